"""Says which models the written-out decoder of `model.py` is right for.

`families.py` has an entry for each model type whose layers' `forward` was read. A model of such a type must also show
nothing that changes what the entry says: modules of other classes, hooks, dropout, adapters of another kind. The
start-up probe then compares the result with the model's own log-probs.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.variants import ALoraLinearVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..forward.attention import HeadShape, backend_named
from ..forward.gguf import GgufLinear
from ..forward.scope import is_answer_only
from ..forward.score import NotRecognizedError
from .attention import PACKED
from .decoder import DecoderLayer, FeedForward, SelfAttention
from .elementwise import ACTIVATIONS
from .families import FAMILIES, MODEL_TYPES, NORMS, Family
from .heads import Angles, Heads
from .lora import Projection
from .model import FusedModel, Parts
from .own import Own

# They change no value: for plain checkpointing, and to record what routers compute.
_HARMLESS_HOOKS = ("make_inputs_require_grads", "output_capturing_hook", "bring_layer_in", "layer_leaves")

__all__ = ["FAMILIES", "MODEL_TYPES", "Family", "fused_decoder", "recognize"]


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
    parts = recognize(causal_lm, compute_dtype)
    device = causal_lm.get_input_embeddings().weight.device
    heads = {m.heads for layer in parts.layers if isinstance(m := layer.mixer, SelfAttention)}
    shapes = {HeadShape(h.queries, h.keys, h.size) for h in heads}
    packed = attention == PACKED.otherwise and all(PACKED.supports(device, compute_dtype, shape) for shape in shapes)
    return FusedModel(causal_lm, parts, PACKED if packed else backend_named(attention))


def recognize(causal_lm: PreTrainedModel, compute_dtype: torch.dtype) -> Parts:
    """Returns what a model is made of that `decoder.py` computes as the model itself does.

    Args:
        causal_lm: the transformers model inside the PEFT model; of a composite, its text decoder is looked at.
        compute_dtype: of the training run, autocast's if it is on.

    Raises:
        NotRecognizedError: why it isn't one.
    """
    config, backbone = causal_lm.config.get_text_config(), causal_lm.get_decoder()
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise NotRecognizedError(f"layers of the model type {config.model_type!r} are not known")
    for name in family.unless:
        if value := getattr(config, name, None):
            raise NotRecognizedError(f"{name} is {value!r}")
    if backbone.embed_tokens.weight.dtype != compute_dtype:
        raise NotRecognizedError(f"weights in {backbone.embed_tokens.weight.dtype} compute in {compute_dtype}")
    if getattr(config, "attention_dropout", 0.0):
        raise NotRecognizedError("its attention has dropout")
    _check_modules(causal_lm, backbone)
    reader = _Reader(family, config, compute_dtype, _routers(backbone))
    layers = [reader.layer(layer, i) for i, layer in enumerate(backbone.layers)]
    answer_only = any(map(is_answer_only, backbone.modules()))
    if answer_only and any(isinstance(layer.mixer, Own) for layer in layers):
        raise NotRecognizedError("an answer-only adapter on layers with a state")
    return Parts(
        layers,
        reader.norm(backbone, "norm"),
        getattr(config, family.embedding_multiplier) if family.embedding_multiplier else 1.0,
        _angles(family, config, backbone.rotary_emb),
        answer_only,
    )


def _check_modules(causal_lm: PreTrainedModel, backbone: nn.Module) -> None:
    """Looks at the decoder and what it stands in; beside it (a vision tower) the model's own modules run."""
    ours = next(name for name, module in causal_lm.named_modules() if module is backbone)
    for name, module in causal_lm.named_modules():
        below = f"{name}.".startswith(f"{ours}.") or not ours
        beside = not below and not f"{ours}.".startswith(f"{name}.") and name
        if beside and module is not causal_lm.get_output_embeddings():
            continue
        layered = below and ".layers." in f".{name}."
        if isinstance(module, AuxiliaryTrainingWrapper) or (isinstance(module, BaseTunerLayer) and not layered):
            raise NotRecognizedError(f"{name} is trained, or has an adapter")
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if any(getattr(hook, "__name__", "") not in _HARMLESS_HOOKS for hook in hooks):
            raise NotRecognizedError(f"{name or 'the model'} has hooks")
        if layered and "forward" in vars(module):
            raise NotRecognizedError(f"{name}'s forward is replaced")
        if isinstance(module, nn.Dropout) and module.p > 0:
            raise NotRecognizedError(f"{name} drops out")


def _routers(backbone: Any) -> tuple[type[nn.Module], int] | None:
    """Returns the class whose output holds the routers' logits, and their place in it, as transformers records it."""
    recorder = (getattr(backbone, "_can_record_outputs", None) or {}).get("router_logits")
    return None if recorder is None else (recorder.target_class, recorder.index)


def _angles(
    family: Family, config: PreTrainedConfig, rotary: Any
) -> Callable[[Tensor, Tensor, str], tuple[Angles, Angles]]:
    def angles(x_1TH: Tensor, positions: Tensor, kind: str) -> tuple[Angles, Angles]:
        found = rotary(x_1TH, positions, *([kind] if family.rope_by_type else []))
        keys = queries = Angles(*(x[0] if family.spread is None else family.spread(x[0]) for x in found))
        if family.query_factor is not None:
            factor_T1 = family.query_factor(config, positions[0])[:, None]
            queries = Angles(*((x_TR * factor_T1).to(x_TR.dtype) for x_TR in keys))
        return queries, keys

    return angles


class _Reader:
    """Reads layers of a family."""

    def __init__(
        self,
        family: Family,
        config: PreTrainedConfig,
        compute_dtype: torch.dtype,
        routers: tuple[type[nn.Module], int] | None,
    ):
        self.family, self.config, self.compute_dtype, self.routers = family, config, compute_dtype, routers
        self.activation = next((getattr(config, n) for n in family.activation if getattr(config, n, None)), None)
        self.times = getattr(config, family.residual_multiplier) if family.residual_multiplier else 1.0

    def layer(self, layer: nn.Module, index: int) -> DecoderLayer:
        family, kinds = self.family, getattr(self.config, "layer_types", None)
        kind = kinds[index] if kinds else "sliding_attention"  # a window of the config is that of all layers then
        return DecoderLayer(
            norm=self.norm(layer, family.norm),
            mixer=self.attention(layer, kind) if _has(layer, family.attention) else self.own_mixer(layer),
            mlp_norm=self.norm(layer, family.mlp_norm),
            mlp=self.feed_forward(layer) if _has(layer, family.down) and not _moe(layer) else self.own_experts(layer),
            post_norm=self.norm(layer, family.post_norm),
            mlp_post_norm=self.norm(layer, family.mlp_post_norm),
            times=self.times,
            scalar=getattr(layer, family.scalar) if family.scalar else None,
            parallel=family.parallel,
        )

    def attention(self, layer: nn.Module, kind: str) -> SelfAttention:
        family, config = self.family, self.config
        attention: Any = layer.get_submodule(family.attention)
        names = family.projections
        tied = getattr(attention, names[-1].rpartition(".")[2], None) is None
        names = names[:-1] if tied else names
        qkv, size = self.projection(layer, *names), attention.head_dim
        if len(names) == 1:
            queries = config.num_attention_heads
            keys = (qkv.outputs[0] // size - queries) // 2
        else:
            queries, keys = qkv.outputs[0] // size // (1 + family.gated), qkv.outputs[1] // size
        q_norm, k_norm = (
            self.norm(layer, n) if n and _has(layer, n) else None for n in family.head_norms or (None,) * 2
        )
        v_norm = k_norm._replace(weight=torch.ones_like(k_norm.weight)) if k_norm and family.value_norm else None
        rope = kind if family.rope_by_type else "all"
        extra: dict[str, Any] = {}
        if family.softcap and getattr(config, family.softcap):
            extra["softcap"] = getattr(config, family.softcap)
        if family.sinks:
            extra["sinks"] = getattr(attention, family.sinks)
            if extra["sinks"].requires_grad:
                raise NotRecognizedError(f"{family.sinks} is trained")
        return SelfAttention(
            qkv=qkv,
            heads=Heads(
                queries, keys, size, q_norm, k_norm, v_norm, family.whole_heads, family.late_norms, family.gated,
                family.pairs, tied,
            ),
            scaling=attention.scaling,
            window=getattr(config, "sliding_window", None) if kind == "sliding_attention" else None,
            out=self.projection(layer, family.out),
            rope=rope if family.rotates(attention, config) else None,
            extra=extra,
        )  # fmt: skip

    def feed_forward(self, layer: nn.Module) -> FeedForward:
        if self.activation not in ACTIVATIONS:
            raise NotRecognizedError(f"hidden_act is {self.activation!r}")
        down = self.projection(layer, self.family.down)
        return FeedForward(self.projection(layer, *self.family.gate_up), down, self.activation)

    def own_mixer(self, layer: nn.Module) -> Own:
        name = self.family.mixer
        if name is None or not _has(layer, name):
            raise NotRecognizedError(f"a layer has no {self.family.attention}")
        module = layer.get_submodule(name)
        return Own(nn.ModuleList([module]), lambda plan, normed, residual: module(normed, prefix_layout=plan))

    def own_experts(self, layer: nn.Module) -> Own:
        family = self.family
        if family.experts is None:
            raise NotRecognizedError(f"a layer has no {family.down}, or has experts beside it")
        compute, mixer = family.experts, family.attention
        modules = nn.ModuleList(m for name, m in layer.named_children() if name not in (mixer, family.mixer))
        kind, place = self.routers or (None, 0)
        routers = [(m, place) for m in modules.modules() if kind is not None and isinstance(m, kind)]
        return Own(modules, lambda plan, normed, residual: compute(layer, normed, residual), routers)

    def projection(self, layer: nn.Module, *names: str) -> Projection:
        for name in names:
            for reason in _against(layer.get_submodule(name), self.compute_dtype):
                raise NotRecognizedError(f"{name.rpartition('.')[2]} {reason}")
        return Projection([layer.get_submodule(name) for name in names])

    def norm(self, module: nn.Module, name: str | None) -> Any:
        """Returns the Norm of that name in a layer; None if there is no name."""
        if name is None:
            return None
        norm: Any = module.get_submodule(name)
        if not re.search("RMSNorm|LayerNorm", type(norm).__name__) or any(p.requires_grad for p in norm.parameters()):
            raise NotRecognizedError(f"a norm is a {type(norm).__name__}, or is trained")
        return NORMS[self.family.norm_kind](norm)


def _has(layer: nn.Module, name: str) -> bool:
    try:
        layer.get_submodule(name)
    except AttributeError:
        return False
    return True


def _moe(layer: nn.Module) -> bool:
    """Whether experts stand beside a dense half."""
    return _has(layer, "experts") or _has(layer, "block_sparse_moe")


def _against(module: Any, compute_dtype: torch.dtype) -> Iterator[str]:
    """Yields what a linear layer or its adapters have that a projection doesn't."""
    base = module
    if isinstance(module, BaseTunerLayer):
        if not isinstance(module, LoraLayer):
            yield f"has an adapter of the kind {type(module).__name__}"
            return
        variants = [one for one in module.lora_variant.values() if not isinstance(one, ALoraLinearVariant)]
        if type(module).__name__ not in ("Linear", "Linear4bit") or variants:
            yield "has an adapter that is not plain LoRA"
        if module.merged:
            yield "is merged with an adapter"
        if any(linear.bias is not None for linear in module.lora_B.values()):
            yield "has an adapter with a bias"
        if len(module.active_adapters) > 1:
            yield "has several active adapters"
        base = module.get_base_layer()
    if type(base) not in (nn.Linear, Linear4bit, GgufLinear):
        yield f"is a {type(base).__name__}"
    elif isinstance(base, Linear4bit):
        if getattr(base.weight, "quant_state", None) is None:
            yield "is not quantized yet"
        if base.compute_dtype not in (None, compute_dtype):
            yield f"computes in {base.compute_dtype}"
    elif (own := getattr(base, "dtype", None) or base.weight.dtype) != compute_dtype:
        yield f"is in {own}"
    if base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad):
        yield "is trained in full"
