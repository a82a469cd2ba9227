"""The DPO loss against hand numbers, its published gradient, and TRL's own expression."""

import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_peft import dpo_loss
from dpo_peft.config import DPOConfig
from dpo_peft.losses import REGISTRY


def column(*values: float, grad: bool = False) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


def random_logps(pairs: int = 6, grad: bool = False) -> list[Tensor]:
    """Four (B,) tensors of log-probs in float64; only those of the policy carry gradients."""
    draw = torch.Generator().manual_seed(5)
    logps = [-20 + 8 * torch.randn(pairs, generator=draw, dtype=torch.float64) for _ in range(4)]
    return [x.requires_grad_(grad and i < 2) for i, x in enumerate(logps)]


def test_example_of_the_note() -> None:
    """Example 3.1: rewards 0.2 and -0.1, margin 0.3, log(1 + exp(-0.3)) = 0.5544."""
    loss = dpo_loss(column(-10.0), column(-15.0), column(-12.0), column(-14.0), beta=0.1)
    assert loss.chosen_rewards_B.item() == pytest.approx(0.2)
    assert loss.rejected_rewards_B.item() == pytest.approx(-0.1)
    assert loss.losses_B.item() == pytest.approx(0.5543552444685272, abs=1e-12)
    assert "0.5544" in inspect.getdoc(dpo_loss)


@pytest.mark.parametrize("beta", [0.01, 0.1, 0.5, 1.0])
def test_by_hand_for_several_betas(beta: float) -> None:
    loss = dpo_loss(column(-10.0), column(-15.0), column(-12.0), column(-14.0), beta=beta)
    assert loss.losses_B.item() == pytest.approx(math.log(1 + math.exp(-beta * 3)), abs=1e-12)


def test_equal_policy_and_reference_give_log_two() -> None:
    logps = random_logps()[:2]
    loss = dpo_loss(*logps, *logps, beta=0.7)
    assert loss.losses_B.tolist() == [math.log(2)] * 6
    assert not loss.chosen_rewards_B.any() and not loss.rejected_rewards_B.any()


def test_only_ratios_to_the_reference_count() -> None:
    """Shifting policy and reference of a completion alike changes nothing."""
    chosen, rejected, ref_chosen, ref_rejected = random_logps()
    shifted = dpo_loss(chosen + 3.0, rejected - 2.0, ref_chosen + 3.0, ref_rejected - 2.0)
    expected = dpo_loss(chosen, rejected, ref_chosen, ref_rejected)
    torch.testing.assert_close(shifted.losses_B, expected.losses_B, rtol=1e-12, atol=0)


def test_a_flipped_label_is_a_swapped_pair() -> None:
    """Swapping chosen and rejected turns the margin d into -d: the losses differ by exactly d."""
    chosen, rejected, ref_chosen, ref_rejected = random_logps()
    straight = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.3)
    swapped = dpo_loss(rejected, chosen, ref_rejected, ref_chosen, beta=0.3)
    margin = straight.chosen_rewards_B - straight.rejected_rewards_B
    torch.testing.assert_close(swapped.losses_B - straight.losses_B, margin, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(swapped.chosen_rewards_B, straight.rejected_rewards_B)


def test_gradcheck() -> None:
    chosen, rejected, ref_chosen, ref_rejected = random_logps(grad=True)
    for options in ({"beta": 0.3}, {"beta": 0.3, "reward_clip": 1.5}):
        assert torch.autograd.gradcheck(
            lambda c, r, o=options: dpo_loss(c, r, ref_chosen, ref_rejected, **o).losses_B, (chosen, rejected)
        )


def test_gradient_is_that_of_the_note() -> None:
    """(12): -beta (1 - sigmoid(margin)) (grad log pi(y_w) - grad log pi(y_l)), through a real parametrisation."""
    draw = torch.Generator().manual_seed(1)
    theta = torch.randn(6, 5, generator=draw, dtype=torch.float64, requires_grad=True)  # a softmax over 5 answers
    ref = torch.randn(6, 5, generator=draw, dtype=torch.float64).log_softmax(1)
    won, lost, pairs, beta = torch.tensor([0, 1, 2, 3, 4, 0]), torch.tensor([1, 2, 3, 4, 0, 3]), torch.arange(6), 0.4
    logps = theta.log_softmax(1)
    loss = dpo_loss(logps[pairs, won], logps[pairs, lost], ref[pairs, won], ref[pairs, lost], beta)
    loss.losses_B.mean().backward()

    with torch.no_grad():
        # The gradient of log softmax(theta)[y] is onehot(y) - softmax(theta).
        difference = F.one_hot(won, 5).double() - F.one_hot(lost, 5).double()
        margin = beta * ((logps - ref)[pairs, won] - (logps - ref)[pairs, lost])
        expected = -beta * (1 - torch.sigmoid(margin))[:, None] * difference / 6
    torch.testing.assert_close(theta.grad, expected, rtol=1e-12, atol=1e-15)


def test_value_and_gradient_are_trls() -> None:
    """TRL 1.16 writes the sigmoid loss as -logsigmoid(beta * ((c - ref_c) - (r - ref_r)))."""
    mine, other = random_logps(grad=True), random_logps(grad=True)
    dpo_loss(*mine, beta=0.25).losses_B.mean().backward()
    expected = -F.logsigmoid(0.25 * ((other[0] - other[2]) - (other[1] - other[3])))
    expected.mean().backward()
    torch.testing.assert_close(dpo_loss(*mine, beta=0.25).losses_B, expected, rtol=1e-12, atol=0)
    for a, b in zip(mine[:2], other[:2], strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_inputs_stay_finite(dtype: torch.dtype) -> None:
    """log(sigmoid(x)) would be -inf from x = -104 on in float32; logsigmoid goes on."""
    chosen = torch.tensor([1e4, -1e4, -1e4, 0.0], dtype=dtype, requires_grad=True)
    zeros = torch.zeros(4, dtype=dtype)
    rejected = torch.tensor([-1e4, 1e4, -1e4, 0.0], dtype=dtype)
    loss = dpo_loss(chosen, rejected, zeros, zeros, beta=1.0)
    loss.losses_B.sum().backward()
    assert loss.losses_B.tolist() == pytest.approx([0.0, 2e4, math.log(2), math.log(2)])
    assert chosen.grad.tolist() == pytest.approx([0.0, -1.0, -0.5, -0.5])
    assert torch.isinf(torch.log(torch.sigmoid(torch.tensor(-2e4, dtype=dtype))))


def test_reward_clip_by_hand() -> None:
    """beta 1, clip 2: rewards (1, -1) stay; (5, -1) counts as (2, -1); (5, -3) as (2, -2)."""
    zeros = column(0.0, 0.0, 0.0)
    chosen, rejected = column(1.0, 5.0, 5.0, grad=True), column(-1.0, -1.0, -3.0, grad=True)
    loss = dpo_loss(chosen, rejected, zeros, zeros, beta=1.0, reward_clip=2.0)
    margins = [2.0, 3.0, 4.0]
    assert loss.losses_B.tolist() == pytest.approx([math.log1p(math.exp(-m)) for m in margins])
    assert loss.chosen_rewards_B.tolist() == [1.0, 5.0, 5.0]  # as they are, unclipped
    assert loss.rejected_rewards_B.tolist() == [-1.0, -1.0, -3.0]
    loss.losses_B.sum().backward()
    weights = [1 / (1 + math.exp(m)) for m in margins]
    assert chosen.grad.tolist() == pytest.approx([-weights[0], 0.0, 0.0])  # no gradient beyond the clip
    assert rejected.grad.tolist() == pytest.approx([weights[0], weights[1], 0.0])


def test_a_wide_clip_changes_nothing() -> None:
    logps = random_logps()
    assert torch.equal(dpo_loss(*logps, reward_clip=1e3).losses_B, dpo_loss(*logps).losses_B)


def test_rewards_are_detached_and_the_loss_is_not() -> None:
    loss = dpo_loss(*random_logps(grad=True))
    assert loss.losses_B.requires_grad
    assert not loss.chosen_rewards_B.requires_grad and not loss.rejected_rewards_B.requires_grad


def test_registry_agrees_with_functions_and_config() -> None:
    options = set(DPOConfig.__dataclass_fields__)
    for name, objective in REGISTRY.items():
        taken = inspect.signature(objective.loss).parameters
        assert set(objective.options) <= set(taken) and set(objective.options) <= options, name
        assert objective.default_beta == taken["beta"].default
        assert objective.data == "pairs" and "arXiv" in objective.paper and "note" in objective.equation
