"""Prompts with images: packed they give what a model gives on rows of its own, and each image is encoded once."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import vision_models as vm
import zoo
from peft import LoraConfig
from torch import Tensor, nn
from vision_models import EXACT, OwnRows, adapted

from dpo_peft.errors import OptionError
from dpo_peft.forward import (
    Sample,
    completion_logps,
    content_keys,
    halves,
    images,
    pack,
    pad_rows,
    plan_forward,
    score,
)
from dpo_peft.model.base import load_base
from dpo_peft.model.loading import attach_adapter
from dpo_peft.reference.adapter_off import check_start, reference_logps


@pytest.mark.sampled(12, slow=3)
@pytest.mark.parametrize("name", vm.ALL)
def test_values_and_gradients_are_those_of_the_models_own_rows(name: str) -> None:
    """Packed, and as padded rows; with prompts of two images, of none and of one in a batch."""
    model = vm.build(name)
    samples = vm.samples_for(name, model.config)
    model = adapted(model)
    own = OwnRows(model, name, samples)
    plan = plan_forward(model, images=samples, fused=False)
    assert plan.shared, plan.reason
    own.assert_same(model, pack(samples))
    own.assert_same(model, pad_rows(samples))
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    own.assert_same(model, pack(samples))


@pytest.mark.sampled(12, slow=3)
@pytest.mark.parametrize("name", vm.ALL)
def test_tower_and_projector_are_adapted_if_asked_for(name: str) -> None:
    """All layers of theirs that have an effect, with the gradients of the model's own rows, checkpointed or not."""
    model = vm.build(name)
    samples = vm.samples_for(name, model.config)
    model = adapted(model, samples[0])
    base = model.get_base_model()
    beside = {f"{n}." for n, m in base.named_modules() for part in images.encoder_parts(base) if m is part}
    own = OwnRows(model, name, samples)
    of_tower = {n: g for n, g in own.grads.items() if n.removeprefix("base_model.model.").startswith(tuple(beside))}
    assert len(of_tower) > 2 * len(beside) and len(of_tower) < len(own.grads)
    assert all(grad.any() for grad in own.grads.values())
    plan = plan_forward(model, images=samples, fused=False)
    assert plan.shared, plan.reason
    own.assert_same(model, pack(samples))
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    own.assert_same(model, pack(samples))
    own.assert_same(model, pad_rows(samples))


def test_a_projector_may_be_trained_whole() -> None:
    model = vm.build("llava")
    samples = vm.samples_for("llava", model.config)
    model = adapted(model, config=LoraConfig(target_modules=["q_proj"], modules_to_save=["multi_modal_projector"]))
    own = OwnRows(model, "llava", samples)
    assert any("multi_modal_projector" in name for name in own.grads)
    plan_forward(model, images=samples, fused=False)
    own.assert_same(model, pack(samples))


def test_lora_vision_without_an_effect_is_refused() -> None:
    (sample,) = vm.samples_for("llava", vm.build("llava").config, (1,))
    with pytest.raises(OptionError, match="LlamaForCausalLM takes no images"):
        attach_adapter(zoo.build("llama"), vision=sample)
    model = vm.build("llava")
    with pytest.raises(OptionError, match="lora_vision=True and target_modules"):
        attach_adapter(model, LoraConfig(target_modules=["q_proj"]), vision=sample)
    model, _ = attach_adapter(model)
    with pytest.raises(OptionError, match="lora_vision=True: the model has an adapter already"):
        attach_adapter(model, vision=sample)


# ---- Each image is encoded once -------------------------------------------------------------------------------------


def encoded(model: Any) -> list[int]:
    """Counts from now on how many images each call of the tower is given."""
    (tower, *_) = images.encoder_parts(model.get_base_model())
    counts: list[int] = []

    def count(module: nn.Module, args: Any, kwargs: Any) -> None:
        grid = kwargs.get("grid_thw")
        pixels = args[0] if args else kwargs["pixel_values"]
        counts.append(len(pixels if grid is None else grid))

    tower.register_forward_pre_hook(count, with_kwargs=True)
    return counts


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
@pytest.mark.parametrize("vision", [False, True])
def test_each_image_is_encoded_once_for_policy_and_reference(name: str, vision: bool) -> None:
    """And once for each where adapters in the tower tell them apart; however many completions a prompt has."""
    model = vm.build(name)
    samples = vm.samples_for(name, model.config, (2, 0, 1), lengths=(3, 5, 4))
    model = adapted(model, samples[0] if vision else None)
    plan_forward(model, images=samples)
    counts = encoded(model)
    for layout in (pack, pad_rows):
        counts.clear()
        batch = layout(samples)
        reference_logps(model, batch)
        completion_logps(model, batch).logps_C.sum().backward()
        assert counts == ([3, 3] if vision else [3]), layout


# ---- What goes wrong is noticed -------------------------------------------------------------------------------------


def no_blocks(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(score, "block_ids", lambda config, batch: None)


def one_block_for_all_images(patch: pytest.MonkeyPatch) -> None:
    right = images.block_ids

    def merged(config: Any, batch: Any) -> Any:
        blocks = right(config, batch)
        return blocks._replace(ids_T=blocks.ids_T.clamp(max=1))

    patch.setattr(score, "block_ids", merged)


def blocks_in_every_layer(patch: pytest.MonkeyPatch) -> None:
    right = images.block_ids
    patch.setattr(score, "block_ids", lambda config, batch: right(config, batch)._replace(everywhere=True))


def positions_of_text(patch: pytest.MonkeyPatch) -> None:
    """Completions continue from the number of the prompt's tokens, not from its largest position."""
    right = images._prompt_positions
    patch.setattr(images, "_prompt_positions", lambda body, sample: (right(body, sample)[0], len(sample.prompt)))


def shifted_by_one(patch: pytest.MonkeyPatch) -> None:
    right = images._prompt_positions

    def moved(body: Any, sample: Sample) -> tuple[Tensor, int]:
        positions, end = right(body, sample)
        return positions, end + 1

    patch.setattr(images, "_prompt_positions", moved)


def features_rolled(patch: pytest.MonkeyPatch) -> None:
    right = images._encode

    def encode(causal_lm: Any, given: Any) -> Any:
        out = right(causal_lm, given)
        pooled = out.pooler_output
        pooled = pooled.flatten(0, -2) if isinstance(pooled, Tensor) else torch.cat(tuple(pooled))
        out.pooler_output = [pooled.roll(1, 0)] if isinstance(out.pooler_output, tuple | list) else pooled.roll(1, 0)
        return out

    patch.setattr(images, "_encode", encode)


def no_deepstack(patch: pytest.MonkeyPatch) -> None:
    right = images._encode

    def encode(causal_lm: Any, given: Any) -> Any:
        out = right(causal_lm, given)
        out.deepstack_features = [[0 * x for x in layer] for layer in out.deepstack_features]
        return out

    patch.setattr(images, "_encode", encode)


def the_other_prompts_image(patch: pytest.MonkeyPatch) -> None:
    right = images.merge_inputs
    patch.setattr(images, "merge_inputs", lambda parts: right(parts[::-1]))


CONTROLS = [
    ("gemma3", no_blocks),
    ("gemma3", one_block_for_all_images),
    ("gemma3", features_rolled),
    ("gemma4_moe", no_blocks),
    ("gemma4_moe", blocks_in_every_layer),
    ("paligemma", no_blocks),
    ("paligemma", the_other_prompts_image),
    ("qwen2_5_vl", positions_of_text),
    ("qwen3_vl", shifted_by_one),
    ("qwen3_vl", no_deepstack),
    ("qwen3_vl", features_rolled),
    ("llava", the_other_prompts_image),
]


@pytest.mark.parametrize(("name", "wrong"), CONTROLS, ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_what_is_wrong_is_noticed(name: str, wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the comparison above, and by the probe: it falls back to rows, or refuses the model if they are wrong too."""
    model = vm.build(name)
    samples = vm.samples_for(name, model.config, (1, 1) if wrong is the_other_prompts_image else (2, 1))
    with torch.no_grad():
        own_N = vm.own_rows(model, name, samples)
        assert plan_forward(model, images=samples).shared
        wrong(monkeypatch)
        shared_N = completion_logps(model, pack(samples)).token_logps_N
    assert (shared_N - own_N).abs().max() > 1e-3
    if wrong is the_other_prompts_image:  # what the model itself is given is merged in the same way
        return
    try:
        plan = plan_forward(model, images=samples)
    except OptionError as error:
        assert "changes its logits" in str(error)
    else:
        assert not plan.shared and "log-probs differ by" in plan.reason


# ---- Batches of rows with and without images ------------------------------------------------------------------------


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", ["qwen3_vl", "idefics3", "paligemma", "pixtral", "gemma4", "llava_next"])
def test_rows_get_in_any_batch_what_they_get_alone(name: str) -> None:
    """Numbers and sizes of images differ from row to row."""
    model = vm.build(name)
    samples = vm.samples_for(name, model.config, (0, 2, 1, 3, 0), (4, 6))
    with torch.no_grad():
        own = [vm.own_rows(model, name, [sample]) for sample in samples]
        assert plan_forward(model, images=samples[1:2]).shared
        for order in ([0, 1, 2, 3, 4], [3, 0, 1], [4, 2], [0, 4]):
            for layout in (pack, pad_rows):
                batch = layout([samples[i] for i in order])
                assert (batch.images is None) == (order == [0, 4])
                logps_N = completion_logps(model, batch).token_logps_N
                assert (logps_N - torch.cat([own[i] for i in order])).abs().max() < EXACT
        first, second = halves(pack(samples))
        for half, part in ((first, own[:2]), (second, own[2:])):
            assert (completion_logps(model, half).token_logps_N - torch.cat(part)).abs().max() < EXACT
        (quarter, _) = halves(second)
        assert (completion_logps(model, quarter).token_logps_N - own[2]).abs().max() < EXACT
    assert halves(first)[0].images is None  # its only row has none


def test_keys_tell_images_apart() -> None:
    model = vm.build("llava")
    samples = vm.samples_for("llava", model.config, (1, 0))
    other = samples[0]._replace(images=replace(samples[0].images, key=b"another"))
    without = samples[0]._replace(images=None)
    keys = [content_keys(layout([sample])) for layout in (pack, pad_rows) for sample in (samples[0], other, without)]
    assert keys[:3] == keys[3:] and len({key for of_one in keys for key in of_one}) == 6
    assert content_keys(pack(samples[::-1])) == content_keys(pack(samples[1:])) + keys[0]


# ---- Dtypes and storage ---------------------------------------------------------------------------------------------


def pooled(model: Any, samples: Sequence[Sample]) -> Tensor:
    """All numbers that tower and projector make of the samples' images."""
    found = images.features(model, pack(samples).images).pooler_output
    return torch.cat([part.flatten() for part in found]).float()


@pytest.mark.sampled(24, slow=3)
@pytest.mark.parametrize("name", vm.ALL)
def test_four_bit_bases_start_at_their_reference(name: str, tmp_path: Path) -> None:
    """Loaded by name, as users do: bfloat16, and NF4 wherever a layer is linear, in the tower too."""
    model = vm.build(name, noise=0.05)
    samples = vm.samples_for(name, model.config)
    model.config.architectures = [type(model).__name__]
    whole = pooled(model.bfloat16(), samples)
    model.save_pretrained(tmp_path)
    model, _ = attach_adapter(load_base(str(tmp_path)), needs_reference=False)
    base = model.get_base_model()
    # A tower that casts pixels to the dtype of packed bytes would give others.
    assert torch.cosine_similarity(pooled(base, samples), whole, dim=0) > 0.9
    quantized = {n for n, p in base.named_parameters() if hasattr(p, "quant_state")}
    tower = {n for n, m in base.named_modules() for part in images.encoder_parts(base) if m is part}
    assert any(n.startswith(tuple(tower)) for n in quantized) and any(".layers.0." in n for n in quantized)
    plan = plan_forward(model, images=samples)
    assert plan.shared, plan.reason
    assert check_start(model, [pack(samples), *(pack([sample]) for sample in samples)], plan.scorer) == 0


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", ["qwen3_vl", "gemma3", "gemma4", "smolvlm", "mistral3"])
def test_autocast_moves_log_probs_as_much_as_it_moves_the_models_own(name: str) -> None:
    model = vm.build(name)
    samples = vm.samples_for(name, model.config)
    with torch.no_grad():
        exact_N = vm.own_rows(model, name, samples)
        with torch.autocast("cpu", torch.bfloat16):
            own_N = vm.own_rows(model, name, samples)
        assert plan_forward(model, dtype=torch.bfloat16, images=samples).shared
        with torch.autocast("cpu", torch.bfloat16):
            shared_N = completion_logps(model, pack(samples)).token_logps_N
    moved = (own_N - exact_N).abs().mean()
    assert 0.0001 < (shared_N - exact_N).abs().mean() < 1.5 * moved


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ["gemma3", "paligemma"])
def test_the_image_token_may_be_outside_of_the_vocabulary(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vm, "IMAGE", 400)
    model = vm.build(name)
    model.config.image_token_id = 400
    samples = vm.samples_for(name, model.config)
    model = adapted(model)
    own = OwnRows(model, name, samples)
    assert plan_forward(model, images=samples).shared
    own.assert_same(model, pack(samples))
    own.assert_same(model, pad_rows(samples))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", vm.BLOCKS)
def test_blocks_meet_windows_as_in_the_models_own_masks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images may have more tokens than a window. Families differ in whether it cuts them, and in which layers they see
    themselves whole."""
    model = vm.build(name, window=3)
    samples = vm.samples_for(name, model.config)
    with torch.no_grad():
        own_N = vm.own_rows(model, name, samples)
        plan = plan_forward(model, images=samples)
        assert plan.shared, plan.reason
        assert (completion_logps(model, pack(samples)).token_logps_N - own_N).abs().max() < EXACT
        batch = pack(samples)
        blocks = images.block_ids(model.config, batch)
        monkeypatch.setattr(score, "block_ids", lambda *given: blocks._replace(cut=not blocks.cut))
        assert (completion_logps(model, batch).token_logps_N - own_N).abs().max() > 1e-3


def test_a_model_that_takes_no_encoded_images_is_refused() -> None:
    samples = vm.samples_for("llava", vm.build("llava").config)
    with pytest.raises(OptionError, match=re.escape("remove_columns('images')")):
        plan_forward(zoo.build("llama").eval(), images=samples)
