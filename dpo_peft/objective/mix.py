"""From the log-probs of a batch to its loss: one objective of the registry, or a weighted mix of several.

`score` gathers what the losses may read about each completion, `losses` calls them. What couples the samples of an
optimizer batch (a sort, a mean over mismatched completions) reaches the policy through its log-probs only, so `couple`
takes the gradient with respect to them on the whole batch, and each micro-batch back-propagates its own part. So does
the auxiliary loss of a mixture of experts, through `slopes`.

Shape suffixes: N predicted tokens, C completions, E samples, B pairs, M mismatched completions, I items (what a loss
averages over: pairs, lists, or single completions).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..forward import PackedBatch, Scores, sum_by_completion
from ..forward.routing import slopes
from ..losses import Objective, discounts, find_objective, length_desensitized_weights, shape_scores, wpo_weights
from ..losses.registry import SHAPES, shown_name
from .kinds import KINDS, Scored, Totals


@dataclass(frozen=True)
class Coupled:
    """A micro-batch's part of a loss that was taken over the whole optimizer batch."""

    ref: Scores | None
    losses_I: Tensor  # its share of the items
    grad_N: Tensor  # d loss / d token log-prob

    def loss(self, token_logps_N: Tensor, items: int) -> Tensor:
        """Returns the part's loss, with the whole batch's gradient. Its log-probs must be those that `couple` saw."""
        return self.losses_I.sum() / items + (self.grad_N * (token_logps_N - token_logps_N.detach())).sum()


class LossOutput(NamedTuple):
    """What `compute_loss` gives beside the loss; detached."""

    losses_I: Tensor  # loss of every item of the micro-batch
    rewards_C: Tensor  # implicit rewards: beta * log(policy / reference), or what the objective has in its place
    scored: Scored  # what the losses read
    aux: Tensor | None = None  # auxiliary loss of a mixture of experts, times the items


class TrainingObjective:
    """The losses that a run minimizes, with their options.

    Args:
        loss_type: names in the registry or import paths; all of them learn from the same kind of data.
        loss_weights: one factor per loss; 1 each if None.
        loss_options: options of losses that are not in the registry, by name.
        options: option name to value; each loss takes those that it reads.
    """

    def __init__(
        self,
        loss_type: Sequence[str],
        loss_weights: Sequence[float] | None = None,
        loss_options: Mapping[str, Any] | None = None,
        **options: Any,
    ):
        self.parts = [find_objective(name) for name in loss_type]
        self.names = [shown_name(name) for name in loss_type]  # fit to be published
        self.weights = [1.0] * len(self.parts) if loss_weights is None else list(loss_weights)
        self.options = options
        self.loss_options = {**(loss_options or {}), **{name: options[name] for name in options if name == "beta"}}
        self.data = self.parts[0].data
        self.kind = KINDS[self.data]
        self.needs_reference = any(part.needs_reference for part in self.parts)
        self.batch_coupled = any(part.batch_coupled for part in self.parts)
        self.needs_mismatched = any("mismatched_scores_M" in part.inputs for part in self.parts)
        extras = {extra for part in self.parts for extra in part.token_extras}
        self.log_sum_sq = "log_sum_sq" in extras and bool(options.get("use_weighting"))
        self.reads_reference_tokens = options.get("ld_alpha") is not None or options.get("discount_gamma", 1.0) != 1.0
        self.single_best = "multi_negative" in loss_type
        self.router_coef = 0.0  # weight of the routers' auxiliary loss; the model says
        # A soft label concerns every loss of a mix, a margin only those that compare two rewards.
        soft = all(part.soft_labels for part in self.parts)
        margin = any("margin_B" in part.inputs for part in self.parts)
        self.label_columns = ("preference",) * soft + ("margin",) * margin

    # ---- Scores to losses ----------------------------------------------------------------------------------------

    def score(self, policy: Scores, ref: Scores | None, batch: PackedBatch) -> Scored:
        """Returns what the losses may read, from the log-probs of a batch."""
        weight_N = self._token_weights(batch)
        weighted_C, ref_weighted_C = policy.logps_C, None if ref is None else ref.logps_C
        if weight_N is not None:
            weighted_C = sum_by_completion(weight_N * policy.token_logps_N, batch)
            ref_weighted_C = None if ref is None else sum_by_completion(weight_N * ref.token_logps_N, batch)
        wpo_C = None
        if policy.log_sum_sq_N is not None:
            tokens = (policy.token_logps_N, policy.log_sum_sq_N, batch.completion_of)
            wpo_C = wpo_weights(*tokens, len(batch.lengths))
        return Scored(
            logps_C=policy.logps_C,
            weighted_logps_C=weighted_C,
            ref_weighted_logps_C=ref_weighted_C,
            wpo_C=wpo_C,
            lengths_C=batch.lengths.to(policy.logps_C.dtype),
            sample_of_C=batch.sample_of,
            grade_C=_grades(batch),
            own_C=None if batch.mismatched is None else ~batch.mismatched,
            preference_E=batch.preference,
            margin_E=batch.margin,
            num_samples=len(batch.rows),
        )

    @property
    def reads(self) -> dict[str, bool]:
        """Returns what `completion_logps` is asked for of the policy, beside the log-probs."""
        return {"log_sum_sq": self.log_sum_sq, "routing": self.router_coef > 0}

    def _token_weights(self, batch: PackedBatch) -> Tensor | None:
        gamma, ld_alpha = self.options.get("discount_gamma", 1.0), self.options.get("ld_alpha")
        if batch.step is not None and gamma != 1.0:
            return discounts(batch.step, gamma)
        if ld_alpha is None:
            return None
        first_C = batch.lengths.cumsum(0) - batch.lengths
        position_N = torch.arange(len(batch.target), device=batch.target.device) - first_C[batch.completion_of]
        shared_C = batch.lengths.view(-1, 2).amin(1).repeat_interleave(2)
        return length_desensitized_weights(position_N, shared_C[batch.completion_of], ld_alpha)

    def losses(self, scored: Scored, totals: Totals) -> Tensor:
        """Returns (I,) the loss of each item, summed over the mix. Its mean over the optimizer batch is the loss."""
        return sum(  # type: ignore[return-value]
            weight * self._losses_of(part, scored, totals)
            for part, weight in zip(self.parts, self.weights, strict=True)
        )

    def loss(
        self, policy: Scores, ref: Scores | None, batch: PackedBatch, totals: Totals, coupled: Coupled | None = None
    ) -> tuple[Tensor, LossOutput]:
        """Returns the loss of a micro-batch, its share of the optimizer batch's mean, and what it is made of."""
        scored = self.score(policy, ref, batch)
        losses_I = coupled.losses_I if coupled else self.losses(scored, totals)
        loss = coupled.loss(policy.token_logps_N, totals.items) if coupled else losses_I.sum() / totals.items
        output = LossOutput(losses_I.detach(), self.rewards(scored), scored)
        if policy.routing is None:
            return loss, output
        slopes_EX = self.slopes([batch], [policy])[0] if batch.router_slopes is None else batch.router_slopes
        aux = (slopes_EX * policy.routing.probs_EX).sum()
        return loss + self.router_coef * aux / totals.items, output._replace(aux=aux.detach())

    def slopes(
        self,
        batches: Sequence[PackedBatch],
        policies: Sequence[Scores],
        groups: Sequence[Sequence[int]] | None = None,
    ) -> list[Tensor]:
        """Returns `routing.slopes` of micro-batches, with the items as weights."""
        routings = [policy.routing for policy in policies if policy.routing is not None]
        return slopes(routings, [self.kind.items_of_samples(batch) for batch in batches], groups)

    def _losses_of(self, part: Objective, scored: Scored, totals: Totals) -> Tensor:
        inputs = self._inputs(part, scored, totals)
        given = self.options if part.name else self.loss_options
        options = {name: given[name] for name in part.keywords if name in given}
        losses_I = part.loss(**{name: inputs[name] for name in part.inputs}, **options)
        if scored.preference_E is not None:
            swapped = _swap(inputs)
            other_I = part.loss(**{name: swapped[name] for name in part.inputs}, **options)
            losses_I = scored.preference_E * losses_I + (1 - scored.preference_E) * other_I
        if scored.wpo_C is not None and "use_weighting" in part.options:
            losses_I = losses_I * scored.wpo_C[::2] * scored.wpo_C[1::2]
        return losses_I

    def _inputs(self, part: Objective, scored: Scored, totals: Totals) -> dict[str, Any]:
        """Returns every tensor that a loss of this kind of data may name."""
        scores_C = scored.log_ratios_C if part.needs_reference else None
        shape = {name: self.options[name] for name in SHAPES if name in part.options and name in self.options}
        if scores_C is not None and shape:
            scores_C = shape_scores(scores_C, self.options.get("beta") or 1.0, **shape)
        logps_C = scored.weighted_logps_C if "ld_alpha" in part.options else scored.logps_C
        return self.kind.inputs(scored, scores_C, logps_C, totals)

    def rewards(self, scored: Scored) -> Tensor:
        """Returns (C,) implicit rewards, detached: beta times what the first loss of the mix compares."""
        kind, beta = self.parts[0].reward, self.options.get("beta")
        if kind == "log_ratio":
            rewards_C = scored.log_ratios_C
        else:
            rewards_C = scored.logps_C if kind == "logp" else scored.logps_C / scored.lengths_C
        return (1.0 if beta is None else beta) * rewards_C.detach()

    def of_evaluation(self, metrics: dict[str, float]) -> dict[str, float]:
        """Returns the metrics of an evaluation, of which some follow from others."""
        if "aux_loss" in metrics:
            metrics["loss"] += self.router_coef * metrics["aux_loss"]
        return metrics

    # ---- Losses that couple the batch ----------------------------------------------------------------------------

    def couple(
        self,
        batches: Sequence[PackedBatch],
        policies: Sequence[Scores],
        refs: Sequence[Scores | None],
        totals: Totals,
        elsewhere: Callable[[Scored | None], tuple[list[Scored], list[Scored]]] = lambda own: ([], []),
    ) -> list[Coupled]:
        """Takes the loss over all micro-batches of an optimizer step. Returns each one's part of it.

        Args:
            batches: the micro-batches.
            policies, refs: their log-probs, without a graph.
            totals: of the whole optimizer batch.
            elsewhere: given the scores of these micro-batches (None if there are none), gives those that other
                processes hold of the optimizer batch, before and after these.
        """
        leaves = [policy.token_logps_N.detach().requires_grad_() for policy in policies]
        with torch.enable_grad():
            parts = []
            for batch, policy, ref, leaf_N in zip(batches, policies, refs, leaves, strict=True):
                logps_C = sum_by_completion(leaf_N, batch)
                parts.append(self.score(Scores(leaf_N, logps_C, policy.log_sum_sq_N), ref, batch))
            before, after = elsewhere(Scored.join(parts) if parts else None)
            if not parts:
                return []
            losses_I = self.losses(Scored.join([*before, *parts, *after]), totals)
            grads = torch.autograd.grad(losses_I.sum() / totals.items, leaves)
        # A loss that sorts gives its items in sorted order: every process counts another stretch of them.
        first = sum(self.kind.items(scored) for scored in before)
        sizes = [self.kind.items(scored) for scored in parts]
        shares = losses_I.detach()[first : first + sum(sizes)].split(sizes)
        return [Coupled(*part) for part in zip(refs, shares, grads, strict=True)]


def _swap(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the inputs of pairs with chosen and rejected exchanged."""
    other = {"chosen": "rejected", "rejected": "chosen"}
    swapped = {"_".join(other.get(word, word) for word in name.split("_")): x for name, x in inputs.items()}
    return {**swapped, "margin_B": -inputs["margin_B"]}


def _grades(batch: PackedBatch) -> Tensor:
    if batch.grade is not None:
        return batch.grade
    # Pairs: the first is the better one, unless its preference says that they tie.
    best_C = torch.ones(len(batch.lengths), dtype=torch.float64, device=batch.rows.device)
    best_C[1::2] = 0.0 if batch.preference is None else (batch.preference == 0.5).to(best_C.dtype)
    return best_C
