"""Every objective's docstring numbers and registry entry; and `dpo_loss`, the loss of four log-probs.

Gradients and extreme inputs are in test_numerics.py, equality with TRL in test_trl.py, identities
between losses in test_identities.py.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_peft.losses import (
    REGISTRY,
    Objective,
    discounts,
    dpo_loss,
    length_desensitized_weights,
    reference_point,
    shape_scores,
    wpo_weights,
)
from dpo_peft.losses.anchored import apo_down_loss, apo_zero_loss, bco_pair_loss, nca_pair_loss, sppo_hard_loss
from dpo_peft.losses.listwise import multi_negative_loss, plackett_luce_loss
from dpo_peft.losses.pairwise import (
    aot_loss,
    aot_unpaired_loss,
    discopop_loss,
    exo_pair_loss,
    hinge_loss,
    ipo_loss,
    robust_loss,
    sigmoid_loss,
    sigmoid_norm_loss,
    trajectory_loss,
)
from dpo_peft.losses.reference_free import (
    cpo_hinge_loss,
    cpo_ipo_loss,
    cpo_loss,
    orpo_loss,
    sft_loss,
    simpo_loss,
)
from dpo_peft.losses.unpaired import apo_zero_unpaired_loss, kto_loss
from dpo_peft.objective import Scored, Totals, TrainingObjective


def column(*values: float, grad: bool = False) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


# ---------------------------------------------------------------------------------------------------------------------
# The docstrings' numbers: function, positional inputs, options, the figures as its docstring prints them.

LOG_HALF, LOG_FIFTH = math.log(0.5), math.log(0.2)
HAND: list[tuple[Callable[..., Any], list[Any], dict[str, Any], list[str]]] = [
    (sigmoid_loss, [[2], [-1]], {}, ["0.5544"]),
    (sigmoid_loss, [[2], [-1], [0.1]], {}, ["0.5981"]),
    (sigmoid_loss, [[2], [-1]], {"label_smoothing": 0.1}, ["0.5844"]),
    (trajectory_loss, [[1 + 0.5 * 2], [-1]], {}, ["0.5544"]),
    (hinge_loss, [[2], [-1]], {}, ["0.7"]),
    (ipo_loss, [[2], [-1], [4], [2]], {}, ["4.0"]),
    (ipo_loss, [[2], [-1], [4], [2]], {"ipo_length_normalize": True}, ["16.0"]),
    (exo_pair_loss, [[2], [-1]], {"label_smoothing": 0.1}, ["0.3584"]),
    (robust_loss, [[2], [-1]], {"label_smoothing": 0.1}, ["0.5169"]),
    (discopop_loss, [[2], [-1]], {"discopop_tau": 0.3}, ["0.6907"]),
    (sigmoid_norm_loss, [[2], [-1], [4], [2]], {}, ["0.6444"]),
    (nca_pair_loss, [[2], [-1]], {}, ["1.3194"]),
    (bco_pair_loss, [[2], [-1]], {}, ["1.2425"]),
    (sppo_hard_loss, [[2], [-1]], {}, ["25.0"]),
    (apo_zero_loss, [[2], [-1]], {}, ["0.9252"]),
    (apo_down_loss, [[2], [-1]], {}, ["0.9754"]),
    (aot_loss, [[-10, -12], [-15, -13], [-14, -13], [-16, -12]], {}, ["0.5981", "0.5544"]),
    (aot_unpaired_loss, [[3, 1], [-2, 1]], {}, ["0.5544", "0.5981"]),
    (sft_loss, [[6, 2], 2.0], {}, ["3.0", "1.0"]),
    (simpo_loss, [[-10], [-15], [5], [5]], {"beta": 2.0, "simpo_gamma": 1.0}, ["0.3133"]),
    (simpo_loss, [[-10], [-15], [5], [5]], {"beta": 2.0, "simpo_gamma": 1.0, "alphapo_alpha": 0.5}, ["0.0023"]),
    (orpo_loss, [[2 * LOG_HALF], [LOG_FIFTH], [2], [1], [-2 * LOG_HALF], 2.0], {}, ["0.7155"]),
    (cpo_loss, [[-10], [-15], [10], 5.0], {}, ["2.4741"]),
    (cpo_hinge_loss, [[-10], [-15], [10], 5.0], {}, ["2.5"]),
    (cpo_ipo_loss, [[-10], [-15], [5], [5], [10], 5.0], {}, ["18.0"]),
    (multi_negative_loss, [[2, -1, 0, 1], [1, 0, 0, 0], torch.tensor([0] * 4), 1], {"beta": 0.5}, ["0.7873"]),
    (plackett_luce_loss, [[2, 1, -1], [3, 2, 1], torch.tensor([0] * 3), 1], {"beta": 0.5}, ["0.9174"]),
    (kto_loss, [[2, -1], [1, 0], [0.5, 1.5]], {}, ["0.4750", "0.4502"]),
    (apo_zero_unpaired_loss, [[2, -1], [1, 0]], {}, ["0.4502", "0.4750"]),
    (reference_point, [[0.5, 1.5]], {}, ["1.0"]),
    (reference_point, [[-2, 1]], {}, ["0.0"]),
    (shape_scores, [[1], 0.1], {}, ["1.0"]),
    (shape_scores, [[1], 0.1], {"f_divergence_type": "forward_kl"}, ["0.6321"]),
    (shape_scores, [[1], 0.1], {"f_divergence_type": "js_divergence"}, ["0.3799"]),
    (shape_scores, [[1], 0.1], {"f_divergence_type": "alpha_divergence"}, ["0.7869"]),
    (discounts, [torch.tensor([0, 1, 3]), 0.5], {}, ["1", "0.5", "0.125"]),
    (
        length_desensitized_weights,
        [torch.arange(5), torch.full((5,), 3), 0.2],
        {},
        ["1", "1", "1", "0.2", "0.2"],
    ),
    (wpo_weights, [[LOG_HALF, math.log(0.25)], [LOG_HALF] * 2, torch.tensor([0, 0]), 1], {}, ["0.7071"]),
]


@pytest.mark.parametrize(("function", "inputs", "options", "figures"), HAND, ids=lambda v: getattr(v, "__name__", ""))
def test_hand_numbers_of_the_docstring(function: Any, inputs: list[Any], options: dict, figures: list[str]) -> None:
    arguments = [column(*value) if isinstance(value, list) else value for value in inputs]
    result = torch.atleast_1d(function(*arguments, **options))
    for value, figure in zip(result.tolist(), figures, strict=True):
        rounded = len(figure.partition(".")[2]) == 4  # shorter figures are exact
        assert value == pytest.approx(float(figure), abs=5.0001e-5 if rounded else 1e-12)
        assert figure in (inspect.getdoc(function) or "")


def test_every_objective_has_hand_numbers() -> None:
    assert {objective.loss for objective in REGISTRY.values()} <= {row[0] for row in HAND}


# ---------------------------------------------------------------------------------------------------------------------
# The registry's entries.

EVERY = pytest.mark.parametrize("name", REGISTRY)


@EVERY
def test_an_entry_says_what_its_function_takes(name: str) -> None:
    entry = REGISTRY[name]
    parameters = inspect.signature(entry.loss).parameters.values()
    positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    keyword = {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert entry.inputs == tuple(p.name for p in positional)
    assert all(p.default is p.empty or p.name == "margin_B" for p in positional)
    assert set(entry.keywords) == set(keyword) and len(set(entry.options)) == len(entry.options)
    assert all(p.default is not p.empty for p in keyword.values())
    assert entry.default_beta == (keyword["beta"].default if "beta" in keyword else None)
    referring = [i for i in entry.inputs if "scores" in i or i.startswith("ref_")]
    assert entry.needs_reference is bool(referring) is (entry.reward == "log_ratio")
    assert entry.token_extras == (("log_sum_sq",) if "use_weighting" in entry.options else ())


def two_samples(entry: Objective, weighted: bool) -> Scored:
    """Two prompts with two completions each, the better one first."""
    logps_C = column(-3.0, -2.0, -1.5, -4.0)
    return Scored(
        logps_C=logps_C,
        weighted_logps_C=logps_C,
        ref_weighted_logps_C=column(-2.0, -2.5, -1.0, -2.0),
        wpo_C=column(0.9, 0.5, 0.7, 0.6) if weighted else None,
        lengths_C=column(3, 2, 4, 5),
        sample_of_C=torch.tensor([0, 0, 1, 1]),
        grade_C=column(1, 0, 1, 0),
        own_C=torch.tensor([True, True, True, entry.name != "kto"]),
        preference_E=None,
        margin_E=None,
        num_samples=2,
    )


@EVERY
@pytest.mark.parametrize(
    ("option", "value"), [("reward_clip", 0.01), ("f_divergence_type", "forward_kl"), ("use_weighting", True)]
)
def test_an_option_before_the_loss_acts_where_the_entry_lists_it(name: str, option: str, value: Any) -> None:
    entry = REGISTRY[name]
    beta = {} if entry.default_beta is None else {"beta": 0.3}
    totals = Totals(2, 3.5)
    plain = TrainingObjective([name], **beta).losses(two_samples(entry, False), totals)
    shaped = TrainingObjective([name], **beta, **{option: value})
    changed = shaped.losses(two_samples(entry, option == "use_weighting"), totals)
    assert torch.equal(plain, changed) is (option not in entry.options)


@EVERY
def test_an_entry_is_documented(name: str) -> None:
    """The docs' entry, the model card and the errors are made of these."""
    entry = REGISTRY[name]
    assert entry.formula and entry.use_when and entry.why_beta
    assert "arXiv:" in entry.paper or name == "sft"
    doc = inspect.getdoc(entry.loss) or ""
    assert "By hand" in doc and entry.equation
    noted = entry.equation.partition("derivations.md, eq")[2].split()
    for number in {word.strip("().,") for word in noted}:
        assert not number.isdigit() or number in doc, f"eq. {number} isn't named in {entry.loss.__name__}"


# ---------------------------------------------------------------------------------------------------------------------
# `dpo_loss`, the loss of four log-probs.


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


def test_gradcheck_of_dpo_loss() -> None:
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
