"""Rows of a dataset whose completions are to be scored: what is known of them decides how they are prepared.

chosen, rejected | completions with ranks or scores | completion with label    they are compared
completion | completions                                                      nobody judged them
"""

from collections.abc import Mapping
from typing import NamedTuple

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..data import DataReport, prepare_dataset
from ..data.formats import GRADE_COLUMNS, LABEL_COLUMNS, is_several, kind_of
from ..losses import REGISTRY
from ..model.adapter_source import TrainedWith


class Place(NamedTuple):
    """Where a prepared row comes from."""

    row: int
    completion: int = 0  # its number in the row, of unlabelled completions


class RowsToScore(NamedTuple):
    """Prepared rows, with what is known of their completions."""

    rows: Dataset  # as they were read
    kind: str  # of `prepare_dataset`'s data, or "unlabelled"
    prepared: Dataset
    summary: DataReport
    places: list[Place]  # of each prepared row

    def grades(self) -> list[list[float]]:
        """Returns the grades of each prepared row's completions: higher is better, equal ones are not compared."""
        if self.kind == "unlabelled":
            return [[0.0]] * len(self.prepared)
        if "grades" in self.prepared.column_names:
            return list(self.prepared["grades"])
        if "preference" in self.prepared.column_names:
            return [[float(preference > 0.5), 0.0] for preference in self.prepared["preference"]]
        return [[1.0, 0.0]] * len(self.prepared)


def prepare_rows(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, setup: TrainedWith, max_length: int | None
) -> RowsToScore:
    """Prepares rows as the training of an adapter would; whatever can't be used is dropped and counted.

    Raises:
        DataError: rows that are no preference data.
    """
    kind = data = kind_of_rows(rows, setup)
    places, usable = [Place(row) for row in range(len(rows))], rows
    if kind == "unlabelled":
        usable, places = _one_by_one(rows)
        data = "singles"
    labels: tuple[str, ...] = LABEL_COLUMNS if data in ("pairs", "trajectories") else ()
    unread = [name for name in LABEL_COLUMNS if name in rows.column_names and name not in labels]
    prepared, summary = prepare_dataset(
        usable.remove_columns(unread),
        tokenizer,
        name="score",
        max_length=max_length,
        truncation_mode=setup.truncation_mode,
        max_unusable_share=1.0,
        data=data,
        label_columns=labels,
    )
    if kind == "unlabelled":
        summary.desirable = 0  # nobody judged them
    return RowsToScore(rows, kind, prepared, summary, [places[row] for row in prepared["row"]])


def kind_of_rows(rows: Dataset, setup: TrainedWith) -> str:
    """Returns what the columns say of the completions."""
    have, first = set(rows.column_names), rows[0]
    if {"chosen", "rejected"} <= have or {"chosen_ids", "rejected_ids"} <= have:
        several = is_several(first.get("rejected"), kind_of(first.get("chosen")))
        if several or is_several(first.get("rejected_ids"), "ids"):
            return "lists"
        return "trajectories" if REGISTRY[setup.loss_type[0]].data == "trajectories" else "pairs"
    if have & {"completions", "completions_ids"}:
        return "lists" if have.intersection(GRADE_COLUMNS) else "unlabelled"
    if have & {"completion", "completion_ids", "messages"}:
        return "singles" if "label" in have else "unlabelled"
    return "pairs"  # which are asked for where nothing is recognized


def _one_by_one(rows: Dataset) -> tuple[Dataset, list[Place]]:
    """Rows with one completion each, as if all were desirable, which `prepare_dataset` has a format for."""
    several = next((name for name in ("completions", "completions_ids") if name in rows.column_names), None)
    if several is None:
        return rows.add_column("label", [True] * len(rows)), [Place(row) for row in range(len(rows))]
    one = several.replace("completions", "completion")
    places = [Place(row, number) for row, found in enumerate(rows[several]) for number in range(len(found or []))]

    def split(batch: Mapping[str, list]) -> dict[str, list]:
        counts = [len(found or []) for found in batch[several]]
        columns: dict[str, list] = {
            name: [value for value, count in zip(values, counts, strict=True) for _ in range(count)]
            for name, values in batch.items()
            if name != several
        }
        columns[one] = [completion for found in batch[several] for completion in found or []]
        return {**columns, "label": [True] * sum(counts)}

    return rows.map(split, batched=True, remove_columns=rows.column_names), places
