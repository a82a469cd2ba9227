"""Compares runs: which figures can stand on one axis, which run is best beyond noise, and reward against KL."""

import math
from collections.abc import Sequence
from dataclasses import replace

from ..artifacts.curves import Curve, Panel, Series, initial_loss
from .charts import Chart, Trace, drawable, frontier_chart, style_of
from .facts import loss_name, margin_of, plain
from .runs import Json, Run

REWARD_KINDS = {"log_ratio": "log-ratios", "logp": "log-probabilities", "mean_logp": "log-probabilities per token"}
REWARDS = ("rewards/margins", "rewards/chosen", "rewards/rejected")
SURE = 0.05  # of a difference that is called one


def beta_of(run: Run) -> float | None:
    """Returns the run's beta, None if it has none or it wasn't recorded."""
    beta = run.facts.get("beta", run.recorded("training").get("beta"))
    return float(beta) if isinstance(beta, int | float) else None


def axis_of(key: str, run: Run) -> str:
    """Returns what a metric of a run is of. Runs whose metric is of the same share an axis.

    The loss of DPO begins at ln 2 whatever its beta; others are scaled by theirs.
    """
    if key in ("loss", "grad_norm"):
        name, beta = loss_name(run), beta_of(run)
        return name if beta is None or initial_loss(name) is not None else f"{name}, β {beta:g}"
    return reward_kind(run) if key in REWARDS else ""


def reward_kind(run: Run) -> str:
    reward = run.facts.get("reward", run.recorded("training").get("reward")) or "log_ratio"
    return REWARD_KINDS.get(reward, str(reward))


def scale_of(key: str, runs: Sequence[Run]) -> list[float]:
    """Returns what each run's metric is multiplied by: rewards of different betas are divided by theirs."""
    betas = [beta_of(run) or 1.0 for run in runs]
    return [1 / beta for beta in betas] if key in REWARDS and len(set(betas)) > 1 else [1.0] * len(runs)


def look_of(run: Run, at: int) -> Trace:
    """Returns a line without values, as run `at` of a comparison is drawn."""
    color, dash = style_of(at)
    return Trace(run.name, [], color, dash, shape=dash, group=f"r{at}")


def by_axis(panel: Panel, runs: Sequence[Run]) -> list[tuple[Panel, list[tuple[int, float]]]]:
    """Returns a panel of one curve for each axis that the runs need: the panel, and the number of each of its runs
    with what its values are multiplied by."""
    key = panel.curves[0].key
    scales, of = scale_of(key, runs), [axis_of(key, run) for run in runs]
    logged = [at for at, run in enumerate(runs) if key in run.metrics]
    title = f"{panel.title} ÷ β" if set(scales) != {1.0} else panel.title
    axes = list(dict.fromkeys(of[at] for at in logged))
    panels = []
    for axis in axes:
        named = replace(panel, title=f"{title}, {axis}") if len(axes) > 1 else replace(panel, title=title)
        named = replace(named, guide=initial_loss(axis)) if key == "loss" else named
        panels.append((named, [(at, scales[at]) for at in logged if of[at] == axis]))
    return panels


# ---- The best run ---------------------------------------------------------------------------------------------------


def ranking(figures: Sequence[Json]) -> list[int]:
    """Returns the numbers of the runs, the highest held-out accuracy first; those that have none, or margins within
    noise, last."""
    return sorted(range(len(figures)), key=lambda at: (not told_apart(figures[at]), -figures[at].get("accuracy", 0)))


def told_apart(figure: Json) -> bool:
    """Returns whether a run has an accuracy on held-out data that isn't of margins within noise."""
    return figure["source"] != "train" and "accuracy" in figure and "note" not in figure


def best_run(runs: Sequence[Run], figures: Sequence[Json]) -> tuple[int | None, str]:
    """Returns which run's held-out accuracy is above each other's beyond noise, None if it is none's; and why."""
    order = [at for at in ranking(figures) if told_apart(figures[at])]
    if len(order) < 2:
        return None, "Fewer than two runs have a held-out accuracy that is beyond noise, so none is called the best."
    first, *others = order
    sure = SURE / len(others)  # of all comparisons together
    close = [at for at in others if not chance(runs[first], figures[first], runs[at], figures[at]) < sure]
    name, accuracy = runs[first].name, figures[first]["accuracy"]
    if not close:
        return first, f"{name} has the highest accuracy, {accuracy:.3f}, beyond noise."
    near = ", ".join(f"{runs[at].name} ({figures[at]['accuracy']:.3f})" for at in close)
    return None, f"{name} has the highest accuracy, {accuracy:.3f}, but within noise of {near}."


def chance(run: Run, figure: Json, other: Run, its: Json) -> float:
    """Returns how likely two runs that are as good as each other differ as much: by the sign test where both have
    judged the same pairs; else 0 where the 95 % intervals of their accuracies lie apart, and 1."""
    won, its_won = (_won(one, of["source"]) for one, of in ((run, figure), (other, its)))
    if won and won.keys() == its_won.keys():
        differ = [won[pair] > its_won[pair] for pair in won if won[pair] != its_won[pair]]
        return sign_test(sum(differ), len(differ))
    if "interval" not in figure or "interval" not in its:
        return 1.0
    return 0.0 if figure["interval"][0] > its["interval"][1] else 1.0


def sign_test(better: int, differ: int) -> float:
    """Returns the two-sided p-value of `better` heads in `differ` throws of a fair coin; of many by the normal law."""
    fewer = min(better, differ - better)
    if differ > 1_000:
        return math.erfc((differ - 2 * fewer - 1) / math.sqrt(2 * differ))
    return min(1.0, 2 * sum(math.comb(differ, k) for k in range(fewer + 1)) / 2**differ)


def _won(run: Run, source: str) -> dict[tuple[float, ...], bool]:
    """Returns which pairs of the last evaluation are judged right, by their row and lengths."""
    evaluated = run.evaluations.get(source, {})
    rows = evaluated[max(evaluated)] if evaluated else []
    return {(row["row"], row["tokens_chosen"], row["tokens_rejected"]): margin_of(row) > 0 for row in rows}


# ---- Reward over KL -------------------------------------------------------------------------------------------------


def frontiers(runs: Sequence[Run]) -> list[Chart]:
    """Returns charts of the held-out accuracy, and of the margin, over the KL: a point for each evaluation."""
    charts = []
    for name, key in (("accuracy", "rewards/accuracies"), ("margin", "rewards/margins")):
        for i, (panel, numbers) in enumerate(by_axis(Panel(f"Held-out {name}", (Curve(key, name, "blue"),)), runs)):
            lines = [(look_of(runs[at], at), of) for at, scale in numbers if (of := evaluated(runs[at], key, scale))]
            missing = [runs[at].name for at, _ in numbers if not evaluated(runs[at], key, 1.0)]
            notes = [f"Without a held-out KL: {', '.join(missing)}."] if missing else []
            if sum(len(of) for _, of in lines) > 1:
                charts.append(frontier_chart(f"frontier-{name}{i}", f"{panel.title} over KL", lines, notes))
    return charts


def evaluated(run: Run, key: str, scale: float) -> list[tuple[float, float, str]]:
    """Returns (KL, metric, step in words) of each evaluation on the run's first evaluation set that has both."""
    source = next((source for source in run.sources if source != "train"), "")
    kl: Series = run.metrics.get("kl", {}).get(source, [])
    values = dict(run.metrics.get(key, {}).get(source, []))
    both = [(step, x, values[step] * scale) for step, x in kl if step in values]
    return [(x, y, f"step {plain(step)}") for step, x, y in both if drawable(x) and drawable(y) and x >= 0]
