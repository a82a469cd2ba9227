"""Rows of any supported format to `prompt_ids`, `completion_ids`, `row` and labels: the entry to the data pipeline.

Two passes over a `Dataset`: one that checks every row and tokenizes nothing but one row of each shape, then one that
tokenizes and truncates. Both are `Dataset.map` calls with a fingerprint of our own (dataset, tokenizer content,
options), so a second run reads the cache. Every source row leaves a record in it, dropped or not, and the summary is
counted from these records. A stream does both row by row, as it is read.
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, IterableDataset, Value
from datasets.fingerprint import Hasher
from torch.utils.data import get_worker_info
from transformers import PreTrainedTokenizerBase

from ..errors import DataError, OptionError
from .clock import template_date
from .fields import Row, RowProblem, Values
from .fingerprint import digest, tokenizer_hash
from .formats import REGISTERED, Wanted
from .image_rows import ImageFile, undecoded
from .images import Images
from .published import PUBLISHED
from .reading import Reading, find_format
from .summary import DataSummary
from .tokenize import check_tokenizer
from .truncate import check_truncation
from .unread import SAMPLED, check_unread
from .worker import RowWorker, rows_of

# Raise it whenever the same inputs give other records.
SCHEMA_VERSION = 5
PROBLEMS_NAMED = 3
UNPAIRED_ROWS = 1000  # that TRL unpairs at a time
STREAM_PATIENCE = 100  # rows of a stream before its share of unusable rows is judged


def prepare_dataset(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    name: str = "train",
    max_length: int | None = 1024,
    truncation_mode: str = "keep_start",
    num_proc: int | None = None,
    on_unusable: str = "drop",
    max_unusable_share: float = 0.5,
    load_from_cache_file: bool = True,
    data: str = "pairs",
    label_columns: Sequence[str] = (),
    discount_unit: str = "turn",
    single_best: bool = False,
    unneeded_columns: Sequence[str] = (),
    unpair: bool = False,
    as_chat: bool | None = False,
    images: Images | None = None,
    invocation: Sequence[int] = (),
) -> tuple[Dataset | IterableDataset, DataSummary]:
    """Tokenizes a preference dataset.

    Args:
        dataset: Rows in one of the formats of `formats.py`.
        tokenizer: Its special tokens and chat template are used as they are.
        name: How messages call the dataset.
        max_length: Most tokens of prompt + one completion; None for no limit.
        truncation_mode: One of `TRUNCATION_MODES` (`truncate.py`).
        num_proc: Worker processes; not for streams.
        on_unusable: "drop" counts and drops rows that carry no signal, or hold nothing in a column that is read;
            "error" refuses the first one.
        max_unusable_share: Above this share of dropped rows the dataset is refused.
        load_from_cache_file: False tokenizes again even if the cache has the result.
        data: What the objective learns from: "pairs", "lists" (K graded completions of one prompt), "singles" (judged
            one by one) or "trajectories" (pairs of conversations that may differ from any turn on). Or "unlabeled":
            completions that nobody judged, to be scored, each as a row of its own; not for streams.
        label_columns: Which of "preference" and "margin" the objective reads, where the dataset has them. A dataset
            with one that is not read is refused.
        discount_unit: What a step of a trajectory is, an assistant "turn" or a "token" of one.
        single_best: For lists: a row whose best grade is shared is unusable.
        unneeded_columns: Columns with text that may stay unread; others are refused (`unread.py`).
        unpair: For singles: a row of several completions becomes one row for each, in the order of
            `trl.unpair_preference_dataset`: of every 1000 rows all chosen ones, then all rejected ones.
        as_chat: Rows of text go into the chat template: the prompt as the user's turn, completions as the assistant's.
            None: if the tokenizer has one, and most prompts aren't rendered already. `summary.as_chat` says which.
        images: The model's processor, if rows may hold images (`images.py`); `tokenizer` is its own. It remembers
            where the images of the prepared rows are found.
        invocation: Tokens that an answer-only adapter acts from (`invocation.py`): each prompt must hold them.

    Returns:
        The prepared rows and the summary. A row has `prompt_ids` (list of int), `completion_ids` (one list per
        completion, the best first), `row` (number in `dataset`), and by `data`

        - pairs, trajectories: `preference` and `margin` (float) if the dataset has them. A preference below 0.5 comes
          back swapped: the other completion first, 1 - preference, -margin;
        - lists, singles: `grades` (one float per completion, higher is better; singles: 1 desirable, 0 undesirable);
        - trajectories: `steps` (one int per completion token, -1 for those that the model does not write).
          `prompt_ids` is what both share at the start, and may be empty;
        - unlabeled: `completion` (which one of its row it is).

        With `images` there is a name of each row's images, which `images.sample` turns into pixels; those of a stream
        come along as `image_files`.

        A stream comes back as a stream, and fills the summary later; it is refused when none of its first 100 rows is
        usable.

    Raises:
        OptionError: an argument is wrong.
        DataError: a row is malformed, or too many rows are unusable.
    """
    check_truncation(max_length, truncation_mode)
    _check_options(on_unusable, max_unusable_share, num_proc)
    check_tokenizer(tokenizer, need_eos=False)
    labels, begins = tuple(label_columns), tuple(invocation)
    wanted = Wanted(data, labels, discount_unit, single_best, unpair, images is not None, begins)
    dataset = dataset if images is None else undecoded(dataset)
    columns, first = _first_row(dataset, name)
    rows = _sample(dataset, first)
    row_format = find_format(name, columns, rows, wanted, tokenizer, as_chat)
    wanted = replace(wanted, label_columns=tuple(column for column in wanted.label_columns if column in columns))
    used = {*row_format.columns, *wanted.label_columns}
    unused = tuple(column for column in columns if column not in used)
    if row_format.kind != "ids":  # beside token ids stands the text that they were made from
        check_unread(name, rows, [column for column in unused if column not in unneeded_columns])
    summary = DataSummary(
        name, row_format.name, max_length, truncation_mode, unused_columns=unused, as_chat=row_format.as_chat
    )
    summary.date = template_date(tokenizer) if row_format.kind == "chat" else None
    drop, streamed = on_unusable == "drop", isinstance(dataset, IterableDataset)
    worker = RowWorker(
        name, row_format, tokenizer, max_length, truncation_mode, wanted, drop, images=images, stream=streamed
    )
    max_share = max_unusable_share if drop else None
    if isinstance(dataset, IterableDataset):
        return _prepare_stream(dataset, worker, summary, max_share, columns), summary
    records = _map_records(dataset, worker, first, num_proc, load_from_cache_file)
    summary.add_all(records.data)
    summary.check()
    summary.check_share(max_share)
    summary.warn()
    prepared = records.select_columns(worker.prepared_columns)
    if summary.dropped or unpair:
        kept = _rows_where(records, "drop", empty=True)
        if unpair:
            found = set(kept.to_pylist())
            kept = [place for place in _unpaired_order(records["row"][:]) if place in found]
        prepared = prepared.select(kept)
    if images is not None:
        images.remember(prepared, partial(_image_files, _plain(dataset), worker))
    return prepared, summary


def _image_files(rows: Dataset, worker: RowWorker, number: int) -> list[ImageFile]:
    try:
        return worker.image_files(rows[number])
    except RowProblem as problem:  # as where a file is gone
        raise problem.located(worker.name, number) from None


def _file_times(rows: Iterable[Row], worker: RowWorker) -> Iterator[tuple[str, int, int]]:
    """Yields name, size and time of the files that rows name as their images: with another one they are prepared
    again."""
    for row in rows:
        with suppress(RowProblem, RecursionError, OSError):  # which is named, or counted, where all rows are checked
            for file in worker.image_files(row):
                if file.path is not None:
                    stat = os.stat(file.path)
                    yield file.path, stat.st_size, stat.st_mtime_ns


def _check_options(on_unusable: str, max_unusable_share: float, num_proc: int | None) -> None:
    if on_unusable not in ("drop", "error"):
        raise OptionError(f"on_unusable={on_unusable!r} is unknown. Use 'drop' or 'error'.")
    if isinstance(max_unusable_share, bool) or not isinstance(max_unusable_share, (int, float)):
        raise OptionError(f"max_unusable_share={max_unusable_share!r} must be a number from 0 to 1.")
    if not 0 <= max_unusable_share <= 1:
        raise OptionError(f"max_unusable_share={max_unusable_share!r} must be from 0 to 1.")
    if num_proc is not None and (type(num_proc) is not int or num_proc < 1):
        raise OptionError(f"num_proc={num_proc!r} must be None or a positive integer.")


def _first_row(dataset: object, name: str) -> tuple[list[str], Row]:
    if not isinstance(dataset, (Dataset, IterableDataset)):
        hint = "Pick one split, e.g. dataset['train']" if hasattr(dataset, "keys") else "Use Dataset.from_list(rows)"
        raise DataError(
            f"{name}: expected a datasets.Dataset or IterableDataset, found {type(dataset).__name__}. {hint}."
        )
    first = next(iter(_plain(dataset)), None)
    if first is None:
        raise DataError(f"{name}: the dataset is empty. Give it at least one row.")
    declared = [] if isinstance(dataset, Dataset) else dataset.column_names or []  # a transform makes its own columns
    return list(dict.fromkeys([*declared, *first])), first


def _plain(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """Returns rows as Python values: a tensor format is undone, a transform of the user's stays."""
    if isinstance(dataset, Dataset) and dataset.format["type"] == "custom":
        return dataset
    return dataset.with_format(None)


def _sample(dataset: Dataset | IterableDataset, first: Row) -> list[Row]:
    """Returns rows from all over a dataset, the first one first; of a stream that one alone."""
    if isinstance(dataset, IterableDataset):
        return [first]
    spread = range(len(dataset)) if len(dataset) <= SAMPLED else range(0, len(dataset), len(dataset) // SAMPLED)
    return [*_plain(dataset.select(spread))]


def _map_records(
    dataset: Dataset, worker: RowWorker, first: Row, num_proc: int | None, load_from_cache_file: bool
) -> Dataset:
    rows = _plain(dataset)
    if rows.format["type"] != "custom":
        used = dict.fromkeys((*worker.format.columns, *worker.wanted.label_columns))
        rows = rows.select_columns([column for column in used if column in first])
    tokenizer = tokenizer_hash(worker.tokenizer)
    content = [dataset._fingerprint, worker.format.name, asdict(worker.wanted), tokenizer, SCHEMA_VERSION]
    prepare = worker.format.prepare
    content.append(repr(prepare))
    if worker.images is not None:
        named = any(_file_times(_sample(dataset, first), worker))  # not all rows are read where they hold the bytes
        content += [worker.images.settings, digest(list(_file_times(rows, worker) if named else ()))]
    if isinstance(prepare, Reading) and prepare.published:
        content.append(Hasher.hash(PUBLISHED[prepare.published].convert))
    if worker.format.name in REGISTERED:
        content.append(Hasher.hash([worker.format.read, prepare]))
    options = {
        "num_proc": num_proc,
        "batched": True,
        "remove_columns": rows.column_names,
        "load_from_cache_file": load_from_cache_file,
    }
    checked = rows.map(
        worker.check_batch,
        features=Features({"problem": Value("string")}),
        new_fingerprint=digest(["check", *content, worker.drop_missing]),
        desc=f"Checking {worker.name} rows",
        **options,
    )
    if bad := _rows_where(checked, "problem", empty=False):
        first_bad = bad[:PROBLEMS_NAMED].to_pylist()
        problems = [(RowProblem(*json.loads(checked[row]["problem"])), row) for row in first_bad]
        count = f"{worker.name}: {len(bad)} malformed rows of {len(checked)}. " if len(bad) > 1 else ""
        raise DataError(count + " | ".join(str(problem.located(worker.name, row)) for problem, row in problems))
    records = rows.map(
        worker.record_batch,
        with_indices=True,
        features=worker.features,
        new_fingerprint=digest(["records", *content, worker.max_length, worker.truncation_mode]),
        desc=f"Tokenizing {worker.name} rows",
        **options,
    )
    return records.with_format(None)


def _rows_where(mapped: Dataset, column: str, empty: bool) -> pa.UInt64Array:
    """Returns the numbers of the rows whose text in `column` is empty (or is not), without reading other columns."""
    texts = mapped.data.column(column)
    return pc.indices_nonzero((pc.equal if empty else pc.not_equal)(texts, ""))


def _unpaired_order(rows: Sequence[int]) -> list[int]:
    """Returns where completions stand in the order of TRL: of every 1000 rows the first ones, then the second ones.

    `rows` are the numbers of their rows, ascending.
    """
    first: dict[int, int] = {}
    places = [(row // UNPAIRED_ROWS, place - first.setdefault(row, place)) for place, row in enumerate(rows)]
    return sorted(range(len(places)), key=places.__getitem__)


def _prepare_stream(
    dataset: IterableDataset, worker: RowWorker, summary: DataSummary, max_share: float | None, columns: list[str]
) -> IterableDataset:
    if worker.images is not None:
        worker.images.seen = True
    if worker.wanted.data == "unlabeled":  # a row may become several
        raise OptionError("data='unlabeled' needs a datasets.Dataset, not a stream.")
    records = _plain(dataset).map(
        partial(_stream_records, worker, summary, max_share),
        with_indices=True,
        batched=True,
        batch_size=UNPAIRED_ROWS if worker.wanted.unpair else 1,
        remove_columns=columns,
        features=worker.features,
    )
    prepared = records.filter(_is_kept).select_columns(worker.prepared_columns)
    if next(iter(prepared), None) is None:
        summary.check_share(1.0)
    summary.reset()
    summary.listen()
    return prepared


def _stream_records(
    worker: RowWorker, summary: DataSummary, max_share: float | None, batch: Values, indices: list[int]
) -> Values:
    """Prepares the next rows of a stream and counts them; row 0 starts a new pass. In a worker process shares of
    dropped rows are not judged: it reads a part."""
    made: list[Values] = []
    rows = rows_of(batch) or [{}] * len(indices)  # a batch of rows without any column has no length
    for row, index in zip(rows, indices, strict=True):
        if index == 0:
            summary.reset()
        for record in worker.records(row, index, check=True):
            summary.add(record)
            made.append(record)
        summary.tell()
        if max_share is None or (summary.source_rows >= STREAM_PATIENCE and get_worker_info() is None):
            summary.check_share(max_share)
    made = [made[place] for place in _unpaired_order([record["row"] for record in made])]
    return {column: [record[column] for record in made] for column in worker.features}


def _is_kept(record: Row) -> bool:
    return not record["drop"]
