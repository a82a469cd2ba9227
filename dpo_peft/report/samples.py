"""The samples of a report: completions of the same prompts before, during and after training, or of several runs.

A page holds a bounded number of characters. What doesn't fit is left out in whole prompts or whole steps, and counted.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .runs import Run

PAGE_CHARACTERS = 500_000
TEXT_CHARACTERS = 8_000  # of one text

Row = Mapping[str, Any]  # of samples.jsonl


@dataclass(frozen=True)
class Text:
    """A text of a sample. `name` says whose it is, `left_out` counts characters that are not shown."""

    name: str
    text: str
    about: str = ""
    left_out: int = 0


@dataclass(frozen=True)
class SampleCard:
    """One prompt: `sides` stand beside each other, `between` is folded."""

    prompt: Text
    sides: list[Text]
    between: list[Text] = field(default_factory=list)

    @property
    def characters(self) -> int:
        return sum(len(text.text) for text in (self.prompt, *self.sides))


def sample_cards(run: Run) -> tuple[list[SampleCard], list[str]]:
    """A card per prompt, first and last step side by side, the steps between folded; and what was left out."""
    by_prompt: dict[int, dict[int, Row]] = {}
    for row in run.samples:
        by_prompt.setdefault(row["prompt_number"], {})[row["step"]] = row
    prompts = [dict(sorted(by_step.items())) for _, by_step in sorted(by_prompt.items())]
    cards, notes = _that_fit([_ends(by_step) for by_step in prompts])
    # Of the steps between, the same ones for all prompts.
    inner = [list(by_step.values())[1:-1] for by_step in prompts[: len(cards)]]
    steps = sorted({row["step"] for rows in inner for row in rows})
    size = dict.fromkeys(steps, 0)
    for between in inner:
        for inner_row in between:
            size[inner_row["step"]] += len(_cut(inner_row["completion"])[0])
    kept = spread(size, PAGE_CHARACTERS - sum(card.characters for card in cards))
    if len(kept) < len(steps):
        notes.append(f"{len(kept):,} of {len(steps):,} steps between are shown; all are in samples.jsonl.")
    for card, between in zip(cards, inner, strict=True):
        card.between.extend(_text(row, f"step {row['step']:,}") for row in between if row["step"] in kept)
    return cards, notes


def compared_samples(runs: Sequence[Run]) -> tuple[list[SampleCard], list[str]]:
    """A card per prompt that at least two runs have: each run's last sample beside the first run's start."""
    by_prompt: dict[str, dict[str, list[Row]]] = {}
    for run in runs:
        for row in sorted(run.samples, key=lambda row: row["step"]):
            by_prompt.setdefault(row["prompt"], {}).setdefault(run.name, []).append(row)
    cards = []
    for prompt, by_run in by_prompt.items():
        if len(by_run) > 1:
            start = next(iter(by_run.values()))[0]
            sides = [_text(start, "before training")] if start["step"] == 0 else []
            sides += [_text(of[-1], f"{name}, step {of[-1]['step']:,}") for name, of in by_run.items()]
            cards.append(SampleCard(_prompt(prompt), sides))
    alone = len(by_prompt) - len(cards)
    cards, notes = _that_fit(cards)
    return cards, notes + ([f"{alone:,} prompts were sampled in one run only."] if alone else [])


def _ends(rows: Mapping[int, Row]) -> SampleCard:
    first, last = min(rows), max(rows)
    names = {last: f"step {last:,}"} if first == last else {first: f"step {first:,}", last: f"after step {last:,}"}
    if 0 in names:
        names[0] = "before training"
    return SampleCard(_prompt(rows[last]["prompt"]), [_text(rows[step], name) for step, name in names.items()])


def _that_fit(cards: list[SampleCard]) -> tuple[list[SampleCard], list[str]]:
    """The first cards, as many as fit the page, and a note of the others."""
    totals = np.cumsum([card.characters for card in cards])
    fit = cards[: int((totals <= PAGE_CHARACTERS).sum())]
    return fit, [f"{len(cards) - len(fit):,} further prompts are in samples.jsonl."] if len(fit) < len(cards) else []


def spread(size: Mapping[int, int], room: int) -> set[int]:
    """As many of the steps as fit into the room by their sizes, evenly spread."""
    steps = list(size)
    for number_of in range(len(steps), 0, -1):
        some = [steps[i] for i in np.unique(np.linspace(0, len(steps) - 1, number_of).round().astype(int))]
        if sum(size[step] for step in some) <= room:
            return set(some)
    return set()


def _text(row: Row, name: str) -> Text:
    text, left_out = _cut(row["completion"])
    tokens = f"{row['tokens']:,} tokens" if isinstance(row.get("tokens"), int) else ""
    unfinished = "not finished" if row.get("finished") is False else ""
    return Text(name, text, ", ".join(part for part in (tokens, unfinished) if part), left_out)


def _prompt(prompt: str) -> Text:
    text, left_out = _cut(prompt.strip("\n"))  # a chat template ends with one
    return Text("prompt", text, left_out=left_out)


def _cut(text: str) -> tuple[str, int]:
    return text[:TEXT_CHARACTERS], max(0, len(text) - TEXT_CHARACTERS)
