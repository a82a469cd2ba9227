"""What an evaluation gives beside its figures: completions of fixed prompts, a record of every pair, named warnings.

None of it changes the run: weights and logs are, bit for bit, those of a run without. All of it is in the checkpoints,
so a resumed run leaves the files that the straight one leaves.

Shape suffixes: B pairs, C completions (chosen at even, rejected at odd indices).
"""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import (
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from ..config import DPOConfig
from ..data import DataReport
from ..distributed import gather_over_processes, rank
from ..errors import OptionError
from ..files import write_rows
from ..forward import PackedBatch
from ..model.generation import end_tokens, sample_completions
from ..objective import Scored, TrainingObjective
from .building import Preparation
from .callbacks import EarlyStop
from .diagnostics import RunFacts, diagnose
from .metrics import length_balanced
from .sample_log import distinct_prompts, in_short, send_table

logger = logging.getLogger(__name__)

SAMPLES = "samples.jsonl"
EXAMPLES = "eval_examples.jsonl"
_SIDES = ("chosen", "rejected")
Row = dict[str, Any]


class Samples(TrainerCallback):
    """Completes fixed prompts, the same at each evaluation, and keeps them in `samples.jsonl`; by the main process.

    Args:
        model: the PEFT model.
        tokenizer: its tokenizer.
        args: the options.
        rows: prepared evaluation rows whose first different prompts are taken; None if there are none.
        autocast: mixed precision around sampling.
        callbacks: of the trainer; those of `report_to` get the samples as tables.
    """

    def __init__(
        self,
        model: PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        args: DPOConfig,
        rows: Any,
        autocast: Callable[[], AbstractContextManager[Any]],
        callbacks: Sequence[TrainerCallback],
    ):
        self.model, self.tokenizer, self.args, self._rows, self._autocast = model, tokenizer, args, rows, autocast
        self._callbacks = callbacks
        self._prompt_ids: list[list[int]] | None = None
        self.reset()

    def reset(self) -> None:
        """Forgets an earlier run."""
        self.samples: list[Row] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begins the run's file anew: what is there is an earlier run's, or of steps that are taken again."""
        if rank() == 0:
            Path(self.args.output_dir, SAMPLES).unlink(missing_ok=True)
            self._write(Path(self.args.output_dir))
        if state.global_step == 0:
            self.take(0)

    def take(self, step: int, again: bool = False) -> None:
        """Samples a step's completions, once unless `again`."""
        known = any(row["step"] == step for row in self.samples)
        if not self.args.sample_prompts or rank() != 0 or (known and not again):
            return
        if self._prompt_ids is None:
            self._prompt_ids = self._choose_prompts()
        try:
            rows = [{"step": step, "prompt_number": i, **row} for i, row in enumerate(self._complete())]
        except torch.OutOfMemoryError as error:
            logger.warning(
                "No samples at step %d: they don't fit into memory. Lower sample_prompts or sample_max_new_tokens. "
                "(%s)",
                step,
                str(error).split("\n")[0],
            )
            torch.cuda.empty_cache()
            return
        self.samples = [row for row in self.samples if row["step"] != step] + rows
        self._write(Path(self.args.output_dir))
        logger.info("Samples at step %d:\n%s", step, in_short(rows))
        send_table(self._callbacks, rows, step)

    def renew(self, step: int) -> None:
        """Samples a step again, if it was sampled: another adapter has been loaded."""
        if any(row["step"] == step for row in self.samples):
            self.take(step, again=True)

    def _choose_prompts(self) -> list[list[int]]:
        """Returns the first different prompts that leave room for a completion."""
        positions = getattr(self.model.config, "max_position_embeddings", None)
        longest = None if positions is None else positions - self.args.sample_max_new_tokens
        chosen = list(islice(distinct_prompts(self._rows, longest), self.args.sample_prompts))
        if len(chosen) < self.args.sample_prompts:
            logger.warning(
                "sample_prompts=%d: the evaluation rows have %d different prompts that leave room for "
                "sample_max_new_tokens=%d, so these are sampled.",
                self.args.sample_prompts,
                len(chosen),
                self.args.sample_max_new_tokens,
            )
        return chosen

    def _complete(self) -> list[Row]:
        prompt_ids, ends = self._prompt_ids or [], end_tokens(self.model, self.tokenizer)
        with self._autocast():
            completions = sample_completions(
                self.model,
                self.tokenizer,
                prompt_ids,
                seed=[self.args.seed + i for i in range(len(prompt_ids))],  # the same at each step, to be compared
                max_new_tokens=self.args.sample_max_new_tokens,
                temperature=self.args.sample_temperature,
            )
        return [
            {
                "prompt": self.tokenizer.decode(prompt, skip_special_tokens=True),
                "completion": self.tokenizer.decode(ids, skip_special_tokens=True),
                "tokens": len(ids),
                "finished": bool(ids) and ids[-1] in ends,
            }
            for prompt, ids in zip(prompt_ids, completions, strict=True)
        ]

    def _write(self, folder: Path) -> None:
        if self.samples:
            write_rows(folder / SAMPLES, self.samples)

    def state_dict(self, folder: Path) -> dict[str, Any]:
        """Writes the samples so far into a checkpoint."""
        self._write(folder)
        return {}

    def load_state_dict(self, state: Mapping[str, Any], folder: Path) -> None:
        """Takes up a run's samples."""
        self.samples = _read(folder / SAMPLES)


class PairRecords(TrainerCallback):
    """Keeps the pairs of each dataset's first and newest evaluation in `eval_examples.jsonl`.

    Args:
        output_dir: of the run.
    """

    def __init__(self, output_dir: str):
        self.output_dir = Path(output_dir)
        self._recording = False  # inside an evaluation whose pairs are recorded
        self.reset()

    def reset(self) -> None:
        """Forgets an earlier run."""
        self.begun = False  # a run has begun, and what evaluations give belongs to it
        self._pairs: list[tuple[Tensor, ...]] = []  # of the evaluation under way, per micro-batch
        self._examples: dict[str, list[list[Row]]] = {}  # dataset to the rows of its first and its newest evaluation

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begins the run's file anew."""
        self.begun = True
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

    def add(self, batch: PackedBatch, scored: Scored, rewards_C: Tensor) -> None:
        """Takes note of the pairs of an evaluation's micro-batch; they stay on the device until its end."""
        if self._recording:
            self._pairs.append((batch.rows, rewards_C, scored.logps_C.detach(), batch.lengths))

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

    def state_dict(self, folder: Path) -> dict[str, Any]:
        """Writes the records so far into a checkpoint."""
        self._write(folder)
        return {}

    def load_state_dict(self, state: Mapping[str, Any], folder: Path) -> None:
        """Takes up a run's records."""
        for row in _read(folder / EXAMPLES):
            looks = self._examples.setdefault(row["dataset"], [])
            if not looks or looks[-1][0]["step"] != row["step"]:
                looks.append([])
            looks[-1].append(row)


class Warnings(TrainerCallback):
    """Looks at what has been logged, and warns of each trouble once a run (docs/diagnostics.md).

    Args:
        args: the options.
        objective: what is minimized.
        summaries: dataset name to what became of its rows.
        evaluated: metric prefixes of the evaluation datasets ("eval", "eval_<name>").

    Attributes:
        raised: `step`, `name` and `message` of this run's warnings, each name once.
    """

    def __init__(
        self,
        args: DPOConfig,
        objective: TrainingObjective,
        summaries: Mapping[str, DataReport],
        evaluated: Iterable[str],
    ):
        self._args, self._objective, self._summaries = args, objective, summaries
        self._evaluated = list(evaluated) if args.eval_strategy != "no" else []
        self.reset()

    def reset(self) -> None:
        """Forgets an earlier run."""
        self.raised: list[dict[str, Any]] = []

    def facts(self, state: TrainerState) -> RunFacts:
        """Returns what is known of the run beside its log; of a stream more as it is read."""
        train = self._summaries["train"]
        return RunFacts(
            reward=self._objective.parts[0].reward,
            beta=1.0 if self._args.beta is None else self._args.beta,
            tokens=train.completion_tokens / train.completions if train.completions else None,
            held_out={name: self._summaries[name].kept_rows for name in self._evaluated},
            max_steps=state.max_steps,
        )

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Warns of what is new."""
        raised = {warning["name"] for warning in self.raised}
        for finding in diagnose(state.log_history, self.facts(state)):
            if finding.name not in raised:
                self.raised.append(finding._asdict())
                if rank() == 0:
                    logger.warning("%s at step %d: %s", finding.name, finding.step, finding.message)

    def state_dict(self, folder: Path) -> dict[str, Any]:
        """Returns the warnings so far."""
        return {"warnings": self.raised}

    def load_state_dict(self, state: Mapping[str, Any], folder: Path) -> None:
        """Takes up a run's warnings."""
        self.raised = list(state.get("warnings", []))


class Evaluation:
    """What a run's evaluations leave behind: samples, records of pairs, warnings, and whether to stop early.

    Args:
        model: the PEFT model.
        tokenizer: its tokenizer.
        args: the options.
        objective: what is minimized.
        datasets: the prepared datasets and what became of their rows.
        autocast: mixed precision around sampling.
        callbacks: of the trainer.
    """

    def __init__(
        self,
        model: PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        args: DPOConfig,
        objective: TrainingObjective,
        datasets: Preparation,
        autocast: Callable[[], AbstractContextManager[Any]],
        callbacks: Sequence[TrainerCallback],
    ):
        first = next(iter(datasets.evaluated.values()), None)
        self.samples = Samples(model, tokenizer, args, first, autocast, callbacks)
        self.records = PairRecords(args.output_dir)
        self.warnings = Warnings(args, objective, datasets.reports, datasets.evaluated)
        self.early_stop = EarlyStop.from_options(args)

    @property
    def parts(self) -> list[Samples | PairRecords | Warnings | EarlyStop]:
        """Returns those that there are: callbacks, saved with checkpoints."""
        return [*filter(None, [self.early_stop]), self.samples, self.records, self.warnings]

    def reset(self) -> None:
        """Forgets an earlier run."""
        for part in self.parts:
            part.reset()

    def finish(self, metrics: dict[str, float], prefix: str, step: int) -> dict[str, float]:
        """Ends the evaluation of a dataset. Returns its metrics with the length-balanced accuracy and the prefix."""
        self.records.finish(prefix, step)
        balanced = length_balanced(*(metrics.get(f"accuracies/chosen_{side}") for side in ("longer", "shorter")))
        if balanced is not None:
            metrics = {**metrics, "accuracies/length_balanced": balanced}
        return {f"{prefix}_{name}": value for name, value in metrics.items()}


def check_reported(name: str | None, metrics: Mapping[str, float], step: int) -> None:
    """Refuses a `metric_for_best_model` that an evaluation turned out to lack.

    Raises:
        OptionError: naming those that it has.
    """
    if name is not None and f"eval_{name.removeprefix('eval_')}" not in metrics:
        raise OptionError(
            f"metric_for_best_model={name!r}: the evaluation of step {step} lacks it, as no held-out row tells "
            f"anything of it. It has {', '.join(sorted(metrics))}."
        )


def first_and_newest(looks: Sequence[list[Row]]) -> list[list[Row]]:
    """Returns a dataset's first and newest evaluation; a step that is evaluated again replaces what it gave before."""
    first, newest = looks[0], looks[-1]
    return [newest] if first[0]["step"] == newest[0]["step"] else [first, newest]


def _read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.is_file() else []
