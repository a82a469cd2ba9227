"""Where an answer-only adapter begins (`forward.scope`): the tokens for it, and rows whose prompts must hold them."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from ..errors import OptionError
from ..forward.scope import invocation_start
from .chat import Chat
from .fields import Messages, RowProblem
from .formats import Example
from .parse import common_start
from .tokenize import plain_ids

# Texts whose ends have nothing in common, and what may stand before a text of the user's.
ENDS = ("a", "Tell me 7", "Why not?", "x = {y}", "\u6c34")
BEFORE = ("a\n", "7.\n\n", "?\n")


def answer_only(tokenizer: PreTrainedTokenizerBase, text: str | None = None) -> list[int]:
    """Returns the tokens that an answer-only adapter acts from: `LoraConfig(alora_invocation_tokens=...)`.

    They are what the chat template adds for the assistant to write; where it adds nothing (Mistral's `[/INST]` belongs
    to the user's turn), what all prompts end with.

    Args:
        tokenizer: of the base.
        text: what stands before every completion instead, for prompts that no template writes, such as "Answer:". With
            white space before it that is always there, it starts with that.

    Raises:
        OptionError: no text and no chat template, or prompts that end with nothing of the template's.
    """
    if text is not None:
        tokens = _common_end([plain_ids(tokenizer, before + text) for before in _before(text)])
        while len(tokens) > 1 and len(tokenizer.decode(tokens[1:])) >= len(text):
            del tokens[0]
    elif not tokenizer.chat_template:
        raise OptionError(
            "adapter_scope=completions: the tokenizer has no chat template that would say where a completion begins. "
            'Give the text that stands before each: adapter_invocation="Answer:", or in Python '
            'answer_only(tokenizer, "Answer:").'
        )
    else:
        tokens = _opening(tokenizer)
    if not tokens:
        what = "the chat template puts nothing of its own" if text is None else f"{text!r} puts no tokens of its own"
        raise OptionError(f"adapter_invocation: {what} before a completion. Give another text, as in the prompts.")
    return tokens


def _before(text: str) -> Sequence[str]:
    return ENDS if text[:1].isspace() else BEFORE


def _opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the tokens that end each prompt of a chat template, of those that the assistant's turn adds if any."""
    first: list[Messages] = [[{"role": "user", "content": text}] for text in ENDS]
    talks = [*first, [*first[0], {"role": "assistant", "content": "b"}, *first[1]]]
    talks.append([{"role": "system", "content": "c"}, *first[2]])
    shown, added = [], []
    for messages in talks:
        chat = Chat(tokenizer, Example("chat", messages, [], ()))
        try:
            without, ids = (chat.ids(messages, "prompt", add_generation_prompt=opens) for opens in (False, True))
        except RowProblem as problem:  # as a template may refuse a system message
            refusal = problem
            continue
        shown.append(ids)
        added.append(len(ids) - common_start([ids, without]))
    if not shown:
        raise OptionError(f"adapter_scope=completions: {refusal.problem}. Remedy: {refusal.remedy}.")
    tokens = _common_end(shown)
    return tokens[-min(added) :] if min(added) else tokens


def _common_end(sequences: Sequence[list[int]]) -> list[int]:
    first = sequences[0]
    return first[len(first) - common_start([ids[::-1] for ids in sequences]) :]


def check_invoked(
    tokenizer: PreTrainedTokenizerBase,
    invocation: Sequence[int],
    prompt_ids: list[int],
    completions: dict[str, list[int]],
) -> None:
    """Raises `RowProblem` unless an answer-only adapter begins in the prompt, and not anew in a completion.

    Args:
        tokenizer: for the message.
        invocation: from `answer_only`; empty for an adapter of all tokens.
        prompt_ids: of the row, before truncation.
        completions: token ids by their names in messages.
    """
    if not invocation:
        return
    text = tokenizer.decode(invocation)
    if invocation_start(prompt_ids, invocation) is None:
        raise RowProblem(
            "prompt",
            f"does not hold {text!r}, from which the adapter acts (alora_invocation_tokens): it ends with "
            f"{tokenizer.decode(prompt_ids[-2 * len(invocation) :])!r}",
            "give prompts that hold these tokens: conversations, text with as_chat=True, or adapter_invocation as "
            "your prompts end; or an adapter of all tokens (adapter_scope: all)",
        )
    before = prompt_ids[len(prompt_ids) - len(invocation) + 1 :]
    for field, ids in completions.items():
        if invocation_start([*before, *ids], invocation) is not None:
            raise RowProblem(
                field,
                f"holds {text!r}, where the adapter would begin anew: it acts from the last one on "
                "(alora_invocation_tokens)",
                "put the earlier turns into the prompt, so that the completion is the last turn alone; or train an "
                "adapter of all tokens (adapter_scope: all)",
            )
