"""Accuracy with its interval, the length-only baseline and length-balanced accuracy: by hand, and by simulation."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest

from dpo_peft.reward.agreement import Agreement, Estimate, Judged, agreement, tally_rows, wilson
from dpo_peft.training.tally import tally_singles


def pair(won: float, better_length: int = 1, worse_length: int = 1) -> Judged:
    """A pair whose better answer scores higher (1), equal (0.5) or lower (0)."""
    return Judged((won, 1 - won), (better_length, worse_length), (1.0, 0.0))


def found(rows: list[Judged]) -> Agreement:
    result = agreement(tally_rows(rows))
    assert result is not None
    return result


def test_by_hand() -> None:
    # Better is longer: right, right, wrong. Shorter: right, tie. Equal: wrong.
    rows = [pair(1, 5, 3), pair(1, 9, 2), pair(0, 4, 1), pair(1, 2, 6), pair(0.5, 1, 2), pair(0, 7, 7)]
    one = found(rows)
    assert (one.rows, one.comparisons) == (6, 6)
    assert one.accuracy.value == pytest.approx((1 + 1 + 0 + 1 + 0.5 + 0) / 6)
    assert one.length_only.value == pytest.approx((3 + 0 + 0.5) / 6)
    assert one.better_longer == (3, pytest.approx(2 / 3))
    assert one.better_shorter == (2, pytest.approx(3 / 4))
    assert one.length_balanced is not None
    assert one.length_balanced.value == pytest.approx((2 / 3 + 3 / 4) / 2)
    assert one.mean_margin == pytest.approx((1 + 1 - 1 + 1 + 0 - 1) / 6)


def test_a_list_is_compared_answer_by_answer() -> None:
    # Grades 2, 1, 1, 0: five comparisons, as the two in the middle tie. Won: 2>1b, 2>0, 1a>0, 1b>0; lost: 2>1a.
    row = Judged((0.5, 0.9, 0.2, 0.1), (4, 4, 5, 3), (2, 1, 1, 0))
    one = found([row])
    assert (one.rows, one.comparisons) == (1, 5)
    assert one.accuracy.value == pytest.approx(4 / 5)
    # Lengths of (better, worse): (4,4) (4,5) (4,3) (4,3) (5,3).
    assert one.length_only.value == pytest.approx((0.5 + 0 + 1 + 1 + 1) / 5)
    assert one.better_longer == (3, 1.0) and one.better_shorter == (1, 1.0)
    assert one.mean_margin == pytest.approx((-0.4 + 0.3 + 0.4 + 0.8 + 0.1) / 5)


def test_single_answers_are_compared_across_rows() -> None:
    # Desirable 3.0, 1.0; undesirable 2.0, 1.0, 0.0: wins 1+1+1 and 0+0.5+1.
    tally = tally_singles([3.0, 2.0, 1.0, 1.0, 0.0], [2, 2, 5, 1, 9], [True, False, True, False, False])
    one = agreement(tally)
    assert one is not None and (one.rows, one.comparisons) == (5, 6)
    assert one.accuracy.value == pytest.approx(4.5 / 6)
    # Lengths: desirable 2 against 2, 1, 9; desirable 5 against 2, 1, 9.
    assert one.length_only.value == pytest.approx((0.5 + 1 + 0 + 1 + 1 + 0) / 6)
    assert one.better_longer == (3, pytest.approx((1 + 0 + 0.5) / 3))
    assert one.better_shorter == (2, pytest.approx((1 + 1) / 2))
    assert one.mean_margin == pytest.approx((1 + 2 + 3 - 1 + 0 + 1) / 6)
    # Each answer's share: desirable 3.0 wins all; 2.0 loses to it and beats 1.0.
    assert (tally.wins_RS.sum(1) / tally.number_RS.sum(1)).tolist() == pytest.approx([1, 0.5, 0.5, 0.75, 1])


def test_single_answers_in_blocks() -> None:
    draw = np.random.default_rng(0)
    scores, lengths = draw.normal(size=2500).round(1), draw.integers(1, 5, 2500)
    good = draw.random(2500) < 0.6  # more than one block of them
    one = agreement(tally_singles(scores, lengths, good))
    better, worse = scores[good][:, None], scores[~good]
    assert one is not None
    assert one.accuracy.value == pytest.approx(float((better > worse).mean() + (better == worse).mean() / 2))
    assert one.comparisons == good.sum() * (~good).sum()


@pytest.mark.parametrize("seed", range(6))
def test_single_answers_against_one_by_one(seed: int) -> None:
    """Every sum of every completion, with ties of scores and of lengths, and with only a few of either kind."""
    draw = np.random.default_rng(seed)
    number = (2, 3, 9, 40, 61, 64)[seed]
    scores = draw.integers(-2, 3, number).astype(float) if seed % 2 else draw.normal(size=number)
    lengths, desirable = draw.integers(0, (2, 9, 900)[seed % 3], number), draw.random(number) < 0.4
    desirable[:2] = [True, False]
    tally = tally_singles(scores, lengths, desirable)
    wins, counted, margins = np.zeros((number, 3)), np.zeros((number, 3)), np.zeros(number)
    for good, bad in itertools.product(np.flatnonzero(desirable), np.flatnonzero(~desirable)):
        stratum = 0 if lengths[good] > lengths[bad] else 1 if lengths[good] < lengths[bad] else 2
        margin = scores[good] - scores[bad]
        for one in (good, bad):
            wins[one, stratum] += 1.0 if margin > 0 else 0.5 if margin == 0 else 0.0
            counted[one, stratum] += 1
            margins[one] += margin
    assert np.array_equal(tally.wins_RS, wins) and np.array_equal(tally.number_RS, counted)
    assert np.allclose(tally.margin_R, margins, atol=1e-12)


def test_length_alone_gets_half_of_the_balanced_accuracy() -> None:
    draw = np.random.default_rng(1)
    for share in (0.1, 0.5, 0.9):
        lengths = [(9, int(draw.integers(1, 9))) for _ in range(40)] + [(3, 3)] * 7
        lengths = [pair if draw.random() < share else pair[::-1] for pair in lengths]
        one = found([Judged(pair, pair, (1.0, 0.0)) for pair in lengths])
        assert one.length_balanced is not None and one.length_balanced.value == 0.5
        assert one.accuracy == one.length_only


def test_nothing_to_compare_or_to_balance() -> None:
    assert agreement(tally_rows([])) is None
    assert agreement(tally_rows([Judged((1.0, 0.0), (1, 2), (1.0, 1.0))])) is None  # a tie
    assert agreement(tally_singles([1.0, 2.0], [1, 1], [True, True])) is None
    one = found([pair(1, 5, 3), pair(0, 4, 4)])
    assert one.length_balanced is None and one.better_shorter == (0, None)


def test_wilson_by_hand() -> None:
    # p = 0.8, n = 10: center (0.8 + z2/20) / (1 + z2/10), half z * sqrt(0.016 + z2/400) / (1 + z2/10), z2 = 3.8415.
    assert wilson(0.8, 10) == pytest.approx((0.8, 0.4901625, 0.9433178), abs=1e-6)
    assert wilson(1.0, 10) == pytest.approx((1.0, 0.7224672, 1.0), abs=1e-6)  # n / (n + z2)
    assert wilson(0.0, 10) == pytest.approx((0.0, 0.0, 0.2775328), abs=1e-6)


def test_pairs_have_wilsons_interval() -> None:
    for wins, number in ((7, 10), (1, 4), (10, 10), (0, 3), (1, 1)):
        rows = [pair(float(i < wins)) for i in range(number)]
        assert found(rows).accuracy == pytest.approx(wilson(wins / number, number))


def test_comparisons_of_one_row_do_not_count_in_full() -> None:
    draw = np.random.default_rng(2)
    rows = [Judged(tuple(draw.normal(size=5)), (1,) * 5, (4, 3, 2, 1, 0)) for _ in range(30)]
    estimates = found(rows).accuracy, wilson(found(rows).accuracy.value, 300), wilson(found(rows).accuracy.value, 30)
    width, if_all_counted, if_rows_counted = (estimate.high - estimate.low for estimate in estimates)
    assert 1.2 * if_all_counted < width < if_rows_counted


# ---- Coverage: the interval holds the truth in 95 of 100 samples ----------------------------------------------------


def coverage(sample: Callable[[], Agreement | None], truth: float, which: str, times: int = 300) -> float:
    estimates: list[Estimate] = [getattr(sample(), which) for _ in range(times)]
    return sum(estimate.low <= truth <= estimate.high for estimate in estimates) / times


@pytest.fixture
def draw() -> np.random.Generator:
    return np.random.default_rng(0)


# A share of 300 samples at 0.95 stays above 0.91 in 99.9 of 100 cases; discrete counts reach 0.93 of coverage.
LEAST, MOST = 0.89, 0.995


@pytest.mark.parametrize(("number", "share"), [(20, 0.5), (60, 0.8), (200, 0.95)])
def test_pairs(draw: np.random.Generator, number: int, share: float) -> None:
    def sample() -> Agreement | None:
        return agreement(tally_rows([pair(float(won)) for won in draw.random(number) < share]))

    assert LEAST < coverage(sample, share, "accuracy") < MOST


@pytest.mark.parametrize(
    ("number", "on_longer", "on_shorter", "longer"), [(40, 0.9, 0.4, 0.8), (60, 0.7, 0.7, 0.5), (200, 0.95, 0.9, 0.9)]
)
def test_balanced(draw: np.random.Generator, number: int, on_longer: float, on_shorter: float, longer: float) -> None:
    def sample() -> Agreement | None:
        rows = []
        for is_longer, luck in zip(draw.random(number) < longer, draw.random(number), strict=True):
            lengths = (5, 3) if is_longer else (3, 5)
            rows.append(pair(float(luck < (on_longer if is_longer else on_shorter)), *lengths))
        return agreement(tally_rows(rows))

    assert LEAST < coverage(sample, (on_longer + on_shorter) / 2, "length_balanced") < MOST
    # Plain accuracy is another figure where the halves differ.
    if on_longer == 0.9:
        assert coverage(sample, (on_longer + on_shorter) / 2, "accuracy") < 0.7


def test_lists(draw: np.random.Generator) -> None:
    """Rows whose comparisons hang together: how well the scores follow the grades differs from row to row."""

    def rows(number: int) -> list[Judged]:
        slopes, noise = draw.normal(0.5, 0.8, number), draw.normal(size=(number, 4))
        return [Judged(s * np.arange(4) + n, (1, 2, 2, 1), range(4)) for s, n in zip(slopes, noise, strict=True)]

    truth = found(rows(20_000)).accuracy.value
    one = [agreement(tally_rows(rows(60))) for _ in range(200)]
    assert LEAST < sum(a.accuracy.low <= truth <= a.accuracy.high for a in one) / len(one) < MOST
    as_if_independent = [wilson(a.accuracy.value, a.comparisons) for a in one]
    assert sum(e.low <= truth <= e.high for e in as_if_independent) / len(one) < 0.85


def test_singles(draw: np.random.Generator) -> None:
    """Scores of two normal distributions a standard deviation apart: the area is Phi(1 / sqrt 2)."""
    truth = 0.5 * (1 + math.erf(0.5))

    def sample() -> Agreement | None:
        scores = np.concatenate([draw.normal(1, 1, 50), draw.normal(0, 1, 25)])
        return agreement(tally_singles(scores, draw.integers(1, 9, 75), np.arange(75) < 50))

    assert LEAST < coverage(sample, truth, "accuracy") < MOST
    assert LEAST < coverage(sample, truth, "length_balanced") < MOST


def test_leaving_out_is_what_it_says() -> None:
    """The interval's width from leaving each row out in turn, computed by brute force."""
    draw = np.random.default_rng(3)
    rows = [Judged(tuple(draw.normal(size=n)), (1,) * n, tuple(range(n))) for n in (2, 3, 4, 3, 2, 4)]
    value = found(rows).accuracy.value
    without = [found(list(part)).accuracy.value for part in itertools.combinations(rows, len(rows) - 1)]
    variance = (5 / 6) ** 2 * float(((np.array(without) - np.mean(without)) ** 2).sum())
    assert found(rows).accuracy == pytest.approx(wilson(value, value * (1 - value) / variance))
