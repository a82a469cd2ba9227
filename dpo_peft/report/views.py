"""What the page of a report shows of one run, and of several in comparison: the template's variables."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from .runs import Run, Series
from .samples import compared_samples, sample_cards

POINTS = 30_000  # of all curves of a page, which bounds its size
SCATTER_POINTS = 1_000
LONG_ENOUGH = 10, 200  # fewest and most stretches of a thinned curve

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
MORE_PANELS = (
    BY_LENGTH,
    Panel("Learning rate", (Curve("learning_rate", "learning rate", BLUE),)),
    Panel("Gradient norm", (Curve("grad_norm", "gradient norm", BLUE),)),
)
Found = Mapping[str, Mapping[str, Series]]  # metric -> source -> values


@dataclass(frozen=True)
class Length:
    """Margin against difference in length, of one evaluation set."""

    chart: Chart
    check: LengthCheck
    dataset: str
    step: int


# ---- One run --------------------------------------------------------------------------------------------------------


def page_of_one(run: Run, found: Found, figures: Figures) -> dict[str, Any]:
    """The variables of a run's page.

    Args:
        run: the run.
        found: its metrics, see `metric_series`.
        figures: its headline.
    """
    cards, notes = sample_cards(run)
    return {
        "tiles": _tiles(figures, found),
        "charts": _curves(run, found),
        "sources": _source_marks(found),
        "margins": [chart for rows in _by_dataset(run) if (chart := _margins(*rows))],
        "lengths": [length for rows in _by_dataset(run) if (length := _length(*rows))],
        "samples": cards,
        "sample_notes": notes,
    }


def _tiles(figures: Figures, found: Found) -> list[dict[str, str]]:
    """The headline: a name, a figure, and what to read it against."""
    held_out = "held-out" if figures.source != "train" else "training"
    where = f" ({source_name(figures.source)})" if figures.source.startswith("eval_") else ""
    tiles = []

    def tile(name: str, value: float | None, about: str = "", text: str = "") -> None:
        if value is not None:
            tiles.append({"name": name, "value": text or number(value), "about": about})

    beside = [] if figures.length_only is None else [f"length alone: {figures.length_only:.3f}"]
    beside += [] if figures.balanced is None else [f"length-balanced: {figures.balanced:.3f}"]
    if figures.interval:
        low, high = figures.interval
        beside.append(f"95\u00a0% interval {low:.3f} to {high:.3f}, {figures.pairs:,} pairs")
    accuracy = "" if figures.accuracy is None else f"{figures.accuracy:.3f}"
    tile(f"{held_out} accuracy{where}", figures.accuracy, "; ".join(beside), accuracy)
    for name, key, value in (("margin", "rewards/margins", figures.margin), ("KL", "kl", figures.kl)):
        about = "chosen − rejected reward" if name == "margin" else "nats per answer, estimate"
        tile(f"{held_out} {name}", value, f"{about}; {_first(found, key, figures.source)}")
    tile(f"{held_out} loss", figures.loss, _first(found, "loss", figures.source))
    epochs = "" if figures.epochs is None else f"{figures.epochs:.3g} epoch{'s' if figures.epochs != 1 else ''}"
    tile("steps", figures.steps, epochs, f"{figures.steps or 0:,}")
    tile("training time", figures.seconds, "", duration(figures.seconds or 0.0))
    return tiles


def _first(found: Found, key: str, source: str) -> str:
    step, value = found[key][source][0] if source in found.get(key, {}) else (0.0, math.nan)
    return f"at step {plain(step)}: {number(value)}"


def _curves(run: Run, found: Found) -> list[Chart]:
    panels = [*PANELS, *MORE_PANELS]
    known = {curve.key for panel in panels for curve in panel.curves}
    # What a run logs beside the trainer's own metrics (compute_metrics, callbacks) gets a chart too.
    panels += [Panel(key, (Curve(key, key, BLUE),)) for key in found if key not in known]
    drawn = {panel.title: _panel_traces(panel, found) for panel in panels}
    buckets = _buckets(sum(map(len, drawn.values())))
    charts = []
    for at, panel in enumerate(panels):
        if traces := drawn[panel.title]:
            guide, label = panel.guide, panel.guide_label
            if panel.title == "Loss":
                guide = math.log(2) if _starts_at_ln2(run) else None
            charts.append(
                curve_chart(
                    f"curve{at}", panel.title, traces, buckets, guide, label, panel.limits, _mark_positions(run)
                )
            )
    return charts


def _panel_traces(panel: Panel, found: Found) -> list[Trace]:
    """Training as lines, each evaluation set as marks of one shape; empty if there is but a baseline."""
    shapes = dict(_evaluation_sources(found))
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


def _evaluation_sources(found: Found) -> list[tuple[str, int]]:
    """Evaluation sets and the shape of their marks, in the order of the log."""
    sources = dict.fromkeys(source for series in found.values() for source in series if source != "train")
    return [(source, i % 4) for i, source in enumerate(sources)]


def _source_marks(found: Found) -> list[tuple[Markup, str]]:
    marks = [(swatch(Trace("", [], "ink")), "training")] if any("train" in series for series in found.values()) else []
    for source, shape in _evaluation_sources(found):
        marks.append((swatch(Trace("", [], "ink", points=True, shape=shape)), source_name(source)))
    return marks


def _starts_at_ln2(run: Run) -> bool:
    """Whether the loss of a policy that equals its reference is ln 2: so it is of DPO as such."""
    trained = (run.adapter.get("auto_mapping") or {}).get("dpo_peft_training") or {}
    loss_type = run.options.get("loss_type") or trained.get("loss_type")
    return loss_type in (["sigmoid"], ["trajectory"], "sigmoid", "trajectory")


def _mark_positions(run: Run) -> list[tuple[float, str]]:
    """(step, names of the warnings that were raised there)."""
    names: dict[int, list[str]] = {}
    for warning in raised_warnings(run):
        if isinstance(warning["step"], int):
            names.setdefault(warning["step"], []).append(warning["name"])
    return [(step, f"step {step}: {', '.join(at_step)}") for step, at_step in names.items()]


def _buckets(traces: int) -> int:
    low, high = LONG_ENOUGH
    return min(max(POINTS // (2 * max(traces, 1)), low), high)


# ---- Pairs of an evaluation -----------------------------------------------------------------------------------------


def _by_dataset(run: Run) -> list[tuple[str, dict[int, list[dict[str, Any]]]]]:
    """(evaluation set, step -> its pairs), in the order of the file."""
    sets: dict[str, dict[int, list[dict[str, Any]]]] = {}
    for row in run.examples:
        sets.setdefault(row["dataset"], {}).setdefault(row["step"], []).append(row)
    return list(sets.items())


def _margins(dataset: str, by_step: Mapping[int, Sequence[Mapping[str, Any]]]) -> Chart | None:
    """The first evaluation's margins as an outline, the last one's as bars."""
    groups = []
    for step in sorted({min(by_step), max(by_step)}):
        values = [margin_of(row) for row in by_step[step]]
        if any(map(math.isfinite, values)):
            last = step == max(by_step)
            label = f"step {step}" + (", before training" if step == 0 else "")
            series = [(0.0, value) for value in values]
            groups.append(Trace(label, series, "c2" if last else "ink", 0 if last else 1, filled=last))
    title = f"Margins of pairs, {source_name(dataset)}"
    groups.sort(key=lambda group: not group.filled)  # the outline lies over the bars
    return histogram_chart(f"margins-{_slug(dataset)}", title, groups, "margin") if groups else None


def _length(dataset: str, by_step: Mapping[int, Sequence[Mapping[str, Any]]]) -> Length | None:
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
    """The variables of a comparison; `found` and `figures` are the runs' metrics and headlines."""
    key = [(swatch(_run_trace(run, i, []), marked=True), run.name, f"r{i}") for i, run in enumerate(runs)]
    cards, notes = compared_samples(runs)
    return {
        "key": key,
        "final": _final_table(runs, figures, [sample for sample, _, _ in key]),
        "differences": differences(runs),
        "charts": _compared_curves(runs, found),
        "margins": _compared_margins(runs),
        "samples": cards,
        "sample_notes": notes,
    }


def _final_table(
    runs: Sequence[Run], figures: Sequence[Figures], swatches: Sequence[Markup]
) -> tuple[list[str], list[list[Any]]]:
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
    points = source != "train"
    return Trace(label, series, color, dash, points, shape=dash, named=False, group=f"r{at}")


def _compared_curves(runs: Sequence[Run], found: Sequence[Found]) -> list[Chart]:
    """One chart per metric, all runs in it."""
    wanted: dict[str, Panel] = {}
    for panel in [*PANELS, *MORE_PANELS]:
        for curve in panel.curves:
            alone = sum(not curve.dashed for curve in panel.curves) == 1
            title = panel.title if alone else f"{panel.title}: {curve.label}"
            if not curve.dashed:
                guide = None if panel.title == "Loss" else panel.guide
                wanted[curve.key] = Panel(title, (curve,), guide, panel.guide_label, panel.limits)
    baselines = {curve.key for panel in PANELS for curve in panel.curves if curve.dashed}
    for key in dict.fromkeys(key for one in found for key in one):
        if key not in baselines:
            wanted.setdefault(key, Panel(key, (Curve(key, key, BLUE),)))
    drawn = {
        key: [
            _run_trace(run, i, series, source)
            for i, (run, one) in enumerate(zip(runs, found, strict=True))
            for source, series in one.get(key, {}).items()
        ]
        for key in wanted
    }
    buckets = _buckets(sum(map(len, drawn.values())))
    return [
        curve_chart(f"curve{at}", p.title, drawn[key], buckets, p.guide, p.guide_label, p.limits)
        for at, (key, p) in enumerate(wanted.items())
        if drawn[key]
    ]


def _compared_margins(runs: Sequence[Run]) -> list[Chart]:
    """The last evaluation of each run, one chart per evaluation set that at least one run has."""
    sets: dict[str, list[Trace]] = {}
    for i, run in enumerate(runs):
        for dataset, by_step in _by_dataset(run):
            step = max(by_step)
            values = [margin_of(row) for row in by_step[step]]
            if any(map(math.isfinite, values)):
                color, dash = style_of(i)
                series = [(0.0, value) for value in values]
                trace = Trace(f"{run.name}, step {step}", series, color, dash, group=f"r{i}")
                sets.setdefault(dataset, []).append(trace)
    return [
        histogram_chart(f"margins-{_slug(name)}", f"Margins of pairs, {source_name(name)}", groups, "margin")
        for name, groups in sets.items()
    ]
