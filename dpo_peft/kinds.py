"""What differs between the kinds of data that losses learn from: pairs, trajectories, lists and single answers.

One object each, `TrainingObjective.kind`: what a loss averages over, what it may read, and what of it is reported.

Shape suffixes: C completions, K of a sample, E samples, B pairs, M mismatched answers, I items (what a loss averages
over: pairs, lists, or single answers).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .forward import PackedBatch

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
    own_C: Tensor | None  # False for an answer to another prompt; None if there are none of these
    preference_E: Tensor | None
    margin_E: Tensor | None
    num_samples: int

    @property
    def log_ratios_C(self) -> Tensor:
        """log(policy / reference), with the token weights."""
        assert self.ref_weighted_logps_C is not None
        return self.weighted_logps_C - self.ref_weighted_logps_C

    def to(self, device: torch.device | str) -> "Scored":
        """A copy on `device` without its graph."""
        values: dict[str, Any] = {name: getattr(self, name) for name in self.__dataclass_fields__}
        moved: dict[str, Any] = {n: v.detach().to(device) if isinstance(v, Tensor) else v for n, v in values.items()}
        return Scored(**moved)

    def own(self, x_C: Tensor) -> Tensor:
        """`x_C` without the mismatched answers."""
        return x_C if self.own_C is None else x_C[self.own_C]

    def mismatched(self, x_C: Tensor) -> Tensor:
        """`x_C` of the mismatched answers alone, (M,)."""
        return x_C[:0] if self.own_C is None else x_C[~self.own_C]


def _partner(x_C: Tensor) -> Tensor:
    """Of each completion of a pair, the other one's value."""
    return x_C.view(-1, 2).flip(1).flatten()


class Kind:
    """What the losses of one kind of data average over and compare, and what of it is reported.

    Here: whole samples, each prompt with its completions.
    """

    data: str  # the name, as in `Objective.data`
    paired = False  # two completions per sample: chosen at even, rejected at odd places

    def totals(self, batches: Sequence[Mapping[str, Any]]) -> Totals:
        """Of the micro-batches of one optimizer step, given as fields of `PackedBatch`."""
        return Totals(sum(len(batch["rows"]) for batch in batches), 1.0)

    def rows(self, batch: PackedBatch) -> Tensor:
        """(I,) the dataset row of each item."""
        return batch.rows

    def items(self, scored: Scored) -> int:
        """I, the number of items."""
        return scored.num_samples

    def inputs(self, scored: Scored, scores_C: Tensor | None, logps_C: Tensor, totals: Totals) -> dict[str, Any]:
        """Every input that a loss may name.

        Args:
            scored: the completions.
            scores_C: their log-ratios, shaped as the loss wants them; None without a reference.
            logps_C: their log-probs, with the token weights if the loss wants them.
            totals: of the whole optimizer batch.
        """
        raise NotImplementedError

    def predictions_by_row(self, scored: Scored, rewards_C: Tensor, rows_E: Tensor) -> list[tuple[Tensor, Tensor]]:
        """What `compute_metrics` gets of each sample: (K,) implicit rewards, and (K, 2) grades and dataset row."""
        sample_of_C = scored.own(scored.sample_of_C)
        labels_C2 = torch.stack([scored.own(scored.grade_C), rows_E[sample_of_C].to(scored.grade_C.dtype)], dim=1)
        sizes = sample_of_C.bincount(minlength=scored.num_samples).tolist()
        return list(zip(scored.own(rewards_C).split(sizes), labels_C2.split(sizes), strict=True))

    def differences(self, x_C: Tensor) -> Tensor:
        """(C, C) of each completion and each other: the value of the row's minus that of the column's."""
        return x_C[:, None] - x_C

    def better(self, scored: Scored) -> Tensor:
        """True where the first of two completions is known to be the better one; shaped as `differences`."""
        same_CC = scored.sample_of_C[:, None] == scored.sample_of_C
        return (self.differences(scored.grade_C) > 0) & same_CC

    def best_and_rest(self, scored: Scored) -> tuple[Tensor, Tensor]:
        """(C,) the completions that nothing is better than, and those that something is; ties are neither."""
        better_CC = self.better(scored)
        rest_C = better_CC.any(0)
        return better_CC.any(1) & ~rest_C, rest_C


class ListKind(Kind):
    """One prompt, several graded completions."""

    data = "lists"

    def inputs(self, scored: Scored, scores_C: Tensor | None, logps_C: Tensor, totals: Totals) -> dict[str, Any]:
        """As in `Kind`."""
        return {
            "scores_C": scores_C,
            "logps_C": logps_C,
            "lengths_C": scored.lengths_C,
            "grades_C": scored.grade_C,
            "sample_of_C": scored.sample_of_C,
            "num_samples": scored.num_samples,
        }


class SingleKind(Kind):
    """Completions judged one by one, beside answers to other prompts if the loss reads those."""

    data = "singles"

    def totals(self, batches: Sequence[Mapping[str, Any]]) -> Totals:
        """As in `Kind`; an item is a completion."""
        return Totals(sum(batch["num_own"] for batch in batches), 1.0)

    def rows(self, batch: PackedBatch) -> Tensor:
        """As in `Kind`."""
        return batch.rows[batch.sample_of if batch.mismatched is None else batch.sample_of[~batch.mismatched]]

    def items(self, scored: Scored) -> int:
        """As in `Kind`."""
        return len(scored.own(scored.lengths_C))

    def inputs(self, scored: Scored, scores_C: Tensor | None, logps_C: Tensor, totals: Totals) -> dict[str, Any]:
        """As in `Kind`."""
        found = {"logps_C": logps_C, "lengths_C": scored.lengths_C, "grades_C": scored.grade_C, "scores_C": scores_C}
        own = {name: x_C if x_C is None else scored.own(x_C) for name, x_C in found.items()}
        return {**own, "mismatched_scores_M": None if scores_C is None else scored.mismatched(scores_C).detach()}

    def better(self, scored: Scored) -> Tensor:
        """As in `Kind`; any good answer is better than any bad one, whatever their prompts."""
        better_CC = self.differences(scored.grade_C) > 0
        return better_CC if scored.own_C is None else better_CC & scored.own_C & scored.own_C[:, None]

    def best_and_rest(self, scored: Scored) -> tuple[Tensor, Tensor]:
        """The good and the bad completions."""
        good_C = scored.grade_C > 0
        return (good_C, ~good_C) if scored.own_C is None else (good_C & scored.own_C, ~good_C & scored.own_C)


class PairKind(Kind):
    """A chosen and a rejected completion of each prompt."""

    data = "pairs"
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
        """What `compute_metrics` gets of each pair: (1, 2) implicit rewards, and (1,) the index of the better one."""
        rewards_B2 = rewards_C.view(-1, 2)
        labels_B = torch.zeros_like(rewards_B2[:, 0], dtype=torch.long)
        return list(zip(rewards_B2.split(1), labels_B.split(1), strict=True))

    def differences(self, x_C: Tensor) -> Tensor:
        """(C,) the value of each completion minus that of its partner."""
        return x_C - _partner(x_C)

    def better(self, scored: Scored) -> Tensor:
        """(C,) True for the better one of each pair; a tie has none."""
        return self.differences(scored.grade_C) > 0

    def best_and_rest(self, scored: Scored) -> tuple[Tensor, Tensor]:
        """As in `Kind`."""
        better_C = self.better(scored)
        return better_C, _partner(better_C)


class TrajectoryKind(PairKind):
    """Pairs of whole conversations."""

    data = "trajectories"


KINDS: dict[str, Kind] = {kind.data: kind for kind in (PairKind(), TrajectoryKind(), ListKind(), SingleKind())}
