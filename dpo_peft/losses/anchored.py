"""Losses of pairs that pull each reward to its own side of a fixed point, not only apart.

A score is log pi(y|x) - log pi_ref(y|x), in nats; a reward is beta times that.
The example: scores 2 and -1, beta 0.1, so the rewards are 0.2 and -0.1.

Shape suffix: B pairs. Every loss returns (B,), in the dtype of its inputs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .registry import WEIGHTS, register


@register(
    "-log sigmoid(r_w) - (log sigmoid(-r_w) + log sigmoid(-r_l)) / 2",
    use_when="The likelihood of the chosen completions must not fall.",
    why_beta="TRL's default; the paper's runs use 0.01.",
    shaping=WEIGHTS,
)
def nca_pair_loss(chosen_scores_B: Tensor, rejected_scores_B: Tensor, *, beta: float = 0.1) -> Tensor:
    """NCA: -log sigmoid(r_w) - 1/2 log sigmoid(-r_w) - 1/2 log sigmoid(-r_l).

    The middle term keeps the chosen reward from growing for ever.

    By hand: 0.5981 + 0.5 * 0.7981 + 0.5 * 0.6444 = 1.3194.

    Source: Chen et al. 2024, Noise Contrastive Alignment, arXiv:2402.05369, InfoNCE replaced by NCE, K = 2.
    """
    chosen_B, rejected_B = beta * chosen_scores_B, beta * rejected_scores_B
    return -F.logsigmoid(chosen_B) - 0.5 * F.logsigmoid(-chosen_B) - 0.5 * F.logsigmoid(-rejected_B)


@register(
    "-log sigmoid(r_w) - log sigmoid(-r_l)",
    use_when="Chosen should mean good and rejected bad, not only better and worse.",
    why_beta="TRL's default; the paper's runs use 0.01.",
    shaping=WEIGHTS,
)
def bco_pair_loss(chosen_scores_B: Tensor, rejected_scores_B: Tensor, *, beta: float = 0.1) -> Tensor:
    """BCO of a pair, without its moving reward shift: -log sigmoid(r_w) - log sigmoid(-r_l).

    By hand: 0.5981 + 0.6444 = 1.2425.

    Source: Jung et al. 2024, Binary Classifier Optimization, arXiv:2404.04656, the classifier's loss, reward shift 0.
    """
    return -F.logsigmoid(beta * chosen_scores_B) - F.logsigmoid(-beta * rejected_scores_B)


@register(
    "(s_w - 1 / (2 beta))^2 + (s_l + 1 / (2 beta))^2",
    use_when="Rounds of sampling from the policy and judging by a preference model.",
    why_beta="TRL's default; the paper's runs use 0.001.",
    shaping=WEIGHTS,
)
def sppo_hard_loss(chosen_scores_B: Tensor, rejected_scores_B: Tensor, *, beta: float = 0.1) -> Tensor:
    """SPPO with win rates 1 and 0: (chosen - 1 / (2 beta))^2 + (rejected + 1 / (2 beta))^2, on scores.

    By hand: (2 - 5)^2 + (-1 + 5)^2 = 25.0.

    Source: Wu et al. 2024, Self-Play Preference Optimization, arXiv:2405.00675, eq. 4.7, win rates 1 and 0; its step
    size eta is 1 / beta.
    """
    return (chosen_scores_B - 0.5 / beta) ** 2 + (rejected_scores_B + 0.5 / beta) ** 2


@register(
    "1 - sigmoid(r_w) + sigmoid(r_l)",
    use_when="The chosen completions are better than what the model writes.",
    why_beta="The value of the paper (section 5.2), and TRL's default.",
    shaping=WEIGHTS,
)
def apo_zero_loss(chosen_scores_B: Tensor, rejected_scores_B: Tensor, *, beta: float = 0.1) -> Tensor:
    """APO-zero: 1 - sigmoid(r_w) + sigmoid(r_l). The chosen one becomes likelier, the rejected one less likely.

    By hand: 1 - 0.5498 + 0.4750 = 0.9252.

    Source: D'Oosterlinck et al. 2024, Anchored Preference Optimization, arXiv:2408.06266, eq. 7.
    """
    return torch.sigmoid(-beta * chosen_scores_B) + torch.sigmoid(beta * rejected_scores_B)


@register(
    "sigmoid(r_w) + 1 - sigmoid(h)",
    use_when="The model already writes better than the chosen completions.",
    why_beta="The value of the paper (section 5.2), and TRL's default.",
    shaping=WEIGHTS,
)
def apo_down_loss(chosen_scores_B: Tensor, rejected_scores_B: Tensor, *, beta: float = 0.1) -> Tensor:
    """APO-down: sigmoid(r_w) + 1 - sigmoid(r_w - r_l). Both become less likely, the rejected one more so.

    By hand: 0.5498 + 1 - 0.5744 = 0.9754.

    Source: D'Oosterlinck et al. 2024, Anchored Preference Optimization, arXiv:2408.06266, eq. 8.
    """
    return torch.sigmoid(beta * chosen_scores_B) + torch.sigmoid(-beta * (chosen_scores_B - rejected_scores_B))
