"""Adapters inside one PEFT model: the tensors of one of them, a frozen copy, another one by path, a mixture of two.

A frozen adapter is the reference of a run that goes on from a trained adapter. Which tensors belong to an adapter is
read off the modules that PEFT put into the model, not off names: a copy that is matched on names ("lora_A") misses
LoRA on embeddings, DoRA's magnitudes, single trained tokens and saved modules.
"""

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, load_peft_weights, set_peft_model_state_dict
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..errors import OptionError, ReferenceMismatchError

logger = logging.getLogger(__name__)

_BY_ADAPTER = (nn.ModuleDict, nn.ParameterDict, BufferDict)  # how PEFT keeps what there is once per adapter
_WRAPPED = ("base_layer", "original_module")  # where a wrapping module keeps what it wraps

# What these initialisations do to the base weights, or where they start the adapter.
_MOVED_BASE = {
    "pissa": "takes the adapter out of the base weights, so the base without it is another model",
    "olora": "takes the adapter out of the base weights, so the base without it is another model",
    "corda": "takes the adapter out of the base weights, so the base without it is another model",
    "loftq": "replaces the base weights, so the base without the adapter is another model",
    "lora_ga": "takes the adapter out of the base weights, so the base without it is another model",
    False: "starts the adapter off zero, so the policy is not the reference at the first step",
}


def check_adapter(config: Any) -> None:
    """Refuse an adapter that no reference can be kept for.

    Args:
        config: the PEFT config of the adapter to train, or of one that is loaded as the reference.

    Raises:
        OptionError: not a LoRA adapter, or one that trains the base's biases or acts on some tokens only.
    """
    if not isinstance(config, LoraConfig):
        raise OptionError(
            f"peft_config is a {type(config).__name__}: only LoRA (with rsLoRA, DoRA, modules_to_save, "
            "trainable_token_indices) is supported, since the reference is the same model with the adapter off or "
            "exchanged. Use peft.LoraConfig."
        )
    if config.bias != "none":
        raise OptionError(
            f"peft_config.bias={config.bias!r} trains the base model's own biases, and switching the adapter off does "
            'not restore them: the reference would drift unnoticed. Set bias="none".'
        )
    if config.alora_invocation_tokens:
        raise OptionError(
            "peft_config.alora_invocation_tokens is not supported: an activated LoRA acts only after its invocation "
            "tokens, which packed prompts don't keep track of. Leave it out."
        )


def moved_base(config: LoraConfig) -> str | None:
    """What the adapter's initialisation does that keeps the bare base from being its start, as a clause; or None."""
    init = config.init_lora_weights
    key = init.lower().split("_niter")[0] if isinstance(init, str) else init
    return f"init_lora_weights={init!r} {_MOVED_BASE[key]}" if key in _MOVED_BASE else None


def adapter_tensors(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """Every tensor of one adapter, parameters and buffers, the live ones rather than copies.

    Args:
        model: a PEFT model.
        adapter: its name in the model. One that the model does not have has no tensors.

    Returns:
        By canonical name, which is the same whatever the adapter is called: the wrapping module's name, the kind and
        what is left, such as "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight". A tensor that several
        modules share stands there once.
    """
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for prefix, layer in adapter_layers(model):
        for name, tensor in layer_tensors(layer, adapter):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                tensors[f"{prefix}.{name}"] = tensor
    return tensors


def adapter_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The modules that PEFT wrapped around those of the base, with their names."""
    for name, module in model.named_modules():
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            yield name, module


def holds_adapter(layer: Any, adapter: str) -> bool:
    """Whether one of the `adapter_layers` has anything of the adapter."""
    if isinstance(layer, AuxiliaryTrainingWrapper):
        return adapter in layer._adapters
    return any(adapter in getattr(layer, kind) for kind in layer.adapter_layer_names)


def _held(layer: nn.Module, adapter: str) -> Iterator[tuple[str, Any]]:
    """The containers of a layer that have an entry for the adapter, by kind."""
    for kind, held in layer.named_children():
        if kind not in _WRAPPED and isinstance(held, _BY_ADAPTER) and adapter in held:
            yield kind, held


def layer_tensors(layer: nn.Module, adapter: str) -> Iterator[tuple[str, Tensor]]:
    """The adapter's tensors in one of the `adapter_layers`, by kind and what is left of their names."""
    for kind, held in _held(layer, adapter):
        part = held[adapter]
        if isinstance(part, Tensor):
            yield kind, part
        else:
            yield from ((f"{kind}.{name}", p) for name, p in part.named_parameters())
            yield from ((f"{kind}.{name}", b) for name, b in part.named_buffers())


def same_values(a: Tensor, b: Tensor) -> bool:
    """Equal shape and values; the dtypes may differ."""
    return a.shape == b.shape and bool((a == b).all())  # bfloat16 is compared as float32, exactly


def freeze_copy(model: PeftModel) -> str:
    """Copy the active adapter inside the model, frozen, never active outside `reference_mode`.

    The copy is made module by module rather than by PEFT's `add_adapter`, which would run the adapter's initialisation
    again: PiSSA and its like would rewrite the base a second time.

    Returns:
        The copy's name: "reference", or "reference_1" and so on where that is taken.

    Raises:
        ReferenceMismatchError: some tensor or setting of the adapter has no equal twin in the copy.
    """
    (adapter,) = model.active_adapters
    name = _unused_name(model)
    memo: dict[int, Any] = {}  # one for all: what modules share, their copies share
    for _, layer in adapter_layers(model):
        for _, held in list(_held(layer, adapter)):
            if name not in held:
                held[name] = _twin(held[adapter], memo)
        for settings in _settings(layer):
            if adapter in settings:
                settings[name] = copy.deepcopy(settings[adapter])
        if isinstance(layer, AuxiliaryTrainingWrapper) and adapter in layer._adapters:
            layer._adapters.add(name)
    config = copy.deepcopy(model.peft_config[adapter])
    config.inference_mode = True
    if moved_base(config):
        config.init_lora_weights = True  # saved and loaded again, it must not rewrite a base
    model.peft_config[name] = config
    _check_copy(model, adapter, name)
    return name


def _unused_name(model: PeftModel) -> str:
    taken = set(model.peft_config).union(*(name.split(".") for name, _ in model.named_modules()))
    number = 0
    while (name := f"reference_{number}" if number else "reference") in taken:
        number += 1
    return name


def _twin(part: Any, memo: dict[int, Any]) -> Any:
    """A frozen copy of an adapter's module or tensor."""
    return copy.deepcopy(part, memo).requires_grad_(False)


def _settings(layer: nn.Module) -> list[dict[str, Any]]:
    """What a layer keeps by adapter and is not a module or tensor: rank, scaling, variant, token indices, ..."""
    return [
        held
        for attribute, held in vars(layer).items()
        if isinstance(held, dict) and not attribute.startswith("_") and attribute != "kwargs"
    ]


def _check_copy(model: PeftModel, adapter: str, name: str) -> None:
    """The copy against the original, found by the adapter's name in the names of tensors and by PEFT's own lists."""
    wrong = []
    for prefix, layer in adapter_layers(model):
        ours, twins = _by_name(layer, adapter), _by_name(layer, name)
        wrong += [f"{prefix}.{key} has no twin" for key in sorted(ours.keys() ^ twins.keys())]
        for key in sorted(ours.keys() & twins.keys()):
            if difference := _difference(ours[key], twins[key]):
                wrong.append(f"{prefix}.{key}: {difference}")
        for attribute in (*layer.other_param_names, "lora_variant"):
            settings = getattr(layer, attribute, None) if "." not in attribute else None
            if isinstance(settings, dict):
                mine, its = _comparable(settings.get(adapter)), _comparable(settings.get(name))
                wrong += [] if mine == its else [f"{prefix}.{attribute}: {mine} and {its}"]
    if wrong:
        raise ReferenceMismatchError(
            f"The frozen copy of adapter {adapter!r} is not exact in {len(wrong)} places, such as {wrong[0]}. This "
            "kind of adapter can't be its own reference: merge it into the base (merge_and_unload) and train a fresh "
            'one, or choose reference="base".'
        )


def _by_name(layer: nn.Module, adapter: str) -> dict[str, Tensor]:
    found = {}
    for tensors in (layer.named_parameters(remove_duplicate=False), layer.named_buffers(remove_duplicate=False)):
        for name, tensor in tensors:
            parts = name.split(".")
            if parts[0] not in _WRAPPED and adapter in parts:
                parts.remove(adapter)
                found[".".join(parts)] = tensor
    return found


def _difference(ours: Tensor, twin: Tensor) -> str | None:
    if (ours.dtype, ours.device, ours.shape) != (twin.dtype, twin.device, twin.shape):
        return f"{ours.dtype} {list(ours.shape)} on {ours.device}, its twin {twin.dtype} {list(twin.shape)}"
    if ours.numel() and ours.untyped_storage().data_ptr() == twin.untyped_storage().data_ptr():
        return "the twin is the same tensor and would be trained with it"
    if twin.requires_grad:
        return "the twin is not frozen"
    ours_B, twin_B = (tensor.detach().reshape(-1).view(torch.uint8) for tensor in (ours, twin))  # NaN equals itself
    return None if torch.equal(ours_B, twin_B) else "the values differ"


def _comparable(setting: Any) -> Any:
    """Objects without a comparison of their own, such as LoRA variants, by their class."""
    return setting if setting is None or type(setting).__eq__ is not object.__eq__ else type(setting)


def read_config(source: str, **from_hub: Any) -> PeftConfig:
    """The PEFT config of an adapter's folder or Hub id; `from_hub` is passed on, such as a revision.

    Raises:
        OptionError: there is none, or it can't be read.
    """
    try:
        return PeftConfig.from_pretrained(source, **from_hub)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OptionError(
            f"{source!r} is no adapter that can be read: {error}. Give a folder that holds adapter_config.json and "
            "adapter_model.safetensors, or a Hub id of one."
        ) from error


def load_frozen(model: PeftModel, folder: str) -> str:
    """Load another adapter into the model, frozen, as float32, never active outside `reference_mode`.

    It may have another rank and other targets than the trained one. The base and the trained adapter, with their
    `requires_grad` flags, stay as they are.

    Args:
        model: the PEFT model, one adapter active.
        folder: the adapter's folder or Hub id.

    Returns:
        Its name in the model, as for `freeze_copy`.

    Raises:
        OptionError: no adapter there, one that can't be a reference, or one that does not fit the model.
    """
    config = read_config(folder)
    _check_loadable(config, folder)
    ours, its = model.get_base_model().config._name_or_path, config.base_model_name_or_path
    if ours and its and ours != its:
        logger.warning("The reference %s was trained on %s and is used on %s: is it the same base?", folder, its, ours)
    name = _unused_name(model)
    config.inference_mode = True
    try:
        with torch.random.fork_rng(devices=[]):  # the run's random numbers don't depend on what its reference is
            model.add_adapter(name, config)
        weights = _adapter_weights(model, load_peft_weights(folder, device="cpu"), folder)
        with _only_its_wrappers(model, name):
            result = set_peft_model_state_dict(model, weights, adapter_name=name)
    except (OptionError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # PEFT and torch raise all kinds
        raise OptionError(
            f"reference={folder!r} does not fit the model or its trained adapter: {first_lines(error)} Choose an "
            "adapter of the same base; where PEFT can't wrap the same module in both, one of other targets."
        ) from error
    check_loaded(result, name, folder)
    for tensor in adapter_tensors(model, name).values():
        if isinstance(tensor, nn.Parameter) and tensor.is_floating_point():
            tensor.data = tensor.data.float()
            tensor.requires_grad_(False)
    return name


def _check_loadable(config: PeftConfig, folder: str) -> None:
    try:
        check_adapter(config)
    except OptionError as error:
        raise OptionError(f"reference={folder!r} can't be used: {error}") from error
    assert isinstance(config, LoraConfig)
    reason = moved_base(config) if config.init_lora_weights is not False else None
    reason = "kasa_config cuts down the base weights" if config.kasa_config else reason
    reason = "layer_replication repeats layers of the base" if config.layer_replication else reason
    if reason:
        raise OptionError(
            f"reference={folder!r} can't be loaded: its {reason}; loading it would change the base under the policy. "
            "Convert it to a plain LoRA first (PEFT's save_pretrained with path_initial_model_for_weight_conversion)."
        )


def first_lines(error: Exception, lines: int = 3) -> str:
    """An error of PEFT or torch, which may be pages of tensors, cut to what a message can hold."""
    return f"{type(error).__name__}: " + " ".join(str(error).split("\n")[:lines]).expandtabs(0)[:400]


@contextmanager
def _only_its_wrappers(model: PeftModel, adapter: str) -> Iterator[None]:
    """PEFT 0.21 looks for trained tokens of every adapter in every adapter's file, and fails: keep it from that."""
    wrappers = [w for _, w in adapter_layers(model) if isinstance(w, AuxiliaryTrainingWrapper)]
    others = [wrapper for wrapper in wrappers if not holds_adapter(wrapper, adapter)]
    for wrapper in others:
        wrapper.adapter_state_dict_load_map = lambda name: {}
    try:
        yield
    finally:
        for wrapper in others:
            del wrapper.adapter_state_dict_load_map


def _adapter_weights(model: PeftModel, weights: dict[str, Tensor], folder: str) -> dict[str, Tensor]:
    """The file's tensors without those of the base (PEFT saves an adapted embedding's base too), which must be ours.

    Raises:
        OptionError: the file's copy of a base tensor differs from the model's.
    """
    base = model.state_dict()
    for name in weights.keys() & base.keys():
        if not same_values(weights[name].to(base[name]), base[name]):
            raise OptionError(
                f"reference={folder!r} holds its own {name}, which differs from the model's: the reference belongs to "
                "another base. Load the base that it was trained on."
            )
    return {name: tensor for name, tensor in weights.items() if name not in base}


def check_loaded(result: Any, adapter: str, folder: str) -> None:
    """Refuse an adapter's file that has too few or too many tensors, which PEFT only warns of.

    Args:
        result: what `set_peft_model_state_dict` or `PeftModel.load_adapter` returned.

    Raises:
        OptionError: naming some of the tensors.
    """
    missing = [name for name in result.missing_keys if adapter in name.split(".") and "base_layer" not in name]
    for what, names in (("lacks", missing), ("holds what the model has no place for,", list(result.unexpected_keys))):
        if names:
            raise OptionError(
                f"The adapter {folder!r} {what} {len(names)} tensors, such as {names[0]}: it was made for another "
                "model or its file is damaged. Load the base that it was trained on, or save it again."
            )


def mix_into(model: PeftModel, adapter: str, frozen: str, alpha: float) -> None:
    """TR-DPO's update of the reference: frozen = alpha * policy + (1 - alpha) * frozen (Gorbatovski et al. 2024).

    In place, every floating-point tensor of the adapter. Factors are mixed, not their product: with alpha below 1 the
    reference's LoRA update is a little off the mixture of the two updates; alpha 1 is an exact copy.

    Raises:
        OptionError: alpha is not in [0, 1].
        ReferenceMismatchError: the two adapters are not of the same build.
    """
    if not 0 <= alpha <= 1:
        raise OptionError(f"alpha={alpha} of the reference's update must lie in [0, 1].")
    ours, its = adapter_tensors(model, adapter), adapter_tensors(model, frozen)
    odd = sorted(ours.keys() ^ its.keys()) or [name for name in ours if ours[name].shape != its[name].shape]
    for prefix, layer in adapter_layers(model):
        odd += [f"{prefix} (scaling)" for s in [getattr(layer, "scaling", {})] if s.get(adapter) != s.get(frozen)]
    if odd or not ours:
        raise ReferenceMismatchError(
            f"The adapters {adapter!r} and {frozen!r} can't be mixed, they differ in {odd[0] if odd else 'everything'}"
            ". A reference that follows the policy must have the same rank, targets and scaling: start it as a copy "
            '(reference="initial").'
        )
    done: set[int] = set()
    with torch.no_grad():
        for name, tensor in its.items():
            storage = tensor.untyped_storage().data_ptr()  # tied factors are two views of one
            if tensor.is_floating_point() and storage not in done:
                done.add(storage)
                tensor.lerp_(ours[name].to(tensor), alpha)
