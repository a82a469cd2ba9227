"""The experts of a mixture in 4 bits, and adapters on them: one product per expert over the tokens that it was given.

transformers keeps the weights of all experts in one 3-D parameter. Here its 4-bit form takes its place in the module:
a `bitsandbytes.nn.Params4bit` whose constants are those of each expert apart, stacked. An expert is unpacked when it
is used, in the backward pass once more, and the base gets no gradient. An adapter is a product of two small matrices
per expert; it is never added to the weights of all of them.

Shape suffixes: N rows (a token once for each of its experts, sorted by expert), X experts, I inputs, O outputs.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Of unpacked weights at a time, at least one expert: decides speed and memory only.
GROUP_BYTES = {"cpu": 1 << 24, "cuda": 1 << 27}


class LowRank(NamedTuple):
    """An adapter on the weights of all experts: W + scale * left @ right, however W lies."""

    left: Tensor  # (X, rows of W, R)
    right: Tensor  # (X, R, columns of W)
    scale: float


def unpack(weight: Any, first: int = 0, last: int | None = None) -> Tensor:
    """Returns the experts from `first` to before `last`, all by default, (X, ...) in the dtype that they were
    quantized from, bit for bit as bitsandbytes unpacks each alone. A weight that is not packed comes as it is."""
    state = getattr(weight, "quant_state", None)
    if state is None:
        return weight[first:last]
    absmax, shape = state.absmax[first:last], state.shape[1:]
    if state.nested:
        nested = state.state2
        scales = nested.absmax[first:last].repeat_interleave(nested.blocksize, 1)[:, : absmax.shape[1]]
        absmax = nested.code[absmax.int()] * scales + state.offset[first:last, None]
    stored = weight.data[first:last]
    # Blocks must not reach into the next expert. The shape is flat, as bitsandbytes' kernel for CPUs misreads blocks
    # that are longer than a row.
    together = len(stored) if shape.numel() % state.blocksize == 0 else 1
    parts = [
        torch.ops.bitsandbytes.dequantize_4bit(
            *(codes.reshape(-1, 1), scale.reshape(-1), state.blocksize, state.quant_type),
            *([len(codes) * shape.numel()], state.dtype),
        )
        for codes, scale in zip(stored.split(together), absmax.split(together), strict=True)
    ]
    return torch.cat(parts).view(len(stored), *shape) if len(parts) > 1 else parts[0].view(len(stored), *shape)


def _grouped(x: Tensor, weight: Tensor) -> bool:
    """Whether torch has one kernel for the products of several experts: it asks for rows of a multiple of 16 bytes."""
    fits = all(size * x.element_size() % 16 == 0 for size in (x.shape[1], *weight.shape[1:]))
    return x.is_cuda and x.dtype == torch.bfloat16 and fits and torch.cuda.get_device_capability(x.device) >= (8, 0)


def multiply(x_NI: Tensor, weight_XOI: Tensor, counts: Sequence[int]) -> Tensor:
    """Returns each row times the transposed weight of its expert, (N, O); `counts` are the rows of each expert."""
    if _grouped(x_NI, weight_XOI):
        ends = torch.tensor(counts, device=x_NI.device).cumsum(0, dtype=torch.int32)
        return F.grouped_mm(x_NI, weight_XOI.transpose(1, 2), offs=ends)
    parts = zip(x_NI.split(list(counts)), weight_XOI.unbind(), strict=True)
    return torch.cat(
        [F.linear(x, weight) for x, weight in parts if len(x)] or [x_NI.new_empty(0, weight_XOI.shape[1])]
    )


class _Frozen(torch.autograd.Function):
    """`multiply` by weights in 4 bits: unpacks them, a group of experts at a time, in both passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any, counts: Sequence[int], transposed: bool) -> Tensor:
        ctx.of = weight, counts, transposed
        return _product(x, weight, counts, transposed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        weight, counts, transposed = ctx.of
        return _product(grad.contiguous(), weight, counts, not transposed), None, None, None


def _product(x: Tensor, weight: Any, counts: Sequence[int], transposed: bool) -> Tensor:
    """Returns (N, O) in the dtype of `x`; `transposed` weights are (X, I, O)."""
    shape = weight.quant_state.shape if hasattr(weight, "quant_state") else weight.shape
    most = max(1, GROUP_BYTES.get(x.device.type, 1 << 27) // (shape[1:].numel() * x.element_size()))
    out, start = x.new_empty(len(x), shape[2 if transposed else 1]), 0
    for first in range(0, shape[0], most):
        own = counts[first : first + most]
        if end := sum(own):
            dense = unpack(weight, first, first + most).to(x.dtype)
            dense = dense.transpose(1, 2) if transposed else dense
            out[start : start + end] = multiply(x[start : start + end], dense, own)
            start += end
    return out


class Experts(nn.Module):
    """Takes the place of the class of a module with 3-D weights: they read as if they were not packed, and the module
    computes by `grouped_forward` if its family can (transformers' `use_experts_implementation` says how).

    Other families compute as they did, on weights that are unpacked, and adapted, once per forward pass.
    """

    low_rank: dict[str, list[LowRank]]  # adapters that are on, by weight
    whole: dict[str, Tensor] | None  # weights that this forward pass unpacked; None outside of one

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Computes as the module's own class, to rounding."""
        if hasattr(self, "has_gate"):
            return grouped_forward(self, *args, **kwargs)
        self.whole = {}
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.whole = None


def _reads_unpacked(name: str) -> property:
    def read(self: Any) -> Tensor:
        weight, adapters = self._parameters[name], self.low_rank.get(name, ())
        if not adapters and not hasattr(weight, "quant_state"):
            return weight
        if self.whole is not None and name in self.whole:
            return self.whole[name]
        dense = unpack(weight)
        for one in adapters:
            dense = torch.baddbmm(dense, one.left.to(dense.dtype), one.right.to(dense.dtype), alpha=one.scale)
        if self.whole is not None:
            self.whole[name] = dense
        return dense

    return property(read)


@cache
def _class_of(own: Any, names: tuple[str, ...]) -> type:
    reads = {name: _reads_unpacked(name) for name in names}
    return type(own.__name__, (Experts, own), {**reads, "__module__": own.__module__})


def convert(module: nn.Module, names: Sequence[str]) -> None:
    """Makes a module with the 3-D weights `names` one of `Experts`."""
    if not isinstance(module, Experts):
        module.low_rank, module.whole = {}, None  # type: ignore[assignment]
        own: Any = type(module)
        module.__class__ = _class_of(own, tuple(names))


def restore(module: nn.Module) -> None:
    """Gives a converted module its class back, and weights that are not packed, on the CPU."""
    for name, weight in module._parameters.items():
        if weight is not None and hasattr(weight, "quant_state"):
            module._parameters[name] = nn.Parameter(unpack(weight).cpu(), requires_grad=False)
    module.__class__ = type(module).__mro__[2]
    del module.low_rank, module.whole


def _dtype(x: Tensor, weight: Any) -> torch.dtype:
    """Returns in which dtype a linear layer would compute."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return weight.quant_state.dtype if hasattr(weight, "quant_state") else weight.dtype


def _linear(module: Any, name: str, x: Tensor, counts: Sequence[int], ids: Tensor) -> Tensor:
    """Returns what a projection of each row's expert, its bias and its adapters give."""
    weight = module._parameters[name]
    dtype = _dtype(x, weight)
    out = _Frozen.apply(x.to(dtype), weight, counts, module.is_transposed)
    if module.has_bias:
        out = out + getattr(module, f"{name}_bias").to(dtype)[ids]
    for one in module.low_rank.get(name, ()):
        wide = dtype if torch.is_autocast_enabled(x.device.type) else one.left.dtype
        left, right = one.left.to(wide), one.right.to(wide)
        a, b = (left.transpose(1, 2), right.transpose(1, 2)) if module.is_transposed else (right, left)
        out = out + multiply(multiply(x.to(wide), a.contiguous(), counts), b.contiguous(), counts) * one.scale
    return out.to(dtype)


def grouped_forward(module: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Returns what the experts make of `hidden`, (tokens, width), as transformers' experts interface defines it.

    Args:
        module: one of `Experts`.
        hidden: (tokens, width).
        top_k_index: (tokens, k) which experts a token goes to.
        top_k_weights: (tokens, k) how much each counts.
    """
    first = "gate_up_proj" if module.has_gate else "up_proj"
    experts, chosen = len(module._parameters["down_proj"]), top_k_index.shape[-1]
    ids, order = top_k_index.reshape(-1).sort(stable=True)
    counts = torch.bincount(ids, minlength=experts).tolist()
    x = _linear(module, first, hidden[order // chosen], counts, ids)
    x = module._apply_gate(x) if module.has_gate else module.act_fn(x)
    x = _linear(module, "down_proj", x, counts, ids)
    if getattr(module, "has_post_expert_norm", False):
        x = module.post_expert_norm(x)
    x = (x * top_k_weights.reshape(-1)[order, None])[order.argsort()]
    return x.view(*top_k_index.shape, -1).sum(1).to(hidden.dtype)


@contextmanager
def adapted(module: Any, name: str, adapters: Sequence[LowRank]) -> Iterator[None]:
    """Switches adapters of a weight on."""
    module.low_rank[name] = list(adapters)
    try:
        yield
    finally:
        del module.low_rank[name]
