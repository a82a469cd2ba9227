"""The command line: `dpo-peft train --config recipes/quickstart.yaml --beta 0.2`.

A YAML file holds any of the options; the command line overrides it. Each option belongs to one of three groups:
`DPOConfig` (training), `DataArguments` and `ModelArguments`.
"""

import json
import logging
import sys
import warnings
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass, field, fields
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import (
    CheckpointError,
    DataError,
    DriftError,
    NonFiniteError,
    OptionError,
    PublishError,
    ReferenceMismatchError,
)
from ..files import CONVERTERS, read_rows
from .options import (
    check_unknown,
    parser_text,
    read_config_file,
    refuse_instead_of_exit,
    required,
    show,
    split_config_word,
)

if TYPE_CHECKING:  # importing it takes seconds, which `dpo-peft help` should not
    from ..config import DPOConfig

USAGE = """usage: dpo-peft COMMAND [options]

  plan    predict memory from the model's config:  dpo-peft plan --config FILE.yaml --gpu 24GB
  pairs   sample answers and make preference pairs of them:  dpo-peft pairs MODEL --prompts FILE --output FILE
  train   train a LoRA adapter on preferences:  dpo-peft train --config FILE.yaml [--any_option value]
  score   judge answers by a trained adapter:  dpo-peft score ADAPTER --dataset_name FILE
  report  show runs as one HTML page:  dpo-peft report RUN [RUN ...]
  merge   put an adapter into its base:  dpo-peft merge ADAPTER --output_dir FOLDER
  push    publish an adapter with its card:  dpo-peft push ADAPTER --repo_id NAME/REPO
  cache   show or clear the reference's cached log-probs:  dpo-peft cache [--clear]

dpo-peft help COMMAND lists its options, with examples and exit codes; dpo-peft --version."""
EXAMPLES = [
    "dpo-peft train --config recipes/dpo_qlora_8b.yaml",
    "dpo-peft train --config recipes/dpo_qlora_8b.yaml --beta 0.2 --output_dir outputs/beta-0.2",
    "dpo-peft train --model_name_or_path Qwen/Qwen3-8B --dataset_name pairs.jsonl --output_dir outputs/run",
    "dpo-peft train --config FILE.yaml --resume_from_checkpoint latest",
    "dpo-peft train --config FILE.yaml --json > result.json",
]


@dataclass
class DataArguments:
    """Where the preference rows come from."""

    _argument_group_name = "data"  # the heading in the help
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

    _argument_group_name = "model and adapter"
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


@dataclass
class OutputArguments:
    """What is printed at the end."""

    _argument_group_name = "result"
    json: bool = field(
        default=False,
        metadata={"help": "Print the result as one JSON object on stdout, everything else on stderr."},
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit status is 0, or one of `cli_options.EXIT_CODES`."""
    command, *rest = [*(sys.argv[1:] if argv is None else argv)] or ["help"]
    if command == "help" and rest:
        command, rest = rest[0], ["--help"]
    if command in ("help", "-h", "--help"):
        print(USAGE)
        return 0
    if command == "--version":
        print(f"dpo-peft {_version()}")
        return 0
    here = {"train": train, "plan": plan}
    # Others lie in modules of their own, which are loaded when they are called.
    elsewhere = ("score", "pairs", "merge", "push", "report", "cache")
    if command not in (*here, *elsewhere):
        print(f"dpo-peft: {command!r} is not a command.\n\n{USAGE}", file=sys.stderr)
        return 2
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it asks for an optional kernel that isn't used here
    warnings.filterwarnings("ignore", category=FutureWarning)  # for those who write programs
    try:
        run = here[command] if command in here else getattr(import_module(f".{command}", __package__), command)
        run(rest)
    except (OptionError, DataError, ReferenceMismatchError, NonFiniteError, CheckpointError) as error:
        print(f"dpo-peft: {error}", file=sys.stderr)
        return 2
    except (DriftError, PublishError) as error:
        print(f"dpo-peft: {error}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:  # training saves a checkpoint first, and leaves as TrainingInterrupted
        print("dpo-peft: stopped.", file=sys.stderr)
        return 130
    return 0


def _version() -> str:
    try:
        return version("dpo-peft")
    except PackageNotFoundError:  # run from a checkout
        return "(not installed)"


def train(argv: Sequence[str]) -> Any:
    """`dpo-peft train`: read options and data, train, evaluate, save. Returns the trainer.

    Raises:
        OptionError, DataError, ReferenceMismatchError, NonFiniteError, CheckpointError: with the remedy.
        TrainingInterrupted: after a signal, with a checkpoint saved.
    """
    data, args, model, output = _parse(argv)
    # The logs of transformers.Trainer go to stdout.
    with redirect_stdout(sys.stderr) if output.json else nullcontext():
        trainer = build_trainer(data, args, model)
        seconds = trainer.train().metrics["train_runtime"]
        if trainer.eval_dataset is not None:
            trainer.evaluate()
        trainer.save_model()
    if trainer.is_world_process_zero():
        folder = Path(trainer.args.output_dir)
        result = {"output_dir": str(folder), "steps": trainer.state.global_step, "seconds": seconds}
        result |= _figures(folder)
        show(result, f"Adapter, model card, metrics.json and curves.png are in {folder}", output.json)
    return trainer


def _figures(folder: Path) -> dict[str, Any]:
    """Of a finished run: metrics at start and end, and the warnings that came up."""
    saved = json.loads((folder / "metrics.json").read_text("utf-8"))
    names = ("first", "last", "eval_first", "eval_last")
    return {**{name: saved[name] for name in names}, "warnings": saved.get("warnings", [])}


def plan(argv: Sequence[str]) -> None:
    """`dpo-peft plan`: what training would take of a GPU, see `cli_plan.plan`.

    Raises:
        OptionError: as `cli_plan.plan`.
    """
    from .plan import plan as print_plan

    print_plan(argv, (DataArguments, ModelArguments), read_config_file)


def build_trainer(data: DataArguments, args: "DPOConfig", model: ModelArguments) -> Any:
    """Load the data and build the `DPOTrainer` that the options describe."""
    from ..trainer import DPOTrainer  # after parsing: a typing error should not wait for the slowest imports

    train_dataset, eval_dataset = load_datasets(data, evaluate=args.eval_strategy != "no")
    args.model_init_kwargs = {"dtype": model.dtype, **(args.model_init_kwargs or {})}  # type: ignore[dict-item]
    if model.model_revision is not None:
        args.model_init_kwargs.setdefault("revision", model.model_revision)
    trainer = DPOTrainer(
        model=model.model_name_or_path,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        peft_config=lora_config(model, args),
    )
    groups = ((group, f) for group in (data, model) for f in fields(group))
    trainer.command_options = {f.name: value for group, f in groups if (value := getattr(group, f.name)) != f.default}
    return trainer


def parse(argv: Sequence[str]) -> tuple[DataArguments, "DPOConfig", ModelArguments]:
    """Options from the command line over those of `--config FILE.yaml`.

    Raises:
        OptionError: an unknown option, a value of the wrong type, a file that can't be read, or no model or dataset.
        SystemExit: `--help` was asked for and printed.
    """
    data, args, model, _ = _parse(argv)
    return data, args, model


def _parse(argv: Sequence[str]) -> tuple[DataArguments, "DPOConfig", ModelArguments, OutputArguments]:
    from trl import TrlParser

    from ..config import DPOConfig
    from ..config_checks import check_option_names

    argv = split_config_word(argv)
    groups = (DataArguments, ModelArguments, OutputArguments, DPOConfig)
    known = {f.name for group in groups for f in fields(group)}
    check_option_names(read_config_file(argv), known | {"env"})
    about = (
        "Train a LoRA adapter on preferences. Needed: model_name_or_path, dataset_name, output_dir.\n"
        "FILE.yaml holds options as `name: value` lines, the command line overrides it."
    )
    parser = TrlParser(groups, **parser_text("train", "--config FILE.yaml [--option value ...]", about, EXAMPLES))
    refuse_instead_of_exit(parser)
    data, model, output, args, unknown = parser.parse_args_and_config(argv, return_remaining_strings=True)
    check_unknown(unknown, lambda given: check_option_names(given, known))
    required(data, "dataset_name")
    required(model, "model_name_or_path")
    return data, args, model, output


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


def lora_config(model: ModelArguments, args: "DPOConfig") -> Any:
    """The adapter that the options describe; None if the model is an adapter, which goes on training.

    Raises:
        OptionError: `lora_dropout` without effect, or options of a new adapter for one that there is.
    """
    from peft import LoraConfig

    from ..model.loading import is_adapter

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
