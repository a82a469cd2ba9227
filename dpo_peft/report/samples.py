"""Chooses the samples of a report: completions of prompts before, during and after training, or of several runs.

A page holds a bounded number of characters. What doesn't fit is left out in whole prompts or whole steps, and counted.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from .runs import Json, Run

PAGE_CHARACTERS = 500_000
TEXT_CHARACTERS = 8_000  # of one text

Side = tuple[str, Json]  # a sample under its name


class SampleCard(NamedTuple):
    """Holds one prompt: `sides` stand beside each other, `between` is folded."""

    prompt: str
    sides: list[Side]
    between: Sequence[Side] = ()

    @property
    def characters(self) -> int:
        """Returns how much of the page it takes when it is folded."""
        return _shown(self.prompt) + sum(_shown(row["completion"]) for _, row in self.sides)


def sample_cards(run: Run) -> tuple[list[SampleCard], list[str]]:
    """Returns a card per prompt, first and last step side by side, the steps between folded; and what was left out."""
    by_prompt: dict[int, dict[int, Json]] = {}
    for row in sorted(run.samples, key=lambda row: (row["prompt_number"], row["step"])):
        by_prompt.setdefault(row["prompt_number"], {})[row["step"]] = row
    cards, notes = _that_fit([_card(list(by_step.values())) for by_step in by_prompt.values()])
    # Of the steps between, the same ones for all prompts.
    size: Counter[int] = Counter()
    for card in cards:
        size.update({row["step"]: _shown(row["completion"]) for _, row in card.between})
    kept = _spread(size, PAGE_CHARACTERS - sum(card.characters for card in cards))
    if len(kept) < len(size):
        notes.append(f"{len(kept):,} of {len(size):,} steps between are shown; all are in samples.jsonl.")
    return [card._replace(between=[side for side in card.between if side[1]["step"] in kept]) for card in cards], notes


def compared_samples(runs: Sequence[Run]) -> tuple[list[SampleCard], list[str]]:
    """Returns a card per prompt that at least two runs have, each run's last sample beside the first run's start; and
    what was left out."""
    by_prompt: dict[str, dict[str, list[Json]]] = {}
    for run in runs:
        for row in sorted(run.samples, key=lambda row: row["step"]):
            by_prompt.setdefault(row["prompt"], {}).setdefault(run.name, []).append(row)
    cards = []
    for prompt, by_run in by_prompt.items():
        if len(by_run) > 1:
            start = next(iter(by_run.values()))[0]
            sides = [("before training", start)] if start["step"] == 0 else []
            sides += [(f"{name}, step {of[-1]['step']:,}", of[-1]) for name, of in by_run.items()]
            cards.append(SampleCard(prompt.strip("\n"), sides))
    alone = len(by_prompt) - len(cards)
    cards, notes = _that_fit(cards)
    return cards, notes + ([f"{alone:,} prompts were sampled in one run only."] if alone else [])


def _card(rows: list[Json]) -> SampleCard:
    """Returns the card of one prompt; its samples are sorted by step."""
    names = [f"step {row['step']:,}" for row in rows]
    if len(rows) > 1:
        names[-1] = f"after {names[-1]}"
    if rows[0]["step"] == 0:
        names[0] = "before training"
    first, *between = zip(names, rows, strict=True)
    # A chat template ends with a newline.
    return SampleCard(rows[-1]["prompt"].strip("\n"), [first, *between[-1:]], between[:-1])


def _that_fit(cards: list[SampleCard]) -> tuple[list[SampleCard], list[str]]:
    """Returns the first cards, as many as fit the page, and a note of the others."""
    totals = np.cumsum([card.characters for card in cards])
    fit = cards[: int((totals <= PAGE_CHARACTERS).sum())]
    return fit, [f"{len(cards) - len(fit):,} further prompts are in samples.jsonl."] if len(fit) < len(cards) else []


def _spread(size: Mapping[int, int], room: int) -> set[int]:
    """Returns as many of the steps as fit into the room by their sizes, evenly spread."""
    steps = sorted(size)
    for count in range(len(steps), 0, -1):
        some = {steps[i] for i in np.linspace(0, len(steps) - 1, count).round().astype(int)}
        if sum(size[step] for step in some) <= room:
            return some
    return set()


def _shown(text: str) -> int:
    return min(len(text), TEXT_CHARACTERS)
