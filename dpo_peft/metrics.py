"""What a training run reports about its pairs, under TRL's names, and how it adds up over micro-batches.

Every metric is a sum and a count kept on the device; they meet the host once, when they are logged. So a mean is over
pairs (or tokens), whatever the split into micro-batches.

Shape suffixes: B pairs, N completion tokens, C completions.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .losses import PairLoss


class Mean(NamedTuple):
    """A mean that is still a sum and a count: 0-dim tensors."""

    total: Tensor
    number: Tensor


def pair_metrics(
    loss: PairLoss,
    logps_C: Tensor,
    token_logps_N: Tensor,
    ref_token_logps_N: Tensor,
    completion_of_N: Tensor,
) -> dict[str, Mean]:
    """The metrics of one batch of pairs, chosen at even and rejected at odd completions.

    - `rewards/chosen`, `rewards/rejected`, `rewards/margins`: implicit rewards beta * log(policy / reference), nats.
    - `rewards/accuracies`: share of pairs whose chosen reward is the larger; a tie counts as half.
    - `accuracies/length_only`: the same for "the longer completion is the better one". Beside accuracy, it tells how
      much of it length alone explains.
    - `logps/chosen`, `logps/rejected`: log-probs of whole completions under the policy, nats.
    - `sample_weight`: 1 - sigmoid(margin), the weight of a pair in the gradient (note eq. 12).
    - `kl`: estimate of the policy's distance from the reference (note eq. 20), nats per completion: the sum over
      tokens of r - 1 - log r with r = policy / reference (Schulman's k3). It is KL(reference || policy) if the
      completions come from the reference, and an indication otherwise.

    Returns:
        Name to `Mean`, on the device of the inputs, detached.
    """
    with torch.no_grad():
        chosen_B, rejected_B = loss.chosen_rewards_B, loss.rejected_rewards_B
        margins_B = chosen_B - rejected_B
        ones_N = torch.ones_like(completion_of_N, dtype=logps_C.dtype)
        lengths_B2 = torch.zeros_like(logps_C).index_add(0, completion_of_N, ones_N).view(-1, 2)
        logps_B2 = logps_C.detach().view(-1, 2)
        log_ratio_N = token_logps_N.detach() - ref_token_logps_N
        kl_N = torch.expm1(log_ratio_N) - log_ratio_N
        return {
            "rewards/chosen": mean_of(chosen_B),
            "rewards/rejected": mean_of(rejected_B),
            "rewards/margins": mean_of(margins_B),
            "rewards/accuracies": mean_of(_wins(margins_B)),
            "accuracies/length_only": mean_of(_wins(lengths_B2[:, 0] - lengths_B2[:, 1])),
            "logps/chosen": mean_of(logps_B2[:, 0]),
            "logps/rejected": mean_of(logps_B2[:, 1]),
            "sample_weight": mean_of(torch.sigmoid(-margins_B)),
            "kl": Mean(kl_N.sum(), torch.tensor(float(logps_C.shape[0]), device=kl_N.device)),
        }


def mean_of(values: Tensor) -> Mean:
    """The mean of a 1-dim tensor, still as sum and count."""
    values = values.detach()
    return Mean(values.sum(), torch.tensor(float(values.shape[0]), device=values.device))


def _wins(difference_B: Tensor) -> Tensor:
    return (difference_B.sign() + 1) / 2


class MetricStore:
    """Adds up `Mean`s per mode ("train", "eval") until they are read."""

    def __init__(self) -> None:
        self._sums: dict[str, dict[str, Mean]] = {}

    def add(self, mode: str, metrics: dict[str, Mean]) -> None:
        """Add one batch's metrics."""
        sums = self._sums.setdefault(mode, {})
        for name, mean in metrics.items():
            old = sums.get(name)
            sums[name] = mean if old is None else Mean(old.total + mean.total, old.number + mean.number)

    def pop(self, mode: str) -> dict[str, float]:
        """The means since the last call, read from the device in one transfer, in order of arrival."""
        sums = self._sums.pop(mode, {})
        if not sums:
            return {}
        totals, counts = torch.stack([torch.stack(tuple(mean)).double() for mean in sums.values()]).T.tolist()
        return {name: total / count for name, total, count in zip(sums, totals, counts, strict=True)}
