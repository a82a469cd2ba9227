"""The element-wise parts of a decoder layer: plain torch here, one Triton kernel each on a GPU.

The torch expressions say what is computed, in the order and with the rounding of transformers' modules; they run on
the CPU and are what the kernels are tested against. Norm weights are frozen: they get no gradient.

Shape suffixes: T tokens, S gathered keys, H hidden size, F width of the feed-forward layer, A attention heads, D head
size, M most copies of a token among the keys, N outputs and K inputs of a linear layer.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from bitsandbytes.functional import dequantize_4bit
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_COLUMNS = 2048  # of a matrix that one kernel program works on


class Norm(NamedTuple):
    """An RMS norm with a frozen weight."""

    weight: Tensor
    eps: float


class Places(NamedTuple):
    """Which rows the keys are gathered from, and where each row's copies went."""

    index_S: Tensor  # row of each key
    copies_TM: Tensor  # places of each row among the keys, -1 where it has fewer


@cache
def _triton() -> Any:
    """Returns the kernels; None if Triton isn't there."""
    try:
        from . import elementwise_triton as triton_kernels
    except ImportError:
        return None
    return triton_kernels


def uses_kernels(x: Tensor) -> bool:
    """Whether Triton kernels run on this tensor."""
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and _triton() is not None


def _power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


# ---- RMS norm (Zhang & Sennrich 2019) -------------------------------------------------------------------------------


def rms_norm(x_TH: Tensor, norm: Norm, out_TH: Tensor | None = None) -> Tensor:
    """Computes x / rms(x) * weight; into `out_TH` if given, which may be part of a wider matrix."""
    out_TH = torch.empty_like(x_TH) if out_TH is None else out_TH
    if uses_kernels(x_TH):
        width = x_TH.shape[1]
        strides = (x_TH.stride(0), out_TH.stride(0))
        _triton().rms_norm[(x_TH.shape[0],)](
            x_TH, norm.weight, out_TH, *strides, width, norm.eps, BLOCK=_power_of_2(width), num_warps=8
        )
        return out_TH
    return out_TH.copy_(norm.weight * _normed(x_TH, norm.eps)[0].to(x_TH.dtype))


def _normed(x_TH: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide_TH = x_TH.to(torch.promote_types(x_TH.dtype, torch.float32))
    scale_T1 = torch.rsqrt(wide_TH.pow(2).mean(-1, keepdim=True) + eps)
    return wide_TH * scale_T1, scale_T1


def rms_norm_backward(x_TH: Tensor, norm: Norm, grad_TH: Tensor, residual_TH: Tensor | None = None) -> Tensor:
    """Returns the gradient of `rms_norm` to its input plus `residual_TH`, which reaches x past the norm."""
    if uses_kernels(x_TH):
        tokens, width = x_TH.shape
        out_TH = torch.empty_like(x_TH, memory_format=torch.contiguous_format)
        residual_TH = None if residual_TH is None else residual_TH.contiguous()
        _triton().rms_norm_backward[(tokens,)](
            x_TH, norm.weight, grad_TH, out_TH if residual_TH is None else residual_TH, out_TH, x_TH.stride(0),
            grad_TH.stride(0), width, norm.eps, BLOCK=_power_of_2(width), ADD=residual_TH is not None, num_warps=8,
        )  # fmt: skip
        return out_TH
    normed_TH, scale_T1 = _normed(x_TH, norm.eps)
    wide_TH = grad_TH.to(normed_TH.dtype) * norm.weight.to(normed_TH.dtype)
    result_TH = scale_T1 * (wide_TH - normed_TH * (wide_TH * normed_TH).mean(-1, keepdim=True))
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


# ---- Rotary positions (Su et al. 2021), with the norm of Qwen 3's heads ---------------------------------------------


class Heads(NamedTuple):
    """How a layer's [q; k; v] splits into heads, and the norms of q and k where it has them."""

    queries: int
    keys: int
    size: int
    q_norm: Norm | None = None
    k_norm: Norm | None = None

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Splits (T, N) into views (T, A, D) of q, k and v."""
        q, k, v = qkv.split([n * self.size for n in (self.queries, self.keys, self.keys)], 1)
        shape = (-1, self.size)
        return q.unflatten(1, shape), k.unflatten(1, shape), v.unflatten(1, shape)


def queries_keys_values(
    qkv: Tensor, heads: Heads, cos_TD: Tensor, sin_TD: Tensor, places: Places | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns what attention reads: heads normalized where they are, q and k turned by positions, k and v gathered.

    Args:
        qkv: (T, N).
        cos_TD, sin_TD: angles from the model's own rotary embedding.
        places: where the keys come from; None leaves them in their rows.

    Returns:
        q (T, A, D), k and v (S, A, D), differentiable in `qkv`. The gradient adds up each row's copies in float32,
        without atomic operations.
    """
    if uses_kernels(qkv):
        return _QueriesKeysValues.apply(qkv, heads, cos_TD, sin_TD, places)
    q, k, v = heads.split(qkv)
    q, k = _rotate(q, heads.q_norm, cos_TD, sin_TD), _rotate(k, heads.k_norm, cos_TD, sin_TD)
    return (q, k, v) if places is None else (q, k[places.index_S], v[places.index_S])


def _rotate(x_TAD: Tensor, norm: Norm | None, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    if norm is not None:
        x_TAD = norm.weight * _normed(x_TAD, norm.eps)[0].to(x_TAD.dtype)
    half = x_TAD.shape[-1] // 2
    turned_TAD = torch.cat((-x_TAD[..., half:], x_TAD[..., :half]), -1)
    return x_TAD * cos_TD[:, None] + turned_TAD * sin_TD[:, None]


class _QueriesKeysValues(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, heads: Heads, cos_TD: Tensor, sin_TD: Tensor, places: Places | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = heads.split(qkv)
        # The norms' gradient reads what went in; a rotation's doesn't.
        ctx.save_for_backward(qkv if heads.q_norm else None, cos_TD, sin_TD)
        ctx.heads, ctx.places, ctx.shape, ctx.dtype = heads, places, qkv.shape, qkv.dtype
        v = v.contiguous() if places is None else v.index_select(0, places.index_S)
        return (
            _launch_rotate(q, heads.q_norm, cos_TD, sin_TD, None),
            _launch_rotate(k, heads.k_norm, cos_TD, sin_TD, places),
            v,
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        qkv, cos_TD, sin_TD = ctx.saved_tensors
        heads, places, angles = ctx.heads, ctx.places, (cos_TD, sin_TD)
        grad = torch.empty(ctx.shape, dtype=ctx.dtype, device=cos_TD.device)
        x = heads.split(grad if qkv is None else qkv)
        grad_q, grad_k, grad_v = heads.split(grad)
        _launch_back(grad_outputs[0], grad_q, x[0], heads.q_norm, angles, None)
        _launch_back(grad_outputs[1], grad_k, x[1], heads.k_norm, angles, places)
        _launch_back(grad_outputs[2], grad_v, x[2], None, None, places)
        return grad, None, None, None, None


def _launch_rotate(x_TAD: Tensor, norm: Norm | None, cos_TD: Tensor, sin_TD: Tensor, places: Places | None) -> Tensor:
    tokens, heads, size = x_TAD.shape
    rows = tokens if places is None else len(places.index_S)
    out = torch.empty(rows, heads, size, dtype=x_TAD.dtype, device=x_TAD.device)
    weight, eps = (cos_TD, 0.0) if norm is None else norm
    _triton().rotate[(rows,)](
        x_TAD, cos_TD if places is None else places.index_S, cos_TD, sin_TD, weight, out, x_TAD.stride(0), heads, eps,
        **_head_blocks(heads, size), GATHER=places is not None, NORM=norm is not None,
    )  # fmt: skip
    return out


def _launch_back(
    grad: Tensor,
    out_TAD: Tensor,
    x_TAD: Tensor,
    norm: Norm | None,
    angles: tuple[Tensor, Tensor] | None,
    places: Places | None,
) -> None:
    tokens, heads, size = out_TAD.shape
    grad = grad.contiguous()
    cos_TD, sin_TD = angles or (grad, grad)
    weight, eps = (grad, 0.0) if norm is None else norm
    copies, most = (grad, 0) if places is None else (places.copies_TM, places.copies_TM.shape[1])
    _triton().rotate_backward[(tokens,)](
        grad, copies, x_TAD, cos_TD, sin_TD, weight, out_TAD, heads * size, x_TAD.stride(0), out_TAD.stride(0), heads,
        eps, **_head_blocks(heads, size), COPIES=most, ROTATE=angles is not None, NORM=norm is not None,
    )  # fmt: skip


def _head_blocks(heads: int, size: int) -> dict[str, int]:
    return {"D": size, "HALF": _power_of_2(size // 2), "HEADS": _power_of_2(heads)}


# ---- SwiGLU (Shazeer 2020) ------------------------------------------------------------------------------------------


def swiglu(gate_up: Tensor, out_TF: Tensor) -> Tensor:
    """Computes silu(gate) * up, from (T, 2F) [gate, up] into `out_TF`, which may be part of a wider matrix."""
    tokens, width = out_TF.shape
    if uses_kernels(gate_up):
        grid = (tokens, -(width // -_COLUMNS))
        _triton().swiglu[grid](gate_up, out_TF, gate_up.stride(0), out_TF.stride(0), width, BLOCK=_COLUMNS)
        return out_TF
    gate_TF, up_TF = gate_up.split(width, 1)
    return out_TF.copy_(F.silu(gate_TF) * up_TF)


def swiglu_backward_(gate_up: Tensor, grad_TF: Tensor) -> None:
    """Turns `gate_up` into its gradient, in place, and `grad_TF`, the product's gradient, into the product."""
    tokens, width = grad_TF.shape
    if uses_kernels(gate_up):
        grid = (tokens, -(width // -_COLUMNS))
        _triton().swiglu_backward[grid](gate_up, grad_TF, gate_up.stride(0), grad_TF.stride(0), width, BLOCK=_COLUMNS)
        return
    gate_TF, up_TF = gate_up.split(width, 1)
    sigmoid_TF, silu_TF = torch.sigmoid(gate_TF), F.silu(gate_TF)
    product_TF = silu_TF * up_TF
    grad_gate_TF = grad_TF * up_TF * sigmoid_TF * (1 + gate_TF * (1 - sigmoid_TF))
    up_TF.copy_(grad_TF * silu_TF)
    gate_TF.copy_(grad_gate_TF)
    grad_TF.copy_(product_TF)


# ---- Weights --------------------------------------------------------------------------------------------------------


def weight_into(linear: nn.Module, beside_NR: Tensor | None, out: Tensor) -> None:
    """Writes [W, B] into `out`, (N, K + R): a linear layer's weight, dequantized if it is in 4 bits, and a matrix.

    Args:
        linear: with a weight of (N, K).
        beside_NR: contiguous; zeros if None.
        out: contiguous rows.
    """
    weight: Any = linear.weight
    state = getattr(weight, "quant_state", None)
    if state is not None and uses_kernels(out) and _kernel_reads(weight, state):
        _launch_dequantize(weight, state, beside_NR, out)
        return
    inputs = linear.in_features
    out[:, :inputs] = weight if state is None else dequantize_4bit(weight.data, state)
    out[:, inputs:] = 0 if beside_NR is None else beside_NR


def _launch_dequantize(weight: Tensor, state: Any, beside_NR: Tensor | None, out: Tensor) -> None:
    rows, columns = state.shape
    nested = state.state2 if state.nested else None
    scales = (nested.code, nested.absmax, state.offset) if nested else (state.code,) * 3
    ranks = out.shape[1] - columns
    _triton().dequantize_4bit[(rows, -(columns // -_COLUMNS))](
        weight, state.absmax, state.code, *scales, out if beside_NR is None else beside_NR, out, out.stride(0),
        columns, ranks, BLOCK=_COLUMNS, QUANT_BLOCK=state.blocksize, NESTED_BLOCK=nested.blocksize if nested else 0,
        STORED=_triton_dtype(state.dtype), R_BLOCK=_power_of_2(max(ranks, 1)), BESIDE=beside_NR is not None,
        enable_fp_fusion=False,
    )  # fmt: skip


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
    _triton().log_sum_exp[(rows,)](logits_KV, target_K, lse_K, logps_K, V=vocab, BLOCK=4096, num_warps=8)
    return logps_K, lse_K


def logps_grad_(logits_KV: Tensor, target_K: Tensor, lse_K: Tensor) -> Tensor:
    """Turns logits into the gradient of their target's log-prob, onehot - softmax, in place (GPU only)."""
    rows, vocab = logits_KV.shape
    _triton().logp_grad[(rows, -(vocab // -4096))](logits_KV, target_K, lse_K, vocab, BLOCK=4096, num_warps=8)
    return logits_KV
