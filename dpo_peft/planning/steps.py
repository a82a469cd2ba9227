"""How to run an optimizer step within a GPU's memory.

`plan_step` cuts it into micro-batches that fit, by the predictions of `memory.py`. `dpo-peft plan` and the trainer use
the same code.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from ..distributed import longest_first
from ..training.throughput import computed_once
from .memory import GIB, RESERVE, MemoryModel
from .shapes import PRESETS, Lora, Shape

__all__ = ["GIB", "PRESETS", "RESERVE", "Lora", "MemoryModel", "MicroBatch", "Shape", "StepPlan", "plan_step"]

RECOMPUTED = 0.73  # of a checkpointed layer's products that its backward repeats: all but the last
ATTENTION_RATE = 0.5  # of the rate of large products, what attention reaches; on an H100 0.64 packed, 0.37 gathered
# What a pass over the weights costs beside its tokens' work, in tokens, and below which number of tokens it gets no
# shorter, since launching its kernels takes as long. From an 8B shape on an H100: weights are dequantized in 6 ms.
PASS_TOKENS, LEAST_TOKENS = 400, 4000
LAUNCH_SECONDS = 3.5e-3  # the same for a layer: as long as 4,000 tokens there


class MicroBatch(NamedTuple):
    """Some samples of an optimizer step, by their indices, and how they are run."""

    samples: tuple[int, ...]
    tokens: int
    keys: int
    predicted: int
    given: int  # tokens that an answer-only adapter leaves to the base
    checkpoint_layers: int
    attended: int  # of these, how many keep what attention gave
    repeated: float  # what the backward pass computes again, in tokens of a forward pass
    peak: float  # bytes


class StepPlan(NamedTuple):
    """An optimizer step as micro-batches, the largest first."""

    micro_batches: tuple[MicroBatch, ...]
    cost: float  # what the plan adds to the samples' own work, in tokens of a forward pass
    fits: bool  # whether every micro-batch is within the limit; one that isn't holds a single sample
    waiting: float = 0  # what of the cost is waiting for layers

    @property
    def max_tokens(self) -> int:
        """Tokens of the largest micro-batch."""
        return max((batch.tokens for batch in self.micro_batches), default=0)


class Pace(NamedTuple):
    """How fast a GPU computes, and how fast layers come to it that are not there."""

    flops: float  # floating-point operations in a second, of large products
    bandwidth: float  # bytes in a second

    def copy_tokens(self, model: MemoryModel) -> float:
        """Returns how long all layers take that come in one pass, in tokens of a forward pass."""
        of_others = 1 - 1 / model.shards if model.shards > 1 else 1
        return of_others * sum(model.placed) / self.bandwidth * self.flops / model.token_flops

    def least_tokens(self, model: MemoryModel) -> float:
        """Returns below which number of tokens a pass gets no shorter."""
        return LAUNCH_SECONDS * model.layers * self.flops / model.token_flops

    def seconds(self, plan: "StepPlan", model: MemoryModel, reference_passes: int) -> float:
        """Returns how long a step takes: the decoder's passes as `plan` counts them, and the head's three products."""
        sums = (sum(getattr(one, name) for one in plan.micro_batches) for name in ("tokens", "predicted", "given"))
        (tokens, predicted, given), passes = sums, 2 + reference_passes
        once = computed_once(tokens, given, model.first / model.layers) if model.fused else 0
        head = 2 * passes * predicted * model.shape.vocab * model.shape.hidden
        return ((passes * (tokens - once) + once + plan.cost) * model.token_flops + head) / self.flops


def copies_of(model: MemoryModel, forward_passes: int) -> int:
    """Returns how often layers come for the forward passes: fused ones serve policy and reference side by side."""
    return 1 if model.fused else forward_passes


def hiding_tokens(copy_tokens: float, checkpointed: float, passes: int, copies: int) -> float:
    """Returns from how many tokens of a micro-batch on no pass waits for its layers.

    Args:
        copy_tokens: see `plan_step`.
        checkpointed: the share of layers that are checkpointed.
        passes, copies: forward passes, and how often layers come for them.
    """
    backward = 1 + RECOMPUTED * (checkpointed == 1)
    return max(copy_tokens / min(passes / copies, backward) - PASS_TOKENS, 0.0)


def layers_to_stream(
    model: MemoryModel, limit: float, pace: Pace, row: int | None, step_tokens: float, reference_passes: int = 1
) -> int:
    """Returns the fewest layers to stream so that, with all of them checkpointed, there is room for what trains well.

    That is the longest row, and a micro-batch whose passes are neither too small for the GPU nor wait for copies.

    Args:
        model: predicts the memory; what it says of layers that come and go is not read.
        limit: bytes that tensors may take.
        pace: of the GPU.
        row: tokens of the longest row, prompt + completion; None: there is no limit.
        step_tokens: of a step; no micro-batch needs more room.
        reference_passes: as for `plan_step`.

    Returns:
        The number; all layers if fewer don't do.
    """
    layers, passes = model.layers, 1 + reference_passes

    def has_room(number: int) -> bool:
        some = replace(model, streamed=number, shards=1)
        if row is not None and some.longest_row(limit, layers) < row:
            return False
        hidden = hiding_tokens(pace.copy_tokens(some), 1, passes, copies_of(model, passes))
        wanted = max(hidden, pace.least_tokens(some) - PASS_TOKENS)
        return some.largest_tokens(limit, layers) >= min(wanted, step_tokens)

    return next(filter(has_room, range(layers)), layers)


def checkpoints_for(
    model: MemoryModel, tokens: float, keys: float, predicted: float, limit: float, given: float = 0, scores: float = 0
) -> tuple[int, int]:
    """Returns how many layers to checkpoint within `limit` bytes, and how many of them keep what attention gave: the
    choice that computes least twice. `scores` are pairs of a query and a key that it sees, without those of `given`
    tokens."""
    size, first, own = (tokens, keys, predicted), model.first, tokens - given
    fewest = model.checkpoint_layers_for(*size, limit, given)
    if not (scores and model.fused and isinstance(model.shape, Shape)) or fewest <= first:
        return fewest, 0
    each = model.layer.attended(own)

    def choice(layers: int) -> tuple[int, int]:
        room = max(limit - model.peak(*size, layers, given), 0)
        return layers, min(int(room // each), layers - first)

    # Memory and work grow straight with layers: best are the fewest, or about the first number of which all keep it.
    all_keep = bisect_left(range(model.layers), True, key=lambda n: choice(n)[1] == n - first, lo=fewest)
    tried = map(choice, (fewest, max(all_keep - 1, fewest), all_keep))
    return min(tried, key=lambda one: repeated(model, own, scores, *one))


def repeated(model: MemoryModel, tokens: float, scores: float, checkpointed: int, attended: int) -> float:
    """Returns what a backward pass computes again, in tokens of a forward pass; arguments as of `checkpoints_for`."""
    layers, found = max(checkpointed - model.first, 0), 0.0
    if scores and isinstance(model.shape, Shape):
        weights = sum(linear.weights for linear in model.shape.linears)
        found = (layers - attended) * 2 * scores * model.shape.q / ATTENTION_RATE / weights
    return (RECOMPUTED * layers * tokens + found) / model.layers


def plan_step(
    samples: Sequence[tuple[float, ...]],
    model: MemoryModel,
    limit: float,
    *,
    max_tokens: int | None = None,
    reference_passes: int = 1,
    pass_tokens: float = PASS_TOKENS,
    least_tokens: float = LEAST_TOKENS,
    copy_tokens: float = 0,
    forward_copies: int | None = None,
) -> StepPlan:
    """Finds the cheapest way to run an optimizer step within memory.

    Few large micro-batches pass over the weights less often; small ones need fewer layers checkpointed. Numbers of
    micro-batches are tried from 1 on, with the samples spread evenly by tokens.

    Args:
        samples: T, S and P of each, which add up (prompts are shared); and, if known, the tokens that an answer-only
            adapter leaves to the base, and the pairs of a query and a key that attention scores.
        model: predicts the memory.
        limit: bytes that tensors may take.
        max_tokens: of a micro-batch, beside the limit. A larger sample stands alone.
        reference_passes: forward passes of the reference per micro-batch: 0 without one, or with its values cached.
        pass_tokens: what a pass over the weights costs beside its tokens' work, in tokens of a forward pass.
        least_tokens: below which a pass gets no shorter.
        copy_tokens: how long all layers take that come in one pass, in tokens of a forward pass: they come beside the
            work, and what takes longer counts.
        forward_copies: how often layers come for the forward passes; None: as `copies_of` says.

    Returns:
        Every sample in exactly one micro-batch. A sample that doesn't fit alone stands alone all the same.
    """
    most = math.inf if max_tokens is None else max_tokens
    tokens, passes = [sample[0] for sample in samples], 2 + reference_passes
    copies = forward_copies or copies_of(model, passes - 1)

    def micro_batch(indices: Sequence[int]) -> MicroBatch:
        T, S, P, *more = (sum(sizes) for sizes in zip(*(samples[i] for i in indices), strict=True))
        given, scores = (*more, 0, 0)[:2] if model.fused else (0, 0)
        layers, attended = checkpoints_for(model, T, S, P, limit, given, scores)
        peak = model.peak(T, S, P, layers, given, attended)
        again = repeated(model, T - given, scores, layers, attended)
        return MicroBatch(tuple(sorted(indices)), T, S, P, given, layers, attended, again, peak)

    def fits(batch: MicroBatch) -> bool:
        return batch.peak <= limit and batch.tokens <= most

    def cost(batch: MicroBatch) -> float:
        # Passes over the weights, and recomputation, beyond the samples' own work; in tokens of a forward pass.
        of_pass = max(batch.tokens + pass_tokens, least_tokens)
        return (passes + batch.repeated / batch.tokens) * of_pass - passes * batch.tokens + waiting(batch)

    def waiting(batch: MicroBatch) -> float:
        of_pass, share = max(batch.tokens + pass_tokens, least_tokens), batch.checkpoint_layers / model.layers
        forward = copies * max(copy_tokens - (passes - 1) / copies * of_pass, 0)
        recomputed = share * max(copy_tokens - (1 + RECOMPUTED) * of_pass, 0)
        return forward + recomputed + (1 - share) * max(copy_tokens - of_pass, 0)

    single = [micro_batch([i]) for i in range(len(samples))]
    alone = [batch for batch in single if not fits(batch)]
    rest = sorted((i for i, batch in enumerate(single) if fits(batch)), key=lambda i: (-tokens[i], i))
    best: list[MicroBatch] = []
    best_cost = math.inf
    for number in range(1, len(rest) + 1):
        if number * passes * pass_tokens >= best_cost:
            break  # more micro-batches cost more than what is known
        tried = []
        # The largest first: what doesn't fit shows at once.
        for one in sorted(longest_first(rest, tokens, number), key=lambda one: -sum(tokens[i] for i in one)):
            tried.append(micro_batch(one))
            if not fits(tried[-1]):
                break
        else:
            if (costs := sum(map(cost, tried))) < best_cost:
                best, best_cost = tried, costs
    batches = sorted(alone + best, key=lambda batch: (-batch.tokens, batch.samples))
    within = all(batch.peak <= limit for batch in batches)
    return StepPlan(tuple(batches), sum(map(cost, batches)), within, sum(map(waiting, batches)))
