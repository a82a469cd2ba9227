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

from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import has_length

from ..training.throughput import Throughput
from .log_file import SHOWN

# Column to its width, in their order; "step" is as wide as the number of steps and the names of sets need.
WIDTHS = {"step": 0, "epoch": 5, "loss": 6, "margin": 6, "acc": 5, "KL": 5, "grad": 6, "lr": 7}
WIDTHS |= {"tok/s": 6, "bound": 5, "GiB": 5, "left": 6}
IMPORTANCE = "step loss margin acc KL left tok/s GiB bound lr epoch grad".split()  # the last go first
METRICS = {"loss": "loss", "margin": "rewards/margins", "acc": "rewards/accuracies", "KL": "kl", "grad": "grad_norm"}
METRICS |= {"GiB": "peak_memory_gib"}
GAP, LONGEST_LABEL = "  ", 16
HEADED = 20  # lines between two heads


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
    """Lays out logs in columns, of which those are left out that don't fit into the terminal (None: all do) or
    `without` which nothing is known. `labels` are the names of what is evaluated."""

    def __init__(self, max_steps: int, labels: Iterable[str], width: int | None, without: Iterable[str] = ()):
        longest = min(max(map(len, labels), default=0), LONGEST_LABEL)
        self.max_steps, self.widths = (
            max_steps,
            {**WIDTHS, "step": max(len("step"), 2 * len(str(max_steps)) + 1, longest)},
        )
        kept = [name for name in IMPORTANCE if name not in without]
        while width is not None and sum(self.widths[name] for name in kept) + len(GAP) * (len(kept) - 1) > width:
            kept.pop()
        self.names = [name for name in WIDTHS if name in kept]

    @property
    def head(self) -> str:
        """Returns the names of the columns."""
        return self._row({name: name for name in self.names}, self.names)

    def training(self, step: int, logs: Mapping[str, float], left: float | None = None) -> str:
        """Returns the line of a training log; `left` are the seconds that the run will take from here, if known."""
        cells = {name: figure(logs.get(key), self.widths[name]) for name, key in METRICS.items()}
        cells |= {"step": f"{step}/{self.max_steps}", "epoch": figure(logs.get("epoch"), 5)}
        cells["lr"] = f"{logs['learning_rate']:.1e}" if "learning_rate" in logs else "-"
        if speed := logs.get("tokens_per_second"):
            cells["tok/s"] = f"{speed:,.0f}" if speed < 99_999.5 else f"{speed / 1000:,.0f}k"
        if "share_of_bound" in logs:
            cells["bound"] = f"{logs['share_of_bound']:.0%}"
        return self._row(cells | ({} if left is None else {"left": span(left)}), self.names)

    def evaluation(self, step: int, prefix: str, logs: Mapping[str, float]) -> str:
        """Returns the line of an evaluation: under the columns of the training's, and beside them its own."""
        own = {name.removeprefix(f"{prefix}_"): value for name, value in logs.items() if name.startswith(f"{prefix}_")}
        names: list[str] = [name for name in ("step", "epoch", "loss", "margin", "acc", "KL") if name in self.names]
        cells = {name: figure(own.get(METRICS[name]), self.widths[name]) for name in names if name in METRICS}
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


# ---- Callbacks ------------------------------------------------------------------------------------------------------


class Shows(TrainerCallback):
    """Shows logs in columns; what it shows goes to `log_file` too. `labels` are prefixes of the metrics of what is
    evaluated; which columns are known, `throughput` and `without` tell."""

    def __init__(
        self,
        throughput: Throughput,
        labels: Sequence[str],
        without: Sequence[str] = (),
        clock: Callable[[], float] = time.perf_counter,
    ):
        super().__init__()
        self.throughput, self.labels, self.without, self._clock = throughput, labels, list(without), clock
        self.columns = Columns(0, labels, None, self.without)
        self._since_head = HEADED
        self.evaluating = ""  # what it is called

    def write(self, line: str) -> None:
        """Shows a line; by subclasses."""
        raise NotImplementedError

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Begins a run."""
        self._begun_at, self._begun = state.global_step, 0.0
        unknown = [] if self.throughput.rate else ["bound"]
        unknown += [] if args.device.type == "cuda" else ["GiB"]
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        self.columns = Columns(state.max_steps, map(label_of, self.labels), width, {*self.without, *unknown})
        self._since_head = HEADED

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Begins the time of which what is left is estimated: evaluations and checkpoints are in both."""
        self._begun = self._begun or self._clock()

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any) -> None:
        """Shows a line."""
        if "loss" in logs:
            done = max(state.global_step - self._begun_at, 1)
            left = (self._clock() - self._begun) / done * (state.max_steps - state.global_step)
            self._show(state, self.columns.training(state.global_step, logs, left))
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
