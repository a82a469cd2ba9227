"""Completions that nobody judged, to token ids as training rows have them, for values that a caller holds."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from .encode import Encoder
from .fields import RowProblem, read_ids, read_messages, read_text
from .formats import ASKING_ROLES, CHAT_COLUMNS, Example, Row
from .parse import read_prompt
from .tokenize import without_eos

PROMPT_COLUMNS = ("prompt", *CHAT_COLUMNS)  # what a prompt's tokens are made from


def encode_answers(
    tokenizer: PreTrainedTokenizerBase, entries: Sequence[Row], first: int = 0, vocab_size: int | None = None
) -> tuple[list[int], list[list[int]]]:
    """Returns the token ids of a prompt and of its completions, as training rows have them.

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
    size = len(tokenizer) if vocab_size is None else vocab_size
    fields = [f"completion {number}" for number in range(first, first + len(entries))]
    given = {field: entry["completion"] for field, entry in zip(fields, entries, strict=True)}
    example = _read_prompt(entries[0], f"the prompt of completion {first}", size)
    encode = Encoder(tokenizer, "implicit reward", example.kind)
    if "completion_ids" in entries[0]:
        sampled = {field: entry["completion_ids"] for field, entry in zip(fields, entries, strict=True)}
        completion_ids = [_ids(sampled, field, size) for field in fields]
        for field, ids in zip(fields, completion_ids, strict=True):
            _check_vocabulary(tokenizer, ids, given[field], field)
        return encode.prompt(example), completion_ids
    read = {field: _read_completion(example.kind, given, field, size) for field in fields}
    if example.kind == "text":  # one without text is its end token alone
        read = {field: text for field, text in read.items() if without_eos(tokenizer, text).strip()}
    encoded = encode(replace(example, completions=list(read.values()), fields=tuple(read)))
    assert not isinstance(encoded, str)
    found = dict(zip(read, encoded.completion_ids, strict=True))
    return encoded.prompt_ids, [found.get(field, [tokenizer.eos_token_id]) for field in fields]


def _read_prompt(entry: Row, name: str, vocab_size: int) -> Example:
    prompt = entry["prompt"]
    if isinstance(prompt, str) or isinstance(prompt, list) and prompt and isinstance(prompt[0], Mapping):
        return read_prompt(entry)
    return Example("ids", _ids({name: prompt}, name, vocab_size), [], ())


def _read_completion(kind: str, given: Row, field: str, vocab_size: int) -> Any:
    if kind == "text":
        return read_text(given, field)
    if kind == "ids":
        return _ids(given, field, vocab_size)
    value = given[field]
    turns = read_messages(
        {field: [{"role": "assistant", "content": value}] if isinstance(value, str) else value}, field
    )
    if not turns or turns[0]["role"] in ASKING_ROLES:
        raise RowProblem(
            field, "does not begin with a turn of the model", "give the completion, and the rest as prompt"
        )
    return turns


def _ids(row: Row, field: str, vocab_size: int) -> list[int]:
    ids = read_ids(row, field, vocab_size)
    if not ids:
        raise RowProblem(field, "has no tokens", "give at least one, such as the end token")
    return ids


def _check_vocabulary(tokenizer: PreTrainedTokenizerBase, ids: list[int], completion: Any, field: str) -> None:
    """Checks sampled tokens against their text: tokens of another vocabulary read differently."""
    one = completion[0] if isinstance(completion, list) and len(completion) == 1 else completion
    text = one.get("content") if isinstance(one, Mapping) else one
    if not isinstance(text, str):
        return
    readings = [tokenizer.decode(ids, skip_special_tokens=skip) for skip in (True, False)]
    if not any(text.strip() in reading for reading in readings):
        raise RowProblem(
            f"{field}'s completion_ids",
            f"read {readings[0][:60]!r} with the adapter's tokenizer, and the text beside them is {text[:60]!r}",
            "if they are of another model's tokenizer, leave completion_ids out, and the texts are tokenized: "
            "reward_funcs=lambda prompts, completions, **_: reward(prompts, completions)",
        )
