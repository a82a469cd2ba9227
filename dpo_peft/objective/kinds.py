"""What differs between the kinds of data that losses learn from: pairs, trajectories, lists and single completions.

One object each, `TrainingObjective.kind`: what a loss averages over, what it may read, and what of it is compared.

Shape suffixes: C completions, K of a sample, E samples, B pairs, M mismatched completions, I items (what a loss
averages over: pairs, lists, or single completions), P comparisons of two completions.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..forward import PackedBatch

_SIDES = ("chosen", "rejected")


class Totals(NamedTuple):
    """What is known of an optimizer batch before any forward pass: its split into micro-batches has no effect."""

    items: int
    mean_chosen_length: Tensor | float  # predicted tokens of the chosen completions, per pair


@dataclass(frozen=True)
class Scored:
    """All that a loss may read about the completions of a batch. Log-probs are float64 sums in nats."""

    logps_C: Tensor  # every predicted token counts once
    weighted_logps_C: Tensor  # the same with the objective's token weights (discounts, ld_alpha)
    ref_weighted_logps_C: Tensor | None  # under the reference; None if the objective needs none
    wpo_C: Tensor | None  # WPO's weight of each completion
    lengths_C: Tensor
    sample_of_C: Tensor
    grade_C: Tensor  # higher is better
    own_C: Tensor | None  # False for a completion to another prompt; None if there are none of these
    preference_E: Tensor | None
    margin_E: Tensor | None
    num_samples: int

    @property
    def log_ratios_C(self) -> Tensor:
        """Returns log(policy / reference), with the token weights."""
        assert self.ref_weighted_logps_C is not None
        return self.weighted_logps_C - self.ref_weighted_logps_C

    def to(self, device: torch.device | str) -> "Scored":
        """Returns a copy on `device` without its graph."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        moved: dict[str, Any] = {name: x.detach().to(device) for name, x in tensors.items()}
        return replace(self, **moved)

    @staticmethod
    def join(parts: "Sequence[Scored]") -> "Scored":
        """Returns the micro-batches of an optimizer step as one batch."""
        if any(part.own_C is not None for part in parts):  # a micro-batch of one row may have no mismatched completion
            own = [torch.ones_like(p.lengths_C, dtype=torch.bool) if p.own_C is None else p.own_C for p in parts]
            parts = [replace(part, own_C=own_C) for part, own_C in zip(parts, own, strict=True)]
        before = [0, *itertools.accumulate(part.num_samples for part in parts)]
        parts = [replace(p, sample_of_C=p.sample_of_C + n) for p, n in zip(parts, before, strict=False)]
        tensors = [name for name, value in vars(parts[0]).items() if isinstance(value, Tensor)]
        joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in tensors}
        return replace(parts[0], **joined, num_samples=before[-1])

    def own(self, x_C: Tensor) -> Tensor:
        """Returns `x_C` without the mismatched completions."""
        return x_C if self.own_C is None else x_C[self.own_C]

    def mismatched(self, x_C: Tensor) -> Tensor:
        """Returns `x_C` of the mismatched completions alone, (M,)."""
        return x_C[:0] if self.own_C is None else x_C[~self.own_C]


class Comparisons(NamedTuple):
    """Completions against each other, (P,) or (C, C), and which of them stand for the better and the worse, (C,)."""

    better_P: Tensor  # whether the first is known to be the better one
    margins_P: Tensor  # reward of the first minus that of the second
    longer_P: Tensor  # the same of their lengths
    best_C: Tensor  # nothing is better than these
    rest_C: Tensor  # something is better than these; what ties is neither


def _against_all(x_C: Tensor) -> Tensor:
    """Returns (C, C) the value of the row's completion minus that of the column's."""
    return x_C[:, None] - x_C


def _partner(x_C: Tensor) -> Tensor:
    """Returns of each completion of a pair the other one's value."""
    return x_C.view(-1, 2).flip(1).flatten()


class Kind:
    """What the losses of one kind of data average over and compare, and what of it is reported.

    Here: lists, one prompt with several graded completions.
    """

    paired = False  # two completions per sample: chosen at even, rejected at odd places
    across_rows = False  # completions of different rows are compared

    def totals(self, batches: Sequence[Mapping[str, Any]]) -> Totals:
        """Returns the totals of the micro-batches of one optimizer step, given as fields of `PackedBatch`."""
        return Totals(sum(len(batch["rows"]) for batch in batches), 1.0)

    def rows(self, batch: PackedBatch) -> Tensor:
        """Returns (I,) the dataset row of each item."""
        return batch.rows

    def items(self, scored: Scored) -> int:
        """Returns I, the number of items."""
        return scored.num_samples

    def items_of_samples(self, batch: PackedBatch) -> Tensor:
        """Returns (E,) the number of items of each sample, float64."""
        return torch.ones_like(batch.rows, dtype=torch.float64)

    def inputs(self, scored: Scored, scores_C: Tensor | None, logps_C: Tensor, totals: Totals) -> dict[str, Any]:
        """Returns every input that a loss may name.

        Args:
            scored: the completions.
            scores_C: their log-ratios, shaped as the loss wants them; None without a reference.
            logps_C: their log-probs, with the token weights if the loss wants them.
            totals: of the whole optimizer batch.
        """
        return {
            "scores_C": scores_C,
            "logps_C": logps_C,
            "lengths_C": scored.lengths_C,
            "grades_C": scored.grade_C,
            "sample_of_C": scored.sample_of_C,
            "num_samples": scored.num_samples,
        }

    def predictions_by_row(self, scored: Scored, rewards_C: Tensor, rows_E: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Returns what `compute_metrics` gets of each sample: (K,) implicit rewards, and (K, 2) grades and dataset
        row."""
        sample_of_C = scored.own(scored.sample_of_C)
        labels_C2 = torch.stack([scored.own(scored.grade_C), rows_E[sample_of_C].to(scored.grade_C.dtype)], dim=1)
        sizes = sample_of_C.bincount(minlength=scored.num_samples).tolist()
        return list(zip(scored.own(rewards_C).split(sizes), labels_C2.split(sizes), strict=True))

    def compare(self, scored: Scored, rewards_C: Tensor) -> Comparisons:
        """Compares each completion with each other one of its sample."""
        same_CC = scored.sample_of_C[:, None] == scored.sample_of_C
        better_CC = (_against_all(scored.grade_C) > 0) & same_CC
        rest_C = better_CC.any(0)
        margins_CC, longer_CC = _against_all(rewards_C), _against_all(scored.lengths_C)
        return Comparisons(better_CC, margins_CC, longer_CC, better_CC.any(1) & ~rest_C, rest_C)


class SingleKind(Kind):
    """Completions judged one by one, beside completions to other prompts if the loss reads those."""

    across_rows = True

    def totals(self, batches: Sequence[Mapping[str, Any]]) -> Totals:
        """As in `Kind`; an item is a completion."""
        return Totals(sum(batch["num_own"] for batch in batches), 1.0)

    def rows(self, batch: PackedBatch) -> Tensor:
        """As in `Kind`."""
        return batch.rows[batch.sample_of if batch.mismatched is None else batch.sample_of[~batch.mismatched]]

    def items(self, scored: Scored) -> int:
        """As in `Kind`."""
        return len(scored.own(scored.lengths_C))

    def items_of_samples(self, batch: PackedBatch) -> Tensor:
        """As in `Kind`."""
        own_C = torch.ones_like(batch.sample_of) if batch.mismatched is None else ~batch.mismatched
        zeros_E = torch.zeros_like(batch.rows, dtype=torch.float64)
        return zeros_E.index_add(0, batch.sample_of, own_C.double())

    def inputs(self, scored: Scored, scores_C: Tensor | None, logps_C: Tensor, totals: Totals) -> dict[str, Any]:
        """As in `Kind`."""
        found = {"logps_C": logps_C, "lengths_C": scored.lengths_C, "grades_C": scored.grade_C, "scores_C": scores_C}
        own = {name: x_C if x_C is None else scored.own(x_C) for name, x_C in found.items()}
        return {**own, "mismatched_scores_M": None if scores_C is None else scored.mismatched(scores_C).detach()}

    def compare(self, scored: Scored, rewards_C: Tensor) -> Comparisons:
        """Compares every good completion with every bad one, whatever their prompts; the best are the good ones."""
        good_C = scored.grade_C > 0
        own_C = torch.ones_like(good_C) if scored.own_C is None else scored.own_C
        better_CC = (_against_all(scored.grade_C) > 0) & own_C & own_C[:, None]
        margins_CC, longer_CC = _against_all(rewards_C), _against_all(scored.lengths_C)
        return Comparisons(better_CC, margins_CC, longer_CC, good_C & own_C, ~good_C & own_C)


class PairKind(Kind):
    """A chosen and a rejected completion of each prompt, or two whole conversations."""

    paired = True

    def totals(self, batches: Sequence[Mapping[str, Any]]) -> Totals:
        """As in `Kind`."""
        items = sum(len(batch["rows"]) for batch in batches)
        return Totals(items, sum(batch["lengths"][::2].sum() for batch in batches) / items if items else 1.0)

    def inputs(self, scored: Scored, scores_C: Tensor | None, logps_C: Tensor, totals: Totals) -> dict[str, Any]:
        """As in `Kind`."""
        by_name = {"lengths": scored.lengths_C, "nll": -scored.logps_C, "logps": logps_C}
        by_name |= {} if scores_C is None else {"scores": scores_C}
        pairs = {f"{side}_{name}_B": x_C[i::2] for name, x_C in by_name.items() for i, side in enumerate(_SIDES)}
        if scored.ref_weighted_logps_C is not None:
            pairs |= {f"ref_{side}_logps_B": scored.ref_weighted_logps_C[i::2] for i, side in enumerate(_SIDES)}
        margin_B: Any = 0.0 if scored.margin_E is None else scored.margin_E
        return {**pairs, "margin_B": margin_B, "mean_chosen_length": totals.mean_chosen_length}

    def predictions_by_row(self, scored: Scored, rewards_C: Tensor, rows_E: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Returns what `compute_metrics` gets of each pair: (1, 2) implicit rewards, and (1,) the index of the better
        one."""
        rewards_B2 = rewards_C.view(-1, 2)
        labels_B = torch.zeros_like(rewards_B2[:, 0], dtype=torch.long)
        return list(zip(rewards_B2.split(1), labels_B.split(1), strict=True))

    def compare(self, scored: Scored, rewards_C: Tensor) -> Comparisons:
        """Compares each completion with its partner, (C,); a tie has no better one."""
        grades_C, margins_C, longer_C = (x_C - _partner(x_C) for x_C in (scored.grade_C, rewards_C, scored.lengths_C))
        better_C = grades_C > 0
        return Comparisons(better_C, margins_C, longer_C, better_C, _partner(better_C))


KINDS = {"pairs": PairKind(), "trajectories": PairKind(), "lists": Kind(), "singles": SingleKind()}
