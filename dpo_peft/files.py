"""Rows from a file or the Hub, and rows to a file: what every command reads and writes."""

import glob
import io
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .errors import OptionError
from .rowfiles import READERS, ending, find_files, read_files

CONVERTERS = ("sharegpt", "alpaca", "hh", "pandalm", "tulu", "oasst_tree")
WRITERS = (".jsonl", ".parquet")


def read_rows(
    name: str,
    split: str = "train",
    config: str | None = None,
    streaming: bool = False,
    dataset_format: str | None = None,
) -> Any:
    """Reads the rows of a file or of a Hub dataset as a `datasets.Dataset` (or a stream).

    Args:
        name: a JSON(L), CSV, TSV or Parquet file (see `rowfiles`), a pattern of such, or a Hub id.
        split, config: of a Hub dataset.
        streaming: read rows as they come.
        dataset_format: one of `CONVERTERS`, to convert every row to preference rows.

    Raises:
        OptionError: there is no such file or dataset, or it can't be read.
        DataError: a file's line that can't be read, with the remedy.
    """
    from datasets import load_dataset

    paths = find_files(name)
    if paths:
        rows = read_files(paths, streaming)
    elif ending(name) in READERS or glob.has_magic(name):
        raise OptionError(f"dataset {name!r}: there is no such file.")
    else:
        try:
            rows = load_dataset(name, config, split=split, streaming=streaming)
        except Exception as error:  # every loader fails in its own way
            why = str(error).strip() or type(error).__name__
            raise OptionError(f"dataset {name!r} can't be read: {why}") from error
    return rows if dataset_format is None else _convert(rows, dataset_format)


def _convert(rows: Any, dataset_format: str) -> Any:
    from . import data

    if dataset_format == "oasst_tree":  # one tree holds several ranked lists
        return rows.map(_split_trees, batched=True, remove_columns=rows.column_names)
    return rows.map(getattr(data, f"from_{dataset_format}"), remove_columns=rows.column_names)


def _split_trees(batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    from .data import from_oasst_tree, worker

    lists = [row for tree in worker.rows_of(batch) for row in from_oasst_tree(tree)]
    return {column: [row[column] for row in lists] for column in ("prompt", "completions", "ranks")}


def check_output(option: str, path: str | Path) -> Path:
    """Returns the file that rows are to be written to, before any long work starts.

    Raises:
        OptionError: its ending is none of `WRITERS`, or it is a folder.
    """
    path = Path(path)
    if path.suffix not in WRITERS:
        raise OptionError(f"{option}={str(path)!r}: the file must end in {' or '.join(WRITERS)}.")
    if path.is_dir():
        raise OptionError(f"{option}={str(path)!r} is a folder: give a file.")
    return path


def write_rows(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Writes rows as JSON lines or Parquet, by the file's ending. The file appears once it is whole.

    Raises:
        OptionError: see `check_output`.
    """
    path = check_output("output", path)
    if path.suffix == ".parquet":
        from datasets import Dataset

        table = io.BytesIO()
        Dataset.from_list([dict(row) for row in rows]).to_parquet(table)
        return write_atomically(path, table.getvalue())
    return write_atomically(path, (json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_atomically(path: str | Path, content: str | bytes | Iterable[str]) -> Path:
    """Writes a file that appears once it is whole and on the disk; a reader, or a kill, never meets a part of it.

    The folder is made if there is none. An iterable is written piece by piece. Text is UTF-8.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.part")
    pieces = [content] if isinstance(content, str | bytes) else content
    with open(unfinished, "wb") as file:
        file.writelines(piece if isinstance(piece, bytes) else piece.encode() for piece in pieces)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
    return path


def strict(value: Any) -> Any:
    """Returns plain values as JSON can hold them: it has no NaN or infinity, which become null."""
    if isinstance(value, Mapping):
        return {key: strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
