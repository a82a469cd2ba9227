"""`dpo-peft report`: a run as one HTML page, or several runs compared."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..report.facts import brief, duration
from ..report.page import save_report
from .options import option, parse_options, show

EXAMPLES = (
    "dpo-peft report outputs/run",
    "dpo-peft report outputs/beta0.1 outputs/beta0.5 --output comparison.html --title 'Which beta'",
    "dpo-peft report outputs/run --json",
)


@dataclass
class ReportArguments:
    """Which runs, and where the page goes."""

    runs: list[str] = field(default_factory=list, metadata={"help": "Output folders of runs, finished or not."})
    output: str | None = option(None, "The page. Default: report.html, in the run's folder, or here for several runs.")
    overwrite: bool = option(False, "Replace output where it is no report, too.")
    title: str = option("", "Title of the page. Default: the names of the runs.")
    json: bool = option(False, "Print one JSON object instead of text.")


def report(argv: Sequence[str]) -> None:
    """Show a training run as one HTML page that needs nothing beside itself: curves, margins, accuracy by length,
    samples, options. Several runs are compared on one page."""
    options = parse_options(argv, ReportArguments, "report", report.__doc__, EXAMPLES, "runs")
    folder = Path(options.runs[0]) if len(options.runs) == 1 else Path()
    output = options.output or folder / "report.html"
    result = save_report(options.runs, output, options.title, options.overwrite)
    show(result, as_text(result), options.json)


def as_text(result: Mapping[str, Any]) -> str:
    """Returns a line for each run, with notes on what is missing, and where the page is."""
    lines = []
    for run in result["runs"]:
        lines += [headline(run), *(f"  {note}" for note in run["missing"])]
    return "\n".join([*lines, f"{result['output']}: {result['bytes'] / 1000:.0f} kB, open it in a browser."])


def headline(run: Mapping[str, Any]) -> str:
    """Returns a run's name, the verdict on it and its last figures in one line."""
    parts = [run["verdict"]["level"]] if "verdict" in run else []
    if "accuracy" in run:
        of = "held-out" if run["source"] != "train" else "training"
        about = [run["note"]] if "note" in run else []
        about += [f"pick the longer {run['length_only']:.3f}"] if "length_only" in run else []
        parts.append(f"{of} accuracy {run['accuracy']:.3f}" + (f" ({'; '.join(about)})" if about else ""))
    parts += [f"{name} {brief(run[key])}" for name, key in (("margin", "margin"), ("KL", "kl")) if key in run]
    parts += [f"{run['steps']:,} steps"] if "steps" in run else []
    parts += [duration(run["seconds"])] if "seconds" in run else []
    parts += ["not finished"] if not run["finished"] else []
    parts += [f"warnings: {', '.join(run['warnings'])}"] if run["warnings"] else []
    return f"{run['name']}: {', '.join(parts) or 'nothing logged'}"
