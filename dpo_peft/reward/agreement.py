"""How well scores agree with judgments: accuracy, what length alone explains of it, and how sure one can be.

A comparison is two completions of which one is known to be better. It is won if the better one has the higher score;
equal scores count as half. A pair is one comparison, a ranked list one for any two of its completions that are ranked
apart; of completions that were judged one by one any desirable and any undesirable one are compared.

Reward models, and people, like what is longer. Two figures beside accuracy show how much: what "the longer completion
is better" wins, and the length-balanced accuracy: the mean of the accuracies on comparisons whose better completion is
the longer one, and on those whose better completion is the shorter one. Length alone gets exactly one half of that.
Completions of equal length say nothing about length, and are left out of it.

Comparisons that share a row are not independent. So the spread of an accuracy is estimated by leaving out one row at a
time (jackknife; Efron and Stein 1981), and read as a number of independent comparisons that would spread as much. The
95 % interval is Wilson's (1927) for that number; for pairs it is the number of pairs. The interval of the balanced
accuracy is put together from those of its two halves (Zou and Donner 2008).

Shape suffixes: R rows that have comparisons (or single completions), S strata: better is longer, shorter, equal.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from ..training.metrics import length_balanced
from ..training.tally import EQUAL, LENGTH_WINS_S, LONGER, SHORTER, Array, Estimate, Tally, wilson


class Judged(NamedTuple):
    """One row: its completions' scores, lengths in tokens, and grades (higher is better)."""

    scores: Sequence[float]
    lengths: Sequence[int]
    grades: Sequence[float]

    def margins(self) -> list[tuple[float, int, int]]:
        """Returns (margin, better, worse) for any two completions that are graded apart, by their indices."""
        every = range(len(self.grades))
        twos = [(a, b) for a in every for b in every if self.grades[a] > self.grades[b]]
        return [(self.scores[a] - self.scores[b], a, b) for a, b in twos]


@dataclass(frozen=True)
class Agreement:
    """Says how well scores agree with judgments."""

    rows: int
    comparisons: int
    accuracy: Estimate
    length_only: Estimate  # accuracy of "the longer completion is better"
    length_balanced: Estimate | None  # None: the better completion is never longer, or never shorter
    better_longer: tuple[int, float | None]  # comparisons whose better completion is longer, and accuracy on them
    better_shorter: tuple[int, float | None]
    mean_margin: float  # score of the better minus that of the worse completion


def agreement(tally: Tally) -> Agreement | None:
    """Returns the figures of a tally; None if there is nothing to compare."""
    if not tally.comparisons:
        return None
    wins_S, number_S = tally.wins_RS.sum(0), tally.number_RS.sum(0)
    strata = [
        (round(n) // tally.shared_by, float(w / n) if n else None) for w, n in zip(wins_S, number_S, strict=True)
    ]
    balanced = length_balanced(strata[LONGER][1], strata[SHORTER][1])
    return Agreement(
        rows=len(tally.margin_R),
        comparisons=tally.comparisons,
        accuracy=_accuracy(tally),
        length_only=_accuracy(replace(tally, wins_RS=tally.number_RS * LENGTH_WINS_S)),
        length_balanced=None if balanced is None else _balanced(tally, balanced),
        better_longer=strata[LONGER],
        better_shorter=strata[SHORTER],
        mean_margin=float(tally.margin_R.sum() / number_S.sum()),
    )


# ---- Counting -------------------------------------------------------------------------------------------------------


def tally_rows(rows: Sequence[Judged]) -> Tally:
    """Counts the comparisons inside each row: pairs and ranked lists. Equal grades are not compared."""
    wins_RS, number_RS, margin_R = np.zeros((len(rows), 3)), np.zeros((len(rows), 3)), np.zeros(len(rows))
    for i, row in enumerate(rows):
        for margin, better, worse in row.margins():
            longer = row.lengths[better] - row.lengths[worse]
            stratum = LONGER if longer > 0 else SHORTER if longer < 0 else EQUAL
            wins_RS[i, stratum] += win(margin)
            number_RS[i, stratum] += 1
            margin_R[i] += margin
    kept = number_RS.any(1)
    return Tally(wins_RS[kept], number_RS[kept], margin_R[kept], np.zeros(kept.sum(), dtype=int))


def win(margin: float) -> float:
    """Returns 1 if the better completion has the higher score, 0.5 if both have the same, else 0."""
    return (float(np.sign(margin)) + 1) / 2


# ---- Figures and how sure they are ----------------------------------------------------------------------------------


def _accuracy(tally: Tally, strata: Sequence[int] = (LONGER, SHORTER, EQUAL)) -> Estimate:
    """Returns the accuracy on the comparisons of some strata.

    Where leaving a row out changes nothing, or leaves nothing, as many independent comparisons are assumed as there
    are rows: an accuracy of 1 on ten pairs is not certain.
    """
    wins, number = (float(sums_RS[:, strata].sum()) for sums_RS in (tally.wins_RS, tally.number_RS))
    held_R = tally.number_RS[:, strata].sum(1) > 0
    rows = int(held_R.sum())
    # The jackknife's variance times (R - 1) / R: for pairs the binomial's p(1-p)/n exactly.
    variance = ((rows - 1) / rows) ** 2 * float((_deviations(tally, strata) ** 2).sum())
    spread = wins / number * (1 - wins / number)
    if not (0 < variance < math.inf and spread > 0):
        # Of single completions, as many as there are of the rarer kind.
        sides = range(tally.shared_by)
        return wilson(wins / number, min(int((held_R & (tally.side_R == side)).sum()) for side in sides))
    return wilson(wins / number, spread / variance)


def _deviations(tally: Tally, strata: Sequence[int]) -> Array:
    """Returns (R,): the accuracy without each row, less their mean."""
    wins_R, number_R = tally.wins_RS[:, strata].sum(1), tally.number_RS[:, strata].sum(1)
    # A comparison stands in as many rows as share it, so the sums hold it that often.
    with np.errstate(invalid="ignore", divide="ignore"):
        without_R = (wins_R.sum() - tally.shared_by * wins_R) / (number_R.sum() - tally.shared_by * number_R)
    return without_R - without_R.mean()


def _balanced(tally: Tally, value: float) -> Estimate:
    """Returns the mean of two accuracies, which rows that hold comparisons of both kinds make depend on each other."""
    halves = [_accuracy(tally, [stratum]) for stratum in (LONGER, SHORTER)]
    a_R, b_R = (_deviations(tally, [stratum]) for stratum in (LONGER, SHORTER))
    scale = math.sqrt((a_R**2).sum() * (b_R**2).sum())
    correlation = float((a_R * b_R).sum()) / scale if 0 < scale < math.inf else 0.0

    def distance(a: float, b: float) -> float:
        return math.sqrt(max(0.0, a * a + b * b + 2 * correlation * a * b)) / 2

    below, above = distance(*(h.value - h.low for h in halves)), distance(*(h.high - h.value for h in halves))
    return Estimate(value, value - below, value + above)
