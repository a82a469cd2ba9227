"""The note's theory on tables, exactly and in float64: 3 prompts, 5 answers each, every probability written down.

Suffixes: X prompts, Y answers.
"""

import torch
from torch import Tensor

from dpo_peft import dpo_loss

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
    x, won, lost = (index.flatten() for index in torch.meshgrid(torch.arange(3), torch.arange(5), torch.arange(5)))
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


def test_minimising_dpo_gives_the_rlhf_optimum() -> None:
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
