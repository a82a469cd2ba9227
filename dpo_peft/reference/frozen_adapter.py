"""Adapters inside one PEFT model: the tensors of one of them, a frozen copy, another one by path, a mixture of two.

A frozen adapter is the reference of a run that trains a trained adapter again. Which tensors belong to an adapter is
read off the modules that PEFT put into the model, not off names: a copy that is matched on names ("lora_A") misses
LoRA on embeddings, DoRA's magnitudes, single trained tokens and saved modules.
"""

import copy
import itertools
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
_MOVED_BASE: dict[str | bool, str] = {
    **dict.fromkeys(
        ("pissa", "olora", "corda", "lora_ga"),
        "takes the adapter out of the base weights, so the base without it is another model",
    ),
    "loftq": "replaces the base weights, so the base without the adapter is another model",
    False: "starts the adapter off zero, so the policy is not the reference at the first step",
}


def check_adapter(config: PeftConfig) -> None:
    """Refuses an adapter that no reference can be kept for.

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
    """Returns, as a clause, why the adapter's initialisation keeps the bare base from being its start; or None."""
    init = config.init_lora_weights
    key = init.lower().split("_niter")[0] if isinstance(init, str) else init
    return f"init_lora_weights={init!r} {_MOVED_BASE[key]}" if key in _MOVED_BASE else None


# ---- The tensors of an adapter --------------------------------------------------------------------------------------


def adapter_tensors(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """Returns every tensor of one adapter, parameters and buffers, the live ones rather than copies.

    Args:
        model: a PEFT model.
        adapter: its name in the model. One that the model does not have has no tensors.

    Returns:
        By canonical name, which is the same whatever the adapter is called: the wrapping module's name, the kind and
        what is left, such as "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight". A tensor that several
        modules share stands there once.
    """
    found = ((f"{at}.{name}", t) for at, layer in adapter_layers(model) for name, t in layer_tensors(layer, adapter))
    tensors: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in found:
        tensors.setdefault(id(tensor), (name, tensor))
    return dict(tensors.values())


def adapter_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yields the modules that PEFT wrapped around those of the base, with their names."""
    for name, module in model.named_modules():
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            yield name, module


def holds_adapter(layer: Any, adapter: str) -> bool:
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


# ---- A frozen copy --------------------------------------------------------------------------------------------------


def freeze_copy(model: PeftModel) -> str:
    """Copies the active adapter inside the model, frozen, never active outside `reference_mode`.

    The copy is made module by module rather than by PEFT's `add_adapter`, which would run the adapter's initialisation
    again: PiSSA and its like would rewrite the base a second time.

    Returns:
        The copy's name: "reference", or "reference_1" and so on where that is taken.

    Raises:
        ReferenceMismatchError: some tensor or setting of the adapter has no equal twin in the copy.
    """
    (adapter,) = model.active_adapters
    name = _unused_name(model)
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
    if moved_base(config):
        config.init_lora_weights = True  # saved and loaded again, it must not rewrite a base
    model.peft_config[name] = config
    _check_copy(model, adapter, name)
    return name


def _unused_name(model: PeftModel) -> str:
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
    wrong = []
    for prefix, layer in adapter_layers(model):
        ours, twins = _found(layer, adapter), _found(layer, name)
        for key in sorted(ours.keys() | twins.keys()):
            if difference := _difference(ours.get(key), twins.get(key)):
                wrong.append(f"{prefix}.{key}: {difference}")
    if wrong:
        raise ReferenceMismatchError(
            f"The frozen copy of adapter {adapter!r} is not exact in {len(wrong)} places, such as {wrong[0]}. This "
            "kind of adapter can't be its own reference: merge it into the base (merge_and_unload) and train a fresh "
            'one, or choose reference="base".'
        )


def _found(layer: Any, adapter: str) -> dict[str, object]:
    """Returns an adapter's parts in a layer, found otherwise than in copying: by names and by PEFT's own lists."""
    found: dict[str, object] = {}
    duplicates = {"remove_duplicate": False}
    for name, tensor in (*layer.named_parameters(**duplicates), *layer.named_buffers(**duplicates)):
        parts = name.split(".")
        if parts[0] not in _WRAPPED and adapter in parts:
            parts.remove(adapter)
            found[".".join(parts)] = tensor
    for attribute in (*layer.other_param_names, "lora_variant"):
        settings = getattr(layer, attribute, None) if "." not in attribute else None
        if isinstance(settings, dict):
            found[attribute] = settings.get(adapter)
    return found


def _difference(ours: object, twin: object) -> str | None:
    if not isinstance(ours, Tensor) or not isinstance(twin, Tensor):
        if isinstance(ours, Tensor) or isinstance(twin, Tensor):
            return "has no twin"
        # Objects without a comparison of their own, such as LoRA variants, are compared by their class.
        alike = type(ours) is type(twin) and type(ours).__eq__ is object.__eq__
        return None if alike or ours == twin else f"{ours} and {twin}"
    if (ours.dtype, ours.device, ours.shape) != (twin.dtype, twin.device, twin.shape):
        return f"{ours.dtype} {list(ours.shape)} on {ours.device}, its twin {twin.dtype} {list(twin.shape)}"
    if twin.requires_grad or (ours.numel() and ours.untyped_storage().data_ptr() == twin.untyped_storage().data_ptr()):
        return "the twin would be trained"
    ours_B, twin_B = (tensor.detach().reshape(-1).view(torch.uint8) for tensor in (ours, twin))  # NaN equals itself
    return None if torch.equal(ours_B, twin_B) else "the values differ"


# ---- Another adapter ------------------------------------------------------------------------------------------------


def read_config(source: str, **from_hub: Any) -> PeftConfig:
    """Returns the PEFT config of an adapter's folder or Hub id; `from_hub` is passed on, such as a revision.

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
    """Loads another adapter into the model, frozen, as float32, never active outside `reference_mode`.

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
    """Returns an error of PEFT or torch, which may be pages of tensors, cut to what a message can hold."""
    return f"{type(error).__name__}: " + " ".join(str(error).split("\n")[:lines]).expandtabs(0)[:400]


@contextmanager
def _only_its_wrappers(model: PeftModel, adapter: str) -> Iterator[None]:
    """Keeps PEFT 0.21 from looking for trained tokens of every adapter in every adapter's file, where it fails."""
    wrappers = [layer for _, layer in adapter_layers(model) if isinstance(layer, AuxiliaryTrainingWrapper)]
    others = [wrapper for wrapper in wrappers if not holds_adapter(wrapper, adapter)]
    for wrapper in others:
        wrapper.adapter_state_dict_load_map = lambda name: {}
    try:
        yield
    finally:
        for wrapper in others:
            del wrapper.adapter_state_dict_load_map


def _adapter_weights(model: PeftModel, weights: dict[str, Tensor], folder: str) -> dict[str, Tensor]:
    """Leaves out the file's tensors of the base (PEFT saves an adapted embedding's base too), which must be ours."""
    base = model.state_dict()
    for name in weights.keys() & base.keys():
        if not same_values(weights[name].to(base[name]), base[name]):
            raise OptionError(
                f"reference={folder!r} holds its own {name}, which differs from the model's: the reference belongs to "
                "another base. Load the base that it was trained on."
            )
    return {name: tensor for name, tensor in weights.items() if name not in base}


def check_loaded(result: Any, adapter: str, folder: str) -> None:
    """Refuses an adapter's file that has too few or too many tensors, which PEFT only warns of.

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
    """Does TR-DPO's update of the reference: frozen = alpha * policy + (1 - alpha) * frozen (Gorbatovski et al. 2024).

    In place, every floating-point tensor of the adapter. Factors are mixed, not their product: with alpha below 1 the
    reference's LoRA update is a little off the mixture of the two updates; alpha 1 is an exact copy.

    Args:
        alpha: 0 to 1.

    Raises:
        ReferenceMismatchError: the two adapters are not of the same build.
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
    done: set[int] = set()
    with torch.no_grad():
        for name, tensor in its.items():
            storage = tensor.untyped_storage().data_ptr()  # tied factors are two views of one
            if tensor.is_floating_point() and storage not in done:
                done.add(storage)
                tensor.lerp_(ours[name].to(tensor), alpha)
