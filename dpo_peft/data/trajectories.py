"""Trajectories: token ids of whole conversations, and for each token the step it belongs to.

The model writes the assistant's turns; everything else (user, system and tool turns, what the template puts between
them) is given. The step of a token is the number t in the discount γ^t of the trajectory loss (note eq. 46): the
number of its assistant turn, or its own number among the assistant's tokens, counted from the start of the
conversation. Tokens that the model does not write have the step -1 and are not scored.

What two trajectories share at their start has the same log-probs in both and cancels in the loss (note eq. 47), so it
becomes their prompt. It may be empty.
"""

from typing import Any

from transformers import PreTrainedTokenizerBase

from .chat import TEMPLATE_REMEDY, Messages, join_turns, render, turn_field
from .fields import RowProblem
from .formats import Example
from .parse import common_start
from .tokenize import Encoded, border_problem, split_at_border

GIVEN = -1  # step of a token that the model does not write


def encode_trajectories(tokenizer: PreTrainedTokenizerBase, example: Example, unit: str) -> Encoded:
    """Render and tokenise whole conversations; `RowProblem` when the template hides where a turn begins or ends.

    `unit` is "turn" or "token". `Encoded.steps` holds a step for each completion token.
    """
    show = _Renderer(tokenizer, example)
    wholes, steps, resplits = [], [], 0
    for index in range(len(example.completions)):
        ids, written, apart = _whole(show, index)
        wholes.append(ids)
        steps.append(number_steps(len(ids), written, unit))
        resplits += apart
    return share_start(wholes, steps, resplits)


def one_turn_each(encoded: Encoded, unit: str) -> Encoded:
    """The same for rows without turns (text, ids): each completion is one assistant turn, after a given prompt."""
    start = len(encoded.prompt_ids)
    wholes = [encoded.prompt_ids + ids for ids in encoded.completion_ids]
    steps = [number_steps(len(ids), [(start, len(ids))], unit) for ids in wholes]
    return share_start(wholes, steps, encoded.resplits)


def number_steps(length: int, written: list[tuple[int, int]], unit: str) -> list[int]:
    """The step of each of `length` tokens; `written` are the assistant's turns, [from, to) each."""
    steps, tokens = [GIVEN] * length, 0
    for turn, (start, end) in enumerate(written):
        size = end - start
        steps[start:end] = [turn] * size if unit == "turn" else range(tokens, tokens + size)
        tokens += size
    return steps


def share_start(wholes: list[list[int]], steps: list[list[int]], resplits: int = 0) -> Encoded:
    """Cut behind the longest common start that leaves every trajectory a token."""
    cut = min(common_start(wholes), *(len(ids) - 1 for ids in wholes))
    return Encoded(wholes[0][:cut], [ids[cut:] for ids in wholes], resplits, [values[cut:] for values in steps])


def unscore_first(prompt_ids: list[int], steps: list[list[int]]) -> list[list[int]]:
    """Without a prompt nothing predicts a completion's first token, so it is taken as given."""
    return steps if prompt_ids else [[GIVEN, *values[1:]] for values in steps]


class _Renderer:
    """Ids of the starts of a row's conversations; what they have in common is rendered once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, example: Example):
        self.tokenizer, self.example = tokenizer, example
        self.memo: dict[str, list[int]] = {}

    def ids(self, messages: Messages, index: int, opens_answer: bool = False) -> list[int]:
        key = repr((messages, opens_answer))
        if key not in self.memo:
            self.memo[key] = self.render(messages, index, opens_answer)
        return self.memo[key]

    def render(self, messages: Messages, index: int, opens_answer: bool, tokenize: bool = True) -> Any:
        options = {"tokenize": tokenize, "add_generation_prompt": opens_answer}
        return render(self.tokenizer, self.example, messages, self.example.fields[index], **options)


def _whole(show: _Renderer, index: int) -> tuple[list[int], list[tuple[int, int]], int]:
    """Ids of a whole conversation, where the assistant's turns begin and end in them, and the number of re-splits.

    A turn begins where the conversation before it ends when it is rendered to be answered, and ends where the
    conversation up to it ends. Each of these renderings must be the start of the next one.
    """
    example = show.example
    messages = join_turns(example, example.completions[index])
    ids: list[int] = []
    before: list[int] = []
    written, resplits, last = [], 0, 0
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        start, end = show.ids(messages[:number], index, opens_answer=True), show.ids(messages[: number + 1], index)
        _check_start(show, index, last, before, start)
        own = end[len(start) :]
        if end[: len(start)] != start:
            own, resplits = _split_turn(show, index, number, start, end), resplits + 1
        ids += start[len(before) :]
        written.append((len(ids), len(ids) + len(own)))
        ids += own
        before, last = end, number
    whole = show.ids(messages, index)
    _check_start(show, index, last, before, whole)
    return ids + whole[len(before) :], written, resplits


def _check_start(show: _Renderer, index: int, number: int, part: list[int], longer: list[int]) -> None:
    if longer[: len(part)] != part:
        raise _turn_problem(show, index, number, part, longer)


def _split_turn(show: _Renderer, index: int, number: int, start: list[int], end: list[int]) -> list[int]:
    """Ids of an assistant's turn whose first token would merge with what comes before it."""
    messages = join_turns(show.example, show.example.completions[index])
    before = show.render(messages[:number], index, opens_answer=True, tokenize=False)
    after = show.render(messages[: number + 1], index, opens_answer=False, tokenize=False)
    own = split_at_border(show.tokenizer, start, end, after[len(before) :]) if after.startswith(before) else None
    if own is None:
        raise _turn_problem(show, index, number, start, end)
    return own


def _turn_problem(show: _Renderer, index: int, number: int, part: list[int], longer: list[int]) -> RowProblem:
    return border_problem(
        show.tokenizer,
        part,
        longer,
        turn_field(show.example, index, number),
        TEMPLATE_REMEDY,
        "the conversation up to here",
        "the whole conversation",
    )
