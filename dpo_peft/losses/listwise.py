"""Losses of lists: several completions of one prompt, graded; lists of any lengths side by side, without padding.

A score is log pi(y|x) - log pi_ref(y|x), in nats. Grades only count by their order, higher is better.

Shape suffixes: C completions of all lists, E lists. Every loss returns (E,), in the dtype of the scores.
"""

import torch
from torch import Tensor

from .registry import register


def segment_logsumexp(values_C: Tensor, segment_of_C: Tensor, num_segments: int) -> Tensor:
    """Returns the log of the sum of exp(values) per segment, (E,). No segment may be empty."""
    lowest_E = values_C.new_full((num_segments,), -torch.inf)
    largest_E = lowest_E.scatter_reduce(0, segment_of_C, values_C.detach(), "amax")
    sums_E = torch.zeros_like(largest_E).index_add(0, segment_of_C, (values_C - largest_E[segment_of_C]).exp())
    return largest_E + sums_E.log()


@register(
    "-log(exp(r_w) / (exp(r_w) + sum_i exp(r_i)))",
    use_when="One best completion and several worse ones per prompt.",
    why_beta="That of sigmoid, which this is for one rejected completion.",
    data="lists",
    shaping=("reward_clip",),
)
def multi_negative_loss(
    scores_C: Tensor, grades_C: Tensor, sample_of_C: Tensor, num_samples: int, *, beta: float = 0.1
) -> Tensor:
    """DPO with m rejected completions, m from list to list: -log of the chosen one's share of sum exp(r).

    The completion of the best grade is the chosen one; all others are rejected, whatever their order. Several of the
    best grade share the label evenly.

    By hand (m = 3, beta 0.5): scores 2, -1, 0, 1 make rewards 1, -0.5, 0, 0.5; the exponentials 2.7183 + 0.6065 + 1 +
    1.6487 = 5.9735; log(5.9735 / 2.7183) = 0.7873.

    Source: van den Oord et al. 2018, InfoNCE, arXiv:1807.03748, eq. 4, on implicit rewards (docs/derivations.md, eq.
    17).
    """
    rewards_C = beta * scores_C
    lowest_E = grades_C.new_full((num_samples,), torch.finfo(grades_C.dtype).min)
    best_E = lowest_E.scatter_reduce(0, sample_of_C, grades_C, "amax")
    is_best_C = (grades_C == best_E[sample_of_C]).to(rewards_C.dtype)
    zeros_E = rewards_C.new_zeros(num_samples)
    number_E = zeros_E.index_add(0, sample_of_C, is_best_C)
    chosen_E = zeros_E.index_add(0, sample_of_C, rewards_C * is_best_C) / number_E
    return segment_logsumexp(rewards_C, sample_of_C, num_samples) - chosen_E


@register(
    "sum_i log sum over {j not above i} of exp(r_j - r_i)",
    use_when="Completions are ranked, and the order of the lower ones can be trusted too.",
    why_beta="That of sigmoid, which this is for two completions.",
    data="lists",
    shaping=("reward_clip",),
)
def plackett_luce_loss(
    scores_C: Tensor, grades_C: Tensor, sample_of_C: Tensor, num_samples: int, *, beta: float = 0.1
) -> Tensor:
    """Minus the log-likelihood of the whole ranking: the best is picked from all, the next from the rest, and so on.

    Tied completions are each picked from the same set, which holds all of the tied ones (Breslow's form). The last
    one, if it stands alone, adds 0.

    By hand (beta 0.5): scores 2, 1, -1, best first, make rewards 1, 0.5, -0.5. The first pick:
    log((2.7183 + 1.6487 + 0.6065) / 2.7183) = 0.6041; the second: log(1 + exp(-1)) = 0.3133; together 0.9174.

    Source: Rafailov et al. 2023, Direct Preference Optimization, arXiv:2305.18290, eq. 20 (appendix A.3).
    """
    rewards_C = beta * scores_C
    # C x C of small C: a few lists of a few completions. It is the plainest form, and exact for ties.
    at_risk_CC = (sample_of_C[:, None] == sample_of_C) & (grades_C[:, None] >= grades_C)
    picks_C = torch.where(at_risk_CC, rewards_C, -torch.inf).logsumexp(1) - rewards_C
    return rewards_C.new_zeros(num_samples).index_add(0, sample_of_C, picks_C)
