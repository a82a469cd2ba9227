"""The reference policy: the same weights with the adapter switched off. There is no second model.

`reference_mode` is the only way to it. `check_adapter` refuses adapters that switching off does not undo, and
`check_start` measures, before the first step, that policy and reference really are the same.

Shape suffix: C completions.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor

from .errors import OptionError, ReferenceMismatchError
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
def reference_mode(model: PeftModel) -> Iterator[None]:
    """Inside, `model` is the reference: adapter off, eval mode (no dropout anywhere), no gradients.

    Adapter, training flags and `requires_grad` flags are as before afterwards, exceptions or not.
    """
    # PEFT turns requires_grad off and on again for whole adapters, which would thaw what a user froze.
    trainable = [p for p in model.parameters() if p.requires_grad]
    frozen_adapter = [p for name, p in model.named_parameters() if not p.requires_grad and _is_adapter(name)]
    try:
        with torch.no_grad(), eval_mode(model), model.disable_adapter():
            yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
        for parameter in frozen_adapter:
            parameter.requires_grad_(False)


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
    dropouts = {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout) and m.training and m.p > 0}
    if dropouts:
        return f"Dropout of {max(dropouts)} is active in the policy: leave disable_dropout=True."
    if any(p.abs().max() > 0 for name, p in model.named_parameters() if ".lora_B." in name or "lora_embedding_A" in name):
        return (
            "The adapter is not at its start (its B matrices are not zero): it was trained before, or its initialisation "
            "is not the identity. Continuing a trained adapter against itself is not available yet; merge it into the "
            "base first (model.merge_and_unload()) and train a fresh adapter."
        )
    return (
        "The adapter's initialisation changes the model. Use a fresh LoRA adapter with init_lora_weights=True, and "
        "check that nothing else modifies the model while the adapter is on."
    )


def _is_adapter(name: str) -> bool:
    return "lora_" in name or "modules_to_save" in name or "trainable_tokens" in name
