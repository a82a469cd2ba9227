"""Charts as inline SVG: curves over steps, histograms, a scatter. Text and colours follow the page they stand in.

Lines differ by colour and dashes, points by colour and shape, so that no chart is read by colour alone. What shows
when one points at a chart lies in `data-points` of each trace, as "x y x y ...".

Left out on purpose: smoothing (it hides the step at which a run broke) and logarithmic axes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from markupsafe import Markup
from matplotlib.ticker import MaxNLocator

from .runs import Series
from .svg import (
    BOTTOM,
    COLOURS,
    DASHES,
    LEFT,
    MOST_TRACES,
    RIGHT,
    TOP,
    Axis,
    cross,
    drawable,
    drawing,
    element,
    frame,
    guide_line,
    guide_text,
    mark,
    number,
    plain,
    px,
    room,
    shape_path,
    zero_line,
)

TABLE_ROWS = 40
DOT = 2.6


@dataclass(frozen=True)
class Trace:
    """One line, or with `points` one row of marks.

    Attributes:
        label: what it shows.
        series: its values.
        colour: one of the page's classes c0 to c5, "grey" or "ink".
        dash: of a line, a place in `DASHES`.
        points: marks instead of a line.
        shape: of the marks, 0 to 3.
        named: it stands in the chart's own legend.
        group: traces of one group are brought out together.
    """

    label: str
    series: Series
    colour: str = "c0"
    dash: int = 0
    points: bool = False
    shape: int = 0
    named: bool = True
    group: str = ""


@dataclass(frozen=True)
class Chart:
    """A drawn chart: `heads` and `rows` are its table, `legend` (swatch, label), `notes` what isn't drawn."""

    key: str
    title: str
    svg: Markup
    heads: list[str]
    rows: list[list[str]]
    legend: list[tuple[Markup, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def style_of(at: int) -> tuple[str, int]:
    """Colour and dashes of run `at`; no two below `MOST_TRACES` share both."""
    return f"c{at % COLOURS}", (at % COLOURS + at // COLOURS) % len(DASHES)


# ---- Curves ---------------------------------------------------------------------------------------------------------


def curve_chart(
    key: str,
    title: str,
    traces: Sequence[Trace],
    buckets: int,
    guide: float | None = None,
    guide_label: str = "",
    limits: tuple[float, float] | None = None,
    marks: Sequence[tuple[float, str]] = (),
) -> Chart:
    """Values over steps.

    Args:
        key: names the chart's elements; unique on the page.
        traces: at least one, each with at least one value.
        buckets: longer traces than twice this are thinned, see `thin`.
        guide, guide_label: a dotted line at this height, and what it says.
        limits: of the axis of values; by default what is drawn, with room.
        marks: (step, name) of warnings, small triangles at the top.
    """
    steps = [step for trace in traces for step, _ in trace.series]
    x = Axis(*room(min(steps), max(steps), 0.0), LEFT, RIGHT)
    values = [value for trace in traces for _, value in trace.series if drawable(value)]
    values += [guide] if guide is not None else []
    y = Axis(*(limits or room(min(values, default=0.0), max(values, default=1.0), 0.07)), BOTTOM, TOP)
    body = [frame(x, y, "step", whole=True)]
    if guide is not None:
        body.append(guide_line(y, guide))
    named = [trace for trace in traces if trace.named]
    thinned = [replace(trace, series=thin(trace.series, buckets)) for trace in traces]
    # Points last: they are few, and lie over the lines.
    body += [_trace(trace, x, y) for trace in sorted(thinned, key=lambda trace: trace.points)]
    body += [mark(x.at(step), name) for step, name in marks if x.low <= step <= x.high]
    if guide is not None and guide_label:
        body.append(guide_text(y, guide, guide_label))
    return Chart(
        key,
        title,
        drawing(key, _described(traces), body, x, y, "step"),
        *_table(traces),
        legend=[(swatch(trace), trace.label) for trace in named] if len(named) > 1 else [],
        notes=[*_thinning(traces, thinned, buckets), *_not_finite(traces)],
    )


def thin(series: Series, buckets: int) -> Series:
    """Of a series longer than `2 * buckets`, the lowest and the highest value of each of `buckets` stretches of
    equally many entries, the first that isn't finite of each, and both ends: no peak is lost."""
    if len(series) <= 2 * buckets:
        return list(series)
    kept = {0, len(series) - 1}
    for stretch in np.array_split(np.arange(len(series)), buckets):
        finite = [int(i) for i in stretch if drawable(series[i][1])]
        if finite:
            kept |= {min(finite, key=lambda i: series[i][1]), max(finite, key=lambda i: series[i][1])}
        if len(finite) < len(stretch):
            kept.add(next(int(i) for i in stretch if not drawable(series[i][1])))
    return [series[i] for i in sorted(kept)]


def _trace(trace: Trace, x: Axis, y: Axis) -> Markup:
    finite = [(x.at(step), y.at(value)) for step, value in trace.series if drawable(value)]
    attributes = {
        "class": f"{'points' if trace.points else 'line'} {trace.colour}",
        "data_group": trace.group,
        "data_label": trace.label,
        "data_points": " ".join(f"{plain(s)} {number(v, plain_minus=True)}" for s, v in trace.series if drawable(v)),
    }
    if trace.points:
        d = "".join(shape_path(trace.shape, px, py) for px, py in finite)
    else:
        attributes["stroke_dasharray"] = DASHES[trace.dash]
        d = _broken_line(trace.series, x, y)
    broken = "".join(cross(x.at(step), BOTTOM) for step, value in trace.series if not drawable(value))
    crosses = element("path", **{"class": f"cross {trace.colour}", "d": broken}) if broken else Markup()
    return element("path", **attributes, d=d) + crosses


def _broken_line(series: Series, x: Axis, y: Axis) -> str:
    """A path that is interrupted where a value isn't finite; a value between two gaps becomes a dot."""
    d, pen = [], "M"
    for step, value in series:
        if not drawable(value):
            pen = "M"
            continue
        # "h0" draws a lone value as a dot, by the line's round ends.
        d.append(f"{pen}{px(x.at(step))} {px(y.at(value))}" + ("h0" if pen == "M" else ""))
        pen = "L"
    return "".join(d)


def _described(traces: Sequence[Trace]) -> str:
    """The chart in words, for those who can't see it."""
    parts = []
    for trace in traces[:MOST_TRACES]:
        (first_step, first), (last_step, last) = trace.series[0], trace.series[-1]
        ends = f"{number(first)} at step {plain(first_step)}, {number(last)} at {plain(last_step)}"
        parts.append(f"{trace.label}: {ends}")
    return "; ".join(parts) + "."


def _table(traces: Sequence[Trace]) -> tuple[list[str], list[list[str]]]:
    """Heads and rows: the traces side by side at steps that are spread evenly over all that were logged."""
    steps = sorted({step for trace in traces for step, _ in trace.series})
    if len(steps) > TABLE_ROWS:
        steps = [steps[int(i)] for i in np.unique(np.linspace(0, len(steps) - 1, TABLE_ROWS).round())]
    columns = [dict(trace.series) for trace in traces]
    rows = [[plain(step), *(number(c[step]) if step in c else "" for c in columns)] for step in steps]
    return ["step", *(trace.label for trace in traces)], rows


def _thinning(traces: Sequence[Trace], thinned: Sequence[Trace], buckets: int) -> list[str]:
    longest = max(len(trace.series) for trace in traces)
    if all(len(a.series) == len(b.series) for a, b in zip(traces, thinned, strict=True)):
        return []
    return [f"{longest:,} values: the lowest and highest of each of {buckets} stretches are drawn."]


def _not_finite(traces: Sequence[Trace]) -> list[str]:
    steps = sorted({step for trace in traces for step, value in trace.series if not drawable(value)})
    if not steps:
        return []
    shown = ", ".join(plain(step) for step in steps[:5]) + (f" and {len(steps) - 5:,} more" if len(steps) > 5 else "")
    return [f"× not finite at step{'s' if len(steps) > 1 else ''} {shown}."]


# ---- Distributions --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """One distribution of a histogram: `filled` as bars, else as an outline."""

    label: str
    values: Sequence[float]
    colour: str = "c0"
    dash: int = 0
    filled: bool = False
    group: str = ""


def histogram_chart(key: str, title: str, groups: Sequence[Group], unit: str) -> Chart:
    """Shares of values in bins that all groups have in common. Edges are round, so 0 is one if it is among them. The
    outermost half per cent of each end lies in the last bins. A group that has one value only (margins before training
    are all 0) is a line across: as a bar it would flatten the others.

    Args:
        groups: at least one, each with at least one finite value.
        unit: what the values are, for the axis.
    """
    finite = [np.array([value for value in group.values if drawable(value)]) for group in groups]
    low, high = np.percentile(np.concatenate(finite), [0.5, 99.5])
    locator = MaxNLocator(nbins=28, steps=[1, 2, 2.5, 5, 10])
    edges = np.asarray(locator.tick_values(*room(float(low), float(high), 0.0)))
    counts = [np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0] for values in finite]
    shares = [100 * count / count.sum() for count in counts]
    alike = [np.ptp(values) < 1e-3 * (edges[1] - edges[0]) for values in finite]
    x = Axis(float(edges[0]), float(edges[-1]), LEFT, RIGHT)
    heights = [share.max() for share, one in zip(shares, alike, strict=True) if not one or all(alike)]
    y = Axis(0.0, float(max(heights)) * 1.08, BOTTOM, TOP)
    body = [frame(x, y, unit, percent=True)]
    for group, values, share, one in zip(groups, finite, shares, alike, strict=True):
        if one and not all(alike):
            d, points = f"M{px(x.at(values[0]))} {BOTTOM}V{TOP}", ""
        else:
            d, points = _outline(x, y, edges, share), _bin_points(edges, share)
        kind = "bars" if group.filled else "line"
        attributes = {"class": f"{kind} {group.colour}", "data_group": group.group, "data_label": group.label}
        body.append(element("path", **attributes, data_points=points, stroke_dasharray=DASHES[group.dash], d=d))
    body.append(zero_line(x, y))
    heads = [unit, *(f"{group.label}, values" for group in groups)]
    rows = [
        [f"{number(a)} to {number(b)}", *(f"{count[i]:,}" for count in counts)]
        for i, (a, b) in enumerate(zip(edges[:-1], edges[1:], strict=True))
    ]
    traces = [Trace(group.label, [], group.colour, group.dash) for group in groups]
    legend = [(swatch(t, filled=group.filled), t.label) for t, group in zip(traces, groups, strict=True)]
    described = "; ".join(
        f"{group.label}: {len(values):,} values, median {number(float(np.median(values)))}, "
        f"{(values > 0).mean():.1%} above 0"
        for group, values in zip(groups, finite, strict=True)
    )
    svg = drawing(key, described + ".", body, x, y, f"{unit} around", unit="%")
    return Chart(key, title, svg, heads, rows, legend, _clipped(groups, finite, edges))


def _outline(x: Axis, y: Axis, edges: np.ndarray, share: np.ndarray) -> str:
    steps = [f"V{px(y.at(s))}H{px(x.at(right))}" for s, right in zip(share, edges[1:], strict=True)]
    return f"M{px(x.at(edges[0]))} {BOTTOM}{''.join(steps)}V{BOTTOM}"


def _bin_points(edges: np.ndarray, share: np.ndarray) -> str:
    middles = (edges[:-1] + edges[1:]) / 2
    return " ".join(f"{middle:.6g} {s:.4g}" for middle, s in zip(middles, share, strict=True))


def _clipped(groups: Sequence[Group], finite: Sequence[np.ndarray], edges: np.ndarray) -> list[str]:
    notes = []
    for group, values in zip(groups, finite, strict=True):
        notes += [f"{group.label}: every value is {number(values[0])}."] if len(set(values)) == 1 else []
        outside = int(((values < edges[0]) | (values > edges[-1])).sum())
        missing = len(group.values) - len(values)
        notes += [f"{group.label}: {outside:,} beyond the ends are in the last bins."] if outside else []
        notes += [f"{group.label}: {missing:,} not finite."] if missing else []
    return notes


def scatter_chart(
    key: str, title: str, points: Sequence[tuple[float, float, str]], x_label: str, most: int, line: bool = True
) -> Chart:
    """Points above 0 as discs, at or below as rings, with the line of least squares.

    Args:
        points: (x, y, text that shows when it is pointed at); not finite ones are left out and counted.
        x_label: what x is.
        most: more points than these are thinned to every n-th.
        line: whether to draw the line of least squares through all points.
    """
    finite = [point for point in points if drawable(point[0]) and drawable(point[1])]
    every = -(-len(finite) // most)
    drawn = finite[::every]
    xs, ys = (np.array([point[i] for point in finite], float) for i in (0, 1))
    x = Axis(*room(float(xs.min()), float(xs.max()), 0.04), LEFT, RIGHT)
    y = Axis(*room(float(ys.min()), float(ys.max()), 0.06), BOTTOM, TOP)
    body = [frame(x, y, x_label)]
    if y.low < 0 < y.high:
        body.append(guide_line(y, 0.0))
    body.append(zero_line(x, y, words=False))
    for px_, py_, text in drawn:
        kind = "disc" if py_ > 0 else "ring"
        circle = {"class": kind, "cx": px(x.at(px_)), "cy": px(y.at(py_)), "r": DOT}
        body.append(element("circle", element("title", text), **circle))
    if line and xs.std() > 0:
        slope, height = np.polyfit(xs, ys, 1)
        ends = [(x.at(v), min(max(y.at(slope * v + height), TOP), BOTTOM)) for v in (xs.min(), xs.max())]
        d = "M" + "L".join(f"{px(a)} {px(b)}" for a, b in ends)
        body.append(element("path", **{"class": "line grey", "stroke_dasharray": DASHES[1], "d": d}))
    notes = [f"{len(drawn):,} of {len(finite):,} points are drawn; figures are of all."] if every > 1 else []
    if len(finite) < len(points):
        notes.append(f"{len(points) - len(finite):,} are not finite and left out.")
    described = f"{len(finite):,} points. {x_label}: {number(xs.min())} to {number(xs.max())}; {title}: "
    described += f"{number(ys.min())} to {number(ys.max())}."
    return Chart(key, title, drawing(key, described, body, x, y, ""), [], [], notes=notes)


# ---- Legend ---------------------------------------------------------------------------------------------------------


def swatch(trace: Trace, filled: bool = False, marked: bool = False) -> Markup:
    """The sample of a legend: line, mark, or with `marked` both; `filled` is a bar."""
    line = {"class": f"line {trace.colour}", "stroke_dasharray": DASHES[trace.dash], "d": "M1 6H25"}
    drawn = [] if trace.points or filled else [element("path", **line)]
    if trace.points or marked:
        drawn.append(element("path", **{"class": f"points {trace.colour}", "d": shape_path(trace.shape, 13, 6)}))
    if filled:
        drawn.append(element("path", **{"class": f"bars {trace.colour}", "d": "M2 11V2H24V11"}))
    return element("svg", *drawn, **{"class": "swatch", "viewBox": "0 0 26 12", "aria_hidden": "true"})
