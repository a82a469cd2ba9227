"""What attention reads: [q; k; v] split into heads, which are normalized, turned by their positions, and gathered.

As in `elementwise.py`, the torch expressions say what is computed, and one Triton kernel does it on a GPU.

Shape suffixes: T tokens, N width of [q; k; v], S gathered keys, A attention heads, D head size, R dimensions of a head
that are turned, M most copies of a token among the keys.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .elementwise import Norm, RMSNorm, normed, power_of_2, triton_kernels, uses_kernels


class Places(NamedTuple):
    """Which rows the keys are gathered from, and where each row's copies went."""

    index_S: Tensor  # row of each key
    copies_TM: Tensor  # places of each row among the keys, -1 where it has fewer


class Angles(NamedTuple):
    """Of the positions, from the model's own rotary embedding (Su et al. 2021)."""

    cos_TR: Tensor
    sin_TR: Tensor


class Heads(NamedTuple):
    """How a layer's [q; k; v] splits into heads, the norms of these where it has them, and how they are turned."""

    queries: int
    keys: int
    size: int
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    v_norm: Norm | None = None
    whole: bool = False  # q_norm and k_norm are over all heads together
    late: bool = False  # q_norm and k_norm come after the rotation
    gated: bool = False  # behind each query head stands a gate of what it finds
    pairs: bool = False  # neighbors are turned, not the two halves
    tied: bool = False  # there are q and k alone: values are the keys, before norm and rotation

    def parts(self, qkv: Tensor) -> tuple[Tensor, ...]:
        """Splits (T, N) into q (with its gates), k and v."""
        return qkv.split([n * self.size for n in (self.queries * (1 + self.gated), self.keys, self.keys)], 1)

    def split(self, qkv: Tensor) -> list[Tensor]:
        """Splits (T, N) into views (T, A, D) of q, k, v and, where it has them, the gates."""
        q, k, v = self.parts(qkv)
        views = [q.unflatten(1, (self.queries, -1)), k.unflatten(1, (-1, self.size)), v.unflatten(1, (-1, self.size))]
        if self.gated:
            views[0], gate = views[0].split(self.size, 2)
            views.append(gate)
        return views


def queries_keys_values(
    qkv: Tensor, heads: Heads, queries: Angles | None, keys: Angles | None, places: Places | None
) -> tuple[Tensor, ...]:
    """Returns what attention reads: heads normalized where they are, q and k turned by positions, k and v gathered.

    Args:
        qkv: (T, N); [q; k] alone where keys and values are tied.
        queries, keys: their angles; None leaves them as they are.
        places: where the keys come from; None leaves them in their rows.

    Returns:
        q (T, A, D), k and v (S, A, D), and the gates (T, A, D) where there are some; differentiable in `qkv`. The
        gradient adds up each row's copies in float32, without atomic operations.
    """
    if heads.tied:
        qkv = torch.cat([qkv, qkv[:, -heads.keys * heads.size :]], 1)
    around = heads.q_norm, heads.k_norm  # what is not within the kernel
    if heads.whole and heads.q_norm and heads.k_norm:
        q, k, v = heads.parts(qkv)
        qkv = torch.cat([RMSNorm.apply(q, heads.q_norm), RMSNorm.apply(k, heads.k_norm), v], 1)
    if heads.whole or heads.late:
        heads = heads._replace(q_norm=None, k_norm=None)
    centered = any(norm is not None and norm.centered for norm in (heads.q_norm, heads.k_norm, heads.v_norm))
    # The kernel knows no means.
    compute = _QueriesKeysValues.apply if uses_kernels(qkv) and not centered else _by_torch
    q, k, *rest = compute(qkv, heads, queries, keys, places)
    if heads.late:
        q, k = (RMSNorm.apply(x.flatten(0, 1), norm).view_as(x) for x, norm in zip((q, k), around, strict=True))
    return q, k, *rest


def _by_torch(
    qkv: Tensor, heads: Heads, queries: Angles | None, keys: Angles | None, places: Places | None
) -> tuple[Tensor, ...]:
    q, k, v, *gate = heads.split(qkv)
    q, k = _rotate(q, heads.q_norm, queries, heads.pairs), _rotate(k, heads.k_norm, keys, heads.pairs)
    v = _rotate(v, heads.v_norm, None, False)
    return (q, k, v, *gate) if places is None else (q, k[places.index_S], v[places.index_S], *gate)


def _rotate(x_TAD: Tensor, norm: Norm | None, angles: Angles | None, pairs: bool) -> Tensor:
    if norm is not None:
        x_TAD = normed(x_TAD, norm)
    if angles is None:
        return x_TAD
    turned = angles.cos_TR.shape[1]
    x_TAR, rest = x_TAD[..., :turned], x_TAD[..., turned:]
    first, second = (x_TAR[..., ::2], x_TAR[..., 1::2]) if pairs else x_TAR.chunk(2, -1)
    across = torch.stack((-second, first), -1).flatten(-2) if pairs else torch.cat((-second, first), -1)
    # Some models keep their angles in float32.
    x_TAR = (x_TAR * angles.cos_TR[:, None] + across * angles.sin_TR[:, None]).to(x_TAD.dtype)
    return torch.cat((x_TAR, rest), -1) if rest.shape[-1] else x_TAR


class _QueriesKeysValues(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, heads: Heads, queries: Angles | None, keys: Angles | None, places: Places | None
    ) -> tuple[Tensor, ...]:
        q, k, v, *gate = heads.split(qkv)
        # The norms' gradient reads what went in; a rotation's doesn't.
        ctx.save_for_backward(qkv if heads.q_norm or heads.v_norm else None)
        ctx.heads, ctx.angles, ctx.places = heads, (queries, keys), places
        ctx.shape, ctx.dtype, ctx.device = qkv.shape, qkv.dtype, qkv.device
        if heads.v_norm is not None:
            v = _launch(v, heads.v_norm, None, False, places)
        else:
            v = v.contiguous() if places is None else v.index_select(0, places.index_S)
        return (
            _launch(q, heads.q_norm, queries, heads.pairs, None),
            _launch(k, heads.k_norm, keys, heads.pairs, places),
            v,
            *(x.contiguous() for x in gate),
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (qkv,), heads, places = ctx.saved_tensors, ctx.heads, ctx.places
        grad = torch.empty(ctx.shape, dtype=ctx.dtype, device=ctx.device)
        x = heads.split(grad if qkv is None else qkv)
        grad_q, grad_k, grad_v, *grad_gate = heads.split(grad)
        _launch_back(grad_outputs[0], grad_q, x[0], heads.q_norm, ctx.angles[0], heads.pairs, None)
        _launch_back(grad_outputs[1], grad_k, x[1], heads.k_norm, ctx.angles[1], heads.pairs, places)
        _launch_back(grad_outputs[2], grad_v, x[2], heads.v_norm, None, False, places)
        for out, given in zip(grad_gate, grad_outputs[3:], strict=True):
            out.copy_(given)
        return grad, None, None, None, None


def _launch(x_TAD: Tensor, norm: Norm | None, angles: Angles | None, pairs: bool, places: Places | None) -> Tensor:
    tokens, heads, size = x_TAD.shape
    rows = tokens if places is None else len(places.index_S)
    out = torch.empty(rows, heads, size, dtype=x_TAD.dtype, device=x_TAD.device)
    cos, sin = angles or (x_TAD, x_TAD)
    weight, eps = (x_TAD, 0.0) if norm is None else norm[:2]
    triton_kernels().rotate[(rows,)](
        x_TAD, x_TAD if places is None else places.index_S, cos, sin, weight, out, x_TAD.stride(0), x_TAD.stride(1),
        heads, eps, **_blocks(heads, size, angles), GATHER=places is not None, ROTATE=angles is not None,
        NORM=norm is not None, WIDE=norm is not None and norm.wide, PAIRS=pairs,
    )  # fmt: skip
    return out


def _launch_back(
    grad: Tensor,
    out_TAD: Tensor,
    x_TAD: Tensor,
    norm: Norm | None,
    angles: Angles | None,
    pairs: bool,
    places: Places | None,
) -> None:
    tokens, heads, size = out_TAD.shape
    grad = grad.contiguous()
    cos, sin = angles or (grad, grad)
    weight, eps = (grad, 0.0) if norm is None else norm[:2]
    copies, most = (grad, 0) if places is None else (places.copies_TM, places.copies_TM.shape[1])
    triton_kernels().rotate_backward[(tokens,)](
        grad, copies, x_TAD, cos, sin, weight, out_TAD, heads * size, x_TAD.stride(0), x_TAD.stride(1),
        out_TAD.stride(0), out_TAD.stride(1), heads, eps, **_blocks(heads, size, angles), COPIES=most,
        ROTATE=angles is not None, NORM=norm is not None, PAIRS=pairs,
    )  # fmt: skip


def _blocks(heads: int, size: int, angles: Angles | None) -> dict[str, int]:
    turned = size if angles is None else angles.cos_TR.shape[1]
    rest = power_of_2(size - turned) if turned < size else 0
    return {"D": size, "TURNED": turned, "HALF": power_of_2(turned // 2), "REST": rest, "HEADS": power_of_2(heads)}
