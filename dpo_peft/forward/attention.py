"""Attention over a packed batch, plugged into transformers by its public hooks. No model file is patched.

A model whose attention implementation is `IMPLEMENTATION` works as before under plain calls (generation, evaluation by
others): they go to SDPA with the masks that SDPA gets. A call that carries `prefix_layout` reads that layout instead.
Such a call also passes `layout_marker()` as its 4-D attention mask, which transformers hands through to the attention
function unchanged; a model that builds masks of its own is caught by that.

Backends: "varlen" (CUDA; one kernel over ragged segments, K and V gathered as [prompt; own tokens]) and "dense" (any
device; the mask predicate itself, sample by sample, and the oracle for the others). On Hopper GPUs fused layers have a
third, "packed" (`shared_attention.py`; kernels that read the packed row as it is).

Shape suffixes: H query heads, G key/value heads, T packed tokens, S gathered keys, D head size, E samples, B longest
sample in tokens.
"""

import importlib.util
import inspect
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..fused.attention import Tiles, plan_tiles, shared_attention
from ..fused.elementwise import Places
from .layout import PackedBatch, visible

IMPLEMENTATION = "dpo_peft_prefix_shared"
# What reaches the attention function without changing it. Anything else that a model passes (softcap, s_aux,
# position_bias, the indices of sparse attention, ...) means something that the layout does not know.
_HARMLESS = {"position_ids", "use_cache", "cache_position", "output_attentions", "output_hidden_states", "return_dict"}


class CannotShareError(RuntimeError):
    """This model's attention can't read a packed batch; use one row per completion."""


class AttentionPlan:
    """A packed batch as the attention function needs it: one object for all layers and for recomputation.

    Args:
        batch: a batch from `pack`, on the model's device.
        backend: "dense" or "varlen".
    """

    def __init__(self, batch: PackedBatch, backend: str):
        self.batch = batch
        self.backend = backend
        self.trace: list[tuple[int | None, int]] | None = None  # for the probe: window and head size of each call
        self._masks: dict[int | None, Tensor] = {}
        self._tiles: dict[tuple[int, int], Tiles] = {}
        assert batch.sample_index is not None
        self.filled_EB = batch.sample_index >= 0
        self.index_EB = batch.sample_index.clamp(min=0)

    @cached_property
    def places(self) -> Places:
        """Where "varlen" attention's keys and values are gathered from."""
        assert self.batch.kv_index is not None and self.batch.kv_copies is not None
        return Places(self.batch.kv_index, self.batch.kv_copies)

    def tiles(self, group: int, head: int) -> Tiles:
        """Those of "packed" attention, made once for all layers."""
        if (group, head) not in self._tiles:
            segments = np.array(self.batch.segments)
            self._tiles[group, head] = plan_tiles(segments, group, head, self.batch.input_ids.device)
        return self._tiles[group, head]

    @cached_property
    def filled_T(self) -> Tensor:
        """Where the tokens are in (E, B). Samples follow each other in the packed row, so this is its order."""
        return self.filled_EB.flatten().nonzero()[:, 0]

    def mask_EBB(self, window: int | None) -> Tensor:
        """The mask predicate on every sample's own tokens. Padding queries see position 0, so no row is empty."""
        if window not in self._masks:
            batch, index = self.batch, self.index_EB
            assert batch.segment is not None and batch.context is not None
            segment, context, pos = batch.segment[index], batch.context[index], batch.position_ids[0][index]
            mask = visible(
                segment[:, :, None], context[:, :, None], pos[:, :, None], segment[:, None], pos[:, None], window
            )
            mask &= self.filled_EB[:, None]
            mask[:, :, 0] |= ~self.filled_EB
            self._masks[window] = mask
        return self._masks[window]


def layout_marker(device: torch.device) -> Tensor:
    """The 4-D mask that stands for "the layout says who sees whom"."""
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)


def prefix_shared_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    prefix_layout: AttentionPlan | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function registered as `IMPLEMENTATION`.

    Args:
        query: (1, H, T, D); key, value: (1, G, T, D).

    Returns:
        (1, T, H, D) and None (no attention weights).

    Raises:
        CannotShareError: the model asks for something that the layout can't express.
    """
    if prefix_layout is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    _refuse_unknown(attention_mask, kwargs)
    if prefix_layout.trace is not None:
        prefix_layout.trace.append((sliding_window, query.shape[-1]))
    q_THD, k_TGD, v_TGD = (x[0].transpose(0, 1) for x in (query, key, value))
    if prefix_layout.backend == "varlen" and not dropout:  # the kernel has no dropout
        index = prefix_layout.batch.kv_index
        assert index is not None
        k_SGD, v_SGD = k_TGD.index_select(0, index), v_TGD.index_select(0, index)
        return attend_varlen(prefix_layout, q_THD.contiguous(), k_SGD, v_SGD, scaling, sliding_window)[None], None
    return attend_dense(prefix_layout, q_THD, k_TGD, v_TGD, scaling, sliding_window, dropout)[None], None


def _refuse_unknown(attention_mask: Tensor | None, kwargs: dict[str, Any]) -> None:
    if attention_mask is not None and tuple(attention_mask.shape) != (1, 1, 1, 1):
        raise CannotShareError("the model builds an attention mask of its own")
    for name, value in kwargs.items():
        if name == "is_causal" and value is False:
            raise CannotShareError("its attention is bidirectional")
        if value is not None and name not in _HARMLESS | {"is_causal"}:
            raise CannotShareError(f"its attention uses {name}")


def attend_dense(
    plan: AttentionPlan,
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    scaling: float | None,
    window: int | None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention sample by sample under the mask predicate; (T, H, D)."""
    index = plan.index_EB
    groups = q_THD.shape[1] // k_TGD.shape[1]
    q_EHBD, k_EGBD, v_EGBD = (x[index].transpose(1, 2) for x in (q_THD, k_TGD, v_TGD))
    out_EHBD = F.scaled_dot_product_attention(
        q_EHBD,
        k_EGBD.repeat_interleave(groups, 1),
        v_EGBD.repeat_interleave(groups, 1),
        attn_mask=plan.mask_EBB(window)[:, None],
        dropout_p=dropout,
        scale=scaling,
    )
    return out_EHBD.transpose(1, 2).flatten(0, 1).index_select(0, plan.filled_T)


def attend_varlen(
    plan: AttentionPlan, q_THD: Tensor, k_SGD: Tensor, v_SGD: Tensor, scaling: float | None, window: int | None
) -> Tensor:
    """Attention of every segment's queries to its gathered keys, in one kernel; (T, H, D)."""
    batch = plan.batch
    size = v_SGD.shape[-1]
    if size < q_THD.shape[-1]:  # latent attention: the kernel wants one head size; zeros add nothing
        v_SGD = F.pad(v_SGD, (0, q_THD.shape[-1] - size))
    out_THD = varlen_kernel(
        q_THD,
        k_SGD,
        v_SGD,
        batch.cu_seq_q,
        batch.cu_seq_k,
        batch.max_q,
        batch.max_k,
        scale=scaling,
        # Bottom-right aligned: a segment's last query sees its last key. -1 is no limit to the left.
        window_size=(-1 if window is None else window - 1, 0),
    )
    return out_THD[..., :size]


def attend_packed(
    plan: AttentionPlan, q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, scaling: float, window: int | None
) -> Tensor:
    """Attention of the packed row as it is, for full attention only; (T, H, D)."""
    assert window is None
    tiles = plan.tiles(q_THD.shape[1] // k_TGD.shape[1], q_THD.shape[2])
    return shared_attention(q_THD, k_TGD, v_TGD, tiles, scaling)


def varlen_kernel(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`torch.nn.attention.varlen.varlen_attn`; newer releases want `enable_gqa` said, older ones don't know it."""
    from torch.nn.attention.varlen import varlen_attn

    if _needs_enable_gqa():
        kwargs["enable_gqa"] = q.shape[1] != k.shape[1]
    out = varlen_attn(q, k, v, *args, **kwargs)
    assert isinstance(out, Tensor)  # only return_aux gives a tuple
    return out


@cache
def _needs_enable_gqa() -> bool:
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def choose_backend(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """ "varlen" where its kernel runs (CUDA sm80+, half precision, head size a multiple of 8 up to 256)."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16) or head_dim % 8 or head_dim > 256:
        return "dense"
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return "dense"
    return "varlen" if torch.cuda.get_device_capability(device) >= (8, 0) else "dense"


AttentionInterface.register(IMPLEMENTATION, prefix_shared_attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
