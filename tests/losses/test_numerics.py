"""Gradients of every objective by finite differences, dtypes, extreme inputs, and options out of range."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dpo_peft.errors import OptionError
from dpo_peft.losses import REGISTRY, Objective, discounts, reference_point, shape_scores
from dpo_peft.losses.pairwise import aot_unpaired_loss, discopop_loss, exo_pair_loss, robust_loss, sigmoid_loss
from dpo_peft.losses.reference_free import orpo_loss
from dpo_peft.losses.unpaired import kto_loss

EVERY = pytest.mark.parametrize("name", REGISTRY)


def column(*values: float, grad: bool = False) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


# ---------------------------------------------------------------------------------------------------------------------
# Gradients, by finite differences.

LISTS = torch.tensor([0, 0, 1, 1, 1, 2, 2, 2, 2])  # lists of 2, 3 and 4
GRADES = column(1, 0, 2, 3, 1, 0, 4, 2, 3)


def random_inputs(entry: Objective, seed: int = 0, grad: bool = True) -> dict[str, Any]:
    """Inputs of the right names and shapes; scores and log-probs carry gradients, away from ties."""
    draw = torch.Generator().manual_seed(seed)
    size = {"lists": 9, "singles": 6}.get(entry.data, 5)

    def normal(number: int) -> Tensor:
        return torch.randn(number, generator=draw, dtype=torch.float64)

    found: dict[str, Any] = {
        "sample_of_C": LISTS,
        "num_samples": 3,
        "grades_C": GRADES if entry.data == "lists" else column(1, 0, 1, 1, 0, 0),
        "mean_chosen_length": 4.0,
    }
    for name in entry.inputs:
        if name in found:
            continue
        if "lengths" in name:
            found[name] = torch.randint(2, 7, (size,), generator=draw).double()
        elif name == "margin_B":
            found[name] = 0.3 * normal(size)
        elif name == "mismatched_scores_M":
            found[name] = (1 + normal(4)).requires_grad_(grad)
        elif "logps" in name or "nll" in name:
            base = -4 - 2 * normal(size).abs()
            found[name] = (-base if "nll" in name else base).requires_grad_(grad and not name.startswith("ref_"))
        else:
            found[name] = (2 * normal(size)).requires_grad_(grad)
    return {name: found[name] for name in entry.inputs}


OPTIONS: dict[str, list[dict[str, Any]]] = {
    "sigmoid": [{"label_smoothing": 0.2}],
    "ipo": [{"ipo_length_normalize": True}],
    "exo_pair": [{"label_smoothing": 0.1}],
    "robust": [{"label_smoothing": 0.2}],
    "discopop": [{"discopop_tau": 0.5}],
    "aot": [{"label_smoothing": 0.2}],
    "aot_unpaired": [{"label_smoothing": 0.2}],
    "simpo": [{"label_smoothing": 0.2, "simpo_gamma": 0.4}, {"alphapo_alpha": 0.3}],
    "cpo": [{"label_smoothing": 0.2, "cpo_alpha": 0.3}],
    "cpo_hinge": [{"cpo_alpha": 0.3}],
    "cpo_ipo": [{"cpo_alpha": 0.3}],
    "kto": [{"desirable_weight": 1.3, "undesirable_weight": 0.6}],
    "apo_zero_unpaired": [{"desirable_weight": 1.3, "undesirable_weight": 0.6}],
}
CASES = [(name, options) for name in REGISTRY for options in [{}, *OPTIONS.get(name, [])]]


@pytest.mark.parametrize(("name", "options"), CASES, ids=lambda v: v if isinstance(v, str) else "+".join(v))
def test_gradcheck(name: str, options: dict[str, Any]) -> None:
    entry = REGISTRY[name]
    options = options if entry.default_beta is None else {"beta": 0.3, **options}
    inputs = random_inputs(entry)
    differentiable = [key for key, value in inputs.items() if isinstance(value, Tensor) and value.requires_grad]
    leaves = [key for key in differentiable if key != "mismatched_scores_M"]
    assert leaves

    def call(*values: Tensor) -> Tensor:
        return entry.loss(**{**inputs, **dict(zip(leaves, values, strict=True))}, **options)

    losses = call(*[inputs[key] for key in leaves])
    items = {"lists": 3, "singles": 6}.get(entry.data, 5)
    assert losses.shape == (items,) and losses.dtype == torch.float64 and losses.isfinite().all()
    assert torch.autograd.gradcheck(call, [inputs[key] for key in leaves])


@EVERY
def test_an_item_depends_on_others_where_the_entry_says_so(name: str) -> None:
    """The first items of a batch, alone and beside the rest of it."""
    entry = REGISTRY[name]
    inputs = random_inputs(entry, grad=False)
    sizes = (
        {"sample_of_C": 5, "logps_C": 5, "scores_C": 5, "grades_C": 5, "lengths_C": 5} if entry.data == "lists" else {}
    )
    alone = {key: x[: sizes.get(key, 3)] if isinstance(x, Tensor) else x for key, x in inputs.items()}
    alone |= {"num_samples": 2} if "num_samples" in alone else {}
    both = entry.loss(**alone), entry.loss(**inputs)
    assert torch.allclose(both[0], both[1][: len(both[0])]) is not entry.batch_coupled


def test_gradcheck_can_fail() -> None:
    """A loss whose gradient is cut somewhere does not pass the check above."""
    inputs = [value.requires_grad_() for value in (column(1.0, 2.0), column(0.5, -1.0))]
    assert not torch.autograd.gradcheck(
        lambda c, r: sigmoid_loss(c, r.detach() + 0 * r), inputs, raise_exception=False
    )


def test_no_gradient_into_the_reference_point() -> None:
    inputs = random_inputs(REGISTRY["kto"])
    kto_loss(**inputs, beta=0.3).sum().backward()
    assert inputs["mismatched_scores_M"].grad is None and inputs["scores_C"].grad.all()
    assert not reference_point(inputs["mismatched_scores_M"]).requires_grad
    assert reference_point(column()).item() == 0.0 and reference_point(column()).shape == ()


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_keep_the_dtype(name: str, dtype: torch.dtype) -> None:
    entry = REGISTRY[name]
    inputs = random_inputs(entry, grad=False)
    narrow = {
        key: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in inputs.items()
    }
    result = entry.loss(**narrow)
    assert result.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(result.double(), entry.loss(**inputs), rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------------------------------------------------------------
# Extreme inputs.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@EVERY
def test_huge_scores_stay_finite(name: str, dtype: torch.dtype) -> None:
    """Scores and log-probs of +-1e4 nats: finite losses and gradients, whichever way they point."""
    entry = REGISTRY[name]
    inputs = random_inputs(entry)
    for key in list(inputs):
        value = inputs[key]
        if isinstance(value, Tensor) and value.requires_grad:
            signs = value.detach().sign() if "scores" in key else -torch.ones_like(value)
            inputs[key] = (signs * 1e4 * (-1 if "nll" in key else 1)).to(dtype).requires_grad_()
        elif isinstance(value, Tensor) and value.is_floating_point():
            inputs[key] = value.to(dtype)
    losses = entry.loss(**inputs)
    losses.sum().backward()
    assert losses.isfinite().all()
    for key, value in inputs.items():
        if isinstance(value, Tensor) and value.grad is not None:
            assert value.grad.isfinite().all(), key


def test_discopop_where_its_two_factors_are_zero_and_infinite() -> None:
    """w * exp(-h) at h = -200: 0 * inf = nan if multiplied; the loss there is that of the logistic part alone."""
    scores = torch.tensor([-200.0], requires_grad=True)
    loss = discopop_loss(scores, torch.zeros(1), beta=1.0)
    loss.sum().backward()
    assert loss.item() == 200.0 and scores.grad.item() == pytest.approx(-1.0)
    assert torch.isnan(torch.sigmoid(scores / 0.05) * torch.exp(-scores))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_orpo_up_to_certainty(dtype: torch.dtype) -> None:
    """p -> 1: log(1 - p) goes to -inf; ours stops at the dtype's epsilon, with finite gradients."""
    tiny = torch.finfo(dtype).eps
    for chosen, rejected in ((0.0, -1.0), (-1.0, 0.0), (0.0, 0.0), (-tiny / 4, -1.0), (-4 * tiny, -1.0), (-1e3, 0.0)):
        logps = [torch.tensor([value], dtype=dtype, requires_grad=True) for value in (chosen, rejected)]
        one = torch.ones(1, dtype=dtype)
        loss = orpo_loss(logps[0], logps[1], one, one, one, 1.0, beta=1.0)
        loss.sum().backward()
        assert loss.isfinite().all() and all(value.grad.isfinite().all() for value in logps)
    # Away from the edge nothing is changed: log odds of p = 1 - 1e-6 by hand.
    p = 1 - 1e-6
    logps = [torch.tensor([math.log(p)], dtype=torch.float64), torch.tensor([math.log(0.5)], dtype=torch.float64)]
    loss = orpo_loss(logps[0], logps[1], *[torch.ones(1, dtype=torch.float64)] * 2, torch.zeros(1), 1.0, beta=1.0)
    assert loss.item() == pytest.approx(math.log1p((1 - p) / p), rel=1e-6)


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"])
@pytest.mark.parametrize("coef", [0.5, 2.0, -1.0])
def test_shaped_scores_stay_finite(divergence: str, coef: float) -> None:
    scores = torch.tensor([-1e5, -300.0, -1.0, 0.0, 1.0, 300.0, 1e5], requires_grad=True)
    shaped = shape_scores(scores, 0.1, divergence, coef)
    (shaped[:, None] - shaped).sum().backward()
    assert shaped.isfinite().all() and scores.grad.isfinite().all()
    assert (shaped.diff() >= 0).all()  # more likely is never worse
    assert shaped[3] == 0 or divergence == "js_divergence"


# ---------------------------------------------------------------------------------------------------------------------
# Options out of range.


@pytest.mark.parametrize(
    ("function", "options", "words"),
    [
        (sigmoid_loss, {"label_smoothing": -0.1}, "label_smoothing"),
        (sigmoid_loss, {"label_smoothing": 0.6}, "label_smoothing"),
        (robust_loss, {"label_smoothing": 0.5}, "robust"),
        (exo_pair_loss, {"label_smoothing": 0.0}, "exo_pair"),
        (exo_pair_loss, {"label_smoothing": 0.5}, "exo_pair"),
        (aot_unpaired_loss, {"label_smoothing": 0.51}, "label_smoothing"),
    ],
)
def test_options_out_of_range(function: Any, options: dict[str, float], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        function(column(1.0), column(0.0), **options)


def test_helpers_refuse_what_they_cannot_do() -> None:
    with pytest.raises(OptionError, match="f_divergence_type='tv'"):
        shape_scores(column(1.0), 0.1, "tv")
    for gamma in (0.0, -0.5, 1.1, float("nan")):
        with pytest.raises(OptionError, match="discount_gamma"):
            discounts(torch.tensor([0, 1]), gamma)
