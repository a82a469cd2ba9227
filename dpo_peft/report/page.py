"""Writes runs as one HTML page that needs nothing beside itself: curves, margins, samples, options; several compared.

The page is the same bytes for the same runs. Its policy (Content-Security-Policy) lets nothing be loaded and nothing
run but its own style and script, which are named by their hashes; every text of a run is escaped.
"""

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ..artifacts.card import figures_of
from ..artifacts.rows_kept import turns
from ..disk import one_writer, write_atomically
from ..errors import OptionError
from ..evaluation.verdict import Verdict, verdict
from .charts import MOST_TRACES
from .comparison import axis_of, best_run, ranking, scale_of
from .facts import brief, data_table, duration, figures_at_end, loss_name, number, plain, settings, source_name
from .runs import Json, Run, read_runs
from .samples import TEXT_CHARACTERS
from .views import page_of

TEMPLATES = Path(__file__).parent / "templates"
AXES = {"loss": "loss", "reward": "rewards/margins"}
REPORT = b'<meta name="generator" content="dpo-peft report">'
# Control characters have no place in HTML; their pictures (U+2400 and on) show that they were there.
CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | {0x7F: 0x2421}


def save_report(
    runs: Sequence[str | Path], output: str | Path, title: str = "", overwrite: bool = False
) -> dict[str, Any]:
    """Writes the page of one run, or the comparison of several.

    Args:
        runs: output folders of runs.
        output: the page's file, ending in .html; missing folders are made.
        title: of the page; by default the runs' names.
        overwrite: replace a file that is no report, too.

    Returns:
        The figures of each run, `output` and its size `bytes`.

    Raises:
        OptionError: no runs or too many, a folder that holds none, another ending, or a file that is no report.
        DataError: a damaged file.
    """
    output = Path(output)
    if output.suffix.lower() not in (".html", ".htm"):
        raise OptionError(f"output={str(output)!r}: the page is HTML, so its name must end in .html.")
    if output.is_dir():
        raise OptionError(f"output={str(output)!r} is a folder: give a file.")
    if output.exists() and not overwrite and REPORT not in output.read_bytes():
        raise OptionError(f"output={str(output)!r} is there and no report: give another name, or --overwrite.")
    if not runs:
        raise OptionError("runs is empty: give the output folder of at least one run.")
    if len(runs) > MOST_TRACES:
        raise OptionError(f"runs: {len(runs)} are too many to tell apart in one chart. Give at most {MOST_TRACES}.")
    read = read_runs(runs)
    figures = [figures_at_end(run) for run in read]
    compared = {
        "verdicts": [verdict_of(run) for run in read],
        "order": ranking(figures),
        "best": best_run(read, figures) if len(read) > 1 else (None, ""),
        "scales": scale_of("rewards/margins", read),
        "axes": {name: len({axis_of(key, run) for run in read}) for name, key in AXES.items()},
    }
    title = title or ", ".join(run.name for run in read)
    html = _render(title=title, runs=read, figures=figures, **compared, **page_of(read))
    with one_writer("output", output):
        write_atomically(output, html, private=True)
    return {"output": str(output), "bytes": len(html), "runs": [summary(run) for run in read]}


def verdict_of(run: Run) -> Verdict | None:
    """Returns the verdict on a run; None for one that isn't finished."""
    return verdict({**figures_of(run.log), **run.facts}) if run.facts else None


def summary(run: Run) -> Json:
    """Returns what is said of a run outside of its page: its figures at the end, the verdict if it is known, its
    warnings, what is missing."""
    judged = verdict_of(run)
    return {
        "name": run.name,
        "finished": not run.unfinished,
        **figures_at_end(run),
        **({"verdict": judged._asdict()} if judged else {}),
        "warnings": sorted({warning["name"] for warning in run.warnings}),
        "missing": run.notes,
    }


def _render(**context: object) -> bytes:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        extensions=["jinja2.ext.do"],
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    for tool in (number, brief, plain, duration, source_name, settings, data_table, content_hash, loss_name, turns):
        environment.filters[tool.__name__] = tool
    ours = ((TEMPLATES / f"report.{kind}").read_text("utf-8") for kind in ("css", "js"))
    style, script = map(Markup, ours)
    template = environment.get_template("report.html")
    page = template.render(style=style, script=script, text_characters=TEXT_CHARACTERS, **context)
    return page.lstrip().translate(CONTROLS).encode("utf-8", "backslashreplace")


def content_hash(text: str) -> str:
    """Returns how a policy names a style or a script."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
