"""Losses that compare sorted batches: the distribution of rewards should move, not each pair by itself.

They depend on the whole optimizer batch, so call them on all of it at once.

Shape suffix: B pairs. Every loss returns (B,), in sorted order, in the dtype of its inputs.
"""

from torch import Tensor

from .pairwise import smoothed_logistic


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

    Source: Melnyk et al. 2024, Distributional Preference Alignment via Optimal Transport, arXiv:2406.05882.
    """
    gaps_B = (chosen_logps_B - rejected_logps_B).sort().values
    ref_gaps_B = (ref_chosen_logps_B - ref_rejected_logps_B).sort().values
    return smoothed_logistic(beta * (gaps_B - ref_gaps_B), label_smoothing)


def aot_unpaired_loss(
    chosen_scores_B: Tensor, rejected_scores_B: Tensor, *, beta: float = 0.1, label_smoothing: float = 0.0
) -> Tensor:
    """AOT, unpaired: -log sigmoid(beta * (sort(chosen) - sort(rejected))), on scores.

    By hand (beta 0.1): chosen 3 and 1, rejected -2 and 1; sorted 1, 3 and -2, 1, so the differences are 3 and 2:
    0.5544 and 0.5981.

    Source: Melnyk et al. 2024, arXiv:2406.05882.
    """
    chosen_B, rejected_B = chosen_scores_B.sort().values, rejected_scores_B.sort().values
    return smoothed_logistic(beta * (chosen_B - rejected_B), label_smoothing)
