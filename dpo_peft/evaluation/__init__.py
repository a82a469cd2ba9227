"""What an evaluation gives beside its figures: completions of fixed prompts, a record of every pair, named warnings.

None of it changes the run: weights and logs are, bit for bit, those of a run without. All of it is in the checkpoints,
so a resumed run leaves the files that the straight one leaves.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from peft import PeftModel
from transformers import PreTrainedTokenizerBase, PrinterCallback, ProgressCallback, TrainerCallback

from ..config import DPOConfig
from ..distributed import meet
from ..forward import PackedBatch
from ..objective import LossOutput, TrainingObjective
from ..training.building import Preparation
from ..training.throughput import Throughput
from .console import Console, PlainConsole, Shows, label_of
from .diagnostics import Warnings
from .log_file import open_log
from .pair_records import PairRecords
from .samples import Samples
from .verdict import verdict

__all__ = ["Evaluation", "open_log", "verdict"]


class Evaluation:
    """What a run's evaluations leave behind.

    `parts` are callbacks, whose state is saved with checkpoints.

    Args:
        datasets: the prepared datasets and what became of their rows.
        autocast: mixed precision around sampling.
        callbacks: of the trainer; those of `report_to` get the samples as tables, and ours takes the place of the one
            that prints.
    """

    def __init__(
        self,
        model: PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        args: DPOConfig,
        objective: TrainingObjective,
        datasets: Preparation,
        throughput: Throughput,
        autocast: Callable[[], AbstractContextManager[object]],
        callbacks: list[TrainerCallback],
    ):
        first = next(iter(datasets.evaluated.values()), ())
        self.samples = Samples(model, tokenizer, args, first, autocast, callbacks, datasets.images)
        self.records = PairRecords(args.output_dir)
        self.warnings = Warnings(args, objective, datasets.reports, datasets.evaluated, self.samples)
        without = [] if objective.needs_reference else ["KL"]
        evaluated = list(datasets.evaluated) if args.eval_strategy != "no" else []
        self.console = take_over(callbacks, throughput, evaluated, without)
        self.parts = [self.samples, self.records, self.warnings]

    @contextmanager
    def under_way(self, own: bool, step: int | None) -> Iterator[None]:
        """Inside, pairs are recorded if a run has begun and the rows are its `own`, all or one of several datasets;
        afterwards, samples of the run's step are taken, if all of them were evaluated (None: not)."""
        with self.records.recording(own):
            yield
        if step is not None and self.records.begun:
            self.samples.take(step)
            meet()  # one process has completed samples
            self.warnings.compare()

    @property
    def warnings_raised(self) -> list[dict[str, Any]]:
        """Returns `step`, `name` and `message` of this run's warnings, each name once."""
        return self.warnings.raised

    def begin(self, dataset: str) -> None:
        """Begins the evaluation of a dataset, named by its metrics' prefix."""
        if self.console is not None:
            self.console.evaluating = label_of(dataset)

    def add(self, batch: PackedBatch, output: LossOutput) -> None:
        """Takes note of the pairs of an evaluation's micro-batch."""
        self.records.add(batch, output)

    def finish(self, dataset: str, step: int) -> None:
        """Ends the evaluation of a dataset, named by its metrics' prefix."""
        self.records.finish(dataset, step)

    def renew(self, step: int) -> None:
        """Samples a step again, if it was sampled: another adapter has been loaded."""
        self.samples.renew(step)
        meet()


def take_over(callbacks: list[TrainerCallback], *of_shows: Any) -> Shows | None:
    """Puts ours, made with the arguments `of_shows`, in the place of the callback that transformers installs by
    default, and returns it; None if there is another one, which stays."""
    for i, callback in enumerate(callbacks):
        own: Any = {ProgressCallback: Console, PrinterCallback: PlainConsole}.get(type(callback))
        if type(callback).__name__ == "NotebookProgressCallback":
            from .notebook import NotebookConsole as own  # imports IPython
        if own is not None:
            callbacks[i] = shows = own(*of_shows)
            return shows
    return None
