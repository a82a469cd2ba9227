"""Draws training curves as one PNG, from the trainer's log history.

Left out on purpose: smoothing (a smoothed curve hides the step at which a run broke) and interactive formats.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import OptionError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito (2008): told apart with every common color vision deficiency, and in gray.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#767676"
INK, RULE = "#22262B", "#D9DCE0"
PANEL_INCHES = (4.9, 3.05)
TITLE_INCHES, KEY_INCHES = 0.5, 0.35
DPI = 120
GUIDE: dict[str, Any] = {"color": GREY, "linewidth": 1.0, "linestyle": (0, (1, 2)), "zorder": 1.5}
RING: dict[str, Any] = {
    "linestyle": "none",
    "marker": "o",
    "markersize": 6,
    "markerfacecolor": "white",
    "markeredgewidth": 1.7,
    "zorder": 5,
}


@dataclass(frozen=True)
class Curve:
    """Describes one line of a panel: the metric's key in the log, its label and color; a baseline is dashed."""

    key: str
    label: str
    colour: str
    dashed: bool = False


@dataclass(frozen=True)
class Panel:
    """Describes one panel. `guide` is the value of no preference, where a curve stands before training."""

    title: str
    curves: tuple[Curve, ...]
    guide: float | None = None
    guide_label: str = ""
    limits: tuple[float, float] | None = None


PANELS = (
    Panel("Loss", (Curve("loss", "loss", BLUE),), guide_label="no preference"),
    Panel(
        "Accuracy",
        (
            Curve("rewards/accuracies", "chosen reward is higher", BLUE),
            Curve("accuracies/length_only", "pick the longer", GREY, dashed=True),
        ),
        0.5,
        "chance",
        limits=(-0.03, 1.03),
    ),
    Panel(
        "Implicit rewards",
        (
            Curve("rewards/margins", "margin", GREEN),
            Curve("rewards/chosen", "chosen", BLUE),
            Curve("rewards/rejected", "rejected", ORANGE),
        ),
        0.0,
    ),
    Panel(
        "Log-probability of a completion (nats)",
        (Curve("logps/chosen", "chosen", BLUE), Curve("logps/rejected", "rejected", ORANGE)),
    ),
    Panel("Sample weight 1 − σ(margin)", (Curve("sample_weight", "mean weight", BLUE),), 0.5, "before training"),
    Panel("KL to the reference, estimate (nats)", (Curve("kl", "estimate", BLUE),), 0.0),
)

Series = list[tuple[float, float]]  # (step, value)


def plot_training_curves(
    log_history: Sequence[Mapping[str, float]], path: str | Path, title: str = "", start_loss: float | None = None
) -> Path:
    """Draws the metrics of a run over its steps and returns the path of the PNG.

    Args:
        log_history: `trainer.state.log_history`, a list of dicts. Each has `step` and metrics under TRL's names
            (`loss`, `rewards/margins`, …); keys that begin with `eval_` are evaluation and are drawn as points.
            Values that are not finite are left out of the curves.
        path: where the PNG goes; missing folders are made.
        title: a line above the panels.
        start_loss: the loss of a policy that equals its reference, such as ln 2, drawn as a guide.

    Raises:
        OptionError: the history has no metric that any panel shows.
    """
    panels = [replace(panel, guide=start_loss) if panel.title == "Loss" else panel for panel in PANELS]
    found = [(panel, series) for panel in panels if (series := panel_series(panel, log_history))]
    if not found:
        keys = sorted({key for entry in log_history for key in entry})
        raise OptionError(
            f"log_history has nothing to plot: {len(log_history)} entries with the keys {keys}. "
            "Expected `step` and metrics such as `loss`; train at least one step with `logging_steps` set."
        )
    # matplotlib is slow to import and only wanted here; the figure needs no display and no global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = len(found) if len(found) < 4 else 2 if len(found) == 4 else 3
    rows = -(-len(found) // columns)
    evaluated = any(key.startswith("eval_") for _, series in found for key in series)
    extra = TITLE_INCHES * bool(title) + KEY_INCHES * evaluated
    size = (PANEL_INCHES[0] * columns, PANEL_INCHES[1] * rows + extra)
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.14, h_pad=0.12)  # type: ignore[union-attr, call-arg]
    for i, (panel, series) in enumerate(found):
        draw_panel(figure.add_subplot(rows, columns, i + 1), panel, series)
    if title:
        figure.suptitle(title, x=0.015, ha="left", fontsize=13, fontweight="bold", color=INK)
    if evaluated:
        add_key(figure)
    return save(figure, Path(path))


def panel_series(panel: Panel, log_history: Sequence[Mapping[str, float]]) -> dict[str, Series]:
    """Returns the panel's metrics that the history has, training and evaluation apart: key -> [(step, value)]."""
    series: dict[str, Series] = {}
    for curve in panel.curves:
        for key in (curve.key, f"eval_{curve.key}"):
            points = [
                (float(entry["step"]), float(entry[key]))
                for entry in log_history
                if "step" in entry and isinstance(entry.get(key), int | float) and math.isfinite(entry[key])
            ]
            if points:
                series[key] = points
    # A baseline alone says nothing.
    return series if any(not c.dashed and {c.key, f"eval_{c.key}"} & series.keys() for c in panel.curves) else {}


def draw_panel(axes: "Axes", panel: Panel, series: dict[str, Series]) -> None:
    """Draws one panel: training as lines, evaluation as ringed points in the same color, the guide behind both."""
    style_axes(axes, panel.title)
    several = sum(not {c.key, f"eval_{c.key}"}.isdisjoint(series) for c in panel.curves) > 1
    for curve in panel.curves:
        label = curve.label if several else None  # one curve is named by the panel's title
        if curve.key in series:
            dashes = (0, (4, 2)) if curve.dashed else "solid"
            marker = "." if len(series[curve.key]) == 1 else None
            axes.plot(*columns_of(series[curve.key]), color=curve.colour, linestyle=dashes, marker=marker, label=label)
            label = None
        if evaluated := series.get(f"eval_{curve.key}"):
            axes.plot(*columns_of(evaluated), color=curve.colour, label=label, **RING)
    if panel.guide is not None:
        axes.axhline(panel.guide, label=panel.guide_label or None, **GUIDE)
    if panel.limits:
        axes.set_ylim(*panel.limits)
    else:
        axes.margins(y=0.12)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8.5, labelcolor=INK, handlelength=2.0)


def columns_of(series: Series) -> tuple[list[float], list[float]]:
    return [step for step, _ in series], [value for _, value in series]


def add_key(figure: "Figure") -> None:
    """Says once, below all panels, what lines and rings are."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=INK, label="training"), Line2D([], [], color=INK, label="evaluation", **RING)]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=9, labelcolor=INK)


def style_axes(axes: "Axes", title: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK, pad=8)
    axes.set_xlabel("step", fontsize=9, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.tick_params(labelsize=8.5, colors=INK, length=0)
    axes.grid(axis="y", color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(GREY)


def save(figure: "Figure", path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=DPI, facecolor="white")
    return path
