"""What an evaluation gives beside its figures: answers to fixed prompts, a record of every pair, named warnings.

None of it changes the run: weights and logs are, bit for bit, those of a run without. All of it is in the checkpoints,
so a resumed run leaves the files that the straight one leaves.

Shape suffixes: B pairs, C completions (chosen at even, rejected at odd indices).
"""

import json
import logging
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..distributed import gather_over_processes, rank
from ..errors import OptionError
from ..files import write_rows
from ..forward import PackedBatch
from ..model.generation import end_tokens, sample_completions
from ..objective import Scored
from .callbacks import StopEarly
from .diagnostics import RunFacts, diagnose
from .metrics import length_balanced
from .sample_log import distinct_prompts, in_short, send_table
from .saving import SavingTrainer

logger = logging.getLogger(__name__)

SAMPLES = "samples.jsonl"
EXAMPLES = "eval_examples.jsonl"
Row = dict[str, Any]


class EvaluatingTrainer(SavingTrainer):
    """Answers prompts, records pairs, warns and stops early as it evaluates; loads the best adapter at the end.

    Attributes:
        warnings_raised: `step`, `name` and `message` of this run's warnings (docs/diagnostics.md), each name once.
    """

    warnings_raised: list[dict[str, Any]]
    _recording = False  # inside an evaluation whose pairs are recorded
    _begun = False  # a run has begun, and what evaluations give belongs to it

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.stop_early: StopEarly | None = None
        patience = self.args.early_stopping_patience
        if patience is not None:
            metric = f"eval_{str(self.args.metric_for_best_model).removeprefix('eval_')}"
            greater, threshold = bool(self.args.greater_is_better), self.args.early_stopping_threshold
            self.stop_early = StopEarly(metric, greater, patience, threshold)
            self.add_callback(self.stop_early)
        self._prompt_ids: list[list[int]] | None = None
        self._pairs: list[tuple[Tensor, ...]] = []  # of the evaluation under way, per micro-batch
        self._forget()
        self.add_callback(_AtStart(self))

    def _forget(self) -> None:
        self.warnings_raised = []
        self._samples: list[Row] = []
        self._examples: dict[str, list[list[Row]]] = {}  # dataset to the rows of its first and its newest evaluation
        if self.stop_early is not None:
            self.stop_early.load({})

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As `ReferencedTrainer.train`. `samples.jsonl` and `eval_examples.jsonl` in `output_dir` are this run's."""
        self._forget()
        self._begun = False
        return super().train(*args, **kwargs)

    def begin(self) -> None:
        """Called when the run is about to take its first step, from scratch or resumed."""
        self._begun = True
        if rank() == 0:
            folder = Path(self.args.output_dir)
            for name in (SAMPLES, EXAMPLES):
                (folder / name).unlink(missing_ok=True)  # of an earlier run, or of steps that are taken again
            self._write_records(folder)
        if self.state.global_step == 0:
            self._sample()

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # Stopped early before it was killed: transformers would look at this after one more step.
        if self.stop_early is not None and self.stop_early.done:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    # ---- Evaluation ------------------------------------------------------------------------------------------------

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in `transformers.Trainer`. Once `train()` has begun, the trainer's own evaluation datasets also give the
        pairs of `eval_examples.jsonl`, and their first prompts the answers of `samples.jsonl`."""
        self._recording = self._begun and (eval_dataset is None or isinstance(eval_dataset, str))
        try:
            metrics = super().evaluate(eval_dataset, *args, **kwargs)
        finally:
            self._recording = False
        if self._begun and eval_dataset is None:
            self._sample()
        return metrics

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As in `SteppingTrainer`, with length-balanced accuracy, and a record of every pair."""
        self._pairs = []
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", args[4] if len(args) > 4 else "eval")
        by_length = (output.metrics.get(f"{prefix}_accuracies/chosen_{side}") for side in ("longer", "shorter"))
        if (balanced := length_balanced(*by_length)) is not None:
            output.metrics[f"{prefix}_accuracies/length_balanced"] = balanced
        if self._recording and self.objective.kind.paired:
            self._keep_examples(prefix)
        return output

    def record_pairs(self, batch: PackedBatch, scored: Scored, rewards_C: Tensor) -> None:
        """Take note of the pairs of an evaluation's micro-batch; they stay on the device until its end."""
        if self._recording and self.objective.kind.paired:
            self._pairs.append((batch.rows, rewards_C, scored.logps_C.detach(), batch.lengths))

    def _keep_examples(self, dataset: str) -> None:
        held: list[Row] = []
        if self._pairs:
            row_B, reward_C, logp_C, tokens_C = (torch.cat(part).tolist() for part in zip(*self._pairs, strict=True))
            values = {"reward": reward_C, "logp": logp_C, "tokens": tokens_C}
            for i, row in enumerate(row_B):
                sides = {f"{name}_{side}": x[2 * i + j] for name, x in values.items() for j, side in enumerate(_SIDES)}
                held.append({"step": self.state.global_step, "dataset": dataset, "row": row, **sides})
        self._pairs = []
        rows = sorted((row for part in gather_over_processes(held) for row in part), key=lambda row: row["row"])
        if rank() == 0 and rows:
            self._examples[dataset] = first_and_newest([*self._examples.get(dataset, []), rows])
            self._write_records(Path(self.args.output_dir))

    # ---- Samples ---------------------------------------------------------------------------------------------------

    def _sample(self, again: bool = False) -> None:
        """Answer the prompts, by the main process alone. A step is sampled once, unless `again`."""
        step = self.state.global_step
        known = any(row["step"] == step for row in self._samples)
        if not self.args.sample_prompts or rank() != 0 or (known and not again):
            return
        if self._prompt_ids is None:
            self._prompt_ids = self._choose_prompts()
        try:
            rows = [{"step": step, "prompt_number": i, **row} for i, row in enumerate(self._answers(self._prompt_ids))]
        except torch.OutOfMemoryError as error:
            logger.warning(
                "No samples at step %d: they don't fit into memory. Lower sample_prompts or sample_max_new_tokens. "
                "(%s)",
                step,
                str(error).split("\n")[0],
            )
            torch.cuda.empty_cache()
            return
        self._samples = [row for row in self._samples if row["step"] != step] + rows
        self._write_records(Path(self.args.output_dir))
        logger.warning("Samples at step %d:\n%s", step, in_short(rows))
        send_table(self.callback_handler.callbacks, rows, step)

    def _choose_prompts(self) -> list[list[int]]:
        """The first different prompts of the first evaluation dataset that leave room for an answer."""
        rows = next(iter(self.eval_dataset.values())) if isinstance(self.eval_dataset, dict) else self.eval_dataset
        positions = getattr(self.model.config, "max_position_embeddings", None)
        longest = None if positions is None else positions - self.args.sample_max_new_tokens
        prompts = distinct_prompts(rows, longest)
        chosen = list(islice(prompts, self.args.sample_prompts))
        if len(chosen) < self.args.sample_prompts:
            logger.warning(
                "sample_prompts=%d: the evaluation rows have %d different prompts that leave room for "
                "sample_max_new_tokens=%d, so these are sampled.",
                self.args.sample_prompts,
                len(chosen),
                self.args.sample_max_new_tokens,
            )
        return chosen

    def _answers(self, prompt_ids: Sequence[list[int]]) -> list[Row]:
        tokenizer, ends = self.processing_class, end_tokens(self.model, self.processing_class)
        with self.compute_loss_context_manager():
            answers = sample_completions(
                self.model,
                tokenizer,
                prompt_ids,
                seed=[self.args.seed + i for i in range(len(prompt_ids))],  # the same at each step, to be compared
                max_new_tokens=self.args.sample_max_new_tokens,
                temperature=self.args.sample_temperature,
            )
        return [
            {
                "prompt": tokenizer.decode(prompt, skip_special_tokens=True),
                "completion": tokenizer.decode(answer, skip_special_tokens=True),
                "tokens": len(answer),
                "finished": bool(answer) and answer[-1] in ends,
            }
            for prompt, answer in zip(prompt_ids, answers, strict=True)
        ]

    # ---- Warnings --------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in `ReferencedTrainer`; then look at what has been logged, and warn of each trouble once a run."""
        super().log(logs, start_time)
        raised = {warning["name"] for warning in self.warnings_raised}
        for finding in diagnose(self.state.log_history, self._facts()):
            if finding.name not in raised:
                self.warnings_raised.append(finding._asdict())
                if rank() == 0:
                    logger.warning("%s at step %d: %s", finding.name, finding.step, finding.message)

    def _facts(self) -> RunFacts:
        report = self.data_reports["train"]
        sets = [f"eval_{name}" for name in self.eval_dataset] if isinstance(self.eval_dataset, dict) else ["eval"]
        evaluated = sets if self.args.eval_strategy != "no" else []
        return RunFacts(
            reward=self.objective.parts[0].reward,
            beta=1.0 if self.args.beta is None else self.args.beta,
            tokens=report.completion_tokens / report.completions if report.completions else None,
            held_out={name: self.data_reports[name].kept_rows for name in evaluated if name in self.data_reports},
            max_steps=self.state.max_steps,
        )

    # ---- Saving and going on ---------------------------------------------------------------------------------------

    def _write_records(self, folder: Path) -> None:
        if self._samples:
            write_rows(folder / SAMPLES, self._samples)
        if self._examples:
            looks = (rows for looks in self._examples.values() for rows in looks)
            write_rows(folder / EXAMPLES, (row for rows in looks for row in rows))

    def save_extra(self, folder: Path) -> dict[str, Any]:
        """As in `ReferencedTrainer`; samples and records so far, warnings, how long early stopping has waited."""
        self._write_records(folder)
        stop_early = None if self.stop_early is None else self.stop_early.state()
        return {**super().save_extra(folder), "warnings": self.warnings_raised, "stop_early": stop_early}

    def load_extra(self, folder: Path, extra: Mapping[str, Any]) -> None:
        """The reverse of `save_extra`."""
        super().load_extra(folder, extra)
        self.warnings_raised = list(extra.get("warnings", []))
        if self.stop_early is not None:
            self.stop_early.load(extra.get("stop_early") or {})
        self._samples = _read(folder / SAMPLES)
        for row in _read(folder / EXAMPLES):
            looks = self._examples.setdefault(row["dataset"], [])
            if not looks or looks[-1][0]["step"] != row["step"]:
                looks.append([])
            looks[-1].append(row)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        name = self.args.metric_for_best_model
        if name is not None and f"eval_{name.removeprefix('eval_')}" not in metrics:
            raise OptionError(
                f"metric_for_best_model={name!r}: the evaluation of step {self.state.global_step} lacks it, as no "
                f"held-out row tells anything of it. It has {', '.join(sorted(metrics))}."
            )
        return super()._determine_best_metric(metrics, trial)

    def _load_best_model(self) -> None:
        """The best adapter, whatever its name, and the reference that it had if that moves."""
        best = Path(str(self.state.best_model_checkpoint))
        folder = best if self.policy_adapter == "default" else best / self.policy_adapter
        self.model.load_adapter(
            str(folder), self.policy_adapter, is_trainable=True, torch_device=str(self.args.device)
        )
        super().load_extra(best, {"halvings": self.halvings})
        logger.warning("The best adapter is loaded: %s (%s).", best, self.state.best_metric)
        step = self.state.global_step
        if best.name != f"checkpoint-{step}" and any(row["step"] == step for row in self._samples):
            self._sample(again=True)  # the newest samples are of the adapter that is saved


_SIDES = ("chosen", "rejected")


class _AtStart(TrainerCallback):
    """Says when a run has been prepared, and restored if it is resumed."""

    def __init__(self, trainer: EvaluatingTrainer):
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.begin()


def first_and_newest(looks: Sequence[list[Row]]) -> list[list[Row]]:
    """Of the evaluations of a dataset; a step that is evaluated again takes the place of what it gave before."""
    first, newest = looks[0], looks[-1]
    return [newest] if first[0]["step"] == newest[0]["step"] else [first, newest]


def _read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.is_file() else []
