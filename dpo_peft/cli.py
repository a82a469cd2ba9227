"""The command line: `dpo-peft train --config recipes/quickstart.yaml --beta 0.2`.

A YAML file holds any of the options; the command line overrides it. Each option belongs to one of three groups:
`DPOConfig` (training), `DataArguments` and `ModelArguments`.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from importlib import import_module
from pathlib import Path
from typing import Any

from .cli_options import read_config_file
from .config import DPOConfig, check_option_names
from .errors import (
    CheckpointError,
    DataError,
    DriftError,
    NonFiniteError,
    OptionError,
    PublishError,
    ReferenceMismatchError,
)
from .files import CONVERTERS, read_rows

USAGE = """usage: dpo-peft COMMAND [options]

  plan    predict memory from the model's config:  dpo-peft plan --config FILE.yaml --gpu 24GB
  pairs   sample answers and make preference pairs of them:  dpo-peft pairs MODEL --prompts FILE --output FILE
  train   train a LoRA adapter on preferences:  dpo-peft train --config FILE.yaml [--any_option value]
  score   judge answers by a trained adapter:  dpo-peft score ADAPTER --dataset_name FILE
  report  show runs as one HTML page:  dpo-peft report RUN [RUN ...]
  merge   put an adapter into its base:  dpo-peft merge ADAPTER --output_dir FOLDER
  push    publish an adapter with its card:  dpo-peft push ADAPTER --repo_id NAME/REPO
  cache   show or clear the reference's cached log-probs:  dpo-peft cache [--clear]

dpo-peft COMMAND --help lists every option."""


@dataclass
class DataArguments:
    """Where the preference rows come from."""

    dataset_name: str = field(default="", metadata={"help": "Hub id, or a JSON(L), Parquet or CSV file."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str = field(default="test", metadata={"help": "Split to evaluate on, if evaluation is on."})
    eval_dataset_name: str | None = field(
        default=None, metadata={"help": "Hub id or file to evaluate on, if not a split of dataset_name."}
    )
    dataset_streaming: bool = field(default=False, metadata={"help": "Read rows as they come; needs max_steps."})
    dataset_format: str | None = field(
        default=None,
        metadata={"help": "Convert rows first.", "choices": list(CONVERTERS)},
    )


@dataclass
class ModelArguments:
    """Which model, and which adapter on it."""

    model_name_or_path: str = field(default="", metadata={"help": "Hub id or folder of the base model."})
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub model."})
    dtype: str = field(
        default="bfloat16",
        metadata={
            "help": "Dtype of what is not quantised, and of computing.",
            "choices": ["auto", "bfloat16", "float16", "float32"],
        },
    )
    lora_r: int = field(default=16, metadata={"help": "Rank."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale: the update is multiplied by lora_alpha / lora_r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout; needs disable_dropout false."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Modules that get an adapter. Default: all linear layers but the head."}
    )
    lora_modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules to train in full."})
    use_rslora: bool = field(default=False, metadata={"help": "Scale by lora_alpha / sqrt(lora_r)."})
    use_dora: bool = field(default=False, metadata={"help": "Weight-decomposed LoRA."})


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit status is 0, or one of `cli_options.EXIT_CODES`."""
    command, *rest = [*(sys.argv[1:] if argv is None else argv), ""]
    if command in ("", "-h", "--help"):
        print(USAGE)
        return 0
    commands = {"train": train, "plan": plan, "cache": cache}
    # Others lie in modules of their own, which are loaded when they are called.
    elsewhere = ("score", "pairs", "merge", "push", "report")
    if command not in (*commands, *elsewhere):
        print(f"dpo-peft: {command!r} is not a command.\n\n{USAGE}", file=sys.stderr)
        return 2
    try:
        if command in elsewhere:
            getattr(import_module(f".cli_{command}", __package__), command)(rest[:-1])
        else:
            commands[command](rest[:-1])
    except (OptionError, DataError, ReferenceMismatchError, NonFiniteError, CheckpointError) as error:
        print(f"dpo-peft: {error}", file=sys.stderr)
        return 2
    except (DriftError, PublishError) as error:
        print(f"dpo-peft: {error}", file=sys.stderr)
        return 3
    return 0


def train(argv: Sequence[str]) -> Any:
    """`dpo-peft train`: read options and data, train, evaluate, save. Returns the trainer.

    Raises:
        OptionError, DataError, ReferenceMismatchError, NonFiniteError, CheckpointError: with the remedy.
        TrainingInterrupted: after a signal, with a checkpoint saved.
    """
    trainer = build_trainer(*parse(argv))
    trainer.train()
    if trainer.eval_dataset is not None:
        trainer.evaluate()
    trainer.save_model()
    print(f"Adapter, model card, metrics.json and curves.png are in {trainer.args.output_dir}")
    return trainer


def plan(argv: Sequence[str]) -> None:
    """`dpo-peft plan`: what training would take of a GPU, see `cli_plan.plan`.

    Raises:
        OptionError: as `cli_plan.plan`.
    """
    from .cli_plan import plan as print_plan

    print_plan(argv, (DataArguments, ModelArguments), read_config_file)


def cache(argv: Sequence[str]) -> None:
    """`dpo-peft cache`: what is kept of which reference, or make room.

    Raises:
        OptionError: there is no such folder, or options that need --clear.
    """
    from .cache import clear, default_folder, summary

    parser = argparse.ArgumentParser(prog="dpo-peft cache", description="The reference's cached log-probs.")
    parser.add_argument("--dir", type=Path, default=default_folder(), help="folder (default: %(default)s)")
    parser.add_argument("--clear", action="store_true", help="delete entries: all, or those that the options name")
    parser.add_argument("--reference", help="with --clear: of this reference alone (its id)")
    parser.add_argument("--unused_days", type=float, help="with --clear: of references unused for so many days")
    options = parser.parse_args(argv)
    if not options.dir.is_dir():
        raise OptionError(f"--dir {options.dir}: there is no such folder.")
    if options.clear:
        entries, size = clear(options.dir, options.reference, options.unused_days)
        print(f"Deleted {entries:,} entries, {size / 1e6:,.1f} MB.")
        return
    if options.reference or options.unused_days is not None:
        raise OptionError("--reference and --unused_days have no effect without --clear.")
    for one in summary(options.dir):
        held = f"{one.entries:>9,} entries  {one.bytes / 1e6:>9,.1f} MB"
        print(f"{one.reference}  {held}  {one.last_used}  {one.about}")


def build_trainer(data: DataArguments, args: DPOConfig, model: ModelArguments) -> Any:
    """Load the data and build the `DPOTrainer` that the options describe."""
    from .trainer import DPOTrainer  # after parsing: a typing error should not wait for the slowest imports

    train_dataset, eval_dataset = load_datasets(data, evaluate=args.eval_strategy != "no")
    args.model_init_kwargs = {"dtype": model.dtype, **(args.model_init_kwargs or {})}  # type: ignore[dict-item]
    if model.model_revision is not None:
        args.model_init_kwargs.setdefault("revision", model.model_revision)
    return DPOTrainer(
        model=model.model_name_or_path,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        peft_config=lora_config(model, args),
    )


def parse(argv: Sequence[str]) -> tuple[DataArguments, DPOConfig, ModelArguments]:
    """Options from the command line over those of `--config FILE.yaml`.

    Raises:
        OptionError: an unknown option, a file that can't be read, or no model or dataset.
    """
    from trl import TrlParser

    argv = [part for word in argv for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    groups = (DataArguments, DPOConfig, ModelArguments)
    known = {f.name for group in groups for f in fields(group)}
    check_option_names(read_config_file(argv), known | {"env"})
    *parsed, unknown = TrlParser(groups, prog="dpo-peft train").parse_args_and_config(
        argv, return_remaining_strings=True
    )
    data, args, model = parsed
    words = zip(unknown, [*unknown[1:], ""], strict=False)
    named = {word[2:].split("=")[0]: value for word, value in words if word.startswith("--")}
    check_option_names(named, known)
    if unknown and not named:
        raise OptionError(f"{unknown[0]!r} belongs to no option: write --option value.")
    for group, name in ((data, "dataset_name"), (model, "model_name_or_path")):
        if not getattr(group, name):
            raise OptionError(f"{name} is missing: give it by --{name} or in the config file.")
    return data, args, model


def load_datasets(data: DataArguments, evaluate: bool) -> tuple[Any, Any]:
    """The training rows, and the evaluation rows if wanted.

    Raises:
        OptionError: no such file, split or dataset.
    """
    train_dataset = _load_rows(data.dataset_name, data.dataset_train_split, data)
    if not evaluate:
        if data.eval_dataset_name is not None:
            raise OptionError(
                "eval_dataset_name has no effect without evaluation: set eval_strategy, or leave it out."
            )
        return train_dataset, None
    if data.eval_dataset_name is None and Path(data.dataset_name).is_file():
        raise OptionError("eval_strategy is set, but a file has no test split: give eval_dataset_name.")
    eval_name = data.eval_dataset_name or data.dataset_name
    return train_dataset, _load_rows(eval_name, data.dataset_test_split, data)


def _load_rows(name: str, split: str, data: DataArguments) -> Any:
    return read_rows(name, split, data.dataset_config, data.dataset_streaming, data.dataset_format)


def lora_config(model: ModelArguments, args: DPOConfig) -> Any:
    """The adapter that the options describe; None if the model is an adapter, which goes on training.

    Raises:
        OptionError: `lora_dropout` without effect, or options of a new adapter for one that there is.
    """
    from peft import LoraConfig

    from .modeling import is_adapter

    if is_adapter(model.model_name_or_path, revision=model.model_revision):
        of_new = [f for f in fields(model) if f.name.startswith(("lora_", "use_"))]
        if given := [f.name for f in of_new if getattr(model, f.name) != f.default]:
            raise OptionError(
                f"{', '.join(given)}: no effect, {model.model_name_or_path} is an adapter and keeps its own. Leave "
                "out, or give its base model for a new adapter."
            )
        return None
    if model.lora_dropout and args.disable_dropout:
        raise OptionError("lora_dropout has no effect while disable_dropout is true: set disable_dropout to false.")
    return LoraConfig(
        r=model.lora_r,
        lora_alpha=model.lora_alpha,
        lora_dropout=model.lora_dropout,
        target_modules=model.lora_target_modules or "all-linear",
        modules_to_save=model.lora_modules_to_save,
        use_rslora=model.use_rslora,
        use_dora=model.use_dora,
        task_type="CAUSAL_LM",
    )


if __name__ == "__main__":
    sys.exit(main())
