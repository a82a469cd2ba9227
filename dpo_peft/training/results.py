"""What a run ends with: the best checkpoint, wherever the run was moved to, and the adapter that is saved, whole."""

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors import SafetensorError
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import compare_trainer_and_checkpoint_args

from ..config import DPOConfig
from ..errors import CheckpointError, OptionError
from ..manifests import whole_result
from ..wings import wing
from .checkpoints import problem_with

logger = logging.getLogger(__name__)

# What a result replaces, by which a folder is seen to hold a finished run, or something of the user's.
RESULT = ("adapter_config.json", "metrics.json", "recipe.yaml", "README.md")


# ---- The adapter ----------------------------------------------------------------------------------------------------


def asks_to_resume(resume: str | bool | None) -> bool:
    """Whether a value of `resume_from_checkpoint` asks for a checkpoint."""
    return bool(resume) and str(resume).lower() != "false"


def check_new_run(args: DPOConfig) -> None:
    """Refuses a folder whose files the result of a new run would replace, by an `OptionError` that names them."""
    there = [name for name in RESULT if (Path(str(args.output_dir)) / name).exists()]
    if there and not args.overwrite_output_dir:
        raise OptionError(
            f"output_dir={args.output_dir!r} holds {', '.join(there)}, of a finished run or of your own, which this "
            "run would replace. Give another output_dir, resume that run (resume_from_checkpoint='latest', if it has "
            "checkpoints), or set overwrite_output_dir=True."
        )


def save_result(trainer: Trainer, folder: str | Path, adapter: bool = True, **of_card: Any) -> None:
    """Saves the adapter in a folder, and what `artifacts` writes beside it (without the `adapter` that alone), whole
    or not at all; by the main process. `of_card`: see `artifacts.SaveResults`. Raises `CheckpointError` if it can't be
    written."""
    if not trainer.args.should_save:
        return
    try:
        with whole_result(folder, sealed=adapter) as staged:
            if adapter:
                trainer._save(str(staged))
            if (artifacts := wing("artifacts")) is not None:
                artifacts.SaveResults(trainer, **of_card).save(staged)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"The adapter can't be saved in {folder}: {error}. {trainer.run_state.remedy()} Free some space or mend "
            "the folder, then resume there; from Python, trainer.save_model(another folder) saves it now."
        ) from error


# ---- The best checkpoint --------------------------------------------------------------------------------------------


class BestCheckpoint(TrainerCallback):
    """Finds the best checkpoint of a run that is resumed: in the run's folder, beside the checkpoint that is resumed
    (which `resumed` gives), or where it was. It must be whole, and its log the beginning of this run's."""

    def __init__(self, resumed: Callable[[], Path | None]):
        self.resumed = resumed

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """Puts its place into the state. Raises a CheckpointError if there is none and `load_best_model_at_end` needs
        it."""
        if (resumed := self.resumed()) is None:
            return
        recorded = json.loads((resumed / TRAINER_STATE_NAME).read_text())["best_model_checkpoint"]
        if recorded is None:
            return
        name = Path(recorded).name
        beside = [str(Path(args.output_dir) / name), str(resumed.parent / name)]
        places = dict.fromkeys([*beside, recorded] if recorded != name else beside)
        problems = {place: _problem_with_best(Path(place), state) for place in places}
        state.best_model_checkpoint = next((place for place, problem in problems.items() if problem is None), None)
        if state.best_model_checkpoint is None:
            why = "; ".join(f"{place} {problem}" for place, problem in problems.items())
            message = f"The best checkpoint so far, {name}, can't be used: {why}."
            if args.load_best_model_at_end:
                raise CheckpointError(f"{message} Put it beside {resumed}, or set load_best_model_at_end=False.")
            logger.warning("%s It is forgotten.", message)


def _problem_with_best(folder: Path, state: TrainerState) -> str | None:
    """Returns what keeps a checkpoint from being the best of this run, as the rest of a sentence."""
    if problem := problem_with(folder):
        return problem
    its = json.loads((folder / TRAINER_STATE_NAME).read_text())["log_history"]
    same = json.dumps(its) == json.dumps(state.log_history[: len(its)])
    return None if same else "is another run's (its log differs)"


def load_best(model: PeftModel, adapter: str, state: TrainerState, reference: Any) -> None:
    """Loads the best adapter, whatever its name, and the reference that it had if that moves."""
    best = Path(str(state.best_model_checkpoint))
    if problem := problem_with(best):
        raise CheckpointError(
            f"The best adapter can't be loaded: {best} {problem}. The last one is in its checkpoint."
        )
    folder = best if adapter == "default" else best / adapter
    model.load_adapter(str(folder), adapter, is_trainable=True, torch_device=str(model.device))
    reference.load_state_dict({}, best)
    logger.info("The best adapter is loaded: %s (%s).", best, state.best_metric)


@contextmanager
def checkpoints_kept(args: DPOConfig) -> Iterator[None]:
    """Inside, transformers ends a run. With a limit of one it would delete all checkpoints but the best, those of
    other programs too."""
    limit, args.save_total_limit = args.save_total_limit, None
    try:
        yield
    finally:
        args.save_total_limit = limit


@contextmanager
def no_false_alarm() -> Iterator[None]:
    """Inside, transformers does not say that the best checkpoint is gone: it looks where that once was. Nor which
    options a resumed run has changed: `RunState.compare` does, and knows which of them change it."""

    def passes(record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(("The best checkpoint", "Warning: The following arguments do not match"))

    logs = [logging.getLogger(module.__module__) for module in (Trainer, compare_trainer_and_checkpoint_args)]
    for log in logs:
        log.addFilter(passes)
    try:
        yield
    finally:
        for log in logs:
            log.removeFilter(passes)
