"""Fingerprints of tensors and of a base change with whatever decides the log-probs, and with nothing else."""

import hashlib
import struct

import bitsandbytes as bnb
import pytest
import torch
from accelerate import cpu_offload
from identity_helpers import WRAPPINGS, flip_one_bit, quantized, swap
from peft import get_peft_model
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor
from trainer_helpers import lora
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from dpo_peft import ReferenceMismatchError
from dpo_peft.model.loading import disable_dropout
from dpo_peft.reference import fingerprint as identity
from dpo_peft.reference.fingerprint import adapter_fingerprint, base_fingerprint, identify, tensor_fingerprint

IDS = torch.arange(10, 30)[None]
BLOCK = 4 * 2**14  # bytes
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.uint8, torch.int8, torch.bool]


# ---- Tensors --------------------------------------------------------------------------------------------------------


def in_python(t: Tensor) -> bytes:
    """The fingerprint as its docstring defines it, in Python's own unbounded whole numbers."""
    data = bytes(t.contiguous().reshape(-1).view(torch.uint8).tolist())
    data += bytes(-len(data) % BLOCK)
    draws = struct.unpack("<32768q", hashlib.shake_128(b"dpo_peft fingerprint 1").digest(2**18))
    digest = hashlib.blake2b(f"{t.dtype} {tuple(t.shape)}".encode(), digest_size=16)
    for start in range(0, len(data), BLOCK):
        words = struct.unpack("<16384i", data[start : start + BLOCK])
        for which in (0, 1):
            multipliers = [m | 1 for m in draws[which * 16384 : (which + 1) * 16384]]
            total = sum(w * m for w, m in zip(words, multipliers, strict=True))
            digest.update((total % 2**64).to_bytes(8, "little"))
    return digest.digest()


def random_bytes(number: int, below: int = 256) -> Tensor:
    return torch.randint(0, below, (number,), dtype=torch.uint8)


@pytest.mark.parametrize("number", [0, 1, 7, BLOCK, 2 * BLOCK + 5])
def test_as_defined(number):
    data = random_bytes(number)
    assert tensor_fingerprint(data) == in_python(data)
    assert tensor_fingerprint(data[: number // 4 * 4].view(torch.float32)) == in_python(
        data[: number // 4 * 4].view(torch.float32)
    )


def test_records_stay_valid():
    """Fingerprints lie in checkpoints and on the Hub: a value that was computed once must come out for ever."""
    assert tensor_fingerprint(torch.arange(5.0)).hex() == "5587e3c9616ab63cb82fdcb92a2c4652"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_single_bit_counts(dtype):
    """Flipped at random places of tensors of odd sizes, the last block's border among them."""
    for number in (3, 252, BLOCK + 507):
        size = torch.empty(0, dtype=dtype).element_size()
        data = random_bytes(number * size, 2 if dtype == torch.bool else 256)
        original = tensor_fingerprint(data.view(dtype))
        seen = {original}
        places = {0, len(data) - 1, *torch.randint(0, len(data), (40,)).tolist()}
        for place in places:
            bit = 1 if dtype == torch.bool else 1 << int(torch.randint(0, 8, ()))
            data[place] ^= bit
            seen.add(tensor_fingerprint(data.view(dtype)))
            data[place] ^= bit
        assert len(seen) == len(places) + 1
        assert tensor_fingerprint(data.view(dtype)) == original


def moved(values: Tensor, swaps: int = 300) -> list[Tensor]:
    """Copies of `values` with two elements swapped each, or the signs of two flipped."""
    changed = []
    for number in range(swaps):
        i, j = torch.randperm(len(values))[:2].tolist()
        other = values.clone()
        if number % 2:
            other[i], other[j] = values[j], values[i]
        else:  # the top bits of two words: multipliers modulo the words' own size would not see it
            other[i], other[j] = -values[i], -values[j]
        if not torch.equal(other, values):
            changed.append(other)
    return changed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_moved_elements(dtype):
    values = torch.randn(3000).to(dtype)
    changed = moved(values)
    assert len({tensor_fingerprint(t) for t in [values, *changed]}) == len(changed) + 1


def test_multipliers_are_what_finds_moved_elements(monkeypatch):
    """Negative control."""
    monkeypatch.setattr(identity, "_multipliers", lambda device: torch.ones(2, 2**14, dtype=torch.int64))
    values = torch.randn(300)
    found = [tensor_fingerprint(t) != tensor_fingerprint(values) for t in moved(values)]
    assert not any(found[1::2])


def test_dtype_and_shape_count():
    data = random_bytes(48)
    same_bytes = [data, data.view(6, 8), data.view(8, 6), data.view(torch.int8), data.view(torch.float16), data[:47]]
    same_bytes += [data.view(torch.bfloat16), torch.zeros(0), torch.zeros(0, 3), torch.zeros(()), torch.zeros(1)]
    assert len({tensor_fingerprint(t) for t in same_bytes}) == len(same_bytes)


def test_storage_does_not_count():
    whole = random_bytes(3 * BLOCK)
    for view in (whole[1:], whole[::3], whole[: 2 * BLOCK].view(2, BLOCK).T, whole[2 : 2 + BLOCK]):
        assert tensor_fingerprint(view) == tensor_fingerprint(view.clone(memory_format=torch.contiguous_format))
    assert tensor_fingerprint(whole[7].expand(9)) == tensor_fingerprint(whole[7].repeat(9))


def test_chunk_size_does_not_count(monkeypatch):
    data = random_bytes(21 * BLOCK + 11)
    found = set()
    for blocks in (1, 2, 5, 16, 100):
        monkeypatch.setattr(identity, "_CHUNK", {"cpu": blocks * BLOCK})
        found.add(tensor_fingerprint(data))
    assert len(found) == 1


def test_a_tensor_that_is_several(monkeypatch):
    """Weights of some quantizers are subclasses that hold values and scales."""
    a, b = torch.randn(5), torch.randn(5)
    seen = [tensor_fingerprint(TwoTensor(*pair)) for pair in ((a, b), (b, a), (a, b + 1), (a + 1, b))]
    assert len(set(seen)) == 4
    assert tensor_fingerprint(TwoTensor(a.clone(), b.clone())) == seen[0]


def test_nothing_to_tell_by():
    with pytest.raises(ReferenceMismatchError, match="meta device.*Load the model's weights"):
        tensor_fingerprint(torch.zeros(3, device="meta"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_on_the_gpu(dtype):
    data = random_bytes(5 * BLOCK + 36, 2 if dtype == torch.bool else 256).view(dtype)
    for t in (data, data[1:]):
        assert tensor_fingerprint(t.cuda()) == tensor_fingerprint(t)


# ---- The base -------------------------------------------------------------------------------------------------------


CHANGES = {
    "one bit": lambda m: flip_one_bit(m.model.layers[1].mlp.up_proj.weight),
    "one bit of the head": lambda m: flip_one_bit(m.lm_head.weight),
    "one bit of a norm": lambda m: flip_one_bit(m.model.norm.weight),
    "dtype of all": lambda m: m.bfloat16(),
    "dtype of one": lambda m: m.lm_head.bfloat16(),
    "two weights swapped": lambda m: swap(m.model.layers[0].mlp.up_proj, m.model.layers[0].mlp.gate_proj),
    "a layer less": lambda m: m.model.layers.__delitem__(1),
    "a buffer": lambda m: m.model.register_buffer("shift", torch.zeros(2)),
    "a parameter": lambda m: m.lm_head.register_parameter("bias", torch.nn.Parameter(torch.zeros(320))),
}
CONFIGS = [
    dict(rope_parameters={"rope_theta": 5e5, "rope_type": "default"}),
    dict(rms_norm_eps=1e-5),
    dict(hidden_act="gelu"),
    dict(max_position_embeddings=2048),
]


@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights(tiny_llama, change):
    model = tiny_llama()
    before = base_fingerprint(model)
    CHANGES[change](model)
    after = base_fingerprint(model)
    assert after[:16] != before[:16]
    assert after[16:] == before[16:]  # the half of the config


@pytest.mark.parametrize("option", CONFIGS, ids=str)
def test_changed_config(tiny_llama, option):
    before, after = base_fingerprint(tiny_llama()), base_fingerprint(tiny_llama(**option))
    assert after[:16] == before[:16] and after[16:] != before[16:]


def test_tied_head(tiny_llama):
    tied, untied = tiny_llama(tie_word_embeddings=True), tiny_llama()
    untied.model.load_state_dict(tied.model.state_dict())
    assert base_fingerprint(untied) != base_fingerprint(tied)
    untied.lm_head.weight.data.copy_(tied.lm_head.weight)
    assert base_fingerprint(untied)[:16] == base_fingerprint(tied)[:16]  # the same weights


def test_what_does_not_change_the_model(tiny_llama, tmp_path):
    model = tiny_llama(attention_dropout=0.3)
    before = base_fingerprint(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert base_fingerprint(loaded) == before
    with torch.no_grad():
        loaded.train()(IDS)
    disable_dropout(loaded)
    loaded.config.pad_token_id = 7  # as trainers do, to match the tokenizer
    loaded.config.use_cache = False
    loaded.gradient_checkpointing_enable()
    loaded.requires_grad_(False)
    assert base_fingerprint(loaded) == before
    assert base_fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto", device_map="cpu")) == before
    other = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    other.model.layers[0].mlp = torch.compile(other.model.layers[0].mlp)  # wraps; compiles at its first call only
    assert base_fingerprint(other) == before


def test_offloaded_weights_are_read(tiny_llama):
    before = base_fingerprint(tiny_llama())
    model = cpu_offload(tiny_llama(), execution_device="cpu")
    assert model.lm_head.weight.is_meta
    assert base_fingerprint(model) == before
    assert model.lm_head.weight.is_meta


@pytest.mark.parametrize("kind", WRAPPINGS)
@pytest.mark.parametrize("tied", [False, True])
def test_wrapping_and_training_leave_the_base_alone(tiny_llama, kind, tied):
    if kind == "lora_bias":
        base = tiny_llama(tie_word_embeddings=tied, attention_bias=True, mlp_bias=True)
    else:
        base = tiny_llama(tie_word_embeddings=tied)
    before = base_fingerprint(base)
    model = get_peft_model(base, lora(**WRAPPINGS[kind]), adapter_name="mine")
    assert base_fingerprint(model) == before
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert base_fingerprint(model) == base_fingerprint(model.get_base_model()) == before
    if kind != "trained tokens":  # PEFT has no second adapter of that kind on the same tokens
        model.add_adapter("other", lora(**WRAPPINGS[kind]))
        model.set_adapter("other")
        assert base_fingerprint(model) == before
    with model.disable_adapter():
        assert base_fingerprint(model) == before
    flip_one_bit(base.model.layers[0].mlp.up_proj.base_layer.weight if kind == "linear" else base.model.norm.weight)
    assert base_fingerprint(model) != before


def test_adapters_on_experts(tmp_path):
    """PEFT nests one wrapper per parameter of the same module."""
    shape = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
    base = MixtralForCausalLM(MixtralConfig(**shape, num_key_value_heads=2, num_local_experts=2))
    before = base_fingerprint(base)
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = get_peft_model(base, lora(target_modules=[], target_parameters=experts, init_lora_weights=False))
    assert base_fingerprint(model) == before
    found = adapter_fingerprint(model, "default")
    model(IDS, labels=IDS).loss.backward()
    assert (base_fingerprint(model), adapter_fingerprint(model, "default")) == (before, found)
    for name, parameter in model.named_parameters():
        flip_one_bit(parameter)
        trained = parameter.requires_grad
        assert (base_fingerprint(model) == before) == trained, name
        assert (adapter_fingerprint(model, "default") == found) == (not trained), name
        flip_one_bit(parameter)


def test_a_merged_adapter_changes_the_base(tiny_llama):
    model = get_peft_model(tiny_llama(), lora(init_lora_weights=False))
    before = base_fingerprint(model)
    model.merge_adapter()
    assert base_fingerprint(model) != before


# ---- A quantized base -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tiny_llama, tmp_path_factory) -> str:
    path = str(tmp_path_factory.mktemp("base"))
    tiny_llama().save_pretrained(path)
    return path


def test_nf4_is_the_same_each_time(folder, tmp_path):
    model = quantized(folder)
    before = base_fingerprint(model)
    assert base_fingerprint(quantized(folder)) == before
    wrapped = get_peft_model(model, lora())
    with torch.no_grad():
        wrapped(IDS)
    assert base_fingerprint(wrapped) == before
    quantized(folder).save_pretrained(tmp_path)  # in 4 bits
    assert base_fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)) == before


def test_how_it_is_quantized_counts(folder):
    models = [
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        quantized(folder),
        quantized(folder, bnb_4bit_use_double_quant=False),
        quantized(folder, bnb_4bit_quant_type="fp4"),
        quantized(folder, torch.bfloat16),
    ]
    found = [base_fingerprint(m) for m in models]
    assert len(set(found)) == len(models)
    assert len({f[16:] for f in found}) == 1
    names = [identify(get_peft_model(m, lora()), None).quantization for m in models]
    assert names == [
        "none",
        "nf4, double quantization, compute float32",
        "nf4, compute float32",
        "fp4, double quantization, compute float32",
        "nf4, double quantization, compute bfloat16",
    ]


CONSTANTS = {
    "absmax": lambda state: flip_one_bit(state.absmax),
    "code": lambda state: flip_one_bit(state.code),
    "offset": lambda state: state.offset.add_(1e-6),
    "nested absmax": lambda state: flip_one_bit(state.state2.absmax),
    "nested code": lambda state: flip_one_bit(state.state2.code),
    "blocksize": lambda state: setattr(state, "blocksize", 128),
    "nested blocksize": lambda state: setattr(state.state2, "blocksize", 128),
    "type": lambda state: setattr(state, "quant_type", "fp4"),
}


@pytest.mark.parametrize("constant", CONSTANTS)
def test_quantization_constants_count(folder, constant):
    model = quantized(folder)
    before = base_fingerprint(model)
    state = model.model.layers[1].self_attn.o_proj.weight.quant_state
    state.code, state.state2.code = state.code.clone(), state.state2.code.clone()  # layers may share them
    assert base_fingerprint(model) == before
    CONSTANTS[constant](state)
    assert base_fingerprint(model) != before


def test_other_blocksize_is_named(folder):
    model = quantized(folder)
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.weight.quant_state.blocksize = 128
    assert identify(get_peft_model(model, lora()), None).quantization.startswith("nf4, blocks of 128, double")


def test_int8_before_and_after_the_scales_move(folder):
    """They lie at the weight until the first forward takes them into the layer."""
    config = BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16, quantization_config=config)
    before = base_fingerprint(model)
    layer = model.model.layers[0].mlp.up_proj
    assert layer.weight.SCB is not None
    layer.init_8bit_state()
    assert layer.weight.SCB is None
    assert base_fingerprint(model) == before
    assert identify(get_peft_model(model, lora()), None).quantization == "int8"
    layer.state.SCB[3] += 0.5
    assert base_fingerprint(model) != before


def test_4_bit_layers_may_rewrite_their_bias(tmp_path):
    """They cast it to their input's dtype in place. What it acts as, in the compute dtype, stays the same."""
    torch.manual_seed(0)
    shape = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=64)
    Qwen2ForCausalLM(Qwen2Config(**shape, num_key_value_heads=4)).save_pretrained(tmp_path)
    model = quantized(tmp_path, torch.bfloat16)
    bias = model.model.layers[0].self_attn.q_proj.bias
    bias.data = bias.data.float() + 0.1234567
    before = base_fingerprint(model)
    with torch.no_grad():
        model(IDS)
    assert bias.dtype == torch.bfloat16
    assert base_fingerprint(model) == before
    bias.data += 0.01
    assert base_fingerprint(model) != before
