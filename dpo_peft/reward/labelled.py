"""Rows that were scored, with what is known of their completions: a line for each row, figures, and the worst of them.

A row's completions stand in the order of preparation, the best first.
"""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from ..data.fields import read_grades
from ..data.formats import GRADE_COLUMNS
from .agreement import Agreement, Estimate, Judged, Tally, agreement, comparisons, tally_rows, tally_singles, win
from .implicit import CompletionScore
from .rows import RowsToScore

SHOWN = 160  # characters of a text
Values = dict[str, object]  # of a row, by column


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
        self.data, self.kind, self.scores, self.grades = data, data.kind, scores, data.grades()
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
        judged = [
            Judged([s.reward for s in self.scores[i]], [s.tokens for s in self.scores[i]], self.grades[i])
            for i in which
        ]
        if self.kind != "singles":
            return tally_rows(judged)
        return tally_singles(*([one[0] for one in column] for column in zip(*judged, strict=True)))

    def worst(self, number: int, tokenizer: PreTrainedTokenizerBase) -> list[Values]:
        """Returns the rows that the scores get most wrong, with shortened texts: the smallest margins, or the single
        completions that win the fewest of their comparisons."""
        wrong = self._wrong_singles() if self.kind == "singles" else self._wrong_rows()
        result = []
        for _, i, found, shown in sorted(wrong, key=lambda one: one[:2])[:number]:
            row = self.data.prepared[i]
            texts = {name: shorten(tokenizer, row["completion_ids"][k]) for name, k in shown.items()}
            prompt = shorten(tokenizer, row["prompt_ids"], end=True)
            result.append({"row": self.data.places[i].row, **self._category(i), **found, "prompt": prompt, **texts})
        return result

    def _wrong_rows(self) -> list[tuple[float, int, Values, dict[str, int]]]:
        """Returns how wrong which row is, what says so, and the completions to show by name."""
        wrong = []
        for i, (scores, grades) in enumerate(zip(self.scores, self.grades, strict=True)):
            margins = [(scores[a].reward - scores[b].reward, a, b) for a, b in comparisons(grades)]
            if margins and min(margins)[0] <= 0:
                margin, a, b = min(margins)
                found: Values = {"margin": margin}
                wrong.append((margin, i, found, {"better": a, "worse": b}))
        return wrong

    def _wrong_singles(self) -> list[tuple[float, int, Values, dict[str, int]]]:
        return [
            (won, i, {"won": won, "label": self.grades[i][0] > 0, "reward": self.scores[i][0].reward}, {"answer": 0})
            for i, won in enumerate(self._won())
            if won < 0.5
        ]

    def _won(self) -> list[float]:
        """Returns the share of its comparisons that each single completion is on the right side of."""
        tally = self.tally(range(len(self)))
        if not tally.comparisons:
            return [0.5] * len(self)
        return (tally.wins_RS.sum(1) / tally.number_RS.sum(1)).tolist()

    def _category(self, i: int) -> Values:
        return {} if self.categories is None else {"category": self.categories[i]}

    # ---- Lines ----------------------------------------------------------------------------------------------------

    def lines(self) -> list[Values]:
        """Returns one for each row that was scored, one for each completion of unlabelled ones."""
        won = self._won() if self.kind == "singles" else []
        lines = []
        for i, scores in enumerate(self.scores):
            place = self.data.places[i]
            if self.kind in ("pairs", "trajectories"):
                values = self._pair(i)
            elif self.kind == "lists":
                values = self._list(i)
            elif self.kind == "singles":
                values = {**columns(scores[0]), "label": self.grades[i][0] > 0, "won": won[i]}
            else:
                values = {**columns(scores[0]), "completion": place.completion}
            lines.append({"row": place.row, **values, **self._category(i)})
        return lines

    def _pair(self, i: int) -> Values:
        chosen, rejected = (columns(score) for score in self.scores[i])
        values = {f"{n}_{side}": v for n in chosen for side, v in (("chosen", chosen[n]), ("rejected", rejected[n]))}
        margin = self.scores[i][0].reward - self.scores[i][1].reward
        ties = self.grades[i][0] == self.grades[i][1]
        return {**values, "margin": margin, "correct": None if ties else win(margin)}

    def _list(self, i: int) -> Values:
        """In the order of the source: preparation has sorted ranked completions by their grades."""
        scores, grades = self.scores[i], self.grades[i]
        order = list(range(len(scores)))
        source = self.data.rows[self.data.places[i].row]
        ranked = {"completions", "completions_ids"} & source.keys() and source.keys() & set(GRADE_COLUMNS)
        if ranked:  # as `formats.detect_format` says
            given = read_grades(source, len(scores))
            order.sort(key=lambda at: -given[at])
        places = sorted(range(len(scores)), key=order.__getitem__)  # of the source's completions among the prepared
        by_place = [columns(scores[k]) for k in places]
        values = {n if n == "tokens" else f"{n}s": [one[n] for one in by_place] for n in by_place[0]}
        won = [win(scores[a].reward - scores[b].reward) for a, b in comparisons(grades)]
        return {**values, "grades": [grades[k] for k in places], "won": sum(won) / len(won)}


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
