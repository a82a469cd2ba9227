"""Which models the written-out decoder of `fused.py` is right for.

The list below names model types whose `forward` was read and is what `fused.py` does. A model on it must also show
nothing that changes that: modules of other classes, hooks, dropout, adapters of another kind. The probe then compares
the result with the model's own log-probs.
"""

from collections.abc import Iterator
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .decoder import DecoderLayer
from .elementwise import Heads, Norm
from .lora import Projection

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")


class NotRecognizedError(Exception):
    """Why the written-out decoder can't be used on a model."""


def recognize(causal_lm: Any, compute_dtype: torch.dtype) -> list[DecoderLayer]:
    """The decoder layers of a model that `fused.py` computes as the model itself does.

    Args:
        causal_lm: the transformers model inside the PEFT model.
        compute_dtype: of the training run, autocast's if it is on.

    Raises:
        NotRecognizedError: why it isn't one.
    """
    config, backbone = causal_lm.config, causal_lm.base_model
    if config.model_type not in MODEL_TYPES:
        raise NotRecognizedError(f"model type {config.model_type!r} is not one of {', '.join(MODEL_TYPES)}")
    if config.hidden_act != "silu":
        raise NotRecognizedError(f"hidden_act is {config.hidden_act!r}")
    if backbone.embed_tokens.weight.dtype != compute_dtype:
        raise NotRecognizedError(f"weights in {backbone.embed_tokens.weight.dtype} compute in {compute_dtype}")
    if getattr(config, "attention_dropout", 0.0):
        raise NotRecognizedError("its attention has dropout")
    _check_modules(causal_lm)
    return [_layer(layer, config, compute_dtype) for layer in backbone.layers]


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


def _layer(layer: Any, config: Any, compute_dtype: torch.dtype) -> DecoderLayer:
    attention, mlp = layer.self_attn, layer.mlp
    q, k, v, out = (_linear(attention, name, compute_dtype) for name in _ATTENTION)
    gate, up, down = (_linear(mlp, name, compute_dtype) for name in _MLP)
    size = attention.head_dim
    qkv = Projection([q, k, v])
    heads = Heads(
        qkv.outputs[0] // size,
        qkv.outputs[1] // size,
        size,
        _norm(getattr(attention, "q_norm", None)),
        _norm(getattr(attention, "k_norm", None)),
    )
    norms = _norm(layer.input_layernorm), _norm(layer.post_attention_layernorm)
    assert norms[0] is not None and norms[1] is not None
    return DecoderLayer(
        norm=norms[0],
        qkv=qkv,
        heads=heads,
        scaling=attention.scaling,
        # Mistral's layers read it from the config.
        window=getattr(attention, "sliding_window", getattr(config, "sliding_window", None)),
        out=Projection([out]),
        mlp_norm=norms[1],
        gate_up=Projection([gate, up]),
        down=Projection([down]),
    )


def _norm(module: Any) -> Norm | None:
    if module is None:
        return None
    if not type(module).__name__.endswith("RMSNorm") or module.weight.requires_grad:
        raise NotRecognizedError(f"a norm is a {type(module).__name__}, or is trained")
    return Norm(module.weight, module.variance_epsilon)


def _linear(parent: Any, name: str, compute_dtype: torch.dtype) -> nn.Module:
    module = getattr(parent, name)
    for reason in _against(module, compute_dtype):
        raise NotRecognizedError(f"{name} {reason}")
    return module


def _against(module: Any, compute_dtype: torch.dtype) -> Iterator[str]:
    """What a linear layer or its adapters have that a projection doesn't."""
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
            yield "is not quantised yet"
        if base.compute_dtype not in (None, compute_dtype):
            yield f"computes in {base.compute_dtype}"
    elif base.weight.dtype != compute_dtype:
        yield f"is in {base.weight.dtype}"
    if base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad):
        yield "is trained in full"
