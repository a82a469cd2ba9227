"""The layers of model families as data, for `recognition.py`.

Each entry was read against the `forward` of transformers' modules. The start-up probe then compares.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .elementwise import Norm

Qkv = tuple[str, ...]


@dataclass(frozen=True)
class Family:
    """A family's decoder layers; the defaults are Llama's.

    The first half adds post_norm(out(attention(norm(x)))) to x, the second mlp_post_norm(down(act(gate) * up)) of
    mlp_norm of the sum. Names are those of modules in a layer; where one is None, there is no such norm. The attention
    module has `head_dim` and `scaling`.
    """

    attention: str = "self_attn"
    projections: Qkv = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")  # or one that makes all three
    out: str = "self_attn.o_proj"
    head_norms: tuple[str, str] | None = None  # of queries and keys, in layers that have them
    value_norm: bool = False  # values have that of keys without its weight
    norm: str | None = "input_layernorm"
    mlp_norm: str | None = "post_attention_layernorm"
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")  # or one that makes both, or has no gate
    down: str = "mlp.down_proj"

    post_norm: str | None = None
    mlp_post_norm: str | None = None
    parallel: bool = False  # both halves read norm(x)
    norm_kind: str = "plain"  # a key of NORMS
    whole_heads: bool = False  # norms of queries and keys are over all heads together
    late_norms: bool = False  # they come after the rotation
    gated: bool = False  # behind each query head stands a gate: sigmoid times what the head finds
    pairs: bool = False  # a rotation turns neighbors, not the two halves of a head
    spread: Callable[[Tensor], Tensor] | None = None  # from cosines of the rotary module to those of each number
    rope_by_type: bool = False  # the rotary module has angles for each kind in `layer_types`
    softcap: str | None = None  # name in the config: scores s become softcap * tanh(s / softcap)
    sinks: str | None = None  # name in the attention module: scores of one more key without a value
    rotates: Callable[[Any, Any], bool] = lambda attention, config: True  # whether a layer has positions at all
    query_factor: Callable[[Any, Tensor], Tensor] | None = None  # of the config and positions (T,): (T,)

    activation: tuple[str, ...] = ("hidden_act", "hidden_activation")  # where the config has its name
    residual_multiplier: str | None = None  # name in the config, as the next
    embedding_multiplier: str | None = None
    scalar: str | None = None  # a layer's buffer: factor of its output
    unless: tuple[str, ...] = ()  # what the config may not ask for

    # Halves that the model's own modules compute where a layer has none of the above. Module in a layer, by its name:
    mixer: str | None = None
    # Of a layer, the normed input and the residual stream, (1, T, H): what its feed-forward half gives.
    experts: Callable[[Any, Tensor, Tensor], Any] | None = None


# What a norm's module computes: the weight and how it is applied.
NORMS: dict[str, Callable[[Any], Norm]] = {
    "plain": lambda m: Norm(m.weight, m.variance_epsilon),
    "wide": lambda m: Norm(m.weight, m.variance_epsilon, wide=True),
    # float32 inside: 1 + w would be rounded in half precision
    "one plus": lambda m: Norm(1.0 + m.weight.detach().float(), m.eps, wide=True),
    "gemma 4": lambda m: Norm(m.weight, m.eps, wide=True),
    "layer": lambda m: Norm(m.weight, m.variance_epsilon, wide=True, centered=True),
}


def _interleaved(x: Tensor) -> Tensor:
    return x[..., : x.shape[-1] // 2].repeat_interleave(2, -1)


def _twice(x: Tensor) -> Tensor:
    return torch.cat((x, x), -1)


def _llama_4_factor(config: Any, positions_T: Tensor) -> Tensor:
    rope = config.rope_parameters
    beta, length = rope["llama_4_scaling_beta"], rope["original_max_position_embeddings"]
    return 1 + beta * torch.log(1 + torch.floor(positions_T / length))


def _block(layer: Any, normed: Tensor, residual: Tensor) -> Any:
    return layer.mlp(normed)


def _gemma_4_experts(layer: Any, normed: Tensor, residual: Tensor) -> Tensor:
    """The dense half beside the experts, which read the residual stream by a norm of their own."""
    dense = layer.post_feedforward_layernorm_1(layer.mlp(normed))
    flat = residual.flatten(0, 1)
    _, weights, index = layer.router(flat)
    found = layer.experts(layer.pre_feedforward_layernorm_2(flat), index, weights)
    return dense + layer.post_feedforward_layernorm_2(found.view_as(residual))


_QK = ("self_attn.q_norm", "self_attn.k_norm")
_LLAMA = Family()
_QWEN3 = Family(head_norms=_QK)
_GEMMA = Family(norm_kind="one plus")
_GEMMA2 = replace(
    _GEMMA,
    post_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_post_norm="post_feedforward_layernorm",
)
_GEMMA3 = replace(_GEMMA2, head_norms=_QK, rope_by_type=True)
_GEMMA4 = replace(
    _GEMMA3,
    norm_kind="gemma 4",
    value_norm=True,
    scalar="layer_scalar",
    unless=("hidden_size_per_layer_input", "num_kv_shared_layers"),
    experts=_gemma_4_experts,
)
_OLMO2 = Family(
    norm_kind="wide",
    norm=None,
    post_norm="post_attention_layernorm",
    mlp_norm=None,
    mlp_post_norm="post_feedforward_layernorm",
    head_norms=_QK,
    whole_heads=True,
)
_FUSED_MLP = ("mlp.gate_up_proj",)
_GLM = Family(gate_up=_FUSED_MLP, pairs=True, spread=_interleaved)
_GRANITE = Family(residual_multiplier="residual_multiplier", embedding_multiplier="embedding_multiplier")
_COHERE = Family(norm_kind="layer", mlp_norm="input_layernorm", parallel=True, pairs=True, unless=("use_qk_norm",))
_QWEN3_5 = Family(norm_kind="one plus", head_norms=_QK, gated=True, mixer="linear_attn")

# To bring a family whose layers can be described so to the fused layers, add its `model_type` here.
FAMILIES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _QWEN3,
    # Llama's layers under other names
    "internlm3": _LLAMA,
    "exaone": _LLAMA,
    "iquestcoder": _LLAMA,
    "ministral": _LLAMA,
    "seed_oss": replace(_LLAMA, unless=("residual_dropout",)),
    "cwm": _LLAMA,
    "smollm3": Family(rotates=lambda attention, config: bool(attention.use_rope)),
    "ministral3": Family(query_factor=_llama_4_factor),
    "qwen2_vl_text": _LLAMA,
    "qwen2_5_vl_text": _LLAMA,
    "qwen3_vl_text": _QWEN3,
    "helium": Family(pairs=True, spread=_interleaved),
    "ernie4_5": Family(pairs=True, spread=_interleaved),
    "hunyuan_v1_dense": Family(head_norms=("self_attn.query_layernorm", "self_attn.key_layernorm"), late_norms=True),
    "arcee": Family(gate_up=("mlp.up_proj",)),
    "gemma": _GEMMA,
    "gemma2": replace(_GEMMA2, softcap="attn_logit_softcapping"),
    "gemma3_text": _GEMMA3,
    "gemma4_text": _GEMMA4,
    "gemma4_unified_text": _GEMMA4,
    "phi3": Family(projections=("self_attn.qkv_proj",), gate_up=_FUSED_MLP),
    "granite": _GRANITE,
    "granitemoehybrid": replace(
        _GRANITE,
        gate_up=("shared_mlp.input_linear",),
        down="shared_mlp.output_linear",
        rotates=lambda attention, config: config.position_embedding_type == "rope",
        mixer="mamba",
        experts=lambda layer, normed, residual: layer.block_sparse_moe(normed) + layer.shared_mlp(normed),
    ),
    "olmo2": _OLMO2,
    "olmo3": replace(_OLMO2, rope_by_type=True),
    "exaone4": replace(
        _OLMO2,
        norm_kind="plain",
        whole_heads=False,
        rotates=lambda attention, config: attention.sliding_window is None or attention.is_sliding,
    ),
    "glm": _GLM,
    "glm4": replace(_GLM, post_norm="post_self_attn_layernorm", mlp_post_norm="post_mlp_layernorm"),
    # Its rotary module turns neighbors by cosines of its own for each number.
    "glm4v_text": replace(_GLM, spread=None, post_norm="post_self_attn_layernorm", mlp_post_norm="post_mlp_layernorm"),
    "cohere": _COHERE,
    "cohere2": replace(_COHERE, rotates=lambda attention, config: attention.sliding_window is not None),
    "qwen3_5_text": _QWEN3_5,
    # Mixtures of experts: their attention, and the layers that are dense
    "mixtral": replace(_LLAMA, experts=_block),
    "qwen3_moe": replace(_QWEN3, experts=_block),
    "qwen3_vl_moe_text": replace(_QWEN3, experts=_block),
    "qwen3_5_moe_text": replace(_QWEN3_5, experts=_block),
    "glm4_moe": replace(_QWEN3, experts=_block),
    "gpt_oss": Family(norm_kind="wide", spread=_twice, sinks="sinks", experts=_block),
}
MODEL_TYPES = FAMILIES.keys()
