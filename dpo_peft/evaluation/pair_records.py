"""Keeps what evaluations give for single pairs.

Shape suffixes: B pairs, C completions (chosen at even, rejected at odd indices).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import TrainerControl, TrainerState

from ..distributed import gather_over_processes, rank
from ..forward import PackedBatch
from ..objective import LossOutput
from .samples import KeptRows, Row

EXAMPLES = "eval_examples.jsonl"
_SIDES = ("chosen", "rejected")


class PairRecords(KeptRows):
    """Keeps the pairs of each dataset's first and newest evaluation in `eval_examples.jsonl`."""

    def __init__(self, run_dir: str):
        super().__init__(run_dir, EXAMPLES)
        self.begun = False  # a run has begun, and what evaluations give belongs to it
        self._recording = False  # inside an evaluation whose pairs are recorded
        self._pairs: list[tuple[Tensor, ...]] = []  # of the evaluation under way, per micro-batch

    def on_train_begin(self, args: object, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """Begins the run's file."""
        super().on_train_begin(args, state, control)
        self.begun, self._pairs = True, []

    @contextmanager
    def recording(self, on: bool) -> Iterator[None]:
        """Inside, evaluations are recorded if `on` and a run has begun."""
        self._recording = on and self.begun
        try:
            yield
        finally:
            self._recording = False

    def add(self, batch: PackedBatch, output: LossOutput) -> None:
        """Takes note of the pairs of an evaluation's micro-batch; they stay on the device until its end."""
        if self._recording:
            self._pairs.append((batch.rows, output.rewards_C, output.scored.logps_C.detach(), batch.lengths))

    def finish(self, dataset: str, step: int) -> None:
        """Ends the evaluation of a dataset: the pairs of all processes are kept, in the order of their rows."""
        pairs, self._pairs = self._pairs, []
        if not self._recording:
            return
        held: list[Row] = []
        if pairs:
            row_B, reward_C, logp_C, tokens_C = (torch.cat(part).tolist() for part in zip(*pairs, strict=True))
            values = {"reward": reward_C, "logp": logp_C, "tokens": tokens_C}
            for i, row in enumerate(row_B):
                sides = {f"{name}_{side}": x[2 * i + j] for name, x in values.items() for j, side in enumerate(_SIDES)}
                held.append({"step": step, "dataset": dataset, "row": row, **sides})
        rows = sorted((row for part in gather_over_processes(held) for row in part), key=lambda row: row["row"])
        if rank() == 0 and rows:
            own = first_and_newest([row for row in self.rows if row["dataset"] == dataset], rows)
            names = dict.fromkeys([row["dataset"] for row in self.rows] + [dataset])
            self.rows = [
                row for name in names for row in (own if name == dataset else self.rows) if row["dataset"] == name
            ]
            self.state_dict(self.run_dir)


def first_and_newest(held: Sequence[Row], rows: Sequence[Row]) -> list[Row]:
    """Returns the rows of a dataset's first evaluation, among those `held`, and of the newest one; a step that is
    evaluated again replaces what it gave before."""
    return [row for row in held if held[0]["step"] == row["step"] != rows[0]["step"]] + list(rows)
