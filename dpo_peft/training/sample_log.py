"""Chooses the prompts that a run completes as it is evaluated, and shows the completions in log and trackers."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from transformers import TrainerCallback

SHOWN, SHOWN_CHARACTERS = 3, 240  # of the samples, in the log

Row = Mapping[str, Any]  # a line of samples.jsonl


def distinct_prompts(rows: Iterable[Mapping[str, Any]], longest: int | None) -> Iterator[list[int]]:
    """Yields the different prompts of prepared rows, in their order, but the empty and those longer than `longest`."""
    seen = set()
    for row in rows:
        prompt = tuple(row["prompt_ids"])
        if prompt and prompt not in seen and (longest is None or len(prompt) <= longest):
            seen.add(prompt)
            yield list(prompt)


def send_table(callbacks: Iterable[TrainerCallback], rows: Sequence[Row], step: int) -> None:
    """Sends samples as a table to those trackers of `report_to` that are running.

    Args:
        callbacks: of the trainer; those of TensorBoard, Weights & Biases and trackio are known.
        rows: of `samples.jsonl`.
        step: they were made at.
    """
    if not rows:
        return
    columns, cells = list(rows[0]), [list(row.values()) for row in rows]
    for callback in callbacks:
        tracker: Any = callback  # their loggers are no part of a callback's type
        name = type(tracker).__name__
        if name == "TensorBoardCallback" and tracker.tb_writer is not None:
            lines = [columns, ["---"] * len(columns), *cells]
            table = "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)
            tracker.tb_writer.add_text("samples", table, step)
        elif name == "WandbCallback" and tracker._initialized:
            table = tracker._wandb.Table(columns=columns, data=cells)
            tracker._wandb.log({"samples": table, "train/global_step": step})
        elif name == "TrackioCallback" and tracker._initialized:
            import pandas

            table = tracker._trackio.Table(dataframe=pandas.DataFrame(cells, columns=columns))
            tracker._trackio.log({"samples": table, "train/global_step": step})


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", "<br>")


def in_short(rows: Sequence[Row]) -> str:
    """Returns the first few samples, cut, for people."""
    lines = []
    for row in rows[:SHOWN]:
        texts = (" ".join(row[name].split()) for name in ("prompt", "completion"))
        prompt, completion = (t if len(t) <= SHOWN_CHARACTERS else t[:SHOWN_CHARACTERS] + " ..." for t in texts)
        lines.append(f"> {prompt}\n  {completion}" + ("" if row["finished"] else " [cut]"))
    return "\n".join(lines)
