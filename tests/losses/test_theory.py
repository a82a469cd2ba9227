"""The theory of docs/derivations.md on tables, exactly and in float64: 3 prompts, 5 answers each, every probability
written down.

Suffixes: X prompts, Y answers. Example 3.1 and the gradient (12) are in test_losses.py, the identities of (13)-(18) in
test_losses_identities.py.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dpo_peft.losses import discounts, dpo_loss
from dpo_peft.losses.listwise import multi_negative_loss, plackett_luce_loss
from dpo_peft.losses.pairwise import trajectory_loss

BETA = 0.7


def table(seed: int) -> Tensor:
    return torch.randn(3, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


REF_XY = (1.5 * table(0)).softmax(1)
REWARD_XY = table(1)


def objective(policy_XY: Tensor, beta: float = BETA) -> Tensor:
    """(1): expected reward minus beta times KL(policy || reference), per prompt."""
    return (policy_XY * (REWARD_XY - beta * (policy_XY.log() - REF_XY.log()))).sum(1)


def optimum(beta: float = BETA) -> tuple[Tensor, Tensor]:
    """(4): reference * exp(reward / beta) / Z, and Z of each prompt."""
    weights_XY = REF_XY * (REWARD_XY / beta).exp()
    partition_X = weights_XY.sum(1)
    return weights_XY / partition_X[:, None], partition_X


def test_closed_form_beats_every_perturbation() -> None:
    """(1)-(4): no policy near the closed form, nor far from it, has a higher objective."""
    best_XY, _ = optimum()
    best_X = objective(best_XY)
    draw = torch.Generator().manual_seed(2)
    for scale in (1e-3, 1e-2, 0.1, 1.0, 3.0):
        for _ in range(200):
            noise_XY = torch.randn(3, 5, generator=draw, dtype=torch.float64)
            other_XY = (best_XY.log() + scale * noise_XY).softmax(1)
            assert (objective(other_XY) < best_X).all()
    for other_XY in (REF_XY, torch.full_like(REF_XY, 0.2), optimum(beta=0.9 * BETA)[0], optimum(beta=1.1 * BETA)[0]):
        assert (objective(other_XY) < best_X).all()


def test_value_at_the_optimum_is_the_partition_function() -> None:
    """(2), (3): the objective is beta log Z - beta KL(policy || optimum), so its maximum is beta log Z."""
    best_XY, partition_X = optimum()
    torch.testing.assert_close(objective(best_XY), BETA * partition_X.log())
    other_XY = table(3).softmax(1)
    kl_X = (other_XY * (other_XY.log() - best_XY.log())).sum(1)
    torch.testing.assert_close(objective(other_XY), BETA * partition_X.log() - BETA * kl_X)


def test_gradient_ascent_finds_the_closed_form() -> None:
    theta_XY = torch.zeros(3, 5, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([theta_XY], max_iter=500, tolerance_grad=1e-13, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = -objective(theta_XY.softmax(1)).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(theta_XY.detach().softmax(1), optimum()[0], rtol=1e-3, atol=1e-5)


def test_reward_from_the_policy() -> None:
    """(5): reward = beta log(policy / reference) + beta log Z."""
    best_XY, partition_X = optimum()
    torch.testing.assert_close(BETA * (best_XY / REF_XY).log() + BETA * partition_X.log()[:, None], REWARD_XY)


def bradley_terry() -> Tensor:
    """(6): P(y beats y' | x) for all pairs of answers, (X, Y, Y)."""
    return torch.sigmoid(REWARD_XY[:, :, None] - REWARD_XY[:, None, :])


def test_partition_function_cancels() -> None:
    """(7): the Bradley-Terry probabilities follow from the policy alone; a shift of the reward per prompt is lost."""
    implicit_XY = BETA * (optimum()[0] / REF_XY).log()
    torch.testing.assert_close(torch.sigmoid(implicit_XY[:, :, None] - implicit_XY[:, None, :]), bradley_terry())
    shift_X1 = torch.tensor([[5.0], [-3.0], [0.5]], dtype=torch.float64)
    weights_XY = REF_XY * ((REWARD_XY + shift_X1) / BETA).exp()
    torch.testing.assert_close(weights_XY / weights_XY.sum(1, keepdim=True), optimum()[0])
    assert not torch.allclose(implicit_XY, REWARD_XY)  # the implicit reward itself is off by beta log Z


def expected_loss(policy_XY: Tensor, beta: float = BETA) -> Tensor:
    """(8), (9): the DPO loss on infinitely many Bradley-Terry labels: each ordered pair with its probability."""
    x, won, lost = (
        index.flatten() for index in torch.meshgrid(torch.arange(3), torch.arange(5), torch.arange(5), indexing="ij")
    )
    different = won != lost
    x, won, lost = x[different], won[different], lost[different]
    logps_XY, ref_XY = policy_XY.log(), REF_XY.log()
    loss = dpo_loss(logps_XY[x, won], logps_XY[x, lost], ref_XY[x, won], ref_XY[x, lost], beta)
    return (bradley_terry()[x, won, lost] * loss.losses_B).sum()


def train(beta: float = BETA) -> Tensor:
    theta_XY = REF_XY.log().clone().requires_grad_()
    optimizer = torch.optim.LBFGS([theta_XY], max_iter=500, tolerance_grad=1e-13, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = expected_loss(theta_XY.softmax(1), beta)
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    return theta_XY.detach().softmax(1)


def test_minimizing_dpo_gives_the_rlhf_optimum() -> None:
    """Theorem 4.1, (8)-(11): a tabular policy trained on exact Bradley-Terry probabilities becomes the closed form."""
    trained_XY = train()
    torch.testing.assert_close(trained_XY, optimum()[0], rtol=1e-5, atol=1e-7)
    assert (trained_XY - REF_XY).abs().max() > 0.1
    # The test can fail: another beta leads to another policy, that beta's own optimum.
    torch.testing.assert_close(train(beta=0.35), optimum(beta=0.35)[0], rtol=1e-5, atol=1e-7)
    assert (optimum(beta=0.35)[0] - optimum()[0]).abs().max() > 0.05


def test_loss_at_the_optimum_is_the_entropy_of_the_labels() -> None:
    """(11): the smallest loss there is, reached at the closed form and nowhere else."""
    best = expected_loss(optimum()[0])
    probability = bradley_terry()
    off = ~torch.eye(5, dtype=torch.bool).expand(3, 5, 5)
    entropy = -(probability * probability.log())[off].sum()
    torch.testing.assert_close(best, entropy)
    for seed in range(20):
        assert expected_loss((optimum()[0].log() + 0.05 * table(10 + seed)).softmax(1)) > best


# ---------------------------------------------------------------------------------------------------------------------
# Lists: (13)-(18) beyond pairs.


def fit(loss: Callable[[Tensor], Tensor], start_XY: Tensor) -> Tensor:
    """The tabular policy (softmax over the last dimension) that minimises a loss, from `start_XY`."""
    theta_XY = start_XY.log().clone().requires_grad_()
    options: dict[str, Any] = dict(
        max_iter=500, tolerance_grad=1e-14, tolerance_change=0, line_search_fn="strong_wolfe"
    )
    optimizer = torch.optim.LBFGS([theta_XY], **options)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(theta_XY.softmax(-1))
        value.backward()
        return value

    for _ in range(3):
        optimizer.step(closure)
    return theta_XY.detach().softmax(-1)


def ranked_lists(sizes: tuple[int, ...], whole_order: bool) -> tuple[Tensor, ...]:
    """Every list of completions a Plackett-Luce judge can return, with its probability.

    Returns prompt and answer of each completion, its grade and list, and the probability of each list. With
    `whole_order` the list's whole order is drawn, otherwise the best one only.
    """
    prompts, answers, grades, lists, weights = [], [], [], [], []
    for x, size in itertools.product(range(3), sizes):
        for chosen in itertools.combinations(range(5), size):
            for order in itertools.permutations(chosen) if whole_order else [(y, *chosen) for y in chosen]:
                ranking = list(dict.fromkeys(order))  # without the repeated best one
                reward = REWARD_XY[x, ranking]
                steps = range(size - 1) if whole_order else range(1)
                weights.append(math.prod(float(reward[i:].softmax(0)[0]) for i in steps))
                lists += [len(weights) - 1] * size
                prompts += [x] * size
                answers += ranking
                grades += [float(size - i) for i in range(size)]
    as_index = [torch.tensor(values) for values in (prompts, answers)]
    return *as_index, torch.tensor(grades), torch.tensor(lists), torch.tensor(weights, dtype=torch.float64)


@pytest.mark.parametrize(
    ("loss", "whole_order"),
    [(multi_negative_loss, False), pytest.param(plackett_luce_loss, True, marks=pytest.mark.slow)],
)
def test_list_losses_have_the_rlhf_optimum(loss: Callable[..., Tensor], whole_order: bool) -> None:
    """(17), and the whole ranking: trained on exact Plackett-Luce choices from lists of 2 to 4 answers, the policy
    becomes the closed form (3)."""
    x, y, grades, lists, weights = ranked_lists((2, 3, 4), whole_order)
    assert float(weights.sum()) == pytest.approx(3 * (10 + 10 + 5))  # each set of answers, probabilities add up to 1

    def expected(policy_XY: Tensor) -> Tensor:
        scores = (policy_XY.log() - REF_XY.log())[x, y]
        return (weights * loss(scores, grades, lists, len(weights), beta=BETA)).sum()

    trained_XY = fit(expected, REF_XY)
    torch.testing.assert_close(trained_XY, optimum()[0], rtol=1e-5, atol=1e-7)
    assert (trained_XY - REF_XY).abs().max() > 0.1
    # At the optimum the loss is the entropy of the judge, its smallest value.
    torch.testing.assert_close(expected(trained_XY), -(weights * weights.log()).sum())


# ---------------------------------------------------------------------------------------------------------------------
# A two-step decision process: (24)-(34), (46)-(48).
#
# Two start states, 3 actions each; each leads to an own second state with 3 actions. Suffixes: S start states, A first
# and B second actions.

GAMMA = 0.6
REF_SA = (0.7 * table(40)[:2, :3]).softmax(1)
REF_SAB = torch.stack([(0.7 * table(41 + s)[:3, :3]).softmax(1) for s in range(2)])
REWARD_SA = table(50)[:2, :3] + torch.tensor([[0.0], [2.0]], dtype=torch.float64)  # the second start is worth more
REWARD_SAB = torch.stack([table(51 + s)[:3, :3] for s in range(2)])


def soft_optimum() -> dict[str, Tensor]:
    """The optimal policy and advantages of (32), backwards from the last step."""
    value_SA = BETA * (REF_SAB * (REWARD_SAB / BETA).exp()).sum(2).log()
    quality_SA = REWARD_SA + GAMMA * value_SA  # (36)
    value_S = BETA * (REF_SA * (quality_SA / BETA).exp()).sum(1).log()
    return {
        "first_SA": REF_SA * ((quality_SA - value_S[:, None]) / BETA).exp(),
        "second_SAB": REF_SAB * ((REWARD_SAB - value_SA[:, :, None]) / BETA).exp(),
        "advantage_SA": quality_SA - value_S[:, None],
        "advantage_SAB": REWARD_SAB - value_SA[:, :, None],
        "value_S": value_S,
    }


def discounted(first_SA: Tensor, second_SAB: Tensor) -> Tensor:
    """Sum over the two steps of gamma^t times a quantity, for all 18 trajectories, by the package's discounts."""
    gammas = discounts(torch.tensor([0, 1]), GAMMA)
    return (gammas[0] * first_SA[:, :, None] + gammas[1] * second_SAB).flatten()


def return_S(first_SA: Tensor, second_SAB: Tensor) -> Tensor:
    """(32): expected discounted reward minus beta log-ratio, per start state."""
    inner_SA = (second_SAB * (REWARD_SAB - BETA * (second_SAB / REF_SAB).log())).sum(2)
    return (first_SA * (REWARD_SA - BETA * (first_SA / REF_SA).log() + GAMMA * inner_SA)).sum(1)


def test_optimal_policy_and_advantage() -> None:
    """(33), (34): policy = reference * exp(A / beta), no partition function; it is normalized and beats all others."""
    best = soft_optimum()
    for key in ("first_SA", "second_SAB"):
        torch.testing.assert_close(best[key].sum(-1), torch.ones_like(best[key].sum(-1)))
    torch.testing.assert_close(return_S(best["first_SA"], best["second_SAB"]), best["value_S"])
    draw = torch.Generator().manual_seed(3)
    for scale in (1e-2, 0.1, 1.0):
        for _ in range(100):
            noise_SA = scale * torch.randn(2, 3, generator=draw, dtype=torch.float64)
            noise_SAB = scale * torch.randn(2, 3, 3, generator=draw, dtype=torch.float64)
            first_SA = (best["first_SA"].log() + noise_SA).softmax(1)
            assert (return_S(first_SA, best["second_SAB"]) < best["value_S"]).all()
            second_SAB = (best["second_SAB"].log() + noise_SAB).softmax(2)
            assert (return_S(best["first_SA"], second_SAB) < best["value_S"]).all()
    torch.testing.assert_close(best["advantage_SA"], BETA * (best["first_SA"] / REF_SA).log())
    torch.testing.assert_close(best["advantage_SAB"], BETA * (best["second_SAB"] / REF_SAB).log())


def fit_trajectories(preference: Tensor, across_starts: bool = True) -> tuple[Tensor, Tensor]:
    """The policy that (46) gives for P[trajectory i over j] = sigmoid(preference_i - preference_j).

    From all 18 x 18 pairs, or only those that begin in the same state.
    """
    i, j = torch.cartesian_prod(torch.arange(18), torch.arange(18)).T
    if not across_starts:
        i, j = i[i // 9 == j // 9], j[i // 9 == j // 9]
    y = torch.sigmoid(preference[i] - preference[j])
    reference = torch.cat([REF_SA, REF_SAB.flatten(0, 1)])  # 8 states of 3 actions

    def expected(policy: Tensor) -> Tensor:
        ratio = policy.log() - reference.log()
        scores = discounted(ratio[:2], ratio[2:].view(2, 3, 3))
        won = trajectory_loss(scores[i], scores[j], beta=BETA)
        return (y * won + (1 - y) * trajectory_loss(scores[j], scores[i], beta=BETA)).sum()

    trained = fit(expected, reference)
    return trained[:2], trained[2:].view(2, 3, 3)


def test_trajectory_loss_recovers_the_optimal_policy() -> None:
    """(46), (47): on exact advantage-based preferences (31), also between different start states, training gives
    (33), and beta log-ratios give the optimal advantages (34)."""
    best = soft_optimum()
    first_SA, second_SAB = fit_trajectories(discounted(best["advantage_SA"], best["advantage_SAB"]))
    torch.testing.assert_close(first_SA, best["first_SA"], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(second_SAB, best["second_SAB"], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(BETA * (first_SA / REF_SA).log(), best["advantage_SA"], rtol=1e-4, atol=1e-5)
    assert (first_SA - REF_SA).abs().max() > 0.1


def test_reward_based_preferences_do_not() -> None:
    """Theorem 5.1, (27), (28): with preferences from discounted rewards (24) the partition functions stay in, and the
    same training ends at another policy. They cancel where the trajectories start alike and transitions are
    deterministic: there sum gamma^t r = sum gamma^t A + V(start), as sums telescope."""
    best = soft_optimum()
    rewards = discounted(REWARD_SA, REWARD_SAB)
    first_SA, _ = fit_trajectories(rewards)
    assert (first_SA - best["first_SA"]).abs().max() > 0.02
    first_SA, second_SAB = fit_trajectories(rewards, across_starts=False)
    torch.testing.assert_close(first_SA, best["first_SA"], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(second_SAB, best["second_SAB"], rtol=1e-5, atol=1e-7)
    advantages = discounted(best["advantage_SA"], best["advantage_SAB"])
    torch.testing.assert_close(rewards - advantages, best["value_S"].repeat_interleave(9))


def test_one_step_trajectories_are_dpo() -> None:
    """(48): one step, gamma whatever, y = 1."""
    x, won, lost = torch.tensor([0, 1, 2]), torch.tensor([0, 3, 4]), torch.tensor([1, 2, 0])
    policy_XY = table(60).softmax(1)
    ratio_XY = (policy_XY / REF_XY).log()
    weight = discounts(torch.zeros(3, dtype=torch.long), GAMMA)
    trajectories = trajectory_loss(weight * ratio_XY[x, won], weight * ratio_XY[x, lost], beta=BETA)
    logps_XY, ref_XY = policy_XY.log(), REF_XY.log()
    pairs = dpo_loss(logps_XY[x, won], logps_XY[x, lost], ref_XY[x, won], ref_XY[x, lost], BETA)
    torch.testing.assert_close(trajectories, pairs.losses_B)


def test_walking_toward_the_goal() -> None:
    """Example 5.1, (30): equal rewards can't tell the two walks apart, advantages can.

    A line of cells with the goal at one end; each step costs 1, the goal gives 100. From the same cell, walk S goes
    two cells nearer, walk O two cells away.
    """
    cells, start = 9, 4
    reward = torch.full((cells, 2), -1.0, dtype=torch.float64)
    reward[1, 0] = 100.0  # the step onto cell 0, where the walk ends
    value = torch.zeros(cells, dtype=torch.float64)
    target = torch.stack([(torch.arange(cells) - 1).clamp(min=0), (torch.arange(cells) + 1).clamp(max=cells - 1)], 1)
    for _ in range(200):
        quality = reward + 0.9 * value[target]
        value = BETA * (0.5 * (quality / BETA).exp()).sum(1).log()
        value[0] = 0.0
    advantage = reward + 0.9 * value[target] - value[:, None]
    walks = {"S": [(start, 0), (start - 1, 0)], "O": [(start, 1), (start + 1, 1)]}
    rewards = {name: sum(float(reward[s, a]) for s, a in walk) for name, walk in walks.items()}
    advantages = {name: sum(float(advantage[s, a]) for s, a in walk) for name, walk in walks.items()}
    assert rewards["S"] == rewards["O"] == -2.0
    assert advantages["S"] > -2 * BETA * math.log(2) > advantages["O"] and advantages["O"] < -10
