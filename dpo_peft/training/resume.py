"""A trainer whose run can be killed at any moment and goes on as if nothing had happened.

A checkpoint is written beside the others and takes its name when it is whole (`checkpoints.py`). It holds all that the
rest of the run depends on: `transformers.Trainer` saves adapter, optimizer, scheduler, random numbers and the place in
the data; `run_state.json` adds the sums of metrics since the last log, the options, and what a subclass has to add.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import Trainer
from transformers.trainer_callback import ExportableState

from ..distributed import gather_over_processes, rank, world_size
from ..errors import CheckpointError, OptionError, TrainingInterrupted
from .callbacks import StopOnSignal
from .checkpoints import (
    commit,
    discard,
    newest_whole,
    problem_with,
    recover,
    rotate,
    staged_checkpoint,
    staging_folder,
)
from .metrics import Mean, MetricStore

logger = logging.getLogger(__name__)

RUN_STATE = "run_state.json"

# Options that the optimizer's saved state holds: another value would be overwritten by it.
_RESTORED = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "optim", "optim_args")
# Options that do not change what is learned, by how their names start.
_HARMLESS = (
    "output_dir run_name logging_ log_ report_to project trackio_ save_ do_ disable_tqdm push_to_hub hub_ load_best "
    "metric_for_best greater_is_better sample_ eval_accumulation per_device_eval dataloader_num dataloader_pin "
    "dataloader_prefetch dataloader_persistent dataloader_multiprocessing remove_unused resume_from "
    "debug skip_memory include_ torch_empty_cache ddp_ local_rank ref_cache cache_ref precompute_ref dataset_num_proc "
    "activation_checkpointing activation_offloading gradient_checkpointing checkpoint_layers max_memory_gib "
    "max_unusable_share on_unusable restore_callback jit_mode"
).split()


class ResumableTrainer(Trainer):
    """A `transformers.Trainer` with whole checkpoints, exact logs across interruptions and a clean end on a signal."""

    metric_store: MetricStore

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.metric_store = MetricStore()
        self._signal = StopOnSignal()
        self._saved_step: int | None = None
        self.add_callback(self._signal)

    # ---- What a subclass adds ------------------------------------------------------------------------------------

    def trajectory(self) -> dict[str, Any]:
        """What decides how the run goes on, name to JSON value: compared when a checkpoint is resumed."""
        options = json.loads(json.dumps(self.args.to_dict(), default=str))
        (options.get("model_init_kwargs") or {}).pop("token", None)  # a secret, and checkpoints are published
        kept = {name: value for name, value in options.items() if not name.startswith(tuple(_HARMLESS))}
        # Drawing an evaluation's order moves the random numbers that dropout reads.
        if getattr(self.args, "disable_dropout", False):
            kept = {name: value for name, value in kept.items() if not name.startswith("eval_")}
        return {**kept, "number of processes": world_size()}

    def fixed(self, name: str) -> bool:
        """Whether a resumed run can't have another value of this part of `trajectory`."""
        return name in _RESTORED

    def check_resumable(self, folder: Path) -> None:
        """Raise if the run can't go on from this whole checkpoint."""

    def save_extra(self, folder: Path) -> dict[str, Any]:
        """Write more files into a checkpoint (main process only); what is returned comes back to `load_extra`."""
        return {}

    def load_extra(self, folder: Path, extra: Mapping[str, Any]) -> None:
        """Restore what `save_extra` kept."""

    # ---- Running -------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, or go on with an interrupted run (see `transformers.Trainer.train`).

        On SIGTERM or Ctrl-C the step is finished and saved; a second signal ends the process at once.

        Args:
            resume_from_checkpoint: a checkpoint's folder; True for the newest whole one in `output_dir`; "latest" for
                the same, or a start from scratch if there is none yet. `args.resume_from_checkpoint` if None.

        Raises:
            CheckpointError: the checkpoint is not whole, or one could not be written.
            OptionError: an option differs from the checkpoint's, and the optimizer's state would overrule it.
            TrainingInterrupted: after a signal; a `SystemExit` with the signal's exit status.
        """
        resume = self.args.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint
        folder = gather_over_processes(self._find_checkpoint(resume) if rank() == 0 else None)[0]
        self.metric_store, self._saved_step = MetricStore(), None
        if folder is not None:
            self.check_resumable(Path(folder))
            self._compare(json.loads((Path(folder) / RUN_STATE).read_text())["trajectory"])
        with self._signal.listening():
            output = super().train(folder, *args, **kwargs)
        if self._signal.agree():
            if self._saved_step != self.state.global_step:  # it came after the last step
                self._save_checkpoint(self.model, None)
            self._interrupted()
        return output._replace(training_loss=output.metrics["train_loss"])

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # transformers looks whether the run is over after a step: one killed at its very end would take one more.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        super()._maybe_log_save_evaluate(*args, **kwargs)
        # With save_strategy="best" an evaluation decides, and may have decided against what the signal asked for.
        if self._signal.agreed and self._saved_step != self.state.global_step:
            self._save_checkpoint(self.model, None)

    def _interrupted(self) -> None:
        step = self.state.global_step
        how = "Go on with resume_from_checkpoint='latest'."
        if self.args.save_only_model:
            how = "It can't be resumed, since save_only_model leaves out the optimizer."
        logger.warning("Stopped by %s after step %d; checkpoint-%d is saved. %s", self._signal.name, step, step, how)
        raise TrainingInterrupted(self._signal.exit_status)

    def _find_checkpoint(self, resume: str | bool | None) -> str | None:
        run_dir = Path(self.args.output_dir)
        if not resume or str(resume).lower() == "false":
            if list(run_dir.glob("checkpoint-*")):
                logger.warning(
                    "%s holds checkpoints of an earlier run, and this run starts from scratch: they are mistaken for "
                    "its own when it is resumed. Use another output_dir, or resume_from_checkpoint=True to go on.",
                    run_dir,
                )
            return None
        latest = str(resume).lower() in ("true", "latest")
        if not latest:
            problem = problem_with(str(resume))
            if problem is not None:
                raise CheckpointError(f"resume_from_checkpoint={str(resume)!r} {problem}. {self._remedy()}")
            return str(resume)
        for sentence in recover(run_dir) if run_dir.is_dir() else ():
            logger.warning("%s", sentence)
        found, passed_over = newest_whole(run_dir)
        for path, problem in passed_over:
            logger.warning("%s is passed over: it %s.", path.name, problem)
        if found is None and (passed_over or str(resume).lower() == "true"):
            why = f"none of its {len(passed_over)} checkpoints is whole" if passed_over else "it holds no checkpoint"
            raise CheckpointError(
                f"resume_from_checkpoint={resume!r}: nothing to go on with in {run_dir}, {why}. Start from scratch "
                "with resume_from_checkpoint=None and another output_dir."
            )
        logger.warning("%s", f"Going on from {found}." if found else f"No checkpoint in {run_dir} yet: a new start.")
        return None if found is None else str(found)

    def _remedy(self) -> str:
        found, _ = newest_whole(self.args.output_dir)
        return f"The newest whole checkpoint is {found}." if found else "There is no whole one in output_dir."

    def _compare(self, before: Mapping[str, Any]) -> None:
        """Say which options differ from the interrupted run's; refuse those that would be overruled."""
        now = json.loads(json.dumps(self.trajectory(), default=str))
        changed = [name for name in now if name in before and now[name] != before[name]]
        lines = {name: f"{name}: {before[name]!r} before, {now[name]!r} now" for name in changed}
        if fixed := [lines[name] for name in changed if self.fixed(name)]:
            raise OptionError(
                f"Resuming with other options: {'; '.join(fixed)}. The checkpoint holds what follows from them, so "
                "the new ones would have no effect. Leave them as they were, or start a new run from the checkpoint's "
                "adapter (model=<checkpoint folder>, reference=...)."
            )
        if changed:
            logger.warning("Resuming with options that change the run: %s.", "; ".join(lines.values()))

    # ---- Checkpoints ---------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_dir, step = Path(self._get_output_dir(trial)), self.state.global_step
        run_dir.mkdir(parents=True, exist_ok=True)
        self.store_flos()
        if step == self.state.best_global_step:
            self.state.best_model_checkpoint = str(run_dir / f"checkpoint-{step}")
        metrics = gather_over_processes(self.metric_store.state())
        try:
            if self.args.should_save:
                staging_folder(run_dir, step)
            self.accelerator.wait_for_everyone()
            self._write(staged_checkpoint(run_dir, step), metrics)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                commit(run_dir, step)
            self._saved_step = step
        except (
            OSError,
            RuntimeError,
            SafetensorError,
        ) as error:  # torch's and safetensors' ways to say that a disk is full
            discard(run_dir, step)
            raise CheckpointError(
                f"checkpoint-{step} can't be written: {error}. {self._remedy()} Free some space or mend the folder, "
                "then resume."
            ) from error
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(run_dir / f"checkpoint-{step}"))
        if self.args.should_save:
            best = [Path(self.state.best_model_checkpoint)] if self.state.best_model_checkpoint else []
            rotate(run_dir, self.args.save_total_limit, [run_dir / f"checkpoint-{step}", *best])

    def _write(self, folder: Path, metrics: list[Any]) -> None:
        self.save_model(str(folder), _internal_call=True)
        if not self.args.save_only_model:
            self._save_optimizer_and_scheduler(str(folder))
            self._save_scaler(str(folder))
            self._save_rng_state(str(folder))
        if not self.args.should_save:
            return
        kept = [cb for cb in [*self.callback_handler.callbacks, self.control] if isinstance(cb, ExportableState)]
        by_name: dict[str, list[Any]] = {}
        for callback in kept:
            by_name.setdefault(type(callback).__name__, []).append(callback.state())
        self.state.stateful_callbacks = {n: s if len(s) > 1 else s[0] for n, s in by_name.items()}
        self.state.save_to_json(str(folder / "trainer_state.json"))
        state = {"trajectory": self.trajectory(), "metrics": metrics, "extra": self.save_extra(folder)}
        (folder / RUN_STATE).write_text(json.dumps(state, indent=1, default=str) + "\n")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        if not (folder / "optimizer.pt").is_file():
            raise CheckpointError(
                f"{folder} has no optimizer state: it was saved with save_only_model=True and can't be resumed. Start "
                "a new run from its adapter (model=<checkpoint folder>, reference=...)."
            )
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        state = json.loads((folder / RUN_STATE).read_text())
        for process, sums in enumerate(state["metrics"]):
            if process % world_size() == rank():
                self.metric_store.load(sums)
        self.load_extra(folder, state["extra"])

    # ---- Logs ----------------------------------------------------------------------------------------------------

    def record_loss(self, loss: torch.Tensor, ends_step: bool) -> None:
        """Add this process's part of a micro-batch's loss; `ends_step` with the last one of an optimizer step."""
        steps = float(ends_step and rank() == 0)
        mean = {"loss": Mean(loss.detach(), torch.tensor(steps, device=loss.device))}
        self.metric_store.add("train", mean)
        self.metric_store.add("run", mean)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics since the last log to a training log. Losses are means over the steps of the whole run,
        those before an interruption included."""
        if "loss" in logs:
            logs.update(self.metric_store.pop("train"))
        if "train_loss" in logs:
            logs["train_loss"] = self.metric_store.pop("run").get("loss", float("nan"))
        super().log(logs, start_time)
