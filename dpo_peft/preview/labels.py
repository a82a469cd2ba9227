"""Which labels are probably wrong, and which rows are the easiest, by margins of adapters that did not see them.

If a share e of the labels is flipped, and an adapter's margin m says with probability sigmoid(T m) which completion
was judged better, the label of a row is what it is with probability (1 - e) sigmoid(T m) + e sigmoid(-T m): a logistic
regression on noisy labels (Bootkrajang and Kaban 2012). T and e are those of the greatest likelihood: T says how far
the margins can be trusted, and e which share of the labels goes against margins that can. A label is flipped with
probability e sigmoid(-T m) / ((1 - e) sigmoid(T m) + e sigmoid(-T m)).

Shape suffixes: R repeats, N rows.
"""

from typing import NamedTuple

import numpy as np

from ..training.tally import Array, Estimate, sigmoid, wilson

PRECISION = 0.8  # share of the rows called mislabelled that is expected to be
SURE = 1.35  # log-likelihood that flips must explain: chance alone gives more in 5 % of sets without any


class Labels(NamedTuple):
    """What margins say of labels."""

    margin_N: Array  # float64, mean over the repeats
    wrong_N: Array  # float64, the probability that the label is flipped
    mislabelled_N: Array  # bool: among the surest, of whom so many are expected to be wrong
    flipped: float  # e, the share of flipped labels
    trust: float  # T, per unit of margin
    accuracy: Estimate  # share of the labels that agree with their margins
    chance: bool  # whether that may be by chance: then the margins say nothing

    @property
    def found(self) -> list[int]:
        """Returns the places of the mislabelled rows, the surest first."""
        return sorted(np.flatnonzero(self.mislabelled_N).tolist(), key=lambda i: float(self.margin_N[i]))


def judge(margins_RN: Array) -> Labels:
    """Returns what held-out margins, (R, N) float64, say of each label. Where they may agree with labels by chance,
    or flips explain them no better than an adapter that is unsure does, none is said to be flipped. Else the surest
    rows are, as many as leave their mean probability at `PRECISION`, each above a half and with a negative margin in
    every repeat."""
    margin_N = margins_RN.mean(0)
    # What one row's label does to another's margin is done to its own too: half of the rows at most are independent.
    accuracy = wilson(float((margin_N > 0).mean()), len(margin_N) / 2)
    chance = accuracy.low <= 0.5
    trust, flipped, gain = _fit(margin_N)
    if chance or gain < SURE:
        trust, flipped = _fit(margin_N, most=0.0)[0], 0.0
    right_N = sigmoid(trust * margin_N)
    wrong_N = flipped * (1 - right_N) / (flipped + (1 - 2 * flipped) * right_N)
    wrong_S = np.sort(wrong_N)[::-1]
    enough_S = np.cumsum(wrong_S) >= PRECISION * np.arange(1, len(wrong_S) + 1)
    least = max(0.5, wrong_S[enough_S].min(initial=1.0))
    called_N = (wrong_N >= least) & (wrong_N > 0.5) & (margins_RN < 0).all(0)
    return Labels(margin_N, wrong_N, called_N, flipped, trust, accuracy, chance)


def easiest(margin_N: Array, share: float) -> list[int]:
    """Returns the places of the share of rows with the largest margins, in their order: the hardest are left out
    (Selective DPO; Gao et al. 2025). A loss of pairs falls with the margin: it is the order by held-out loss."""
    order = np.argsort(-margin_N, kind="stable")
    return sorted(order[: round(share * len(order))].tolist())


def _fit(margin_N: Array, most: float = 0.499) -> tuple[float, float, float]:
    """Returns T, e <= `most` and the log-likelihood that e adds, by a grid that closes in on the best point."""
    unit = np.abs(margin_N).mean() or 1.0
    log_trust, flipped, step = 0.0, most / 2, np.array([4.0, most / 2])
    for _ in range(12):
        trusts = np.exp(log_trust + step[0] * np.linspace(-1, 1, 9)) / unit
        shares = np.unique(np.clip(flipped + step[1] * np.linspace(-1, 1, 9), 0, most))
        right_TN = sigmoid(trusts[:, None] * margin_N)
        scores = np.stack([np.log(e + (1 - 2 * e) * right_TN + 1e-300).sum(1) for e in shares], 1)
        t, s = np.unravel_index(scores.argmax(), scores.shape)
        log_trust, flipped, step = float(np.log(trusts[t] * unit)), float(shares[s]), step / 2
    gain = float(scores.max()) - _fit(margin_N, 0.0)[2] if most else float(scores.max())
    return float(trusts[t]), flipped, gain
