"""Linear layers whose weight stays in the blocks of a GGUF file, as llama.cpp stores and serves it.

A block is 32 or 256 neighbors along the input dimension. They are dequantized in float32, which gives the numbers of
llama.cpp's own dequantization, and then cast to what is computed in: once for each product, here or in the matrix that
the fused layers read, and once more in the backward pass. No matrix is kept.

llama.cpp rounds what such a layer reads to 8 bits. `round_activations` does the same, to see what that alone makes of
a model (docs/serving.md); nothing is trained so.

Shape suffixes: T tokens, N outputs, K inputs, B bytes of K inputs.
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
        self.rounds = False
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
        y = _Product.apply(as_read(self, x), self)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, ggml_type={self.ggml_type}"


class GgufHead(nn.Linear):
    """An output layer whose weight was dequantized from blocks of `ggml_type`, for which logits are computed often."""

    ggml_type: int
    rounds = False

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(as_read(self, x))


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


def round_activations(model: nn.Module) -> bool:
    """Has the layers in blocks, for good, round what they read as llama.cpp does on a CPU; says whether there are any.
    They have no gradient then."""
    layers = [layer for layer in model.modules() if isinstance(layer, GgufLinear | GgufHead)]
    for layer in layers:
        layer.rounds = True
    return bool(layers)


def as_read(layer: Any, x: Tensor) -> Tensor:
    """Returns the inputs of a head or a layer in blocks as its product takes them."""
    return rounded(x, block_of(layer.ggml_type)[0]) if getattr(layer, "rounds", False) else x


def rounded(x: Tensor, block: int) -> Tensor:
    """Returns x, (..., K), rounded to 8 bits with a scale for each `block` of neighbors, which is the largest of them
    over 127: ggml's Q8_0 (blocks of 32, scales in float16) or Q8_K (256)."""
    values = x.float().unflatten(-1, (-1, block))
    most = values.abs().amax(-1, keepdim=True)
    codes, scale = (values * (127 / most).nan_to_num_(0, 0, 0)).round_(), most / 127
    return (codes * (scale.half().float() if block == 32 else scale)).flatten(-2).to(x.dtype)


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
