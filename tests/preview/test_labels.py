"""What margins say of labels: by hand, and on margins that were drawn with a known share of flipped labels."""

import math

import numpy as np
import pytest

from dpo_peft.preview.labels import easiest, judge
from dpo_peft.training.tally import wilson


def drawn(share: float, seed: int, number: int = 4000, trust: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    """Margins (1, N) whose clean labels are as sigmoid(trust * margin) says, and which labels were flipped."""
    draw = np.random.default_rng(seed)
    margin_N = draw.normal(0, 4 / trust, number)
    right_N = draw.random(number) < 1 / (1 + np.exp(-trust * margin_N))
    flipped_N = draw.random(number) < share
    return (margin_N * np.where(right_N ^ flipped_N, 1, -1))[None], flipped_N


@pytest.mark.parametrize("share", [0.05, 0.1, 0.2, 0.35])
def test_the_share_of_flips_is_found(share: float) -> None:
    found = [judge(drawn(share, seed)[0]) for seed in range(5)]
    assert abs(np.mean([one.flipped for one in found]) - share) < 0.02
    assert abs(np.mean([one.trust for one in found]) / 3 - 1) < 0.15
    for one in found:  # at the greatest likelihood the probabilities add up to the share
        assert abs(one.wrong_N.mean() - one.flipped) < 0.003


@pytest.mark.parametrize("share", [0.1, 0.2])
def test_probabilities_are_calibrated(share: float) -> None:
    sets = [(judge(margins_RN), flipped_N) for margins_RN, flipped_N in (drawn(share, seed) for seed in range(8))]
    wrong_N, flipped_N = np.concatenate([one.wrong_N for one, _ in sets]), np.concatenate([f for _, f in sets])
    for low in (0.0, 0.25, 0.5, 0.75):
        inside = (wrong_N >= low) & (wrong_N < low + 0.25)
        assert abs(wrong_N[inside].mean() - flipped_N[inside].mean()) < 0.1


@pytest.mark.parametrize("share", [0.05, 0.1, 0.2])
def test_four_of_five_rows_that_are_called_wrong_are(share: float) -> None:
    sets = [
        (judge(margins_RN).mislabelled_N, flipped_N) for margins_RN, flipped_N in (drawn(share, i) for i in range(8))
    ]
    called_N, flipped_N = np.concatenate([called for called, _ in sets]), np.concatenate([f for _, f in sets])
    assert abs(flipped_N[called_N].mean() - 0.8) < 0.07  # all above a half would be right in 0.6 to 0.75
    assert called_N[flipped_N].mean() > 0.1


def test_no_flips_are_made_up() -> None:
    assert sum(judge(drawn(0.0, seed)[0]).mislabelled_N.any() for seed in range(20)) <= 3
    noise = np.random.default_rng(0).normal(0, 1, (2, 500))  # an adapter that has learned nothing
    assert judge(noise).flipped == 0.0 and not judge(noise).mislabelled_N.any()


def test_by_hand() -> None:
    """Nine margins of 1 and one of -1, many times over: 10 % disagree, and from one distance alone flips can't be told
    from doubt; with as many of 10 and -10, doubt would have gone and flips remain."""
    near, far = [1.0] * 9 + [-1.0], [10.0] * 9 + [-10.0]
    found = judge(np.array([near * 50]))
    assert found.flipped == 0.0 and math.isclose(found.trust, math.log(9), rel_tol=0.01)
    found = judge(np.array([(near + far) * 50]))
    assert abs(found.flipped - 0.1) < 0.01 and found.mislabelled_N.sum() == 100
    assert found.found[0] == 19  # the first of -10
    # Negative on average but not in every repeat: not stable.
    swaying = np.array([(near + far) * 50, (near + far) * 50])
    swaying[1, 19] = 0.1
    assert not judge(swaying).mislabelled_N[19] and judge(swaying).mislabelled_N.sum() == 99


def test_the_easiest_rows_in_their_order() -> None:
    assert easiest(np.array([0.1, 3.0, -1.0, 2.0, 0.5]), 0.6) == [1, 3, 4]
    assert easiest(np.array([0.0, 0.0, 0.0, 0.0]), 0.5) == [0, 1]  # equal ones as they stand


def crossed(seed: int, signal: float, turned: float = 0.0, rows: int = 100) -> tuple[np.ndarray, np.ndarray]:
    """Margins (1, N) of two folds under linear models after one step on the other fold, and which labels were turned
    of those that follow a direction with this strength; 0: coin flips."""
    draw = np.random.default_rng(seed)
    x_NF, fold_N = draw.normal(size=(rows, 3)), draw.permutation(rows) % 2
    turned_N = draw.random(rows) < turned
    label_N = np.where((draw.random(rows) < 1 / (1 + np.exp(-signal * x_NF[:, 0]))) ^ turned_N, 1, -1)
    other_NN = fold_N[:, None] != fold_N
    return (label_N * ((x_NF @ x_NF.T * other_NN) @ label_N))[None], turned_N


def test_of_coin_flips_nothing_is_said() -> None:
    """Margins of folds sway together: a label acts on another row's margin as that row's label acts on its own."""
    found = [judge(crossed(seed, 0.0)[0]) for seed in range(300)]
    assert (
        sum(not one.chance for one in found) <= 9 and sum(one.mislabelled_N.any() for one in found) <= 3
    )  # 10 without
    as_independent = [wilson(one.accuracy.value, 100).low > 0.5 for one in found]
    assert sum(as_independent) > 12  # more than the 2.5 % of rows that are independent
    assert all(one.flipped == 0 for one in found if one.chance)


def test_of_labels_that_can_be_learned_something_is_said() -> None:
    sets = [(judge(margins_RN), turned_N) for margins_RN, turned_N in (crossed(seed, 5.0, 0.1) for seed in range(20))]
    assert not any(found.chance for found, _ in sets)
    called_N, turned_N = np.concatenate([one.mislabelled_N for one, _ in sets]), np.concatenate([t for _, t in sets])
    assert turned_N[called_N].mean() > 0.5 and called_N[turned_N].mean() > 0.2
