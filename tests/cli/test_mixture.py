"""Files of several shapes, shares of them, and rows that are held out by their prompts."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from dpo_peft.cli import train as cli
from dpo_peft.cli.mixture import DataArguments, load_datasets
from dpo_peft.cli.options import parse_options
from dpo_peft.data import prepare_dataset
from dpo_peft.errors import OptionError
from dpo_peft.files import read_rows
from dpo_peft.pairs.options import PairsOptions


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def model(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


TEXT = [{"prompt": f"text {i}", "chosen": "good", "rejected": "bad"} for i in range(4)]
SHAREGPT = [
    {
        "conversations": [{"from": "human", "value": f"talk {i}"}],
        "chosen": {"from": "gpt", "value": "good"},
        "rejected": {"from": "gpt", "value": "bad"},
    }
    for i in range(4)
]
WHOLE = [
    {"chosen": user(f"whole {i}") + model("good"), "rejected": user(f"whole {i}") + model("bad")} for i in range(4)
]
RATED = [
    {"instruction": f"rated {i}", "generations": ["bad", "middling", "good"], "ratings": [1.0, 2.0, 3.0]}
    for i in range(4)
]
TALKS = {"text": TEXT, "talk": SHAREGPT, "whole": WHOLE, "rated": RATED}


@pytest.mark.parametrize("kinds", [("text", "talk"), ("talk", "whole"), ("whole", "text"), ("text", "rated")])
@pytest.mark.parametrize("apart", [True, False])
def test_files_of_two_shapes_are_read_each_by_its_own(
    kinds: tuple[str, str], apart: bool, tmp_path: Path, make_tokenizer: Any
) -> None:
    """As names of their own, and found by one pattern; the same ids as of the files by themselves."""
    names = [write(tmp_path / "rows" / f"{n}-{kind}.jsonl", TALKS[kind]) for n, kind in enumerate(kinds)]
    joined = read_rows(names if apart else str(tmp_path / "rows" / "*.jsonl"))
    tokenizer = make_tokenizer()
    found, report = prepare_dataset(joined, tokenizer, as_chat=True)
    alone = [row for name in names for row in prepare_dataset(read_rows(name), tokenizer, as_chat=True)[0]]
    assert report.dropped == {} and len(found) == 8
    for row, expected in zip(found, alone, strict=True):
        assert row["prompt_ids"] == expected["prompt_ids"] and row["completion_ids"] == expected["completion_ids"]


def test_rows_that_do_not_go_together_are_named(tmp_path: Path) -> None:
    judged = [{"prompt": "a", "completion": "b", "label": True}]
    names = [write(tmp_path / "a.jsonl", TEXT), write(tmp_path / "b.jsonl", judged)]
    with pytest.raises(OptionError, match=r"a.jsonl: chosen, prompt, rejected; .*b.jsonl: completion, label, prompt"):
        read_rows(names)


def test_weights_are_shares_of_the_rows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = [write(tmp_path / "a.jsonl", TEXT), write(tmp_path / "b.jsonl", SHAREGPT)]
    with caplog.at_level(logging.INFO, "dpo_peft"):
        rows, _ = load_datasets(DataArguments(dataset_name=names, dataset_weights=[1, 3]), evaluate=False)
    prompts = [row["prompt"][0]["content"] for row in rows]
    assert prompts == ["text 0", "talk 0", "talk 1", "talk 2", "talk 3"]
    assert f"1 of {names[0]}" in caplog.text and f"4 of {names[1]}" in caplog.text
    with pytest.raises(OptionError, match="dataset_weights gives 1 weights for 2 of dataset_name"):
        load_datasets(DataArguments(dataset_name=names, dataset_weights=[1]), evaluate=False)


def test_a_part_of_a_mixture_has_names_of_its_own(tmp_path: Path) -> None:
    own = [{"question": row["prompt"], "good": row["chosen"], "bad": row["rejected"]} for row in TEXT]
    names = {"question": "prompt", "good": "chosen", "bad": "rejected"}
    parts = [
        {"path": write(tmp_path / "a.jsonl", TEXT)},
        {"path": write(tmp_path / "b.jsonl", own), "column_map": names},
    ]
    rows, _ = load_datasets(DataArguments(datasets=parts), evaluate=False)
    assert rows.to_list() == [*TEXT, *TEXT]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ask:prompt"], r"no column 'ask'; the columns are \['prompt', 'chosen', 'rejected'\]"),
        (["chosen:rejected"], "there is a column 'rejected' already.*rejected:other_rejected"),
        (["chosen"], "write old:new"),
        (["chosen:a", "rejected:a"], "each name once"),
    ],
)
def test_a_column_map_that_is_wrong(words: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=f"column_map.*{message}"):
        read_rows(write(tmp_path / "a.jsonl", TEXT), column_map=words)


def test_an_evaluation_set_may_have_our_names_already(tmp_path: Path) -> None:
    own = [{"question": row["prompt"], "good": row["chosen"], "bad": row["rejected"]} for row in TEXT]
    names = ["question:prompt", "good:chosen", "bad:rejected"]
    a, b = write(tmp_path / "a.jsonl", own), write(tmp_path / "b.jsonl", TEXT)
    for test in (a, b):
        data = DataArguments(dataset_name=a, eval_dataset_name=test, column_map=names)
        assert [part.to_list() for part in load_datasets(data, evaluate=True)] == [TEXT, TEXT]


def test_rows_of_each_file_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = [write(tmp_path / "a.jsonl", TEXT), write(tmp_path / "b.jsonl", TEXT[:3])]
    with caplog.at_level(logging.INFO, "dpo_peft"):
        read_rows(names)
    assert f"Rows: 4 of {names[0]}, 3 of {names[1]}." in caplog.text


def test_two_columns_change_names(tmp_path: Path) -> None:
    rows = read_rows(write(tmp_path / "a.jsonl", TEXT), column_map={"chosen": "rejected", "rejected": "chosen"})
    assert [row["chosen"] for row in rows] == ["bad"] * 4


# ---- Rows held out --------------------------------------------------------------------------------------------------


def prompts(rows: Any) -> set[str]:
    return {json.dumps(row.get("prompt") or row.get("conversations") or row.get("chosen")[:-1]) for row in rows}


@pytest.mark.parametrize("kind", ["text", "talk", "whole"])
@pytest.mark.parametrize("size", [0.2, 6])
def test_no_prompt_is_on_both_sides(kind: str, size: float, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Thirty rows of ten prompts: three each, far from each other."""
    rows = [json.loads(json.dumps(TALKS[kind][0]).replace(" 0", f" {n % 10}")) for n in range(30)]
    data = DataArguments(dataset_name=write(tmp_path / "a.jsonl", rows), eval_share=size)
    with caplog.at_level(logging.INFO, "dpo_peft"):
        train, test = load_datasets(data, evaluate=True, seed=5)
    assert (len(train), len(test)) == (24, 6) and not prompts(train) & prompts(test)
    assert "6 of 30 rows are held out (2 prompts); " in caplog.text
    again = load_datasets(data, evaluate=True, seed=5)
    assert [list(part) for part in again] == [list(train), list(test)]
    assert list(load_datasets(data, evaluate=True, seed=6)[1]) != list(test)


def test_rows_of_different_prompts_are_held_out_as_trl_does(tmp_path: Path) -> None:
    name = write(tmp_path / "a.jsonl", [{**TEXT[0], "prompt": f"text {n}"} for n in range(20)])
    for option in ("eval_share", "test_split_size"):
        train, test = load_datasets(DataArguments(dataset_name=name, **{option: 0.25}), evaluate=True, seed=3)
        expected = read_rows(name).train_test_split(test_size=0.25, seed=3)
        assert list(train) == list(expected["train"]) and list(test) == list(expected["test"])


def test_one_prompt_alone_can_not_be_split(tmp_path: Path) -> None:
    data = DataArguments(dataset_name=write(tmp_path / "a.jsonl", [TEXT[0]] * 9), eval_share=0.5)
    with pytest.raises(OptionError, match=r"eval_share=0.5: nothing is left to train on"):
        load_datasets(data, evaluate=True)


def test_eval_share_turns_evaluation_on(tmp_path: Path) -> None:
    fixed = ["--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", str(tmp_path), "--use_cpu", "true"]
    _, args, _ = cli.parse([*fixed, "--eval_share", "0.1"])
    assert (args.eval_strategy, args.eval_steps) == ("steps", 0.25)
    _, args, _ = cli.parse([*fixed, "--eval_share", "0.1", "--eval_strategy", "epoch"])
    assert args.eval_strategy == "epoch"
    assert cli.parse([*fixed, "--test_split_size", "0.1"])[1].eval_strategy == "no"


@pytest.mark.parametrize(
    ("words", "expected"),
    [([], None), (["--as_chat"], True), (["--as_chat", "no"], False), (["--as-chat=1"], True)],
)
def test_as_chat_alone_is_true(words: list[str], expected: bool | None, tmp_path: Path) -> None:
    fixed = ["--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", str(tmp_path), "--use_cpu", "true"]
    assert cli.parse([*fixed, *words])[1].as_chat is expected
    assert parse_options(words, PairsOptions, "pairs", "", []).as_chat is expected
