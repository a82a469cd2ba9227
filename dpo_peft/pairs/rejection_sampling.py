"""Statistical rejection sampling: of a policy's own completions, those that the best policy for a reward would give.

The optimum of RLHF's objective is pi*(y|x) = pi(y|x) exp(r(x, y) / beta) / Z(x) (docs/derivations.md, eq. 4).
Completions sampled from pi become completions of pi* if each is kept with a probability in proportion to exp(r /
beta). Liu et al. 2023, "Statistical Rejection Sampling Improves Preference Optimization" (RSO, arXiv:2309.06657),
section 3.2 and Algorithm 1; docs/derivations.md, eq. 84.

Nothing here knows of models or texts: candidates are their rewards, by index.
"""

import math
from collections.abc import Sequence
from random import Random
from typing import NamedTuple


class Accepted(NamedTuple):
    """What rejection sampling kept of the candidates."""

    indices: list[int]  # in the order in which they were accepted
    trials: int  # decisions that were taken: accepted and rejected ones, over all rounds


def acceptance(reward: float, best: float, beta: float) -> float:
    """Returns the probability that a candidate is accepted: exp((reward - best) / beta), `best` being the highest
    reward that is left. Theorem 1 of the paper: its mean over pi is the expected share of accepted ones."""
    return math.exp((reward - best) / beta)


def rejection_sample(rewards: Sequence[float], accept: int, beta: float, draw: Random) -> Accepted:
    """Accepts `accept` of the candidates, each at most once (Algorithm 1 of the paper).

    In rounds: every candidate that is left is accepted with `acceptance`, against the highest reward that was left
    when the round began. As the best one is always accepted, each round accepts one at least. With many candidates the
    accepted ones are a sample of pi*; beta to infinity gives the first ones, beta to 0 the best ones.

    Args:
        rewards: one finite number per candidate, in the order in which they were sampled. A text stands once.
        accept: how many to accept; all of them if there are no more.
        beta: above 0, in units of the reward. Smaller trusts the reward more.
        draw: decides, one uniform number per trial.
    """
    left, trials = list(range(len(rewards))), 0
    kept: list[int] = []
    while left and len(kept) < accept:
        best = max(rewards[i] for i in left)
        for i in list(left):
            trials += 1
            if draw.random() < acceptance(rewards[i], best, beta):
                kept.append(i)
                left.remove(i)
                if len(kept) == accept:
                    break
    return Accepted(kept, trials)


def first_round(accepted: Sequence[int], rewards: Sequence[float], draw: Random) -> list[tuple[int, int]]:
    """Pairs the accepted candidates at random, each in one pair (the paper's first-round-rank).

    Returns:
        (better, worse) by reward; of two equal ones in the order drawn. An odd one is left over.
    """
    return tournament(accepted, rewards, draw)[: len(accepted) // 2]


def tournament(accepted: Sequence[int], rewards: Sequence[float], draw: Random) -> list[tuple[int, int]]:
    """Pairs at random, then the winners, until one is left: one pair less than there are candidates (the paper's
    tournament-rank). Of two equal ones the first drawn stays; an odd one stays by itself.

    Returns:
        (better, worse) of every match, round by round.
    """
    order, matches = draw.sample(list(accepted), len(accepted)), []
    while len(order) > 1:
        twos = zip(order[::2], order[1::2], strict=False)
        played = [(a, b) if rewards[a] >= rewards[b] else (b, a) for a, b in twos]
        matches += played
        order = [winner for winner, _ in played] + order[2 * len(played) :]
    return matches


MATCHES = {"first_round": first_round, "tournament": tournament}
