"""A dataset looked at before anything is trained: what is read of it, how long, how often, and what it would teach."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..data import DataSummary, prepare_dataset
from ..data.formats import Wanted
from ..data.image_rows import undecoded
from ..data.images import Images
from ..data.reading import find_format
from ..data.summary import REASONS
from ..data.unread import SAMPLED, check_unread
from ..errors import DataError
from ..reward.agreement import Estimate
from .counts import NAMED, Repeats, length_facts, sized_tokens
from .near import apart
from .reading import MALFORMED, Item, Sized, read_items, text_parts
from .render import render_parts, render_row
from .style import compare_forms, compare_lengths, forms_of
from .template import describe_template, family_of

OF_LENGTH = {"identical_after_truncation", "prompt_too_long", "completion_too_long", "nothing_scored"}
OF_SUMMARY = (
    "max_length truncation_mode rows_truncated prompts_trimmed completions_trimmed ends_lost total_tokens "
    "prompt_tokens completion_tokens unshared_tokens longest spelled ties swapped"
).split()


@dataclass
class Look:
    """What was found in a dataset.

    Attributes:
        facts: figures by name, as `dpo-peft data --json` prints them (docs/data.md).
        stops: what would stop training, as it would say so.
        repeats: what stands more than once.
        prepared: the rows as they will be trained; `whole` without truncation. None without a tokenizer.
    """

    facts: dict[str, Any]
    stops: list[str] = field(default_factory=list)
    repeats: Repeats = field(default_factory=Repeats)
    tokenizer: PreTrainedTokenizerBase | None = None
    images: Images | None = None
    prepared: Dataset | None = None
    whole: Dataset | None = None
    first: list[Item] = field(default_factory=list)
    item: Callable[[int], Item] = Item  # of a row's number

    def leak(self, evaluation: "Look") -> dict[str, Any]:
        """Returns what of another dataset's rows stands here too, or nearly so (`Repeats.leak`), with its texts."""
        found = self.repeats.leak(evaluation.repeats)
        evaluation.show(found["near_prompts"], self, whole=False)
        evaluation.show(found["near_rows"], self)
        return found

    def show(self, near: dict[str, Any], other: "Look", whole: bool = True) -> None:
        """Adds the texts of near (row, row of `other`), shortened to what differs, of prompts alone or whole rows."""

        def text(item: Item) -> str:
            return " | ".join([item.prompt, *(item.completions if whole else ())])

        near["texts"] = [apart(text(self.item(i)), text(other.item(j))) for i, j in near["first"]]

    def rendered(self, number: int, width: int = 80, color: bool = False, most_lines: int | None = None) -> list[str]:
        """Returns the first usable rows as they will be trained; without a tokenizer as texts. See `render_row`."""
        if self.prepared is None or self.whole is None or self.tokenizer is None:
            some = [(item.row, item.example) for item in self.first[:number] if item.example]
            return [f"row {row}\n{render_parts(text_parts(one), width, color, most_lines)}" for row, one in some]
        found, numbers = [], list(self.whole["row"])
        for row in self.prepared.select(range(min(number, len(self.prepared)))):
            places = [place for place, of in enumerate(numbers) if of == row["row"]]
            whole = self.whole[places[0]] if len(places) == 1 else None
            tokens = ", ".join(str(len(ids)) for ids in row["completion_ids"])
            title = f"row {row['row']}: {len(row['prompt_ids'])} tokens of prompt, {tokens} of completion"
            text = render_row(row, self.tokenizer, width, color, whole, most_lines, self.images)
            found.append(f"{title}\n{text}")
        return found


def look(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase | None = None,
    name: str = "train",
    stop_tokens: Sequence[int] = (),
    **options: Any,
) -> Look:
    """Looks at preference rows as training would take them.

    Args:
        rows: in one of the formats of `data.formats`.
        tokenizer: of the model. Without one, texts are looked at, and lengths are in characters.
        name: how messages call the dataset.
        stop_tokens: at which generation stops (`template.stop_tokens`).
        options: of `prepare_dataset`.

    Raises:
        OptionError: an option is wrong.
        DataError: the rows are in no known format, or in none for `data`. What else would stop training is in `stops`.
    """
    rows = undecoded(rows)
    sampled = list(rows.with_format(None).select(range(min(SAMPLED, len(rows)))))
    if not sampled:
        raise DataError(f"{name}: the dataset is empty. Give it at least one row.")
    names = ("data", "label_columns", "discount_unit", "single_best", "unpair")
    images: Images | None = options.get("images")
    readable = tokenizer is None or images is not None
    wanted = Wanted(**{one: options[one] for one in names if one in options}, images=readable)
    row_format = find_format(name, rows.column_names, sampled, wanted, tokenizer, options.get("as_chat", False))
    wanted = replace(wanted, label_columns=tuple(one for one in wanted.label_columns if one in rows.column_names))
    used = {*row_format.columns, *wanted.label_columns}
    unread = [one for one in rows.column_names if one not in used]
    columns = {"read": [one for one in rows.column_names if one in used], "unread": unread}
    facts: dict[str, Any] = {"name": name, "rows": len(rows), "format": row_format.name, "data": wanted.data}
    seen = Look(facts | {"as_chat": row_format.as_chat, "columns": columns}, images=images)
    if row_format.kind != "ids":
        try:
            check_unread(name, sampled, [one for one in unread if one not in options.get("unneeded_columns", ())])
        except DataError as error:
            seen.stops.append(str(error))
    summary = None if tokenizer is None else _prepare(seen, rows, tokenizer, options)
    found = _Pass(seen, wanted.data)
    found.read(read_items(rows, row_format, wanted, seen.tokenizer))
    if found.problem and tokenizer is None:
        seen.stops.append(found.problem)
    template = None
    if seen.tokenizer is not None and seen.whole is not None:
        found.sizes, counts = sized_tokens(seen.whole, wanted.data, stop_tokens)
        template = {**describe_template(seen.tokenizer, stop_tokens), "completions_without_stop": counts}
    unit = "tokens" if row_format.kind == "ids" or template else "characters"
    unusable = found.lost(summary)
    seen.item = lambda row: next(read_items(rows.select([row]), row_format, wanted, seen.tokenizer))
    seen.facts |= {
        "usable": len(found.sizes) if summary is None else summary.kept_rows,
        "unusable": unusable,
        "images": found.image_facts(),
        "lengths": length_facts(found.sizes, wanted.data, unit) if found.sizes else None,
        "longest": max((row.prompt + max(row.completions) for row in found.sizes), default=0),
        "tokens": None if summary is None else {name: getattr(summary, name) for name in OF_SUMMARY},
        "repeats": seen.repeats.facts(),
        "bias": found.bias(),
        "template": template,
        "rendered_by": found.rendered_by,
    }
    seen.show(seen.facts["repeats"]["near_duplicates"], seen)
    return seen


def _prepare(
    seen: Look, rows: Dataset, tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]
) -> DataSummary | None:
    """Prepares the rows as training does, and once more without truncation where that took something."""
    # A share of unusable rows, and unread columns, are for the caller to judge: the look goes on.
    free = {**options, "name": seen.facts["name"], "max_unusable_share": 1.0, "unneeded_columns": rows.column_names}
    try:
        prepared, summary = prepare_dataset(rows, tokenizer, **free)
        whole = prepared
        if summary.rows_truncated or OF_LENGTH & summary.dropped.keys():
            whole, _ = prepare_dataset(rows, tokenizer, **{**free, "max_length": None})
    except DataError as error:
        seen.stops.append(str(error))
        return None
    assert isinstance(prepared, Dataset) and isinstance(whole, Dataset)
    seen.tokenizer, seen.prepared, seen.whole = tokenizer, prepared, whole
    return summary


class _Pass:
    """What one pass over a dataset's rows collects."""

    def __init__(self, seen: Look, data: str):
        self.seen, self.data = seen, data
        self.unusable: dict[str, list[int]] = {}
        self.problem = self.rendered_by = ""
        self.sizes: list[Sized] = []
        self.images: list[int] = []  # of each row
        self.forms: tuple[list[list[bool]], list[list[bool]]] = [], []  # of the better completions, of the worse ones

    def read(self, items: Iterable[Item]) -> None:
        """Goes through the rows."""
        kept = None if self.seen.whole is None else set(self.seen.whole["row"])
        for item in items:
            if item.reason:
                self.unusable.setdefault(item.reason, []).append(item.row)
                if item.problem and not self.problem:
                    self.problem = str(item.problem.located(self.seen.facts["name"], item.row))
            elif kept is None or item.row in kept:
                self._add(item)

    def _add(self, item: Item) -> None:
        self.seen.repeats.add(item)
        self.seen.first += [item] if len(self.seen.first) < NAMED else []
        self.sizes.append(item.sized)
        self.images.append(item.images)
        self.rendered_by = self.rendered_by or family_of(item.prompt)
        grades = item.sized.grades
        if not any(item.completions):  # token ids without a tokenizer
            return
        if self.data == "singles":
            for text, grade in zip(item.completions, grades, strict=True):
                self.forms[grade == 0].append(forms_of(text, item.prompt))
        elif grades and grades[0] > grades[-1]:
            for side, text in zip(self.forms, (item.completions[0], item.completions[-1]), strict=True):
                side.append(forms_of(text, item.prompt))

    def lost(self, summary: DataSummary | None) -> dict[str, dict[str, Any]]:
        """Returns the unusable rows by reason: as the summary of their preparation has them, or as texts show them."""
        counts = {reason: (len(rows), rows[:NAMED]) for reason, rows in self.unusable.items()}
        if summary is not None:
            counts = {reason: (count, summary.dropped_rows[reason]) for reason, count in summary.dropped.items()}
        explained = {**REASONS, MALFORMED: (self.problem, "mend or remove them")}
        names = ("rows", "first", "meaning", "remedy")
        return {why: dict(zip(names, (*found, *explained[why]), strict=True)) for why, found in counts.items()}

    def image_facts(self) -> dict[str, Any] | None:
        """Returns how many images the usable rows have, and how many of the prompts' tokens are theirs, if any."""
        if not any(self.images):
            return None
        seen, tokens = self.seen, None
        if seen.images is not None and seen.prepared is not None:
            tokens = sum(ids.count(seen.images.token) for ids in seen.prepared["prompt_ids"])
        found = {"images": sum(self.images), "rows": sum(map(bool, self.images)), "most_of_a_row": max(self.images)}
        return {**found, "tokens": tokens}

    def bias(self) -> dict[str, Any] | None:
        """Returns what tells better from worse completions; None where nothing is compared."""
        grades = [row.grades for row in self.sizes]
        lengths = compare_lengths([row.completions for row in self.sizes], grades) if any(grades) else None
        if lengths is None:
            return None
        found = {name: v._asdict() if isinstance(v, Estimate) else v for name, v in lengths._asdict().items()}
        forms = compare_forms(*self.forms, paired=self.data != "singles") if all(self.forms) else {}
        return {"length": found, "forms": {name: form._asdict() for name, form in forms.items()}}
