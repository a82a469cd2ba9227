"""The model that is trained: a frozen base, in 4 bits by default, with LoRA on its linear layers.

This trainer never trains the base. Trainable weights are float32 masters, whatever the base is stored in: in bfloat16
most updates at DPO's learning rates round to nothing.
"""

import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PretrainedConfig, PreTrainedModel
from transformers.utils.peft_utils import find_adapter_config_file
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..errors import OptionError, ReferenceMismatchError
from ..reference.adapter_off import Reference, add_reference, base_change, check_reference, is_identity, sample_logits
from ..reference.frozen_adapter import (
    adapter_layers,
    adapter_tensors,
    check_adapter,
    check_loaded,
    first_lines,
    moved_base,
    read_config,
)

logger = logging.getLogger(__name__)

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def default_lora() -> LoraConfig:
    """Returns LoRA of rank 16 on every linear layer but the head, without dropout."""
    return LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")


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
) -> PreTrainedModel:
    """Loads a causal LM by name or folder: bfloat16, its linear layers in NF4, unless told otherwise.

    Args:
        name: Hub id or local folder.
        quantization_config: replaces the default NF4 configuration.
        quantize: False loads without quantization (unless `quantization_config` is given).
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
        kwargs["quantization_config"] = nf4_config(torch.bfloat16 if isinstance(dtype, str) else dtype)
    kwargs.setdefault("trust_remote_code", trust_remote_code)
    if device is not None and device.type != "cpu":
        kwargs.setdefault("device_map", {"": device})
    try:
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **kwargs)
    except (OSError, ValueError) as error:
        raise OptionError(f"model={name!r} can't be loaded: {error}") from error


def _read_dtype(dtype: object) -> torch.dtype | str:
    if dtype == "auto":
        return "auto"
    for name, known in _DTYPES.items():
        if dtype in (name, known):
            return known
    if dtype is None:
        return torch.bfloat16
    raise OptionError(f"model_init_kwargs['dtype']={dtype!r}: use one of 'auto', {', '.join(map(repr, _DTYPES))}.")


def load_model(
    name: str,
    quantization_config: QuantizationConfigMixin | None = None,
    quantize: bool = True,
    init_kwargs: Mapping[str, object] | None = None,
    trust_remote_code: bool = False,
    device: torch.device | None = None,
) -> PreTrainedModel | PeftModel:
    """Loads a base as `load_base` does, or if `name` is an adapter's, its base with the adapter on it to train on.

    The base is the one that the adapter's config names, at the revision that it names; a `revision` in `init_kwargs`
    is that of `name`. Arguments as for `load_base`.

    Raises:
        OptionError: as `load_base`; the base is not named or not found, or the adapter does not fit it.
    """
    kwargs = dict(init_kwargs or {})
    from_hub = {key: kwargs[key] for key in ("revision", "token", "cache_dir") if kwargs.get(key) is not None}
    if not is_adapter(name, **from_hub):
        return load_base(name, quantization_config, quantize, init_kwargs, trust_remote_code, device)
    config = read_config(name, **from_hub)
    check_adapter(config)
    remedy = (
        "Or load the base yourself and pass PeftModel.from_pretrained(base, folder, is_trainable=True) as the model."
    )
    if not config.base_model_name_or_path:
        raise OptionError(
            f"The adapter {name!r} does not say which base it belongs to: write base_model_name_or_path into its "
            f"adapter_config.json. {remedy}"
        )
    kwargs.pop("revision", None)
    if config.revision:
        kwargs["revision"] = config.revision
    base_name = config.base_model_name_or_path
    try:
        base = load_base(base_name, quantization_config, quantize, kwargs, trust_remote_code, device)
    except OptionError as error:
        raise OptionError(
            f"The adapter {name!r} belongs to the base {base_name!r}, which can't be loaded: {error} If it lies "
            f"elsewhere, put that into base_model_name_or_path of its adapter_config.json. {remedy}"
        ) from error
    keep_weights(base)
    return load_on(base, name, from_hub)


def is_adapter(name: str, **from_hub: object) -> bool:
    """Whether a folder or Hub id is that of an adapter; `from_hub` is passed on, such as a revision."""
    if os.path.isdir(name):
        return os.path.isfile(os.path.join(name, "adapter_config.json"))
    try:
        return find_adapter_config_file(name, **from_hub) is not None
    except (OSError, ValueError):  # no such repository: `load_base` says so
        return False


def load_on(base: PreTrainedModel, name: str, from_hub: Mapping[str, object]) -> PeftModel:
    """Loads the adapter `name` on a loaded base, every tensor of it accounted for.

    Raises:
        OptionError: it does not fit.
    """
    try:
        model = PeftModel.from_pretrained(base, name, is_trainable=True, **from_hub)
        # PEFT only warns of tensors that are missing, and keeps quiet about surplus ones: read the file once more.
        result = model.load_adapter(name, model.active_adapters[0], is_trainable=True, **from_hub)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # PEFT and torch raise all kinds
        raise OptionError(
            f"The adapter {name!r} does not fit its base {base.config._name_or_path!r}, loaded like this: "
            f"{first_lines(error)}"
        ) from error
    check_loaded(result, model.active_adapters[0], name)
    return model


def attach_adapter(
    model: PreTrainedModel | PeftModel,
    peft_config: LoraConfig | None = None,
    reference: str | None = None,
    needs_reference: bool = True,
) -> tuple[PeftModel, Reference]:
    """Returns the PEFT model to train, `model` itself if it has an adapter and else with a new one, and its reference.

    Everything but the active adapter is frozen; trainable weights become float32.

    Args:
        model: the base, or a PEFT model with the adapter to train active.
        peft_config: of the new adapter; rank 16 on every linear layer if None.
        reference: "base", the adapter switched off. "initial" or None, the adapter as it came in: switched off if it
            changes nothing yet, else a frozen copy of it. Or the folder or Hub id of another adapter on the same base
            ("./base" is a folder).
        needs_reference: False makes no copy, for objectives without a reference.

    Raises:
        OptionError: an adapter that can't be trained here (see `check_adapter`), a `peft_config` for a model that has
            an adapter already, several active adapters, an adapter loaded for inference, or a reference that does not
            exist or is not what the adapter started from.
        ReferenceMismatchError: attaching the adapter changed the base and the base is to be the reference, or the
            adapter can't be copied exactly.
    """
    keep_weights(model)
    if isinstance(model, PeftModel):
        if peft_config is not None:
            raise OptionError(
                "model is a PeftModel and peft_config is given too: pass the PeftModel alone to train its adapter, or "
                "the base model with peft_config."
            )
        _check_peft_model(model)
        config = model.peft_config[model.active_adapters[0]]
        check_reference(config, reference, fresh=False)
        starts_at_base = is_identity(model, model.active_adapters[0])
    elif getattr(model, "_hf_peft_config_loaded", False):
        raise OptionError(
            "model is a base with an adapter loaded into it by transformers. Pass the adapter's folder, or "
            "PeftModel.from_pretrained(base, folder, is_trainable=True)."
        )
    else:
        peft_config = default_lora() if peft_config is None else peft_config
        check_adapter(peft_config)
        check_reference(peft_config, reference, fresh=True)
        model, starts_at_base = _new_adapter(model, peft_config, reference)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            logger.info("%s is trained: cast from %s to float32.", name, parameter.dtype)
            parameter.data = parameter.data.float()
    return model, add_reference(model, reference, starts_at_base) if needs_reference else Reference("base", None)


def _new_adapter(base: PreTrainedModel, peft_config: LoraConfig, reference: str | None) -> tuple[PeftModel, bool]:
    """Returns `base` with a fresh adapter, and whether that starts at the base."""
    before = sample_logits(base)
    try:
        model = get_peft_model(base, peft_config)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # PEFT raises all kinds; some initializations need preparation
        raise OptionError(
            f"peft_config can't be attached to this model (init_lora_weights={peft_config.init_lora_weights!r}): "
            f"{first_lines(error)} If the initialization needs preparation, do it as PEFT's documentation "
            "says and pass the PeftModel; init_lora_weights=True needs none."
        ) from error
    change = base_change(base, before)
    if change is not None and reference not in (None, "initial"):
        raise ReferenceMismatchError(
            "Attaching the adapter changed the base model itself: with the adapter off its logits differ by up to "
            f"{change:.3g}, so reference={reference!r} would be on another model. Use a LoraConfig that leaves the "
            "base alone (init_lora_weights=True, no kasa_config, no layer_replication), or leave "
            'reference="initial".'
        )
    return model, change is None and moved_base(peft_config) is None


def _check_peft_model(model: PeftModel) -> None:
    active = model.active_adapters
    if len(active) != 1:
        raise OptionError(f"{len(active)} adapters are active ({active}): activate the one to train by set_adapter.")
    check_adapter(model.peft_config[active[0]])
    merged = {name for _, layer in adapter_layers(model) for name in layer.merged_adapters}
    if merged:
        raise OptionError(f"Adapters are merged into the base ({sorted(merged)}): call unmerge_adapter() first.")
    if not any(p.requires_grad for p in model.parameters()):
        raise OptionError(
            f"The adapter {active[0]!r} has no trainable weights: it was loaded for inference. Load it with "
            "PeftModel.from_pretrained(..., is_trainable=True)."
        )
    own = {id(tensor) for tensor in adapter_tensors(model, active[0]).values()}
    others = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in own]
    if others:
        raise OptionError(
            f"{len(others)} weights outside the adapter {active[0]!r} are trainable (such as {others[0]}): the "
            "reference would change with them. Freeze them with requires_grad_(False)."
        )


def keep_weights(model: nn.Module) -> None:
    """Stops bitsandbytes from repacking 4-bit weights in place.

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
    """Turns every kind of dropout off: modules, and the rates that modules and configs keep as plain numbers.

    Layer drop and the noise on a router's input, which act in training only too, count as dropout.

    Returns:
        The distinct names of what was on, for the log.
    """
    found = set()
    holders: list[object] = []
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

    quantized: int = 0  # bytes of 4- or 8-bit weights with their quantization constants
    unquantized: int = 0  # bytes of frozen weights in 16 or 32 bits
    reference_adapter: int = 0  # bytes of the frozen adapter that is the reference
    trainable: int = 0  # bytes of trained weights
    trainable_count: int = 0
    dtypes: dict[str, int] = field(default_factory=dict)  # dtype of the unquantized weights to bytes
    largest_unquantized: list[tuple[str, int]] = field(default_factory=list)

    def __str__(self) -> str:
        dtypes = ", ".join(f"{name} {_mib(n)}" for name, n in sorted(self.dtypes.items()))
        worth_naming = [(name, n) for name, n in self.largest_unquantized if n >= 0.01 * self.unquantized]
        largest = ", ".join(f"{name} {_mib(n)}" for name, n in worth_naming)
        reference = f" Reference adapter: {_mib(self.reference_adapter)}." if self.reference_adapter else ""
        return (
            f"Base: {_mib(self.quantized)} quantized, {_mib(self.unquantized)} not ({dtypes or 'nothing'}; largest: "
            f"{largest or 'none'}). Adapter: {self.trainable_count:,} trained weights, {_mib(self.trainable)}."
            f"{reference}"
        )


def storage_report(model: nn.Module, show: int = 3, reference: str | None = None) -> StorageReport:
    """Counts a model's bytes by what was quantized and what was not (a layer missed by quantization shows up here).

    Args:
        model: the base or PEFT model.
        show: how many of the largest unquantized weights to list.
        reference: name of the frozen adapter that is the reference, which is counted apart.
    """
    report = StorageReport()
    of_reference = {id(tensor) for tensor in adapter_tensors(model, reference).values()} if reference else set()
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
        elif id(parameter) in of_reference:
            report.reference_adapter += size
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


def _constants(parameter: Tensor) -> Iterable[torch.Tensor]:
    """Yields the tensors of a bitsandbytes quantization state, nested ones included."""
    state = getattr(parameter, "quant_state", None)
    while state is not None:
        yield from (t for t in (state.absmax, state.code, state.offset) if isinstance(t, torch.Tensor))
        state = getattr(state, "state2", None)


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
