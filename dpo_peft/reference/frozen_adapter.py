"""Adapters inside one PEFT model: the tensors of one of them, a frozen copy, a mixture of two.

A frozen adapter is the reference of a run that trains a trained adapter again. Which tensors belong to an adapter is
read off the modules that PEFT put into the model, not off names: a copy that is matched on names ("lora_A") misses
LoRA on embeddings, DoRA's magnitudes, single trained tokens and saved modules.
"""

import copy
import itertools
from collections.abc import Iterator
from typing import Any, TypeAlias

import torch
from peft import PeftModel
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..errors import ReferenceMismatchError

AdapterLayer: TypeAlias = BaseTunerLayer | AuxiliaryTrainingWrapper  # what PEFT wraps around the base's modules
_BY_ADAPTER = (nn.ModuleDict, nn.ParameterDict, BufferDict)  # how PEFT keeps what there is once per adapter
_WRAPPED = ("base_layer", "original_module")  # where a wrapping module keeps what it wraps


def adapter_tensors(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """Returns every tensor of one adapter, parameters and buffers, the live ones rather than copies. An adapter that
    the model does not have has no tensors.

    Returns:
        By canonical name, which is the same whatever the adapter is called: the wrapping module's name, the kind and
        what is left, such as "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight". A tensor that several
        modules share stands there once.
    """
    found: dict[int, tuple[str, Tensor]] = {}
    for at, layer in adapter_layers(model):
        for name, tensor in layer_tensors(layer, adapter):
            found.setdefault(id(tensor), (f"{at}.{name}", tensor))
    return dict(found.values())


def adapter_layers(model: nn.Module) -> Iterator[tuple[str, AdapterLayer]]:
    """Yields the modules that PEFT wrapped around those of the base, with their names."""
    for name, module in model.named_modules():
        if isinstance(module, AdapterLayer):
            yield name, module


def holds_adapter(layer: AdapterLayer, adapter: str) -> bool:
    """Returns whether one of the `adapter_layers` has anything of the adapter."""
    if isinstance(layer, AuxiliaryTrainingWrapper):
        return adapter in layer._adapters
    return any(adapter in getattr(layer, kind) for kind in layer.adapter_layer_names)


def _held(layer: nn.Module, adapter: str) -> Iterator[tuple[str, Any]]:
    """Yields the containers of a layer that have a module or tensor of the adapter, by kind."""
    for kind, held in layer.named_children():
        if kind not in _WRAPPED and isinstance(held, _BY_ADAPTER) and adapter in held:
            yield kind, held


def layer_tensors(layer: nn.Module, adapter: str) -> Iterator[tuple[str, Tensor]]:
    """Yields the adapter's tensors in one of the `adapter_layers`, by kind and what is left of their names."""
    for kind, held in _held(layer, adapter):
        part = held[adapter]
        if isinstance(part, Tensor):
            yield kind, part
        else:
            yield from ((f"{kind}.{name}", t) for name, t in (*part.named_parameters(), *part.named_buffers()))


def same_values(a: Tensor, b: Tensor) -> bool:
    """Returns whether shape and values are equal; the dtypes may differ."""
    return a.shape == b.shape and bool((a == b).all())  # bfloat16 is compared as float32, exactly


def freeze_copy(model: PeftModel) -> str:
    """Copies the active adapter inside the model, frozen, never active outside `reference_mode`. Returns its name.

    The copy is made module by module rather than by PEFT's `add_adapter`, which would run the adapter's initialization
    again: PiSSA and its like would rewrite the base a second time. Raises `ReferenceMismatchError` if some tensor or
    setting of the adapter has no equal twin in the copy.
    """
    (adapter,) = model.active_adapters
    name = unused_name(model)
    memo: dict[int, object] = {}  # one for all: what modules share, their copies share
    for _, layer in adapter_layers(model):
        for _, held in _held(layer, adapter):
            held[name] = _twin(held[adapter], memo)
        for settings in _settings(layer, adapter):
            settings[name] = copy.deepcopy(settings[adapter])
        if isinstance(layer, AuxiliaryTrainingWrapper) and adapter in layer._adapters:
            layer._adapters.add(name)
    config = copy.deepcopy(model.peft_config[adapter])
    config.inference_mode = True
    config.init_lora_weights = True  # saved and loaded again, it must not rewrite a base
    model.peft_config[name] = config
    _check_copy(model, adapter, name)
    return name


def unused_name(model: PeftModel) -> str:
    """Returns a name for one more adapter: "reference", or "reference_1" and so on where that is taken."""
    taken = set(model.peft_config).union(*(name.split(".") for name, _ in model.named_modules()))
    names = itertools.chain(["reference"], (f"reference_{number}" for number in itertools.count(1)))
    return next(name for name in names if name not in taken)


def _twin(part: nn.Module | Tensor, memo: dict[int, object]) -> nn.Module | Tensor:
    """Returns a frozen copy of an adapter's module or tensor."""
    return copy.deepcopy(part, memo).requires_grad_(False)


def _settings(layer: nn.Module, adapter: str) -> list[dict[str, object]]:
    """Returns what a layer keeps by adapter in plain dicts: rank, scaling, variant, token indices, ..."""
    own = ((name, held) for name, held in vars(layer).items() if not name.startswith("_") and name != "kwargs")
    return [held for _, held in own if isinstance(held, dict) and adapter in held]


def _check_copy(model: PeftModel, adapter: str, name: str) -> None:
    """Compares the copy with the adapter, found otherwise than in copying: by names and by PEFT's own lists."""
    wrong = []
    for at, layer in adapter_layers(model):
        tensors = dict((*layer.named_parameters(remove_duplicate=False), *layer.named_buffers(remove_duplicate=False)))
        twins: dict[str, tuple[object, object]] = {}
        for key, tensor in tensors.items():
            path = key.split(".")
            if path[0] not in _WRAPPED and adapter in path:
                path[path.index(adapter)] = name
                twins[key] = tensor, tensors.get(".".join(path))
        for kind in (*layer.other_param_names, "lora_variant"):
            if isinstance(settings := getattr(layer, kind, None), dict):
                twins[kind] = settings.get(adapter), settings.get(name)
        wrong += [f"{at}.{key}: {how}" for key, two in twins.items() if (how := _difference(*two))]
    if wrong:
        raise ReferenceMismatchError(
            f"The frozen copy of adapter {adapter!r} is not exact in {len(wrong)} places, such as {wrong[0]}. This "
            "kind of adapter can't be its own reference: merge it into the base (merge_and_unload) and train a fresh "
            'one, or choose reference="base".'
        )


def _difference(ours: object, twin: object) -> str | None:
    if not isinstance(ours, Tensor):
        # Objects without a comparison of their own, such as LoRA variants, are compared by their class.
        alike = type(ours) is type(twin) and type(ours).__eq__ is object.__eq__
        return None if alike or ours == twin else f"{ours} and {twin}"
    if not isinstance(twin, Tensor):
        return "has no twin"
    if (ours.dtype, ours.device, ours.shape) != (twin.dtype, twin.device, twin.shape):
        return f"{ours.dtype} {list(ours.shape)} on {ours.device}, its twin {twin.dtype} {list(twin.shape)}"
    if twin.requires_grad or (ours.numel() and ours.untyped_storage().data_ptr() == twin.untyped_storage().data_ptr()):
        return "the twin would be trained"
    ours_B, twin_B = (tensor.detach().reshape(-1).view(torch.uint8) for tensor in (ours, twin))  # NaN equals itself
    return None if torch.equal(ours_B, twin_B) else "the values differ"


def mix_into(model: PeftModel, adapter: str, frozen: str, alpha: float) -> None:
    """Does TR-DPO's update of the reference: frozen = alpha * policy + (1 - alpha) * frozen (Gorbatovski et al. 2024).

    In place, every floating-point tensor of the adapter. Factors are mixed, not their product: with alpha below 1 the
    reference's LoRA update is a little off the mixture of the two updates; alpha 1 is an exact copy. Raises
    `ReferenceMismatchError` if the two adapters are not of the same build.
    """
    ours, its = adapter_tensors(model, adapter), adapter_tensors(model, frozen)
    odd = sorted(ours.keys() ^ its.keys()) or [name for name in ours if ours[name].shape != its[name].shape]
    scalings = ((at, getattr(layer, "scaling", {})) for at, layer in adapter_layers(model))
    odd += [f"{at} (scaling)" for at, scaling in scalings if scaling.get(adapter) != scaling.get(frozen)]
    if odd or not ours:
        raise ReferenceMismatchError(
            f"The adapters {adapter!r} and {frozen!r} can't be mixed, they differ in {odd[0] if odd else 'everything'}"
            ". A reference that follows the policy must have the same rank, targets and scaling: start it as a copy "
            '(reference="initial").'
        )
    # Tied factors are two views of one storage, which is to move once.
    distinct = {t.untyped_storage().data_ptr(): (name, t) for name, t in its.items() if t.is_floating_point()}
    with torch.no_grad():
        for name, tensor in distinct.values():
            tensor.lerp_(ours[name].to(tensor), alpha)
