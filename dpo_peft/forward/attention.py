"""Attention over a packed batch, plugged into transformers by its public hooks. No model file is patched.

A model whose attention implementation is `IMPLEMENTATION` works as before under plain calls (generation, evaluation by
others): they go to SDPA with the masks that SDPA gets, and where it can't do what the model wants (soft-capped scores,
sinks) to the model's own function. A call that carries `prefix_layout` reads that layout instead.
Such a call also passes `layout_marker()` as its 4-D attention mask, which transformers hands through to the attention
function unchanged; a model that builds masks of its own is caught by that.

Each way to compute attention is one record in `BACKENDS`: "varlen" (CUDA; one kernel over ragged segments, K and V
gathered as [prompt; own tokens]) and "dense" (any device; the mask predicate itself, sample by sample, and the oracle
for the others). To add one, put its record into the list, before those that it is to be preferred to.

Shape suffixes: H query heads, G key/value heads, T packed tokens, S gathered keys, D head size, E samples, B longest
sample in tokens, Q most queries of a sample.
"""

import inspect
import sys
from collections.abc import Callable, Collection, Hashable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .images import Blocks
from .layout import PackedBatch, visible

Made = TypeVar("Made")

IMPLEMENTATION = "dpo_peft_prefix_shared"
# What reaches the attention function without changing it. Anything else that a model passes (position_bias, the
# indices of sparse attention, ...) means something that the layout does not know.
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
    (T, H, D) from q (T, H, D), k and v (T, G, D), or (S, G, D) if `gathers`. What it `takes` beyond that reaches it as
    keywords, if a call has it: "dropout", "softcap" (scores s become softcap * tanh(s / softcap)), "sinks" ((H,)
    scores of one more key without a value), "chunk" (as in `visible`), "blocks" (`images.Blocks`). A call with a
    window or with keywords that a backend does not do goes to the one named `otherwise`.
    """

    name: str
    supports: Callable[[torch.device, torch.dtype, HeadShape], bool]
    attend: Callable[..., Tensor]
    gathers: bool = False  # its keys and values are those of `kv_index`: [prompt; own tokens] for each segment
    windows: bool = True
    continues: bool = True  # takes queries of completions alone, with all keys
    takes: frozenset[str] = frozenset()
    otherwise: str = "dense"


class AttentionPlan:
    """A packed batch as the attention function needs it: one object for all layers and for recomputation.

    Args:
        batch: a batch from `pack`, on the model's device.
        backend: a record, or the name of one in `BACKENDS`.
        given: tokens before the queries, whose keys and values are given (`scope.split`).
    """

    def __init__(self, batch: PackedBatch, backend: str | AttentionBackend, given: int = 0):
        self.batch, self.given = batch, given
        self.backend = backend_named(backend) if isinstance(backend, str) else backend
        self.trace: list[tuple[int | None, HeadShape]] | None = None  # for the probe: window and heads of each call
        self.blocks: Blocks | None = None  # of tokens that see each other both ways, from `images.block_ids`
        self.mixed: list[str] | None = None  # for the probe: the class of each mixer of `states.py` that was called
        self._made: dict[Hashable, Any] = {}

    def backend_for(self, window: int | None, extra: Collection[str] = ()) -> AttentionBackend:
        """Returns the backend that takes a call with such keywords: the plan's, or the one that does what it can't."""
        backend = self.backend
        while (
            (window is not None and not backend.windows)
            or not backend.takes.issuperset(extra)
            or (self.given and not backend.continues)
        ):
            backend = backend_named(backend.otherwise)
        return backend

    def blocks_for(self, window: int | None) -> Blocks | None:
        """Returns the blocks that layers with such a window know."""
        return self.blocks if self.blocks and (window is not None or self.blocks.everywhere) else None

    def once(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """Returns what `make` gives; calls it once for all layers."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


class BySample(NamedTuple):
    """A packed batch cut into its samples, each padded to the longest; Q queries of them."""

    query_EQ: Tensor  # flat positions of the queries, counted without the tokens before them
    key_EB: Tensor  # and of the keys
    place_T: Tensor  # where each query is in (E, Q)
    mask_EQB: Tensor  # who sees whom. Padding queries see position 0, so no row is empty


def by_sample(plan: AttentionPlan, window: int | None, chunk: int | None = None) -> BySample:
    """Cuts a packed batch into its samples, and applies the mask predicate to each one's own tokens."""
    batch, blocks = plan.batch, plan.blocks_for(window)
    assert batch.sample_index is not None and batch.segment is not None and batch.context is not None
    queries = batch.query_index if plan.given else batch.sample_index
    assert queries is not None
    filled_EB, key_EB = batch.sample_index >= 0, batch.sample_index.clamp(min=0)
    asks_EQ, at_EQ = queries >= 0, queries.clamp(min=plan.given)
    mask_EQB = visible(
        batch.segment[at_EQ][:, :, None],
        batch.context[at_EQ][:, :, None],
        batch.position_ids[0][at_EQ][:, :, None],
        batch.segment[key_EB][:, None],
        batch.position_ids[0][key_EB][:, None],
        window,
        chunk,
        None if blocks is None else (blocks.ids_T[at_EQ][:, :, None], blocks.ids_T[key_EB][:, None], blocks.cut),
    )
    mask_EQB &= filled_EB[:, None]
    mask_EQB[:, :, 0] |= ~asks_EQ
    query_EQ, place_T = at_EQ - plan.given, asks_EQ.flatten().nonzero()[:, 0]
    # Prompts that stand before all completions part the tokens of a sample.
    return BySample(query_EQ, key_EB, place_T[query_EQ.flatten()[place_T].argsort()], mask_EQB)


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
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attends as transformers' functions do; registered as `IMPLEMENTATION`.

    Args:
        query: (1, H, T, D); key, value: (1, G, T, D).

    Returns:
        (1, T, H, D) and None (no attention weights).

    Raises:
        CannotShareError: the model asks for something that the layout can't express.
    """
    if prefix_layout is None:
        kwargs |= {"dropout": dropout, "scaling": scaling}
        if softcap is None and s_aux is None:
            return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return _own_attention(module, query, key, value, attention_mask, softcap=softcap, **kwargs)
    _refuse_unknown(attention_mask, kwargs)
    query = _retuned(module, query, prefix_layout)
    if prefix_layout.trace is not None:
        prefix_layout.trace.append((sliding_window, HeadShape(query.shape[1], key.shape[1], query.shape[3])))
    extra: dict[str, Any] = {
        "dropout": dropout or None,
        "softcap": softcap,
        "sinks": s_aux,
        "chunk": _chunk_of(module),
    }
    extra |= {"blocks": prefix_layout.blocks_for(sliding_window)}
    extra = {name: value for name, value in extra.items() if value is not None}
    backend = prefix_layout.backend_for(sliding_window, extra)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if backend.gathers:
        index = prefix_layout.batch.kv_index
        assert index is not None
        k, v = k.index_select(0, index), v.index_select(0, index)
    return backend.attend(prefix_layout, q, k, v, scaling, sliding_window, **extra)[None], None


def _own_attention(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Calls the function that the module's model has for "eager", which wants its mask added to the scores."""
    if attention_mask is None:  # what SDPA would be told by `is_causal`
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
        attention_mask = (seen.tril() if q.shape[2] > 1 else seen)[None, None]
    added = torch.zeros(attention_mask.shape, dtype=q.dtype, device=q.device)
    added = added.masked_fill(~attention_mask, torch.finfo(q.dtype).min)
    return sys.modules[type(module).__module__].eager_attention_forward(module, q, k, v, added, **kwargs)


def _chunk_of(module: Any) -> int | None:
    """Returns the length of the chunks that a layer's attention is confined to; Llama 4 says it by the mask alone."""
    kinds = getattr(getattr(module, "config", None), "layer_types", None)
    return module.config.attention_chunk_size if kinds and kinds[module.layer_idx] == "chunked_attention" else None


def _retuned(module: Any, q_1HTD: Tensor, plan: AttentionPlan) -> Tensor:
    """Returns the queries as Llama 4 scales them at their positions; it scaled them at their places in the row."""
    if not getattr(module, "attn_temperature_tuning", False) or module.use_rope:
        return q_1HTD

    def scale(position_T: Tensor) -> Tensor:
        return (torch.floor((position_T.float() + 1) / module.floor_scale)).log1p() * module.attn_scale + 1

    position_T = plan.batch.position_ids[0]
    right_T = scale(position_T) / scale(torch.arange(len(position_T), device=position_T.device))
    return (q_1HTD * right_T[:, None]).to(q_1HTD.dtype)


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
    *,
    dropout: float = 0.0,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    chunk: int | None = None,
    blocks: Blocks | None = None,
) -> Tensor:
    """Attends sample by sample under the mask predicate; (T, H, D)."""
    samples = plan.once(("by sample", window, chunk), lambda: by_sample(plan, window, chunk))
    groups = q_THD.shape[1] // k_TGD.shape[1]
    q_EHQD = q_THD[samples.query_EQ].transpose(1, 2)
    k_EHBD, v_EHBD = (x[samples.key_EB].transpose(1, 2).repeat_interleave(groups, 1) for x in (k_TGD, v_TGD))
    mask_E1QB = samples.mask_EQB[:, None]
    if sinks is not None:
        scaling = scaling or q_THD.shape[2] ** -0.5
        q_EHQD, k_EHBD, v_EHBD = _with_sinks(q_EHQD, k_EHBD, v_EHBD, sinks / scaling)
        mask_E1QB = F.pad(mask_E1QB, (0, 1), value=True)
    given = (q_EHQD, k_EHBD, v_EHBD, mask_E1QB)
    if softcap is None:
        out_EHQD = F.scaled_dot_product_attention(*given, dropout_p=dropout, scale=scaling)
    else:  # recomputed in the backward pass, so that one layer's scores exist at a time
        scaling = scaling or q_EHQD.shape[3] ** -0.5
        out_EHQD = checkpoint(_attend_capped, *given, scaling, softcap, dropout, use_reentrant=False)
    return out_EHQD.transpose(1, 2).flatten(0, 1).index_select(0, samples.place_T)


def _with_sinks(q_EHBD: Tensor, k_EHBD: Tensor, v_EHBD: Tensor, sinks_H: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Adds the sinks as the last key: it meets ones that the queries get in a further dimension, and has no value.

    There are eight of these dimensions, since kernels on a GPU want a multiple of it.
    """
    size = k_EHBD.shape[3]
    q_EHBD = torch.cat([q_EHBD, q_EHBD.new_ones(*q_EHBD.shape[:3], 1), q_EHBD.new_zeros(*q_EHBD.shape[:3], 7)], 3)
    sink_H = F.pad(sinks_H.to(k_EHBD.dtype)[:, None], (size, 7))
    sink_EH1D = sink_H[None, :, None].expand(len(k_EHBD), -1, -1, -1)
    return q_EHBD, torch.cat([F.pad(k_EHBD, (0, 8)), sink_EH1D], 2), F.pad(v_EHBD, (0, 0, 0, 1))


def _attend_capped(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float, softcap: float, dropout: float
) -> Tensor:
    scores = softcap * torch.tanh(q @ k.transpose(2, 3) * scaling / softcap)
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1, dtype=torch.float32).to(q.dtype)
    return F.dropout(weights, dropout) @ v


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


DENSE_TAKES = frozenset({"dropout", "softcap", "sinks", "chunk", "blocks"})
# The first that supports a model is taken.
BACKENDS = [
    AttentionBackend("varlen", _varlen_runs, attend_varlen, gathers=True),
    AttentionBackend("dense", lambda device, dtype, heads: True, attend_dense, takes=DENSE_TAKES),
]


def backend_named(name: str) -> AttentionBackend:
    """Returns the record of that name in `BACKENDS`."""
    return next(backend for backend in BACKENDS if backend.name == name)


def choose_backend(device: torch.device, dtype: torch.dtype, heads: HeadShape) -> str:
    """Returns the name of the first backend that runs there."""
    return next(backend.name for backend in BACKENDS if backend.supports(device, dtype, heads))


AttentionInterface.register(IMPLEMENTATION, prefix_shared_attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
