"""One row of a known format to an `Example`: one prompt with K completions, the best first.

A row that is wrong raises `RowProblem` (the caller adds dataset and row number); a row that is well formed but can't
teach anything comes back as the name of the reason (see `summary.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from .fields import (
    Messages,
    RowProblem,
    read_conversation,
    read_entries,
    read_grades,
    read_ids,
    read_label,
    read_messages,
    read_template_kwargs,
    read_text,
    read_tools,
)
from .formats import (
    ASKING_ROLES,
    ASSISTANT,
    HUMAN,
    REGISTERED,
    Example,
    Row,
    RowFormat,
    Wanted,
    detect_format,
    is_several,
    split_format,
    used_columns,
)
from .summary import EMPTY_COMPLETION, IDENTICAL, NO_COMMON_PROMPT, NOTHING_SCORED, TRANSCRIPTS_DIFFER


@dataclass(frozen=True)
class Answers:
    """The answers of a row, the best first: how messages call them, what they hold, and their grades, if any."""

    fields: tuple[str, ...]
    values: list[Any]
    grades: list[float] | None = None


def find_format(name: str, columns: list[str], first: Row, wanted: Wanted, vocab_size: int) -> RowFormat:
    """Returns the format of dataset `name`, ready to read its rows; `vocab_size` bounds token ids that they hold.

    Raises `DataError` when there is none, or none that the objective can learn from.
    """
    have = set(columns)
    for row_format in REGISTERED.values():
        if row_format.detect(have, first):
            return row_format
    fmt = detect_format(name, columns, first, wanted)
    read = partial(parse_row, fmt=fmt, vocab_size=vocab_size, data=wanted.data)
    return RowFormat(fmt, kind_of_format(fmt), used_columns(fmt), read)


def kind_of_format(fmt: str) -> str:
    """Returns what the examples of one of the package's own formats hold: "text", "chat" or "ids"."""
    return "ids" if fmt.startswith("ids") else "chat" if fmt.startswith("chat") else "text"


def parse_row(row: Row, fmt: str, vocab_size: int, data: str = "pairs") -> Example | str:
    """Turns one row of format `fmt` into an `Example`, or into the reason why it carries no signal.

    Raises `RowProblem` when the row is malformed. `vocab_size` bounds pre-tokenised ids; `data` is what the objective
    learns from (`Wanted`).
    """
    base, how = split_format(fmt)
    if fmt == "chat_implicit_label":
        return _parse_judged_conversation(row)
    answers = _read_answers(row, kind_of_format(fmt), how, vocab_size, data)
    if base == "text":
        return Example("text", read_text(row, "prompt"), answers.values, answers.fields, answers.grades)
    if base == "text_implicit":
        return _parse_text_implicit(answers)
    if base == "transcript":
        return _parse_transcript(answers)
    if base == "ids":
        prompt_ids = read_ids(row, "prompt_ids", vocab_size)
        if not prompt_ids and data != "trajectories":
            raise RowProblem("prompt_ids", "is empty", "give at least one prompt token, e.g. the BOS id")
        return Example("ids", prompt_ids, answers.values, answers.fields, answers.grades)
    if data == "trajectories":
        return _parse_trajectories(row, base == "chat_implicit", answers)
    return _parse_chat(row, base == "chat_implicit", answers)


def read_prompt(row: Row, as_chat: bool = False) -> Example:
    """Reads a row's prompt alone, text or messages, as an example without completions.

    Raises `RowProblem` when it is malformed. With `as_chat` a prompt that is text becomes a user's message.
    """
    if isinstance(row.get("prompt"), list):
        prompt = read_conversation(row, "prompt")
    else:
        text = read_text(row, "prompt")
        if not as_chat:
            return Example("text", text, [], ())
        prompt = [{"role": "user", "content": text}]
    return _chat_example(row, prompt, Answers((), []), prompt[-1]["role"] == "assistant")


def _read_answers(row: Row, kind: str, how: str, vocab_size: int, data: str) -> Answers:
    read: Any = {"text": read_text, "chat": read_messages, "ids": partial(read_ids, vocab_size=vocab_size)}[kind]
    end = "_ids" if kind == "ids" else ""
    if how == "label":
        return Answers((f"completion{end}",), [read(row, f"completion{end}")], [read_label(row)])
    if how == "ranked":
        ranked = read_entries(row, f"completions{end}", least=2)
        grades = read_grades(row, len(ranked))
        fields, values = list(ranked), [read(ranked, field) for field in ranked]
        order = sorted(range(len(values)), key=lambda index: -grades[index])
        return Answers(tuple(fields[i] for i in order), [values[i] for i in order], [grades[i] for i in order])
    chosen, rejected, graded = f"chosen{end}", f"rejected{end}", data in ("lists", "singles")
    entries: Row = row
    fields = [chosen, rejected]
    if graded and is_several(row.get(rejected), kind):
        entries = {**row, **read_entries(row, rejected)}
        fields = [chosen, *(field for field in entries if field not in row)]
    values = [read(entries, field) for field in fields]
    return Answers(tuple(fields), values, [1.0] + [0.0] * (len(values) - 1) if graded else None)


def _parse_text_implicit(answers: Answers) -> Example | str:
    """Splits where the texts begin to differ, backing up to the start of the word (a lone blank goes with it)."""
    texts = answers.values
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
    return Example("text", first[:cut], [text[cut:] for text in texts], answers.fields, answers.grades)


def _in_spaced_word(char: str) -> bool:
    return char.isalnum() and ord(char) < 0x2E80  # Chinese, Japanese and Korean blocks have no blanks to back up to


def _parse_transcript(answers: Answers) -> Example | str:
    """Cuts behind the last "Assistant:" of each transcript; the parts before it must be the same text."""
    prompts, replies = [], []
    for field, text in zip(answers.fields, answers.values, strict=True):
        cut = text.rfind(ASSISTANT) + len(ASSISTANT)
        if not text.startswith(HUMAN) or cut < len(ASSISTANT):
            raise RowProblem(
                field,
                f"is no transcript: it must start with {HUMAN!r} and hold {ASSISTANT!r}, found {text[:60]!r}",
                "remove the row, or give the dataset a 'prompt' column",
            )
        prompts.append(text[:cut])
        replies.append(text[cut:])
    if len(set(prompts)) > 1:
        return TRANSCRIPTS_DIFFER
    return Example("text", prompts[0], replies, answers.fields, answers.grades)


def _parse_chat(row: Row, implicit: bool, answers: Answers) -> Example | str:
    prompt, completions = _split_conversations(row, implicit, answers)
    if implicit:
        if not prompt:
            return NO_COMMON_PROMPT
        if not all(_is_one_answer(answer) for answer in completions):
            return TRANSCRIPTS_DIFFER
    if any(_says_nothing(answer) for answer in completions):
        return EMPTY_COMPLETION
    for field, answer in zip(answers.fields, completions, strict=True):
        if answer[0]["role"] in ASKING_ROLES:
            raise RowProblem(
                field,
                f"starts with a {answer[0]['role']!r} turn, which the model never writes",
                "move shared turns into 'prompt', or drop the 'prompt' column if these are whole conversations",
            )
    continues = not implicit and prompt[-1]["role"] == "assistant"
    return _chat_example(row, prompt, replace(answers, values=completions), continues)


def _parse_trajectories(row: Row, implicit: bool, answers: Answers) -> Example | str:
    """Reads whole conversations that may differ from any turn on; without a `prompt` column the prompt stays empty."""
    prompt, completions = _split_conversations(row, implicit, answers)
    written = [[message for message in turns if message["role"] == "assistant"] for turns in completions]
    if not all(written):
        return NOTHING_SCORED
    if any(_says_nothing(turns) for turns in written):
        return EMPTY_COMPLETION
    if implicit:
        prompt, completions = [], answers.values
    for field, start in [("prompt", prompt)] if prompt else zip(answers.fields, completions, strict=True):
        if start[0]["role"] == "assistant":
            raise RowProblem(
                f"{field}[0]",
                "is an assistant turn, and no template shows where the model starts to write the first turn",
                "begin the conversation with a system or user turn",
            )
    continues = bool(prompt) and prompt[-1]["role"] == "assistant"
    continues = continues and any(turns[0]["role"] == "assistant" for turns in completions)
    return _chat_example(row, prompt, replace(answers, values=completions), continues)


def _parse_judged_conversation(row: Row) -> Example | str:
    """Reads `messages` and `label`: the assistant turns at the end are what was judged."""
    messages, label = read_messages(row, "messages"), read_label(row)
    cut = next((i for i in range(len(messages), 0, -1) if messages[i - 1]["role"] != "assistant"), 0)
    if cut == len(messages) or not cut:
        found = f"ends with a {messages[-1]['role']!r} turn" if messages else "is an empty conversation"
        raise RowProblem(
            "messages",
            "has no turn before the judged one" if messages and not cut else f"{found}, so there is no judged answer",
            "end the conversation with the judged assistant turn, after the user's",
        )
    if _says_nothing(messages[cut:]):
        return EMPTY_COMPLETION
    return _chat_example(row, messages[:cut], Answers(("messages",), [messages[cut:]], [label]), continues=False)


def _chat_example(row: Row, prompt: Messages, answers: Answers, continues: bool) -> Example:
    if continues and answers.values:
        _check_continuation(prompt, answers.values)
    chat = read_tools(row), read_template_kwargs(row)
    return Example("chat", prompt, answers.values, answers.fields, answers.grades, *chat, continues)


def _split_conversations(row: Row, implicit: bool, answers: Answers) -> tuple[Messages, list[Messages]]:
    """Returns prompt and completions: those given, or the common start of whole conversations and what follows it."""
    if not implicit:
        return read_conversation(row, "prompt"), answers.values
    for field, messages in zip(answers.fields, answers.values, strict=True):
        if not messages:
            raise RowProblem(field, "is an empty conversation", "remove the row")
    # Each side keeps at least its last message as the answer, even when one conversation holds the other.
    cut = min(common_start(answers.values), *(len(messages) - 1 for messages in answers.values))
    return answers.values[0][:cut], [messages[cut:] for messages in answers.values]


def _is_one_answer(messages: Messages) -> bool:
    """Says whether these are one assistant turn, or several with tool results between them."""
    roles = [message["role"] for message in messages]
    twice = any(pair == ("assistant", "assistant") for pair in zip(roles, roles[1:], strict=False))
    return roles[0] != "tool" and not twice and not count_turns(messages, ASKING_ROLES)


def count_turns(messages: Messages, roles: tuple[str, ...]) -> int:
    """Counts the messages with one of these roles."""
    return sum(message["role"] in roles for message in messages)


def _says_nothing(answer: Messages) -> bool:
    return not any(m.get("tool_calls") or m.get("content") and str(m["content"]).strip() for m in answer)


def _check_continuation(prompt: Messages, completions: list[Messages]) -> None:
    joined = [prompt[-1], *(answer[0] for answer in completions)]
    if not all(isinstance(message.get("content"), str) and message["role"] == "assistant" for message in joined):
        raise RowProblem(
            "prompt",
            "ends with an assistant turn, so the answers go on with it; that needs plain text on both sides",
            "end the prompt with the user's turn, or make the last and the first content plain text",
        )


def common_start(sequences: Sequence[Any]) -> int:
    """Returns the length of the common start of sequences."""
    first, *others = sequences
    limit = min(map(len, sequences))
    if all(other[:limit] == first[:limit] for other in others):
        return limit
    return next(i for i in range(limit) if any(other[i] != first[i] for other in others))
