"""What is watched while a run goes on: numbers that are not finite, signals, when the reference follows the policy,
when a held-out metric gets no better."""

import logging
import math
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..distributed import any_process, gather_over_processes, rank
from ..errors import NonFiniteError
from ..reference.frozen_adapter import mix_into

logger = logging.getLogger(__name__)


class StopWhenNonFinite(TrainerCallback):
    """Before every optimizer step: one look at the losses and gradients of its micro-batches."""

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer = self.trainer
        # A process whose share of the batch is empty has nothing.
        rows, finite = torch.empty(0, dtype=torch.long), torch.ones(0, dtype=torch.bool)
        if trainer.step_finite:
            rows, finite = map(torch.cat, zip(*trainer.step_finite, strict=True))
            trainer.step_finite = []
        all_finite = finite.all()
        # Under fp16 the gradient scaler expects overflows and skips such steps by itself.
        if not args.fp16:
            norm = trainer.take_grad_norm()
            all_finite = all_finite & torch.isfinite(norm).to(all_finite.device)
        if any_process(not all_finite):
            self._stop(state, rows, finite)

    def _stop(self, state: TrainerState, rows: torch.Tensor, finite: torch.Tensor) -> None:
        gathered = gather_over_processes((rows[~finite].tolist(), rows.tolist()))
        bad = [row for process in gathered for row in process[0]]
        what = "loss" if bad else "gradient"
        bad = bad or [row for process in gathered for row in process[1]]
        raise NonFiniteError(
            f"Step {state.global_step + 1}: the {what} is not finite, on training rows {', '.join(map(str, bad))}. "
            "The optimizer has not stepped; the last checkpoint is intact. Look at these rows, lower learning_rate, "
            "or use bf16 instead of fp16."
        )


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

        def receive(number: int, frame: Any) -> None:
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

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save and stop, all processes at the same step."""
        if self.agree():
            control.should_save = control.should_training_stop = True

    def agree(self) -> bool:
        """Whether a signal came to any of the processes. All of them must ask."""
        self.agreed = self.agreed or any_process(self._received is not None)
        if self.agreed and self._received is None:
            self._received = signal.SIGTERM  # another process was told
        return self.agreed

    @property
    def name(self) -> str:
        """Which one, for people."""
        return "Ctrl-C" if self._received == signal.SIGINT else "SIGTERM"

    @property
    def exit_status(self) -> int:
        """What a shell gives for a process that the signal ended."""
        return 128 + (self._received or 0)


class SyncReference(TrainerCallback):
    """TR-DPO: every `steps` steps the frozen reference moves towards the policy (Gorbatovski et al. 2024)."""

    def __init__(self, model: Any, policy: str, frozen: str, alpha: float, steps: int):
        self.mix = lambda: mix_into(model, policy, frozen, alpha)
        self.steps = steps

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Mix if it is time."""
        if state.global_step % self.steps == 0:
            self.mix()


class StopEarly(TrainerCallback):
    """Ends a run when a held-out metric has not become better for `patience` evaluations in a row.

    Not the callback of transformers: that one forgets its count when a run is resumed, and moves its mark with gains
    below the threshold, so that many small ones never count.

    Args:
        metric: its name in an evaluation's figures, with `eval_`.
        greater: whether more is better.
        patience: evaluations without a better one, at least 1.
        threshold: by how much a better one must be better.
    """

    def __init__(self, metric: str, greater: bool, patience: int, threshold: float):
        self.metric, self.sign, self.patience, self.threshold = metric, 1 if greater else -1, patience, threshold
        self.load({})

    def state(self) -> dict[str, Any]:
        """What `load` takes back, as JSON values."""
        return {"best": self.best, "best_step": self.best_step, "waited": self.waited, "step": self.step}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take up a run's state; a new run's if empty."""
        self.best: float | None = state.get("best")
        self.best_step: int | None = state.get("best_step")
        self.waited: int = state.get("waited", 0)
        self.step: int = state.get("step", -1)  # of the newest evaluation that counted

    @property
    def done(self) -> bool:
        """Whether the run is to end."""
        return self.waited >= self.patience

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A run that was killed after it was told to stop takes no further step when it is resumed."""
        control.should_training_stop = control.should_training_stop or self.done

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Count. An evaluation of another dataset lacks the metric; one of a step that has been seen says no more."""
        value = (metrics or {}).get(self.metric)
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
            logger.warning(
                "Stopped early after step %d: %s %s, and %d evaluations in a row were not better (threshold %g).",
                self.step,
                self.metric,
                best,
                self.waited,
                self.threshold,
            )
