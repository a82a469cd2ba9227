"""The element-wise parts of a decoder layer: plain torch here, one Triton kernel each on a GPU.

The torch expressions say what is computed, in the order and with the rounding of transformers' modules; they run on
the CPU and are what the kernels are tested against. Norm weights are frozen: they get no gradient.

Shape suffixes: T tokens, H hidden size, F width of the feed-forward layer, N outputs and K inputs of a linear layer.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from bitsandbytes.functional import dequantize_4bit
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_COLUMNS = 2048  # of a matrix that one kernel program works on
E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max


class Norm(NamedTuple):
    """An RMS norm with a frozen weight."""

    weight: Tensor
    eps: float
    wide: bool = False  # rounded after the weight is multiplied in, not before
    centered: bool = False  # the mean is subtracted first: a layer norm


@cache
def triton_kernels() -> Any:
    """Returns the kernels; None if Triton isn't there."""
    try:
        from . import elementwise_triton as kernels
    except ImportError:
        return None
    return kernels


def uses_kernels(x: Tensor) -> bool:
    """Whether Triton kernels run on this tensor."""
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16, E4M3) and triton_kernels() is not None


def power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


# ---- RMS norm (Zhang & Sennrich 2019) -------------------------------------------------------------------------------


def rms_norm(x_TH: Tensor, norm: Norm, out_TH: Tensor | None = None, residual_TH: Tensor | None = None) -> Tensor:
    """Computes x / rms(x) * weight, plus a residual; into `out_TH` if given, which may be part of a wider matrix."""
    out_TH = x_TH.new_empty(x_TH.shape) if out_TH is None else out_TH
    if uses_kernels(x_TH):
        width = x_TH.shape[1]
        residual = out_TH if residual_TH is None else residual_TH
        strides = (x_TH.stride(0), out_TH.stride(0), residual.stride(0))
        triton_kernels().rms_norm[(x_TH.shape[0],)](
            x_TH, norm.weight, residual, out_TH, *strides, width, norm.eps, BLOCK=power_of_2(width), WIDE=norm.wide,
            CENTERED=norm.centered, ADD=residual_TH is not None, num_warps=8,
        )  # fmt: skip
        return out_TH
    y_TH = normed(x_TH, norm)
    return out_TH.copy_(y_TH if residual_TH is None else residual_TH + y_TH)


def normed(x_TH: Tensor, norm: Norm) -> Tensor:
    """Computes the norm of the last dimension in plain torch, differentiable."""
    wide_TH = _normed(x_TH, norm)[0]
    if norm.wide:
        return (wide_TH * norm.weight.to(wide_TH.dtype)).to(x_TH.dtype)
    return norm.weight * wide_TH.to(x_TH.dtype)


def _normed(x_TH: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    wide_TH = x_TH.to(torch.promote_types(x_TH.dtype, torch.float32))
    if norm.centered:
        wide_TH = wide_TH - wide_TH.mean(-1, keepdim=True)
    scale_T1 = torch.rsqrt(wide_TH.pow(2).mean(-1, keepdim=True) + norm.eps)
    return wide_TH * scale_T1, scale_T1


def rms_norm_backward(x_TH: Tensor, norm: Norm, grad_TH: Tensor, residual_TH: Tensor | None = None) -> Tensor:
    """Returns the gradient of `rms_norm` to its input plus `residual_TH`, which reaches x past the norm."""
    if uses_kernels(x_TH):
        tokens, width = x_TH.shape
        out_TH = torch.empty_like(x_TH, memory_format=torch.contiguous_format)
        residual_TH = None if residual_TH is None else residual_TH.contiguous()
        triton_kernels().rms_norm_backward[(tokens,)](
            x_TH, norm.weight, grad_TH, out_TH if residual_TH is None else residual_TH, out_TH, x_TH.stride(0),
            grad_TH.stride(0), width, norm.eps, BLOCK=power_of_2(width), CENTERED=norm.centered,
            ADD=residual_TH is not None, num_warps=8,
        )  # fmt: skip
        return out_TH
    normed_TH, scale_T1 = _normed(x_TH, norm)
    wide_TH = grad_TH.to(normed_TH.dtype) * norm.weight.to(normed_TH.dtype)
    result_TH = wide_TH - normed_TH * (wide_TH * normed_TH).mean(-1, keepdim=True)
    if norm.centered:
        result_TH = result_TH - wide_TH.mean(-1, keepdim=True)
    result_TH = scale_T1 * result_TH
    return (result_TH if residual_TH is None else result_TH + residual_TH).to(x_TH.dtype)


class RMSNorm(torch.autograd.Function):
    """`rms_norm` with a gradient to its input."""

    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, norm: Norm) -> Tensor:
        ctx.save_for_backward(x_TH)
        ctx.norm = norm
        return rms_norm(x_TH, norm)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return rms_norm_backward(ctx.saved_tensors[0], ctx.norm, grad_outputs[0].contiguous()), None


# ---- Activations: SwiGLU, GeGLU (Shazeer 2020), and without a gate --------------------------------------------------


def _silu_backward(grad: Tensor, x: Tensor) -> Tensor:
    sigmoid = torch.sigmoid(x)
    return grad * sigmoid * (1 + x * (1 - sigmoid))


def _gelu(kind: str) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]:
    backward = torch.ops.aten.gelu_backward
    return partial(F.gelu, approximate=kind), lambda grad, x: backward(grad, x, approximate=kind)


# By the names of transformers: the function, and its gradient from that of the result and the input.
_FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "silu": (F.silu, _silu_backward),
    "gelu_pytorch_tanh": _gelu("tanh"),
    "gelu": _gelu("none"),
    "relu2": (lambda x: F.relu(x).square(), lambda grad, x: grad * 2 * F.relu(x)),
}
ACTIVATIONS = _FUNCTIONS.keys()


def activate(gate_up: Tensor, out_TF: Tensor, name: str = "silu") -> Tensor:
    """Computes act(gate) * up from (T, 2F) [gate, up], or act(x) from (T, F), into `out_TF`, which may be part of a
    wider matrix."""
    if uses_kernels(gate_up):
        _launch_activation(triton_kernels().activate, gate_up, out_TF, name)
        return out_TF
    function = _FUNCTIONS[name][0]
    gate_TF, *up = gate_up.split(out_TF.shape[1], 1)
    return out_TF.copy_(function(gate_TF) * up[0] if up else function(gate_TF))


def activate_backward_(gate_up: Tensor, grad_TF: Tensor, name: str = "silu") -> None:
    """Turns `gate_up` into its gradient, in place, and `grad_TF`, the product's gradient, into the product."""
    if uses_kernels(gate_up):
        _launch_activation(triton_kernels().activate_backward, gate_up, grad_TF, name)
        return
    function, backward = _FUNCTIONS[name]
    gate_TF, *up = gate_up.split(grad_TF.shape[1], 1)
    value_TF = function(gate_TF)
    if not up:
        gate_TF.copy_(backward(grad_TF, gate_TF))
        grad_TF.copy_(value_TF)
        return
    product_TF = value_TF * up[0]
    grad_gate_TF = backward(grad_TF * up[0], gate_TF)
    up[0].copy_(grad_TF * value_TF)
    gate_TF.copy_(grad_gate_TF)
    grad_TF.copy_(product_TF)


def _launch_activation(kernel: Any, gate_up: Tensor, out_TF: Tensor, name: str) -> None:
    tokens, width = out_TF.shape
    kernel[(tokens, -(width // -_COLUMNS))](
        gate_up, out_TF, gate_up.stride(0), out_TF.stride(0), width, BLOCK=_COLUMNS, KIND=name,
        GATED=gate_up.shape[1] > width,
    )  # fmt: skip


# ---- Weights --------------------------------------------------------------------------------------------------------


def weight_into(linear: nn.Module, beside_NR: Tensor | None, out: Tensor, scale: Tensor | None = None) -> None:
    """Writes [W, B] into `out`, (N, K + R): a linear layer's weight, dequantized if it is in 4 bits, and a matrix.

    Args:
        linear: with a weight of (N, K).
        beside_NR: contiguous; zeros if None.
        out: contiguous rows.
        scale: a float32 number that W is divided by, for an `out` in e4m3.
    """
    weight: Any = linear.weight
    state = getattr(weight, "quant_state", None)
    if state is not None and uses_kernels(out) and _kernel_reads(weight, state):
        _launch_dequantize(weight, state, beside_NR, out, scale)
        return
    inputs = linear.in_features
    weight_NK = weight if state is None else dequantize_4bit(weight.data, state)
    out[:, :inputs] = weight_NK if scale is None else weight_NK.float() / scale
    out[:, inputs:] = 0 if beside_NR is None else beside_NR


def _launch_dequantize(
    weight: Tensor, state: Any, beside_NR: Tensor | None, out: Tensor, scale: Tensor | None
) -> None:
    rows, columns = state.shape
    nested = state.state2 if state.nested else None
    scales = (nested.code, nested.absmax, state.offset) if nested else (state.code,) * 3
    ranks = out.shape[1] - columns
    triton_kernels().dequantize_4bit[(rows, -(columns // -_COLUMNS))](
        weight, state.absmax, state.code, *scales, out if beside_NR is None else beside_NR,
        state.code if scale is None else scale, out, out.stride(0), columns, ranks, BLOCK=_COLUMNS,
        QUANT_BLOCK=state.blocksize, NESTED_BLOCK=nested.blocksize if nested else 0,
        STORED=_triton_dtype(state.dtype), R_BLOCK=power_of_2(max(ranks, 1)), BESIDE=beside_NR is not None,
        SCALED=scale is not None, enable_fp_fusion=False,
    )  # fmt: skip


def quantize_rows(x_TK: Tensor) -> tuple[Tensor, Tensor]:
    """Returns x in e4m3, each row divided by its scale, and the scales, (T, 1) float32."""
    if uses_kernels(x_TK):
        tokens, width = x_TK.shape
        out_TK = torch.empty(tokens, width, dtype=E4M3, device=x_TK.device)
        scales_T1 = torch.empty(tokens, 1, dtype=torch.float32, device=x_TK.device)
        triton_kernels().quantize_row[(tokens,)](x_TK, out_TK, scales_T1, x_TK.stride(0), width, BLOCK=_COLUMNS)
        return out_TK, scales_T1
    wide_TK = x_TK.float()
    scales_T1 = (wide_TK.abs().amax(1, keepdim=True) / LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
    return (wide_TK / scales_T1).to(E4M3), scales_T1


def _kernel_reads(weight: Tensor, state: Any) -> bool:
    blocks_fit = state.shape[1] % state.blocksize == 0 and _COLUMNS % state.blocksize == 0
    return blocks_fit and weight.dtype == torch.uint8


def _triton_dtype(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}[dtype]


# ---- Head -----------------------------------------------------------------------------------------------------------


def logps_from_logits(logits_KV: Tensor, target_K: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs of the targets and log-sum-exp, float32, from contiguous logits in half precision (GPU only)."""
    rows, vocab = logits_KV.shape
    lse_K, logps_K = torch.empty(2, rows, dtype=torch.float32, device=logits_KV.device)
    triton_kernels().log_sum_exp[(rows,)](logits_KV, target_K, lse_K, logps_K, V=vocab, BLOCK=4096, num_warps=8)
    return logps_K, lse_K


def logps_grad_(logits_KV: Tensor, target_K: Tensor, lse_K: Tensor) -> Tensor:
    """Turns logits into the gradient of their target's log-prob, onehot - softmax, in place (GPU only)."""
    rows, vocab = logits_KV.shape
    triton_kernels().logp_grad[(rows, -(vocab // -4096))](logits_KV, target_K, lse_K, vocab, BLOCK=4096, num_warps=8)
    return logits_KV
