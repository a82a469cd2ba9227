"""The report in a real browser: drawn, readable on a phone, silent, alone. Skipped where there is no Chromium."""

from pathlib import Path

import pytest
from browser import Browser, Page
from report_helpers import HOSTILE, chart, log_of, make_run, points_of, read_page, samples_of, write_lines

from dpo_peft.report.page import save_report

pytest_plugins = ["browser"]
PHONE = {"width": 375, "height": 700, "phone": True}
BOXES = """[...document.querySelectorAll("svg.chart")].map(svg => {
    const box = svg.getBoundingClientRect();
    const marks = svg.querySelectorAll("g.line path, g.points use, g.disc use, g.ring use");
    return [box.left, box.right, box.width, box.height, marks.length];
})"""
MARKS = """[...document.querySelectorAll("svg.chart g.line path, svg.chart g.bars path")].map(path => {
    const box = path.getBBox(), label = path.parentElement.dataset.label || "least squares";
    return [label, box.width, box.height, getComputedStyle(path).stroke];
})"""
# Everything that holds text, out of view on the right though no box around it scrolls.
OVERFLOWING = """[...document.querySelectorAll("body *")].filter(element => {
    if (!element.checkVisibility() || element.closest(".scroll, svg, #tip")) return false;
    return element.getBoundingClientRect().right > document.documentElement.clientWidth + 0.5;
}).map(element => element.outerHTML.slice(0, 80))"""


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of one run, with hostile samples, a warning and very long words."""
    folder = tmp_path_factory.mktemp("one") / ("run-with-a-name-" + "long" * 20)
    warnings = [{"step": 30, "name": "high-kl", "message": "w" * 200}]
    log = [{**entry, "custom": None} if "loss" in entry else entry for entry in log_of(40)]  # drawn without a value
    make_run(folder, log_history=log, warnings=warnings, options={"loss_type": ["sigmoid"], "o" * 90: "v" * 300})
    rows = samples_of((0, 20, 40), (HOSTILE, "p" * 300))
    write_lines(folder / "samples.jsonl", [{**row, "completion": HOSTILE + "c" * 300} for row in rows])
    save_report([folder], folder / "report.html")
    return folder / "report.html"


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison of three runs."""
    root = tmp_path_factory.mktemp("several")
    runs = [make_run(root / f"run{i}", log_history=log_of(40, seed=i), beta=0.1 * i) for i in range(3)]
    save_report(runs, root / "report.html")
    return root / "report.html"


@pytest.fixture(scope="module", params=["one run", "several runs"])
def report(request: pytest.FixtureRequest, one: Path, several: Path) -> Path:
    return one if request.param == "one run" else several


def box_of(selector: str, at: int = 0) -> str:
    """Script for left, top, width and height of an element in the window."""
    box = f"document.querySelectorAll({selector!r})[{at}].getBoundingClientRect()"
    return f"(b => [b.left, b.top, b.width, b.height])({box})"


def silent_and_alone(page: Page, path: Path) -> None:
    """Nothing was asked for but the file and its empty icon, and nothing went wrong."""
    assert [url for url in page.requests() if url != "data:,"] == [path.resolve().as_uri()]
    assert page.complaints() == []


def test_charts_are_drawn(browser: Browser, report: Path) -> None:
    page = browser.page(width=1280).open(report)
    silent_and_alone(page, report)
    boxes = page.run(BOXES)
    assert len(boxes) == len(read_page(report).all("svg", class_="chart")) >= 11
    for left, right, width, height, marks in boxes:
        assert 0 <= left and right <= 1280 and width > 250 and height > 150 and marks >= 1
    for label, width, height, stroke in page.run(MARKS):
        assert width + height > 20 or label == "custom", label
        assert stroke.startswith("rgb") and stroke != "rgb(0, 0, 0)", label  # the style sheet was let in


def test_readable_on_a_phone(browser: Browser, report: Path) -> None:
    page = browser.page(**PHONE).open(report)
    silent_and_alone(page, report)
    page.run("document.querySelectorAll('details').forEach(fold => fold.open = true)")
    assert page.run("document.scrollingElement.scrollWidth") == 375
    assert page.run(OVERFLOWING) == []
    for left, right, width, height, _ in page.run(BOXES):
        assert left >= 0 and right <= 375 and width > 270 and height > 150
    # Letters on charts are scaled with them; those elsewhere aren't.
    sizes = page.run("[...document.querySelectorAll('svg.chart text')].map(t => t.getBoundingClientRect().height)")
    assert min(sizes) > 8.5
    letters = "[...document.querySelectorAll('p, td, dd, li')].map(e => parseFloat(getComputedStyle(e).fontSize))"
    assert min(page.run(letters)) >= 12


def test_pointing_at_a_chart_shows_its_values(browser: Browser, one: Path) -> None:
    page = browser.page(width=1280).open(one)
    page.run("document.querySelector('svg.chart').scrollIntoView({block: 'center', behavior: 'instant'})")
    page.run("new Promise(done => setTimeout(done, 100))")
    left, top, width, height = page.run(box_of("svg.chart"))
    assert page.run("document.querySelector('#tip').checkVisibility()") is False
    steps = dict(points_of(chart(read_page(one), "Loss"), "loss"))
    # 46 to 350 of 360 units are steps 1 to 40.
    x = left + width * (46 + (25 - 1) / 39 * 304) / 360
    page.move(x, top + height / 2)
    shown = page.run("document.querySelector('#tip').innerText.split('\\n').map(s => s.trim()).filter(Boolean)")
    assert shown[:1] == ["step 25"] and shown[1].startswith("loss") and f"{steps[25]:g}" in " ".join(shown)
    tip_left, tip_top, tip_width, tip_height = page.run(box_of("#tip"))
    assert tip_left >= 0 and tip_left + tip_width <= 1280 and tip_top >= 0 and tip_top + tip_height <= 900
    assert page.run("document.querySelectorAll('svg.chart .cursor circle').length") >= 1
    page.move(2, 2)
    assert page.run("document.querySelector('#tip').checkVisibility()") is False
    # The same by keys.
    page.run("document.querySelector('svg.chart').focus()")
    for _ in range(3):
        page.press("ArrowRight")
    assert page.run("document.querySelector('#tip').firstChild.textContent") == "step 3"
    page.press("Escape")
    assert page.run("document.querySelector('#tip').checkVisibility()") is False


def test_every_chart_bears_a_pointer(browser: Browser, one: Path) -> None:
    """Also one whose values are all not finite."""
    page = browser.page(width=1280).open(one)
    count = page.run("document.querySelectorAll('svg.chart').length")
    for i in range(count):
        chart_i = f"document.querySelectorAll('svg.chart')[{i}]"
        page.run(f"{chart_i}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
        left, top, width, height = page.run(box_of("svg.chart", i))
        page.move(left + width / 2, top + height / 2)
    assert count >= 11 and page.complaints() == []


def test_folds_open(browser: Browser, one: Path) -> None:
    page = browser.page(width=1280).open(one)
    inside = "document.querySelector('article details .text').checkVisibility()"
    assert page.run(inside) is False
    page.run("document.querySelector('article details summary').click()")
    assert page.run(inside) is True
    page.run("document.querySelector('figure details summary').click()")
    assert page.run("document.querySelector('figure details td').checkVisibility()") is True


def test_a_run_is_brought_out(browser: Browser, several: Path) -> None:
    page = browser.page(width=1280).open(several)
    opacity = "['r0', 'r1', 'r2'].map(g => +getComputedStyle(document.querySelector(`svg [data-group=${g}]`)).opacity)"
    assert page.run(opacity) == [1, 1, 1]
    page.run("document.querySelectorAll('.key button')[1].click()")
    faint = page.run(opacity)
    assert faint[1] == 1 and faint[0] == faint[2] < 0.5
    page.run("document.querySelectorAll('.key button')[1].click()")
    assert page.run(opacity) == [1, 1, 1]


def luminance(color: str) -> float:
    """Of "rgb(r, g, b)", as WCAG defines it."""
    parts = [float(part) / 255 for part in color.strip("rgba()").split(",")[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_contrast_in_both_themes(browser: Browser, report: Path, dark: bool) -> None:
    """Text at least 4.5 to its ground, marks at least 3 (WCAG 2.2, AA)."""
    page = browser.page(width=1280, dark=dark).open(report)
    silent_and_alone(page, report)
    style = "getComputedStyle(document.querySelector({!r})).{}"
    ground, card = (page.run(style.format(s, "backgroundColor")) for s in ("body", ".card"))
    assert (luminance(ground) < 0.1) == (luminance(card) < 0.1) == dark
    for selector in ("h1", ".kind", "nav a", "table caption"):
        assert min(contrast(page.run(style.format(selector, "color")), g) for g in (ground, card)) >= 4.5, selector
    assert contrast(page.run(style.format("svg.chart text", "fill")), card) >= 4.5
    for label, _, _, stroke in page.run(MARKS):
        assert contrast(stroke, card) >= 3, label
    if page.run("!!document.querySelector('.warnings li')"):
        strong, box = (
            page.run(style.format(".warnings strong", "color")),
            page.run(style.format(".warnings li", "backgroundColor")),
        )
        assert contrast(strong, box) >= 4.5


def test_print_is_light_and_whole(browser: Browser, one: Path) -> None:
    page = browser.page(width=794, dark=True).open(one)
    page.call(
        "Emulation.setEmulatedMedia", media="print", features=[{"name": "prefers-color-scheme", "value": "dark"}]
    )
    assert luminance(page.run("getComputedStyle(document.querySelector('.card')).backgroundColor")) == 1
    assert page.run("document.scrollingElement.scrollWidth") <= 794
    assert page.run("document.querySelector('nav').checkVisibility()") is False


@pytest.mark.attack("hostile rows")
def test_hostile_text_does_nothing(browser: Browser, one: Path, tmp_path: Path) -> None:
    page = browser.page().open(one)
    assert page.run("typeof hacked") == "undefined"
    shown = HOSTILE.replace("\x00", "␀").replace("\x1b", "␛")
    assert page.run("document.querySelector('article .text').textContent") == shown
    # The same text, neither escaped nor under the policy, does act: the check can fail.
    naked = tmp_path / "naked.html"
    naked.write_text(f"<!DOCTYPE html><title>x</title><body>{HOSTILE}", "utf-8")
    assert browser.page().open(naked).run("typeof hacked") == "number"


@pytest.mark.attack("hostile rows")
def test_the_policy_stops_what_escaping_let_through(browser: Browser, one: Path, tmp_path: Path) -> None:
    """And requests and complaints are seen: the silence that the other tests ask for is not deafness."""
    injected = tmp_path / "injected.html"
    bad = "<img src='http://127.0.0.1:9/x.png'><script>hacked = 1</script><b style='color: red'>x</b><main>"
    injected.write_text(one.read_text("utf-8").replace("<main>", bad), "utf-8")
    page = browser.page().open(injected)
    assert page.run("typeof hacked") == "undefined"
    complaints = " ".join(page.complaints())
    for kind in ("script", "image", "style"):
        assert kind in complaints
    with pytest.raises(AssertionError):
        silent_and_alone(page, injected)
    loading = tmp_path / "loading.html"
    loading.write_text("<!DOCTYPE html><script>console.error('x'); nowhere()</script><img src='missing.png'>", "utf-8")
    page = browser.page().open(loading)
    assert any(url.endswith("missing.png") for url in page.requests())
    assert len(page.complaints()) >= 2
