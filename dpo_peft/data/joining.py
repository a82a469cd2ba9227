"""Datasets of several shapes as one: each is read by its own format, and all come to the same columns."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from typing import Any

from datasets import Dataset

from ..errors import DataError, OptionError
from .fields import NoValue, Row, RowProblem, Values
from .fingerprint import digest
from .formats import LABEL_COLUMNS, REGISTERED, Wanted, data_of, detect_layout
from .image_rows import take_images, undecoded
from .parse import common_start, parse_row
from .published import find_published
from .reading import ANY_VOCABULARY, Reading, find_reading, kind_of_value, readable
from .unread import SAMPLED

logger = logging.getLogger(__name__)

OURS = ("prompt", "chosen", "rejected", "completion", "completions", "messages", "prompt_ids", "chosen_ids")


def shape_of(columns: Sequence[str], first: Row) -> str:
    """Returns what decides how rows are read: equal for datasets that are read alike."""
    found = find_published(columns, first)
    return json.dumps([found, {column: kind_of_value(first[column]) for column in OURS if column in first}])


def join_shapes(parts: Mapping[str, Dataset]) -> tuple[Callable[[], Iterator[Values]], str]:
    """Returns what yields the rows of datasets of different shapes, in our columns, and a digest of what decides them.
    Raises `OptionError` for datasets, by name, that don't go together, such as pairs and single judged completions,
    and what yields them `DataError` for a malformed row."""
    parts = {name: undecoded(rows) for name, rows in parts.items()}
    found = {name: _reading(name, rows) for name, rows in parts.items()}
    texts = [name for name, (_, first) in found.items() if not _chats(first)]
    chats = len(texts) < len(found)
    if texts and chats:
        logger.info("%s: the texts become turns, as the other rows are messages.", ", ".join(texts))
    readings = {name: replace(reading, turns=chats or reading.turns) for name, (reading, _) in found.items()}
    firsts = {name: readable(name, islice(rows, SAMPLED), readings[name])[0] for name, rows in parts.items()}
    ranked = any("completions" in first for first in firsts.values())
    kinds = {name: sorted(_unified(first, ranked).keys() & {*OURS, "label"}) for name, first in firsts.items()}
    if len(set(map(str, kinds.values()))) > 1:
        each = "; ".join(f"{name}: {', '.join(columns)}" for name, columns in kinds.items())
        raise OptionError(f"These rows don't go together ({each}). Train on one kind of them.")

    def rows() -> Iterator[Values]:
        for name, dataset in parts.items():
            for number, row in enumerate(dataset):
                try:
                    yield _unified(readings[name](row), ranked)
                except NoValue:
                    yield {}  # it is counted as missing_value
                except RowProblem as problem:
                    raise problem.located(name, number) from None

    decides = ([dataset._fingerprint, repr(readings[name])] for name, dataset in parts.items())
    return rows, digest(["joined", *decides])


def _reading(name: str, rows: Dataset) -> tuple[Reading, Row]:
    return find_reading(name, rows.column_names, [*islice(rows, SAMPLED)])


def _chats(first: Row) -> bool:
    return any(kind_of_value(first.get(column)) in ("messages", "message") for column in OURS if column in first)


def _unified(row: Row, ranked: bool) -> Values:
    """Returns a row with a prompt of its own, and with scores where other rows have some."""
    made = dict(row)
    if "prompt" not in made and isinstance(made.get("chosen"), list) and isinstance(made.get("rejected"), list):
        cut = min(common_start([made["chosen"], made["rejected"]]), len(made["chosen"]) - 1, len(made["rejected"]) - 1)
        made |= {"prompt": made["chosen"][:cut], **{side: made[side][cut:] for side in ("chosen", "rejected")}}
    if ranked and "chosen" in made:
        made |= {"completions": [made.pop("chosen"), made.pop("rejected")], "scores": [1.0, 0.0]}
    if "ranks" in made:
        made["scores"] = [-float(rank) for rank in made.pop("ranks")]
    return made


def prompt_keys(rows: Dataset, name: str) -> list[str]:
    """Returns for each row what its prompt is told by: equal for rows of the same prompt, with the same images. A row
    that can't be read has a key of its own."""
    rows = undecoded(rows)
    reading, first = _reading(name, rows)
    columns = set(first) - set(LABEL_COLUMNS)
    data = data_of(columns, first)
    registered = next((one for one in REGISTERED.values() if one.detect(set(rows.column_names), rows[0])), None)
    layout = None
    with suppress(DataError):  # it is said where the rows are prepared
        layout = None if registered else detect_layout(name, columns, first, Wanted(data=data, images=True))

    def key(row: Row) -> Any:
        if registered is not None:
            return registered.read(row)
        return None if layout is None else parse_row(reading(row), layout, ANY_VOCABULARY, data)

    found = []
    for number, row in enumerate(rows):
        try:
            example, images = key(row), [image.digest().hex() for image in take_images(row)]
        except (RowProblem, DataError):
            example = None
        prompt = getattr(example, "prompt", None)
        told = json.dumps([prompt, *images], sort_keys=True, default=str) if prompt is not None else f"row {number}"
        found.append(told)
    return found
