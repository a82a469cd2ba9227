"""Attention over the packed layout in kernels of our own: no gathered keys, and tiles that suit short segments.

`tiles.plan_tiles` turns a batch's segments into lists of tiles, once per batch; `shared_attention` runs
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
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks

from ..forward.attention import AttentionBackend, AttentionPlan, BySample, HeadShape, attend_dense, by_sample
from .heads import Places
from .tiles import MAX_GROUP, MAX_HEAD, Launch, Tiles, padded_head, plan_tiles

_LOG2_E = math.log2(math.e)


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
        if before := ctx.tiles.given:
            grads[1:] = (F.pad(x, (0, 0, 0, 0, before, 0)) for x in grads[1:])
        return *grads, None, None


def attend_packed(
    plan: AttentionPlan, q_TAD: Tensor, k_TGD: Tensor, v_TGD: Tensor, scaling: float | None, window: None
) -> Tensor:
    """Attends over the packed row as it is, (T, A, D); the batch's tiles are made once for all layers."""
    segments, group, head = plan.batch.segments, q_TAD.shape[1] // k_TGD.shape[1], q_TAD.shape[2]
    tiles = plan.once(
        ("tiles", group, head), lambda: plan_tiles(np.array(segments), group, head, q_TAD.device, given=plan.given)
    )
    return shared_attention(q_TAD, k_TGD, v_TGD, tiles, scaling)


# Fused layers take it where the model's own take "varlen".
PACKED = AttentionBackend("packed", supports, attend_packed, windows=False, otherwise="varlen")


def _joined(given: Tensor, own: Tensor) -> Tensor:
    return torch.cat([given, own])


class Attention(NamedTuple):
    """Attention of one pass over the model, for its layers with the same window."""

    attend: Callable[..., Tensor]  # q, k, v, scaling, window, and the keywords that it was bound for, to (T, A, D)
    places: Places | None = None  # where it wants keys and values gathered from
    joined: Callable[[Tensor, Tensor], Tensor] = _joined  # of keys or values that are given, and its own
    resumes: bool = True  # beside q, k and v it keeps only what it gives and sums of exponentials (`Attended`)


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
            bound[kind] = Attention(partial(attend_by_sample, samples), resumes=False)
            continue
        joined = _joined
        if taken.gathers:
            assert batch.kv_index is not None and batch.kv_copies is not None
            joined = partial(_Gathered.apply, batch.kv_index, batch.kv_copies[plan.given :, 0] - plan.given)
            # Without given ones in the same pass that turns the heads by their positions.
            places = None if plan.given else Places(batch.kv_index, batch.kv_copies)
        bound[kind] = Attention(partial(taken.attend, plan, **given), places, joined, taken.attend is not attend_dense)
    return bound


class Attended:
    """What attention gave, and what its backward pass needs of it, while q, k and v are let go to be computed again.

    Its graph begins at them and keeps all but them; `resume` ties it to those that were computed again.
    """

    def __init__(self, attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, *how: Any, **extra: Any):
        self._qkv = qkv = [q, k, v]

        def pack(x: Tensor) -> Tensor | int:
            same = (i for i, y in enumerate(qkv) if (x.data_ptr(), x.stride()) == (y.data_ptr(), y.stride()))
            return next((i for i in same if x.shape == qkv[i].shape), x)

        with torch.enable_grad(), saved_tensors_hooks(pack, lambda x: qkv[x] if isinstance(x, int) else x):
            # No leaves: a graph holds those.
            begun = _Begun.apply(torch.empty(0, requires_grad=True), q, k, v)
            self._out: Tensor | None = attend(*begun, *how, **extra)
        self._edges, self.out = [get_gradient_edge(x) for x in begun], self._out.detach()
        qkv.clear()

    def resume(self, *qkv: Tensor) -> Tensor:
        """Returns the output as a function of q, k and v that equal the former ones; once."""
        return _Resumed.apply(self, *qkv)

    def grads(self, grad_TAD: Tensor, *qkv: Tensor) -> tuple[Tensor, ...]:
        """Returns the gradients to q, k and v, and lets go of everything."""
        assert self._out is not None
        out, self._out, self._qkv[:] = self._out, None, qkv
        found = torch.autograd.grad(out, self._edges, grad_TAD)
        self._qkv.clear()
        return found


class _Begun(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, begin: Tensor, *qkv: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for x in qkv)


class _Resumed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, attended: Attended, *qkv: Tensor) -> Tensor:
        ctx.save_for_backward(*qkv)
        ctx.attended, out_TAD = attended, attended.out
        del attended.out
        return out_TAD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.attended.grads(grad_outputs[0], *ctx.saved_tensors)


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
    fits = tuple(q_TAD.shape) == wanted and (keys, head) == (tiles.given + tiles.tokens, tiles.head)
    if not fits or v_TGD.shape != k_TGD.shape:
        raise ValueError(
            f"Queries {tuple(q_TAD.shape)}, keys {tuple(k_TGD.shape)} and values {tuple(v_TGD.shape)} don't fit tiles "
            f"for {tiles.tokens} tokens behind {tiles.given} keys with {tiles.group} query heads per key head of "
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
    return [q_TAD, k_TGD[tiles.given :], v_TGD[tiles.given :]]
