"""Conversations to token ids through the tokenizer's own chat template.

The prompt is rendered with the generation prompt, or, when its last message is the assistant's, as a message to be
continued (TRL opens a second assistant turn there); each completion is what follows it in the whole conversation. The
template ends the completion; no end token is added.
"""

import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..errors import DataError
from .fields import Message, Messages, RowProblem
from .formats import Example
from .tokenize import Encoded, border_problem, split_at_border

TEMPLATE_REMEDY = (
    "use a chat template that renders the prompt the same way in both, or set what it offers for that in "
    "chat_template_kwargs, e.g. enable_thinking"
)
MARK = re.compile(r"\((?:turn|call) \d+\)")


def check_chat_template(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    if not tokenizer.chat_template:
        raise DataError(
            f"{name}: the rows are conversations, but the tokenizer has no chat template. Set "
            "tokenizer.chat_template, take an instruction-tuned model's tokenizer, or give the rows as text."
        )


def prompt_ids_of(tokenizer: PreTrainedTokenizerBase, example: Example) -> list[int]:
    """Renders the prompt up to where the model starts to write; `RowProblem` when nothing comes of it."""
    prompt_ids = render_ids(tokenizer, example, example.prompt, "prompt", **opening(example))
    if not prompt_ids:
        raise RowProblem("prompt", "the chat template renders it to nothing", "check the chat template")
    return prompt_ids


def encode_chat(tokenizer: PreTrainedTokenizerBase, example: Example) -> Encoded:
    """Renders and tokenizes one conversation; `RowProblem` when the template refuses it or the prompt is no prefix."""
    prompt_ids = prompt_ids_of(tokenizer, example)
    completion_ids, resplits = [], 0
    for field, messages in zip(example.fields, example.completions, strict=True):
        whole = join_turns(example, messages)
        joint = render_ids(tokenizer, example, whole, field)
        ids = joint[len(prompt_ids) :]
        if joint[: len(prompt_ids)] != prompt_ids:
            # A token merges across the border, or the texts really differ.
            prompt_text = render_text(tokenizer, example, example.prompt, "prompt", **opening(example))
            text = render_text(tokenizer, example, whole, field)
            merges = text.startswith(prompt_text)
            split = split_at_border(tokenizer, prompt_ids, joint, text[len(prompt_text) :]) if merges else None
            if split is None:
                raise border_problem(tokenizer, prompt_ids, joint, field, TEMPLATE_REMEDY)
            ids, resplits = split, resplits + 1
        completion_ids.append(ids)
    return Encoded(prompt_ids, completion_ids, resplits)


def join_turns(example: Example, completion: Messages) -> Messages:
    """Returns the whole conversation; a completion that continues the prompt's last message is joined to it."""
    if not example.continues:
        return [*example.prompt, *completion]
    last, first = example.prompt[-1], completion[0]
    return [*example.prompt[:-1], {**last, **first, "content": last["content"] + first["content"]}, *completion[1:]]


def turn_field(example: Example, index: int, number: int) -> str:
    """Names turn `number` of the whole conversation with completion `index`, for messages."""
    start = len(example.prompt) - example.continues
    return f"prompt[{number}]" if number < start else f"{example.fields[index]}[{number - start}]"


def turn_kind(message: Message) -> tuple[str, ...]:
    """Returns what decides how a template takes a message, besides the texts: its role and its fields."""
    return (message["role"], *sorted(message))


def check_rendering(tokenizer: PreTrainedTokenizerBase, example: Example) -> None:
    """Raises `RowProblem` when the template leaves out tools, tool calls or a turn of this row.

    Left out is what can change without a change of the rendered text; templates may well trim or rewrite a turn.
    Trajectories may have no prompt, and any of their turns may be the user's.
    """
    prompt_text = partial(render_text, tokenizer, example, field="prompt", **opening(example))
    wholes = [join_turns(example, messages) for messages in example.completions]
    shows = [partial(render_text, tokenizer, example, field=field) for field in example.fields]
    opens = bool(example.prompt) and example.prompt[-1]["role"] != "assistant" or example.continues
    show, shared = (prompt_text, example.prompt) if opens else (shows[0], wholes[0])
    if example.tools and show(shared) == show(shared, tools=None):
        raise RowProblem(
            "tools",
            "the chat template leaves the tools out",
            "use a template that renders tools, or remove the column: dataset.remove_columns('tools')",
        )
    start = len(example.prompt) if opens else 0
    if opens:
        _check_turns_shown(show, example, example.prompt, 0, 0)
    for index, whole in enumerate(wholes):
        _check_turns_shown(shows[index], example, whole, index, max(start - example.continues, 0))


def _check_turns_shown(show: Callable[..., str], example: Example, messages: Messages, index: int, start: int) -> None:
    """Asks of each turn from `start` on whether `show` shows it.

    All of them are marked and rendered at once, so that the work grows with the turns. A turn whose mark is not
    found, because the template leaves it out or rewrites it, is changed on its own.
    """
    shown = show(messages)
    marked = [_mark(message, at) if at >= start else message for at, message in enumerate(messages)]
    found = set(MARK.findall(show(marked).lower())) - set(MARK.findall(shown.lower()))
    for at, message in enumerate(messages[start:], start):
        for what, mark, changed in _changed_turns(message, at):
            if mark not in found and show([*messages[:at], changed, *messages[at + 1 :]]) == shown:
                raise RowProblem(
                    turn_field(example, index, at),
                    f"the chat template leaves {what} out",
                    "use a chat template that renders it, or remove the message",
                )


def _mark(message: Message, number: int) -> Message:
    """Returns the message with a mark in what it asks or answers, and in the name of the first tool it calls."""
    marked = dict(message)
    if message["role"] != "assistant" and isinstance(message.get("content"), str):
        marked["content"] = f"{message['content']} (turn {number})"
    match message.get("tool_calls"):
        case [{"function": {"name": str(name), **function}, **call}, *others]:
            named = {**function, "name": f"{name} (call {number})"}
            marked["tool_calls"] = [{**call, "function": named}, *others]
    return marked


def _changed_turns(message: Message, number: int) -> Iterator[tuple[str, str, Message]]:
    """Yields what can be left out of a message, its mark, and the message with it changed."""
    if message["role"] != "assistant" and isinstance(message.get("content"), str):
        yield f"the {message['role']!r} turn", f"(turn {number})", _mark(message, number)
    if message.get("tool_calls"):
        others = {key: value for key, value in message.items() if key != "tool_calls"}
        yield "a tool call", f"(call {number})", {"content": "", **others}


def opening(example: Example) -> dict[str, Any]:
    """Returns the template's argument that renders a prompt up to where the model starts to write."""
    return {"continue_final_message" if example.continues else "add_generation_prompt": True}


def render_ids(
    tokenizer: PreTrainedTokenizerBase, example: Example, messages: Messages, field: str, **changes: Any
) -> list[int]:
    """Returns the token ids of `messages` with the row's tools and arguments, and `changes` to them."""
    options = {"tokenize": True, "return_dict": True, "tokenizer_kwargs": {"verbose": False}, **changes}
    return list(_render(tokenizer, example, messages, field, options)["input_ids"])


def render_text(
    tokenizer: PreTrainedTokenizerBase, example: Example, messages: Messages, field: str, **changes: Any
) -> str:
    """Returns the text of `messages`, as `render_ids`."""
    text: str = _render(tokenizer, example, messages, field, {"tokenize": False, **changes})
    return text


def _render(
    tokenizer: PreTrainedTokenizerBase, example: Example, messages: Messages, field: str, options: dict[str, Any]
) -> Any:
    try:
        return tokenizer.apply_chat_template(
            messages, **{"tools": example.tools, **example.template_kwargs, **options}
        )
    except Exception as error:  # a template is code of someone else's and may raise anything
        roles = ", ".join(message["role"] for message in messages)
        raise RowProblem(
            field,
            f"the chat template refuses this conversation ({roles}): {type(error).__name__}: {error}",
            "reorder, merge or remove the messages, or use another chat template",
        ) from error
