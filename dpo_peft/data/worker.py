"""One row at a time: check it, tokenise it, cut it, and keep the statistics that the report is counted from."""

import json
from typing import Any

from datasets import Features, Sequence, Value
from transformers import PreTrainedTokenizerBase

from .chat import check_chat_template, check_rendering, encode_chat
from .report import EMPTY_COMPLETION, IDENTICAL
from .schema import ASKING_ROLES, Example, Row, count_turns, parse_row
from .tokenize import Encoded, check_tokenizer, encode_text, is_empty, leading_ids
from .truncate import Fitted, all_same, fit
from .values import RowProblem

COUNTERS = (
    "completions foreign_turns prompt_cut completions_cut ends_lost resplits prompt_tokens completion_tokens longest"
).split()
RECORD = Features(
    {
        "prompt_ids": Sequence(Value("int32")),
        "completion_ids": Sequence(Sequence(Value("int32"))),
        "row": Value("int64"),
        "drop": Value("string"),
        **{counter: Value("int32") for counter in COUNTERS},
    }
)


class RowWorker:
    """Checks and tokenises single rows of one dataset; goes to worker processes as a whole."""

    def __init__(
        self, name: str, fmt: str, tokenizer: PreTrainedTokenizerBase, max_length: int | None, truncation_mode: str
    ):
        self.name, self.fmt, self.tokenizer = name, fmt, tokenizer
        self.max_length, self.truncation_mode = max_length, truncation_mode
        is_text = fmt in ("text", "text_implicit", "transcript")
        check_tokenizer(tokenizer, need_eos=is_text)
        if fmt in ("chat", "chat_implicit"):
            check_chat_template(tokenizer, name)
        self.leading = leading_ids(tokenizer) if is_text else []
        self.vocab_size = len(tokenizer)
        self.tried: set[str] = set()

    def check(self, row: Row) -> None:
        """Raise `RowProblem` for a malformed row. The first row of each shape goes through the chat template."""
        example = parse_row(row, self.fmt, self.vocab_size)
        if not isinstance(example, Example):
            return
        if example.kind == "text" and not example.prompt and not self.leading:
            self.encode(example)
        if example.kind == "chat" and (shape := _shape(example)) not in self.tried:
            check_rendering(self.tokenizer, example)
            self.encode(example)
            self.tried.add(shape)

    def encode(self, example: Example) -> Encoded | str:
        """Ids of an example, or the reason why there is nothing to learn from it."""
        encoded: Encoded | str
        if example.kind == "text":
            encoded = encode_text(self.tokenizer, example.prompt, example.completions, self.leading)
        elif example.kind == "chat":
            encoded = encode_chat(self.tokenizer, example)
        else:
            encoded = Encoded(example.prompt, example.completions)
        if isinstance(encoded, str):
            return encoded
        if any(is_empty(ids, self.tokenizer.eos_token_id) for ids in encoded.completion_ids):
            return EMPTY_COMPLETION
        return IDENTICAL if all_same(encoded.completion_ids) else encoded

    def record(self, row: Row, index: int) -> dict[str, Any]:
        """The prepared row with its statistics; a dropped one has no ids and names the reason."""
        example = parse_row(row, self.fmt, self.vocab_size)
        encoded = self.encode(example) if isinstance(example, Example) else example
        fitted: Fitted | str
        if isinstance(encoded, Encoded):
            fitted = fit(encoded.prompt_ids, encoded.completion_ids, self.max_length, self.truncation_mode)
        else:
            fitted = encoded
        if not isinstance(encoded, Encoded) or not isinstance(fitted, Fitted):
            return {"prompt_ids": [], "completion_ids": [], "row": index, "drop": fitted, **dict.fromkeys(COUNTERS, 0)}
        lengths = [len(ids) for ids in fitted.completion_ids]
        return {
            "prompt_ids": fitted.prompt_ids,
            "completion_ids": fitted.completion_ids,
            "row": index,
            "drop": "",
            "completions": len(lengths),
            "foreign_turns": _foreign_turns(example),
            "prompt_cut": fitted.prompt_cut,
            "completions_cut": fitted.completions_cut,
            "ends_lost": fitted.ends_lost,
            "resplits": encoded.resplits,
            "prompt_tokens": len(fitted.prompt_ids),
            "completion_tokens": sum(lengths),
            "longest": len(fitted.prompt_ids) + max(lengths),
        }

    def check_batch(self, batch: Any) -> dict[str, list[str]]:
        """Map function of the first pass: what is wrong with each row, as JSON, or nothing."""
        return {"problem": [self._problem(row) for row in rows_of(batch)]}

    def record_batch(self, batch: Any, indices: list[int]) -> dict[str, list[Any]]:
        """Map function of the second pass."""
        records = []
        for row, index in zip(rows_of(batch), indices, strict=True):
            try:
                records.append(self.record(row, index))
            except RowProblem as problem:
                raise problem.located(self.name, index) from problem.__cause__
        return {column: [record[column] for record in records] for column in RECORD}

    def _problem(self, row: Row) -> str:
        try:
            self.check(row)
        except RowProblem as problem:
            return json.dumps(problem.args)
        return ""


def rows_of(batch: Any) -> list[dict[str, Any]]:
    """Rows of a batch of columns."""
    columns = list(batch.keys())
    return [dict(zip(columns, values, strict=True)) for values in zip(*(batch[c] for c in columns), strict=True)]


def _foreign_turns(example: Example | str) -> int:
    """How many completions hold turns that the model does not write."""
    if isinstance(example, str) or example.kind != "chat":
        return 0
    return sum(count_turns(messages, (*ASKING_ROLES, "tool")) > 0 for messages in example.completions)


def _shape(example: Example) -> str:
    """What decides how a template takes a row, besides the texts: roles, fields, tools, arguments."""
    conversations = [example.prompt, *example.completions]
    roles = [[(m["role"], *sorted(m)) for m in messages] for messages in conversations]
    return json.dumps([roles, bool(example.tools), example.template_kwargs, example.continues], default=str)
