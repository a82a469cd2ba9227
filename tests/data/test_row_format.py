"""A format for rows that is added from outside the package."""

import json

import pytest
from data_helpers import answer, chat_pair, turns
from datasets import Dataset, IterableDataset

from dpo_peft.data import prepare_dataset
from dpo_peft.data.fields import RowProblem, read_text
from dpo_peft.data.formats import REGISTERED, Example, RowFormat, register
from dpo_peft.errors import DataError

ROWS = [{"duel": json.dumps({"ask": f"Color {i}?", "won": f"blue {i}", "lost": "red"}), "id": i} for i in range(5)]


def read_duel(row):
    duel = json.loads(read_text(row, "duel"))
    if "won" not in duel:
        raise RowProblem("duel", "nobody has won", "leave the duel out")
    if duel["won"] == "nothing":
        return "empty_completion"
    return Example("chat", turns(duel["ask"]), [answer(duel["won"]), answer(duel["lost"])], ("won", "lost"))


@pytest.fixture(autouse=True)
def duels():
    register(RowFormat("duel", "chat", ("duel",), read_duel, detect=lambda columns, first: "duel" in columns))
    yield
    del REGISTERED["duel"]


@pytest.mark.parametrize("num_proc", [None, 2])
def test_rows_of_an_added_format(make_tokenizer, num_proc):
    rows = [*ROWS, {"duel": json.dumps({"ask": "?", "won": "nothing", "lost": "x"}), "id": 5}]
    prepared, report = prepare_dataset(Dataset.from_list(rows), make_tokenizer(), num_proc=num_proc)
    same = [chat_pair(f"Color {i}?", f"blue {i}", "red") for i in range(5)]
    assert list(prepared) == list(prepare_dataset(Dataset.from_list(same), make_tokenizer())[0])
    assert (report.format, report.unused_columns) == ("duel", ("id",))
    assert report.dropped_rows == {"empty_completion": [5]}
    stream, _ = prepare_dataset(IterableDataset.from_generator(lambda: iter(rows)), make_tokenizer())
    assert list(stream) == list(prepared)


def test_a_malformed_row_of_an_added_format_is_named(make_tokenizer):
    with pytest.raises(DataError, match="train row 5, field 'duel': nobody has won. Remedy: leave the duel out"):
        prepare_dataset(Dataset.from_list([*ROWS, {"duel": "{}", "id": 5}]), make_tokenizer())


def test_another_reader_misses_the_cache(make_tokenizer, tmp_path):
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "rows")

    def lengths():
        prepared, _ = prepare_dataset(Dataset.load_from_disk(tmp_path / "rows"), make_tokenizer())
        return [len(row["prompt_ids"]) for row in prepared]

    def read_twice(row):
        example = read_duel(row)
        return Example("chat", turns(example.prompt[0]["content"] * 2), example.completions, example.fields)

    before = lengths()
    register(RowFormat("duel", "chat", ("duel",), read_twice, detect=lambda columns, first: "duel" in columns))
    assert all(now > then for now, then in zip(lengths(), before, strict=True))


def test_datasets_of_other_formats_are_left_alone(make_tokenizer):
    assert prepare_dataset(Dataset.from_list([chat_pair()]), make_tokenizer())[1].format == "chat"
