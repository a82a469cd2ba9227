"""Every kind of checkable instruction: texts that follow it and texts that don't, by hand; prompts; the reward."""

import json
from pathlib import Path

import pytest

from dpo_peft import OptionError
from dpo_peft.cli import main
from dpo_peft.files import read_rows
from dpo_peft.suites.checkers import CHECKERS, KINDS, follows
from dpo_peft.suites.instructions import make_prompts, reward

POEM = "The sea is calm tonight.\nThe tide is full, the moon lies fair."
# Parameters, texts that follow, texts that don't.
EXAMPLES: dict[str, tuple[dict[str, object], list[str], list[str]]] = {
    "least_words": (
        {"number": 4},
        ["One two three four.", "It's well-made, by and large."],
        ["One two three.", "a-b c"],
    ),
    "most_words": ({"number": 3}, ["One two three!", "Yes."], ["One two three four", "...", "- - -"]),
    "sentences": (
        {"number": 2},
        ["It rains. I stay.", "Pi is 3.14 or so. Good!", 'He said "no." Then he left'],
        ["It rains.", "One. Two. Three.", "It rains... I stay. So it goes."],
    ),
    "paragraphs": ({"number": 2}, ["One.\n\nTwo.", "\nA\nb\n \nC\n"], ["One.\nTwo.", "A\n\nB\n\nC", "One."]),
    "keywords": (
        {"present": ["lantern", "river"]},
        ["A lantern by the River.", "river, lantern"],
        ["A lantern alone.", "Two lanterns by the river."],
    ),
    "forbidden": ({"absent": ["very", "good"]}, ["It is goodness itself.", "Fine."], ["Very well.", "That is GOOD."]),
    "frequency": (
        {"word": "stone", "number": 2},
        ["Stone on stone.", "A stone, a stone, a stone."],
        ["A stone.", "stones and stone"],
    ),
    "letters": ({"letter": "z", "number": 3}, ["Zigzag, dozing", "zzz"], ["Zigzag", "none"]),
    "no_letter": ({"letter": "x"}, ["All is well."], ["An extra word.", "XL"]),
    "no_commas": ({}, ["No pause here."], ["Here, a pause."]),
    "lowercase": ({}, ["all of it is small."], ["Not all.", "123"]),
    "uppercase": ({}, ["ALL OF IT.", "ÄRGER"], ["ALL OF iT", "42"]),
    "json_only": ({}, ['{"a": [1, 2]}', " {}\n"], ["[1, 2]", 'Here: {"a": 1}', '```json\n{"a": 1}\n```', "{'a': 1}"]),
    "bullets": (
        {"number": 2},
        ["- one\n- two", "Two points:\n* one\n * two\nThat's it."],
        ["- one", "- a\n- b\n- c", "-one\n-two"],
    ),
    "numbered": (
        {"number": 3},
        ["1. a\n2. b\n3. c", "So:\n 1. a\n 2. b\n 3. c\n"],
        ["1. a\n2. b", "1. a\n3. b\n2. c", "1) a\n2) b\n3) c", "1. a\n2. b\n3. c\n4. d"],
    ),
    "starts": (
        {"phrase": "To be frank,"},
        ["To be frank, no.", "\nTo be frank, yes"],
        ["to be frank, no", "Well. To be frank,"],
    ),
    "ends": ({"phrase": "That is all."}, ["No. That is all.", "That is all.\n"], ["That is all. Bye.", "That is all"]),
    "postscript": (
        {"marker": "P.S."},
        ["Dear me.\nP.S. Call.", "Hi\n\nP.S. One\nmore"],
        ["P.S. Only this.", "Hi P.S. inline", "Hi\nP.S.", "Hi\nPS: x"],
    ),
    "title": (
        {},
        ["[[A day]]\nIt rains.", "\n[[Rain]]\n\nText"],
        ["[[A day]]", "A day\nText", "[A day]\nText", "[[ ]]\nText"],
    ),
    "sections": (
        {"separator": "* * *", "number": 2},
        ["One\n* * *\nTwo", "a\nb\n  * * *\nc"],
        ["One\n* * *\n", "One * * * Two", "a\n* * *\nb\n* * *\nc", "One\n***\nTwo"],
    ),
    "quoted": ({}, ['"All of it."', ' "A\nb" '], ['"Half" of it', "'All'", '""', '"A" and "b"', "All"]),
    "script": (
        {"language": "Russian"},
        ["Дождь идёт с утра.", "Поезд до Bonn уходит в полночь, а следующий поезд пойдёт только утром."],
        ["It rains.", "Дождь means rain.", "Βρέχει σήμερα", "12345"],
    ),
    "repeats": (
        {"request": "Say what rain is."},
        ["Say what rain is. Water that falls.", "Say what rain is.\nWater"],
        ["Say what rain is.", "Rain is water.", "say what rain is. Water."],
    ),
    "alternatives": (
        {"marker": "======"},
        ["One way.\n======\nAnother way.", "a ====== b"],
        ["One way.", "Same\n======\nSame", "a\n======\n", "a\n======\nb\n======\nc"],
    ),
    "bold": ({"number": 2}, ["**One** and **two words**."], ["**One** and *two*.", "**One\ntwo** **", "** ** **a**"]),
}


def test_there_is_an_example_of_each_of_the_25_kinds() -> None:
    assert {*EXAMPLES} == {*CHECKERS} == {*KINDS} and len(KINDS) == 25


@pytest.mark.parametrize("kind", EXAMPLES)
def test_a_checker(kind: str) -> None:
    parameters, followed, not_followed = EXAMPLES[kind]
    assert [text for text in followed if not follows(text, kind, **parameters)] == []
    assert [text for text in [*not_followed, "", " \n"] if follows(text, kind, **parameters)] == []


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("Greek", "Βρέχει από το πρωί."),
        ("Korean", "아침부터 비가 온다."),
        ("Hindi", "सुबह से बारिश हो रही है।"),
        ("Arabic", "تمطر منذ الصباح."),
        ("Japanese", "朝から雨が降っている。"),
        ("Hebrew", "יורד גשם מאז הבוקר."),
        ("Thai", "ฝนตกตั้งแต่เช้า"),
    ],
)
def test_a_language_is_known_by_its_script(language: str, text: str) -> None:
    assert follows(text, "script", language=language)
    assert not follows("Дождь идёт с утра.", "script", language=language)


def test_what_is_loose() -> None:
    """A first line, a last line and asterisks are forgiven, and nothing in the middle is."""
    cases = {
        "Sure!\n{}\nHope that helps!": True,
        '```json\n{"a": 1}\n```': True,
        '{"a": 1} is it': False,
        "A\nB\n{}": False,
    }
    for text, passes in cases.items():
        assert follows(text, "json_only", loose=True) is passes and not follows(text, "json_only")
    assert follows("*quiet*", "starts", loose=True, phrase="quiet") and not follows(
        "*quiet*", "starts", phrase="quiet"
    )
    assert all(follows(text, kind, loose=True, **p) for kind, (p, good, _) in EXAMPLES.items() for text in good)


def test_prompts_say_what_is_checked() -> None:
    rows = make_prompts()
    assert rows == make_prompts(0, 300)[:200] and rows != make_prompts(1)
    read = [json.loads(row["instruction"]) for row in rows]
    assert [sum(one["kind"] == kind for one in read) for kind in KINDS] == [8] * 25
    assert len({row["prompt"] for row in rows}) > 190
    for row, one in zip(rows, read, strict=True):
        values = [v for name, v in one.items() if name not in ("kind", "request")]
        flat = [str(v) for value in values for v in (value if isinstance(value, list) else [value])]
        assert all(value in row["prompt"] for value in flat) and "{" not in row["prompt"].replace("{}", "")
        if one["kind"] == "repeats":
            assert row["prompt"].startswith(one["request"])


def test_the_checkers_make_pairs(tmp_path: Path) -> None:
    """`dpo-peft pairs` judges by them, here completions that are there already."""
    file, out = tmp_path / "answered.jsonl", tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": "Q1", "completions": ["small", "Large"], "instruction": '{"kind": "lowercase"}'},
        {"prompt": "Q2", "completions": ["a, b", "a b"], "instruction": '{"kind": "no_commas"}'},
        {"prompt": "Q3", "completions": ["x", "y"], "instruction": '{"kind": "most_words", "number": 5}'},  # a tie
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    how = ["--reward", "dpo_peft.suites.instructions:reward", "--output", str(out)]
    assert main(["pairs", "--prompts", str(file), *how]) == 0
    made = read_rows(str(out))
    assert [(row["chosen"], row["rejected"], row["reward_margin"]) for row in made] == [
        ("small", "Large", 1),
        ("a b", "a, b", 1),
    ]
    said = [[{"role": "assistant", "content": text}] for text in ("Large", "small")]
    assert reward(completions=said, instruction=[rows[0]["instruction"]] * 2, prompts=["Q1"] * 2) == [0.0, 1.0]


@pytest.mark.parametrize(
    "instruction", ["lowercase", '{"kind": "rhymes"}', '{"kind": "bullets"}', '{"number": 3}', "[1]"]
)
def test_an_instruction_that_cannot_be_checked(instruction: str) -> None:
    with pytest.raises(OptionError, match="can't be checked"):
        reward(completions=["a"], instruction=[instruction])
