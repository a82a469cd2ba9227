"""Rows that were scored, with what is known of their completions: a line for each row, figures, and the worst of them.

A row's completions stand in the order of preparation, the best first.
"""

import logging
import math
from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..data.fields import read_grades
from ..data.formats import GRADE_COLUMNS
from ..forward.scope import invocation_tokens
from ..model.adapter_source import UNRECORDED, AdapterSource
from ..training.arguments import hold_images
from ..training.tally import Tally, tally_singles
from .agreement import Agreement, Estimate, Judged, agreement, tally_rows, win
from .implicit import CompletionScore, ImplicitReward
from .rows import RowsToScore, prepare_rows

logger = logging.getLogger(__name__)

SHOWN = 160  # characters of a text
Values = dict[str, object]  # of a row, by column


def score_dataset(
    source: AdapterSource,
    rows: Dataset,
    categories: Sequence[str] | None = None,
    beta: float | None = None,
    max_length: int | str | None = "recorded",
    max_tokens: int = 16384,
    unneeded_columns: Sequence[str] = (),
) -> tuple[ImplicitReward, "ScoredRows"]:
    """Scores the completions of a dataset by a trained adapter, prepared as its training would.

    Args:
        source: the adapter.
        rows: pairs, lists, or completions with or without labels; what can't be used is dropped and counted.
        categories: one for each row, to report figures by.
        beta, max_length, max_tokens: see `ImplicitReward`.
        unneeded_columns: see `prepare_dataset`.

    Raises:
        OptionError, ReferenceMismatchError: as `ImplicitReward`.
        DataError: rows in no known format.
        NonFiniteError: a log-prob is NaN or infinite.
    """
    setup = source.read() or UNRECORDED
    limit: Any = setup.max_length if max_length == "recorded" else max_length
    # Rows first: a bad one is found in seconds, not after minutes of loading the model.
    images = source.images(needed=hold_images(rows))
    tokenizer = images.tokenizer if images else source.tokenizer()
    invocation = invocation_tokens({"": source.config}, "")
    data = prepare_rows(rows, tokenizer, setup, limit, unneeded_columns, images, invocation)
    logger.info("%s", data.summary)
    reward = ImplicitReward(source, tokenizer=images, beta=beta, max_length=limit, max_tokens=max_tokens)
    logger.info("%s", reward.plan)
    return reward, ScoredRows(data, reward.score_rows(data.prepared, progress=True), categories)


class ScoredRows:
    """Rows with a score for each of their completions.

    Args:
        data: the rows that were scored.
        scores: what `ImplicitReward.score_rows` gave for each prepared row.
        categories: one for each row as it was read, or None.
    """

    def __init__(
        self, data: RowsToScore, scores: Sequence[Sequence[CompletionScore]], categories: Sequence[str] | None = None
    ):
        self.data, self.kind, self.scores = data, data.kind, scores
        self.judged = [
            Judged([score.reward for score in row], [score.tokens for score in row], grades)
            for row, grades in zip(scores, data.grades(), strict=True)
        ]
        self.categories = None if categories is None else [categories[place.row] for place in data.places]

    def __len__(self) -> int:
        return len(self.scores)

    # ---- Figures --------------------------------------------------------------------------------------------------

    def figures(self) -> Values:
        """Returns sums and means, and how well the scores agree with the judgments, by category too."""
        everything = range(len(self))
        rewards = [score.reward for row in self.scores for score in row]
        found = agreement(self.tally(everything))
        figures: Values = {
            "completions": len(rewards),
            "tokens": sum(score.tokens for row in self.scores for score in row),
            "mean_reward": sum(rewards) / len(rewards),
            "agreement": as_dict(found),
        }
        if self.categories is not None and found is not None:
            members: dict[str, list[int]] = {name: [] for name in sorted(set(self.categories))}
            for i, name in enumerate(self.categories):
                members[name].append(i)
            figures["by_category"] = {name: as_dict(agreement(self.tally(rows))) for name, rows in members.items()}
        return figures

    def tally(self, which: Sequence[int]) -> Tally:
        """Returns the comparisons of some of the rows."""
        rows = [self.judged[i] for i in which]
        if self.kind != "singles":
            return tally_rows(rows)
        return tally_singles(*([one[0] for one in column] for column in zip(*rows, strict=True)))

    def worst(self, number: int, tokenizer: PreTrainedTokenizerBase) -> list[Values]:
        """Returns the rows that the scores get most wrong, with shortened texts: the smallest margins, or the single
        completions that win the fewest of their comparisons."""
        wrong: list[tuple[float, int, Values, dict[str, int]]] = []  # how wrong which row is; completions to show
        if self.kind == "singles":
            for i, won in enumerate(self._won()):
                if won is not None and won < 0.5:
                    found: Values = {
                        "won": won,
                        "label": self.judged[i].grades[0] > 0,
                        "reward": self.scores[i][0].reward,
                    }
                    wrong.append((won, i, found, {"answer": 0}))
        else:
            for i, judged in enumerate(self.judged):
                margin, better, worse = min(judged.margins(), default=(math.inf, 0, 0))
                if margin <= 0:
                    wrong.append((margin, i, {"margin": margin}, {"better": better, "worse": worse}))
        result = []
        for _, i, values, shown in sorted(wrong, key=lambda one: one[:2])[:number]:
            row = self.data.prepared[i]
            texts = {name: shorten(tokenizer, row["completion_ids"][k]) for name, k in shown.items()}
            prompt = shorten(tokenizer, row["prompt_ids"], end=True)
            result.append({"row": self.data.places[i].row, **self._category(i), **values, "prompt": prompt, **texts})
        return result

    def _won(self) -> list[float | None]:
        """Returns the share of its comparisons that each row wins, None if it has none. A single completion has those
        with other rows, and 0.5 if there are none."""
        if self.kind != "singles":
            wins = [[win(margin) for margin, _, _ in judged.margins()] for judged in self.judged]
            return [sum(row) / len(row) if row else None for row in wins]
        tally = self.tally(range(len(self)))
        return (tally.wins_RS.sum(1) / tally.number_RS.sum(1)).tolist() if tally.comparisons else [0.5] * len(self)

    def _category(self, i: int) -> Values:
        return {} if self.categories is None else {"category": self.categories[i]}

    # ---- Lines ----------------------------------------------------------------------------------------------------

    def lines(self) -> list[Values]:
        """Returns one for each row that was scored, one for each completion of ones that nobody judged."""
        lines: list[Values] = []
        for i, (scores, won) in enumerate(zip(self.scores, self._won(), strict=True)):
            place, values = self.data.places[i], Values()
            if self.kind in ("pairs", "trajectories"):
                both = [(side, columns(score)) for side, score in zip(("chosen", "rejected"), scores, strict=True)]
                values = {f"{name}_{side}": one[name] for name in both[0][1] for side, one in both}
                values |= {"margin": scores[0].reward - scores[1].reward, "correct": won}
            elif self.kind == "lists":
                values = {**self._list(i), "won": won}
            elif self.kind == "singles":
                values = {**columns(scores[0]), "label": self.judged[i].grades[0] > 0, "won": won}
            else:
                values = {**columns(scores[0]), "completion": place.completion}
            lines.append({"row": place.row, **values, **self._category(i)})
        return lines

    def _list(self, i: int) -> Values:
        """In the order of the source: preparation has sorted ranked completions by their grades."""
        places = list(range(len(self.scores[i])))  # of the source's completions among the prepared
        source = self.data.rows[self.data.places[i].row]
        ranked = {"completions", "completions_ids"} & source.keys() and source.keys() & set(GRADE_COLUMNS)
        if ranked:  # as `formats.detect_format` says
            given = read_grades(source, len(places))
            order = sorted(places, key=lambda at: -given[at])
            places.sort(key=order.__getitem__)
        by_place = [columns(self.scores[i][k]) for k in places]
        values = {n if n == "tokens" else f"{n}s": [one[n] for one in by_place] for n in by_place[0]}
        return {**values, "grades": [self.judged[i].grades[k] for k in places]}


def columns(score: CompletionScore) -> dict[str, float]:
    """Returns a score's values by name; without a reference there is no `ref_logp`."""
    return {name: value for name, value in score._asdict().items() if value is not None}


def as_dict(found: Agreement | None) -> Values | None:
    """Returns figures as JSON can hold them."""
    if found is None:
        return None
    values = {name: v._asdict() if isinstance(v, Estimate) else v for name, v in vars(found).items()}
    for name in ("better_longer", "better_shorter"):
        number, accuracy = values[name]
        values[name] = {"comparisons": number, "accuracy": accuracy}
    return values


def shorten(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], end: bool = False) -> str:
    """Returns the text of token ids on one line: its start, or its end."""
    text = " ".join(tokenizer.decode(ids, skip_special_tokens=True).split())
    if len(text) <= SHOWN:
        return text
    return "…" + text[1 - SHOWN :] if end else text[: SHOWN - 1] + "…"
