"""What a row may look like, and how it becomes an `Example`: one prompt with K completions.

`detect_format` looks at the columns and the first row and names one format for the whole dataset; `parse_row` turns a
row of that format into an `Example`. A row that is wrong raises `RowProblem` (the caller adds dataset and row number);
a row that is well formed but can't teach anything comes back as the name of the reason (see `report.py`).

| format        | columns                                                                                     |
|---------------|---------------------------------------------------------------------------------------------|
| text          | `prompt`, `chosen`, `rejected`: text                                                        |
| text_implicit | `chosen`, `rejected`: text that starts alike                                                |
| transcript    | `chosen`, `rejected`: raw HH text, "\\n\\nHuman: … \\n\\nAssistant: …"                          |
| chat          | `prompt`, `chosen`, `rejected`: lists of {role, content}; `tools`, `chat_template_kwargs`   |
| chat_implicit | `chosen`, `rejected`: whole conversations that start alike (a text `prompt` is then unused) |
| ids           | `prompt_ids`, `chosen_ids`, `rejected_ids`: token ids, used as they are                     |
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import DataError
from .report import EMPTY_COMPLETION, IDENTICAL, NO_COMMON_PROMPT, TRANSCRIPTS_DIFFER
from .values import RowProblem, read_ids, read_messages, read_template_kwargs, read_text, read_tools

Row = Mapping[str, Any]

TEXT_COLUMNS = ("prompt", "chosen", "rejected")
ID_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
CHAT_COLUMNS = ("tools", "chat_template_kwargs")
USED_COLUMNS = {
    "text": TEXT_COLUMNS,
    "text_implicit": TEXT_COLUMNS[1:],
    "transcript": TEXT_COLUMNS[1:],
    "chat": TEXT_COLUMNS + CHAT_COLUMNS,
    "chat_implicit": TEXT_COLUMNS[1:] + CHAT_COLUMNS,
    "ids": ID_COLUMNS,
}
ASKING_ROLES = ("user", "system", "developer")
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
ACCEPTED = (
    "prompt/chosen/rejected as text or lists of messages, chosen/rejected that start alike (implicit prompt), raw HH "
    "transcripts, or prompt_ids/chosen_ids/rejected_ids"
)


@dataclass(frozen=True)
class Example:
    """One prompt with K completions before tokenisation; for pairs the chosen one comes first.

    `kind` is "text" (str), "chat" (lists of messages) or "ids" (lists of int) and holds for prompt and completions.
    `continues` says that the completions go on with the prompt's last message instead of starting a new one.
    """

    kind: str
    prompt: Any
    completions: list[Any]
    tools: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    continues: bool = False


def detect_format(name: str, columns: list[str], first: Row) -> str:
    """Name the format of dataset `name` from its columns and its first row; a `DataError` if there is none."""
    have = set(columns)
    _refuse_other_formats(name, have, first)
    if have.intersection(ID_COLUMNS) and not {"chosen", "rejected"} <= have:
        _need(name, have, ID_COLUMNS)
        return "ids"
    _need(name, have, ("chosen", "rejected"))
    kinds = {column: _kind_of(first.get(column)) for column in TEXT_COLUMNS if column in have}
    if kinds["chosen"] == kinds["rejected"] == "text":
        return _detect_text(name, have, kinds, first)
    if kinds["chosen"] == kinds["rejected"] == "list":
        return _detect_chat(name, kinds, first)
    for column in ("chosen", "rejected"):  # something odd: let the readers say what
        if kinds[column] == "text" or kinds[column] == "list":
            continue
        _raise_problem(name, read_text, first, column)
    raise DataError(
        f"{name}: 'chosen' is {kinds['chosen']} but 'rejected' is {kinds['rejected']}. Give both as text or both as "
        "lists of messages."
    )


def _detect_text(name: str, have: set[str], kinds: dict[str, str], first: Row) -> str:
    if "prompt" in have:
        if kinds["prompt"] == "list":
            raise DataError(
                f"{name}: 'prompt' is a list of messages but 'chosen' and 'rejected' are text. Make the answers "
                'messages too: [{"role": "assistant", "content": text}].'
            )
        return "text"
    questions = sorted(have & {"instruction", "question", "query", "input"})
    if questions:
        raise DataError(
            f"{name}: no 'prompt' column, but {', '.join(map(repr, questions))} looks like one. Alpaca-like rows: "
            "dataset.map(dpo_peft.data.from_alpaca); otherwise rename the column to 'prompt'."
        )
    if first["chosen"].startswith(HUMAN) and first["rejected"].startswith(HUMAN):
        return "transcript"
    return "text_implicit"


def _detect_chat(name: str, kinds: dict[str, str], first: Row) -> str:
    if kinds.get("prompt") == "list":
        return "chat"
    if "prompt" not in kinds:
        return "chat_implicit"
    # Some public sets repeat the question as text beside two whole conversations.
    opening = first["chosen"][0] if first["chosen"] else None
    if isinstance(opening, Mapping) and opening.get("role") in ASKING_ROLES:
        return "chat_implicit"
    raise DataError(
        f"{name}: 'prompt' is {kinds['prompt']} but 'chosen' and 'rejected' are lists of messages. Make the prompt a "
        'list of messages too: [{"role": "user", "content": text}].'
    )


def _refuse_other_formats(name: str, have: set[str], first: Row) -> None:
    """Name formats that need another objective, a converter or a vision model, before anything else is said."""
    vision = sorted(have & {"image", "images"})
    if vision:
        raise DataError(
            f"{name}: column {vision[0]!r} holds images, and vision models are not supported. Remove the column if "
            f"the text alone is meant: dataset.remove_columns({vision!r})."
        )
    later, paired = None, {"chosen", "rejected"} <= have
    if "completions" in have and not paired:
        later = "'completions' (ranked or scored lists) needs a multi-completion objective"
    elif "label" in have and have & {"completion", "messages"} and not paired:
        later = "'label' (one judged answer per row) needs the KTO objective"
    elif "preference" in have:
        later = "'preference' (a soft label) needs a soft-label objective; hard pairs: remove the column"
    elif _list_of_answers(first.get("rejected")):
        later = "'rejected' as a list of answers needs the multi-negative objective"
    if later:
        raise DataError(f"{name}: {later}. DPO pairs here need one chosen and one rejected answer: {ACCEPTED}.")
    if {"response1", "response2"} <= have and not paired:
        raise DataError(
            f"{name}: PandaLM comparisons. Convert them first: dataset.filter(dpo_peft.data.pandalm_decided)"
            ".map(dpo_peft.data.from_pandalm)."
        )
    if "conversations" in have and "prompt" not in have:
        raise DataError(f"{name}: ShareGPT rows. Convert them first: dataset.map(dpo_peft.data.from_sharegpt).")


def _list_of_answers(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], (str, list))


def _need(name: str, have: set[str], wanted: tuple[str, ...]) -> None:
    missing = [column for column in wanted if column not in have]
    if missing:
        raise DataError(
            f"{name}: column {', '.join(map(repr, missing))} is missing; the columns are {sorted(have)}. Accepted: "
            f"{ACCEPTED}. Rename with dataset.rename_column(old, new)."
        )


def _kind_of(value: Any) -> str:
    if isinstance(value, str):
        return "text"
    return "list" if isinstance(value, list) else type(value).__name__


def _raise_problem(name: str, read: Callable[[Row, str], Any], row: Row, column: str) -> None:
    try:
        read(row, column)
    except RowProblem as problem:
        raise problem.located(name, 0) from None


def parse_row(row: Row, fmt: str, vocab_size: int) -> Example | str:
    """Turn one row of format `fmt` into an `Example`, or into the reason why it carries no signal.

    Raises `RowProblem` when the row is malformed. `vocab_size` bounds pre-tokenised ids.
    """
    if fmt == "text":
        prompt, *completions = (read_text(row, column) for column in TEXT_COLUMNS)
        return Example("text", prompt, completions)
    if fmt == "text_implicit":
        return _parse_text_implicit(read_text(row, "chosen"), read_text(row, "rejected"))
    if fmt == "transcript":
        return _parse_transcript(row)
    if fmt == "ids":
        prompt_ids, *completion_ids = (read_ids(row, column, vocab_size) for column in ID_COLUMNS)
        if not prompt_ids:
            raise RowProblem("prompt_ids", "is empty", "give at least one prompt token, e.g. the BOS id")
        return Example("ids", prompt_ids, completion_ids)
    return _parse_chat(row, implicit=fmt == "chat_implicit")


def _parse_text_implicit(chosen: str, rejected: str) -> Example | str:
    """Split where the texts begin to differ, backing up to the start of the word (a lone blank goes with the word)."""
    if chosen == rejected:
        return IDENTICAL
    cut = _common(chosen, rejected)
    spaced = {text[cut] for text in (chosen, rejected) if cut < len(text)}
    if any(_in_spaced_word(char) for char in spaced):
        while cut and _in_spaced_word(chosen[cut - 1]):
            cut -= 1
    if cut and chosen[cut - 1] == " ":
        cut -= 1
    if not cut:
        return NO_COMMON_PROMPT
    return Example("text", chosen[:cut], [chosen[cut:], rejected[cut:]])


def _in_spaced_word(char: str) -> bool:
    return char.isalnum() and ord(char) < 0x2E80  # Chinese, Japanese and Korean blocks have no blanks to back up to


def _parse_transcript(row: Row) -> Example | str:
    """Cut behind the last "Assistant:" of each transcript; the parts before it must be the same text."""
    prompts, replies = [], []
    for column in ("chosen", "rejected"):
        text = read_text(row, column)
        cut = text.rfind(ASSISTANT) + len(ASSISTANT)
        if not text.startswith(HUMAN) or cut < len(ASSISTANT):
            raise RowProblem(
                column,
                f"is no transcript: it must start with {HUMAN!r} and hold {ASSISTANT!r}, found {text[:60]!r}",
                "remove the row, or give the dataset a 'prompt' column",
            )
        prompts.append(text[:cut])
        replies.append(text[cut:])
    if prompts[0] != prompts[1]:
        return TRANSCRIPTS_DIFFER
    return Example("text", prompts[0], replies)


def _parse_chat(row: Row, implicit: bool) -> Example | str:
    chosen, rejected = (read_messages(row, column) for column in ("chosen", "rejected"))
    if implicit:
        if not chosen or not rejected:
            raise RowProblem("rejected" if chosen else "chosen", "is an empty conversation", "remove the row")
        # Each side keeps at least its last message as the answer, even when one conversation holds the other.
        cut = min(_common(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
        prompt, completions = chosen[:cut], [chosen[cut:], rejected[cut:]]
        if not prompt:
            return NO_COMMON_PROMPT
        if not all(_is_one_answer(answer) for answer in completions):
            return TRANSCRIPTS_DIFFER
    else:
        prompt, completions = read_messages(row, "prompt"), [chosen, rejected]
        if not prompt:
            raise RowProblem("prompt", "is an empty conversation", "give at least one message")
    if any(_says_nothing(answer) for answer in completions):
        return EMPTY_COMPLETION
    for column, answer in zip(("chosen", "rejected"), completions, strict=True):
        if answer[0]["role"] in ASKING_ROLES:
            raise RowProblem(
                column,
                f"starts with a {answer[0]['role']!r} turn, which the model never writes",
                "move shared turns into 'prompt', or drop the 'prompt' column if these are whole conversations",
            )
    continues = not implicit and prompt[-1]["role"] == "assistant"
    if continues:
        _check_continuation(prompt, completions)
    return Example("chat", prompt, completions, read_tools(row), read_template_kwargs(row), continues)


def _is_one_answer(messages: list[dict[str, Any]]) -> bool:
    """One assistant turn, or several with tool results between them."""
    roles = [message["role"] for message in messages]
    twice = any(pair == ("assistant", "assistant") for pair in zip(roles, roles[1:], strict=False))
    return roles[0] != "tool" and not twice and not count_turns(messages, ASKING_ROLES)


def count_turns(messages: list[dict[str, Any]], roles: tuple[str, ...]) -> int:
    """Number of messages with one of these roles."""
    return sum(message["role"] in roles for message in messages)


def _says_nothing(answer: list[dict[str, Any]]) -> bool:
    return not any(m.get("tool_calls") or m.get("content") and str(m["content"]).strip() for m in answer)


def _check_continuation(prompt: list[dict[str, Any]], completions: list[list[dict[str, Any]]]) -> None:
    joined = [prompt[-1], *(answer[0] for answer in completions)]
    if not all(isinstance(message.get("content"), str) and message["role"] == "assistant" for message in joined):
        raise RowProblem(
            "prompt",
            "ends with an assistant turn, so the answers go on with it; that needs plain text on both sides",
            "end the prompt with the user's turn, or make the last and the first content plain text",
        )


def _common(first: Any, second: Any) -> int:
    """Length of the common start of two sequences."""
    limit = min(len(first), len(second))
    if first[:limit] == second[:limit]:
        return limit
    return next(index for index in range(limit) if first[index] != second[index])
