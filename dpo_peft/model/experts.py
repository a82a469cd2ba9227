"""Experts of a mixture: put into 4 bits while a base is loaded, and adapted where that is asked for.

bitsandbytes and transformers quantize linear layers only; the experts of a mixture, nearly all of its weights, are 3-D
parameters. Here they are quantized as they are read, one expert after the other on the device where it stays: the
other experts of its layer are in 16 bits on the host meanwhile, and in no other place.
"""

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.integrations.accelerate import get_device
from transformers.integrations.bitsandbytes import Bnb4bitQuantize
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module

from ..errors import OptionError
from ..forward.experts import LowRank, adapted, convert

logger = logging.getLogger(__name__)


def expert_weights(model: nn.Module) -> dict[str, Tensor]:
    """Returns the weights of experts by name, packed or not: 3-D parameters of modules that are no layers of torch."""
    found = {}
    for path, module in model.named_modules():
        for name, weight in module._parameters.items():
            if weight is None or type(module).__module__.startswith("torch.nn."):
                continue
            state = getattr(weight, "quant_state", None)
            shape = weight.shape if state is None else state.shape
            if len(shape) == 3 and min(shape[1:]) > 1:
                found[f"{path}.{name}"] = weight
    return found


def experts_per_token(config: PretrainedConfig) -> int | None:
    """Returns how many experts of a layer a token is sent to; None if the config, that of the text, doesn't tell."""
    names = "num_experts_per_tok", "top_k_experts"
    return next((number for name in names if (number := getattr(config, name, None))), None)


def pack(weight: Tensor, device: torch.device | str, quant_type: str, double: bool, storage: torch.dtype) -> Tensor:
    """Quantizes a 3-D weight, (X, O, I), expert by expert as bitsandbytes does a linear layer.

    Returns:
        A `Params4bit`, (X, bytes of one), whose constants are those of each expert, stacked along the first dimension.
    """
    from bitsandbytes.functional import QuantState, quantize_4bit
    from bitsandbytes.nn import Params4bit

    how = {"blocksize": 64, "quant_type": quant_type}
    codes, states = zip(
        *(
            quantize_4bit(one.to(device).contiguous(), **how, compress_statistics=double, quant_storage=storage)
            for one in weight
        ),
        strict=True,
    )
    shared, nested, offset = states[0], None, None
    if double:
        inner = shared.state2
        scales = torch.stack([state.state2.absmax for state in states])
        nested = QuantState(absmax=scales, code=inner.code, blocksize=inner.blocksize, dtype=inner.dtype)
        offset = torch.stack([state.offset for state in states])
    absmax = torch.stack([state.absmax for state in states])
    stacked = QuantState(absmax, weight.shape, shared.code, 64, quant_type, weight.dtype, offset, nested)
    data = torch.stack([code.reshape(-1) for code in codes])
    rest = {"compress_statistics": double, "quant_storage": storage, "bnb_quantized": True}
    return Params4bit(data, requires_grad=False, quant_state=stacked, **how, **rest)


class _AsItIs(ConversionOps):
    """Leaves a tensor alone; a converter's, so that it is read on the host."""

    def convert(self, input_dict: dict[str, Any], source_patterns: Any, target_patterns: Any, **_: Any) -> Any:
        (tensors,) = input_dict.values()
        return {target_patterns[0]: tensors}

    @property
    def reverse_op(self) -> ConversionOps:
        return self


class _Quantize(Bnb4bitQuantize):
    def convert(self, input_dict: dict[str, Any], full_layer_name: str | None = None, **kwargs: Any) -> dict[str, Any]:
        experts = self.hf_quantizer.experts & input_dict.keys()
        own = {name: value for name, value in input_dict.items() if name not in experts}
        result = super().convert(own, full_layer_name, **kwargs)
        for name in experts:
            value = input_dict.pop(name)
            result[name] = self.hf_quantizer.pack(name, value[0] if isinstance(value, list) else value)
        return result


class _Unpack(ConversionOps):
    """Makes weights of single experts, which a checkpoint holds in 4 bits, those that its next operations join."""

    def __init__(self, hf_quantizer: "Experts4Bit"):
        self.hf_quantizer = hf_quantizer

    def convert(self, input_dict: dict[str, Any], full_layer_name: str = "", model: Any = None, **_: Any) -> Any:
        from bitsandbytes.functional import QuantState, dequantize_4bit

        dtype = model.get_parameter(full_layer_name).dtype
        result = {}
        for pattern in [one for one in input_dict if one.endswith(".weight")]:
            beside = {key: input_dict[key] for key in input_dict if key.startswith(f"{pattern}.")}
            result[pattern] = input_dict[pattern]
            for number, codes in enumerate(input_dict[pattern] if beside else ()):
                state = QuantState.from_dict({key: parts[number] for key, parts in beside.items()}, codes.device)
                shape, state.shape = state.shape, torch.Size([state.shape.numel()])  # see `unpack`
                result[pattern][number] = dequantize_4bit(codes, state).view(shape).to(dtype)
        return result


class _Pack(ConversionOps):
    def __init__(self, hf_quantizer: "Experts4Bit"):
        self.hf_quantizer = hf_quantizer

    def convert(self, input_dict: dict[str, Any], full_layer_name: str = "", model: Any = None, **_: Any) -> Any:
        ((pattern, value),) = input_dict.items()
        weight = value[0] if isinstance(value, list) else value
        weight = weight.to(model.get_parameter(full_layer_name).dtype)
        return {pattern: self.hf_quantizer.pack(full_layer_name, weight)}


class Experts4Bit(Bnb4BitHfQuantizer):
    """bitsandbytes' 4 bits for linear layers and for experts."""

    experts: frozenset[str] = frozenset()

    def _process_model_before_weight_loading(self, model: Any, device_map: Any = None, **kwargs: Any) -> None:
        super()._process_model_before_weight_loading(model, device_map=device_map, **kwargs)
        self.device_map = device_map or {"": "cpu"}
        out = self.modules_to_not_convert
        self.experts = frozenset(
            name for name in expert_weights(model) if should_convert_module(name.rpartition(".")[0], out)
        )

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        return param_name in self.experts or super().param_needs_quantization(model, param_name, **kwargs)

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self)

    def update_weight_conversions(self, weight_conversions: Any, *model: Any) -> Any:
        """Has the weights of experts read on the host; in a checkpoint in 4 bits they become so here, where each
        expert is a linear layer by itself, or none is quantized."""
        names = sorted({".".join(name.split(".")[-2:]) for name in self.experts})
        whole = [WeightConverter([name], [name], [_AsItIs()]) for name in names]
        found = [*super().update_weight_conversions(weight_conversions, *model), *whole]
        for at, one in enumerate(found):
            if isinstance(one, WeightConverter) and any(
                t in name for t in one.target_patterns for name in self.experts
            ):
                if self.pre_quantized:
                    kinds = [kind.removeprefix("weight") for kind in self.serialized_names["weight"]]
                    apart = [
                        p + kind for p in one._original_source_patterns if p.endswith(".weight") for kind in kinds
                    ]
                    operations = [*([_Unpack(self)] if apart else []), *one.operations, _Pack(self)]
                    one = found[at] = one.copy(
                        apart or one._original_source_patterns, one._original_target_patterns, operations=operations
                    )
                one.force_cpu = True
        return found

    def pack(self, name: str, weight: Tensor) -> Tensor:
        """Quantizes a weight of experts as the config says, on the device where it belongs."""
        config = self.quantization_config
        how = config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant, config.bnb_4bit_quant_storage
        return pack(weight, get_device(self.device_map, name, valid_torch_device=True), *how)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        modules: dict[Any, list[str]] = {}
        for name in self.experts:
            module, own = get_module_from_name(model, name)
            modules.setdefault(module, []).append(own)
        for module, names in modules.items():
            convert(module, sorted(names))
        return super()._process_model_after_weight_loading(model, **kwargs)

    def is_serializable(self) -> bool:
        return not self.experts


@contextmanager
def experts_in_4_bits(wanted: bool = True) -> Iterator[None]:
    """Has `from_pretrained` quantize experts too, where it quantizes to 4 bits."""
    usual = AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"]
    AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"] = Experts4Bit if wanted else usual
    try:
        yield
    finally:
        AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"] = usual


def has_packed_experts(model: nn.Module) -> bool:
    """Whether experts are in 4 bits."""
    return any(hasattr(weight, "quant_state") for weight in expert_weights(model).values())


def warn_of_whole_experts(model: nn.Module) -> None:
    """Says how many bytes the experts of a quantized base take that are not quantized."""
    whole = {name: weight for name, weight in expert_weights(model).items() if not hasattr(weight, "quant_state")}
    if whole and getattr(model, "hf_quantizer", None) is not None:
        logger.warning(
            "The base is quantized, its experts are not: they take %.1f GiB (%d weights, such as %s). To have them in "
            "4 bits, give the model by name with the default quantization.",
            *(sum(weight.nbytes for weight in whole.values()) / 2**30, len(whole), next(iter(whole))),
        )


# ---- Adapters -------------------------------------------------------------------------------------------------------


def target_experts(config: LoraConfig, model: PreTrainedModel) -> LoraConfig:
    """Returns the config of an adapter that is put on all experts too. They get its rank each. Raises `OptionError`
    where there are none, or the config names parameters of its own."""
    names = sorted({".".join(name.split(".")[-2:]) for name in expert_weights(model)})
    if not names:
        raise OptionError("lora_experts=True: the model is no mixture of experts. Leave it out.")
    if config.target_parameters:
        raise OptionError("lora_experts=True and peft_config.target_parameters are given: give one of them.")
    config = copy.copy(config)  # the user may build another adapter with it
    config.target_parameters = names
    return config


class GroupedParamWrapper(ParamWrapper):
    """PEFT's LoRA on the weights of experts, computed for the rows of each instead of added to its weights."""

    @contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        with adapted(self.get_base_layer(), self.parameter_name, [*self._factors(active_adapters)]):
            yield

    def _factors(self, adapters: list[str]) -> Iterator[LowRank]:
        for name in adapters:
            if name in self.lora_A:
                a, b = self.lora_A[name].weight, self.lora_B[name].weight
                a = a.view(self.num_experts, -1, a.shape[-1])  # (experts, rank, in)
                b = b.view(b.shape[0], -1, self.num_experts).permute(2, 0, 1)  # (experts, out, rank)
                left, right = (b, a) if self._did_swap_in_out_features else (a.transpose(1, 2), b.transpose(1, 2))
                yield LowRank(left, right, self.scaling[name])

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds the adapter to the weights. Raises an OptionError if they are in 4 bits: nothing could be added."""
        weight = self.get_base_layer()._parameters[self.parameter_name]
        if hasattr(weight, "quant_state"):
            raise OptionError("Adapters can't be merged into experts in 4 bits: use dpo_peft.merge.")
        super().merge(safe_merge, adapter_names)


GroupedParamWrapper.__name__ = ParamWrapper.__name__  # PEFT knows it by its name


def group_adapters(model: nn.Module) -> None:
    """Has adapters on the weights of experts computed expert by expert. PEFT would add each to all experts' weights
    in every forward pass, for which weights in 4 bits have no room."""
    module: Any
    for module in list(model.modules()):
        if type(module) is ParamWrapper and module._param_ndim == 3:
            base = module.get_base_layer()
            names = [name for name, weight in base.named_parameters(recurse=False) if weight.ndim == 3]
            convert(base, names)
            module.__class__ = GroupedParamWrapper
