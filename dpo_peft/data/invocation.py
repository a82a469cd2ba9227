"""Where an answer-only adapter begins (`forward.scope`): the tokens for it, and rows whose prompts must hold them."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from ..errors import OptionError
from ..forward.scope import invocation_start
from .chat import Chat
from .fields import RowProblem
from .formats import Example
from .parse import common_start
from .tokenize import plain_ids

ENDS = ("a", "Tell me 7", "Why not?", "x = {y}", "\u6c34")  # of texts: they have nothing in common


def answer_only(tokenizer: PreTrainedTokenizerBase, text: str | None = None) -> list[int]:
    """Returns the tokens that an answer-only adapter acts from: `LoraConfig(alora_invocation_tokens=...)`.

    They are what the chat template adds for the assistant to write; where it adds nothing (Mistral's `[/INST]` belongs
    to the user's turn), what all prompts end with.

    Args:
        tokenizer: of the base.
        text: what stands before every completion instead, for prompts that no template writes, such as "Answer:". With
            white space before it that is always there, it starts with that.

    Raises:
        OptionError: no text and no chat template, or nothing that stands before every completion.
    """
    if text is None and not tokenizer.chat_template:
        raise OptionError(
            "adapter_scope=completions: the tokenizer has no chat template that would say where a completion begins. "
            'Give the text before each: adapter_invocation="Answer:", or answer_only(tokenizer, "Answer:").'
        )
    if text is None:
        tokens = _opening(tokenizer)
    else:
        between = "" if text[:1].isspace() else "\n"
        tokens = _common_end([plain_ids(tokenizer, f"{end}{between}{text}") for end in ENDS])
        while len(tokens) > 1 and len(tokenizer.decode(tokens[1:])) >= len(text):
            del tokens[0]
    if not tokens or text == "":
        what = "the chat template puts nothing of its own" if text is None else f"{text!r} puts no tokens"
        raise OptionError(f"adapter_invocation: {what} before a completion. Give another text, as in the prompts.")
    return tokens


def _opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the tokens that end each prompt of a chat template, of those that the assistant's turn adds if any."""
    talks = [[{"role": "user", "content": text}] for text in ENDS]
    talks.append([*talks[0], {"role": "assistant", "content": "b"}, *talks[1]])
    talks.append([{"role": "system", "content": "c"}, *talks[2]])
    shown, added, refused = [], [], None
    for messages in talks:
        chat = Chat(tokenizer, Example("chat", messages, [], ()))
        try:
            without, ids = (chat.ids(messages, "prompt", add_generation_prompt=opens) for opens in (False, True))
        except RowProblem as problem:  # as a template may refuse a system message
            refused = problem
            continue
        shown.append(ids)
        added.append(len(ids) - common_start([ids, without]))
    if not shown and refused:
        raise OptionError(f"adapter_scope=completions: {refused.problem}. Remedy: {refused.remedy}.")
    tokens = _common_end(shown)
    return tokens[-min(added) :] if min(added) else tokens


def _common_end(sequences: Sequence[list[int]]) -> list[int]:
    return sequences[0][len(sequences[0]) - common_start([ids[::-1] for ids in sequences]) :]


def check_invoked(
    tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], prompt_ids: list[int], completions: dict[str, list[int]]
) -> None:
    """Raises `RowProblem` unless an answer-only adapter that acts from `tokens`, if there are any, begins in the whole
    prompt and not anew in one of the completions, which go by their names in messages."""
    if not tokens:
        return
    text, end = tokenizer.decode(tokens), prompt_ids[-2 * len(tokens) :]
    if invocation_start(prompt_ids, tokens) is None:
        raise RowProblem(
            "prompt",
            f"does not hold {text!r}, from which the adapter acts (alora_invocation_tokens): it ends with "
            f"{tokenizer.decode(end)!r}",
            "give conversations, text with as_chat=True, or adapter_invocation as your prompts end; or train an "
            "adapter of all tokens (adapter_scope: all)",
        )
    for field, ids in completions.items():
        if invocation_start([*prompt_ids[len(prompt_ids) - len(tokens) + 1 :], *ids], tokens) is not None:
            raise RowProblem(
                field,
                f"holds {text!r}, where the adapter would begin anew (alora_invocation_tokens)",
                "put the earlier turns into the prompt; or train an adapter of all tokens (adapter_scope: all)",
            )
