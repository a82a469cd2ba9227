"""How to run an optimizer step within a GPU's memory.

`plan_step` cuts it into micro-batches that fit, by the predictions of `memory.py`. `dpo-peft plan` and the trainer use
the same code.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from ..distributed import longest_first
from .memory import GIB, RESERVE, MemoryModel
from .shapes import PRESETS, Lora, Shape

__all__ = ["GIB", "PRESETS", "RESERVE", "Lora", "MemoryModel", "MicroBatch", "Shape", "StepPlan", "plan_step"]

RECOMPUTED = 0.73  # of a checkpointed layer's forward pass that its backward repeats: all but the last product
# What a pass over the weights costs beside its tokens' work, in tokens, and below which number of tokens it gets no
# shorter, since launching its kernels takes as long. From an 8B shape on an H100: weights are dequantized in 6 ms.
PASS_TOKENS, LEAST_TOKENS = 400, 4000


class MicroBatch(NamedTuple):
    """Some samples of an optimizer step, by their indices, and how they are run."""

    samples: tuple[int, ...]
    tokens: int
    keys: int
    predicted: int
    checkpoint_layers: int
    peak: float  # bytes


class StepPlan(NamedTuple):
    """An optimizer step as micro-batches, the largest first."""

    micro_batches: tuple[MicroBatch, ...]
    cost: float  # what the plan adds to the samples' own work, in tokens of a forward pass
    fits: bool  # whether every micro-batch is within the limit; one that isn't holds a single sample

    @property
    def max_tokens(self) -> int:
        """Tokens of the largest micro-batch."""
        return max((batch.tokens for batch in self.micro_batches), default=0)


def plan_step(
    samples: Sequence[tuple[int, int, int]],
    model: MemoryModel,
    limit: float,
    *,
    max_tokens: int | None = None,
    reference_passes: int = 1,
    pass_tokens: float = PASS_TOKENS,
    least_tokens: float = LEAST_TOKENS,
) -> StepPlan:
    """Finds the cheapest way to run an optimizer step within memory.

    Few large micro-batches pass over the weights less often; small ones need fewer layers checkpointed. Numbers of
    micro-batches are tried from 1 on, with the samples spread evenly by tokens.

    Args:
        samples: T, S and P of each, which add up (prompts are shared).
        model: predicts the memory.
        limit: bytes that tensors may take.
        max_tokens: of a micro-batch, beside the limit. A larger sample stands alone.
        reference_passes: forward passes of the reference per micro-batch: 0 without one, or with its values cached.
        pass_tokens: what a pass over the weights costs beside its tokens' work, in tokens of a forward pass.
        least_tokens: below which a pass gets no shorter.

    Returns:
        Every sample in exactly one micro-batch. A sample that doesn't fit alone stands alone all the same.
    """
    most = math.inf if max_tokens is None else max_tokens
    tokens, passes = [sample[0] for sample in samples], 2 + reference_passes

    def micro_batch(indices: Sequence[int]) -> MicroBatch:
        T, S, P = (sum(samples[i][k] for i in indices) for k in range(3))
        layers = model.checkpoint_layers_for(T, S, P, limit)
        return MicroBatch(tuple(sorted(indices)), T, S, P, layers, model.peak(T, S, P, layers))

    def fits(batch: MicroBatch) -> bool:
        return batch.peak <= limit and batch.tokens <= most

    def cost(batch: MicroBatch) -> float:
        # Passes over the weights, and recomputation, beyond the samples' own work; in tokens of a forward pass.
        repeated = RECOMPUTED * batch.checkpoint_layers / model.layers
        return (passes + repeated) * max(batch.tokens + pass_tokens, least_tokens) - passes * batch.tokens

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
    return StepPlan(tuple(batches), sum(map(cost, batches)), all(batch.peak <= limit for batch in batches))
