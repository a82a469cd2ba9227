"""Works out what a report says in tables: figures, accuracy by length, options and where they differ."""

import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ..artifacts.card import adapter_facts, shown_name
from ..reward.agreement import Estimate, Judged, agreement, tally_rows, wilson, win
from ..training.metrics import NOISE_NOTE, within_noise
from .runs import Json, Run

# They differ in every run; the objective is the loss with its source.
OWN_NAMES = frozenset("output_dir run_name hub_model_id logging_dir report_to objective".split())


# ---- Figures --------------------------------------------------------------------------------------------------------


def figures_at_end(run: Run) -> Json:
    """Returns the headline of a run: its last values on its first evaluation set, or of training where there was no
    evaluation. What was not logged is left out.

    - source: of accuracy, margin, KL and loss: "eval", "eval_NAME" or "train", see `metric_series`.
    - accuracy, length_only, margin, kl, loss: metrics.
    - note: "margins within noise", if they are (`within_noise`).
    - steps, epochs, seconds: of the training; rows_used, of `rows` that could be.
    - pairs: pairs that the accuracy is of; interval: 95 % interval of the accuracy, if the pairs are known.
    - balanced: the mean accuracy of "the better completion is longer" and "is shorter".
    """
    source = next((source for source in run.sources if source != "train"), "train")
    last = {metric: series[source][-1][1] for metric, series in run.metrics.items() if source in series}
    last = {metric: value for metric, value in last.items() if math.isfinite(value)}
    evaluated = run.evaluations.get(source, {})
    examples = evaluated[max(evaluated)] if evaluated else []
    data = run.facts.get("data", {}).get(source, {})
    each_is_a_pair = source != "train" and data.get("kept_rows") and data.get("completions") == 2 * data["kept_rows"]
    pairs = len(examples) or (data["kept_rows"] if each_is_a_pair else None)
    accuracy, balanced = last.get("rewards/accuracies"), length_check(examples).balanced
    sure = wilson(accuracy, pairs) if accuracy is not None and pairs else None
    beta, reward = (run.facts.get(name, run.recorded("training").get(name)) for name in ("beta", "reward"))
    noisy = within_noise(last.get("rewards/margins"), beta, last.get("kl"), reward or "log_ratio")
    entries = [entry for entry in run.log if isinstance(entry.get("step"), int | float)]
    runtime = next((entry["train_runtime"] for entry in reversed(run.log) if "train_runtime" in entry), None)
    figures = {
        "source": source,
        "accuracy": accuracy,
        "note": NOISE_NOTE if noisy and accuracy is not None else None,
        "length_only": last.get("accuracies/length_only"),
        "margin": last.get("rewards/margins"),
        "kl": last.get("kl"),
        "loss": last.get("loss"),
        "steps": max((int(entry["step"]) for entry in entries), default=None),
        "epochs": next((entry["epoch"] for entry in reversed(entries) if "epoch" in entry), None),
        "rows_used": run.facts.get("rows_used"),
        "rows": run.facts.get("data", {}).get("train", {}).get("kept_rows"),
        "seconds": run.facts.get("seconds") or runtime,
        "pairs": pairs,
        "interval": (sure.low, sure.high) if sure else None,
        "balanced": last.get("accuracies/length_balanced", balanced.value if balanced else None),
    }
    return {name: figure for name, figure in figures.items() if figure is not None}


def number(value: float, minus: str = "−") -> str:
    """Returns a figure with four digits."""
    if not math.isfinite(value):
        return "not finite"
    text = f"{int(value)}" if float(value).is_integer() and abs(value) < 1e5 else f"{value:.4g}"
    return text.replace("-", minus)


def brief(value: float) -> str:
    """Returns a figure as a headline needs it: three digits, below 1 two; `number` has more."""
    size = abs(value)
    if not math.isfinite(value) or size == 0:
        return number(value)
    text = f"{value:.2g}" if size < 1 else f"{value:,.{2 if size < 10 else 1 if size < 100 else 0}f}"
    return text.replace("-", "−")


def plain(step: float) -> str:
    """Returns a step: whole where it is whole."""
    return str(int(step)) if float(step).is_integer() else f"{step:.6g}"


def duration(seconds: float) -> str:
    """Returns seconds for people."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes} min"
    return f"{minutes} min {rest} s" if seconds >= 100 else f"{seconds:.0f} s"


def source_name(source: str) -> str:
    """Returns a source as a reader should see it."""
    return {"train": "training", "eval": "evaluation"}.get(source) or f"evaluation on {source.removeprefix('eval_')}"


# ---- Length ---------------------------------------------------------------------------------------------------------


class LengthCheck(NamedTuple):
    """Says how much length explains of one evaluation: rows of a table, the correlation of margin and difference in
    length (NaN if one of them is the same everywhere), and the length-balanced accuracy (see `agreement`)."""

    rows: list[list[str]]
    correlation: float
    balanced: Estimate | None


def length_check(examples: Sequence[Json]) -> LengthCheck:
    """Returns accuracy and margin of the pairs whose chosen completion is shorter, as long, and longer, in tokens.
    Pairs that aren't finite are left out."""
    finite = [row for row in examples if math.isfinite(margin_of(row) + longer_by(row))]
    length, margin = np.array([longer_by(row) for row in finite]), np.array([margin_of(row) for row in finite])
    rows = []
    for name, part in {"shorter": length < 0, "as long": length == 0, "longer": length > 0}.items():
        won = [win(difference) for difference in margin[part]]
        means = [f"{np.mean(won):.3f}", number(margin[part].mean())] if won else ["", ""]
        rows.append([f"chosen is {name}", f"{len(won):,}", *means])
    varied = len(finite) > 1 and length.std() > 0 and margin.std() > 0
    correlation = float(np.corrcoef(length, margin)[0, 1]) if varied else math.nan
    pairs = [[(row[f"{of}_chosen"], row[f"{of}_rejected"]) for of in ("reward", "tokens")] for row in finite]
    judged = agreement(tally_rows([Judged(scores, lengths, (1.0, 0.0)) for scores, lengths in pairs]))
    return LengthCheck(rows, correlation, judged.length_balanced if judged else None)


def margin_of(row: Json) -> float:
    """Returns the implicit reward of chosen minus that of rejected, as the trainer's metrics scale it."""
    return row["reward_chosen"] - row["reward_rejected"]


def longer_by(row: Json) -> float:
    """Returns the tokens of chosen minus those of rejected."""
    return row["tokens_chosen"] - row["tokens_rejected"]


# ---- Options --------------------------------------------------------------------------------------------------------


def settings(run: Run) -> dict[str, dict[str, str]]:
    """Returns heading -> name -> value of what the run was made with; headings without a value are left out."""
    facts, trained, reference = run.facts, run.recorded("training"), run.recorded("reference")
    base = str(facts.get("base_model") or run.adapter.get("base_model_name_or_path") or "")
    run_facts = {
        "base model": base and shown_name(base),
        "loss": loss_name(run),
        "objective": facts.get("objective"),
        "beta": facts.get("beta", trained.get("beta")),
        "reward": facts.get("reward") or trained.get("reward"),
        "reference": facts.get("reference"),
        "quantization": facts.get("quantization") or trained.get("quantization") or reference.get("quantization"),
    }
    environment = dict(facts.get("environment") or {})
    environment |= environment.pop("versions", None) or facts.get("versions") or {}
    stored = facts.get("storage_bytes") or {}
    adapter = facts.get("adapter") or adapter_facts(run.adapter)
    adapter = {**adapter, "trained weights": stored.get("trainable_count")}
    groups = {"Run": run_facts, "Options": run.options, "Adapter": adapter, "Environment": environment}
    cleaned = {
        heading: {name: shown(value) for name, value in group.items() if value is not None and value != ""}
        for heading, group in groups.items()
    }
    return {heading: group for heading, group in cleaned.items() if group}


def loss_name(run: Run) -> str:
    """Returns the run's loss, or mix of losses, by name alone."""
    objective = str(run.facts.get("objective") or "")
    if parts := re.findall(r"(?:[\d.e-]+ × )?`[^`]+`", objective):
        return " + ".join(parts).replace("`", "")
    names = run.options.get("loss_type") or run.recorded("training").get("loss_type") or objective
    return " + ".join(map(str, names)) if isinstance(names, list) else str(names)


def data_table(run: Run) -> tuple[list[str], list[list[str]]]:
    """Returns heads and rows of what became of each dataset's rows. Counts that are 0 everywhere are left out."""
    data = {name: report for name, report in run.facts.get("data", {}).items() if isinstance(report, dict)}
    rows = []
    for key in dict.fromkeys(key for report in data.values() for key in report):
        values = [report.get(key) for report in data.values()]
        if key not in ("name", "dropped_rows") and any(values):
            rows.append([key.replace("_", " "), *("" if value is None else shown(value) for value in values)])
    return ["", *data], rows


def differences(runs: Sequence[Run]) -> list[list[str]]:
    """Returns (name, value in each run) of the settings that are not the same in all, names of the runs left out."""
    every = [settings(run) for run in runs]
    headings = dict.fromkeys(heading for groups in every for heading in groups)
    rows: list[list[str]] = []
    for heading in headings:
        # An option that was recorded nowhere in a run that records its options has its default there.
        missing = ["default" if heading == "Options" and heading in groups else "–" for groups in every]
        for name in dict.fromkeys(name for groups in every for name in groups.get(heading, {})):
            values = [groups.get(heading, {}).get(name, no) for groups, no in zip(every, missing, strict=True)]
            if name not in OWN_NAMES and len(set(values)) > 1 and [name, *values] not in rows:
                rows.append([name, *values])
    return rows


def shown(value: object) -> str:
    """Returns a value in a table: floats to six digits, of local paths only the last part."""
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
