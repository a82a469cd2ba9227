"""Experts in 4 bits: against a table look-up and the families' own eager code in float64; the life of such a model."""

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from trainer_helpers import id_pairs, largest_difference, ours, step_logs, theirs
from transformers import AutoModelForCausalLM, FlexOlmoConfig, FlexOlmoForCausalLM, PreTrainedModel
from transformers.quantizers.quantizers_utils import get_module_from_name

from dpo_peft.errors import OptionError
from dpo_peft.forward import experts as computing
from dpo_peft.forward.experts import Experts, convert, restore, unpack
from dpo_peft.merge.merging import merge_adapter
from dpo_peft.merge.weights import dequantize
from dpo_peft.model.adapter_source import load_trained
from dpo_peft.model.base import load_base, nf4_config
from dpo_peft.model.experts import Experts4Bit, expert_weights, group_adapters, pack
from dpo_peft.model.loading import attach_adapter, storage_report
from dpo_peft.model.rebuilding import base_as_given, keep_weights
from dpo_peft.reference.fingerprint import base_fingerprint

HOW = ("cpu", "nf4", True, torch.uint8)
# Experts' own way: the interface; biases, transposed, clamped; no gate; a forward outside the interface, twice.
FAMILIES = ("qwen3_moe", "gpt_oss", "nemotron_h", "longcat_flash", "llama4_text")


def looked_up(weight: Any) -> Tensor:
    """Returns what packed weights stand for, by the definition of NF4 with double quantization, in float64."""
    state, found = weight.quant_state, []
    for expert in range(len(weight)):
        codes = weight.data[expert].view(torch.uint8).long()
        values = state.code.double()[torch.stack([codes >> 4, codes & 15], 1).view(-1)]
        scales = state.absmax[expert]
        if state.nested:
            outer = state.state2.absmax[expert].double().repeat_interleave(state.state2.blocksize)[: len(scales)]
            scales = state.state2.code.double()[scales.long()] * outer + state.offset[expert].double()
        size = state.shape[1:].numel()
        values = values[:size] * scales.double().repeat_interleave(state.blocksize)[:size]
        found.append(values.view(state.shape[1:]))
    return torch.stack(found)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("shape", [(3, 64, 128), (4, 64, 32), (3, 24, 40), (2, 300, 128)])
def test_an_expert_is_packed_as_a_linear_layer(shape: tuple[int, ...], double: bool) -> None:
    import bitsandbytes as bnb

    weight = torch.randn(shape)
    packed: Any = pack(weight, "cpu", "nf4", double, torch.uint8)
    torch.testing.assert_close(unpack(packed).double(), looked_up(packed), rtol=1e-6, atol=1e-7)
    assert torch.equal(unpack(packed)[1:2], unpack(packed, 1, 2))
    for expert, one in enumerate(weight):
        alone: Any = bnb.nn.Params4bit(one, requires_grad=False, quant_type="nf4", compress_statistics=double).to(
            "cpu"
        )
        assert torch.equal(alone.data.view(-1), packed.data[expert])
        assert torch.equal(alone.quant_state.absmax, packed.quant_state.absmax[expert])
        if double:
            assert alone.quant_state.offset == packed.quant_state.offset[expert]


def test_a_lost_constant_shows() -> None:
    packed: Any = pack(torch.randn(3, 64, 128), *HOW)
    right = unpack(packed)
    packed.quant_state.offset = torch.zeros(3)
    assert not torch.allclose(unpack(packed), right, atol=1e-2)


# ---- One module -----------------------------------------------------------------------------------------------------


def expert_module(family: str) -> nn.Module:
    """Returns the first experts of a family's tiny model."""
    model = zoo.build(family)
    model.set_experts_implementation("eager")
    return get_module_from_name(model, next(name for name in expert_weights(model) if "shared" not in name))[0]


def routed(module: nn.Module, family: str, routing: str) -> tuple[Tensor, ...]:
    """Returns what the module is called with: 24 tokens; Llama 4 sorts them itself."""
    x = torch.randn(24, 64, requires_grad=True)
    if family == "llama4_text":
        return (x,)
    experts = len(module._parameters["down_proj"])
    logits = torch.randn(24, experts)
    if routing == "one of two idle":
        logits[:, 1] = -100.0
    top = torch.topk(logits, 2).indices
    if routing == "all to one":
        top = torch.full((24, 2), 2)
        top[:, 1] = 0
    return x, top, torch.rand(24, 2, requires_grad=True)


def packed_and_dense(family: str) -> tuple[nn.Module, nn.Module, list[str]]:
    """Returns a module with its weights in 4 bits, one in float64 of the class as it was, and the weights' names."""
    module = expert_module(family)
    dense = copy.deepcopy(module).double()
    names = [name for name, weight in module._parameters.items() if weight is not None and weight.ndim == 3]
    for name in names:
        packed: Any = pack(module._parameters[name].detach(), *HOW)
        module._parameters[name] = packed
        setattr(dense, name, nn.Parameter(looked_up(packed)))
    convert(module, names)
    return module.requires_grad_(False), dense.requires_grad_(False), names


def compare(module: Callable[..., Tensor], dense: nn.Module, inputs: tuple[Tensor, ...]) -> float:
    """Returns how far outputs and gradients of the inputs are apart, relative to the largest."""
    wide = tuple(
        part.detach().double().requires_grad_(part.requires_grad) if part.is_floating_point() else part
        for part in inputs
    )
    out, want = module(*inputs), dense(*wide)
    slope = torch.randn(out.shape, generator=torch.Generator().manual_seed(5))
    given = [part for part in inputs if part.requires_grad]
    grads = torch.autograd.grad(out, given, slope)
    wanted = torch.autograd.grad(want, [part for part in wide if part.requires_grad], slope.double())
    pairs = zip((out, *grads), (want, *wanted), strict=True)
    return max(float(((a - b).abs().max() / b.abs().max()).detach()) for a, b in pairs)


@pytest.mark.parametrize("routing", ["mixed", "one of two idle", "all to one"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_experts_compute_as_their_own_code_on_dense_weights(family: str, routing: str) -> None:
    module, dense, names = packed_and_dense(family)
    inputs = routed(module, family, routing)
    assert compare(module, dense, inputs) < 3e-6
    with torch.no_grad():  # negative control
        module._parameters["down_proj"].data = module._parameters["down_proj"].data.flip(0)
    assert compare(module, dense, inputs) > 1e-2
    assert all(module._parameters[name].grad is None for name in names)


def test_groups_of_experts_by_the_kernel_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    module, dense, _ = packed_and_dense("qwen3_moe")
    inputs = routed(module, "qwen3_moe", "one of two idle")
    monkeypatch.setattr(computing, "_grouped", lambda x, weight: True)
    monkeypatch.setitem(computing.GROUP_BYTES, "cpu", 3 * 64 * 64 * 4)  # three experts, then one
    assert compare(module, dense, inputs) < 3e-6


def test_nothing_unpacked_is_kept_for_the_backward_pass() -> None:
    module, _, _ = packed_and_dense("qwen3_moe")
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one) or one, lambda one: one):
        module(*routed(module, "qwen3_moe", "mixed"))
    assert max(one.numel() for one in kept) <= 48 * 64 < module.down_proj.numel()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("packed", [True, False])
def test_adapters_on_experts(family: str, packed: bool) -> None:
    """Against dense weights with the products added, gradients of both factors included."""
    module, dense, names = packed_and_dense(family)
    if not packed:
        restore(module)
    holder = nn.ModuleDict({"experts": module})
    config = LoraConfig(r=3, lora_alpha=6, target_modules=[], target_parameters=names)
    holder = get_peft_model(holder, config).base_model.model
    group_adapters(holder)
    wrapped = holder["experts"]
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    layer = wrapped
    while layer is not layer.get_base_layer():
        nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
        factors[layer.parameter_name] = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        layer = layer.base_layer
        if not hasattr(layer, "lora_A"):
            break
    wide = {name: [part.detach().double().requires_grad_() for part in pair] for name, pair in factors.items()}
    swapped = not getattr(module, "is_transposed", False)
    for name, (a, b) in wide.items():
        experts = len(dense._parameters[name])
        a, b = a.view(experts, 3, -1), b.view(len(b), 3, experts)
        delta = torch.einsum("ore,eri->eoi" if swapped else "ore,eri->eio", b, a) * 2
        whole = dense._parameters.pop(name) + delta
        setattr(dense, name, whole)
    inputs = routed(module, family, "one of two idle")
    out, want = wrapped(*inputs), dense(*(x.double() if x.is_floating_point() else x for x in inputs))
    slope = torch.randn(out.shape)
    ordered = [part for pair in factors.values() for part in pair]
    grads = torch.autograd.grad(out, [inputs[0], *ordered], slope)
    wanted = torch.autograd.grad(want, [inputs[0], *(part for pair in wide.values() for part in pair)], slope.double())
    for got, right in zip((out, *grads), (want, *wanted), strict=True):
        assert float((got - right).abs().max() / right.abs().max()) < 5e-6
    with torch.no_grad():
        layer_off = module(*inputs)
        assert (layer_off - out).abs().max() > 1e-3
        for one in holder.modules():
            if hasattr(one, "enable_adapters"):
                one.enable_adapters(False)
        assert torch.equal(wrapped(*inputs), layer_off)


# ---- Whole models ---------------------------------------------------------------------------------------------------


def flex_olmo() -> PreTrainedModel:
    """A family that tests/helpers/zoo.py does not have."""
    torch.manual_seed(0)
    names = {"pad_token_id", "bos_token_id", "eos_token_id", "vocab_size", "hidden_size", "intermediate_size"}
    names |= {"num_hidden_layers", "num_attention_heads", "num_key_value_heads", "num_experts", "num_experts_per_tok"}
    model = FlexOlmoForCausalLM(FlexOlmoConfig(**{name: zoo.COMMON[name] for name in names})).float()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory, make_tokenizer: Any) -> Callable[[str], str]:
    """`bases("gpt_oss")`: folder of a tiny model in float32."""
    made: dict[str, str] = {}

    def base(family: str) -> str:
        if family not in made:
            folder = str(tmp_path_factory.mktemp(family))
            (flex_olmo() if family == "flex_olmo" else zoo.build(family)).save_pretrained(folder)
            make_tokenizer().save_pretrained(folder)
            made[family] = folder
        return made[family]

    return base


WHOLE = {"dtype": "float32"}
LIFE = ("qwen3_moe", "gpt_oss", "flex_olmo")


@pytest.mark.sampled(2)
@pytest.mark.parametrize("family", [*LIFE, "llama4_text"])
def test_a_base_by_name_is_in_4_bits(bases: Any, family: str) -> None:
    packed, whole = (load_base(bases(family), init_kwargs=WHOLE, experts=experts) for experts in (True, False))
    weights = expert_weights(packed)
    report, before = storage_report(packed.requires_grad_(False)), storage_report(whole.requires_grad_(False))
    plain = expert_weights(whole)
    assert weights.keys() == plain.keys()
    size = sum(weight.numel() for weight in plain.values())
    assert before.unquantized - report.unquantized == 4 * size
    tables = 2048 * len(weights)  # which large weights hardly notice
    assert size / 2 < report.quantized - before.quantized < 0.53 * size + tables
    for name, weight in weights.items():
        shape = plain[name].shape
        module, own = get_module_from_name(packed, name)
        assert isinstance(module, Experts) and getattr(module, own).shape == shape
        again: Any = pack(plain[name].detach(), *HOW)
        assert torch.equal(again.data, weight.data)
    given = base_as_given(packed)
    assert given.base_changed is None
    assert base_fingerprint(packed) == base_fingerprint(load_base(bases(family), init_kwargs=WHOLE))
    next(iter(weights.values())).data[0, 0] ^= 1
    assert base_fingerprint(packed) != base_fingerprint(load_base(bases(family), init_kwargs=WHOLE))


def test_experts_are_read_on_the_host_and_quantized_one_by_one(bases: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import bitsandbytes.functional as bnb

    shapes, original = [], bnb.quantize_4bit
    monkeypatch.setattr(bnb, "quantize_4bit", lambda one, **k: shapes.append(tuple(one.shape)) or original(one, **k))
    for family, size in (("mixtral", (192, 64)), ("gpt_oss", (64, 192))):
        seen: list[Any] = []
        convert_one = Experts4Bit.update_weight_conversions
        monkeypatch.setattr(
            Experts4Bit,
            "update_weight_conversions",
            lambda self, *a, f=convert_one, s=seen: s.append(f(self, *a)) or s[-1],
        )
        load_base(bases(family), init_kwargs=WHOLE)
        monkeypatch.setattr(Experts4Bit, "update_weight_conversions", convert_one)
        assert shapes.count(size) == 8  # 2 layers of 4 experts
        on_host = [one for one in seen[0] if getattr(one, "force_cpu", False)]
        assert {target for one in on_host for target in one.target_patterns} >= {
            "experts.gate_up_proj",
            "experts.down_proj",
        }
    assert max(len(shape) for shape in shapes) == 2


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_a_checkpoint_in_4_bits(bases: Any, family: str, tmp_path: Path) -> None:
    """As transformers 4 saved them: each expert is a linear layer by itself, or (gpt-oss) experts are in 16 bits."""
    import bitsandbytes as bnb

    folder, stored, meant = Path(bases(family)), {}, {}
    for key, tensor in load_file(folder / "model.safetensors").items():
        stored[key] = tensor
        if re.fullmatch(r".*proj\.weight", key):
            how: Any = {"quant_type": "nf4", "compress_statistics": True}
            one: Any = bnb.nn.Params4bit(tensor, requires_grad=False, **how).to("cpu")
            stored[key] = one.data
            stored |= {f"{key}.{name}": part for name, part in one.quant_state.as_dict(packed=True).items()}
            meant[key] = unpack(pack(tensor[None], *HOW))[0]
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config |= {"quantization_config": json.loads(nf4_config(torch.float32).to_json_string(use_diff=False))}
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = expert_weights(load_base(str(tmp_path), init_kwargs=WHOLE))
    plain = expert_weights(load_base(str(folder), init_kwargs=WHOLE, experts=False))
    for name, weight in weights.items():
        want = plain[name].detach()
        if family == "qwen3_moe":
            kinds = ["gate_proj", "up_proj"] if name.endswith("gate_up_proj") else ["down_proj"]
            stem = name.rpartition(".")[0]
            want = torch.stack([torch.cat([meant[f"{stem}.{e}.{k}.weight"] for k in kinds]) for e in range(4)])
        # What was in 4 bits changes by no more than the second rounding of its scales.
        bound = 0.01 if family == "qwen3_moe" else 0.2
        assert hasattr(weight, "quant_state") and (unpack(weight) - want).abs().max() < bound * want.abs().max()


def test_16_bits_are_said(bases: Any, caplog: pytest.LogCaptureFixture) -> None:
    eight = nf4_config(torch.float32)
    eight.llm_int8_skip_modules = ["experts", "lm_head"]
    model = load_base(bases("qwen3_moe"), quantization_config=eight, init_kwargs=WHOLE)
    assert not any(hasattr(weight, "quant_state") for weight in expert_weights(model).values())
    assert "its experts are not" in caplog.text
    assert load_base(bases("qwen3_moe"), quantize=False) and caplog.text.count("its experts are not") == 1


@pytest.mark.sampled(3)
@pytest.mark.parametrize("family", LIFE)
def test_trained_as_trl_does_on_the_weights_unpacked(bases: Any, family: str, tmp_path: Path) -> None:
    rows = id_pairs(16)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    options = {"max_steps": 4, "learning_rate": 1e-2, "adam_epsilon": 1e-4, "router_aux_loss_coef": 0.0}

    packed, unpacked = (load_base(bases(family), init_kwargs=WHOLE) for _ in range(2))
    keep_weights(packed)
    dequantize(unpacked)
    dense = AutoModelForCausalLM.from_pretrained(bases(family), dtype=torch.float32)  # TRL knows no 4 bits of it
    dense.load_state_dict(unpacked.state_dict())
    trainers = []
    for name, model, trainer in (("ours", packed, ours), ("trl", dense, theirs)):
        torch.manual_seed(1)
        adapted = get_peft_model(model, copy.deepcopy(config))
        none = {} if trainer is ours else {"peft_config": None}
        trainers.append(trainer(adapted, rows, load_tokenizer(bases(family)), tmp_path / name, **none, **options))
        trainers[-1].train()
    mine, reference = trainers
    assert largest_difference(mine, reference, ["loss"]) < 2e-6


def load_tokenizer(folder: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


IDS = torch.randint(5, 270, (1, 24), generator=torch.Generator().manual_seed(2))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits


@pytest.mark.sampled(4)
@pytest.mark.parametrize("family", [*LIFE, "llama4_text"])
def test_life_of_an_adapter_on_experts(bases: Any, family: str, tmp_path: Path) -> None:
    """Trained, resumed, scored, served by plain PEFT, merged."""
    folder, tokenizer, rows = bases(family), load_tokenizer(bases(family)), id_pairs(16)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    options = {"max_steps": 4, "learning_rate": 1e-2, "model_init_kwargs": WHOLE, "lora_experts": True}
    options |= {"gradient_checkpointing": True, "router_aux_loss_coef": 0.0}
    trainer = ours(folder, rows, tokenizer, tmp_path / "run", peft_config=config, **options)
    assert config.target_parameters is None
    trainer.train()
    trainer.save_model()
    assert abs(step_logs(trainer)[0]["loss"] - 0.693147) < 1e-5
    zero = [n for n, p in trainer.model.named_parameters() if "lora_B" in n and "experts" in n and not p.any()]
    assert not zero and any("experts.base_layer.lora_B" in n for n, _ in trainer.model.named_parameters())
    trained = logits(trainer.model)
    with trainer.model.disable_adapter():
        bare = logits(trainer.model)
    keep_weights(again := load_base(folder, init_kwargs=WHOLE))
    assert torch.equal(bare, logits(again))
    # Scored as it was trained, in a model of its own.
    loaded = load_trained(str(tmp_path / "run"))
    assert torch.equal(logits(loaded.model), trained)
    # Plain PEFT, plain transformers, on the same weights unpacked.
    keep_weights(dense := load_base(folder, init_kwargs=WHOLE))
    dequantize(dense)
    served = logits(PeftModel.from_pretrained(dense, tmp_path / "run"))
    scale = (trained - bare).abs().max()
    assert scale > 1e-2 and (served - trained).abs().max() < 2e-5 * max(1.0, float(scale))
    # And on the whole base, which has the same places for it.
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16), tmp_path / "run")
    report = merge_adapter(str(tmp_path / "run"), tmp_path / "merged", dtype="float32", max_drift=1e-4)
    assert report.drift.mean_token < 1e-4
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert (logits(merged) - trained).abs().max() < 2e-4 * max(1.0, float(scale))
    # Trained on: the reference is a frozen copy of it.
    on = ours(
        str(tmp_path / "run"),
        rows,
        tokenizer,
        tmp_path / "on",
        max_steps=1,
        model_init_kwargs=WHOLE,
        peft_config=None,
        reference="initial",
        router_aux_loss_coef=0.0,
    )
    on.train()
    assert on.reference.adapter is not None and abs(step_logs(on)[0]["loss"] - 0.693147) < 1e-5


def test_resumed_and_generating(bases: Any, tmp_path: Path) -> None:
    folder, tokenizer, rows = bases("qwen3_moe"), load_tokenizer(bases("qwen3_moe")), id_pairs(16)
    options = {"model_init_kwargs": WHOLE, "lora_experts": True, "save_strategy": "steps", "save_steps": 2}

    def run(name: str, **changed: Any) -> Any:
        return ours(folder, rows, tokenizer, tmp_path / name, **{**options, "max_steps": 4, **changed})

    straight, stopped = run("a"), run("b")
    straight.train()
    stopped.train()
    resumed = run("b")
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-2"))
    assert torch.equal(logits(straight.model), logits(resumed.model))
    model = straight.model.eval()
    ids = model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False)
    greedy = IDS
    for _ in range(4):
        with torch.no_grad():
            greedy = torch.cat([greedy, model(input_ids=greedy).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(ids, greedy)


@pytest.mark.parametrize("precision", ["autocast", "bfloat16"])
def test_bfloat16(bases: Any, precision: str) -> None:
    """Packed experts round as unpacked ones do."""
    dtype = {"dtype": "float32" if precision == "autocast" else "bfloat16"}
    packed, dense = (load_base(bases("qwen3_moe"), init_kwargs=dtype) for _ in range(2))
    keep_weights(packed)
    dequantize(dense)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        a, b = logits(packed), logits(dense)
    assert (a - b).abs().max() < 0.05 * b.abs().max()


def test_options_that_contradict(bases: Any, tiny_llama: Any) -> None:
    with pytest.raises(OptionError, match="no mixture of experts"):
        attach_adapter(tiny_llama(), lora_experts=True)
    config = LoraConfig(target_parameters=["experts.down_proj"], target_modules=["q_proj"])
    model = load_base(bases("qwen3_moe"), init_kwargs=WHOLE)
    with pytest.raises(OptionError, match="give one of them"):
        attach_adapter(model, copy.deepcopy(config), lora_experts=True)
    adapted, _ = attach_adapter(model, config)
    with pytest.raises(OptionError, match="has an adapter already"):
        attach_adapter(adapted, lora_experts=True)
    with pytest.raises(OptionError, match="can't be merged into experts in 4 bits"):
        adapted.merge_and_unload()


# ---- Static memory --------------------------------------------------------------------------------------------------

QWEN = dict(hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768, num_hidden_layers=48, head_dim=128)
QWEN |= dict(num_attention_heads=32, num_key_value_heads=4, num_experts=128, num_experts_per_tok=8, vocab_size=151936)
GPT_OSS = dict(hidden_size=2880, intermediate_size=2880, num_hidden_layers=24, num_local_experts=32, head_dim=64)
GPT_OSS |= dict(num_attention_heads=64, num_key_value_heads=8, vocab_size=201088)


@pytest.mark.parametrize(("kind", "config", "gib"), [("qwen3_moe", QWEN, 20), ("gpt_oss", GPT_OSS, 14)])
def test_static_memory(kind: str, config: dict[str, int], gib: float) -> None:
    """Of real sizes: a model without content goes through the quantizer's own rule and bitsandbytes' own shapes."""
    from transformers import CONFIG_MAPPING

    whole = config["num_hidden_layers"]
    sizes = [static_bytes(CONFIG_MAPPING[kind](**{**config, "num_hidden_layers": layers})) for layers in (1, 2)]
    total = sizes[0] + (whole - 1) * (sizes[1] - sizes[0])  # layers are alike
    assert 0.75 * gib < total / 2**30 < gib


def static_bytes(config: Any) -> int:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    quantizer = Experts4Bit(nf4_config(torch.bfloat16), pre_quantized=False)
    quantizer.preprocess_model(model, device_map={"": "meta"})
    total = 0
    for name, parameter in model.named_parameters():
        if quantizer.param_needs_quantization(model, name):
            weight = parameter if parameter.ndim == 3 else torch.empty(1, *parameter.shape, device="meta")
            packed: Any = quantizer.pack(name, weight.to(torch.bfloat16))
            state = packed.quant_state
            total += packed.nbytes + sum(one.nbytes for one in (state.absmax, state.offset, state.state2.absmax))
        else:
            total += parameter.nbytes
    return total
