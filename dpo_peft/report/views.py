"""Chooses what the page of a report shows: the template's variables, of one run or of several in comparison."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..artifacts.curves import PANELS, Curve, Panel, Series, initial_loss
from ..artifacts.rows_kept import MOST_WORST, wrong_pairs
from .charts import Chart, Trace, curve_chart
from .comparison import by_axis, frontiers, look_of, reward_kind, scale_of
from .distributions import counts_chart, histogram_chart, scatter_chart
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
    if one:
        drawn = [(panel, _traces(panel, runs[0], sources)) for panel in _panels(runs)]
    else:
        drawn = [(p, _compared(p, runs, of)) for panel in _panels(runs) for p, of in by_axis(panel, runs)]
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
        "looks": [look_of(run, at) for at, run in enumerate(runs)],
        "sources": list(sources.values()),
        "margins": _margins(runs),
        "lengths": [length for dataset in runs[0].evaluations if (length := _length(runs[0], dataset))] if one else [],
        "differences": differences(runs),
        "data_lengths": data_lengths(runs[0]) if one else [],
        "worst": _worst(runs[0]) if one else [],
        "frontiers": [] if one else frontiers(runs),
        "samples": cards,
        "pictures": {name: uri for run in runs for name, uri in run.pictures.items()},
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


def _compared(panel: Panel, runs: Sequence[Run], numbers: Sequence[tuple[int, float]]) -> list[Trace]:
    """Returns the panel's curve of each run that has the panel's axis, a color and dashes for each."""
    traces = []
    for at, scale in numbers:
        for source, series in runs[at].metrics[panel.curves[0].key].items():
            points = source != "train"
            label = f"{runs[at].name}, {source_name(source)}" if points else runs[at].name
            scaled = [(step, value * scale) for step, value in series]
            traces.append(replace(look_of(runs[at], at), label=label, series=scaled, points=points))
    return traces


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
    outline; of several the last of each, a chart for each kind of reward."""
    sets: dict[tuple[str, str], list[Trace]] = {}
    scales = scale_of("rewards/margins", runs)
    kinds = [reward_kind(run) for run in runs]
    for at, run in enumerate(runs):
        for dataset, by_step in run.evaluations.items():
            first, last = min(by_step), max(by_step)
            if len(runs) > 1:
                series = _series(by_step[last], scales[at])
                traces = [replace(look_of(run, at), label=f"{run.name}, step {last}", series=series)]
            else:
                names = {step: f"step {step}" + (", before training" if step == 0 else "") for step in (first, last)}
                traces = [Trace(names[last], _series(by_step[last]), "c2", filled=True)]
                traces += [Trace(names[first], _series(by_step[first]), "ink", dash=1)] if first != last else []
            finite = [trace for trace in traces if any(math.isfinite(margin) for _, margin in trace.series)]
            sets.setdefault((dataset, kinds[at] if len(set(kinds)) > 1 else ""), []).extend(finite)
    unit = "margin ÷ β" if set(scales) != {1.0} else "margin"
    return [
        histogram_chart(
            f"margins-{_slug(dataset)}-{_slug(kind)}",
            ", ".join(filter(None, (f"{unit.replace('margin', 'Margins')} of pairs", kind, source_name(dataset)))),
            traces,
            unit,
        )
        for (dataset, kind), traces in sets.items()
        if traces
    ]


def _series(rows: Sequence[Json], scale: float = 1.0) -> Series:
    return [(0.0, margin_of(row) * scale) for row in rows]


def _worst(run: Run) -> list[tuple[str, int, list[tuple[Json, Json]]]]:
    """Returns (evaluation set, how many of its pairs are judged wrong, the worst of them with their texts, which are
    empty where they weren't recorded)."""
    texts = {(row["dataset"], row["row"]): row for row in run.texts}
    found = []
    for dataset, pairs in wrong_pairs(run.examples).items():
        worst = [(pair, texts.get((dataset, pair["row"]), {})) for pair in pairs[:MOST_WORST]]
        found.append((source_name(dataset), len(pairs), worst))
    return found


def data_lengths(run: Run) -> list[Chart]:
    """Returns a chart of the tokens of each dataset's rows, and what truncation took."""
    charts = []
    for name, counts in (run.facts.get("lengths") or {}).items():
        data, bins = run.facts.get("data", {}).get(name, {}), dict(counts)
        edges, limit = bins.pop("edges"), data.get("max_length")
        cut, kept = data.get("rows_truncated", 0), data.get("kept_rows") or 1
        limited = "There is no max_length." if limit is None else f"max_length is {limit:,}."
        lost = f"{cut:,} of {kept:,} rows ({cut / kept:.1%}) were truncated." if cut else "No row was truncated."
        title = f"Tokens of rows, {source_name(name)}"
        charts.append(counts_chart(f"tokens-{_slug(name)}", title, edges, bins, limit, f"{limited} {lost}"))
    return charts


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
