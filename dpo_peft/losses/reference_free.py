"""Losses of pairs that need no reference at all.

Log-probs are sums over completion tokens, in nats. `mean_chosen_length` is the mean number of chosen tokens per pair
over the whole optimizer batch: the mean over pairs of chosen_nll / mean_chosen_length then is the mean over tokens,
whatever the split into micro-batches.

Shape suffix: B pairs. Every loss returns (B,), in the dtype of its inputs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .pairwise import smoothed_logistic
from .registry import register
from .scores import shape_scores


@register(
    "-log pi(y_w) per token",
    use_when="As one part of a mix, to keep the likelihood of the chosen completions up.",
    why_beta="It has no beta.",
)
def sft_loss(chosen_nll_B: Tensor, mean_chosen_length: Tensor | float) -> Tensor:
    """Cross-entropy per token of the chosen completions. The rejected ones aren't read.

    By hand: nats 6 and 2 over 3 and 1 tokens, so 2 tokens a pair: 3.0 and 1.0, whose mean is 8 nats / 4 tokens.

    Source: maximum likelihood, the first term of ORPO's 6 (docs/derivations.md, eq. 53).
    """
    return chosen_nll_B / mean_chosen_length


@register(
    "-log sigmoid(beta * (logp_w / |y_w| - logp_l / |y_l|) - gamma)",
    use_when="No time or memory for a reference, and completions should not grow longer.",
    why_beta="The paper's runs use 2 and more: log-probs per token are small. TRL's default is 0.1.",
)
def simpo_loss(
    chosen_logps_B: Tensor,
    rejected_logps_B: Tensor,
    chosen_lengths_B: Tensor,
    rejected_lengths_B: Tensor,
    margin_B: Tensor | float = 0.0,
    *,
    beta: float = 2.0,
    simpo_gamma: float = 1.0,
    alphapo_alpha: float = 0.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """SimPO: -log sigmoid(beta * (log pi(y_w) / |y_w| - log pi(y_l) / |y_l|) - gamma).

    By hand: log-probs -10 and -15 over 5 tokens each, beta 2, simpo_gamma 1: 2 * (-2 + 3) - 1 = 1,
    log(1 + exp(-1)) = 0.3133.

    `margin_B` is taken off beside gamma, in the same unit. AlphaPO has (1 - exp(-a u)) / a in the place of a mean u,
    with a = `alphapo_alpha`; 0 is SimPO. By hand, a = 0.5 (beta 2, simpo_gamma 1, the log-probs above): rewards
    -3.4366 and -6.9634, 2 * 3.5268 - 1 = 6.0536, log(1 + exp(-6.0536)) = 0.0023.

    Source: Meng et al. 2024, SimPO, arXiv:2405.14734, eq. 6 (docs/derivations.md, eq. 52); alpha: Gupta et al. 2025,
    AlphaPO, arXiv:2501.03884.
    """
    means = chosen_logps_B / chosen_lengths_B, rejected_logps_B / rejected_lengths_B
    # Alike as functions: AlphaPO's of a mean, and the alpha divergence's of a score.
    chosen_B, rejected_B = (shape_scores(mean_B, beta, "alpha_divergence", 1 - alphapo_alpha) for mean_B in means)
    return smoothed_logistic(beta * (chosen_B - rejected_B) - simpo_gamma - margin_B, label_smoothing)


def log_odds(mean_logps_B: Tensor) -> Tensor:
    """Returns log(p / (1 - p)) of p = exp(mean_logps), finite up to p = 1: 1 - p is at least the dtype's epsilon."""
    below_one_B = mean_logps_B.clamp(max=-torch.finfo(mean_logps_B.dtype).eps)
    return below_one_B - torch.log(-torch.expm1(below_one_B))


@register(
    "-log pi(y_w) per token - beta * log sigmoid(log(odds(y_w) / odds(y_l)))",
    use_when="Preference training straight from a base model, without an SFT run before.",
    why_beta="TRL's default; it is lambda of the paper.",
)
def orpo_loss(
    chosen_logps_B: Tensor,
    rejected_logps_B: Tensor,
    chosen_lengths_B: Tensor,
    rejected_lengths_B: Tensor,
    chosen_nll_B: Tensor,
    mean_chosen_length: Tensor | float,
    *,
    beta: float = 0.1,
) -> Tensor:
    """ORPO: cross-entropy per token of the chosen completion - beta * log sigmoid(log(odds(y_w) / odds(y_l))).

    odds = p / (1 - p) with p = exp(log pi(y) / |y|), the geometric mean of the token probabilities. beta is
    lambda of docs/derivations.md, eq. 53. The cross-entropy is that of the completion, not of prompt and completion.

    By hand (beta 0.1): two chosen tokens of probability 0.5 each, one rejected token of probability 0.2. The odds are
    1 and 0.25, their ratio 4, -log(4 / 5) = 0.2231; 2 * 0.6931 nats over 2 tokens: 0.6931 + 0.1 * 0.2231 = 0.7155.

    Source: Hong et al. 2024, ORPO, arXiv:2403.07691, eq. 6, 7 (docs/derivations.md, eq. 53).
    """
    ratio_B = log_odds(chosen_logps_B / chosen_lengths_B) - log_odds(rejected_logps_B / rejected_lengths_B)
    return sft_loss(chosen_nll_B, mean_chosen_length) - beta * F.logsigmoid(ratio_B)


@register(
    "-log sigmoid(beta * (logp_w - logp_l)) - alpha * log pi(y_w) per token",
    use_when="Chosen completions are excellent and of about the same length, as in translation.",
    why_beta="The paper's value, and TRL's default.",
)
def cpo_loss(
    chosen_logps_B: Tensor,
    rejected_logps_B: Tensor,
    chosen_nll_B: Tensor,
    mean_chosen_length: Tensor | float,
    margin_B: Tensor | float = 0.0,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    cpo_alpha: float = 1.0,
) -> Tensor:
    """CPO: -log sigmoid(beta * (log pi(y_w) - log pi(y_l))) + alpha * cross-entropy per token of the chosen one.

    DPO with a uniform reference, held by the second term.

    By hand (beta 0.1, cpo_alpha 1): log-probs -10 and -15, 5 chosen tokens: log(1 + exp(-0.5)) + 10 / 5 = 0.4741 + 2 =
    2.4741.

    Source: Xu et al. 2024, Contrastive Preference Optimization, arXiv:2401.08417, eq. 3.
    """
    h_B = beta * (chosen_logps_B - rejected_logps_B) - margin_B
    return smoothed_logistic(h_B, label_smoothing) + cpo_alpha * sft_loss(chosen_nll_B, mean_chosen_length)


@register(
    "max(0, 1 - beta * (logp_w - logp_l)) - alpha * log pi(y_w) per token",
    use_when="As cpo, where pairs that are told apart well enough should stop pulling.",
)
def cpo_hinge_loss(
    chosen_logps_B: Tensor,
    rejected_logps_B: Tensor,
    chosen_nll_B: Tensor,
    mean_chosen_length: Tensor | float,
    margin_B: Tensor | float = 0.0,
    *,
    beta: float = 0.1,
    cpo_alpha: float = 1.0,
) -> Tensor:
    """SLiC-HF: max(0, 1 - beta * (log pi(y_w) - log pi(y_l))) + alpha * cross-entropy per token of the chosen one.

    It is "hinge" of TRL's CPO. By hand (beta 0.1, cpo_alpha 1): log-probs -10 and -15, 5 chosen tokens:
    1 - 0.5 + 10 / 5 = 2.5.

    Source: Zhao et al. 2023, SLiC-HF, arXiv:2305.10425, its calibration term (delta = 1 / beta) and regularizer.
    """
    hinge_B = torch.relu(1 - (beta * (chosen_logps_B - rejected_logps_B) - margin_B))
    return hinge_B + cpo_alpha * sft_loss(chosen_nll_B, mean_chosen_length)


@register(
    "(logp_w / |y_w| - logp_l / |y_l| - 1 / (2 beta))^2 - alpha * log pi(y_w) per token",
    use_when="As cpo, where the log-probs per token should come to lie a set distance apart and no further.",
)
def cpo_ipo_loss(
    chosen_logps_B: Tensor,
    rejected_logps_B: Tensor,
    chosen_lengths_B: Tensor,
    rejected_lengths_B: Tensor,
    chosen_nll_B: Tensor,
    mean_chosen_length: Tensor | float,
    *,
    beta: float = 0.1,
    cpo_alpha: float = 1.0,
) -> Tensor:
    """IPO without a reference: (difference of log-probs per token - 1 / (2 beta))^2 + alpha * cross-entropy per token.

    It is "ipo" of TRL's CPO. By hand (beta 0.1, cpo_alpha 1): log-probs -10 and -15 over 5 tokens each:
    (1 - 5)^2 + 10 / 5 = 18.0.

    Source: Azar et al. 2023, IPO, arXiv:2310.12036, eq. 17, of a uniform reference and per token.
    """
    means_B = chosen_logps_B / chosen_lengths_B - rejected_logps_B / rejected_lengths_B
    return (means_B - 1 / (2 * beta)) ** 2 + cpo_alpha * sft_loss(chosen_nll_B, mean_chosen_length)
