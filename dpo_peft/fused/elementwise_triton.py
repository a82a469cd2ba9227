"""The element-wise parts of a decoder layer as Triton kernels: what `kernels.py` runs on a GPU.

Each kernel reads its inputs once and writes its outputs once; sums are float32. Rounding to the storage dtype happens
where transformers' modules have it. Where an output has a row stride, it may be a part of a wider matrix.

Shape suffixes: T tokens, H hidden size, F width of the feed-forward layer, D head size, V vocabulary.
"""

import triton
import triton.language as tl


@triton.jit
def rms_norm(
    x_ptr, weight_ptr, residual_ptr, out_ptr, x_stride, out_stride, residual_stride, H, eps, BLOCK: tl.constexpr,
    WIDE: tl.constexpr, CENTERED: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < H
    x = tl.load(x_ptr + row * x_stride + cols, mask=inside, other=0.0)
    x32 = x.to(tl.float32)
    if CENTERED:
        x32 = tl.where(inside, x32 - tl.sum(x32, 0) / H, 0.0)
    weight = tl.load(weight_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    out = _weighted(x32 * tl.rsqrt(tl.sum(x32 * x32, 0) / H + eps), weight, x.dtype, WIDE)
    if ADD:
        out += tl.load(residual_ptr + row * residual_stride + cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * out_stride + cols, out.to(x.dtype), mask=inside)


@triton.jit
def _weighted(normed, weight, dtype: tl.constexpr, WIDE: tl.constexpr):
    """Normed values times weights, rounded to `dtype` after it and, unless it is WIDE, before it; float32."""
    if not WIDE:
        normed = normed.to(dtype).to(tl.float32)
    return (normed * weight).to(dtype).to(tl.float32)


@triton.jit
def rms_norm_backward(
    x_ptr, weight_ptr, grad_ptr, residual_ptr, out_ptr, x_stride, grad_stride, H, eps, BLOCK: tl.constexpr,
    CENTERED: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < H
    x = tl.load(x_ptr + row * x_stride + cols, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + row * grad_stride + cols, mask=inside, other=0.0).to(tl.float32)
    grad *= tl.load(weight_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    if CENTERED:
        x = tl.where(inside, x - tl.sum(x, 0) / H, 0.0)
    scale = tl.rsqrt(tl.sum(x * x, 0) / H + eps)
    normed = x * scale
    result = grad - normed * (tl.sum(grad * normed, 0) / H)
    if CENTERED:
        result -= tl.sum(grad, 0) / H
    result = scale * result
    if ADD:
        result += tl.load(residual_ptr + row * H + cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * H + cols, result.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def rotate(
    x_ptr, index_ptr, cos_ptr, sin_ptr, weight_ptr, out_ptr, x_stride, x_head, heads, eps, D: tl.constexpr,
    TURNED: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, HEADS: tl.constexpr, GATHER: tl.constexpr,
    ROTATE: tl.constexpr, NORM: tl.constexpr, WIDE: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Row i of the output: row `index[i]` of the input, its heads normalized, their first TURNED numbers rotated."""
    row = tl.program_id(0).to(tl.int64)
    source = tl.load(index_ptr + row) if GATHER else row
    half = tl.arange(0, HALF)[None, :]
    head = tl.arange(0, HEADS)[:, None]
    first, second = _turned(half, TURNED, PAIRS)
    turned = half < TURNED // 2
    inside = turned & (head < heads)
    x = x_ptr + source * x_stride + head * x_head
    out = out_ptr + (row * heads + head) * D
    x1 = tl.load(x + first, mask=inside, other=0.0)
    x2 = tl.load(x + second, mask=inside, other=0.0)
    a1, a2 = x1.to(tl.float32), x2.to(tl.float32)
    square = tl.sum(a1 * a1, 1) + tl.sum(a2 * a2, 1)
    if REST > 0:  # numbers that are not turned
        third = TURNED + tl.arange(0, REST)[None, :]
        left = (third < D) & (head < heads)
        a3 = tl.load(x + third, mask=left, other=0.0).to(tl.float32)
        square += tl.sum(a3 * a3, 1)
    if NORM:
        scale = tl.rsqrt(square / D + eps)[:, None]
        a1 = _weighted(a1 * scale, tl.load(weight_ptr + first, mask=turned, other=0.0).to(tl.float32), x1.dtype, WIDE)
        a2 = _weighted(a2 * scale, tl.load(weight_ptr + second, mask=turned, other=0.0).to(tl.float32), x1.dtype, WIDE)
        if REST > 0:
            weight = tl.load(weight_ptr + third, mask=third < D, other=0.0).to(tl.float32)
            a3 = _weighted(a3 * scale, weight, x1.dtype, WIDE)
    if ROTATE:
        c1 = tl.load(cos_ptr + source * TURNED + first, mask=turned, other=0.0).to(tl.float32)
        s1 = tl.load(sin_ptr + source * TURNED + first, mask=turned, other=0.0).to(tl.float32)
        c2 = tl.load(cos_ptr + source * TURNED + second, mask=turned, other=0.0).to(tl.float32)
        s2 = tl.load(sin_ptr + source * TURNED + second, mask=turned, other=0.0).to(tl.float32)
        a1, a2 = a1 * c1 - a2 * s1, a2 * c2 + a1 * s2
    tl.store(out + first, a1.to(x1.dtype), mask=inside)
    tl.store(out + second, a2.to(x1.dtype), mask=inside)
    if REST > 0:
        tl.store(out + third, a3.to(x1.dtype), mask=left)


@triton.jit
def _turned(half, TURNED: tl.constexpr, PAIRS: tl.constexpr):
    """The places of the two numbers that are turned together: neighbors, or in the two halves."""
    if PAIRS:
        return 2 * half, 2 * half + 1
    return half, half + TURNED // 2


@triton.jit
def rotate_backward(
    grad_ptr, copies_ptr, x_ptr, cos_ptr, sin_ptr, weight_ptr, out_ptr, grad_stride, x_stride, x_head, out_stride,
    out_head, heads, eps, D: tl.constexpr, TURNED: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
    HEADS: tl.constexpr, COPIES: tl.constexpr, ROTATE: tl.constexpr, NORM: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Row t of the output: the gradients of all rows that `rotate` made of row t, added up and turned back."""
    row = tl.program_id(0).to(tl.int64)
    half = tl.arange(0, HALF)[None, :]
    head = tl.arange(0, HEADS)[:, None]
    first, second = _turned(half, TURNED, PAIRS)
    turned = half < TURNED // 2
    inside = turned & (head < heads)
    x = x_ptr + row * x_stride + head * x_head
    out = out_ptr + row * out_stride + head * out_head
    g1 = tl.zeros((HEADS, HALF), tl.float32)
    g2 = tl.zeros((HEADS, HALF), tl.float32)
    if REST > 0:
        third = TURNED + tl.arange(0, REST)[None, :]
        left = (third < D) & (head < heads)
        g3 = tl.zeros((HEADS, REST), tl.float32)
    for copy in tl.static_range(max(COPIES, 1)):
        place = row
        if COPIES > 0:
            place = tl.load(copies_ptr + row * COPIES + copy)
        grad = grad_ptr + place * grad_stride + head * D
        g1 += tl.load(grad + first, mask=inside & (first + place >= first), other=0.0).to(tl.float32)
        g2 += tl.load(grad + second, mask=inside & (first + place >= first), other=0.0).to(tl.float32)
        if REST > 0:
            g3 += tl.load(grad + third, mask=left & (third + place >= third), other=0.0).to(tl.float32)
    if ROTATE:
        c1 = tl.load(cos_ptr + row * TURNED + first, mask=turned, other=0.0).to(tl.float32)
        s1 = tl.load(sin_ptr + row * TURNED + first, mask=turned, other=0.0).to(tl.float32)
        c2 = tl.load(cos_ptr + row * TURNED + second, mask=turned, other=0.0).to(tl.float32)
        s2 = tl.load(sin_ptr + row * TURNED + second, mask=turned, other=0.0).to(tl.float32)
        g1, g2 = g1 * c1 + g2 * s2, g2 * c2 - g1 * s1
    if NORM:
        x1 = tl.load(x + first, mask=inside, other=0.0).to(tl.float32)
        x2 = tl.load(x + second, mask=inside, other=0.0).to(tl.float32)
        g1 *= tl.load(weight_ptr + first, mask=turned, other=0.0).to(tl.float32)
        g2 *= tl.load(weight_ptr + second, mask=turned, other=0.0).to(tl.float32)
        square = tl.sum(x1 * x1, 1) + tl.sum(x2 * x2, 1)
        if REST > 0:
            x3 = tl.load(x + third, mask=left, other=0.0).to(tl.float32)
            g3 *= tl.load(weight_ptr + third, mask=third < D, other=0.0).to(tl.float32)
            square += tl.sum(x3 * x3, 1)
        scale = tl.rsqrt(square / D + eps)[:, None]
        n1, n2 = x1 * scale, x2 * scale
        product = tl.sum(g1 * n1, 1) + tl.sum(g2 * n2, 1)
        if REST > 0:
            n3 = x3 * scale
            product += tl.sum(g3 * n3, 1)
        mean = (product / D)[:, None]
        g1, g2 = scale * (g1 - n1 * mean), scale * (g2 - n2 * mean)
        if REST > 0:
            g3 = scale * (g3 - n3 * mean)
    tl.store(out + first, g1.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(out + second, g2.to(out_ptr.dtype.element_ty), mask=inside)
    if REST > 0:
        tl.store(out + third, g3.to(out_ptr.dtype.element_ty), mask=left)


@triton.jit
def activate(gate_up_ptr, out_ptr, gate_up_stride, out_stride, F, BLOCK: tl.constexpr, KIND: tl.constexpr,
             GATED: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < F
    gate = tl.load(gate_up_ptr + row * gate_up_stride + cols, mask=inside, other=0.0)
    value, slope = _activation(gate.to(tl.float32), KIND)
    value = value.to(gate.dtype).to(tl.float32)
    if GATED:
        up = tl.load(gate_up_ptr + row * gate_up_stride + F + cols, mask=inside, other=0.0)
        value *= up.to(tl.float32)
    tl.store(out_ptr + row * out_stride + cols, value.to(gate.dtype), mask=inside)


@triton.jit
def activate_backward(gate_up_ptr, grad_ptr, gate_up_stride, grad_stride, F, BLOCK: tl.constexpr, KIND: tl.constexpr,
                      GATED: tl.constexpr):  # fmt: skip
    """In place: gate and up become their gradients, the gradient of the product becomes the product."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < F
    gate_place = gate_up_ptr + row * gate_up_stride + cols
    grad_place = grad_ptr + row * grad_stride + cols
    gate = tl.load(gate_place, mask=inside, other=0.0)
    grad = tl.load(grad_place, mask=inside, other=0.0).to(tl.float32)
    value, slope = _activation(gate.to(tl.float32), KIND)
    value = value.to(gate.dtype).to(tl.float32)
    if GATED:
        up = tl.load(gate_place + F, mask=inside, other=0.0).to(tl.float32)
        tl.store(gate_place + F, (grad * value).to(gate.dtype), mask=inside)
        grad, value = grad * up, value * up
    tl.store(gate_place, (grad * slope).to(gate.dtype), mask=inside)
    tl.store(grad_place, value.to(gate.dtype), mask=inside)


@triton.jit
def _activation(x, KIND: tl.constexpr):
    """An activation and its derivative."""
    if KIND == "silu":
        sigmoid = tl.sigmoid(x)
        return x * sigmoid, sigmoid * (1.0 + x * (1.0 - sigmoid))
    elif KIND == "relu2":
        positive = tl.maximum(x, 0.0)
        return positive * positive, 2.0 * positive
    elif KIND == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        return x * cdf, cdf + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    else:  # gelu_pytorch_tanh; (1 + tanh(y)) / 2 = sigmoid(2 y)
        share = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        slope = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
        return x * share, share + x * share * (1.0 - share) * slope


@triton.jit
def dequantize_4bit(
    packed_ptr, absmax_ptr, code_ptr, absmax_code_ptr, absmax2_ptr, offset_ptr, beside_ptr, scale_ptr, out_ptr,
    out_stride, K, R, BLOCK: tl.constexpr, QUANT_BLOCK: tl.constexpr, NESTED_BLOCK: tl.constexpr,
    STORED: tl.constexpr, R_BLOCK: tl.constexpr, BESIDE: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """4-bit codes to values, one row of the weight at a time; the high half of a byte comes first.

    With NESTED_BLOCK > 0 the scales are themselves 8-bit codes (double quantization). The R columns after the K of the
    weight are filled from `beside_ptr`, (N, R), or with zeros.
    """
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    BLOCKS: tl.constexpr = BLOCK // QUANT_BLOCK
    HALF: tl.constexpr = QUANT_BLOCK // 2
    block = tl.arange(0, BLOCKS)
    block_inside = first + block * QUANT_BLOCK < K
    block_index = (row * K + first) // QUANT_BLOCK + block
    if NESTED_BLOCK > 0:
        coded = tl.load(absmax_ptr + block_index, mask=block_inside, other=0)
        scale = tl.load(absmax_code_ptr + coded.to(tl.int32), mask=block_inside, other=0.0)
        scale *= tl.load(absmax2_ptr + block_index // NESTED_BLOCK, mask=block_inside, other=0.0)
        scale += tl.load(offset_ptr)
    else:
        scale = tl.load(absmax_ptr + block_index, mask=block_inside, other=0.0)
    byte = block[:, None] * HALF + tl.arange(0, HALF)[None, :]
    inside = block_inside[:, None] & (byte >= 0)
    packed = tl.load(packed_ptr + (row * K + first) // 2 + byte, mask=inside, other=0).to(tl.int32)
    high = (tl.load(code_ptr + (packed >> 4)) * scale[:, None]).to(STORED)
    low = (tl.load(code_ptr + (packed & 15)) * scale[:, None]).to(STORED)
    both = tl.interleave(high, low)
    if SCALED:  # to e4m3
        both = tl.div_rn(both.to(tl.float32), tl.load(scale_ptr))
    both = both.to(out_ptr.dtype.element_ty)
    col = block[:, None] * QUANT_BLOCK + tl.arange(0, QUANT_BLOCK)[None, :]
    tl.store(out_ptr + row * out_stride + first + col, both, mask=block_inside[:, None] & (col >= 0))
    if tl.program_id(1) == 0:
        rank = tl.arange(0, R_BLOCK)
        beside = tl.zeros((R_BLOCK,), out_ptr.dtype.element_ty)
        if BESIDE:
            beside = tl.load(beside_ptr + row * R + rank, mask=rank < R, other=0.0)
        tl.store(out_ptr + row * out_stride + K + rank, beside, mask=rank < R)


@triton.jit
def quantize_row(x_ptr, out_ptr, scale_ptr, x_stride, K, BLOCK: tl.constexpr):
    """A row to e4m3, divided by its scale, which its largest number decides."""
    row = tl.program_id(0).to(tl.int64)
    largest = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, K, BLOCK):
        cols = first + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * x_stride + cols, mask=cols < K, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(x))
    scale = tl.maximum(tl.div_rn(tl.max(largest, 0), 448.0), 1.1754943508222875e-38)
    tl.store(scale_ptr + row, scale)
    for first in range(0, K, BLOCK):
        cols = first + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * x_stride + cols, mask=cols < K, other=0.0).to(tl.float32)
        tl.store(out_ptr + row * K + cols, tl.div_rn(x, scale).to(out_ptr.dtype.element_ty), mask=cols < K)


@triton.jit
def log_sum_exp(logits_ptr, target_ptr, lse_ptr, logps_ptr, V: tl.constexpr, BLOCK: tl.constexpr):
    """Of each row of logits, and the log-prob of its target."""
    row = tl.program_id(0).to(tl.int64)
    logits = logits_ptr + row * V
    largest = -float("inf")
    total = 0.0
    for first in range(0, V, BLOCK):
        cols = first + tl.arange(0, BLOCK)
        x = tl.load(logits + cols, mask=cols < V, other=-float("inf")).to(tl.float32)
        new = tl.maximum(largest, tl.max(x, 0))
        total = total * tl.exp(largest - new) + tl.sum(tl.exp(x - new), 0)
        largest = new
    lse = largest + tl.log(total)
    target = tl.load(target_ptr + row)
    tl.store(lse_ptr + row, lse)
    tl.store(logps_ptr + row, tl.load(logits + target).to(tl.float32) - lse)


@triton.jit
def logp_grad(logits_ptr, target_ptr, lse_ptr, V, BLOCK: tl.constexpr):
    """In place: logits become d logp(target) / d logits = onehot - softmax."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = logits_ptr + row * V + cols
    x = tl.load(place, mask=cols < V, other=0.0).to(tl.float32)
    prob = tl.exp(x - tl.load(lse_ptr + row))
    grad = tl.where(cols == tl.load(target_ptr + row), 1.0, 0.0) - prob
    tl.store(place, grad.to(logits_ptr.dtype.element_ty), mask=cols < V)
