"""Rows that were scored, with what is known of their answers: a line for each row, figures, and the worst of them.

A row's answers stand in the order of preparation, the best first.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from ..data.fields import read_grades
from ..data.formats import GRADE_COLUMNS
from .agreement import Agreement, Judged, Tally, agreement, comparisons, tally_rows, tally_singles, win
from .implicit import CompletionScore

SHOWN = 160  # characters of a text
SIDES = ("chosen", "rejected")


class Place(NamedTuple):
    """Where an answer stood that was prepared as a row of its own."""

    row: int
    completion: int


class ScoredRows:
    """What `ImplicitReward.score_rows` gave for prepared rows.

    Args:
        rows: the rows as they were read.
        kind: "pairs", "trajectories", "lists", "singles" or "unlabelled".
        categories: one for each of `rows`, or None.
        prepared: the rows that were scored; their `row` is an index into `places`, or into `rows` without them.
        places: of "unlabelled" answers, (row, number among the row's completions).
        scores: of each prepared row's answers.
    """

    def __init__(
        self,
        rows: Any,
        kind: str,
        categories: Sequence[str] | None,
        prepared: Any,
        places: Sequence[tuple[int, int]] | None,
        scores: Sequence[Sequence[CompletionScore]],
    ):
        self.rows, self.kind, self.prepared, self.scores = rows, kind, prepared, scores
        self.places = [Place(row, 0) if places is None else Place(*places[row]) for row in prepared["row"]]
        self.grades = self._grades()
        self.categories = None if categories is None else [categories[place.row] for place in self.places]

    def __len__(self) -> int:
        return len(self.scores)

    def _grades(self) -> list[list[float]]:
        """Higher is better; equal ones are not compared."""
        if self.kind == "unlabelled":
            return [[0.0]] * len(self)
        if "grades" in self.prepared.column_names:
            return list(self.prepared["grades"])
        if "preference" in self.prepared.column_names:
            return [[float(preference > 0.5), 0.0] for preference in self.prepared["preference"]]
        return [[1.0, 0.0]] * len(self)

    # ---- Figures --------------------------------------------------------------------------------------------------

    def figures(self) -> dict[str, Any]:
        """Sums and means, and how well the scores agree with the judgements, by category too."""
        everything = range(len(self))
        rewards = [score.reward for row in self.scores for score in row]
        figures: dict[str, Any] = {
            "completions": len(rewards),
            "tokens": sum(score.tokens for row in self.scores for score in row),
            "mean_reward": sum(rewards) / len(rewards),
            "agreement": as_dict(agreement(self.tally(everything))),
        }
        if self.categories is not None and figures["agreement"] is not None:
            members: dict[str, list[int]] = {name: [] for name in sorted(set(self.categories))}
            for place, name in enumerate(self.categories):
                members[name].append(place)
            figures["by_category"] = {name: as_dict(agreement(self.tally(rows))) for name, rows in members.items()}
        return figures

    def tally(self, which: Sequence[int]) -> Tally:
        """The comparisons of some of the rows."""
        judged = [
            Judged([s.reward for s in self.scores[i]], [s.tokens for s in self.scores[i]], self.grades[i])
            for i in which
        ]
        if self.kind != "singles":
            return tally_rows(judged)
        return tally_singles(*([one[0] for one in column] for column in zip(*judged, strict=True)))

    def worst(self, number: int, tokenizer: Any) -> list[dict[str, Any]]:
        """The rows that the scores get most wrong, with shortened texts: the smallest margins, or the single answers
        that win the fewest of their comparisons."""
        wrong = self._wrong_singles() if self.kind == "singles" else self._wrong_rows()
        result = []
        for _, i, found in sorted(wrong, key=lambda one: one[:2])[:number]:
            row = self.prepared[i]
            texts = {"prompt": row["prompt_ids"]} | {
                n: row["completion_ids"][k] for n, k in found.pop("answers").items()
            }
            of_category = {} if self.categories is None else {"category": self.categories[i]}
            shown = {name: shorten(tokenizer, ids, end=name == "prompt") for name, ids in texts.items()}
            result.append({"row": self.places[i].row, **of_category, **found, **shown})
        return result

    def _wrong_rows(self) -> list[tuple[float, int, dict[str, Any]]]:
        wrong = []
        for i, (scores, grades) in enumerate(zip(self.scores, self.grades, strict=True)):
            margins = [(scores[a].reward - scores[b].reward, a, b) for a, b in comparisons(grades)]
            if margins and min(margins)[0] <= 0:
                margin, a, b = min(margins)
                wrong.append((margin, i, {"margin": margin, "answers": {"better": a, "worse": b}}))
        return wrong

    def _wrong_singles(self) -> list[tuple[float, int, dict[str, Any]]]:
        wrong = []
        for i, won in enumerate(self._won()):
            if won < 0.5:
                label, reward = self.grades[i][0] > 0, self.scores[i][0].reward
                wrong.append((won, i, {"won": won, "label": label, "reward": reward, "answers": {"answer": 0}}))
        return wrong

    def _won(self) -> list[float]:
        """The share of its comparisons that each single answer is on the right side of."""
        tally = self.tally(range(len(self)))
        if not tally.comparisons:
            return [0.5] * len(self)
        return [float(won) for won in tally.wins_RS.sum(1) / tally.number_RS.sum(1)]

    # ---- Lines ----------------------------------------------------------------------------------------------------

    def lines(self) -> list[dict[str, Any]]:
        """One for each row that was scored, one for each answer of unlabelled ones."""
        won = self._won() if self.kind == "singles" else []
        lines = []
        for i, scores in enumerate(self.scores):
            line: dict[str, Any] = {"row": self.places[i].row}
            if self.kind in ("pairs", "trajectories"):
                line |= self._pair(i)
            elif self.kind == "lists":
                line |= self._list(i)
            else:
                line |= columns(scores[0])
                line |= {"completion": self.places[i].completion} if self.kind == "unlabelled" else {}
            if self.kind == "singles":
                line |= {"label": self.grades[i][0] > 0, "won": won[i]}
            if self.categories is not None:
                line["category"] = self.categories[i]
            lines.append(line)
        return lines

    def _pair(self, i: int) -> dict[str, Any]:
        chosen, rejected = self.scores[i]
        of_sides = [columns(score) for score in (chosen, rejected)]
        values = {f"{n}_{side}": v[n] for n in of_sides[0] for side, v in zip(SIDES, of_sides, strict=True)}
        margin = chosen.reward - rejected.reward
        ties = self.grades[i][0] == self.grades[i][1]
        return {**values, "margin": margin, "correct": None if ties else win(margin)}

    def _list(self, i: int) -> dict[str, Any]:
        """In the order of the source: preparation has sorted ranked answers by their grades."""
        scores, grades = self.scores[i], self.grades[i]
        order = list(range(len(scores)))
        source = self.rows[self.places[i].row]
        ranked = {"completions", "completions_ids"} & source.keys() and source.keys() & set(GRADE_COLUMNS)
        if ranked:  # as `schema.detect_format` says
            given = read_grades(source, len(scores))
            order.sort(key=lambda at: -given[at])
        places = sorted(range(len(scores)), key=order.__getitem__)  # of the source's answers among the prepared
        of_answers = [columns(scores[k]) for k in places]
        values = {n if n == "tokens" else f"{n}s": [one[n] for one in of_answers] for n in of_answers[0]}
        won = [win(scores[a].reward - scores[b].reward) for a, b in comparisons(grades)]
        return {**values, "grades": [grades[k] for k in places], "won": sum(won) / len(won)}


def columns(score: CompletionScore) -> dict[str, Any]:
    """By name; without a reference there is no `ref_logp`."""
    return {name: value for name, value in score._asdict().items() if value is not None}


def as_dict(found: Agreement | None) -> dict[str, Any] | None:
    """For JSON."""
    if found is None:
        return None
    values = asdict(found)
    for name in ("accuracy", "length_only", "length_balanced"):
        estimate = getattr(found, name)
        values[name] = None if estimate is None else estimate._asdict()
    for name in ("better_longer", "better_shorter"):
        number, accuracy = getattr(found, name)
        values[name] = {"comparisons": number, "accuracy": accuracy}
    return values


def shorten(tokenizer: Any, ids: Sequence[int], end: bool = False) -> str:
    """The text of token ids on one line: its start, or its end."""
    text = " ".join(tokenizer.decode(ids, skip_special_tokens=True).split())
    if len(text) <= SHOWN:
        return text
    return "…" + text[1 - SHOWN :] if end else text[: SHOWN - 1] + "…"
