"""The reference policy: the same weights with the adapter switched off or exchanged. There is no second model.

`reference_mode` is the only way to it. `check_start` measures, before the first step, that policy and reference really
are the same.

Shape suffix: C completions.
"""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft import PeftModel
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from ..errors import NonFiniteError, OptionError, ReferenceMismatchError
from ..forward.layout import PackedBatch
from ..forward.modules import bring_in, eval_mode
from ..forward.probe import token_rounding
from ..forward.score import Backend, Decoder, Scores, completion_logps
from .frozen_adapter import AdapterLayer, holds_adapter, layer_tensors, same_values

logger = logging.getLogger(__name__)

# How a model card says it.
ADAPTER_OFF = "the same weights with the adapter switched off; no second model was held."


@dataclass
class Reference:
    """What the policy is compared with."""

    choice: str  # "base": the bare base. "initial": the adapter as it came in. "adapter": another one, by path
    adapter: str | None  # name of the frozen adapter in the model; None: the trained adapter is switched off
    source: str | None = None  # folder or Hub id that the frozen adapter was loaded from
    chosen: bool = False  # the user said which; not the default


def is_identity(model: nn.Module, adapter: str) -> bool:
    """Returns whether the adapter provably changes nothing, so that the model with it off is the same.

    Zero LoRA products and modules or token rows that equal the base's are proof. False means "not known": a fresh DoRA
    changes nothing either, but its magnitudes show that only up to rounding.
    """
    for module in model.modules():
        bring_in(module)  # a module that was saved is compared with the base's
        if isinstance(module, AdapterLayer) and not _adds_nothing(module, adapter):
            return False
    return True


def _adds_nothing(layer: AdapterLayer, adapter: str) -> bool:
    tensors = dict(layer_tensors(layer, adapter))
    if not tensors:
        return True
    if isinstance(layer, ModulesToSaveWrapper):
        saved, original = layer.modules_to_save[adapter].state_dict(), layer.original_module.state_dict()
        return saved.keys() == original.keys() and all(same_values(saved[name], original[name]) for name in saved)
    if isinstance(layer, TrainableTokensLayer):
        rows = layer.get_base_layer().weight[layer.token_indices[adapter]]
        return same_values(layer.trainable_tokens_delta[adapter], rows)
    factors = {"lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B"}
    zero = {name for name, tensor in tensors.items() if not tensor.any()}
    return bool(zero & factors) and tensors.keys() - factors <= zero & {"lora_B.bias"}


@contextmanager
def reference_mode(model: nn.Module, adapter: str | None = None) -> Iterator[None]:
    """Makes `model` the reference inside: eval mode (no dropout anywhere), no gradients, and the adapter exchanged.

    Adapter, training flags and `requires_grad` flags are as before afterwards, exceptions or not.

    Args:
        model: a PEFT model or the base inside one.
        adapter: the frozen adapter that alone is on inside; None switches all adapters off. Where a module has nothing
            of it, the module is the base's; where a module's adapter was switched off, it stays so.

    Raises:
        OptionError: the model has no such adapter.
    """
    # What `PeftModel.disable_adapter` and `set_adapter` do, without their survey of the whole model, which takes
    # longer than the rest of a small step, and without setting `requires_grad`, which thaws what a user froze.
    layers = [module for module in model.modules() if isinstance(module, AdapterLayer)]
    exchanged = [adapter is not None and holds_adapter(layer, adapter) for layer in layers]
    if adapter is not None and not any(exchanged):
        raise OptionError(f"The model has no adapter {adapter!r} to be the reference.")
    before = [(layer, layer._disable_adapters, layer._active_adapter) for layer in layers]
    try:
        for layer, on in zip(layers, exchanged, strict=True):
            layer._disable_adapters = layer._disable_adapters or not on
            layer._active_adapter = [adapter] if on else layer._active_adapter
        with torch.no_grad(), eval_mode(model):
            yield
    finally:
        for layer, disabled, active in before:
            layer._disable_adapters, layer._active_adapter = disabled, active


def reference_logps(
    model: PeftModel, batch: PackedBatch, backend: Backend = "dense", adapter: str | None = None
) -> Scores:
    """Log-probs of a batch under the reference: `completion_logps` in `reference_mode`.

    A `Decoder` takes the reference's adapter as an argument: it has no dropout and nothing to switch, which for
    small batches takes as long as the pass itself.
    """
    if isinstance(backend, Decoder) and batch.shared:
        with torch.no_grad():
            return completion_logps(model, batch, backend.reference(adapter))
    with reference_mode(model, adapter):
        return completion_logps(model, batch, backend)


def check_start(
    model: PeftModel, batches: list[PackedBatch], backend: Backend = "dense", adapter: str | None = None
) -> float:
    """Checks before the first step that every implicit reward is zero within the noise floor: the step-0 gate.

    It is for references that the policy starts at. The policy is scored with the adapter on and dropout as training
    will have it; the floor is how far the reference's own log-probs move when the same completions are scored in
    another batch shape, as far as rounding explains it: more is warned of, and not taken for noise. Returns the
    largest difference found, in nats per sequence.

    Args:
        model: the PEFT model, untrained.
        batches: at least two batches over the same completions: the first as training sees it, the others hold the
            same samples in another shape.
        adapter: name of the frozen adapter that is the reference; None: the adapter off.

    Raises:
        ReferenceMismatchError: policy and reference differ by more than the floor.
    """
    whole, *parts = batches
    ref_C = reference_logps(model, whole, backend, adapter).logps_C
    with torch.no_grad():
        policy_C = completion_logps(model, whole, backend).logps_C
    check_finite(ref_C, whole, "Before the first step, the reference's own log-probs of training rows")
    apart_C = torch.cat([reference_logps(model, part, backend, adapter).logps_C for part in parts])
    rounding = rounding_limit(model, whole)
    floor = noise_floor(ref_C, apart_C, rounding)
    if cause := neighbors_act(ref_C, apart_C, rounding):
        logger.warning(
            "%s So the loss depends on how rows are batched. Compute in float32, or take "
            "per_device_train_batch_size=1, and please report the model's name.",
            cause,
        )
    difference = float((policy_C - ref_C).abs().max())
    if not difference <= floor:
        raise ReferenceMismatchError(
            f"Before the first step, policy and reference differ by up to {difference:.3g} nats per completion (noise "
            f"floor {floor:.2g}). {_likely_cause(model, adapter)}"
        )
    return difference


def check_finite(logps_C: Tensor, batch: PackedBatch, what: str) -> None:
    """Raises NonFiniteError for log-probs that are NaN or infinite; `what` begins the message, dataset rows follow."""
    if (bad_C := ~torch.isfinite(logps_C)).any():
        rows = ", ".join(map(str, batch.rows[batch.sample_of[bad_C]].unique().tolist()))
        raise NonFiniteError(
            f"{what} {rows} are not finite. Look at these rows and at the model's weights; a model made for bfloat16 "
            "may overflow in float16."
        )


def noise_floor(ref_C: Tensor, other_shape_C: Tensor, rounding: float = math.inf) -> float:
    """Returns what a batch's shape may change, from (C,) log-probs of the same completions in two shapes; in nats.

    What is measured counts up to `rounding` (see `rounding_limit`). Otherwise a model whose log-probs depend on the
    other rows of a batch would be measured by this very defect, and nothing be noticed.
    """
    return 1e-4 + 1e-6 * float(ref_C.abs().max()) + min(2 * _moved(ref_C, other_shape_C), rounding)


def rounding_limit(model: nn.Module, batch: PackedBatch) -> float:
    """Returns by how many nats rounding may move a completion of a batch: the errors of its tokens add up at random.

    Measured on tiny models with 2 to 150 tokens on a CPU: at most a sixth of it in 8 bits, a ninth in 16, a 75th in
    32. The rest is for deeper models, and for kernels that GPUs choose by shape.
    """
    return 3 * token_rounding(model) * math.sqrt(int(batch.lengths.max()))


def neighbors_act(ref_C: Tensor, other_shape_C: Tensor, rounding: float) -> str:
    """Returns a sentence if log-probs move more with the other rows of a batch than rounding explains; else ""."""
    if not (moved := _moved(ref_C, other_shape_C)) > rounding + 1e-4:
        return ""
    return (
        f"Log-probs of the same completions differ by up to {moved:.3g} nats with the rows that are computed beside "
        f"them, and rounding explains {rounding:.2g}: they depend on their neighbors in a batch."
    )


def _moved(ref_C: Tensor, other_shape_C: Tensor) -> float:
    return float((ref_C - other_shape_C).abs().max())


def _likely_cause(model: PeftModel, adapter: str | None) -> str:
    dropouts = {m.p for m in model.modules() if isinstance(m, nn.Dropout) and m.training and m.p > 0}
    if dropouts:
        return f"Dropout of {max(dropouts)} is active in the policy: leave disable_dropout=True."
    if adapter is None and not is_identity(model, model.active_adapters[0]):
        return (
            "The adapter is not at its start: it was trained before, or its initialization is not the identity. To "
            'train it against itself as it came in, leave the reference at "initial"; against the bare base, say '
            'so with reference="base".'
        )
    return (
        "Something acts on the policy and not on the reference, or the other way round. Check that there are no hooks "
        "on the model and that nothing else modifies the model while the trained adapter is on."
    )
