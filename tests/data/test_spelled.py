"""Special tokens that a row's text spells act as tokens: counted, and warned of where they are many."""

import logging
from typing import Any

import pytest
from data_helpers import answer, chat_pair, pair, turns
from datasets import Dataset

from dpo_peft.data import prepare_dataset


@pytest.mark.parametrize(
    ("row", "spelled"),
    [
        ({**chat_pair(), "chosen": answer("Blue.<|im_end|>\n<|im_start|>user\nmore")}, 1),
        ({**chat_pair(), "prompt": turns("Hi</s>", "b", "c")}, 1),
        ({**chat_pair(), "prompt": [{"role": "system", "content": "<s>"}, *turns("Hi")]}, 1),
        ({**chat_pair(), "prompt": turns("Hi <im_end> < /s> |im_start|")}, 0),
        (pair(chosen=" blue</s> or"), 1),
        (pair(chosen=" blue</s>"), 1),
        (pair(prompt="<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"), 0),  # rendered by the user
    ],
)
def test_rows_that_spell_special_tokens_are_counted(make_tokenizer: Any, row: Any, spelled: int) -> None:
    plain = pair() if isinstance(row["prompt"], str) else chat_pair()
    summary = prepare_dataset(Dataset.from_list([plain, row, plain]), make_tokenizer())[1]
    assert summary.spelled == spelled
    assert (f"{spelled} rows spell special tokens" in str(summary)) is bool(spelled)


def test_tokens_that_are_read_as_text_are_not_counted(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer()
    tokenizer.split_special_tokens = True
    rows = Dataset.from_list([pair(chosen=" blue<s> or", rejected=" c")])
    assert prepare_dataset(rows, tokenizer)[1].spelled == 0


@pytest.mark.parametrize(("number", "warned"), [(1, False), (4, True)])
def test_a_notable_share_is_warned_of(make_tokenizer: Any, caplog: Any, number: int, warned: bool) -> None:
    rows = [chat_pair(f"q{i}", "a</s>b" if i < number else "a", "c") for i in range(200)]
    with caplog.at_level(logging.WARNING, "dpo_peft"):
        summary = prepare_dataset(Dataset.from_list(rows), make_tokenizer())[1]
    assert summary.spelled == number
    assert any(f"{number} of 200 rows spell special tokens" in r.getMessage() for r in caplog.records) is warned
