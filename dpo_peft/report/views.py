"""Chooses what the page of a report shows: the template's variables, of one run or of several in comparison."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..artifacts.curves import PANELS, Curve, Panel, Series, initial_loss
from .charts import Chart, Trace, curve_chart, histogram_chart, scatter_chart, style_of
from .facts import LengthCheck, differences, length_check, longer_by, margin_of, number, plain, source_name
from .runs import Json, Run
from .samples import compared_samples, sample_cards

POINTS = 30_000  # of all curves of a page, which bounds its size
SCATTER_POINTS = 1_000
FEWEST_BUCKETS, MOST_BUCKETS = 10, 200  # of a thinned curve

# Class of the page and dashes, so that no line is known by its color alone.
COLORS = {"blue": ("c0", 0), "orange": ("c1", 1), "green": ("c2", 3), "gray": ("gray", 2)}


def page_of(runs: Sequence[Run]) -> dict[str, Any]:
    """Returns the variables of the page beside the runs themselves. Of one run a chart shows curves that belong
    together, of several the same curve of each."""
    one = len(runs) == 1
    cards, notes = sample_cards(runs[0]) if one else compared_samples(runs)
    sources = _sources(runs[0])
    drawn = [(panel, _traces(panel, runs[0], sources) if one else _compared(panel, runs)) for panel in _panels(runs)]
    drawn = [(panel, traces) for panel, traces in drawn if traces]
    # The more curves a page has, the more they are thinned.
    buckets = POINTS // (2 * max(sum(len(traces) for _, traces in drawn), 1))
    buckets = min(max(buckets, FEWEST_BUCKETS), MOST_BUCKETS)
    warned = _warned(runs[0]) if one else []
    return {
        "charts": [
            curve_chart(f"curve{i}", p.title, traces, buckets, p.guide, p.guide_label, p.limits, warned)
            for i, (p, traces) in enumerate(drawn)
        ],
        "looks": [_look(run, at) for at, run in enumerate(runs)],
        "sources": list(sources.values()),
        "margins": _margins(runs),
        "lengths": [length for dataset in runs[0].evaluations if (length := _length(runs[0], dataset))] if one else [],
        "differences": differences(runs),
        "samples": cards,
        "sample_notes": notes,
    }


# ---- Curves ---------------------------------------------------------------------------------------------------------


def _panels(runs: Sequence[Run]) -> list[Panel]:
    """Returns the panels, one for each metric that a run logs beside the trainer's own (compute_metrics, callbacks)
    at the end. Of several runs each curve that is no baseline has its own."""
    known = {curve.key for panel in PANELS for curve in panel.curves}
    other = dict.fromkeys(key for run in runs for key in run.metrics if key not in known)
    panels = [*PANELS, *(Panel(key, (Curve(key, key, "blue"),)) for key in other)]
    if len(runs) == 1:
        loss_type = runs[0].options.get("loss_type") or runs[0].recorded("training").get("loss_type")
        return [replace(panels[0], guide=initial_loss(loss_type)), *panels[1:]]
    single = []
    for panel in panels:
        curves = [curve for curve in panel.curves if not curve.dashed]
        titles = [panel.title if len(curves) == 1 else f"{panel.title}: {curve.label}" for curve in curves]
        single += [replace(panel, title=title, curves=(curve,)) for title, curve in zip(titles, curves, strict=True)]
    return single


def _traces(panel: Panel, run: Run, sources: dict[str, Trace]) -> list[Trace]:
    """Returns training as lines, each evaluation set as marks of one shape; nothing if there is but a baseline."""
    found = [(at, curve, run.metrics[curve.key]) for at, curve in enumerate(panel.curves) if curve.key in run.metrics]
    lines = any("train" in series for *_, series in found)
    several_sets = sum(look.points for look in sources.values()) > 1
    traces = []
    for at, curve, by_source in found:
        color, dash = COLORS[curve.color]
        for source, series in by_source.items():
            look = sources[source]
            # Marks lie on the line that they belong to; without lines their shape tells the curves apart.
            shape = look.shape if lines or several_sets else at % 4
            label = f"{curve.label}, {look.label}" if look.points else curve.label
            traces.append(Trace(label, series, color, dash, look.points, shape))
    return traces if any(not curve.dashed for _, curve, _ in found) else []


def _compared(panel: Panel, runs: Sequence[Run]) -> list[Trace]:
    """Returns the panel's curve of each run, a color and dashes for each."""
    traces = []
    for at, run in enumerate(runs):
        for source, series in run.metrics.get(panel.curves[0].key, {}).items():
            points = source != "train"
            label = f"{run.name}, {source_name(source)}" if points else run.name
            traces.append(replace(_look(run, at), label=label, series=series, points=points))
    return traces


def _look(run: Run, at: int) -> Trace:
    """Returns a line without values, as run `at` of a comparison is drawn."""
    color, dash = style_of(at)
    return Trace(run.name, [], color, dash, shape=dash, group=f"r{at}")


def _sources(run: Run) -> dict[str, Trace]:
    """Returns how training and each evaluation set are drawn, for the legend above all charts."""
    evaluated = [source for source in run.sources if source != "train"]
    marks = {name: Trace(source_name(name), [], "ink", points=True, shape=i % 4) for i, name in enumerate(evaluated)}
    return {"train": Trace(source_name("train"), [], "ink"), **marks} if "train" in run.sources else marks


def _warned(run: Run) -> list[tuple[float, str]]:
    """Returns (step, names of the warnings that were raised there)."""
    names: dict[int, list[str]] = {}
    for warning in run.warnings:
        if isinstance(warning["step"], int):
            names.setdefault(warning["step"], []).append(warning["name"])
    return [(step, f"step {step}: {', '.join(at_step)}") for step, at_step in names.items()]


# ---- Pairs of an evaluation -----------------------------------------------------------------------------------------


def _margins(runs: Sequence[Run]) -> list[Chart]:
    """Returns a chart for each evaluation set: of one run the last evaluation as bars, under the first one as an
    outline; of several the last of each."""
    sets: dict[str, list[Trace]] = {}
    for at, run in enumerate(runs):
        for dataset, by_step in run.evaluations.items():
            first, last = min(by_step), max(by_step)
            if len(runs) > 1:
                traces = [replace(_look(run, at), label=f"{run.name}, step {last}", series=_series(by_step[last]))]
            else:
                names = {step: f"step {step}" + (", before training" if step == 0 else "") for step in (first, last)}
                traces = [Trace(names[last], _series(by_step[last]), "c2", filled=True)]
                traces += [Trace(names[first], _series(by_step[first]), "ink", dash=1)] if first != last else []
            finite = [trace for trace in traces if any(math.isfinite(margin) for _, margin in trace.series)]
            sets.setdefault(dataset, []).extend(finite)
    return [
        histogram_chart(f"margins-{_slug(dataset)}", f"Margins of pairs, {source_name(dataset)}", traces, "margin")
        for dataset, traces in sets.items()
        if traces
    ]


def _series(rows: Sequence[Json]) -> Series:
    return [(0.0, margin_of(row)) for row in rows]


def _length(run: Run, dataset: str) -> tuple[Chart, LengthCheck, str] | None:
    """Returns margin against difference in length at the last evaluation, drawn and in figures, and where that is."""
    step = max(run.evaluations[dataset])
    rows = run.evaluations[dataset][step]
    points = []
    for row in rows:
        lengths = f"{plain(row['tokens_chosen'])} against {plain(row['tokens_rejected'])} tokens"
        text = f"pair {row['row']}: margin {number(margin_of(row))}, {lengths}"
        points.append((longer_by(row), margin_of(row), text))
    if not any(math.isfinite(margin) for _, margin, _ in points):
        return None
    title = f"Margin by length, {source_name(dataset)} at step {step}"
    axis = "tokens of chosen − tokens of rejected"
    chart = scatter_chart(f"length-{_slug(dataset)}", title, points, axis, SCATTER_POINTS)
    return chart, length_check(rows), f"{dataset} at step {step}"


def _slug(name: str) -> str:
    """Returns a name for an element's id: two names never share one."""
    return name.encode("utf-8", "backslashreplace").hex()
