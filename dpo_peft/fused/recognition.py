"""Says which models the written-out decoder of `decoder.py` is right for.

`FAMILIES` has an entry for each model type whose layers' `forward` was read and is what `decoder.py` does. A model of
such a type must also show nothing that changes that: modules of other classes, hooks, dropout, adapters of another
kind. The start-up probe then compares the result with the model's own log-probs.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..forward.attention import HeadShape, backend_named
from ..forward.score import NotRecognizedError
from .attention import PACKED
from .decoder import DecoderLayer, FusedModel
from .elementwise import Heads, Norm
from .lora import Projection


@dataclass(frozen=True)
class Family:
    """Names of the parts of a family's decoder layers; the defaults are Llama's.

    The layer computes x + out(attention(norm(x))), with rotary positions, and to that it adds down(silu(gate) * up) of
    the second norm. The attention module has `head_dim` and `scaling`.
    """

    attention: str = "self_attn"
    projections: tuple[str, str, str] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    out: str = "self_attn.o_proj"
    head_norms: tuple[str, str] | None = None  # of queries and keys
    norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    gate_up: tuple[str, str] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"


# To bring a family whose layers are put together as above to the fused layers, add its `config.model_type` here.
FAMILIES = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(head_norms=("self_attn.q_norm", "self_attn.k_norm")),
}
MODEL_TYPES = FAMILIES.keys()


def fused_decoder(causal_lm: PreTrainedModel, compute_dtype: torch.dtype, attention: str) -> FusedModel:
    """Returns the written-out decoder of a model.

    Args:
        causal_lm: the transformers model inside the PEFT model.
        compute_dtype: of the training run, autocast's if it is on.
        attention: name of the backend that the model's own layers take. Where that is "varlen" and our kernels run,
            these take its place.

    Raises:
        NotRecognizedError: the model isn't one that `decoder.py` is right for.
    """
    layers = recognize(causal_lm, compute_dtype)
    heads, device = layers[0].heads, causal_lm.get_input_embeddings().weight.device
    shape = HeadShape(heads.queries, heads.keys, heads.size)
    packed = attention == PACKED.otherwise and PACKED.supports(device, compute_dtype, shape)
    return FusedModel(causal_lm, layers, PACKED if packed else backend_named(attention))


def recognize(causal_lm: PreTrainedModel, compute_dtype: torch.dtype) -> list[DecoderLayer]:
    """Returns the layers of a model that `decoder.py` computes as the model itself does.

    Args:
        causal_lm: the transformers model inside the PEFT model.
        compute_dtype: of the training run, autocast's if it is on.

    Raises:
        NotRecognizedError: why it isn't one.
    """
    config, backbone = causal_lm.config, causal_lm.base_model
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise NotRecognizedError(f"model type {config.model_type!r} is not one of {', '.join(FAMILIES)}")
    if config.hidden_act != "silu":
        raise NotRecognizedError(f"hidden_act is {config.hidden_act!r}")
    if backbone.embed_tokens.weight.dtype != compute_dtype:
        raise NotRecognizedError(f"weights in {backbone.embed_tokens.weight.dtype} compute in {compute_dtype}")
    if getattr(config, "attention_dropout", 0.0):
        raise NotRecognizedError("its attention has dropout")
    _check_modules(causal_lm)
    return [_layer(layer, family, config, compute_dtype) for layer in backbone.layers]


def _check_modules(causal_lm: nn.Module) -> None:
    for name, module in causal_lm.named_modules():
        layered = ".layers." in f".{name}."
        if isinstance(module, AuxiliaryTrainingWrapper) or (isinstance(module, BaseTunerLayer) and not layered):
            raise NotRecognizedError(f"{name} is trained, or has an adapter")
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        # The hook that asks for input gradients is there for plain checkpointing, and changes no value.
        if any(getattr(hook, "__name__", "") != "make_inputs_require_grads" for hook in hooks):
            raise NotRecognizedError(f"{name or 'the model'} has hooks")
        if layered and "forward" in vars(module):
            raise NotRecognizedError(f"{name}'s forward is replaced")
        if isinstance(module, nn.Dropout) and module.p > 0:
            raise NotRecognizedError(f"{name} drops out")


def _layer(layer: nn.Module, family: Family, config: PreTrainedConfig, compute_dtype: torch.dtype) -> DecoderLayer:
    def projection(*names: str) -> Projection:
        for name in names:
            for reason in _against(layer.get_submodule(name), compute_dtype):
                raise NotRecognizedError(f"{name.rpartition('.')[2]} {reason}")
        return Projection([layer.get_submodule(name) for name in names])

    def norm(name: str) -> Norm:
        module: Any = layer.get_submodule(name)
        if not type(module).__name__.endswith("RMSNorm") or module.weight.requires_grad:
            raise NotRecognizedError(f"a norm is a {type(module).__name__}, or is trained")
        return Norm(module.weight, module.variance_epsilon)

    attention: Any = layer.get_submodule(family.attention)
    qkv, size = projection(*family.projections), attention.head_dim
    head_norms = [norm(name) for name in family.head_norms or ()]
    return DecoderLayer(
        norm=norm(family.norm),
        qkv=qkv,
        heads=Heads(qkv.outputs[0] // size, qkv.outputs[1] // size, size, *head_norms),
        scaling=attention.scaling,
        # Mistral's layers read it from the config.
        window=getattr(attention, "sliding_window", getattr(config, "sliding_window", None)),
        out=projection(family.out),
        mlp_norm=norm(family.mlp_norm),
        gate_up=projection(*family.gate_up),
        down=projection(family.down),
    )


def _against(module: Any, compute_dtype: torch.dtype) -> Iterator[str]:
    """Yields what a linear layer or its adapters have that a projection doesn't."""
    base = module
    if isinstance(module, BaseTunerLayer):
        if not isinstance(module, LoraLayer):
            yield f"has an adapter of the kind {type(module).__name__}"
            return
        if type(module).__name__ not in ("Linear", "Linear4bit") or getattr(module, "lora_variant", None):
            yield "has an adapter that is not plain LoRA"
        if module.merged:
            yield "is merged with an adapter"
        if any(linear.bias is not None for linear in module.lora_B.values()):
            yield "has an adapter with a bias"
        if len(module.active_adapters) > 1:
            yield "has several active adapters"
        base = module.get_base_layer()
    if type(base) not in (nn.Linear, Linear4bit):
        yield f"is a {type(base).__name__}"
    elif isinstance(base, Linear4bit):
        if getattr(base.weight, "quant_state", None) is None:
            yield "is not quantized yet"
        if base.compute_dtype not in (None, compute_dtype):
            yield f"computes in {base.compute_dtype}"
    elif base.weight.dtype != compute_dtype:
        yield f"is in {base.weight.dtype}"
    if base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad):
        yield "is trained in full"
