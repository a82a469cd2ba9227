"""Counts how often the better of two completions has the higher score.

Shape suffixes: R rows, S strata: better is longer, shorter, equal; N values, Q queries.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

Array = np.ndarray

LONGER, SHORTER, EQUAL = range(3)
LENGTH_WINS_S = np.array([1.0, 0.0, 0.5])
Z = 1.959963984540054  # of the normal distribution 2.5 % lie above


class Estimate(NamedTuple):
    """A share in [0, 1] with its 95 % confidence interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


@dataclass(frozen=True)
class Tally:
    """Holds the sums of each row's comparisons."""

    wins_RS: Array
    number_RS: Array
    margin_R: Array  # better minus worse score
    side_R: Array  # 1 for an undesirable single completion, otherwise 0
    shared_by: int = 1  # rows that a comparison belongs to: 2 for single completions

    @property
    def comparisons(self) -> int:
        """Returns the number over all rows."""
        return round(self.number_RS.sum()) // self.shared_by


def sigmoid(x: Array) -> Array:
    """Returns 1 / (1 + exp(-x)), without overflow."""
    return 0.5 * (1 + np.tanh(x / 2))


def tally_singles(scores: ArrayLike, lengths: ArrayLike, desirable: ArrayLike) -> Tally:
    """Compares every desirable with every undesirable completion. Accuracy is the area under the ROC curve."""
    score, length, side_R = np.asarray(scores, float), np.asarray(lengths), 1 - np.asarray(desirable, int)
    good, bad = np.flatnonzero(side_R == 0), np.flatnonzero(side_R)
    if not len(good) or not len(bad):
        return Tally(np.zeros((0, 3)), np.zeros((0, 3)), np.zeros(0), side_R[:0])
    wins_RS, number_RS, margin_R = np.zeros((len(score), 3)), np.zeros((len(score), 3)), np.zeros(len(score))
    for own, others, sign in ((good, bad, 1), (bad, good, -1)):
        order = others[np.argsort(sign * score[others], kind="stable")]  # those that the own ones win against, first
        ranked, everything = sign * score[order], np.full(len(own), len(order))
        below, up_to = (np.searchsorted(ranked, sign * score[own], side) for side in ("left", "right"))
        for sums_RS, prefixes in ((number_RS, (everything,)), (wins_RS, (below, up_to))):  # a tie is half a win
            for prefix in prefixes:
                shorter = _count_less(length[order], prefix, length[own])
                equal = _count_less(length[order], prefix, length[own] + 1) - shorter
                longer, share = prefix - shorter - equal, 1 / len(prefixes)
                better, worse = (shorter, longer) if sign == 1 else (longer, shorter)
                sums_RS[own] += share * np.stack([better, worse, equal], 1)
        margin_R[own] = sign * (score[own] * len(others) - score[others].sum())
    return Tally(wins_RS, number_RS, margin_R, side_R, shared_by=2)


def _count_less(values_N: Array, prefix_Q: Array, bound_Q: Array) -> Array:
    """Returns (Q,): how many of the first `prefix` values, whole numbers from 0 on, are less than `bound`.

    Bit by bit from the highest, with the values split stably by it (a wavelet matrix; Claude and Navarro 2012): the
    time grows with N and Q and the number of bits.
    """
    count_Q, start_Q, end_Q = np.zeros_like(prefix_Q), np.zeros_like(prefix_Q), prefix_Q
    for bit in reversed(range(int(max(values_N.max(), bound_Q.max())).bit_length())):
        one_N = (values_N >> bit & 1).astype(bool)
        zeros_before = np.concatenate([[0], np.cumsum(~one_N)])
        starts, ends, set_Q = zeros_before[start_Q], zeros_before[end_Q], (bound_Q >> bit & 1).astype(bool)
        count_Q = count_Q + np.where(set_Q, ends - starts, 0)
        start_Q = np.where(set_Q, zeros_before[-1] + start_Q - starts, starts)
        end_Q = np.where(set_Q, zeros_before[-1] + end_Q - ends, ends)
        values_N = np.concatenate([values_N[~one_N], values_N[one_N]])
    return count_Q


def wilson(share: float, number: float) -> Estimate:
    """Returns Wilson's 95 % interval of a binomial share of `number` independent comparisons, maybe not whole."""
    center = (share + Z**2 / (2 * number)) / (1 + Z**2 / number)
    half = Z * math.sqrt(share * (1 - share) / number + Z**2 / (4 * number**2)) / (1 + Z**2 / number)
    return Estimate(share, max(0.0, min(share, center - half)), min(1.0, max(share, center + half)))
