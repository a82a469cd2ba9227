"""What stands in rows more than once, and how long they are."""

from collections.abc import Iterator, Sequence
from hashlib import blake2b
from itertools import combinations
from typing import Any

import numpy as np
from datasets import Dataset

from ..data.worker import rows_of
from .near import Near, Pairs
from .reading import PAIRED, Item, Sized
from .render import ENDING

NAMED = 5  # rows that are named for each thing that is found
Judgment = tuple[bytes | float, ...]


class Repeats:
    """Finds rows that stand twice, contradict each other, or share a prompt. Usable rows are `add`ed one by one.

    Attributes:
        duplicates: (row, an earlier row with the same prompt, completions and judgment).
        contradictions: (row, an earlier row that says the opposite of the same two completions, or of the same one).
        near: the words of the rows.
    """

    def __init__(self) -> None:
        self.duplicates: list[tuple[int, int]] = []
        self.contradictions: list[tuple[int, int]] = []
        self.near = Near()
        self._prompts: dict[bytes, list[int]] = {}
        self._whole: dict[Judgment, int] = {}
        self._said: dict[Judgment, int] = {}

    def add(self, item: Item) -> None:
        """Counts a row."""
        self.near.add(item)
        prompt, *completions = (blake2b(key.encode("utf-8", "replace"), digest_size=12).digest() for key in item.keys)
        self._prompts.setdefault(prompt, []).append(item.row)
        grades = item.sized.grades
        if (first := self._whole.setdefault((prompt, *completions, *grades), item.row)) != item.row:
            self.duplicates.append((item.row, first))
        against = []
        for said, opposite in _judgments(prompt, completions, grades):
            self._said.setdefault(said, item.row)
            against += [self._said[opposite]] if opposite in self._said else []
        self.contradictions += [(item.row, against[0])] if against else []

    def facts(self) -> dict[str, Any]:
        """Returns the counts, and the first rows of each kind."""
        shared = [len(rows) for rows in self._prompts.values() if len(rows) > 1]
        told = {row for row, _ in self.duplicates + self.contradictions}
        return {
            "duplicates": _first(self.duplicates),
            "contradictions": _first(self.contradictions),
            "near_duplicates": _first([two for two in self.near.rows_in() if two[0] not in told]),
            "prompts": len(self._prompts),
            "rows_that_share_a_prompt": sum(shared),
            "most_rows_of_a_prompt": max(shared, default=1),
        }

    def leak(self, evaluation: "Repeats") -> dict[str, Any]:
        """Returns how many evaluation rows have a prompt that stands here too, the first as (evaluation, this) row; of
        the others, how many have nearly one of these prompts; and how many stand here nearly as they are."""
        theirs = evaluation._prompts
        both = [(row, self._prompts[one][0]) for one in theirs.keys() & self._prompts.keys() for row in theirs[one]]
        exact, near = {row for row, _ in both}, evaluation.near
        found = {
            "near_prompts": _first([two for two in near.prompts_in(self.near) if two[0] not in exact]),
            "near_rows": _first(near.rows_in(self.near)),
        }
        return {**_first(sorted(both)), "of": sum(map(len, theirs.values())), **found}


def _first(found: Pairs) -> dict[str, Any]:
    return {"rows": len(found), "first": found[:NAMED]}


def _judgments(
    prompt: bytes, completions: Sequence[bytes], grades: Sequence[float]
) -> Iterator[tuple[Judgment, Judgment]]:
    """Yields what a row says of its completions, and what would be the opposite."""
    if len(completions) == 1 and grades:
        yield (prompt, *completions, grades[0]), (prompt, *completions, 1 - grades[0])
    for (a, grade), (b, other) in combinations(zip(completions, grades, strict=False), 2):
        if grade != other:
            better, worse = (a, b) if grade > other else (b, a)
            yield (prompt, better, worse), (prompt, worse, better)


# ---- Lengths --------------------------------------------------------------------------------------------------------


def sized_tokens(prepared: Dataset, data: str, stop_tokens: Sequence[int]) -> tuple[list[Sized], int]:
    """Returns the lengths of prepared rows in tokens, and how many completions don't end with one of these."""
    found, unended, stops = [], 0, set(stop_tokens)
    for batch in prepared.iter(batch_size=1000):
        for row in rows_of(batch):
            grades = row.get("grades") or []
            if data in PAIRED:
                grades = [float(row.get("preference", 1.0) != 0.5), 0.0]
            found.append(Sized(len(row["prompt_ids"]), [*map(len, row["completion_ids"])], grades))
            unended += sum(stops.isdisjoint(ids[-ENDING:]) for ids in row["completion_ids"])
    return found, unended


def length_facts(rows: Sequence[Sized], data: str, unit: str) -> dict[str, Any]:
    """Returns of prompts and of each side the mean length, and those that half, 90 % and 99 % don't exceed."""
    levels = {"min": 0.0, "median": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    by_side: dict[str, list[int]] = {"prompt": [row.prompt for row in rows]}
    facts: dict[str, Any] = {"unit": unit}
    for row in rows:
        for side, length in row.sides(data):
            by_side.setdefault(side, []).append(length)
    for side, lengths in by_side.items():
        found = np.quantile(lengths, list(levels.values()), method="inverted_cdf")
        facts[side] = {"mean": float(np.mean(lengths)), **dict(zip(levels, map(int, found), strict=True))}
    return facts
