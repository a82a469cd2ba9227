"""Charts of a report: how one is made, curves over steps, reward over KL; `distributions` has the others. matplotlib
draws them, the page gives them their look.

Lines differ by color and dashes, points by color and shape, so that no chart is read by color alone.

Left out on purpose: smoothing (it hides the step at which a run broke) and logarithmic axes of values.
"""

import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path

import numpy as np
from markupsafe import Markup
from matplotlib import style
from matplotlib.figure import Figure

from ..artifacts.curves import Series
from .facts import number, plain

TABLE_ROWS = 40
COLORS = 6
DASHES = ("", "7 3", "2 3", "9 3 2 3")
MARKERS = "osD^"
MOST_TRACES = COLORS * len(DASHES)  # told apart by color and dashes together
BOX, MARK = (304, 168), 7.5  # of a chart's plot, and a mark with the room that it needs: units of the picture
MOST_ABREAST = 6  # marks beside each other that have all of that room
HUGE = 1e150  # a difference of values beyond it overflows: drawn as not finite
Range = tuple[float, float]

# Reset first: the machine's own matplotlibrc would change the bytes of the page.
in_our_style = style.context(Path(__file__).parent / "templates" / "charts.mplstyle", after_reset=True)


@dataclass(frozen=True)
class Trace:
    """Holds one line, or with `points` one row of marks, or in a histogram one distribution."""

    label: str  # what it shows
    series: Series  # its (step, value); of a distribution (0, value)
    color: str = "c0"  # one of the page's classes c0 to c5, "gray" or "ink"
    dash: int = 0  # of a line, a place in `DASHES`
    points: bool = False  # marks instead of a line
    shape: int = 0  # of the marks, a place in `MARKERS`
    filled: bool = False  # bars instead of an outline
    group: str = ""  # of a comparison: traces of one group are brought out together, and named above all charts

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

    def titled(self, gid: str, titles: Sequence[str]) -> None:
        """Gives the marks that are drawn as `gid` titles, which show when they are pointed at."""
        self._titles[gid] = titles

    def marks(self, points: Sequence[tuple[float, float]], marker: str, name: str, titles: Sequence[str] = ()) -> None:
        """Draws marks of the class `name`; a title shows when its mark is pointed at."""
        self.titled(name, titles)
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
    lines = [trace for trace in traces if not trace.points]
    chart = Chart(key, title, room(steps[0], steps[-1], 0.0 if lines else 0.05), y_range, "step", hover="step")
    if guide is not None:
        chart.guide(guide, guide_label)
    thinned, apart = 0, _apart([trace for trace in traces if trace.points], chart)
    for trace in sorted(traces, key=lambda trace: trace.points):  # points last: they are few, and lie over the lines
        series = thin(trace.series, buckets)
        thinned = max(thinned, len(trace.series) * (len(series) < len(trace.series)))
        gid = chart.trace(trace, [point for point in series if drawable(point[1])])
        aside = apart if trace.points else {}
        drawn = np.array([(x + aside.get((x, id(trace)), 0), y if drawable(y) else math.nan) for x, y in series])
        chart.axes.plot(*drawn.T, MARKERS[trace.shape] if trace.points else "-", markersize=5.5, gid=gid)
        chart.marks([(x, y_range[0]) for x, y in series if not drawable(y)], "x", f"cross {trace.color}")
    top = y_range[1] + 0.04 * (y_range[1] - y_range[0])
    warned = [(step, name) for step, name in warned if chart.x[0] <= step <= chart.x[1]]
    chart.marks([(step, top) for step, _ in warned], "v", "mark", [name for _, name in warned])
    drawn_as = {(trace.color, trace.dash) for trace in lines}
    named = [t for t in traces if not t.group and (not t.points or (t.color, t.dash) not in drawn_as)]
    note = f"{thinned:,} values: the lowest and highest of each of {buckets} stretches are drawn."
    return chart.finish(
        "; ".join(map(_ends, traces[:MOST_TRACES])) + ".",
        ([note] if thinned else []) + _not_finite(traces) + _ended_before(lines, steps[-1]),
        ["step", *(trace.label for trace in traces)],
        _rows(traces, steps),
        named if len(named) > 1 else [],
    )


def _apart(marks: Sequence[Trace], chart: Chart) -> dict[tuple[float, int], float]:
    """Returns (step, id of the trace) -> how far its mark is moved aside, in steps: of marks that would lie over each
    other all are seen, side by side."""
    wide, high = ((high - low) * MARK / size for (low, high), size in zip((chart.x, chart.y), BOX, strict=True))
    by_step: dict[float, list[tuple[float, int]]] = {}
    for at, trace in enumerate(marks):
        for step, value in trace.series:
            by_step.setdefault(step, []).extend([(value, at)] if drawable(value) else [])
    moved = {}
    for step, placed in by_step.items():
        heap: list[tuple[float, int]] = []
        for value, at in [*sorted(placed), (math.inf, 0)]:
            if heap and value - heap[-1][0] > high:
                each = wide * min(1, MOST_ABREAST / len(heap))
                for i, (_, of) in enumerate(sorted(heap, key=lambda one: one[1])):
                    moved[step, id(marks[of])] = each * (i - (len(heap) - 1) / 2)
                heap = []
            heap.append((value, at))
    return moved


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


def _ended_before(lines: Sequence[Trace], last: float) -> list[str]:
    """Returns where training was logged last, if that is before what else is drawn."""
    end = max((trace.series[-1][0] for trace in lines), default=last)
    one_run = not any(trace.group for trace in lines)
    return [f"Training was last logged at step {plain(end)}."] if end < last and one_run else []


def _not_finite(traces: Sequence[Trace]) -> list[str]:
    steps = sorted({step for trace in traces for step, value in trace.series if not drawable(value)})
    shown = ", ".join(plain(step) for step in steps[:5]) + (f" and {len(steps) - 5:,} more" if len(steps) > 5 else "")
    return [f"× not finite at step{'s' if len(steps) > 1 else ''} {shown}."] if steps else []


# ---- Reward over KL -------------------------------------------------------------------------------------------------


@in_our_style
def frontier_chart(
    key: str, title: str, lines: Sequence[tuple[Trace, Sequence[tuple[float, float, str]]]], notes: Sequence[str]
) -> Chart:
    """Draws for each run a line through its evaluations, in their order, over the KL. Most of what happens does so at
    a small KL, so the axis is that of its root, as in docs/objectives.md.

    Args:
        key, title: see `Chart`.
        lines: how a run is drawn, and its (KL, value, text that shows when the mark is pointed at), all finite.
        notes: what isn't drawn.
    """
    points = [point for _, of in lines for point in of]
    most = max(kl for kl, *_ in points) * 1.1 or 1.0
    values = [value for _, value, _ in points]
    chart = Chart(key, title, (0.0, most), room(min(values), max(values), 0.07), "KL (nats per completion)")
    chart.axes.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0.0)), np.square))
    ticks: list[float] = [0.0]
    for tick in (m * 10.0**e for e in range(-6, 7) for m in (1, 2, 5)):
        if tick <= most and math.sqrt(tick) - math.sqrt(ticks[-1]) > 0.12 * math.sqrt(most):
            ticks.append(tick)
    chart.axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    for look, of in lines:
        xs, ys = np.array([point[:2] for point in of]).T
        chart.axes.plot(xs, ys, "-", gid=chart.trace(look, []))
        gid = chart.trace(replace(look, points=True), [])
        chart.titled(gid, [text for *_, text in of])
        chart.axes.plot(xs, ys, MARKERS[look.shape], markersize=5.5, gid=gid, clip_on=False)
    ends = [f"{look.label}: {number(of[-1][1])} at a KL of {number(of[-1][0])}" for look, of in lines]
    rows = [[f"{look.label}, {text}", number(kl), number(value)] for look, of in lines for kl, value, text in of]
    return chart.finish("; ".join(ends) + ".", notes, ["evaluation", "KL", title], rows)
