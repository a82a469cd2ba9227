"""Reads and checks single values of a row: text, messages, token ids, tools. Each reader raises `RowProblem`.

Arrow fills the keys that a struct lacks with None, in messages as in tool schemas, so None-valued keys are taken as
absent. A schema that needs a real null can be given as a JSON string, which is used as it is.
"""

import json
import sys
from collections.abc import Mapping
from typing import Any

from ..errors import DataError
from .limits import size_problem

Row = Mapping[str, Any]
Values = dict[str, Any]  # of a row, by column
Message = dict[str, Any]
Messages = list[Message]

# Set by the pipeline itself or the tokenizer's own: from a row they would replace the template, its functions or its
# special tokens, and change what is rendered behind the user's back.
RESERVED_KWARGS = frozenset(
    "conversation conversations messages tools tokenize return_dict return_tensors return_assistant_tokens_mask "
    "add_generation_prompt continue_final_message padding truncation max_length tokenizer_kwargs chat_template "
    "sanitize_control_tokens strftime_now raise_exception "
    "bos_token eos_token unk_token sep_token pad_token cls_token mask_token".split()
)


class RowProblem(Exception):
    """What is wrong with a field of a row and what to do about it; `located` adds where the row stands."""

    def __init__(self, field: str, problem: str, remedy: str):
        super().__init__(field, problem, remedy)
        self.field, self.problem, self.remedy = field, problem, remedy

    def located(self, dataset: str, row: int) -> DataError:
        return DataError(f"{dataset} row {row}, field {self.field!r}: {self.problem}. Remedy: {self.remedy}.")


PARTS = ("text", "image", "image_url")  # of a message's content


class NoValue(RowProblem):
    """A cell holds nothing. With on_unusable="drop" the row is left out and counted."""


def check_size(row: Row) -> None:
    """Refuses a row with a column that is too large or too deep to be read."""
    for column, content in row.items():
        if problem := size_problem(content):
            raise RowProblem(column, problem, "remove the row, or cut it down")


def read_text(row: Row, column: str) -> str:
    """Returns text that can be encoded as UTF-8; may be empty."""
    value = _get(row, column)
    _expect(value, str, column, "text", "store the completion as text, or remove the row")
    _check_utf8(value, column)
    return str(value)


def read_ids(row: Row, column: str, vocab_size: int) -> list[int]:
    """Returns token ids, each in [0, vocab_size); may be empty."""
    ids: list[int] = _expect(_get(row, column), list, column, "a list of token ids", "store a list of int")
    for position, token in enumerate(ids):
        if type(token) is not int:  # bool is a subclass of int
            raise RowProblem(
                column, f"position {position} holds {_name(token)}, not a token id", "store a list of int"
            )
        if not 0 <= token < vocab_size:
            raise RowProblem(
                column,
                f"position {position} holds id {shown(token, 40)}, outside the vocabulary of {vocab_size} tokens",
                "tokenize with the tokenizer that is passed to the trainer",
            )
    return ids


def read_entries(row: Row, column: str, least: int = 1) -> Values:
    """Returns the values of a list by their names in messages: {"completions[0]": …}."""
    values = _expect(_get(row, column), list, column, "a list of completions", "store a list")
    if len(values) < least:
        empty = "" if values else ", an empty list"
        wanted = "at least one completion" if least == 1 else f"at least {least} completions to compare"
        remedy = f"give every row {wanted}, or remove the row"
        raise RowProblem(column, f"holds {len(values)} completions{empty}", remedy)
    return {f"{column}[{index}]": value for index, value in enumerate(values)}


def read_number(row: Row, column: str) -> float:
    """Returns a finite number."""
    value, remedy = _get(row, column), "store a number, or remove the row"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _wrong(value, column, "a number", remedy)
    if not abs(value) <= sys.float_info.max:  # math.isfinite can't take any whole number
        found = value if isinstance(value, float) else f"one of {value.bit_length()} bits"
        raise RowProblem(column, f"expected a finite number, found {found}", remedy)
    return float(value)


def read_preference(row: Row) -> float:
    """Returns the probability in [0, 1] that the chosen completion is the better one."""
    value = read_number(row, "preference")
    if not 0 <= value <= 1:
        raise RowProblem(
            "preference",
            f"{value:g} is no probability",
            "give the probability that chosen is better: 1 certain, 0.5 a tie, 0 rejected is better",
        )
    return value


def read_label(row: Row) -> float:
    """Returns 1.0 for a desirable completion, 0.0 for an undesirable one."""
    value = _get(row, "label")
    if type(value) not in (bool, int) or value not in (0, 1):
        raise _wrong(value, "label", "True or False", "store True for a desirable completion")
    return float(value)


def read_grades(row: Row, count: int) -> list[float]:
    """Returns one number per completion, higher is better: `scores`, or minus the `ranks`."""
    column = "ranks" if "ranks" in row else "scores"
    entries = read_entries(row, column, least=0)
    if len(entries) != count:
        raise RowProblem(column, f"{len(entries)} {column} for {count} completions", "give each completion one")
    grades = [read_number(entries, entry) for entry in entries]
    return [0.0 - grade for grade in grades] if column == "ranks" else grades


def read_messages(row: Row, column: str, least: int = 0) -> Messages:
    """Returns messages as fresh dicts without None-valued keys."""
    value, remedy = _get(row, column), 'store [{"role": …, "content": …}, …]'
    if type(value) is not list and isinstance(value, Mapping):
        found = f"expected a list of messages, found one dict with the keys {sorted(value)}"
        raise RowProblem(column, found, f"{remedy} (a datasets.List of a dict, not a Sequence)")
    messages = _expect(value, list, column, "a list of messages", remedy)
    if len(messages) < least:
        raise RowProblem(column, "is an empty conversation", "give at least one message, or remove the row")
    return [_read_message(message, f"{column}[{index}]") for index, message in enumerate(messages)]


def _read_message(message: object, where: str) -> Message:
    given: Row = _expect(message, Mapping, where, "a message", 'use {"role": …, "content": …}')
    if "from" in given and "role" not in given:
        raise RowProblem(where, "has from/value instead of role/content", "store every message with role and content")
    clean: Message = without_none(given)
    role, content = clean.get("role"), clean.get("content")
    if not isinstance(role, str) or not role:
        raise RowProblem(where, f"'role' is {_name(role)}", "give a role: system, user, assistant or tool")
    if content is None and not clean.get("tool_calls"):
        raise RowProblem(where, "has no 'content'", "give the text, or remove the message")
    if content is not None and not isinstance(content, str | list):
        raise RowProblem(where, f"'content' should be text, found {_name(content)}", "store the content as text")
    for part in content if isinstance(content, list) else ():
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in PARTS or kind == "text" and not isinstance(part.get("text"), str):
            raise RowProblem(
                where,
                f"'content' holds a part that is neither text nor an image: {shown(part, 60)}",
                'use text, [{"type": "text", "text": …}] or [{"type": "image"}]',
            )
        if kind == "text":
            _check_utf8(part["text"], where)
    if isinstance(content, str):
        _check_utf8(content, where)
    return clean


def first_message(value: object) -> Row:
    """Returns the first of several messages, or a message itself; an empty one for anything else."""
    first = value[0] if isinstance(value, list) and value else value
    return first if isinstance(first, Mapping) else {}


def content_text(message: Message) -> str:
    """Returns a message's text, also where it is given in parts."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def read_tools(row: Row) -> list[Values] | None:
    """Returns the row's tool schemas (list, or a JSON string of one); None when there are none."""
    tools = from_json(row, "tools")
    if tools is None:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise RowProblem("tools", "expected a list of JSON schemas", "store a list of dicts or its JSON string")
    return (tools if isinstance(row["tools"], str) else without_none(tools)) or None


def read_template_kwargs(row: Row) -> Values:
    """Returns extra arguments for the chat template (dict, or a JSON string of one)."""
    column = "chat_template_kwargs"
    kwargs = from_json(row, column)
    if kwargs is None:
        return {}
    _expect(kwargs, Mapping, column, "a dict", "store a dict")
    if reserved := sorted(name for name in kwargs if name in RESERVED_KWARGS or str(name).endswith("_token")):
        raise RowProblem(column, f"{reserved[0]!r} is set by the pipeline", f"remove {reserved[0]!r} from the dict")
    clean: Values = without_none(kwargs)
    return clean


def from_json(row: Row, column: str) -> Any:
    """Returns a value that may be given as JSON text."""
    value = row.get(column)
    if not isinstance(value, str):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RowProblem(column, f"is no valid JSON ({error})", "store a JSON string or the value itself") from None
    check_size({column: found})
    return found


def without_none(value: Any) -> Any:
    """Returns a copy of nested lists and dicts without the keys whose value is None."""
    if isinstance(value, Mapping):
        return {key: without_none(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [without_none(inner) for inner in value]
    return value


def _get(row: Row, column: str) -> Any:
    if column not in row:
        raise RowProblem(column, "is missing", f"give every row the field {column!r}")
    return row[column]


def _expect(value: Any, kind: type, field: str, expected: str, remedy: str) -> Any:
    """Returns a value that is of this kind."""
    if not isinstance(value, kind):
        raise _wrong(value, field, expected, remedy)
    return value


def _wrong(value: object, field: str, expected: str, remedy: str) -> RowProblem:
    problem = NoValue if value is None else RowProblem
    return problem(field, f"expected {expected}, found {_name(value)}", remedy)


def _check_utf8(text: str, where: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowProblem(
            where,
            f"holds a lone surrogate at character {error.start} and can't be encoded",
            'repair the text, e.g. text.encode("utf-8", "replace").decode()',
        ) from None


def _name(value: object) -> str:
    if value is None:
        return "nothing (None)"
    if isinstance(value, bool):
        return f"a boolean ({value})"
    return f"{type(value).__name__} ({shown(value, 40)})"


def shown(value: object, length: int) -> str:
    """Returns the start of a value's text, for messages."""
    try:
        return str(value)[:length]
    except Exception:  # numbers of thousands of digits, objects of any class, deep nesting
        return "not printable"
