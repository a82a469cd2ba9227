"""Rows from a file or the Hub, and rows to a file: what every command reads and writes."""

import glob
import io
import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .data.published import PUBLISHED, convert_dataset
from .disk import write_atomically
from .errors import DataError, OptionError
from .rowfiles import READERS, dataset_of, ending, find_files, first_row, read_files, row_count

logger = logging.getLogger(__name__)
CONVERTERS = tuple(PUBLISHED)
WRITERS = (".jsonl", ".parquet")


def read_rows(
    name: str | Sequence[str],
    split: str = "train",
    config: str | None = None,
    streaming: bool = False,
    dataset_format: str | None = None,
    column_map: Mapping[str, str] | Sequence[str] | None = None,
    **where: object,
) -> Any:
    """Reads the rows of files, folders or Hub datasets as a `datasets.Dataset` (or a stream).

    Args:
        name: a JSON(L), CSV, TSV or Parquet file (see `rowfiles`), a pattern of such, a folder of such, a folder that
            `save_to_disk` wrote, or a Hub id; or several of these, read one after the other. Files of several shapes
            are read each by its own format.
        split, config: of a Hub dataset or a folder.
        streaming: read rows as they come.
        dataset_format: one of `CONVERTERS`, to convert every row to preference rows.
        column_map: columns, and the names that they are read by: {"question": "prompt"} or ["question:prompt"].
        where: `data_dir` or `data_files` of a Hub dataset.

    Raises:
        OptionError: there is no such file or dataset, or it can't be read.
        DataError: a file's line that can't be read, with the remedy.
    """
    names, parts = as_list(name), dict[str, Any]()
    found = [find_files(one) for one in names]
    paths = [path for paths in found for path in paths]
    if names and all(found):
        parts = {str(path): read_files([path], streaming) for path in paths} if _differ(paths) else {}
        if len(names) > 1 and not parts and not streaming:
            counts = [f"{sum(map(row_count, files))} of {one}" for one, files in zip(names, found, strict=True)]
            logger.info("Rows: %s.", ", ".join(counts))
        parts = parts or {", ".join(names): read_files(paths, streaming)}
    else:
        parts = {one: _read_one(one, split, config, streaming, where) for one in names}
    columns = {one: list(rows.column_names or next(iter(rows), {})) for one, rows in parts.items()}
    mapped = as_mapping(column_map)
    if missing := [old for old in mapped if not any(old in have for have in columns.values())]:
        have = "; ".join(str(one) for one in columns.values())
        raise OptionError(f"column_map: there is no column {', '.join(map(repr, missing))}; the columns are {have}.")
    return joined({one: _as_asked(rows, columns[one], mapped, dataset_format) for one, rows in parts.items()})


def as_list(given: str | Sequence[str] | None) -> list[str]:
    """Returns the names that an option of one or several gives."""
    return [given] if isinstance(given, str) else list(given or ())


def without_splits(name: str | Sequence[str]) -> bool:
    """Whether a name, or one of several, stands for rows that have no splits: files, or one saved dataset."""
    return any(
        ending(one) in READERS or find_files(one) or (Path(one) / "state.json").is_file() for one in as_list(name)
    )


def _differ(paths: Sequence[Path]) -> bool:
    """Says whether files are not all of one shape, by the first row of each."""
    from .data.joining import shape_of

    firsts = [row for path in paths if len(paths) > 1 and ending(path) in READERS and (row := first_row(path))]
    return len({shape_of(list(row), row) for row in firsts}) > 1


def _as_asked(rows: Any, have: Sequence[str], names: Mapping[str, str], dataset_format: str | None) -> Any:
    """Returns a dataset with those of its columns renamed that have new names, and converted.

    Raises:
        OptionError: there is a column of a new name already.
    """
    names = {old: new for old, new in names.items() if old in have}
    if taken := [new for new in names.values() if new in have and new not in names]:
        found = f"column_map: there is a column {taken[0]!r} already"
        raise OptionError(f"{found}: give it another name too, {taken[0]}:other_{taken[0]}.")
    rows = rows.rename_columns(names) if names else rows
    return rows if dataset_format is None else convert_dataset(rows, dataset_format)


def as_mapping(given: Mapping[str, str] | Sequence[str] | None) -> dict[str, str]:
    """Returns the names that `column_map` gives: a mapping, or words old:new.

    Raises:
        OptionError: a word is none, or two columns get one name.
    """
    pairs = given.items() if isinstance(given, Mapping) else [word.rpartition(":")[::2] for word in given or ()]
    names = {str(old): str(new) for old, new in pairs}
    if not all(old and new for old, new in names.items()) or len(set(names.values())) < len(list(pairs)):
        raise OptionError(f"column_map={given!r}: write old:new, each name once, such as question:prompt good:chosen.")
    return names


def joined(parts: Mapping[str, Any]) -> Any:
    """Returns the rows of several datasets, by their names, one after the other.

    Raises:
        OptionError: they don't go together.
    """
    from datasets import Dataset, concatenate_datasets

    from .data.joining import join_shapes, shape_of

    sets = list(parts.values())
    if len(sets) == 1:
        return sets[0]
    if all(isinstance(rows, Dataset) and len(rows) for rows in sets):
        logger.info("Rows: %s.", ", ".join(f"{len(rows)} of {name}" for name, rows in parts.items()))
    try:
        if all(isinstance(rows, Dataset) and len(rows) for rows in sets):
            if len({shape_of(rows.column_names, rows[0]) for rows in sets}) > 1:
                return dataset_of(*join_shapes(parts))
        return concatenate_datasets(sets)
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
