"""Attention over the packed layout in kernels of our own: no gathered keys, and tiles that suit short segments.

`plan_tiles` turns a batch's segments into lists of tiles, once per batch; `shared_attention` runs
`attention_triton.py` on them. The kernels' numbers of programs are known on the host: nothing waits for the GPU.

What is computed is `attention.attend_dense`, without windows and dropout. Scores and sums are float32; probabilities
and their gradients are rounded to the inputs' dtype before they are multiplied. Each output is written by one program
in a fixed order, so results are the same in every run.

Shape suffixes: T tokens, A query heads, G key/value heads, R query heads per key head, D head size, S segments.
"""

import math
import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..forward.attention import AttentionBackend, AttentionPlan, BySample, HeadShape, attend_dense, by_sample
from .heads import Places

MAX_HEAD, MAX_GROUP = 256, 16
_LOG2_E = math.log2(math.e)


class Launch(NamedTuple):
    """How one kernel is cut and compiled."""

    rows: int  # of a block of queries: tokens times query heads per key head
    keys: int  # of a block of keys
    warps: int
    stages: int
    hot: int = 1  # blocks without mask: 0 none; 1 those before the gap; 2 all. To keys: 0 none; else all


class Launches(NamedTuple):
    """One for each kernel."""

    forward: Launch
    grad_q: Launch
    grad_kv: Launch


# By head size, padded to a power of 2, and by the KiB of shared memory that a block of threads needs at most, as
# Triton compiles them for sm80 to sm120. Those of 128 are the best for long and short segments alike of eight each
# that were measured on an H100; nobody measured on other cards.
LAUNCHES = {
    64: {82: Launches(Launch(128, 64, 4, 3), Launch(128, 64, 8, 3), Launch(64, 128, 8, 3))},
    128: {82: Launches(Launch(128, 32, 8, 3), Launch(64, 32, 4, 2), Launch(32, 64, 4, 3))},
    256: {
        162: Launches(Launch(64, 64, 8, 2), Launch(64, 32, 8, 2), Launch(32, 64, 8, 2)),
        98: Launches(Launch(64, 32, 8, 2), Launch(32, 32, 8, 2), Launch(32, 32, 8, 2)),
    },
}


class Tiles(NamedTuple):
    """A batch's tiles, the longest work first, for one shape of heads."""

    forward: Tensor  # (tiles, 5) int32: start, end, first key, keys before the gap, length of the gap
    grad_q: Tensor  # the same in the size of that kernel
    grad_kv: Tensor  # (tiles, 3) int32: start, end, end of the queries that see it
    tokens: int  # T, of the queries
    longest: int  # from a sample's first key to its last, in tokens
    group: int  # R
    head: int  # D
    launches: Launches
    before: int = 0  # keys that stand before the first query


def padded_head(head: int) -> int:
    """Returns the power of 2 that the kernels compute with."""
    return max(16, 1 << (head - 1).bit_length())


def launches_for(head: int, device: torch.device | str) -> Launches:
    """Returns the first of `LAUNCHES` for a head size that the device has the shared memory for."""
    limit = 227 * 1024  # an H100's
    if torch.device(device).type == "cuda":
        properties: Any = torch.cuda.get_device_properties(device)  # whose stubs miss this one
        limit = properties.shared_memory_per_block_optin
    fitting = LAUNCHES[max(64, padded_head(head))].items()
    return next(launches for kib, launches in fitting if kib * 1024 <= limit)


def supports(device: torch.device, dtype: torch.dtype, heads: HeadShape) -> bool:
    """Whether the kernels are taken: where they `can_run`, on Hopper.

    On other cards nobody has measured whether they win. `benchmarks/attention.py` takes them there all the same.
    """
    return can_run(device, dtype, heads) and torch.cuda.get_device_capability(device)[0] == 9


def can_run(device: torch.device, dtype: torch.dtype, heads: HeadShape) -> bool:
    """Whether the kernels run: half precision, up to 16 query heads per key head, head size up to 256, sm80 or later.

    All of these cards have the shared memory for one of `LAUNCHES` at least.
    """
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return False
    if heads.queries % heads.keys or heads.queries // heads.keys > MAX_GROUP or heads.size > MAX_HEAD:
        return False
    try:
        from . import attention_triton as triton_attention  # noqa: F401
    except ImportError:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


# ---- Tiles ----------------------------------------------------------------------------------------------------------


def plan_tiles(
    segments_S2: np.ndarray,
    group: int,
    head: int,
    device: torch.device | str,
    launches: Launches | None = None,
    completions_only: bool = False,
) -> Tiles:
    """Cuts a batch into tiles.

    Args:
        segments_S2: length of each segment in tokens and index of its context, the prompt's segment (its own index
            for a prompt and for a completion of an empty prompt), on the host.
        group: R, query heads per key head.
        head: D, size of a head.
        device: where the tiles go.
        launches: sizes of the kernels' blocks; `launches_for` the device by default.
        completions_only: for queries of the completions alone, over keys of all prompts and then all completions.

    Raises:
        ValueError: heads that the kernels don't do, or completions that don't follow their prompt.
    """
    if not 0 < group <= MAX_GROUP or not 0 < head <= MAX_HEAD:
        raise ValueError(
            f"The attention kernels do up to {MAX_GROUP} query heads per key head of size up to {MAX_HEAD}, not "
            f"{group} of size {head}: use varlen attention."
        )
    launches = launches or launches_for(head, device)
    spans = _Spans.of(segments_S2, completions_only)
    tables = [
        _query_tiles(spans, launches.forward.rows // group),
        _query_tiles(spans, launches.grad_q.rows // group),
        _key_tiles(spans, launches.grad_kv.keys),
    ]
    flat = torch.from_numpy(np.concatenate([table.ravel() for table in tables]).astype(np.int32))
    if torch.device(device).type == "cuda":
        flat = flat.pin_memory()  # or the copy would wait for the kernels before it
    parts = flat.to(device, non_blocking=True).split([table.size for table in tables])
    forward, grad_q, grad_kv = (part.view(table.shape) for part, table in zip(parts, tables, strict=True))
    before, tokens = -int(spans.start.min()), int(spans.end.max())
    return Tiles(forward, grad_q, grad_kv, tokens, spans.longest, group, head, launches, before)


class _Spans(NamedTuple):
    """Where each segment stands among the keys, (S,) each, counted from the first query."""

    start: np.ndarray
    end: np.ndarray
    context: np.ndarray
    seen_until: np.ndarray  # end of the queries that see it: of the sample for a prompt, its own for a completion
    longest: int  # sample
    computed: np.ndarray  # whether it is cut into tiles

    @classmethod
    def of(cls, segments_S2: np.ndarray, completions_only: bool) -> "_Spans":
        length, context = segments_S2.T.astype(np.int64)
        index = np.arange(len(length))
        latest = np.maximum.accumulate(np.where(context == index, index, -1))
        if (context != latest).any():
            raise ValueError("A completion must follow its prompt or another completion of it.")
        outside = np.isin(index, context[context != index]) & completions_only  # prompts: they stand first then
        order = np.argsort(~outside, kind="stable")
        end = np.empty_like(length)
        end[order] = np.cumsum(length[order]) - length[outside].sum()
        start = end - length
        seen_until = end.copy()
        np.maximum.at(seen_until, context, end)
        return cls(start, end, context, seen_until, int((seen_until - start).max()), ~outside)

    def cut(self, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Cuts what is computed into pieces of `size` tokens: segment, start and end of each."""
        pieces = -(-(self.end - self.start) // size) * self.computed
        segment = np.repeat(np.arange(len(pieces)), pieces)
        within = np.arange(len(segment)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        start = self.start[segment] + within * size
        return segment, start, np.minimum(start + size, self.end[segment])


def _query_tiles(spans: _Spans, size: int) -> np.ndarray:
    segment, start, end = spans.cut(size)
    prompt = spans.context[segment]
    base = spans.start[prompt]
    has_prompt = prompt != segment
    before_gap = np.where(has_prompt, spans.end[prompt], start) - base
    gap = np.where(has_prompt, spans.start[segment] - spans.end[prompt], 0)
    return _longest_first(np.stack([start, end, base, before_gap, gap], 1), end - base - gap)


def _key_tiles(spans: _Spans, size: int) -> np.ndarray:
    segment, start, end = spans.cut(size)
    seen_until = spans.seen_until[segment]
    return _longest_first(np.stack([start, end, seen_until], 1), seen_until - start)


def _longest_first(table: np.ndarray, work: np.ndarray) -> np.ndarray:
    return table[np.argsort(-work, kind="stable")]


# ---- Attention ------------------------------------------------------------------------------------------------------


def shared_attention(q_TAD: Tensor, k_TGD: Tensor, v_TGD: Tensor, tiles: Tiles, scaling: float | None) -> Tensor:
    """Attends from every token to its prompt and its own segment; (T, A, D), differentiable.

    Args:
        q_TAD, k_TGD, v_TGD: may be parts of wider matrices, if the last dimension is contiguous. With tiles for
            completions only, k and v hold the prompts too, whose gradient is then zero.
        tiles: from `plan_tiles`, on the same device, for these heads.
        scaling: factor of the scores, > 0; 1 / sqrt(D) by default.

    Raises:
        ValueError: tensors that don't fit each other or the tiles.
    """
    return _SharedAttention.apply(q_TAD, k_TGD, v_TGD, tiles, scaling or tiles.head**-0.5)


class _SharedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_TAD: Tensor, k_TGD: Tensor, v_TGD: Tensor, tiles: Tiles, scaling: float) -> Tensor:
        out_TAD, lse_GTR = attend_forward(q_TAD, k_TGD, v_TGD, tiles, scaling)
        ctx.save_for_backward(q_TAD, k_TGD, v_TGD, out_TAD, lse_GTR)
        ctx.tiles, ctx.scaling = tiles, scaling
        return out_TAD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        q_TAD, k_TGD, v_TGD, out_TAD, lse_GTR = ctx.saved_tensors
        grads = attend_backward(grad_outputs[0], q_TAD, k_TGD, v_TGD, out_TAD, lse_GTR, ctx.tiles, ctx.scaling)
        if before := ctx.tiles.before:
            grads[1:] = (F.pad(x, (0, 0, 0, 0, before, 0)) for x in grads[1:])
        return *grads, None, None


def attend_packed(
    plan: AttentionPlan, q_TAD: Tensor, k_TGD: Tensor, v_TGD: Tensor, scaling: float | None, window: None
) -> Tensor:
    """Attends over the packed row as it is, (T, A, D); the batch's tiles are made once for all layers."""
    segments, group, head = plan.batch.segments, q_TAD.shape[1] // k_TGD.shape[1], q_TAD.shape[2]
    tiles = plan.once(("tiles", group, head), lambda: plan_tiles(np.array(segments), group, head, q_TAD.device))
    return shared_attention(q_TAD, k_TGD, v_TGD, tiles, scaling)


# Fused layers take it where the model's own take "varlen".
PACKED = AttentionBackend("packed", supports, attend_packed, windows=False, continues=False, otherwise="varlen")


def _joined(given: Tensor, own: Tensor) -> Tensor:
    return torch.cat([given, own])


class Attention(NamedTuple):
    """Attention of one pass over the model, for its layers with the same window."""

    attend: Callable[..., Tensor]  # q, k, v, scaling, window, and the keywords that it was bound for, to (T, A, D)
    places: Places | None = None  # where it wants keys and values gathered from
    joined: Callable[[Tensor, Tensor], Tensor] = _joined  # of keys or values that are given, and its own


Kind = tuple[int | None, tuple[str, ...]]  # the window of some layers, and the keywords of their attention


def bind(plan: AttentionPlan, kinds: Iterable[Kind]) -> dict[Kind, Attention]:
    """Returns attention over a batch for each kind; what its layers share is made here."""
    batch, bound, samples = plan.batch, {}, dict[int | None, BySample]()
    for kind in kinds:
        window, extra = kind
        blocks = plan.blocks_for(window)
        given = {} if blocks is None else {"blocks": blocks}
        taken, places = plan.backend_for(window, (*extra, *given)), None
        if taken.attend is attend_dense and not extra:
            samples[window] = by_sample(plan, window)
            bound[kind] = Attention(partial(attend_by_sample, samples))
            continue
        joined = _joined
        if taken.gathers:
            assert batch.kv_index is not None and batch.kv_copies is not None
            joined = partial(_Gathered.apply, batch.kv_index, batch.kv_copies[plan.given :, 0] - plan.given)
            # Without given ones in the same pass that turns the heads by their positions.
            places = None if plan.given else Places(batch.kv_index, batch.kv_copies)
        bound[kind] = Attention(partial(taken.attend, plan, **given), places, joined)
    return bound


class _Gathered(torch.autograd.Function):
    """The rows `index_S` of [given; own], each own one once, at `place_T`: so the gradient is gathered too."""

    @staticmethod
    def forward(ctx: Any, index_S: Tensor, place_T: Tensor, given: Tensor, own: Tensor) -> Tensor:
        ctx.save_for_backward(place_T)
        return torch.cat([given, own]).index_select(0, index_S)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, grad_outputs[0].index_select(0, ctx.saved_tensors[0])


def attend_by_sample(
    samples: Mapping[int | None, BySample], q: Tensor, k: Tensor, v: Tensor, scaling: float, window: int | None
) -> Tensor:
    """Attends as `attend_dense` does, (T, A, D), with nothing to make or to look up for each layer."""
    query_EQ, key_EB, place_T, mask_EQB = samples[window]
    group, q_EAQD = q.shape[1] // k.shape[1], q[query_EQ].transpose(1, 2)
    k_EABD, v_EABD = (x[key_EB].transpose(1, 2).repeat_interleave(group, 1) for x in (k, v))
    out_EAQD = F.scaled_dot_product_attention(q_EAQD, k_EABD, v_EABD, mask_EQB[:, None], scale=scaling)
    return out_EAQD.transpose(1, 2).flatten(0, 1).index_select(0, place_T)


def attend_forward(q_TAD: Tensor, k_TGD: Tensor, v_TGD: Tensor, tiles: Tiles, scaling: float) -> tuple[Tensor, Tensor]:
    """Computes `shared_attention` without a gradient: out (T, A, D) and lse (G, T, R), float32.

    `lse` holds the logarithm to base 2 of each row's sum of exponentials.
    """
    q_TAD, k_TGD, v_TGD = _from_first_query(q_TAD, k_TGD, v_TGD, tiles, scaling)
    out_TAD = torch.empty(q_TAD.shape, dtype=q_TAD.dtype, device=q_TAD.device)
    lse_GTR = torch.empty(k_TGD.shape[1], tiles.tokens, tiles.group, dtype=torch.float32, device=q_TAD.device)
    _kernels().attend[_grid(k_TGD, tiles.forward)](
        q_TAD, k_TGD, v_TGD, out_TAD, lse_GTR, tiles.forward, tiles.tokens, *_strides(q_TAD, k_TGD, v_TGD),
        out_TAD.stride(0), scaling * _LOG2_E, **_constants(tiles, tiles.launches.forward),
    )  # fmt: skip
    return out_TAD, lse_GTR


def attend_backward(
    grad_TAD: Tensor,
    q_TAD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    out_TAD: Tensor,
    lse_GTR: Tensor,
    tiles: Tiles,
    scaling: float,
) -> list[Tensor]:
    """Returns the gradients to q, k and v from that of the output and what `attend_forward` gave.

    Those of k and v begin where the queries do: prompts outside them get none.
    """
    q_TAD, k_TGD, v_TGD = _from_first_query(q_TAD, k_TGD, v_TGD, tiles, scaling)
    grad_TAD = grad_TAD.contiguous()
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q_TAD, k_TGD, v_TGD)]
    delta_GTR = torch.empty_like(lse_GTR)
    strides = _strides(q_TAD, k_TGD, v_TGD)
    scales = scaling, scaling * _LOG2_E
    _kernels().grad_queries[_grid(k_TGD, tiles.grad_q)](
        q_TAD, k_TGD, v_TGD, out_TAD, grad_TAD, lse_GTR, delta_GTR, grads[0], tiles.grad_q, tiles.tokens, *strides,
        out_TAD.stride(0), *_strides(grads[0]), *scales, **_constants(tiles, tiles.launches.grad_q),
    )  # fmt: skip
    _kernels().grad_keys[_grid(k_TGD, tiles.grad_kv)](
        q_TAD, k_TGD, v_TGD, grad_TAD, lse_GTR, delta_GTR, *grads[1:], tiles.grad_kv, tiles.tokens, *strides,
        out_TAD.stride(0), *_strides(*grads[1:]), *scales, **_constants(tiles, tiles.launches.grad_kv),
    )  # fmt: skip
    return grads


def _kernels() -> Any:
    from . import attention_triton as triton_attention

    return triton_attention


def _grid(k_TGD: Tensor, table: Tensor) -> tuple[int, int]:
    """Heads of a tile run side by side."""
    return k_TGD.shape[1], table.shape[0]


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:2]]


def _constants(tiles: Tiles, launch: Launch) -> dict[str, int]:
    return {
        "GROUP": tiles.group, "HEAD": tiles.head, "WIDTH": padded_head(tiles.head), "ROWS": launch.rows,
        "KEYS": launch.keys, "HOT": launch.hot, "num_warps": launch.warps, "num_stages": launch.stages,
    }  # fmt: skip


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _from_first_query(q_TAD: Tensor, k_TGD: Tensor, v_TGD: Tensor, tiles: Tiles, scaling: float) -> list[Tensor]:
    """Checks what the kernels read. Keys and values become views from the first query on: tiles count from there."""
    keys, kv_heads, head = k_TGD.shape
    wanted = (tiles.tokens, kv_heads * tiles.group, tiles.head)
    fits = tuple(q_TAD.shape) == wanted and (keys, head) == (tiles.before + tiles.tokens, tiles.head)
    if not fits or v_TGD.shape != k_TGD.shape:
        raise ValueError(
            f"Queries {tuple(q_TAD.shape)}, keys {tuple(k_TGD.shape)} and values {tuple(v_TGD.shape)} don't fit tiles "
            f"for {tiles.tokens} tokens behind {tiles.before} keys with {tiles.group} query heads per key head of "
            f"size {tiles.head}."
        )
    q_TAD, k_TGD, v_TGD = (_rows_contiguous(x) for x in (q_TAD, k_TGD, v_TGD))
    if scaling <= 0:
        raise ValueError(f"The scores' factor must be positive, not {scaling}.")
    if tiles.longest * max(x.stride(0) for x in (q_TAD, k_TGD, v_TGD)) >= 2**31:
        raise ValueError(f"A sample of {tiles.longest} tokens is too long for the attention kernels: use varlen.")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if q_TAD.dtype not in (torch.float16, torch.bfloat16) and not interpreted:
        raise ValueError(f"The attention kernels run in half precision, not in {q_TAD.dtype}.")
    return [q_TAD, k_TGD[tiles.before :], v_TGD[tiles.before :]]
