"""The arithmetic of a merge: quantized weights unpacked, an adapter added to plain ones, tied embeddings kept apart.

PEFT does the adding, so that every kind of adapter that it has (LoRA, rsLoRA, DoRA, on linear layers or embeddings,
single tokens, whole modules) is added as its forward pass does.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from tqdm.auto import tqdm
from transformers import PretrainedConfig, PreTrainedModel

from ..forward.experts import Experts, restore
from ..forward.gguf import GgufLinear, dequantized
from ..model.adapters import moved_base
from ..model.targets import targets_as_named
from ..reference.fingerprint import quantization_parts
from ..reference.frozen_adapter import adapter_layers, adapter_tensors


def dequantize(model: PreTrainedModel) -> None:
    """Replaces every linear layer in 4 or 8 bits or GGUF blocks and the experts of mixtures, in place, by plain ones
    on the CPU with the values that their forward uses.

    A 4-bit layer unpacks its weight into the dtype that it was quantized from and casts that to its input's: the same
    call gives the same values here. (In 8 bits a GPU rounds activations too, which no plain weight can do.)
    """
    import bitsandbytes as bnb

    for name, module in list(model.named_modules()):
        if isinstance(module, Experts):
            restore(module)
            continue
        if isinstance(module, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state).cpu()
        elif isinstance(module, bnb.nn.Linear8bitLt):
            scales = next(part for kind, part in quantization_parts(module.weight, module) if kind == "SCB")
            weight = bnb.functional.int8_vectorwise_dequant(module.weight.data, scales).cpu()
        elif isinstance(module, GgufLinear):
            weight = dequantized(module.blocks, module.ggml_type, module.dtype).cpu()
        else:
            continue
        plain = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
        plain.weight = nn.Parameter(weight, requires_grad=False)
        plain.bias = module.bias
        model.set_submodule(name, plain)
    if (quantizer := getattr(model, "hf_quantizer", None)) is not None:
        quantizer.remove_quantization_config(model)


def is_tied(config: PretrainedConfig) -> bool:
    """Says whether a model's two embeddings are one. Of a model of text and images either config may say so."""
    return any(getattr(part, "tie_word_embeddings", False) for part in (config, config.get_text_config()))


def merge_into(
    base: PreTrainedModel, adapter: str, config: PeftConfig, dtype: torch.dtype, from_hub: dict[str, str]
) -> PreTrainedModel:
    """Merges an adapter, by folder or Hub id, into a base that is not quantized and on the CPU, in place: layer by
    layer in float32, then rounded to `dtype`. Embeddings that are one tensor are two afterwards if the adapter made
    them differ."""
    tied = is_tied(base.config)
    untie(base)
    if moved_base(config) and config.init_lora_weights is not False:
        config.init_lora_weights = True  # the base was moved when the adapter was loaded for the first time
    with quiet(), targets_as_named():
        model = PeftModel.from_pretrained(base, adapter, config=config, **from_hub)
        # PEFT rounds whole modules that were trained to the base's dtype: once more, into float32.
        policy = model.active_adapters[0]
        for tensor in adapter_tensors(model, policy).values():
            tensor.data = tensor.data.float() if tensor.is_floating_point() else tensor.data
        model.load_adapter(adapter, policy, **from_hub)
        add_layers(model, dtype)
        merged = model.merge_and_unload(safe_merge=True)  # what is left: whole modules that were trained
    kept = {*(merged._keep_in_fp32_modules or ()), *(getattr(merged, "_keep_in_fp32_modules_strict", None) or ())}
    for name, parameter in merged.named_parameters():
        if parameter.is_floating_point() and not kept & set(name.split(".")):
            parameter.data = parameter.data.to(dtype)
    if tied:
        tie_if_equal(merged)
    return merged


def add_layers(model: PeftModel, dtype: torch.dtype) -> None:
    """Adds the active adapter to the weights under it, each in float32 and then rounded to `dtype`."""
    layers = [layer for _, layer in adapter_layers(model) if isinstance(layer, BaseTunerLayer)]
    for layer in tqdm(layers, desc="Merging", unit="layer"):
        own = list(layer.get_base_layer().parameters(recurse=False))
        for parameter in own:
            parameter.data = parameter.data.float()
        layer.merge(safe_merge=True)
        for parameter in own:
            parameter.data = parameter.data.to(dtype)


def untie(model: PreTrainedModel) -> None:
    """Gives the head its own copy of embeddings that it shares: an adapter on one must not change the other."""
    embed = model.get_input_embeddings()
    head = model.get_output_embeddings()
    if head is not None and head.weight is embed.weight:
        head.weight = nn.Parameter(embed.weight.detach().clone(), requires_grad=False)


def tie_if_equal(model: PreTrainedModel) -> None:
    """Lets equal embeddings and head be one tensor again, and has the config say so if they are not: with a config
    that says "tied", one of two tensors would vanish when the model is loaded."""
    embed = model.get_input_embeddings()
    head = model.get_output_embeddings()
    equal = head is not None and torch.equal(embed.weight, head.weight)
    if equal:
        head.weight = embed.weight
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = equal


@contextmanager
def quiet() -> Iterator[None]:
    """Hides that PEFT warns of tied and of already merged weights, both of which are taken care of here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield
