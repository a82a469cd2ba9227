"""Attention over the packed layout as Triton kernels: what `attention.py` runs.

FlashAttention's algorithm (Dao et al. 2022, 2023): scores are made block by block and never stored, the backward pass
makes them again from the logarithms of their sums. Three things are particular to the layout.

A tile's rows are the tokens of one segment times the query heads that share a key head: row r is token r // GROUP and
head r % GROUP. So tiles are few tokens high, which suits short completions and wastes little on the diagonal, keys are
read once for all heads, and the gradients to keys add up those heads without atomic operations.

The keys that a tile sees are one range with at most one gap in it: [prompt | other completions | own tokens]. They
are counted without the gap. Counted with it, from the prompt's first token on, key <= query is the whole mask: all of
a prompt stands before its completions. The hot loop covers blocks that every row sees whole and has no mask.

The queries that see a tile of a prompt are all later rows of the sample, those that see a tile of a completion its own
later rows. Either is one range without gaps, and key <= query the whole mask again.

Rows beyond a tile's end repeat the last one and are not stored.

Every output is written by one program in a fixed order: results are the same in every run.

Names: a token's place is counted from the first key of the tile's range ("place") or in the packed row ("start",
"end"); scores and `lse` are in units of log 2; HEAD is the head size, WIDTH the power of 2 that holds it.
"""

import triton
import triton.language as tl

# Differ from batch to batch, also in what they are multiples of: no reason to compile again.
_CHANGING = ["T", "tiles_ptr"]


@triton.jit
def _rows(start, end, ROWS: tl.constexpr, GROUP: tl.constexpr):
    """Token and head of each row of a tile that begins at token `start`, and whether it is one of its own."""
    row = tl.arange(0, ROWS)
    token = start + tl.minimum(row // GROUP, ROWS // GROUP - 1)
    inside = (row < ROWS // GROUP * GROUP) & (token < end)
    return tl.minimum(token, end - 1), row % GROUP, inside


@triton.jit
def _load(pointers, inside, HEAD: tl.constexpr, WIDTH: tl.constexpr, MASK: tl.constexpr):
    """A block of vectors; zeros for rows not `inside` (if MASK) and beyond the head's size."""
    if HEAD < WIDTH:
        whole = tl.arange(0, WIDTH)[None, :] < HEAD
        return tl.load(pointers, mask=(whole & inside[:, None]) if MASK else whole, other=0.0)
    if MASK:
        return tl.load(pointers, mask=inside[:, None], other=0.0)
    return tl.load(pointers)


@triton.jit
def _store(pointers, x, inside, HEAD: tl.constexpr, WIDTH: tl.constexpr):
    col = tl.arange(0, WIDTH)[None, :]
    tl.store(pointers, x.to(pointers.dtype.element_ty), mask=inside[:, None] & (col < HEAD))


@triton.jit
def _key_places(first, before_gap, gap, KEYS: tl.constexpr, GAP: tl.constexpr):
    """Of the block of keys that begins with the `first`, counted without the gap."""
    count = first + tl.arange(0, KEYS)
    return count + tl.where(count >= before_gap, gap, 0) if GAP else count


@triton.jit
def _hot_end(start, base, before_gap, gap, KEYS: tl.constexpr, HOT: tl.constexpr):
    """Where the blocks without mask end. HOT 0: there are none. 1: before the gap. 2: before the tile's own tokens."""
    seen = before_gap if HOT == 1 else start - base - gap
    return seen // KEYS * KEYS if HOT > 0 else 0


# ---- Forward --------------------------------------------------------------------------------------------------------


@triton.jit
def _attend_blocks(
    acc, largest, total, q, place, k_ptr, v_ptr, k_stride, v_stride, scale, first, last, before_gap, gap, end,
    HEAD: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr, GAP: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Online softmax over the keys first..last."""
    col = tl.arange(0, WIDTH)[None, :]
    for block in range(first, last, KEYS):
        key = _key_places(block, before_gap, gap, KEYS, GAP)
        k = _load(k_ptr + key[:, None] * k_stride + col, key < end, HEAD, WIDTH, MASK)
        scores = tl.dot(q, tl.trans(k))
        if MASK:
            scores = tl.where(key[None, :] <= place[:, None], scores, -float("inf"))
        new = tl.maximum(largest, tl.max(scores, 1) * scale)
        p = tl.exp2(scores * scale - new[:, None])
        shrink = tl.exp2(largest - new)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None]
        v = _load(v_ptr + key[:, None] * v_stride + col, key < end, HEAD, WIDTH, MASK)
        acc = tl.dot(p.to(v.dtype), v, acc)
        largest = new
    return acc, largest, total


@triton.jit(do_not_specialize=_CHANGING)
def attend(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, tiles_ptr, T, q_stride, q_head, k_stride, k_head, v_stride, v_head,
    out_stride, scale, GROUP: tl.constexpr, HEAD: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, HOT: tl.constexpr,
):  # fmt: skip
    """One tile of queries for one key head. Every row sees the first key, so no sum is empty."""
    group = tl.program_id(0)
    tile = tiles_ptr + tl.program_id(1) * 5
    start, end, base = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    before_gap, gap = tl.load(tile + 3), tl.load(tile + 4)
    token, head, inside = _rows(start, end, ROWS, GROUP)
    col = tl.arange(0, WIDTH)[None, :]
    q_ptr += start.to(tl.int64) * q_stride + group * GROUP * q_head
    k_ptr += base.to(tl.int64) * k_stride + group * k_head
    v_ptr += base.to(tl.int64) * v_stride + group * v_head
    out_ptr += start.to(tl.int64) * out_stride + group * GROUP * HEAD
    q = _load(q_ptr + ((token - start) * q_stride + head * q_head)[:, None] + col, inside, HEAD, WIDTH, False)
    acc = tl.zeros((ROWS, WIDTH), tl.float32)
    largest = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    hot = _hot_end(start, base, before_gap, gap, KEYS, HOT)
    if HOT > 0:
        acc, largest, total = _attend_blocks(
            acc, largest, total, q, token - base, k_ptr, v_ptr, k_stride, v_stride, scale, 0, hot, before_gap, gap,
            end - base, HEAD, WIDTH, KEYS, HOT == 2, False,
        )  # fmt: skip
    acc, largest, total = _attend_blocks(
        acc, largest, total, q, token - base, k_ptr, v_ptr, k_stride, v_stride, scale, hot, end - base - gap,
        before_gap, gap, end - base, HEAD, WIDTH, KEYS, True, True,
    )  # fmt: skip
    out = out_ptr + ((token - start) * out_stride + head * HEAD)[:, None] + col
    _store(out, acc / total[:, None], inside, HEAD, WIDTH)
    tl.store(lse_ptr + (group * T + token) * GROUP + head, largest + tl.log2(total), mask=inside)


# ---- Gradient to the queries ----------------------------------------------------------------------------------------


@triton.jit
def _grad_q_blocks(
    grad_q, q, grad, lse, delta, place, k_ptr, v_ptr, k_stride, v_stride, scale, first, last, before_gap, gap, end,
    HEAD: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr, GAP: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    col = tl.arange(0, WIDTH)[None, :]
    for block in range(first, last, KEYS):
        key = _key_places(block, before_gap, gap, KEYS, GAP)
        k = _load(k_ptr + key[:, None] * k_stride + col, key < end, HEAD, WIDTH, MASK)
        v = _load(v_ptr + key[:, None] * v_stride + col, key < end, HEAD, WIDTH, MASK)
        p = tl.exp2(tl.dot(q, tl.trans(k)) * scale - lse[:, None])
        if MASK:
            p = tl.where(key[None, :] <= place[:, None], p, 0.0)
        grad_scores = p * (tl.dot(grad, tl.trans(v)) - delta[:, None])
        grad_q = tl.dot(grad_scores.to(k.dtype), k, grad_q)
    return grad_q


@triton.jit(do_not_specialize=_CHANGING)
def grad_queries(
    q_ptr, k_ptr, v_ptr, out_ptr, grad_ptr, lse_ptr, delta_ptr, grad_q_ptr, tiles_ptr, T, q_stride, q_head, k_stride,
    k_head, v_stride, v_head, out_stride, grad_q_stride, grad_q_head, scale, score_scale, GROUP: tl.constexpr,
    HEAD: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, HOT: tl.constexpr,
):  # fmt: skip
    """One tile of queries for one key head. Also stores delta = sum(out * grad), which `grad_keys` needs."""
    group = tl.program_id(0)
    tile = tiles_ptr + tl.program_id(1) * 5
    start, end, base = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    before_gap, gap = tl.load(tile + 3), tl.load(tile + 4)
    token, head, inside = _rows(start, end, ROWS, GROUP)
    col = tl.arange(0, WIDTH)[None, :]
    q_ptr += start.to(tl.int64) * q_stride + group * GROUP * q_head
    k_ptr += base.to(tl.int64) * k_stride + group * k_head
    v_ptr += base.to(tl.int64) * v_stride + group * v_head
    q = _load(q_ptr + ((token - start) * q_stride + head * q_head)[:, None] + col, inside, HEAD, WIDTH, False)
    first = start.to(tl.int64) * out_stride + group * GROUP * HEAD
    place = ((token - start) * out_stride + head * HEAD)[:, None] + col
    grad = _load(grad_ptr + first + place, inside, HEAD, WIDTH, False)
    out = _load(out_ptr + first + place, inside, HEAD, WIDTH, False)
    row = (group * T + token) * GROUP + head
    lse = tl.load(lse_ptr + row)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    tl.store(delta_ptr + row, delta, mask=inside)
    grad_q = tl.zeros((ROWS, WIDTH), tl.float32)
    hot = _hot_end(start, base, before_gap, gap, KEYS, HOT)
    if HOT > 0:
        grad_q = _grad_q_blocks(
            grad_q, q, grad, lse, delta, token - base, k_ptr, v_ptr, k_stride, v_stride, score_scale, 0, hot,
            before_gap, gap, end - base, HEAD, WIDTH, KEYS, HOT == 2, False,
        )  # fmt: skip
    grad_q = _grad_q_blocks(
        grad_q, q, grad, lse, delta, token - base, k_ptr, v_ptr, k_stride, v_stride, score_scale, hot,
        end - base - gap, before_gap, gap, end - base, HEAD, WIDTH, KEYS, True, True,
    )  # fmt: skip
    grad_q_ptr += start.to(tl.int64) * grad_q_stride + group * GROUP * grad_q_head
    place = ((token - start) * grad_q_stride + head * grad_q_head)[:, None] + col
    _store(grad_q_ptr + place, grad_q * scale, inside, HEAD, WIDTH)


# ---- Gradients to keys and values -----------------------------------------------------------------------------------


@triton.jit
def _grad_kv_blocks(
    grad_k, grad_v, k, v, key, q_ptr, grad_ptr, lse_ptr, delta_ptr, q_stride, q_head, out_stride, scale, first, last,
    end, GROUP: tl.constexpr, HEAD: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Adds what the query tokens first..last give. Scores are transposed here: keys down, queries across."""
    TOKENS: tl.constexpr = ROWS // GROUP
    col = tl.arange(0, WIDTH)[None, :]
    row = tl.arange(0, ROWS)
    token = row // GROUP
    head = row % GROUP
    for block in range(first, last, TOKENS):
        inside = (row < TOKENS * GROUP) & (block + token < end)
        q_block = q_ptr + block * q_stride
        grad_block = grad_ptr + block * out_stride
        q = _load(q_block + (token * q_stride + head * q_head)[:, None] + col, inside, HEAD, WIDTH, True)
        # An infinite sum makes the probabilities of rows that don't exist zero.
        lse = tl.load(lse_ptr + block * GROUP + row, mask=inside, other=float("inf"))
        p = tl.exp2(tl.dot(k, tl.trans(q)) * scale - lse[None, :])
        if MASK:
            p = tl.where(key[:, None] <= (block + token)[None, :], p, 0.0)
        grad = _load(grad_block + (token * out_stride + head * HEAD)[:, None] + col, inside, HEAD, WIDTH, True)
        grad_v = tl.dot(p.to(grad.dtype), grad, grad_v)
        delta = tl.load(delta_ptr + block * GROUP + row, mask=inside, other=0.0)
        grad_scores = p * (tl.dot(v, tl.trans(grad)) - delta[None, :])
        grad_k = tl.dot(grad_scores.to(q.dtype), q, grad_k)
    return grad_k, grad_v


@triton.jit(do_not_specialize=_CHANGING)
def grad_keys(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, grad_k_ptr, grad_v_ptr, tiles_ptr, T, q_stride, q_head,
    k_stride, k_head, v_stride, v_head, out_stride, grad_k_stride, grad_k_head, grad_v_stride, grad_v_head, scale,
    score_scale, GROUP: tl.constexpr, HEAD: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, HOT: tl.constexpr,
):  # fmt: skip
    """One tile of keys and values of one key head. Places are counted from the tile's first key."""
    TOKENS: tl.constexpr = ROWS // GROUP
    group = tl.program_id(0)
    tile = tiles_ptr + tl.program_id(1) * 3
    start, end, queries_end = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    first = start.to(tl.int64)
    key = tl.arange(0, KEYS)
    inside = key < end - start
    read = tl.minimum(key, end - start - 1)[:, None]
    col = tl.arange(0, WIDTH)[None, :]
    k = _load(k_ptr + first * k_stride + group * k_head + read * k_stride + col, inside, HEAD, WIDTH, False)
    v = _load(v_ptr + first * v_stride + group * v_head + read * v_stride + col, inside, HEAD, WIDTH, False)
    q_ptr += first * q_stride + group * GROUP * q_head
    grad_ptr += first * out_stride + group * GROUP * HEAD
    lse_ptr += (group * T + start) * GROUP
    delta_ptr += (group * T + start) * GROUP
    grad_k = tl.zeros((KEYS, WIDTH), tl.float32)
    grad_v = tl.zeros((KEYS, WIDTH), tl.float32)
    last = queries_end - start
    # Later tokens than the tile's own see all of it.
    masked = tl.minimum((end - start + TOKENS - 1) // TOKENS * TOKENS, last) if HOT > 0 else last
    grad_k, grad_v = _grad_kv_blocks(
        grad_k, grad_v, k, v, key, q_ptr, grad_ptr, lse_ptr, delta_ptr, q_stride, q_head, out_stride, score_scale, 0,
        masked, last, GROUP, HEAD, WIDTH, ROWS, True,
    )  # fmt: skip
    if HOT > 0:
        grad_k, grad_v = _grad_kv_blocks(
            grad_k, grad_v, k, v, key, q_ptr, grad_ptr, lse_ptr, delta_ptr, q_stride, q_head, out_stride, score_scale,
            masked, last, last, GROUP, HEAD, WIDTH, ROWS, False,
        )  # fmt: skip
    place = key[:, None]
    grad_k_ptr += first * grad_k_stride + group * grad_k_head
    grad_v_ptr += first * grad_v_stride + group * grad_v_head
    _store(grad_k_ptr + place * grad_k_stride + col, grad_k * scale, inside, HEAD, WIDTH)
    _store(grad_v_ptr + place * grad_v_stride + col, grad_v, inside, HEAD, WIDTH)
