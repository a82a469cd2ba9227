"""Tries several settings on one base and gives most of the steps to those that do well early: successive halving
(Jamieson and Talwalkar 2016, arXiv:1502.07943).

Each setting is a run in a folder of its own. It is stopped at a share of its steps (a rung), judged on held-out rows,
and resumed if it is among the best. Its schedule is that of the whole run, so what reaches the end is what the setting
gives when it is trained alone. The base is loaded once, and each run takes its adapter off when it stops.
"""

import gc
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from .disk import one_writer, write_atomically
from .errors import NonFiniteError, OptionError
from .model.base import one_base
from .report.charts import MOST_TRACES
from .report.page import save_report
from .trainer import DPOTrainer
from .training.metrics import BALANCED, within_noise

logger = logging.getLogger(__name__)
STATE = "sweep.json"
PAGE = "comparison.html"
RUNGS = (0.25, 0.5, 1.0)

Json = dict[str, Any]


def run_sweep(
    make: Callable[[str], DPOTrainer],
    settings: Mapping[str, Json],
    output_dir: str | Path,
    rungs: Sequence[float] = RUNGS,
    keep: float = 0.34,
    max_kl: float | None = None,
) -> Json:
    """Trains settings by successive halving, and chooses one. A sweep that was interrupted goes on when it is called
    again.

    Args:
        make: returns the trainer of a setting by its name; with evaluation rows, and `output_dir` of its own.
        settings: name to what tells a setting from the others, as it is recorded.
        output_dir: of `sweep.json`, the state and result, and `comparison.html`.
        rungs: shares of a run's steps at which runs are judged, ascending, the last one 1.
        keep: share of the runs that go on from each rung, rounded up.
        max_kl: nats a completion (the `kl` metric on held-out rows) beyond which a setting is not chosen.

    Returns:
        `settings`, `results` (name to one entry for each rung: `steps`, `of` how many; on the first evaluation set
        `rows`, `accuracy`, `balanced` by length, `kl`, `margin`, that in `nats`, and whether it is within `noise`),
        `failed` (name to why), `order` (names, the best first), `choice` (a name, or None), `reason`, `steps`
        (`trained` in all, and those of the `full` grid), `page`.

    Raises:
        OptionError: rungs, keep or max_kl out of range, or a folder with another sweep.
    """
    check_sweep(settings, rungs, keep, max_kl)
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with one_writer("output_dir", folder), one_base(), _short():
        found = _begun(folder, {"settings": dict(settings), "rungs": [*rungs], "keep": keep, "max_kl": max_kl})
        results, failed, alive = found["results"], found["failed"], [*settings]
        for at, share in enumerate(rungs):
            for name in alive:
                if name not in failed and len(results[name]) == at:
                    try:
                        results[name].append(result := _advance(make(name), share))
                        told = (f"{one} {value:.3g}" for one, value in result.items() if value is not None)
                        logger.info("%s: %s", name, ", ".join(told))
                    except NonFiniteError as error:
                        failed[name] = str(error)
                        logger.warning("%s is given up: %s", name, error)
                    write_atomically(folder / STATE, json.dumps(found, indent=1))
            ranked = rank({name: results[name][at] for name in alive if name not in failed}, max_kl)
            alive = ranked[: math.ceil(keep * len(alive))] if share < 1 else ranked
            logger.info("%d%% of the steps: %s.", round(100 * share), " > ".join(ranked) or "none is left")
        found |= _concluded(found, alive)
        shown = [folder / name for name in found["order"] if results[name]][:MOST_TRACES]
        if shown:
            found["page"] = save_report(shown, folder / PAGE, f"Sweep: {found['reason']}")["output"]
        write_atomically(folder / STATE, json.dumps(found, indent=1))
    return found


def check_sweep(settings: Mapping[str, Json], rungs: Sequence[float], keep: float, max_kl: float | None) -> None:
    """Raises an OptionError for arguments of `run_sweep` that are out of range."""
    if len(settings) < 2:
        raise OptionError(f"settings: {len(settings)} is nothing to choose from. Give at least two.")
    if [*rungs] != sorted({*rungs}) or not rungs or rungs[0] <= 0 or rungs[-1] != 1:
        raise OptionError(f"rungs={[*rungs]}: give ascending shares of the steps that end with 1, as 0.25 0.5 1.")
    if not 0 < keep <= 1:
        raise OptionError(f"keep={keep}: give a share above 0 and up to 1.")
    if max_kl is not None and max_kl <= 0:
        raise OptionError(f"max_kl={max_kl}: give nats a completion above 0, or leave it out.")


def _begun(folder: Path, asked: Json) -> Json:
    """Returns the state of a sweep, as far as it came."""
    fresh = {**asked, "results": {name: [] for name in asked["settings"]}, "failed": {}}
    if not (folder / STATE).is_file():
        return fresh
    known = json.loads((folder / STATE).read_text("utf-8"))
    if other := [name for name, value in asked.items() if known[name] != value]:
        raise OptionError(
            f"output_dir={str(folder)!r} holds another sweep ({', '.join(other)} differ). Give another output_dir, or "
            "the options of that one to go on with it."
        )
    return {name: known[name] for name in fresh}


class _StopAt(TrainerCallback):
    """Evaluates, saves and stops a run at a share of its steps."""

    def __init__(self, share: float):
        self.share = share

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        if state.global_step >= math.ceil(self.share * state.max_steps):
            control.should_evaluate = control.should_save = control.should_training_stop = True


def _advance(trainer: DPOTrainer, share: float) -> Json:
    """Trains a run up to a share of its steps, from where it is, and saves the result at its end. Returns its figures
    on held-out rows, and takes its adapter off the base."""
    try:
        trainer.add_callback(_StopAt(share))
        trainer.train(resume_from_checkpoint="latest")
        if share == 1:
            trainer.save_model()
        prefix = next(iter(trainer.prepare.evaluated))
        logs = [entry for entry in trainer.state.log_history if f"{prefix}_loss" in entry]
        names = {"accuracy": "rewards/accuracies", "balanced": BALANCED, "kl": "kl", "margin": "rewards/margins"}
        figures = {own: logs[-1].get(f"{prefix}_{name}") for own, name in names.items()}
        beta, reward = float(trainer.args.beta or 1.0), trainer.objective.parts[0].reward
        return {
            "steps": trainer.state.global_step,
            "of": trainer.state.max_steps,
            "rows": trainer.data_reports[prefix].kept_rows,
            **figures,
            "nats": (figures["margin"] or 0.0) / beta,
            "noise": within_noise(figures["margin"], beta, figures["kl"], reward),
        }
    finally:
        trainer.model.unload()
        trainer.model = trainer.model_wrapped = None
        del trainer
        gc.collect()


@contextmanager
def _short() -> Iterator[None]:
    """Keeps the package to warnings, but for this module: a run tells what the one before has told."""
    package = logging.getLogger("dpo_peft")
    before, own = package.level, logger.level
    logger.setLevel(package.getEffectiveLevel())
    package.setLevel(max(package.getEffectiveLevel(), logging.WARNING))
    try:
        yield
    finally:
        package.setLevel(before)
        logger.setLevel(own)


def _beyond(result: Json, max_kl: float | None) -> bool:
    return max_kl is not None and result["kl"] is not None and result["kl"] > max_kl


def rank(results: Mapping[str, Json], max_kl: float | None) -> list[str]:
    """Returns the names of results within the limit of the KL, the best first.

    Accuracies within a standard error of the highest count as equal to it: of these the widest margin in nats comes
    first, as the limit says how far a policy may go for it. The others follow by accuracy (balanced by length, plain
    where that is unknown); margins within noise, whose accuracy says nothing of what the model writes, come last.
    """
    fit = {name: one for name, one in results.items() if not _beyond(one, max_kl)}
    told = [one for one in fit.values() if not one["noise"]]
    best: Json = max(told, key=_score, default={"accuracy": 0.0, "balanced": None, "rows": 1})
    limit = _score(best) - math.sqrt(_score(best) * (1 - _score(best)) / best["rows"])

    def place(name: str) -> tuple[bool, bool, float]:
        one = fit[name]
        equal = _score(one) >= limit
        return one["noise"], not equal, -one["nats"] if equal else -_score(one)

    return sorted(fit, key=place)


def _score(result: Json) -> float:
    score: float = result["accuracy"] if result["balanced"] is None else result["balanced"]
    return score


def _concluded(found: Json, finalists: Sequence[str]) -> Json:
    """Returns order, choice and reason. Those that came farther stand before others, those beyond the limit behind."""
    results, max_kl, order = found["results"], found["max_kl"], list[str]()
    for at in reversed(range(len(found["rungs"]))):
        here = {name: results[name][at] for name in found["settings"] if len(results[name]) == at + 1}
        order += rank(here, max_kl)
        order += [name for name in here if name not in order]
    steps = {one: sum(results[name][-1][of] for name in order) for one, of in (("trained", "steps"), ("full", "of"))}
    if not finalists:
        limit = "" if max_kl is None else f" or beyond max_kl={max_kl:g}"
        return {"order": order, "choice": None, "steps": steps, "reason": f"every setting failed{limit}"}
    first = results[finalists[0]][-1]
    how = "" if first["balanced"] is None else " balanced by length"
    kl = "" if first["kl"] is None else f", KL {first['kl']:.2f}"
    reason = f"{finalists[0]} (held-out accuracy{how} {_score(first):.3f}, margin {first['nats']:.2f} nats{kl})"
    return {"order": order, "choice": finalists[0], "steps": steps, "reason": reason}
