"""matplotlib's drawing of a chart as a part of the page.

Of matplotlib's SVG the shapes and texts are taken and the styles left: the page's own style sheet colors them by
class, in both themes, and its policy would refuse style attributes. Element ids begin with the chart's key.
"""

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from io import StringIO

from markupsafe import Markup, escape
from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Transform

WIDTH, HEIGHT = 360, 210  # near the size on the screen, so that 11 units of text are 11 pixels or little less
LEFT, RIGHT, TOP, BOTTOM = 46, 350, 14, 182  # the plot's box
ROUND = [1, 2, 2.5, 5, 10]
# Reset first: the machine's own matplotlibrc would change the bytes of the page.
as_svg = style.context({"svg.fonttype": "none", "svg.hashsalt": "dpo-peft", "path.simplify": False}, after_reset=True)


def element(name: str, *children: object, **attributes: object) -> Markup:
    """Returns an element, everything escaped. In names `_` stands for `-`; empty values are left out."""
    written = Markup().join(
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), value)
        for key, value in attributes.items()
        if value not in ("", None)
    )
    return Markup("<{0}{1}>{2}</{0}>").format(name, written, Markup().join(escape(child) for child in children))


class Plot:
    """One chart while it is drawn: matplotlib's `axes`, of 360 by 210 units with the box that `data-box` names.

    Args:
        x_label: stands below the axis of steps or values.
        x, y: ranges of the axes.
        whole: steps are whole numbers.
        unit: stands behind every number of the vertical axis.
    """

    def __init__(
        self, x_label: str, x: tuple[float, float], y: tuple[float, float], whole: bool = False, unit: str = ""
    ):
        self.x, self.y, self.unit = x, y, unit
        self._parts: dict[str, dict[str, str]] = {name: {"class": name} for name in ("axis", "gridline", "unit")}
        self._titles: dict[str, Iterator[str]] = {}
        self.figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72))
        self.figure.patch.set_visible(False)
        box = (LEFT / WIDTH, 1 - BOTTOM / HEIGHT, (RIGHT - LEFT) / WIDTH, (BOTTOM - TOP) / HEIGHT)
        self.axes = self.figure.add_axes(box, xlim=x, ylim=y)
        self.axes.patch.set_visible(False)
        self.axes.xaxis.set_major_locator(MaxNLocator(6, steps=ROUND, integer=whole))
        self.axes.yaxis.set_major_locator(MaxNLocator(5, steps=ROUND))
        self.axes.ticklabel_format(axis="x", style="plain", useOffset=False)
        self.axes.ticklabel_format(axis="y", scilimits=(-4, 6), useOffset=False)
        if unit:
            self.axes.yaxis.set_major_formatter(f"{{x:g}} {unit}")
        self.axes.tick_params(length=0, pad=6)
        self.axes.grid(axis="y", gid="gridline")
        self.axes.set_axisbelow(True)
        self.axes.spines[["left", "right", "top"]].set_visible(False)
        self.axes.spines["bottom"].set_gid("axis")
        self.figure.text(RIGHT / WIDTH, 2 / HEIGHT, x_label, ha="right", gid="unit")

    def part(self, titles: Sequence[str] = (), **attributes: str) -> str:
        """Returns the `gid` for an artist whose group on the page gets these attributes (`class_` for class), and
        whose marks get the titles."""
        name = f"part{len(self._parts)}"
        self._parts[name] = attributes
        self._titles[name] = iter(titles)
        return name

    def guide(self, at: float, label: str = "", vertical: bool = False) -> None:
        """Draws a dotted line at a value, and says above its end what it is."""
        (self.axes.axvline if vertical else self.axes.axhline)(at, gid=self.part(class_="guide"))
        if label:
            self._note(label, (1, at), self.axes.get_yaxis_transform(), (0, 3), "right")

    def zero(self, words: bool = True) -> None:
        """Marks where margins change sign, if it is on the chart."""
        low, high = self.x
        if not low <= 0 <= high:
            return
        self.guide(0.0, vertical=True)
        enough, above = 46 / (RIGHT - LEFT) * (high - low), self.axes.get_xaxis_transform()
        if words and -low > enough:
            self._note("wrong", (0, 1), above, (-5, 3), "right")
        if words and high > enough:
            self._note("right", (0, 1), above, (5, 3), "left")

    def _note(
        self, text: str, at: tuple[float, float], space: Transform, away: tuple[float, float], side: str
    ) -> None:
        self.axes.annotate(text, at, away, space, "offset points", ha=side, gid="unit")

    def svg(self, key: str, described: str, x_name: str) -> Markup:
        """Returns the drawing. It is named by the heading `key`-title; x_name "" has nothing to hover."""
        written = StringIO()
        self.figure.savefig(written, format="svg")
        body = self._body(ET.fromstring(written.getvalue()), key, iter(()))
        attributes = {
            "class_": "chart",
            "viewBox": f"0 0 {WIDTH} {HEIGHT}",
            "role": "img",
            "aria_labelledby": f"{key}-title",
            "aria_describedby": f"{key}-desc",
            "tabindex": "0" if x_name else "",
            "data_x": x_name,
            "data_unit": self.unit,
            "data_domain": " ".join(map(repr, (*self.x, *self.y))),
            "data_box": f"{LEFT} {RIGHT} {TOP} {BOTTOM}",
        }
        return element("svg", element("desc", described, id=f"{key}-desc"), body, **attributes)

    def _body(self, node: ET.Element, key: str, titles: Iterator[str]) -> Markup:
        """What the page takes of a node, and of all below it."""
        name, tag = node.get("id", ""), node.tag.rpartition("}")[2]
        titles = self._titles.get(name, titles)
        children = Markup().join(self._body(child, key, titles) for child in node)
        if tag == "path":
            return element("path", id=f"{key}-{name}" if name else "", d=_short(node.get("d", "")))
        if tag == "use":
            href = next(value for attribute, value in node.items() if attribute.endswith("href"))
            title = [element("title", text) for text in [next(titles, "")] if text]
            return element("use", *title, href=f"#{key}-{href[1:]}", **_place(node))
        if tag == "text":
            (anchor,) = re.findall(r"text-anchor: (\w+)", node.get("style", "")) or [""]
            return element("text", node.text, **_place(node), text_anchor=anchor)
        if tag == "defs":
            return element("defs", children) if children else children
        return element("g", children, **self._parts[name]) if name in self._parts and children else children


def _place(node: ET.Element) -> dict[str, str]:
    return {name: px(float(node.get(name, 0))) for name in ("x", "y")}


def _short(path: str) -> str:
    """A path without spaces that nobody needs, to a tenth of a pixel; a point between two gaps becomes a dot."""
    path = re.sub(r"-?\d+\.\d+", lambda found: px(float(found[0])), re.sub(r"\s*([A-Za-z])\s*", r"\1", path.strip()))
    return re.sub(r"(M[^A-Za-z]+)(?=M|$)", r"\1h0", path)


def px(value: float) -> str:
    """A coordinate to a tenth of a pixel."""
    return f"{round(value, 1) + 0.0:g}"  # + 0.0: no minus before a zero
