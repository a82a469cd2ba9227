"""`dpo-peft score`: judge the answers of a dataset by a trained adapter.

The rows go through the same preparation and the same forward pass as in training, so the margins are those that the
trainer's evaluation would report. What is known of the answers decides what comes out:

    chosen, rejected | completions with ranks or scores | completion with label    scores and accuracy
    completion | completions                                                      scores only
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import OptionError
from ..files import CONVERTERS, READERS, check_output, read_rows, write_rows
from .options import parse_options, required, show

logger = logging.getLogger(__name__)

EXAMPLES = (
    "dpo-peft score outputs/quickstart --dataset_name test.jsonl",
    "dpo-peft score outputs/run --dataset_name org/preferences --dataset_split test --category_column source",
    "dpo-peft score outputs/run --dataset_name answers.parquet --output scores.parquet --worst 0 --json",
)


@dataclass
class ScoreOptions:
    """Options of `dpo-peft score`."""

    adapter: str = field(default="", metadata={"help": "Folder or Hub id of the adapter."})
    dataset_name: str = field(default="", metadata={"help": "Hub id, or a JSON(L), Parquet or CSV file."})
    dataset_split: str | None = field(default=None, metadata={"help": "Split of a Hub dataset; 'test' if not given."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    dataset_format: str | None = field(
        default=None, metadata={"help": "Convert rows first.", "choices": list(CONVERTERS)}
    )
    category_column: str | None = field(default=None, metadata={"help": "Column to report accuracy by."})
    output: str | None = field(default=None, metadata={"help": "File for the scores of each row: .jsonl or .parquet."})
    worst: int = field(default=10, metadata={"help": "How many of the rows that are most wrong to show."})
    json: bool = field(default=False, metadata={"help": "Print the result as JSON."})
    beta: float | None = field(default=None, metadata={"help": "Replaces the beta of the training."})
    reference: str | None = field(
        default=None, metadata={"help": "Adapter that was the reference, if not where the record says."}
    )
    base: str | None = field(default=None, metadata={"help": "Base model, if not where the adapter says."})
    check_base: bool = field(default=True, metadata={"help": "Refuse a base that is not the one of the training."})
    max_length: int | None = field(
        default=None, metadata={"help": "Tokens of prompt + answer; 0 for no limit. As in training if not given."}
    )
    max_tokens: int = field(default=16384, metadata={"help": "Tokens of a forward pass: lower it if memory runs out."})
    quantize: bool | None = field(
        default=None, metadata={"help": "NF4 or not, in place of how the base was loaded for the training."}
    )
    dtype: str | None = field(default=None, metadata={"help": "Replaces the dtype of what is not quantised."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of an adapter on the Hub."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that ships with the model."})


@dataclass(frozen=True)
class Source:
    """The rows as they were read, and what their columns say of the answers."""

    rows: Any
    kind: str  # of `prepare_dataset`'s data, or "unlabelled"
    categories: list[str] | None  # one per row


def score(argv: Sequence[str]) -> None:
    """Read options and rows, score, print the result.

    Raises:
        OptionError, DataError, ReferenceMismatchError, NonFiniteError: with the remedy.
    """
    options = parse_options(
        argv,
        ScoreOptions,
        "score",
        "Score answers by the implicit reward of a trained adapter, and compare with judgements, if there are any.",
        EXAMPLES,
    )
    required(options, "adapter", "dataset_name")
    _check(options)
    result, text = run(options)
    show(result, text, options.json)


def _check(options: ScoreOptions) -> None:
    """What can be known before anything is loaded."""
    if options.output is not None:
        check_output("output", options.output)
    if options.worst < 0:
        raise OptionError(f"worst={options.worst} must be 0 or more.")
    if Path(options.dataset_name).suffix in READERS:
        for name in ("dataset_split", "dataset_config"):
            if getattr(options, name) is not None:
                raise OptionError(f"{name} has no effect: {options.dataset_name} is a file. Leave it out.")


def run(options: ScoreOptions) -> tuple[dict[str, Any], str]:
    """The result of the command, and the same for people to read."""
    from ..model.adapter_source import read_adapter
    from ..reward.implicit import ImplicitReward
    from ..reward.labelled import ScoredRows

    # Rows first: a bad one is found in seconds, not after minutes of loading the model.
    trained, tokenizer = read_adapter(options.adapter, options.base, options.trust_remote_code, options.revision)
    source = _read(options, trained)
    limit = options.max_length or None
    if options.max_length is None:
        limit = trained.max_length if trained else None
    prepared, report, places = _prepare(source, tokenizer, limit, trained)
    logger.warning("%s", report)
    reward = ImplicitReward(
        options.adapter,
        beta=options.beta,
        reference=options.reference,
        max_length=limit,
        max_tokens=options.max_tokens,
        base=options.base,
        quantize=options.quantize,
        dtype=options.dtype,
        check_base=options.check_base,
        revision=options.revision,
        trust_remote_code=options.trust_remote_code,
    )
    logger.warning("%s", reward.plan)
    scored = ScoredRows(
        source.rows, source.kind, source.categories, prepared, places, reward.score_rows(prepared, progress=True)
    )
    result = {
        "adapter": options.adapter,
        "dataset": options.dataset_name,
        "data": source.kind,
        "reward": str(reward),
        "beta": reward.beta,
        "max_length": limit,
        "rows": len(source.rows),
        "scored_rows": len(scored),
        "dropped": report.dropped,
        "truncated": report.rows_truncated,
        **scored.figures(),
    }
    if result["agreement"] is not None and options.worst:
        result["worst"] = scored.worst(options.worst, tokenizer)
    if options.output is not None:
        result["output"] = str(write_rows(options.output, scored.lines()))
    return result, describe(result)


# ---- Rows in --------------------------------------------------------------------------------------------------------


def _read(options: ScoreOptions, trained: Any) -> Source:
    where = (options.dataset_name, options.dataset_split or "test", options.dataset_config, False)
    rows = read_rows(*where, options.dataset_format)
    if not len(rows):
        raise OptionError(f"dataset {options.dataset_name!r} is empty.")
    categories = None
    if options.category_column is not None:
        # A converter keeps nothing but the preference: the rows as they came have the rest.
        raw = rows if options.dataset_format is None else read_rows(*where)
        if options.category_column not in raw.column_names:
            raise OptionError(
                f"category_column={options.category_column!r}: the columns are {', '.join(raw.column_names)}."
            )
        if len(raw) != len(rows):
            raise OptionError(
                f"category_column can't be used with dataset_format={options.dataset_format!r}, which makes several "
                "rows of one. Leave it out."
            )
        categories = [str(value) for value in raw[options.category_column]]
    return Source(rows, _kind(rows, trained), categories)


def _kind(rows: Any, trained: Any) -> str:
    """What the columns say of the answers."""
    from ..data.formats import GRADE_COLUMNS, is_several, kind_of
    from ..losses import REGISTRY

    have, first = set(rows.column_names), rows[0]
    if {"chosen", "rejected"} <= have or {"chosen_ids", "rejected_ids"} <= have:
        several = is_several(first.get("rejected"), kind_of(first.get("chosen")))
        if several or is_several(first.get("rejected_ids"), "ids"):
            return "lists"
        entry = None if trained is None else REGISTRY.get(trained.loss_type[0])  # None too: a loss of someone's own
        return "trajectories" if entry is not None and entry.data == "trajectories" else "pairs"
    if have & {"completions", "completions_ids"}:
        return "lists" if have.intersection(GRADE_COLUMNS) else "unlabelled"
    if have & {"completion", "completion_ids", "messages"}:
        return "singles" if "label" in have else "unlabelled"
    return "pairs"  # which are asked for where nothing is recognised


def _prepare(source: Source, tokenizer: Any, max_length: int | None, trained: Any) -> tuple[Any, Any, Any]:
    """Prepared rows, the report, and for unlabelled rows where each came from: (row, number of its completion)."""
    from ..data import prepare_dataset
    from ..data.formats import LABEL_COLUMNS

    rows, kind, places = source.rows, source.kind, None
    if kind == "unlabelled":
        rows, places = _one_by_one(rows)
        kind = "singles"
    labels: tuple[str, ...] = LABEL_COLUMNS if kind in ("pairs", "trajectories") else ()
    unread = [name for name in LABEL_COLUMNS if name in rows.column_names and name not in labels]
    prepared, report = prepare_dataset(
        rows.remove_columns(unread),
        tokenizer,
        name="score",
        max_length=max_length,
        truncation_mode=trained.truncation_mode if trained else "keep_start",
        max_unusable_share=1.0,
        data=kind,
        label_columns=labels,
    )
    if places is not None:
        report.desirable = 0  # nobody judged them
    return prepared, report, places


def _one_by_one(rows: Any) -> tuple[Any, list[tuple[int, int]]]:
    """Rows with one completion each, as if all were desirable, which `prepare_dataset` has a format for."""
    several = next((name for name in ("completions", "completions_ids") if name in rows.column_names), None)
    if several is None:
        return rows.add_column("label", [True] * len(rows)), [(row, 0) for row in range(len(rows))]
    one = several.replace("completions", "completion")
    places = [(row, number) for row, answers in enumerate(rows[several]) for number in range(len(answers or []))]

    def split(batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        counts = [len(answers or []) for answers in batch[several]]
        repeated = {
            name: [value for value, count in zip(values, counts, strict=True) for _ in range(count)]
            for name, values in batch.items()
            if name != several
        }
        return {
            **repeated,
            one: [a for answers in batch[several] for a in answers or []],
            "label": [True] * sum(counts),
        }

    return rows.map(split, batched=True, remove_columns=rows.column_names), places


# ---- For people -----------------------------------------------------------------------------------------------------

UNITS = {
    "pairs": "pairs",
    "trajectories": "pairs of conversations",
    "lists": "lists",
    "singles": "answers",
    "unlabelled": "answers",
}


def describe(result: Mapping[str, Any]) -> str:
    """The result in plain words."""
    what = f"{result['scored_rows']:,} {UNITS[result['data']]} of {result['rows']:,} rows scored"
    if dropped := sum(result["dropped"].values()):
        what += f", {dropped:,} dropped (see above)"
    if result["truncated"]:
        what += f", {result['truncated']:,} cut to {result['max_length']} tokens"
    lines = [f"{result['adapter']} on {result['dataset']}: {what}.", f"Reward: {result['reward']}.", ""]
    if result["agreement"] is None:
        why = "no row says which answer is better" if result["data"] != "unlabelled" else "the answers have no labels"
        lines.append(f"No accuracy: {why}. Mean reward {result['mean_reward']:+.3f}.")
    else:
        lines += _accuracy_table(result)
        lines += _worst_rows(result.get("worst"))
    if "output" in result:
        lines += ["", f"Scores: {result['output']}"]
    return "\n".join(lines)


def _accuracy_table(result: Mapping[str, Any]) -> list[str]:
    found = result["agreement"]
    title = f"{'':<34} accuracy  95 % interval   comparisons"
    rows = [
        _line("all", found["accuracy"], found["comparisons"]),
        _line("length-balanced", found["length_balanced"], None),
        _line("  better answer is longer", *_half(found["better_longer"])),
        _line("  better answer is shorter", *_half(found["better_shorter"])),
        _line('"the longer answer is better"', found["length_only"], None),
    ]
    lines = [title, *rows, "", f"Mean margin {found['mean_margin']:+.3f}, mean reward {result['mean_reward']:+.3f}."]
    if "by_category" in result:
        title = f"{'category':<34} accuracy  95 % interval   comparisons  length-balanced  longer is better"
        lines += ["", title]
        for name, one in result["by_category"].items():
            if one is None:
                lines.append(f"{_short(name, 34):<34}        -  no comparisons")
                continue
            beside = [one["length_balanced"], one["length_only"]]
            balanced, length = ("-" if figure is None else f"{figure['value']:.3f}" for figure in beside)
            row = _line(_short(name, 34), one["accuracy"], one["comparisons"])
            lines.append(f"{row}  {balanced:>15}  {length:>16}")
    return lines


def _half(half: Mapping[str, Any]) -> tuple[dict[str, Any] | None, int]:
    value = half["accuracy"]
    return (None if value is None else {"value": value}), half["comparisons"]


def _line(name: str, figure: Mapping[str, Any] | None, comparisons: int | None) -> str:
    value = "-" if figure is None else f"{figure['value']:.3f}"
    interval = f"{figure['low']:.3f} to {figure['high']:.3f}" if figure and "low" in figure else ""
    return (
        f"{name:<34} {value:>8}  {interval:<14} {'' if comparisons is None else format(comparisons, ','):>12}".rstrip()
    )


def _worst_rows(worst: Sequence[Mapping[str, Any]] | None) -> list[str]:
    if worst is None:
        return []
    if not worst:
        return ["", "No row is wrong."]
    lines = ["", "Most wrong:"]
    for one in worst:
        category = f" ({one['category']})" if "category" in one else ""
        texts = [f"    {name}: {one[name]}" for name in ("prompt", "better", "worse", "answer") if name in one]
        lines += [f"  row {one['row']}{category}: {_wrong(one)}", *texts]
    return lines


def _wrong(one: Mapping[str, Any]) -> str:
    if "margin" in one:
        return f"margin {one['margin']:+.3f}"
    kind = "desirable" if one["label"] else "undesirable"
    return f"{kind}, reward {one['reward']:+.3f}, right against {one['won']:.0%} of the others"


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
