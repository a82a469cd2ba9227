"""Where objectives coincide, what they are worth at the start, where their optimum lies, and what changes nothing."""

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_peft.losses import (
    REGISTRY,
    discounts,
    length_desensitized_weights,
    reference_point,
    shape_scores,
    wpo_weights,
)
from dpo_peft.losses.listwise import multi_negative_loss, plackett_luce_loss, segment_logsumexp
from dpo_peft.losses.pairwise import (
    aot_loss,
    aot_unpaired_loss,
    dpo_loss,
    exo_pair_loss,
    hinge_loss,
    ipo_loss,
    robust_loss,
    sigmoid_loss,
    sigmoid_norm_loss,
    trajectory_loss,
)
from dpo_peft.losses.reference_free import cpo_loss, log_odds, sft_loss, simpo_loss
from dpo_peft.losses.unpaired import apo_zero_unpaired_loss, kto_loss

BETA = 0.3


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def same(a: Tensor, b: Tensor | float) -> None:
    torch.testing.assert_close(a, torch.as_tensor(b, dtype=a.dtype).expand_as(a), rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# The value where policy and reference are one.

LOG2 = math.log(2)
AT_START: dict[str, float] = {
    "sigmoid": LOG2,
    "trajectory": LOG2,
    "hinge": 1.0,
    "ipo": 1 / (4 * BETA**2),
    "exo_pair": -LOG2 - 0.5 * (math.log(0.9) + math.log(0.1)),
    "nca_pair": 2 * LOG2,
    "robust": LOG2,
    "bco_pair": 2 * LOG2,
    "sppo_hard": 1 / (2 * BETA**2),
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "discopop": 0.5 * LOG2 + 0.5,
    "sigmoid_norm": LOG2,
    "aot": LOG2,
    "aot_unpaired": LOG2,
    "multi_negative": math.log(3),  # of 3 completions
    "plackett_luce": math.log(6),  # of 3! orders
    "kto": 0.5,
    "apo_zero_unpaired": 0.5,
}


@pytest.mark.parametrize("name", AT_START)
def test_policy_equal_to_reference(name: str) -> None:
    entry = REGISTRY[name]
    logps = -20 + 3 * normal(6)
    inputs: dict[str, Any] = {i: torch.zeros(6, dtype=torch.float64) for i in entry.inputs if "scores" in i}
    inputs |= {i: logps + ("rejected" in i) for i in entry.inputs if "logps" in i}
    inputs |= {i: torch.arange(2.0, 8.0).double() for i in entry.inputs if "lengths" in i}
    grades = torch.tensor([2.0, 1.0, 0.0] * 2 if entry.data == "lists" else [1.0, 0.0] * 3)
    inputs |= {"grades_C": grades, "sample_of_C": torch.tensor([0, 0, 0, 1, 1, 1]), "num_samples": 2}
    options = {"label_smoothing": 0.1} if name == "exo_pair" else {}
    losses = entry.loss(**{i: inputs[i] for i in entry.inputs if i in inputs}, beta=BETA, **options)
    same(losses, AT_START[name])


def test_every_loss_with_a_reference_is_in_the_table() -> None:
    assert set(AT_START) == {name for name, entry in REGISTRY.items() if entry.needs_reference}


# ---------------------------------------------------------------------------------------------------------------------
# Special cases of one another.


def test_losses_that_become_dpo() -> None:
    """(17) with m = 1, Plackett-Luce of two, robust at e = 0, (46) with gamma 1 and one step: all are (9)."""
    chosen, rejected = 3 * normal(8), 3 * normal(8, seed=1)
    expected = sigmoid_loss(chosen, rejected, beta=BETA)
    same(robust_loss(chosen, rejected, beta=BETA, label_smoothing=0.0), expected)
    same(sigmoid_loss(chosen, rejected, beta=BETA, label_smoothing=0.0), expected)
    one = torch.ones(8, dtype=torch.float64)
    same(sigmoid_norm_loss(chosen, rejected, one, one, beta=BETA), expected)
    steps = torch.zeros(8, dtype=torch.long)
    weighted = [score * discounts(steps, 1.0) for score in (chosen, rejected)]
    same(trajectory_loss(*weighted, beta=BETA), expected)
    same(trajectory_loss(*[s * discounts(steps, 0.3) for s in (chosen, rejected)], beta=BETA), expected)  # 0.3**0
    scores, grades = torch.stack([rejected, chosen], 1).flatten(), torch.tensor([0.0, 1.0] * 8)
    lists = torch.arange(8).repeat_interleave(2)
    same(multi_negative_loss(scores, grades, lists, 8, beta=BETA), expected)
    same(plackett_luce_loss(scores, grades, lists, 8, beta=BETA), expected)
    zeros = torch.zeros(8, dtype=torch.float64)
    same(dpo_loss(chosen, rejected, zeros, zeros, beta=BETA).losses_B, expected)
    # Of one pair, sorting does nothing.
    for b in range(8):
        pair = chosen[b : b + 1], rejected[b : b + 1]
        same(aot_unpaired_loss(*pair, beta=BETA), expected[b])
        same(aot_loss(*pair, zeros[:1], zeros[:1], beta=BETA), expected[b])


def test_losses_that_become_one_another() -> None:
    chosen, rejected = -4 - normal(8).abs(), -4 - normal(8, seed=1).abs()
    one, zeros = torch.ones(8, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)
    # CPO without its second term is DPO with a reference of equal log-probs.
    uniform = sigmoid_loss(chosen, rejected, beta=BETA)
    same(cpo_loss(chosen, rejected, -chosen, 4.0, beta=BETA, cpo_alpha=0.0), uniform)
    same(cpo_loss(chosen, rejected, -chosen, 4.0, beta=BETA, cpo_alpha=2.0), uniform + 2 * sft_loss(-chosen, 4.0))
    # SimPO without gamma and of one token is the same; gamma is a constant margin.
    same(simpo_loss(chosen, rejected, one, one, beta=BETA, simpo_gamma=0.0), uniform)
    same(
        simpo_loss(chosen, rejected, one, one, beta=BETA, simpo_gamma=0.4),
        sigmoid_loss(chosen, rejected, 0.4 * one, beta=BETA),
    )
    # KTO with the reference point at 0 is APO-zero of single completions; whose pair is APO-zero.
    scores, grades = torch.cat([chosen, rejected]) + 4, torch.cat([one, zeros])
    kto = kto_loss(scores, grades, zeros[:0], beta=BETA)
    same(kto, apo_zero_unpaired_loss(scores, grades, beta=BETA))
    same(kto[:8] + kto[8:], REGISTRY["apo_zero"].loss(chosen + 4, rejected + 4, beta=BETA))
    # One token: IPO's two forms are one.
    same(ipo_loss(chosen, rejected, one, one, ipo_length_normalize=True), ipo_loss(chosen, rejected, one, one))


def test_plackett_luce_is_a_chain_of_multi_negative_losses() -> None:
    """The first pick from all, the second from the rest, ...: each a (17)."""
    scores, grades = 2 * normal(5), torch.tensor([3.0, 5.0, 1.0, 2.0, 4.0])
    order = grades.argsort(descending=True)
    parts = []
    for first in range(4):
        rest = order[first:]
        zeros = torch.zeros(len(rest), dtype=torch.long)
        parts.append(multi_negative_loss(scores[rest], grades[rest], zeros, 1, beta=BETA))
    same(plackett_luce_loss(scores, grades, torch.zeros(5, dtype=torch.long), 1, beta=BETA), torch.cat(parts).sum())


def test_plackett_luce_is_a_distribution_over_orders() -> None:
    """exp(-loss) over all 4! rankings of the same scores adds up to 1."""
    scores, lists = 3 * normal(4), torch.zeros(4, dtype=torch.long)
    ranks = [torch.tensor(order, dtype=torch.float64) for order in itertools.permutations(range(4))]
    total = sum(plackett_luce_loss(scores, grades, lists, 1, beta=BETA).neg().exp() for grades in ranks)
    same(torch.as_tensor(total), 1.0)


def test_multi_negative_is_cross_entropy() -> None:
    """(13)-(17): InfoNCE, here PyTorch's cross-entropy list by list; beta is the inverse temperature of (18)."""
    sizes = [2, 8, 3, 5, 2]
    lists = torch.arange(5).repeat_interleave(torch.tensor(sizes))
    scores, grades = 3 * normal(20), normal(20, seed=1)
    shuffle = torch.randperm(20, generator=torch.Generator().manual_seed(2))
    losses = multi_negative_loss(scores[shuffle], grades[shuffle], lists[shuffle], 5, beta=1 / 0.7)
    for e, (own, grade) in enumerate(zip(scores.split(sizes), grades.split(sizes), strict=True)):
        same(losses[e], F.cross_entropy(own / 0.7, grade.argmax()))


def test_segment_logsumexp() -> None:
    values = torch.tensor([1e4, 1e4 - 1, -1e4, 0.0, -1e4 - 2], dtype=torch.float64, requires_grad=True)
    segments = torch.tensor([1, 1, 0, 2, 0])
    result = segment_logsumexp(values, segments, 3)
    expected = torch.stack([values[segments == e].logsumexp(0) for e in range(3)])
    same(result, expected)
    (a,) = torch.autograd.grad(result.sum(), values)
    (b,) = torch.autograd.grad(expected.sum(), values)
    same(a, b)


# ---------------------------------------------------------------------------------------------------------------------
# Ties and soft labels: p * loss(w, l) + (1 - p) * loss(l, w).

SOFT = [name for name, entry in REGISTRY.items() if entry.soft_labels]


def soft(name: str, chosen: Tensor, rejected: Tensor, p: float, margin: float = 0.0, **options: Any) -> Tensor:
    """What the trainer does with a `preference` column."""
    entry = REGISTRY[name]
    lengths = [torch.full_like(chosen, 1.0)] * (2 if "chosen_lengths_B" in entry.inputs else 0)
    margins = [[sign * margin * torch.ones_like(chosen)] if "margin_B" in entry.inputs else [] for sign in (1, -1)]
    straight = entry.loss(chosen, rejected, *lengths, *margins[0], beta=BETA, **options)
    return p * straight + (1 - p) * entry.loss(rejected, chosen, *lengths, *margins[1], beta=BETA, **options)


@pytest.mark.parametrize("name", SOFT)
def test_a_tie_pulls_nowhere_at_equal_rewards(name: str) -> None:
    """y = 0.5: at equal rewards there is no gradient on the difference; and swapping the pair changes nothing."""
    chosen, rejected = 0.2 * normal(6), 0.2 * normal(6, seed=1)
    same(soft(name, chosen, rejected, 0.5), soft(name, rejected, chosen, 0.5))
    equal = [chosen.clone().requires_grad_(), chosen.clone().requires_grad_()]
    soft(name, *equal, 0.5).sum().backward()
    same(equal[0].grad, equal[1].grad)
    if name in ("sigmoid", "trajectory", "hinge", "ipo", "robust", "sigmoid_norm", "simpo", "discopop", "exo_pair"):
        # These read the difference only, so neither side moves at all (simpo's and hinge's fixed margins cancel too).
        same(equal[0].grad, 0.0)


@pytest.mark.parametrize("name", SOFT)
def test_a_flipped_label_is_a_swapped_pair(name: str) -> None:
    chosen, rejected = 2 * normal(6), 2 * normal(6, seed=1)
    same(soft(name, chosen, rejected, 0.0, margin=0.2), soft(name, rejected, chosen, 1.0, margin=-0.2))
    same(soft(name, chosen, rejected, 0.3, margin=0.2), soft(name, rejected, chosen, 0.7, margin=-0.2))
    assert (soft(name, chosen, rejected, 0.0) - soft(name, chosen, rejected, 1.0)).abs().max() > 0.05


def test_label_smoothing_is_a_soft_label() -> None:
    chosen, rejected = 2 * normal(6), 2 * normal(6, seed=1)
    same(sigmoid_loss(chosen, rejected, beta=BETA, label_smoothing=0.2), soft("sigmoid", chosen, rejected, 0.8))


def test_robust_is_unbiased_under_flips() -> None:
    """Its mean over labels that are flipped with probability e is the DPO loss of the clean label."""
    chosen, rejected = 2 * normal(6), 2 * normal(6, seed=1)
    same(soft("robust", chosen, rejected, 0.8, label_smoothing=0.2), sigmoid_loss(chosen, rejected, beta=BETA))


def test_margins_shift_the_difference() -> None:
    """h = beta * (chosen - rejected) - margin, in rewards; a pair's own value each."""
    chosen, rejected, margin = 2 * normal(6), 2 * normal(6, seed=1), normal(6, seed=2).abs()
    moved = chosen - margin / BETA
    for loss in (sigmoid_loss, hinge_loss, trajectory_loss):
        same(loss(chosen, rejected, margin, beta=BETA), loss(moved, rejected, beta=BETA))
    same(
        robust_loss(chosen, rejected, margin, beta=BETA, label_smoothing=0.1),
        robust_loss(moved, rejected, beta=BETA, label_smoothing=0.1),
    )
    lengths = torch.full((6,), 2.0, dtype=torch.float64)
    halves = dict(chosen_lengths_B=lengths, rejected_lengths_B=lengths)
    same(
        sigmoid_norm_loss(chosen, rejected, **halves, margin_B=margin, beta=BETA),
        sigmoid_loss(chosen / 2, rejected / 2, margin, beta=BETA),
    )
    logps = -4 - chosen.abs(), -4 - rejected.abs()
    same(
        simpo_loss(*logps, **halves, margin_B=margin, simpo_gamma=0.3),
        simpo_loss(*logps, **halves, simpo_gamma=0.3 + margin),
    )
    same(
        cpo_loss(*logps, -logps[0], 4.0, margin, beta=BETA, cpo_alpha=0.0),
        sigmoid_loss(*logps, margin, beta=BETA),
    )


@pytest.mark.parametrize("ties", [[1.0, 1.0, 0.0], [2.0, 1.0, 1.0], [1.0, 1.0, 1.0]])
@pytest.mark.parametrize("loss", [multi_negative_loss, plackett_luce_loss])
def test_ties_in_lists_are_symmetric(loss: Any, ties: list[float]) -> None:
    """Exchanging the scores of tied completions changes nothing, and at equal scores they get the same gradient."""
    grades, lists = torch.tensor(ties, dtype=torch.float64), torch.zeros(3, dtype=torch.long)
    scores = 2 * normal(3)
    i, j = [(a, b) for a, b in itertools.combinations(range(3), 2) if ties[a] == ties[b]][0]
    swapped = scores.clone()
    swapped[[i, j]] = scores[[j, i]]
    same(loss(scores, grades, lists, 1, beta=BETA), loss(swapped, grades, lists, 1, beta=BETA))
    flat = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    loss(flat, grades, lists, 1, beta=BETA).sum().backward()
    assert flat.grad is not None
    same(flat.grad[i], flat.grad[j])
    same(flat.grad.sum(), 0.0)


def test_breslow_ties_by_hand() -> None:
    """Scores a, b tied above c: log-sum-exp of all three minus a, the same minus b, and 0 for c."""
    scores, lists = torch.tensor([0.5, -0.2, 0.1], dtype=torch.float64), torch.zeros(3, dtype=torch.long)
    grades = torch.tensor([4.0, 4.0, 1.0])
    total = math.log(math.exp(0.5) + math.exp(-0.2) + math.exp(0.1))
    same(plackett_luce_loss(scores, grades, lists, 1, beta=1.0), 2 * total - 0.5 + 0.2)
    # And tied at the end: both are picked from the same two.
    last = torch.tensor([4.0, 1.0, 1.0])
    pair = math.log(math.exp(-0.2) + math.exp(0.1))
    same(plackett_luce_loss(scores, last, lists, 1, beta=1.0), total - 0.5 + 2 * pair + 0.2 - 0.1)


# ---------------------------------------------------------------------------------------------------------------------
# What changes nothing.


@pytest.mark.parametrize("name", ["multi_negative", "plackett_luce"])
def test_lists_are_independent_of_order_and_neighbors(name: str) -> None:
    loss, scores, grades = REGISTRY[name].loss, 2 * normal(9), normal(9, seed=1)
    lists = torch.tensor([0, 1, 2, 1, 0, 1, 2, 1, 1])
    together = loss(scores, grades, lists, 3, beta=BETA)
    for e in range(3):
        own = lists == e
        alone = loss(scores[own], grades[own], torch.zeros(int(own.sum()), dtype=torch.long), 1, beta=BETA)
        same(together[e : e + 1], alone)
    shuffle = torch.randperm(9, generator=torch.Generator().manual_seed(3))
    same(loss(scores[shuffle], grades[shuffle], lists[shuffle], 3, beta=BETA), together)
    same(loss(scores, 10 * grades + 3, lists, 3, beta=BETA), together)  # only the order of grades counts
    shift = torch.tensor([5.0, -7.0, 100.0], dtype=torch.float64)
    torch.testing.assert_close(
        loss(scores + shift[lists], grades, lists, 3, beta=BETA), together, rtol=1e-9, atol=1e-9
    )


def test_sorting_losses_ignore_who_is_paired_with_whom() -> None:
    chosen, rejected = 2 * normal(6), 2 * normal(6, seed=1)
    shuffle = torch.randperm(6, generator=torch.Generator().manual_seed(4))
    expected = aot_unpaired_loss(chosen, rejected, beta=BETA)
    same(aot_unpaired_loss(chosen, rejected[shuffle], beta=BETA), expected)
    # Batch-coupled indeed: the mean over halves is another number.
    halves = torch.cat([aot_unpaired_loss(chosen[i : i + 3], rejected[i : i + 3], beta=BETA) for i in (0, 3)])
    assert (halves.mean() - expected.mean()).abs() > 1e-3


def test_kto_is_symmetric_about_its_reference_point() -> None:
    distance, mismatched = normal(6).abs(), torch.tensor([0.5, 2.5], dtype=torch.float64)
    z = reference_point(mismatched)
    good, bad = torch.ones(6), torch.zeros(6)
    same(kto_loss(z + distance, good, mismatched, beta=BETA), kto_loss(z - distance, bad, mismatched, beta=BETA))
    same(kto_loss(z.expand(6), good, mismatched, beta=BETA), 0.5)
    same(
        kto_loss(distance, good, mismatched, beta=BETA, desirable_weight=3.0),
        3 * kto_loss(distance, good, mismatched, beta=BETA),
    )
    same(
        kto_loss(distance, bad, mismatched, beta=BETA, desirable_weight=3.0),
        kto_loss(distance, bad, mismatched, beta=BETA),
    )


def test_token_mean_terms_add_up_under_any_split() -> None:
    """Mean over all pairs of nll / (mean length of the whole batch) is total nats / total tokens."""
    nll, lengths = normal(8).abs() * 9, torch.tensor([1.0, 9.0, 4.0, 2.0, 7.0, 7.0, 3.0, 5.0])
    total = nll.sum() / lengths.sum()
    for size in (1, 2, 4, 8):
        parts = torch.cat([sft_loss(part, lengths.mean()) for part in nll.split(size)])
        same(parts.mean(), total)
    naive = torch.stack(
        [part.sum() / own.sum() for part, own in zip(nll.split(2), lengths.split(2), strict=True)]
    ).mean()
    assert (naive - total).abs() > 0.01  # means of micro-batches would not do (T10)


# ---------------------------------------------------------------------------------------------------------------------
# Where the optimum lies.


def minimum(loss: Any, size: int = 1) -> Tensor:
    """The point where a smooth convex function of (size,) is smallest."""
    point = torch.zeros(size, dtype=torch.float64, requires_grad=True)
    options: dict[str, Any] = dict(
        max_iter=200, tolerance_grad=1e-14, tolerance_change=0, line_search_fn="strong_wolfe"
    )
    optimizer = torch.optim.LBFGS([point], **options)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(point).sum()
        value.backward()
        return value

    for _ in range(3):
        optimizer.step(closure)
    return point.detach()


def near(a: Tensor, b: float) -> None:
    torch.testing.assert_close(a, torch.full_like(a, b), rtol=1e-5, atol=1e-6)


def test_where_each_optimum_lies() -> None:
    zero = torch.zeros(1, dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    logit = math.log(0.8 / 0.2)
    near(BETA * minimum(lambda s: soft("sigmoid", s, zero, 0.8)), logit)
    near(BETA * minimum(lambda s: sigmoid_loss(s, zero, beta=BETA, label_smoothing=0.2)), logit)
    near(BETA * minimum(lambda s: exo_pair_loss(s, zero, beta=BETA, label_smoothing=0.2)), logit)
    near(minimum(lambda s: ipo_loss(s, zero, one, one, beta=BETA)), 1 / (2 * BETA))
    near(minimum(lambda s: soft("ipo", s, zero, 0.8)), (2 * 0.8 - 1) / (2 * BETA))
    near(minimum(lambda s: ipo_loss(s, zero, 5 * one, one, beta=BETA, ipo_length_normalize=True)), 5 / (2 * BETA))
    near(minimum(lambda s: REGISTRY["sppo_hard"].loss(s, zero, beta=BETA)), 1 / (2 * BETA))
    near(minimum(lambda s: REGISTRY["sppo_hard"].loss(zero, s, beta=BETA)), -1 / (2 * BETA))
    near(BETA * minimum(lambda s: REGISTRY["nca_pair"].loss(s, zero, beta=BETA)), math.log(2))  # sigmoid = 2/3


def test_hinge_stops_at_one() -> None:
    zero = torch.zeros(3, dtype=torch.float64)
    scores = torch.tensor([0.99, 1.0, 7.0], dtype=torch.float64, requires_grad=True)
    loss = hinge_loss(scores / BETA, zero, beta=BETA)
    loss.sum().backward()
    torch.testing.assert_close(loss.detach(), torch.tensor([0.01, 0.0, 0.0], dtype=torch.float64))
    assert scores.grad is not None and scores.grad[0] == -1 and scores.grad[2] == 0


# ---------------------------------------------------------------------------------------------------------------------
# The helpers.


def test_divergences_agree_to_first_order() -> None:
    """Near the reference all divergences are alike: slope 1 at u = 0, but js, whose slope is 1/2."""
    for name, slope in (("reverse_kl", 1.0), ("forward_kl", 1.0), ("alpha_divergence", 1.0), ("js_divergence", 0.5)):
        score = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        shaped = shape_scores(score, BETA, name)
        shaped.backward()
        assert shaped.item() == pytest.approx(0.0, abs=1e-15)
        assert score.grad is not None and score.grad.item() == pytest.approx(slope)


def test_divergences_against_their_definition() -> None:
    """Score = f'(t) at t = policy / reference, f written out; f' by autograd, up to f'(1)."""
    alpha = 0.3
    definitions = {
        "reverse_kl": lambda t: t * t.log(),
        "forward_kl": lambda t: -t.log(),
        "js_divergence": lambda t: t * t.log() - (t + 1) * ((t + 1) / 2).log(),
        "alpha_divergence": lambda t: (t**alpha - 1) / (alpha * (alpha - 1)),
    }
    u = torch.linspace(-3, 3, 13, dtype=torch.float64)
    for name, f in definitions.items():
        t = u.exp().requires_grad_()
        (slope,) = torch.autograd.grad(f(t).sum(), t)
        shaped = shape_scores(u, BETA, name, alpha)
        same(shaped - shaped[6], slope - slope[6])


def test_alpha_divergence_has_the_plain_score_as_its_limit() -> None:
    u = 3 * normal(8)
    for coef in (1 + 1e-8, 1 - 1e-8, 1 + 2e-6):
        torch.testing.assert_close(shape_scores(u, BETA, "alpha_divergence", coef), u, rtol=1e-4, atol=1e-4)


def test_reward_clip_in_rewards() -> None:
    scores = torch.tensor([-50.0, -5.0, 5.0, 50.0], dtype=torch.float64, requires_grad=True)
    clipped = shape_scores(scores, 0.1, reward_clip=2.0)
    assert (0.1 * clipped).tolist() == pytest.approx([-2.0, -0.5, 0.5, 2.0])
    clipped.sum().backward()
    assert scores.grad is not None and scores.grad.tolist() == [0.0, 1.0, 1.0, 0.0]


def test_discounts_are_float64_powers() -> None:
    steps = torch.tensor([0, 1, 2, 1000])
    assert discounts(steps, 1.0).tolist() == [1.0] * 4
    found = discounts(steps, 0.99)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx([1.0, 0.99, 0.9801, math.exp(1000 * math.log(0.99))], rel=1e-12)


def test_length_weights_of_both_sides() -> None:
    """Lengths 3 and 5: the shorter one is untouched, the longer one's last two tokens weigh ld_alpha."""
    position, shared = torch.tensor([0, 1, 2, 0, 1, 2, 3, 4]), torch.full((8,), 3)
    assert length_desensitized_weights(position, shared, 0.5).tolist() == [1.0] * 6 + [0.5] * 2
    assert length_desensitized_weights(position, shared, 1.0).tolist() == [1.0] * 8
    assert length_desensitized_weights(position, shared, 0.0).sum() == 6


def test_wpo_weights_of_several_completions() -> None:
    """Of a uniform distribution over V every token has log p = log sum p^2 = -log V: weight 1. Tokens in any order."""
    uniform = torch.full((4,), -math.log(7), dtype=torch.float64, requires_grad=True)
    owner = torch.tensor([1, 0, 1, 1])
    weights = wpo_weights(uniform, torch.full((4,), -math.log(7), dtype=torch.float64), owner, 3)
    assert not weights.requires_grad
    same(weights, 1.0)  # the third completion has no tokens
    logps = torch.tensor([-1.0, -3.0, -2.0, -6.0], dtype=torch.float64)
    weights = wpo_weights(logps, torch.zeros(4, dtype=torch.float64), owner, 2)
    same(weights, math.exp(-3.0))


def test_log_odds_of_plain_probabilities() -> None:
    p = torch.tensor([1e-9, 0.2, 0.5, 0.9, 1 - 1e-9], dtype=torch.float64)
    torch.testing.assert_close(log_odds(p.log()), torch.logit(p), rtol=1e-6, atol=1e-12)
