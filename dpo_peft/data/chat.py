"""Conversations to token ids through the tokenizer's own chat template.

The prompt is rendered with the generation prompt, or, when its last message is the assistant's, as a message to be
continued (TRL opens a second assistant turn there); each completion is what follows it in the whole conversation. The
template ends the completion; no end token is added.
"""

import json
import re
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from .clock import dated_template
from .fields import Message, Messages, RowProblem, content_text
from .formats import Encoded, Example
from .image_rows import PLACE, in_parts
from .images import Images
from .limits import TEMPLATE_SECONDS, limited_time
from .tokenize import Borders, ids_behind, plain_ids

TEMPLATE_REMEDY = (
    "use a chat template that renders the prompt the same way in both, or set what it offers for that in "
    "chat_template_kwargs, e.g. enable_thinking"
)
Show = Callable[..., str]  # messages to the text that a template makes of them
MARK = re.compile(r"\(mark \d+\)")
END = "(mark end)"
UNENDED = "no end"  # of a turn that the template doesn't end
Kind = tuple[str, ...]  # see `turn_kind`
Place = tuple[str, str, tuple[Kind | None, ...], frozenset[Kind], frozenset[Kind]]
# The keys under which a message holds what the model is to write.
WRITTEN = ("content", "reasoning_content", "reasoning", "thinking")
# A block that the generation prompt opens at its end, for the model to fill and close.
OPENED = re.compile(r"<(think|thinking|thought|reasoning|seed:think)>\s*\Z")


class Chat:
    """A row's conversations as the chat template renders them, with the row's tools and arguments.

    All methods raise `RowProblem` when the template refuses a conversation.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        example: Example,
        borders: Borders | None = None,
        images: Images | None = None,
    ):
        self.tokenizer, self.example, self.borders, self.images = tokenizer, example, borders, images
        # Of a text that was tokenized: its start up to and with the last border, and without, and the ids of that.
        self.start: tuple[str, str, list[int]] = "", "", []
        # The template's argument that renders a prompt up to where the model starts to write.
        self.opens: dict[str, Any] = {"continue_final_message" if example.continues else "add_generation_prompt": True}

    def ids(self, messages: Messages, field: str, **changes: object) -> list[int]:
        """Returns the token ids of messages; `changes` are to the template's arguments, `field` is for messages."""
        if self.images is not None or self.borders is not None and self.borders.tokens:
            text = self._expanded(self.text(messages, field, **changes), field)
            try:
                return self._tokenize(text)
            except Exception as error:  # as where a role holds half a character
                raise self._refused(messages, field, error) from error
        options = {"tokenize": True, "return_dict": True, "tokenizer_kwargs": {"verbose": False}, **changes}
        return list(self._render(messages, field, options)["input_ids"])

    def _tokenize(self, text: str) -> list[int]:
        """Returns the ids of a rendered text. What the row's texts have in common is tokenized once."""
        if self.borders is None:
            return plain_ids(self.tokenizer, text)
        if not self.start[0] or not text.startswith(self.start[0]):
            at, border = self.borders.last(text)
            self.start = text[:at] + border, text[:at], plain_ids(self.tokenizer, text[:at]) if at else []
        _, before, ids = self.start
        return ids + plain_ids(self.tokenizer, text[len(before) :])

    def _expanded(self, text: str, field: str) -> str:
        """Returns a rendered text with the tokens of the prompt's images in place of their marks."""
        if self.images is None:
            return text
        if (found := text.count(self.images.mark)) != len(self.example.images):
            raise RowProblem(
                field,
                f"the chat template shows {found} times {self.images.mark!r} for {len(self.example.images)} images",
                f"take {self.images.mark!r} out of the texts, or use a chat template that renders images",
            )
        return self.images.expand(text, self.example.images)

    def text(self, messages: Messages, field: str, **changes: object) -> str:
        """Returns the text of messages, as `ids`."""
        return str(self._render(messages, field, {"tokenize": False, **changes}))

    def _render(self, messages: Messages, field: str, options: dict[str, object]) -> Any:
        given = {"tools": self.example.tools, **self.example.template_kwargs, **options}
        given["chat_template"] = dated_template(self.tokenizer, given["tools"])
        try:
            with limited_time(TEMPLATE_SECONDS):
                return self.tokenizer.apply_chat_template(in_parts(messages) if self.images else messages, **given)
        except Exception as error:  # a template is code of someone else's and may raise anything
            raise self._refused(messages, field, error) from error

    def _refused(self, messages: Messages, field: str, error: Exception) -> RowProblem:
        roles = ", ".join(message["role"] for message in messages)
        return RowProblem(
            field,
            f"the chat template refuses this conversation ({roles}): {type(error).__name__}: {error}",
            "reorder, merge or remove the messages, or use another chat template",
        )

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
            if joint[: len(prompt_ids)] != prompt_ids:
                mended = self._behind_opened(whole, self.text(whole, field))
                if mended is not None:
                    whole_text = self._expanded(self.prompt_text + mended, field)
                    text, joint = partial(str, mended), plain_ids(self.tokenizer, whole_text)
            ids, apart = ids_behind(self.tokenizer, prompt_ids, joint, text, field, TEMPLATE_REMEDY)
            completion_ids.append(ids)
            resplits += apart
        return Encoded(prompt_ids, completion_ids, resplits)

    @cached_property
    def prompt_text(self) -> str:
        """Returns the text of the prompt up to where the model starts to write."""
        return self.text(self.example.prompt, "prompt", **self.opens)

    def whole_text(self, messages: Messages, field: str, **changes: object) -> str:
        """Returns the text of a whole conversation as it is trained on."""
        text = self.text(messages, field, **changes)
        mended = self._behind_opened(messages, text)
        return text if mended is None else self.prompt_text + mended

    def _behind_opened(self, messages: Messages, text: str) -> str | None:
        """Returns what is to follow the prompt's text where it ends with an opened block, such as <think>.

        A model that generates writes the block's content and closes it. `text`, of the whole conversation, may show a
        block that is closed at once (Nemotron 3), or none and cut what the model thought (DeepSeek R1). The prompt
        keeps its opened block, and what the template leaves out comes back: the thoughts of the row, and the end of
        the block. The rest is the template's. None where there is no such block or the template shows it by itself.
        """
        start = self.example.prompt
        if self.example.continues or not start or start[-1]["role"] == "assistant" or len(messages) <= len(start):
            return None
        before = self.prompt_text
        opened = OPENED.search(before)
        if not opened or text.startswith(before) or not text.startswith(before[: opened.start()]):
            return None
        tag, close = f"<{opened[1]}>", f"</{opened[1]}>"
        rest = text[opened.start() :].removeprefix(tag)
        thoughts, closed, _ = content_text(messages[len(start)]).rpartition(close)
        thoughts = thoughts.lstrip().removeprefix(tag).lstrip("\n")
        if close in rest and thoughts.strip() in rest:
            return rest
        if rest.lstrip().startswith(close):
            return thoughts + rest
        return f"{thoughts}{close}{rest}" if closed else f"\n{close}\n\n{rest}"

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

    def places(self) -> list[list["Place"]]:
        """Returns where each turn that `check` tries stands, by part: what decides how a template takes it.

        That is, besides the texts: the row's arguments, the turn's own kind and those of its neighbours, which kinds
        come before and after, and roughly how long the conversation is.
        """
        kinds: dict[int, Kind] = {}
        row = json.dumps([bool(self.example.tools), self.example.template_kwargs, self.example.continues], default=str)
        found = []
        for number, part in enumerate(self._parts()):
            for message in part.messages:
                if id(message) not in kinds:
                    kinds[id(message)] = turn_kind(message)
            turns = [kinds[id(message)] for message in part.messages]
            around, size = [None, *turns, None], f"{bool(number)} {len(turns).bit_length()}"
            before, after = _kinds_before(turns), _kinds_before(turns[::-1])[::-1]
            each = range(part.start, len(turns))
            found.append([(row, size, tuple(around[at : at + 3]), before[at], after[at]) for at in each])
        return found

    def check(self) -> list[list[set[str]]]:
        """Says what the template leaves out of each turn of `places`, as "role.key"; `UNENDED` if it doesn't end it.

        Left out is what can change without a change of the rendered text; templates may well trim or rewrite a turn.
        Trajectories may have no prompt, and any of their turns may be the user's. Raises `RowProblem` where it leaves
        out tools, tool calls, a turn, or text of the model's in a completion.
        """
        parts = self._parts()
        show, shared = parts[0].show, parts[0].messages
        if self.example.tools and show(shared) == show(shared, tools=None):
            raise RowProblem(
                "tools",
                "the chat template leaves the tools out",
                "use a template that renders tools, or remove the column: dataset.remove_columns('tools')",
            )
        return [self._left_out(part) for part in parts]

    def _parts(self) -> list["_Part"]:
        """Returns the prompt, if there is one that opens the model's turn, and each whole conversation behind it."""
        prompt, fields = self.example.prompt, self.example.fields
        opens = bool(prompt) and prompt[-1]["role"] != "assistant" or self.example.continues
        start = len(prompt) - self.example.continues if opens else 0
        shows = [partial(self.whole_text, field=name) for name in fields]
        wholes = [_Part(show, self.whole(index), index, start, start) for index, show in enumerate(shows)]
        shown = partial(self.text, field="prompt", **self.opens)
        return [_Part(shown, prompt, 0, 0, len(prompt)), *wholes] if opens else wholes

    def _left_out(self, part: "_Part") -> list[set[str]]:
        """Returns which keys of each message from the part's start on are not shown, e.g. "tool.name".

        What the row can't do without raises `RowProblem`: turns of others, tool calls, and in the completion what the
        model is to write. Without a prompt, earlier turns that are shortened are for the split to find.
        """
        show, messages, index, start, completion = part
        shown, last = show(messages), len(messages) - 1
        found = [set[str]() for _ in messages[start:]]
        for key in dict.fromkeys(key for message in messages[start:] for key in message):
            probes = {at: probe for at in range(start, len(messages)) if (probe := _probe(messages[at], key, at))}
            for at in _hidden(show, messages, shown, probes):
                role = messages[at]["role"]
                mine = role == "assistant"
                if key == "tool_calls" or (key == "content" and not mine):
                    what, remedy = "a tool call" if mine else f"the {role!r} turn", "remove the message"
                elif mine and key in WRITTEN and at >= completion and (completion or key != "content" or at == last):
                    what = f"{key!r} of the assistant's turn, or its start," if key == "content" else repr(key)
                    remedy = f"put the text into 'content' as the model writes it, or remove {key!r} from the messages"
                else:
                    found[at - start].add(f"{role}.{key}")
                    continue
                raise RowProblem(
                    self.turn_field(index, at),
                    f"the chat template leaves {what} out",
                    f"use a chat template that renders it, or {remedy}",
                )
        if completion < len(messages) and _goes_on(show, messages):
            found[-1].add(UNENDED)
        return found


class _Part(NamedTuple):
    """A conversation of a row, how it is shown, and from which turn on it is looked at and is a completion."""

    show: Show
    messages: Messages
    number: int  # of the completion
    start: int
    completion: int


class _Probe(NamedTuple):
    """A message with a mark in the value of a key, and without that value, or with another."""

    marked: Message
    changed: Message


def _hidden(show: Show, messages: Messages, shown: str, probes: dict[int, _Probe]) -> list[int]:
    """Returns the probed turns that `show` does not show.

    All of them are marked and rendered at once, so that the work grows with the turns. Those whose mark is not found,
    because the template leaves them out or rewrites them, are changed at once; only if that shows, each on its own.
    What the template refuses once it is changed is something that it reads.
    """

    def shows(changed: dict[int, Message]) -> str:
        return show([changed.get(at, message) for at, message in enumerate(messages)])

    try:
        found = set(MARK.findall(shows({at: probe.marked for at, probe in probes.items()}).lower()))
        found -= set(MARK.findall(shown.lower()))
        changed = {at: probe.changed for at, probe in probes.items() if _mark(at) not in found}
        if not changed or shows(changed) == shown:
            return list(changed)
        return [at for at in changed if shows({at: changed[at]}) == shown]
    except RowProblem:
        return []


def _mark(number: int) -> str:
    return f"(mark {number})"


def _probe(message: Message, key: str, number: int) -> _Probe | None:
    """Returns the probe of a key that holds something."""
    value, mark = message.get(key), _mark(number)
    if key == "role" or _is_blank(value):
        return None
    match value:
        case str(text) if key == "content" and message["role"] == "assistant":
            # What a template cuts is what the model thought before it answered.
            head, tag, rest = text.partition("<think>") if text.lstrip().startswith("<think>") else ("", "", text)
            marked = {**message, key: f"{head}{tag}{mark} {rest}"}
        case str(text):
            marked = {**message, key: f"{text} {mark}"}
        case [{"function": {"name": str(name), **function}, **call}, *others] if key == "tool_calls":
            marked = {**message, key: [{**call, "function": {**function, "name": f"{name} {mark}"}}, *others]}
        case [*others, {"text": str(text), **part}] if key == "content":
            marked = {**message, key: [*others, {**part, "text": f"{text} {mark}"}]}
        case [*parts] if key == "content":  # the last one is an image
            marked = {**message, key: [*parts, {"type": "text", "text": mark}]}
        case _:
            marked = message
    without = {"content": "", **{name: held for name, held in message.items() if name != key}}
    return _Probe(marked, marked if key == "content" or isinstance(value, str) else without)


def _goes_on(show: Show, messages: Messages) -> bool:
    """Says whether the template shows nothing behind the text of the last turn, if that is the assistant's."""
    *before, last = messages
    if last["role"] != "assistant" or not isinstance(text := last.get("content"), str) or last.get("tool_calls"):
        return False
    try:
        shown = show([*before, {**last, "content": f"{text.rstrip()} {END}"}])
    except RowProblem:
        return False
    return shown.rstrip().lower().endswith(END)


def _kinds_before(turns: list[Kind]) -> list[frozenset[Kind]]:
    """Returns for each turn which kinds stand before it."""
    found = [frozenset[Kind]()]
    for kind in turns[:-1]:
        found.append(found[-1] if kind in found[-1] else found[-1] | {kind})
    return found


def turn_kind(message: Message) -> Kind:
    """Returns what decides how a template takes a message, besides the texts: its role and its filled fields."""
    thought = ("</think>",) if "</think>" in content_text(message) else ()
    content = message.get("content")
    pictured = ("image",) if isinstance(content, list) and PLACE in content else ()
    return (
        message["role"],
        *thought,
        *pictured,
        *sorted(key for key, value in message.items() if key == "content" or not _is_blank(value)),
    )


def _is_blank(value: object) -> bool:
    return not value or isinstance(value, str) and not value.strip()
