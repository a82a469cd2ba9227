"""A base model by name: its class, its dtype, and its linear layers in 4 bits."""

import copy
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PretrainedConfig, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..errors import OptionError
from .checkpoint_formats import Checkpoint
from .experts import experts_in_4_bits, warn_of_whole_experts
from .gguf import from_named
from .rebuilding import loader
from .targets import computes_linear, dtype_read, read_past

logger = logging.getLogger(__name__)

# Of `model_init_kwargs`: where the model's files are found.
_FILES = ("revision", "token", "cache_dir", "subfolder", "local_files_only", "code_revision", "trust_remote_code")
_DTYPES = ("auto", "bfloat16", "float16", "float32")
_KEPT: ContextVar[dict[str, tuple[PreTrainedModel, torch.Tensor]] | None] = ContextVar("kept", default=None)


def nf4_config(compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """Returns NF4 with double quantization (Dettmers et al. 2023, QLoRA): about 4.13 bits per weight."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def base_config(name: str, init_kwargs: object = None, trust_remote_code: bool = False) -> PretrainedConfig:
    """Returns the config of a model by name, found where `init_kwargs` say; an OptionError if it can't be read."""
    given = init_kwargs if isinstance(init_kwargs, dict) else {}
    where = {key: given[key] for key in _FILES if given.get(key) is not None}
    try:
        return from_named(AutoConfig, name, **{"trust_remote_code": trust_remote_code, **where})
    except (OSError, ValueError, KeyError) as error:
        raise OptionError(f"The config of model_name_or_path={name!r} can't be read: {error}") from error


@contextmanager
def one_base() -> Iterator[None]:
    """Inside, a base that is asked for again in the same way is the one in memory, for trainers in turn: each takes
    its adapter off (`PeftModel.unload`) before the next one begins."""
    token = _KEPT.set({})
    try:
        yield
    finally:
        _KEPT.reset(token)


def load_base(
    name: str,
    quantization_config: QuantizationConfigMixin | None = None,
    quantize: bool = True,
    init_kwargs: Mapping[str, object] | None = None,
    trust_remote_code: bool = False,
    device: torch.device | None = None,
    class_name: str | None = None,
    experts: bool = True,
) -> PreTrainedModel:
    """Loads a causal LM by name or folder: bfloat16, its linear layers and experts in NF4, unless told otherwise.

    Its class is the one that its files name, so that an adapter fits what people serve: of a model of text and images
    the whole, even where AutoModelForCausalLM has a class for its text alone.

    Args:
        name: Hub id or local folder.
        quantization_config: replaces the default NF4 configuration.
        quantize: False loads without quantization (unless `quantization_config` is given).
        init_kwargs: for `from_pretrained`; `dtype` may be a string such as "float32".
        trust_remote_code: run code that ships with the model.
        device: where the model goes; the CPU if None.
        class_name: its class in transformers, where that and the quantization are known from a training.
        experts: False leaves the experts of a mixture in 16 bits, as an older version did.

    Raises:
        OptionError: contradictory options, a folder without a model, or one with a weight too few.
    """
    kept, asked = _KEPT.get(), repr((name, quantization_config, quantize, init_kwargs, device, class_name, experts))
    if kept and asked in kept:
        model, random_state = kept[asked]
        torch.set_rng_state(random_state)  # as loading it leaves that
        return model
    if kept is not None:
        kept.clear()
    kwargs = dict(init_kwargs or {})
    dtype = _read_dtype(kwargs.pop("dtype", kwargs.pop("torch_dtype", None)))
    if quantization_config is not None and "quantization_config" in kwargs:
        raise OptionError("quantization_config is given to the trainer and in model_init_kwargs: give one of them.")
    given = kwargs.pop("quantization_config", quantization_config)
    kwargs.setdefault("trust_remote_code", trust_remote_code)
    if device is not None and device.type != "cpu":
        kwargs.setdefault("device_map", {"": device})
    with unloadable_refused(name):
        checkpoint = Checkpoint(name, given, quantize, kwargs)
        quantization = nf4_config(torch.bfloat16 if isinstance(dtype, str) else dtype) if quantize else None
        quantization = quantization if given is None else given
        kind = loader(class_name)
        if class_name is None:
            config = from_named(AutoConfig, name, **{key: kwargs[key] for key in _FILES if key in kwargs})
            kind = class_of(config, bool(kwargs["trust_remote_code"]))
            if not checkpoint.is_kept:
                quantization = fitted(quantization, config, kind, bool(kwargs["trust_remote_code"]))
        with all_linear_quantized(quantization), experts_in_4_bits(experts):
            loading = {"output_loading_info": True, "ignore_mismatched_sizes": True, **kwargs}
            model, info = checkpoint.load(kind, dtype, quantization, **loading)
    _check_complete(name, model, info)
    warn_of_whole_experts(model)
    if kept is not None:
        kept[asked] = model, torch.get_rng_state()
    return model


@contextmanager
def unloadable_refused(name: str) -> Iterator[None]:
    """Turns what transformers raises inside about a model that it can't load into an OptionError."""
    try:
        yield
    except OptionError:
        raise
    except (OSError, ValueError, ImportError) as error:
        why = f"can't be loaded: {error}"
        if "Unrecognized configuration class" in why:  # followed by a list of all classes
            why = "is nothing that AutoModelForCausalLM loads. Load it by its own class and pass it."
        raise OptionError(f"model={name!r} {why}") from error


def class_of(config: PretrainedConfig, trust_remote_code: bool = False) -> Any:
    """Returns the class that loads a model: the one of transformers that its config names, where that is a language
    model's, or AutoModelForCausalLM, which also finds code beside the model."""
    usual = AutoModelForCausalLM._model_mapping.get(type(config), None)
    kind = getattr(transformers, (config.architectures or [""])[0], usual)
    beside = trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if kind is usual or beside or config.is_encoder_decoder or not issubclass(kind, GenerationMixin):
        return AutoModelForCausalLM
    return kind if kind.config_class is type(config) else AutoModelForCausalLM


def fitted(quantization: Any, config: PretrainedConfig, kind: Any, trust_remote_code: bool) -> Any:
    """Returns a bitsandbytes config that leaves out layers whose weights, or a tower's their dtype, the model reads
    itself, where it would find packed bytes, and takes in those that transformers overlooks. It lists what it leaves
    out: so it is recorded."""
    if not isinstance(quantization, BitsAndBytesConfig) or not quantization.is_quantizable():
        return quantization
    with torch.device("meta"):
        if kind is AutoModelForCausalLM:
            empty = kind.from_config(copy.deepcopy(config), trust_remote_code=trust_remote_code)
        else:
            empty = kind(copy.deepcopy(config))
    kept = read_past(empty) + dtype_read(empty)
    overlooked = {type(layer) for layer in empty.modules() if _is_overlooked(type(layer))}
    if not kept and not overlooked:
        return quantization
    quantization = copy.deepcopy(quantization)
    default = quantization.llm_int8_skip_modules or get_keys_to_not_convert(empty)
    ends = {".".join(name.split(".")[-2:]) for name in kept}
    quantization.llm_int8_skip_modules = sorted({*default, *ends})
    if kept:
        logger.info("Not quantized: %s, as the model reads their weights itself.", ", ".join(sorted(ends)))
    return quantization


def _is_overlooked(kind: Any) -> bool:
    ours = kind.__module__.startswith("transformers.models.")
    return ours and issubclass(kind, nn.Linear) and computes_linear(kind)


@contextmanager
def all_linear_quantized(quantization: object) -> Iterator[None]:
    """Inside, models are built with nn.Linear in the place of subclasses that compute the same, as bitsandbytes takes
    no others; if their quantization says what it leaves out."""
    found = []
    if getattr(quantization, "llm_int8_skip_modules", None) is not None:
        modules = [module for name, module in [*sys.modules.items()] if name.startswith("transformers.models.")]
        found = [
            (module, name, kind)
            for module in modules
            for name, kind in vars(module).items()
            if isinstance(kind, type) and kind.__module__ == module.__name__ and _is_overlooked(kind)
        ]
    for module, name, _ in found:
        setattr(module, name, nn.Linear)
    try:
        yield
    finally:
        for module, name, kind in found:
            setattr(module, name, kind)


def _check_complete(name: str, model: PreTrainedModel, info: Mapping[str, Any]) -> None:
    """Refuses a model some of whose weights are not in its files: they would be random. Those that its files hold
    beyond it are counted."""
    parameters = dict(model.named_parameters())
    missing = sorted(key for key in info["missing_keys"] if key in parameters)
    differing = list(info["mismatched_keys"])
    for key, layer in model.named_modules():  # transformers does not compare a shape that it quantizes
        if isinstance(layer, nn.Linear) and (state := getattr(layer.weight, "quant_state", None)) is not None:
            own = layer.out_features, layer.in_features
            differing += [(f"{key}.weight", state.shape, own)] if tuple(state.shape) != own else []
    shapes = [f"{key} is {[*its]} there and {[*own]} in the model" for key, its, own in differing]
    if missing or shapes:
        what = sorted(shapes)[0] if shapes else f"they lack {len(missing)} weights, such as {missing[0]}"
        raise OptionError(
            f"model={name!r}: its files don't fit {type(model).__name__}: {what}. These weights would be random. "
            "Download the model again, or save it whole."
        )
    if surplus := sorted(info["unexpected_keys"]):
        logger.info(
            "%d weights in the files of %r have no place in %s and are left out, such as %s.",
            *(len(surplus), name, type(model).__name__, surplus[0]),
        )


def _read_dtype(dtype: object) -> torch.dtype | str:
    name = "bfloat16" if dtype is None else str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise OptionError(f"model_init_kwargs['dtype']={dtype!r}: use one of {', '.join(map(repr, _DTYPES))}.")
    return name if name == "auto" else getattr(torch, name)
