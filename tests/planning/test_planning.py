"""The memory planner: hand-worked bytes, real bytes of loaded models, real saved tensors, and plans within limits.

Symbols as in memory.py: T tokens, S keys, P predicted tokens.
"""

import random
from typing import Any

import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from trainer_helpers import lora as lora_config
from transformers import (
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    Lfm2Config,
    LlamaConfig,
    MixtralConfig,
    Phi3Config,
    PhiConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    T5Config,
    set_seed,
)
from varlen_kernel import flash_kernel

from dpo_peft import OptionError
from dpo_peft.forward import Sample, attention, completion_logps, pack, plan_forward
from dpo_peft.fused import attention as fused_attention
from dpo_peft.fused.recognition import fused_decoder
from dpo_peft.model.loading import attach_adapter, load_base, storage_report
from dpo_peft.planning import GIB, PRESETS, RESERVE, Lora, MemoryModel, Shape, Sketch, checkpoints_for, plan, plan_step
from dpo_peft.planning.memory import HEAD_PHASE, LAYER_PHASE, MARGIN
from dpo_peft.planning.shapes import NotPlainError
from dpo_peft.planning.sketch import nf4_bytes
from dpo_peft.planning.steps import MicroBatch, Pace, StepPlan
from dpo_peft.training.packing import size_of

TINY = Shape.llama(hidden=8, intermediate=16, layers=3, heads=2, kv_heads=1, vocab=32)
SMALL = dict(
    vocab_size=320,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)


# ---- By hand --------------------------------------------------------------------------------------------------------


def test_components_by_hand() -> None:
    """Hidden 8 = width of 2 query heads of 4, one key head of 4, MLP 16, 3 layers, vocabulary 32; LoRA of rank 2.

    A layer's weights: q 8*8 = 64, k and v 4*8 = 32 each, o 64, gate, up and down 16*8 = 128 each.
    NF4 of 64 weights: 32 bytes, 1 block -> 1 scale and 1 scale of scales (4), tables 64 + 1024 + 4: 1129.
      of 32: 16 + 1 + 4 + 1092 = 1113. of 128: 64 + 2 + 4 + 1092 = 1162. A layer: 2*1129 + 2*1113 + 3*1162 = 7970.
    Not quantized: embedding and head 2*32*8 = 512, norms 3*2*8 + 8 = 56: 568 weights, 1136 bytes.
    Trained, rank * (inputs + outputs): q 32, k 24, v 24, o 32, gate 48, up 48, down 48 = 256 a layer, 768.
      float32: 3072; AdamW's two moments 6144; gradients 3072.
    Copy that computes: ranks of a group, rounded up to 8: all four 8. 8 * (inputs + outputs of the group):
      8*(8+16) + 8*(8+8) + 8*(8+32) + 8*(16+8) = 832 a layer; in 2 bytes, 3 layers: 4992.

    T = 10, S = 14, P = 6. A layer keeps q and attention's output 2*2*10*8 = 320, log-sum-exp 4*10*2 = 80, keys and
      values 2*2*14*4 = 224, input and residual 2*2*10*8 = 320, gate and up 2*10*32 = 640: 1584. Its input is 160.
    Saved, 1 layer checkpointed: 160 + 2*1584 = 3328. All 3, one of them recomputed: 2*160 + 1584 = 1904.
    Backward of one layer, the attention kernel: gradients of output and residual 2*2*10*8 = 320, of o and q 320, of q
      in float32 4*10*8 = 320, of keys and values for each query head and each key head 2*2*14*(8+4) = 672: 1632.
    Largest dequantized group with ranks: gate and up, 32 * (8+8), in 2 bytes: 1024.
    Head: 6 rows (fewer than 1024) of 32 logits in 2 bytes: 384; three (6, 8) of hidden states: 288. 672 in all.
    Indices: 8*(8*10 + 14 + 3*6) = 896; cos and sin 2*2*10*4 = 160; log-probs 16*6 = 96: 1152.
    """
    model = MemoryModel.of_shape(TINY, Lora.of(TINY, rank=2))
    fixed = {
        "quantized_weights": 3 * 7970,
        "unquantized_weights": 1136,
        "adapter": 3072,
        "adapter_working_copy": 4992,
        "optimizer_state": 6144,
        "gradients": 3072,
        "reference_adapter": 0,
    }
    batch = {"layer_backward": 1632, "dequantized_weights": 1024, "head": 672, "index_tensors": 1152}
    assert model.components(10, 14, 6, 1) == {**fixed, "saved_activations": 3328, **batch}
    assert model.components(10, 14, 6, 3) == {**fixed, "saved_activations": 1904, **batch}
    # The head is done before the layer's backward begins, and smaller.
    assert model.peak(10, 14, 6, 1) == sum(fixed.values()) + 3328 + 1632 + 1024 + 1152
    assert list(model.layer.phases(10, 14).values()) == [320 + 480, 320 + 640, 320 + 640, 1632, 320 + 640 + 320]


def test_other_settings_by_hand() -> None:
    """The same model. 768 weights are three blocks of 256 with two float32 scales each in 8-bit AdamW."""
    adapter = Lora.of(TINY, rank=2)
    plain = MemoryModel.of_shape(TINY, adapter, quantize=False)
    assert (plain.quantized, plain.unquantized) == (0, 2 * (568 + 3 * 576))
    eight_bit = MemoryModel.of_shape(TINY, adapter, optimizer="paged_adamw_8bit")
    assert eight_bit.fixed["optimizer_state"] == 768 * 2 + 2 * 4 * 3
    with_copy = MemoryModel.of_shape(TINY, adapter, reference=Lora.of(TINY, rank=1))
    assert with_copy.fixed["reference_adapter"] == 4 * 384
    chunked = MemoryModel.of_shape(TINY, adapter, chunk_rows=4)
    assert chunked.components(10, 14, 6, 0)["head"] == 4 * 32 * 2 + 288
    with_norms = Shape.llama(8, 16, 3, 2, 1, 32, qk_norm=True)
    more = MemoryModel.of_shape(with_norms, adapter).components(10, 14, 6, 0)["saved_activations"]
    assert more - 3 * 1584 == 3 * 2 * 10 * 16  # what norms on q and k read


@pytest.mark.parametrize("optimizer", ["adamw", "galore_adamw", ""])
def test_unknown_optimizer(optimizer: str) -> None:
    with pytest.raises(OptionError, match=f"optim='{optimizer}'.*adamw_torch_fused"):
        _ = MemoryModel.of_shape(TINY, optimizer=optimizer).fixed


# ---- Against real bytes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("shape", [(64, 64), (252, 123), (1, 3), (507, 129), (256, 256), (320, 1024)])
def test_nf4_bytes_are_those_of_bitsandbytes(shape: tuple[int, int], nested: bool) -> None:
    weight, state = quantize_4bit(torch.randn(shape), quant_type="nf4", compress_statistics=nested)
    tensors = [weight, state.absmax, state.code]
    tensors += [state.offset, state.state2.absmax, state.state2.code] if nested else []
    assert nf4_bytes(shape[0] * shape[1], nested) == sum(t.nbytes for t in tensors)


CONFIGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, {"tie_word_embeddings": False}),
    "llama, tied": (LlamaConfig, {"tie_word_embeddings": True}),
    "llama, large heads": (LlamaConfig, {"head_dim": 32}),
    "qwen2, biases": (Qwen2Config, {}),
    "qwen3, norms on heads": (Qwen3Config, {"head_dim": 16}),
    "gemma": (GemmaConfig, {"head_dim": 16}),
    "phi3, fused linears": (Phi3Config, {}),
    "phi, no gate": (PhiConfig, {}),
}


def load(config: Any, folder: Any, **adapter: Any) -> Any:
    """The model of a config with random weights, loaded in NF4, with a LoRA adapter."""
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return attach_adapter(load_base(str(folder)), lora_config(**adapter))[0]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", CONFIGS)
def test_bytes_are_those_of_the_loaded_model(name: str, tmp_path: Any) -> None:
    kind, changed = CONFIGS[name]
    config = kind(**{**SMALL, **changed})
    model = load(config, tmp_path)
    real = storage_report(model)
    shape = Shape.of(config)
    predicted = MemoryModel.of_shape(shape, Lora.of(shape, rank=4))
    in_16_bits = sum(p.numel() for p in model.get_base_model().parameters() if p.dtype == torch.bfloat16)
    assert shape.unquantized_weights == in_16_bits
    assert (predicted.quantized, predicted.unquantized) == (real.quantized, real.unquantized)
    assert predicted.trained == real.trainable_count
    assert MemoryModel.of_model(model, real) == predicted


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "down_proj"], "r": 3},
        {"target_modules": ["up_proj", "lm_head"]},
        {"target_modules": ["v_proj", "embed_tokens"]},
        {"target_modules": r".*layers\.1\..*_proj"},
        {"use_dora": True},
        {"rank_pattern": {"q_proj": 9}},
        {"modules_to_save": ["lm_head", "embed_tokens"]},
    ],
)
def test_adapters_of_other_kinds(tmp_path: Any, options: dict[str, Any]) -> None:
    config = LlamaConfig(**SMALL, tie_word_embeddings=False)
    real = storage_report(load(config, tmp_path, **options))
    sketch = Sketch(config, lora_config(**options))
    assert sketch.trained == real.trainable_count
    plain = Lora.read(Shape.of(config), lora_config(**options))
    assert (plain is not None) is (options.keys() <= {"target_modules", "r"} and "down_proj" in str(options))
    if plain is not None:
        assert plain.weights(Shape.of(config)) == real.trainable_count


def test_of_model_reads_ranks_and_the_reference(tmp_path: Any) -> None:
    config = LlamaConfig(**SMALL, tie_word_embeddings=False)
    model = load(config, tmp_path, rank_pattern={"up_proj": 6}, target_modules=["up_proj", "o_proj"])
    memory = MemoryModel.of_model(model, storage_report(model), optimizer="sgd")
    assert memory.lora == Lora({"o_proj": 4, "up_proj": 6})
    assert memory.optimizer == "sgd"
    model.add_adapter("frozen", lora_config(target_modules=["up_proj", "o_proj"]))
    stored = storage_report(model, reference="frozen")
    assert MemoryModel.of_model(model, stored).reference == 4 * Lora({"o_proj": 4, "up_proj": 4}).weights(memory.shape)
    own = MemoryModel.of_model(model, stored, fused=False)
    assert (own.ranks, own.trained) == ([4, 6], memory.trained)
    assert own.shape.trained == memory.trained


def test_presets_are_the_shapes_of_their_configs() -> None:
    wide = dict(tie_word_embeddings=False, num_key_value_heads=8)
    llama = LlamaConfig(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, vocab_size=128256, **wide)
    qwen = Qwen3Config(
        hidden_size=5120,
        intermediate_size=17408,
        num_hidden_layers=40,
        num_attention_heads=40,
        vocab_size=151936,
        head_dim=128,
        **wide,
    )
    assert Shape.of(llama) == PRESETS["8b"][1]
    assert Shape.of(qwen) == PRESETS["14b"][1]
    published = {
        "1b": 1.24,
        "3b": 3.21,
        "7b": 6.74,
        "8b": 8.03,
        "13b": 13.02,
        "14b": 14.77,
        "32b": 32.76,
        "70b": 70.55,
    }
    for size, billions in published.items():
        assert round(PRESETS[size][1].weights / 1e9, 2) == billions, size
    assert round(PRESETS["405b"][1].weights / 1e9, 1) == 405.9  # 405.85


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64), "no linear layer"),
        (MixtralConfig(**SMALL, num_local_experts=2), "its layers hold"),
        (Lfm2Config(**SMALL, layer_types=["conv", "conv", "full_attention"]), "its layers hold"),
    ],
    ids=["gpt2", "mixtral", "lfm2"],
)
def test_what_is_no_plain_decoder_is_sketched(config: Any, reason: str) -> None:
    with pytest.raises(NotPlainError, match=reason):
        Shape.of(config)
    assert MemoryModel.of_sketch(Sketch(config, lora_config())).peak(100, 150, 70, 0) > 0


@pytest.mark.parametrize("config", [T5Config(d_model=32, num_layers=1, vocab_size=64), PretrainedConfig()])
def test_what_is_no_causal_lm_is_refused(config: Any) -> None:
    with pytest.raises(OptionError, match="can't be predicted: it can't be built from its config.*--shape"):
        Sketch(config, lora_config())


def test_a_shape_leaves_its_config_alone() -> None:
    config = LlamaConfig(**SMALL)
    before = config.to_dict()
    Shape.of(config)
    assert config.to_dict() == before


def test_a_name_that_no_layer_has_is_refused() -> None:
    config = LlamaConfig(**SMALL)
    with pytest.raises(OptionError, match="lora_target_modules: 'w1' is not one of .*q_proj"):
        _ = Sketch(config, lora_config(target_modules=["q_proj", "w1"])).trained


# ---- Against the tensors that autograd really saves -----------------------------------------------------------------


def bytes_saved(model: Any, backend: Any, batch: Any) -> int:
    """Bytes of the distinct tensors that a forward pass keeps for its backward, the model's own weights left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, torch.Tensor] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            scores = completion_logps(model, batch, backend)
    size = sum(tensor.untyped_storage().nbytes() for tensor in storages.values())
    scores.logps_C.sum().backward()  # tensors live until here, so that no storage is used twice
    return size


def bytes_per_layer(tmp_path: Any, fused: bool, checkpointed: bool = False) -> tuple[float, MemoryModel]:
    """What one more layer keeps, for 240 tokens in one sample; on the CPU attention reads keys where they are."""
    set_seed(0)
    sizes = []
    batch = pack([Sample(list(range(100)), [list(range(60)), list(range(80))])])
    changed = dict(hidden_size=128, intermediate_size=320, num_key_value_heads=4, tie_word_embeddings=False)
    for layers in (2, 3):
        config = LlamaConfig(**{**SMALL, **changed, "num_hidden_layers": layers})
        model = load(config, tmp_path / str(layers), r=16)
        model.train()
        backend = plan_forward(model, True, torch.bfloat16, fused=fused).scorer
        if checkpointed:
            backend.checkpointed = lambda batch, layers=layers: (layers, 0)
        sizes.append(bytes_saved(model, backend, batch))
    shape = Shape.of(config)
    if not fused:
        return sizes[1] - sizes[0], MemoryModel.of_sketch(Sketch(config, lora_config(r=16), row=240), fused=False)
    return sizes[1] - sizes[0], MemoryModel.of_shape(shape, Lora.of(shape, rank=16))


def test_fused_layers_keep_what_is_predicted(tmp_path: Any) -> None:
    """Beside that the CPU's attention keeps its mask, 240 x 240 in 2 bytes, and copies its output (T, Q)."""
    measured, model = bytes_per_layer(tmp_path, fused=True)
    parts = [model.components(240, 240, 140, checkpoint)["saved_activations"] for checkpoint in (0, 1)]
    kept = parts[0] - parts[1] + 2 * 240 * 128
    assert measured == pytest.approx(kept + 2 * 240 * 240 + 2 * 240 * 128, rel=0.01)
    checkpointed, _ = bytes_per_layer(tmp_path, fused=True, checkpointed=True)
    assert checkpointed == 2 * 240 * 128


def test_layers_keep_what_is_predicted_with_kernels_for_attention(tmp_path: Any, monkeypatch: Any) -> None:
    """Everything, their input, or with it what attention gave: within 3 %, of one more layer."""
    monkeypatch.setattr(attention, "varlen_kernel", flash_kernel)
    batch = pack([Sample(list(range(100)), [list(range(60)), list(range(80))])])
    size, found, shape = (240, 440, 140), dict[tuple[int, int], list[int]](), None
    for layers in (2, 3):
        set_seed(0)
        config = LlamaConfig(**{**SMALL, **WIDE, "num_key_value_heads": 2, "num_hidden_layers": layers})
        model = load(config, tmp_path / str(layers), r=16)
        model.train()
        decoder = fused_decoder(model.get_base_model(), torch.bfloat16, "varlen")
        for keeping in [(0, 0), (1, 0), (1, 1)]:
            decoder.checkpointed = lambda batch, n=layers, each=keeping: (n * each[0], n * each[1])
            with monkeypatch.context() as patch:
                patch.setattr(fused_attention, "saved_tensors_hooks", noted := Noted())
                found.setdefault(keeping, []).append(bytes_saved(model, decoder, batch) + noted.size)
        shape = Shape.of(config)
    layer = MemoryModel.of_shape(shape).layer
    predicted = {(0, 0): layer.kept(*size[:2]), (1, 0): 2 * 240 * 128}
    predicted[1, 1] = predicted[1, 0] + layer.attended(240)
    for keeping, (two, three) in found.items():
        assert three - two == pytest.approx(predicted[keeping], rel=0.03)
    model_of = MemoryModel.of_shape(shape)
    saved = [model_of.components(*size, 2, attended=n)["saved_activations"] for n in (0, 2)]
    assert saved[1] - saved[0] == 2 * (predicted[1, 1] - predicted[1, 0])


class Noted:
    """`saved_tensors_hooks` that add up the bytes of what is kept: inner hooks hide it from outer ones."""

    size = 0

    def __call__(self, pack: Any, unpack: Any) -> Any:
        def noting(tensor: torch.Tensor) -> Any:
            kept = pack(tensor)
            self.size += kept.nbytes if isinstance(kept, torch.Tensor) else 0
            return kept

        return torch.autograd.graph.saved_tensors_hooks(noting, unpack)


@pytest.mark.parametrize(("pairs", "attends"), [((2, 3000, 250), True), ((8, 190, 300), False)])
def test_what_is_kept_saves_most_time(pairs: tuple[int, int, int], attends: bool) -> None:
    """No other choice of the 8B shape that fits within 12 GiB computes less twice, and with long prompts keeping what
    attention gave is worth more than keeping a few layers whole. By hand: 4 FLOPs for each score and number of the
    queries, at half the rate of products, which do 2 for each weight."""
    number, prompt, answer = pairs
    size = tuple(number * n for n in (prompt + 2 * answer, 3 * prompt + 2 * answer, 2 * answer))
    scores, limit = number * (prompt**2 / 2 + 2 * answer * (prompt + answer / 2)), 12 * GIB

    def work(layers: int, attended: int) -> float:
        of_attention = 2 * 4 * scores * 4096 / (2 * 218103808)
        return 0.73 * layers * size[0] + (layers - attended) * of_attention

    choices = [(n, m) for n in range(33) for m in range(n + 1)]
    fitting = [one for one in choices if EIGHT.peak(*size, one[0], attended=one[1]) <= limit]
    best = min(fitting, key=lambda one: work(*one))
    assert checkpoints_for(EIGHT, *size, limit, scores=scores) == best
    assert (best[1] > best[0] / 2) is attends
    assert checkpoints_for(EIGHT, *size, limit) == (fitting[0][0], 0)
    assert checkpoints_for(EIGHT, *size, 80 * GIB, scores=scores) == (0, 0)
    assert checkpoints_for(EIGHT, *size, 0, scores=scores) == (32, 0)


def test_plain_layers_keep_what_is_predicted(tmp_path: Any) -> None:
    """Beside that, the mask of the CPU's attention. The prediction has a margin of 3 %."""
    measured, model = bytes_per_layer(tmp_path, fused=False)
    parts = [model.components(240, 240, 140, checkpoint)["saved_activations"] for checkpoint in (0, 1)]
    kept = (parts[0] - parts[1]) / MARGIN + 2 * 240 * 128
    assert measured == pytest.approx(kept + 2 * 240 * 240, rel=0.12)


# ---- Adapters that act on less --------------------------------------------------------------------------------------

LINEAR = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
WIDE = dict(hidden_size=128, intermediate_size=320, num_key_value_heads=4, tie_word_embeddings=False)


def scoped(tmp_path: Any, prompt: int, layers: int = 4, **adapter: Any) -> tuple[int, MemoryModel, dict[str, int]]:
    """Bytes that a pass keeps, what predicts them, and the sizes of the batch."""
    set_seed(0)
    ids = [1 + i % 300 for i in range(prompt)]
    start = prompt - 2 if "alora_invocation_tokens" in adapter else None
    one = Sample(ids, [list(range(60)), list(range(80))], adapter_start=start)
    config = LlamaConfig(**{**SMALL, **WIDE, "num_hidden_layers": layers})
    model = load(config, tmp_path / f"{layers} {prompt}", r=16, target_modules=LINEAR, **adapter)
    model.train()
    decoder = plan_forward(model, True, torch.bfloat16).fused
    batch = pack([one])
    row: dict[str, Any] = {"prompt_ids": ids, "completion_ids": one.completions}
    size = size_of(row if start is None else {**row, "adapter_start": start}, shared=True)
    assert size.tokens == batch.input_ids.numel() and size.keys == len(batch.kv_index)
    assert size.given == (start or 0) and size.predicted == len(batch.target)
    memory = MemoryModel.of_model(model, storage_report(model), fused=True)
    counted = {name: n for name, n in size._asdict().items() if name != "scores"}
    return bytes_saved(model, decoder, batch), memory, counted


def predicted(memory: MemoryModel, size: dict[str, int]) -> float:
    return memory.components(**size, checkpoint_layers=0)["saved_activations"]


def test_layers_below_the_first_adapter_keep_nothing(tmp_path: Any) -> None:
    upper, memory, size = scoped(tmp_path, 100, layers_to_transform=[2, 3])
    two, other, same = scoped(tmp_path, 100, layers=2)
    assert memory.first == 2 and other.first == 0 and size == same
    assert upper == pytest.approx(two, rel=1e-3)
    assert predicted(memory, size) == predicted(other, size)
    all_four, full, _ = scoped(tmp_path, 100)
    assert all_four > 1.8 * upper and predicted(full, size) == pytest.approx(2 * predicted(memory, size))


def test_of_prompts_that_are_left_to_the_base_only_keys_and_values_are_kept(tmp_path: Any) -> None:
    """A longer prompt adds to each layer what its queries read of it, and on a CPU its mask."""
    answers: dict[str, Any] = {"alora_invocation_tokens": [7, 8]}
    short, memory, size = scoped(tmp_path, 100, **answers)
    long, _, longer = scoped(tmp_path, 300, **answers)
    kv, queries = 2 * 2 * 128, 60 + 80 + 2 * 2  # bytes of a token's key and value
    masks = 4 * 200 * queries * 2  # and one of truth values, and indices
    assert long - short - masks == pytest.approx(4 * 200 * kv, rel=0.15)
    # Where keys are gathered, each completion has a copy of them.
    assert predicted(memory, longer) - predicted(memory, size) == 4 * 2 * 200 * kv
    (whole, full, of_100), (grown, _, of_300) = scoped(tmp_path, 100), scoped(tmp_path, 300)
    assert grown - whole > 3 * (long - short)
    assert predicted(full, of_300) - predicted(full, of_100) > 3 * (
        predicted(memory, longer) - predicted(memory, size)
    )
    # Checkpointed layers keep the prompts' keys and values once, and of the completions the layer's input.
    all_of_them = [memory.components(**one, checkpoint_layers=4)["saved_activations"] for one in (size, longer)]
    assert all_of_them[1] - all_of_them[0] == pytest.approx(4 * 200 * kv + 2 * 200 * kv, rel=1e-6)


def test_a_plan_counts_adapters_that_act_on_less_as_training_does() -> None:
    """Prompts of 3,000, pairs of 250: of a sample 3,000 tokens pass once, 500 three times; below layer 16 all once.

    In tokens of a forward pass: 3 * 3,500; 3,000 + 3 * 500; 3,500 / 2 + 3 * 3,500 / 2; 3,000 + (500 + 3 * 500) / 2.
    """
    lengths = {"prompt_tokens": 3000, "answer_tokens": 250, "per_device_train_batch_size": 1}
    work = {
        (): 3 * 3500,
        (("adapter_scope", "completions"),): 3000 + 3 * 500,
        (("lora_layers_to_transform", "0.5"),): (3500 + 3 * 3500) / 2,
        (("adapter_scope", "completions"), ("lora_layers_to_transform", "0.5")): 3000 + (500 + 3 * 500) / 2,
    }
    peaks = []
    for options, tokens in work.items():
        found = plan(shape="8b", gpu="80GB", **lengths, **dict(options))
        model, given = found.model, 3000 * ("adapter_scope" in dict(options))
        size = {"tokens": 3500, "keys": 9500, "predicted": 500, "given": given, "checkpoint_layers": 0, "attended": 0}
        assert {**found.figures["micro_batch"], "samples": 1} == {"samples": 1, **size}
        assert found.figures["components"] == model.components(**size)
        assert model.first == 16 * ("lora_layers_to_transform" in dict(options))
        assert model.trained == 41943040 // (1 + (model.first > 0))
        peaks.append(found.figures["peak"])
        one = MicroBatch((0,), 3500, 9500, 500, given, 0, 0, 0.0, 0.0)
        head = 3 * 2 * 500 * 128256 * 4096
        seconds = Pace(1e12, 1).seconds(StepPlan((one,), 0.0, True), model, 1)
        assert seconds == pytest.approx((tokens * 2 * 32 * 218103808 + head) / 1e12)
    assert peaks[0] > peaks[2] > peaks[1] > peaks[3]


# ---- Against what was measured on GPUs ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "layers", "fused", "measured"),
    [
        (6300, 32, False, 12.0),  # 8 pairs, packed with shared prompts, the model's own layers, H100
        pytest.param(6300, 16, False, 29.6, marks=pytest.mark.slow),
        pytest.param(6300, 0, False, 47.1, marks=pytest.mark.slow),
        (12400, 80, True, 59.6),  # 70B
        (20000, 80, True, 73.7),
    ],
)
def test_peaks_of_the_prototype(tokens: int, layers: int, fused: bool, measured: float) -> None:
    """GiB that a prototype with other element-wise kernels took: only the size is to agree."""
    shape = PRESETS["70b" if layers == 80 else "8b"][1]
    plain = Sketch(shape.config(), lora_config(r=16))
    model = MemoryModel.of_shape(shape) if fused else MemoryModel.of_sketch(plain, fused=False)
    peak = model.peak(tokens, 1.5 * tokens, 0.75 * tokens, layers)
    assert peak / GIB == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize(
    ("size", "gib", "none", "half", "full"),
    [("8b", 24, 5700, 10000, 35000), ("8b", 80, 24000, 42000, 144000), ("70b", 80, 2800, 5000, 23000)],
)
def test_tokens_near_earlier_estimates(size: str, gib: int, none: int, half: int, full: int) -> None:
    """Estimates made before there were fused layers, with 8-bit Adam."""
    model = MemoryModel.of_shape(PRESETS[size][1], optimizer="adamw_8bit")
    layers = model.shape.layers
    found = [model.largest_tokens(0.98 * gib * GIB - RESERVE, n) for n in (0, layers // 2, layers)]
    assert found == [pytest.approx(expected, rel=0.3) for expected in (none, half, full)]


def test_what_must_fit() -> None:
    big, small = (MemoryModel.of_shape(PRESETS[size][1]) for size in ("70b", "8b"))
    assert big.largest_tokens(79.1 * GIB - RESERVE, 80) >= 20000
    assert small.largest_tokens(23.5 * GIB - RESERVE, 32) >= 16000
    assert big.largest_tokens(24 * GIB, 80) == 0  # its weights alone are larger


# ---- Properties -----------------------------------------------------------------------------------------------------


def draws(number: int, seed: int = 0) -> list[tuple[MemoryModel, int, int, int, float]]:
    """Models, batch sizes and limits from far too small to ample."""
    draw = random.Random(seed)
    found = []
    for _ in range(number):
        shape = PRESETS[draw.choice(["1b", "8b", "14b"])][1]
        model = MemoryModel.of_shape(shape, Lora.of(shape, draw.choice([4, 16, 64])))
        prompt, answers = draw.randint(1, 8000), draw.randint(2, 8000)
        size = (prompt + answers, 3 * prompt + answers, answers)
        low, high = model.peak(*size, shape.layers), model.peak(*size, 0)
        found.append((model, *size, low + (high - low) * draw.uniform(-0.3, 1.3)))
    return found


@pytest.mark.parametrize("case", draws(60), ids=lambda case: "")
def test_the_fewest_layers_that_fit(case: tuple) -> None:
    fits_as_predicted(*case)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("fused", [True, False])
def test_the_fewest_layers_that_fit_of_another_family(fused: bool) -> None:
    """Layers that differ: the fused ones of such a family are checkpointed one by one too, its own all or none."""
    config = Gemma3TextConfig(**SMALL, head_dim=16, layer_types=["sliding_attention"] * 2 + ["full_attention"])
    model = MemoryModel.of_sketch(Sketch(config, lora_config()), fused=fused)
    for prompt, completions, share in [(100, 200, 0.55), (2000, 60, -0.2), (30, 4000, 1.2), (5, 9, 0.9)]:
        size = prompt + completions, 3 * prompt + completions, completions
        low, high = model.peak(*size, 3), model.peak(*size, 0)
        fits_as_predicted(model, *size, low + (high - low) * share)


def fits_as_predicted(model: MemoryModel, *case: float) -> None:
    """Checks how many layers are checkpointed, and the most tokens, against the peaks of all choices."""
    *size, limit = case
    layers = model.checkpoint_layers_for(*size, limit)
    peaks = [model.peak(*size, n) for n in range(model.shape.layers + 1)]
    assert peaks == sorted(peaks, reverse=True)
    fitting = [n for n, peak in enumerate(peaks) if peak <= limit and (model.fused or n in (0, len(peaks) - 1))]
    assert layers == (fitting[0] if fitting else model.shape.layers)
    more = [model.checkpoint_layers_for(*(factor * n for n in size), limit) for factor in (1, 1.2, 2, 5)]
    assert more == sorted(more)
    parts = model.components(*size, layers)
    head, layer = (sum(parts[name] for name in names) for names in (HEAD_PHASE, LAYER_PHASE))
    assert peaks[layers] == pytest.approx(sum(parts.values()) - min(head, layer))
    for n in (0, model.shape.layers):
        most = model.largest_tokens(limit, n)
        assert most == 0 or model.peak(most, 1.5 * most, 0.75 * most, n) <= limit
        assert model.peak(most + 1, 1.5 * (most + 1), 0.75 * (most + 1), n) > limit


def test_the_longest_row_fits_however_it_is_split() -> None:
    model = MemoryModel.of_shape(PRESETS["8b"][1])
    limit = 12 * GIB
    row = model.longest_row(limit, 32)
    peaks = []
    for prompt in range(0, row, row // 20):
        answer = row - prompt
        peaks.append(model.peak(prompt + 2 * answer, 3 * prompt + 2 * answer, 2 * answer, 32))
    assert max(peaks) <= limit
    assert model.peak(2 * (row + 1), 2 * (row + 1), 2 * (row + 1), 32) > limit  # all answer is the worst here
    assert model.longest_row(limit, 32, answers=4) < row


# ---- Steps ----------------------------------------------------------------------------------------------------------

EIGHT = MemoryModel.of_shape(PRESETS["8b"][1])


def pairs(number: int, seed: int = 0, longest: int = 900) -> list[tuple[int, int, int]]:
    draw = random.Random(seed)
    lengths = [[draw.randint(2, longest) for _ in range(3)] for _ in range(number)]
    return [(p + a + b, 3 * p + a + b, a + b) for p, a, b in lengths]


@pytest.mark.parametrize("gib", [9, 12, 24, 80])
@pytest.mark.parametrize("number", [1, 7, 64])
def test_every_sample_stands_in_one_micro_batch_that_fits(number: int, gib: int) -> None:
    samples, limit = pairs(number), gib * GIB
    plan = plan_step(samples, EIGHT, limit)
    assert sorted(i for batch in plan.micro_batches for i in batch.samples) == list(range(number))
    assert plan.fits
    for batch in plan.micro_batches:
        size = tuple(sum(samples[i][k] for i in batch.samples) for k in range(3))
        assert (batch.tokens, batch.keys, batch.predicted) == size
        assert batch.peak == EIGHT.peak(*size, batch.checkpoint_layers) <= limit
        assert batch.checkpoint_layers == EIGHT.checkpoint_layers_for(*size, limit)
    tokens = [batch.tokens for batch in plan.micro_batches]
    assert tokens == sorted(tokens, reverse=True) and plan.max_tokens == tokens[0]
    assert plan == plan_step(samples, EIGHT, limit)


def test_the_cost_by_hand() -> None:
    """Ample memory: one micro-batch, nothing repeated; 3 passes over the weights, 2 without a reference, and a pass
    over 1,000 tokens takes as long as one over 4,000.

    Where both of two equal samples fit at 8 of 32 layers checkpointed and each alone without: together the cost is
    400 * (3 + 0.73 * 8/32) + 0.73 * 8/32 * T, apart 2 * 3 * 400 if 3,000 tokens are no fewer than make a pass longer.
    """
    sample = (800, 1200, 600)
    assert plan_step([sample] * 5, EIGHT, 80 * GIB).cost == 3 * 400
    assert plan_step([sample] * 5, EIGHT, 80 * GIB, reference_passes=0).cost == 2 * 400
    assert plan_step([(1000, 1500, 700)], EIGHT, 80 * GIB).cost == 3 * (4000 - 1000)
    sample = (3000, 4500, 2250)
    limit = EIGHT.peak(6000, 9000, 4500, 8)
    together = plan_step([sample] * 2, EIGHT, limit)
    assert [batch.checkpoint_layers for batch in together.micro_batches] == [8]
    assert together.cost == pytest.approx(400 * (3 + 0.73 / 4) + 0.73 / 4 * 6000)
    apart = plan_step([sample] * 2, EIGHT, limit, pass_tokens=10, least_tokens=0)
    assert [batch.checkpoint_layers for batch in apart.micro_batches] == [0, 0]
    assert apart.cost == 2 * 3 * 10


@pytest.mark.parametrize("pass_tokens", [0, 100, 1100, 1e6])
def test_no_number_of_even_micro_batches_is_cheaper(pass_tokens: float) -> None:
    """Equal samples: every number of micro-batches has one even spread, so all can be tried."""
    sample, number, limit = (800, 1200, 600), 24, 14 * GIB
    costs = []
    for n in range(1, number + 1):
        sizes = [(number + n - 1 - i) // n for i in range(n)]
        cost = 0.0
        for size in sizes:
            batch = tuple(size * x for x in sample)
            layers = EIGHT.checkpoint_layers_for(*batch, limit)
            fits = EIGHT.peak(*batch, layers) <= limit
            repeated = 0.73 * layers / 32
            cost += pass_tokens * (3 + repeated) + repeated * batch[0] if fits else float("inf")
        costs.append(cost)
    plan = plan_step([sample] * number, EIGHT, limit, pass_tokens=pass_tokens, least_tokens=0)
    assert plan.cost == pytest.approx(min(costs))


def test_a_token_budget_holds_beside_the_limit() -> None:
    samples = pairs(40)
    plan = plan_step(samples, EIGHT, 80 * GIB, max_tokens=2000)
    assert sorted(i for batch in plan.micro_batches for i in batch.samples) == list(range(40))
    assert all(batch.tokens <= 2000 or len(batch.samples) == 1 for batch in plan.micro_batches)
    assert len(plan.micro_batches) > len(plan_step(samples, EIGHT, 80 * GIB).micro_batches)


def test_a_sample_that_does_not_fit_stands_alone() -> None:
    samples = [*pairs(6), (200000, 600000, 1000), *pairs(6, seed=1)]
    plan = plan_step(samples, EIGHT, 16 * GIB)
    assert not plan.fits
    assert [batch.samples for batch in plan.micro_batches if batch.peak > 16 * GIB] == [(6,)]
    assert plan.micro_batches[0].checkpoint_layers == 32
    assert sorted(i for batch in plan.micro_batches for i in batch.samples) == list(range(13))
    assert plan_step([], EIGHT, GIB).micro_batches == ()
