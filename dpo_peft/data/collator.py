"""From prepared rows to a batch: the collator.

Rows come from `prepare_dataset`: `prompt_ids`, `completion_ids` (K lists), `row`, and the labels that the objective
reads.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

from ..forward.content import content_keys
from ..forward.layout import PackedBatch, Sample, pack, pad_rows
from .fields import Row, Values
from .images import Images
from .worker import EXTRAS, IDS

T = TypeVar("T")

PREPARED_COLUMNS = [*IDS, *EXTRAS]  # all that a prepared row may hold


class PreferenceCollator:
    """Lays prepared rows out for one forward pass, as a dict of the fields of `PackedBatch`: each prompt once in one
    packed row (`shared`), or one padded row per completion, filled with `pad_token_id` (masked, so its value has no
    effect). `images` makes the pixels of rows with images."""

    def __init__(self, shared: bool = True, pad_token_id: int = 0, images: Images | None = None):
        self.shared = shared
        self.pad_token_id = pad_token_id
        self.images = images

    def __call__(self, rows: Sequence[Values]) -> Values:
        """Turns prepared rows into `PackedBatch` fields, on the CPU."""
        samples = [_sample(row) for row in with_pixels(rows, self.images)]
        return (pack(samples) if self.shared else pad_rows(samples, self.pad_token_id)).as_dict()


def with_keys(rows: Sequence[Values], collate: Callable[[Sequence[Values]], Values]) -> Values:
    """Returns what `collate` makes of rows with `keys`: what each completion's log-prob depends on, for a cache. They
    are made from the ids that the model will read, whoever laid the batch out."""
    batch = collate(rows)
    return {**batch, "keys": content_keys(PackedBatch(**batch))}


def _sample(row: Row) -> Sample:
    return Sample(
        row["prompt_ids"],
        row["completion_ids"],
        row.get("row", -1),
        steps=row.get("steps"),
        grades=row.get("grades"),
        preference=row.get("preference"),
        margin=row.get("margin"),
        mismatched=row.get("mismatched_ids", ()),
        images=row.get("pixels"),
        adapter_start=row.get("adapter_start"),
    )


def with_pixels(rows: Sequence[Values], images: Images | None) -> list[Values]:
    """Returns prepared rows with the `pixels` of their images, those that have none yet."""
    if images is None:
        return list(rows)
    return [row if "pixels" in row else {**row, "pixels": images.sample(row)} for row in rows]


@dataclass(frozen=True)
class Rows:
    """Rows on their way through a data loader. What moves batches to a device does not look inside."""

    rows: list[Values]


def keep_rows(rows: Sequence[Values], images: Images | None = None) -> Values:
    """Returns rows as they are, but for pixels, as `{"kept": ...}`: an optimizer batch is laid out as a whole."""
    return {"kept": Rows(with_pixels(rows, images))}


def chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yields `size` items at a time; the last ones may be fewer."""
    left = iter(items)
    while part := list(islice(left, size)):
        yield part


def mismatch(
    rows: Sequence[Values], before: Sequence[Values] = (), max_length: int | None = None
) -> tuple[list[Values], int]:
    """Gives each row the completions of the row before it, the first row those of the last, as `mismatched_ids`.
    Returns the rows, and how many completions were cut.

    KTO estimates its reference point on such pairs of a prompt with the completion of another (Ethayarajh et al. 2024,
    section 4.1): the mismatched completions of a batch are its own, each once. A single row takes those of the last
    one of `before`, the batch before it; without any it gets none. Each is cut, at its end, to what its new prompt
    leaves of `max_length`, the most tokens of both (None: no limit).
    """
    others = before if len(rows) == 1 else rows
    if not others:
        return list(rows), 0
    found, cut = [], 0
    for row, source in zip(rows, [others[-1], *rows[:-1]], strict=True):
        room = None if max_length is None else max_length - len(row["prompt_ids"])
        found.append({**row, "mismatched_ids": [ids[:room] for ids in source["completion_ids"]]})
        cut += sum(len(ids) > room for ids in source["completion_ids"]) if room is not None else 0
    return found, cut
