"""What the reference can be, for every kind of adapter: the adapter as it came in, or the bare base."""

import copy
import logging
from typing import Any

import pytest
import torch
from peft import IA3Config, LoHaConfig, PrefixTuningConfig, VeraConfig
from peft import get_peft_model as wrap
from reference_helpers import (
    BATCH,
    KINDS,
    SAMPLES,
    build_base,
    named,
    options_of,
    perturb,
    policy_logps,
    same,
    train,
    without_repacking,
)
from trainer_helpers import lora

from dpo_peft import OptionError, ReferenceMismatchError
from dpo_peft.forward import pad_rows
from dpo_peft.model.loading import attach_adapter
from dpo_peft.reference import frozen_adapter as frozen
from dpo_peft.reference.adapter_off import Reference, check_start, is_identity, reference_logps
from dpo_peft.reference.frozen_adapter import adapter_tensors, freeze_copy

# ---- "initial": a frozen copy ---------------------------------------------------------------------------------------


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_goes_on_against_itself(tiny_llama, base_folder, kind):
    config, base, name = options_of(kind)
    model = wrap(build_base(base, tiny_llama, base_folder), config, adapter_name=name)
    perturb(model)
    bfloat16 = base == "bfloat16"
    if bfloat16:  # the trained weights become float32 first, and the copy too
        model.base_model._cast_adapter_dtype(name, autocast_adapter_dtype=True)
        for p in model.parameters():
            p.data = p.data.float() if p.requires_grad else p.data
    incoming, flags = named(model, name), {n: p.requires_grad for n, p in model.named_parameters()}
    context = torch.autocast("cpu", torch.bfloat16, enabled=bfloat16)
    with context:
        expected = policy_logps(without_repacking(model))

    model, reference = attach_adapter(model)
    frozen_name = "reference_1" if name == "reference" else "reference"
    assert reference == Reference("initial", frozen_name)
    assert all(p.requires_grad == flags[n] for n, p in model.named_parameters() if n in flags)
    assert same(named(model, frozen_name), incoming) and incoming
    assert not any(t.requires_grad for t in adapter_tensors(model, frozen_name).values())
    assert len(adapter_tensors(model, frozen_name)) == len(adapter_tensors(model, name)) <= len(incoming)
    with context:
        ref = reference_logps(model, BATCH, adapter=frozen_name).logps_C
        # The trainer computes adapters on experts in its own way, to rounding PEFT's.
        rounding = 1e-5 if kind == "expert weights" else 0
        assert torch.equal(policy_logps(model), ref)
        torch.testing.assert_close(ref, expected, rtol=rounding, atol=0)
        assert (reference_logps(model, BATCH).logps_C - expected).abs().max() > 1e-2  # it is not the bare base
        train(model)
        assert (policy_logps(model) - expected).abs().max() > 1e-3
        assert torch.equal(reference_logps(model, BATCH, adapter=frozen_name).logps_C, ref)
    assert same(named(model, frozen_name), incoming)
    moved = named(model, name)
    assert any(not torch.equal(moved[key], incoming[key]) for key in incoming)
    assert model.active_adapters == [name]


@pytest.mark.parametrize("kind", ["linear", "embedding", "dora", "saved head and embedding", "some tokens", "nf4"])
def test_the_tensors_of_an_adapter(tiny_llama, base_folder, kind):
    """Against what PEFT marks as trainable, which it does by another rule."""
    config, base, name = options_of(kind)
    model = wrap(build_base(base, tiny_llama, base_folder), config, adapter_name=name)
    found = adapter_tensors(model, name)
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(t) for t in found.values() if isinstance(t, torch.nn.Parameter)} == trained
    assert set(found) == {f"base_model.model.{key}" for key in named(model, name)}
    assert adapter_tensors(model, "another") == {}
    other = wrap(build_base(base, tiny_llama, base_folder), config, adapter_name="other")
    assert found.keys() == adapter_tensors(other, "other").keys()


def test_the_copy_leaves_base_and_other_adapters_alone(tiny_llama, base_folder):
    """PiSSA run again by `add_adapter` would rewrite the base a second time."""
    for init, base in (("pissa", "llama"), ("olora", "nf4")):
        model = wrap(build_base(base, tiny_llama, base_folder), lora(init_lora_weights=init), adapter_name="mine")
        model.add_adapter("idle", lora(r=2))
        before = {name: t.clone() for name, t in model.state_dict().items()}
        random = torch.random.get_rng_state()
        freeze_copy(model)
        after = model.state_dict()
        assert all(torch.equal(t, after[name]) for name, t in before.items())
        assert {name.replace(".reference.", ".mine.") for name in after} == before.keys()
        assert model.peft_config["reference"].init_lora_weights is True
        assert torch.equal(random, torch.random.get_rng_state())


class Lost:
    """Ways of copying wrongly; each takes the place of `frozen._twin`."""

    def __init__(self, how: str):
        self.how, self.calls = how, 0

    def __call__(self, part: Any, memo: dict[int, Any]) -> Any:
        self.calls += 1
        twin = copy.deepcopy(part, memo).requires_grad_(False)
        if self.calls != 6:  # the second layer's dropout, lora_A and lora_B: 4, 5, 6
            return twin
        with torch.no_grad():
            if self.how == "bfloat16":
                return twin.to(torch.bfloat16)
            if self.how == "shared":
                return part
            if self.how == "thawed":
                return twin.requires_grad_(True)
            if self.how == "one bit":
                twin.weight.view(torch.int32).bitwise_xor_(torch.tensor(1))
            if self.how == "fresh":
                twin.reset_parameters()
        return twin


@pytest.mark.parametrize("how", ["bfloat16", "shared", "thawed", "one bit", "fresh"])
def test_a_wrong_copy_is_caught(tiny_llama, monkeypatch, how):
    model = wrap(tiny_llama(), lora())
    perturb(model)
    monkeypatch.setattr(frozen, "_twin", Lost(how))
    with pytest.raises(ReferenceMismatchError, match=r"not exact in 1 places.*layers\.0\.self_attn\.k_proj\.lora_B"):
        freeze_copy(model)


@pytest.mark.parametrize("kind", ["embedding", "dora", "saved head", "some tokens"])
def test_a_copy_that_matches_on_names_is_caught(tiny_llama, monkeypatch, kind):
    """The fault of others: only what is called lora_A or lora_B is copied."""
    config, _, name = options_of(kind)
    model = wrap(tiny_llama(), config, adapter_name=name)
    complete = frozen._held
    by_name = ("lora_A", "lora_B", "lora_dropout")
    monkeypatch.setattr(frozen, "_held", lambda *args: [(k, held) for k, held in complete(*args) if k in by_name])
    with pytest.raises(ReferenceMismatchError, match="has no twin"):
        freeze_copy(model)


def test_a_lost_setting_is_caught(tiny_llama, monkeypatch):
    model = wrap(tiny_llama(), lora(use_rslora=True))
    complete = frozen._settings
    without = lambda layer, adapter: [s for s in complete(layer, adapter) if s is not getattr(layer, "scaling", None)]  # noqa: E731
    monkeypatch.setattr(frozen, "_settings", without)
    with pytest.raises(ReferenceMismatchError, match="scaling: 4.0 and None"):
        freeze_copy(model)


# ---- "initial" of a fresh adapter, and "base" -----------------------------------------------------------------------

AT_BASE = [
    "linear",
    "embedding",
    "rslora",
    "saved head",
    "some tokens",
    "lora_bias",
    "mica",
    "nf4",
    "some tokens, tied",
]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", AT_BASE)
def test_an_adapter_that_changes_nothing_is_switched_off(tiny_llama, base_folder, kind):
    config, base, name = options_of(kind)
    model = wrap(build_base(base, tiny_llama, base_folder), config, adapter_name=name)
    assert attach_adapter(model)[1] == Reference("initial", None)
    assert attach_adapter(build_base(base, tiny_llama, base_folder), config)[1] == Reference("initial", None)
    # Any trained tensor that moves alone decides otherwise, unless another factor keeps the product at zero.
    for key, tensor in adapter_tensors(model, name).items():
        if tensor.requires_grad:
            kept = tensor.detach().clone()
            tensor.data.view(-1)[-1] += 1.0
            differs = not torch.equal(policy_logps(model), reference_logps(model, BATCH).logps_C)
            assert is_identity(model, name) is not differs or "token" in key or "embed" in key, key
            assert differs <= (not is_identity(model, name)), key
            tensor.data.copy_(kept)
    assert is_identity(model, name)


def test_a_fresh_dora_is_switched_off_and_a_given_one_copied(tiny_llama):
    assert attach_adapter(tiny_llama(), lora(use_dora=True))[1].adapter is None
    assert attach_adapter(wrap(tiny_llama(), lora(use_dora=True)))[1].adapter == "reference"


MOVING = ["pissa", "olora", "random start", "kasa", "replicated layers"]


@pytest.mark.parametrize("kind", MOVING)
def test_a_fresh_adapter_that_starts_elsewhere_is_copied(tiny_llama, caplog, kind):
    with caplog.at_level(logging.INFO):
        model, reference = attach_adapter(tiny_llama(), options_of(kind)[0])
    assert reference == Reference("initial", "reference")
    assert "frozen copy of the adapter as it came in: 0." in caplog.text and "MiB more" in caplog.text
    assert check_start(model, [BATCH, *(pad_rows([s]) for s in SAMPLES)], adapter="reference") == 0.0
    with pytest.raises(OptionError if kind in MOVING[:3] else ReferenceMismatchError, match='reference="initial"'):
        attach_adapter(tiny_llama(), options_of(kind)[0], reference="base")


def test_the_base_may_be_chosen(tiny_llama):
    base = policy_logps(tiny_llama())
    model = wrap(tiny_llama(), lora(init_lora_weights=False))  # given by the user: where it starts is known to him
    perturb(model)
    model, reference = attach_adapter(model, reference="base")
    assert reference == Reference("base", None, chosen=True) and list(model.peft_config) == ["default"]
    assert torch.equal(reference_logps(model, BATCH).logps_C, base)
    with pytest.raises(ReferenceMismatchError, match='not at its start.*"initial".*reference="base"'):
        check_start(model, [BATCH, *(pad_rows([s]) for s in SAMPLES)])
    for init in ("pissa", "olora"):
        with pytest.raises(OptionError, match=f"init_lora_weights='{init}'.*reference=\"initial\""):
            attach_adapter(wrap(tiny_llama(), lora(init_lora_weights=init)), reference="base")


@pytest.mark.parametrize("init", ["corda", "loftq"])
def test_an_initialization_without_its_preparation(tiny_llama, init):
    config = lora()
    config.init_lora_weights = init  # set here, since LoraConfig itself asks for optional packages for some
    with pytest.raises(OptionError, match=rf"init_lora_weights={init!r}.*PEFT's documentation"):
        attach_adapter(tiny_llama(), config)


@pytest.mark.parametrize("other", [IA3Config, LoHaConfig, VeraConfig, PrefixTuningConfig])
def test_only_lora(tiny_llama, other):
    prompt = other is PrefixTuningConfig
    config = other(task_type="CAUSAL_LM", **({"num_virtual_tokens": 2} if prompt else {"target_modules": ["q_proj"]}))
    if other is IA3Config:
        config.feedforward_modules = []
    for model, given in ((tiny_llama(), config), (wrap(tiny_llama(), copy.deepcopy(config)), None)):
        with pytest.raises(OptionError, match=rf"{other.__name__}: only LoRA.*LoraConfig"):
            attach_adapter(model, given)


def test_a_merged_adapter_is_refused(tiny_llama):
    model = wrap(tiny_llama(), lora())
    model.merge_adapter()
    with pytest.raises(OptionError, match=r"merged.*unmerge_adapter"):
        attach_adapter(model)
