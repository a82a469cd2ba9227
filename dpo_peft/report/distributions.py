"""Distributions in a report: histograms, counts in bins, a scatter."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
from matplotlib.ticker import MaxNLocator

from .charts import Chart, Trace, drawable, in_our_style, room
from .facts import number


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


@in_our_style
def counts_chart(
    key: str, title: str, edges: Sequence[int], counts: Mapping[str, Sequence[int]], limit: int | None, note: str
) -> Chart:
    """Draws how many tokens prompts, completions and whole rows have, in shares of each; the whole rows as bars.

    Args:
        key, title: see `Chart`.
        edges: of the bins, tokens.
        counts: name to how many are in each bin, whole rows last.
        limit: `max_length`, which a line marks where it is on the chart.
        note: stands below.
    """
    shares = {name: 100 * np.array(of) / max(sum(of), 1) for name, of in counts.items()}
    highest = max(max(share) for share in shares.values())
    right = max(edges[-1], limit * 1.02) if limit and limit <= 1.5 * edges[-1] else edges[-1]
    chart = Chart(key, title, (edges[0], right), (0.0, highest * 1.08), "tokens", hover="tokens around", unit="%")
    middles = [(a + b) / 2 for a, b in pairwise(edges)]
    looks = (("c0", 0), ("c2", 1), ("c1", 2))
    traces = [Trace(name, [], *look) for name, look in zip(list(shares)[:-1], looks, strict=False)]
    traces = [Trace(list(shares)[-1], [], "gray", filled=True), *traces]
    for trace in traces:
        share = shares[trace.label]
        gid = chart.trace(trace, list(zip(middles, share.tolist(), strict=True)))
        chart.axes.stairs(share, edges, fill=trace.filled, baseline=0 if trace.filled else None, gid=gid)
    if limit and limit <= right:
        chart.axes.axvline(limit, gid="limit")
        space = chart.axes.get_xaxis_transform()
        chart.axes.annotate("max_length", (limit, 1), (-4, 3), space, "offset points", ha="right", gid="unit")
    rows = [[f"{a} to {b - 1}", *(f"{of[i]:,}" for of in counts.values())] for i, (a, b) in enumerate(pairwise(edges))]
    fullest = [f"{name}: most have around {number(middles[int(np.argmax(share))])}" for name, share in shares.items()]
    return chart.finish("; ".join(fullest) + " tokens.", [note], ["tokens", *counts], rows, traces)
