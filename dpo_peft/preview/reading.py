"""Preference rows as texts, before anything is tokenized: what each holds, and why some can't be used."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..data.fields import NoValue, RowProblem, check_size, content_text, read_preference
from ..data.formats import IMAGE_COLUMNS, Example, RowFormat, Wanted
from ..data.image_rows import ImageFile, count_images, take_images
from ..data.parse import Parsed, common_start
from ..data.summary import EMPTY_COMPLETION, IDENTICAL, MISSING_VALUE, NO_RANKING, NO_SINGLE_BEST, SAME_TEXT
from ..data.truncate import all_same
from ..data.worker import TOO_DEEP, rows_of
from .render import Part, completion_labels

MALFORMED = "malformed"
PAIRED = ("pairs", "trajectories")
SIDES = {**dict.fromkeys(PAIRED, ("chosen", "rejected")), "lists": ("best", "worst")}


class Sized(NamedTuple):
    """The lengths of a row's prompt and completions, and the grades of these: of equal ones none is better."""

    prompt: int
    completions: list[int]
    grades: list[float]

    def sides(self, data: str) -> list[tuple[str, int]]:
        """Returns the lengths that are compared, with the names of the sides."""
        if data in SIDES:
            return list(zip(SIDES[data], (self.completions[0], self.completions[-1]), strict=True))
        names = [("undesirable", "desirable")[int(grade > 0)] for grade in self.grades]
        return list(zip(names or ["completion"], self.completions, strict=True))


class Item(NamedTuple):
    """A row, or a completion of it that nobody judged. Completions stand in order, the best first."""

    row: int
    reason: str = ""  # why it can't be used: one of `data.REASONS`, or malformed, or nothing
    problem: RowProblem | None = None  # of a malformed row
    prompt: str = ""
    completions: Sequence[str] = ()  # what the model is to write
    keys: Sequence[str] = ()  # of prompt and completions: equal where everything is the same
    sized: Sized = Sized(0, [], [])  # in characters, or tokens where the row gives ids
    example: Example | None = None
    images: int = 0


def read_items(
    rows: Dataset, row_format: RowFormat, wanted: Wanted, tokenizer: PreTrainedTokenizerBase | None = None
) -> Iterator[Item]:
    """Yields the rows of a format, the unusable ones too. Token ids are decoded if there is a tokenizer."""
    batches = rows.with_format(None).iter(batch_size=1000)
    for number, row in enumerate(row for batch in batches for row in rows_of(batch)):
        try:
            images = take_images(row)
            row = {column: value for column, value in row.items() if column not in IMAGE_COLUMNS}
            check_size(row)
            ours = row_format.prepare(row)
            found = row_format.read(ours)
            preference = read_preference(ours) if "preference" in wanted.label_columns else 1.0
        except NoValue:
            yield Item(number, MISSING_VALUE)
            continue
        except (RowProblem, RecursionError) as error:
            yield Item(number, MALFORMED, error if isinstance(error, RowProblem) else TOO_DEEP)
            continue
        for example in found if isinstance(found, list) else [found]:
            yield _item(number, example, wanted, preference, tokenizer, images)


def _item(
    number: int,
    example: Parsed,
    wanted: Wanted,
    preference: float,
    tokenizer: PreTrainedTokenizerBase | None,
    images: Sequence[ImageFile],
) -> Item:
    if isinstance(example, str):
        return Item(number, example)
    prompt, completions, grades = example.prompt, example.completions, list(example.grades or ())
    if not prompt and example.kind == "chat":  # trajectories without a prompt of their own
        cut = min(common_start(completions), *(len(turns) - 1 for turns in completions))
        prompt, completions = completions[0][:cut], [turns[cut:] for turns in completions]
    if wanted.data in PAIRED:
        grades = [float(preference != 0.5), 0.0]
        completions = completions[::-1] if preference < 0.5 else completions

    def text(value: Any, *roles: str) -> str:
        if example.kind == "chat":
            return "\n".join(content_text(turn) for turn in value if not roles or turn["role"] in roles)
        if example.kind == "text":
            return str(value)
        return "" if tokenizer is None else str(tokenizer.decode(value, skip_special_tokens=True))

    asked, written = text(prompt), [text(one, "assistant") for one in completions]
    sizes = [len(one) for one in (completions if example.kind == "ids" else written)]
    return Item(
        row=number,
        reason=_reason(example, wanted),
        prompt=asked,
        completions=written,
        keys=[f"{prompt}{[image.digest() for image in images] or ''}", *map(str, completions)],
        sized=Sized(len(prompt) if example.kind == "ids" else len(asked), sizes, grades),
        example=replace(example, prompt=prompt, completions=completions),
        images=len(images) or (sum(map(count_images, prompt)) if example.kind == "chat" else 0),
    )


def text_parts(example: Example) -> list[Part]:
    """Returns what of a row is to be rendered where there is no tokenizer."""

    def shown(value: Any) -> str:
        chat = example.kind == "chat"
        return "\n".join(f"{turn['role']}: {content_text(turn)}" for turn in value) if chat else str(value)

    labels = [("prompt", "prompt"), *completion_labels(example.grades, len(example.completions))]
    values = [example.prompt, *example.completions]
    return [Part(label, [(shown(value), style)]) for (label, style), value in zip(labels, values, strict=True)]


def _reason(example: Example, wanted: Wanted) -> str:
    """Returns why a row teaches nothing, as far as its texts show it; "" if it may teach something."""
    grades, completions = example.grades, example.completions
    if wanted.data == "lists" and grades and grades[0] == grades[-1]:
        return NO_RANKING
    if wanted.data == "lists" and grades and wanted.single_best and grades[0] == grades[1]:
        return NO_SINGLE_BEST
    if example.kind == "text" and not all(text.strip() for text in completions):
        return EMPTY_COMPLETION
    if all_same(completions):
        return IDENTICAL
    found: dict[str, float] = {}
    apart = grades and any(found.setdefault(str(one), g) != g for one, g in zip(completions, grades, strict=True))
    return SAME_TEXT if apart else ""
