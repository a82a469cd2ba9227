"""Intervals and the win rate at equal length, against plain loops, closed forms and a fit by hand."""

import math

import numpy as np
import pytest

from dpo_peft.suites.figures import accuracy, balanced, bootstrap, mean_figure, ratio, share_figure
from dpo_peft.suites.judge import RIDGE, length_controlled
from dpo_peft.suites.neutral import repeated
from dpo_peft.training.tally import Tally, wilson


def test_a_bootstrap_is_that_of_plain_loops() -> None:
    draw = np.random.default_rng(5)
    base, adapter, weights = draw.normal(size=30), draw.normal(1, 2, 30), draw.integers(1, 9, 30)
    figure = mean_figure("loss", {"base": base, "adapter": adapter}, weights, seed=7)
    again, found = np.random.default_rng(7), []
    for _ in range(20):
        for counts in again.multinomial(30, [1 / 30] * 30, 100):
            rows = [at for at, number in enumerate(counts) for _ in range(number)]
            total = sum(weights[at] for at in rows)
            found.append([sum(side[at] for at in rows) / total for side in (base, adapter)])
    drawn = np.array(found)
    for estimate, values in (
        (figure.base, drawn[:, 0]),
        (figure.adapter, drawn[:, 1]),
        (figure.difference, drawn[:, 1] - drawn[:, 0]),
    ):
        assert estimate is not None
        assert (estimate.low, estimate.high) == pytest.approx(np.percentile(values, [2.5, 97.5]))
    assert figure.difference is not None
    assert figure.difference.value == pytest.approx((adapter.sum() - base.sum()) / weights.sum())


def test_intervals_are_near_their_closed_forms() -> None:
    values = np.random.default_rng(0).normal(3, 2, 400)
    found = bootstrap(ratio(values), 400)
    half = 1.96 * values.std() / 20
    assert found.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.1 * half)
    # Of paired shares: 60 rows gained, 20 lost of 400; the difference varies by (b + c - (b - c)^2 / n) / n^2.
    base, on = [False] * 60 + [True] * 20 + [True] * 320, [True] * 60 + [False] * 20 + [True] * 320
    figure = share_figure("strict", {"base": base, "adapter": on})
    assert figure.difference is not None and figure.difference.value == pytest.approx(0.1)
    half = 1.96 * math.sqrt(80 - 40**2 / 400) / 400
    assert (figure.difference.low, figure.difference.high) == pytest.approx((0.1 - half, 0.1 + half), abs=0.1 * half)
    assert (figure.base, figure.adapter) == (wilson(0.85, 400), wilson(0.95, 400))


def test_accuracies_are_statistics_of_drawn_rows() -> None:
    wins, number = np.array([[1.0, 0, 0], [0, 0.5, 0], [0, 0, 1]]), np.array([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]])
    tally = Tally(wins, number, np.zeros(3), np.zeros(3, int))
    drawn = np.array([[1, 1, 1], [2, 1, 0], [0, 3, 0]])
    assert accuracy(tally)(drawn) == pytest.approx([2.5 / 3, 2.5 / 3, 0.5])
    assert balanced(tally)(drawn)[:2] == pytest.approx([0.75, 0.75]) and math.isnan(balanced(tally)(drawn)[2])


def fit_by_hand(wins: np.ndarray, longer: np.ndarray) -> float:
    """The win rate at equal length by Newton's iteration written out for two numbers, pair by pair."""
    x, theta, phi = [math.tanh(d / longer.std()) for d in longer], 0.0, 0.0
    for _ in range(100):
        a, b, c, u, v = RIDGE, 0.0, RIDGE, -RIDGE * theta, -RIDGE * phi
        for win, at in zip(wins, x, strict=True):
            p = 1 / (1 + math.exp(-theta - phi * at))
            u, v, bend = u + win - p, v + (win - p) * at, p * (1 - p)
            a, b, c = a + bend, b + bend * at, c + bend * at * at
        determinant = a * c - b * b
        theta, phi = theta + 0.5 * (c * u - b * v) / determinant, phi + 0.5 * (a * v - b * u) / determinant
    return 1 / (1 + math.exp(-theta))


def test_the_win_rate_at_equal_length_is_the_fit_by_hand() -> None:
    draw = np.random.default_rng(1)
    longer = draw.normal(20, 40, 120).round()
    wins = (draw.random(120) < 1 / (1 + np.exp(-0.4 - 2 * np.tanh(longer / longer.std())))) * 1.0
    wins[::10] = 0.5
    every = np.ones((1, 120))
    assert length_controlled(wins, longer)(every)[0] == pytest.approx(fit_by_hand(wins, longer), abs=1e-9)
    counts = draw.multinomial(120, [1 / 120] * 120, 1)
    repeated_rows = np.repeat(np.arange(120), counts[0])
    statistic = length_controlled(wins, longer)
    assert statistic(np.concatenate([every, counts]))[1] == pytest.approx(statistic(counts)[0])
    assert abs(statistic(counts)[0] - wins[repeated_rows].mean()) < 0.2


def test_a_judge_that_likes_what_is_longer_is_seen_through() -> None:
    """It always takes the longer one, and the adapter's is the longer one in most pairs: at equal length a draw."""
    longer = np.arange(-10, 40) + 0.5
    wins = (longer > 0) * 1.0
    assert wins.mean() == 0.8
    assert length_controlled(wins, longer)(np.ones((1, 50)))[0] == pytest.approx(0.5, abs=0.1)
    same = length_controlled(wins, np.zeros(50))(np.ones((1, 50)))[0]  # without lengths it is the win rate itself
    assert same == pytest.approx(0.8, abs=1e-3)
    all_won = length_controlled(np.ones(50), longer)(np.ones((1, 50)))[0]
    assert 0.99 < all_won < 1


def test_repetition_by_hand() -> None:
    assert repeated("a b c d a b c d".split()) == pytest.approx(1 - 4 / 5)  # abcd bcda cdab dabc abcd
    assert repeated("a b c d e".split()) == 0 == repeated("a b c".split()) == repeated([])
    assert repeated("a a b".split(), 1) == pytest.approx(1 / 3)
