"""The rows of an optimizer step in as few micro-batches as a token budget allows, level in size.

Losses are divided by the items of the whole step, so which rows share a micro-batch has no effect on the step. A few
large micro-batches are faster than many small ones; the budget is what fits into memory. The bins depend on the rows
alone: a resumed run packs as the straight one does.

A bin is the rows of one micro-batch, by their indices. A row that is larger than the budget gets a bin of its own.
"""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from ..distributed import longest_first

Row = dict[str, Any]  # a prepared one
MicroBatch = dict[str, Any]  # fields of a `PackedBatch`
Entry = dict[str, Any]  # what `transformers.Trainer` counts as a micro-batch


class Size(NamedTuple):
    """The tokens that a row takes in a micro-batch of its own."""

    tokens: int  # positions of the forward pass, padding included
    keys: int  # keys that its segments read: a shared prompt counts for itself and once more for each completion
    predicted: int  # tokens with a log-prob
    given: int = 0  # tokens that an answer-only adapter leaves to the base
    scores: float = 0  # pairs of a query and a key that it sees, of the tokens that are not given


class Shape(NamedTuple):
    """The rectangle that a row takes when each completion is padded to the longest of the micro-batch."""

    completions: int  # those of other prompts beside it among them
    longest: int  # prompt and longest completion


def shape_of(row: Row) -> Shape:
    """Returns the shape of a prepared row."""
    lengths = [len(ids) for ids in (*row["completion_ids"], *row.get("mismatched_ids", ()))]
    return Shape(len(lengths), len(row["prompt_ids"]) + max(lengths))


def size_of(row: Row, shared: bool) -> Size:
    """Returns the size of a prepared row, whose prompt is laid out once (`shared`) or once per completion."""
    lengths = [len(ids) for name in ("completion_ids", "mismatched_ids") for ids in row.get(name, ())]
    answers = sum(lengths)
    unscored = sum(step < 0 for steps_C in row.get("steps") or () for step in steps_C)
    completions, longest = shape_of(row)
    if not shared:
        return Size(completions * longest, completions * longest, answers - unscored)
    prompt = len(row["prompt_ids"])
    alone = row.get("adapter_start", prompt)  # what follows in it stands before each completion
    tokens = alone + completions * (prompt - alone) + answers
    given = alone if "adapter_start" in row else 0
    own = (n + prompt - alone for n in lengths)
    scores = (alone**2 - given**2) / 2 + sum(n * (alone + n / 2) for n in own)
    return Size(tokens, tokens + completions * alone, answers - unscored, given, scores)


def tokens_of(row: Row, shared: bool) -> int:
    """Returns the positions that a prepared row takes in the forward pass."""
    return size_of(row, shared).tokens


def pack_rows(rows: Sequence[Row], budget: int, shared: bool) -> list[list[int]]:
    """Packs prepared rows into bins of at most `budget` tokens, the largest first; indices ascend in each.

    The largest comes first, so that what does not fit into memory is known at once, and its blocks are used again.
    """
    if shared:
        return level_bins([tokens_of(row, shared) for row in rows], budget)
    return padded_bins([shape_of(row) for row in rows], budget)


# ---- Shared prompts: a bin's size is the sum of its rows ------------------------------------------------------------


def level_bins(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Packs into as few bins as first-fit or longest-first needs, as level as longest-first makes them.

    First-fit decreasing takes at most 11/9 of the fewest bins and 6/9 (Dósa 2007). Longest-first, each row into the
    emptiest bin, has a largest bin of at most 4/3 of the smallest possible (Graham 1969); where it would go beyond the
    budget the bins of first-fit are taken, which are nearly full.
    """
    order = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))
    alone = [i for i in order if sizes[i] > budget]
    rest = order[len(alone) :]
    bins = _first_fit(rest, sizes, budget)
    for number in range(-(-sum(sizes[i] for i in rest) // budget), len(bins) + 1):
        level = longest_first(rest, sizes, number)
        if all(sum(sizes[i] for i in one) <= budget for one in level):
            bins = level
            break
    bins.sort(key=lambda one: (-sum(sizes[i] for i in one), one[0]))
    return [[i] for i in alone] + [sorted(one) for one in bins]


def _first_fit(order: Sequence[int], sizes: Sequence[int], budget: int) -> list[list[int]]:
    bins: list[list[int]] = []
    loads: list[int] = []
    for i in order:
        place = next((b for b, load in enumerate(loads) if load + sizes[i] <= budget), None)
        if place is None:
            bins.append([i])
            loads.append(sizes[i])
        else:
            bins[place].append(i)
            loads[place] += sizes[i]
    return bins


# ---- Padded rows: a bin's size is its completions times the longest -------------------------------------------------


def padded_bins(shapes: Sequence[Shape], budget: int) -> list[list[int]]:
    """Cuts the rows, in order of their length, into stretches, so that little is padded: with equally many completions
    in each row the fewest bins that there are, and their largest as small as stretches can have it."""
    order = sorted(range(len(shapes)), key=lambda i: (-shapes[i].longest, -shapes[i].completions, i))
    single = [shape.completions * shape.longest for shape in shapes]
    alone = sorted((i for i in order if single[i] > budget), key=lambda i: (-single[i], i))
    rest = [i for i in order if single[i] <= budget]
    number = len(_stretches(rest, shapes, budget))
    low = max((single[i] for i in rest), default=budget)
    # The smallest budget with which there are no more bins.
    least = bisect_left(range(budget), True, low, key=lambda b: len(_stretches(rest, shapes, b)) <= number)
    bins = _stretches(rest, shapes, least)
    bins.sort(key=lambda one: (-padded_size(one, shapes), one[0]))
    return [[i] for i in alone] + [sorted(one) for one in bins]


def padded_size(rows: Sequence[int], shapes: Sequence[Shape]) -> int:
    """Returns the tokens of a bin of padded rows."""
    return sum(shapes[i].completions for i in rows) * max(shapes[i].longest for i in rows)


def _stretches(order: Sequence[int], shapes: Sequence[Shape], budget: int) -> list[list[int]]:
    """Cuts `order`, which is by length: the first row of a bin is its longest."""
    bins: list[list[int]] = []
    completions = 0  # of the last bin
    for i in order:
        completions += shapes[i].completions
        if bins and completions * shapes[bins[-1][0]].longest <= budget:
            bins[-1].append(i)
        else:
            bins.append([i])
            completions = shapes[i].completions
    return bins


# ---- Entries of the training loop -----------------------------------------------------------------------------------


def hang(packs: Sequence[MicroBatch], bins: Sequence[Sequence[int]], number: int) -> list[Entry]:
    """Hangs micro-batches, each of which has the rows of a bin, on the `number` of entries that `transformers.Trainer`
    counts as those of an optimizer step: its loop takes as many as were read from the data loader, however many
    micro-batches there are.

    Returns dicts with `packs`, some micro-batches or none, `order` (their rows one after the other) and, for what
    counts tokens, all their `input_ids` and `attention_mask` (if they have one), flat.
    """
    counting = [name for name in ("input_ids", "attention_mask") if not packs or packs[0].get(name) is not None]
    nothing, entries = torch.empty(0, dtype=torch.long), []
    for start, end in pairwise(entry * len(packs) // number for entry in range(number + 1)):
        held = list(packs[start:end])
        flat = {name: torch.cat([pack[name].reshape(-1) for pack in held]) if held else nothing for name in counting}
        entries.append({"packs": held, "order": [i for rows in bins[start:end] for i in rows], **flat})
    return entries


def as_entry(batch: MicroBatch) -> Entry:
    """Returns the entry of a single micro-batch, whose fields it has too; or of none, for a process without a row."""
    if "empty" in batch:
        return hang([], [], 1)[0]
    order = batch.get("order", range(len(batch["rows"])))
    fields = {name: value for name, value in batch.items() if name != "order"}
    return {**fields, "packs": [fields], "order": list(order)}


def to_device(batch: MicroBatch, device: torch.device) -> MicroBatch:
    """Queues a batch that was laid out on the CPU for the device. From pageable memory, the copy would wait until the
    GPU has done all that was asked of it before."""

    def move(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        pinned = value.pin_memory() if value.device.type == "cpu" and device.type == "cuda" else value
        return pinned.to(device, non_blocking=True)

    return {name: move(value) for name, value in batch.items()}


def describe(packs: Sequence[MicroBatch], budget: int) -> str:
    """Says in one sentence how the rows of a step were packed."""
    tokens = [pack["input_ids"].numel() for pack in packs]
    return (
        f"{sum(len(pack['rows']) for pack in packs)} rows in {len(packs)} micro-batches, the largest of {max(tokens)} "
        f"tokens; the budget is {budget}, and {sum(tokens) / (len(packs) * budget):.0%} of it is used."
    )
