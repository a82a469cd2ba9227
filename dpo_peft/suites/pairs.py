"""Accuracy on pairs and ranked lists, such as those of RewardBench, LLMBar and JudgeBench, by `dpo-peft score`'s own
functions."""

from collections.abc import Callable, Sequence
from typing import Any

from ..errors import OptionError
from ..forward.scope import invocation_tokens
from ..pairs.engines import ModelSource
from ..reward.agreement import agreement
from ..reward.judgments import ScoredRows
from ..reward.rows import prepare_rows
from ..training.tally import Estimate, Tally
from .figures import Figure, Statistic, accuracy, balanced, difference
from .options import EvalOptions
from .subject import Evaluate, Subject, read_some, setup_of

CATEGORIES = ("subset", "source")  # RewardBench's, JudgeBench's
STATISTICS: tuple[tuple[str, str, Callable[[Tally], Statistic] | None], ...] = (
    ("length alone", "length_only", None),
    ("mean log-prob", "accuracy", accuracy),
    ("mean log-prob, length-balanced", "length_balanced", balanced),
)


def pairs(file: str | None, options: EvalOptions, source: ModelSource) -> Evaluate:
    """Says how often the better completion has the higher implicit reward (adapter against base), and how often the
    higher mean log-prob of a token under each of the two, beside what length alone gets."""
    if file is None:
        raise OptionError("suites=pairs needs a file of pairs: pairs:FILE.")
    rows = read_some(file, options, options.dataset_split)
    category = next((name for name in CATEGORIES if name in rows.column_names), None)
    setup, tokenizer = setup_of(source), source.tokenizer()
    invocation = invocation_tokens({"": source.config}, "") if source.is_adapter else ()
    unneeded = [*(options.unneeded_columns or ()), *filter(None, [category])]
    data = prepare_rows(rows, tokenizer, setup, setup.max_length, unneeded, None, invocation)
    if data.kind not in ("pairs", "lists", "trajectories"):
        raise OptionError(f"suites=pairs:{file}: these rows are no pairs and no ranked lists.")
    parts: dict[str, list[int]] = {}
    for at, place in enumerate(data.places if category else ()):
        parts.setdefault(str(rows[place.row][category]), []).append(at)

    def evaluate(subject: Subject) -> dict[str, Any]:
        scores = subject.reward.score_rows(data.prepared, progress=True)
        rewards = {
            "base": [[one._replace(reward=(one.ref_logp or 0.0) / one.tokens) for one in row] for row in scores],
            "adapter": [[one._replace(reward=one.logp / one.tokens) for one in row] for row in scores],
            "reward": scores,
        }
        used = [*subject.sides, *(["reward"] if "adapter" in subject.sides else [])]
        scored = {name: ScoredRows(data, rewards[name]) for name in used}
        figures = _figures(scored, range(len(data.prepared)), options.seed)
        for part, which in sorted(parts.items()) if len(parts) > 1 else ():
            found = _figures(scored, which, options.seed, detail=True)
            figures += [one._replace(name=f"{part}, {one.name}") for one in found]
        return {"figures": figures, "dropped": data.summary.dropped, "truncated": data.summary.rows_truncated}

    return evaluate


def _figures(scored: dict[str, ScoredRows], which: Sequence[int], seed: int, detail: bool = False) -> list[Figure]:
    """Returns the figures of some of the prepared rows; none where there is nothing to compare."""
    tallies = {name: one.tally(which) for name, one in scored.items()}
    found = {name: one for name, tally in tallies.items() if (one := agreement(tally)) is not None}
    if not found:
        return []
    base, sides, figures = found["base"], {name: one for name, one in tallies.items() if name != "reward"}, []
    for name, value, statistic in STATISTICS:
        each: dict[str, Estimate | None] = {side: getattr(one, value) for side, one in found.items()}
        apart = None
        if statistic is not None and each["base"] is not None:
            apart = difference({side: statistic(tally) for side, tally in sides.items()}, base.rows, seed)
        figures.append(Figure(name, each["base"], each.get("adapter"), apart, base.comparisons, detail))
        if statistic is not None and "reward" in found:
            named = name.replace("mean log-prob", "implicit reward")
            figures.append(Figure(named, None, each["reward"], None, base.comparisons, detail))
    return figures
