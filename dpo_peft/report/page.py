"""Runs as one HTML page that needs nothing beside itself: curves, margins, samples, options; or several compared.

The page is the same bytes for the same runs. Its policy (Content-Security-Policy) lets nothing be loaded and nothing
run but its own style and script, which are named by their hashes; every text of a run is escaped.
"""

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ..errors import OptionError
from ..files import write_atomically
from .facts import (
    Figures,
    data_table,
    figure_table,
    figures_at_end,
    raised_warnings,
    settings,
)
from .runs import Run, metric_series, read_runs
from .svg import MOST_TRACES, number
from .views import page_of_one, page_of_several

TEMPLATES = Path(__file__).parent / "templates"
# Control characters have no place in HTML; their pictures (U+2400 and on) show that they were there.
CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | {0x7F: 0x2421}


@dataclass(frozen=True)
class Report:
    """A page, and its figures as `dpo-peft report --json` prints them."""

    html: bytes
    summary: dict[str, Any]


def save_report(runs: Sequence[str | Path], output: str | Path, title: str = "") -> dict[str, Any]:
    """Write the page of one run, or the comparison of several.

    Args:
        runs: output folders of runs.
        output: the page's file, ending in .html; missing folders are made.
        title: of the page; by default the runs' names.

    Returns:
        The figures of each run, `output` and its size `bytes`.

    Raises:
        OptionError: no runs or too many, a folder that holds none, or another ending.
        DataError: a damaged file.
    """
    output = Path(output)
    if output.suffix.lower() not in (".html", ".htm"):
        raise OptionError(f"output={str(output)!r}: the page is HTML, so its name must end in .html.")
    if output.is_dir():
        raise OptionError(f"output={str(output)!r} is a folder: give a file.")
    if not runs:
        raise OptionError("runs is empty: give the output folder of at least one run.")
    if len(runs) > MOST_TRACES:
        raise OptionError(f"runs: {len(runs)} are too many to tell apart in one chart. Give at most {MOST_TRACES}.")
    report = make_report(read_runs(runs), title)
    write_atomically(output, report.html)
    return {"output": str(output), "bytes": len(report.html), **report.summary}


def make_report(runs: Sequence[Run], title: str = "") -> Report:
    """The page of runs that were read."""
    found = [metric_series(run) for run in runs]
    figures = [figures_at_end(run, one) for run, one in zip(runs, found, strict=True)]
    context = page_of_one(runs[0], found[0], figures[0]) if len(runs) == 1 else page_of_several(runs, found, figures)
    html = _render(
        title=title or ", ".join(run.name for run in runs),
        runs=[
            {
                "run": run,
                "figures": one,
                "settings": settings(run),
                "data": data_table(run),
                "all_figures": figure_table(run),
                "warnings": raised_warnings(run),
            }
            for run, one in zip(runs, figures, strict=True)
        ],
        **context,
    )
    return Report(html, {"runs": [_summary(run, one) for run, one in zip(runs, figures, strict=True)]})


def _summary(run: Run, figures: Figures) -> dict[str, Any]:
    return {
        "name": run.name,
        "finished": not run.unfinished,
        **{key: value for key, value in vars(figures).items() if value is not None},
        "warnings": sorted({warning["name"] for warning in raised_warnings(run)}),
        "missing": run.notes,
    }


# ---- The page -------------------------------------------------------------------------------------------------------


def _render(**context: Any) -> bytes:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["number"] = number
    style, script = ((TEMPLATES / f"report.{kind}").read_text("utf-8") for kind in ("css", "js"))
    policy = (
        f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    page = environment.get_template("report.html").render(
        policy=policy, style=Markup(style), script=Markup(script), **context
    )
    return page.lstrip().translate(CONTROLS).encode("utf-8", "backslashreplace")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
