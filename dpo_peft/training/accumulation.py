"""An optimizer step from its micro-batches, on one process or several, whatever part of it fits into memory.

Every process reads the rows of all processes' micro-batches and keeps its share. Losses are divided by the items of
the whole optimizer batch and gradients are summed, so neither the number of processes nor the split into micro-batches
changes the step. With a token budget the rows of a whole step are packed into as few micro-batches as it allows
(`packing.py`). A micro-batch that runs out of memory is halved, and the step repeated.

A micro-batch is a dict of the fields of `PackedBatch`. What `transformers.Trainer` counts as one, an *entry* of its
loop, holds its own as `packs`: one, or under a token budget several or none, or what they were cut into.
"""

import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..config import DPOConfig
from ..data.collator import mismatch
from ..distributed import gather_over_processes, rank, shares, sum_gradients, sum_over_processes, world_size
from ..forward import PackedBatch, Scores, halves
from ..forward.scope import acting
from ..objective import LossOutput, Scored, Totals, TrainingObjective
from .arguments import longest_allowed
from .memory_budget import MemoryBudget
from .metrics import Mean, MetricStore
from .packing import Entry, MicroBatch, Row, as_entry, describe, hang, pack_rows, size_of, to_device, tokens_of

logger = logging.getLogger(__name__)

Score = Callable[[PackedBatch], Scores]
T = TypeVar("T")


class OptimizerStep:
    """The optimizer step that is being accumulated.

    Args:
        budget: how large micro-batches may be, and how many layers are checkpointed.
        metrics: where losses are added up.
        collate: prepared rows to a micro-batch.
        policy: log-probs under the policy, with a graph unless gradients are off.
        reference: log-probs under the reference; None for an objective without one.
        autocast: mixed precision around both.
    """

    def __init__(
        self,
        model: nn.Module,
        args: DPOConfig,
        objective: TrainingObjective,
        budget: MemoryBudget,
        metrics: MetricStore,
        collate: Callable[[Sequence[Row]], MicroBatch],
        policy: Score,
        reference: Callable[[PackedBatch], Scores | None],
        autocast: Callable[[], AbstractContextManager[object]],
    ):
        self.model, self.args, self.objective, self.budget, self.metrics = model, args, objective, budget, metrics
        self.collate, self._policy, self._reference, self._autocast = collate, policy, reference, autocast
        self._rank, self._processes = rank(), world_size()
        self.max_length = longest_allowed(model, args.max_length)  # tokens; None: any number
        self.halvings = 0  # how often each micro-batch is cut in two, since it did not fit
        self.mismatched_cut = 0  # mismatched completions that were cut to `max_length` so far
        self.evaluated: list[Row] = []  # the last row of the evaluation batch before; none as an evaluation starts
        self.finite: list[tuple[PackedBatch, Tensor]] = []  # micro-batches so far, and which items' losses are finite
        self._entries: list[Entry] = []
        self._totals = Totals(0, 1.0)
        self._done = 0  # entries of the step whose gradients are there
        self._cuts = 0  # how often its micro-batches have been cut in two
        self._metrics_before: dict[str, dict[str, Mean]] = {}
        self._pads: bool | None = None  # whether `collate` pads; known once it has laid something out
        self._packing_logged = False
        self._trained: Sequence[nn.Parameter] = ()
        self._grad_norm: Tensor | None = None

    def state_dict(self, folder: Path) -> dict[str, int]:
        """Returns what a checkpoint keeps of it: a resumed run cuts micro-batches as the interrupted one did."""
        return {"halvings": self.halvings}

    def load_state_dict(self, state: Mapping[str, Any], folder: Path) -> None:
        """Takes up a run's state."""
        self.halvings = state["halvings"]

    def counts(self) -> dict[str, float]:
        """Returns how many mismatched completions were cut so far, for the log; nothing if none was."""
        return {"mismatched_cut": self.mismatched_cut} if self.mismatched_cut else {}

    # ---- Forward and backward ------------------------------------------------------------------------------------

    def begin(self, entries: list[Entry], number: int) -> tuple[list[Entry], Totals]:
        """Lays out what came from the data loader. An objective that couples rows takes its loss here, over all.
        Returns entries for the training loop, and the step's totals over all processes. Where a stream ended before
        `number` of them, the rest are empty: the loop steps after as many."""
        self.model.train()
        self._entries, self._cuts = [*self.lay_out(entries), *hang([], [], 1) * (number - len(entries))], 0
        self._totals = self.totals(_micro_batches(self._entries))
        self._metrics_before = self.metrics.snapshot()
        self._start_over()
        return self._entries, self._totals

    def run(self, entry: Entry, backward: Callable[[MicroBatch, Totals], Tensor]) -> Tensor:
        """Adds the gradients of an entry; with the last one of the step, sums them over the processes. `backward` runs
        forward and backward of a micro-batch and returns its loss, detached. Returns this process's part of the
        entry's loss, detached. Raises `torch.OutOfMemoryError` if a single row does not fit, or the objective's batch
        can't be cut."""
        index = next(i for i, one in enumerate(self._entries) if one is entry)
        loss = self._until_it_fits(lambda: self._accumulate_to(index, backward))
        if self._processes > 1 and index == len(self._entries) - 1:
            sum_gradients(self.model.parameters())
        return loss

    def _accumulate_to(self, index: int, backward: Callable[[MicroBatch, Totals], Tensor]) -> Tensor:
        """Adds the gradients up to an entry, from the first one if the step is repeated. Returns the last loss."""
        for i in range(self._done, index + 1):
            loss = torch.zeros((), device=self.args.device)
            for part in self._entries[i]["packs"]:
                with acting(self.model, part.get("alora_offsets")):  # also where layers are computed again
                    loss = loss + backward(part, self._totals)
                _release(part)
            # The mean is over steps: one process counts each step once, with its last entry.
            steps = float(i == len(self._entries) - 1 and self._rank == 0)
            mean = {"loss": Mean(loss.detach(), torch.tensor(steps, device=loss.device))}
            self.metrics.add("train", mean)
            self.metrics.add("run", mean)
            self._done = i + 1
        return loss

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside, `model.train()` and `model.zero_grad()`, which are called in every step, do not walk through a few
        thousand modules where there is nothing to change: the GPU has nothing to do meanwhile."""
        model = self.model
        self._trained = trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

        def train(mode: bool = True) -> nn.Module:
            return model if mode and model.training else type(model).train(model, mode)

        def zero_grad(set_to_none: bool = True) -> None:
            for parameter in trained:
                parameter.grad = None

        methods = {"train": train, "zero_grad": zero_grad}
        mine = {name: method for name, method in methods.items() if name not in vars(model)}
        vars(model).update(mine)
        try:
            yield
        finally:
            for name in mine:
                del vars(model)[name]

    def clip_grad_norm(self, accelerator: Accelerator) -> Tensor:
        """Clips the step's gradients to `max_grad_norm` together. Returns their norm before."""
        if self.args.fp16:  # its gradients are scaled until accelerate clips them
            return accelerator.clip_grad_norm_(self._trained, self.args.max_grad_norm)
        self._grad_norm = torch.nn.utils.clip_grad_norm_(self._trained, self.args.max_grad_norm)
        return self._grad_norm

    def take_grad_norm(self) -> Tensor:
        """Returns the norm of the step's gradients before they were clipped, and forgets it."""
        norm, self._grad_norm = self._grad_norm, None
        grads = [p.grad for p in self._trained if p.grad is not None]
        return torch.nn.utils.get_total_norm(grads) if norm is None else norm

    # ---- Micro-batches -------------------------------------------------------------------------------------------

    def lay_out(self, entries: list[Entry]) -> list[Entry]:
        """Turns micro-batches, or rows that were kept (`keep_rows`), into as many entries of the training loop.

        Each row gets the completions of another one beside its own if the objective reads them.
        """
        if "kept" not in entries[0]:
            return [as_entry(batch) for batch in entries]
        kept = [entry["kept"].rows for entry in entries]
        if self.objective.needs_mismatched:
            flat = [row for part in kept for row in part]
            found, cut = mismatch(flat, self.evaluated, self.max_length)
            self.mismatched_cut += cut
            self.evaluated, rows = [] if self.model.training else flat[-1:], iter(found)
            kept = [list(itertools.islice(rows, len(part))) for part in kept]
        if self._pads is None:
            self._pads = self.collate(next(part[:1] for part in kept if part)).get("attention_mask") is not None
        if self.args.max_tokens_per_microbatch is not None or self.args.full_determinism:
            return self._pack(kept)
        entries = []
        for part in kept:
            share = self._share(part)
            batch = {**self.collate([part[i] for i in share]), "order": share} if share else {"empty": True}
            entries.append(as_entry(to_device(batch, self.args.device)))
        return entries

    def _share(self, rows: Sequence[Row]) -> list[int]:
        """Returns which rows are this process's own."""
        # No bit of an evaluation may depend on its batch size under `full_determinism`.
        level = self._processes > 1 and not (self.args.full_determinism and not self.model.training)
        return shares([tokens_of(row, not self._pads) if level else 1 for row in rows], self._processes)[self._rank]

    def _pack(self, parts: list[list[Row]]) -> list[Entry]:
        """Packs this process's rows of a step into micro-batches within the budget, hung on as many entries.

        With `full_determinism` each row is one, in their order, and the last entry has all: whatever the number of
        entries, the same numbers are added in the same order.
        """
        everyone, part_of = [row for part in parts for row in part], [i for i, part in enumerate(parts) for _ in part]
        share = self._share(everyone)
        rows = [everyone[i] for i in share]
        if not rows:
            return hang([], [], len(parts))
        if self.args.full_determinism:
            budget, idle, bins = None, len(parts) - 1, [[i] for i in range(len(rows))]
        else:
            budget = self.budget.microbatch_tokens([size_of(row, not self._pads) for row in rows])
            idle, bins = 0, pack_rows(rows, budget, shared=not self._pads)
        packs = [to_device(self.collate([rows[i] for i in one]), self.args.device) for one in bins]
        if budget is not None and self.model.training and not self._packing_logged:
            self._packing_logged = True
            logger.info("The first optimizer step is packed: %s", describe(packs, budget))
        bins = [[share[i] for i in one] for one in bins]
        entries = [*hang([], [], 1) * idle, *hang(packs, bins, len(parts) - idle)]
        return [{**entry, "parts": [part_of[i] for i in entry["order"]]} for entry in entries]

    def totals(self, batches: Sequence[MicroBatch]) -> Totals:
        """Returns the totals of an optimizer step's micro-batches, all processes' together."""
        own = self.objective.kind.totals(batches)
        if self._processes == 1:
            return own
        items, chosen = sum_over_processes([own.items, float(own.mean_chosen_length) * own.items])
        return Totals(int(items), chosen / items)

    def couple(self, entries: Sequence[Entry], totals: Totals) -> None:
        """Takes the loss over all of an objective's coupled batch, if it couples; each micro-batch gets its part.

        The routers' auxiliary loss couples the rows that came as one batch, if these are in several micro-batches.
        """
        batches = _micro_batches(entries)
        coupled = self.objective.batch_coupled and (len(batches) > 1 or self._processes > 1)
        groups = _groups(entries)
        cut = len({i for group in groups for i in group}) < len(groups) or any(len(set(group)) > 1 for group in groups)
        routed = cut and self.objective.router_coef > 0
        if not (coupled or routed):
            return
        packed = [PackedBatch(**batch) for batch in batches]
        with torch.no_grad(), self._autocast():
            refs = [self._reference(batch) for batch in packed] if coupled else []
            policies = [self._policy(batch) for batch in packed]
        if routed:
            for batch, slopes_EX in zip(batches, self.objective.slopes(packed, policies, groups), strict=True):
                batch["router_slopes"] = slopes_EX
        if not coupled:
            return
        shares = self.objective.couple(packed, policies, refs, totals, self._scores_elsewhere)
        for batch, part in zip(batches, shares, strict=True):
            batch["coupled"] = part

    def _scores_elsewhere(self, own: Scored | None) -> tuple[list[Scored], list[Scored]]:
        """Returns the scores of the other processes' shares of the optimizer batch, of lower and of higher ranks."""
        shares = gather_over_processes(None if own is None else own.to("cpu"))
        moved = [[] if share is None else [share.to(self.args.device)] for share in shares]
        return sum(moved[: self._rank], []), sum(moved[self._rank + 1 :], [])

    def predict(
        self, entry: Entry, compute_loss: Callable[..., tuple[Tensor, LossOutput]]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Scores an evaluation batch. What couples a batch is taken over it, and a token budget holds here too.
        Returns this process's part of the loss; rewards and labels of the rows of all processes, in their order."""
        (entry,) = self.lay_out([entry])
        totals = self.totals(entry["packs"])
        self.couple([entry], totals)
        loss, rows = torch.zeros((), device=self.args.device), []
        for batch in entry["packs"]:
            with torch.no_grad(), self._autocast():
                part, output = compute_loss(batch, num_items_in_batch=totals)
                rows += self.objective.kind.predictions_by_row(output.scored, output.rewards_C, batch["rows"])
            loss = loss + part.float()
            _release(batch)
        everyone = itertools.chain(*gather_over_processes(list(zip(entry["order"], rows, strict=True))))
        rows = [row for _, row in sorted(everyone, key=lambda placed: placed[0])]
        rewards, labels = (torch.cat(parts).to(self.args.device) for parts in zip(*rows, strict=True))
        return loss, rewards, labels

    # ---- Out of memory -------------------------------------------------------------------------------------------

    def _until_it_fits(self, action: Callable[[], T]) -> T:
        """Runs a part of the step. When memory runs out, room is made and the step is begun again."""
        while True:
            try:
                return action()
            except torch.OutOfMemoryError as error:
                message = str(error)
            self._make_room(message)  # outside of the handler, where the failed pass and its tensors are gone

    def _make_room(self, message: str) -> None:
        """Checkpoints more layers if that is left to us and may help, else halves; and begins the step again."""
        held = torch.cuda.max_memory_allocated(self.args.device) if self.args.device.type == "cuda" else 0
        if self.budget.tighten(held):
            logger.warning(
                "Out of memory: from here on micro-batches keep within %.1f GiB. The step is repeated. Set "
                "max_memory_gib to avoid this. (%s)",
                *(self.budget.limit / 2**30, message.split("\n")[0]),
            )
        else:
            self._halve(message)
        self.model.zero_grad(set_to_none=True)
        self.metrics.restore(self._metrics_before)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._start_over()

    def _start_over(self) -> None:
        """Goes back to the first micro-batch, cut as often as memory made it necessary and coupled if they couple."""
        self.finite, self._done = [], 0
        self._until_it_fits(self._split)

    def _halve(self, message: str) -> None:
        rows = max(map(_size, _micro_batches(self._entries)), default=1)
        packed = self.args.max_tokens_per_microbatch is not None
        lower = "max_tokens_per_microbatch" if packed else "per_device_train_batch_size"
        if rows < 2:
            raise torch.OutOfMemoryError(
                "Out of memory with a single row in a micro-batch. Lower max_length, set gradient_checkpointing=True, "
                f"or use a smaller model. ({message})"
            )
        # Not on one process of several, which must couple together; nor under dropout, whose masks would not repeat.
        if self.objective.batch_coupled and (self._processes > 1 or not self.args.disable_dropout):
            raise torch.OutOfMemoryError(
                "Out of memory, and this objective couples its batch: in several processes, or with dropout, it can't "
                f"be cut. Lower {lower}. ({message})"
            )
        self.halvings += 1
        logger.warning(
            "Out of memory with %d rows in a micro-batch: from here on each is run in %d parts, which gives the same "
            "steps. The step is repeated. Lower %s to avoid this. (%s)",
            *(rows, 2**self.halvings, lower, message.split("\n")[0]),
        )

    def _split(self) -> None:
        for batch in _micro_batches(self._entries):
            batch.pop("coupled", None)
            batch.pop("router_slopes", None)
        for _ in range(self.halvings - self._cuts):
            cut = [[half for batch in entry["packs"] for half in _halves(batch)] for entry in self._entries]
            for entry, packs in zip(self._entries, cut, strict=True):
                entry["packs"] = packs
            self._cuts += 1
        self.couple(self._entries, self._totals)


def _micro_batches(entries: Sequence[Entry]) -> list[MicroBatch]:
    return [batch for entry in entries for batch in entry["packs"]]


def _release(batch: MicroBatch) -> None:
    """Frees the features of a micro-batch's images: it is kept until the step ends."""
    if "images" in batch:
        batch["images"].release()


def _size(batch: MicroBatch) -> int:
    return len(batch["rows"])


def _groups(entries: Sequence[Entry]) -> list[list[int]]:
    """Returns for each micro-batch in which batch of the data loader its rows came."""
    came = [entry.get("parts", [i] * sum(map(_size, entry["packs"]))) for i, entry in enumerate(entries)]
    numbers = itertools.chain(*came)
    return [list(itertools.islice(numbers, _size(batch))) for batch in _micro_batches(entries)]


def _halves(batch: MicroBatch) -> list[MicroBatch]:
    return [batch] if _size(batch) < 2 else [half.as_dict() for half in halves(PackedBatch(**batch))]
