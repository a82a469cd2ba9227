"""Refuses rows with text that nobody would read: a question, a system prompt or an earlier turn in another column.

Without it the rows look whole, and the model learns answers to a question that it never saw.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence

from ..errors import DataError
from .fields import Row, first_message
from .formats import renaming

SAMPLED = 50  # rows of a dataset that are looked at
WORDS = 4  # of a text that is more than a label or a name

# What a column of such a name holds is part of the prompt, however short it is; and how it is renamed to be read.
_BEHIND = {"prompt": "instruction", "{0}": "input"}  # of Alpaca-like rows: they are joined
SYSTEM_COLUMNS = ("system", "system_prompt", "system_message")
ASKING: dict[str, dict[str, str]] = {
    **dict.fromkeys(SYSTEM_COLUMNS, {}),
    **dict.fromkeys(("history", "dialog", "dialogue", "conversation", "conversations"), {"{0}": "history"}),
    **dict.fromkeys(("messages", "prompt", "user_message"), {"{0}": "prompt"}),
    **dict.fromkeys(("instruction", "question", "query"), {"{0}": "instruction", "prompt": "input"}),
    **dict.fromkeys(("input", "context", "passage", "document"), _BEHIND),
}


def check_unread(name: str, rows: Sequence[Row], unread: Collection[str]) -> None:
    """Refuses columns, of those that are neither read nor said to be unneeded, that hold text which no other column
    has in some rows: a `DataError` names the column, what it holds, and what to do with it."""
    read = ["\n".join(t for name, v in row.items() if name not in unread for t in texts_in(v)) for row in rows]
    for column in unread:
        lost = [text for row, text_read in zip(rows, read, strict=True) if (text := _lost(row, column, text_read))]
        if not lost or (column not in ASKING and 2 * len(lost) < len(rows)):
            continue
        raise DataError(
            f"{name}: column {column!r} holds text that is not read, such as {lost[0][:60]!r}. {_remedy(column, rows)}"
            f"If it isn't needed: --unneeded_columns {column}, or unneeded_columns=[{column!r}] in Python."
        )


def _remedy(column: str, rows: Sequence[Row]) -> str:
    """Returns the sentence that says how a column becomes part of the prompt, if an option does it."""
    if column in SYSTEM_COLUMNS:
        return "As the system turn it needs the chat template: --as_chat true, or as_chat=True in Python. "
    first, beside = rows[0], {"{0}": "prompt"} if "prompt" not in rows[0] else _BEHIND
    names = {old.format(column): new for old, new in ASKING.get(column, beside).items()}
    joined = "instruction" in names.values() and not isinstance(first.get("prompt"), str)
    if names.keys() - first.keys() or joined or set(names.values()) & (first.keys() - names.keys()):
        return ""
    names = {old: new for old, new in names.items() if old != new}
    return f"If it belongs to the prompt: {renaming(names)}. " if names else ""


def _lost(row: Row, column: str, read: str) -> str:
    """Returns a text of a column that is not in `read`; "" if there is none, or labels and names alone."""
    value = row.get(column)
    words = 1 if column in ASKING or not isinstance(value, str) else WORDS
    turns = column in ASKING or isinstance(value, str) or bool({"content", "value"} & first_message(value).keys())
    found = (text for text in texts_in(value) if turns and len(text.split()) >= words and text.strip() not in read)
    return next(found, "")


def texts_in(value: object) -> Iterator[str]:
    """Yields the texts inside a value; of a message what it says, not who."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            if key not in ("role", "from", "type"):
                yield from texts_in(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from texts_in(inner)
