"""Parts of a chart as SVG: axes and their numbers, marks, the drawing around them."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape
from matplotlib.ticker import MaxNLocator

WIDTH, HEIGHT = 360, 210  # near the size on the screen, so that 11 units of text are 11 pixels or little less
LEFT, RIGHT, TOP, BOTTOM = 46, 350, 14, 182  # the plot's box
DASHES = ("", "7 3", "2 3", "9 3 2 3")
COLOURS = 6
MOST_TRACES = COLOURS * len(DASHES)  # told apart by colour and dashes together
HUGE = 1e150  # a difference of values beyond it overflows: drawn as not finite


@dataclass(frozen=True)
class Axis:
    """Values from `low` to `high` on pixels from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, most: int, whole: bool = False) -> list[float]:
        locator = MaxNLocator(nbins=most, steps=[1, 2, 2.5, 5, 10], integer=whole)
        slack = 1e-9 * (self.high - self.low)
        ticks = (float(tick) for tick in locator.tick_values(self.low, self.high))
        return [tick for tick in ticks if self.low - slack <= tick <= self.high + slack]


def element(name: str, *children: object, **attributes: object) -> Markup:
    """An SVG element, everything escaped. In names `_` stands for `-`; empty values are left out."""
    written = Markup().join(
        Markup(' {}="{}"').format(Markup(key.replace("_", "-")), value)
        for key, value in attributes.items()
        if value != ""
    )
    inner = Markup().join(escape(child) for child in children)
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), written, inner)


def number(value: float, plain_minus: bool = False) -> str:
    """A figure with four digits."""
    if not math.isfinite(value):
        return "not finite"
    text = f"{int(value)}" if float(value).is_integer() and abs(value) < 1e5 else f"{value:.4g}"
    return text if plain_minus else text.replace("-", "−")


def plain(step: float) -> str:
    """A step: whole where it is whole."""
    return str(int(step)) if float(step).is_integer() else f"{step:.6g}"


def px(value: float) -> str:
    """A coordinate to a tenth of a pixel."""
    return f"{value:.1f}".removesuffix(".0")


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """Equally many decimals for all, as few as tell them apart."""
    spacing = min((b - a for a, b in zip(ticks, ticks[1:], strict=False)), default=1.0)
    largest = max(map(abs, ticks), default=0.0)
    if spacing < 1e-4 or largest >= 1e6:
        texts = [f"{tick:.2e}" if tick else "0" for tick in ticks]
        texts = [_short_power(text) for text in texts]
    else:
        decimals = next(d for d in range(7) if abs(round(spacing, d) - spacing) < 1e-3 * spacing)
        texts = [f"{tick + 0.0:.{decimals}f}" for tick in ticks]
    return [text.replace("-", "−") for text in texts]


def _short_power(text: str) -> str:
    mantissa, _, power = text.partition("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(power)}" if power else text


def frame(x: Axis, y: Axis, x_label: str, whole: bool = False, percent: bool = False) -> Markup:
    """Grid, axis, and the numbers along both."""
    x_ticks, y_ticks = x.ticks(6, whole), y.ticks(5)
    parts = [element("path", **{"class": "gridline", "d": "".join(f"M{LEFT} {px(y.at(t))}H{RIGHT}" for t in y_ticks)})]
    parts.append(element("path", **{"class": "axis", "d": f"M{LEFT} {BOTTOM}H{RIGHT}"}))
    for tick, text in zip(y_ticks, tick_labels(y_ticks), strict=True):
        at = {"x": LEFT - 6, "y": px(y.at(tick) + 3.8), "text_anchor": "end"}
        parts.append(element("text", text + (" %" if percent else ""), **at))
    for tick, text in zip(x_ticks, tick_labels(x_ticks), strict=True):
        where = x.at(tick)
        where, anchor = (RIGHT, "end") if where > RIGHT - 12 else (where, "middle")
        parts.append(element("text", text, x=px(where), y=BOTTOM + 14, text_anchor=anchor))
    parts.append(element("text", x_label, **{"class": "unit", "x": RIGHT, "y": HEIGHT - 2, "text_anchor": "end"}))
    return Markup().join(parts)


def guide_line(y: Axis, value: float) -> Markup:
    return element("path", **{"class": "guide", "d": f"M{LEFT} {px(y.at(value))}H{RIGHT}"})


def guide_text(y: Axis, value: float, label: str) -> Markup:
    return element("text", label, **{"class": "unit", "x": RIGHT, "y": px(y.at(value) - 3), "text_anchor": "end"})


def zero_line(x: Axis, y: Axis, words: bool = True) -> Markup:
    """Where margins change sign, if it is on the chart."""
    if not x.low <= 0 <= x.high:
        return Markup()
    at = x.at(0.0)
    parts = [element("path", **{"class": "guide", "d": f"M{px(at)} {TOP}V{BOTTOM}"})]
    unit = {"class": "unit", "y": TOP - 3}
    if words and at - LEFT > 46:
        parts.append(element("text", "wrong", **unit, x=px(at - 5), text_anchor="end"))
    if words and RIGHT - at > 46:
        parts.append(element("text", "right", **unit, x=px(at + 5)))
    return Markup().join(parts)


def mark(at: float, name: str) -> Markup:
    d = f"M{px(at - 4)} {TOP - 10}h8l-4 7z"
    return element("path", element("title", name), **{"class": "mark", "d": d})


def shape_path(shape: int, x: float, y: float) -> str:
    """Circle, square, diamond or triangle around a point, as a path."""
    if shape == 0:
        return f"M{px(x - 3.4)} {px(y)}a3.4 3.4 0 1 0 6.8 0a3.4 3.4 0 1 0 -6.8 0z"
    if shape == 1:
        return f"M{px(x - 3)} {px(y - 3)}h6v6h-6z"
    if shape == 2:
        return f"M{px(x)} {px(y - 4.3)}l4.3 4.3l-4.3 4.3l-4.3 -4.3z"
    return f"M{px(x)} {px(y - 4)}l4 7h-8z"


def cross(x: float, y: float) -> str:
    return f"M{px(x - 3)} {px(y - 3)}l6 6m0 -6l-6 6"


def drawing(key: str, described: str, body: Iterable[Markup], x: Axis, y: Axis, x_name: str, unit: str = "") -> Markup:
    """The whole drawing. Named by the heading `key`-title on the page; x_name "" has nothing to hover."""
    attributes = {
        "class": "chart",
        "viewBox": f"0 0 {WIDTH} {HEIGHT}",
        "role": "img",
        "aria_labelledby": f"{key}-title",
        "aria_describedby": f"{key}-desc",
        "tabindex": "0" if x_name else "",
        "data_x": x_name,
        "data_unit": unit,
        "data_domain": f"{x.low!r} {x.high!r} {y.low!r} {y.high!r}",
        "data_box": f"{LEFT} {RIGHT} {TOP} {BOTTOM}",
    }
    return element("svg", element("desc", described, id=f"{key}-desc"), *body, **attributes)


def room(low: float, high: float, share: float) -> tuple[float, float]:
    """A range with room at both ends; never empty."""
    room = (high - low) * share
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-9):
        room = max(abs(low) * 0.1, 0.5)
    return low - room, high + room


def drawable(value: float) -> bool:
    return math.isfinite(value) and abs(value) < HUGE
