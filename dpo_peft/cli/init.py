"""`dpo-peft init`: a short config file for a model, a data file and a GPU, to train by as it is."""

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import yaml
from datasets import Dataset

from ..conversion import convert
from ..data.formats import data_of
from ..errors import OptionError
from ..files import as_list, without_splits
from ..losses import find_objective
from ..planning.memory import GIB, RESERVE
from ..planning.run import DEFAULTS, Plan, plan
from ..training.arguments import load_tokenizer
from .measure import measure, sample
from .mixture import DataArguments, load_datasets
from .options import RowOptions, option, option_of, parse_options, required, show
from .recipes import write_new

EXAMPLES = (
    "dpo-peft init --model_name_or_path Qwen/Qwen3-8B --dataset_name pairs.jsonl --gpu 4090 --output run.yaml",
    "dpo-peft init --model_name_or_path ./model --dataset_name votes.csv > run.yaml",
    "dpo-peft init --from_file axolotl.yaml --output run.yaml",
    "dpo-peft init --model_name_or_path ./model --dataset_name votes.csv --gpu 24GB --json",
)
LOSSES = {"pairs": "sigmoid", "lists": "multi_negative", "singles": "kto", "unlabeled": ""}
WHAT = {"sigmoid": "DPO", "kto": "judged one by one", "multi_negative": "one best completion, several worse ones"}
LENGTHS = (256, 512, 1024, 1536, 2048)  # of max_length; rows beyond are cut


class Line(NamedTuple):
    """An option of the file, and why it is so."""

    name: str
    value: Any
    why: str = ""
    off: bool = False  # commented out: to choose


ON_CPU = [Line("dtype", "float32", "this machine has no GPU, and CPUs no fast bfloat16"), Line("bf16", False)]


@dataclass
class InitOptions:
    """For what the file is, and where it goes."""

    model_name_or_path: str = option("", "Hub id or folder of the base. Needed.")
    dataset_name: None | str | list[str] = option_of(RowOptions, "dataset_name")
    dataset_format: str | None = option_of(RowOptions, "dataset_format")
    column_map: list[str] | None = option_of(RowOptions, "column_map")
    gpu: str | None = option(None, "GPU to plan for, by name or size: RTX4090, H100, 24GB. Default: this machine's.")
    from_file: str | None = option(None, "Config of Axolotl or LLaMA-Factory to convert instead.")
    output: str | None = option(None, "The file; one that is there is not replaced. Default: it is printed.")
    json: bool = option(False, "Print the result as JSON.")


def init(argv: Sequence[str]) -> None:
    """Write a short YAML file to train by: the loss by the kind of rows, memory by the planner, learning rate and beta
    by what was measured (docs/from-trl.md)."""
    options = parse_options(argv, InitOptions, "init", init.__doc__, EXAMPLES)
    if options.from_file is not None:
        given = [f.name for f in fields(options) if f.name not in ("from_file", "output", "json")]
        if extra := [name for name in given if getattr(options, name)]:
            raise OptionError(f"{', '.join(extra)}: no effect, all is taken from {options.from_file}. Leave out.")
        text, unknown = convert(options.from_file)
        values = yaml.safe_load(text)
        told = [f"{options.output}: converted from {options.from_file}.", *(f"  {note}" for note in unknown)]
    else:
        required(options, "model_name_or_path", "dataset_name")
        lines, unknown = propose(options)
        text, values = as_yaml(options, lines, unknown), {one.name: one.value for one in lines if not one.off}
        told = [f"{options.output}: {len(values)} options.", *(f"  not known: {one}" for one in unknown)]
        told.append(f"Check it: dpo-peft train --config {options.output} --dry_run")
    if options.output is not None:
        write_new("output", options.output, text)
    shown = text.rstrip("\n") if options.output is None else "\n".join(told)
    show({"output": options.output, "options": values, "unknown": unknown}, shown, options.json)


def propose(options: InitOptions) -> tuple[list[Line], list[str]]:
    """Returns the options of a run, and sentences on what could not be known."""
    unknown: list[str] = []
    o = SimpleNamespace(**{**DEFAULTS, **vars(options), "max_length": LENGTHS[-1]})
    rows, evaluated, o.loss_type = _rows(o, unknown)
    summary = _measured(rows, o, unknown)
    number = None if rows is None else len(rows)
    found = {} if summary is None else sample(summary)
    longest = LENGTHS[2] if summary is None else summary.longest
    o.max_length = next((one for one in LENGTHS if one >= longest), LENGTHS[-1])
    batch = 8 if number is None or number < 2000 else 16
    epochs = 3 if number is not None and number < 2000 else 1
    planned, memory = _memory(o, options.gpu, found, batch, unknown)
    lines = [
        Line("model_name_or_path", options.model_name_or_path),
        Line("dataset_name", options.dataset_name, "" if number is None else f"{number:,} rows"),
    ]
    for name in ("dataset_format", "column_map"):
        lines += [Line(name, getattr(options, name))] if getattr(options, name) else []
    (loss,) = o.loss_type
    lines += [
        *evaluated,
        Line("output_dir", "outputs/run"),
        Line("loss_type", loss, WHAT[loss]),
        Line("beta", find_objective(loss).default_beta, "how strongly the policy is held to the reference"),
        Line("learning_rate", *_learning_rate(planned, number, batch, epochs)),
        Line("lr_scheduler_type", "cosine"),
        Line("warmup_steps", 0.1, "a share of the steps"),
        Line("num_train_epochs", epochs),
        Line("per_device_train_batch_size", batch, "rows of an optimizer step"),
        Line("max_length", o.max_length, f"the longest row has {longest:,} tokens" if summary is not None else ""),
        *[Line("truncation_mode", "trim_prompt", "a completion is never cut")] * (longest > o.max_length),
        Line("lora_r", o.lora_r),
        Line("lora_alpha", 2 * o.lora_r),
        *memory,
    ]
    if evaluated:
        lines += [Line("eval_strategy", "epoch"), Line("sample_prompts", 4, "completions before and after, to read")]
    return [*lines, Line("save_strategy", "epoch"), Line("logging_steps", 5), *_less(found, loss)], unknown


def _less(found: dict[str, int], loss: str) -> list[Line]:
    """Returns the options for adapters that act on less, which cost something and are for people to choose.

    What they save is counted by products with weights: three passes, and one where policy and reference are one.
    """
    if not found or not find_objective(loss).needs_reference:
        return []
    prompt, answers = found["prompt_tokens"], found["answers"] * found["answer_tokens"]
    times = 3 * (prompt + answers) / (prompt + 3 * answers)
    page = "by a step, see docs/adapters.md"
    lines = [Line("lora_layers_to_transform", 0.5, f"1.5 times less work, goes half as far {page}", True)]
    if times > 1.2:
        why = f"{times:.1f} times less work, goes less far {page}"
        lines.append(Line("adapter_scope", "completions", why, True))
    return lines


def _rows(o: Any, unknown: list[str]) -> tuple[Dataset | None, list[Line], list[str]]:
    """Returns the training rows, what to evaluate on, and the loss by their kind; no rows if the Hub can't be had."""
    given = {f.name: getattr(o, f.name, None) for f in fields(DataArguments)}
    data = DataArguments(**{name: value for name, value in given.items() if value is not None})
    try:
        rows, _ = load_datasets(data, False)
    except OptionError as error:
        if without_splits(o.dataset_name):
            raise
        unknown.append(f"kind and number of the rows, taken for pairs: {error}")
        return None, [], [LOSSES["pairs"]]
    kind = data_of(rows.column_names, rows[0])
    if not (loss := LOSSES[kind]):
        raise OptionError(
            f"dataset_name={o.dataset_name!r}: nobody judged its completions, so there is nothing to learn from. "
            "`dpo-peft pairs` judges and pairs completions."
        )
    evaluated = Line("eval_share", 0.1 if len(rows) < 5000 else 0.02, "of the rows, to evaluate on")
    with suppress(OptionError):  # there is no split
        if not without_splits(o.dataset_name):
            load_datasets(data, True)
            evaluated = Line("dataset_test_split", data.dataset_test_split, "to evaluate on")
    return rows, [evaluated], [loss]


def _measured(rows: Dataset | None, o: Any, unknown: list[str]) -> Any:
    try:
        tokenizer = load_tokenizer(o.model_name_or_path, o.model_init_kwargs, o.trust_remote_code)
    except OptionError as error:
        unknown.append(f"lengths of the rows, taken for {o.prompt_tokens} + 2 x {o.answer_tokens} tokens: {error}")
        return None
    return None if rows is None else measure(rows, tokenizer, o)


def _memory(
    o: Any, gpu: str | None, found: dict[str, int], batch: int, unknown: list[str]
) -> tuple[Plan | None, list[Line]]:
    """Returns a plan that fits, and the options that make it fit; `max_length` and `lora_r` of `o` may fall for it."""
    if gpu is None and torch.cuda.is_available():
        gpu = f"{torch.cuda.mem_get_info()[1] / GIB:.2f}GiB"
    known = {name: getattr(o, name) for name in DEFAULTS} | found
    known |= {"gpu": gpu, "per_device_train_batch_size": batch, "max_tokens_per_microbatch": "auto"}
    if gpu is None:
        unknown.append("the GPU: give --gpu to plan for one")
    try:
        for optim, rank in (("adamw_torch_fused", 16), ("adamw_8bit", 16), ("adamw_8bit", 8)):
            planned = plan(**known | {"optim": optim, "lora_r": rank})
            if gpu is None or planned.figures["step"]["fits"]:
                break
    except OptionError as error:
        if "can't be read" not in str(error) and "can't be predicted" not in str(error):
            raise
        unknown.append(f"the memory of the run: {error}")
        return None, [Line("max_tokens_per_microbatch", "auto", "packed to fit the GPU")] if gpu else ON_CPU
    if gpu is None:
        return planned, ON_CPU
    step, fits = planned.figures["step"], planned.figures["fits"]
    if not step["fits"]:
        raise OptionError(
            f"gpu={gpu!r}: a single row takes {step['peak'] / GIB:.2f} GiB, and there are "
            f"{planned.figures['gpu']['usable'] / GIB:.2f} for tensors. Give a larger GPU or a smaller model."
        )
    o.lora_r = rank
    if (longest := fits[-1]["longest_row"]) < o.max_length:
        o.max_length = max(longest // 64 * 64, 64)
    peak = f"packed to fit {gpu}: {(step['peak'] + RESERVE) / GIB:.1f} GiB at the peak, predicted"
    lines = [Line("max_tokens_per_microbatch", "auto", peak)]
    if optim != "adamw_torch_fused":
        lines.append(Line("optim", optim, "it would not fit otherwise"))
    return planned, lines


def _learning_rate(planned: Plan | None, rows: int | None, batch: int, epochs: int) -> tuple[float, str]:
    """Returns the learning rate by size of the model and length of the run, and where it is from."""
    size = None if planned is None else planned.figures["weights"]
    steps = None if rows is None else math.ceil(rows / batch) * epochs
    if size is not None and size < 1e9:
        return 1e-4, "small models take 5e-5 to 2e-4 (docs/from-trl.md)"
    if size is not None and size > 5e9 and steps is not None and steps > 1000:
        return 1e-5, "5e-6 to 1e-5 for long runs of large models (docs/from-trl.md)"
    return 2e-5, "the default for LoRA (docs/from-trl.md)"


def as_yaml(options: InitOptions, lines: Sequence[Line], unknown: Sequence[str]) -> str:
    """Returns the file's text."""
    names = " ".join(as_list(options.dataset_name))
    head = [f"Preference training of {options.model_name_or_path} on {names}.", *(f"Not known: {n}" for n in unknown)]
    head = [f"# {' '.join(line.split())}" for line in head]
    train = "dpo-peft train --config THIS_FILE"
    head += [f"# Check it:  {train} --dry_run", f"# Train:     {train}"]
    told = [(f"{'# ' * one.off}{one.name}: {_value(one.value)}", one.why) for one in lines]
    width = min(max(len(text) for text, why in told if why), 48)
    return "\n".join([*head, "", *(f"{text:<{width}}  # {why}" if why else text for text, why in told)]) + "\n"


def _value(value: Any) -> str:
    """Returns a value as YAML has it."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=math.inf)
    return text.removesuffix("\n").removesuffix("\n...")
