"""What the page of a report shows of one run, and of several in comparison: the template's variables."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from markupsafe import Markup

from ..artifacts.curves import BLUE, GREEN, GREY, ORANGE, PANELS, Curve, Panel
from .charts import Chart, Trace, curve_chart, histogram_chart, scatter_chart, style_of, swatch
from .facts import (
    Figures,
    LengthCheck,
    differences,
    duration,
    length_check,
    margin_of,
    number,
    plain,
    raised_warnings,
    source_name,
)
from .runs import Found, Row, Run, Series
from .samples import compared_samples, sample_cards

POINTS = 30_000  # of all curves of a page, which bounds its size
SCATTER_POINTS = 1_000
FEWEST_BUCKETS, MOST_BUCKETS = 10, 200  # of a thinned curve

# Class of the page and dashes, so that no line is known by its color alone.
COLORS = {BLUE: ("c0", 0), ORANGE: ("c1", 1), GREEN: ("c2", 3), GREY: ("grey", 2)}
BY_LENGTH = Panel(
    "Accuracy by length",
    (
        Curve("accuracies/length_balanced", "balanced", GREEN),
        Curve("accuracies/chosen_longer", "chosen is longer", BLUE),
        Curve("accuracies/chosen_shorter", "chosen is shorter", ORANGE),
    ),
    0.5,
    "chance",
    limits=(-0.03, 1.03),
)
ALL_PANELS = (
    *PANELS,
    BY_LENGTH,
    Panel("Learning rate", (Curve("learning_rate", "learning rate", BLUE),)),
    Panel("Gradient norm", (Curve("grad_norm", "gradient norm", BLUE),)),
)


@dataclass(frozen=True)
class Length:
    """Margin against difference in length, of one evaluation set."""

    chart: Chart
    check: LengthCheck
    dataset: str
    step: int


def _charts(panels: Sequence[tuple[Panel, list[Trace]]], marks: Sequence[tuple[float, str]] = ()) -> list[Chart]:
    """The panels that have traces, drawn; the more curves a page has, the more they are thinned."""
    buckets = POINTS // (2 * max(sum(len(traces) for _, traces in panels), 1))
    buckets = min(max(buckets, FEWEST_BUCKETS), MOST_BUCKETS)
    return [
        curve_chart(f"curve{at}", p.title, traces, buckets, p.guide, p.guide_label, p.limits, marks)
        for at, (p, traces) in enumerate(panels)
        if traces
    ]


def _unknown_panels(found: Sequence[Found]) -> list[Panel]:
    """A panel for each metric that a run logs beside the trainer's own (compute_metrics, callbacks)."""
    known = {curve.key for panel in ALL_PANELS for curve in panel.curves}
    other = dict.fromkeys(key for one in found for key in one if key not in known)
    return [Panel(key, (Curve(key, key, BLUE),)) for key in other]


# ---- One run --------------------------------------------------------------------------------------------------------


def page_of_one(run: Run, found: Found, figures: Figures) -> dict[str, Any]:
    """Returns the variables of a run's page.

    Args:
        run: the run.
        found: its metrics, see `metric_series`.
        figures: its headline.
    """
    cards, notes = sample_cards(run)
    loss = replace(ALL_PANELS[0], guide=math.log(2) if _starts_at_ln2(run) else None)
    panels = [loss, *ALL_PANELS[1:], *_unknown_panels([found])]
    sets = _by_dataset(run)
    return {
        "tiles": _tiles(figures, found),
        "charts": _charts([(panel, _panel_traces(panel, found)) for panel in panels], _mark_positions(run)),
        "sources": _source_marks(found),
        "margins": [chart for name, by_step in sets.items() for chart in _margin_chart(name, _ends(by_step))],
        "lengths": [length for rows in sets.items() if (length := _length(*rows))],
        "samples": cards,
        "sample_notes": notes,
    }


def _tiles(figures: Figures, found: Found) -> list[tuple[str, str, str]]:
    """The headline: names, figures, and what to read them against."""
    of = "training" if figures.source == "train" else "held-out"
    where = f" ({source_name(figures.source)})" if figures.source.startswith("eval_") else ""
    beside = [] if figures.length_only is None else [f"length alone: {figures.length_only:.3f}"]
    beside += [] if figures.balanced is None else [f"length-balanced: {figures.balanced:.3f}"]
    if figures.interval:
        low, high = figures.interval
        beside.append(f"95\u00a0% interval {low:.3f} to {high:.3f}, {figures.pairs:,} pairs")
    epochs = "" if figures.epochs is None else f"{figures.epochs:.3g} epoch{'s' if figures.epochs != 1 else ''}"

    def first(key: str) -> str:
        step, value = found.get(key, {}).get(figures.source, [(0.0, math.nan)])[0]
        return f"at step {plain(step)}: {number(value)}"

    tiles: list[tuple[str, float | None, Callable[[float], str], str]] = [
        (f"{of} accuracy{where}", figures.accuracy, "{:.3f}".format, "; ".join(beside)),
        (f"{of} margin", figures.margin, number, f"chosen − rejected reward; {first('rewards/margins')}"),
        (f"{of} KL", figures.kl, number, f"nats per completion, estimate; {first('kl')}"),
        (f"{of} loss", figures.loss, number, first("loss")),
        ("steps", figures.steps, "{:,}".format, epochs),
        ("training time", figures.seconds, duration, ""),
    ]
    return [(name, shown(value), about) for name, value, shown, about in tiles if value is not None]


def _panel_traces(panel: Panel, found: Found) -> list[Trace]:
    """Training as lines, each evaluation set as marks of one shape; empty if there is but a baseline."""
    shapes = _evaluation_shapes(found)
    trained = any("train" in found.get(curve.key, {}) for curve in panel.curves)
    traces = []
    for at, curve in enumerate(panel.curves):
        color, dash = COLORS[curve.colour]
        for source, series in found.get(curve.key, {}).items():
            points = source != "train"
            label = f"{curve.label}, {source_name(source)}" if points else curve.label
            # Marks lie on the line that they belong to; without lines their shape tells the curves apart.
            shape = shapes.get(source, 0) if trained or len(shapes) > 1 else at % 4
            named = not points or "train" not in found[curve.key]
            traces.append(Trace(label, series, color, dash, points, shape, named=named))
    only_baseline = all(curve.dashed or curve.key not in found for curve in panel.curves)
    return [] if only_baseline else traces


def _evaluation_shapes(found: Found) -> dict[str, int]:
    """Evaluation sets and the shape of their marks, in the order of the log."""
    sources = dict.fromkeys(source for series in found.values() for source in series if source != "train")
    return {source: i % 4 for i, source in enumerate(sources)}


def _source_marks(found: Found) -> list[tuple[Markup, str]]:
    marks = [(swatch(Trace("", [], "ink")), "training")] if any("train" in series for series in found.values()) else []
    for source, shape in _evaluation_shapes(found).items():
        marks.append((swatch(Trace("", [], "ink", points=True, shape=shape)), source_name(source)))
    return marks


def _starts_at_ln2(run: Run) -> bool:
    """Whether the loss of a policy that equals its reference is ln 2: so it is of DPO as such."""
    loss_type = run.options.get("loss_type") or run.recorded("training").get("loss_type")
    return loss_type in (["sigmoid"], ["trajectory"], "sigmoid", "trajectory")


def _mark_positions(run: Run) -> list[tuple[float, str]]:
    """(step, names of the warnings that were raised there)."""
    names: dict[int, list[str]] = {}
    for warning in raised_warnings(run):
        if isinstance(warning["step"], int):
            names.setdefault(warning["step"], []).append(warning["name"])
    return [(step, f"step {step}: {', '.join(at_step)}") for step, at_step in names.items()]


# ---- Pairs of an evaluation -----------------------------------------------------------------------------------------

ByStep = Mapping[int, Sequence[Row]]  # step to the pairs that were evaluated then


def _by_dataset(run: Run) -> dict[str, dict[int, list[Row]]]:
    """The pairs by evaluation set and step, in the order of the file."""
    sets: dict[str, dict[int, list[Row]]] = {}
    for row in run.examples:
        sets.setdefault(row["dataset"], {}).setdefault(row["step"], []).append(row)
    return sets


def _margins(rows: Sequence[Row]) -> Series:
    return [(0.0, margin_of(row)) for row in rows]


def _ends(by_step: ByStep) -> list[Trace]:
    """The last evaluation's margins as bars, under those of the first one as an outline."""
    first, last = min(by_step), max(by_step)
    names = {step: f"step {step}" + (", before training" if step == 0 else "") for step in (first, last)}
    outline = [Trace(names[first], _margins(by_step[first]), "ink", dash=1)] if first != last else []
    return [Trace(names[last], _margins(by_step[last]), "c2", filled=True), *outline]


def _margin_chart(dataset: str, traces: Sequence[Trace]) -> list[Chart]:
    """The chart of the distributions that have a finite margin; none if none has."""
    traces = [trace for trace in traces if any(math.isfinite(margin) for _, margin in trace.series)]
    title = f"Margins of pairs, {source_name(dataset)}"
    return [histogram_chart(f"margins-{_slug(dataset)}", title, traces, "margin")] if traces else []


def _length(dataset: str, by_step: ByStep) -> Length | None:
    step = max(by_step)
    points = []
    for row in by_step[step]:
        longer, margin = row["tokens_chosen"] - row["tokens_rejected"], margin_of(row)
        lengths = f"{plain(row['tokens_chosen'])} against {plain(row['tokens_rejected'])} tokens"
        points.append((longer, margin, f"pair {row['row']}: margin {number(margin)}, {lengths}"))
    if not any(math.isfinite(margin) for _, margin, _ in points):
        return None
    title = f"Margin by length, {source_name(dataset)} at step {step}"
    axis = "tokens of chosen − tokens of rejected"
    chart = scatter_chart(f"length-{_slug(dataset)}", title, points, axis, SCATTER_POINTS)
    return Length(chart, length_check(by_step[step]), dataset, step)


def _slug(name: str) -> str:
    """For an element's id: two names never share one."""
    return name.encode("utf-8", "backslashreplace").hex()


# ---- Several runs ---------------------------------------------------------------------------------------------------


def page_of_several(runs: Sequence[Run], found: Sequence[Found], figures: Sequence[Figures]) -> dict[str, Any]:
    """Returns the variables of a comparison; `found` and `figures` are the runs' metrics and headlines."""
    samples = [swatch(_run_trace(run, i, []), marked=True) for i, run in enumerate(runs)]
    cards, notes = compared_samples(runs)
    panels = [(panel, _compared_traces(panel.curves[0].key, runs, found)) for panel in _compared_panels(found)]
    return {
        "key": [(sample, run.name, f"r{i}") for i, (sample, run) in enumerate(zip(samples, runs, strict=True))],
        "final": _final_table(runs, figures, samples),
        "differences": differences(runs),
        "charts": _charts(panels),
        "margins": _compared_margins(runs),
        "samples": cards,
        "sample_notes": notes,
    }


def _final_table(
    runs: Sequence[Run], figures: Sequence[Figures], swatches: Sequence[Markup]
) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of the runs' headlines."""
    heads = "run,of,accuracy,length-balanced,length alone,margin,KL,loss,steps,time,warnings".split(",")
    rows = []
    for run, f, sample in zip(runs, figures, swatches, strict=True):
        shares = ["" if value is None else f"{value:.3f}" for value in (f.accuracy, f.balanced, f.length_only)]
        values = ["" if value is None else number(value) for value in (f.margin, f.kl, f.loss)]
        work = ["" if f.steps is None else f"{f.steps:,}", "" if f.seconds is None else duration(f.seconds)]
        names = ", ".join(dict.fromkeys(warning["name"] for warning in raised_warnings(run)))
        rows.append([sample + run.name, source_name(f.source), *shares, *values, *work, names])
    return heads, rows


def _run_trace(run: Run, at: int, series: Series, source: str = "train") -> Trace:
    label = run.name if source == "train" else f"{run.name}, {source_name(source)}"
    color, dash = style_of(at)
    return Trace(label, series, color, dash, points=source != "train", shape=dash, named=False, group=f"r{at}")


def _compared_panels(found: Sequence[Found]) -> list[Panel]:
    """A panel for each metric that is no baseline."""
    panels = []
    for panel in ALL_PANELS:
        curves = [curve for curve in panel.curves if not curve.dashed]
        for curve in curves:
            title = panel.title if len(curves) == 1 else f"{panel.title}: {curve.label}"
            guide = None if panel.title == "Loss" else panel.guide
            panels.append(replace(panel, title=title, curves=(curve,), guide=guide))
    return panels + _unknown_panels(found)


def _compared_traces(key: str, runs: Sequence[Run], found: Sequence[Found]) -> list[Trace]:
    return [
        _run_trace(run, i, series, source)
        for i, (run, one) in enumerate(zip(runs, found, strict=True))
        for source, series in one.get(key, {}).items()
    ]


def _compared_margins(runs: Sequence[Run]) -> list[Chart]:
    """The last evaluation of each run, one chart per evaluation set that at least one run has."""
    sets: dict[str, list[Trace]] = {}
    for i, run in enumerate(runs):
        color, dash = style_of(i)
        for dataset, by_step in _by_dataset(run).items():
            last = max(by_step)
            trace = Trace(f"{run.name}, step {last}", _margins(by_step[last]), color, dash, group=f"r{i}")
            sets.setdefault(dataset, []).append(trace)
    return [chart for name, traces in sets.items() for chart in _margin_chart(name, traces)]
