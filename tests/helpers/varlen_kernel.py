"""`varlen_attn` written out, for machines without a GPU."""

from typing import Any

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


class Flash(torch.autograd.Function):
    """The same, computed and differentiated as kernels do it: they keep q, k, v, the output and a log-sum-exp."""

    calls = 0

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bounds: tuple[Tensor, Tensor], scale: float) -> Tensor:
        Flash.calls += 1
        scores_HTS = Flash.scores(q, k, bounds, scale)
        lse_HT = scores_HTS.logsumexp(2)
        weights_HTS = (scores_HTS - lse_HT[..., None]).exp()
        out = torch.einsum("hts,shd->thd", weights_HTS, v.repeat_interleave(q.shape[1] // v.shape[1], 1)).contiguous()
        ctx.save_for_backward(q, k, v, out, lse_HT.float())
        ctx.bounds, ctx.scale = bounds, scale
        return out

    @staticmethod
    def scores(q: Tensor, k: Tensor, bounds: tuple[Tensor, Tensor], scale: float) -> Tensor:
        seen_TS = torch.zeros(len(q), len(k), dtype=torch.bool)
        for (start, end), (k_start, k_end) in zip(*(x.unfold(0, 2, 1).tolist() for x in bounds), strict=True):
            n, m = end - start, k_end - k_start
            seen_TS[start:end, k_start:k_end] = torch.ones(n, m, dtype=torch.bool).tril(m - n)
        scores_HTS = scale * torch.einsum("thd,shd->hts", q, k.repeat_interleave(q.shape[1] // k.shape[1], 1))
        return scores_HTS.masked_fill(~seen_TS, -torch.inf)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (q, k, v, out, lse_HT), grad = ctx.saved_tensors, grad_outputs[0]
        group = q.shape[1] // k.shape[1]
        weights_HTS = (Flash.scores(q, k, ctx.bounds, ctx.scale) - lse_HT.to(q.dtype)[..., None]).exp()
        keys, values = (x.repeat_interleave(group, 1) for x in (k, v))
        delta_HT1 = (grad * out).sum(2).T[..., None]
        of_scores = weights_HTS * (torch.einsum("thd,shd->hts", grad, values) - delta_HT1) * ctx.scale
        of_keys, of_values = (
            torch.einsum("hts,thd->shd", x, y).unflatten(1, (-1, group)).sum(2)
            for x, y in ((of_scores, q), (weights_HTS, grad))
        )
        return torch.einsum("hts,shd->thd", of_scores, keys), of_keys, of_values, None, None


def flash_kernel(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, *longest: int, scale: float | None, window_size: Any
) -> Tensor:
    """`emulated_kernel` without windows, as `Flash`."""
    assert window_size == (-1, 0)
    return Flash.apply(q, k, v, (cu_q, cu_k), scale or q.shape[2] ** -0.5)
