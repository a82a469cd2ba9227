"""`varlen_attn` written out, for machines without a GPU."""

import torch
from torch import Tensor


def emulated_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """What `varlen_attn` computes: softmax attention per segment, the window counted from the bottom-right corner.

    q is (T_q, H, D); k and v are (T_k, G, D), each of the G heads shared by H / G query heads. In a segment with n
    queries and m keys, query i stands at key i + m - n and sees `left` keys before and `right` keys after it; -1 is no
    limit. It refuses what the kernel refuses.
    """
    assert q.is_contiguous() and q.shape[2] == k.shape[2] == v.shape[2] and q.shape[1] % k.shape[1] == 0
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert max_q == cu_seq_q.diff().max() and max_k == cu_seq_k.diff().max()
    groups, scale, (left, right) = q.shape[1] // k.shape[1], scale or q.shape[2] ** -0.5, window_size
    out = []
    for start, end, k_start, k_end in zip(cu_seq_q[:-1], cu_seq_q[1:], cu_seq_k[:-1], cu_seq_k[1:], strict=True):
        keys, values = k[k_start:k_end], v[k_start:k_end]
        n, m = int(end - start), int(k_end - k_start)
        for i in range(n):
            at = i + m - n
            first = 0 if left < 0 else max(0, at - left)
            last = m if right < 0 else min(m, at + right + 1)
            heads = []
            for h in range(q.shape[1]):
                scores = keys[first:last, h // groups] @ q[start + i, h] * scale
                heads.append(scores.softmax(0) @ values[first:last, h // groups])
            out.append(torch.stack(heads))
    return torch.stack(out)
