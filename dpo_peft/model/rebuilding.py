"""What of a base must be known to make it again: how it was quantized, its class, resized embeddings, changed weights.

A model that is made in code may be anything. What can be made again is recorded with the adapter; what can't is
refused, or said, before the training.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.utils import cached_file

from ..errors import OptionError
from ..reference.fingerprint import base_parts
from .adapters import moved_base
from .stored_weights import weight_files

_FOUR_BITS = ("load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype")
_IF_UNUSUAL = ("llm_int8_skip_modules", "llm_int8_threshold", "llm_int8_has_fp16_weight", "bnb_4bit_quant_storage")
_ROUNDED = 0.01  # share of a weight's quantized values that devices may round differently


def quantization_options(quantization: object) -> dict[str, object]:
    """Returns what of a 4- or 8-bit `BitsAndBytesConfig` decides the weights, as plain values; empty for none, or
    another kind."""
    if not isinstance(quantization, BitsAndBytesConfig) or not quantization.is_quantizable():
        return {}
    options, usual = quantization.to_dict(), BitsAndBytesConfig().to_dict()
    always = _FOUR_BITS if quantization.load_in_4bit else ("load_in_8bit",)
    unusual = [name for name in _IF_UNUSUAL if options[name] != usual[name]]
    return {name: options[name] for name in (*always, *unusual)}


@dataclass(frozen=True)
class BaseAsGiven:
    """In what a base differs from the model that its name gives."""

    base_class: str | None = None  # of transformers, where it is not what AutoModelForCausalLM loads
    vocabulary: int | None = None  # rows of resized embeddings, which are saved with the adapter
    base_changed: str | None = None  # in what its weights differ from its files


def check_class(model: PreTrainedModel | PeftModel) -> None:
    """Refuses a model that is no causal LM, or whose class could not be loaded again, by an `OptionError`."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    kind = type(base)
    if base.config.is_encoder_decoder or base.get_output_embeddings() is None:
        what = "an encoder-decoder" if base.config.is_encoder_decoder else "a model without a language-model head"
        raise OptionError(f"model is {what} ({kind.__name__}): pass a causal LM, as AutoModelForCausalLM loads it.")
    name = base_class(base)
    if name is not None and getattr(transformers, name, None) is not kind:
        raise OptionError(
            f"model is a {name} of {kind.__module__}, which AutoModelForCausalLM does not know, so the adapter could "
            "not be loaded again: make it known by AutoModelForCausalLM.register(config class, model class)."
        )


def base_class(base: PreTrainedModel) -> str | None:
    """Returns the name of a base's class; None for one that `AutoModelForCausalLM` loads."""
    usual = AutoModelForCausalLM._model_mapping.get(type(base.config), None)
    known = usual is type(base) or type(base).__module__.startswith("transformers_modules.")  # code beside the model
    return None if known else type(base).__name__


def loader(class_name: str | None) -> Any:
    """Returns the class whose `from_pretrained` loads a base: `class_name` of transformers, or the usual one."""
    return AutoModelForCausalLM if class_name is None else getattr(transformers, class_name)


def base_as_given(model: PreTrainedModel | PeftModel) -> BaseAsGiven:
    """Compares a base with its files, where they are on this machine, by a few rows of every weight.

    Names that files and model do not share are left out, as models load some weights under another name.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    own = {name: part for name, part in base_parts(base) if isinstance(part, Tensor) and not part.is_meta}
    vocabulary, prefix, rows = None, f"{base.base_model_prefix}.", base.get_input_embeddings().weight.shape[0]
    compared: dict[str, bool] = {}
    for file in _files_here(base.config._name_or_path, getattr(base.config, "_commit_hash", None)):
        with safe_open(file, "pt") as saved:
            for key in saved.keys():
                name = next((n for n in (key, prefix + key, key.removeprefix(prefix)) if n in own), None)
                if name is None:
                    continue
                tensor, part = own[name], saved.get_slice(key)
                shape = part.get_shape()
                if len(shape) == 2 and tensor.shape == (rows, shape[1]) and shape[0] != rows:
                    vocabulary = rows
                if (same := _same_rows(tensor, part)) is not None:
                    compared[name] = same
    changed = [name for name, same in compared.items() if not same]
    # Some initializations of adapters change the base, and do so again when the adapter is loaded.
    moves = isinstance(model, PeftModel) and moved_base(model.peft_config[model.active_adapters[0]]) is not None
    if not changed or moves:
        return BaseAsGiven(base_class(base), vocabulary)
    return BaseAsGiven(
        base_class(base), vocabulary, f"{len(changed)} of {len(compared)} weights, such as {changed[0]}"
    )


def _files_here(name: str, revision: str | None) -> list[str]:
    """Returns the files of a model's weights in its folder or the Hub's cache; none where they are not here."""
    here = {"revision": revision or "main", "local_files_only": True}
    try:
        return weight_files(name, here, _raise_exceptions_for_connection_errors=False) if name else []
    except (OSError, ValueError):
        return []


def _same_rows(tensor: Tensor, saved: Any) -> bool | None:
    """Whether first, middle and last row of a weight are what a file holds; None if they can't be compared."""
    state, shape = getattr(tensor, "quant_state", None), tuple(saved.get_shape())
    whole = tuple(state.shape) if state is not None else tuple(tensor.shape)
    if not shape or len(shape) != len(whole) or shape[1:] != whole[1:]:
        return None
    last = min(shape[0], whole[0]) - 1
    for row in sorted({0, last // 2, last}):
        its = saved[row : row + 1]
        if not its.is_floating_point() or its.element_size() == 1:
            return None  # a checkpoint that is quantized itself
        if state is not None:
            same = _same_codes(tensor, its.to(tensor.device, state.dtype), row)
        elif tensor.dtype == torch.int8:
            its = its.half().float()
            codes = (its * (127 / its.abs().max())).round().to(tensor)
            same = (codes != tensor[row]).float().mean().item() <= _ROUNDED
        else:
            own = tensor[row : row + 1].cpu()
            # It may have been loaded in 16 bits and widened later.
            by = (own.dtype, torch.bfloat16, torch.float16)
            same = any(torch.equal(its.to(dtype).to(own.dtype), own) for dtype in by)
        if not same:
            return False
    return True


def _same_codes(tensor: Any, row: Tensor, index: int) -> bool:
    """Whether a row of a 4-bit weight is what a row of a file, on its device, gives."""
    import bitsandbytes as bnb

    state, size = tensor.quant_state, row.numel()
    if size % state.blocksize:
        return True  # its blocks reach into other rows
    packed = bnb.functional.quantize_4bit(row, blocksize=state.blocksize, quant_type=state.quant_type)[0]
    own = tensor.data.view(-1).view(torch.uint8)[index * size // 2 : (index + 1) * size // 2]
    return (packed.view(-1) != own).float().mean().item() <= _ROUNDED


def resize_as_saved(base: PreTrainedModel, adapter: str, from_hub: Mapping[str, object]) -> None:
    """Gives a base as many embeddings as an adapter's file holds, which are then loaded from there."""
    missing = {"_raise_exceptions_for_missing_entries": False}
    file = cached_file(adapter, SAFETENSORS_WEIGHTS_NAME, **from_hub, **missing)
    embedded = base.get_input_embeddings()
    prefix = next(f"base_model.model.{name}." for name, module in base.named_modules() if module is embedded)
    rows, width = embedded.weight.shape
    if file is None:
        return
    with safe_open(file, "pt") as saved:
        for key in saved.keys():
            if key.startswith(prefix) and key.endswith("weight") and "lora_" not in key:
                shape = saved.get_slice(key).get_shape()
                if len(shape) == 2 and shape[1] == width and shape[0] != rows:
                    with torch.random.fork_rng():  # the new rows are drawn at random, and replaced
                        base.resize_token_embeddings(shape[0], mean_resizing=False)
                    return


def keep_weights(model: nn.Module) -> None:
    """Stops bitsandbytes from repacking 4-bit weights in place, and from computing 8-bit ones in two ways. Raises
    `OptionError` where it has happened already: the original weights are lost.

    On a CPU with AVX512-BF16 its linear layers do so at the first forward in eval mode, for faster inference: scales
    are rounded to bfloat16, and the layer has no gradient any more. The reference is scored in eval mode, so it would
    change the weights under the policy. In 8 bits, a CPU unpacks the weights in train mode, and packs the activations
    too in eval mode: policy and reference would differ by up to a nat. Here it always unpacks.
    """
    for name, module in model.named_modules():
        if getattr(getattr(getattr(module, "weight", None), "quant_state", None), "packing_format_for_cpu", False):
            raise OptionError(
                f"The 4-bit weights of {name} were repacked for inference when the model ran in eval mode on this "
                "CPU, and can't be trained on. Load the model again and pass it before running it, or pass its name."
            )
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
        hooks = module._forward_pre_hooks
        if type(module).__name__ == "Linear8bitLt" and _as_in_training not in hooks.values():
            module.register_forward_pre_hook(_as_in_training)


def _as_in_training(module: nn.Module, args: object) -> None:
    module.training = True
