"""How rows come to the columns of `formats.py`: published formats, JSON text, system prompts, texts as turns.

Training, scoring and `dpo-peft pairs` read rows through one `Reading`, which is found once for a dataset.
"""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..errors import DataError
from .converters import from_hh
from .fields import Messages, Row, RowProblem, Values, content_text, first_message, shown
from .formats import ASKING_ROLES, ASSISTANT, HUMAN, IMAGE_COLUMNS, REGISTERED, RowFormat, Wanted, detect_layout
from .parse import json_columns, parse_each, parse_row, with_parsed
from .published import PUBLISHED, as_messages, convert_row, find_published
from .tokenize import special_tokens
from .unread import SYSTEM_COLUMNS

logger = logging.getLogger(__name__)

ANY_VOCABULARY = 2**31
COMPLETIONS = ("chosen", "rejected", "completion")
# A prompt that ends with a role to be continued is rendered already, by a template of its own.
OPEN_TURN = re.compile(r"(\b(assistant|response|answer|output|a)|\[/INST\])\s*:?[\s*#]*\Z", re.IGNORECASE)


@dataclass(frozen=True)
class Reading:
    """Brings the rows of a dataset to our columns, one at a time; goes to worker processes."""

    published: str = ""  # the entry of `PUBLISHED` whose rows these are
    as_json: tuple[str, ...] = ()  # columns that hold messages as JSON text
    before: tuple[str, ...] = ()  # columns of a system prompt and of earlier turns, which go in front of the prompt
    turns: bool = False  # texts become turns: prompts the user's, completions the assistant's
    as_chat: bool | None = None  # whether plain texts become turns (see `choose_as_chat`); None: the rows are none

    def __call__(self, row: Row) -> Row:
        """Returns a row in our columns. Raises `RowProblem` where it is malformed."""
        if self.published:
            row = convert_row(row, self.published)
        row = with_parsed(row, self.as_json)
        return as_turns(row, self.before) if self.turns else row

    @property
    def columns(self) -> tuple[str, ...]:
        """Returns the columns that are read here, as the dataset calls them."""
        return (*(PUBLISHED[self.published].columns if self.published else ()), *self.before)


def find_reading(
    name: str,
    columns: Iterable[str],
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase | None = None,
    as_chat: bool | None = False,
) -> tuple[Reading, Row]:
    """Returns how a dataset's rows are to be read, and a row that is filled in, read so. `rows` are some of the
    dataset's, the first one first; texts may go into the tokenizer's chat template, see `choose_as_chat` (None: none
    is known yet). Raises `DataError` for rows whose converter has to be asked for, and where `as_chat` contradicts
    them."""
    published = find_published(columns, rows[0])
    if published and PUBLISHED[published].convert_all:
        raise DataError(
            f"{name}: {PUBLISHED[published].what}. A row of these isn't one here, so ask for it: --dataset_format "
            f"{published}, or in Python dataset = dpo_peft.data.convert_dataset(dataset, {published!r})."
        )
    sample = readable(name, rows, Reading(published))
    as_json = json_columns(sample[0])
    first = with_parsed(sample[0], as_json)
    prompt, found = first.get("prompt"), [first[column] for column in COMPLETIONS if column in first]
    found += first["completions"] if isinstance(first.get("completions"), list) else []
    kinds = {kind for value in found if (kind := kind_of_value(value))}
    whole = _asks(first) is not None
    chosen = None
    if (isinstance(prompt, str) or "prompt" not in first and _transcripts(found)) and kinds <= {"text"}:
        chosen = None if published else choose_as_chat(name, sample, tokenizer, as_chat)
    kind = kind_of_value(prompt)
    mixed = bool(kind) and not whole and len(kinds) == 1 and kind not in kinds
    messages = map(first_message, (prompt, first.get("messages"), *found))
    theirs = any("from" in message and message.get("role") is None for message in messages)
    turns = bool(published or chosen or mixed or theirs or whole and isinstance(prompt, list))
    chat = turns or "messages" in kinds or isinstance(first.get("messages"), list)
    before = [column for column in SYSTEM_COLUMNS if column in first and isinstance(first[column], str | None)]
    before += ["history"] if isinstance(first.get("history"), list) else []
    reading = Reading(published, as_json, tuple(before) if chat else (), turns or chat and bool(before), chosen)
    if published:
        logger.info("%s: read as %s (dataset_format %s).", name, PUBLISHED[published].what, published)
    return reading, readable(name, sample if not published else rows, reading)[0]


def readable(name: str, rows: Iterable[Row], reading: Reading) -> list[Row]:
    """Returns rows that are filled in, as they are read; the first one if there is none."""
    read, problem = [], None
    for number, row in enumerate(rows):
        try:
            read.append(reading(row))
        except RowProblem as found:  # it is named, or counted, where all rows are checked
            problem = problem or found.located(name, number)
    if not read:
        assert problem is not None
        raise problem
    needed = ("prompt", *COMPLETIONS, "completions", "messages")
    return sorted(read, key=lambda row: any(row.get(column, "") is None for column in needed))


def choose_as_chat(
    name: str, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase | None, as_chat: bool | None
) -> bool:
    """Returns whether texts go into the chat template: prompts as the user's turn, completions as the assistant's.
    `as_chat` None: if there is a template, and most prompts of these rows aren't rendered by one already; what is
    chosen is said. Raises `DataError` for True where there is no template, or most prompts hold its tokens already."""
    template = tokenizer is not None and bool(tokenizer.chat_template)
    if as_chat is False or as_chat is None and not template:
        return False
    if tokenizer is None:
        return True
    if not template:
        raise DataError(f"{name}: as_chat is true, and the tokenizer has no chat template. Leave as_chat out.")
    prompts = [row["prompt"] for row in rows if isinstance(row.get("prompt"), str)]
    special = special_tokens(tokenizer)
    spelled = [token for token in special if 2 * sum(token in prompt for prompt in prompts) > len(prompts)]
    if spelled and as_chat:
        raise DataError(f"{name}: as_chat is true, and the prompts hold {spelled[0]!r} already. Set it to false.")
    opened = next((found[0].strip() for prompt in prompts if (found := OPEN_TURN.search(prompt))), "")
    rendered = spelled or 2 * sum(bool(OPEN_TURN.search(prompt)) for prompt in prompts) > len(prompts)
    if as_chat is None and rendered:
        what = f"hold {spelled[0]!r}" if spelled else f"end like {opened!r}"
        logger.info("%s: the prompts %s, so the texts stay as they are (as_chat true or false chooses).", name, what)
        return False
    if as_chat is None:
        logger.info(
            "%s: the rows are text, and go into the chat template: the prompt as the user's turn, completions as the "
            "assistant's (as_chat; with as_chat false the text is trained as it is).",
            name,
        )
    return True


def as_turns(row: Row, before: Sequence[str] = ()) -> Values:
    """Returns a row whose prompt and completions are messages: a text becomes a turn of the user's or the assistant's.
    Columns `before` hold a system prompt and earlier turns, which go in front. Raises `RowProblem` for a value that is
    neither text nor messages, and for two system prompts."""
    made: Values = {column: value for column, value in row.items() if column not in before}
    for column in (*COMPLETIONS, "completions", "messages"):
        if row.get(column) is not None:
            made[column] = _completion(row[column], column)
    head, prompt, asks = _head(row, before), row.get("prompt"), _asks(made)
    if asks is None and isinstance(prompt, str):
        made["prompt"] = [*head, {"role": "user", "content": prompt}]
    elif asks is None and prompt is not None:
        made["prompt"] = _behind(head, as_messages(prompt, "prompt"))
    elif asks is not None:  # whole conversations
        if isinstance(prompt, list) and asks[: len(prompt)] == as_messages(prompt, "prompt"):
            del made["prompt"]
        for column in ("chosen", "rejected", "messages"):
            if head and isinstance(made.get(column), list):
                made[column] = _behind(head, made[column])
        if head and isinstance(made.get("completions"), list):
            made["completions"] = [_behind(head, turns) for turns in made["completions"]]
    return made


def _completion(value: Any, column: str) -> Any:
    if isinstance(value, list) and value and isinstance(value[0], str | list | None):
        return [None if one is None else _completion(one, column) for one in value]
    if isinstance(value, str) and column != "completion" and value.startswith(HUMAN) and ASSISTANT in value:
        return from_hh({"chosen": value, "rejected": value})["chosen"]
    return as_messages(value, column)


def _head(row: Row, before: Sequence[str]) -> Messages:
    """Returns the turns that the columns `before` hold."""
    head: Messages = []
    for column in before:
        value = row.get(column)
        if isinstance(value, str) and column != "history":
            head += [{"role": "system", "content": value}] if value.strip() else []
            continue
        for turn in value or ():
            if isinstance(turn, list | tuple) and len(turn) == 2 and all(isinstance(text, str) for text in turn):
                roles = zip(("user", "assistant"), turn, strict=True)
                head += [{"role": role, "content": text} for role, text in roles]
            elif isinstance(turn, Mapping):
                head += as_messages([turn], column)
            else:
                found = f"expected [question, answer] or messages, found {shown(turn, 40)}"
                raise RowProblem(column, found, "repair the row")
    return head


def _behind(head: Messages, turns: Messages) -> Messages:
    """Returns turns behind those that come before; their own system prompt has to be the same."""
    if head and turns and turns[0].get("role") == "system" == head[0]["role"]:
        if content_text(head[0]).strip() != content_text(turns[0]).strip():
            problem = "differs from the system turn of the messages"
            raise RowProblem("system", problem, "leave one of them out")
        turns = turns[1:]
    return [*head, *turns]


def kind_of_value(value: object) -> str:
    """Returns what a prompt or completion is, or of several the first: "text", "message" or "messages"; else ""."""
    if isinstance(value, list) and value:
        return "messages" if isinstance(value[0], Mapping) else kind_of_value(value[0])
    return "text" if isinstance(value, str) else "message" if isinstance(value, Mapping) else ""


def _asks(row: Row) -> Messages | None:
    """Returns a row's completion that is a whole conversation, if it has one."""
    several = row.get("completions")
    for turns in [row.get("chosen"), row.get("messages"), *(several if isinstance(several, list) else ())]:
        if isinstance(turns, list) and turns and isinstance(turns[0], Mapping):
            role = turns[0].get("role") or {"human": "user", "system": "system"}.get(str(turns[0].get("from")))
            return turns if role in ASKING_ROLES else None
    return None


def _transcripts(texts: Sequence[object]) -> bool:
    return len(texts) == 2 and all(isinstance(text, str) and text.startswith(HUMAN) for text in texts)


def find_format(
    name: str,
    columns: Iterable[str],
    rows: Sequence[Row],
    wanted: Wanted,
    tokenizer: PreTrainedTokenizerBase | None,
    as_chat: bool | None,
) -> RowFormat:
    """Returns the format of dataset `name`, ready to read its rows, of which `rows` are some. Without a tokenizer rows
    may hold any token ids.

    Raises `DataError` when there is none, or none that the objective can learn from.
    """
    columns = set(columns)
    for row_format in REGISTERED.values():
        if row_format.detect(columns, rows[0]):
            return row_format
    reading, first = find_reading(name, columns, rows, tokenizer, as_chat)
    layout = detect_layout(name, {*columns.difference(reading.columns), *first}, first, wanted)
    parse = parse_each if layout.judged == "unlabeled" else parse_row
    vocabulary = ANY_VOCABULARY if tokenizer is None else len(tokenizer)
    read = partial(parse, layout=layout, vocab_size=vocabulary, data=wanted.data)
    used = tuple(dict.fromkeys((*layout.used_columns, *reading.columns, *sorted(columns & IMAGE_COLUMNS))))
    return RowFormat(layout.name, layout.kind, used, read, prepare=reading, as_chat=reading.as_chat)
