"""Rows whose words are nearly those of another row, found exactly: none above the threshold is missed.

A text is the set of its threes of neighboring words (shingles; Broder 1997), and two are alike by the Jaccard
similarity of their sets. Of two sets at least t alike, the first |x| - ceil(t |x|) + 1 elements of each, in any order
common to all, share one (prefix filtering; Chaudhuri et al. 2006, Bayardo et al. 2007). With the rarest first few
texts meet there, and only those are compared. MinHash with 128 values in 16 bands would miss 5 % of the pairs that are
0.8 alike.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher
from math import ceil
from typing import Any

import numpy as np

from .reading import Item

SIMILAR = 0.8
# Threes in more than so many texts, and more than this share of them, are a template's: they say nothing.
COMMON, COMMON_SHARE = 100, 0.01
AROUND, SHOWN = 4, 240  # words around a difference, characters of a text that are shown
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"  # Thai to Han: a letter is a word
_WORD = re.compile(f"[{_UNSPACED}]|[^\\W{_UNSPACED}]+")
_PIECE = re.compile(f"(?:[{_UNSPACED}]|[^\\s{_UNSPACED}]+) ?")
_FACTORS = 0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9  # odd

Array = np.ndarray[Any, Any]
Pairs = list[tuple[int, int]]


def shingles(text: str, salt: int = 0) -> Array:
    """Returns (S,) uint32, ascending: the hashes of a text's threes of neighboring words, case and signs aside. A
    shorter text is one of its own, an empty one has none. With another `salt` the same words are others."""
    words = _WORD.findall(text.lower())
    hashes = np.fromiter(map(hash, words or [""]), np.int64).view(np.uint64)
    hashes = np.pad(hashes, (0, max(0, 3 - len(words))))
    mixed = sum((hashes[at : len(hashes) - 2 + at] * np.uint64(by) for at, by in enumerate(_FACTORS)), np.uint64(salt))
    return np.unique((mixed >> np.uint64(32)).astype(np.uint32))[: len(words)]


def jaccard(one: Array, other: Array) -> float:
    """Returns the share of the elements of two sets that both have; each is an array without repeats."""
    shared = len(np.intersect1d(one, other, assume_unique=True))
    return shared / max(len(one) + len(other) - shared, 1)


def similar(
    sets: Sequence[Array],
    known: Sequence[Array] | None = None,
    threshold: float = SIMILAR,
    alike: Callable[[int, int], bool] = lambda i, j: True,
) -> Pairs:
    """Returns (i, j) for each of some sets that is at least `threshold` alike to one that is known: the first one.

    Args:
        sets: of hashes, as of `shingles`. Those that most have in common are left out of all first.
        known: sets to compare with. None: those before it that are like none before them, so that it says what would
            go if each set that is like a kept one went.
        alike: what else must hold of two.
    """
    every = [*(known or ()), *sets]
    found, counts = np.unique(np.concatenate([np.empty(0, np.uint32), *every]), return_counts=True)
    limit = max(COMMON, COMMON_SHARE * len(every))
    shared, counts, common = found[counts > 1], counts[counts > 1], found[counts > limit]
    kept: dict[int, Array] = {}
    index: dict[int, list[int]] = defaultdict(list)
    pairs: Pairs = []

    def begin(whole: Array) -> tuple[Array, list[int]]:
        """Returns a set without what most have, and those of its first elements that others have too."""
        at = np.minimum(np.searchsorted(shared, whole), len(shared) - 1)
        often = counts[at] * (shared[at] == whole) if len(shared) else np.zeros(len(whole), int)
        told = whole[often <= limit] if len(common) else whole
        own = int((often == 0).sum())
        length = len(told) - ceil(threshold * len(told)) + 1 - own if len(told) else 0
        if length <= 0:
            return told, []
        order = np.lexsort((whole, often))
        return told, whole[order][own : own + length].tolist()

    for number, whole in enumerate(every):
        i = number - len(known or ())
        told, first = begin(whole)
        if not first:
            continue
        match = None
        if known is None or i >= 0:
            candidates = sorted({j for one in first for j in index.get(one, ())})
            near = (j for j in candidates if jaccard(told, kept[j]) >= threshold and alike(i, j))
            match = next(near, None)
        if match is not None:
            pairs.append((i, match))
        elif known is None or i < 0:
            kept[number] = told
            for one in first:
                index[one].append(number)
    return pairs


def apart(one: str, other: str) -> list[str]:
    """Returns two texts on a line each, shortened to the words that differ, in [ ], and some around them."""
    words = [_PIECE.findall(f"{' '.join(text.split())} ") for text in (one, other)]
    lines = ["", ""]
    for group in SequenceMatcher(None, words[0], words[1], autojunk=False).get_grouped_opcodes(AROUND):
        for how, *ends in group:
            for side in (0, 1):
                text = "".join(words[side][ends[2 * side] : ends[2 * side + 1]])
                gap = " " * (text.endswith(" ") or not text)
                lines[side] += text if how == "equal" else f"[{text.rstrip()}]{gap}"
        lines = [f"{line.rstrip()} … " for line in lines]
    return [(line if len(line) <= SHOWN else f"{line[:SHOWN]}…").strip() or "(the same words)" for line in lines]


class Near:
    """Finds rows whose prompt and completions are nearly those of another. Usable rows are `add`ed one by one."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.prompts: list[Array] = []
        self.completions: list[Array] = []

    def add(self, item: Item) -> None:
        """Takes the words of a row; one without text has none."""
        self.rows.append(item.row)
        self.prompts.append(shingles(item.prompt))
        written = [shingles(text, salt=1 << 63) for text in item.completions]
        self.completions.append(np.unique(np.concatenate(written)))

    def prompts_in(self, known: "Near") -> Pairs:
        """Returns (row, row of `known`) whose prompts are nearly the same."""
        return [(self.rows[i], known.rows[j]) for i, j in similar(self.prompts, known.prompts)]

    def rows_in(self, known: "Near | None" = None) -> Pairs:
        """Returns (row, row of `known`, or an earlier one) nearly the same as a whole and in their completions."""
        of = known or self
        alike = lambda i, j: jaccard(self.completions[i], of.completions[j]) >= SIMILAR  # noqa: E731
        pairs = similar(self._whole(), known._whole() if known else None, alike=alike)
        return [(self.rows[i], of.rows[j]) for i, j in pairs]

    def _whole(self) -> list[Array]:
        return [np.concatenate(both) for both in zip(self.prompts, self.completions, strict=True)]
