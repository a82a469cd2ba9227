"""Linear layers that read the same input, with their LoRA adapters, as one matrix product.

A frozen weight W (N, K) with an adapter is y = x W^T + s (x A^T) B^T (Hu et al. 2021). Here that is one product over a
longer inner dimension:

    y = [x, u] @ [W, B]^T    with u = x (sA)^T

so the adapter is summed inside the product, in float32, and no pass over x or y is spent on it. The backward pass gets
du = dy B from the same product that gives dy W. Several layers on one input (q, k, v; gate, up) are stacked: their Bs
stand block by block. 4-bit weights are dequantized into the matrix just before it is used.

A switched-off adapter is u = 0 in products of the same shape. So the reference takes the same kernels as the policy,
and while B = 0 both are equal bit for bit.

Shape suffixes: T tokens, K inputs, N outputs, R adapter ranks of all layers together (rounded up to a multiple of 8).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from .elementwise import weight_into

_ALIGNMENT = 8  # ranks are rounded up to it: rows of half-precision matrices start at multiples of 16 bytes


class Projection:
    """The linear layers of one decoder layer that read the same input.

    Args:
        modules: linear layers, or PEFT's LoRA layers around them.
    """

    def __init__(self, modules: Sequence[nn.Module]):
        self.modules = list(modules)
        self.bases: list[Any] = [m.get_base_layer() if isinstance(m, LoraLayer) else m for m in modules]
        self.inputs: int = self.bases[0].in_features
        self.outputs: list[int] = [base.out_features for base in self.bases]
        most = [max(m.r.values(), default=0) if isinstance(m, LoraLayer) else 0 for m in modules]
        self.rank = -(sum(most) // -_ALIGNMENT) * _ALIGNMENT
        self.keeps = False  # see `kept_weights`
        self.kept: Tensor | None = None
        self.kind: type[ProjectionPass] = ProjectionPass
        self.scale: Tensor | None = None  # of the weight in FP8, once it is known
        self.bias_N: Tensor | None = None
        if biases := [base.bias.detach() for base in self.bases if base.bias is not None]:
            zeros = [biases[0].new_zeros(n) for n in self.outputs]
            parts = [zero if base.bias is None else base.bias for base, zero in zip(self.bases, zeros, strict=True)]
            self.bias_N = torch.cat([part.detach().to(biases[0].dtype) for part in parts])

    def active(self, only: Sequence[str] | None = None) -> list[tuple[int, Tensor, Tensor, float]]:
        """Returns the index of the layer, A (r, K), B (n, r) and scale of every adapter that is switched on now; where
        adapters are on, `only` names others to take instead."""
        found = []
        for i, module in enumerate(self.modules):
            if not isinstance(module, LoraLayer) or module.disable_adapters:
                continue
            for name in module.active_adapters if only is None else only:
                if name in module.lora_A:
                    a, b = module.lora_A[name].weight, module.lora_B[name].weight
                    found.append((i, a, b, float(module.scaling[name])))
        return found


@dataclass
class ProjectionPass:
    """A projection with the adapters that are on, in the dtype that it computes in: for one pass over the model."""

    projection: Projection
    a_RK: Tensor | None = None  # s A of every layer, stacked; None: all adapters are off
    b_NR: Tensor | None = None  # B of every layer, block by block
    parameters: tuple[Tensor, ...] = ()  # A and B of each adapter in turn, the float32 masters
    blocks: tuple[tuple[slice, slice, float], ...] = ()  # of each adapter: rows of b_NR, its ranks, its scale

    @property
    def inputs(self) -> int:
        """Returns K."""
        return self.projection.inputs

    def weight(self, like: Tensor) -> Tensor:
        """Returns [W, B], (N, K + R), in dtype and on device of `like`."""
        outputs, out = self.projection.outputs, self.projection.kept
        if out is not None:
            if self.b_NR is not None:  # without, u is 0 beside the B of another pass
                out[:, self.inputs :] = self.b_NR
            return out
        out = like.new_empty(sum(outputs), self.inputs + self.projection.rank)
        beside = [None] * len(outputs) if self.b_NR is None else self.b_NR.split(outputs)
        for base, b_nR, rows in zip(self.projection.bases, beside, out.split(outputs), strict=True):
            weight_into(base, b_nR, rows)
        self.projection.kept = out if self.projection.keeps else None
        return out

    def empty_input(self, like: Tensor) -> Tensor:
        """Returns room for [x, u], (T, K + R), in dtype and with the rows of `like`; x is to be written into the
        first K columns, then `fill_ranks` adds u."""
        return like.new_empty(like.shape[0], self.inputs + self.projection.rank)

    def fill_ranks(self, extended: Tensor) -> Tensor:
        """Writes u beside x."""
        x_TK, u_TR = extended[:, : self.inputs], extended[:, self.inputs :]
        if self.a_RK is None:
            u_TR.zero_()
        else:
            torch.mm(x_TK, self.a_RK.T, out=u_TR)
        return extended

    def extend(self, x_TK: Tensor) -> Tensor:
        """Returns [x, u]."""
        if not self.projection.rank:
            return x_TK
        extended = self.empty_input(x_TK)
        extended[:, : self.inputs] = x_TK
        return self.fill_ranks(extended)

    def forward(self, extended: Tensor) -> Tensor:
        """Returns y."""
        weight, bias_N = self.weight(extended), self.projection.bias_N
        if bias_N is None:
            return extended @ weight.T
        return torch.addmm(bias_N.to(extended.dtype), extended, weight.T)

    def add_to(
        self, residual_TN: Tensor | None, extended: Tensor, in_place: bool = False, times: float = 1.0
    ) -> Tensor:
        """Returns residual + y times a number, added inside the product; or y times the number."""
        if residual_TN is None:
            y_TN = self.forward(extended)
            return y_TN if times == 1 else y_TN.mul_(times)
        weight, bias_N = self.weight(extended), self.projection.bias_N
        add = residual_TN.addmm_ if in_place else residual_TN.addmm
        out = add(extended, weight.T, alpha=times)
        return out if bias_N is None else out.add_(bias_N, alpha=times)

    def backward(self, grad_TN: Tensor) -> Tensor:
        """Returns [dx, du], (T, K + R), of y's gradient. The adapter's share of dx comes by `add_ranks`."""
        return grad_TN @ self.weight(grad_TN)

    def add_ranks(self, grad_extended: Tensor) -> Tensor:
        """Returns dx, in place, from `backward`."""
        grad_TK, grad_TR = grad_extended[:, : self.inputs], grad_extended[:, self.inputs :]
        return grad_TK if self.a_RK is None else grad_TK.addmm_(grad_TR, self.a_RK)

    def parameter_grads(self, extended: Tensor, grad_TN: Tensor, grad_TR: Tensor) -> list[Tensor | None]:
        """Returns the gradients of `parameters`: dA = s du^T x and dB = dy^T u.

        Args:
            extended: [x, u] of the forward pass.
            grad_TN: dy.
            grad_TR: du.
        """
        if not self.parameters:
            return []
        grad_a_RK = _product(grad_TR, extended[:, : self.inputs], self.parameters[0].dtype)
        grad_b_NR = _product(grad_TN, extended[:, self.inputs :], self.parameters[0].dtype)
        grads: list[Tensor | None] = []
        for rows, ranks, scale in self.blocks:
            grads += [grad_a_RK[ranks] * scale, grad_b_NR[rows, ranks].contiguous()]
        return grads


@contextmanager
def kept_weights(projections: Sequence[Projection]) -> Iterator[None]:
    """Inside, the matrices of these projections are made once for all passes that read them."""
    for one in projections:
        one.keeps = True
    try:
        yield
    finally:
        for one in projections:
            one.keeps, one.kept = False, None


def _product(a_TM: Tensor, b_TN: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns a^T b, summed and kept in float32 where the GPU can; in `dtype`."""
    if a_TM.is_cuda and a_TM.element_size() == 2 and dtype == torch.float32:
        return torch.mm(a_TM.T, b_TN, out_dtype=torch.float32)
    return (a_TM.T @ b_TN).to(dtype)


def prepare(
    projections: Sequence[Projection], dtype: torch.dtype, device: torch.device, only: Sequence[str] | None = None
) -> list[ProjectionPass]:
    """Returns every projection with the adapters that are on (see `Projection.active`), cast once for the pass."""
    active = [projection.active(only) for projection in projections]
    if not any(active):
        return [projection.kind(projection) for projection in projections]
    sizes = [(p.rank * p.inputs, sum(p.outputs) * p.rank) for p in projections]
    room = torch.zeros(sum(map(sum, sizes)), dtype=dtype, device=device).split([n for pair in sizes for n in pair])
    result, cast_to, masters, scales = [], [], [], []
    for i, (projection, adapters) in enumerate(zip(projections, active, strict=True)):
        a_RK = room[2 * i].view(projection.rank, projection.inputs)
        b_NR = room[2 * i + 1].view(sum(projection.outputs), projection.rank)
        first, blocks = 0, []
        for layer, a, b, scale in adapters:
            start = sum(projection.outputs[:layer])
            rows, ranks = slice(start, start + b.shape[0]), slice(first, first + a.shape[0])
            first = ranks.stop
            cast_to += [a_RK[ranks], b_NR[rows, ranks]]
            masters += [a.detach(), b.detach()]
            scales += [scale, 1.0]
            blocks.append((rows, ranks, scale))
        parameters = tuple(p for _, a, b, _ in adapters for p in (a, b))
        result.append(projection.kind(projection, a_RK, b_NR, parameters, tuple(blocks)))
    torch._foreach_copy_(cast_to, torch._foreach_mul(masters, scales))
    return result
