"""`dpo-peft score`: score the completions of a dataset by a trained adapter.

The rows go through the same preparation and the same forward pass as in training, so the margins are those that the
trainer's evaluation would report. What is known of the completions decides what comes out, see `reward.rows`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..disk import one_writer
from ..errors import OptionError
from ..files import as_list, check_output, write_rows
from ..model.options import AdapterOptions
from .options import RowOptions, load_rows, option, parse_options, show

if TYPE_CHECKING:
    from datasets import Dataset

EXAMPLES = (
    "dpo-peft score outputs/quickstart --dataset_name test.jsonl",
    "dpo-peft score outputs/run --dataset_name org/preferences --dataset_split test --category_column source",
    "dpo-peft score outputs/run --dataset_name answers.parquet --output scores.parquet --worst 0 --json",
)


@dataclass(frozen=True)
class ScoreOptions(RowOptions, AdapterOptions):
    """Options of `dpo-peft score`."""

    category_column: str | None = option(None, "Column to report accuracy by.")
    unneeded_columns: list[str] | None = option(None, "Columns with text that may stay unread.")
    output: str | None = option(None, "File for the scores of each row: .jsonl or .parquet.")
    overwrite: bool = option(False, "Replace output.")
    worst: int = option(10, "How many of the rows that are most wrong to show.")
    json: bool = option(False, "Print the result as JSON.")
    beta: float | None = option(None, "Replaces the beta of the training.")
    max_length: int | None = option(None, "Tokens of prompt + completion; 0: no limit. Default: as in training.")
    max_tokens: int = option(16384, "Tokens of a forward pass: lower it if memory runs out.")


def score(argv: Sequence[str]) -> None:
    """Score completions by the implicit reward of a trained adapter, and compare with judgments, if there are any."""
    options = parse_options(argv, ScoreOptions, "score", score.__doc__, EXAMPLES, "adapter", "dataset_name")
    if options.worst < 0:
        raise OptionError(f"worst={options.worst} must be 0 or more.")
    if options.output is None:
        result = run(options)
    else:
        check_output("output", options.output, as_list(options.dataset_name), options.overwrite)
        with one_writer("output", options.output):
            result = run(options)
    show(result, describe(result), options.json)


def run(options: ScoreOptions) -> dict[str, Any]:
    """Returns the result of the command, and writes the scores of each row if there is an output."""
    rows = load_rows(options)
    if not len(rows):
        raise OptionError(f"dataset {options.dataset_name!r} is empty.")
    categories = None if options.category_column is None else _categories(options, rows)
    from ..model.adapter_source import AdapterSource
    from ..reward.judgments import score_dataset

    limit = "recorded" if options.max_length is None else options.max_length or None
    source = AdapterSource.of(options)
    unneeded = [*(options.unneeded_columns or ()), *filter(None, [options.category_column])]
    reward, scored = score_dataset(source, rows, categories, options.beta, limit, options.max_tokens, unneeded)
    summary = scored.data.summary
    result: dict[str, Any] = {
        "adapter": options.adapter,
        "dataset": options.dataset_name,
        "data": scored.kind,
        "reward": str(reward),
        "beta": reward.beta,
        "max_length": reward.max_length,
        "rows": len(rows),
        "scored_rows": len(scored),
        "dropped": summary.dropped,
        "truncated": summary.rows_truncated,
        **scored.figures(),
    }
    if found := result["agreement"]:
        from ..training.metrics import NOISE_NOTE, within_noise

        squares = [score.reward**2 for row in scored.scores for score in row]
        kl = sum(squares) / len(squares) / (2 * reward.beta**2)
        noisy = within_noise(found["mean_margin"], reward.beta, kl, reward.kind)
        result["note"] = NOISE_NOTE if noisy else ""
    if found and options.worst:
        result["worst"] = scored.worst(options.worst, reward.tokenizer)
    if options.output is not None:
        result["output"] = str(write_rows(options.output, scored.lines()))
    return result


def _categories(options: ScoreOptions, rows: "Dataset") -> list[str]:
    """Returns one for each row. A converter keeps nothing but the preference: the rows as they came have the rest."""
    raw = rows if options.dataset_format is None else load_rows(replace(options, dataset_format=None))
    if options.category_column not in raw.column_names:
        raise OptionError(
            f"category_column={options.category_column!r}: the columns are {', '.join(raw.column_names)}."
        )
    if len(raw) != len(rows):
        raise OptionError(
            f"category_column can't be used with dataset_format={options.dataset_format!r}, which makes several rows "
            "of one. Leave it out."
        )
    return [str(value) for value in raw[options.category_column]]


# ---- For people -----------------------------------------------------------------------------------------------------

UNITS = {"pairs": "pairs", "trajectories": "pairs of conversations", "lists": "lists"}  # of others: completions
TITLE = f"{'':<34} accuracy  95 % interval   comparisons"


def describe(result: Mapping[str, Any]) -> str:
    """Returns the result in plain words."""
    what = f"{result['scored_rows']:,} {UNITS.get(result['data'], 'completions')} of {result['rows']:,} rows scored"
    if dropped := sum(result["dropped"].values()):
        what += f", {dropped:,} dropped (see above)"
    if result["truncated"]:
        what += f", {result['truncated']:,} cut to {result['max_length']} tokens"
    dataset = result["dataset"]
    on = dataset if isinstance(dataset, str) else ", ".join(dataset)
    lines = [f"{result['adapter']} on {on}: {what}.", f"Reward: {result['reward']}.", ""]
    if found := result["agreement"]:
        lines += [TITLE, *_accuracy_lines(found, result["note"])]
        lines += ["", f"Mean margin {found['mean_margin']:+.3f}, mean reward {result['mean_reward']:+.3f}."]
        lines += _category_lines(result.get("by_category", {}))
        lines += _worst_lines(result.get("worst"))
    else:
        unlabeled = result["data"] == "unlabeled"
        why = "the completions have no labels" if unlabeled else "no row says which completion is better"
        lines.append(f"No accuracy: {why}. Mean reward {result['mean_reward']:+.3f}.")
    return "\n".join([*lines, "", f"Scores: {result['output']}"] if "output" in result else lines)


def _accuracy_lines(found: Mapping[str, Any], note: str) -> list[str]:
    longer, shorter = found["better_longer"], found["better_shorter"]
    return [
        f"{_line('all', found['accuracy'], found['comparisons'])}  {note}".rstrip(),
        _line("length-balanced", found["length_balanced"]),
        _line("  better completion is longer", {"value": longer["accuracy"]}, longer["comparisons"]),
        _line("  better completion is shorter", {"value": shorter["accuracy"]}, shorter["comparisons"]),
        _line('"the longer completion is better"', found["length_only"]),
    ]


def _category_lines(by_category: Mapping[str, Any]) -> list[str]:
    lines = ["", f"{'category':<34}{TITLE[34:]}  length-balanced  longer is better"] if by_category else []
    for name, one in by_category.items():
        name = name if len(name) <= 34 else name[:33] + "…"
        if one is None:
            lines.append(f"{name:<34}        -  no comparisons")
        else:
            balanced, length = _value(one["length_balanced"]), _value(one["length_only"])
            lines.append(f"{_line(name, one['accuracy'], one['comparisons'])}  {balanced:>15}  {length:>16}")
    return lines


def _line(name: str, figure: Mapping[str, Any] | None, comparisons: int | None = None) -> str:
    interval = f"{figure['low']:.3f} to {figure['high']:.3f}" if figure and "low" in figure else ""
    number = "" if comparisons is None else f"{comparisons:,}"
    return f"{name:<34} {_value(figure):>8}  {interval:<14} {number:>12}".rstrip()


def _value(figure: Mapping[str, Any] | None) -> str:
    return "-" if figure is None or figure["value"] is None else f"{figure['value']:.3f}"


def _worst_lines(worst: Sequence[Mapping[str, Any]] | None) -> list[str]:
    if not worst:
        return [] if worst is None else ["", "No row is wrong."]
    lines = ["", "Most wrong:"]
    for one in worst:
        kind = "desirable" if one.get("label") else "undesirable"
        wrong = (
            f"margin {one['margin']:+.3f}"
            if "margin" in one
            else f"{kind}, reward {one['reward']:+.3f}, right against {one['won']:.0%} of the others"
        )
        category = f" ({one['category']})" if "category" in one else ""
        lines.append(f"  row {one['row']}{category}: {wrong}")
        lines += [f"    {name}: {one[name]}" for name in ("prompt", "better", "worse", "answer") if name in one]
    return lines
