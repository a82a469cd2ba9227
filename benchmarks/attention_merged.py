"""Attention over a packed batch in two calls of FlashAttention 2, without gathered keys.

Each segment attends to itself, and completions to their prompt's keys; the logarithms of the sums of exponentials say
how much each call counts. In the backward pass both get the merged output and sums, for the kernel's own function
ignores a gradient to the sums.

Shape suffixes: T tokens, H query heads, G key heads, D head size, P tokens of prompts that have completions, C tokens
of those completions.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpo_peft.forward.attention import AttentionPlan
from dpo_peft.forward.layout import PackedBatch


class Part(NamedTuple):
    """What one call covers: ranges of queries, each on one range of keys."""

    cu_q: Tensor  # int32 bounds
    cu_k: Tensor
    max_q: int
    max_k: int
    causal: bool


class Parts(NamedTuple):
    """Both calls for a batch."""

    own: Part
    on_prompts: Part
    completion_C: Tensor  # flat positions of the second call's queries
    prompt_P: Tensor  # and of its keys


class Calls(NamedTuple):
    """How a part is computed."""

    # q (T, H, D), k, v, part, scale -> out, lse (H, T): logarithms of the sums of exponentials
    forward: Callable[[Tensor, Tensor, Tensor, Part, float], tuple[Tensor, Tensor]]
    # grad of out, q, k, v, out, lse, part, scale -> grads of q, k, v; out and lse may cover more keys than the part's
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


def parts_of(batch: PackedBatch) -> Parts:
    """Two calls' bounds; all tensors on the batch's device."""
    assert batch.segments is not None and batch.cu_seq_q is not None
    length, context = np.array(batch.segments).T
    index, end = np.arange(len(length)), np.cumsum(length)
    completion = context != index
    prompt = np.unique(context[completion])
    answered = np.bincount(context[completion], weights=length[completion], minlength=len(length)).astype(int)[prompt]

    def to_device(values: np.ndarray, dtype: torch.dtype) -> Tensor:
        x = torch.from_numpy(values).to(dtype)
        device = batch.input_ids.device
        return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)

    def places(segments: np.ndarray) -> Tensor:
        ranges = [np.arange(end[s] - length[s], end[s]) for s in segments]
        return to_device(np.concatenate(ranges or [np.empty(0)]), torch.int64)

    def bounds(lengths: np.ndarray) -> Tensor:
        return to_device(np.append(0, np.cumsum(lengths)), torch.int32)

    own = Part(batch.cu_seq_q, batch.cu_seq_q, batch.max_q, batch.max_q, causal=True)
    most = (max(answered, default=0), max(length[prompt], default=0))
    on_prompts = Part(bounds(answered), bounds(length[prompt]), *map(int, most), causal=False)
    return Parts(own, on_prompts, places(index[completion]), places(prompt))


def merge(out_THD: Tensor, lse_HT: Tensor, more_THD: Tensor, more_HT: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys from that over each."""
    total_HT = torch.logaddexp(lse_HT, more_HT)
    share, more = ((x - total_HT).exp().T[..., None] for x in (lse_HT, more_HT))
    return (share * out_THD + more * more_THD).to(out_THD.dtype), total_HT


@cache
def _compiled_merge() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(merge, dynamic=True)


class Merged(torch.autograd.Function):
    """Both calls. With the merged output and sums, each one's backward finds the probabilities of the whole softmax:
    the gradients of the parts add up."""

    @staticmethod
    def forward(
        ctx: Any, q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, parts: Parts, calls: Calls, scale: float
    ) -> Tensor:
        out_THD, lse_HT = calls.forward(q_THD, k_TGD, v_TGD, parts.own, scale)
        C, P = parts.completion_C, parts.prompt_P
        if len(C):
            more = calls.forward(q_THD[C], k_TGD[P], v_TGD[P], parts.on_prompts, scale)
            merged_CHD, merged_HC = (_compiled_merge() if q_THD.is_cuda else merge)(out_THD[C], lse_HT[:, C], *more)
            out_THD.index_copy_(0, C, merged_CHD)
            lse_HT.index_copy_(1, C, merged_HC)
        ctx.save_for_backward(q_THD, k_TGD, v_TGD, out_THD, lse_HT)
        ctx.parts, ctx.calls, ctx.scale = parts, calls, scale
        return out_THD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        q_THD, k_TGD, v_TGD, out_THD, lse_HT = ctx.saved_tensors
        parts, backward, grad_THD = ctx.parts, ctx.calls.backward, grad_outputs[0].contiguous()
        C, P = parts.completion_C, parts.prompt_P
        grads = backward(grad_THD, q_THD, k_TGD, v_TGD, out_THD, lse_HT, parts.own, ctx.scale)
        if len(C):
            given = (grad_THD[C], q_THD[C], k_TGD[P], v_TGD[P], out_THD[C], lse_HT[:, C])
            more = backward(*given, parts.on_prompts, ctx.scale)
            for grad, rows, x in zip(grads, (C, P, P), more, strict=True):
                grad.index_copy_(0, rows, grad[rows] + x)
        return *grads, None, None, None


def _flash_options(part: Part, scale: float) -> dict[str, Any]:
    return {"scale": scale, "window_size_left": -1, "window_size_right": 0 if part.causal else -1}


def _flash_forward(q: Tensor, k: Tensor, v: Tensor, part: Part, scale: float) -> tuple[Tensor, Tensor]:
    given = (q, k, v, *part[:4], 0.0, part.causal, False)
    out, lse, *_ = torch.ops.aten._flash_attention_forward(*given, **_flash_options(part, scale))
    return out, lse


def _flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, part: Part, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)  # without dropout
    given = (grad, q, k, v, out, lse.contiguous(), *part[:4], 0.0, part.causal, *rng)
    return torch.ops.aten._flash_attention_backward(*given, **_flash_options(part, scale))


FLASH = Calls(_flash_forward, _flash_backward)


def attend_merged(
    plan: AttentionPlan, q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, scaling: float | None, window: None
) -> Tensor:
    parts = plan.once("parts", lambda: parts_of(plan.batch))
    q, k, v = (x.contiguous() for x in (q_THD, k_TGD, v_TGD))
    return Merged.apply(q, k, v, parts, FLASH, scaling or q.shape[2] ** -0.5)
