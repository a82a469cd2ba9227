"""Conversations to token ids through the tokenizer's own chat template.

The prompt is rendered with the generation prompt, or, when its last message is the assistant's, as a message to be
continued (TRL opens a second assistant turn there); each completion is what follows it in the whole conversation. The
template ends the completion; no end token is added.
"""

import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from .fields import Message, Messages, RowProblem
from .formats import Example
from .tokenize import Encoded, ids_behind

TEMPLATE_REMEDY = (
    "use a chat template that renders the prompt the same way in both, or set what it offers for that in "
    "chat_template_kwargs, e.g. enable_thinking"
)
MARK = re.compile(r"\((?:turn|call) \d+\)")


class Chat:
    """A row's conversations as the chat template renders them, with the row's tools and arguments.

    All methods raise `RowProblem` when the template refuses a conversation.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, example: Example):
        self.tokenizer, self.example = tokenizer, example
        # The template's argument that renders a prompt up to where the model starts to write.
        self.opens: dict[str, Any] = {"continue_final_message" if example.continues else "add_generation_prompt": True}

    def ids(self, messages: Messages, field: str, **changes: object) -> list[int]:
        """Returns the token ids of messages; `changes` are to the template's arguments, `field` is for messages."""
        options = {"tokenize": True, "return_dict": True, "tokenizer_kwargs": {"verbose": False}, **changes}
        return list(self._render(messages, field, options)["input_ids"])

    def text(self, messages: Messages, field: str, **changes: object) -> str:
        """Returns the text of messages, as `ids`."""
        return str(self._render(messages, field, {"tokenize": False, **changes}))

    def _render(self, messages: Messages, field: str, options: dict[str, object]) -> Any:
        given = {"tools": self.example.tools, **self.example.template_kwargs, **options}
        try:
            return self.tokenizer.apply_chat_template(messages, **given)
        except Exception as error:  # a template is code of someone else's and may raise anything
            roles = ", ".join(message["role"] for message in messages)
            raise RowProblem(
                field,
                f"the chat template refuses this conversation ({roles}): {type(error).__name__}: {error}",
                "reorder, merge or remove the messages, or use another chat template",
            ) from error

    def text_behind(self, start: Messages, opens: dict[str, bool], messages: Messages, field: str) -> str | None:
        """Returns the text of messages that follows that of their start; None where they begin otherwise."""
        before, text = self.text(start, field, **opens), self.text(messages, field)
        return text[len(before) :] if text.startswith(before) else None

    def prompt_ids(self) -> list[int]:
        """Renders the prompt up to where the model starts to write; `RowProblem` when nothing comes of it."""
        prompt_ids = self.ids(self.example.prompt, "prompt", **self.opens)
        if not prompt_ids:
            raise RowProblem("prompt", "the chat template renders it to nothing", "check the chat template")
        return prompt_ids

    def encode(self) -> Encoded:
        """Renders and tokenizes the row; `RowProblem` when the prompt's ids are no prefix."""
        prompt_ids, completion_ids, resplits = self.prompt_ids(), [], 0
        for index, field in enumerate(self.example.fields):
            whole = self.whole(index)
            text = partial(self.text_behind, self.example.prompt, self.opens, whole, field)
            joint = self.ids(whole, field)
            ids, apart = ids_behind(self.tokenizer, prompt_ids, joint, text, field, TEMPLATE_REMEDY)
            completion_ids.append(ids)
            resplits += apart
        return Encoded(prompt_ids, completion_ids, resplits)

    def whole(self, index: int) -> Messages:
        """Returns a whole conversation; a completion that continues the prompt's last message is joined to it."""
        prompt, completion = self.example.prompt, self.example.completions[index]
        if not self.example.continues:
            return [*prompt, *completion]
        last, first = prompt[-1], completion[0]
        return [*prompt[:-1], {**last, **first, "content": last["content"] + first["content"]}, *completion[1:]]

    def turn_field(self, index: int, number: int) -> str:
        """Names turn `number` of the whole conversation with completion `index`, for messages."""
        start = len(self.example.prompt) - self.example.continues
        return f"prompt[{number}]" if number < start else f"{self.example.fields[index]}[{number - start}]"

    # ---- What a template leaves out ---------------------------------------------------------------------------------

    def check(self) -> None:
        """Raises `RowProblem` when the template leaves out tools, tool calls or a turn of this row.

        Left out is what can change without a change of the rendered text; templates may well trim or rewrite a turn.
        Trajectories may have no prompt, and any of their turns may be the user's.
        """
        prompt = self.example.prompt
        wholes = [(partial(self.text, field=name), self.whole(i)) for i, name in enumerate(self.example.fields)]
        opens = bool(prompt) and prompt[-1]["role"] != "assistant" or self.example.continues
        show, shared = (partial(self.text, field="prompt", **self.opens), prompt) if opens else wholes[0]
        if self.example.tools and show(shared) == show(shared, tools=None):
            raise RowProblem(
                "tools",
                "the chat template leaves the tools out",
                "use a template that renders tools, or remove the column: dataset.remove_columns('tools')",
            )
        if opens:
            self._check_turns_shown(show, prompt, 0, 0)
        for index, (show, whole) in enumerate(wholes):
            self._check_turns_shown(show, whole, index, len(prompt) - self.example.continues if opens else 0)

    def _check_turns_shown(self, show: Callable[..., str], messages: Messages, index: int, start: int) -> None:
        """Asks of each turn from `start` on whether `show` shows it.

        All of them are marked and rendered at once, so that the work grows with the turns. A turn whose mark is not
        found, because the template leaves it out or rewrites it, is changed on its own.
        """
        shown = show(messages)
        probes = {at: probe for at in range(start, len(messages)) if (probe := _probe(messages[at], at))}
        marked = [probes[at].marked if at in probes else message for at, message in enumerate(messages)]
        found = set(MARK.findall(show(marked).lower())) - set(MARK.findall(shown.lower()))
        for at, probe in probes.items():
            if probe.mark not in found and show([*messages[:at], probe.changed, *messages[at + 1 :]]) == shown:
                raise RowProblem(
                    self.turn_field(index, at),
                    f"the chat template leaves {probe.what} out",
                    "use a chat template that renders it, or remove the message",
                )


class _Probe(NamedTuple):
    """What a template may leave out of a message: the message with a mark in it, and without it or with another."""

    what: str
    mark: str
    marked: Message
    changed: Message


def _probe(message: Message, number: int) -> _Probe | None:
    if message["role"] != "assistant" and isinstance(message.get("content"), str):
        mark = f"(turn {number})"
        marked = {**message, "content": f"{message['content']} {mark}"}
        return _Probe(f"the {message['role']!r} turn", mark, marked, marked)
    calls, mark = message.get("tool_calls"), f"(call {number})"
    if not calls:
        return None
    marked = message
    match calls:
        case [{"function": {"name": str(name), **function}, **call}, *others]:
            marked = {**message, "tool_calls": [{**call, "function": {**function, "name": f"{name} {mark}"}}, *others]}
    without = {key: value for key, value in message.items() if key != "tool_calls"}
    return _Probe("a tool call", mark, marked, {"content": "", **without})


def turn_kind(message: Message) -> tuple[str, ...]:
    """Returns what decides how a template takes a message, besides the texts: its role and its fields."""
    return (message["role"], *sorted(message))
