"""`dpo-peft data FILE`: looks at preference rows before anything heavy is loaded, and shows how they are trained."""

import os
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from ..config import DPOConfig
from ..errors import OptionError, StrictError
from ..files import as_list
from ..preview import look
from ..preview.advice import advise, leak_advice, named
from ..preview.reading import SIDES
from ..rowfiles import find_files
from .crossfit import CrossFitArguments, advise_labels, asked_for, check, describe_labels
from .crossfit import run as cross_fit
from .launch import LaunchArguments
from .mixture import DataArguments, load_datasets
from .options import made, option, option_of, parse_groups, printable, required, show
from .train import ModelArguments, OutputArguments

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from ..data.images import Images

EXAMPLES = [
    "dpo-peft data pairs.jsonl",
    "dpo-peft data pairs.jsonl --model_name_or_path Qwen/Qwen3-8B --rows 5",
    "dpo-peft data train.jsonl --eval_dataset_name test.jsonl --strict",
    "dpo-peft data --config recipes/dpo_qlora_8b.yaml --color always | less -R",
    "dpo-peft data votes.csv --dataset_format pandalm --json",
    "dpo-peft data --config FILE.yaml --cross_fit 3 --keep_easiest 0.6 --output_dir audit",
]
OF_STREAM = 10_000  # rows that are looked at
MOST_LINES = 16  # of a prompt or a completion, on a terminal
LEVELS = {"mean": "mean", "median": "median", "p90": "90 %", "p99": "99 %", "max": "longest"}


@dataclass
class LookArguments:
    """What is looked at, and how it is shown."""

    _argument_group_name = "the look"
    rows: int = option(2, "How many of the first rows to show.")
    color: str = option(
        "auto", "Colors; auto: on a terminal, if NO_COLOR is not set.", choices=["auto", "always", "never"]
    )
    strict: bool = option(False, "Exit with 3 if something is to be acted on.")
    json: bool = option(False, "Print the result as JSON.")


@dataclass
class Written:
    """Where folds leave what they find."""

    _argument_group_name = CrossFitArguments._argument_group_name
    output_dir: str | None = option(None, "With cross_fit: folder of difficulty.jsonl and easiest.jsonl.")


@dataclass
class TrainedAs:
    """Options of training that decide what becomes of rows."""

    _argument_group_name = "as they will be trained"
    model_name_or_path: str = option(
        "", "Hub id or folder of a model or an adapter: its tokenizer is used. Without one, texts are looked at."
    )
    model_revision: str | None = option_of(ModelArguments, "model_revision")
    trust_remote_code: bool = option_of(DPOConfig, "trust_remote_code")
    loss_type: list[str] | None = option(None, "As for training. Default: one that the rows suit.")
    max_length: int | None = option_of(DPOConfig, "max_length")
    truncation_mode: str = option_of(DPOConfig, "truncation_mode")
    unneeded_columns: list[str] | None = option_of(DPOConfig, "unneeded_columns")
    unpair_preferences: bool = option_of(DPOConfig, "unpair_preferences")
    discount_unit: str = option_of(DPOConfig, "discount_unit")
    as_chat: bool | None = option_of(DPOConfig, "as_chat")
    on_unusable: str = option_of(DPOConfig, "on_unusable")
    max_unusable_share: float = option_of(DPOConfig, "max_unusable_share")
    dataset_num_proc: int | None = option_of(DPOConfig, "dataset_num_proc")
    eval_strategy: str = option("no", "Evaluation while training: other than no, the test rows are looked at too.")
    seed: int = option(42, "Of the rows that are held out.")


def data(argv: Sequence[str]) -> None:
    """Look at preference rows before training: format, lengths, repeats, bias, and how they will be trained."""
    words = list(argv)
    if words and not words[0].startswith("-"):
        words = ["--dataset_name", *words]
    groups: list[type] = [LookArguments, CrossFitArguments, DataArguments, TrainedAs, Written]
    unread: list[type] = [ModelArguments, OutputArguments, LaunchArguments, DPOConfig]
    if crossed := asked_for(words):
        groups, unread = [*groups[:3], ModelArguments, DPOConfig], unread[1:3]
    usage = "[DATASET_NAME] [--config FILE.yaml] [--option value ...]"
    options, of_file = parse_groups(words, groups, "data", usage, data.__doc__, EXAMPLES, unread)
    required(options, *([] if options.datasets else ["dataset_name"]))
    asked, trained = made(LookArguments, options), made(TrainedAs, options)
    if asked.rows < 0:
        raise OptionError(f"rows={asked.rows} must be 0 or more.")
    if crossed:
        check(options)
    elif (
        options.keep_easiest is not None
        or options.cross_fit_repeats != CrossFitArguments.cross_fit_repeats
        or options.output_dir != of_file.get("output_dir")  # a file's is that of the training
    ):
        raise OptionError(
            "keep_easiest, cross_fit_repeats, output_dir: no effect without cross_fit. Give it, such as 3."
        )
    result, shown = run(made(DataArguments, options), trained, asked)
    if crossed:
        result["labels"] = cross_fit(options)
        result["to_do"] += advise_labels(result["labels"])
    if asked.json:
        show(result, "", as_json=True)
    else:
        text = printable(describe(result, columns()))
        tokens = "⏎ ends a line, control tokens are purple or in ⟦ ⟧"
        title = f"First rows as they will be trained ({tokens})" if result["tokenizer"] else "First rows as text"
        print("\n\n".join([text, *([title] if shown else []), *shown, printable(_to_do(result["to_do"], columns()))]))
    if asked.strict and result["to_do"]:
        raise StrictError(f"--strict: {len(result['to_do'])} things are to be acted on.")


def run(data: DataArguments, trained: TrainedAs, asked: LookArguments) -> tuple[dict[str, Any], list[str]]:
    """Returns the result of the command, and the first rows rendered."""
    evaluate = trained.eval_strategy not in ("no", False) or bool(data.eval_dataset_name or data.held_out)
    train, evaluation = load_datasets(data, evaluate, trained.seed)
    sets: dict[str, Any] = {"train": train}
    if evaluation is not None:
        named = evaluation.items() if isinstance(evaluation, dict) else [("", evaluation)]
        sets |= {f"eval_{name}" if name else "eval": rows for name, rows in named}
    tables = {name: _first_of_stream(rows) for name, rows in sets.items()}
    options, to_do = _as_objective(trained, tables["train"])
    tokenizer, options["images"], stop_tokens = _tokenizer(trained, tables["train"])
    looks = {name: look(rows, tokenizer, name, stop_tokens, **options) for name, rows in tables.items()}
    for name, one in looks.items():
        found = [*one.stops, *advise(one.facts, trained.max_unusable_share)]
        to_do += found if name == "train" else [f"{name}: {sentence}" for sentence in found]
    leaks = {name: looks["train"].leak(one) for name, one in looks.items() if name != "train"}
    to_do += [sentence for name, leak in leaks.items() for sentence in leak_advice(leak, name)]
    parts = {name: load_datasets(part, False)[0] for name, part in _parts(data).items()}
    files = [look(_first_of_stream(rows), None, name, **options).facts for name, rows in parts.items()]
    color = asked.color == "always" or asked.color == "auto" and sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    most = MOST_LINES if sys.stdout.isatty() else None
    shown = looks["train"].rendered(asked.rows, columns(), color and not asked.json, most)
    names = ", ".join(as_list(data.dataset_name)) or f"a mixture of {len(data.datasets or ())}"
    facts = {name: one.facts for name, one in looks.items()}
    result: dict[str, Any] = {"dataset": names, "sets": facts, "files": files, "leaks": leaks, "to_do": to_do}
    result |= {"tokenizer": trained.model_name_or_path or None, "first_rows": shown}
    return result, shown


def columns() -> int:
    """Returns the width to print at: the terminal's, or what COLUMNS says, or 100."""
    return shutil.get_terminal_size((100, 24)).columns


def _first_of_stream(rows: Any) -> "Dataset":
    from datasets import Dataset

    return rows if isinstance(rows, Dataset) else Dataset.from_list(list(islice(rows, OF_STREAM)))


def _parts(data: DataArguments) -> dict[str, DataArguments]:
    """Returns the files, datasets or parts of a mixture, each to be read by itself, if there are several."""
    alone = replace(data, eval_dataset_name=None, test_split_size=None, eval_share=None, dataset_weights=None)
    if data.datasets:
        each = enumerate(data.datasets, 1)
        parts = {f"part {number}, {part.get('path')}": replace(alone, datasets=[part]) for number, part in each}
    else:
        files = [(name, find_files(name)) for name in as_list(data.dataset_name)]
        names = [name for given, found in files for name in (map(str, found) if found else [given])]
        parts = {name: replace(alone, dataset_name=name) for name in names}
    return parts if len(parts) > 1 else {}


def _as_objective(trained: TrainedAs, rows: "Dataset") -> tuple[dict[str, Any], list[str]]:
    """Returns the options of `look`, and what to do where no objective is given and the default's doesn't suit."""
    from ..config_checks import check_loss_type
    from ..data.formats import LISTS, SINGLES, SUITS, find_completions
    from ..data.reading import find_reading
    from ..objective import TrainingObjective
    from ..training.building import row_options

    kind = "pairs"
    if trained.loss_type is None and len(rows):
        _, first = find_reading("train", rows.column_names, [rows[0]])
        suits = SUITS[find_completions(set(first), first)[1]]
        kind = kind if kind in suits else suits[0]
    losses = as_list(trained.loss_type) or {"lists": ["plackett_luce"], "singles": ["kto"]}.get(kind, ["sigmoid"])
    check_loss_type(losses, None)
    options = row_options(trained, TrainingObjective(losses))
    options |= {"unneeded_columns": as_list(trained.unneeded_columns), "num_proc": trained.dataset_num_proc}
    if kind == "unlabeled":
        options |= {"data": kind, "label_columns": ()}
    return options, {
        "lists": [f"These are lists of completions: training on them needs {LISTS}."],
        "singles": [f"These are judged completions: training on them needs {SINGLES}."],
        "unlabeled": ["Nobody judged these completions: they can be scored, but not trained on."],
    }.get(kind, [])


def _tokenizer(
    trained: TrainedAs, rows: "Dataset"
) -> "tuple[PreTrainedTokenizerBase | None, Images | None, list[int]]":
    """Returns the model's tokenizer, its processor if rows have images, and what ends a completion."""
    if not trained.model_name_or_path:
        return None, None, []
    from ..data.images import Images
    from ..model.adapters import is_adapter, read_config
    from ..preview.template import stop_tokens
    from ..training.arguments import hold_images, load_processor, load_tokenizer

    name, revision = trained.model_name_or_path, trained.model_revision
    where = name, {"revision": revision}, trained.trust_remote_code
    images = Images(load_processor(*where)) if hold_images(rows) else None
    tokenizer = load_tokenizer(*where) if images is None else images.tokenizer
    base = (
        read_config(name, revision=revision).base_model_name_or_path if is_adapter(name, revision=revision) else name
    )
    return tokenizer, images, stop_tokens(base or name, tokenizer)


# ---- For people -----------------------------------------------------------------------------------------------------


def describe(result: Mapping[str, Any], width: int) -> str:
    """Returns what was found as text."""
    sections = []
    for name, facts in result["sets"].items():
        title = f"{result['dataset'] if name == 'train' else name}: "
        sections.append(_rows(facts, title, width))
        if name == "train" and result["files"]:
            sections += [_rows(one, f"{one['name']}: ", width) for one in result["files"]]
        sections += [_lengths(facts, result["tokenizer"])] if facts["lengths"] else []
        sections += [_repeats(facts["repeats"])]
        sections += [_bias(facts)] if facts["bias"] and name == "train" else []
    if template := result["sets"]["train"]["template"]:
        sections.append(_template(template, width))
    for name, leak in result["leaks"].items():
        for what in "prompts", "rows":
            if texts := _texts(leak[f"near_{what}"]):
                sections.append("\n".join([f"Nearly the same {what} in {name} (above) and in training", *texts]))
    sections += [describe_labels(result["labels"])] if "labels" in result else []
    return "\n\n".join(sections)


def _rows(facts: Mapping[str, Any], title: str, width: int) -> str:
    """Returns what was read, and which rows can't be used."""
    read, unread = (", ".join(facts["columns"][name]) for name in ("read", "unread"))
    lines = [f"{title}{facts['rows']:,} rows, {facts['usable']:,} usable: {facts['data']} ({facts['format']} format)"]
    lines += ["  texts go into the chat template as turns (as_chat)"] if facts["as_chat"] else []
    lines += [f"  columns read: {read}", *([f"  not read, left aside: {unread}"] if unread else [])]
    if found := facts["images"]:
        tokens = "" if found["tokens"] is None else f", {found['tokens']:,} of the prompts' tokens"
        most = f" (at most {found['most_of_a_row']:,})" if found["most_of_a_row"] > 1 else ""
        lines.append(f"  {found['images']:,} images in {found['rows']:,} rows{most}{tokens}")
    for reason, found in facts["unusable"].items():
        lines.append(f"  {found['rows']:,} {reason}, {found['meaning']} ({named(found)})")
    return _wrapped(lines, width, "    ")


def _lengths(facts: Mapping[str, Any], tokenizer: str | None) -> str:
    lengths, tokens = facts["lengths"], facts["tokens"]
    hint = "" if lengths["unit"] == "tokens" else " (tokens: give --model_name_or_path)"
    lines = [f"Lengths in {lengths['unit']}{hint}", f"{'':<16}" + "".join(f"{name:>9}" for name in LEVELS.values())]
    for side, found in lengths.items():
        if side != "unit":
            lines.append(f"  {side:<14}" + "".join(f"{found[level]:>9,.0f}" for level in LEVELS))
    if tokens:
        limit = "no max_length" if tokens["max_length"] is None else f"max_length {tokens['max_length']:,}"
        cut = f"{tokens['rows_truncated']:,} rows cut ({tokens['truncation_mode']}), {tokens['ends_lost']:,} ends lost"
        lines += [
            f"  {tokens['total_tokens']:,} tokens in all, {tokens['unshared_tokens']:,} with prompts repeated",
            f"  {limit}: {cut}",
        ]
    return "\n".join(lines)


def _repeats(found: Mapping[str, Any]) -> str:
    share, most = found["rows_that_share_a_prompt"], found["most_rows_of_a_prompt"]
    lines = [f"Prompts: {found['prompts']:,} different ones" + f", at most {most:,} rows of one" * bool(share)]
    told = {"duplicates": "repeat an earlier one", "near_duplicates": "are nearly an earlier one"}
    for name, what in {**told, "contradictions": "say the opposite of another"}.items():
        rows = found[name]["rows"]
        lines.append(f"  {rows:,} rows {what}" + (f" ({named(found[name])})" if rows else ""))
        lines += _texts(found[name])
    return "\n".join(lines)


def _texts(found: Mapping[str, Any]) -> list[str]:
    """Returns the texts of pairs of rows, one under the other."""
    pairs = zip(found["first"], found.get("texts", ()), strict=False)
    return [f"    row {row:<6} {text}" for both in pairs for row, text in zip(*both, strict=True)]


def _bias(facts: Mapping[str, Any]) -> str:
    bias, (better, worse) = facts["bias"], SIDES.get(facts["data"], ("desirable", "undesirable"))
    length, only = bias["length"], bias["length"]["length_only"]
    lines = [f"{'What tells them apart':<34}{better:>12}{worse:>12}"]
    interval = f"   {length['longer']['low']:.0%} to {length['longer']['high']:.0%}"
    lines.append(f"  {'longer':<32}{length['longer']['value']:>12.1%}{length['shorter']:>12.1%}{interval}")
    for name, form in bias["forms"].items():
        mark = "   more than noise" if form["notable"] else ""
        if form["better"] or form["worse"]:
            lines.append(f"  {name:<32}{form['better']:>12.1%}{form['worse']:>12.1%}{mark}")
    difference, interval = length["mean_difference"], f"{only['low']:.3f} to {only['high']:.3f}"
    lines += [
        f"  {better} is {'longer' if difference > 0 else 'shorter'} by {abs(difference):,.1f} on average",
        f'  "The longer is better" is right in {only["value"]:.3f} ({interval}): to be beaten',
    ]
    return "\n".join(lines)


def _template(template: Mapping[str, Any], width: int) -> str:
    family, system, date = (template[name] for name in ("family", "default_system", "date"))
    lines = [f"Chat template: {family or 'none: the model has plain text only'}"]
    lines += [f"  default system prompt: {system!r}"] if system else []
    lines += [f"  date that it writes: {date}"] if date else []
    lines.append(f"  generation stops at {', '.join(template['stops'])}")
    if number := template["completions_without_stop"]:
        lines[-1] += f": {number:,} completions do not end so"
    return _wrapped(lines, width, "    ")


def _to_do(sentences: Sequence[str], width: int) -> str:
    if not sentences:
        return "Nothing to be acted on."
    return "To be acted on\n" + _wrapped([f"- {one}" for one in sentences], width, "  ")


def _wrapped(lines: Sequence[str], width: int, indent: str) -> str:
    wrap = textwrap.TextWrapper(width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return "\n".join(map(wrap.fill, lines))
