"""Reads a run's output folder for its report. What is missing is said; only a damaged file is an error."""

import itertools
import json
import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from ..artifacts.curves import Metrics, metric_series
from ..errors import DataError, OptionError
from ..manifests import EVAL, settle, weights_digest
from ..suites.figures import table

PAGE_PICTURES = 5_000_000  # characters of data URIs
Json = dict[str, Any]  # an object as json reads it
_NUMBERS = "reward_chosen reward_rejected logp_chosen logp_rejected tokens_chosen tokens_rejected".split()
ROW_FIELDS: dict[str, dict[str, type]] = {
    "samples.jsonl": {"step": int, "prompt_number": int, "prompt": str, "completion": str},
    "worst_pairs.jsonl": {"dataset": str, "row": int, "prompt": str, "chosen": str, "rejected": str},
    "pictures.jsonl": {"image": str, "thumbnail": str},
    "eval_examples.jsonl": {"step": int, "dataset": str, "row": int, **dict.fromkeys(_NUMBERS, float)},
}


class Run:
    """Reads the output folder of a run, finished or not, and holds what is known of the run.

    Args:
        folder: has `metrics.json`, or checkpoints with `trainer_state.json` if the run isn't finished.
        name: what the run is called; by default as its folder.

    Raises:
        OptionError: there is no such folder, or it holds no run.
        DataError: a file of it is damaged.
    """

    def __init__(self, folder: str | Path, name: str = ""):
        folder = Path(folder)
        if not folder.is_dir():
            raise OptionError(f"runs: {str(folder)!r} is not a folder. Give the output_dir of a run.")
        settle(folder)
        self.name = name or folder.resolve().name
        self.notes: list[str] = []  # what is missing, and what that takes from the page
        home, self.unfinished = folder, ""  # where the log comes from if there is no metrics.json
        self.facts = state = _read_object(folder / "metrics.json")  # empty for a run that isn't finished
        if not (folder / "metrics.json").is_file():
            home, state = _newest_state(folder)
            last = state.get("max_steps")
            self.unfinished = f"{home.name}, step {state.get('global_step', '?')}" + (f" of {last}" if last else "")
        self.log: list[Json] = state.get("log_history") or []  # `trainer.state.log_history`
        if not isinstance(self.log, list) or not all(isinstance(entry, dict) for entry in self.log):
            raise DataError(f"{folder.name}: log_history is not a list of objects. Restore the file.")
        self.adapter = _read_object(home / "adapter_config.json")  # empty without one
        recorded = self.facts.get("options")
        self.options: Json = recorded if isinstance(recorded, dict) else _read_object(folder / "recipe.yaml")
        for found, note in (
            (self.log, "The log is empty: no curves and no figures. Train at least one step with logging_steps set."),
            (self.adapter, "There is no adapter_config.json: the adapter can't be shown."),
            (self.options, "The run's options were not recorded: neither `options` in metrics.json nor recipe.yaml."),
        ):
            self.notes += [] if found else [note]
        self.samples = self._rows(folder / "samples.jsonl", "samples")
        self.examples = self._rows(folder / "eval_examples.jsonl", "margins by pair and by length")
        texts = folder / "worst_pairs.jsonl"  # an older version wrote none, nor a run that judges no pair wrong
        self.texts = self._rows(texts, "the texts of the worst pairs") if texts.is_file() else []
        found = _read_object(folder / EVAL)
        if found and found.get("weights") != weights_digest(folder):
            self.notes.append(f"{EVAL} is of other weights than the adapter's: run dpo-peft eval again.")
            found = {}
        self.evaluated = list(table(found)) if found else []  # lines of a table
        kept = folder / "pictures.jsonl"
        # Of samples and worst pairs, as data URIs by name.
        self.pictures = self._pictures(self._rows(kept, "pictures") if kept.is_file() else [])

    def _rows(self, path: Path, what: str) -> list[Json]:
        """Returns the rows of a JSON lines file. A killed run may leave its last line half written: that is noted."""
        if not path.is_file():
            self.notes.append(f"There is no {path.name}: {what} can't be shown.")
            return []
        lines = path.read_bytes().decode("utf-8", "replace").split("\n")
        rows = []
        for number, line in enumerate(lines, 1):
            try:
                rows += [_checked(json.loads(line), ROW_FIELDS[path.name])] if line.strip() else []
            except ValueError as error:
                if number < len(lines):
                    where = f"{path.parent.name}/{path.name}, line {number}"
                    raise DataError(f"{where}: {error}. Correct or delete the line.") from error
                self.notes.append(f"The last line of {path.name} is not whole and was left out.")
        return rows

    def _pictures(self, rows: list[Json]) -> dict[str, str]:
        """Returns the pictures that a page has room for, as data URIs by name."""
        sizes = list(itertools.accumulate(len(row["thumbnail"]) for row in rows))
        found = {
            row["image"]: row["thumbnail"] for row, size in zip(rows, sizes, strict=True) if size <= PAGE_PICTURES
        }
        if len(found) < len(rows):
            self.notes.append(f"{len(rows) - len(found):,} further pictures are in pictures.jsonl.")
        return {name: uri for name, uri in found.items() if uri.startswith("data:image/jpeg;base64,")}

    def recorded(self, part: str) -> Json:
        """Returns what the adapter's config says of its "training" or its "reference"."""
        return (self.adapter.get("auto_mapping") or {}).get(f"dpo_peft_{part}") or {}

    @cached_property
    def metrics(self) -> Metrics:
        """Returns every metric of the log by its sources, see `metric_series`."""
        sets = {name for name in self.facts.get("data", {}) if name.startswith("eval_")}
        return metric_series(self.log, sets | {row["dataset"] for row in self.examples})

    @property
    def sources(self) -> list[str]:
        """Returns where metrics come from: training first, then evaluation sets in the order of the log."""
        return sorted(dict.fromkeys(s for series in self.metrics.values() for s in series), key=lambda s: s != "train")

    @cached_property
    def evaluations(self) -> dict[str, dict[int, list[Json]]]:
        """Returns the pairs by evaluation set and step, in the order of the file."""
        found: dict[str, dict[int, list[Json]]] = {}
        for row in self.examples:
            found.setdefault(row["dataset"], {}).setdefault(row["step"], []).append(row)
        return found

    @cached_property
    def warnings(self) -> list[Json]:
        """Returns what diagnostics raised: step, name, message."""
        return [
            {"step": warning.get("step"), "name": str(warning["name"]), "message": str(warning.get("message", ""))}
            for warning in self.facts.get("warnings") or []
            if isinstance(warning, dict) and warning.get("name")
        ]


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Reads several runs; those whose folders have one name are told apart by their parents' names. Raises as `Run`
    does, and for a run that is given twice."""
    paths = [Path(folder).resolve() for folder in folders]
    for path in paths:
        if paths.count(path) > 1:
            raise OptionError(f"runs: {path.name!r} is given twice. A run stands on the page once.")
    length = 1
    while len({path.parts[-length:] for path in paths}) < len(paths):
        length += 1
    names = ["/".join(path.parts[-length:]).lstrip("/") for path in paths]
    return [Run(folder, name) for folder, name in zip(folders, names, strict=True)]


def _newest_state(folder: Path) -> tuple[Path, Json]:
    """Returns the newest checkpoint with a state that can be read, and that state."""
    numbered = {path.name.removeprefix("checkpoint-"): path for path in folder.glob("checkpoint-*")}
    damaged = None
    for number in sorted(filter(str.isdecimal, numbered), key=int, reverse=True):
        try:
            if state := _read_object(numbered[number] / "trainer_state.json"):
                return numbered[number], state
        except DataError as error:
            damaged = damaged or error
    raise damaged or OptionError(
        f"runs: {str(folder)!r} has neither metrics.json nor a checkpoint with trainer_state.json. Give the "
        "output_dir of a run that has been saved (`trainer.save_model()`), or that has a checkpoint."
    )


def _read_object(path: Path) -> Json:
    """Returns what a JSON or YAML file holds; nothing where there is no file."""
    if not path.is_file():
        return {}
    shown = f"{path.parent.name}/{path.name}"
    try:
        text = path.read_text("utf-8")
        content = yaml.safe_load(text) or {} if path.suffix == ".yaml" else json.loads(text)
    except (ValueError, OSError, yaml.YAMLError) as error:
        raise DataError(f"{shown} can't be read: {error}. Restore or delete it, or save the run again.") from error
    if not isinstance(content, dict):
        raise DataError(f"{shown} must hold an object. Restore or delete it, or save the run again.")
    return content


def _checked(row: object, fields: dict[str, type]) -> Json:
    """Returns the row, null (JSON has no NaN) as NaN. A field that is missing or of another type is a ValueError."""
    if not isinstance(row, dict):
        raise ValueError("not an object")
    for name, kind in fields.items():
        if name not in row:
            raise ValueError(f"{name} is missing")
        if kind is float and row[name] is None:
            row[name] = math.nan
        fits = isinstance(row[name], int | float if kind is float else kind)
        if not fits or isinstance(row[name], bool):
            raise ValueError(f"{name} is {row[name]!r}, not of type {kind.__name__}")
    return row
