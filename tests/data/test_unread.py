"""Text that the rows bring and nobody reads is refused, unless the user says that it isn't needed; messages that are
stored as JSON text are messages."""

import json
from typing import Any

import pytest
from data_helpers import answer, turns, word_tokenizer
from datasets import Dataset, IterableDataset

from dpo_peft.data import prepare_dataset
from dpo_peft.data.prompts import read_prompts
from dpo_peft.errors import DataError

TEXT = {"prompt": "a", "chosen": " b", "rejected": " c"}
CHAT = {"prompt": turns("a"), "chosen": answer("b"), "rejected": answer("c")}
STARTS_ALIKE = {"chosen": "a b c", "rejected": "a b d"}
LOST: dict[str, tuple[dict[str, Any], str, str]] = {  # rows, column that is named, words of its remedy
    "a question of another name": ({**STARTS_ALIKE, "asked": "a b c d a"}, "asked", "--column_map asked:prompt on"),
    "system": ({**TEXT, "system": "d"}, "system", "--as_chat true"),
    "input": ({**TEXT, "input": "d"}, "input", "--column_map prompt:instruction on"),
    "context": ({**TEXT, "context": "d"}, "context", "--column_map prompt:instruction context:input on"),
    "context of messages": ({**CHAT, "context": "d"}, "context", "--unneeded_columns context"),
    "history of another name": ({**CHAT, "dialog": turns("b", "d")}, "dialog", "--column_map dialog:history on"),
    "history as messages": ({**CHAT, "earlier": turns("d", "d")}, "earlier", "--unneeded_columns earlier"),
    "ShareGPT turns": ({**CHAT, "more": [{"from": "human", "value": "d"}]}, "more", "--unneeded_columns more"),
    "a long text": ({**TEXT, "rationale": "d d d d"}, "rationale", "prompt:instruction rationale:input on"),
    "a prompt beside conversations": (
        {"prompt": "d d", "chosen": turns("a", "b"), "rejected": turns("a", "c")},
        "prompt",
        "--unneeded_columns prompt",
    ),
}
READ: dict[str, dict[str, Any]] = {
    "labels and names": {**TEXT, "id": "7", "source": "some public set", "model": "d", "when": "2024-01-02 10:00"},
    "numbers and lists of them": {**TEXT, "score": 0.5, "scores_of": [1, 2], "extra": {"a": 1}},
    "an empty system prompt": {**TEXT, "system": ""},
    "no history": {**CHAT, "history": []},
    "nothing": {**CHAT, "system": None},
    "messages that are the chosen ones": {
        "prompt": "a",
        "messages": turns("a", "b"),
        "chosen": turns("a", "b"),
        "rejected": turns("a", "c"),
    },
    "what a converter left": {**CHAT, "conversations": [{"from": "human", "value": "a"}]},
    "the text of token ids": {"prompt_ids": [3], "chosen_ids": [4], "rejected_ids": [5], "prompt": "a b c d"},
}


def prepared(rows: Any, **options: Any) -> list[dict[str, Any]]:
    return list(prepare_dataset(rows, word_tokenizer(), **options)[0])


@pytest.mark.parametrize("case", LOST)
def test_text_that_nobody_reads_is_refused_by_its_column(case: str) -> None:
    row, column, remedy = LOST[case]
    rows = Dataset.from_list([row, row])
    with pytest.raises(DataError, match=f"^train: column '{column}' holds text that is not read") as caught:
        prepared(rows)
    assert remedy in str(caught.value) and f"unneeded_columns=['{column}']" in str(caught.value)
    with pytest.raises(DataError, match=f"column '{column}'"):
        prepared(IterableDataset.from_generator(lambda: iter([row, row])))
    # Both remedies work as they are written.
    assert prepared(rows, unneeded_columns=[column]) == prepared(rows.remove_columns(column))


@pytest.mark.parametrize("case", READ)
def test_what_loses_nothing_is_read(case: str) -> None:
    assert len(prepared(Dataset.from_list([READ[case]] * 2))) == 2


def test_a_text_in_few_rows_is_no_prompt_but_a_system_prompt_in_one_is() -> None:
    """A comment here and there stays unread; a column whose name says that it asks is refused for one row of it."""
    rows = [{**TEXT, "note": "", "system": ""}] * 9
    assert len(prepared(Dataset.from_list([*rows, {**TEXT, "note": "a b c d", "system": ""}]))) == 10
    with pytest.raises(DataError, match="'system'"):
        prepared(Dataset.from_list([*rows, {**TEXT, "note": "", "system": "d"}]))


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize(
    ("row", "options"),
    [
        (CHAT, {}),
        ({"chosen": turns("a", "b"), "rejected": turns("a", "c")}, {}),
        ({"chosen": turns("a", "b"), "rejected": turns("a", "c")}, {"data": "trajectories"}),
        ({"messages": turns("a", "b"), "label": True}, {"data": "singles"}),
        ({"prompt": turns("a"), "completions": [answer("b"), answer("c")], "ranks": [0, 1]}, {"data": "lists"}),
    ],
)
def test_messages_as_json_text_are_messages(row: Any, options: Any, indent: Any) -> None:
    """As exports to CSV and Parquet have them."""
    text = {
        name: json.dumps(value, indent=indent) if name not in ("label", "ranks") else value
        for name, value in row.items()
    }
    assert prepared(Dataset.from_list([text] * 2), **options) == prepared(Dataset.from_list([row] * 2), **options)


def test_a_row_whose_json_is_broken_is_named() -> None:
    text = {name: json.dumps(value) for name, value in CHAT.items()}
    rows = Dataset.from_list([text, {**text, "chosen": text["chosen"][:-3]}])
    with pytest.raises(DataError, match="train row 1, field 'chosen': is no valid JSON"):
        prepared(rows)


def test_text_that_only_looks_like_json_stays_text() -> None:
    row = {"prompt": "[1, 2]", "chosen": ' [{"a": 1}]', "rejected": " [b"}
    (one, _) = prepared(Dataset.from_list([row] * 2))
    tokenizer = word_tokenizer()
    assert one["prompt_ids"] == tokenizer("[1, 2]")["input_ids"]


def test_prompts_of_pairs_as_json_text_are_prompts() -> None:
    (prompt, _), _ = read_prompts(Dataset.from_list([{"prompt": json.dumps(turns("a"))}] * 2), "prompts")
    assert prompt.example.kind == "chat" and prompt.example.prompt == turns("a")
