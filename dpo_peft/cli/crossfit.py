"""`dpo-peft data FILE --cross_fit K`: how hard pairs are to adapters that did not see them, and wrong labels.

It takes the options of `dpo-peft train` and trains as that does, without evaluation and checkpoints.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..disk import one_writer
from ..errors import OptionError
from ..files import as_list, write_rows
from ..preview.reading import PAIRED
from .mixture import DataArguments
from .options import made, option, required, split_config
from .train import ModelArguments, inputs_of, without_bars

if TYPE_CHECKING:
    from ..preview.labels import Labels
    from ..trainer import DPOTrainer

# What a run's file may ask for, and folds have no use for: left at the defaults.
OFF = (
    "eval_strategy eval_steps load_best_model_at_end metric_for_best_model greater_is_better early_stopping_patience "
    "early_stopping_threshold sample_prompts sample_max_new_tokens sample_temperature push_to_hub report_to "
    "precompute_ref_log_probs precompute_ref_tokens"
).split()
DIFFICULTY, EASIEST = "difficulty.jsonl", "easiest.jsonl"
SHOWN = 5  # mislabelled rows with their texts


@dataclass
class CrossFitArguments:
    """How difficulty is measured."""

    _argument_group_name = "difficulty and wrong labels, by the model"
    cross_fit: int = option(
        0, "Folds: train an adapter on all but one, score that one. Takes all options of `dpo-peft train`."
    )
    cross_fit_repeats: int = option(2, "How often, with other folds each time; margins are averaged.")
    keep_easiest: float | None = option(
        None, "Share of the rows to write to easiest.jsonl in output_dir: the hardest are left out (Selective DPO)."
    )


def asked_for(argv: Sequence[str]) -> bool:
    """Returns whether words, or the file that they name, ask for folds."""
    words, given = split_config(argv)
    return "cross_fit" in given or any(word.split("=")[0] == "--cross_fit" for word in words)


def check(options: argparse.Namespace) -> None:
    """Refuses what would stop the folds, before anything is read: a wrong option, one for other data than pairs, or an
    output that is there."""
    from ..objective import TrainingObjective

    asked, folder = made(CrossFitArguments, options), Path(str(options.output_dir))
    if asked.cross_fit < 2 or asked.cross_fit_repeats < 1:
        raise OptionError("cross_fit must be 2 or more, and cross_fit_repeats 1 or more.")
    if asked.keep_easiest is not None and not 0 < asked.keep_easiest < 1:
        raise OptionError(f"keep_easiest={asked.keep_easiest:g} must be above 0 and below 1, such as 0.6.")
    required(options, "model_name_or_path", "output_dir")
    if TrainingObjective(as_list(options.loss_type)).data not in PAIRED:
        raise OptionError(f"cross_fit is for pairs, and loss_type={options.loss_type} for others: give one of pairs.")
    if options.dataset_streaming or options.streaming:
        raise OptionError("cross_fit reads rows more than once: leave dataset_streaming and streaming out.")
    names = [DIFFICULTY, *([EASIEST] if asked.keep_easiest else [])]
    if (there := [name for name in names if (folder / name).exists()]) and not options.overwrite_output_dir:
        raise OptionError(
            f"output_dir={str(folder)!r} holds {', '.join(there)}: give another one, or set overwrite_output_dir."
        )


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Returns what the folds say of the training rows, and writes it: difficulty.jsonl, and easiest.jsonl if asked."""
    from ..config import DPOConfig
    from ..objective import TrainingObjective

    vars(options).update({f.name: f.default for f in fields(DPOConfig) if f.name in OFF}, save_strategy="no")
    # In the place of a pass ahead: each log-prob of the reference is computed where it is first needed, and kept.
    compared = TrainingObjective(as_list(options.loss_type)).needs_reference
    options.cache_ref_log_probs = compared and not options.sync_ref_model
    data, args = replace(made(DataArguments, options), eval_dataset_name=None), made(DPOConfig, options)
    folder = Path(str(args.output_dir))
    with one_writer("output_dir", folder, inside=True), redirect_stdout(sys.stderr), without_bars():
        inputs = inputs_of(data, args, made(ModelArguments, options))
        return _crossed(made(CrossFitArguments, options), inputs, folder)


def _crossed(asked: CrossFitArguments, inputs: dict[str, Any], folder: Path) -> dict[str, Any]:
    from ..preview.crossfit import cross_fit
    from ..preview.labels import easiest, judge
    from ..trainer import DPOTrainer

    trainer = DPOTrainer(**inputs)
    rows = list(trainer.train_dataset["row"])
    margins_RN = cross_fit(trainer, asked.cross_fit, asked.cross_fit_repeats, trainer.args.seed)
    found = judge(margins_RN)
    columns = margins_RN.T.tolist(), found.margin_N.tolist(), found.wrong_N.tolist(), found.mislabelled_N.tolist()
    names = ("row", "margins", "margin", "wrong", "mislabelled")
    lines = [dict(zip(names, line, strict=True)) for line in zip(rows, *columns, strict=True)]
    files = [write_rows(folder / DIFFICULTY, lines)]
    result: dict[str, Any] = {
        "rows": len(rows),
        "accuracy": found.accuracy._asdict(),
        "chance": found.chance,
        "flipped": found.flipped,
    }
    if asked.keep_easiest:
        kept = [rows[i] for i in easiest(found.margin_N, asked.keep_easiest)]
        files.append(write_rows(folder / EASIEST, inputs["train_dataset"].select(kept)))
        result |= {"kept": len(kept), "dropped": len(rows) - len(kept)}
    shown = [_shown(trainer, i, found) for i in found.found[:SHOWN]]
    result |= {"mislabelled": {"rows": len(found.found), "first": [rows[i] for i in found.found[:SHOWN]]}}
    return result | {"texts": shown, "files": [str(file) for file in files]}


def _shown(trainer: "DPOTrainer", i: int, found: "Labels") -> dict[str, Any]:
    """Returns a row with its texts, shortened."""
    from ..reward.judgments import shorten

    row = trainer.train_dataset[i]
    chosen, rejected = (shorten(trainer.tokenizer, ids) for ids in row["completion_ids"])
    texts = {"prompt": shorten(trainer.tokenizer, row["prompt_ids"], end=True), "chosen": chosen, "rejected": rejected}
    return {"row": row["row"], "margin": float(found.margin_N[i]), "wrong": float(found.wrong_N[i]), **texts}


def advise_labels(result: Mapping[str, Any]) -> list[str]:
    """Returns what to do about labels that are probably wrong, and about adapters that can't tell."""
    if result["chance"]:
        easiest = f", and {EASIEST} holds rows by chance" if "kept" in result else ""
        return [
            f"{_agreement(result)}: that may be chance. The margins say nothing of labels or of difficulty{easiest}. "
            "Give more rows, more steps or a higher learning_rate, or a larger model."
        ]
    if not (number := result["mislabelled"]["rows"]):
        return []
    return [
        f"{number:,} labels are probably wrong (mislabelled in {result['files'][0]}), and about "
        f"{result['flipped'] * result['rows']:,.0f} in all: look at these rows and turn or remove them, or give "
        f"label_smoothing {result['flipped']:.2f}."
    ]


def describe_labels(result: Mapping[str, Any]) -> str:
    """Returns what the folds say, as text."""
    share, called = f"{result['flipped']:.1%}", f"{result['mislabelled']['rows']:,}"
    labels = f"  about {share} of the labels are flipped, {called} rows probably"
    lines = [f"Held out: {_agreement(result)}", "  which may be chance" if result["chance"] else labels]
    if "kept" in result:
        lines.append(f"  {EASIEST}: {result['kept']:,} rows kept, the {result['dropped']:,} hardest dropped")
    for one in result["texts"]:
        lines.append(f"  row {one['row']}: margin {one['margin']:+.2f}, wrong with probability {one['wrong']:.2f}")
        lines += [f"    {name:<9}{one[name]}" for name in ("prompt", "chosen", "rejected")]
    return "\n".join([*lines, *(f"  written: {file}" for file in result["files"])])


def _agreement(result: Mapping[str, Any]) -> str:
    agree = "{value:.1%} ({low:.1%} to {high:.1%})".format(**result["accuracy"])
    return f"{agree} of {result['rows']:,} labels agree with adapters that did not see them"
