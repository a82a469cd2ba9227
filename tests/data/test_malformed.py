"""Every malformed dataset, row or option is an error of ours that says where, what and how to repair it.

Rows that Arrow itself would refuse (mixed types, lone surrogates) come in as streams of plain Python rows.
"""

import json

import pytest
from data_helpers import answer, assert_third_row_refused, chat_pair, pair, turns
from datasets import Dataset, DatasetDict, IterableDataset

from dpo_peft.data import from_alpaca, from_hh, from_pandalm, from_sharegpt, prepare_dataset
from dpo_peft.errors import DataError, OptionError

IDS = {"prompt_ids": [5, 6], "chosen_ids": [7, 2], "rejected_ids": [8, 2]}
TRANSCRIPT = "\n\nHuman: Hi\n\nAssistant: "
HH = {"chosen": TRANSCRIPT + "Yes.", "rejected": TRANSCRIPT + "No."}


def messages(**changes):
    return [{"role": "user", "content": "Hi", **changes}]


# (good first row, changes of the bad row, field named, words of the problem, words of the remedy)
BAD_ROWS = {
    "none as text": (
        pair(),
        {"chosen": None},
        "chosen",
        "expected text, found nothing (None)",
        "store the completion",
    ),
    "none as prompt": (pair(), {"prompt": None}, "prompt", "found nothing (None)", "remove the row"),
    "boolean as text": (pair(), {"rejected": True}, "rejected", "found a boolean (True)", "as text"),
    "number as text": (pair(), {"chosen": 3.5}, "chosen", "found float (3.5)", "as text"),
    "list as text": (pair(), {"chosen": ["a"]}, "chosen", "found list", "as text"),
    "dict as text": (pair(), {"chosen": {"value": "a"}}, "chosen", "found dict", "as text"),
    "field missing": (pair(), {"rejected": ...}, "rejected", "is missing", "give every row"),
    "lone surrogate": (pair(), {"chosen": "a\ud800"}, "chosen", "lone surrogate at character 1", "repair the text"),
    "surrogate in prompt": (pair(), {"prompt": "\udfff"}, "prompt", "lone surrogate at character 0", "repair"),
    "empty prompt": (pair(), {"prompt": ""}, "prompt", "is empty", "at least one token"),
    "text as messages": (chat_pair(), {"chosen": "Blue"}, "chosen", "a list of messages, found str", "store [{"),
    "none as messages": (chat_pair(), {"rejected": None}, "rejected", "found nothing (None)", "store [{"),
    "dict of lists": (
        chat_pair(),
        {"prompt": {"role": ["user"], "content": ["Hi"]}},
        "prompt",
        "found one dict with the keys ['content', 'role']",
        "datasets.List",
    ),
    "empty prompt list": (chat_pair(), {"prompt": []}, "prompt", "is an empty conversation", "at least one message"),
    "message as text": (chat_pair(), {"prompt": ["Hi"]}, "prompt[0]", "expected a message, found str", "use {"),
    "no role": (chat_pair(), {"prompt": [{"content": "Hi"}]}, "prompt[0]", "'role' is nothing", "give a role"),
    "empty role": (chat_pair(), {"prompt": messages(role="")}, "prompt[0]", "'role' is str ()", "give a role"),
    "role is a number": (chat_pair(), {"prompt": messages(role=1)}, "prompt[0]", "'role' is int (1)", "give a role"),
    "no content": (chat_pair(), {"prompt": [{"role": "user"}]}, "prompt[0]", "has no 'content'", "give the text"),
    "content none": (chat_pair(), {"prompt": messages(content=None)}, "prompt[0]", "has no 'content'", "give"),
    "content boolean": (chat_pair(), {"chosen": answer(True)}, "chosen[0]", "found a boolean", "content as text"),
    "content surrogate": (chat_pair(), {"chosen": answer("\ud8ff")}, "chosen[0]", "lone surrogate", "repair"),
    "image part": (
        chat_pair(),
        {"prompt": messages(content=[{"type": "image"}])},
        "messages",
        "holds images, and there is no processor",
        "AutoProcessor",
    ),
    "from and value": (
        chat_pair(),
        {"prompt": [{"from": "human", "value": "Hi"}]},
        "prompt[0]",
        "from/value",
        "role and content",
    ),
    "user completion": (chat_pair(), {"chosen": turns("Hi", "a")}, "chosen", "starts with a 'user' turn", "move"),
    "parts to continue": (
        chat_pair(),
        {"prompt": turns("Hi", "x")[:1] + answer([{"type": "text", "text": "x"}])},
        "prompt",
        "the completions go on with it",
        "plain text",
    ),
    "empty implicit": (
        {"chosen": turns("a", "b"), "rejected": turns("a", "c")},
        {"rejected": []},
        "rejected",
        "is an empty conversation",
        "remove the row",
    ),
    "tools no json": (chat_pair(), {"tools": "[{"}, "tools", "is no valid JSON", "store a JSON string"),
    "tools a dict": (chat_pair(), {"tools": json.dumps({"a": 1})}, "tools", "list of JSON schemas", "list of dicts"),
    "kwargs a list": (chat_pair(), {"chat_template_kwargs": [1]}, "chat_template_kwargs", "found list", "a dict"),
    "reserved kwarg": (
        chat_pair(),
        {"chat_template_kwargs": {"tokenize": False}},
        "chat_template_kwargs",
        "'tokenize' is set by the pipeline",
        "remove 'tokenize'",
    ),
    "boolean as id": (IDS, {"chosen_ids": [7, True]}, "chosen_ids", "position 1 holds a boolean", "list of int"),
    "float as id": (IDS, {"chosen_ids": [7.0]}, "chosen_ids", "position 0 holds float", "list of int"),
    "id too large": (IDS, {"rejected_ids": [99999]}, "rejected_ids", "holds id 99999, outside", "the tokenizer that"),
    "id negative": (IDS, {"prompt_ids": [5, -100]}, "prompt_ids", "position 1 holds id -100", "tokenizer"),
    "no prompt ids": (IDS, {"prompt_ids": []}, "prompt_ids", "is empty", "at least one prompt token"),
    "ids none": (IDS, {"prompt_ids": None}, "prompt_ids", "found nothing (None)", "list of int"),
    "ids text": (IDS, {"prompt_ids": "5 6"}, "prompt_ids", "a list of token ids, found str", "list of int"),
    "no transcript": (HH, {"chosen": "Yes."}, "chosen", "is no transcript", "'prompt' column"),
    "nobody answers": (HH, {"rejected": "\n\nHuman: Hi"}, "rejected", "is no transcript", "remove the row"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_malformed_row(make_tokenizer, case):
    good, changes, field, problem, remedy = BAD_ROWS[case]
    bad = {key: value for key, value in {**good, **changes}.items() if value is not ...}
    stream = IterableDataset.from_generator(lambda: iter([good, good, bad]))
    if None in changes.values():  # it is left out and counted, unless no row may be
        prepared, report = prepare_dataset(stream, make_tokenizer(), name="eval")
        assert len(list(prepared)) == 2 and report.dropped_rows == {"missing_value": [2]}
    on_unusable = "error" if None in changes.values() else "drop"
    prepared, _ = prepare_dataset(stream, make_tokenizer(), name="eval", on_unusable=on_unusable)
    assert_third_row_refused(prepared, field, problem, remedy)


@pytest.mark.parametrize("case", ["none as text", "empty prompt", "no content", "id too large", "nobody answers"])
def test_malformed_rows_of_a_dataset_are_found_before_tokenizing(make_tokenizer, monkeypatch, case):
    good, changes, field, problem, _ = BAD_ROWS[case]
    monkeypatch.setattr("dpo_peft.data.worker.RowWorker.record_batch", None)
    dataset = Dataset.from_list([good, {**good, **changes}, good, {**good, **changes}])
    with pytest.raises(DataError) as error:
        prepare_dataset(dataset, make_tokenizer(), name="eval", on_unusable="error")
    assert str(error.value).startswith(f"eval: 2 malformed rows of 4. eval row 1, field '{field}': ")
    assert f"| eval row 3, field '{field}'" in str(error.value) and problem in str(error.value)


def rows(*items):
    return Dataset.from_list(list(items))


BAD_DATASETS = {
    "empty": (lambda: Dataset.from_dict({"prompt": [], "chosen": [], "rejected": []}), "the dataset is empty"),
    "empty stream": (lambda: IterableDataset.from_generator(lambda: iter([])), "the dataset is empty"),
    "list": (lambda: [pair()], "found list. Use Dataset.from_list"),
    "splits": (lambda: DatasetDict({"train": rows(pair())}), "found DatasetDict. Pick one split"),
    "none": (lambda: None, "found NoneType"),
    "missing column": (
        lambda: rows({"prompt": "a", "chosen": "b"}),
        "column 'rejected' is missing.*--column_map YOUR_",
    ),
    "missing ids": (lambda: rows({"prompt_ids": [1], "chosen_ids": [2]}), "column 'rejected_ids' is missing"),
    "other columns": (
        lambda: rows({"text": "a"}),
        r"column 'chosen', 'rejected' is missing; the columns are \['text'\]",
    ),
    "images": (
        lambda: rows({**pair(), "images": "x"}),
        "'images' holds images, and there is no proc.*remove_columns",
    ),
    "unranked": (
        lambda: rows({"prompt": "a", "completions": ["b", "c"]}),
        "'completions'.*'multi_negative' or 'plackett_luce'",
    ),
    "judged": (
        lambda: rows({"prompt": "a", "completion": "b", "label": True}),
        "'label'.*'kto' or 'apo_zero_unpaired'",
    ),
    "soft": (lambda: rows({**pair(), "preference": 0.5}), r"'preference' would have no effect.*remove_columns\('pref"),
    "several rejected": (lambda: rows({**pair(), "rejected": ["a", "b"]}), "'rejected' as a list.*'multi_negative'"),
    "sharegpt": (
        lambda: rows({"conversations": [{"from": "human", "value": "x"}], "chosen": {}, "rejected": {}}),
        r"row 0, field 'chosen': expected a message, found {}",
    ),
    "question": (
        lambda: rows({"query": "q", "chosen": "a", "rejected": "b"}),
        r"'query' looks like one.*--column_map query:prompt on.*dataset.rename_columns\({'query': 'prompt'}\)",
    ),
    "text and messages": (lambda: rows({**chat_pair(), "rejected": "x"}), "'chosen' is list but 'rejected' is text"),
    "booleans": (lambda: rows({**pair(), "chosen": True}), " row 0, field 'chosen': expected text, found a bool"),
    "all none": (lambda: rows({**pair(), "chosen": None}), "1 of 1 rows are unusable.*missing_value"),
}


@pytest.mark.parametrize("case", BAD_DATASETS)
def test_malformed_dataset(make_tokenizer, case):
    make, words = BAD_DATASETS[case]
    with pytest.raises(DataError, match=f"^train.*{words}"):
        prepare_dataset(make(), make_tokenizer())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_length": 1}, "max_length=1 must be None or an integer of at least 2"),
        ({"max_length": True}, "max_length=True"),
        ({"max_length": "512"}, "max_length='512'"),
        (
            {"truncation_mode": "middle"},
            "truncation_mode='middle' is unknown. Use one of keep_start, keep_end, trim_p",
        ),
        ({"on_unusable": "skip"}, "on_unusable='skip' is unknown. Use 'drop' or 'error'"),
        ({"max_unusable_share": 1.5}, "max_unusable_share=1.5 must be from 0 to 1"),
        ({"max_unusable_share": "half"}, "max_unusable_share='half' must be a number"),
        ({"num_proc": 0}, "num_proc=0 must be None or a positive integer"),
    ],
)
def test_wrong_option(make_tokenizer, options, words):
    with pytest.raises(OptionError, match=words):
        prepare_dataset(rows(pair()), make_tokenizer(), **options)


def test_no_tokenizer(make_tokenizer):
    class Processor:
        tokenizer = make_tokenizer()

    with pytest.raises(OptionError, match="found Processor. Pass processor.tokenizer"):
        prepare_dataset(rows(pair()), Processor())
    with pytest.raises(OptionError, match="found str"):
        prepare_dataset(rows(pair()), "gpt2")


@pytest.mark.parametrize(
    ("convert", "row", "words"),
    [
        (from_sharegpt, {"conversations": None}, "field 'conversations': expected list, found NoneType"),
        (from_sharegpt, {"conversations": [{"from": "cat", "value": "x"}]}, "unknown speaker 'cat'. Use one of human"),
        (from_sharegpt, {"conversations": [], "chosen": "x", "rejected": "y"}, "field 'chosen': expected a dict with"),
        (
            from_alpaca,
            {"instruction": "q", "chosen": True, "rejected": "b"},
            "field 'chosen': expected str, found bool",
        ),
        (from_alpaca, {"chosen": "a", "rejected": "b"}, "field 'instruction': expected str, found NoneType"),
        (from_hh, {"chosen": "Hi", "rejected": "Hi"}, "field 'chosen': a transcript starts with"),
        (
            from_pandalm,
            {
                "idx": 7,
                "instruction": "q",
                "response1": True,
                "response2": "",
                **{f"annotator{i}": 1 for i in (1, 2, 3)},
            },
            "row with idx 7, field 'response1': expected str, found bool",
        ),
        (from_pandalm, {"idx": 7, "annotator1": 1, "annotator2": 2, "annotator3": 0}, "tied. Filter first"),
        (from_pandalm, {"annotator1": None}, "field 'annotator1': expected int"),
    ],
)
def test_converters_refuse(convert, row, words):
    with pytest.raises(DataError, match=words):
        convert(row)
