"""Losses of pairs: one chosen and one rejected completion of the same prompt.

Shape suffix: B pairs. All log-probs are sums over completion tokens, in nats.
"""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class PairLoss(NamedTuple):
    """A loss per pair, and the implicit rewards it was made from."""

    losses_B: Tensor  # differentiable
    chosen_rewards_B: Tensor  # beta * log(policy / reference), detached
    rejected_rewards_B: Tensor  # the same of the rejected completion, detached


def dpo_loss(
    chosen_logps_B: Tensor,
    rejected_logps_B: Tensor,
    ref_chosen_logps_B: Tensor,
    ref_rejected_logps_B: Tensor,
    beta: float = 0.1,
    reward_clip: float | None = None,
) -> PairLoss:
    """The DPO loss, -log sigmoid of the difference of implicit rewards.

        r(x, y) = beta * (log pi(y|x) - log pi_ref(y|x))        loss = -log sigmoid(r(x, y_w) - r(x, y_l))

    By hand (note, example 3.1): log-probs -10 and -15 under the policy, -12 and -14 under the reference, beta 0.1.
    The rewards are 0.1 * (-10 + 12) = 0.2 and 0.1 * (-15 + 14) = -0.1, their difference 0.3, and
    -log sigmoid(0.3) = log(1 + exp(-0.3)) = 0.5544.

    Args:
        chosen_logps_B: (B,) log-probs of the chosen completions under the policy.
        rejected_logps_B: (B,) of the rejected ones.
        ref_chosen_logps_B: (B,) of the chosen ones under the reference.
        ref_rejected_logps_B: (B,) of the rejected ones under the reference.
        beta: how strongly the policy is held to the reference; rewards are in units of beta nats.
        reward_clip: clip each implicit reward to [-reward_clip, reward_clip] (note section 6.3). A reward outside it
            gets no gradient. The rewards returned are the unclipped ones.

    Returns:
        `PairLoss`, each tensor (B,).

    Source: Rafailov et al. 2023, eq. 7 (note eqs. 8, 9, 11, listing 2).
    """
    chosen_rewards_B = beta * (chosen_logps_B - ref_chosen_logps_B)
    rejected_rewards_B = beta * (rejected_logps_B - ref_rejected_logps_B)
    chosen_B, rejected_B = chosen_rewards_B, rejected_rewards_B
    if reward_clip is not None:
        chosen_B = chosen_B.clamp(-reward_clip, reward_clip)
        rejected_B = rejected_B.clamp(-reward_clip, reward_clip)
    return PairLoss(-F.logsigmoid(chosen_B - rejected_B), chosen_rewards_B.detach(), rejected_rewards_B.detach())
