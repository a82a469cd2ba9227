"""What a training run reports about its completions, under TRL's names, and how it adds up over micro-batches.

Every metric is a sum and a count kept on the device; they meet the host once, when they are logged. So a mean is over
pairs (or tokens), whatever the split into micro-batches.

Shape suffixes: N predicted tokens, C completions, P comparisons of two completions (see `Kind.compare`).
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..distributed import gather_over_processes
from ..forward import PackedBatch, Scores
from ..objective import Kind, LossOutput
from . import tally

LONGER, SHORTER, BALANCED = (f"accuracies/{how}" for how in ("chosen_longer", "chosen_shorter", "length_balanced"))
NOISE = 0.1  # nats: a pair's margin in bfloat16 depends on its batch by as much, see docs/diagnostics.md
NOISE_NOTE = "margins within noise"  # how it is said beside an accuracy


class Mean(NamedTuple):
    """A mean that is still a sum and a count: 0-dim tensors."""

    total: Tensor
    number: Tensor


@torch.no_grad()
def preference_metrics(
    kind: Kind, output: LossOutput, policy: Scores, ref: Scores | None, batch: PackedBatch, held_out: bool = False
) -> dict[str, Mean]:
    """Returns the metrics of one batch.

    "Better" and "worse" are two completions whose order is known: those of a pair (unless it ties), any two of a list
    that are ranked apart, any desirable and any undesirable completion of the batch (of all held-out rows, once
    `MetricStore.pop` gives the figures of an evaluation).

    - `rewards/chosen`, `rewards/rejected`: implicit rewards, nats times beta, of the best completions (pairs: chosen;
      lists: the top; single completions: desirable) and of the rest.
    - `rewards/margins`: reward of the better minus that of the worse completion.
    - `rewards/accuracies`: share of (better, worse) whose rewards are in that order; equal ones count as half.
    - `accuracies/length_only`: the same for "the longer completion is the better one". Beside accuracy, it tells how
      much of it length alone explains.
    - `logps/chosen`, `logps/rejected`: log-probs of whole completions under the policy, nats.
    - `sample_weight` (pairs, trajectories): 1 - sigmoid(margin), the weight of a pair in DPO's gradient
      (docs/derivations.md, eq. 12).
    - `kl` (with a reference, unless a cache holds its sums only): estimate of the policy's distance from it
      (docs/derivations.md, eq. 85), nats per completion: the sum over tokens of r - 1 - log r with r = policy /
      reference (Schulman's k3). It is KL(reference || policy) if the completions come from the reference, and an
      indication otherwise.
    - `z_ref` (with mismatched completions): mean of beta * log(policy / reference) over them, KTO's reference point
      before its floor at 0.
    - `accuracies/chosen_longer`, `accuracies/chosen_shorter` (of held-out rows): `rewards/accuracies` where the better
      completion is the longer one, and where it is the shorter one. A reward that follows length is right on the first
      and wrong on the second.

    - `aux_loss` (with `router_aux_loss_coef`): the routers' auxiliary loss, a mean over the micro-batches' items.
    - `loss` (of held-out rows), without the auxiliary loss.

    Args:
        output: of `compute_loss`.
        policy, ref: the log-probs of the batch that it was made from.
        held_out: whether it is an evaluation's.

    Returns:
        Name to `Mean`, on the device of the inputs, detached.
    """
    scored, rewards_C = output.scored, output.rewards_C
    better_P, margins_P, longer_P, best_C, rest_C = kind.compare(scored, rewards_C)
    wins_P = _wins(margins_P)
    metrics = {"loss": mean_of(output.losses_I)} if held_out else {}
    metrics |= {
        "rewards/chosen": _mean_where(rewards_C, best_C),
        "rewards/rejected": _mean_where(rewards_C, rest_C),
        "rewards/margins": _mean_where(margins_P, better_P),
        "rewards/accuracies": _mean_where(wins_P, better_P),
        "accuracies/length_only": _mean_where(_wins(longer_P), better_P),
        "logps/chosen": _mean_where(scored.logps_C, best_C),
        "logps/rejected": _mean_where(scored.logps_C, rest_C),
    }
    if kind.paired:
        metrics["sample_weight"] = _mean_where(torch.sigmoid(-margins_P), better_P)
    if ref is not None and len(ref.token_logps_N):
        log_ratio_N = policy.token_logps_N - ref.token_logps_N
        kl_N = torch.expm1(log_ratio_N) - log_ratio_N
        own_C = torch.ones_like(best_C) if scored.own_C is None else scored.own_C
        metrics["kl"] = Mean((kl_N * own_C[batch.completion_of]).sum().double(), own_C.sum().double())
    if output.aux is not None:
        metrics["aux_loss"] = Mean(output.aux, torch.tensor(float(len(output.losses_I)), device=output.aux.device))
    if scored.own_C is not None:
        metrics["z_ref"] = _mean_where(rewards_C, ~scored.own_C)
    if held_out:
        metrics[LONGER] = _mean_where(wins_P, better_P & (longer_P > 0))
        metrics[SHORTER] = _mean_where(wins_P, better_P & (longer_P < 0))
    return metrics


def metric_names(kind: Kind, with_reference: bool, mismatched: bool) -> set[str]:
    """Returns the names that an evaluation may report, without `eval_`: those of `preference_metrics`, the loss, and
    `accuracies/length_balanced`."""
    names = [f"rewards/{which}" for which in ("chosen", "rejected", "margins", "accuracies")]
    names += ["logps/chosen", "logps/rejected", "loss", LONGER, SHORTER, "accuracies/length_only", BALANCED]
    optional = {"sample_weight": kind.paired, "kl": with_reference, "z_ref": mismatched}
    return {*names, *(name for name, reported in optional.items() if reported)}


def length_balanced(longer: float | None, shorter: float | None) -> float | None:
    """Returns the mean of the accuracies where the better completion is the longer and where it is the shorter one;
    None if one of them is unknown. A reward that only follows length has 0.5."""
    return None if longer is None or shorter is None else (longer + shorter) / 2


def within_noise(margin: float | None, beta: float | None, kl: float | None = None, reward: str = "log_ratio") -> bool:
    """Returns whether policy and reference are so close that computing in 16 bits, as adapters are used, makes as much
    of a margin as the training has. Their accuracy then counts signs that say nothing of what the model writes.

    Args:
        margin: mean of the better minus the worse completion's reward; None if unknown.
        beta: the factor of the rewards; None stands for 1.
        kl: nats per completion, as in `preference_metrics`; None if unknown. Where it is large, margins are, though
            their mean may be small.
        reward: kind of the rewards; those without a reference are never within noise, as they don't start at 0.
    """
    if margin is None or reward != "log_ratio":
        return False
    return max(abs(margin) / (beta or 1.0), kl or 0.0) < NOISE


def _mean_where(values: Tensor, mask: Tensor) -> Mean:
    return Mean(torch.where(mask, values, 0.0).sum().double(), mask.sum().double())


def mean_of(values: Tensor) -> Mean:
    """Returns the mean of a 1-dim tensor, still as sum and count."""
    values = values.detach()
    return Mean(values.sum(), torch.tensor(float(values.shape[0]), device=values.device))


def _wins(difference: Tensor) -> Tensor:
    return (difference.sign() + 1) / 2


class MetricStore:
    """Adds up `Mean`s per mode ("train", "eval") until they are read."""

    def __init__(self) -> None:
        self._sums: dict[str, dict[str, Mean]] = {}
        self._judged: dict[str, list[Tensor]] = {}  # rewards, lengths and grades of a micro-batch, (3, C), on the CPU

    def record(
        self, kind: Kind, output: LossOutput, policy: Scores, ref: Scores | None, batch: PackedBatch, held_out: bool
    ) -> None:
        """Adds a micro-batch's metrics to those of the log, or of the evaluation under way (see `preference_metrics`).

        Completions that are compared across rows are kept until the evaluation is over, 24 bytes each."""
        mode, scored = "eval" if held_out else "train", output.scored
        self.add(mode, preference_metrics(kind, output, policy, ref, batch, held_out))
        if held_out and kind.across_rows:
            columns = output.rewards_C, scored.lengths_C, scored.grade_C
            judged_3C = torch.stack([scored.own(x_C).double() for x_C in columns]).cpu()
            self._judged.setdefault(mode, []).append(judged_3C)

    def add(self, mode: str, metrics: dict[str, Mean]) -> None:
        """Adds one batch's metrics."""
        sums = self._sums.setdefault(mode, {})
        for name, mean in metrics.items():
            mean = Mean(mean.total.double(), mean.number.double())
            old = sums.get(name)
            sums[name] = mean if old is None else Mean(old.total + mean.total, old.number + mean.number)

    def pop(self, mode: str) -> dict[str, float]:
        """Returns the means since the last call over all processes, in order of arrival.

        Among them, where it is known, `accuracies/length_balanced`.
        """
        sums: dict[str, tuple[float, float]] = {}
        parts = gather_over_processes((_read(self._sums.pop(mode, {})), self._judged.pop(mode, [])))
        for process, _ in parts:
            for name, (total, number) in process.items():
                old_total, old_number = sums.get(name, (0.0, 0.0))
                sums[name] = (old_total + total, old_number + number)
        judged = [judged_3C for _, part in parts for judged_3C in part]
        if judged:  # what each batch compared says less
            sums |= _over_all(torch.cat(judged, 1).numpy())
        # Nothing to average over: a batch of ties has no accuracy, one of desirable completions no rejected reward.
        means = {name: total / number for name, (total, number) in sums.items() if number}
        balanced = length_balanced(means.get(LONGER), means.get(SHORTER))
        return means if balanced is None else {**means, BALANCED: balanced}

    def of_log(self, logs: Mapping[str, float]) -> dict[str, float]:
        """Returns what a training log gets: the means since the last one. The log at the end gets those of the steps
        after the last one too, and the loss over the steps of the whole run, those before an interruption included."""
        if not {"loss", "train_loss"} & logs.keys():
            return {}
        found = self.pop("train")
        if "train_loss" in logs:
            found.pop("loss", None)  # no further training log
            found["train_loss"] = self.pop("run").get("loss", float("nan"))
        return found

    def clear(self, mode: str) -> None:
        """Forgets a mode's sums."""
        self._sums.pop(mode, None)
        self._judged.pop(mode, None)

    def snapshot(self) -> dict[str, dict[str, Mean]]:
        """Returns what `restore` takes back."""
        return {mode: dict(sums) for mode, sums in self._sums.items()}

    def restore(self, snapshot: dict[str, dict[str, Mean]]) -> None:
        """Forgets what was added since the snapshot."""
        self._sums = {mode: dict(sums) for mode, sums in snapshot.items()}

    def state(self) -> dict[str, dict[str, tuple[float, float]]]:
        """Returns this process's sums as plain numbers, exact in JSON."""
        return {mode: _read(sums) for mode, sums in self._sums.items()}

    def load(self, state: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
        """Adds what `state` gave."""
        for mode, sums in state.items():
            self.add(mode, {name: Mean(*torch.tensor(list(pair), dtype=torch.float64)) for name, pair in sums.items()})


def _read(sums: Mapping[str, Mean]) -> dict[str, tuple[float, float]]:
    """Reads sums from the device, in one transfer."""
    if not sums:
        return {}
    totals, numbers = torch.stack([torch.stack(tuple(mean)) for mean in sums.values()]).T.tolist()
    return dict(zip(sums, zip(totals, numbers, strict=True), strict=True))


def _over_all(judged_3C: np.ndarray) -> dict[str, tuple[float, float]]:
    """Compares every desirable with every undesirable completion. Returns each figure as a sum and a count."""
    rewards_C, lengths_C, grades_C = judged_3C
    counted = tally.tally_singles(rewards_C, lengths_C.astype(int), grades_C > 0)
    wins_S, number_S = counted.wins_RS.sum(0), counted.number_RS.sum(0)  # each comparison twice, in both
    if np.isnan(rewards_C).any():
        wins_S[:] = np.nan
    found = {
        "rewards/margins": (counted.margin_R.sum(), number_S.sum()),
        "rewards/accuracies": (wins_S.sum(), number_S.sum()),
        "accuracies/length_only": (number_S @ tally.LENGTH_WINS_S, number_S.sum()),
        LONGER: (wins_S[tally.LONGER], number_S[tally.LONGER]),
        SHORTER: (wins_S[tally.SHORTER], number_S[tally.SHORTER]),
    }
    return {name: (float(total), float(number)) for name, (total, number) in found.items()}
