"""What the tests of references share: adapters of every kind, weights as if they had been trained, log-probs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import KasaConfig
from torch import Tensor
from trainer_helpers import lora
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from dpo_peft.forward import Sample, completion_logps, pad_rows
from dpo_peft.model.loading import load_base

SAMPLES = [
    Sample([11, 12, 13, 14], [[21, 22, 23], [31, 32, 33, 34, 35]], 0),
    Sample([15, 16], [[24, 25, 26, 27], [36]], 1),
]
BATCH = pad_rows(SAMPLES)


def tiny_moe() -> Qwen3MoeForCausalLM:
    sizes = dict(hidden_size=32, intermediate_size=32, moe_intermediate_size=32, num_hidden_layers=1)
    heads = dict(num_attention_heads=2, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=64, initializer_range=0.2, **sizes, **heads)).eval()


# Options of the LoRA; "base" and "name" (of the adapter) are taken out.
KINDS: dict[str, dict[str, Any]] = {
    "linear": {},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head", "v_proj"]},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "dora on an embedding": {"use_dora": True, "target_modules": ["embed_tokens", "o_proj"]},
    "dora and rslora": {"use_dora": True, "use_rslora": True},
    "lora_bias": {"lora_bias": True},
    "saved head": {"modules_to_save": ["lm_head"]},
    "saved head and embedding": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "some tokens": {"trainable_token_indices": [11, 21, 36]},
    "some tokens, tied": {"trainable_token_indices": [11, 21], "base": "tied"},
    "saved embedding, tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True, "base": "tied"},
    "embedding, tied": {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True, "base": "tied"},
    "patterns": {"rank_pattern": {"q_proj": 2, "up_proj": 6}, "alpha_pattern": {"q_proj": 3}},
    "some layers": {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]},
    "excluded": {"exclude_modules": ["down_proj"]},
    "called mine": {"name": "mine", "modules_to_save": ["lm_head"]},
    "called reference": {"name": "reference", "use_dora": True},
    "called model": {"name": "model", "trainable_token_indices": [11]},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "random start": {"init_lora_weights": False},
    "mica": {"init_lora_weights": "mica"},
    "kasa": {"kasa_config": KasaConfig()},
    "replicated layers": {"layer_replication": [(0, 2), (1, 2)]},
    "expert weights": {
        "target_modules": ["q_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        "base": "moe",
    },
    "nf4": {"base": "nf4"},
    "nf4, dora and head": {"base": "nf4", "use_dora": True, "modules_to_save": ["lm_head"]},
    "nf4, olora": {"base": "nf4", "init_lora_weights": "olora"},
    "bfloat16": {"base": "bfloat16", "modules_to_save": ["lm_head"], "trainable_token_indices": [11]},
}


def options_of(kind: str) -> tuple[LoraConfig, str, str]:
    """The config, the base and the adapter's name."""
    given = dict(KINDS[kind])
    base, name = given.pop("base", "llama"), given.pop("name", "default")
    return lora(**given), base, name


def build_base(base: str, tiny_llama: Callable[..., Any], folder: str) -> Any:
    if base == "moe":
        return tiny_moe()
    if base == "nf4":
        return load_base(folder, init_kwargs={"dtype": "float32"})
    model = tiny_llama(tie_word_embeddings=base == "tied")
    return model.to(torch.bfloat16) if base == "bfloat16" else model


def perturb(model: Any, size: float = 0.1) -> None:
    """Move every weight of the adapter at random, as if it had been trained."""
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape).to(p) * size)


def policy_logps(model: Any) -> Tensor:
    with torch.no_grad():
        return completion_logps(model.eval(), BATCH).logps_C


def named(model: Any, adapter: str) -> dict[str, Tensor]:
    """Tensors of an adapter found by its name alone, as an oracle for `adapter_tensors`; copies."""
    found = {}
    for kind in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)):
        for name, tensor in kind:
            parts = name.removeprefix("base_model.model.").split(".")
            last = max((i for i, part in enumerate(parts) if part == adapter), default=0)
            if last > 0:
                found[".".join(parts[:last] + parts[last + 1 :])] = tensor.detach().clone()
    return found


def train(model: Any, steps: int = 3) -> None:
    """A few steps that push the first completion of each pair up and the second down."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1e-3)
    for _ in range(steps):
        chosen, rejected = completion_logps(model.train(), BATCH).logps_C.view(2, 2).unbind(1)
        (rejected - chosen).sum().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 10.0)
        optimizer.step()
        optimizer.zero_grad()


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def without_repacking(model: PeftModel) -> PeftModel:
    """bitsandbytes kept from repacking, as everywhere here."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


OTHERS: dict[str, dict[str, Any]] = {
    "another rank": {"r": 2, "target_modules": ["q_proj", "up_proj"]},
    "embedding": {"target_modules": ["embed_tokens", "v_proj"]},
    "dora": {"use_dora": True, "use_rslora": True, "target_modules": ["o_proj"]},
    "saved head": {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]},
    "some tokens": {"trainable_token_indices": [12, 22], "target_modules": ["k_proj"]},
}


def saved(model: Any, config: LoraConfig, folder: Path) -> str:
    """The folder of an adapter of this kind, its weights at random."""
    model = get_peft_model(model, config)
    perturb(model, 0.2)
    model.save_pretrained(folder)
    return str(folder)
