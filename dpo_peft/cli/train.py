"""`dpo-peft train --config FILE.yaml --beta 0.2`: options and data in, a trained adapter out.

A YAML file holds any of the options; the command line overrides it. Each option belongs to one of three groups:
`DPOConfig` (training), `DataArguments` and `ModelArguments`.
"""

import argparse
import json
import logging
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..disk import one_writer
from ..errors import CheckpointError, OptionError
from ..files import as_list
from .launch import LaunchArguments, job
from .mixture import DataArguments, load_datasets
from .options import known, made, option, parse_groups, required, show

if TYPE_CHECKING:  # importing them takes seconds, which a help should not
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig

    from ..config import DPOConfig
    from ..trainer import DPOTrainer

logger = logging.getLogger(__name__)
EVAL_STEPS = 0.25  # of the run, with eval_share alone
EXAMPLES = [
    "dpo-peft train --config dpo_qlora_8b",
    "dpo-peft train --config dpo_qlora_8b --beta 0.2 --output_dir outputs/beta-0.2",
    "dpo-peft train --model_name_or_path Qwen/Qwen3-8B --dataset_name pairs.jsonl --output_dir outputs/run",
    "dpo-peft train --config FILE.yaml --resume_from_checkpoint latest",
    "dpo-peft train --config FILE.yaml --num_processes 2 --json > result.json",
]


@dataclass
class ModelArguments:
    """Which model, and which adapter on it."""

    model_name_or_path: str = option("", "Base or adapter, a folder or Hub id. Needed.")
    model_revision: str | None = option(None, "Branch, tag or commit of a Hub model.")
    dtype: str = option(
        "bfloat16", "To compute in, and of what is not quantized.", choices=["auto", "bfloat16", "float16", "float32"]
    )
    lora_r: int = option(16, "Rank.")
    lora_alpha: int = option(32, "Scale of the update, times 1 / lora_r.")
    lora_dropout: float = option(0.0, "Dropout; needs disable_dropout false.")
    lora_target_modules: list[str] | None = option(None, "Names, one pattern, or all-linear, the default.")
    lora_target_parameters: list[str] | None = option(None, "Parameters that get an adapter, such as fused experts'.")
    lora_modules_to_save: list[str] | None = option(None, "Modules to train in full.")
    lora_layers_to_transform: None | str | list[str] = option(
        None, "Layers that get an adapter: numbers, ranges as 16-31, or a share as 0.5, the upper half. Default: all."
    )
    adapter_scope: str = option(
        "all", "Acts on all tokens, or on completions, leaving prompts to the base.", choices=["all", "completions"]
    )
    adapter_invocation: str | None = option(
        None, "adapter_scope completions: the text before each completion, if not the chat template's."
    )
    lora_task_type: str = option("CAUSAL_LM", "The only one.", choices=["CAUSAL_LM"])
    use_peft: bool | None = option(None, "An adapter is trained in any case.", nargs="?", const=True)
    use_rslora: bool = option(False, "Scale by lora_alpha / sqrt(lora_r).")
    use_dora: bool = option(False, "Weight-decomposed LoRA.")
    attn_implementation: str | None = option(None, "Attention, where the trainer has none of its own.")
    load_in_4bit: bool | None = option(
        None, "Quantize as the bnb_ options say. Default: NF4, nested; false: not quantized.", nargs="?", const=True
    )
    load_in_8bit: bool = option(False, "Load the base in 8 bits.")
    bnb_4bit_quant_type: str = option("nf4", "load_in_4bit: its type.", choices=["nf4", "fp4"])
    use_bnb_nested_quant: bool = option(False, "load_in_4bit: quantize the constants of the quantization too.")
    bnb_4bit_quant_storage: str | None = option(None, "load_in_4bit: uint8, or nothing.", choices=["uint8"])


@dataclass
class OutputArguments:
    """What is printed at the end."""

    dry_run: bool = option(False, "Check everything that needs no weights, say what the run would do, and stop.")
    json: bool = option(False, "Print the result as one JSON object on stdout, everything else on stderr.")


def train(argv: Sequence[str]) -> "DPOTrainer | None":
    """Train a LoRA adapter on preferences. Needed: model_name_or_path and dataset_name. `dpo-peft init` writes a
    FILE.yaml, --dry_run checks it."""
    started = job(argv)
    if started is not None and not started.dry_run:
        if not known("train", argv):
            _options(argv)  # which takes seconds, and says what is wrong with them
        started.run(argv)
        return None
    data, args, model, output = _parse(argv)
    if output.dry_run:
        from .dry_run import dry_run

        with _claimed(args):
            processes = started.processes if started is not None else args.world_size
            show(*dry_run(args, model, inputs_of(data, args, model), processes), output.json)
        return None
    from ..evaluation.log_file import SHOWN  # after parsing: these take seconds
    from . import COMMANDS
    from .closing import closing, evaluated

    bars = nullcontext() if sys.stderr.isatty() and not args.disable_tqdm else without_bars()
    # The logs of transformers.Trainer go to stdout.
    with redirect_stdout(sys.stderr) if output.json else nullcontext(), bars, _claimed(args):
        trainer = build_trainer(data, args, model)
        if not (data.dataset_streaming or data.streaming):  # whose rows are counted as they are read
            logger.info("The first row as it is trained on:\n%s", first_row(trainer))
        seconds = trainer.train().metrics["train_runtime"]
        if trainer.eval_dataset is not None and not evaluated(trainer):
            trainer.evaluate()
        try:
            trainer.save_model()
        except CheckpointError as error:
            raise CheckpointError(f"{error} {_rescued(trainer)}") from error
    if trainer.is_world_process_zero():
        folder = Path(trainer.args.output_dir)
        result = {"output_dir": str(folder), "steps": trainer.state.global_step, "seconds": seconds}
        saved = json.loads((folder / "metrics.json").read_text("utf-8"))
        result |= {name: saved[name] for name in ("first", "last", "eval_first", "eval_last")}
        result |= {"warnings": saved.get("warnings", []), "verdict": saved["verdict"]}
        text = closing(trainer, saved, COMMANDS)
        SHOWN.info("%s", text)
        show(result, f"\n{text}", output.json)
    return trainer


def first_row(trainer: "DPOTrainer") -> str:
    """Returns the first training row as `dpo-peft data` shows it, shortened."""
    from ..preview import render_row

    first = next(iter(trainer.train_dataset))
    lines = render_row(first, trainer.tokenizer, most_lines=4, images=trainer.images).splitlines()
    return "\n".join([*lines[:12], *(["… (dpo-peft data shows all)"] if len(lines) > 12 else [])])


@contextmanager
def without_bars() -> Iterator[None]:
    """Turns off the bars of other libraries, such as those of loading weights and of mapping rows."""
    import datasets
    from transformers.utils import logging

    shown = not datasets.are_progress_bars_disabled()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
            datasets.enable_progress_bars()


@contextmanager
def _claimed(args: "DPOConfig") -> Iterator[None]:
    """Keeps the output folder to this job, from before data and model are loaded to the end; an OptionError where it
    can't be written to, another process writes there, or it holds a finished run."""
    from ..training.results import asks_to_resume, check_new_run

    if os.environ.get("RANK", "0") != "0":
        yield
        return
    folder = Path(str(args.output_dir))
    with one_writer("output_dir", folder, inside=True):
        if not asks_to_resume(args.resume_from_checkpoint) or not any(folder.glob("checkpoint-*")):
            check_new_run(args)
        yield


def _rescued(trainer: "DPOTrainer") -> str:
    """Saves the adapter among the temporary files, as it would end with the process. Returns a sentence on that."""
    from ..training.results import save_result

    folder = tempfile.mkdtemp(prefix="dpo-peft-")
    try:
        save_result(trainer, folder)
    except CheckpointError:
        return f"It could not be saved in {folder} either."
    return f"Meanwhile it is in {folder}."


def build_trainer(data: DataArguments, args: "DPOConfig", model: ModelArguments) -> "DPOTrainer":
    """Loads the data and builds the `DPOTrainer` that the options describe."""
    from ..trainer import DPOTrainer  # after parsing: a typing error should not wait for the slowest imports

    trainer = DPOTrainer(**inputs_of(data, args, model))
    groups = ((group, f) for group in (data, model) for f in fields(group))
    trainer.command_options = {f.name: value for group, f in groups if (value := getattr(group, f.name)) != f.default}
    return trainer


def inputs_of(data: DataArguments, args: "DPOConfig", model: ModelArguments) -> dict[str, Any]:
    """Loads the data and returns the arguments of `DPOTrainer`."""
    train_dataset, eval_dataset = load_datasets(data, args.eval_strategy != "no", args.seed)
    args.model_init_kwargs = {"dtype": model.dtype, **(args.model_init_kwargs or {})}  # type: ignore[dict-item]
    for name, value in {"revision": model.model_revision, "attn_implementation": model.attn_implementation}.items():
        if value is not None:
            args.model_init_kwargs.setdefault(name, value)
    return {
        "model": model.model_name_or_path,
        "args": args,
        "train_dataset": train_dataset,
        "eval_dataset": eval_dataset,
        "quantization_config": quantization(model, args),
        "peft_config": lora_config(model, args),
    }


def parse(argv: Sequence[str]) -> tuple[DataArguments, "DPOConfig", ModelArguments]:
    """Returns options from the command line over those of `--config FILE.yaml`. Raises as `parse_groups` does, and
    where there is no model or dataset."""
    return _parse(argv)[:3]


def _parse(argv: Sequence[str]) -> tuple[DataArguments, "DPOConfig", ModelArguments, OutputArguments]:
    from ..config import DPOConfig

    options = _options(argv)
    required(options, *([] if options.datasets else ["dataset_name"]), "model_name_or_path")
    if options.eval_share is not None and str(options.eval_strategy) == "no":
        options.eval_strategy, options.eval_steps = "steps", options.eval_steps or EVAL_STEPS
        logger.info("eval_share: evaluation is on (eval_strategy steps, eval_steps %g).", options.eval_steps)
    data, args = made(DataArguments, options), made(DPOConfig, options)
    return data, args, made(ModelArguments, options), made(OutputArguments, options)


def _options(argv: Sequence[str]) -> argparse.Namespace:
    from ..config import DPOConfig

    groups = (DataArguments, ModelArguments, OutputArguments, LaunchArguments, DPOConfig)
    usage = "--config FILE.yaml [--option value ...]"
    return parse_groups(argv, groups, "train", usage, train.__doc__, EXAMPLES)[0]


def quantization(model: ModelArguments, args: "DPOConfig") -> "BitsAndBytesConfig | None":
    """Returns how the options of TRL have the base quantized; None for `quantize_base`, which they may switch off. An
    OptionError where options contradict each other, or have no effect."""
    from transformers import BitsAndBytesConfig

    if model.load_in_4bit and model.load_in_8bit:
        raise OptionError("load_in_4bit and load_in_8bit are given: give one of them.")
    if not model.load_in_4bit:
        names = ("bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage")
        if given := [f.name for f in fields(model) if f.name in names and getattr(model, f.name) != f.default]:
            raise OptionError(f"{', '.join(given)}: no effect without load_in_4bit. Set it too, or leave out.")
    base, wanted = args.quantize_base, model.load_in_4bit
    if base is not None and (model.load_in_8bit or wanted not in (None, base)):
        raise OptionError("quantize_base contradicts load_in_4bit or load_in_8bit: give one of them.")
    if model.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    if not model.load_in_4bit:
        args.quantize_base = base if wanted is None else False
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=model.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=model.use_bnb_nested_quant,
        bnb_4bit_compute_dtype="bfloat16" if model.dtype == "auto" else model.dtype,
    )


def lora_config(model: ModelArguments, args: "DPOConfig") -> "LoraConfig | None":
    """Returns the adapter that the options describe; None if the model is an adapter, which is trained on. An
    OptionError for `lora_dropout` without effect, or options of a new adapter for one that there is."""
    from peft import LoraConfig

    from ..model.adapters import is_adapter

    if model.use_peft is False:
        raise OptionError(
            "use_peft=False asks to train the whole model, which is not offered: an adapter is trained, and the base "
            "below it is the reference. Set use_peft to true, or leave it out."
        )
    if is_adapter(model.model_name_or_path, revision=model.model_revision):
        of_new = [f for f in fields(model) if f.name.startswith(("lora_", "use_rslora", "use_dora", "adapter_"))]
        if given := [f.name for f in of_new if getattr(model, f.name) != f.default]:
            raise OptionError(
                f"{', '.join(given)}: no effect, {model.model_name_or_path} is an adapter and keeps its own. Leave "
                "out, or give its base model for a new adapter."
            )
        return None
    # With use_peft the options are those of a file for TRL, where the dropout is turned off without a word.
    if model.lora_dropout and args.disable_dropout and not model.use_peft:
        raise OptionError("lora_dropout has no effect while disable_dropout is true: set disable_dropout to false.")
    config = LoraConfig(
        r=model.lora_r,
        lora_alpha=model.lora_alpha,
        lora_dropout=model.lora_dropout,
        target_modules=target_modules(model.lora_target_modules) or "all-linear",
        target_parameters=model.lora_target_parameters,
        modules_to_save=model.lora_modules_to_save,
        use_rslora=model.use_rslora,
        use_dora=model.use_dora,
        task_type="CAUSAL_LM",
    )
    return _scoped(config, model, args)


def _scoped(config: "LoraConfig", model: ModelArguments, args: "DPOConfig") -> "LoraConfig":
    """Puts the layers that the adapter is on into its config, and the tokens that it acts from."""
    from ..data import answer_only
    from ..model.base import base_config
    from ..model.scope import check_layers, layer_numbers
    from ..training.arguments import load_tokenizer

    name, kwargs = model.model_name_or_path, args.model_init_kwargs
    if model.lora_layers_to_transform is not None:
        shape = base_config(name, kwargs, args.trust_remote_code).get_text_config(decoder=True)
        # PEFT takes it beside names alone, which "all-linear" becomes once the model is there.
        config.layers_to_transform = layer_numbers(model.lora_layers_to_transform, shape.num_hidden_layers)
        check_layers(config, shape.num_hidden_layers)
    if model.adapter_scope == "completions":
        tokenizer = load_tokenizer(name, kwargs, args.trust_remote_code)
        config.alora_invocation_tokens = answer_only(tokenizer, model.adapter_invocation)
        logger.info("The adapter acts from %r on.", tokenizer.decode(config.alora_invocation_tokens))
    elif model.adapter_invocation is not None:
        raise OptionError("adapter_invocation: no effect with adapter_scope all. Set completions, or leave it out.")
    return config


def target_modules(given: "None | str | list[str]") -> "None | str | list[str]":
    """Returns what PEFT takes: a list of names, or as text "all-linear" or a pattern of whole names. An OptionError
    for several values of which one is no name: PEFT would look for modules that are called like it."""
    names = as_list(given)
    others = [name for name in names if name == "all-linear" or not re.fullmatch(r"[\w.]+", name)]
    if not others:
        return names or None
    if len(names) > 1:
        raise OptionError(
            f"lora_target_modules: {others[0]!r} stands alone, beside no other value. Join patterns by |: "
            "'.*q_proj|.*v_proj'."
        )
    return others[0]
