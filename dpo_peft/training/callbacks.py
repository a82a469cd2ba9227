"""Callbacks that act on a run: they stop it at numbers that are not finite, at a signal, or when a held-out metric
gets no better, and they move a reference that follows the policy."""

import logging
import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState

from ..config import DPOConfig
from ..data import DataSummary
from ..distributed import any_process, gather_over_processes, rank
from ..errors import DataError, NonFiniteError, OptionError, TrainingInterrupted
from ..forward import PackedBatch
from ..reference.policy import ReferencePolicy
from .accumulation import OptimizerStep
from .checkpoints import newest_whole

logger = logging.getLogger(__name__)


class StopOnNonFinite(TrainerCallback):
    """Looks once before every optimizer step at the losses and gradients of its micro-batches, and behind it at the
    weights."""

    def __init__(self, step: OptimizerStep):
        self.step = step

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, *_: object, **kwargs: object) -> None:
        """Raises `NonFiniteError`, in all processes, before the optimizer takes a step that is not finite."""
        parts, self.step.finite = self.step.finite, []
        # A process whose share of the batch is empty has nothing.
        all_finite = torch.cat([finite for _, finite in parts]).all() if parts else torch.ones((), dtype=torch.bool)
        # Under fp16 the gradient scaler expects overflows and skips such steps by itself.
        if not self.step.args.fp16:
            norm = self.step.take_grad_norm()
            all_finite = all_finite & torch.isfinite(norm).to(all_finite.device)
        if any_process(not all_finite):
            self._stop(args, state, parts)

    def on_optimizer_step(self, args: Any, state: TrainerState, *_: object, **kwargs: object) -> None:
        """Raises `NonFiniteError` when the step left weights that are not finite, before they are saved anywhere.

        All processes hold the same weights, so none needs to ask the others."""
        own = self.step.model.named_parameters()
        trained = {name: tensor.detach() for name, tensor in own if tensor.requires_grad}
        if torch.isfinite(torch.stack(torch._foreach_norm([*trained.values()])).sum()):
            return
        bad = [name for name, tensor in trained.items() if not torch.isfinite(tensor).all()]
        if bad:  # else there are numbers so large that their squares are not finite
            kept = " The last checkpoint is from before it." if newest_whole(args.output_dir)[0] else ""
            raise NonFiniteError(
                f"Step {state.global_step + 1} made {len(bad)} of {len(trained)} trained tensors NaN or infinite, "
                f"such as {bad[0]}.{kept} Lower learning_rate, or raise adam_epsilon."
            )

    def _stop(self, args: Any, state: TrainerState, parts: list[tuple[PackedBatch, torch.Tensor]]) -> None:
        own: list[tuple[int, bool]] = []
        for batch, finite in parts:
            own += zip(self.step.objective.kind.rows(batch).tolist(), finite.tolist(), strict=True)
        rows = [pair for process in gather_over_processes(own) for pair in process]
        bad = [row for row, finite in rows if not finite]
        what = "loss" if bad else "gradient"
        bad = bad or [row for row, _ in rows]
        kept = "; the last checkpoint is intact" if newest_whole(args.output_dir)[0] else ""
        raise NonFiniteError(
            f"Step {state.global_step + 1}: the {what} is not finite, on training rows {', '.join(map(str, bad))}. "
            f"The optimizer has not stepped{kept}. Look at these rows, lower learning_rate, or use bf16 instead of "
            "fp16."
        )


class CountStream(TrainerCallback):
    """Counts what a stream drops as it is read (`Preparation.count`), and holds it to `max_unusable_share`."""

    def __init__(self, count: Callable[[str, bool], DataSummary]):
        self.count = count

    def on_step_end(self, args: object, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """Judges once enough rows are read."""
        self.count("train", False)

    def on_epoch_end(self, args: object, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """Judges a pass that is over, however short."""
        self.count("train", not control.should_training_stop)

    def on_train_end(self, args: object, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """Says what became of the rows; what is trained is kept, so the share is no more than warned of."""
        try:
            logger.info("%s", self.count("train", True))
        except DataError as error:
            logger.warning("%s", error)


class StopOnSignal(TrainerCallback):
    """SIGTERM and Ctrl-C end a run after the step that they fall into, with a checkpoint. A second acts at once."""

    def __init__(self) -> None:
        self._received: int | None = None
        self.agreed = False  # all processes know of it

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, the signals are kept for `on_step_end`. Without effect outside the main thread."""
        self._received, self.agreed = None, False
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {each: signal.getsignal(each) or signal.SIG_DFL for each in (signal.SIGTERM, signal.SIGINT)}

        def receive(number: int, frame: object) -> None:
            self._received = number
            for each, handler in before.items():
                signal.signal(each, handler)

        try:
            for number in before:
                signal.signal(number, receive)
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def on_step_end(self, args: object, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """Saves and stops, all processes at the same step."""
        if self.agree():
            control.should_save = control.should_training_stop = True

    def agree(self) -> bool:
        """Returns whether a signal came to any of the processes. All of them must ask."""
        self.agreed = self.agreed or any_process(self._received is not None)
        if self.agreed and self._received is None:
            self._received = signal.SIGTERM  # another process was told
        return self.agreed

    def leave(self, step: int, resumable: bool) -> None:
        """Ends the run, whose checkpoint is saved: raises `TrainingInterrupted` with the exit status that a shell
        gives for a process that the signal ended."""
        how = "Resume with resume_from_checkpoint='latest'."
        if not resumable:
            how = "It can't be resumed, since save_only_model leaves out the optimizer."
        name = "Ctrl-C" if self._received == signal.SIGINT else "SIGTERM"
        logger.warning("Stopped by %s after step %d; checkpoint-%d is saved. %s", name, step, step, how)
        raise TrainingInterrupted(128 + (self._received or 0))


class SyncReference(TrainerCallback):
    """TR-DPO: every `steps` steps the frozen reference moves toward the policy (Gorbatovski et al. 2024)."""

    def __init__(self, reference: ReferencePolicy, alpha: float, steps: int):
        self.reference, self.alpha, self.steps = reference, alpha, steps

    def on_step_end(self, args: object, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """Mixes if it is time."""
        if state.global_step % self.steps == 0:
            self.reference.mix(self.alpha)


class EarlyStop(TrainerCallback):
    """Ends a run when a held-out metric (its name in an evaluation's figures, with `eval_`) has not become better, by
    more than a threshold, for `patience` evaluations in a row, at least 1.

    Not the callback of transformers: that one forgets its count when a run is resumed, and moves its mark with gains
    below the threshold, so that many small ones never count.
    """

    def __init__(self, metric: str, greater: bool, patience: int, threshold: float):
        self.metric, self.sign, self.patience, self.threshold = metric, 1 if greater else -1, patience, threshold
        self.reset()

    @classmethod
    def from_options(cls, args: DPOConfig) -> list["EarlyStop"]:
        """Returns the callback if the options ask for it."""
        if args.early_stopping_patience is None:
            return []
        metric = f"eval_{str(args.metric_for_best_model).removeprefix('eval_')}"
        threshold = args.early_stopping_threshold
        return [cls(metric, bool(args.greater_is_better), args.early_stopping_patience, threshold)]

    def state_dict(self, folder: Path) -> dict[str, Any]:
        """Returns how long it has waited, as JSON values."""
        names = ("best", "best_step", "waited", "step")
        return {"stop_early": {name: getattr(self, name) for name in names}}

    def load_state_dict(self, state: Mapping[str, Any], folder: Path) -> None:
        """Takes up a run's state."""
        self.reset(**(state.get("stop_early") or {}))

    def reset(self, best: float | None = None, best_step: int | None = None, waited: int = 0, step: int = -1) -> None:
        """Forgets an earlier run; `step` is that of the newest evaluation that counted."""
        self.best, self.best_step, self.waited, self.step = best, best_step, waited, step

    @property
    def done(self) -> bool:
        """Says whether the run is to end."""
        return self.waited >= self.patience

    def on_train_begin(self, args: object, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """A run that was killed after it was told to stop takes no further step when it is resumed."""
        if state.global_step == 0:
            self.reset()
        control.should_training_stop = control.should_training_stop or self.done

    def on_evaluate(self, args: object, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Counts. An evaluation of another dataset lacks the metric; one of a step that has been seen says no more."""
        value = kwargs["metrics"].get(self.metric)
        if value is None or state.global_step <= self.step:
            return
        self.step = state.global_step
        gain = -math.inf if not math.isfinite(value) else self.sign * (value - (self.best or 0.0))
        if math.isfinite(gain) and (self.best is None or gain > self.threshold):
            self.best, self.best_step, self.waited = float(value), self.step, 0
            return
        self.waited += 1
        if not self.done:
            return
        control.should_training_stop = True
        if rank() == 0:
            best = "was never finite" if self.best is None else f"was best, {self.best:.4g}, at step {self.best_step}"
            logger.info(
                "Stopped early after step %d: %s %s, and %d evaluations in a row were not better (threshold %g).",
                *(self.step, self.metric, best, self.waited, self.threshold),
            )


def check_reported(name: str | None, metrics: Mapping[str, float], step: int) -> None:
    """Refuses a `metric_for_best_model` that an evaluation turned out to lack, by an `OptionError` with those that it
    has."""
    if name is not None and f"eval_{name.removeprefix('eval_')}" not in metrics:
        raise OptionError(
            f"metric_for_best_model={name!r}: the evaluation of step {step} lacks it, as no held-out row tells "
            f"anything of it. It has {', '.join(sorted(metrics))}."
        )
