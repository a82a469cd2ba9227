"""What a run needs to be killed at any moment and resumed as if nothing had happened.

A checkpoint is written beside the others and takes its name when it is whole (`checkpoints.py`). It holds all that the
rest of the run depends on: `transformers.Trainer` saves adapter, optimizer, scheduler, random numbers and the place in
the data; `run_state.json` adds the sums of metrics since the last log, the options, and the state of each part.
"""

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from math import gcd
from pathlib import Path
from typing import Any, Protocol

from datasets import IterableDataset
from peft import PeftConfig
from safetensors import SafetensorError
from transformers import Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from ..config import DPOConfig
from ..credentials import SECRET
from ..data.clock import KEY as DATE
from ..disk import one_writer, write_atomically
from ..distributed import gather_over_processes, rank, world_size
from ..errors import CheckpointError, OptionError
from ..model.training_record import read_training
from . import checkpoints
from .metrics import MetricStore
from .results import BestCheckpoint, asks_to_resume, check_new_run, no_false_alarm

logger = logging.getLogger(__name__)

RUN_STATE = "run_state.json"
# Options that the optimizer's saved state holds: another value would be overwritten by it.
_RESTORED = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "optim", "optim_args")
_OF_THE_MODEL = ("base model", "rotary", "peft_config.")
OLD_LEARNING_RATE = 1e-6  # the default up to 0.1
# Options that do not change what is learned, by how their names start.
_HARMLESS = (
    "output_dir overwrite_output run_name logging_ log_ report_to project trackio_ save_ do_ disable_tqdm push_to_hub "
    "hub_ load_best metric_for_best greater_is_better sample_ eval_accumulation per_device_eval dataloader_num "
    "dataloader_pin dataloader_prefetch dataloader_persistent dataloader_multiprocessing remove_unused resume_from "
    "debug skip_memory include_ torch_empty_cache ddp_ local_rank ref_cache cache_ref precompute_ref dataset_num_proc "
    "activation_checkpointing activation_offloading gradient_checkpointing checkpoint_layers max_memory_gib fsdp "
    "stream_layers max_unusable_share on_unusable restore_callback jit_mode"
).split()
PROCESSES = "number of processes"
_BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps", PROCESSES)  # their product is a step's rows
_ADAPTER_SHAPE = (
    "r lora_alpha target_modules use_rslora use_dora modules_to_save rank_pattern alpha_pattern layers_to_transform "
    "alora_invocation_tokens"
).split()


class Part(Protocol):
    """A part of the trainer that a resumed run takes up where it was."""

    def state_dict(self, folder: Path) -> dict[str, Any]:
        """Returns its state as JSON values, after writing what is larger into the checkpoint's folder."""

    def load_state_dict(self, state: Mapping[str, Any], folder: Path) -> None:
        """Takes up a state; `state` holds the entries of all parts."""


def trajectory(args: DPOConfig, adapter: PeftConfig, rows: Mapping[str, str], base: str) -> dict[str, Any]:
    """Returns what decides how a run continues, name to JSON value: compared when a checkpoint is resumed.

    `rows` is what the training rows are told by (`Preparation.told_by`), `base` the fingerprint of the base.
    """
    options = json.loads(json.dumps(args.to_dict(), default=str))
    # Drawing an evaluation's order moves the random numbers that dropout reads.
    harmless = (*_HARMLESS, "eval_") if args.disable_dropout else tuple(_HARMLESS)
    kept = {name: value for name, value in options.items() if not name.startswith(harmless)}
    config = adapter.to_dict()
    for name in _ADAPTER_SHAPE:
        value = config[name]
        kept[f"peft_config.{name}"] = sorted(value) if isinstance(value, (set, list)) else value
    if (trained := read_training(adapter)) is not None and trained.rope_length is not None:
        kept["rotary frequencies of rows of"] = f"{trained.rope_length} tokens"
    return {**kept, PROCESSES: world_size(), **rows, "base model": base}


class RunState:
    """The state of a run beyond what `transformers.Trainer` saves.

    Args:
        args: the options; checkpoints lie in `output_dir`.
        metrics: sums since the last log; each process has its own.
        parts: what else is saved and restored.
        trajectory: gives what decides how the run continues (see `trajectory`).
    """

    def __init__(
        self, args: DPOConfig, metrics: MetricStore, parts: Sequence[Part], trajectory: Callable[[], dict[str, Any]]
    ):
        self.args, self.run_dir = args, Path(str(args.output_dir))
        self.metrics, self.parts, self.trajectory = metrics, parts, trajectory
        self.saved_step: int | None = None  # of the newest checkpoint that this run has written
        self.resumed: Path | None = None  # the checkpoint that it was resumed from
        self.best = BestCheckpoint(lambda: self.resumed)
        self._begun = False  # what is in the folder is this trainer's own

    # ---- Finding a checkpoint ------------------------------------------------------------------------------------

    def find(self, resume: str | bool | None) -> str | None:
        """Returns the checkpoint's folder to resume from, the same on all processes; None for a new start. `resume` is
        as `resume_from_checkpoint` of `DPOTrainer.train`. Raises `CheckpointError` where the checkpoint is not whole,
        or there is none, and `OptionError` where the folder holds another run's result (`check_new_run`)."""
        self.saved_step = None
        self.metrics.restore({})
        resume = self.args.resume_from_checkpoint if resume is None else resume
        found = gather_over_processes(self._find(resume) if rank() == 0 else None)[0]
        self.resumed, self._begun = None if found is None else Path(found), True
        return found

    def _find(self, resume: str | bool | None) -> str | None:
        for sentence in checkpoints.recover(self.run_dir):
            logger.info("%s", sentence)
        found = self.chosen(resume)
        elsewhere = found is None or Path(found).resolve().parent != self.run_dir.resolve()
        if elsewhere and not self._begun:
            check_new_run(self.args)
        return found

    def chosen(self, resume: str | bool | None) -> str | None:
        """Returns what `find` would, of what is in the folder as it is, on this process alone."""
        if not asks_to_resume(resume):
            if list(self.run_dir.glob("checkpoint-*")):
                logger.warning(
                    "%s holds checkpoints of an earlier run, and this run starts from scratch: they are mistaken for "
                    "its own when it is resumed. Use another output_dir, or resume_from_checkpoint=True to go on.",
                    self.run_dir,
                )
            return None
        if str(resume).lower() not in ("true", "latest"):
            if problem := checkpoints.problem_with(str(resume)):
                raise CheckpointError(f"resume_from_checkpoint={str(resume)!r} {problem}. {self.remedy()}")
            return str(resume)
        found, passed_over = checkpoints.newest_whole(self.run_dir)
        for path, problem in passed_over:
            logger.warning("%s is passed over: it %s.", path.name, problem)
        if found is None and (passed_over or str(resume).lower() == "true"):
            why = f"none of its {len(passed_over)} checkpoints is whole" if passed_over else "it holds no checkpoint"
            raise CheckpointError(
                f"resume_from_checkpoint={resume!r}: nothing to go on with in {self.run_dir}, {why}. Start from "
                "scratch with resume_from_checkpoint=None and another output_dir."
            )
        logger.info("%s", f"Resuming from {found}." if found else f"No checkpoint in {self.run_dir} yet: a new start.")
        return None if found is None else str(found)

    def remedy(self) -> str:
        """Returns a sentence on what there is to resume."""
        found, _ = checkpoints.newest_whole(self.run_dir)
        return f"The newest whole checkpoint is {found}." if found else "There is no whole one in output_dir."

    def compare(self, folder: Path, routers: bool = False) -> None:
        """Says in what the run's `trajectory` differs from a checkpoint's. A run that began with what used to be the
        default of `learning_rate` keeps it, in `args` too, where the option is left out.

        `routers` says whether there is a loss of routers, which is of each batch of the data loader.

        Raises:
            OptionError: one that the checkpoint's tensors would overrule.
            CheckpointError: it was saved without the optimizer and can't be resumed.
        """
        before, args = _read(folder)["trajectory"], self.args
        if (before.get("learning_rate"), args.learning_rate) == (OLD_LEARNING_RATE, DPOConfig.learning_rate):
            args.learning_rate = OLD_LEARNING_RATE
            logger.info("learning_rate stays %g: the default when the run began.", OLD_LEARNING_RATE)
        now = self.trajectory()
        changed = [name for name in now if name in before and now[name] != before[name]]
        rows, rows_before = rows_of_a_step(now), rows_of_a_step(before)
        free = self._free(routers) if rows == rows_before else ()
        changed = [name for name in changed if name not in free]
        lines = {name: f"{name}: {before[name]!r} before, {now[name]!r} now" for name in changed}
        fixed = [name for name in changed if name in _RESTORED or name.startswith(_OF_THE_MODEL)]
        if fixed:
            raise OptionError(
                f"Resuming with other options: {'; '.join(map(lines.__getitem__, fixed))}. The checkpoint holds what "
                "follows from them, so the new ones would have no effect. Leave them as they were, or start a new run "
                "from the checkpoint's adapter (model=<checkpoint folder>, reference=...)."
            )
        if changed or rows != rows_before:
            remedy = (
                " The rows were made before the checkpoint was known: give it as "
                "DPOConfig(resume_from_checkpoint=...), and its date is used again."
                if DATE in changed
                else ""
            )
            if rows != rows_before:
                lines["rows"] = f"rows of an optimizer batch: {rows_before} before, {rows} now"
                remedy += _same_batch(rows_before, now)
            elif PROCESSES in changed and not args.disable_dropout:
                remedy += " Dropout draws other random numbers on another number of processes."
            logger.warning("Resuming with options that change the run: %s.%s", "; ".join(lines.values()), remedy)
        if not (folder / "optimizer.pt").is_file():
            raise CheckpointError(
                f"{folder} has no optimizer state: it was saved with save_only_model=True and can't be resumed. Start "
                "a new run from its adapter (model=<checkpoint folder>, reference=...)."
            )

    def _free(self, routers: bool) -> Sequence[str]:
        """Returns the options that only say how the rows of a step are split, and change it by rounding at most."""
        args = self.args
        if args.full_determinism:  # not by a bit, but gradients of other processes are summed in another order
            return (*_BATCH[:2], "max_tokens_per_microbatch")
        drawn = args.train_sampling_strategy == "random" and not args.accelerator_config.use_seedable_sampler
        if routers or drawn or args.dataloader_drop_last or not args.disable_dropout:
            return ()
        return (*_BATCH, "max_tokens_per_microbatch")

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Keeps other runs out of the folder. Raises an OptionError if one is there."""
        lock = one_writer("output_dir", self.run_dir, inside=True) if rank() == 0 else nullcontext()
        with lock, no_false_alarm():
            yield

    # ---- Reading and writing -------------------------------------------------------------------------------------

    def load(self, folder: Path) -> None:
        """Restores metrics and parts from a checkpoint."""
        state = _read(folder)
        for process, sums in enumerate(state["metrics"]):
            if process % world_size() == rank():
                self.metrics.load(sums)
        for part in self.parts:
            part.load_state_dict(state["extra"], folder)

    def save_checkpoint(self, trainer: Trainer) -> None:
        """Saves the run as `checkpoint-<step>`, whole or not at all; all processes must call it. Raises
        `CheckpointError` if it can't be written."""
        args, state = trainer.args, trainer.state
        step, run_dir = state.global_step, Path(args.output_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        trainer.store_flos()
        if step == state.best_global_step:
            state.best_model_checkpoint = str(run_dir / f"checkpoint-{step}")
        metrics = gather_over_processes(self.metrics.state())
        try:
            if args.should_save:
                checkpoints.staging_folder(run_dir, step)
            trainer.accelerator.wait_for_everyone()
            self.write_files(trainer, checkpoints.staged_checkpoint(run_dir, step), metrics)
            trainer.accelerator.wait_for_everyone()
            if args.should_save:
                checkpoints.commit(run_dir, step)
            self.saved_step = step
        # torch's and safetensors' ways to say that a disk is full are the last two.
        except (OSError, RuntimeError, SafetensorError) as error:
            checkpoints.discard(run_dir, step)
            raise CheckpointError(
                f"checkpoint-{step} can't be written: {error}. {self.remedy()} Free some space or mend the folder, "
                "then resume."
            ) from error
        if args.push_to_hub:
            trainer._push_from_checkpoint(str(run_dir / f"checkpoint-{step}"))
        if args.should_save:
            best = [Path(state.best_model_checkpoint)] if state.best_model_checkpoint else []
            checkpoints.rotate(run_dir, args.save_total_limit, [run_dir / f"checkpoint-{step}", *best])

    def write_files(self, trainer: Trainer, folder: Path, metrics: Sequence[Any]) -> None:
        """Writes all files of a checkpoint into a folder; `metrics` are the sums of each process."""
        trainer.save_model(str(folder), _internal_call=True)
        if not trainer.args.save_only_model:
            trainer._save_optimizer_and_scheduler(str(folder))
            trainer._save_scaler(str(folder))
            trainer._save_rng_state(str(folder))
        if not trainer.args.should_save:
            return
        states: dict[str, list[Any]] = {}
        for callback in [*trainer.callback_handler.callbacks, trainer.control]:
            if isinstance(callback, ExportableState):
                states.setdefault(type(callback).__name__, []).append(callback.state())
        trainer.state.stateful_callbacks = {name: of[0] if len(of) == 1 else of for name, of in states.items()}
        best = trainer.state.best_model_checkpoint
        trainer.state.best_model_checkpoint = best and Path(best).name  # the folder may be moved
        trainer.state.save_to_json(str(folder / TRAINER_STATE_NAME))
        trainer.state.best_model_checkpoint = best
        extra = {name: value for part in self.parts for name, value in part.state_dict(folder).items()}
        state = {"trajectory": self.trajectory(), "metrics": metrics, "extra": extra}
        write_atomically(folder / RUN_STATE, json.dumps(state, indent=1) + "\n")


def place_in_data(trainer: Trainer, counted: tuple[int, int], folder: str | None) -> tuple[int, int]:
    """Returns how many passes over the data a checkpoint (None: a new start) has behind it, and how many batches of
    the one under way. transformers has counted the same, but takes all steps of a run over a stream for one pass, as
    it doesn't know the length; the `epoch` that it saves has the passes before the point."""
    if folder is None or not isinstance(trainer.train_dataset, IterableDataset):
        return counted
    state = TrainerState.load_from_json(str(Path(folder, TRAINER_STATE_NAME)))
    passes, part = divmod(state.epoch or 0.0, 1)
    rows = part * state.max_steps * rows_of_a_step(_read(Path(folder))["trajectory"])
    batch = trainer.args.per_device_train_batch_size * world_size()
    return int(passes), 0 if trainer.args.ignore_data_skip else round(rows / batch)


def rows_of_a_step(trajectory: Mapping[str, Any]) -> int:
    """Returns the rows of an optimizer batch, all processes' together."""
    own = trajectory.get("rows of an optimizer batch, per process")  # up to 0.3, with full_determinism
    return trajectory[PROCESSES] * (own or trajectory[_BATCH[0]] * trajectory[_BATCH[1]])


def _same_batch(rows: int, now: Mapping[str, Any]) -> str:
    """Returns a sentence on how a step keeps its number of rows."""
    own, left = divmod(rows, now[PROCESSES])
    if left:
        return f" {rows} rows are no multiple of {now[PROCESSES]} processes: take a number of them that divides it."
    each = gcd(own, now[_BATCH[0]])
    return (
        f" To keep the batch on this number of processes ({now[PROCESSES]}): per_device_train_batch_size={each}, "
        f"gradient_accumulation_steps={own // each}."
    )


def save_adapter(trainer: Trainer, adapter: str, folder: Path) -> None:
    """Saves one adapter of the trainer's model, its tokenizer and its options, without the secrets in them."""
    trained = read_training(trainer.model.peft_config[adapter])
    resized = "auto" if trained is None or trained.vocabulary is None else True  # PEFT can't always tell
    trainer.model.save_pretrained(folder, selected_adapters=[adapter], save_embedding_layers=resized)
    if trained is not None and trained.base_changed:
        logger.warning(
            "%s names %r as its base, which differs from the model that was trained: %s.",
            *(folder, trainer.model.config._name_or_path, trained.base_changed),
        )
    tokenizer = trainer.tokenizer
    for name in [name for name in tokenizer.init_kwargs if SECRET.search(name)]:
        if name not in tokenizer.special_tokens_map:  # eos_token and the like
            del tokenizer.init_kwargs[name]
    trainer.processing_class.save_pretrained(folder)
    options = json.dumps(trainer.args.to_dict(), indent=1, default=str)
    (folder / "training_args.json").write_text(options + "\n")
    (folder / "training_args.bin").unlink(missing_ok=True)  # an earlier version's: a pickle, perhaps with a token


def _read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / RUN_STATE).read_text())
