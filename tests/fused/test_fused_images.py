"""Fused layers on prompts with images: features in the places of embedded tokens, angles on three axes, blocks."""

from typing import Any

import pytest
import torch
import vision_models as vm

from dpo_peft.forward import completion_logps, images, pack, plan_forward
from dpo_peft.fused import model as decoder
from dpo_peft.reference.adapter_off import reference_logps

# Whose text has no entry in `families.py`, or is one that its entry is not for.
NOT_FUSED = ["gemma4", "lfm2_vl"]
FUSED = [name for name in vm.ALL if name not in NOT_FUSED]


@pytest.mark.sampled(7, slow=3)
@pytest.mark.parametrize("name", FUSED)
def test_values_and_gradients_are_those_of_the_models_own_rows(name: str) -> None:
    """Kept or checkpointed, with a frozen tower."""
    model = vm.build(name, noise=0.05)  # with more, Gemma 4 rounds by 1e-5
    samples = vm.samples_for(name, model.config)
    model = vm.adapted(model)
    own = vm.OwnRows(model, name, samples)
    plan = plan_forward(model, images=samples)
    assert plan.fused, plan.unfused
    own.assert_same(model, pack(samples), plan.scorer)
    plan.fused.checkpointed = lambda batch: (1, 0)
    own.assert_same(model, pack(samples), plan.scorer)


@pytest.mark.parametrize("name", NOT_FUSED)
def test_others_keep_their_own_layers(name: str) -> None:
    model = vm.build(name)
    plan = plan_forward(model, images=vm.samples_for(name, model.config))
    assert plan.shared and plan.fused is None


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ["qwen3_vl", "llava", "gemma3", "qwen2_5_vl", "mistral3", "smolvlm"])
def test_adapters_in_the_tower_get_the_gradients_of_the_models_own_rows(name: str) -> None:
    """And are off in the reference's pass."""
    model = vm.build(name)
    samples = vm.samples_for(name, model.config)
    model = vm.adapted(model, samples[0])
    own = vm.OwnRows(model, name, samples)
    plan = plan_forward(model, images=samples)
    assert plan.fused, plan.unfused
    own.assert_same(model, pack(samples), plan.scorer)
    plan.fused.checkpointed = lambda batch: (2, 0)
    own.assert_same(model, pack(samples), plan.scorer)


def test_images_are_encoded_once_for_both_passes_and_prompts_of_text_compute_as_before() -> None:
    model = vm.build("qwen3_vl")
    with_images, text, _ = samples = vm.samples_for("qwen3_vl", model.config)
    model = vm.adapted(model)
    before = completion_logps(model, pack([text]), plan_forward(model).scorer).token_logps_N
    plan = plan_forward(model, images=samples)
    calls: list[Any] = []
    images.encoder_parts(model.get_base_model())[0].register_forward_hook(lambda *given: calls.append(given))
    assert torch.equal(completion_logps(model, pack([text]), plan.scorer).token_logps_N, before)
    assert not calls
    batch = pack(samples)
    reference_logps(model, batch, plan.scorer)
    completion_logps(model, batch, plan.scorer)
    assert len(calls) == 1
    one_more = with_images._replace(prompt=[*with_images.prompt, vm.IMAGE])
    with pytest.raises(ValueError, match="15 image tokens, and the model makes 14 features"):
        completion_logps(model, pack([one_more]), plan.scorer)


# ---- What goes wrong is noticed -------------------------------------------------------------------------------------


def one_axis(given: images.Embedded) -> images.Embedded:
    return given._replace(positions=given.positions[:1])


def no_deepstack(given: images.Embedded) -> images.Embedded:
    return given._replace(added=())


def rolled(given: images.Embedded) -> images.Embedded:
    return given._replace(x_TH=given.x_TH.roll(1, 0))


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("qwen2_5_vl", one_axis), ("qwen3_vl", one_axis), ("qwen3_vl", no_deepstack), ("llava", rolled)],
    ids=lambda x: x if isinstance(x, str) else x.__name__,
)
def test_layers_that_are_given_something_else_are_refused(name: str, wrong: Any, monkeypatch: Any) -> None:
    model = vm.build(name)
    samples = vm.samples_for(name, model.config)
    model = vm.adapted(model)
    right = images.embedded
    monkeypatch.setattr(decoder, "embedded", lambda *given: wrong(right(*given)))
    plan = plan_forward(model, images=samples)
    assert plan.shared and plan.fused is None and "fused log-probs differ by" in plan.unfused


@pytest.mark.parametrize("name", ["gemma3", "gemma4_moe", "paligemma"])
def test_blocks_that_are_left_out_are_noticed(name: str, monkeypatch: Any) -> None:
    model = vm.build(name)
    samples = vm.samples_for(name, model.config)
    model = vm.adapted(model)
    assert plan_forward(model, images=samples).fused
    monkeypatch.setattr(decoder, "block_ids", lambda config, batch: None)
    plan = plan_forward(model, images=samples)
    assert plan.shared and plan.fused is None and "fused log-probs differ by" in plan.unfused


@pytest.mark.parametrize("name", ["gemma3", "paligemma"])
def test_the_image_token_may_be_outside_of_the_vocabulary(name: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(vm, "IMAGE", 400)
    model = vm.build(name)
    model.config.image_token_id = 400
    samples = vm.samples_for(name, model.config)
    model = vm.adapted(model)
    own = vm.OwnRows(model, name, samples)
    plan = plan_forward(model, images=samples)
    assert plan.fused, plan.unfused
    own.assert_same(model, pack(samples), plan.scorer)
