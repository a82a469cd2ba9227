"""What a report says in tables: figures, accuracy by length, options and where they differ. Plain data, no drawing."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..artifacts.card import shown_name
from ..reward.agreement import Estimate, Judged, agreement, tally_rows, wilson
from .runs import Found, Row, Run, adapter_facts, base_name

OWN_NAMES = frozenset("output_dir run_name hub_model_id logging_dir report_to".split())  # differ in every run


# ---- Figures --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figures:
    """The headline of a run. What was not logged is None.

    Attributes:
        source: of accuracy, margin, KL and loss: "eval", "eval_NAME" or "train", see `runs.py`.
        pairs: pairs that the accuracy is of, if that is known.
        interval: 95 % interval of the accuracy, if the pairs are known.
        balanced: the mean accuracy of "the better completion is longer" and "is shorter".
        seconds: of the training.
    """

    source: str
    accuracy: float | None
    length_only: float | None
    margin: float | None
    kl: float | None
    loss: float | None
    steps: int | None
    epochs: float | None
    seconds: float | None
    pairs: int | None = None
    interval: tuple[float, float] | None = None
    balanced: float | None = None


def figures_at_end(run: Run, found: Found) -> Figures:
    """The last values of a run: of its first evaluation set, or of training where there was no evaluation."""
    source = next((s for series in found.values() for s in series if s != "train"), "train")

    def last(metric: str) -> float | None:
        value = found.get(metric, {}).get(source, [(0.0, math.nan)])[-1][1]
        return value if math.isfinite(value) else None

    of_source = [row for row in run.examples if row["dataset"] == source]
    last_step = max((row["step"] for row in of_source), default=0)
    examples = [row for row in of_source if row["step"] == last_step]
    data = run.facts.get("data", {}).get(source, {})
    each_is_a_pair = source != "train" and data.get("kept_rows") and data.get("completions") == 2 * data["kept_rows"]
    pairs = len(examples) or (data["kept_rows"] if each_is_a_pair else None)
    accuracy, balanced = last("rewards/accuracies"), last("accuracies/length_balanced")
    sure = wilson(accuracy, pairs) if accuracy is not None and pairs else None
    if balanced is None and (checked := length_check(examples).balanced):
        balanced = checked.value
    entries = [entry for entry in run.log if isinstance(entry.get("step"), int | float)]
    seconds = run.facts.get("seconds") or next((e["train_runtime"] for e in run.log if "train_runtime" in e), None)
    return Figures(
        source=source,
        accuracy=accuracy,
        length_only=last("accuracies/length_only"),
        margin=last("rewards/margins"),
        kl=last("kl"),
        loss=last("loss"),
        steps=max((int(entry["step"]) for entry in entries), default=None),
        epochs=next((entry["epoch"] for entry in reversed(entries) if "epoch" in entry), None),
        seconds=seconds,
        pairs=pairs,
        interval=(sure.low, sure.high) if sure else None,
        balanced=balanced,
    )


def number(value: float, minus: str = "−") -> str:
    """Returns a figure with four digits."""
    if not math.isfinite(value):
        return "not finite"
    text = f"{int(value)}" if float(value).is_integer() and abs(value) < 1e5 else f"{value:.4g}"
    return text.replace("-", minus)


def plain(step: float) -> str:
    """Returns a step: whole where it is whole."""
    return str(int(step)) if float(step).is_integer() else f"{step:.6g}"


def duration(seconds: float) -> str:
    """Seconds for people."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes} min"
    return f"{minutes} min {rest} s" if seconds >= 100 else f"{seconds:.0f} s"


def figure_table(found: Found) -> tuple[list[str], list[list[str]]]:
    """Heads and rows: every metric, first and last, of training and of each evaluation set."""
    sources = sorted({s: None for series in found.values() for s in series}, key=lambda source: source != "train")
    heads = ["metric", *(f"{source_name(source)}, {end}" for source in sources for end in ("first", "last"))]
    rows = []
    for metric, series in found.items():
        ends = [series[source][i][1] if source in series else None for source in sources for i in (0, -1)]
        rows.append([metric, *("" if value is None else number(value) for value in ends)])
    return heads, rows


def source_name(source: str) -> str:
    """A source as a reader should see it."""
    return {"train": "training", "eval": "evaluation"}.get(source) or f"evaluation on {source.removeprefix('eval_')}"


def raised_warnings(run: Run) -> list[dict[str, Any]]:
    """What diagnostics raised: step, name, message."""
    raised = run.facts.get("warnings") or []
    return [
        {"step": warning.get("step"), "name": str(warning.get("name")), "message": str(warning.get("message", ""))}
        for warning in raised
        if isinstance(warning, dict) and warning.get("name")
    ]


# ---- Length ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LengthCheck:
    """How much length explains of one evaluation: rows of a table, the correlation of margin and difference in length
    (NaN if one of them is the same everywhere), and the length-balanced accuracy (see `agreement`)."""

    rows: list[list[str]]
    correlation: float
    balanced: Estimate | None


def length_check(examples: Sequence[Row]) -> LengthCheck:
    """Returns accuracy and margin of the pairs whose chosen completion is shorter, as long, and longer, in tokens.
    Pairs that aren't finite are left out."""
    finite = [row for row in examples if math.isfinite(margin_of(row) + row["tokens_chosen"] - row["tokens_rejected"])]
    length = np.array([row["tokens_chosen"] - row["tokens_rejected"] for row in finite], float)
    margin = np.array([margin_of(row) for row in finite], float)
    rows = []
    for name, part in {"shorter": length < 0, "as long": length == 0, "longer": length > 0}.items():
        # A tie counts as half.
        means = [((np.sign(margin[part]) + 1) / 2).mean(), margin[part].mean()] if part.any() else []
        figures = [f"{means[0]:.3f}", number(float(means[1]))] if means else ["", ""]
        rows.append([f"chosen is {name}", f"{part.sum():,}", *figures])
    varied = len(finite) > 1 and length.std() > 0 and margin.std() > 0
    correlation = float(np.corrcoef(length, margin)[0, 1]) if varied else math.nan
    judged = agreement(tally_rows([_judged(row) for row in finite]))
    return LengthCheck(rows, correlation, judged.length_balanced if judged else None)


def _judged(row: Row) -> Judged:
    scores, lengths = ((row[f"{of}_chosen"], row[f"{of}_rejected"]) for of in ("reward", "tokens"))
    return Judged(scores, lengths, (1.0, 0.0))


def margin_of(row: Row) -> float:
    """Returns the implicit reward of chosen minus that of rejected, as the trainer's metrics scale it."""
    return row["reward_chosen"] - row["reward_rejected"]


# ---- Options --------------------------------------------------------------------------------------------------------


def settings(run: Run) -> dict[str, dict[str, str]]:
    """Heading -> name -> value of what the run was made with; headings without a value are left out."""
    facts = run.facts
    trained, reference = run.recorded("training"), run.recorded("reference")
    run_facts = {
        "base model": base_name(run),
        "objective": facts.get("objective") or trained.get("loss_type"),
        "beta": facts.get("beta", trained.get("beta")),
        "reward": facts.get("reward") or trained.get("reward"),
        "reference": facts.get("reference"),
        "quantization": facts.get("quantization") or trained.get("quantization") or reference.get("quantization"),
    }
    environment = facts.get("environment") or {}
    versions = environment.get("versions") or facts.get("versions") or {}
    stored = facts.get("storage_bytes") or {}
    environment = {key: value for key, value in environment.items() if key != "versions"} | versions
    adapter = {**adapter_facts(run), "trained weights": stored.get("trainable_count")}
    groups = {"Run": run_facts, "Options": run.options, "Adapter": adapter, "Environment": environment}
    cleaned = {
        heading: {name: shown(value) for name, value in group.items() if value is not None and value != ""}
        for heading, group in groups.items()
    }
    return {heading: group for heading, group in cleaned.items() if group}


def data_table(run: Run) -> tuple[list[str], list[list[str]]]:
    """Heads and rows: what became of each dataset's rows. Counts that are 0 everywhere are left out."""
    data = {name: report for name, report in run.facts.get("data", {}).items() if isinstance(report, dict)}
    fields = list(dict.fromkeys(key for report in data.values() for key in report))
    rows = []
    for key in fields:
        values = [report.get(key) for report in data.values()]
        if key not in ("name", "dropped_rows") and any(values):
            rows.append([key.replace("_", " "), *(shown(value) if value is not None else "" for value in values)])
    return ["", *data], rows if data else []


def differences(runs: Sequence[Run]) -> list[list[str]]:
    """Rows (name, value in each run) of the settings that are not the same in all runs, names of the runs left out."""
    every = [settings(run) for run in runs]
    names = dict.fromkeys((heading, name) for groups in every for heading in groups for name in groups[heading])
    order = list(dict.fromkeys(heading for groups in every for heading in groups))
    rows: list[list[str]] = []
    for heading, name in sorted(names, key=lambda one: order.index(one[0])):
        # An option that was recorded nowhere in a run that records its options has its default there.
        values = [
            groups.get(heading, {}).get(name, "default" if heading == "Options" and "Options" in groups else "–")
            for groups in every
        ]
        if name not in OWN_NAMES and len(set(values)) > 1 and [name, *values] not in rows:
            rows.append([name, *values])
    return rows


def shown(value: Any) -> str:
    """A value in a table: floats to six digits, of local paths only the last part."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {shown(item)}" for key, item in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(shown(item) for item in value) or "none"
    text = str(value).replace("`", "")  # Markdown of a card
    return shown_name(text) if os.path.isabs(text) else text
