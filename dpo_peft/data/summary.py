"""What became of every source row: kept, or dropped for a named reason; and what truncation took away."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import chain
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch.utils.data import get_worker_info

from ..errors import DataError

logger = logging.getLogger(__name__)

# reason -> (what it means, what to do about it)
REASONS = {
    "empty_completion": ("a completion has no text besides its end token", "remove these rows"),
    "identical_completions": ("all completions are the same", "remove these rows"),
    "identical_after_truncation": (
        "the completions differ only in what truncation took away",
        "raise max_length or use truncation_mode='trim_prompt'",
    ),
    "prompt_too_long": (
        "the prompt alone fills max_length",
        "raise max_length or use truncation_mode='keep_end' or 'trim_prompt'",
    ),
    "completion_too_long": (
        "a completion does not fit beside one prompt token",
        "raise max_length or use another truncation_mode",
    ),
    "transcripts_differ": (
        "the conversations differ before the last assistant turn",
        "remove these rows or give prompt, chosen and rejected yourself",
    ),
    "no_common_prompt": ("chosen and rejected share no start", "add a 'prompt' column"),
    "no_ranking": ("all completions have the same grade, a tie", "remove these rows"),
    "no_single_best": (
        "several completions share the best grade, and the objective needs one best",
        "remove all but one of them or use loss_type='plackett_luce'",
    ),
    "same_text_ranked_apart": ("the same text has two grades", "remove these rows or the repeated completions"),
    "missing_value": ("a column that is read holds nothing", "fill it in, or remove these rows"),
    "nothing_scored": (
        "a trajectory has no token of the assistant's where it differs, or truncation took them",
        "remove these rows, raise max_length or use another truncation_mode",
    ),
    "unreadable_image": ("an image is damaged, too large or of an unknown kind", "mend or remove these rows"),
    "image_cut": (
        "truncation would take away an image, or a part of one",
        "raise max_length or use truncation_mode='keep_start'",
    ),
    "invocation_cut": (
        "truncation would take away the tokens that an answer-only adapter acts from",
        "raise max_length or use truncation_mode='keep_start'",
    ),
}
# Their names, in this order.
EMPTY_COMPLETION, IDENTICAL, IDENTICAL_AFTER, PROMPT_TOO_LONG, COMPLETION_TOO_LONG, *_others = REASONS
TRANSCRIPTS_DIFFER, NO_COMMON_PROMPT, NO_RANKING, NO_SINGLE_BEST, SAME_TEXT, MISSING_VALUE, *_others = _others
NOTHING_SCORED, UNREADABLE_IMAGE, IMAGE_CUT, INVOCATION_CUT = _others
ROWS_NAMED = 5
NOTABLE = 0.01  # share of rows


def explain(reason: str) -> str:
    """Returns a reason with what it means and the remedy, for messages; the sentence is left open."""
    meaning, remedy = REASONS[reason]
    return f"{reason}: {meaning}. Remedy: {remedy}"


# What is added up over the rows: the name that a row's record has for it, and that of the sum.
_same = "completions ends_lost foreign_turns unended spelled swapped ties desirable undesirable prompt_tokens"
ADDED = {name: name for name in [*_same.split(), "completion_tokens"]}
ADDED |= {"completions_cut": "completions_trimmed", "resplits": "boundary_resplits"}


@dataclass
class DataSummary:
    """Counts for one dataset. Rows unless said otherwise; truncation and token counts are of the kept rows.

    A stream fills its summary as it is read and starts again from zero with each pass. The worker processes of a data
    loader `tell` what they have counted, and the main process `gather`s it.
    """

    name: str
    format: str = ""
    max_length: int | None = None
    truncation_mode: str = "keep_start"
    source_rows: int = 0
    kept_rows: int = 0
    dropped: dict[str, int] = field(default_factory=dict)  # reason -> rows
    dropped_rows: dict[str, list[int]] = field(default_factory=dict)  # reason -> the first few row numbers
    completions: int = 0
    rows_truncated: int = 0
    prompts_trimmed: int = 0
    completions_trimmed: int = 0  # completions
    ends_lost: int = 0  # completions whose end token was cut off
    boundary_resplits: int = 0  # completions tokenized on their own, as a token would have crossed the border
    swapped: int = 0  # pairs whose preference was below 0.5: the rejected completion now stands first
    ties: int = 0  # pairs with preference 0.5
    desirable: int = 0  # completions that were judged one by one
    undesirable: int = 0
    foreign_turns: int = 0  # completions that hold user or tool turns, whose tokens are scored like the rest
    unended: int = 0  # completions with nothing behind their text for the model to stop with
    spelled: int = 0  # rows whose text spells special tokens, which act as tokens (messages, completions of text)
    left_out: dict[str, int] = field(default_factory=dict)  # key of messages that the template leaves out -> rows
    prompt_tokens: int = 0  # each prompt once
    completion_tokens: int = 0
    unshared_tokens: int = 0  # prompt repeated for every completion
    longest: int = 0  # tokens of prompt + one completion
    unused_columns: tuple[str, ...] = ()
    as_chat: bool | None = False  # whether texts were read as turns of the chat template; None: there were none
    date: str | None = None  # that the chat template writes, where it writes one

    _warned = False  # for good, also where a stream starts again
    _told = torch.zeros(0, 0, dtype=torch.int64)  # one row of numbers for each worker process, in shared memory

    @property
    def total_tokens(self) -> int:
        """Returns the tokens of all kept rows with each prompt counted once."""
        return self.prompt_tokens + self.completion_tokens

    @property
    def dropped_total(self) -> int:
        return sum(self.dropped.values())

    def check(self) -> None:
        """Raises `DataError` unless every source row is accounted for."""
        if self.kept_rows + self.dropped_total != self.source_rows:
            raise DataError(
                f"{self.name}: {self.kept_rows} kept + {self.dropped_total} dropped rows are not the "
                f"{self.source_rows} source rows. This is a defect of the pipeline, please report it."
            )

    def warn(self) -> None:
        """Warns of what is kept and notable, once all rows are counted."""
        if self.spelled > NOTABLE * self.kept_rows:
            logger.warning(
                "%s: %d of %d rows spell special tokens of the tokenizer in their text (such as its end token). Each "
                "acts as a token there: it may end a turn or open another. Take them out of the texts if that is not "
                "meant.",
                *(self.name, self.spelled, self.kept_rows),
            )

    def check_share(self, max_share: float | None) -> None:
        """Raises `DataError` when no row is left, or more than `max_share` of the rows were dropped; None: or any."""
        if not self.source_rows:
            raise DataError(f"{self.name}: the dataset is empty. Give it at least one row.")
        if max_share is None and self.dropped:
            reason, rows = next(iter(self.dropped_rows.items()))
            raise DataError(
                f"{self.name} row {rows[0]}: {explain(reason)}, or let them be dropped with on_unusable='drop'."
            )
        if max_share is None or self.kept_rows and self.dropped_total / self.source_rows <= max_share:
            return
        left = f"more than max_unusable_share={max_share:g}" if self.kept_rows else "none is left"
        reasons = "; ".join(
            "{}× {} ({}; remedy: {}; e.g. row {})".format(
                count, reason, *REASONS[reason], self.dropped_rows[reason][0]
            )
            for reason, count in self.dropped.items()
        )
        raise DataError(
            f"{self.name}: {self.dropped_total} of {self.source_rows} rows are unusable, {left}: {reasons}."
        )

    def add(self, record: Mapping[str, Any]) -> None:
        """Counts one row: the statistics that `worker.py` keeps beside its ids."""
        self.source_rows += 1
        if reason := record["drop"]:
            self.dropped[reason] = self.dropped.get(reason, 0) + 1
            named = self.dropped_rows.setdefault(reason, [])
            if len(named) < ROWS_NAMED:
                named.append(record["row"])
            return
        self.kept_rows += 1
        for name, target in ADDED.items():
            setattr(self, target, getattr(self, target) + record[name])
        for key in filter(None, record["left_out"].split(", ")):
            self.left_out[key] = self.left_out.get(key, 0) + 1
        self._warn_unended([record["row"]] if self.unended else [])
        self.rows_truncated += bool(record["prompt_cut"] or record["completions_cut"])
        self.prompts_trimmed += bool(record["prompt_cut"])
        self.unshared_tokens += record["prompt_tokens"] * record["completions"] + record["completion_tokens"]
        self.longest = max(self.longest, record["longest"])

    def add_all(self, records: pa.Table) -> None:
        """Counts the rows of a table by its columns, as `add` does one by one."""
        drop, prompt_cut, cut = (records.column(name) for name in ("drop", "prompt_cut", "completions_cut"))
        self.source_rows += len(drop)
        self.kept_rows += len(drop)
        for reason, count in _counts(drop):
            self.kept_rows -= count
            self.dropped[reason] = count
            self.dropped_rows[reason] = _rows_with(records, pc.equal(drop, reason), ROWS_NAMED)
        for name, target in ADDED.items():
            setattr(self, target, getattr(self, target) + _sum(records.column(name)))
        for keys, count in _counts(records.column("left_out")):
            for key in keys.split(", "):
                self.left_out[key] = self.left_out.get(key, 0) + count
        self._warn_unended(_rows_with(records, pc.not_equal(records.column("unended"), 0), 1))
        self.rows_truncated += _sum(pc.not_equal(pc.add(prompt_cut, cut), 0))
        self.prompts_trimmed += _sum(pc.not_equal(prompt_cut, 0))
        prompts, completions = (records.column(name).cast("int64") for name in ("prompt_tokens", "completions"))
        self.unshared_tokens += _sum(pc.multiply(prompts, completions)) + _sum(records.column("completion_tokens"))
        self.longest = max(self.longest, pc.max(records.column("longest")).as_py() or 0)

    def _warn_unended(self, rows: Sequence[int]) -> None:
        if rows and not self._warned:
            self._warned = True
            logger.warning(
                "%s: the chat template ends the assistant's turn with no token (e.g. in row %d): the model does not "
                "learn to stop. Use a template that puts the end token behind the turn.",
                *(self.name, rows[0]),
            )

    def reset(self) -> None:
        """Starts counting again; what describes the dataset stays."""
        kept = self.name, self.format, self.max_length, self.truncation_mode
        self.__init__(  # type: ignore[misc]
            *kept, unused_columns=self.unused_columns, as_chat=self.as_chat, date=self.date
        )

    def listen(self) -> None:
        """Lets worker processes, to which copies of this summary go, `tell` it what they count."""
        self._told = torch.zeros(MOST_WORKERS, len(NUMBERS) + 2 * len(REASONS), dtype=torch.int64).share_memory_()

    def tell(self) -> None:
        """In a worker process: shows the main process what has been counted here of the pass under way."""
        if (worker := get_worker_info()) is not None and worker.id < len(self._told):
            drops = ((self.dropped.get(reason, 0), self.dropped_rows.get(reason, [0])[0]) for reason in REASONS)
            self._told[worker.id] = torch.tensor([*(getattr(self, name) for name in NUMBERS), *chain(*drops)])

    def gather(self) -> None:
        """Takes over what worker processes have told, if there are some. Of the dropped rows one each is named, by its
        number in the worker's part of the stream; which keys the template leaves out is not told."""
        told = [row for row in self._told.tolist() if row[0]]
        if not told:
            return
        for name, counted in zip(NUMBERS, zip(*told, strict=True), strict=False):
            setattr(self, name, max(counted) if name == "longest" else sum(counted))
        self.dropped, self.dropped_rows = {}, {}
        for number, reason in enumerate(REASONS):
            drops = [row[len(NUMBERS) + 2 * number :][:2] for row in told]
            if count := sum(drop[0] for drop in drops):
                self.dropped[reason] = count
                self.dropped_rows[reason] = [first for count, first in drops if count]

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.kept_rows} of {self.source_rows} rows kept ({self.format} format)"]
        for reason, count in self.dropped.items():
            rows = ", ".join(map(str, self.dropped_rows[reason]))
            more = ", …" if count > len(self.dropped_rows[reason]) else ""
            lines.append(f"  dropped {count}: {reason}, {REASONS[reason][0]} (row {rows}{more})")
        limit = "no limit" if self.max_length is None else f"max_length {self.max_length}, {self.truncation_mode}"
        lines.append(
            f"  tokens: {self.total_tokens} ({self.prompt_tokens} prompt, {self.completion_tokens} completion; "
            f"{self.unshared_tokens} with the prompt repeated), longest {self.longest} ({limit})"
        )
        if self.rows_truncated:
            lines.append(
                f"  truncated: {self.rows_truncated} rows ({self.prompts_trimmed} prompts, {self.completions_trimmed} "
                f"completions, {self.ends_lost} of them lost their end token)"
            )
        notes = (
            (self.boundary_resplits, "completions tokenized apart from the prompt (merge at the border)"),
            (self.foreign_turns, "completions hold user or tool turns; their tokens are scored too"),
            (self.unended, "completions end without an end token: the chat template puts none behind the turn"),
            (self.spelled, "rows spell special tokens of the tokenizer in their text; each acts as a token there"),
            (self.swapped, "rows swapped: preference below 0.5"),
            (self.ties, "ties: preference 0.5"),
        )
        lines += [f"  {count} {note}" for count, note in notes if count]
        if self.desirable or self.undesirable:
            alone = "" if self.desirable and self.undesirable else "; with one kind alone there is nothing to compare"
            lines.append(f"  completions: {self.desirable} desirable, {self.undesirable} undesirable{alone}")
        if self.left_out:
            keys = ", ".join(f"{key} ({count} rows)" for key, count in self.left_out.items())
            lines.append(f"  left out by the chat template: {keys}")
        if self.date:
            lines.append(f"  date in the chat template: {self.date}, kept with the tokenizer")
        if self.unused_columns:
            lines.append(f"  unused columns: {', '.join(self.unused_columns)}")
        return "\n".join(lines)


def _sum(column: Any) -> int:
    return pc.sum(column).as_py() or 0


def _counts(texts: Any) -> Iterator[tuple[str, int]]:
    """Yields the texts of a column but the empty one, each with the number of its rows, in order of appearance."""
    yield from ((one["values"], one["counts"]) for one in pc.value_counts(texts).to_pylist() if one["values"])


def _rows_with(records: pa.Table, mask: Any, most: int) -> list[int]:
    return records.column("row").take(pc.indices_nonzero(mask).slice(0, most)).to_pylist()


# What worker processes tell of beside the drops. The first is not 0 once there is something to tell.
NUMBERS = ["source_rows", *(one.name for one in fields(DataSummary) if one.type is int and one.name != "source_rows")]
MOST_WORKERS = 256
DataReport = DataSummary  # its name before
