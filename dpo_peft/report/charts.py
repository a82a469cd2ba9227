"""Charts of a report: curves over steps, histograms, a scatter.

Lines differ by color and dashes, points by color and shape, so that no chart is read by color alone. What shows when
one points at a chart lies in `data-points` of each trace, as "x y x y ...".

Left out on purpose: smoothing (it hides the step at which a run broke) and logarithmic axes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from markupsafe import Markup
from matplotlib.ticker import MaxNLocator

from .facts import number, plain
from .runs import Series
from .svg import ROUND, Plot, as_svg, element

TABLE_ROWS = 40
COLORS = 6
DASHES = ("", "7 3", "2 3", "9 3 2 3")
MARKERS = "osD^"
SWATCHES = ("M10 6a3 3 0 1 0 6 0a3 3 0 1 0 -6 0z", "M10 3h6v6h-6z", "M13 2l4 4l-4 4l-4 -4z", "M13 2l4 7h-8z")
MOST_TRACES = COLORS * len(DASHES)  # told apart by color and dashes together
HUGE = 1e150  # a difference of values beyond it overflows: drawn as not finite


@dataclass(frozen=True)
class Trace:
    """One line, or with `points` one row of marks, or in a histogram one distribution.

    Attributes:
        label: what it shows.
        series: its (step, value); of a distribution (0, value).
        color: one of the page's classes c0 to c5, "grey" or "ink".
        dash: of a line, a place in `DASHES`.
        points: marks instead of a line.
        shape: of the marks, 0 to 3.
        filled: bars instead of an outline.
        named: it stands in the chart's own legend.
        group: traces of one group are brought out together.
    """

    label: str
    series: Series
    color: str = "c0"
    dash: int = 0
    points: bool = False
    shape: int = 0
    filled: bool = False
    named: bool = True
    group: str = ""

    @property
    def look(self) -> dict[str, str]:
        kind = "bars" if self.filled else "points" if self.points else "line"
        return {"class_": f"{kind} {self.color}", "stroke_dasharray": "" if self.points else DASHES[self.dash]}

    def attributes(self, points: Series) -> dict[str, str]:
        """Of its group on the page; `points` are shown when they are pointed at."""
        shown = " ".join(f"{plain(x)} {number(y, '-')}" for x, y in points)
        return {**self.look, "data_group": self.group, "data_label": self.label, "data_points": shown}


@dataclass(frozen=True)
class Chart:
    """A drawn chart: `heads` and `rows` are its table, `legend` (swatch, label), `notes` what isn't drawn."""

    key: str
    title: str
    svg: Markup
    heads: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    legend: list[tuple[Markup, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def style_of(at: int) -> tuple[str, int]:
    """Returns color and dashes of run `at`; no two below `MOST_TRACES` share both."""
    return f"c{at % COLORS}", (at % COLORS + at // COLORS) % len(DASHES)


def swatch(trace: Trace, marked: bool = False) -> Markup:
    """Returns the sample of a legend: line, mark, bar, or with `marked` line and mark."""
    drawn = [] if trace.points or trace.filled else [element("path", **trace.look, d="M1 6H25")]
    if trace.points or marked:
        drawn.append(element("path", class_=f"points {trace.color}", d=SWATCHES[trace.shape]))
    if trace.filled:
        drawn.append(element("path", **trace.look, d="M2 11V2H24V11"))
    return element("svg", *drawn, class_="swatch", viewBox="0 0 26 12", aria_hidden="true")


# ---- Curves ---------------------------------------------------------------------------------------------------------


@as_svg
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
    """Draws values over steps.

    Args:
        key: names the chart's elements; unique on the page.
        traces: at least one, each with at least one value.
        buckets: longer traces than twice this are thinned, see `thin`.
        guide, guide_label: a dotted line at this height, and what it says.
        limits: of the axis of values; by default what is drawn, with room.
        marks: (step, name) of warnings, small triangles at the top.
    """
    steps = sorted({step for trace in traces for step, _ in trace.series})
    values = [value for trace in traces for _, value in trace.series if drawable(value)]
    values += [guide] if guide is not None else []
    y_range = limits or room(min(values, default=0.0), max(values, default=1.0), 0.07)
    plot = Plot("step", room(steps[0], steps[-1], 0.0), y_range, whole=True)
    if guide is not None:
        plot.guide(guide, guide_label)
    thinned = 0
    for trace in sorted(traces, key=lambda trace: trace.points):  # points last: they are few, and lie over the lines
        series = thin(trace.series, buckets)
        thinned = max(thinned, len(trace.series) * (len(series) < len(trace.series)))
        xs, ys = [x for x, _ in series], [y if drawable(y) else math.nan for _, y in series]
        gid = plot.part(**trace.attributes([(x, y) for x, y in series if drawable(y)]))
        plot.axes.plot(xs, ys, MARKERS[trace.shape] if trace.points else "-", markersize=5.5, gid=gid)
        broken = [x for x, y in series if not drawable(y)]
        gid = plot.part(class_=f"cross {trace.color}")
        plot.axes.plot(broken, [y_range[0]] * len(broken), "x", markersize=6, gid=gid)
    marked = [(step, name) for step, name in marks if plot.x[0] <= step <= plot.x[1]]
    gid, top = plot.part([name for _, name in marked], class_="mark"), plot.axes.get_xaxis_transform()
    plot.axes.plot([step for step, _ in marked], [1.04] * len(marked), "v", transform=top, gid=gid, clip_on=False)
    named = [trace for trace in traces if trace.named]
    note = f"{thinned:,} values: the lowest and highest of each of {buckets} stretches are drawn."
    return Chart(
        key,
        title,
        plot.svg(key, "; ".join(map(_ends, traces[:MOST_TRACES])) + ".", "step"),
        ["step", *(trace.label for trace in traces)],
        _rows(traces, steps),
        [(swatch(trace), trace.label) for trace in named] if len(named) > 1 else [],
        ([note] if thinned else []) + _not_finite(traces),
    )


def thin(series: Series, buckets: int) -> Series:
    """Returns of a series longer than `2 * buckets` the lowest and the highest value of each of `buckets` stretches of
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


def _ends(trace: Trace) -> str:
    """A trace in words, for those who can't see it."""
    (first_step, first), (last_step, last) = trace.series[0], trace.series[-1]
    return f"{trace.label}: {number(first)} at step {plain(first_step)}, {number(last)} at {plain(last_step)}"


def _rows(traces: Sequence[Trace], steps: Sequence[float]) -> list[list[str]]:
    """The traces side by side at steps that are spread evenly over all that were logged."""
    columns = [dict(trace.series) for trace in traces]
    last = len(steps) - 1
    shown = [steps[int(i)] for i in np.unique(np.linspace(0, last, min(last + 1, TABLE_ROWS)).round())]
    return [[plain(step), *(number(c[step]) if step in c else "" for c in columns)] for step in shown]


def _not_finite(traces: Sequence[Trace]) -> list[str]:
    steps = sorted({step for trace in traces for step, value in trace.series if not drawable(value)})
    if not steps:
        return []
    shown = ", ".join(plain(step) for step in steps[:5]) + (f" and {len(steps) - 5:,} more" if len(steps) > 5 else "")
    return [f"× not finite at step{'s' if len(steps) > 1 else ''} {shown}."]


def drawable(value: float) -> bool:
    return math.isfinite(value) and abs(value) < HUGE


def room(low: float, high: float, share: float) -> tuple[float, float]:
    """Returns a range with room at both ends; never empty."""
    more = (high - low) * share
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-9):
        more = max(abs(low) * 0.1, 0.5)
    return low - more, high + more


# ---- Distributions --------------------------------------------------------------------------------------------------


@as_svg
def histogram_chart(key: str, title: str, traces: Sequence[Trace], unit: str) -> Chart:
    """Draws shares of values in bins that all traces have in common. Edges are round, so 0 is one if it is among them.
    The outermost half per cent of each end lies in the last bins. A trace that has one value only (margins before
    training are all 0) is a line across: as a bar it would flatten the others.

    Args:
        traces: at least one, each with at least one finite value.
        unit: what the values are, for the axis.
    """
    finite = [np.array([value for _, value in trace.series if drawable(value)]) for trace in traces]
    low, high = np.percentile(np.concatenate(finite), [0.5, 99.5])
    edges = np.asarray(MaxNLocator(nbins=28, steps=ROUND).tick_values(*room(float(low), float(high), 0.0)))
    counts = [np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0] for values in finite]
    shares = [100 * count / count.sum() for count in counts]
    alike = [np.ptp(values) < 1e-3 * (edges[1] - edges[0]) for values in finite]
    alike = [one and not all(alike) for one in alike]
    highest = max(share.max() for share, one in zip(shares, alike, strict=True) if not one)
    plot = Plot(unit, (float(edges[0]), float(edges[-1])), (0.0, float(highest) * 1.08), unit="%")
    middles = (edges[:-1] + edges[1:]) / 2
    notes, described = [], []
    for trace, values, share, one in zip(traces, finite, shares, alike, strict=True):
        points = [] if one else list(zip(middles.tolist(), share.tolist(), strict=True))
        gid = plot.part(**trace.attributes(points))
        if one:
            plot.axes.axvline(values[0], gid=gid)
        else:
            plot.axes.stairs(share, edges, fill=trace.filled, gid=gid)
        notes += _left_out(trace, values, edges)
        middle, above = number(float(np.median(values))), (values > 0).mean()
        described.append(f"{trace.label}: {len(values):,} values, median {middle}, {above:.1%} above 0")
    plot.zero()
    rows = [
        [f"{number(a)} to {number(b)}", *(f"{count[i]:,}" for count in counts)]
        for i, (a, b) in enumerate(zip(edges[:-1], edges[1:], strict=True))
    ]
    svg = plot.svg(key, "; ".join(described) + ".", f"{unit} around")
    heads = [unit, *(f"{trace.label}, values" for trace in traces)]
    return Chart(key, title, svg, heads, rows, [(swatch(trace), trace.label) for trace in traces], notes)


def _left_out(trace: Trace, values: np.ndarray, edges: np.ndarray) -> list[str]:
    outside, missing = int(((values < edges[0]) | (values > edges[-1])).sum()), len(trace.series) - len(values)
    notes = [f"{trace.label}: every value is {number(values[0])}."] if len(set(values)) == 1 else []
    notes += [f"{trace.label}: {outside:,} beyond the ends are in the last bins."] if outside else []
    return notes + ([f"{trace.label}: {missing:,} not finite."] if missing else [])


@as_svg
def scatter_chart(key: str, title: str, points: Sequence[tuple[float, float, str]], x_label: str, most: int) -> Chart:
    """Draws points above 0 as discs, at or below as rings, with the line of least squares through all of them.

    Args:
        points: (x, y, text that shows when it is pointed at); not finite ones are left out and counted.
        x_label: what x is.
        most: more points than these are thinned to every n-th.
    """
    finite = [point for point in points if drawable(point[0]) and drawable(point[1])]
    every = -(-len(finite) // most)
    drawn = finite[::every]
    xs, ys = (np.array([point[i] for point in finite], float) for i in (0, 1))
    plot = Plot(x_label, room(float(xs.min()), float(xs.max()), 0.04), room(float(ys.min()), float(ys.max()), 0.06))
    if plot.y[0] < 0 < plot.y[1]:
        plot.guide(0.0)
    plot.zero(words=False)
    for kind, some in (("disc", [p for p in drawn if p[1] > 0]), ("ring", [p for p in drawn if p[1] <= 0])):
        gid = plot.part([text for *_, text in some], class_=kind)
        plot.axes.plot([p[0] for p in some], [p[1] for p in some], "o", markersize=5.2, gid=gid)
    if xs.std() > 0:
        ends = np.array([xs.min(), xs.max()])
        line = np.clip(np.polyval(np.polyfit(xs, ys, 1), ends), *plot.y)
        plot.axes.plot(ends, line, gid=plot.part(class_="line grey", stroke_dasharray=DASHES[1]))
    notes = [f"{len(drawn):,} of {len(finite):,} points are drawn; figures are of all."] if every > 1 else []
    if len(finite) < len(points):
        notes.append(f"{len(points) - len(finite):,} are not finite and left out.")
    described = f"{len(finite):,} points. {x_label}: {number(xs.min())} to {number(xs.max())}; {title}: "
    described += f"{number(ys.min())} to {number(ys.max())}."
    return Chart(key, title, plot.svg(key, described, ""), notes=notes)
