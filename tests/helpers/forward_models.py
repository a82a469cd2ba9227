"""Tiny random models of many architectures, and the oracle that the packed forward is compared with.

The oracle never sees our layout: it feeds each completion alone or in right-padded rows to the model's own forward and
reads the log-probs from the model's own full logits.
"""

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from dpo_peft.forward import Sample
from dpo_peft.model.loading import disable_dropout

VOCAB = 131
WINDOW = 5  # shorter than the samples, so that a window that is ignored shows

# Set where a config has such a field. A large range: with the default of 0.02 a wrong mask hardly moves the logits.
COMMON = dict(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=96,
    moe_intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    num_experts=4,
    num_local_experts=4,
    n_routed_experts=4,
    num_experts_per_tok=2,
    max_position_embeddings=256,
    initializer_range=0.15,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
SLIDING = dict(sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"])
MLA = dict(
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=16,
    head_dim=8,
    num_key_value_heads=4,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=1,
)
# Ministral 3 scales queries by their position, from the fifth one on with these figures.
BY_POSITION = dict(
    rope_type="yarn",
    rope_theta=10000.0,
    factor=16.0,
    beta_fast=32.0,
    beta_slow=1.0,
    mscale=1.0,
    mscale_all_dim=1.0,
    original_max_position_embeddings=4,
    max_position_embeddings=256,
    llama_4_scaling_beta=0.5,
)
GEMMA4 = dict(global_head_dim=32, vocab_size_per_layer_input=VOCAB, hidden_size_per_layer_input=16)

# Architecture -> (name of its config class without Config, options beyond COMMON).
SHARING: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied-bias": ("Llama", dict(tie_word_embeddings=True, attention_bias=True, mlp_bias=True)),
    "mistral": ("Mistral", dict(sliding_window=WINDOW)),
    "ministral": ("Ministral", SLIDING),
    "ministral3": ("Ministral3", dict(sliding_window=WINDOW, rope_parameters=BY_POSITION)),
    "mixtral": ("Mixtral", dict(sliding_window=WINDOW)),
    "qwen2": ("Qwen2", dict(use_sliding_window=True, max_window_layers=1, **SLIDING)),
    "qwen2-moe": ("Qwen2Moe", dict(shared_expert_intermediate_size=32, decoder_sparse_step=1)),
    "qwen3": ("Qwen3", {}),
    "qwen3-moe": ("Qwen3Moe", dict(decoder_sparse_step=1)),
    "phi": ("Phi", dict(num_key_value_heads=4)),
    "phi3": ("Phi3", dict(sliding_window=WINDOW)),
    "gemma": ("Gemma", {}),
    "gemma3": ("Gemma3", dict(final_logit_softcapping=3.0, **SLIDING)),
    "gemma4": ("Gemma4", dict(final_logit_softcapping=3.0, **GEMMA4, **SLIDING)),
    "gemma4-shared-kv": (
        "Gemma4",
        dict(
            GEMMA4,
            num_hidden_layers=4,
            num_kv_shared_layers=2,
            sliding_window=WINDOW,
            layer_types=["sliding_attention", "full_attention"] * 2,
        ),
    ),
    "granite": ("Granite", dict(logits_scaling=2.0, attention_multiplier=0.2, residual_multiplier=0.7)),
    "granitemoe": ("GraniteMoe", dict(logits_scaling=2.0, attention_multiplier=0.2)),
    "olmo": ("Olmo", dict(clip_qkv=1.5)),
    "olmo2": ("Olmo2", {}),
    "olmo3": ("Olmo3", SLIDING),
    "olmoe": ("Olmoe", {}),
    "cohere": ("Cohere", dict(logit_scale=0.25)),
    "cohere2": ("Cohere2", dict(logit_scale=0.25, **SLIDING)),
    "glm": ("Glm", {}),
    "glm4": ("Glm4", {}),
    "glm4-moe": ("Glm4Moe", dict(n_group=1, topk_group=1, first_k_dense_replace=1, n_shared_experts=1)),
    "smollm3": ("SmolLM3", dict(no_rope_layers=[1, 0])),
    "starcoder2": ("Starcoder2", dict(sliding_window=WINDOW)),
    "exaone4": ("Exaone4", SLIDING),
    "helium": ("Helium", {}),
    "hunyuan": ("HunYuanDenseV1", {}),
    "ernie4.5": ("Ernie4_5", {}),
    "seed-oss": ("SeedOss", {}),
    "apertus": ("Apertus", {}),
    "gpt-neox": ("GPTNeoX", {}),
    "gpt2": ("GPT2", dict(n_embd=64, n_inner=96, n_layer=2, n_head=4, n_positions=256)),
    "opt": ("OPT", dict(ffn_dim=96, word_embed_proj_dim=32, init_std=0.15)),
    "deepseek-v3": ("DeepseekV3", MLA),
    "nanochat": ("NanoChat", dict(final_logit_softcapping=3.0)),
    "gemma2": ("Gemma2", SLIDING),  # soft-capped scores
    "gpt-oss": ("GptOss", SLIDING),  # sinks
    "llama4": ("Llama4", dict(attention_chunk_size=WINDOW, intermediate_size_mlp=96, moe_layers=[1])),
    "mamba2": ("Mamba2", dict(head_dim=16, num_heads=8, state_size=8, n_groups=2)),
    "lfm2": ("Lfm2", dict(layer_types=["conv", "full_attention"])),
    "qwen3-next": (
        "Qwen3Next",
        dict(
            layer_types=["linear_attention", "full_attention"],
            linear_num_value_heads=4,
            linear_num_key_heads=2,
            linear_key_head_dim=16,
            linear_value_head_dim=16,
            shared_expert_intermediate_size=32,
        ),
    ),
}

# Architectures that can't share a prompt -> the same, and what the plan's reason must say.
FALLING_BACK: dict[str, tuple[str, dict[str, Any], str]] = {
    "jamba (hybrid)": (
        "Jamba",
        dict(attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False),
        "1 of its layers carry a state that can't be handed on",
    ),
    "recurrent-gemma (hybrid)": (
        "RecurrentGemma",
        dict(num_hidden_layers=3, lru_width=64, attention_window_size=8, logits_soft_cap=3.0),
        "layers",
    ),
    "deepseek-v3.2 (sparse)": (
        "DeepseekV32",
        dict(MLA, index_topk=64, index_n_heads=2, index_head_dim=16),
        "layers of the kind",
    ),
    "qwen2-moe (window by mask only)": (
        "Qwen2Moe",
        dict(
            SLIDING,
            sliding_window=64,
            use_sliding_window=True,
            max_window_layers=1,
            shared_expert_intermediate_size=32,
            decoder_sparse_step=1,
        ),
        "not told the sliding window",
    ),
    "bloom (alibi)": ("Bloom", dict(n_layer=2, n_head=4), "attention interface"),
    "mpt (alibi)": ("Mpt", dict(d_model=64, n_heads=4, n_layers=2, max_seq_len=256), "attention interface"),
    "stablelm (own attention)": ("StableLm", {}, "layers are plain attention"),
}
# PEFT refuses Mamba's fused modules and can't wrap Llama 4's router.
LORA_TARGETS = {"Mamba2": ["in_proj"], "Llama4": ["q_proj", "v_proj", "o_proj"]}


def build(class_name: str, options: dict[str, Any] | None = None, seed: int = 0, dropout: bool = False) -> Any:
    """A random fp32 causal LM of that architecture, in eval mode, without dropout unless asked for."""
    text = class_name + "Text"  # multi-modal families name their language part so
    name = text if hasattr(transformers, text + "Config") else class_name
    config_class = getattr(transformers, name + "Config")
    known = set(config_class().to_dict()) | set(config_class.attribute_map)
    config = config_class(**{k: v for k, v in COMMON.items() if k in known} | (options or {}))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    if not dropout:
        disable_dropout(model)
    return model


def add_lora(model: Any, seed: int = 1, **options: Any) -> PeftModel:
    """LoRA with random, non-zero weights, so that the adapter matters and every one of its weights gets a gradient."""
    target = next((t for name, t in LORA_TARGETS.items() if type(model).__name__.startswith(name)), "all-linear")
    config = LoraConfig(**{**dict(r=4, lora_alpha=8, target_modules=target, task_type="CAUSAL_LM"), **options})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft_model = get_peft_model(model, config)
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.1)
    return peft_model


def random_samples(shape: Sequence[tuple[int, Sequence[int]]], seed: int = 0, vocab: int = VOCAB) -> list[Sample]:
    """Samples of the given (prompt length, completion lengths); token ids from 3 on, rows numbered from 100."""
    generator = torch.Generator().manual_seed(seed)

    def ids(n: int) -> list[int]:
        return torch.randint(3, vocab, (n,), generator=generator).tolist()

    return [Sample(ids(p), [ids(c) for c in completions], 100 + i) for i, (p, completions) in enumerate(shape)]


def own_token_logps(model: nn.Module, samples: Sequence[Sample], pad_left: bool = False) -> list[Tensor]:
    """The oracle: log-probs of each completion's tokens, from the model's own full logits on padded rows."""
    rows = [(list(s.prompt), list(c)) for s in samples for c in s.completions]
    length = max(len(p) + len(c) for p, c in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    starts = [length - len(p) - len(c) if pad_left else 0 for p, c in rows]
    for r, (p, c) in enumerate(rows):
        ids[r, starts[r] : starts[r] + len(p) + len(c)] = torch.tensor(p + c)
        mask[r, starts[r] : starts[r] + len(p) + len(c)] = 1
    logps = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float().log_softmax(-1)
    out = []
    for r, (p, c) in enumerate(rows):
        first = starts[r] + len(p)
        out.append(torch.stack([logps[r, first + t - 1, token] for t, token in enumerate(c)]))
    return out


def adapter_grads(model: nn.Module, logps_C: Tensor) -> dict[str, Tensor]:
    """Gradients of every trained weight from a weighted sum of the completions' log-probs."""
    model.zero_grad()
    weights_C = torch.linspace(-1.0, 1.3, len(logps_C))
    (logps_C * weights_C).sum().backward()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name: p.grad.clone() if p.grad is not None else torch.zeros_like(p) for name, p in trained.items()}


def grad_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest difference of two sets of gradients, relative to the largest element of each weight's gradient."""
    assert a.keys() == b.keys() and a
    return max(float((a[n] - b[n]).abs().max() / b[n].abs().max().clamp(min=1e-12)) for n in b)
