"""A base model by name: its class, its dtype, and its linear layers in 4 bits."""

import re
from collections.abc import Mapping

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..errors import OptionError
from .experts import experts_in_4_bits, warn_of_whole_experts
from .rebuilding import loader

_DTYPES = ("auto", "bfloat16", "float16", "float32")


def nf4_config(compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """Returns NF4 with double quantization (Dettmers et al. 2023, QLoRA): about 4.13 bits per weight."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


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

    Args:
        name: Hub id or local folder.
        quantization_config: replaces the default NF4 configuration.
        quantize: False loads without quantization (unless `quantization_config` is given).
        init_kwargs: for `from_pretrained`; `dtype` may be a string such as "float32".
        trust_remote_code: run code that ships with the model.
        device: where the model goes; the CPU if None.
        class_name: its class in transformers, if it is not what AutoModelForCausalLM loads.
        experts: False leaves the experts of a mixture in 16 bits, as versions before 16 did.

    Raises:
        OptionError: contradictory options, or a folder without a model.
    """
    kwargs = dict(init_kwargs or {})
    dtype = _read_dtype(kwargs.pop("dtype", kwargs.pop("torch_dtype", None)))
    if quantization_config is not None and "quantization_config" in kwargs:
        raise OptionError("quantization_config is given to the trainer and in model_init_kwargs: give one of them.")
    if quantization_config is not None:
        kwargs["quantization_config"] = quantization_config
    elif quantize and "quantization_config" not in kwargs:
        kwargs["quantization_config"] = nf4_config(torch.bfloat16 if isinstance(dtype, str) else dtype)
    kwargs.setdefault("trust_remote_code", trust_remote_code)
    if device is not None and device.type != "cpu":
        kwargs.setdefault("device_map", {"": device})
    try:
        with experts_in_4_bits(experts):
            model = loader(class_name).from_pretrained(name, dtype=dtype, **kwargs)
    except (OSError, ValueError, ImportError) as error:
        if quantized := re.search(r"quantized with (\w+) but you are passing a BitsAndBytesConfig", str(error)):
            out = "" if quantization_config is None else "leave quantization_config out and "
            raise OptionError(
                f"model={name!r} is quantized already ({quantized[1]}): {out}set quantize_base=False. Then it is "
                "taken as it is."
            ) from error
        why = f"can't be loaded: {error}"
        if "Unrecognized configuration class" in why:  # followed by a list of all classes
            why = "is nothing that AutoModelForCausalLM loads. Load it by its own class and pass it."
        raise OptionError(f"model={name!r} {why}") from error
    warn_of_whole_experts(model)
    return model


def _read_dtype(dtype: object) -> torch.dtype | str:
    name = "bfloat16" if dtype is None else str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise OptionError(f"model_init_kwargs['dtype']={dtype!r}: use one of {', '.join(map(repr, _DTYPES))}.")
    return name if name == "auto" else getattr(torch, name)
