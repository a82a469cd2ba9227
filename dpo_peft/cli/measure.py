"""How long a dataset's rows are, in tokens: what `plan`, `init` and `train --dry_run` reckon with."""

from typing import Any

from ..config import objective_options
from ..config_checks import resolve_beta
from ..data import DataReport, prepare_dataset
from ..errors import OptionError
from ..files import without_splits
from ..objective import TrainingObjective
from ..training.arguments import load_tokenizer
from ..training.building import row_options
from .mixture import DataArguments, load_datasets
from .options import made

ROWS = 1000  # at most, from the start


def sample(summary: DataReport) -> dict[str, int]:
    """Returns the mean tokens of a prompt and of a completion, and how many completions a row has, as `plan` calls
    them."""
    kept, completions = max(summary.kept_rows, 1), max(summary.completions, 1)
    return {
        "prompt_tokens": max(round(summary.prompt_tokens / kept), 1),
        "answer_tokens": max(round(summary.completion_tokens / completions), 1),
        "answers": max(round(completions / kept), 1),
    }


def measure(rows: Any, tokenizer: Any, o: Any) -> DataReport:
    """Returns what becomes of the first rows of a dataset under options `o`, those of `DPOConfig` by their names."""
    names = [o.loss_type] if isinstance(o.loss_type, str) else o.loss_type
    objective = TrainingObjective(
        names, o.loss_weights, **{**objective_options(o), "beta": resolve_beta(names, o.beta)}
    )
    first = rows.select(range(min(ROWS, len(rows))))
    return prepare_dataset(first, tokenizer, **row_options(o, objective))[1]


def found_lengths(o: Any) -> tuple[dict[str, int], str]:
    """Returns the lengths of the dataset that options name, and a sentence on where they are from; none, and why, if
    the dataset is on the Hub and can't be had, or there is no tokenizer. A file that can't be read, or rows that can't
    be used, are an OptionError or DataError."""
    data = made(DataArguments, o)
    if not (data.dataset_name or data.datasets):
        return {}, ""
    if not o.model_name_or_path:
        return {}, "The dataset was not read: a shape has no tokenizer to count by."
    try:
        tokenizer = load_tokenizer(o.model_name_or_path, o.model_init_kwargs, o.trust_remote_code)
    except OptionError as error:
        return {}, f"The dataset was not read. {error}"
    try:
        rows, _ = load_datasets(data, False)
    except OptionError as error:
        if data.dataset_name and without_splits(data.dataset_name):
            raise
        return {}, f"The dataset was not read: {error}"
    if data.dataset_streaming or data.streaming:
        return {}, "The dataset was not read, as it is a stream."
    summary = measure(rows, tokenizer, o)
    part = "" if len(rows) <= ROWS else f" the first {ROWS:,} of"
    return sample(summary), f"Lengths are those of{part} {len(rows):,} rows of {o.dataset_name or 'the mixture'}."
