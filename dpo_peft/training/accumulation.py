"""An optimizer step from its micro-batches, on one process or several, whatever part of it fits into memory.

Every process reads the rows of all processes' micro-batches and keeps its share. Losses are divided by the items of
the whole optimizer batch and gradients are summed, so neither the number of processes nor the split into micro-batches
changes the step. With a token budget the rows of a whole step are packed into as few micro-batches as it allows
(`microbatch.py`). A micro-batch that runs out of memory is halved, and the step repeated.

Shape suffixes: I items of the loss, B pairs, C completions.
"""

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..data.collator import mismatch
from ..distributed import (
    ShareCollator,
    gather_over_processes,
    interleave,
    rank,
    sum_gradients,
    sum_over_processes,
    unshard,
    world_size,
)
from ..forward import PackedBatch, Scores, halves
from ..objective import Scored, Totals, TrainingObjective
from .memory_budget import MemoryBudget
from .packing import describe, hang, pack_rows, size_of, to_device
from .resume import ResumableTrainer

logger = logging.getLogger(__name__)


class Step(NamedTuple):
    """The optimizer step that is being accumulated."""

    # Micro-batches: fields of `PackedBatch`, and what `_split` and `_couple` add. Under a token budget an entry of the
    # training loop holds some of them or none, see `hang`.
    batches: list[dict[str, Any]]
    totals: Totals
    metrics: Any  # the metric store as it was before the step


def fields_of(inputs: dict[str, Any]) -> dict[str, Any]:
    """A micro-batch without what was added to the fields of `PackedBatch`."""
    return {name: value for name, value in inputs.items() if name not in ("coupled", "parts")}


class SteppingTrainer(ResumableTrainer):
    """Takes optimizer steps on micro-batches. A subclass has the method: `compute_loss`, `_policy`, `_reference`."""

    objective: TrainingObjective
    budget: MemoryBudget
    collate: Callable[[Sequence[dict[str, Any]]], dict[str, Any]]
    step: Step
    accumulated = 0  # micro-batches of the step whose gradients are there
    halvings = 0  # how often each micro-batch is cut in two, since it did not fit
    step_finite: list[tuple[Tensor, Tensor]]  # rows and whether their loss is finite, per micro-batch
    _pads: bool | None = None  # whether `collate` pads; known once it has laid something out
    _packing_logged = False
    _trained: Sequence[nn.Parameter] = ()
    _grad_norm: Tensor | None = None

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.step_finite = []

    def _policy(self, batch: PackedBatch) -> Scores:
        raise NotImplementedError

    def _reference(self, batch: PackedBatch) -> Scores | None:
        raise NotImplementedError

    # ---- The CPU's share of a step -------------------------------------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in `ResumableTrainer`."""
        self._trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        with _without_surveys(self.model, self._trained):
            return super().train(*args, **kwargs)

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        if self.args.fp16:  # gradients are to be unscaled first
            return super()._clip_grad_norm(model)
        self._grad_norm = torch.nn.utils.clip_grad_norm_(self._trained, self.args.max_grad_norm)
        return self._grad_norm

    def take_grad_norm(self) -> Tensor:
        """Norm of the step's gradients before they were clipped, once."""
        norm, self._grad_norm = self._grad_norm, None
        if norm is not None:
            return norm
        return torch.nn.utils.get_total_norm([p.grad for p in self._trained if p.grad is not None])

    # ---- Micro-batches -------------------------------------------------------------------------------------------

    def _get_dataloader(self, dataset: Any, description: str, batch_size: int, *args: Any, **kwargs: Any) -> Any:
        loader = super()._get_dataloader(dataset, description, batch_size * world_size(), *args, **kwargs)
        unshard(loader, dataset)
        return loader

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """The micro-batches of one optimizer step, and its `Totals`.

        An objective that couples the samples of a batch takes its loss here, over all of them, so that any split into
        micro-batches gives the same step.
        """
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        self.model.train()
        batches = self._lay_out(batches)
        self.step = Step(batches, self._totals(_parts(batches)), self.metric_store.snapshot())
        self.accumulated = 0
        self.step_finite = []
        self._until_it_fits(self._split)
        return batches, self.step.totals

    def _lay_out(self, batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Rows that were kept become as many entries of the training loop, each row with the answers of another one
        beside its own if the objective reads them."""
        if "kept" not in batches[0]:
            return batches
        kept = [batch["kept"].rows for batch in batches]
        if self.objective.needs_mismatched:
            rows = iter(mismatch([row for part in kept for row in part]))
            kept = [list(itertools.islice(rows, len(part))) for part in kept]
        if getattr(self.args, "max_tokens_per_microbatch", None) is None:
            collate = ShareCollator(self.collate)
            return [to_device(collate(part), self.args.device) for part in kept]
        # The rows that `ShareCollator` would keep, so that predictions find their places again.
        return self._pack([row for part in kept for row in part[rank() :: world_size()]], len(batches))

    def _pack(self, rows: list[dict[str, Any]], entries: int) -> list[dict[str, Any]]:
        """This process's rows of a step in micro-batches within the budget, hung on `entries` entries."""
        if not rows:
            return hang([], [], entries)
        if self._pads is None:
            self._pads = self.collate(rows[:1]).get("attention_mask") is not None
        budget = self.microbatch_tokens([size_of(row, not self._pads) for row in rows])
        bins = pack_rows(rows, budget, shared=not self._pads)
        packs = [to_device(self.collate([rows[i] for i in one]), self.args.device) for one in bins]
        if self.model.training and not self._packing_logged:
            self._packing_logged = True
            logger.warning("The first optimizer step is packed: %s", describe(packs, budget))
        return hang(packs, bins, entries)

    def microbatch_tokens(self, samples: Sequence[tuple[int, int, int]]) -> int:
        """The token budget of a micro-batch, for the rows of an optimizer step or of an evaluation batch.

        Args:
            samples: (tokens, keys, predicted) of each row of this process, at least one; see `microbatch.Size`.
        """
        return self.budget.microbatch_tokens(samples)

    def _totals(self, batches: list[dict[str, Any]]) -> Totals:
        """Of the micro-batches of an optimizer step, all processes' together."""
        own = self.objective.totals([batch for batch in batches if "empty" not in batch])
        if world_size() == 1:
            return own
        items, chosen = sum_over_processes([own.items, float(own.mean_chosen_length) * own.items])
        return Totals(int(items), chosen / items)

    def _couple(self, batches: list[dict[str, Any]], totals: Totals) -> None:
        batches = [batch for batch in batches if "empty" not in batch]
        packed = [PackedBatch(**fields_of(self._prepare_inputs(batch))) for batch in batches]
        with torch.no_grad(), self.compute_loss_context_manager():
            refs = [self._reference(batch) for batch in packed]
            policies = [self._policy(batch) for batch in packed]
        coupled = self.objective.couple(packed, policies, refs, totals, self._scores_elsewhere)
        for batch, part in zip(batches, coupled, strict=True):
            batch["coupled"] = part

    def _scores_elsewhere(self, own: Scored | None) -> tuple[list[Scored], list[Scored]]:
        """The scores of the other processes' shares of the optimizer batch, of lower and of higher ranks."""
        shares = gather_over_processes(None if own is None else own.to("cpu"))
        moved = [[] if share is None else [share.to(self.args.device)] for share in shares]
        return sum(moved[: rank()], []), sum(moved[rank() + 1 :], [])

    # ---- Forward and backward ------------------------------------------------------------------------------------

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Totals | None = None
    ) -> Tensor:
        """Forward and backward of one micro-batch; with the last one of a step, the sum over processes.

        Returns:
            This process's part of the loss, detached.
        """
        index = next(i for i, batch in enumerate(self.step.batches) if batch is inputs)
        loss = self._until_it_fits(lambda: self._accumulate_to(model, index))
        if index == len(self.step.batches) - 1:
            sum_gradients(self.model.parameters())
        return loss

    def _accumulate_to(self, model: nn.Module, index: int) -> Tensor:
        """Add the gradients up to a micro-batch, from the beginning if the step is repeated. Returns the last loss."""
        loss = torch.zeros((), device=self.args.device)
        for i in range(self.accumulated, index + 1):
            loss = torch.zeros((), device=self.args.device)
            for part in _parts_of(self.step.batches[i]):
                if "empty" not in part:
                    loss = loss + super().training_step(model, part, self.step.totals)
            self.record_loss(loss, ends_step=i == len(self.step.batches) - 1)
            self.accumulated = i + 1
        return loss

    # ---- Out of memory -------------------------------------------------------------------------------------------

    def _until_it_fits(self, action: Callable[[], Any]) -> Any:
        """Run a part of the step. When memory runs out, micro-batches are cut in two and the step is begun again."""
        while True:
            try:
                return action()
            except torch.OutOfMemoryError as error:
                message = str(error)
            # Outside of the handler, where the failed pass and its tensors are gone.
            self._make_room(message)

    def _make_room(self, message: str) -> None:
        """Checkpoint more layers if that is left to us and may help, else halve; and begin the step again."""
        held = torch.cuda.max_memory_allocated(self.args.device) if self.args.device.type == "cuda" else 0
        if self.budget.tighten(held):
            logger.warning(
                "Out of memory: from here on micro-batches keep within %.1f GiB. The step is repeated. Set "
                "max_memory_gib to avoid this. (%s)",
                self.budget.limit / 2**30,
                message.split("\n")[0],
            )
        else:
            self._halve(message)
        self.model.zero_grad(set_to_none=True)
        self.metric_store.restore(self.step.metrics)
        self.step_finite = []
        self.accumulated = 0
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._until_it_fits(self._split)

    def _halve(self, message: str) -> None:
        rows = [len(part["rows"]) for part in _parts(self.step.batches) if "empty" not in part]
        packed = any("packs" in batch for batch in self.step.batches)
        lower = "max_tokens_per_microbatch" if packed else "per_device_train_batch_size"
        if max(rows, default=1) < 2:
            raise torch.OutOfMemoryError(
                "Out of memory with a single row in a micro-batch. Lower max_length, set gradient_checkpointing=True, "
                f"or use a smaller model. ({message})"
            )
        # Not on one process of several, which must couple together; nor under dropout, whose masks would not repeat.
        if self.objective.batch_coupled and (world_size() > 1 or not getattr(self.args, "disable_dropout", True)):
            raise torch.OutOfMemoryError(
                "Out of memory, and this objective couples its batch: in several processes, or with dropout, it can't "
                f"be cut. Lower {lower}. ({message})"
            )
        self.halvings += 1
        logger.warning(
            "Out of memory with %d rows in a micro-batch: from here on each is run in %d parts, which gives the same "
            "steps. The step is repeated. Lower %s to avoid this. (%s)",
            max(rows),
            2**self.halvings,
            lower,
            message.split("\n")[0],
        )

    def _split(self) -> None:
        """Cut every micro-batch as often as memory made it necessary; couple what the objective couples."""
        for batch in self.step.batches if self.halvings else ():
            parts = [fields_of(pack) for pack in batch.get("packs", [batch])]
            for _ in range(self.halvings):
                parts = [half for part in parts for half in _halves(part)]
            batch["parts"] = parts
        parts = _parts(self.step.batches)
        if self.objective.batch_coupled and (len(parts) > 1 or world_size() > 1):
            self._couple(parts, self.step.totals)

    # ---- Evaluation ----------------------------------------------------------------------------------------------

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """One evaluation batch: its loss, implicit rewards and labels (see `compute_metrics` of `DPOTrainer`).

        What couples a batch is taken over the evaluation batch. A token budget holds here too.
        """
        batch = self._lay_out([inputs])[0]
        parts = [self._prepare_inputs(part) for part in _parts_of(batch) if "empty" not in part]
        totals = self._totals(parts)
        if self.objective.batch_coupled and (len(parts) > 1 or world_size() > 1):
            self._couple(parts, totals)
        loss, rows = torch.zeros((), device=self.args.device), []
        for part in parts:
            with torch.no_grad(), self.compute_loss_context_manager():
                part_loss, output = self.compute_loss(model, part, return_outputs=True, num_items_in_batch=totals)
            loss = loss + part_loss.float()
            if not prediction_loss_only:
                rows += self.objective.kind.predictions_by_row(output.scored, output.rewards_C, part["rows"])
        if prediction_loss_only:
            return loss, None, None
        if "order" in batch:
            rows = [row for _, row in sorted(zip(batch["order"], rows, strict=True), key=lambda placed: placed[0])]
        rows = interleave(gather_over_processes(rows))
        predictions, labels = (torch.cat(parts).to(self.args.device) for parts in zip(*rows, strict=True))
        return loss, predictions, labels

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As in `transformers.Trainer`, with the loss and the metrics as means over the whole dataset."""
        self.metric_store.clear("eval")
        self.gather_function = lambda tensor: tensor  # what `prediction_step` gives is gathered already
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", args[4] if len(args) > 4 else "eval")
        metrics = self.metric_store.pop("eval")
        output.metrics.update({f"{prefix}_{name}": value for name, value in metrics.items()})
        return output


@contextmanager
def _without_surveys(model: nn.Module, trained: Sequence[nn.Parameter]) -> Iterator[None]:
    """Inside, `model.train()` and `model.zero_grad()`, which are called in every step, do not walk through a few
    thousand modules where there is nothing to change: the GPU has nothing to do meanwhile."""

    def train(mode: bool = True) -> nn.Module:
        return model if mode and model.training else type(model).train(model, mode)

    def zero_grad(set_to_none: bool = True) -> None:
        for parameter in trained:
            parameter.grad = None

    mine = {name: method for name, method in (("train", train), ("zero_grad", zero_grad)) if name not in vars(model)}
    vars(model).update(mine)
    try:
        yield
    finally:
        for name in mine:
            del vars(model)[name]


def _parts_of(batch: dict[str, Any]) -> list[dict[str, Any]]:
    """What is run for an entry of the training loop: its micro-batches, or what `_split` made of them."""
    return batch.get("parts", batch.get("packs", [batch]))


def _parts(batches: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [part for batch in batches for part in _parts_of(batch)]


def _halves(part: dict[str, Any]) -> list[dict[str, Any]]:
    if "empty" in part or len(part["rows"]) < 2:
        return [part]
    return [half.as_dict() for half in halves(PackedBatch(**part))]
