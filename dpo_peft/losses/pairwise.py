"""Losses of pairs that look at the difference of the two rewards: one chosen, one rejected completion.

`aot` and `aot_unpaired` compare sorted batches, so that the distribution of rewards moves and not each pair by itself:
call them on the whole optimizer batch at once; they give their losses in sorted order.

A score is log pi(y|x) - log pi_ref(y|x), in nats, weighted, shaped and clipped by `scores.py` where the run asks it.
The example of most docstrings is that of docs/derivations.md, after eq. 11: scores 2 and -1, beta 0.1, so h = 0.1 * (2
+ 1) = 0.3.

Shape suffix: B pairs. Every loss returns (B,), in the dtype of its inputs.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import OptionError
from .registry import register
from .scores import shape_scores


class PairLoss(NamedTuple):
    """A loss per pair, and the implicit rewards it was made from."""

    losses_B: Tensor  # differentiable
    chosen_rewards_B: Tensor  # beta * log(policy / reference), detached
    rejected_rewards_B: Tensor  # the same of the rejected completion, detached


def smoothed_logistic(h: Tensor, label_smoothing: float) -> Tensor:
    """Returns -(1 - e) log sigmoid(h) - e log sigmoid(-h): the label is wrong with probability e.

    Raises:
        OptionError: e outside [0, 0.5].
    """
    if not 0 <= label_smoothing <= 0.5:
        raise OptionError(f"label_smoothing={label_smoothing!r} must lie in [0, 0.5]: the chance of a wrong label.")
    if label_smoothing == 0:
        return -F.logsigmoid(h)
    return -(1 - label_smoothing) * F.logsigmoid(h) - label_smoothing * F.logsigmoid(-h)


@register(
    "-log sigmoid(h)",
    use_when="The default: one better and one worse completion per prompt.",
    why_beta="The value of the paper (appendix B), and TRL's default.",
)
def sigmoid_loss(
    chosen_scores_B: Tensor,
    rejected_scores_B: Tensor,
    margin_B: Tensor | float = 0.0,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:
    """DPO: -log sigmoid(h), h = beta * (chosen - rejected) - margin.

    By hand (scores 2 and -1, beta 0.1): h = 0.3, log(1 + exp(-0.3)) = 0.5544. With margin 0.1, h = 0.2: 0.5981. With
    label_smoothing 0.1 (conservative DPO): 0.9 * 0.5544 + 0.1 * 0.8544 = 0.5844.

    Source: Rafailov et al. 2023, Direct Preference Optimization, arXiv:2305.18290, eq. 7 (docs/derivations.md, eqs. 8,
    9, 11); smoothing: Mitchell 2023, cDPO; margin: Amini et al. 2024, ODPO, arXiv:2402.10571.
    """
    return smoothed_logistic(beta * (chosen_scores_B - rejected_scores_B) - margin_B, label_smoothing)


@register(
    "-log sigmoid(h), s = sum over t of gamma^t log(pi / pi_ref)",
    use_when="Whole conversations are compared, which may part at any turn.",
    why_beta="That of sigmoid, which this is for one step.",
    data="trajectories",
    shaping=("discount_gamma", "discount_unit", "reward_clip"),
)
def trajectory_loss(
    chosen_scores_B: Tensor, rejected_scores_B: Tensor, margin_B: Tensor | float = 0.0, *, beta: float = 0.1
) -> Tensor:
    """Advantage DPO: -log sigmoid(h) of discounted scores, each the sum over steps of gamma^t * log-ratio.

    The caller discounts (`scores.discounts`). By hand: gamma 0.5, log-ratios 1 and 2 of the chosen trajectory's two
    steps make 1 + 0.5 * 2 = 2, one step of -1 makes -1; beta 0.1: log(1 + exp(-0.3)) = 0.5544.

    Source: Hejna et al. 2023, Contrastive Preference Learning, arXiv:2310.13639, its contrastive loss, with a
    reference (docs/derivations.md, eqs. 31, 46, 47).
    """
    return sigmoid_loss(chosen_scores_B, rejected_scores_B, margin_B, beta=beta)


@register(
    "max(0, 1 - h)",
    use_when="Pairs that are told apart well enough should stop pulling.",
)
def hinge_loss(
    chosen_scores_B: Tensor, rejected_scores_B: Tensor, margin_B: Tensor | float = 0.0, *, beta: float = 0.1
) -> Tensor:
    """max(0, 1 - h): no gradient once the rewards are 1 (plus the margin) apart.

    By hand: 1 - 0.3 = 0.7.

    Source: Zhao et al. 2023, SLiC-HF, arXiv:2305.10425, the calibration term, on log-ratios as in RSO; RSO: Liu et al.
    2023, arXiv:2309.06657.
    """
    return torch.relu(1 - (beta * (chosen_scores_B - rejected_scores_B) - margin_B))


@register(
    "(s_w - s_l - 1 / (2 beta))^2",
    use_when="Labels are nearly deterministic and DPO overfits them.",
    why_beta="TRL's default; as sums, pairs should come to lie 1 / (2 beta) = 5 nats apart.",
)
def ipo_loss(
    chosen_scores_B: Tensor,
    rejected_scores_B: Tensor,
    chosen_lengths_B: Tensor,
    rejected_lengths_B: Tensor,
    *,
    beta: float = 0.1,
    ipo_length_normalize: bool = False,
) -> Tensor:
    """IPO: (chosen - rejected - 1 / (2 beta))^2.

    The default takes scores as sums over tokens, as the paper prints it. `ipo_length_normalize` divides each score
    by its number of tokens first: the target then is a difference per token, which long completions reach at the price
    of a far larger distance from the reference.

    By hand: (3 - 5)^2 = 4.0. Normalized, with 4 and 2 tokens: (2 / 4 + 1 / 2 - 5)^2 = 16.0.

    Source: Azar et al. 2023, A General Theoretical Paradigm (IPO), arXiv:2310.12036, eq. 17 (docs/derivations.md, eq.
    50).
    """
    if ipo_length_normalize:
        chosen_scores_B = chosen_scores_B / chosen_lengths_B
        rejected_scores_B = rejected_scores_B / rejected_lengths_B
    return (chosen_scores_B - rejected_scores_B - 1 / (2 * beta)) ** 2


@register(
    "KL((sigmoid(h), sigmoid(-h)) || (1 - e, e))",
    use_when="The policy should concentrate on the better completions instead of covering all of them.",
    why_beta="The value of the paper (appendix B), and TRL's default.",
)
def exo_pair_loss(
    chosen_scores_B: Tensor, rejected_scores_B: Tensor, *, beta: float = 0.1, label_smoothing: float = 1e-3
) -> Tensor:
    """EXO: KL(q || p) of q = (sigmoid(h), sigmoid(-h)) from the labels p = (1 - e, e).

    By hand (h = 0.3, label_smoothing 0.1): q = 0.5744, 0.4256; 0.5744 * (log 0.5744 - log 0.9) +
    0.4256 * (log 0.4256 - log 0.1) = -0.2579 + 0.6163 = 0.3584.

    Raises:
        OptionError: label_smoothing outside (0, 0.5). At 0 the loss is infinite.

    Source: Ji et al. 2024, Efficient Exact Optimization, arXiv:2402.00856, eq. 16.
    """
    if not 0 < label_smoothing < 0.5:
        raise OptionError(
            f"label_smoothing={label_smoothing!r}: exo_pair needs a value in (0, 0.5), such as 0.001; "
            "at 0 its loss is infinite."
        )
    h_B = beta * (chosen_scores_B - rejected_scores_B)
    smoothing = h_B.new_tensor(label_smoothing)
    log_q_B, log_not_q_B = F.logsigmoid(h_B), F.logsigmoid(-h_B)
    chosen_B = log_q_B.exp() * (log_q_B - torch.log1p(-smoothing))
    return chosen_B + log_not_q_B.exp() * (log_not_q_B - smoothing.log())


@register(
    "(-(1 - e) log sigmoid(h) + e log sigmoid(-h)) / (1 - 2 e)",
    use_when="A known share e of the labels is wrong.",
    why_beta="TRL's default; the paper's runs use 0.01.",
)
def robust_loss(
    chosen_scores_B: Tensor,
    rejected_scores_B: Tensor,
    margin_B: Tensor | float = 0.0,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Robust DPO: unbiased under labels that are flipped with probability e.

    By hand (label_smoothing 0.1): (0.9 * 0.5544 - 0.1 * 0.8544) / 0.8 = 0.5169.

    Raises:
        OptionError: label_smoothing outside [0, 0.5).

    Source: Chowdhury et al. 2024, Provably Robust DPO, arXiv:2403.00409, the unbiased loss of section 3.1.
    """
    if not 0 <= label_smoothing < 0.5:
        raise OptionError(f"label_smoothing={label_smoothing!r}: robust needs a value in [0, 0.5).")
    h_B = beta * (chosen_scores_B - rejected_scores_B) - margin_B
    straight_B = -(1 - label_smoothing) * F.logsigmoid(h_B)
    return (straight_B + label_smoothing * F.logsigmoid(-h_B)) / (1 - 2 * label_smoothing)


@register(
    "(1 - w) * -log sigmoid(h) + w * exp(-h), w = sigmoid(h / tau)",
    use_when="A comparison with the loss that a language model found.",
    why_beta="TRL's default; the paper's runs use 0.05.",
)
def discopop_loss(
    chosen_scores_B: Tensor, rejected_scores_B: Tensor, *, beta: float = 0.1, discopop_tau: float = 0.05
) -> Tensor:
    """DiscoPOP: a blend of the logistic and the exponential loss, w = sigmoid(h / tau).

    By hand (h = 0.3, discopop_tau 0.3): w = 0.7311; 0.2689 * 0.5544 + 0.7311 * 0.7408 = 0.6907.

    w * exp(-h) is formed as one exponential: apart, they become 0 * inf at a large negative h.

    Source: Lu et al. 2024, Discovering Preference Optimization Algorithms, arXiv:2406.08414, eq. 5.
    """
    h_B = beta * (chosen_scores_B - rejected_scores_B)
    logistic_B = -F.logsigmoid(h_B) * torch.sigmoid(-h_B / discopop_tau)
    return logistic_B + torch.exp(F.logsigmoid(h_B / discopop_tau) - h_B)


@register(
    "-log sigmoid(beta * (s_w / |y_w| - s_l / |y_l|))",
    use_when="The longer completion is mostly the chosen one, and completions should not grow.",
    why_beta="TRL's default; scores per token are small, so the paper takes 5.",
)
def sigmoid_norm_loss(
    chosen_scores_B: Tensor,
    rejected_scores_B: Tensor,
    chosen_lengths_B: Tensor,
    rejected_lengths_B: Tensor,
    margin_B: Tensor | float = 0.0,
    *,
    beta: float = 0.1,
) -> Tensor:
    """DPO on scores per token: -log sigmoid(beta * (chosen / |y_w| - rejected / |y_l|) - margin).

    By hand (4 and 2 tokens): 0.1 * (2 / 4 + 1 / 2) = 0.1, log(1 + exp(-0.1)) = 0.6444.

    Source: Lambert et al. 2024, Tulu 3, arXiv:2411.15124, its length-normalized DPO.
    """
    return sigmoid_loss(
        chosen_scores_B / chosen_lengths_B, rejected_scores_B / rejected_lengths_B, margin_B, beta=beta
    )


@register(
    "-log sigmoid(beta * (sort(logp_w - logp_l) - sort(ref_w - ref_l)))",
    use_when="The whole distribution of margins should move; needs a large batch.",
    shaping=("ld_alpha",),
    batch_coupled=True,
)
def aot_loss(
    chosen_logps_B: Tensor,
    rejected_logps_B: Tensor,
    ref_chosen_logps_B: Tensor,
    ref_rejected_logps_B: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:
    """AOT, paired: -log sigmoid(beta * (sort(policy's gaps) - sort(reference's gaps))).

    A gap is log pi(y_w) - log pi(y_l).

    By hand (beta 0.1): gaps 5 and 1 under the policy, 2 and -1 under the reference; sorted 1, 5 and -1, 2, so the
    differences are 2 and 3: 0.5981 and 0.5544.

    Source: Melnyk et al. 2024, Alignment via Optimal Transport, arXiv:2406.05882, the paired objective.
    """
    gaps_B = (chosen_logps_B - rejected_logps_B).sort().values
    ref_gaps_B = (ref_chosen_logps_B - ref_rejected_logps_B).sort().values
    return smoothed_logistic(beta * (gaps_B - ref_gaps_B), label_smoothing)


@register(
    "-log sigmoid(beta * (sort(s_w) - sort(s_l)))",
    use_when="As aot, where good and bad completions need not belong to the same prompts.",
    shaping=("ld_alpha",),
    batch_coupled=True,
)
def aot_unpaired_loss(
    chosen_scores_B: Tensor, rejected_scores_B: Tensor, *, beta: float = 0.1, label_smoothing: float = 0.0
) -> Tensor:
    """AOT, unpaired: -log sigmoid(beta * (sort(chosen) - sort(rejected))), on scores.

    By hand (beta 0.1): chosen 3 and 1, rejected -2 and 1; sorted 1, 3 and -2, 1, so the differences are 3 and 2:
    0.5544 and 0.5981.

    Source: Melnyk et al. 2024, Alignment via Optimal Transport, arXiv:2406.05882, the unpaired objective.
    """
    chosen_B, rejected_B = chosen_scores_B.sort().values, rejected_scores_B.sort().values
    return smoothed_logistic(beta * (chosen_B - rejected_B), label_smoothing)


def dpo_loss(
    chosen_logps_B: Tensor,
    rejected_logps_B: Tensor,
    ref_chosen_logps_B: Tensor,
    ref_rejected_logps_B: Tensor,
    beta: float = 0.1,
    reward_clip: float | None = None,
) -> PairLoss:
    """Returns the DPO loss from four log-probs, -log sigmoid of the difference of implicit rewards.

        r(x, y) = beta * (log pi(y|x) - log pi_ref(y|x))        loss = -log sigmoid(r(x, y_w) - r(x, y_l))

    By hand (docs/derivations.md, after eq. 11): log-probs -10 and -15 under the policy, -12 and -14 under the
    reference, beta 0.1. The rewards are 0.1 * (-10 + 12) = 0.2 and 0.1 * (-15 + 14) = -0.1, their difference 0.3, and
    -log sigmoid(0.3) = log(1 + exp(-0.3)) = 0.5544.

    Args:
        chosen_logps_B, rejected_logps_B: (B,) log-probs of the completions under the policy.
        ref_chosen_logps_B, ref_rejected_logps_B: (B,) the same under the reference.
        beta: how strongly the policy is held to the reference; rewards are in units of beta nats.
        reward_clip: clip each implicit reward to [-reward_clip, reward_clip]. A reward outside it
            gets no gradient. The rewards returned are the unclipped ones.

    Source: Rafailov et al. 2023, eq. 7 (docs/derivations.md, eqs. 8, 9, 11).
    """
    chosen_B, rejected_B = chosen_logps_B - ref_chosen_logps_B, rejected_logps_B - ref_rejected_logps_B
    losses_B = sigmoid_loss(
        shape_scores(chosen_B, beta, reward_clip=reward_clip),
        shape_scores(rejected_B, beta, reward_clip=reward_clip),
        beta=beta,
    )
    return PairLoss(losses_B, beta * chosen_B.detach(), beta * rejected_B.detach())
