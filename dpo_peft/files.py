"""Rows from a file or the Hub, and rows to a file: what every command reads and writes."""

import glob
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .disk import write_atomically
from .errors import DataError, OptionError
from .rowfiles import READERS, ending, find_files, read_files

CONVERTERS = ("sharegpt", "alpaca", "hh", "pandalm", "tulu", "oasst_tree")
WRITERS = (".jsonl", ".parquet")


def read_rows(
    name: str | Sequence[str],
    split: str = "train",
    config: str | None = None,
    streaming: bool = False,
    dataset_format: str | None = None,
    **where: object,
) -> Any:
    """Reads the rows of files, folders or Hub datasets as a `datasets.Dataset` (or a stream).

    Args:
        name: a JSON(L), CSV, TSV or Parquet file (see `rowfiles`), a pattern of such, a folder of such, a folder that
            `save_to_disk` wrote, or a Hub id; or several of these, read one after the other.
        split, config: of a Hub dataset or a folder.
        streaming: read rows as they come.
        dataset_format: one of `CONVERTERS`, to convert every row to preference rows.
        where: `data_dir` or `data_files` of a Hub dataset.

    Raises:
        OptionError: there is no such file or dataset, or it can't be read.
        DataError: a file's line that can't be read, with the remedy.
    """
    names = as_list(name)
    found = [find_files(one) for one in names]
    if names and all(found):
        rows = read_files([path for paths in found for path in paths], streaming)
    else:
        rows = joined([_read_one(one, split, config, streaming, where) for one in names])
    return rows if dataset_format is None else convert(rows, dataset_format)


def as_list(given: str | Sequence[str] | None) -> list[str]:
    """Returns the names that an option of one or several gives."""
    return [given] if isinstance(given, str) else list(given or ())


def without_splits(name: str | Sequence[str]) -> bool:
    """Whether a name, or one of several, stands for rows that have no splits: files, or one saved dataset."""
    return any(
        ending(one) in READERS or find_files(one) or (Path(one) / "state.json").is_file() for one in as_list(name)
    )


def joined(parts: Sequence[Any]) -> Any:
    """Returns the rows of several datasets, one after the other.

    Raises:
        OptionError: a column's type differs.
    """
    from datasets import concatenate_datasets

    try:
        return parts[0] if len(parts) == 1 else concatenate_datasets(list(parts))
    except ValueError as error:
        raise OptionError(f"The datasets don't go together: {error} Bring them to one format first.") from error


def _read_one(name: str, split: str, config: str | None, streaming: bool, where: Mapping[str, object]) -> Any:
    from datasets import load_dataset, load_dataset_builder

    if paths := find_files(name):
        return read_files(paths, streaming)
    if ending(name) in READERS or glob.has_magic(name):
        raise OptionError(f"dataset {name!r}: there is no such file.")
    folder = Path(name)
    try:
        if any((folder / file).is_file() for file in ("state.json", "dataset_dict.json")):
            return _read_saved(folder, split, streaming)
        if folder.is_dir() and not where:  # `datasets` says which files a split has; they are read as any files are
            splits = load_dataset_builder(name, config).config.data_files or {}
            if splits and split.isidentifier() and split not in splits:
                raise OptionError(f"dataset {name!r} has no split {split!r}: it has {', '.join(map(str, splits))}.")
            files = splits.get(split, ())
            if files and all(ending(file) in READERS for file in files):
                return read_files([Path(file) for file in files], streaming)
        return load_dataset(name, config, split=split, streaming=streaming, **where)
    except (OptionError, DataError):
        raise
    except Exception as error:  # every loader fails in its own way
        why = str(error).strip() or type(error).__name__
        raise OptionError(f"dataset {name!r} can't be read: {why}") from error


def _read_saved(folder: Path, split: str, streaming: bool) -> Any:
    """Reads what `save_to_disk` wrote: a dataset, or of several the one that is called like the split."""
    from datasets import DatasetDict, load_from_disk

    saved = load_from_disk(folder)
    if isinstance(saved, DatasetDict):
        if split not in saved:
            raise OptionError(f"dataset {str(folder)!r} has no split {split!r}: it has {', '.join(saved)}.")
        saved = saved[split]
    return saved.to_iterable_dataset() if streaming else saved


def convert(rows: Any, dataset_format: str) -> Any:
    """Returns the rows of one of the formats in `CONVERTERS` as preference rows."""
    from . import data

    if dataset_format == "oasst_tree":  # one tree holds several ranked lists
        return rows.map(_split_trees, batched=True, remove_columns=rows.column_names)
    return rows.map(getattr(data, f"from_{dataset_format}"), remove_columns=rows.column_names)


def _split_trees(batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    from .data import from_oasst_tree, worker

    lists = [row for tree in worker.rows_of(batch) for row in from_oasst_tree(tree)]
    return {column: [row[column] for row in lists] for column in ("prompt", "completions", "ranks")}


def check_output(option: str, path: str | Path, inputs: Iterable[str] = (), overwrite: bool = True) -> Path:
    """Returns the file that rows are to be written to, before any long work starts.

    Args:
        option: what names it, for messages.
        path: the file.
        inputs: names of what is read, as `read_rows` takes them. No option lets one of them be written over.
        overwrite: whether another file that is there may be.

    Raises:
        OptionError: its ending is none of `WRITERS`, it is a folder, an input, or there already.
    """
    path = Path(path)
    if path.suffix not in WRITERS:
        raise OptionError(f"{option}={str(path)!r}: the file must end in {' or '.join(WRITERS)}.")
    if path.is_dir():
        raise OptionError(f"{option}={str(path)!r} is a folder: give a file.")
    if path.exists():
        read = {one.resolve() for name in inputs if name for one in [Path(name), *find_files(name)]}
        if read & {path.resolve(), *path.resolve().parents}:
            raise OptionError(f"{option}={str(path)!r} is what is read: give the output another name.")
        if not overwrite:
            raise OptionError(f"{option}={str(path)!r} is there already: give another name, or --overwrite.")
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
        return write_atomically(path, table.getvalue(), private=True)
    return write_atomically(path, (json.dumps(row, ensure_ascii=False) + "\n" for row in rows), private=True)


def strict(value: Any) -> Any:
    """Returns plain values as JSON can hold them: it has no NaN or infinity, which become null."""
    if isinstance(value, Mapping):
        return {key: strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
