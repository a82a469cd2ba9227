"""Prompts of rows, and completions as a caller holds them: what a model is to answer, and what nobody judged yet."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..errors import DataError
from .encode import Encoder
from .fields import Row, RowProblem, Values, check_size, read_entries, read_ids, read_number
from .formats import (
    ASKING_ROLES,
    CHAT_COLUMNS,
    IMAGE_COLUMNS,
    LABEL_COLUMNS,
    Encoded,
    Example,
    Layout,
    Wanted,
    detect_layout,
    name_them,
)
from .image_rows import ImageFile, place_images, take_images, undecoded
from .images import Images
from .parse import parse_row, read_completion, read_prompt
from .reading import find_reading
from .summary import explain
from .tokenize import special_tokens, without_eos
from .unread import SAMPLED

PROMPT_COLUMNS = ("prompt", *CHAT_COLUMNS)  # what a prompt's tokens are made from


@dataclass(frozen=True)
class Prompt:
    """A prompt of a dataset; `completions` and `scores` are None where there are none yet."""

    number: int  # its row
    example: Example  # the prompt, as text or messages, and what its chat template takes
    columns: Values = field(default_factory=dict)  # the row's other values
    completions: list[Any] | None = None  # texts, or lists of messages if the prompt is one
    scores: list[float | None] | None = None
    files: Sequence[ImageFile] = ()  # of its images, which stand opened in the example

    @property
    def fields(self) -> Values:
        """Returns the columns with which training reads the same prompt."""
        extra: Values = {"tools": self.example.tools, "chat_template_kwargs": self.example.template_kwargs}
        extra |= {"images": [file.text for file in self.files]}
        return {"prompt": self.example.prompt, **{name: value for name, value in extra.items() if value}}

    def completion(self, text: str) -> Any:
        """Returns a sampled text in the form that goes with the prompt."""
        return read_completion({"": text}, "", self.example.kind, 0)


def read_prompts(
    rows: Dataset,
    name: str,
    score_column: str | None = None,
    as_chat: bool | None = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    images: Images | None = None,
) -> tuple[list[Prompt], Counter[str]]:
    """Reads the prompts of a dataset, and counts the rows that have none, by reason.

    Args:
        rows: with a column `prompt` (text or messages); or pairs, of which the prompt is taken, in any format of
            training but token ids. With a column `completions`, completions are read too.
        name: of the dataset, for messages.
        score_column: holds a list of numbers per row, one for each of `completions`, higher is better.
        as_chat, tokenizer: whether prompts of text go into whose chat template, see `choose_as_chat`.
        images: the processor of images, if there are some.

    Raises:
        DataError: no prompts, or a row that can't be read, with the remedy.
    """
    rows = rows if images is None else undecoded(rows)
    columns, skipped, found = rows.column_names, Counter[str](), []
    first = next(iter(rows), None)
    if first is None:
        raise DataError(f"{name}: there are no rows.")
    reading, first = find_reading(name, columns, [*islice(rows, SAMPLED)], tokenizer, as_chat)
    answered = "completions" in first and not reading.published
    if score_column is not None and (missing := {"completions", score_column} - set(columns)):
        raise DataError(f"{name}: score_column={score_column!r}: there is no column {min(missing)!r}.")
    layout = None if answered else _implicit_layout(name, list(first), first)
    for number, row in enumerate(rows):
        try:
            given, row = row, {column: value for column, value in row.items() if column not in IMAGE_COLUMNS}
            check_size(row)
            row = reading(row)
            example = parse_row(row, layout, 0, "lists") if layout else read_prompt(row)
            if isinstance(example, str):
                skipped[example] += 1
                continue
            entries = read_entries(row, "completions", least=0) if answered else {}
            completions = [read_completion(entries, one, example.kind, 0) for one in entries] if answered else None
            scores = _read_scores(row, score_column, len(entries)) if score_column else None
            files, example = open_images(example, given, images)
        except RowProblem as problem:
            raise problem.located(name, number) from None
        used = {"prompt", "completions", score_column, *example.fields}
        others = {column: row[column] for column in row if column not in used}
        if images is not None:  # a reward function gets them as training would
            others["images"] = [file.text for file in files]
        found.append(Prompt(number, example, others, completions, scores, files))
    if not found:
        raise DataError(f"{name}: no row has a prompt ({', '.join(f'{n} x {why}' for why, n in skipped.items())}).")
    return found, skipped


def _implicit_layout(name: str, columns: Sequence[str], first: Row) -> Layout | None:
    """Returns the format of pairs without a prompt of their own, or None where `prompt` has it."""
    if {"chosen", "rejected"} <= set(columns) or "completions" in columns:
        layout = detect_layout(name, set(columns) - set(LABEL_COLUMNS), first, Wanted(data="lists"))
        return layout if layout.implicit else None
    if "prompt" not in columns:
        have = f"{name}: there is no column 'prompt' (columns: {', '.join(columns)})"
        raise DataError(f"{have}. {name_them(set(columns), ())}")
    return None


def _read_scores(row: Row, column: str, count: int) -> list[float | None]:
    entries = read_entries(row, column, least=0)
    if len(entries) != count:
        raise RowProblem(column, f"{len(entries)} scores for {count} completions", "give each completion one")
    return [None if value is None else read_number(entries, entry) for entry, value in entries.items()]


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], name: str, images: Images | None = None
) -> list[list[int]]:
    """Returns the token ids of each prompt, up to where the model begins to write; the same ones that training has.
    Raises `DataError` for a prompt that renders to nothing or that the chat template refuses, and for messages without
    a template."""
    kinds = {prompt.example.kind for prompt in prompts}
    encoders = {kind: Encoder(tokenizer, name, kind, ends=False, images=images) for kind in kinds}
    encoded = []
    for prompt in prompts:
        try:
            encoded.append(encoders[prompt.example.kind].prompt(prompt.example))
        except RowProblem as problem:
            raise problem.located(name, prompt.number) from None
    return encoded


def image_columns(prompt: Prompt, images: Images | None) -> Values:
    """Returns the columns by which `Images.sample` finds a prompt's images; none without."""
    if images is None or not prompt.files:
        return {}
    return {"images": images.key(prompt.example.images), "image_files": [file._asdict() for file in prompt.files]}


def encode_completions(
    tokenizer: PreTrainedTokenizerBase,
    entries: Sequence[Row],
    first: int = 0,
    vocab_size: int | None = None,
    as_chat: bool = False,
    images: Images | None = None,
) -> Values:
    """Returns `prompt_ids` and `completion_ids` of a prompt and its completions, as training rows have them, with
    `images` and `image_files` if it has some.

    Args:
        tokenizer: with a chat template for messages, with an end token for text.
        entries: one for each completion, all of the same prompt: `prompt`, `completion`, or `completion_ids` with
            their text, and `tools` and `chat_template_kwargs` for messages.
        first: number of the first one, for messages.
        vocab_size: bounds token ids that are given. A model may have, and sample, more than its tokenizer knows.
        as_chat: a prompt of text is a user's turn, unless it holds special tokens already.
        images: the processor of images, which stand in columns, as in training rows, or in the prompt's messages.

    Raises:
        RowProblem: what is wrong with which of them.
        DataError: the tokenizer lacks an end token or a chat template.
    """
    size = len(tokenizer) if vocab_size is None else vocab_size
    fields = [f"completion {number}" for number in range(first, first + len(entries))]
    given = dict(zip(fields, (entry["completion"] for entry in entries), strict=True))
    prompt = entries[0]["prompt"]
    if as_chat and isinstance(prompt, str) and not any(token in prompt for token in special_tokens(tokenizer)):
        entries = [{**entry, "prompt": [{"role": "user", "content": prompt}]} for entry in entries]
        prompt = entries[0]["prompt"]
    if isinstance(prompt, str) or isinstance(prompt, list) and prompt and isinstance(prompt[0], Mapping):
        example = read_prompt(entries[0])
    else:
        example = Example("ids", _some_ids(prompt, f"the prompt of completion {first}", size), [], ())
    files, example = open_images(example, entries[0], images)
    encode = Encoder(tokenizer, "implicit reward", example.kind, images=images)
    if "completion_ids" in entries[0]:
        sampled = [_some_ids(entry["completion_ids"], one, size) for one, entry in zip(fields, entries, strict=True)]
        for ids, (one, text) in zip(sampled, given.items(), strict=True):
            _check_vocabulary(tokenizer, ids, text, one)
        return _with_images(Encoded(encode.prompt(example), sampled), example, files, images)
    read = {one: read_completion(given, one, example.kind, size) for one in fields}
    for one, completion in read.items():
        if example.kind == "ids":
            _some_ids(completion, one, size)
        elif example.kind == "chat" and (not completion or completion[0]["role"] in ASKING_ROLES):
            remedy = "give the completion, and the rest as prompt"
            raise RowProblem(one, "does not begin with a turn of the model", remedy)
    if example.kind == "text":  # one without text is its end token alone
        read = {one: text for one, text in read.items() if without_eos(tokenizer, text).strip()}
    encoded = encode(replace(example, completions=list(read.values()), fields=tuple(read)))
    assert not isinstance(encoded, str)
    found = dict(zip(read, encoded.completion_ids, strict=True))
    encoded = replace(encoded, completion_ids=[found.get(one, [tokenizer.eos_token_id]) for one in fields])
    return _with_images(encoded, example, files, images)


def open_images(example: Example, row: Row, images: Images | None) -> tuple[list[ImageFile], Example]:
    """Returns the files of a prompt's images, and the example with them opened and in their places. Images in its
    messages come first: TRL gives its reward functions both.

    Raises `RowProblem` for what can't be read, and where there is no processor to read it.
    """
    contents = [turn.get("content") for turn in example.prompt] if example.kind == "chat" else []
    parts = [part for content in contents if isinstance(content, list) for part in content]
    inside = any(part["type"] != "text" and len(part) > 1 for part in parts)
    placed = place_images(example, [] if inside else take_images(row), images.place_in_text if images else None)
    opened = images.opened(placed) if images else placed
    if isinstance(opened, str):
        raise RowProblem("images", explain(opened), "give files that can be read as images")
    return list(placed.images), opened


def _with_images(encoded: Encoded, example: Example, files: list[ImageFile], images: Images | None) -> Values:
    row = {"prompt_ids": encoded.prompt_ids, "completion_ids": encoded.completion_ids}
    key = images.checked(encoded, example).images if images else ""
    return {**row, "images": key, "image_files": [file._asdict() for file in files]} if files else row


def _some_ids(value: object, name: str, vocab_size: int) -> list[int]:
    ids = read_ids({name: value}, name, vocab_size)
    if not ids:
        raise RowProblem(name, "has no tokens", "give at least one, such as the end token")
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
