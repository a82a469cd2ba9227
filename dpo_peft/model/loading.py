"""The model that is trained: a frozen base, in 4 bits by default, with LoRA on its linear layers.

This trainer never trains the base. Trainable weights are float32 masters, whatever the base is stored in: in bfloat16
most updates at DPO's learning rates round to nothing.
"""

import inspect
import logging
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..errors import OptionError, ReferenceMismatchError
from ..forward.layout import Sample
from ..forward.modules import eval_mode
from ..reference.adapter_off import Reference, is_identity, reference_mode
from ..reference.fingerprint import quantization_parts
from ..reference.frozen_adapter import adapter_layers, adapter_tensors, freeze_copy
from .adapters import (
    check_adapter,
    check_loaded,
    is_adapter,
    load_frozen,
    misfits_refused,
    moved_base,
    named_place,
    read_config,
)
from .base import load_base, unloadable_refused
from .checkpoint_formats import Checkpoint
from .experts import group_adapters, target_experts
from .rebuilding import keep_weights, resize_as_saved
from .scope import check_attached
from .targets import choose_targets, log_targets, save_as_parameters, starred, targets_as_named
from .training_record import UNRECORDED, read_training

logger = logging.getLogger(__name__)

FROM_HUB = ("revision", "token", "cache_dir")  # of `model_init_kwargs`: they hold for all files of the model's name
# Layer drop and the noise on a router's input act in training only, as dropout does.
_DROPOUT = re.compile(r".*dropout.*|.*(_pdrop|layerdrop)|(input_)?jitter_noise")


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
    is that of `name`. Arguments as for `load_base`; so are errors, or an `OptionError` says that the base is not named
    or not found, or that the adapter does not fit it.
    """
    kwargs = dict(init_kwargs or {})
    from_hub = hub_place(kwargs)
    if not is_adapter(name, **from_hub):
        return load_base(name, quantization_config, quantize, init_kwargs, trust_remote_code, device)
    config = read_config(name, **from_hub)
    check_adapter(config)
    remedy = (
        "put it into base_model_name_or_path of its adapter_config.json. Or load the base yourself and pass "
        "PeftModel.from_pretrained(base, folder, is_trainable=True) as the model."
    )
    if not (base := named_place(name, "base", config.base_model_name_or_path)):
        raise OptionError(f"The adapter {name!r} does not say which base it belongs to: {remedy}")
    kwargs.pop("revision", None)
    if config.revision:
        kwargs["revision"] = config.revision
    record = read_training(config)
    trained = record or UNRECORDED
    if quantize and quantization_config is None:
        quantization_config = trained.quantization_config()
    class_name, experts = record and record.class_name, record is None or trained.experts_quantized
    how = quantization_config, quantize, kwargs, trust_remote_code, device, class_name, experts
    return load_on_base(name, base, remedy, from_hub, *how)


def check_checkpoint(
    name: str,
    quantization_config: QuantizationConfigMixin | None,
    quantize: bool,
    init_kwargs: Mapping[str, object] | None,
) -> None:
    """Refuses a base that is stored in a way that can't be trained on, by its config alone: before long work begins.
    Arguments as for `load_model`; raises `OptionError`, also where there is no model. An adapter's base that isn't
    found is left to it."""
    kwargs: dict[str, object] = dict(init_kwargs or {})
    from_hub = hub_place(kwargs)
    given: Any = kwargs.get("quantization_config", quantization_config)
    if not is_adapter(name, **from_hub):
        with unloadable_refused(name):
            Checkpoint(name, given, quantize, kwargs)
    elif (base := (config := read_config(name, **from_hub)).base_model_name_or_path) is not None:
        with suppress(OSError):
            Checkpoint(base, given, quantize, {**kwargs, "revision": config.revision})


def hub_place(init_kwargs: object) -> dict[str, Any]:
    """Returns the part of `model_init_kwargs` that says where a name's files are on the Hub."""
    given = init_kwargs if isinstance(init_kwargs, dict) else {}
    return {key: given[key] for key in FROM_HUB if given.get(key) is not None}


def load_on_base(adapter: str, base: str, remedy: str, from_hub: Mapping[str, object], *how: Any) -> PeftModel:
    """Loads an adapter, to be trained on, and the base under it, made as the other arguments of `load_base` say.
    `remedy` ends the message if the base can't be found; `from_hub` says where on the Hub the adapter is. Raises
    `OptionError` where the base can't be loaded, or the adapter does not fit it."""
    try:
        model = load_base(base, *how)
    except OptionError as error:
        raise OptionError(
            f"The adapter {adapter!r} belongs to the base {base!r}, which can't be loaded: {error} If it lies "
            f"elsewhere, {remedy}"
        ) from error
    keep_weights(model)
    resize_as_saved(model, adapter, from_hub)
    with (
        misfits_refused(f"The adapter {adapter!r} does not fit its base {base!r}, loaded like this: "),
        targets_as_named(),
    ):
        adapted = PeftModel.from_pretrained(model, adapter, is_trainable=True, **from_hub)
        # This one says which tensors are missing or surplus: it reads the file once more.
        result = adapted.load_adapter(adapter, adapted.active_adapters[0], is_trainable=True, **from_hub)
    check_loaded(result, adapted.active_adapters[0], adapter)
    group_adapters(adapted)
    return adapted


def attach_adapter(
    model: PreTrainedModel | PeftModel,
    peft_config: LoraConfig | None = None,
    reference: str | None = None,
    needs_reference: bool = True,
    lora_experts: bool = False,
    vision: Sample | None = None,
) -> tuple[PeftModel, Reference]:
    """Returns the PEFT model to train, `model` itself if it has an adapter and else with a new one, and its reference.

    Everything but the active adapter is frozen; trainable weights become float32.

    Args:
        model: the base, or a PEFT model with the adapter to train active.
        peft_config: of the new adapter; rank 16 on every linear layer but the head, without dropout, if None.
        reference: "base", the adapter switched off. "initial" or None, the adapter as it came in: switched off if it
            changes nothing yet, else a frozen copy of it. Or the folder or Hub id of another adapter on the same base
            ("./base" is a folder).
        needs_reference: False makes no copy, for objectives without a reference.
        lora_experts: put the new adapter on the experts of a mixture too.
        vision: a tiny sample with images, to put it on those layers of tower and projector too that they move
            (lora_vision).

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
        if lora_experts or vision:
            name = "lora_experts" if lora_experts else "lora_vision"
            raise OptionError(f"{name}=True: the model has an adapter already. Leave it out.")
        _check_peft_model(model)
        config = model.peft_config[model.active_adapters[0]]
        _check_reference(config, reference, fresh=False)
        starts_at_base = is_identity(model, model.active_adapters[0])
    elif getattr(model, "_hf_peft_config_loaded", False):
        raise OptionError(
            "model is a base with an adapter loaded into it by transformers. Pass the adapter's folder, or "
            "PeftModel.from_pretrained(base, folder, is_trainable=True)."
        )
    else:
        if peft_config is None:
            peft_config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        if lora_experts:
            peft_config = target_experts(peft_config, model)
        check_adapter(peft_config)
        _check_reference(peft_config, reference, fresh=True)
        model, starts_at_base = _new_adapter(model, peft_config, reference, vision)
    check_attached(model, model.active_adapters[0])
    group_adapters(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            logger.info("%s is trained: cast from %s to float32.", name, parameter.dtype)
            parameter.data = parameter.data.float()
    return model, _hold_reference(model, reference, starts_at_base) if needs_reference else Reference("base", None)


def _check_reference(config: LoraConfig, reference: str | None, fresh: bool) -> None:
    """Refuses a reference on the bare base where the adapter's initialization changes the base, or starts off it; an
    adapter that is not `fresh` but given by the user may start anywhere."""
    reason = moved_base(config)
    starts_off_only = config.init_lora_weights is False and not (fresh and reference == "base")
    if reference in (None, "initial") or reason is None or starts_off_only:
        return
    raise OptionError(
        f"peft_config.{reason}. With reference={reference!r} that would be the wrong reference: leave "
        'reference="initial" (a frozen copy of the adapter as it starts), or set init_lora_weights=True (or '
        '"gaussian"), which starts at the base exactly.'
    )


def _new_adapter(
    base: PreTrainedModel, peft_config: LoraConfig, reference: str | None, vision: Sample | None
) -> tuple[PeftModel, bool]:
    """Returns `base` with a fresh adapter, and whether that starts at the base."""
    base.requires_grad_(False)  # as PEFT does; some kernels round otherwise for weights that are trained
    before = _sample_logits(base)
    init, given = peft_config.init_lora_weights, peft_config.target_modules
    left_out = choose_targets(peft_config, base, vision)
    remedy = (
        "If the initialization needs preparation, do it as PEFT's documentation says and pass the PeftModel; "
        "init_lora_weights=True needs none."
    )
    with (
        misfits_refused(f"peft_config can't be attached to this model (init_lora_weights={init!r}): ", remedy),
        targets_as_named(new=True),
    ):
        model = get_peft_model(base, peft_config)
    save_as_parameters(model, peft_config)
    log_targets(model, given, left_out)
    with reference_mode(base):
        after = _sample_logits(base)
    same_base = torch.equal(before.nan_to_num(), after.nan_to_num())
    if not same_base and reference not in (None, "initial"):
        raise ReferenceMismatchError(
            "Attaching the adapter changed the base model itself: with the adapter off its logits differ by up to "
            f"{float((before - after).abs().max()):.3g}, so reference={reference!r} would be on another model. Use a "
            "LoraConfig that leaves the base alone (init_lora_weights=True, no kasa_config, no layer_replication), or "
            'leave reference="initial".'
        )
    return model, same_base and moved_base(peft_config) is None


def _sample_logits(model: PreTrainedModel) -> Tensor:
    """Returns the logits of four tokens, (1, 4, V), by which a changed base shows."""
    weight = model.get_input_embeddings().weight
    ids = torch.arange(4, device=weight.device)[None] * (weight.shape[0] // 4)
    with torch.no_grad(), eval_mode(model):
        return model(input_ids=ids, use_cache=False).logits


def _hold_reference(model: PeftModel, reference: str | None, starts_at_base: bool) -> Reference:
    """Finds or makes the reference of a model whose adapter is ready to be trained."""
    if reference == "base":
        return Reference("base", None, chosen=True)
    if reference is None or reference == "initial":
        held = Reference("initial", None if starts_at_base else freeze_copy(model), chosen=reference is not None)
    else:
        held = Reference("adapter", load_frozen(model, reference), reference, chosen=True)
    if held.adapter is not None:
        what = f"the adapter {reference!r}" if held.source else "a frozen copy of the adapter as it came in"
        size = sum(tensor.nbytes for tensor in adapter_tensors(model, held.adapter).values()) / 2**20
        logger.info("The reference is %s: %.1f MiB more, and its share of each reference pass.", what, size)
    return held


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


def disable_dropout(model: nn.Module) -> list[str]:
    """Turns every kind of dropout off: modules, the rates that modules and configs keep as plain numbers, and routers
    that draw their experts at random in training (Phi-MoE), which stay in evaluation mode. Returns the distinct names
    of what was on, for the log."""
    found = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and module.p > 0:
            found.add("lora_dropout" if "lora_dropout" in name else name.rsplit(".", 1)[-1])
            module.p = 0.0
        router = type(module).__name__.endswith("Router") and "train" not in vars(module)
        if router and "training" in inspect.unwrap(type(module).forward).__code__.co_names:
            found.add("sampling of experts")
            vars(module.eval())["train"] = lambda mode=True, kept=module: kept
        config = getattr(module, "config", None)  # some models read it at run time
        for holder in (module, config) if isinstance(config, PretrainedConfig) else (module,):
            for attribute, value in list(vars(holder).items()):
                if isinstance(value, float) and value > 0 and _DROPOUT.fullmatch(attribute):
                    found.add(attribute)
                    setattr(holder, attribute, 0.0)
    return sorted(found)


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


def storage_report(model: nn.Module, reference: str | None = None) -> StorageReport:
    """Counts a model's bytes by what was quantized and what was not (a layer missed by quantization shows up here).
    The frozen adapter `reference` is counted apart."""
    report = StorageReport()
    of_reference = {id(tensor) for tensor in adapter_tensors(model, reference).values()} if reference else set()
    unquantized: dict[str, int] = {}
    seen: set[int] = set()
    for name, parameter in model.named_parameters():
        # Of a layer that is elsewhere at the moment the storage is empty.
        place = parameter.data_ptr() if parameter.untyped_storage().nbytes() else id(parameter)
        if place in seen and parameter.numel():
            continue
        seen.add(place)
        size = parameter.nbytes
        if parameter.requires_grad:
            report.trainable += size
            report.trainable_count += parameter.numel()
        elif id(parameter) in of_reference:
            report.reference_adapter += size
        elif hasattr(parameter, "quant_state") or parameter.dtype in (torch.int8, torch.uint8):
            report.quantized += size + sum(
                part.nbytes for _, part in quantization_parts(parameter) if isinstance(part, Tensor)
            )
        else:
            report.unquantized += size
            dtype = str(parameter.dtype).removeprefix("torch.")
            report.dtypes[dtype] = report.dtypes.get(dtype, 0) + size
            group = starred(name)
            unquantized[group] = unquantized.get(group, 0) + size
    report.largest_unquantized = sorted(unquantized.items(), key=lambda item: -item[1])[:3]
    return report


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
