"""Says in one sentence whether a run was good, from what its metrics.json holds.

Good means: on rows that it was not trained on, the adapter tells better from worse completions more often than length
alone does, by more than chance explains, and no warning speaks against it. docs/diagnostics.md#the-verdict has the
rules and why the figures in them are what they are.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ..training.metrics import NOISE, length_balanced, within_noise
from ..training.tally import Estimate, wilson
from .diagnostics import REMEDIES

LEVELS = ("good", "unsure", "bad")
FEWEST = 30  # held-out comparisons below which nothing is called good
WORTH = 0.05  # an accuracy that is surely no further above length alone than this is no better
FEW_ROWS = 200  # of the training
BY_HEART = 0.1  # training accuracy above what the held-out one may be
OF_WARNINGS = {"no-learning": "bad", "reward-saturation": "good"}  # the others: unsure
HEADLINES = {"no-learning": "Nothing was learned.", "no-change": "The training has changed no sampled text."}

Metrics = Mapping[str, Any]  # contents of a metrics.json


class Verdict(NamedTuple):
    """Judges a run."""

    headline: str  # one sentence
    level: str  # one of `LEVELS`
    reasons: list[str]  # one sentence each, with a figure and what to do next; the one of the headline first


class Point(NamedTuple):
    """Says one thing about a run: how it counts, in short, and with its figures and what to do."""

    level: str
    headline: str
    reason: str


class HeldOut(NamedTuple):
    """Holds what one evaluation set says at the end of a run."""

    name: str  # prefix of its metrics
    where: str  # the set, for a sentence; empty if it is the only one
    figures: dict[str, float]  # of its last evaluation, names without prefix; those that are not finite are left out
    comparisons: int  # independent ones, 0 if unknown
    before: float | None  # accuracy at its first evaluation, if there were several

    @property
    def accuracy(self) -> Estimate | None:
        """Returns the accuracy with its interval."""
        value = self.figures.get("rewards/accuracies")
        return None if value is None or not self.comparisons else wilson(value, self.comparisons)

    @property
    def length_alone(self) -> float:
        """Returns the accuracy of always taking the longer, or always the shorter one, whichever is right more often;
        0.5 if it is unknown."""
        longer = self.figures.get("accuracies/length_only", 0.5)
        return max(longer, 1 - longer)

    @property
    def balanced(self) -> Estimate | None:
        """Returns the length-balanced accuracy, of whose two halves the numbers are taken from `length_only`; None if
        one half is unknown. Length alone has 0.5."""
        sides = [self.figures.get(f"accuracies/chosen_{side}") for side in ("longer", "shorter")]
        value, longer = length_balanced(*sides), self.figures.get("accuracies/length_only", 0.5)
        numbers = [self.comparisons * longer, self.comparisons * (1 - longer)]
        if value is None or min(numbers) <= 0:
            return None
        halves = [wilson(share or 0.0, number) for share, number in zip(sides, numbers, strict=True)]
        below = math.hypot(*(half.value - half.low for half in halves)) / 2
        return Estimate(value, value - below, value + math.hypot(*(half.high - half.value for half in halves)) / 2)


def verdict(metrics: Metrics) -> Verdict:
    """Returns how good a run was.

    Args:
        metrics: contents of a metrics.json, also of one that an earlier version wrote. What is missing there is taken
            as unknown.
    """
    points = list(_points(metrics))
    levels = [point.level for point in points]
    sets = levels[: len(held_out(metrics))]
    level = max(levels, key=LEVELS.index)
    if level == "bad" and "bad" not in levels[len(sets) :] and "good" in sets:
        level = "unsure"  # one set speaks for the run, another against it
    heading = max(points, key=lambda point: LEVELS.index(point.level))
    reasons = [heading.reason, *(point.reason for point in points if point is not heading)]
    return Verdict(heading.headline, level, reasons + ([] if level == "good" else list(_notes(metrics))))


def _points(metrics: Metrics) -> Iterator[Point]:
    steps = _newest(metrics, "step")
    if not steps:
        remedy = "Raise max_steps or num_train_epochs, or give more rows"
        yield Point("bad", "Nothing was trained.", f"The run took 0 steps. {remedy}.")
        return
    sets = held_out(metrics)
    for one in sets:
        yield _of_set(one, metrics)
    if not sets:
        rows = (metrics.get("data") or {}).get("train", {}).get("kept_rows", 0)
        share = next((share for share in (0.05, 0.1) if share * rows >= 100), 0.2)
        yield Point(
            "unsure",
            "Nothing was held out, so it is not known what the adapter does with new text.",
            f"The figures are of the {rows or 'same'} rows that were trained on. Hold some out: "
            f"--eval_share {share:g} --eval_strategy steps (in Python: eval_dataset).",
        )
    for warning in metrics.get("warnings") or ():
        name = warning["name"]
        remedy = REMEDIES.get(name, "See docs/diagnostics.md.")
        headline = HEADLINES.get(name, f"There is a warning: {name}.")
        yield Point(OF_WARNINGS.get(name, "unsure"), headline, f"Warning {name} at step {warning['step']}: {remedy}")


def held_out(metrics: Metrics) -> list[HeldOut]:
    """Returns the sets that were evaluated, in the order of the data."""
    data, last, first = metrics.get("data") or {}, metrics.get("eval_last") or {}, metrics.get("eval_first") or {}
    names = [name for name in data if name == "eval" or name.startswith("eval_")]
    if not names and "rewards/accuracies" in last:
        names = ["eval"]
    found = []
    for name in names:
        prefix = name.removeprefix("eval").removeprefix("_") + "_" if name != "eval" else ""
        own = {key.removeprefix(prefix): value for key, value in last.items() if key.startswith(prefix)}
        times = sum(f"{name}_loss" in entry for entry in metrics.get("log_history") or ())
        if not times and "loss" not in own:
            continue
        found.append(
            HeldOut(
                name,
                f" on {prefix.rstrip('_')!r}" if len(names) > 1 else "",
                {key: value for key, value in own.items() if isinstance(value, float | int) and math.isfinite(value)},
                _comparisons(data.get(name, {})),
                first.get(f"{prefix}rewards/accuracies") if times > 1 else None,
            )
        )
    return found


def _comparisons(rows: Mapping[str, Any]) -> int:
    """Returns how many independent comparisons a set holds: pairs that don't tie, lists, or of completions that were
    judged one by one as many as there are of the rarer kind."""
    single = rows.get("desirable", 0), rows.get("undesirable", 0)
    if any(single):
        return min(single)
    return rows.get("kept_rows", 0) - rows.get("ties", 0)


def _of_set(one: HeldOut, metrics: Metrics) -> Point:
    accuracy, where, number = one.accuracy, one.where, one.comparisons
    if "loss" not in one.figures:
        broken = f"The held-out loss{where} is not a number"
        return Point("bad", f"{broken}.", f"{broken} on {number} comparisons: lower learning_rate, or use bf16.")
    if accuracy is None:
        nothing = f"The held-out rows{where} hold nothing to compare"
        return Point(
            "unsure",
            f"{nothing}.",
            f"{nothing} ({number} comparisons): give rows of both kinds, or pairs, in eval_dataset_name.",
        )
    margin, beta = one.figures.get("rewards/margins"), metrics.get("beta") or 1.0
    reward = metrics.get("reward") or "log_ratio"
    if margin is not None and within_noise(margin, beta, one.figures.get("kl"), reward):
        return Point(
            "bad",
            f"The training has changed next to nothing{where}.",
            f"The margin{where} is {margin / beta:.2g} nats, within noise ({NOISE:g}), so the accuracy of "
            f"{accuracy.value:.3f} says nothing: raise learning_rate, or train longer.",
        )
    alone, balanced = one.length_alone, one.balanced
    side = ", taking the shorter one" if one.figures.get("accuracies/length_only", 0.5) < 0.5 else ""
    beside = f"accuracy {accuracy}{where} on {number:,} comparisons; length alone gets {alone:.3f}{side}"
    beyond_length = accuracy.low > alone or (balanced is not None and balanced.low > 0.5)
    if number < FEWEST:
        what, remedy = f"Too few held-out rows{where}", f"Hold out at least {FEWEST}, better 200."
        return Point("unsure", f"{what} to tell.", f"{what}: {beside}. {remedy}")
    if accuracy.low > 0.5 and beyond_length:
        return _since_start(one, accuracy, beside, reward)
    if accuracy.high <= alone + WORTH:
        what = f"No better than length alone{where}"
        return Point(
            "bad",
            f"{what}.",
            f"{what}: {beside}. Look at the pairs (dpo-peft data FILE), raise learning_rate, or train longer.",
        )
    what = f"Too close to call{where}"
    enough = next((n for n in (2**k * 50 for k in range(12)) if wilson(accuracy.value, n).low > alone), 0)
    more = f"so many of {enough:,} would tell" if enough > number else "more pairs or a longer run may tell"
    return Point("unsure", f"{what}: chance explains it as well.", f"{what}: {beside}. Hold out more rows; {more}.")


def _since_start(one: HeldOut, accuracy: Estimate, beside: str, reward: str) -> Point:
    """Judges a set that is better than length alone. A reward without a reference doesn't start at 0, so what the
    training has added is only seen beside an earlier evaluation."""
    good = Point("good", f"Better than length alone{one.where}, by more than chance.", f"Held-out {beside}.")
    if reward == "log_ratio" or (one.before is not None and accuracy.low > one.before):
        return good
    if one.before is None:
        what = "It is not known what the training has added"
        return Point(
            "unsure",
            f"{what}{one.where}.",
            f"{what}: {beside}, and the untrained model's own was not measured. Add --eval_on_start true.",
        )
    what = f"Hardly better than at its first evaluation{one.where}"
    return Point("unsure", f"{what}.", f"{what} ({one.before:.3f}): {beside}. Raise learning_rate, or train longer.")


def _notes(metrics: Metrics) -> Iterator[str]:
    """Yields what may have kept a run from being good."""
    rows, epochs = (metrics.get("data") or {}).get("train", {}).get("kept_rows", 0), _newest(metrics, "epoch")
    if 0 < rows < FEW_ROWS:
        yield f"It was trained on {rows} rows: collect more, a thousand is a usual start."
    elif rows and 0 < epochs < 0.95:
        yield f"It has seen {epochs:.0%} of its {rows:,} rows: raise max_steps, or leave it out."
    trained = (metrics.get("last") or {}).get("rewards/accuracies")
    for one in held_out(metrics):
        if one.accuracy is not None and trained is not None and trained > one.accuracy.high + BY_HEART:
            yield (
                f"Training accuracy is {trained:.3f}, held-out accuracy{one.where} {one.accuracy.value:.3f}: the rows "
                "are learned by heart, so use fewer epochs, a lower learning_rate or more pairs."
            )


def _newest(metrics: Metrics, name: str) -> float:
    return next((entry[name] for entry in reversed(metrics.get("log_history") or ()) if entry.get(name)), 0)
