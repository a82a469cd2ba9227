"""The reference policy: the same weights with the adapter switched off. There is no second model.

`reference_mode` is the only way to it. `check_adapter` refuses adapters that switching off does not undo. Then come
two measurements: `base_kept`, that attaching an adapter left the base alone, and `check_start`, before the first step,
that policy and reference really are the same.

Shape suffix: C completions.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from .errors import NonFiniteError, OptionError, ReferenceMismatchError
from .forward.layout import PackedBatch
from .forward.score import Scores, completion_logps, eval_mode

# What these initialisations do to the base weights, or where they start the adapter.
_MOVED_BASE = {
    "pissa": "takes the adapter out of the base weights, so the base without it is another model",
    "olora": "takes the adapter out of the base weights, so the base without it is another model",
    "corda": "takes the adapter out of the base weights, so the base without it is another model",
    "loftq": "replaces the base weights, so the base without the adapter is another model",
    "lora_ga": "takes the adapter out of the base weights, so the base without it is another model",
    False: "starts the adapter off zero, so the policy is not the reference at the first step",
}


@contextmanager
def reference_mode(model: nn.Module) -> Iterator[None]:
    """Inside, `model` is the reference: adapter off, eval mode (no dropout anywhere), no gradients.

    `model` is a PEFT model or the base inside one. Adapter, training flags and `requires_grad` flags are as before
    afterwards, exceptions or not.
    """
    # What `PeftModel.disable_adapter` does, without its survey of the whole model, which takes longer than the rest of
    # a small step. Switching a layer off and on again thaws all of its adapter, whatever a user froze.
    switchable = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    layers = [m for m in model.modules() if isinstance(m, switchable) and not m.disable_adapters]
    flags = [(p, p.requires_grad) for layer in layers for p in layer.parameters()]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        with torch.no_grad(), eval_mode(model):
            yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def reference_logps(model: PeftModel, batch: PackedBatch, backend: str = "dense") -> Scores:
    """Log-probs of a batch under the reference: `completion_logps` in `reference_mode`."""
    with reference_mode(model):
        return completion_logps(model, batch, backend)


def check_adapter(config: Any) -> None:
    """Refuse an adapter whose reference would silently be another model than the one it was built on.

    Args:
        config: the active adapter's PEFT config.

    Raises:
        OptionError: not a LoRA adapter, or one that changes the base, trains its biases or starts off zero.
    """
    if not isinstance(config, LoraConfig):
        raise OptionError(
            f"peft_config is a {type(config).__name__}: only LoRA (with rsLoRA, DoRA, modules_to_save) is supported, "
            "since the reference is the model with the adapter switched off. Use peft.LoraConfig."
        )
    if config.bias != "none":
        raise OptionError(
            f"peft_config.bias={config.bias!r} trains the base model's own biases, and switching the adapter off does "
            'not restore them: the reference would drift unnoticed. Set bias="none".'
        )
    init = config.init_lora_weights
    key = init.lower().split("_niter")[0] if isinstance(init, str) else init
    if key in _MOVED_BASE:
        raise OptionError(
            f"peft_config.init_lora_weights={init!r} {_MOVED_BASE[key]}. "
            'Set init_lora_weights=True (or "gaussian"), which starts at the reference exactly.'
        )
    if config.alora_invocation_tokens:
        raise OptionError(
            "peft_config.alora_invocation_tokens is not supported: an activated LoRA acts only after its invocation "
            "tokens, which packed prompts don't keep track of. Leave it out."
        )


@contextmanager
def base_kept(model: PreTrainedModel) -> Iterator[None]:
    """Around the wrapping of `model`: with the adapter off it must still be, bit for bit, what it was before.

    Some adapters rewrite the base when they are attached. It is measured on a few tokens rather than listed.

    Raises:
        ReferenceMismatchError: it isn't.
    """
    before = _sample_logits(model)
    yield
    with reference_mode(model):
        after = _sample_logits(model)
    if not torch.equal(before.nan_to_num(), after.nan_to_num()):
        raise ReferenceMismatchError(
            "Attaching the adapter changed the base model itself: with the adapter off its logits differ by up to "
            f"{float((before - after).abs().max()):.3g}, so the reference would be another model. Use a LoraConfig "
            "that leaves the base alone (init_lora_weights=True, no kasa_config, no layer_replication)."
        )


def _sample_logits(model: PreTrainedModel) -> Tensor:
    weight = model.get_input_embeddings().weight
    ids = torch.arange(4, device=weight.device)[None] * (weight.shape[0] // 4)
    with torch.no_grad(), eval_mode(model):
        return model(input_ids=ids, use_cache=False).logits


def check_start(model: PeftModel, batches: list[PackedBatch], backend: str = "dense") -> float:
    """The step-0 gate: before the first step, every implicit reward must be zero within the noise floor.

    The policy is scored with the adapter on and dropout as training will have it off; the floor is how far the
    reference's own log-probs move when the same completions are scored in another batch shape.

    Args:
        model: the PEFT model, untrained.
        batches: at least two batches over the same completions: the first as training sees it, the others hold the
            same samples in another shape.
        backend: attention backend.

    Returns:
        The largest difference found, in nats per sequence.

    Raises:
        ReferenceMismatchError: policy and reference differ by more than the floor.
    """
    whole, *parts = batches
    ref_C = reference_logps(model, whole, backend).logps_C
    with torch.no_grad():
        policy_C = completion_logps(model, whole, backend).logps_C
    if not torch.isfinite(ref_C).all():
        rows = ", ".join(map(str, whole.rows[whole.sample_of[~torch.isfinite(ref_C)]].unique().tolist()))
        raise NonFiniteError(
            f"Before the first step, the base model's own log-probs of training rows {rows} are not finite. Look at "
            "these rows and at the model's weights; a model made for bfloat16 may overflow in float16."
        )
    floor = _floor(ref_C, torch.cat([reference_logps(model, part, backend).logps_C for part in parts]))
    difference = float((policy_C - ref_C).abs().max())
    if not difference <= floor:
        raise ReferenceMismatchError(
            f"Before the first step, policy and reference differ by up to {difference:.3g} nats per completion (noise "
            f"floor {floor:.2g}). {_likely_cause(model)}"
        )
    return difference


def _floor(ref_C: Tensor, other_shape_C: Tensor) -> float:
    rounding = 1e-4 + 1e-6 * float(ref_C.abs().max())
    return rounding + 2 * float((ref_C - other_shape_C).abs().max())


def _likely_cause(model: PeftModel) -> str:
    dropouts = {m.p for m in model.modules() if isinstance(m, nn.Dropout) and m.training and m.p > 0}
    if dropouts:
        return f"Dropout of {max(dropouts)} is active in the policy: leave disable_dropout=True."
    starts_at_zero = [p for name, p in model.named_parameters() if ".lora_B." in name or "lora_embedding_A" in name]
    if any(p.abs().max() > 0 for p in starts_at_zero):
        return (
            "The adapter is not at its start (its B matrices are not zero): it was trained before, or its "
            "initialisation is not the identity. Continuing a trained adapter against itself is not available yet; "
            "merge it into the base first (model.merge_and_unload()) and train a fresh adapter."
        )
    return (
        "The adapter's initialisation changes the model. Use a fresh LoRA adapter with init_lora_weights=True, and "
        "check that nothing else modifies the model while the adapter is on."
    )
