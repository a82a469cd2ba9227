"""The model that is trained: a frozen base, in 4 bits by default, with LoRA on its linear layers.

This trainer never trains the base. Trainable weights are float32 masters, whatever the base is stored in: in bfloat16
most updates at DPO's learning rates round to nothing.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PretrainedConfig, PreTrainedModel

from .errors import OptionError
from .reference import base_kept, check_adapter

logger = logging.getLogger(__name__)

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def default_lora() -> LoraConfig:
    """LoRA of rank 16 on every linear layer but the head, without dropout."""
    return LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")


def nf4_config(compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """NF4 with double quantisation (Dettmers et al. 2023, QLoRA): about 4.13 bits per weight."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def load_base(
    name: str,
    quantization_config: Any = None,
    quantize: bool = True,
    init_kwargs: dict[str, Any] | None = None,
    trust_remote_code: bool = False,
    device: torch.device | None = None,
) -> PreTrainedModel:
    """Load a causal LM by name or folder: bfloat16, its linear layers in NF4, unless told otherwise.

    Args:
        name: Hub id or local folder.
        quantization_config: replaces the default NF4 configuration.
        quantize: False loads without quantisation (unless `quantization_config` is given).
        init_kwargs: for `from_pretrained`; `dtype` may be a string such as "float32".
        trust_remote_code: run code that ships with the model.
        device: where the model goes; the CPU if None.

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
        kwargs["quantization_config"] = nf4_config(torch.bfloat16 if dtype == "auto" else dtype)
    kwargs.setdefault("trust_remote_code", trust_remote_code)
    if device is not None and device.type != "cpu":
        kwargs.setdefault("device_map", {"": device})
    try:
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **kwargs)
    except (OSError, ValueError) as error:
        raise OptionError(f"model={name!r} can't be loaded: {error}") from error


def _read_dtype(dtype: Any) -> Any:
    if dtype is None:
        return torch.bfloat16
    if isinstance(dtype, str) and dtype in _DTYPES:
        return _DTYPES[dtype]
    if dtype == "auto" or dtype in _DTYPES.values():
        return dtype
    raise OptionError(f"model_init_kwargs['dtype']={dtype!r}: use one of 'auto', {', '.join(map(repr, _DTYPES))}.")


def attach_adapter(model: PreTrainedModel | PeftModel, peft_config: Any = None) -> PeftModel:
    """The PEFT model to train: `model` itself if it has an adapter, else `model` with a new one.

    Everything but the active adapter is frozen; trainable weights become float32.

    Raises:
        OptionError: an adapter that can't be trained here (see `check_adapter`), a `peft_config` for a model that has
            an adapter already, several active adapters, or an adapter loaded for inference.
        ReferenceMismatchError: attaching the adapter changes the base.
    """
    keep_weights(model)
    if isinstance(model, PeftModel):
        if peft_config is not None:
            raise OptionError(
                "model is a PeftModel and peft_config is given too: pass the PeftModel alone to train its adapter, or "
                "the base model with peft_config."
            )
        _check_peft_model(model)
    elif getattr(model, "_hf_peft_config_loaded", False):
        raise OptionError(
            "model is an adapter's folder, or a model with an adapter loaded into it. Training starts from a bare "
            "base: give the base model's name, or merge the adapter first (merge_and_unload)."
        )
    else:
        peft_config = default_lora() if peft_config is None else peft_config
        check_adapter(peft_config)
        with base_kept(model):
            wrapped = get_peft_model(model, peft_config)
        model = wrapped
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            logger.info("%s is trained: cast from %s to float32.", name, parameter.dtype)
            parameter.data = parameter.data.float()
    return model


def _check_peft_model(model: PeftModel) -> None:
    active = model.active_adapters
    if len(active) != 1:
        raise OptionError(f"{len(active)} adapters are active ({active}): activate the one to train by set_adapter.")
    check_adapter(model.peft_config[active[0]])
    if not any(p.requires_grad for p in model.parameters()):
        raise OptionError(
            f"The adapter {active[0]!r} has no trainable weights: it was loaded for inference. Load it with "
            "PeftModel.from_pretrained(..., is_trainable=True)."
        )
    of_base = [n for n, p in model.named_parameters() if p.requires_grad and f".{active[0]}" not in n]
    if of_base:
        raise OptionError(
            f"{len(of_base)} weights outside the adapter {active[0]!r} are trainable (such as {of_base[0]}): the "
            "reference would change with them. Freeze them with requires_grad_(False)."
        )


def keep_weights(model: nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights in place.

    On a CPU with AVX512-BF16 its linear layers do so at the first forward in eval mode, for faster inference: scales
    are rounded to bfloat16, and the layer has no gradient any more. The reference is scored in eval mode, so it would
    change the weights under the policy.

    Raises:
        OptionError: it has happened already; the original weights are lost.
    """
    for name, module in model.named_modules():
        if getattr(getattr(getattr(module, "weight", None), "quant_state", None), "packing_format_for_cpu", False):
            raise OptionError(
                f"The 4-bit weights of {name} were repacked for inference when the model ran in eval mode on this "
                "CPU, and can't be trained on. Load the model again and pass it before running it, or pass its name."
            )
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def disable_dropout(model: nn.Module) -> list[str]:
    """Turn every kind of dropout off: modules, and the rates that modules and configs keep as plain numbers.

    Layer drop and the noise on a router's input, which act in training only too, count as dropout.

    Returns:
        The distinct names of what was on, for the log.
    """
    found = set()
    holders: list[Any] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and module.p > 0:
            found.add("lora_dropout" if "lora_dropout" in name else name.rsplit(".", 1)[-1])
            module.p = 0.0
        holders.append(module)
        if isinstance(getattr(module, "config", None), PretrainedConfig):  # some models read it at run time
            holders.append(module.config)
    for holder in holders:
        for attribute, value in list(vars(holder).items()):
            if isinstance(value, float) and value > 0 and _is_dropout(attribute):
                found.add(attribute)
                setattr(holder, attribute, 0.0)
    return sorted(found)


def _is_dropout(name: str) -> bool:
    return (
        "dropout" in name or name.endswith(("_pdrop", "layerdrop")) or name in ("jitter_noise", "input_jitter_noise")
    )


@dataclass
class StorageReport:
    """Where the bytes of a model are. Tied weights count once."""

    quantized: int = 0  # bytes of 4- or 8-bit weights with their quantisation constants
    unquantized: int = 0  # bytes of frozen weights in 16 or 32 bits
    trainable: int = 0  # bytes of trained weights
    trainable_count: int = 0
    dtypes: dict[str, int] = field(default_factory=dict)  # dtype of the unquantised weights to bytes
    largest_unquantized: list[tuple[str, int]] = field(default_factory=list)

    def __str__(self) -> str:
        dtypes = ", ".join(f"{name} {_mib(n)}" for name, n in sorted(self.dtypes.items()))
        largest = ", ".join(f"{name} {_mib(n)}" for name, n in self.largest_unquantized)
        return (
            f"Base: {_mib(self.quantized)} quantised, {_mib(self.unquantized)} not ({dtypes or 'nothing'}; largest: "
            f"{largest or 'none'}). Adapter: {self.trainable_count:,} trained weights, {_mib(self.trainable)}."
        )


def storage_report(model: nn.Module, show: int = 3) -> StorageReport:
    """Count a model's bytes by what was quantised and what was not (a layer missed by quantisation shows up here)."""
    report = StorageReport()
    unquantized: dict[str, int] = {}
    seen: set[int] = set()
    for name, parameter in model.named_parameters():
        if parameter.data_ptr() in seen and parameter.numel():
            continue
        seen.add(parameter.data_ptr())
        size = parameter.numel() * parameter.element_size()
        if parameter.requires_grad:
            report.trainable += size
            report.trainable_count += parameter.numel()
        elif hasattr(parameter, "quant_state") or parameter.dtype in (torch.int8, torch.uint8):
            report.quantized += size + sum(t.numel() * t.element_size() for t in _constants(parameter))
        else:
            report.unquantized += size
            dtype = str(parameter.dtype).removeprefix("torch.")
            report.dtypes[dtype] = report.dtypes.get(dtype, 0) + size
            group = ".".join("*" if part.isdigit() else part for part in name.split("."))
            unquantized[group] = unquantized.get(group, 0) + size
    report.largest_unquantized = sorted(unquantized.items(), key=lambda item: -item[1])[:show]
    return report


def _constants(parameter: Any) -> Iterable[torch.Tensor]:
    """The tensors of a bitsandbytes quantisation state, nested ones included."""
    state = getattr(parameter, "quant_state", None)
    while state is not None:
        yield from (t for t in (state.absmax, state.code, state.offset) if isinstance(t, torch.Tensor))
        state = getattr(state, "state2", None)


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
