"""Rejection sampling against the exact law of the paper's algorithm, by enumeration, and against the target policy."""

import math
from collections import Counter
from itertools import product
from random import Random
from typing import Any

import pytest

from dpo_peft.pairs import rejection_sampling as rso
from dpo_peft.pairs.rejection_sampling import Accepted, first_round, rejection_sample, tournament

DRAWS = 20_000
REWARDS = [0.3, 1.0, -0.4, 0.7]  # of a toy set of candidates, in the order in which they were sampled
BETA = 0.5
FITS, WRONG = 3.3, 6.0  # standard normal deviates

Law = dict[tuple[int, ...], float]


def exact_law(rewards: list[float], accept: int, beta: float) -> Law:
    """Probability of every order of accepted candidates, from the paper's Algorithm 1: in each round every candidate
    that is left is tried once, in order, against the best that was left when the round began."""
    law: Counter[tuple[int, ...]] = Counter()

    def a_round(kept: tuple[int, ...], left: list[int], probability: float) -> None:
        if len(kept) == min(accept, len(rewards)):
            law[kept] += probability
            return
        best = max(rewards[i] for i in left)
        chances = [math.exp((rewards[i] - best) / beta) for i in left]
        for outcome in product((True, False), repeat=len(left)):
            chance = math.prod(p if yes else 1 - p for p, yes in zip(chances, outcome, strict=True))
            if chance:
                taken = [i for i, yes in zip(left, outcome, strict=True) if yes][: accept - len(kept)]
                a_round((*kept, *taken), [i for i in left if i not in taken], probability * chance)

    a_round((), list(range(len(rewards))), 1.0)
    return dict(law)


def chi_square(counts: Counter[Any], law: dict[Any, float], draws: int) -> float:
    """Pearson's statistic as a standard normal deviate (Wilson and Hilferty 1931): above 3.3 with probability 0.0005.
    Outcomes of less than 5 expected draws are put together."""
    rare = [key for key, p in law.items() if p * draws < 5]
    cells = [(counts[key], p * draws) for key, p in law.items() if key not in rare]
    if rare:
        cells.append((sum(counts[key] for key in rare), max(sum(law[key] for key in rare) * draws, 1e-9)))
    assert sum(counts.values()) == draws and not counts.keys() - law.keys()
    statistic = sum((seen - expected) ** 2 / expected for seen, expected in cells)
    spread = 2 / (9 * (len(cells) - 1))
    return ((statistic / (len(cells) - 1)) ** (1 / 3) - 1 + spread) / math.sqrt(spread)


def orders(rewards: list[float], accept: int, beta: float, seed: int = 0) -> Counter[tuple[int, ...]]:
    draw = Random(seed)
    return Counter(tuple(rejection_sample(rewards, accept, beta, draw).indices) for _ in range(DRAWS))


def test_the_law_by_hand() -> None:
    """Two candidates, one accepted, beta 1: the first one, of reward 0 against ln 2, is taken with probability 1/2;
    otherwise the second, the best, always is."""
    law = exact_law([0.0, math.log(2)], 1, 1.0)
    assert law == pytest.approx({(0,): 0.5, (1,): 0.5})
    # Both accepted: in one round with 1/2, in the order of the candidates; else the best one first.
    assert exact_law([0.0, math.log(2)], 2, 1.0) == pytest.approx({(0, 1): 0.5, (1, 0): 0.5})


@pytest.mark.parametrize("accept", [1, 2, 3, 4])
def test_accepted_orders_follow_the_exact_law(accept: int) -> None:
    law = exact_law(REWARDS, accept, BETA)
    assert sum(law.values()) == pytest.approx(1)
    assert chi_square(orders(REWARDS, accept, BETA), law, DRAWS) < FITS


class Scripted(Random):
    """Gives the uniform numbers that it is told to."""

    def __init__(self, numbers: list[float]):
        super().__init__()
        self.numbers = iter(numbers)

    def random(self) -> float:
        return next(self.numbers)


@pytest.mark.parametrize("factor", [1 - 1e-12, 1 + 1e-12])
def test_the_threshold_is_exactly_the_papers(factor: float) -> None:
    """u just below or above exp((r_i - r_max) / beta) accepts or rejects candidate i; in the second round r_max is the
    best that was left by the first."""
    first = [math.exp((reward - 1.0) / BETA) for reward in REWARDS]
    for i in (0, 2, 3):
        tried = [0.999, 0.999, 0.999, 0.999]
        tried[i] = first[i] * factor
        accepted = rejection_sample(REWARDS, 2, BETA, Scripted([*tried, 0.999, 0.999, 0.999]))
        below = sorted({i, 1}) if factor < 1 else [1, 3]  # the best is always accepted; and in round 2 the next best
        assert accepted.indices == below
    second = math.exp((0.3 - 0.7) / BETA) * factor  # candidate 0 in round 2, against candidate 3
    accepted = rejection_sample(REWARDS, 2, BETA, Scripted([0.999, 0.5, 0.999, 0.999, second, 0.999, 0.5]))
    assert accepted == Accepted([1, 0] if factor < 1 else [1, 3], 5 if factor < 1 else 7)


@pytest.mark.parametrize(
    ("wrong", "accept"),
    [
        (lambda reward, best, beta: math.exp((best - reward) / -beta / 2), 2),  # another beta
        (lambda reward, best, beta: math.exp((reward - best) * beta), 2),  # times instead of divided by beta
        (lambda reward, best, beta: math.exp((min(REWARDS) - reward) / beta), 2),  # the sign: prefers the worst
        (lambda reward, best, beta: math.exp((reward - max(REWARDS)) / beta), 3),  # the best is not looked up again
        (lambda reward, best, beta: float(reward == best), 2),  # the best ones, without chance
    ],
)
def test_the_chi_square_rejects_a_wrong_rule(wrong: Any, accept: int, monkeypatch: Any) -> None:
    law = exact_law(REWARDS, accept, BETA)
    monkeypatch.setattr(rso, "acceptance", wrong)
    counts = orders(REWARDS, accept, BETA)
    for impossible in counts.keys() - law.keys():
        law[impossible] = 0.0
    assert chi_square(counts, law, DRAWS) > WRONG


# ---- The target policy ----------------------------------------------------------------------------------------------

POLICY = {"a": 0.5, "b": 0.3, "c": 0.15, "d": 0.05}  # pi(y) of a toy task of four kinds of answers
REWARD = {"a": -1.0, "b": 0.0, "c": 0.5, "d": 1.2}
MANY = 300  # candidates


def first_accepted(candidates: int, draws: int, policy: dict[str, float], beta: float = 1.0) -> Counter[str]:
    """Kind of the first accepted of so many answers sampled from the policy, again and again. Each answer is a text of
    its own; its kind decides its reward."""
    draw, found = Random(2), Counter[str]()
    for _ in range(draws):
        kinds = draw.choices(list(policy), list(policy.values()), k=candidates)
        accepted = rejection_sample([REWARD[kind] for kind in kinds], 1, beta, draw)
        found[kinds[accepted.indices[0]]] += 1
    return found


def optimal_policy(beta: float) -> dict[str, float]:
    """pi*(y) = pi(y) exp(r(y) / beta) / Z (docs/derivations.md, eq. 4)."""
    weights = {kind: p * math.exp(REWARD[kind] / beta) for kind, p in POLICY.items()}
    return {kind: weight / sum(weights.values()) for kind, weight in weights.items()}


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
def test_with_many_candidates_the_first_accepted_is_a_sample_of_the_optimal_policy(beta: float) -> None:
    draws = 3000
    assert chi_square(first_accepted(MANY, draws, POLICY, beta), optimal_policy(beta), draws) < FITS
    assert chi_square(first_accepted(MANY, draws, POLICY, 3 * beta), optimal_policy(beta), draws) > WRONG  # control


def test_with_few_candidates_it_follows_the_exact_mixture() -> None:
    """Three candidates: the law of the first accepted, over all 64 samples of the policy, weighted by their
    probability. It isn't the optimal policy yet, which the same test sees."""
    law: Counter[str] = Counter()
    for kinds in product(POLICY, repeat=3):
        chance = math.prod(POLICY[kind] for kind in kinds)
        for (first,), p in exact_law([REWARD[kind] for kind in kinds], 1, 1.0).items():
            law[kinds[first]] += chance * p
    counts = first_accepted(3, DRAWS, POLICY)
    assert chi_square(counts, dict(law), DRAWS) < FITS
    assert chi_square(counts, optimal_policy(1.0), DRAWS) > WRONG


def test_the_acceptance_rate_is_that_of_theorem_1() -> None:
    """E[exp((r - r_max) / beta)] under the policy, with 300 candidates of which the first 8 accepted end the work."""
    beta, draw, trials, accepted = 0.8, Random(3), 0, 0
    for _ in range(500):
        kinds = draw.choices(list(POLICY), list(POLICY.values()), k=MANY)
        result = rejection_sample([REWARD[kind] for kind in kinds], 8, beta, draw)
        trials, accepted = trials + result.trials, accepted + len(result.indices)
    expected = sum(p * math.exp((REWARD[kind] - 1.2) / beta) for kind, p in POLICY.items())
    # The number of trials until 8 are accepted is negative binomial: mean 8 / p, variance 8 (1 - p) / p**2.
    mean, variance = 8 / expected, 8 * (1 - expected) / expected**2
    assert abs(trials / 500 - mean) < 4 * math.sqrt(variance / 500)
    assert accepted == 4000


def test_limits_of_beta() -> None:
    """To 0 it takes the best ones, one a round; to infinity the first ones (remark under Theorem 1)."""
    assert rejection_sample(REWARDS, 3, 1e-9, Random(0)).indices == [1, 3, 0]
    assert rejection_sample(REWARDS, 3, 1e9, Random(0)) == Accepted([0, 1, 2], 3)


def test_all_are_accepted_if_there_are_no_more() -> None:
    assert sorted(rejection_sample([0.0, 5.0], 8, 0.1, Random(0)).indices) == [0, 1]
    assert rejection_sample([], 8, 0.1, Random(0)) == Accepted([], 0)


# ---- Pairs of the accepted ------------------------------------------------------------------------------------------


def test_the_first_round_pairs_everyone_once_at_random() -> None:
    rewards, seen = [0.0, 1.0, 2.0, 3.0], Counter[tuple[tuple[int, int], ...]]()
    draw = Random(0)
    for _ in range(3000):
        matches = first_round([0, 1, 2, 3], rewards, draw)
        assert sorted(i for match in matches for i in match) == [0, 1, 2, 3]
        assert all(rewards[better] > rewards[worse] for better, worse in matches)
        seen[tuple(sorted(matches))] += 1
    law = {((1, 0), (3, 2)): 1 / 3, ((2, 0), (3, 1)): 1 / 3, ((2, 1), (3, 0)): 1 / 3}
    assert chi_square(seen, law, 3000) < FITS
    assert len(first_round([5, 7, 8], [0.0] * 9, draw)) == 1  # the odd one is left over


@pytest.mark.parametrize("number", [2, 3, 5, 8])
def test_a_tournament_has_one_champion(number: int) -> None:
    rewards = [float(i) for i in range(number)]
    for seed in range(50):
        matches = tournament(range(number), rewards, Random(seed))
        losers = [worse for _, worse in matches]
        assert sorted(losers) == list(range(number - 1))  # all but the best one lose, once each
        assert all(rewards[better] > rewards[worse] for better, worse in matches)
