"""Keeps what evaluations give for single pairs.

Shape suffixes: B pairs, C completions (chosen at even, rejected at odd indices).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState

from ..distributed import gather_over_processes, rank
from ..files import write_rows
from ..forward import PackedBatch
from ..objective import LossOutput
from .samples import Row, read_lines

EXAMPLES = "eval_examples.jsonl"
_SIDES = ("chosen", "rejected")


class PairRecords(TrainerCallback):
    """Keeps the pairs of each dataset's first and newest evaluation in `eval_examples.jsonl`.

    Args:
        output_dir: of the run.

    Attributes:
        begun: a run has begun, and what evaluations give belongs to it.
    """

    def __init__(self, output_dir: str):
        self.output_dir = Path(output_dir)
        self.begun = False
        self._recording = False  # inside an evaluation whose pairs are recorded
        self._pairs: list[tuple[Tensor, ...]] = []  # of the evaluation under way, per micro-batch
        self._examples: dict[str, list[list[Row]]] = {}  # dataset to the rows of its first and its newest evaluation

    def on_train_begin(self, args: object, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """Begins the run's file anew."""
        self.begun = True
        if state.global_step == 0:
            self._pairs, self._examples = [], {}
        if rank() == 0:
            (self.output_dir / EXAMPLES).unlink(missing_ok=True)
            self._write(self.output_dir)

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
            self._examples[dataset] = first_and_newest([*self._examples.get(dataset, []), rows])
            self._write(self.output_dir)

    def _write(self, folder: Path) -> None:
        if self._examples:
            looks = (rows for looks in self._examples.values() for rows in looks)
            write_rows(folder / EXAMPLES, (row for rows in looks for row in rows))

    def state_dict(self, folder: Path) -> dict[str, object]:
        """Writes the records so far into a checkpoint."""
        self._write(folder)
        return {}

    def load_state_dict(self, state: Mapping[str, object], folder: Path) -> None:
        """Takes up a run's records."""
        self._examples = {}
        for row in read_lines(folder / EXAMPLES):
            looks = self._examples.setdefault(row["dataset"], [])
            if not looks or looks[-1][0]["step"] != row["step"]:
                looks.append([])
            looks[-1].append(row)


def first_and_newest(looks: Sequence[list[Row]]) -> list[list[Row]]:
    """Returns a dataset's first and newest evaluation; a step that is evaluated again replaces what it gave before."""
    first, newest = looks[0], looks[-1]
    return [newest] if first[0]["step"] == newest[0]["step"] else [first, newest]
