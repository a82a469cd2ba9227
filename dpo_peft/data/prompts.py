"""Prompts from rows: what a model is to answer, or what was answered already and is to be judged."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..errors import DataError
from .encode import Encoder
from .fields import RowProblem, read_entries, read_messages, read_number, read_text
from .formats import LABEL_COLUMNS, Example, Wanted, detect_format, split_format
from .parse import parse_row, read_prompt

IMPLICIT = (
    "text_implicit",
    "transcript",
    "chat_implicit",
)  # formats whose prompt is the common start of the completions


@dataclass(frozen=True)
class Prompt:
    """A prompt of a dataset; `completions` and `scores` are None where there are none yet."""

    number: int  # its row
    example: Example  # without completions: the prompt, as text or messages, and what its chat template takes
    columns: dict[str, Any] = field(default_factory=dict)  # the row's other values
    completions: list[Any] | None = None  # texts, or lists of messages if the prompt is one
    scores: list[float | None] | None = None

    @property
    def fields(self) -> dict[str, Any]:
        """Returns the columns with which training reads the same prompt."""
        extra = {"tools": self.example.tools, "chat_template_kwargs": self.example.template_kwargs}
        return {"prompt": self.example.prompt, **{name: value for name, value in extra.items() if value}}

    def completion(self, text: str) -> Any:
        """Returns a sampled text in the form that goes with the prompt."""
        return [{"role": "assistant", "content": text}] if self.example.kind == "chat" else text


def read_prompts(
    rows: Any, name: str, score_column: str | None = None, as_chat: bool = False
) -> tuple[list[Prompt], Counter[str]]:
    """Reads the prompts of a dataset, and counts the rows that have none, by reason.

    Args:
        rows: with a column `prompt` (text or messages); or pairs, of which the prompt is taken, in any format of
            training but token ids. With a column `completions`, completions are read too.
        name: of the dataset, for messages.
        score_column: holds a list of numbers per row, one for each of `completions`, higher is better.
        as_chat: a prompt that is text becomes a user's message.

    Raises:
        DataError: no prompts, or a row that can't be read, with the remedy.
    """
    columns, skipped, found = list(rows.column_names), Counter[str](), []
    first = next(iter(rows), None)
    if first is None:
        raise DataError(f"{name}: there are no rows.")
    given = "completions" in columns
    if score_column is not None and (missing := {"completions", score_column} - set(columns)):
        raise DataError(f"{name}: score_column={score_column!r}: there is no column {min(missing)!r}.")
    fmt = None if given else _implicit_format(name, columns, first)
    for number, row in enumerate(rows):
        try:
            example = read_prompt(row, as_chat) if fmt is None else parse_row(row, fmt, 0, "lists")
            if isinstance(example, str):
                skipped[example] += 1
                continue
            completions = _read_completions(row, example.kind) if given else None
            scores = _read_scores(row, score_column, len(completions or ())) if score_column else None
        except RowProblem as problem:
            raise problem.located(name, number) from None
        used = {"prompt", "completions", score_column, *example.fields}
        others = {column: row[column] for column in columns if column not in used}
        found.append(Prompt(number, example, others, completions, scores))
    if not found:
        raise DataError(f"{name}: no row has a prompt ({', '.join(f'{n} x {why}' for why, n in skipped.items())}).")
    return found, skipped


def _implicit_format(name: str, columns: Sequence[str], first: Mapping[str, Any]) -> str | None:
    """Returns the format of pairs without a prompt of their own, or None where `prompt` has it."""
    if not {"chosen", "rejected"} <= set(columns):
        if "prompt" not in columns:
            raise DataError(
                f"{name}: there is no column 'prompt' (columns: {', '.join(columns)}). Rename yours to it."
            )
        return None
    unlabelled = [column for column in columns if column not in LABEL_COLUMNS]
    fmt = detect_format(name, unlabelled, first, Wanted(data="lists"))
    return fmt if split_format(fmt)[0] in IMPLICIT else None


def _read_completions(row: Mapping[str, Any], kind: str) -> list[Any]:
    entries = read_entries(row, "completions", least=0)
    found = []
    for entry, value in entries.items():
        if kind == "text" or isinstance(value, str):
            text = read_text(entries, entry)
            found.append(text if kind == "text" else [{"role": "assistant", "content": text}])
        else:
            found.append(read_messages(entries, entry))
    return found


def _read_scores(row: Mapping[str, Any], column: str, count: int) -> list[float | None]:
    entries = read_entries(row, column, least=0)
    if len(entries) != count:
        raise RowProblem(column, f"{len(entries)} scores for {count} completions", "give each completion one")
    return [None if value is None else read_number(entries, entry) for entry, value in entries.items()]


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], name: str) -> list[list[int]]:
    """Returns the token ids of each prompt, up to where the model begins to write; the same ones that training has.

    Raises:
        DataError: a prompt that renders to nothing, that the chat template refuses, or messages without a template.
    """
    kinds = {prompt.example.kind for prompt in prompts}
    encoders = {kind: Encoder(tokenizer, name, kind, ends=False) for kind in kinds}
    encoded = []
    for prompt in prompts:
        try:
            encoded.append(encoders[prompt.example.kind].prompt(prompt.example))
        except RowProblem as problem:
            raise problem.located(name, prompt.number) from None
    return encoded
