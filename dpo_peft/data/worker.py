"""One row at a time: check it, tokenize it, cut it, and keep the statistics that the summary is counted from."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from itertools import combinations
from typing import Any

from datasets import Features, Sequence, Value
from transformers import PreTrainedTokenizerBase

from ..forward.scope import invocation_start
from . import summary
from .chat import UNENDED, Place
from .encode import Encoder
from .fields import NoValue, Row, RowProblem, Values, check_size, read_number, read_preference
from .formats import ASKING_ROLES, IMAGE_COLUMNS, Encoded, Example, RowFormat, Wanted
from .image_rows import ImageFile, place_images, take_images
from .images import Images
from .invocation import check_invoked
from .parse import Parsed
from .tokenize import special_tokens
from .trajectories import GIVEN, encode_trajectories, one_turn_each
from .truncate import all_same, fit
from .unread import texts_in

COUNTERS = (
    "completions foreign_turns prompt_cut completions_cut ends_lost resplits prompt_tokens completion_tokens longest "
    "swapped ties desirable undesirable unended spelled"
).split()
IDS = {
    "prompt_ids": Sequence(Value("int32")),
    "completion_ids": Sequence(Sequence(Value("int32"))),
    "row": Value("int64"),
}
STATISTICS = {"drop": Value("string"), "left_out": Value("string"), **{name: Value("int32") for name in COUNTERS}}
# What a row holds beside its ids, by what the objective learns from.
EXTRAS = {
    "preference": Value("float64"),
    "margin": Value("float64"),
    "grades": Sequence(Value("float64")),
    "steps": Sequence(Sequence(Value("int32"))),
    "completion": Value("int64"),  # which of its row, where nobody judged them
    "adapter_start": Value("int32"),  # place in the prompt from which an answer-only adapter acts
    "images": Value("string"),  # name of the prompt's images; "" for none
    # Of a stream's rows, which are not found again.
    "image_files": [{"content": Value("binary"), "path": Value("string")}],
}
BY_DATA = {"lists": ["grades"], "singles": ["grades"], "trajectories": ["steps"], "unlabeled": ["completion"]}
# What a row that is dropped holds instead.
NOTHING: Values = {**dict.fromkeys([*IDS, *EXTRAS], []), "preference": 0.0, "margin": 0.0}
NOTHING |= {"left_out": "", "images": "", "adapter_start": 0}
TOO_DEEP = RowProblem("row", "is nested too deeply", "store what is nested as JSON text")
READ_LABEL: dict[str, Callable[[Row], float]] = {
    "preference": read_preference,
    "margin": partial(read_number, column="margin"),
}


class RowWorker:
    """Checks and tokenizes single rows of one dataset; goes to worker processes as a whole.

    `wanted.label_columns` must be columns of the dataset. `drop_missing`: a row whose cell holds nothing is dropped
    and counted, not refused. `images`: the processor of rows with images, if there is one; rows of a `stream` keep
    their files. `prepared_columns` are those that training reads, `features` those and the statistics.
    """

    def __init__(
        self,
        name: str,
        row_format: RowFormat,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int | None,
        truncation_mode: str,
        wanted: Wanted,
        drop_missing: bool = True,
        images: Images | None = None,
        stream: bool = False,
    ):
        self.name, self.format, self.tokenizer, self.wanted = name, row_format, tokenizer, wanted
        self.max_length, self.truncation_mode, self.drop_missing = max_length, truncation_mode, drop_missing
        self.encoder, self.images = Encoder(tokenizer, name, row_format.kind, images=images), images
        self.tried: dict[Place, set[str]] = {}  # what the template leaves out of turns, by where they stand
        self.special = special_tokens(tokenizer)
        extras = [*wanted.label_columns, *BY_DATA.get(wanted.data, ())]
        extras += ["adapter_start"] if wanted.invocation else []
        extras += (["images", "image_files"] if stream else ["images"]) if images else []
        self.features = Features({**IDS, **{extra: EXTRAS[extra] for extra in extras}, **STATISTICS})
        self.prepared_columns = [*IDS, *extras]

    def check_batch(self, batch: Mapping[str, list[Any]]) -> dict[str, list[str]]:
        """Map function of the first pass: what is wrong with each row, as JSON, or nothing."""
        return {"problem": [self._problem(row) for row in rows_of(batch)]}

    def record_batch(self, batch: Mapping[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        """Map function of the second pass."""
        each = zip(rows_of(batch), indices, strict=True)
        records = [record for row, index in each for record in self.records(row, index)]
        return {column: [record[column] for record in records] for column in self.features}

    def records(self, row: Row, index: int, check: bool = False) -> list[Values]:
        """Returns the prepared row with its statistics, or one for each completion if nobody judged them.

        One that is dropped has no ids and names the reason. Raises `DataError` for a malformed row.
        """
        try:
            examples, labels = self._check(row) if check else self._parse(row)
            made = [self._record(example, labels) for example in examples]
        except RecursionError:
            raise TOO_DEEP.located(self.name, index) from None
        except RowProblem as problem:
            raise problem.located(self.name, index) from problem.__cause__
        whole = ({**record, "row": index, "completion": number} for number, record in enumerate(made))
        return [{column: record[column] for column in self.features} for record in whole]

    def _problem(self, row: Row) -> str:
        try:
            self._check(row)
        except RowProblem as problem:
            return json.dumps(problem.args)
        except RecursionError:
            return json.dumps(TOO_DEEP.args)
        return ""

    def _parse(self, row: Row, drop_missing: bool = True) -> tuple[list[Parsed], dict[str, float]]:
        """Returns the row's examples and its labels. Raises `RowProblem` for a malformed row."""
        try:
            given = take_images(row)
            row = {column: value for column, value in row.items() if column not in IMAGE_COLUMNS}
            if self.format.kind != "ids":  # which hold nothing but whole numbers
                check_size(row)
            row = self.format.prepare(row)
            found = self.format.read(row)
            labels = {column: READ_LABEL[column](row) for column in self.wanted.label_columns}
        except NoValue:
            if not drop_missing:
                raise
            return [summary.MISSING_VALUE], {}
        if self.wanted.unpair and isinstance(found, Example):
            found = _unpaired(found)
        examples = found if isinstance(found, list) else [found]
        place = self.images.place_in_text if self.images else None
        return [one if isinstance(one, str) else place_images(one, given, place) for one in examples], labels

    def image_files(self, row: Row) -> list[ImageFile]:
        """Returns the images of a row's prompt."""
        return next((list(one.images) for one in self._parse(row)[0] if not isinstance(one, str)), [])

    def _check(self, row: Row) -> tuple[list[Parsed], dict[str, float]]:
        """Parses a row; the first of each shape goes through the chat template, which may refuse it."""
        examples, labels = self._parse(row, self.drop_missing)
        for example in examples:
            if isinstance(example, str):
                continue
            empty = example.kind == "text" and not example.prompt and not self.encoder.leading
            if empty or example.kind == "chat" and self._try(example)[1]:
                self._encode(example)
        return examples, labels

    def _try(self, example: Example) -> tuple[list[Place], bool]:
        """Tries what the chat template leaves out of turns that stand where none was tried before.

        Returns where the example's turns stand, and whether one of these places is new.
        """
        chat = self.encoder.chat(example)
        places = [place for part in chat.places() for place in part]
        if all(place in self.tried for place in places):
            return places, False
        for place, keys in zip(places, (keys for part in chat.check() for keys in part), strict=True):
            self.tried.setdefault(place, keys)
        return places, True

    def _left_out(self, example: Example) -> tuple[str, int]:
        """Returns the keys of its messages that the chat template leaves out, and how many turns it doesn't end."""
        if example.kind != "chat":
            return "", 0
        found = [keys for place in self._try(example)[0] if (keys := self.tried[place])]
        return ", ".join(sorted(set().union(*found) - {UNENDED})), sum(UNENDED in keys for keys in found)

    def _encode(self, example: Example) -> Encoded | str:
        """Returns the ids of an example, or the reason why there is nothing to learn from it. Images are opened."""
        opened = example if self.images is None else self.images.opened(example)
        if isinstance(opened, str):
            return opened
        encoded = self._ids(opened)
        if isinstance(encoded, str) or self.images is None:
            return encoded
        return self.images.checked(encoded, opened)

    def _ids(self, example: Example) -> Encoded | str:
        turns, unit = self.wanted.data == "trajectories", self.wanted.discount_unit
        if turns and example.kind == "chat":
            encoded: Encoded | str = encode_trajectories(self.encoder.chat(example), unit)
        else:
            encoded = self.encoder(example)
        if isinstance(encoded, str):
            return encoded
        # What is left of a trajectory behind the shared start may well be no more than its end.
        end = self.tokenizer.eos_token_id
        if not encoded.steps and any(all(token == end for token in ids) for ids in encoded.completion_ids):
            return summary.EMPTY_COMPLETION
        if turns and not encoded.steps:
            encoded = one_turn_each(encoded, unit)
        if all_same(encoded.completion_ids):
            return summary.IDENTICAL
        return summary.SAME_TEXT if graded_apart(encoded.completion_ids, example.grades) else encoded

    def _prepare(self, example: Example) -> Encoded | str:
        """Returns ids and steps after truncation, or why nothing useful is left."""
        grades = example.grades
        if self.wanted.data == "lists" and grades:
            if grades[0] == grades[-1]:
                return summary.NO_RANKING
            if self.wanted.single_best and grades[0] == grades[1]:
                return summary.NO_SINGLE_BEST
        encoded = self._encode(example)
        if isinstance(encoded, str):
            return encoded
        begins = self.wanted.invocation
        named = dict(zip(example.fields, encoded.completion_ids, strict=True))
        check_invoked(self.tokenizer, begins, encoded.prompt_ids, named)
        fitted = fit(encoded, self.max_length, self.truncation_mode)
        if isinstance(fitted, str):
            return fitted
        if graded_apart(fitted.completion_ids, grades):
            return summary.IDENTICAL_AFTER
        if self.images is not None and self.images.cuts(encoded.prompt_ids, fitted.prompt_cut):
            return summary.IMAGE_CUT
        if begins and invocation_start(fitted.prompt_ids, begins) is None:
            return summary.INVOCATION_CUT
        steps = fitted.steps
        if not fitted.prompt_ids:  # nothing predicts the first token
            steps = [[GIVEN, *values[1:]] for values in steps]
        if any(set(values) <= {GIVEN} for values in steps):
            return summary.NOTHING_SCORED
        return replace(fitted, steps=steps)

    def _spells(self, example: Example) -> bool:
        """Says whether messages, or completions of text, spell special tokens. A text prompt may well be rendered."""
        read = {"chat": [example.prompt, *example.completions], "text": example.completions}
        text = "\n".join(texts_in(read.get(example.kind, [])))
        return any(token in text for token in self.special)

    def _record(self, example: Parsed, labels: dict[str, float]) -> Values:
        made = example if isinstance(example, str) else self._prepare(example)
        if isinstance(example, str) or isinstance(made, str):
            return {**dict.fromkeys(COUNTERS, 0), **NOTHING, "drop": made}
        left_out, unended = self._left_out(example)
        lengths = [len(ids) for ids in made.completion_ids]
        record = {
            **dict.fromkeys(COUNTERS, 0),
            **vars(made),
            **labels,
            "grades": example.grades,
            "drop": "",
            "left_out": left_out,
            "unended": unended,
            "spelled": int(self._spells(example)),
            "completions": len(lengths),
            "foreign_turns": 0 if self.wanted.data == "trajectories" else _foreign_turns(example),
            "image_files": [file._asdict() for file in example.images],
            "prompt_tokens": len(made.prompt_ids),
            "completion_tokens": sum(lengths),
            "longest": len(made.prompt_ids) + max(lengths),
            "ties": int(labels.get("preference") == 0.5),
        }
        if self.wanted.invocation:
            record["adapter_start"] = invocation_start(made.prompt_ids, self.wanted.invocation)
        if self.wanted.data == "singles" and example.grades:
            record |= {"desirable": example.grades.count(1.0), "undesirable": example.grades.count(0.0)}
        if labels.get("preference", 1.0) < 0.5:  # the completion that is likely the better one stands first
            record |= {"swapped": 1, "preference": 1 - labels["preference"]}
            record |= {column: record[column][::-1] for column in ("completion_ids", "steps")}
            record |= {"margin": 0.0 - labels["margin"]} if "margin" in labels else {}
        return record


def rows_of(batch: Mapping[str, list[Any]]) -> list[Values]:
    """Returns the rows of a batch of columns."""
    columns = {column: batch[column] for column in batch}
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def graded_apart(completion_ids: list[list[int]], grades: list[float] | None) -> bool:
    """Says whether the same completion stands there with two grades."""
    if not grades:
        return False
    found: dict[tuple[int, ...], float] = {}
    return any(found.setdefault(tuple(ids), grade) != grade for ids, grade in zip(completion_ids, grades, strict=True))


def _unpaired(example: Example) -> list[Parsed]:
    """Returns an example for each completion; or why all of them teach nothing, which one alone doesn't show."""
    grades = example.grades or []
    each = list(zip(example.completions, example.fields, grades, strict=True))
    if any(one == other and grade != least for (one, _, grade), (other, _, least) in combinations(each, 2)):
        return [summary.IDENTICAL if all_same(example.completions) else summary.SAME_TEXT]
    return [replace(example, completions=[one], fields=(field,), grades=[grade]) for one, field, grade in each]


def _foreign_turns(example: Example) -> int:
    """Counts the completions that hold turns that the model does not write."""
    conversations = example.completions if example.kind == "chat" else []
    return sum(any(turn["role"] in (*ASKING_ROLES, "tool") for turn in turns) for turns in conversations)
