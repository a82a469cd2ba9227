"""Figures of a base and an adapter beside each other, with 95 % intervals, and how they are shown.

Both sides of a figure are of the same rows, so the interval of their difference is that of paired rows: a bootstrap
draws rows with replacement and takes both sides of each (Efron 1979; percentiles). Shares of rows have Wilson's
interval, which also holds where all rows pass or none.

Shape suffixes: N rows, B draws, S strata: better is longer, shorter, equal.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..training.tally import LONGER, SHORTER, Array, Estimate, Tally, wilson

DRAWS, AT_ONCE = 2000, 100
Statistic = Callable[[Array], Array]  # of (B, N) numbers of how often each row was drawn: (B,) values


class Figure(NamedTuple):
    """One line of a suite's table."""

    name: str
    base: Estimate | None
    adapter: Estimate | None
    difference: Estimate | None  # adapter minus base
    rows: int
    detail: bool = False  # of a part of the rows: not in the card


def bootstrap(statistic: Statistic, rows: int, seed: int = 0) -> Estimate:
    """Returns a statistic of all rows with the interval that its percentiles over draws of the rows have."""
    draws, even = np.random.default_rng(seed), np.full(rows, 1 / rows)
    drawn = [statistic(draws.multinomial(rows, even, AT_ONCE)) for _ in range(DRAWS // AT_ONCE)]
    low, high = np.nanquantile(np.concatenate(drawn), [0.025, 0.975])
    return Estimate(float(statistic(np.ones((1, rows)))[0]), float(low), float(high))


def ratio(values_N: Any, weights_N: Any = 1.0) -> Statistic:
    """Returns the statistic sum of values over sum of weights: a mean if all weights are 1."""
    values_N = np.asarray(values_N, float)
    weights_N = np.broadcast_to(np.asarray(weights_N, float), values_N.shape)
    return lambda drawn_BN: (drawn_BN @ values_N) / (drawn_BN @ weights_N)


def accuracy(tally: Tally) -> Statistic:
    """Returns the accuracy as a statistic of the tally's rows."""
    return ratio(tally.wins_RS.sum(1), tally.number_RS.sum(1))


def balanced(tally: Tally) -> Statistic:
    """Returns the length-balanced accuracy as a statistic; NaN for draws without comparisons of one of the kinds."""
    sides = [ratio(tally.wins_RS[:, stratum], tally.number_RS[:, stratum]) for stratum in (LONGER, SHORTER)]

    def mean(drawn_BN: Array) -> Array:
        with np.errstate(invalid="ignore"):
            return (sides[0](drawn_BN) + sides[1](drawn_BN)) / 2

    return mean


def difference(by_side: Mapping[str, Statistic], rows: int, seed: int) -> Estimate | None:
    """Returns adapter minus base; None without an adapter."""
    if len(by_side) < 2:
        return None
    return bootstrap(lambda drawn_BN: by_side["adapter"](drawn_BN) - by_side["base"](drawn_BN), rows, seed)


def mean_figure(name: str, by_side: Mapping[str, Any], weights_N: Any = 1.0, seed: int = 0) -> Figure:
    """Returns the figure of (N,) values of each side, means over rows or, with weights, sums over sums of weights."""
    statistics = {side: ratio(values_N, weights_N) for side, values_N in by_side.items()}
    rows = len(by_side["base"])
    each = {side: bootstrap(statistic, rows, seed) for side, statistic in statistics.items()}
    return Figure(name, each["base"], each.get("adapter"), difference(statistics, rows, seed), rows)


def share_figure(name: str, by_side: Mapping[str, Sequence[bool]], seed: int = 0, detail: bool = False) -> Figure:
    """Returns the figure of rows that pass or don't, as shares; of a detail without the difference."""
    rows = len(by_side["base"])
    each = {side: wilson(sum(passed) / rows, rows) for side, passed in by_side.items()}
    apart = None if detail else difference({side: ratio(passed) for side, passed in by_side.items()}, rows, seed)
    return Figure(name, each["base"], each.get("adapter"), apart, rows, detail)


def as_dict(figure: Figure) -> dict[str, Any]:
    """Returns a figure as JSON can hold it."""
    values = figure._asdict()
    return {name: one._asdict() if isinstance(one, Estimate) else one for name, one in values.items()}


# ---- Shown ----------------------------------------------------------------------------------------------------------

HEADS = ("", "base", "adapter", "difference", "rows")


def table(result: Mapping[str, Any], details: bool = False) -> Iterator[list[str]]:
    """Yields the lines of what an eval.json holds, a cell for each of `HEADS`; with `details` those of parts too."""
    for suite in result["suites"]:
        for figure in suite["figures"]:
            if details or not figure["detail"]:
                cells = [_shown(figure[side]) for side in ("base", "adapter", "difference")]
                yield [f"{suite['name']}: {figure['name']}", *cells, f"{figure['rows']:,}"]


def _shown(figure: Mapping[str, float] | None) -> str:
    return "" if figure is None else str(Estimate(**figure))
