"""References that are another adapter, or a moving one; an adapter's folder as the model."""

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, IA3Config, PeftModel
from peft import get_peft_model as wrap
from peft.tuners.lora.config import KasaConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from reference_helpers import (
    BATCH,
    OTHERS,
    build_base,
    named,
    options_of,
    perturb,
    policy_logps,
    same,
    saved,
    train,
    without_repacking,
)
from safetensors.torch import load_file, save_file
from trainer_helpers import lora

from dpo_peft import OptionError, ReferenceMismatchError
from dpo_peft.model.adapters import load_frozen
from dpo_peft.model.loading import attach_adapter, load_base, load_model, storage_report
from dpo_peft.reference.adapter_off import Reference, reference_logps, reference_mode
from dpo_peft.reference.frozen_adapter import adapter_tensors, freeze_copy, mix_into

SWITCHES = (BaseTunerLayer, AuxiliaryTrainingWrapper)


# ---- Another adapter, by path ---------------------------------------------------------------------------------------


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("policy", ["linear", "some tokens", "saved head", "nf4"])
def test_a_reference_by_path_is_that_adapter(tiny_llama, base_folder, tmp_path, policy, kind):
    config, base, _ = options_of(policy)
    folder = saved(build_base(base, tiny_llama, base_folder), lora(**OTHERS[kind]), tmp_path)
    if (policy, kind) == ("some tokens", "embedding"):  # PEFT can't wrap a module in both
        with pytest.raises(OptionError, match=r"(?s)does not fit.*TrainableTokensWrapper.*same module"):
            attach_adapter(build_base(base, tiny_llama, base_folder), config, reference=folder)
        return
    oracle = PeftModel.from_pretrained(build_base(base, tiny_llama, base_folder), folder)
    expected = policy_logps(without_repacking(oracle))

    alone, _ = attach_adapter(build_base(base, tiny_llama, base_folder), copy.deepcopy(config))
    perturbed = torch.random.get_rng_state()
    model, reference = attach_adapter(build_base(base, tiny_llama, base_folder), config, reference=folder)
    assert reference == Reference("adapter", "reference", folder, chosen=True)
    for each in (alone, model):
        torch.random.set_rng_state(perturbed)
        for tensor in adapter_tensors(each, "default").values():
            tensor.data.copy_(torch.randn(tensor.shape) * 0.1 if tensor.requires_grad else tensor)
    off = reference_logps(model, BATCH).logps_C
    policy_before = policy_logps(model)
    assert torch.equal(policy_before, policy_logps(alone))  # the policy does not notice
    assert torch.equal(off, reference_logps(alone, BATCH).logps_C)
    assert torch.equal(reference_logps(model, BATCH, adapter="reference").logps_C, expected)
    assert (expected - off).abs().max() > 1e-2 and (expected - policy_before).abs().max() > 1e-2
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    assert {n.replace(".default", "") for n, flag in flags.items() if flag} == {
        n.replace(".default", "") for n, p in alone.named_parameters() if p.requires_grad
    }
    before = named(model, "reference")
    train(model)
    assert same(named(model, "reference"), before)
    assert torch.equal(reference_logps(model, BATCH, adapter="reference").logps_C, expected)
    assert not torch.equal(policy_logps(model), policy_before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_reference_by_path_that_equals_the_policy(tiny_llama, tmp_path, dtype):
    """In the same precision: the trained weights become float32, so the reference's do."""
    folder = saved(tiny_llama().to(dtype), lora(use_dora=True, modules_to_save=["lm_head"]), tmp_path)
    model = PeftModel.from_pretrained(tiny_llama().to(dtype), folder, is_trainable=True)
    model, reference = attach_adapter(model, reference=folder)
    assert {t.dtype for t in adapter_tensors(model, reference.adapter).values()} == {torch.float32}
    assert same(named(model, reference.adapter), named(model, "default"))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        assert torch.equal(policy_logps(model), reference_logps(model, BATCH, adapter=reference.adapter).logps_C)


@pytest.mark.parametrize("kind", OTHERS)
def test_loading_a_reference_leaves_the_policy_as_it_is(tiny_llama, tmp_path, kind):
    """Flags, activity and weights, also where parts are frozen, and other adapters."""
    folder = saved(tiny_llama(), lora(**OTHERS[kind]), tmp_path)
    model = wrap(tiny_llama(), lora(trainable_token_indices=[11], target_modules=["q_proj", "v_proj"]), "mine")
    if kind == "embedding":
        model = wrap(tiny_llama(), lora(target_modules=["q_proj", "v_proj"]), "mine")
    model.add_adapter("idle", lora(r=2, modules_to_save=["lm_head"]))
    for name, p in model.named_parameters():
        if "layers.0" in name:
            p.requires_grad_(False)
    before, weights = state_of(model), {name: p.clone() for name, p in model.named_parameters()}
    random = torch.random.get_rng_state()
    load_frozen(model, folder)
    after = state_of(model)
    for what in ("grad", "off", "active"):
        changed = {name for name, value in before[what].items() if after[what].get(name, value) != value}
        assert not changed, (what, changed)
    assert not any(flag for name, flag in after["grad"].items() if "reference" in name.split("."))
    assert not any("reference" in active for _, active in after["active"].values())
    now = dict(model.named_parameters())
    assert all(torch.equal(now.get(name, p), p) for name, p in weights.items())
    assert torch.equal(random, torch.random.get_rng_state())


def test_references_that_cannot_be_loaded(tiny_llama, tmp_path):
    def refused(folder: Any, pattern: str, model: Any = None, config: Any = None) -> None:
        with pytest.raises(OptionError, match=pattern):
            attach_adapter(model or tiny_llama(), config or lora(), reference=str(folder))

    refused(tmp_path / "none", "none' is no adapter that can be read.*adapter_config.json")
    pissa = saved(tiny_llama(), lora(init_lora_weights="pissa"), tmp_path / "pissa")
    refused(pissa, "pissa.*takes the adapter out of the base.*path_initial_model_for_weight_conversion")
    kasa = saved(tiny_llama(), lora(kasa_config=KasaConfig()), tmp_path / "kasa")
    refused(kasa, "kasa_config cuts down")
    ia3 = wrap(tiny_llama(), IA3Config(target_modules=["q_proj"], feedforward_modules=[], task_type="CAUSAL_LM"))
    ia3.save_pretrained(tmp_path / "ia3")
    refused(tmp_path / "ia3", "ia3' can't be used.*only LoRA")
    bias = saved(tiny_llama(attention_bias=True), lora(bias="all"), tmp_path / "bias")
    refused(bias, "bias='all'", tiny_llama(attention_bias=True))
    small = saved(tiny_llama(hidden_size=32), lora(), tmp_path / "small")
    refused(small, "small' does not fit.*size mismatch.*same base")
    good = saved(tiny_llama(), lora(), tmp_path / "good")
    refused(good, "pissa.*wrong reference", config=lora(init_lora_weights="pissa"))
    for change, pattern in (("drop", "lacks 1 tensors"), ("add", "holds what the model has no place for, 1 tensors")):
        folder = tmp_path / change
        shutil.copytree(good, folder)
        weights = load_file(folder / "adapter_model.safetensors")
        if change == "drop":
            weights.pop(sorted(weights)[3])
        else:
            weights["base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"] = torch.zeros(4, 64)
        save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        refused(folder, pattern)


def test_a_reference_may_not_bring_its_own_embedding(tiny_llama, tmp_path):
    """PEFT saves the base of an adapted embedding too, and on loading writes it over the model's."""
    folder = saved(tiny_llama(), lora(target_modules=["embed_tokens", "q_proj"]), tmp_path / "other")
    assert any("base_layer" in name for name in load_file(tmp_path / "other" / "adapter_model.safetensors"))
    attach_adapter(tiny_llama(), lora(), reference=folder)
    folder = saved(tiny_llama(seed=1), lora(target_modules=["embed_tokens", "q_proj"]), tmp_path / "another")
    with pytest.raises(OptionError, match=r"holds its own base_model\.model\.model\.embed_tokens.*another base"):
        attach_adapter(tiny_llama(), lora(), reference=folder)


def test_another_base_is_mentioned(tiny_llama, tmp_path, caplog):
    folder = saved(tiny_llama(), lora(), tmp_path)
    config = Path(folder) / "adapter_config.json"
    config.write_text(
        config.read_text().replace('"base_model_name_or_path": null', '"base_model_name_or_path": "x/y"')
    )
    assert "x/y" in config.read_text()
    model = tiny_llama()
    model.config._name_or_path = "x/z"
    load_frozen(wrap(model, lora()), folder)
    assert "trained on x/y and is used on x/z" in caplog.text


# ---- reference_mode -------------------------------------------------------------------------------------------------


def state_of(model: Any) -> dict[str, Any]:
    switches = {name: m for name, m in model.named_modules() if isinstance(m, SWITCHES)}
    return {
        "grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "training": {name: m.training for name, m in model.named_modules()},
        "off": {name: m.disable_adapters for name, m in switches.items()},
        "active": {name: (m._active_adapter, m.active_adapters) for name, m in switches.items()},
        "grad mode": torch.is_grad_enabled(),
    }


@pytest.mark.parametrize("fails", [True, False])
def test_reference_mode_restores_everything(tiny_llama, tmp_path, fails):
    """With parts of the adapter frozen, a layer switched off, a module in eval mode, another adapter that is idle."""
    folder = saved(tiny_llama(), lora(**OTHERS["saved head"]), tmp_path)
    policy = lora(trainable_token_indices=[11], target_modules=["q_proj", "v_proj"])
    model, reference = attach_adapter(tiny_llama(), policy, reference=folder)
    model.add_adapter("idle", lora(r=2))
    model.train()
    for name, p in model.named_parameters():
        if "layers.0" in name:
            p.requires_grad_(False)
    layers = model.get_base_model().model.layers
    layers[1].self_attn.q_proj.enable_adapters(False)
    layers[1].mlp.eval()
    before = state_of(model)
    try:
        with reference_mode(model, reference.adapter):
            inside = state_of(model)
            on = {name for name, off in inside["off"].items() if not off}
            assert {name.removeprefix("base_model.model.") for name in on} == {
                "model.layers.0.self_attn.q_proj",
                "lm_head",
            }
            assert all(inside["active"][name][1] == ["reference"] for name in on)
            assert not any(inside["training"].values()) and not inside["grad mode"]
            if fails:
                raise KeyError("inside")
    except KeyError:
        assert fails
    assert state_of(model) == before
    with pytest.raises(OptionError, match="no adapter 'lost'"), reference_mode(model, "lost"):
        pass
    assert state_of(model) == before


# ---- TR-DPO ---------------------------------------------------------------------------------------------------------


def test_mixing_by_hand(tiny_llama):
    model = wrap(tiny_llama(), lora(modules_to_save=["lm_head"], trainable_token_indices=[11], use_dora=True))
    for tensor in adapter_tensors(model, "default").values():
        tensor.data.fill_(1.0)
    freeze_copy(model)
    for tensor in adapter_tensors(model, "default").values():
        tensor.data.fill_(3.0)
    base = {n: p.clone() for n, p in model.named_parameters() if "default" not in n and "reference" not in n}
    # 0.25 * 3 + 0.75 * 1 = 1.5; 0.5 * 3 + 0.5 * 1.5 = 2.25; then not at all; then altogether.
    for alpha, expected in ((0.25, 1.5), (0.5, 2.25), (0.0, 2.25), (1.0, 3.0)):
        mix_into(model, "default", "reference", alpha)
        mixed = adapter_tensors(model, "reference")
        assert {float(x) for t in mixed.values() for x in (t.min(), t.max())} == {expected} and len(mixed) > 40
        assert {float(t.detach().max()) for t in adapter_tensors(model, "default").values()} == {3.0}
    assert all(torch.equal(p, model.get_parameter(n)) for n, p in base.items())


@pytest.mark.parametrize(
    "kind", ["linear", "some tokens, tied", "saved embedding, tied", "embedding, tied", "patterns"]
)
def test_a_mixture_lies_between(tiny_llama, base_folder, kind):
    config, base, name = options_of(kind)
    model = wrap(build_base(base, tiny_llama, base_folder), config, adapter_name=name)
    perturb(model)
    model, reference = attach_adapter(model)
    before = named(model, "reference")
    train(model)
    policy = named(model, name)
    mix_into(model, name, "reference", 0.3)
    for key, mixed in named(model, "reference").items():
        assert (mixed - (0.3 * policy[key] + 0.7 * before[key])).abs().max() < 1e-6
    mix_into(model, name, "reference", 1.0)
    assert same(named(model, "reference"), policy)
    assert torch.equal(policy_logps(model), reference_logps(model, BATCH, adapter=reference.adapter).logps_C)


def test_mixtures_that_make_no_sense(tiny_llama, tmp_path):
    for number, changed in enumerate([{"r": 2}, {"target_modules": ["q_proj"]}, {"lora_alpha": 4}]):
        folder = saved(tiny_llama(), lora(**changed), tmp_path / str(number))
        model, _ = attach_adapter(tiny_llama(), lora(), reference=folder)
        with pytest.raises(ReferenceMismatchError, match='can\'t be mixed, they differ in .*reference="initial"'):
            mix_into(model, "default", "reference", 0.5)


# ---- An adapter's folder as the model -------------------------------------------------------------------------------


@pytest.mark.parametrize("quantize", [True, False])
def test_a_folder_of_an_adapter_loads_with_its_base(base_folder, tmp_path, quantize):
    kwargs = {"dtype": "float32"}
    folder = saved(load_base(base_folder, None, quantize, kwargs), lora(modules_to_save=["lm_head"]), tmp_path)
    model = load_model(folder, quantize=quantize, init_kwargs=kwargs)
    assert isinstance(model, PeftModel) and bool(getattr(model, "is_loaded_in_4bit", False)) is quantize
    oracle = AutoPeftModelForCausalLM.from_pretrained(
        folder, **kwargs, quantization_config=model.get_base_model().config.quantization_config if quantize else None
    )
    assert torch.equal(policy_logps(model), policy_logps(without_repacking(oracle)))
    model, reference = attach_adapter(model)
    assert reference.adapter == "reference"
    train(model)
    assert same(named(model, "reference"), named(oracle, "default"))
    assert not isinstance(load_model(base_folder, quantize=False), PeftModel)


def test_adapters_without_their_base(tiny_llama, base_folder, tmp_path):
    folder = saved(load_base(base_folder, quantize=False), lora(), tmp_path / "adapter")
    config = Path(folder) / "adapter_config.json"
    text = config.read_text()
    config.write_text(text.replace(f'"{base_folder}"', '"gone/away"'))
    with pytest.raises(OptionError, match="(?s)belongs to the base 'gone/away', which can't be.*is_trainable=True"):
        load_model(folder)
    config.write_text(text.replace(f'"{base_folder}"', "null"))
    with pytest.raises(OptionError, match="does not say which base.*is_trainable=True"):
        load_model(folder)
    with pytest.raises(OptionError, match="gone/away.*can't be loaded"):
        load_model("gone/away")
    tiny_llama(hidden_size=32).save_pretrained(tmp_path / "small")
    config.write_text(text.replace(base_folder, str(tmp_path / "small")))
    with pytest.raises(OptionError, match=r"does not fit its base.*small.*size mismatch"):
        load_model(folder, quantize=False)
    config.write_text(text)
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    weights.pop(sorted(weights)[0])
    save_file(weights, tmp_path / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(OptionError, match="lacks 1 tensors"):
        load_model(folder, quantize=False)


# ---- What it costs --------------------------------------------------------------------------------------------------


def test_the_frozen_copy_is_counted_apart(tiny_llama, base_folder):
    model = wrap(load_base(base_folder), lora(modules_to_save=["lm_head"]))
    perturb(model)
    alone = storage_report(model)
    model, reference = attach_adapter(model)
    report = storage_report(model, reference=reference.adapter)
    # Rank 4 on 7 linear layers of 2 blocks, and the head, in float32.
    weights = 2 * 4 * ((64 + 64) * 2 + (64 + 32) * 2 + (64 + 128) * 3) + 320 * 64
    assert report.reference_adapter == 4 * weights == report.trainable
    assert (report.quantized, report.unquantized) == (alone.quantized, alone.unquantized)
    assert f"Reference adapter: {4 * weights / 2**20:.1f} MiB." in str(report)
    assert "Reference" not in str(alone) and alone.reference_adapter == 0
