"""Runs for `parallel_run.train`, and how far the figures of two of them are apart."""

from typing import Any

TOLERANCE = 1e-6  # of a figure; relative where it is above 1


KL_TOLERANCE = 5e-6  # it adds up exponentials of float32 log-ratios, whose rounding depends on the rows beside them
# Ends of the names of figures that differ from run to run. All that compares runs reads them here.
TIMED = ("_runtime", "_per_second", "_preparation_time", "share_of_bound", "peak_memory_gib")


BY_LENGTH = ("length_only", "chosen_longer", "chosen_shorter", "length_balanced")


ACROSS_ROWS = ("rewards/margins", "rewards/accuracies", *(f"accuracies/{kind}" for kind in BY_LENGTH))


def run(name: str, *loss: str, rows: int = 13, batch: int = 4, **more: Any) -> dict[str, Any]:
    """A run for `parallel_run.train`. 13 rows in batches of 4: the last one leaves rank 1 without a row."""
    return {"name": name, "loss": list(loss or ["sigmoid"]), "rows": rows, "batch": batch, **more}


def flat(value: Any, name: str = "") -> dict[str, float]:
    """Every figure of a result by its path, those that measure time left out."""
    if isinstance(value, dict):
        items = {f"{name}.{key}": part for key, part in value.items() if not key.endswith(TIMED)}
    elif isinstance(value, list):
        items = {f"{name}.{index}": part for index, part in enumerate(value)}
    else:
        return {name: value}
    return {path: figure for key, part in items.items() for path, figure in flat(part, key).items()}


def largest_difference(a: dict[str, Any], b: dict[str, Any]) -> tuple[float, str]:
    """Over all figures, relative to those above 1, with its path. Both must have the same figures.

    A difference of `kl` is scaled so that `TOLERANCE` is its bound too.
    """
    left, right = flat(a), flat(b)
    assert left.keys() == right.keys(), sorted(left.keys() ^ right.keys())
    scale = {name: TOLERANCE / KL_TOLERANCE if name.endswith(("_kl", ".kl")) else 1.0 for name in left}
    return max((scale[name] * abs(x - right[name]) / max(1.0, abs(x)), name) for name, x in left.items())


def without_comparisons(result: dict[str, Any]) -> dict[str, Any]:
    """A result without the training metrics that compare each good completion of a micro-batch with each bad one: of
    single completions each process has fewer to compare, as any finer split into micro-batches has."""

    def kept(logs: dict[str, float]) -> dict[str, float]:
        return {name: figure for name, figure in logs.items() if not name.endswith(ACROSS_ROWS)}

    return {**result, "logs": [kept(logs) for logs in result["logs"]]}
