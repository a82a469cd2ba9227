"""Attention over a packed batch, plugged into transformers by its public hooks. No model file is patched.

A model whose attention implementation is `IMPLEMENTATION` works as before under plain calls (generation, evaluation by
others): they go to SDPA with the masks that SDPA gets. A call that carries `prefix_layout` reads that layout instead.
Such a call also passes `layout_marker()` as its 4-D attention mask, which transformers hands through to the attention
function unchanged; a model that builds masks of its own is caught by that.

Each way to compute attention is one record in `BACKENDS`: "varlen" (CUDA; one kernel over ragged segments, K and V
gathered as [prompt; own tokens]) and "dense" (any device; the mask predicate itself, sample by sample, and the oracle
for the others). To add one, put its record into the list, before those that it is to be preferred to.

Shape suffixes: H query heads, G key/value heads, T packed tokens, S gathered keys, D head size, E samples, B longest
sample in tokens.
"""

import inspect
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .layout import PackedBatch, visible

Made = TypeVar("Made")

IMPLEMENTATION = "dpo_peft_prefix_shared"
# What reaches the attention function without changing it. Anything else that a model passes (softcap, s_aux,
# position_bias, the indices of sparse attention, ...) means something that the layout does not know.
_HARMLESS = set("position_ids use_cache cache_position return_dict".split())
_HARMLESS |= {f"output_{what}" for what in ("attentions", "hidden_states", "router_logits")}


class CannotShareError(RuntimeError):
    """This model's attention can't read a packed batch; use one row per completion."""


class HeadShape(NamedTuple):
    """The heads of an attention layer."""

    queries: int  # H
    keys: int  # G
    size: int  # D


@dataclass(frozen=True)
class AttentionBackend:
    """One way to compute attention over a packed batch.

    `supports(device, dtype, heads)` says whether it runs there. `attend(plan, q, k, v, scaling, window)` gives
    (T, H, D) from q (T, H, D), k and v (T, G, D), or (S, G, D) if `gathers`; if it does `dropout`, it takes that as a
    keyword too. A call with a window or dropout that a backend does not do goes to the one named `otherwise`.
    """

    name: str
    supports: Callable[[torch.device, torch.dtype, HeadShape], bool]
    attend: Callable[..., Tensor]
    gathers: bool = False  # its keys and values are those of `kv_index`: [prompt; own tokens] for each segment
    windows: bool = True
    dropout: bool = False
    otherwise: str = "dense"


class AttentionPlan:
    """A packed batch as the attention function needs it: one object for all layers and for recomputation.

    Args:
        batch: a batch from `pack`, on the model's device.
        backend: a record, or the name of one in `BACKENDS`.
    """

    def __init__(self, batch: PackedBatch, backend: str | AttentionBackend):
        self.batch = batch
        self.backend = backend_named(backend) if isinstance(backend, str) else backend
        self.trace: list[tuple[int | None, HeadShape]] | None = None  # for the probe: window and heads of each call
        self._made: dict[Hashable, Any] = {}

    def backend_for(self, window: int | None, dropout: float = 0.0) -> AttentionBackend:
        """Returns the backend that takes a call: the plan's, or the one that does what it can't."""
        backend = self.backend
        while (window is not None and not backend.windows) or (dropout and not backend.dropout):
            backend = backend_named(backend.otherwise)
        return backend

    def once(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """Returns what `make` gives; calls it once for all layers."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


class BySample(NamedTuple):
    """A packed batch cut into its samples, each padded to the longest."""

    index_EB: Tensor  # flat positions of their tokens
    filled_T: Tensor  # where the tokens are in (E, B). Samples follow each other in the packed row: this is its order
    mask_EBB: Tensor  # who sees whom. Padding queries see position 0, so no row is empty


def by_sample(batch: PackedBatch, window: int | None) -> BySample:
    """Cuts a packed batch into its samples, and applies the mask predicate to each one's own tokens."""
    assert batch.sample_index is not None and batch.segment is not None and batch.context is not None
    filled_EB, index_EB = batch.sample_index >= 0, batch.sample_index.clamp(min=0)
    segment, context, pos = batch.segment[index_EB], batch.context[index_EB], batch.position_ids[0][index_EB]
    mask_EBB = visible(
        segment[:, :, None], context[:, :, None], pos[:, :, None], segment[:, None], pos[:, None], window
    )
    mask_EBB &= filled_EB[:, None]
    mask_EBB[:, :, 0] |= ~filled_EB
    return BySample(index_EB, filled_EB.flatten().nonzero()[:, 0], mask_EBB)


def layout_marker(device: torch.device) -> Tensor:
    """Returns the 4-D mask that stands for "the layout says who sees whom"."""
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
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Attends as transformers' functions do; registered as `IMPLEMENTATION`.

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
        prefix_layout.trace.append((sliding_window, HeadShape(query.shape[1], key.shape[1], query.shape[3])))
    backend = prefix_layout.backend_for(sliding_window, dropout)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if backend.gathers:
        index = prefix_layout.batch.kv_index
        assert index is not None
        k, v = k.index_select(0, index), v.index_select(0, index)
    extra = {"dropout": dropout} if dropout else {}
    return backend.attend(prefix_layout, q, k, v, scaling, sliding_window, **extra)[None], None


def _refuse_unknown(attention_mask: Tensor | None, kwargs: dict[str, object]) -> None:
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
    """Attends sample by sample under the mask predicate; (T, H, D)."""
    samples = plan.once(("by sample", window), lambda: by_sample(plan.batch, window))
    groups = q_THD.shape[1] // k_TGD.shape[1]
    q_EHBD, k_EGBD, v_EGBD = (x[samples.index_EB].transpose(1, 2) for x in (q_THD, k_TGD, v_TGD))
    out_EHBD = F.scaled_dot_product_attention(
        q_EHBD,
        k_EGBD.repeat_interleave(groups, 1),
        v_EGBD.repeat_interleave(groups, 1),
        attn_mask=samples.mask_EBB[:, None],
        dropout_p=dropout,
        scale=scaling,
    )
    return out_EHBD.transpose(1, 2).flatten(0, 1).index_select(0, samples.filled_T)


def attend_varlen(
    plan: AttentionPlan, q_THD: Tensor, k_SGD: Tensor, v_SGD: Tensor, scaling: float | None, window: int | None
) -> Tensor:
    """Attends from every segment's queries to its gathered keys, in one kernel; (T, H, D)."""
    batch = plan.batch
    size = v_SGD.shape[-1]
    if size < q_THD.shape[-1]:  # latent attention: the kernel wants one head size; zeros add nothing
        v_SGD = F.pad(v_SGD, (0, q_THD.shape[-1] - size))
    out_THD = varlen_kernel(
        q_THD.contiguous(),
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


def varlen_kernel(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Calls `torch.nn.attention.varlen.varlen_attn`; newer releases want `enable_gqa`, older ones don't know it."""
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


def _varlen_runs(device: torch.device, dtype: torch.dtype, heads: HeadShape) -> bool:
    """Whether torch's kernel runs: CUDA sm80+, half precision, head size a multiple of 8 up to 256."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16) or heads.size % 8 or heads.size > 256:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


# The first that supports a model is taken.
BACKENDS = [
    AttentionBackend("varlen", _varlen_runs, attend_varlen, gathers=True),
    AttentionBackend("dense", lambda device, dtype, heads: True, attend_dense, dropout=True),
]


def backend_named(name: str) -> AttentionBackend:
    """Returns the record of that name in `BACKENDS`."""
    return next(backend for backend in BACKENDS if backend.name == name)


def choose_backend(device: torch.device, dtype: torch.dtype, heads: HeadShape) -> str:
    """Returns the name of the first backend that runs there."""
    return next(backend.name for backend in BACKENDS if backend.supports(device, dtype, heads))


AttentionInterface.register(IMPLEMENTATION, prefix_shared_attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
