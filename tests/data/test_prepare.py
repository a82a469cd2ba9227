"""`prepare_dataset` as a whole: caching as `datasets` does it, streams, worker processes, odd kinds of datasets."""

import random

import pytest
from data_helpers import answer, chat_pair, pair, turns
from datasets import Dataset, IterableDataset, load_from_disk
from tokenizers import AddedToken

from dpo_peft.data import (
    from_alpaca,
    from_hh,
    from_oasst_tree,
    from_sharegpt,
    from_tulu,
    pandalm_decided,
    prepare_dataset,
)
from dpo_peft.data.fingerprint import tokenizer_hash
from dpo_peft.data.worker import RowWorker
from dpo_peft.errors import DataError

ROWS = [chat_pair(f"Question {i}", "yes " * (i % 7 + 1), "no " * (i % 5 + 1)) for i in range(30)]
ROWS[4] = chat_pair("same", "a", "a")
ROWS[9] = chat_pair("none", "", "a")


def from_disk(path, rows):
    """A dataset with files of its own, so that results are cached beside them."""
    if not path.exists():
        Dataset.from_list(rows).save_to_disk(path)
    return load_from_disk(path)


@pytest.fixture
def calls(monkeypatch):
    """How many batches were checked and tokenized in this process."""
    count = {"check_batch": 0, "record_batch": 0}
    for name in count:
        original = getattr(RowWorker, name)

        def counted(self, *args, name=name, original=original):
            count[name] += 1
            return original(self, *args)

        monkeypatch.setattr(RowWorker, name, counted)
    return count


def test_second_run_reads_the_cache_with_the_same_report(tmp_path, make_tokenizer, calls):
    first, first_report = prepare_dataset(from_disk(tmp_path / "d", ROWS), make_tokenizer(), max_length=55)
    assert calls == {"check_batch": 1, "record_batch": 1}
    second, second_report = prepare_dataset(from_disk(tmp_path / "d", ROWS), make_tokenizer(), max_length=55)
    assert calls == {"check_batch": 1, "record_batch": 1}
    assert second[:] == first[:] and second_report == first_report
    assert second.cache_files == first.cache_files != []
    assert first_report.dropped == {"identical_completions": 1, "empty_completion": 1} and first_report.ends_lost
    prepare_dataset(from_disk(tmp_path / "d", ROWS), make_tokenizer(), max_length=55, load_from_cache_file=False)
    assert calls == {"check_batch": 2, "record_batch": 2}


def other_template(tokenizer):
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_start|>", "<|im_start|> ")


def other_special_token(tokenizer):
    tokenizer.eos_token = "<|im_end|>"


def added_token(tokenizer):
    tokenizer.add_tokens([AddedToken("Question", normalized=False)])


@pytest.mark.attack("stale caches")
@pytest.mark.parametrize("change", [other_template, other_special_token, added_token])
def test_a_changed_tokenizer_misses_the_cache(tmp_path, make_tokenizer, calls, change):  # as T6
    prepare_dataset(from_disk(tmp_path / "d", ROWS), make_tokenizer())
    tokenizer = make_tokenizer()
    change(tokenizer)
    prepared, _ = prepare_dataset(from_disk(tmp_path / "d", ROWS), tokenizer)
    assert calls["record_batch"] == 2
    fresh, _ = prepare_dataset(Dataset.from_list(ROWS), tokenizer)
    assert prepared[:] == fresh[:]


@pytest.mark.parametrize(
    "options", [{"max_length": 50}, {"max_length": None}, {"truncation_mode": "keep_end"}], ids=str
)
def test_a_changed_option_misses_the_cache_but_not_the_check(tmp_path, make_tokenizer, calls, options):
    prepare_dataset(from_disk(tmp_path / "d", ROWS), make_tokenizer(), max_length=55)
    prepare_dataset(from_disk(tmp_path / "d", ROWS), make_tokenizer(), **{"max_length": 55, **options})
    assert calls == {"check_batch": 1, "record_batch": 2}


SOFT = [{**row, "preference": 0.25 + i % 3 / 4} for i, row in enumerate(ROWS)]
TIED = [
    {"prompt": turns(f"q{i}"), "completions": [answer(t) for t in "abc"], "ranks": [0, i % 2, 1]} for i in range(10)
]
CHANGES = {
    "data": (ROWS, {"data": "pairs"}, {"data": "lists"}),
    "data between graded kinds": (ROWS, {"data": "singles"}, {"data": "lists"}),
    "discount_unit": (ROWS, {"data": "trajectories"}, {"data": "trajectories", "discount_unit": "token"}),
    "single_best": (TIED, {"data": "lists"}, {"data": "lists", "single_best": True}),
    "label_columns": (
        SOFT,
        {"label_columns": ("preference",)},
        {"label_columns": ("preference",), "data": "trajectories"},
    ),
}


@pytest.mark.attack("stale caches")
@pytest.mark.parametrize("case", CHANGES)
def test_what_the_objective_learns_from_is_part_of_the_cache_key(tmp_path, make_tokenizer, calls, case):
    rows, first, second = CHANGES[case]
    for options, number in ((first, 1), (second, 2), (first, 2), (second, 2)):
        prepared, report = prepare_dataset(from_disk(tmp_path / "d", rows), make_tokenizer(), **options)
        assert calls["record_batch"] == number
        fresh = prepare_dataset(Dataset.from_list(rows), make_tokenizer(), load_from_cache_file=False, **options)
        calls["record_batch"] = number
        assert prepared[:] == fresh[0][:] and report == fresh[1]


def test_readable_labels_that_the_dataset_lacks_do_not_miss_the_cache(tmp_path, make_tokenizer, calls):
    for labels in ((), ("margin",), ["preference", "margin"]):
        prepare_dataset(from_disk(tmp_path / "d", ROWS), make_tokenizer(), label_columns=labels)
    assert calls["record_batch"] == 1


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("rows", "options"),
    [
        (SOFT, {"label_columns": ("preference", "margin")}),
        (SOFT, {"label_columns": ("preference",), "data": "trajectories", "discount_unit": "token"}),
        (TIED, {"data": "lists", "single_best": True}),
        (ROWS, {"data": "singles"}),
        (ROWS[:40], {"data": "singles", "unpair": True}),
    ],
    ids=["soft pairs", "trajectories", "lists", "singles", "unpaired"],
)
def test_streams_and_worker_processes_give_the_same_of_every_kind(make_tokenizer, rows, options):
    options = {"max_length": 50, **options}
    alone, report = prepare_dataset(Dataset.from_list(rows), make_tokenizer(), **options)
    assert report.dropped and set(report.dropped) & {"no_single_best", "identical_completions"}
    together = prepare_dataset(Dataset.from_list(rows), make_tokenizer(), num_proc=2, **options)
    assert together[0][:] == alone[:] and together[1] == report
    stream, stream_report = prepare_dataset(
        IterableDataset.from_generator(lambda: iter(rows)), make_tokenizer(), **options
    )
    assert stream.column_names == alone.column_names and stream.features == alone.features
    for _ in range(2):
        assert list(stream) == list(alone) and stream_report == report


@pytest.mark.attack("stale caches")
def test_changed_rows_miss_the_cache(tmp_path, make_tokenizer, calls):
    dataset = from_disk(tmp_path / "d", ROWS)
    prepare_dataset(dataset, make_tokenizer())
    prepare_dataset(dataset.select(range(20)), make_tokenizer())
    assert calls["record_batch"] == 2


def test_policy_on_unusable_rows_does_not_miss_the_cache(tmp_path, make_tokenizer, calls):
    prepare_dataset(from_disk(tmp_path / "d", ROWS), make_tokenizer())
    with pytest.raises(DataError, match="train row 4: identical_completions"):
        prepare_dataset(from_disk(tmp_path / "d", ROWS), make_tokenizer(), on_unusable="error")
    with pytest.raises(DataError, match="2 of 30 rows"):
        prepare_dataset(from_disk(tmp_path / "d", ROWS), make_tokenizer(), max_unusable_share=0.01)
    assert calls["record_batch"] == 1


def test_tokenizer_hash_is_of_content(make_tokenizer):
    tokenizer = make_tokenizer()
    before = tokenizer_hash(tokenizer)
    assert before == tokenizer_hash(make_tokenizer())
    tokenizer(["a", "bcd"], padding=True, truncation=True, max_length=3)  # leaves settings in the backend
    assert tokenizer_hash(tokenizer) == before
    assert tokenizer_hash(make_tokenizer(add_bos=True)) != before


def test_progress_bars_name_the_dataset(make_tokenizer, capfd):
    prepare_dataset(Dataset.from_list([pair()]), make_tokenizer(), name="validation")
    shown = capfd.readouterr().err
    assert "Checking validation rows" in shown and "Tokenizing validation rows" in shown


@pytest.mark.slow
def test_worker_processes_give_the_same(make_tokenizer):
    alone, alone_report = prepare_dataset(Dataset.from_list(ROWS), make_tokenizer(), max_length=55)
    together, report = prepare_dataset(Dataset.from_list(ROWS), make_tokenizer(), max_length=55, num_proc=2)
    assert together[:] == alone[:] and report == alone_report
    bad = [*ROWS, {**chat_pair(), "prompt": [{"role": "user", "content": None}]}]
    with pytest.raises(DataError, match=r"train row 30, field 'prompt\[0\]'"):
        prepare_dataset(Dataset.from_list(bad), make_tokenizer(), num_proc=2)


class TestStream:
    def make(self, rows):
        return IterableDataset.from_generator(lambda: iter(rows))

    @pytest.mark.parametrize("rows", [ROWS, [pair("a b c", f" {i}", f" {i + 1}") for i in range(20)]])
    def test_same_rows_and_counts_as_a_dataset(self, make_tokenizer, rows):
        prepared, report = prepare_dataset(Dataset.from_list(rows), make_tokenizer(), max_length=55)
        stream, stream_report = prepare_dataset(self.make(rows), make_tokenizer(), max_length=55)
        assert stream_report.source_rows == 0
        for _ in range(2):  # a second pass counts anew
            assert list(stream) == list(prepared)
            assert stream_report == report
            stream_report.check()

    def test_of_a_dataset(self, make_tokenizer):
        dataset = Dataset.from_list(ROWS)
        stream, report = prepare_dataset(dataset.to_iterable_dataset(num_shards=3), make_tokenizer())
        assert stream.column_names == ["prompt_ids", "completion_ids", "row"]
        assert list(stream) == list(prepare_dataset(dataset, make_tokenizer())[0]) and report.source_rows == 30

    def test_is_lazy(self, make_tokenizer):
        seen = []

        def rows():
            for i in range(1000):
                seen.append(i)
                yield pair(f"question {i}")

        stream, _ = prepare_dataset(IterableDataset.from_generator(rows), make_tokenizer())
        assert max(seen) == 0
        iterator = iter(stream)
        assert [next(iterator)["row"] for _ in range(3)] == [0, 1, 2] and max(seen) < 10

    def test_rows_with_other_keys(self, make_tokenizer):
        rows = [pair(), {**pair(), "note": 1}, {**pair(), "other": "x"}]
        assert list(prepare_dataset(self.make(rows), make_tokenizer())[0])[2]["row"] == 2

    def test_no_usable_row(self, make_tokenizer):
        rows = [pair(chosen="")] * 5
        with pytest.raises(DataError, match="5 of 5 rows are unusable, none is left"):
            prepare_dataset(self.make(rows), make_tokenizer())
        with pytest.raises(DataError, match="100 of 100 rows are unusable"):
            prepare_dataset(self.make(rows * 100), make_tokenizer())

    def test_share_is_judged_on_the_way(self, make_tokenizer):
        rows = [pair(), pair(chosen=""), pair(chosen="")] * 200
        stream, report = prepare_dataset(self.make(rows), make_tokenizer())
        with pytest.raises(DataError, match="of 100 rows are unusable, more than max_unusable_share=0.5"):
            list(stream)
        stream, report = prepare_dataset(self.make(rows), make_tokenizer(), max_unusable_share=0.7)
        assert len(list(stream)) == report.kept_rows == 200

    def test_error_policy(self, make_tokenizer):
        stream, _ = prepare_dataset(self.make([pair(), pair(chosen="")]), make_tokenizer(), on_unusable="error")
        with pytest.raises(DataError, match="train row 1: empty_completion"):
            list(stream)


def test_shuffled_dataset_keeps_row_numbers_of_what_was_given(make_tokenizer):
    dataset = Dataset.from_list(ROWS).shuffle(seed=3)
    tokenizer = make_tokenizer()
    for row in prepare_dataset(dataset, tokenizer)[0]:
        assert dataset[row["row"]]["prompt"][0]["content"] in tokenizer.decode(row["prompt_ids"])


def test_formatted_and_transformed_datasets(make_tokenizer):
    ids = Dataset.from_list([{"prompt_ids": [5, 6], "chosen_ids": [7, 2], "rejected_ids": [8, 2]}])
    assert prepare_dataset(ids.with_format("torch"), make_tokenizer())[0][0]["completion_ids"] == [[7, 2], [8, 2]]
    stream = ids.to_iterable_dataset().with_format("torch")
    assert next(iter(prepare_dataset(stream, make_tokenizer())[0]))["prompt_ids"] == [5, 6]
    raw = Dataset.from_list([{"question": f"q{i}", "good": " a", "bad": " b"} for i in range(3)])
    rows = raw.with_transform(lambda b: {"prompt": b["question"], "chosen": b["good"], "rejected": b["bad"]})
    prepared, report = prepare_dataset(rows, make_tokenizer())
    assert make_tokenizer().decode(prepared[2]["prompt_ids"]) == "q2" and report.unused_columns == ()


def test_prepared_columns_and_unused_ones(make_tokenizer):
    prepared, report = prepare_dataset(Dataset.from_list([{**pair(), "score": 1.0, "id": "x"}]), make_tokenizer())
    assert prepared.column_names == ["prompt_ids", "completion_ids", "row"]
    assert report.unused_columns == ("score", "id") and "unused columns: score, id" in str(report)
    # Tools have no place in plain text: named as unused, not taken silently.
    assert prepare_dataset(Dataset.from_list([{**pair(), "tools": "[]"}]), make_tokenizer())[1].unused_columns


def test_transcript(make_tokenizer):
    head = "\n\nHuman: Hi\n\nAssistant: Ho\n\nHuman: Is it so?\n\nAssistant:"
    rows = [
        {"chosen": head + " Yes, the end.", "rejected": head + " Yes, thanks."},
        {"chosen": head + " a\n\nHuman: b\n\nAssistant: c", "rejected": head + " d"},
        {"chosen": head + " ", "rejected": head + " d"},
    ]
    tokenizer = make_tokenizer()
    prepared, report = prepare_dataset(Dataset.from_list(rows), tokenizer, max_unusable_share=0.7)
    assert report.format == "transcript"
    assert report.dropped == {"transcripts_differ": 1, "empty_completion": 1}
    texts = [tokenizer.decode(ids) for ids in [prepared[0]["prompt_ids"], *prepared[0]["completion_ids"]]]
    assert texts == [head, " Yes, the end.</s>", " Yes, thanks.</s>"]  # not cut behind "Yes, th"
    chats, chat_report = prepare_dataset(Dataset.from_list(rows).map(from_hh), tokenizer, max_unusable_share=0.7)
    assert chat_report.dropped == report.dropped
    prompt = tokenizer.apply_chat_template(turns("Hi", "Ho", "Is it so?"), add_generation_prompt=True)["input_ids"]
    assert chats[0]["prompt_ids"] == prompt


def test_converters():
    sharegpt = {
        "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}],
        "system": "S",
        "chosen": {"from": "gpt", "value": "a"},
        "rejected": {"from": "gpt", "value": "b"},
    }
    assert from_sharegpt(sharegpt) == {
        "prompt": turns("Hi", "Ho", system="S"),
        "chosen": [{"role": "assistant", "content": "a"}],
        "rejected": [{"role": "assistant", "content": "b"}],
    }
    alpaca = {"instruction": "Do", "input": "it", "output": "x", "chosen": "a", "rejected": "b"}
    assert from_alpaca(alpaca)["prompt"] == turns("Do\n\nit")
    history = {**alpaca, "input": "", "history": [["q", "a"]], "system": "S"}
    assert from_alpaca(history)["prompt"] == turns("q", "a", "Do", system="S")
    ranked = {"instruction": "Do", "input": "", "output": ["a", "b", "c"], "history": [["q", "a"]]}
    assert from_alpaca(ranked) == {
        "prompt": turns("q", "a", "Do"),
        "completions": [answer("a"), answer("b"), answer("c")],
        "ranks": [0, 1, 2],
    }
    votes = [{"annotator1": a, "annotator2": b, "annotator3": c} for a, b, c in [(1, 2, 0), (1, 1, 2), (0, 0, 2)]]
    assert [pandalm_decided(row) for row in votes] == [False, True, True]
    same_role = from_hh({"chosen": "\n\nHuman: a\n\nHuman: b\n\nAssistant: c", "rejected": "\n\nHuman: a"})
    assert [m["role"] for m in same_role["chosen"]] == ["user", "user", "assistant"]


@pytest.mark.parametrize(
    ("words", "preference"),
    [
        ("a-is-better", 1.0),
        ("a-is-slightly-better", 0.75),
        ("tie", 0.5),
        ("b-is-slightly-better", 0.25),
        ("b-is-better", 0.0),
    ],
)
def test_tulu_converter(words, preference):
    row = {"id": 1, "prompt": "q", "completion_a": "x", "completion_b": "y", "preference": words}
    assert from_tulu(row) == {
        "prompt": turns("q"),
        "chosen": answer("x"),
        "rejected": answer("y"),
        "preference": preference,
    }


def test_tree_converter():
    """Two ranked groups; a lone reply, replies without a rank and the prompters' own ranks make none."""

    def reply(role, text, rank, *replies):
        return {"role": role, "text": text, "rank": rank, "replies": list(replies)}

    deep = [reply("assistant", "d1", 1), reply("assistant", "d0", 0), reply("assistant", "d?", None)]
    asks = [reply("prompter", "c", 0, *deep), reply("prompter", "e", 1, reply("assistant", "lone", None))]
    tree = {
        "message_tree_id": "t",
        "prompt": reply("prompter", "a", None, reply("assistant", "b0", 0, *asks), reply("assistant", "b1", 1)),
    }
    assert from_oasst_tree(tree) == [
        {"prompt": turns("a"), "completions": [answer("b0"), answer("b1")], "ranks": [0, 1]},
        {"prompt": turns("a", "b0", "c"), "completions": [answer("d1"), answer("d0")], "ranks": [1, 0]},
    ]


def test_row_order_of_random_datasets_is_kept_by_stream_and_processes(make_tokenizer):
    rng = random.Random(5)
    rows = [pair(f"q{i}", rng.choice(["", " a", " b"]), rng.choice([" a", " b"])) for i in range(60)]
    options = dict(tokenizer=make_tokenizer(), max_unusable_share=1.0)
    prepared, report = prepare_dataset(Dataset.from_list(rows), **options)
    usable = [i for i, row in enumerate(rows) if row["chosen"] and row["chosen"] != row["rejected"]]
    assert prepared["row"][:] == usable
    stream, _ = prepare_dataset(IterableDataset.from_generator(lambda: iter(rows)), **options)
    assert [row["row"] for row in stream] == usable
    assert prepare_dataset(Dataset.from_list(rows), num_proc=3, **options)[0]["row"][:] == usable
