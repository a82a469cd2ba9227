"""Losses of pairs that pull each reward to its own side of a fixed point, not only apart.

A score is log pi(y|x) - log pi_ref(y|x), in nats; a reward is beta times that.
The example: scores 2 and -1, beta 0.1, so the rewards are 0.2 and -0.1.

Shape suffix: B pairs. Every loss returns (B,), in the dtype of its inputs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def nca_pair_loss(chosen_scores_B: Tensor, rejected_scores_B: Tensor, *, beta: float = 0.1) -> Tensor:
    """NCA: -log sigmoid(r_w) - 1/2 log sigmoid(-r_w) - 1/2 log sigmoid(-r_l).

    The middle term keeps the chosen reward from growing for ever.

    By hand: 0.5981 + 0.5 * 0.7981 + 0.5 * 0.6444 = 1.3194.

    Source: Chen et al. 2024, Noise Contrastive Alignment, arXiv:2402.05369.
    """
    chosen_B, rejected_B = beta * chosen_scores_B, beta * rejected_scores_B
    return -F.logsigmoid(chosen_B) - 0.5 * F.logsigmoid(-chosen_B) - 0.5 * F.logsigmoid(-rejected_B)


def bco_pair_loss(chosen_scores_B: Tensor, rejected_scores_B: Tensor, *, beta: float = 0.1) -> Tensor:
    """BCO of a pair, without its moving reward shift: -log sigmoid(r_w) - log sigmoid(-r_l).

    By hand: 0.5981 + 0.6444 = 1.2425.

    Source: Jung et al. 2024, Binary Classifier Optimization, arXiv:2404.04656.
    """
    return -F.logsigmoid(beta * chosen_scores_B) - F.logsigmoid(-beta * rejected_scores_B)


def sppo_hard_loss(chosen_scores_B: Tensor, rejected_scores_B: Tensor, *, beta: float = 0.1) -> Tensor:
    """SPPO with win rates 1 and 0: (chosen - 1 / (2 beta))^2 + (rejected + 1 / (2 beta))^2, on scores.

    By hand: (2 - 5)^2 + (-1 + 5)^2 = 25.0.

    Source: Wu et al. 2024, arXiv:2405.00675, eq. 4.7; its step size eta is 1 / beta.
    """
    return (chosen_scores_B - 0.5 / beta) ** 2 + (rejected_scores_B + 0.5 / beta) ** 2


def apo_zero_loss(chosen_scores_B: Tensor, rejected_scores_B: Tensor, *, beta: float = 0.1) -> Tensor:
    """APO-zero: 1 - sigmoid(r_w) + sigmoid(r_l). The chosen one becomes likelier, the rejected one less likely.

    By hand: 1 - 0.5498 + 0.4750 = 0.9252.

    Source: D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 7.
    """
    return torch.sigmoid(-beta * chosen_scores_B) + torch.sigmoid(beta * rejected_scores_B)


def apo_down_loss(chosen_scores_B: Tensor, rejected_scores_B: Tensor, *, beta: float = 0.1) -> Tensor:
    """APO-down: sigmoid(r_w) + 1 - sigmoid(r_w - r_l). Both become less likely, the rejected one more so.

    By hand: 0.5498 + 1 - 0.5744 = 0.9754.

    Source: D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 8.
    """
    return torch.sigmoid(beta * chosen_scores_B) + torch.sigmoid(-beta * (chosen_scores_B - rejected_scores_B))
