"""docs/derivations.md: its numbers are those that the code refers to, and what it derives is so, in float64.

What `tests/losses/test_theory.py` and `test_identities.py` hold already (the optimum, DPO's and the lists' minima, the
divergences, trajectories) isn't repeated here.
"""

import itertools
import math
import re
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
import torch
import torch.nn.functional as F
from paths import REPO
from torch import Tensor

from dpo_peft.losses import REGISTRY
from dpo_peft.losses.anchored import bco_pair_loss
from dpo_peft.losses.pairwise import (
    aot_unpaired_loss,
    discopop_loss,
    exo_pair_loss,
    hinge_loss,
    ipo_loss,
    robust_loss,
    sigmoid_loss,
    sigmoid_norm_loss,
)
from dpo_peft.losses.reference_free import simpo_loss
from dpo_peft.pairs.rejection_sampling import acceptance, rejection_sample

PAGE = (REPO / "docs" / "derivations.md").read_text("utf-8")
NUMBERS = [int(number) for number in re.findall(r"\\tag\{(\d+)\}", PAGE)]
REFERENCE = re.compile(r"derivations(?:\.md)?,\s+eqs?\.\s+((?:\d+)(?:(?:,| and| to)\s+\d+)*)")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def referring_files() -> Iterator[tuple[Path, str]]:
    for folder in ("dpo_peft", "docs", "tests", "recipes"):
        for path in sorted((REPO / folder).rglob("*")):
            if path.suffix in (".py", ".md", ".yaml") and path.name != "derivations.md":
                yield path, re.sub(r"\n[\s#>*-]*", " ", path.read_text("utf-8"))


def test_numbers_count_from_one_and_can_be_linked() -> None:
    assert sorted(NUMBERS) == list(range(1, len(NUMBERS) + 1)), "a number is missing or stands twice"
    assert sorted(map(int, re.findall(r'<a id="eq-(\d+)"></a>', PAGE))) == sorted(NUMBERS)
    assert {int(number) for number in re.findall(r"\]\(#eq-(\d+)\)", PAGE)} <= set(NUMBERS)


def test_every_reference_has_its_equation() -> None:
    found = [
        (path.name, int(number))
        for path, text in referring_files()
        for listed in REFERENCE.findall(text)
        for number in re.findall(r"\d+", listed)
    ]
    assert len(found) > 30
    assert not [(name, number) for name, number in found if number not in NUMBERS]


def test_every_loss_has_its_equation() -> None:
    table = PAGE.partition("## By name")[2]
    assert not [name for name in REGISTRY if not re.search(rf"^\|.*`{name}`.*\]\(#eq-\d+\)", table, re.MULTILINE)]


def slope_at(loss: object, h: float) -> float:
    """The derivative of a loss of the margin at beta 1."""
    h_B = torch.tensor([h], dtype=torch.float64, requires_grad=True)
    loss(h_B, torch.zeros_like(h_B)).sum().backward()  # type: ignore[operator]
    return h_B.grad.item()  # type: ignore[union-attr]


def test_gradient_of_dpo() -> None:
    """Eq. 12, of a softmax policy with four completions."""
    logits, reference = normal(4).requires_grad_(), F.log_softmax(normal(4, seed=1), 0)
    logps = F.log_softmax(logits, 0)
    scores = logps - reference
    loss = sigmoid_loss(scores[:1], scores[1:2], beta=0.3).sum()
    (got,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (direction,) = torch.autograd.grad(logps[0] - logps[1], logits)
    weight = 1 - torch.sigmoid(0.3 * (scores[0] - scores[1]))
    torch.testing.assert_close(got, (-0.3 * weight * direction).detach())


def test_ipo_fits_the_win_rates() -> None:
    """Eq. 50: on all pairs of three completions its minimum has scores (p(y) - p(y')) / beta apart."""
    wins = torch.tensor([[0.5, 0.7, 0.9], [0.3, 0.5, 0.6], [0.1, 0.4, 0.5]], dtype=torch.float64)
    scores, beta = torch.zeros(3, dtype=torch.float64, requires_grad=True), 0.4
    one = torch.ones(9, dtype=torch.float64)
    first, second = map(torch.tensor, zip(*itertools.product(range(3), repeat=2), strict=True))
    optimizer = torch.optim.LBFGS([scores], max_iter=100, tolerance_grad=1e-13, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        losses = ipo_loss(scores[first], scores[second], one, one, beta=beta)
        total = (wins[first, second] * losses).sum()  # every pair in both orders, as often as it wins
        total.backward()
        return total

    optimizer.step(loss)
    win_rate = wins.mean(1)
    got = scores.detach() - scores[0].detach()
    torch.testing.assert_close(got, (win_rate - win_rate[0]) / beta, rtol=0, atol=1e-8)


@pytest.mark.parametrize("loss", [sigmoid_loss, robust_loss, hinge_loss, exo_pair_loss])
def test_slope_at_the_start_has_the_sign_of_the_label(loss: object) -> None:
    """Eq. 63, at beta 1 and h = 0."""
    at_zero = slope_at(lambda a, b: loss(a, b, beta=1.0), 0.0)  # type: ignore[operator]
    assert at_zero < 0


def test_minimum_of_exo() -> None:
    """Eq. 65: at the logit of the label, and with the derivative that the page states."""
    epsilon = 0.1
    for h in (-1.0, 0.5, math.log(9), 4.0):
        q = 1 / (1 + math.exp(-h))
        stated = q * (1 - q) * (h - math.log((1 - epsilon) / epsilon))
        assert slope_at(lambda a, b: exo_pair_loss(a, b, beta=1.0, label_smoothing=epsilon), h) == pytest.approx(
            stated, abs=1e-12
        )


@pytest.mark.parametrize("tau", [0.05, (1 - math.log(2)) / 3, 0.3])
def test_slope_of_discopop(tau: float) -> None:
    """Eq. 66."""
    got = slope_at(lambda a, b: discopop_loss(a, b, beta=1.0, discopop_tau=tau), 0.0)
    assert got == pytest.approx((1 - math.log(2)) / (4 * tau) - 0.75, abs=1e-12)


def test_bco_is_above_dpo() -> None:
    """Eq. 68."""
    chosen, rejected = 3 * normal(1000), 3 * normal(1000, seed=1)
    assert (bco_pair_loss(chosen, rejected, beta=1.0) > sigmoid_loss(chosen, rejected, beta=1.0)).all()


def test_simpo_is_length_normalized_dpo_of_a_uniform_reference() -> None:
    """Eqs. 52 and 75."""
    chosen, rejected, lengths = (
        -10 * normal(5).abs(),
        -10 * normal(5, seed=1).abs(),
        torch.tensor([3, 1, 4, 1, 5.0]).double(),
    )
    other, uniform = lengths.flip(0), math.log(50)
    scores = chosen + uniform * lengths, rejected + uniform * other
    got = sigmoid_norm_loss(*scores, lengths, other, margin_B=0.7, beta=2.0)
    torch.testing.assert_close(got, simpo_loss(chosen, rejected, lengths, other, beta=2.0, simpo_gamma=0.7))


def test_advantages_telescope() -> None:
    """Eqs. 33, 34 and 55 on a tree of tokens: 2 tokens, 3 steps, a reward at each."""
    beta, gamma, depth = 0.5, 0.9, 3
    draw = Random(0)
    paths = [path for n in range(depth + 1) for path in itertools.product((0, 1), repeat=n)]
    reward = {path: draw.gauss(0, 1) for path in paths if path}
    reference = {path: draw.uniform(0.2, 0.8) for path in paths if len(path) < depth}
    value = dict.fromkeys((path for path in paths if len(path) == depth), 0.0)
    advantage: dict[tuple[int, ...], float] = {}
    for path in sorted(reference, key=len, reverse=True):
        prior = (1 - reference[path], reference[path])
        action = [reward[(*path, a)] + gamma * value[(*path, a)] for a in (0, 1)]
        value[path] = beta * math.log(sum(p * math.exp(q / beta) for p, q in zip(prior, action, strict=True)))
        policy = [p * math.exp((q - value[path]) / beta) for p, q in zip(prior, action, strict=True)]
        assert sum(policy) == pytest.approx(1, abs=1e-12)  # no partition function is left
        for a in (0, 1):
            advantage[(*path, a)] = beta * math.log(policy[a] / prior[a])
    for path in itertools.product((0, 1), repeat=depth):
        steps = [path[: t + 1] for t in range(depth)]
        got = sum(gamma**t * advantage[step] for t, step in enumerate(steps))
        returns = sum(gamma**t * reward[step] for t, step in enumerate(steps))
        assert got == pytest.approx(returns - value[()], abs=1e-12)


def test_sorting_is_the_cheapest_matching() -> None:
    """Eqs. 82 and 83: no matching of five scores with five has a smaller logistic cost."""
    chosen, rejected = normal(5), normal(5, seed=1)
    least = aot_unpaired_loss(chosen, rejected, beta=1.0).sum()
    costs = [sigmoid_loss(chosen, rejected[list(order)], beta=1.0).sum() for order in itertools.permutations(range(5))]
    assert least.item() == pytest.approx(min(costs).item(), abs=1e-12)


def test_rejection_sampling_has_the_law_of_the_optimum() -> None:
    """Eq. 84, exactly; and `rejection_sample` accepts accordingly."""
    policy, rewards, beta = [0.5, 0.3, 0.2], [0.0, 0.4, 1.0], 0.5
    kept = [p * acceptance(r, max(rewards), beta) for p, r in zip(policy, rewards, strict=True)]
    optimum = [p * math.exp(r / beta) for p, r in zip(policy, rewards, strict=True)]
    for a, b in zip(kept, optimum, strict=True):
        assert a / sum(kept) == pytest.approx(b / sum(optimum), abs=1e-12)
    draw = Random(0)
    sampled = draw.choices(range(3), policy, k=20_000)
    found = rejection_sample([rewards[i] for i in sampled], 5000, beta, draw).indices  # within the first round
    assert max(found) < 20_000
    share = sum(sampled[i] == 2 for i in found) / len(found)
    assert share == pytest.approx(optimum[2] / sum(optimum), abs=0.03)


def test_the_distance_that_is_logged() -> None:
    """Eq. 85, summed over a vocabulary: the mean under the reference is KL(reference || policy)."""
    policy, reference = F.log_softmax(normal(30), 0), F.log_softmax(normal(30, seed=1), 0)
    log_ratio = policy - reference
    terms = torch.expm1(log_ratio) - log_ratio
    assert (terms >= 0).all()
    torch.testing.assert_close((reference.exp() * terms).sum(), (reference.exp() * (reference - policy)).sum())
