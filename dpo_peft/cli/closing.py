"""What `dpo-peft train` says at its end: a table of the figures, a verdict with its reasons, and the next commands."""

import shlex
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..evaluation.console import figure
from ..evaluation.verdict import HeldOut, held_out
from ..files import as_list, without_splits
from ..report.facts import duration
from ..training.metrics import NOISE_NOTE, within_noise

if TYPE_CHECKING:
    from ..trainer import DPOTrainer

WIDTH = 80
FILES = {
    "adapter_model.safetensors": "adapter",
    "README.md": "model card",
    "metrics.json": "",
    "curves.png": "",
    "samples.jsonl": "",
}
ROWS = {
    "rewards/accuracies": "accuracy",
    "accuracies/length_only": "  of length alone",
    "accuracies/length_balanced": "  balanced by length",
    "rewards/margins": "margin",
    "loss": "loss",
    "kl": "KL, nats a completion",
}


def evaluated(trainer: "DPOTrainer") -> bool:
    """Returns whether the newest evaluation of every set is of this step, and of the weights that are here."""
    state = trainer.state
    known = {name for entry in state.log_history if entry["step"] == state.global_step for name in entry}
    best = str(state.best_model_checkpoint)
    other = trainer.args.load_best_model_at_end and not best.endswith(f"checkpoint-{state.global_step}")
    return not other and all(f"{name}_loss" in known for name in trainer.prepare.evaluated)


def closing(trainer: "DPOTrainer", saved: Mapping[str, Any], commands: Sequence[str]) -> str:
    """Returns the text.

    Args:
        trainer: after the run.
        saved: contents of its metrics.json.
        commands: those of `dpo-peft`.
    """
    folder = Path(str(trainer.args.output_dir))
    verdict = saved["verdict"]
    lines = [*_table(saved), *_work(trainer, saved), ""]
    lines += textwrap.wrap(f"Verdict: {verdict['level']}. {verdict['headline']}", WIDTH)
    for reason in verdict["reasons"]:
        lines += textwrap.wrap(reason, WIDTH, initial_indent="  - ", subsequent_indent="    ", break_on_hyphens=False)
    names = [f"{what} ({name})" if what else name for name, what in FILES.items() if (folder / name).is_file()]
    lines += ["", *textwrap.wrap(f"{', '.join(names)} are in {folder}", WIDTH, break_on_hyphens=False)]
    if trainer.state.global_step:
        lines += ["Next:", *(f"  {command}" for command in _next(trainer, folder, commands))]
    return "\n".join(lines)


def _table(saved: Mapping[str, Any]) -> Iterator[str]:
    """Yields a table for each set that was evaluated; without one, for the training rows."""
    sets = {one.name: one for one in held_out(saved)}
    for name in sets or ["train"]:
        prefix = "" if name == "train" else f"{name}_"
        entries = [entry for entry in saved["log_history"] if f"{prefix}loss" in entry]
        shown = [entry for i, entry in enumerate(entries) if i == len(entries) - 1 or (i == 0 < len(entries) - 1)]
        title = {"train": "on training rows", "eval": "held out"}.get(name, name.removeprefix("eval_"))
        if shown:
            yield f"{title:<24}" + "".join(f"step {entry['step']}".rjust(12) for entry in shown)
        for key, what in ROWS.items():
            cells = [figure(entry.get(f"{prefix}{key}")) for entry in shown]
            if {*cells} - {"-"}:
                note = _note(sets[name], saved) if key == "rewards/accuracies" and name in sets else ""
                yield f"{what:<24}" + "".join(f"{cell:>12}" for cell in cells) + note


def _note(one: HeldOut, saved: Mapping[str, Any]) -> str:
    """Returns how sure the last accuracy of a set is, to stand behind it."""
    notes = [f"{one.accuracy.low:.3f} to {one.accuracy.high:.3f}"] if one.accuracy else []
    margin, kl = (one.figures.get(name) for name in ("rewards/margins", "kl"))
    notes += [NOISE_NOTE] if within_noise(margin, saved["beta"], kl, saved["reward"]) else []
    return f"  ({'; '.join(notes)})" if notes else ""


def _work(trainer: Any, saved: Mapping[str, Any]) -> Iterator[str]:
    """Yields what the run took."""
    rows, pace, seconds = saved["data"].get("train", {}), trainer.throughput, saved["seconds"]
    passes = f", {trainer.state.epoch:.3g} passes" if trainer.state.epoch else ""
    used = f"{rows['kept_rows']:,} of {rows['source_rows']:,} rows" if rows else "rows of a stream"
    yield f"{trainer.state.global_step:,} steps on {used}{passes}"
    if pace.tokens and seconds:
        peak = f", peak memory {pace.peak / 2**30:.1f} GiB" if pace.peak else ""
        speed = f"{pace.tokens / pace.seconds:,.0f} tokens a second"
        yield f"{pace.tokens:,.0f} tokens in {duration(seconds)}, {speed} while training{peak}"


def _next(trainer: "DPOTrainer", folder: Path, commands: Sequence[str]) -> Iterator[str]:
    """Yields commands that work as they stand, from here; of `push` the name is to be put in."""
    here, given = shlex.quote(str(folder)), trainer.command_options or {}
    rows = [str(one) for one in as_list(given.get("eval_dataset_name"))]
    rows = rows[:1] if rows and without_splits(rows[0]) else []
    if "chat" in commands:
        yield f"dpo-peft chat {here}"
    if "compare" in commands and rows:
        yield f"dpo-peft compare {here} --prompts {shlex.quote(rows[0])}"
    for one in rows if not {"column_map", "as_chat", "datasets"} & given.keys() else []:
        options = [f"--dataset_format {given['dataset_format']}"] if "dataset_format" in given else []
        if trainer.args.unneeded_columns:
            options.append(f"--unneeded_columns {shlex.join(trainer.args.unneeded_columns)}")
        yield " ".join([f"dpo-peft score {here} --dataset_name {shlex.quote(one)}", *options])
    yield f"dpo-peft report {here}"
    if not trainer.prepare.invocation:  # which can't be merged
        merged = folder.parent / (folder.resolve().name + "-merged")
        yield f"dpo-peft merge {here} --output_dir {shlex.quote(str(merged))}"
    yield f"dpo-peft push {here} --repo_id YOUR_NAME/{shlex.quote(folder.resolve().name)}"
