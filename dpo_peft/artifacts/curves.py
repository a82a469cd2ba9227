"""Draws training curves as one PNG, from the trainer's log history.

Left out on purpose: smoothing (a smoothed curve hides the step at which a run broke) and interactive formats.
"""

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from ..errors import OptionError
from ..files import write_atomically
from .card import BOOKKEEPING

# Okabe and Ito (2008): told apart with every common color vision deficiency, and in gray.
BLUE, ORANGE, GREEN, GRAY = "#0072B2", "#D55E00", "#009E73", "#767676"
COLORS = {"blue": BLUE, "orange": ORANGE, "green": GREEN, "gray": GRAY}
INK, RULE = "#22262B", "#D9DCE0"
PANEL_INCHES = (4.9, 3.05)
KEY_INCHES = 0.35
DPI = 120
GUIDE: dict[str, Any] = {"color": GRAY, "linewidth": 1.0, "linestyle": (0, (1, 2)), "zorder": 1.5}
RING: dict[str, Any] = dict(
    linestyle="none", marker="o", markersize=6, markerfacecolor="white", markeredgewidth=1.7, zorder=5
)


@dataclass(frozen=True)
class Curve:
    """Describes one line of a panel, see panels.yaml; its color is a name in `COLORS`."""

    key: str
    label: str
    color: str
    dashed: bool = False


@dataclass(frozen=True)
class Panel:
    """Describes one panel, see panels.yaml; `in_picture`: also in curves.png, not only in a report."""

    title: str
    curves: tuple[Curve, ...]
    guide: float | None = None
    guide_label: str = ""
    limits: tuple[float, float] | None = None
    in_picture: bool = True


def _panel(curves: list[dict[str, Any]], limits: Sequence[float] = (), **options: Any) -> Panel:
    low_and_high = (limits[0], limits[1]) if limits else None
    return Panel(curves=tuple(Curve(**curve) for curve in curves), limits=low_and_high, **options)


PANELS = [_panel(**panel) for panel in yaml.safe_load(Path(__file__).with_name("panels.yaml").read_text("utf-8"))]
Series = list[tuple[float, float]]  # (step, value) by step; a value may be NaN or infinite
Metrics = dict[str, dict[str, Series]]  # metric -> source -> values, see `metric_series`


def plot_training_curves(
    log_history: Sequence[Mapping[str, float]], path: str | Path, start_loss: float | None = None
) -> Path:
    """Draws the metrics of a run over its steps and returns the path of the PNG.

    Args:
        log_history: `trainer.state.log_history`, a list of dicts. Each has `step` and metrics under TRL's names
            (`loss`, `rewards/margins`, …); keys that begin with `eval_` are evaluation and are drawn as points.
            Values that are not finite are left out of the curves.
        path: where the PNG goes; missing folders are made.
        start_loss: the loss of a policy that equals its reference, such as ln 2, drawn as a guide.

    Raises:
        OptionError: the history has no metric that any panel shows.
    """
    panels = [replace(PANELS[0], guide=start_loss), *(panel for panel in PANELS[1:] if panel.in_picture)]
    metrics = metric_series(log_history)
    found = [(panel, curves) for panel in panels if (curves := _curves_with_values(panel, metrics))]
    if not found:
        keys = sorted({key for entry in log_history for key in entry})
        raise OptionError(
            f"log_history has nothing to plot: {len(log_history)} entries with the keys {keys}. "
            "Expected `step` and metrics such as `loss`; train at least one step with `logging_steps` set."
        )
    columns = len(found) if len(found) < 4 else 2 if len(found) == 4 else 3
    rows = -(-len(found) // columns)
    evaluated = any(evaluation for _, curves in found for _, _, evaluation in curves)
    size = (PANEL_INCHES[0] * columns, PANEL_INCHES[1] * rows + KEY_INCHES * evaluated)
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.14, h_pad=0.12)  # type: ignore[union-attr, call-arg]
    for i, (panel, curves) in enumerate(found):
        _draw_panel(figure.add_subplot(rows, columns, i + 1), panel, curves)
    if evaluated:
        # Says once, below all panels, what lines and rings are.
        handles = [Line2D([], [], color=INK, label="training"), Line2D([], [], color=INK, label="evaluation", **RING)]
        figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=9, labelcolor=INK)
    return save(figure, Path(path))


def metric_series(log_history: Sequence[Mapping[str, float | None]], sets: Iterable[str] = ()) -> Metrics:
    """Sorts a log: metric -> source -> [(step, value)], training first, then in the order of the log.

    A source is "train", "eval", or one of `sets`: "eval_NAME" for one of several evaluation sets. Of two values at a
    step the later one counts; JSON's null is NaN.
    """
    found: dict[str, dict[str, dict[float, float]]] = {}
    keys: dict[str, tuple[str, str]] = {}  # a long log has few
    for entry in log_history:
        step = entry.get("step")
        for key, value in entry.items():
            if key not in keys:
                source, metric = source_of(key, sets)
                keys[key] = source, "" if BOOKKEEPING.match(metric) and metric != "learning_rate" else metric
            source, metric = keys[key]
            if metric and _is_number(step) and (value is None or _is_number(value)):
                values = found.setdefault(metric, {}).setdefault(source, {})
                values[float(step)] = math.nan if value is None else float(value)
    return {
        metric: {source: sorted(by[source].items()) for source in sorted(by, key=lambda source: source != "train")}
        for metric, by in found.items()
    }


def source_of(key: str, sets: Iterable[str] = ()) -> tuple[str, str]:
    """Returns (source, metric) of a key of the log: `eval_helpful_loss` is the loss on the set "helpful"."""
    for name in sorted(sets, key=len, reverse=True):
        if key.startswith(f"{name}_"):
            return name, key.removeprefix(f"{name}_")
    return ("eval", key.removeprefix("eval_")) if key.startswith("eval_") else ("train", key)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def initial_loss(loss_type: object) -> float | None:
    """Returns the loss of a policy that equals its reference: of DPO as such it is known."""
    return math.log(2) if loss_type in (["sigmoid"], ["trajectory"], "sigmoid", "trajectory") else None


def _curves_with_values(panel: Panel, metrics: Metrics) -> list[tuple[Curve, Series, Series]]:
    """Returns curve, training and evaluation, finite values only; nothing if only a baseline has any."""
    found = []
    for curve in panel.curves:
        of_sources = [metrics.get(curve.key, {}).get(source, []) for source in ("train", "eval")]
        training, evaluation = ([point for point in series if math.isfinite(point[1])] for series in of_sources)
        if training or evaluation:
            found.append((curve, training, evaluation))
    return found if any(not curve.dashed for curve, *_ in found) else []


def _draw_panel(axes: Axes, panel: Panel, curves: Sequence[tuple[Curve, Series, Series]]) -> None:
    """Draws one panel: training as lines, evaluation as ringed points in the same color, the guide behind both."""
    style_axes(axes, panel.title)
    for curve, training, evaluation in curves:
        color = COLORS[curve.color]
        label = curve.label if len(curves) > 1 else None  # one curve is named by the panel's title
        if training:
            dashes = (0, (4, 2)) if curve.dashed else "solid"
            marker = "." if len(training) == 1 else None
            axes.plot(*zip(*training, strict=True), color=color, linestyle=dashes, marker=marker, label=label)
            label = None
        if evaluation:
            axes.plot(*zip(*evaluation, strict=True), color=color, label=label, **RING)
    if panel.guide is not None:
        axes.axhline(panel.guide, label=panel.guide_label or None, **GUIDE)
    if panel.limits:
        axes.set_ylim(*panel.limits)
    else:
        axes.margins(y=0.12)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8.5, labelcolor=INK, handlelength=2.0)


def style_axes(axes: Axes, title: str) -> None:
    """Gives a panel its title, and the look that all have."""
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK, pad=8)
    axes.set_xlabel("step", fontsize=9, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.tick_params(labelsize=8.5, colors=INK, length=0)
    axes.grid(axis="y", color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(GRAY)


def save(figure: Figure, path: Path) -> Path:
    """Writes the figure as a PNG and returns its path."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=DPI, facecolor="white")
    return write_atomically(path, picture.getvalue())
