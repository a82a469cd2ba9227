"""One row at a time: check it, tokenize it, cut it, and keep the statistics that the summary is counted from."""

import json
from typing import Any

from datasets import Features, Sequence, Value
from transformers import PreTrainedTokenizerBase

from .chat import check_rendering, turn_kind
from .encode import Encoder
from .fields import RowProblem, read_number, read_preference
from .formats import ASKING_ROLES, Example, Row, RowFormat, Wanted
from .parse import count_turns
from .summary import (
    EMPTY_COMPLETION,
    IDENTICAL,
    IDENTICAL_AFTER,
    NO_RANKING,
    NO_SINGLE_BEST,
    NOTHING_SCORED,
    SAME_TEXT,
)
from .tokenize import Encoded, is_empty
from .trajectories import GIVEN, encode_trajectories, one_turn_each, unscore_first
from .truncate import Fitted, all_same, cut_alike, fit

COUNTERS = (
    "completions foreign_turns prompt_cut completions_cut ends_lost resplits prompt_tokens completion_tokens longest "
    "swapped ties desirable undesirable"
).split()
IDS = {
    "prompt_ids": Sequence(Value("int32")),
    "completion_ids": Sequence(Sequence(Value("int32"))),
    "row": Value("int64"),
}
STATISTICS = {"drop": Value("string"), **{counter: Value("int32") for counter in COUNTERS}}
# What a row holds beside its ids, by what the objective learns from.
EXTRAS = {
    "preference": Value("float64"),
    "margin": Value("float64"),
    "grades": Sequence(Value("float64")),
    "steps": Sequence(Sequence(Value("int32"))),
}
NOTHING: dict[str, Any] = {"preference": 0.0, "margin": 0.0, "grades": [], "steps": []}


class RowWorker:
    """Checks and tokenizes single rows of one dataset; goes to worker processes as a whole.

    `wanted.label_columns` must be columns of the dataset. `prepared_columns` are those that training reads, `features`
    those and the statistics.
    """

    def __init__(
        self,
        name: str,
        row_format: RowFormat,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int | None,
        truncation_mode: str,
        wanted: Wanted,
    ):
        self.name, self.format, self.tokenizer, self.wanted = name, row_format, tokenizer, wanted
        self.max_length, self.truncation_mode = max_length, truncation_mode
        self.encoder = Encoder(tokenizer, name, row_format.kind)
        self.tried: set[str] = set()
        steps = ["steps"] if wanted.data == "trajectories" else []
        extras = [*wanted.label_columns, *(["grades"] if wanted.graded else []), *steps]
        self.features = Features({**IDS, **{extra: EXTRAS[extra] for extra in extras}, **STATISTICS})
        self.prepared_columns = [*IDS, *extras]

    def read(self, row: Row) -> tuple[Example | str, dict[str, float]]:
        """Returns the row's example, or why it has none, and its labels. Raises `RowProblem` for a malformed row.

        The first row of each shape goes through the chat template.
        """
        example, labels = self._parse(row)
        if not isinstance(example, Example):
            return example, labels
        if example.kind == "text" and not example.prompt and not self.encoder.leading:
            self.encode(example)
        if example.kind == "chat" and (shape := _shape(example)) not in self.tried:
            check_rendering(self.tokenizer, example)
            self.encode(example)
            self.tried.add(shape)
        return example, labels

    def _parse(self, row: Row) -> tuple[Example | str, dict[str, float]]:
        example = self.format.read(row)
        read = {"preference": read_preference, "margin": lambda row: read_number(row, "margin")}
        return example, {column: read[column](row) for column in self.wanted.label_columns}

    def encode(self, example: Example) -> Encoded | str:
        """Returns the ids of an example, or the reason why there is nothing to learn from it."""
        turns, unit = self.wanted.data == "trajectories", self.wanted.discount_unit
        if turns and example.kind == "chat":
            encoded: Encoded | str = encode_trajectories(self.tokenizer, example, unit)
        else:
            encoded = self.encoder(example)
        if isinstance(encoded, str):
            return encoded
        # What is left of a trajectory behind the shared start may well be no more than its end.
        if not encoded.steps and any(is_empty(ids, self.tokenizer.eos_token_id) for ids in encoded.completion_ids):
            return EMPTY_COMPLETION
        if turns and not encoded.steps:
            encoded = one_turn_each(encoded, unit)
        if all_same(encoded.completion_ids):
            return IDENTICAL
        return SAME_TEXT if graded_apart(encoded.completion_ids, example.grades) else encoded

    def record(self, example: Example | str, labels: dict[str, float], index: int) -> dict[str, Any]:
        """Returns the prepared row with its statistics; a dropped one has no ids and names the reason."""
        made = self._prepare(example) if isinstance(example, Example) else example
        if isinstance(example, str) or isinstance(made, str):
            ids: dict[str, Any] = {"prompt_ids": [], "completion_ids": [], "row": index, "drop": made}
            return self._columns({**dict.fromkeys(COUNTERS, 0), **NOTHING, **ids})
        fitted, resplits, steps = made
        lengths = [len(ids) for ids in fitted.completion_ids]
        record = {
            **dict.fromkeys(COUNTERS, 0),
            "prompt_ids": fitted.prompt_ids,
            "completion_ids": fitted.completion_ids,
            "row": index,
            "drop": "",
            "completions": len(lengths),
            "foreign_turns": 0 if self.wanted.data == "trajectories" else _foreign_turns(example),
            "prompt_cut": fitted.prompt_cut,
            "completions_cut": fitted.completions_cut,
            "ends_lost": fitted.ends_lost,
            "resplits": resplits,
            "prompt_tokens": len(fitted.prompt_ids),
            "completion_tokens": sum(lengths),
            "longest": len(fitted.prompt_ids) + max(lengths),
            "grades": example.grades,
            "steps": steps,
            **labels,
        }
        return self._columns({**record, **self._judgments(record)})

    def _columns(self, record: dict[str, Any]) -> dict[str, Any]:
        return {column: record[column] for column in self.features}

    def _prepare(self, example: Example) -> tuple[Fitted, int, list[list[int]]] | str:
        """Ids after truncation, number of re-splits and steps; or the reason why nothing useful is left."""
        encoded = self._no_ranking(example) or self.encode(example)
        if isinstance(encoded, str):
            return encoded
        fitted = fit(encoded.prompt_ids, encoded.completion_ids, self.max_length, self.truncation_mode)
        if isinstance(fitted, str):
            return fitted
        if graded_apart(fitted.completion_ids, example.grades):
            return IDENTICAL_AFTER
        kept = zip(encoded.steps or [], fitted.completion_ids, strict=bool(encoded.steps))
        steps = [cut_alike(values, ids, self.truncation_mode) for values, ids in kept]
        steps = unscore_first(fitted.prompt_ids, steps)
        if any(set(values) <= {GIVEN} for values in steps):
            return NOTHING_SCORED
        return fitted, encoded.resplits, steps

    def _no_ranking(self, example: Example) -> str:
        """Names why the grades of a list teach nothing, if so."""
        if self.wanted.data != "lists" or not example.grades:
            return ""
        if example.grades[0] == example.grades[-1]:
            return NO_RANKING
        return NO_SINGLE_BEST if self.wanted.single_best and example.grades[0] == example.grades[1] else ""

    def _judgments(self, record: dict[str, Any]) -> dict[str, Any]:
        """Counts labels of each kind, and puts the completion that is likely the better one first."""
        counts: dict[str, Any] = {"ties": int(record.get("preference") == 0.5)}
        if self.wanted.data == "singles":
            counts |= {"desirable": record["grades"].count(1.0), "undesirable": record["grades"].count(0.0)}
        if record.get("preference", 1.0) >= 0.5:
            return counts
        counts |= {"swapped": 1, "preference": 1 - record["preference"]}
        counts |= {column: record[column][::-1] for column in ("completion_ids", "steps")}
        return counts | ({"margin": 0.0 - record["margin"]} if "margin" in record else {})

    def check_batch(self, batch: Any) -> dict[str, list[str]]:
        """Map function of the first pass: what is wrong with each row, as JSON, or nothing."""
        return {"problem": [self._problem(row) for row in rows_of(batch)]}

    def record_batch(self, batch: Any, indices: list[int]) -> dict[str, list[Any]]:
        """Map function of the second pass."""
        records = []
        for row, index in zip(rows_of(batch), indices, strict=True):
            try:
                records.append(self.record(*self._parse(row), index))
            except RowProblem as problem:
                raise problem.located(self.name, index) from problem.__cause__
        return {column: [record[column] for record in records] for column in self.features}

    def _problem(self, row: Row) -> str:
        try:
            self.read(row)
        except RowProblem as problem:
            return json.dumps(problem.args)
        return ""


def rows_of(batch: Any) -> list[dict[str, Any]]:
    """Returns the rows of a batch of columns."""
    columns = list(batch.keys())
    return [dict(zip(columns, values, strict=True)) for values in zip(*(batch[c] for c in columns), strict=True)]


def graded_apart(completion_ids: list[list[int]], grades: list[float] | None) -> bool:
    """Says whether the same completion stands there with two grades."""
    if not grades:
        return False
    found: dict[tuple[int, ...], float] = {}
    return any(found.setdefault(tuple(ids), grade) != grade for ids, grade in zip(completion_ids, grades, strict=True))


def _foreign_turns(example: Example) -> int:
    """Counts the completions that hold turns that the model does not write."""
    if example.kind != "chat":
        return 0
    return sum(count_turns(messages, (*ASKING_ROLES, "tool")) > 0 for messages in example.completions)


def _shape(example: Example) -> str:
    """Returns what decides how a template takes a row, besides the texts: roles, fields, tools, arguments."""
    conversations = [example.prompt, *example.completions]
    roles = [[turn_kind(message) for message in messages] for messages in conversations]
    return json.dumps([roles, bool(example.tools), example.template_kwargs, example.continues], default=str)
