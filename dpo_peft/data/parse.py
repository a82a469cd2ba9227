"""One row of a known format to an `Example`: one prompt with K completions, the best first.

A row that is wrong raises `RowProblem` (the caller adds dataset and row number); a row that is well formed but can't
teach anything comes back as the name of the reason (see `summary.py`).
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from . import fields
from .fields import Messages, Row, RowProblem, Values, content_text
from .formats import ASKING_ROLES, ASSISTANT, HUMAN, Example, Layout, is_several
from .summary import EMPTY_COMPLETION, IDENTICAL, NO_COMMON_PROMPT, NO_RANKING, NOTHING_SCORED, TRANSCRIPTS_DIFFER

Parsed = Example | str  # an example, or the reason why there is none
MESSAGE_COLUMNS = ("prompt", "chosen", "rejected", "completion", "completions", "messages")


class Given(NamedTuple):
    """The completions of a row, the best first: how messages call them, what they hold, and their grades, if any."""

    fields: tuple[str, ...] = ()
    completions: list[Any] = []
    grades: list[float] | None = None

    def best_and_worst(self, data: str) -> "Given":
        """Returns the best completion and the worst of several with grades, as a pair; none of them for a tie."""
        grades = self.grades or [0.0]
        if grades[0] == grades[-1]:
            return Given()
        pair = [self.completions[0], self.completions[-1]]
        return Given((self.fields[0], self.fields[-1]), pair, [1.0, 0.0] if data == "singles" else None)

    def after(self, kind: str, prompt: Any, completions: list[Any] | None = None) -> Example:
        """Returns an example of these completions, or of what is left of them behind the prompt."""
        return Example(
            kind, prompt, self.completions if completions is None else completions, self.fields, self.grades
        )


def json_columns(row: Row) -> tuple[str, ...]:
    """Returns the columns that hold messages as JSON text, as exports to CSV and Parquet have them."""
    return tuple(column for column in MESSAGE_COLUMNS if _holds_messages(row.get(column)))


def _holds_messages(text: object) -> bool:
    if not isinstance(text, str) or not text.lstrip().startswith("["):
        return False
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return False
    found = found[0] if found and isinstance(found[0], list) else found
    return bool(found) and all(isinstance(turn, dict) and {"role", "from"} & turn.keys() for turn in found)


def with_parsed(row: Row, columns: Sequence[str]) -> Row:
    """Returns a row whose messages are parsed from the JSON text in these columns.

    Raises `RowProblem` for text that is none.
    """
    return {**row, **{column: fields.from_json(row, column) for column in columns}} if columns else row


def parse_row(row: Row, layout: Layout, vocab_size: int, data: str) -> Parsed:
    """Turns a row into an `Example`, or into the reason why it carries no signal.

    Raises `RowProblem` when the row is malformed. `vocab_size` bounds ids that are given; `data` is what the objective
    learns from (`Wanted`).
    """
    given = _read_completions(row, layout, vocab_size, data)
    if layout.judged == "ranked" and data != "lists":
        given = given.best_and_worst(data)
        if not given.completions:
            return NO_RANKING
    return _add_prompt(row, layout, given, vocab_size, data)


def parse_each(row: Row, layout: Layout, vocab_size: int, data: str) -> list[Parsed]:
    """Turns each completion of a row, which nobody judged, into an example of its own, as `parse_row`."""
    given = _read_completions(row, layout, vocab_size, data)
    each = zip(given.fields, given.completions, strict=True)
    return [_add_prompt(row, layout, Given((field,), [one]), vocab_size, data) for field, one in each]


def read_prompt(row: Row) -> Example:
    """Reads a row's prompt alone, text or messages, as an example without completions.

    Raises `RowProblem` when it is malformed.
    """
    if not isinstance(row.get("prompt"), list):
        return Given().after("text", fields.read_text(row, "prompt"))
    prompt = fields.read_messages(row, "prompt", least=1)
    return _chat(row, Given(), prompt, [], prompt[-1]["role"] == "assistant")


def read_completion(entries: Row, field: str, kind: str, vocab_size: int) -> Any:
    """Reads a completion in the form that goes with its prompt. After messages, a text is a turn of the model."""
    if kind == "chat" and isinstance(entries[field], str):
        return [{"role": "assistant", "content": fields.read_text(entries, field)}]
    return _read_value(entries, field, kind, vocab_size)


def _read_value(row: Row, field: str, kind: str, vocab_size: int, least: int = 0) -> Any:
    """Reads a text, token ids, or at least so many messages."""
    if kind == "chat":
        return fields.read_messages(row, field, least)
    return fields.read_text(row, field) if kind == "text" else fields.read_ids(row, field, vocab_size)


def _read_completions(row: Row, layout: Layout, vocab_size: int, data: str) -> Given:
    """Reads a row's completions and what is known of them."""
    first, *others = layout.columns
    entries = row
    grades: Values  # of each completion by its name in messages
    if layout.judged == "ranked":
        entries = fields.read_entries(row, first, least=2)
        graded = zip(entries, fields.read_grades(row, len(entries)), strict=True)
        grades = dict(sorted(graded, key=lambda one: -one[1]))
    elif layout.judged == "label":
        grades = {first: fields.read_label(row)}
    elif layout.judged == "unlabeled":
        if first.startswith("completions"):
            entries = {} if row.get(first) is None else fields.read_entries(row, first, least=0)
        grades = dict.fromkeys([first] if entries is row else entries)
    else:
        worse: Mapping[str, object] = dict.fromkeys(others)
        if data in ("lists", "singles") and is_several(row.get(others[0]), layout.kind):
            worse = fields.read_entries(row, others[0])
            entries = {**row, **worse}
        grades = {first: 1.0, **dict.fromkeys(worse, 0.0)}
    least = int(layout.implicit and first != "messages")
    completions = [_read_value(entries, field, layout.kind, vocab_size, least) for field in grades]
    judged = data in ("lists", "singles") or layout.judged == "ranked"
    return Given(tuple(grades), completions, list(grades.values()) if judged else None)


def _add_prompt(row: Row, layout: Layout, given: Given, vocab_size: int, data: str) -> Parsed:
    """Returns an example with its prompt: the row's, or what its completions have in common."""
    if layout.prompt == "text":
        return given.after("text", fields.read_text(row, "prompt"))
    if layout.prompt == "text_implicit":
        return _cut_texts(given)
    if layout.prompt == "transcript":
        return _cut_transcripts(given)
    if layout.prompt == "ids":
        prompt_ids = fields.read_ids(row, "prompt_ids", vocab_size)
        if not prompt_ids and data != "trajectories":
            raise RowProblem("prompt_ids", "is empty", "give at least one prompt token, e.g. the BOS id")
        return given.after("ids", prompt_ids)
    if layout.columns == ("messages",):
        prompt, completions = _cut_judged(given.completions[0])
    elif layout.implicit:
        prompt, completions = _cut_conversations(given)
    else:
        prompt, completions = fields.read_messages(row, "prompt", least=1), given.completions
    if data == "trajectories":
        return _trajectories(row, given, prompt, completions, layout.implicit)
    if layout.implicit and len(completions) > 1:
        if not prompt:
            return NO_COMMON_PROMPT
        if not all(_is_one_answer(turns) for turns in completions):
            return TRANSCRIPTS_DIFFER
    if any(_says_nothing(turns) for turns in completions):
        return EMPTY_COMPLETION
    for field, turns in zip(given.fields, completions, strict=True):
        if turns[0]["role"] in ASKING_ROLES:
            raise RowProblem(
                field,
                f"starts with a {turns[0]['role']!r} turn, which the model never writes",
                "move shared turns into 'prompt', or drop the 'prompt' column if these are whole conversations",
            )
    return _chat(row, given, prompt, completions, not layout.implicit and prompt[-1]["role"] == "assistant")


def _cut_texts(given: Given) -> Parsed:
    """Splits where the texts begin to differ, backing up to the start of the word (a lone blank goes with it)."""
    texts = given.completions
    if len(set(texts)) == 1:
        return IDENTICAL
    first, cut = texts[0], common_start(texts)
    spaced = {text[cut] for text in texts if cut < len(text)}
    if any(_in_spaced_word(char) for char in spaced):
        while cut and _in_spaced_word(first[cut - 1]):
            cut -= 1
    if cut and first[cut - 1] == " ":
        cut -= 1
    if not cut:
        return NO_COMMON_PROMPT
    return given.after("text", first[:cut], [text[cut:] for text in texts])


def _in_spaced_word(char: str) -> bool:
    return char.isalnum() and ord(char) < 0x2E80  # Chinese, Japanese and Korean blocks have no blanks to back up to


def _cut_transcripts(given: Given) -> Parsed:
    """Cuts behind the last "Assistant:" of each transcript; the parts before it must be the same text."""
    for field, text in zip(given.fields, given.completions, strict=True):
        if not text.startswith(HUMAN) or ASSISTANT not in text:
            raise RowProblem(
                field,
                f"is no transcript: it must start with {HUMAN!r} and hold {ASSISTANT!r}, found {text[:60]!r}",
                "remove the row, or give the dataset a 'prompt' column",
            )
    cut = [text.rpartition(ASSISTANT) for text in given.completions]
    if len({prompt for prompt, _, _ in cut}) > 1:
        return TRANSCRIPTS_DIFFER
    return given.after("text", cut[0][0] + ASSISTANT, [reply for _, _, reply in cut])


def _cut_conversations(given: Given) -> tuple[Messages, list[Messages]]:
    """Cuts behind the common start of whole conversations, but leaves each at least its last message."""
    cut = min(common_start(given.completions), *(len(messages) - 1 for messages in given.completions))
    return given.completions[0][:cut], [messages[cut:] for messages in given.completions]


def _cut_judged(messages: Messages) -> tuple[Messages, list[Messages]]:
    """Cuts before the assistant turns at the end, which are what was judged."""
    cut = next((i for i in range(len(messages), 0, -1) if messages[i - 1]["role"] != "assistant"), 0)
    if cut == len(messages) or not cut:
        found = f"ends with a {messages[-1]['role']!r} turn" if messages else "is an empty conversation"
        raise RowProblem(
            "messages",
            "has no turn before the judged one" if messages and not cut else f"{found}: no completion is judged",
            "end the conversation with the judged assistant turn, after the user's",
        )
    return messages[:cut], [messages[cut:]]


def _trajectories(row: Row, given: Given, prompt: Messages, completions: list[Messages], implicit: bool) -> Parsed:
    """Takes whole conversations that may differ from any turn on; without a `prompt` column the prompt stays empty."""
    written = [[message for message in turns if message["role"] == "assistant"] for turns in completions]
    if not all(written):
        return NOTHING_SCORED
    if any(_says_nothing(turns) for turns in written):
        return EMPTY_COMPLETION
    if implicit:
        prompt, completions = [], given.completions
    for field, start in [("prompt", prompt)] if prompt else zip(given.fields, completions, strict=True):
        if start[0]["role"] == "assistant":
            raise RowProblem(
                f"{field}[0]",
                "is an assistant turn, and no template shows where the model starts to write the first turn",
                "begin the conversation with a system or user turn",
            )
    opens = bool(prompt) and prompt[-1]["role"] == "assistant"
    return _chat(row, given, prompt, completions, opens and any(t[0]["role"] == "assistant" for t in completions))


def _chat(row: Row, given: Given, prompt: Messages, completions: list[Messages], continues: bool) -> Example:
    """Returns an example of messages, with the tools and template arguments of the row."""
    joined = [prompt[-1], *(turns[0] for turns in completions)] if continues and completions else []
    if not all(isinstance(message.get("content"), str) and message["role"] == "assistant" for message in joined):
        raise RowProblem(
            "prompt",
            "ends with an assistant turn, so the completions go on with it; that needs plain text on both sides",
            "end the prompt with the user's turn, or make the last and the first content plain text",
        )
    chat = fields.read_tools(row), fields.read_template_kwargs(row)
    return Example("chat", prompt, completions, given.fields, given.grades, *chat, continues)


def _is_one_answer(messages: Messages) -> bool:
    """Says whether these are one assistant turn, or several with tool results between them."""
    roles = [message["role"] for message in messages]
    twice = any(pair == ("assistant", "assistant") for pair in zip(roles, roles[1:], strict=False))
    return roles[0] != "tool" and not twice and not set(roles).intersection(ASKING_ROLES)


def _says_nothing(turns: Messages) -> bool:
    return not any(m.get("tool_calls") or content_text(m).strip() for m in turns)


def common_start(sequences: Sequence[Any]) -> int:
    """Returns the length of the common start of sequences."""
    first, *others = sequences
    limit = min(map(len, sequences))
    if all(other[:limit] == first[:limit] for other in others):
        return limit
    return next(i for i in range(limit) if any(other[i] != first[i] for other in others))
