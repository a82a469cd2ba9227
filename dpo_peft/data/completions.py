"""Prompts and completions that nobody judged, to token ids as training rows have them.

What `prepare_dataset` does for rows with labels, for values that a caller holds: texts, lists of messages, or ids.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from .chat import check_chat_template, encode_chat
from .fields import RowProblem, read_ids, read_messages, read_template_kwargs, read_text, read_tools
from .formats import ASKING_ROLES, CHAT_COLUMNS, Example, Row
from .tokenize import check_tokenizer, encode_text, leading_ids, without_eos

PROMPT_COLUMNS = ("prompt", *CHAT_COLUMNS)  # what a prompt's tokens are made from


def encode_answers(
    tokenizer: Any, entries: Sequence[Row], first: int = 0, vocab_size: int | None = None
) -> tuple[list[int], list[list[int]]]:
    """Token ids of a prompt and of its completions, as training rows have them.

    Args:
        tokenizer: with a chat template for messages, with an end token for text.
        entries: one for each completion, all of the same prompt: `prompt`, `completion`, or `completion_ids` with
            their text, and `tools` and `chat_template_kwargs` for messages.
        first: number of the first one, for messages.
        vocab_size: bounds token ids that are given. A model may have, and sample, more than its tokenizer knows.

    Raises:
        RowProblem: what is wrong with which of them.
        DataError: the tokenizer lacks an end token or a chat template.
    """
    prompt, sampled = entries[0]["prompt"], "completion_ids" in entries[0]
    size = len(tokenizer) if vocab_size is None else vocab_size
    fields = [f"completion {number}" for number in range(first, first + len(entries))]
    given = {field: entry["completion"] for field, entry in zip(fields, entries, strict=True)}
    answers = {} if sampled else given
    if isinstance(prompt, str):
        prompt_ids, completion_ids = _encode_text(tokenizer, prompt, answers)
    elif isinstance(prompt, list) and prompt and isinstance(prompt[0], Mapping):
        prompt_ids, completion_ids = _encode_chat(tokenizer, entries[0], answers)
    else:
        name = f"the prompt of completion {first}"
        prompt_ids = _ids({name: prompt}, name, size)
        completion_ids = [_ids(answers, field, size) for field in answers]
    if sampled:
        ids = {field: entry["completion_ids"] for field, entry in zip(fields, entries, strict=True)}
        completion_ids = [_ids(ids, field, size) for field in fields]
        for field, tokens in zip(fields, completion_ids, strict=True):
            _check_vocabulary(tokenizer, tokens, given[field], field)
    return prompt_ids, completion_ids


def _ids(row: Row, field: str, vocab_size: int) -> list[int]:
    ids = read_ids(row, field, vocab_size)
    if not ids:
        raise RowProblem(field, "has no tokens", "give at least one, such as the end token")
    return ids


def _encode_text(tokenizer: Any, prompt: str, answers: Row) -> tuple[list[int], list[list[int]]]:
    check_tokenizer(tokenizer, need_eos=True)
    leading = leading_ids(tokenizer)
    texts = {field: read_text(answers, field) for field in answers}
    filled = [field for field, text in texts.items() if without_eos(tokenizer, text).strip()]
    encoded = encode_text(tokenizer, prompt, [texts[field] for field in filled], leading, filled)
    assert not isinstance(encoded, str)
    ids = dict(zip(filled, encoded.completion_ids, strict=True))
    return encoded.prompt_ids, [ids.get(field, [tokenizer.eos_token_id]) for field in texts]


def _encode_chat(tokenizer: Any, entry: Row, answers: Row) -> tuple[list[int], list[list[int]]]:
    check_chat_template(tokenizer, "implicit reward")
    prompt, turns = read_messages(entry, "prompt"), []
    for field, answer in answers.items():
        messages = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
        turns.append(read_messages({field: messages}, field))
        if not turns[-1] or turns[-1][0]["role"] in ASKING_ROLES:
            raise RowProblem(
                field, "does not begin with a turn of the model", "give the answer, and the rest as prompt"
            )
    example = Example(
        "chat",
        prompt,
        turns,
        tuple(answers),
        tools=read_tools(entry),
        template_kwargs=read_template_kwargs(entry),
        continues=prompt[-1]["role"] == "assistant",
    )
    encoded = encode_chat(tokenizer, example)
    return encoded.prompt_ids, encoded.completion_ids


def _check_vocabulary(tokenizer: Any, ids: list[int], completion: Any, field: str) -> None:
    """Sampled tokens come with their text: tokens of another vocabulary read differently."""
    one = completion[0] if isinstance(completion, list) and len(completion) == 1 else completion
    text = one.get("content") if isinstance(one, Mapping) else one
    if not isinstance(text, str):
        return
    readings = [tokenizer.decode(ids, skip_special_tokens=skip) for skip in (True, False)]
    if not any(text.strip() in reading for reading in readings):
        raise RowProblem(
            f"{field}'s completion_ids",
            f"read {readings[0][:60]!r} with the adapter's tokenizer, and the text beside them is {text[:60]!r}",
            "if they are of another model's tokenizer, leave completion_ids out, and the texts are tokenised: "
            "reward_funcs=lambda prompts, completions, **_: reward(prompts, completions)",
        )
