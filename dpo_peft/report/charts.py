"""Charts of a report: curves over steps, histograms, a scatter. matplotlib draws them, the page gives them their look.

Lines differ by color and dashes, points by color and shape, so that no chart is read by color alone.

Left out on purpose: smoothing (it hides the step at which a run broke) and logarithmic axes.
"""

import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import numpy as np
from markupsafe import Markup
from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..artifacts.curves import Series
from .facts import number, plain

TABLE_ROWS = 40
COLORS = 6
DASHES = ("", "7 3", "2 3", "9 3 2 3")
MARKERS = "osD^"
MOST_TRACES = COLORS * len(DASHES)  # told apart by color and dashes together
HUGE = 1e150  # a difference of values beyond it overflows: drawn as not finite
Range = tuple[float, float]

# Reset first: the machine's own matplotlibrc would change the bytes of the page.
in_our_style = style.context(Path(__file__).parent / "templates" / "charts.mplstyle", after_reset=True)


@dataclass(frozen=True)
class Trace:
    """Holds one line, or with `points` one row of marks, or in a histogram one distribution.

    Attributes:
        label: what it shows.
        series: its (step, value); of a distribution (0, value).
        color: one of the page's classes c0 to c5, "gray" or "ink".
        dash: of a line, a place in `DASHES`.
        points: marks instead of a line.
        shape: of the marks, a place in `MARKERS`.
        filled: bars instead of an outline.
        group: of a comparison: traces of one group are brought out together, and named above all charts.
    """

    label: str
    series: Series
    color: str = "c0"
    dash: int = 0
    points: bool = False
    shape: int = 0
    filled: bool = False
    group: str = ""

    @property
    def kind(self) -> str:
        return "bars" if self.filled else "points" if self.points else "line"

    @property
    def dashes(self) -> str:
        return "" if self.points else DASHES[self.dash]


class Chart:
    """Draws a chart on its `axes`, and holds it as the page's template reads it.

    Args:
        key: begins the ids of the chart's elements; unique on the page.
        title: stands above it.
        x, y: ranges of the axes.
        x_label: stands below the axis of steps or values.
        hover: what a value of x is when the chart is pointed at; "" if there is nothing to point at.
        unit: stands behind every number of the vertical axis.

    """

    def __init__(self, key: str, title: str, x: Range, y: Range, x_label: str, hover: str = "", unit: str = ""):
        self.key, self.title, self.x, self.y, self.hover, self.unit = key, title, x, y, hover, unit
        self._traces: dict[str, dict[str, str]] = {}  # id in matplotlib's drawing -> attributes on the page
        self._titles: dict[str, Sequence[str]] = {}
        self.figure = Figure()
        self.axes = self.figure.add_subplot(xlim=x, ylim=y)
        self.axes.locator_params("x", nbins=6, integer=hover == "step")
        self.axes.locator_params("y", nbins=5)
        self.axes.ticklabel_format(axis="x", style="plain")
        if unit:
            self.axes.yaxis.set_major_formatter(f"{{x:g}} {unit}")
        self.axes.grid(axis="y", gid="gridline")
        self.axes.patch.set_visible(False)
        self.axes.spines["bottom"].set_gid("axis")
        self.axes.set_xlabel(x_label, gid="unit")

    def trace(self, trace: Trace, points: Series) -> str:
        """Returns the `gid` for what draws a trace; `points` are shown when they are pointed at."""
        shown = " ".join(f"{plain(x)} {number(y, '-')}" for x, y in points)
        looks = {"class": f"{trace.kind} {trace.color}", "stroke-dasharray": trace.dashes, "data-group": trace.group}
        looks |= {"data-label": trace.label, "data-points": shown}
        self._traces[gid := f"trace{len(self._traces)}"] = {name: look for name, look in looks.items() if look}
        return gid

    def marks(self, points: Sequence[tuple[float, float]], marker: str, name: str, titles: Sequence[str] = ()) -> None:
        """Draws marks of the class `name`; a title shows when its mark is pointed at."""
        self._titles[name] = titles
        size = 6 if marker in "xv" else 5.2
        self.axes.plot(*np.reshape(points, (-1, 2)).T, marker, markersize=size, gid=name, clip_on=False)

    def guide(self, at: float, label: str = "", vertical: bool = False) -> None:
        """Draws a dotted line at a value, and says above its end what it is."""
        (self.axes.axvline if vertical else self.axes.axhline)(at, gid="guide")
        space = self.axes.get_yaxis_transform()
        self.axes.annotate(label, (1, at), (0, 3), space, "offset points", ha="right", gid="unit")

    def zero(self, words: bool = True) -> None:
        """Marks where margins change sign, if it is on the chart; says on which side they are wrong, if there is
        room."""
        low, high = self.x
        if low <= 0 <= high:
            self.guide(0.0, vertical=True)
            for word, side, room in (("wrong", -1, -low), ("right", 1, high)):
                if words and room > 0.15 * (high - low):
                    space, align = self.axes.get_xaxis_transform(), "left" if side > 0 else "right"
                    self.axes.annotate(word, (0, 1), (5 * side, 3), space, "offset points", ha=align, gid="unit")

    def finish(
        self,
        described: str,
        notes: Sequence[str],
        heads: Sequence[str] = (),
        rows: Sequence[Sequence[str]] = (),
        legend: Sequence[Trace] = (),
    ) -> "Chart":
        """Takes what matplotlib drew into `svg`: shapes and texts. Its styles are left, since the page's style sheet
        colors by class, in both themes, and its policy would refuse style attributes.

        Args:
            described: the chart in words, for those who can't see it.
            notes: what isn't drawn.
            heads, rows: its values as a table.
            legend: what is named below it.
        """
        self.described, self.notes, self.heads, self.rows, self.legend = described, notes, heads, rows, legend
        written = StringIO()
        self.figure.savefig(written, format="svg")
        bare = re.sub(r'<(metadata|style|clipPath).*?</\1>| xmlns="[^"]*"', "", written.getvalue(), flags=re.DOTALL)
        root = ET.fromstring(bare)  # noqa: S314 - matplotlib wrote it
        for node in root.iter():
            node.tail = None
            for use, title in zip(node.iter("use"), self._titles.get(node.get("id", ""), ()), strict=False):
                ET.SubElement(use, "title").text = title
            node.attrib = self._attributes(node)
            node.text = node.text if node.tag in ("text", "title") else None
        shapes = "".join(ET.tostring(node, "unicode", method="html") for node in root)
        self.svg = Markup(re.sub(r"<(g|defs)[^>]*></\1>", "", shapes))  # noqa: S704 - escaped by tostring
        return self

    def _attributes(self, node: ET.Element) -> dict[str, str]:
        """Returns what a shape is given on the page."""
        name = node.get("id", "")
        if node.tag == "path":  # one with an id is a marker
            return {"d": _short(node.get("d", "")), **({"id": f"{self.key}-{name}"} if name else {})}
        place = {axis: _px(float(node.get(axis, 0))) for axis in "xy"}
        if node.tag == "use":
            return {"href": f"#{self.key}-{node.get('{http://www.w3.org/1999/xlink}href', '')[1:]}", **place}
        if node.tag == "text":
            (anchor,) = re.findall(r"text-anchor: (\w+)", node.get("style", "")) or ["start"]
            return {**place, "text-anchor": anchor}
        if name in self._traces:
            return self._traces[name]
        return {"class": name} if name and not re.search(r"_\d+$", name) else {}  # others are matplotlib's own names


def _short(path: str) -> str:
    """Returns a path to a tenth of a pixel, without needless spaces; a point between two gaps becomes a dot."""
    path = re.sub(r"-?\d+\.\d+", lambda found: _px(float(found[0])), re.sub(r"\s*([A-Za-z])\s*", r"\1", path.strip()))
    return re.sub(r"(M[^A-Za-z]+)(?=M|$)", r"\1h0", path)


def _px(value: float) -> str:
    return f"{round(value, 1) + 0.0:g}"  # + 0.0: no minus before a zero


def style_of(at: int) -> tuple[str, int]:
    """Returns color and dashes of run `at`; no two below `MOST_TRACES` share both."""
    return f"c{at % COLORS}", (at % COLORS + at // COLORS) % len(DASHES)


def drawable(value: float) -> bool:
    return math.isfinite(value) and abs(value) < HUGE


def room(low: float, high: float, share: float) -> Range:
    """Returns a range with room at both ends; never empty."""
    more = (high - low) * share
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-9):
        more = max(abs(low) * 0.1, 0.5)
    return low - more, high + more


# ---- Curves ---------------------------------------------------------------------------------------------------------


@in_our_style
def curve_chart(
    key: str,
    title: str,
    traces: Sequence[Trace],
    buckets: int,
    guide: float | None = None,
    guide_label: str = "",
    limits: Range | None = None,
    warned: Sequence[tuple[float, str]] = (),
) -> Chart:
    """Draws values over steps.

    Args:
        key, title: see `Chart`.
        traces: at least one, each with at least one value.
        buckets: longer traces than twice this are thinned, see `thin`.
        guide, guide_label: a dotted line at this height, and what it says.
        limits: of the axis of values; by default what is drawn, with room.
        warned: (step, name) of warnings, small triangles at the top.
    """
    steps = sorted({step for trace in traces for step, _ in trace.series})
    values = [value for trace in traces for _, value in trace.series if drawable(value)]
    values += [guide] if guide is not None else []
    y_range = limits or room(min(values, default=0.0), max(values, default=1.0), 0.07)
    chart = Chart(key, title, room(steps[0], steps[-1], 0.0), y_range, "step", hover="step")
    if guide is not None:
        chart.guide(guide, guide_label)
    thinned = 0
    for trace in sorted(traces, key=lambda trace: trace.points):  # points last: they are few, and lie over the lines
        series = thin(trace.series, buckets)
        thinned = max(thinned, len(trace.series) * (len(series) < len(trace.series)))
        gid = chart.trace(trace, [point for point in series if drawable(point[1])])
        drawn = np.array([(x, y if drawable(y) else math.nan) for x, y in series])
        chart.axes.plot(*drawn.T, MARKERS[trace.shape] if trace.points else "-", markersize=5.5, gid=gid)
        chart.marks([(x, y_range[0]) for x, y in series if not drawable(y)], "x", f"cross {trace.color}")
    top = y_range[1] + 0.04 * (y_range[1] - y_range[0])
    warned = [(step, name) for step, name in warned if chart.x[0] <= step <= chart.x[1]]
    chart.marks([(step, top) for step, _ in warned], "v", "mark", [name for _, name in warned])
    lines = {(trace.color, trace.dash) for trace in traces if not trace.points}
    named = [t for t in traces if not t.group and (not t.points or (t.color, t.dash) not in lines)]
    note = f"{thinned:,} values: the lowest and highest of each of {buckets} stretches are drawn."
    return chart.finish(
        "; ".join(map(_ends, traces[:MOST_TRACES])) + ".",
        ([note] if thinned else []) + _not_finite(traces),
        ["step", *(trace.label for trace in traces)],
        _rows(traces, steps),
        named if len(named) > 1 else [],
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
    """Returns a trace in words."""
    (first_step, first), (last_step, last) = trace.series[0], trace.series[-1]
    return f"{trace.label}: {number(first)} at step {plain(first_step)}, {number(last)} at {plain(last_step)}"


def _rows(traces: Sequence[Trace], steps: Sequence[float]) -> list[list[str]]:
    """Returns the traces side by side at steps that are spread evenly over all that were logged."""
    columns = [dict(trace.series) for trace in traces]
    last = len(steps) - 1
    shown = [steps[int(i)] for i in np.unique(np.linspace(0, last, min(last + 1, TABLE_ROWS)).round())]
    return [[plain(step), *(number(c[step]) if step in c else "" for c in columns)] for step in shown]


def _not_finite(traces: Sequence[Trace]) -> list[str]:
    steps = sorted({step for trace in traces for step, value in trace.series if not drawable(value)})
    shown = ", ".join(plain(step) for step in steps[:5]) + (f" and {len(steps) - 5:,} more" if len(steps) > 5 else "")
    return [f"× not finite at step{'s' if len(steps) > 1 else ''} {shown}."] if steps else []


# ---- Distributions --------------------------------------------------------------------------------------------------


@in_our_style
def histogram_chart(key: str, title: str, traces: Sequence[Trace], unit: str) -> Chart:
    """Draws shares of values in bins that all traces have in common. Edges are round, so 0 is one if it is among them.
    The outermost half per cent of each end lies in the last bins. A trace that has one value only (margins before
    training are all 0) is a line across: as a bar it would flatten the others.

    Args:
        key, title: see `Chart`.
        traces: at least one, each with at least one finite value.
        unit: what the values are, for the axis.
    """
    finite = [np.array([value for _, value in trace.series if drawable(value)]) for trace in traces]
    low, high = np.percentile(np.concatenate(finite), [0.5, 99.5])
    edges = np.array(MaxNLocator(nbins=28, steps=[1, 2, 2.5, 5, 10]).tick_values(*room(low, high, 0.0)))
    counts = [np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0] for values in finite]
    shares = [100 * count / count.sum() for count in counts]
    alike = [np.ptp(values) < 1e-3 * (edges[1] - edges[0]) for values in finite]
    alike = [one and not all(alike) for one in alike]
    highest = max(share.max() for share, one in zip(shares, alike, strict=True) if not one)
    chart = Chart(key, title, (edges[0], edges[-1]), (0.0, highest * 1.08), unit, hover=f"{unit} around", unit="%")
    middles = (edges[:-1] + edges[1:]) / 2
    notes, described = [], []
    for trace, values, share, one in zip(traces, finite, shares, alike, strict=True):
        if one:
            chart.axes.axvline(values[0], gid=chart.trace(trace, []))
        else:
            gid = chart.trace(trace, list(zip(middles.tolist(), share.tolist(), strict=True)))
            chart.axes.stairs(share, edges, fill=trace.filled, gid=gid)
        outside, missing = ((values < edges[0]) | (values > edges[-1])).sum(), len(trace.series) - len(values)
        notes += [f"{trace.label}: every value is {number(values[0])}."] if not np.ptp(values) else []
        notes += [f"{trace.label}: {outside:,} beyond the ends are in the last bins."] if outside else []
        notes += [f"{trace.label}: {missing:,} not finite."] if missing else []
        middle, above = number(float(np.median(values))), (values > 0).mean()
        described.append(f"{trace.label}: {len(values):,} values, median {middle}, {above:.1%} above 0")
    chart.zero()
    bins = zip(edges[:-1], edges[1:], *counts, strict=True)
    rows = [[f"{number(a)} to {number(b)}", *(f"{count:,}" for count in of_bin)] for a, b, *of_bin in bins]
    heads = [unit, *(f"{trace.label}, values" for trace in traces)]
    return chart.finish("; ".join(described) + ".", notes, heads, rows, traces)


@in_our_style
def scatter_chart(key: str, title: str, points: Sequence[tuple[float, float, str]], x_label: str, most: int) -> Chart:
    """Draws points above 0 as discs, at or below as rings, with the line of least squares through all of them.

    Args:
        key, title: see `Chart`.
        points: (x, y, text that shows when it is pointed at); not finite ones are left out and counted.
        x_label: what x is.
        most: more points than these are thinned to every n-th.
    """
    finite = [point for point in points if drawable(point[0]) and drawable(point[1])]
    every = -(-len(finite) // most)
    drawn = finite[::every]
    xs, ys = (np.array([point[i] for point in finite], float) for i in (0, 1))
    chart = Chart(key, title, room(xs.min(), xs.max(), 0.04), room(ys.min(), ys.max(), 0.06), x_label)
    if chart.y[0] < 0 < chart.y[1]:
        chart.guide(0.0)
    chart.zero(words=False)
    for kind, some in (("disc", [p for p in drawn if p[1] > 0]), ("ring", [p for p in drawn if p[1] <= 0])):
        chart.marks([(x, y) for x, y, _ in some], "o", kind, [text for *_, text in some])
    if xs.std() > 0:
        ends = np.array([xs.min(), xs.max()])
        line = np.clip(np.polyval(np.polyfit(xs, ys, 1), ends), *chart.y)
        chart.axes.plot(ends, line, gid=chart.trace(Trace("", [], "gray", dash=1), []))
    notes = [f"{len(drawn):,} of {len(finite):,} points are drawn; figures are of all."] if every > 1 else []
    notes += [f"{len(points) - len(finite):,} are not finite and left out."] if len(finite) < len(points) else []
    described = f"{len(finite):,} points. {x_label}: {number(xs.min())} to {number(xs.max())}; {title}: "
    return chart.finish(f"{described}{number(ys.min())} to {number(ys.max())}.", notes)
