"""Rows as they stand in files: every text is taken as it is, and what can't be read is named by file and line.

The readers of `datasets` take a file's name for a pattern, its time for its content, texts that look like numbers or
dates for numbers and dates, and answer a bad line with "an error occurred". So the rows of JSON, CSV and Parquet files
are yielded here, and `Dataset.from_generator` keeps them in its cache under a digest of the files' bytes.
"""

import csv
import glob
import hashlib
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, IterableDataset, config
from fsspec.core import OpenFile
from fsspec.implementations.local import LocalFileSystem

from .disk import pieces
from .errors import DataError, OptionError

Row = dict[str, Any]

COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
LONGEST_LINE = 1_000_000_000  # bytes; what a row may hold is limited further where it is read
CHUNK = 10_000  # rows whose types are inferred together
NUMBERS = ("preference", "margin")  # columns of a CSV file that hold numbers; all others hold text
IMAGES = ("image", "images")  # columns
NAMES = ("path", "url", "image", "image_url")  # keys under which an image's name stands
LABELS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


def ending(path: str | Path) -> str:
    """Returns the ending of a file that says what it holds: ".csv" of "rows.csv.gz"; ".jsonl" of "rows.gz"."""
    path = Path(path)
    return (Path(path.stem).suffix or ".jsonl") if path.suffix in COMPRESSED else path.suffix


def find_files(name: str) -> list[Path]:
    """Returns the files that a name stands for: itself if it is there, else those that match it as a pattern."""
    return [Path(name)] if os.path.isfile(name) else sorted(map(Path, filter(os.path.isfile, glob.glob(name))))


def read_files(paths: Sequence[Path], streaming: bool = False) -> Dataset | IterableDataset:
    """Reads the rows of files, one after the other.

    Args:
        paths: JSON(L), CSV, TSV or Parquet files, JSON and CSV also compressed.
        streaming: read rows as they come.

    Raises:
        OptionError: a file's ending is none of `READERS`.
        DataError: naming file, line and remedy.
    """
    for path in paths:
        if ending(path) not in READERS:
            raise OptionError(f"dataset {str(path)!r}: use one of {', '.join(READERS)}.")
    given, typed = {"paths": list(paths)}, all(ending(path) == ".parquet" for path in paths)
    digest = "" if streaming and typed else _digest(paths)
    features = Features.from_arrow_schema(_schema(paths) if typed else _kept_schema(paths, digest))
    if streaming:
        return IterableDataset.from_generator(_rows, features=features, gen_kwargs=given)
    return Dataset.from_generator(_rows, features=features, gen_kwargs=given, fingerprint=digest)


def dataset_of(rows: Callable[[], Iterator[Row]], digest: str) -> Dataset:
    """Returns rows that are made as a dataset, which is kept under a digest of what they are made of."""
    schema, path, made = None, Path("the joined rows"), ((f"row {n}", row) for n, row in enumerate(rows()))
    while chunk := list(islice(made, CHUNK)):
        schema = _unite(schema, _infer(chunk, path), path, f"{chunk[0][0]} and after")
    return Dataset.from_generator(rows, features=Features.from_arrow_schema(schema), fingerprint=digest)


def first_row(path: Path) -> Row:
    """Returns the first row of a file; {} if there is none."""
    return next((row for _, row in READERS[ending(path)](path)), {})


def row_count(path: Path) -> int:
    """Returns the number of a file's rows."""
    return sum(1 for _ in READERS[ending(path)](path))


def _digest(paths: Sequence[Path]) -> str:
    digest = hashlib.blake2b(b"rows of files, 1", digest_size=16)
    for path in paths:
        digest.update(f"{ending(path)} {path.stat().st_size} ".encode())
        images = False
        for piece in pieces(path):
            digest.update(piece)
            images = images or b"image" in piece
        if images:  # whose names are as seen from the folder
            digest.update(str(path.parent.resolve()).encode())
    return digest.hexdigest()


def _rows(paths: Sequence[Path]) -> Iterator[Row]:
    for path in paths:
        rows, folder = (row for _, row in READERS[ending(path)](path)), path.parent.resolve()
        for first in islice(rows, 1):
            named = _may_name_images(first)
            yield from (_with_places(row, folder) if named else row for row in chain([first], rows))


# ---- Images: their names are as seen from the data file's folder ----------------------------------------------------


def _may_name_images(row: Row) -> bool:
    """Says whether rows like this one name images: in a column of them, or in parts of messages."""
    turns = [turn for value in row.values() if isinstance(value, list) for turn in value if isinstance(turn, dict)]
    texts = (value for value in row.values() if isinstance(value, str) and value.startswith("["))
    in_parts = any(isinstance(turn.get("content"), list) for turn in turns) or any('"image' in text for text in texts)
    return in_parts or any(name in row for name in IMAGES)


def _with_places(row: Row, folder: Path) -> Row:
    return {name: _placed(value, folder, name in IMAGES) for name, value in row.items()}


def _placed(value: Any, folder: Path, image: bool) -> Any:
    if isinstance(value, str) and value.lstrip().startswith("["):  # a list in a cell of a table
        with suppress(ValueError, RecursionError):
            found = json.loads(value)
            if image or all(isinstance(turn, dict) and {"role", "from"} & turn.keys() for turn in found):
                return json.dumps(_rooted(found, folder, image), ensure_ascii=False)
    return _rooted(value, folder, image)


def _rooted(value: Any, folder: Path, image: bool) -> Any:
    """Returns an image's name from the data file's folder; of messages with their parts, or of several."""
    if isinstance(value, str):
        return str(folder / value) if image and value and "://" not in value and value[:5] != "data:" else value
    if isinstance(value, list):
        return [_rooted(one, folder, image) for one in value] if value and not isinstance(value[0], int) else value
    if not isinstance(value, dict) or image and value.get("bytes") is not None:
        return value
    if image:
        return {key: _rooted(inner, folder, key in NAMES) for key, inner in value.items()}
    content = value.get("content")
    if not isinstance(content, list):
        return value
    types = ("image", "image_url")
    parts = [_rooted(part, folder, isinstance(part, dict) and part.get("type") in types) for part in content]
    return {**value, "content": parts}


# ---- Readers: each yields where a row stands, and the row -----------------------------------------------------------


def _problem(path: Path, where: str, problem: object, remedy: str) -> DataError:
    return DataError(f"{path}, {where}: {problem}. Remedy: {remedy}.")


def _open_text(path: Path) -> AbstractContextManager[BinaryIO]:
    if path.suffix == ".zst":  # fsspec needs a package for it, and reads neither lines nor a second frame
        return io.BufferedReader(pa.input_stream(path, compression="zstd"))
    return OpenFile(LocalFileSystem(), str(path), "rb", compression="infer")


def _lines(path: Path) -> Iterator[str]:
    """Yields the lines of a text file in UTF-8, with their ends."""
    number = 1
    try:
        with _open_text(path) as file:
            for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE), b""), start=1):
                if len(line) == LONGEST_LINE:
                    problem = f"has more than {LONGEST_LINE:,} bytes"
                    raise _problem(path, f"line {number}", problem, "write one row a line, and cut what is longer")
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
    except DataError:
        raise
    except UnicodeDecodeError as error:
        problem = f"byte {error.start} is no UTF-8 ({error.reason})"
        raise _problem(path, f"line {number}", problem, "save the file as UTF-8") from None
    except (OSError, EOFError, ValueError) as error:
        raise DataError(
            f"{path} can't be read after line {number}: {error}. Remedy: mend or copy it again."
        ) from error


def _read_json(path: Path) -> Iterator[tuple[str, Row]]:
    """Reads a JSON list of objects, or one object a line."""
    lines = _lines(path)
    numbered = ((number, line) for number, line in enumerate(lines, start=1) if line.strip())
    first = next(numbered, None)
    if first is None:
        return
    if first[1].lstrip().startswith("["):
        text = first[1] + "".join(lines)
        rows = enumerate(_parse(path, "the list", text), start=1)
        located = ((f"item {number}", row) for number, row in rows)
    else:
        located = (
            (f"line {number}", _parse(path, f"line {number}", line)) for number, line in chain([first], numbered)
        )
    for where, row in located:
        if not isinstance(row, dict):
            raise _problem(path, where, f"holds {type(row).__name__}, not an object", 'write {"prompt": …} a row')
        yield where, row


def _parse(path: Path, where: str, text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise _problem(path, where, "is nested too deeply", "store what is nested as JSON text") from None
    except ValueError as error:
        raise _problem(path, where, f"is no JSON ({error})", "write one object a line, or a list of them") from None


def _object(pairs: list[tuple[str, Any]]) -> Row:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for i, (name, _) in enumerate(pairs) if name in dict(pairs[:i]))
        raise ValueError(f"the key {twice!r} stands twice")
    return found


def _read_csv(path: Path) -> Iterator[tuple[str, Row]]:
    """Reads a table with a line of names. Cells are text; numbers and labels only where the format has them."""
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(_lines(path), delimiter="\t" if ending(path) == ".tsv" else ",", strict=True)
    names: list[str] = []
    while True:
        start = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise _problem(path, f"line {start}", f"is no CSV ({error})", "put texts with quotes in quotes") from None
        if cells is None:
            return
        if not names:
            names = cells
            if len(set(names)) < len(names):
                raise _problem(path, f"line {start}", "two columns have one name", "name each column once")
        elif cells:  # an empty line is no row
            if len(cells) != len(names):
                problem = f"has {len(cells)} cells, the first line {len(names)}"
                raise _problem(path, f"line {start}", problem, "put texts with commas or line ends in quotes")
            row = {name: _cell(path, start, name, cell) for name, cell in zip(names, cells, strict=True)}
            yield f"line {start}", row


def _cell(path: Path, line: int, name: str, text: str) -> object:
    if name in NUMBERS:
        try:
            return float(text) if text.strip() else None
        except ValueError:
            raise _problem(path, f"line {line}", f"{name} is {text!r}, not a number", "store a number") from None
    return LABELS.get(text.strip().lower(), text) if name == "label" else text


def _read_parquet(path: Path) -> Iterator[tuple[str, Row]]:
    with _open_parquet(path) as file:
        rows = chain.from_iterable(batch.to_pylist() for batch in file.iter_batches(batch_size=CHUNK))
        yield from ((f"row {number}", row) for number, row in enumerate(rows))


@contextmanager
def _open_parquet(path: Path) -> Iterator[pq.ParquetFile]:
    try:
        with pq.ParquetFile(path) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is no Parquet file that can be read: {error}. Remedy: write it again.") from error


READERS: dict[str, Callable[[Path], Iterator[tuple[str, Row]]]] = {
    ".jsonl": _read_json,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}


# ---- Types ----------------------------------------------------------------------------------------------------------


def _kept_schema(paths: Sequence[Path], digest: str) -> pa.Schema:
    """Returns the types of all rows. They are kept beside the cached rows: a second start doesn't read the files."""
    kept = Path(config.HF_DATASETS_CACHE) / "dpo_peft_types" / digest
    with suppress(OSError, pa.ArrowException):
        return pa.ipc.read_schema(pa.py_buffer(kept.read_bytes()))
    schema = _schema(paths)
    with suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        part = kept.with_suffix(f".{os.getpid()}")
        part.write_bytes(schema.serialize())
        os.replace(part, kept)
    return schema


def _schema(paths: Sequence[Path]) -> pa.Schema:
    """Returns the Arrow types of all rows: integers beside floats become floats, keys that some rows lack are None."""
    schema: pa.Schema | None = None
    for path in paths:
        if ending(path) == ".parquet":
            with _open_parquet(path) as file:
                schema = _unite(schema, file.schema_arrow, path, "its columns")
            continue
        rows = READERS[ending(path)](path)
        while chunk := list(islice(rows, CHUNK)):
            schema = _unite(schema, _infer(chunk, path), path, f"{chunk[0][0]} and after")
    if schema is None:
        raise DataError(f"{', '.join(map(str, paths))}: there are no rows.")
    return schema


def _unite(before: pa.Schema | None, found: pa.Schema, path: Path, where: str) -> pa.Schema:
    try:
        return found if before is None else pa.unify_schemas([before, found], promote_options="permissive")
    except pa.ArrowException as error:
        raise _problem(path, where, f"a column's type changes ({error})", "store one type of value a column") from None


def _infer(chunk: list[tuple[str, Row]], path: Path) -> pa.Schema:
    names = dict.fromkeys(chain.from_iterable(row for _, row in chunk))
    return pa.schema([(name, _type([row.get(name) for _, row in chunk], chunk, name, path)) for name in names])


def _type(values: list[Any], chunk: list[tuple[str, Row]], name: str, path: Path) -> pa.DataType:
    """Returns the type of a column. Where there is none, the first row that doesn't go with those before is named."""
    try:
        return pa.array(values).type
    except (pa.ArrowException, UnicodeError, OverflowError, ValueError, TypeError) as error:
        problem = str(error)
    good, bad = 0, len(values)  # the first `good` values have a type, the first `bad` have none
    while bad - good > 1:
        middle = (good + bad) // 2
        try:
            pa.array(values[:middle])
            good = middle
        except (pa.ArrowException, UnicodeError, OverflowError, ValueError, TypeError):
            bad = middle
    text = f"{name!r} does not go with the rows before ({problem.splitlines()[0][:120]})"
    raise _problem(path, chunk[bad - 1][0], text, "store one type of value a column, e.g. as JSON text")
