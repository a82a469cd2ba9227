"""Conversations to token ids through the tokenizer's own chat template.

The prompt is rendered with the generation prompt, or, when its last message is the assistant's, as a message to be
continued (TRL opens a second assistant turn there); each completion is what follows it in the whole conversation. The
template ends the completion; no end token is added.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..errors import DataError
from .fields import RowProblem
from .formats import Example
from .tokenize import Encoded, border_problem, split_at_border

Messages = list[dict[str, Any]]
TEMPLATE_REMEDY = (
    "use a chat template that renders the prompt the same way in both, or set what it offers for that in "
    "chat_template_kwargs, e.g. enable_thinking"
)


def check_chat_template(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    if not tokenizer.chat_template:
        raise DataError(
            f"{name}: the rows are conversations, but the tokenizer has no chat template. Set "
            "tokenizer.chat_template, take an instruction-tuned model's tokenizer, or give the rows as text."
        )


def encode_chat(tokenizer: PreTrainedTokenizerBase, example: Example) -> Encoded:
    """Render and tokenise one conversation; `RowProblem` when the template refuses it or the prompt is no prefix."""
    prompt_ids = render(tokenizer, example, example.prompt, "prompt", opens_answer=True)
    if not prompt_ids:
        raise RowProblem("prompt", "the chat template renders it to nothing", "check the chat template")
    completion_ids, resplits = [], 0
    for field, messages in zip(example.fields, example.completions, strict=True):
        whole = join_turns(example, messages)
        joint = render(tokenizer, example, whole, field)
        ids = joint[len(prompt_ids) :]
        if joint[: len(prompt_ids)] != prompt_ids:
            split = _split_text(tokenizer, example, whole, prompt_ids, joint, field)
            if split is None:
                raise border_problem(tokenizer, prompt_ids, joint, field, TEMPLATE_REMEDY)
            ids, resplits = split, resplits + 1
        completion_ids.append(ids)
    return Encoded(prompt_ids, completion_ids, resplits)


def join_turns(example: Example, completion: Messages) -> Messages:
    """The whole conversation; a completion that continues the prompt's last message is joined to it."""
    if not example.continues:
        return [*example.prompt, *completion]
    last, first = example.prompt[-1], completion[0]
    return [*example.prompt[:-1], {**last, **first, "content": last["content"] + first["content"]}, *completion[1:]]


def turn_field(example: Example, index: int, number: int) -> str:
    """How messages call turn `number` of the whole conversation with completion `index`."""
    start = len(example.prompt) - example.continues
    return f"prompt[{number}]" if number < start else f"{example.fields[index]}[{number - start}]"


def check_rendering(tokenizer: PreTrainedTokenizerBase, example: Example) -> None:
    """Raise `RowProblem` when the template leaves out tools, tool calls or a turn of this row.

    Left out is what can change without a change of the rendered text; templates may well trim or rewrite a turn.
    Trajectories may have no prompt, and any of their turns may be the user's.
    """

    def prompt_text(messages: Messages, **changes: Any) -> str:
        return render(tokenizer, example, messages, "prompt", opens_answer=True, tokenize=False, **changes)

    wholes = [join_turns(example, messages) for messages in example.completions]
    shows = [partial(render, tokenizer, example, field=field, tokenize=False) for field in example.fields]
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
    """Change each turn from `start` on, and ask whether `show` shows it."""
    shown = show(messages)
    for at, message in enumerate(messages[start:], start):
        for what, changed in _changed_turns(message):
            if show([*messages[:at], changed, *messages[at + 1 :]]) == shown:
                raise RowProblem(
                    turn_field(example, index, at),
                    f"the chat template leaves {what} out",
                    "use a chat template that renders it, or remove the message",
                )


def _changed_turns(message: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    if message["role"] != "assistant" and isinstance(message.get("content"), str):
        yield f"the {message['role']!r} turn", {**message, "content": message["content"] + " (changed)"}
    if message.get("tool_calls"):
        others = {key: value for key, value in message.items() if key != "tool_calls"}
        yield "a tool call", {"content": "", **others}


def render(
    tokenizer: PreTrainedTokenizerBase,
    example: Example,
    messages: Messages,
    field: str,
    opens_answer: bool = False,
    tokenize: bool = True,
    **changes: Any,
) -> Any:
    """Ids (or text) of `messages`; with `opens_answer` up to where the model starts to write."""
    options: dict[str, Any] = {"tools": example.tools, **example.template_kwargs, **changes}
    if opens_answer:
        options["continue_final_message" if example.continues else "add_generation_prompt"] = True
    if tokenize:
        options |= {"return_dict": True, "tokenizer_kwargs": {"verbose": False}}
    try:
        rendered: Any = tokenizer.apply_chat_template(messages, tokenize=tokenize, **options)
    except Exception as error:  # a template is code of someone else's and may raise anything
        roles = ", ".join(message["role"] for message in messages)
        raise RowProblem(
            field,
            f"the chat template refuses this conversation ({roles}): {type(error).__name__}: {error}",
            "reorder, merge or remove the messages, or use another chat template",
        ) from error
    return list(rendered["input_ids"]) if tokenize else rendered


def _split_text(
    tokenizer: PreTrainedTokenizerBase,
    example: Example,
    whole: Messages,
    prompt_ids: list[int],
    joint: list[int],
    field: str,
) -> list[int] | None:
    """A merge across the border, or texts that really differ (None)?"""
    prompt_text = render(tokenizer, example, example.prompt, "prompt", opens_answer=True, tokenize=False)
    text = render(tokenizer, example, whole, field, tokenize=False)
    if not text.startswith(prompt_text):
        return None
    return split_at_border(tokenizer, prompt_ids, joint, text[len(prompt_text) :])
