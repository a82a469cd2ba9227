"""Linear layers whose weight stays in the blocks of a GGUF file, as llama.cpp stores and serves it.

A block is 32 or 256 neighbors along the input dimension. They are dequantized in float32, which gives the numbers of
llama.cpp's own dequantization, and then cast to what is computed in: once for each product, here or in the matrix that
the fused layers read, and once more in the backward pass. No matrix is kept.

Shape suffixes: N outputs, K inputs, B bytes of K inputs.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

_CHUNK = {"cpu": 1 << 20}  # weights that are float32 at once: what fits a CPU's cache; on a GPU 2**24


def _refused(*_: object) -> None:
    raise RuntimeError("A layer in GGUF blocks can't be added to: merge the adapter by `dpo-peft merge`.")


class _Made(Tensor):
    """A weight that was made to be read: PEFT's merge would add to it, and it would be lost."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # results are plain
    data = property(Tensor.detach, _refused)


class GgufLinear(nn.Linear):
    """A frozen linear layer. `weight` is a new tensor each time that it is read: (out_features, in_features).

    Args:
        in_features, out_features: K and N.
        bias: whether there is one, in `dtype`.
        ggml_type: ggml's number of the block's type.
        dtype: of `weight`.
    """

    _is_hf_initialized = True  # or transformers fills what `weight` returns at random

    def __init__(self, in_features: int, out_features: int, bias: bool, ggml_type: int, dtype: torch.dtype):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.ggml_type, self.dtype = in_features, out_features, ggml_type, dtype
        elements, size = block_of(ggml_type)
        blocks_NB = torch.empty(out_features, in_features // elements * size, dtype=torch.uint8)
        self.blocks = nn.Parameter(blocks_NB, requires_grad=False)
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features, dtype=dtype)) if bias else None)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return dequantized(self.blocks, self.ggml_type, self.dtype).as_subclass(_Made)

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        y = _Product.apply(x, self)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, ggml_type={self.ggml_type}"


class _Product(torch.autograd.Function):
    """x W^T, with a gradient to x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: GgufLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, dequantized(layer.blocks, layer.ggml_type, x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ dequantized(ctx.layer.blocks, ctx.layer.ggml_type, grads[0].dtype), None


def block_of(ggml_type: int) -> tuple[int, int]:
    """Returns how many weights a block holds, and its bytes. A KeyError for a type that isn't known."""
    from transformers.integrations.gguf.dequant import GGML_BLOCK

    return _BLOCK[ggml_type] if ggml_type in _BLOCK else GGML_BLOCK[ggml_type]


def dequantized(blocks_NB: Tensor, ggml_type: int, dtype: torch.dtype) -> Tensor:
    """Returns the (N, K) weights of blocks, (N, B) uint8: computed in float32, some rows at a time."""
    from transformers.integrations.gguf.dequant import dequantize

    elements, size = block_of(ggml_type)
    inputs, chunk = blocks_NB.shape[1] // size * elements, _CHUNK.get(blocks_NB.device.type, 1 << 24)
    out_NK = torch.empty(blocks_NB.shape[0], inputs, dtype=dtype, device=blocks_NB.device)
    for rows, out in zip(*(t.split(max(1, chunk // inputs)) for t in (blocks_NB.detach(), out_NK)), strict=True):
        own = _OWN.get(ggml_type)
        values = own(rows.reshape(-1, size)) if own else dequantize(rows, ggml_type)
        out.copy_(values.view(out.shape))
    return out_NK


def _five_bits(blocks: Tensor, start: int) -> Tensor:
    """Returns the codes of blocks, (blocks, 32): 32 fifth bits, then two codes' lower bits a byte."""
    bits = torch.arange(8, dtype=torch.uint8, device=blocks.device)
    high = (blocks[:, start : start + 4, None] >> bits & 1).flatten(1)
    low = torch.cat([blocks[:, start + 4 :] & 15, blocks[:, start + 4 :] >> 4], 1)
    return (low | high << 4).float()


def _half(blocks: Tensor, start: int) -> Tensor:
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def _q5_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * (_five_bits(blocks, 2) - 16)


def _q5_1(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * _five_bits(blocks, 4) + _half(blocks, 2)


# What transformers has no dequantization for: Q5_0 and Q5_1.
_BLOCK = {6: (32, 22), 7: (32, 24)}
_OWN: dict[int, Callable[[Tensor], Tensor]] = {6: _q5_0, 7: _q5_1}
