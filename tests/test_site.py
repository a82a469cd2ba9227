"""The documentation's site: it builds without a warning, and reads without a network, in a real browser too."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from browser import Browser
from paths import REPO

pytest_plugins = ["browser"]
pytestmark = pytest.mark.slow
for _module in ("material", "mkdocstrings", "ziamath"):
    pytest.importorskip(_module, reason="the extra `docs` isn't installed")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` does."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_every_page_opens_alone_and_fits_a_phone(site: Path, browser: Browser) -> None:
    """No address but the site's own, nothing on the console, nothing beyond the right edge, no LaTeX left."""
    page, bad = browser.page(width=390, height=800, phone=True), []
    for path in sorted({*site.rglob("*.html")} - {site / "404.html"}):  # that one is for servers
        browser.events.clear()
        page.open(path)
        name, text = path.relative_to(site).as_posix(), page.run("document.querySelector('article')?.innerText ?? ''")
        asked = [url for url in page.requests() if not url.startswith(("file:", "data:"))]
        wide = page.run("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        left = re.findall(r"\\(?:frac|log|pi|text|sigma)\b", text) if "repo/" not in name else []
        if asked or wide > 0 or left or (complaints := page.complaints()):
            bad.append(f"{name}: asked for {asked}, {wide} px too wide, LaTeX {left}, console {complaints}")
    assert not bad, "\n".join(bad)


def test_search_finds_an_option(site: Path, browser: Browser) -> None:
    page = browser.page()
    page.open(site / "index.html")
    page.run("document.querySelector('label[for=__search]').click()")
    page.run("""(() => {
        const box = document.querySelector('[data-md-component=search-query]');
        box.focus();
        box.value = 'discount_gamma';
        for (const kind of ['input', 'keyup']) box.dispatchEvent(new Event(kind, {bubbles: true}));
    })()""")
    found: list[str] = []
    for _ in range(100):  # the index is read by a worker
        found = page.run("[...document.querySelectorAll('.md-search-result__item a')].map(link => link.href)")
        if found:
            break
        time.sleep(0.2)
    assert any("objectives.html" in link for link in found), found


def test_llms_txt_lists_every_page_of_the_navigation(site: Path) -> None:
    text = (site / "llms.txt").read_text("utf-8")
    links = re.findall(r"\]\((\S+)\)", text)
    assert len(links) > 30 and not [link for link in links if not (site / link).is_file()]
    named = re.findall(r"^\s+- .*: (\S+)\.md$", (REPO / "mkdocs.yml").read_text("utf-8"), flags=re.MULTILINE)
    assert not {f"{name.replace('README', 'index')}.html" for name in named} - set(links)
