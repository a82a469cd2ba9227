"""The rows that `dpo-peft train` reads: of one name or several, or of a mixture as TRL's config files describe it."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import OptionError
from ..files import as_list, as_mapping, joined, read_rows, without_splits
from ..rowfiles import COMPRESSED, READERS
from .options import RowOptions, option, option_of

logger = logging.getLogger(__name__)
ColumnMap = Mapping[str, str] | Sequence[str] | None
PART = ("path", "name", "data_dir", "data_files", "split", "columns", "fraction", "dataset_format", "column_map")


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
        None,
        "A mixture, in FILE.yaml: a list of path, name, data_dir, data_files, split, columns, fraction, "
        "dataset_format, column_map.",
    )
    dataset_weights: list[float] | None = option(
        None, "Shares of several dataset_name in the training rows, such as 0.7 0.3. Default: all rows of each."
    )
    eval_share: float | None = option(
        None,
        "Share, or number, of the rows to hold out for evaluation, which it turns on. No prompt is on both sides.",
    )
    test_split_size: float | None = option(None, "The same, as TRL calls it; evaluation is on by eval_strategy alone.")
    dataset_streaming: bool = option(False, "Read rows as they come; needs max_steps.")
    streaming: bool = option(False, "The same.")
    dataset_format: str | None = option_of(RowOptions, "dataset_format")
    column_map: list[str] | None = option_of(RowOptions, "column_map")

    @property
    def held_out(self) -> float | None:
        """The share, or number, of the rows that is held out for evaluation."""
        return self.test_split_size if self.eval_share is None else self.eval_share


def load_datasets(data: DataArguments, evaluate: bool, seed: int = 42) -> tuple[Any, Any]:
    """Returns the training rows, and the evaluation rows if wanted: a dict by name if there are several sets.

    Args:
        data: the options.
        evaluate: whether evaluation is on.
        seed: of the rows that `eval_share` holds out.

    Raises:
        OptionError: no such file, split or dataset, or options that contradict each other.
    """
    streaming = data.dataset_streaming or data.streaming
    how = (data.dataset_config, streaming, data.dataset_format, data.column_map)
    name, named = data.dataset_name or "", data.eval_dataset_name
    if bool(data.datasets) == bool(name):
        raise OptionError("dataset_name and datasets: give one of them.")
    if named is not None and not evaluate:
        raise OptionError("eval_dataset_name has no effect without evaluation: set eval_strategy, or leave it out.")
    held = {"eval_dataset_name": named, "eval_share": data.eval_share, "test_split_size": data.test_split_size}
    if len(given := [option for option, value in held.items() if value is not None]) > 1:
        raise OptionError(f"{' and '.join(given)} are given: give one of them.")
    lacks_split = named is None and data.held_out is None
    if evaluate and lacks_split and (data.datasets or without_splits(name)):
        what = "a mixture" if data.datasets else "a file"
        raise OptionError(
            f"eval_strategy is set, but {what} has no test split: give eval_dataset_name, or hold rows out by "
            "--eval_share 0.05."
        )
    if data.datasets or data.dataset_weights is not None:
        train = _read_mixture(data.datasets or _weighted(data), streaming, data.dataset_format, data.column_map)
    else:
        train = read_rows(name, data.dataset_train_split, *how)
    if data.held_out is not None:
        train, test = _split(train, given[0], data.held_out, seed, streaming)
        return train, test if evaluate else None
    if not evaluate:
        return train, None
    names = named if isinstance(named, list) else [named or name]
    sets = {_stem(one): _read_test(one, data, how) for one in names}
    if len(sets) < len(names):
        raise OptionError(f"eval_dataset_name: metrics are called by the sets' names, {', '.join(sets)}. Rename some.")
    return train, sets if len(names) > 1 else next(iter(sets.values()))


def _read_test(name: str | list[str], data: DataArguments, how: tuple[Any, ...]) -> Any:
    """Returns the rows of an evaluation set. One whose columns have our names already needs no `column_map`."""
    if data.column_map and not {*as_mapping(data.column_map)} & {
        *(read_rows(name, data.dataset_test_split, *how[:2]).column_names or data.column_map)
    }:
        how = how[:3]
    return read_rows(name, data.dataset_test_split, *how)


def _stem(name: str | list[str]) -> str:
    """Returns what a set is called in the metrics: "test" of "data/test.jsonl.gz"."""
    path = Path(name if isinstance(name, str) else name[0])
    while path.suffix in (*COMPRESSED, *READERS):
        path = path.with_suffix("")
    return path.name


def _split(rows: Any, option: str, size: float, seed: int, streaming: bool) -> tuple[Any, Any]:
    """Returns the rows to train on, and those held out: at random, and with them all others of the same prompts."""
    from datasets import Dataset

    from ..data.joining import prompt_keys

    if streaming:
        raise OptionError(f"{option} needs the number of rows, which a stream does not know: leave one out.")
    try:
        numbers = Dataset.from_dict({"row": range(len(rows))})
        parts = numbers.train_test_split(test_size=int(size) if size >= 1 else size, seed=seed)
    except ValueError as error:
        raise OptionError(f"{option}={size:g}: {error}") from error
    chosen, others = parts["test"]["row"][:], parts["train"]["row"][:]
    keys = prompt_keys(rows, "the rows")
    same: dict[str, list[int]] = {}
    for number in [*chosen, *others]:
        same.setdefault(keys[number], []).append(number)
    held: list[int] = []
    for row_numbers in same.values():  # in the order of the first row of each prompt
        if len(held) >= len(chosen):
            break
        held += row_numbers
    if len(held) == len(rows):
        raise OptionError(f"{option}={size:g}: nothing is left to train on, as all rows have the same prompts.")
    together, left = set(held), set(chosen)
    told = f"{len(held)} of {len(rows)} rows are held out ({len({keys[n] for n in held})} prompts)"
    if moved := len(together - left):
        told += f"; {moved} of them only as their prompt is held out, so that none is on both sides"
    logger.info("%s=%g: %s.", option, size, told)
    rest = [number for number in [*chosen, *others] if number not in together]
    return rows.select(rest), rows.select(held)


def _weighted(data: DataArguments) -> list[dict[str, Any]]:
    """Returns `dataset_name` with `dataset_weights` as the parts of a mixture."""
    names, weights = as_list(data.dataset_name), data.dataset_weights or []
    if len(names) != len(weights):
        raise OptionError(f"dataset_weights gives {len(weights)} weights for {len(names)} of dataset_name: one each.")
    where = {"name": data.dataset_config, "split": data.dataset_train_split}
    return [{"path": name, "fraction": weight, **where} for name, weight in zip(names, weights, strict=True)]


def _read_mixture(
    parts: Sequence[Mapping[str, Any]], streaming: bool, dataset_format: str | None, column_map: ColumnMap
) -> Any:
    """Returns the rows of all parts; with fractions the first of each, as many as keep the shares (as TRL does)."""
    datasets = [_read_part(part, streaming, dataset_format, column_map) for part in parts]
    fractions: list[Any] = [part.get("fraction") for part in parts]
    if any(fraction is not None for fraction in fractions):
        good = all(isinstance(fraction, int | float) and fraction > 0 for fraction in fractions)
        if not good or streaming:
            raise OptionError(
                "datasets, dataset_weights: fraction is a number above 0 of each part or of none, and not of a stream."
            )
        shares = [fraction / sum(fractions) for fraction in fractions]
        total = min(len(rows) / share for rows, share in zip(datasets, shares, strict=True))
        datasets = [rows.select(range(round(share * total))) for rows, share in zip(datasets, shares, strict=True)]
    return joined({f"{part['path']} ({n})": rows for n, (part, rows) in enumerate(zip(parts, datasets, strict=True))})


def _read_part(part: Mapping[str, Any], streaming: bool, dataset_format: str | None, column_map: ColumnMap) -> Any:
    if not isinstance(part, Mapping) or "path" not in part or not set(part) <= set(PART):
        raise OptionError(f"datasets: {part!r} must be a mapping with path and any of {', '.join(PART[1:])}.")
    given = {name: value for name, value in part.items() if value is not None}
    name, split, files = given["path"], given.get("split", "train"), given.get("data_files")
    how = {"dataset_format": given.get("dataset_format", dataset_format)}
    how["column_map"] = given.get("column_map", column_map)
    if f".{name.removesuffix('l')}" in READERS and files is not None:  # of "json": its files alone matter
        name = files.get(split, ()) if isinstance(files, Mapping) else files
        rows = read_rows(name, split, streaming=streaming, **how)
    else:
        where = {name: given[name] for name in ("data_dir", "data_files") if name in given}
        rows = read_rows(name, split, given.get("name"), streaming, **how, **where)
    if missing := set(columns := given.get("columns", ())) - set(rows.column_names or columns):
        raise OptionError(f"datasets: {part['path']!r} has no columns {', '.join(sorted(missing))}.")
    return rows.select_columns(list(columns)) if columns else rows
