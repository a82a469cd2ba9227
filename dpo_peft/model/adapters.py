"""LoRA adapters of others: which kinds are supported, read from disk, and loaded into a model as its reference.

PEFT only warns of tensors that an adapter's file lacks, and keeps quiet about those that the model has no place for.
Here every tensor is accounted for.
"""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, PeftType, load_peft_weights, set_peft_model_state_dict
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers.utils.peft_utils import find_adapter_config_file

from ..errors import OptionError
from ..manifests import check_one_run, settle
from ..reference.frozen_adapter import adapter_layers, adapter_tensors, holds_adapter, same_values, unused_name
from .experts import group_adapters
from .scope import check_answer_only, check_same_scope
from .targets import targets_as_named

logger = logging.getLogger(__name__)

# What these initializations do to the base weights, or where they start the adapter.
_MOVED_BASE: dict[str | bool, str] = {
    **dict.fromkeys(
        ("pissa", "olora", "corda", "lora_ga"),
        "takes the adapter out of the base weights, so the base without it is another model",
    ),
    "loftq": "replaces the base weights, so the base without the adapter is another model",
    False: "starts the adapter off zero, so the policy is not the reference at the first step",
}
# Where PEFT saves embeddings whole, trained rows are in the file a second time under these names.
_TWICE = re.compile(r"\.(modules_to_save\.weight|token_adapter\.trainable_tokens_delta)$")


def check_adapter(config: PeftConfig) -> None:
    """Refuses an adapter, to be trained or to be the reference, that no reference can be kept for: an `OptionError`
    for one that is not LoRA, that trains the base's biases, or an answer-only one of a kind that PEFT does not
    know."""
    if not isinstance(config, LoraConfig):
        raise OptionError(
            f"peft_config is a {type(config).__name__}: only LoRA (with rsLoRA, DoRA, modules_to_save, "
            "trainable_token_indices) is supported, since the reference is the same model with the adapter off or "
            "exchanged. Use peft.LoraConfig."
        )
    if config.peft_type != PeftType.LORA:  # a subclass: AdaLoRA
        raise OptionError(
            f"peft_config is a {type(config).__name__}, which needs a schedule of its own in every step: without it "
            "the adapter would be trained as a LoRA of the rank that it starts with. Use peft.LoraConfig."
        )
    if config.monteclora_config:
        raise OptionError(
            "peft_config.monteclora_config is not supported: it needs a loss of its own, and its noise in training "
            "would enter the policy's log-probs alone. Leave it out."
        )
    if config.bias != "none":
        raise OptionError(
            f"peft_config.bias={config.bias!r} trains the base model's own biases, and switching the adapter off does "
            'not restore them: the reference would drift unnoticed. Set bias="none".'
        )
    check_answer_only(config)


def moved_base(config: LoraConfig) -> str | None:
    """Returns, as a clause, why the adapter's initialization keeps the bare base from being its start; or None."""
    init = config.init_lora_weights
    key = init.lower().split("_niter")[0] if isinstance(init, str) else init
    return f"init_lora_weights={init!r} {_MOVED_BASE[key]}" if key in _MOVED_BASE else None


def is_adapter(name: str, **from_hub: object) -> bool:
    """Whether a folder or Hub id is that of an adapter; `from_hub` is passed on, such as a revision."""
    settle(Path(name))
    try:
        return find_adapter_config_file(name, **from_hub) is not None
    except (OSError, ValueError):  # no such repository: `load_base` says so
        return False


def read_config(source: str, **from_hub: Any) -> PeftConfig:
    """Returns the PEFT config of an adapter's folder or Hub id; `from_hub` is passed on, such as a revision. Raises an
    OptionError if there is none, it can't be read, or its files are not those of one run."""
    check_one_run(source)
    try:
        return PeftConfig.from_pretrained(source, **from_hub)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OptionError(
            f"{source!r} is no adapter that can be read: {error}. Give a folder that holds adapter_config.json and "
            "adapter_model.safetensors, or a Hub id of one."
        ) from error


def named_place(adapter: str, what: str, name: str | None) -> str:
    """Returns what an adapter's config names as its base or reference; nothing if it names none. Raises `OptionError`
    where an adapter of the Hub names a folder, which can't be meant to be one of this machine."""
    parts = re.split(r"[/\\]", name or "")
    if name and (len(parts) > 2 or ":" in name or {"", "~", ".", ".."} & {*parts}) and not Path(adapter).is_dir():
        raise OptionError(
            f"The adapter {adapter!r} of the Hub names a folder as its {what} ({name}). Look where that is from, and "
            f"give the {what} yourself."
        )
    return name or ""


@contextmanager
def misfits_refused(misfit: str, remedy: str = "") -> Iterator[None]:
    """Turns what PEFT and torch raise inside, of all kinds and pages long, into an OptionError of three lines."""
    try:
        yield
    except (OptionError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: " + " ".join(str(error).split("\n")[:3]).expandtabs(0)[:400]
        raise OptionError(f"{misfit}{reason} {remedy}".rstrip()) from error


def load_frozen(model: PeftModel, folder: str) -> str:
    """Loads another adapter, by folder or Hub id, into the model, frozen, as float32, never active outside
    `reference_mode`. Returns its name in the model.

    It may have another rank and other targets than the trained one. The base and the trained adapter, with their
    `requires_grad` flags, stay as they are. Raises `OptionError` where there is no adapter, or one that can't be a
    reference or does not fit the model.
    """
    config = read_config(folder)
    _check_loadable(config, folder)
    ours, its = model.get_base_model().config._name_or_path, config.base_model_name_or_path
    if ours and its and ours != its:
        logger.warning("The reference %s was trained on %s and is used on %s: is it the same base?", folder, its, ours)
    check_same_scope(model, model.active_adapters[0], config, f"reference={folder!r}")
    name = unused_name(model)
    config.inference_mode = True
    remedy = "Choose an adapter of the same base; where PEFT can't wrap the same module in both, one of other targets."
    with misfits_refused(f"reference={folder!r} does not fit the model or its trained adapter: ", remedy):
        # The run's random numbers don't depend on what its reference is.
        with torch.random.fork_rng(devices=[]), targets_as_named():
            model.add_adapter(name, config)
        group_adapters(model)
        weights = _adapter_weights(model, load_peft_weights(folder, device="cpu"), folder)
        with _only_its_wrappers(model, name):
            result = set_peft_model_state_dict(model, weights, adapter_name=name)
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
    """Raises an OptionError for an adapter's file with too few or too many tensors, by what PEFT's loader returned."""
    missing = [name for name in result.missing_keys if adapter in name.split(".") and "base_layer" not in name]
    surplus = [name for name in result.unexpected_keys if not _TWICE.search(name)]
    for what, names in (("lacks", missing), ("holds what the model has no place for,", surplus)):
        if names:
            raise OptionError(
                f"The adapter {folder!r} {what} {len(names)} tensors, such as {names[0]}: it was made for another "
                "model or its file is damaged. Load the base that it was trained on, or save it again."
            )
