"""A run's output folder, read for its report. What is missing is said; only a damaged file is an error.

A metric comes from several sources: "train", "eval", or "eval_NAME" for one of several evaluation sets.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..artifacts.card import BOOKKEEPING, shown_name
from ..errors import DataError, OptionError

Series = list[tuple[float, float]]  # (step, value) by step; a value may be NaN or infinite
Found = Mapping[str, Mapping[str, Series]]  # metric -> source -> values
Row = Mapping[str, Any]  # of samples.jsonl or eval_examples.jsonl
SAMPLE_FIELDS = {"step": int, "prompt_number": int, "prompt": str, "completion": str}
_NUMBERS = "reward_chosen reward_rejected logp_chosen logp_rejected tokens_chosen tokens_rejected".split()
EXAMPLE_FIELDS = {"step": int, "dataset": str, "row": int, **dict.fromkeys(_NUMBERS, float)}


@dataclass(frozen=True)
class Run:
    """What is known of a run.

    Attributes:
        name: the folder's name; made longer by its parents' where runs share it.
        log: `trainer.state.log_history`.
        facts: contents of metrics.json; empty for a run that isn't finished.
        options: the run's options, as far as they were recorded.
        adapter: contents of adapter_config.json; empty without one.
        samples: rows of samples.jsonl.
        examples: rows of eval_examples.jsonl.
        unfinished: where the log comes from if there is no metrics.json; empty for a finished run.
        notes: what is missing, and what that takes from the page.
    """

    name: str
    log: list[dict[str, Any]]
    facts: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    adapter: dict[str, Any] = field(default_factory=dict)
    samples: list[Row] = field(default_factory=list)
    examples: list[Row] = field(default_factory=list)
    unfinished: str = ""
    notes: list[str] = field(default_factory=list)

    def recorded(self, part: str) -> dict[str, Any]:
        """What the adapter's config says of its "training" or its "reference"."""
        return (self.adapter.get("auto_mapping") or {}).get(f"dpo_peft_{part}") or {}


def read_run(folder: str | Path, name: str = "") -> Run:
    """Read the output folder of a run, finished or not.

    Args:
        folder: has `metrics.json`, or checkpoints with `trainer_state.json` if the run isn't finished.
        name: what the run is called; by default as its folder.

    Raises:
        OptionError: there is no such folder, or it holds no run.
        DataError: a file of it is damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise OptionError(f"runs: {str(folder)!r} is not a folder. Give the output_dir of a run.")
    notes: list[str] = []
    facts, unfinished, home = {}, "", folder
    if (folder / "metrics.json").is_file():
        facts = _read_object(folder / "metrics.json")
        log = facts.get("log_history") or []
    else:
        home, state = _newest_state(folder)
        log, last = state.get("log_history") or [], state.get("max_steps")
        unfinished = f"{home.name}, step {state.get('global_step', '?')}" + (f" of {last}" if last else "")
    if not isinstance(log, list) or not all(isinstance(entry, dict) for entry in log):
        raise DataError(f"{folder.name}: log_history is not a list of objects. Restore the file.")
    if not log:
        notes.append("The log is empty: no curves and no figures. Train at least one step with logging_steps set.")
    adapter = {}
    if (home / "adapter_config.json").is_file():
        adapter = _read_object(home / "adapter_config.json")
    else:
        notes.append("There is no adapter_config.json: the adapter can't be shown.")
    return Run(
        name=name or folder.resolve().name,
        log=log,
        facts=facts,
        options=_options(folder, facts, notes),
        adapter=adapter,
        samples=_rows(folder, "samples.jsonl", SAMPLE_FIELDS, "samples", notes),
        examples=_rows(folder, "eval_examples.jsonl", EXAMPLE_FIELDS, "margins by pair and by length", notes),
        unfinished=unfinished,
        notes=notes,
    )


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Read several runs; those whose folders have one name are told apart by their parents' names.

    Raises:
        OptionError: a run is given twice, or see `read_run`.
    """
    paths = [Path(folder).resolve() for folder in folders]
    for path in paths:
        if paths.count(path) > 1:
            raise OptionError(f"runs: {path.name!r} is given twice. A run stands on the page once.")
    length = 1
    while len({path.parts[-length:] for path in paths}) < len(paths):
        length += 1
    names = ["/".join(path.parts[-length:]).lstrip("/") for path in paths]
    return [read_run(folder, name) for folder, name in zip(folders, names, strict=True)]


# ---- Metrics --------------------------------------------------------------------------------------------------------


def metric_series(run: Run) -> dict[str, dict[str, Series]]:
    """Every metric of the log: name -> source -> [(step, value)], training first, then in the order of the log. Of
    two values at a step the later one counts."""
    sets = [name for name in run.facts.get("data", {}) if name.startswith("eval_")]
    sets += sorted({row["dataset"] for row in run.examples} - {"eval", *sets})
    found: dict[str, dict[str, dict[float, float]]] = {}
    for entry in run.log:
        for key, value in entry.items() if _is_number(entry.get("step")) else ():
            source, metric = source_of(key, sets)
            shown = metric == "learning_rate" or not BOOKKEEPING.match(metric)
            if shown and (value is None or _is_number(value)):
                values = found.setdefault(metric, {}).setdefault(source, {})
                values[float(entry["step"])] = math.nan if value is None else float(value)
    return {
        metric: {source: sorted(by[source].items()) for source in sorted(by, key=lambda source: source != "train")}
        for metric, by in found.items()
    }


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def source_of(key: str, sets: Iterable[str] = ()) -> tuple[str, str]:
    """(source, metric) of a key of the log: `eval_helpful_loss` is the loss on the evaluation set "helpful"."""
    for name in sorted(sets, key=len, reverse=True):
        if key.startswith(f"{name}_"):
            return name, key.removeprefix(f"{name}_")
    return ("eval", key.removeprefix("eval_")) if key.startswith("eval_") else ("train", key)


# ---- Files ----------------------------------------------------------------------------------------------------------


def _options(folder: Path, facts: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    if isinstance(facts.get("options"), dict):
        return facts["options"]
    recipe = folder / "recipe.yaml"
    if recipe.is_file():
        try:
            options = yaml.safe_load(recipe.read_text("utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise DataError(f"{folder.name}/recipe.yaml is not valid YAML: {error}. Restore or delete it.") from error
        if isinstance(options, dict):
            return options
    notes.append("The run's options were not recorded: neither `options` in metrics.json nor recipe.yaml.")
    return {}


def _newest_state(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The newest checkpoint with a state that can be read, and that state."""
    paths = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    numbers = {path: path.name.removeprefix("checkpoint-") for path in paths}
    damaged = None
    for path in sorted((p for p in paths if numbers[p].isdecimal()), key=lambda p: int(numbers[p]), reverse=True):
        try:
            return path, _read_object(path / "trainer_state.json")
        except DataError as error:
            damaged = damaged or error
    raise damaged or OptionError(
        f"runs: {str(folder)!r} has neither metrics.json nor a checkpoint with trainer_state.json. Give the "
        "output_dir of a run that has been saved (`trainer.save_model()`), or that has a checkpoint."
    )


def _read_object(path: Path) -> dict[str, Any]:
    shown = f"{path.parent.name}/{path.name}"
    try:
        content = json.loads(path.read_text("utf-8"))
    except (ValueError, OSError) as error:
        raise DataError(f"{shown} can't be read: {error}. Restore it, or save the run again.") from error
    if not isinstance(content, dict):
        raise DataError(f"{shown} must hold a JSON object. Restore it, or save the run again.")
    return content


def _rows(folder: Path, file: str, fields: Mapping[str, type], what: str, notes: list[str]) -> list[Row]:
    """The rows of a JSON lines file. A run that was killed may leave its last line half written: that is noted."""
    path = folder / file
    if not path.is_file():
        notes.append(f"There is no {file}: {what} can't be shown.")
        return []
    lines: list[str] = path.read_bytes().decode("utf-8", "replace").split("\n")
    rows: list[Row] = []
    for number, line in enumerate(lines, 1):
        try:
            rows += [_checked(json.loads(line), fields)] if line.strip() else []
        except ValueError as error:
            if number == len(lines):
                notes.append(f"The last line of {file} is not whole and was left out.")
                break
            raise DataError(f"{folder.name}/{file}, line {number}: {error}. Correct or delete the line.") from error
    return rows


def _checked(row: Any, fields: Mapping[str, type]) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError("not an object")
    for name, kind in fields.items():
        if name not in row:
            raise ValueError(f"{name} is missing")
        if kind is float and row[name] is None:  # JSON's NaN
            row[name] = math.nan
        fits = isinstance(row[name], int | float if kind is float else kind)
        if not fits or isinstance(row[name], bool):
            raise ValueError(f"{name} is {row[name]!r}, not of type {kind.__name__}")
    return row


def adapter_facts(run: Run) -> dict[str, Any]:
    """The adapter's options: as metrics.json has them, else from its config."""
    if isinstance(run.facts.get("adapter"), dict):
        return run.facts["adapter"]
    if not run.adapter:
        return {}
    names = {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout", "target_modules": "target modules"}
    facts = {shown: run.adapter[name] for name, shown in names.items() if name in run.adapter}
    if isinstance(facts.get("target modules"), list):
        facts["target modules"] = sorted(facts["target modules"])
    return facts | {name: True for name in ("use_dora", "use_rslora") if run.adapter.get(name)}


def base_name(run: Run) -> str:
    """The base model, of a path only its last part; empty if it was not recorded."""
    name = run.facts.get("base_model") or run.adapter.get("base_model_name_or_path") or ""
    return shown_name(str(name)) if name else ""
