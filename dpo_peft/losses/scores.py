"""What happens to log-ratios before a loss sees them: divergences, clipping, and weights of tokens and pairs.

A score is log pi(y|x) - log pi_ref(y|x) of a completion, in nats.

Shape suffixes: N completion tokens, C completions.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import OptionError

F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
MAX_EXPONENT = 80.0  # exp(80) = 5.5e34, still finite in float32 and bfloat16


def shape_scores(
    scores: Tensor,
    beta: float,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
    reward_clip: float | None = None,
) -> Tensor:
    """Log-ratios u -> f'(exp(u)) of the chosen divergence, up to a constant, then clipped.

        reverse_kl        u, the plain DPO score
        forward_kl        1 - exp(-u)
        js_divergence     log 2 + logsigmoid(u)
        alpha_divergence  (exp((a - 1) u) - 1) / (a - 1), which is u itself at a = 1

    By hand, u = 1: 1.0, 1 - 1/e = 0.6321, log 2 - log(1 + 1/e) = 0.3799, a = 0.5: (exp(-0.5) - 1) / -0.5 = 0.7869.

    An exponent above 80 counts as 80, so that two very unlikely completions give a huge finite score each and not
    inf - inf. Such a completion gets no gradient.

    Args:
        scores: any shape, nats.
        beta: only used to turn `reward_clip` into units of scores.
        f_divergence_type: one of `F_DIVERGENCES`.
        f_alpha_divergence_coef: a of the alpha divergence; ignored by the others.
        reward_clip: clip beta * score to [-reward_clip, reward_clip]. No gradient outside.

    Raises:
        OptionError: unknown divergence.

    Source: Wang et al. 2023, Beyond Reverse KL, arXiv:2309.16240, table 1.
    """
    if f_divergence_type == "forward_kl":
        scores = 1 - torch.exp((-scores).clamp(max=MAX_EXPONENT))
    elif f_divergence_type == "js_divergence":
        scores = math.log(2) + F.logsigmoid(scores)
    elif f_divergence_type == "alpha_divergence":
        power = f_alpha_divergence_coef - 1
        if abs(power) >= 1e-6:  # below, the division would lose every digit, and the limit is u
            scores = torch.expm1((power * scores).clamp(max=MAX_EXPONENT)) / power
    elif f_divergence_type != "reverse_kl":
        raise OptionError(
            f"f_divergence_type={f_divergence_type!r} is unknown. Use one of {', '.join(F_DIVERGENCES)}."
        )
    if reward_clip is not None:
        scores = scores.clamp(-reward_clip / beta, reward_clip / beta)
    return scores


def discounts(steps_N: Tensor, gamma: float) -> Tensor:
    """Returns (N,) float64 gamma ** step, the weights of a trajectory's log-ratios; steps are int64 from 0.

    By hand: steps 0, 1, 3 at gamma 0.5 weigh 1, 0.5 and 0.125.

    Raises:
        OptionError: gamma outside (0, 1].

    Source: docs/derivations.md, eqs. 31, 47.
    """
    if not 0 < gamma <= 1:
        raise OptionError(f"discount_gamma={gamma!r} must be above 0 and at most 1 (1 is no discount).")
    return gamma ** steps_N.double()


def length_desensitized_weights(position_N: Tensor, shared_length_N: Tensor, ld_alpha: float) -> Tensor:
    """Returns (N,) float64: 1 up to the length of the pair's shorter completion, `ld_alpha` for tokens beyond.

    By hand: 5 tokens against a completion of 3 at ld_alpha 0.2 weigh 1, 1, 1, 0.2, 0.2.

    Args:
        position_N: (N,) int64, index of the token in its completion, from 0.
        shared_length_N: (N,) int64, length of the shorter completion of the token's pair.
        ld_alpha: 1 changes nothing, 0 cuts the excess off.

    Source: Liu et al. 2024, LD-DPO, arXiv:2409.06411.
    """
    one = torch.ones((), dtype=torch.float64, device=position_N.device)
    return torch.where(position_N < shared_length_N, one, ld_alpha * one)


def wpo_weights(token_logps_N: Tensor, log_sum_sq_N: Tensor, completion_of_N: Tensor, num_completions: int) -> Tensor:
    """Returns how likely the policy would have written each completion: exp(mean of log p - log sum p^2).

    The weight of a pair is the product of its two. A token drawn from the policy has log p = log sum p^2 on average
    (roughly), so that on-policy text weighs about 1 whatever the temperature.

    By hand: two tokens of probability 0.5 and 0.25, whose distributions have sum p^2 = 0.5 and 0.5, weigh
    exp((log 1 + log 0.5) / 2) = 0.7071.

    Args:
        token_logps_N: (N,) log-probs of the completion tokens.
        log_sum_sq_N: (N,) log of the sum over the vocabulary of squared probabilities.
        completion_of_N: (N,) int64, which completion.
        num_completions: C. The result is (C,), detached; a completion without tokens weighs 1.

    Source: Zhou et al. 2024, WPO, arXiv:2406.11827, eq. 2 with the sampled alignment.
    """
    aligned_N = (token_logps_N - log_sum_sq_N).detach()
    zeros_C = torch.zeros(num_completions, dtype=aligned_N.dtype, device=aligned_N.device)
    sums_C = zeros_C.index_add(0, completion_of_N, aligned_N)
    lengths_C = zeros_C.index_add(0, completion_of_N, torch.ones_like(aligned_N)).clamp(min=1)
    return torch.exp(sums_C / lengths_C)
