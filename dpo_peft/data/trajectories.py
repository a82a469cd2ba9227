"""Trajectories: token ids of whole conversations, and for each token the step it belongs to.

The model writes the assistant's turns; everything else (user, system and tool turns, what the template puts between
them) is given. The step of a token is the number t in the discount γ^t of the trajectory loss (docs/derivations.md,
eq. 46): the number of its assistant turn, or its own number among the assistant's tokens, counted from the start of
the conversation. Tokens that the model does not write have the step -1 and are not scored.

What two trajectories share at their start has the same log-probs in both and cancels in the loss (docs/derivations.md,
eq. 47), so it becomes their prompt. It may be empty.
"""

from dataclasses import dataclass, field
from functools import partial

from .chat import TEMPLATE_REMEDY, Chat, turn_kind
from .fields import Messages, RowProblem
from .formats import Encoded
from .parse import common_start
from .tokenize import ids_behind

GIVEN = -1  # step of a token that the model does not write


def encode_trajectories(chat: Chat, unit: str) -> Encoded:
    """Tokenizes whole conversations, with steps by "turn" or "token". Raises `RowProblem` when the template hides
    where a turn begins or ends."""
    memo = dict[str, list[int]]()
    found = [_Conversation(chat, index, memo).split() for index in range(len(chat.example.completions))]
    steps = [number_steps(len(turns.ids), turns.written, unit) for turns in found]
    return share_start([turns.ids for turns in found], steps, sum(turns.resplits for turns in found))


def one_turn_each(encoded: Encoded, unit: str) -> Encoded:
    """Does the same for rows without turns (text, ids): each completion is one turn, after a given prompt."""
    start = len(encoded.prompt_ids)
    wholes = [encoded.prompt_ids + ids for ids in encoded.completion_ids]
    steps = [number_steps(len(ids), [(start, len(ids))], unit) for ids in wholes]
    return share_start(wholes, steps, encoded.resplits)


def number_steps(length: int, written: list[tuple[int, int]], unit: str) -> list[int]:
    """Returns the step of each of `length` tokens; `written` are the assistant's turns, [from, to) each."""
    steps, tokens = [GIVEN] * length, 0
    for turn, (start, end) in enumerate(written):
        size = end - start
        steps[start:end] = [turn] * size if unit == "turn" else range(tokens, tokens + size)
        tokens += size
    return steps


def share_start(wholes: list[list[int]], steps: list[list[int]], resplits: int = 0) -> Encoded:
    """Cuts behind the longest common start that leaves every trajectory a token."""
    cut = min(common_start(wholes), *(len(ids) - 1 for ids in wholes))
    return Encoded(wholes[0][:cut], [ids[cut:] for ids in wholes], resplits, [values[cut:] for values in steps])


@dataclass
class _Turns:
    """The ids of a whole conversation, and where the assistant's turns begin and end in them."""

    ids: list[int] = field(default_factory=list)
    written: list[tuple[int, int]] = field(default_factory=list)
    resplits: int = 0
    rendered: list[int] = field(default_factory=list)  # as the template's text is tokenized: without re-splits


class _Conversation:
    """One of a row's conversations, to be split at its assistant's turns."""

    def __init__(self, chat: Chat, index: int, memo: dict[str, list[int]]):
        self.chat, self.index, self.memo = chat, index, memo
        self.field, self.messages = chat.example.fields[index], chat.whole(index)

    def split(self) -> _Turns:
        """Returns the ids with their turns.

        The walk with short contexts takes time in proportion to the turns, and the template still has the last word:
        put together, the pieces must be its rendering of the whole conversation. Where they are not, the template may
        number its turns or rewrite earlier ones, and every start of the conversation is rendered to find out.
        """
        try:
            turns = self._walk(shorten=True)
            if turns.rendered == self._ids(self.messages):
                return turns
        except RowProblem:  # of a shortened conversation, perhaps not of the whole one
            pass
        return self._walk(shorten=False)

    def _walk(self, shorten: bool) -> _Turns:
        """Renders up to where each assistant turn begins, and up to its end; each must be the start of the next.

        With `shorten`, all that lies before a turn is replaced, once an earlier assistant turn was of the same kind
        (its fields) as the one before it, by the context that ends with that earlier turn.
        """
        turns = _Turns()
        contexts: dict[tuple[str, ...], tuple[Messages, list[int]]] = {}
        context: Messages = []
        before: list[int] = []
        done = 0  # the number of messages that `context` stands for
        for number, message in enumerate(self.messages):
            if message["role"] != "assistant":
                continue
            asked = [*context, *self.messages[done:number]]
            start = self._ids(asked, opens=True)
            given, _ = self._behind(before, start, done - 1)
            context = [*asked, message]
            end = self._ids(context)
            own, apart = self._behind(start, end, number, asked, context)
            turns.ids += given
            turns.written.append((len(turns.ids), len(turns.ids) + len(own)))
            turns.ids += own
            turns.resplits += apart
            turns.rendered += end[len(before) :]
            before, done = end, number + 1
            if shorten:
                context, before = contexts.setdefault(turn_kind(message), (context, before))
        rest, _ = self._behind(before, self._ids([*context, *self.messages[done:]]), done - 1)
        turns.ids += rest
        turns.rendered += rest
        return turns

    def _ids(self, messages: Messages, opens: bool = False) -> list[int]:
        """Returns the ids of some messages. What a row's conversations have in common is rendered once."""
        key = repr((messages, opens))
        if key not in self.memo:
            self.memo[key] = self.chat.ids(messages, self.field, add_generation_prompt=opens)
        return self.memo[key]

    def _behind(self, part: list[int], longer: list[int], number: int, *turns: Messages) -> tuple[list[int], bool]:
        """Returns the ids behind those of a part, and whether the first would merge with what is before it.

        That is allowed where `turns` are given: the messages before an assistant's turn, and these with it. `number`
        is of the message that is named where the part is not the start.
        """
        opens = {"add_generation_prompt": True}
        text = partial(self.chat.text_behind, turns[0], opens, turns[1], self.field) if turns else lambda: None
        where = self.chat.turn_field(self.index, number)
        named = "the conversation up to here", "the whole conversation"
        return ids_behind(self.chat.tokenizer, part, longer, text, where, TEMPLATE_REMEDY, *named)
