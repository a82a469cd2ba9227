"""Rows of a dataset whose completions are to be scored, prepared by what is known of them:

    chosen, rejected | completions with ranks or scores | completion with label    they are compared
    completion | completions                                                      nobody judged them

Completions of one prompt that stand next to each other are laid out together.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..data import DataReport, prepare_dataset
from ..data.fields import Row
from ..data.formats import LABEL_COLUMNS, data_of
from ..data.images import Images
from ..data.reading import find_reading
from ..losses import REGISTRY
from ..model.adapter_source import TrainedWith


class Place(NamedTuple):
    """Where a prepared row comes from."""

    row: int
    completion: int = 0  # its number in the row, of completions that nobody judged


class RowsToScore(NamedTuple):
    """Prepared rows, with what is known of their completions."""

    rows: Dataset  # as they were read
    kind: str  # of data, see `prepare_dataset`
    prepared: Dataset
    summary: DataReport
    places: list[Place]  # of each prepared row

    def grades(self) -> list[list[float]]:
        """Returns the grades of each prepared row's completions: higher is better, equal ones are not compared."""
        if self.kind == "unlabeled":
            return [[0.0]] * len(self.prepared)
        if "grades" in self.prepared.column_names:
            return list(self.prepared["grades"])
        if "preference" in self.prepared.column_names:
            return [[float(preference > 0.5), 0.0] for preference in self.prepared["preference"]]
        return [[1.0, 0.0]] * len(self.prepared)


def prepare_rows(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    setup: TrainedWith,
    max_length: int | None,
    unneeded_columns: Sequence[str] = (),
    images: Images | None = None,
    invocation: Sequence[int] = (),
) -> RowsToScore:
    """Prepares rows as the training of an adapter would; whatever can't be used is dropped and counted.

    Raises:
        DataError: rows that are no preference data.
    """
    _, first = find_reading("score", rows.column_names, [rows[0]])
    data = data_of(first, first)
    loss = REGISTRY.get(setup.loss_type[0])  # None: a loss of the user's own
    if data == "pairs" and loss is not None and loss.data == "trajectories":
        data = "trajectories"
    labels = LABEL_COLUMNS if data in ("pairs", "trajectories") else ()
    prepared, summary = prepare_dataset(
        rows.remove_columns([name for name in LABEL_COLUMNS if name in rows.column_names and name not in labels]),
        tokenizer,
        name="score",
        max_length=max_length,
        truncation_mode=setup.truncation_mode,
        max_unusable_share=1.0,
        data=data,
        label_columns=labels,
        unneeded_columns=unneeded_columns,
        as_chat=setup.as_chat,
        images=images,
        invocation=invocation,
    )
    numbers = prepared["completion"] if data == "unlabeled" else [0] * len(prepared)
    places = [Place(*place) for place in zip(prepared["row"], numbers, strict=True)]
    return RowsToScore(rows, data, prepared, summary, places)


def units_of(rows: Sequence[Row], budget: int, shared: bool) -> Iterator[dict[str, Any]]:
    """Yields the rows' completions in their order, those of one prompt together up to the budget.

    `ends` counts the rows whose last completion is in a unit. Without shared prompts each completion is its own.
    """
    unit: dict[str, Any] = {}
    size = 0
    for row in rows:
        names = [name for name in ("completion_ids", "steps") if name in row]
        kept = {name: row[name] for name in ("images", "image_files", "adapter_start") if name in row}
        for number, ids in enumerate(row["completion_ids"]):
            alike = bool(unit) and unit["prompt_ids"] == row["prompt_ids"] and ("steps" in unit) == ("steps" in row)
            alike = alike and unit.get("images") == row.get("images")
            if not (shared and alike and size + len(ids) <= budget):
                if unit:
                    yield unit
                unit = {
                    "prompt_ids": row["prompt_ids"],
                    "row": row["row"],
                    "ends": 0,
                    **kept,
                    **{name: [] for name in names},
                }
                size = len(row["prompt_ids"])
            for name in names:
                unit[name].append(row[name][number])
            size += len(ids)
        unit["ends"] += 1
    if unit:
        yield unit
