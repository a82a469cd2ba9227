"""The rows that `dpo-peft train` reads: of one name or several, or of a mixture as TRL's config files describe it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import OptionError
from ..files import convert, joined, read_rows, without_splits
from ..rowfiles import COMPRESSED, READERS
from .options import RowOptions, option, option_of

PART = ("path", "name", "data_dir", "data_files", "split", "columns", "fraction")


@dataclass
class DataArguments:
    """Where the preference rows come from."""

    _argument_group_name = "data"  # the heading in the help
    dataset_name: None | str | list[str] = option_of(RowOptions, "dataset_name")
    dataset_config: str | None = option_of(RowOptions, "dataset_config")
    dataset_train_split: str = option("train", "Split to train on.")
    dataset_test_split: str = option("test", "Split to evaluate on, if evaluation is on.")
    eval_dataset_name: None | str | list[str] = option(
        None, "Hub ids or files to evaluate on, each by itself, if not a split of dataset_name."
    )
    datasets: list[dict[str, Any]] | None = option(
        None, "A mixture, in FILE.yaml: a list of path, name, data_dir, data_files, split, columns, fraction."
    )
    test_split_size: float | None = option(None, "Share, or number, of the rows to hold out for evaluation.")
    dataset_streaming: bool = option(False, "Read rows as they come; needs max_steps.")
    streaming: bool = option(False, "The same.")
    dataset_format: str | None = option_of(RowOptions, "dataset_format")


def load_datasets(data: DataArguments, evaluate: bool, seed: int = 42) -> tuple[Any, Any]:
    """Returns the training rows, and the evaluation rows if wanted: a dict by name if there are several sets.

    Args:
        data: the options.
        evaluate: whether evaluation is on.
        seed: of the rows that `test_split_size` holds out.

    Raises:
        OptionError: no such file, split or dataset, or options that contradict each other.
    """
    how = (data.dataset_config, data.dataset_streaming or data.streaming, data.dataset_format)
    name, named = data.dataset_name or "", data.eval_dataset_name
    if bool(data.datasets) == bool(name):
        raise OptionError("dataset_name and datasets: give one of them.")
    if named is not None and not evaluate:
        raise OptionError("eval_dataset_name has no effect without evaluation: set eval_strategy, or leave it out.")
    if named is not None and data.test_split_size is not None:
        raise OptionError("eval_dataset_name and test_split_size are given: give one of them.")
    lacks_split = named is None and data.test_split_size is None
    if evaluate and lacks_split and (data.datasets or without_splits(name)):
        what = "a mixture" if data.datasets else "a file"
        raise OptionError(
            f"eval_strategy is set, but {what} has no test split: give eval_dataset_name or test_split_size."
        )
    if data.datasets:
        train = _read_mixture(data.datasets, how[1], data.dataset_format)
    else:
        train = read_rows(name, data.dataset_train_split, *how)
    if data.test_split_size is not None:
        train, test = _split(train, data.test_split_size, seed, streaming=how[1])
        return train, test if evaluate else None
    if not evaluate:
        return train, None
    names = named if isinstance(named, list) else [named or name]
    sets = {_stem(one): read_rows(one, data.dataset_test_split, *how) for one in names}
    if len(sets) < len(names):
        raise OptionError(f"eval_dataset_name: metrics are called by the sets' names, {', '.join(sets)}. Rename some.")
    return train, sets if len(names) > 1 else next(iter(sets.values()))


def _stem(name: str | list[str]) -> str:
    """Returns what a set is called in the metrics: "test" of "data/test.jsonl.gz"."""
    path = Path(name if isinstance(name, str) else name[0])
    while path.suffix in (*COMPRESSED, *READERS):
        path = path.with_suffix("")
    return path.name


def _split(rows: Any, size: float, seed: int, streaming: bool) -> tuple[Any, Any]:
    if streaming:
        raise OptionError("test_split_size needs the number of rows, which a stream does not know: leave one out.")
    try:
        parts = rows.train_test_split(test_size=int(size) if size >= 1 else size, seed=seed)
    except ValueError as error:
        raise OptionError(f"test_split_size={size:g}: {error}") from error
    return parts["train"], parts["test"]


def _read_mixture(parts: Sequence[Mapping[str, Any]], streaming: bool, dataset_format: str | None) -> Any:
    """Returns the rows of all parts; with fractions the first of each, as many as keep the shares (as TRL does)."""
    datasets = [_read_part(part, streaming) for part in parts]
    fractions: list[Any] = [part.get("fraction") for part in parts]
    if any(fraction is not None for fraction in fractions):
        good = all(isinstance(fraction, int | float) and fraction > 0 for fraction in fractions)
        if not good or streaming:
            raise OptionError("datasets: fraction is a number above 0 of each part or of none, and not of a stream.")
        shares = [fraction / sum(fractions) for fraction in fractions]
        total = min(len(rows) / share for rows, share in zip(datasets, shares, strict=True))
        datasets = [rows.select(range(round(share * total))) for rows, share in zip(datasets, shares, strict=True)]
    return joined(datasets if dataset_format is None else [convert(rows, dataset_format) for rows in datasets])


def _read_part(part: Mapping[str, Any], streaming: bool) -> Any:
    if not isinstance(part, Mapping) or "path" not in part or not set(part) <= set(PART):
        raise OptionError(f"datasets: {part!r} must be a mapping with path and any of {', '.join(PART[1:])}.")
    given = {name: value for name, value in part.items() if value is not None}
    name, split, files = given["path"], given.get("split", "train"), given.get("data_files")
    if f".{name.removesuffix('l')}" in READERS and files is not None:  # of "json": its files alone matter
        name = files.get(split, ()) if isinstance(files, Mapping) else files
        rows = read_rows(name, split, streaming=streaming)
    else:
        where = {name: given[name] for name in ("data_dir", "data_files") if name in given}
        rows = read_rows(name, split, given.get("name"), streaming, **where)
    if missing := set(columns := given.get("columns", ())) - set(rows.column_names or columns):
        raise OptionError(f"datasets: {part['path']!r} has no columns {', '.join(sorted(missing))}.")
    return rows.select_columns(list(columns)) if columns else rows
