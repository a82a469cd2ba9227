"""Losses of single completions, each judged good or bad.

A score is log pi(y|x) - log pi_ref(y|x), in nats.

Shape suffixes: C completions, M mismatched completions. Every loss returns (C,), in the dtype of the scores.
"""

import torch
from torch import Tensor

from .registry import register


def reference_point(mismatched_scores_M: Tensor) -> Tensor:
    """Returns KTO's z_ref: the mean score of completions that belong to other prompts, at least 0; 0-dim, detached.

    It estimates KL(policy || reference) over the whole optimizer batch, which can't be negative. Without mismatched
    completions it is 0.

    By hand: scores 0.5 and 1.5 give 1.0; -2 and 1 give 0.0.

    Source: Ethayarajh et al. 2024, arXiv:2402.01306, section 4.1.
    """
    if mismatched_scores_M.numel() == 0:
        return mismatched_scores_M.new_zeros(())
    return mismatched_scores_M.detach().mean().clamp(min=0)


@register(
    "w_good * (1 - sigmoid(beta * (s - z))) or w_bad * sigmoid(beta * (s - z))",
    use_when="Completions are judged good or bad one by one, in no pairs.",
    why_beta="The paper's and TRL's default.",
    data="singles",
)
def kto_loss(
    scores_C: Tensor,
    grades_C: Tensor,
    mismatched_scores_M: Tensor,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """KTO: w * (1 - sigmoid(beta * (s - z_ref))) for a good completion, w * sigmoid(beta * (s - z_ref)) for a bad one.

    beta is applied once, to score and reference point alike.

    By hand (beta 0.1, z_ref 1.0 from mismatched scores 0.5 and 1.5): a good completion of score 2: 1 - sigmoid(0.1) =
    0.4750; a bad one of score -1: sigmoid(-0.2) = 0.4502.

    Source: Ethayarajh et al. 2024, KTO, arXiv:2402.01306, eq. 7 (docs/derivations.md, eq. 51).
    """
    scores_C = scores_C - reference_point(mismatched_scores_M)
    return _judged(beta * scores_C, grades_C, desirable_weight, undesirable_weight)


@register(
    "w_good * (1 - sigmoid(r)) or w_bad * sigmoid(r)",
    use_when="As kto, without the cost and noise of a reference point.",
    data="singles",
)
def apo_zero_unpaired_loss(
    scores_C: Tensor,
    grades_C: Tensor,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """APO-zero of single completions, KTO with z_ref = 0: w * (1 - sigmoid(r)) if good, w * sigmoid(r) if bad.

    By hand (beta 0.1): a good completion of score 2: 1 - sigmoid(0.2) = 0.4502; a bad one of score -1: sigmoid(-0.1) =
    0.4750.

    Source: D'Oosterlinck et al. 2024, Anchored Preference Optimization, arXiv:2408.06266, eq. 7, a term for each.
    """
    return _judged(beta * scores_C, grades_C, desirable_weight, undesirable_weight)


def _judged(rewards_C: Tensor, grades_C: Tensor, desirable_weight: float, undesirable_weight: float) -> Tensor:
    good_C = grades_C > 0.5
    return torch.where(
        good_C, desirable_weight * torch.sigmoid(-rewards_C), undesirable_weight * torch.sigmoid(rewards_C)
    )
