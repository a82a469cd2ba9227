"""What a run shows while it trains: a line a log, a line an evaluation, in columns that fit the terminal.

It takes the place of transformers' own callbacks, which print every metric. Trackers, `log_history` and metrics.json
get all of them as ever. docs/diagnostics.md#while-it-runs explains the columns.
"""

import math
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from transformers.trainer_utils import has_length

from ..distributed import world_size
from .log_file import SHOWN

# Column to its width, in their order; "step" is as wide as the number of steps and the names of sets need.
WIDTHS = {"step": 0, "epoch": 5, "loss": 6, "margin": 6, "acc": 5, "KL": 5, "grad": 6, "lr": 7}
WIDTHS |= {"tok/s": 6, "bound": 5, "GiB": 5, "left": 6}
IMPORTANCE = "step loss margin acc KL left tok/s GiB bound lr epoch grad".split()  # the last go first
METRICS = {"loss": "loss", "margin": "rewards/margins", "acc": "rewards/accuracies", "KL": "kl", "grad": "grad_norm"}
GAP, LONGEST_LABEL = "  ", 16
HEADED = 20  # lines between two heads
PRODUCT = (8192, 4096, 8192)  # of the matrices that a GPU's rate is measured with: as large as those of an 8B model


def figure(value: float | None, width: int = 6) -> str:
    """Returns a number with as many decimals as fit, at most four."""
    if value is None:
        return "-"
    if not math.isfinite(value) or 0 < abs(value) < 10.0 ** -(width - 3):
        return f"{value:.0e}" if math.isfinite(value) else str(float(value))
    texts = (f"{value:.{decimals}f}" for decimals in range(min(4, width - 2), -1, -1))
    return next((text for text in texts if len(text) <= width), f"{value:.0e}")


def span(seconds: float) -> str:
    """Returns a time in at most six characters."""
    if seconds < 100:
        return f"{seconds:.0f}s"
    minutes = round(seconds / 60)
    hours, rest = divmod(minutes, 60)
    return f"{minutes}m" if minutes < 100 else f"{hours}h{rest:02d}m" if hours < 100 else f"{hours}h"


class Columns:
    """Lays out logs in columns.

    Args:
        max_steps: of the run.
        labels: names of what is evaluated.
        width: of the terminal; None shows all columns.
        without: columns about which nothing is known.
    """

    def __init__(self, max_steps: int, labels: Iterable[str], width: int | None, without: Iterable[str] = ()):
        longest = max(
            [len("step"), 2 * len(str(max_steps)) + 1, *(min(len(label), LONGEST_LABEL) for label in labels)]
        )
        self.max_steps, self.widths = max_steps, {**WIDTHS, "step": longest}
        kept = [name for name in IMPORTANCE if name not in without]
        while width is not None and sum(self.widths[name] for name in kept) + len(GAP) * (len(kept) - 1) > width:
            kept.pop()
        self.names = [name for name in WIDTHS if name in kept]

    @property
    def head(self) -> str:
        """Returns the names of the columns."""
        return self._row({name: name for name in self.names}, self.names)

    def training(self, step: int, logs: Mapping[str, float], about: Mapping[str, str]) -> str:
        """Returns the line of a training log; `about` are cells of columns that it doesn't fill itself."""
        cells = {name: figure(logs.get(key), self.widths[name]) for name, key in METRICS.items()}
        cells |= {"step": f"{step}/{self.max_steps}", "epoch": figure(logs.get("epoch"), 5)}
        cells["lr"] = f"{logs['learning_rate']:.1e}" if "learning_rate" in logs else "-"
        return self._row({**cells, **about}, self.names)

    def evaluation(self, step: int, prefix: str, logs: Mapping[str, float]) -> str:
        """Returns the line of an evaluation: under the columns of the training's, and beside them its own."""
        own = {name.removeprefix(f"{prefix}_"): value for name, value in logs.items() if name.startswith(f"{prefix}_")}
        names = [name for name in ("step", "epoch", "loss", "margin", "acc", "KL") if name in self.names]
        shown: list[str] = [name for name in names if name in METRICS]
        cells: dict[str, str] = {
            "epoch": "",
            **{name: figure(own.get(METRICS[name]), self.widths[name]) for name in shown},
        }
        length = own.get("accuracies/length_only")
        notes = [f"length alone {length:.3f}"] if length is not None else []
        notes += [f"{own['runtime']:.1f} s" if own["runtime"] < 100 else span(own["runtime"]), f"step {step}"]
        return f"{self._row({**cells, 'step': label_of(prefix), 'epoch': ''}, names)}{GAP}{', '.join(notes)}"

    def _row(self, cells: Mapping[str, str], names: Sequence[str]) -> str:
        return GAP.join(cells.get(name, "-").rjust(self.widths[name]) for name in names)


def label_of(prefix: str) -> str:
    """Returns what an evaluation is called, by the prefix of its metrics."""
    name = prefix.removeprefix("eval_")
    return name if len(name) <= LONGEST_LABEL else name[: LONGEST_LABEL - 1] + "…"


class Pace:
    """Measures how fast a run is: tokens a second, share of the bound, memory and time left.

    Args:
        model: that is trained.
        passes: over the weights, for a token: 3 with a reference pass (two forward passes, and the backward pass,
            which skips the frozen weights), else 2.
        clock: gives seconds.
    """

    def __init__(self, model: PreTrainedModel, passes: int, clock: Callable[[], float] = time.perf_counter):
        self._model, self._passes, self._clock = model, passes, clock
        self.rate: float | None = None  # FLOP/s of all GPUs; None where the share of the bound is not known
        self.peak = 0  # bytes
        self.tokens = self.seconds = 0.0  # of the steps since `begin`

    def begin(self, state: TrainerState) -> None:
        """Begins a run, or resumes one."""
        self._counted = self._model.num_parameters(exclude_embeddings=True)  # as `floating_point_ops` does
        self._flops, self.tokens, self.seconds = state.total_flos, 0.0, 0.0
        head, embedded = self._model.get_output_embeddings().weight, self._model.get_input_embeddings().weight
        self._weights = self._counted - (0 if head is embedded else head.numel())  # completions alone pass the head
        experts = getattr(self._model.config.get_text_config(), "num_experts_per_tok", None)
        on_gpu = self._model.device.type == "cuda"
        self.rate = gpu_rate(self._model.device) if on_gpu and not experts else None
        self._first = self._since = self._stopped = self._clock()
        self._begun_at, self._paused, self._started = state.global_step, False, False

    def step_begins(self) -> None:
        """Takes out of the time what an evaluation or a checkpoint took."""
        now = self._clock()
        if not self._started:
            self._started, self._first, self._since = True, now, now
        if self._paused:
            self._since += now - self._stopped
            self._paused = False

    def step_ends(self) -> None:
        """Stops the time, should an evaluation or a checkpoint follow."""
        self._stopped = self._clock()

    def pause(self) -> None:
        """An evaluation or a checkpoint has taken place since the last step."""
        self._paused = True

    def cells(self, state: TrainerState) -> dict[str, str]:
        """Returns what is known since the last log, by column."""
        now = self._clock()
        seconds, self._since, self._stopped = now - self._since, now, now
        tokens, self._flops = (state.total_flos - self._flops) / (6 * self._counted), state.total_flos
        self.tokens, self.seconds = self.tokens + tokens, self.seconds + seconds
        done, cells = state.global_step - self._begun_at, {}
        if tokens and seconds > 0:
            speed = tokens / seconds
            cells["tok/s"] = f"{speed:,.0f}" if speed < 99_999.5 else f"{speed / 1000:,.0f}k"
            if self.rate:
                share = 2 * self._passes * self._weights * speed / self.rate
                cells["bound"] = f"{share:.0%}"
        if self._model.device.type == "cuda":
            self.peak = max(self.peak, torch.cuda.max_memory_allocated(self._model.device))
            cells["GiB"] = figure(self.peak / 2**30, 5)
        if done:
            cells["left"] = span((now - self._first) / done * (state.max_steps - state.global_step))
        return cells


def gpu_rate(device: torch.device) -> float | None:
    """Returns the rate of large bfloat16 matrix products, FLOP/s of all GPUs of the run; None if there is no memory to
    measure it. It takes some 50 ms."""
    m, k, n = PRODUCT
    try:
        # No random numbers: those of the run would be others.
        a, b = (torch.linspace(-1, 1, r * c, device=device).view(r, c).bfloat16() for r, c in ((m, k), (k, n)))
        seconds = []
        for _ in range(5):
            torch.cuda.synchronize(device)
            start = time.perf_counter()
            for _ in range(4):
                a @ b
            torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - start)
    except torch.OutOfMemoryError:
        return None
    return 4 * 2 * m * k * n / min(seconds) * world_size()


# ---- Callbacks ------------------------------------------------------------------------------------------------------


class Shows(TrainerCallback):
    """Shows logs in columns; what it shows goes to `log_file` too.

    Args:
        pace: of the run.
        labels: prefixes of the metrics of what is evaluated.
        without: columns about which nothing is known.
    """

    def __init__(self, pace: Pace, labels: Sequence[str], without: Sequence[str] = ()):
        super().__init__()
        self.pace, self.labels, self.without = pace, labels, list(without)
        self.columns = Columns(0, labels, None, self.without)
        self._since_head = HEADED
        self.evaluating = ""  # what it is called

    def write(self, line: str) -> None:
        """Shows a line; by subclasses."""
        raise NotImplementedError

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Begins a run."""
        self.pace.begin(state)
        unknown = [] if self.pace.rate else ["bound"]
        unknown += [] if args.device.type == "cuda" else ["GiB"]
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        self.columns = Columns(state.max_steps, map(label_of, self.labels), width, {*self.without, *unknown})
        self._since_head = HEADED

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Lets the time run."""
        self.pace.step_begins()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Stops the time."""
        super().on_step_end(*args, **kwargs)
        self.pace.step_ends()

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        """Takes a checkpoint out of the time."""
        self.pace.pause()

    def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Takes an evaluation out of the time."""
        super().on_evaluate(*args, **kwargs)
        self.pace.pause()

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any) -> None:
        """Shows a line."""
        if "loss" in logs:
            cells = self.pace.cells(state)
            self._show(state, self.columns.training(state.global_step, logs, cells))
        for name in logs:
            if name.endswith("_runtime") and name != "train_runtime":
                prefix = name.removesuffix("_runtime")
                self._show(state, self.columns.evaluation(state.global_step, prefix, logs))
        if "train_loss" in logs and state.is_world_process_zero:
            self._say(
                f"{state.global_step:,} steps in {span(logs['train_runtime'])}, mean loss {logs['train_loss']:.4f}"
            )

    def _show(self, state: TrainerState, line: str) -> None:
        if not state.is_world_process_zero:
            return
        if self._since_head >= HEADED:
            self._say(self.columns.head)
            self._since_head = 0
        self._since_head += 1
        self._say(line)

    def _say(self, line: str) -> None:
        self.write(line)
        SHOWN.info("%s", line)


class Console(Shows, ProgressCallback):
    """Shows lines above progress bars; the bars only on a terminal."""

    prediction_bar: Any

    def write(self, line: str) -> None:
        """Prints above the bars."""
        tqdm.write(line)

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Begins the run's bar."""
        super().on_train_begin(args, state, control, **kwargs)
        self.current_step = 0
        if state.is_world_process_zero:  # `disable=None`: a file gets no bars
            self.training_bar = tqdm(total=state.max_steps, desc="train", dynamic_ncols=True, disable=None)

    def on_prediction_step(
        self, args: Any, state: TrainerState, control: TrainerControl, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Moves the bar of an evaluation, which bears the name of what is evaluated."""
        if state.is_world_process_zero and self.prediction_bar is None and has_length(eval_dataloader):
            self.prediction_bar = tqdm(
                total=len(eval_dataloader), desc=self.evaluating, leave=False, dynamic_ncols=True, disable=None
            )
        super().on_prediction_step(args, state, control, eval_dataloader, **kwargs)


class PlainConsole(Shows, PrinterCallback):
    """Shows lines, and no bars (`disable_tqdm`)."""

    def write(self, line: str) -> None:
        """Prints."""
        print(line, flush=True)
