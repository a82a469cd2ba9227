"""A row as it is trained on, as text: compared with what was written by hand, and with the tokenizer's decoding."""

import re
import unicodedata
from typing import Any

import pytest
from data_helpers import turns, word_tokenizer
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dpo_peft.data import prepare_dataset
from dpo_peft.preview import render_row
from dpo_peft.preview.render import visible
from dpo_peft.quickstart import model_path
from dpo_peft.quickstart import test_file as rows_file

CODE = re.compile(r"\x1b\[[\d;]*m")


@pytest.fixture(scope="module")
def chatml() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(model_path())


def prepared(rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, **options: Any) -> list[dict[str, Any]]:
    options = {"max_length": None, **options}
    return list(prepare_dataset(Dataset.from_list(rows), tokenizer, **options)[0])


def chat(prompt: str, chosen: str, rejected: str) -> dict[str, Any]:
    answers = {"chosen": turns("", chosen)[1:], "rejected": turns("", rejected)[1:]}
    return {"prompt": turns(prompt), **answers}


def test_a_pair(chatml: PreTrainedTokenizerBase) -> None:
    (row,) = prepared([chat("Hello.\n  The walk? ", "A treat.", "A gloomy bus and an awful bridge, all.")], chatml)
    assert render_row(row, chatml, width=43) == (
        "prompt      ⟦<|im_start|>⟧user⏎\n"
        "            Hello.⏎\n"
        "              The walk?␣⟦<|im_end|>⟧⏎\n"
        "            ⟦<|im_start|>⟧assistant⏎\n"
        "chosen      A treat.⟦<|im_end|>⟧\n"
        "rejected    A gloomy bus and an awful\n"
        "            bridge, all.⟦<|im_end|>⟧"
    )


def test_colors_mark_what_is_what(chatml: PreTrainedTokenizerBase) -> None:
    (row,) = prepared([chat("Hello.", "A treat.", "Rain.")], chatml)
    lines = render_row(row, chatml, color=True).splitlines()
    assert lines[1] == "            \x1b[94mHello.\x1b[0m\x1b[1;35m<|im_end|>\x1b[0m\x1b[94m⏎\x1b[0m"
    assert lines[3] == "chosen      \x1b[32mA treat.\x1b[0m\x1b[1;35m<|im_end|>\x1b[0m"
    assert lines[4] == "rejected    \x1b[31mRain.\x1b[0m\x1b[1;35m<|im_end|>\x1b[0m"
    plain = render_row(row, chatml).replace("⟦", "").replace("⟧", "")
    assert CODE.sub("", "\n".join(lines)) == plain


def test_a_trajectory_shows_what_is_given(chatml: PreTrainedTokenizerBase) -> None:
    whole = {
        "chosen": turns("Hello.", "A walk.", "And then?", "A treat."),
        "rejected": turns("Hello.", "A bus.", "And then?", "Rain."),
    }
    (row,) = prepared([whole], chatml, data="trajectories")
    given = (
        "  given     ⏎\n"
        "            ⟦<|im_start|>⟧user⏎\n"
        "            And then?⟦<|im_end|>⟧⏎\n"
        "            ⟦<|im_start|>⟧assistant⏎\n"
    )
    assert render_row(row, chatml) == (
        "prompt      ⟦<|im_start|>⟧user⏎\n"
        "            Hello.⟦<|im_end|>⟧⏎\n"
        "            ⟦<|im_start|>⟧assistant⏎\n"
        "            A\n"  # what both share is given
        f"chosen       walk.⟦<|im_end|>⟧\n{given}chosen      A treat.⟦<|im_end|>⟧\n"
        f"rejected     bus.⟦<|im_end|>⟧\n{given}rejected    Rain.⟦<|im_end|>⟧"
    )
    assert "\x1b[2mAnd then?" in render_row(row, chatml, color=True)


def test_lists_and_single_completions(chatml: PreTrainedTokenizerBase) -> None:
    def reply(text: str) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": text}]

    ranked = {"prompt": turns("Hello."), "completions": [reply(t) for t in ("Rain.", "A treat.", "A bus.", "A walk.")]}
    (row,) = prepared([{**ranked, "ranks": [3, 1, 2, 2]}], chatml, data="lists")
    lines = render_row(row, chatml, color=True).splitlines()[3:]
    assert [CODE.sub("", line)[:17].strip() for line in lines] == [
        "best        A tre",
        "2.          A bus",
        "2.          A wal",
        "worst       Rain.",
    ]
    assert [CODE.findall(line)[0] for line in lines] == ["\x1b[32m", "\x1b[33m", "\x1b[33m", "\x1b[31m"]
    single = {"prompt": turns("Hello."), "completion": reply("Rain.")}
    for label, shown in ((True, "desirable   Rain."), (False, "undesirable Rain.")):
        (row,) = prepared([{**single, "label": label}], chatml, data="singles")
        assert render_row(row, chatml).splitlines()[-1].startswith(shown)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        # a b c and d d a </s>, or c </s>: five of the seven tokens stay, the first or the last
        ("keep_start", "prompt      a b c\nchosen      d d [2 tokens cut]\nrejected    c⟦</s>⟧"),
        ("keep_end", "prompt      [2 tokens cut] c\nchosen      d d a⟦</s>⟧\nrejected    c⟦</s>⟧"),
    ],
)
def test_what_truncation_took(mode: str, expected: str) -> None:
    tokenizer = word_tokenizer()
    rows = [{"prompt": "a b c", "chosen": " d d a", "rejected": " c"}]
    (row,) = prepared(rows, tokenizer, max_length=5, truncation_mode=mode)
    (whole,) = prepared(rows, tokenizer)
    assert re.sub(" +|␣", " ", render_row(row, tokenizer, whole=whole)) == re.sub(" +", " ", expected)


def test_a_completion_without_an_end_is_marked() -> None:
    tokenizer = word_tokenizer()
    (row,) = prepared([{"prompt": "a b c", "chosen": " d d a", "rejected": " c"}], tokenizer, max_length=5)
    chosen, rejected = render_row(row, tokenizer).splitlines()[1:]
    assert chosen.endswith("[no end token]") and "[no end token]" not in rejected


def test_long_parts_are_shortened_and_counted(chatml: PreTrainedTokenizerBase) -> None:
    (row,) = prepared([chat("\n".join("abcdefghij"), "A treat.", "Rain.")], chatml)
    whole, short = (render_row(row, chatml, most_lines=most).splitlines() for most in (None, 4))
    assert len(whole) == 14  # the prompt has twelve
    assert short == [*whole[:2], "            … 9 more lines …", whole[11], *whole[12:]]


@pytest.mark.attack("hostile text")
@pytest.mark.parametrize("color", [False, True])
def test_nothing_in_a_row_reaches_the_terminal(chatml: PreTrainedTokenizerBase, color: bool) -> None:
    controls = "".join(map(chr, [*range(0x20), *range(0x7F, 0xA0), 0x200E, 0x202E, 0x2066, 0x2028, 0xFEFF]))
    attack = f"\x1b[2J\x1b]0;owned\x07{controls}"
    (row,) = prepared([chat(f"Hello.{attack}", f"A treat.{attack}", "Rain.")], chatml)
    shown = CODE.sub("", render_row(row, chatml, color=color))
    kinds = {unicodedata.category(char) for char in shown if char != "\n"}
    assert not kinds & {"Cc", "Cf", "Zl", "Zp", "Cs"}
    assert "\\x1b[2J" in shown and "\\u202e" in shown and "\\t" in shown
    assert visible("\ud800") == "\\ud800"


def columns(text: str) -> int:
    return sum(1 + (unicodedata.east_asian_width(char) in "WF") for char in text)


@pytest.mark.parametrize("width", [40, 80, 119])
def test_lines_keep_the_width_and_say_every_token(chatml: PreTrainedTokenizerBase, width: int) -> None:
    """The decoder of the tokenizer, on the whole, is the oracle."""
    rows = list(Dataset.from_json(str(rows_file())))[:20] if width == 80 else []
    rows = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows]
    rows += [chat("你好，" * 40 + "👍🏽 naïve " * 9, "说" * 95, "x" * 200)]
    for row in prepared(rows, chatml):
        text = render_row(row, chatml, width)
        assert max(map(columns, text.splitlines())) <= width
        said = re.sub("[⟦⟧␣ ]", "", "".join(line[12:] for line in text.splitlines()))
        wholes = [row["prompt_ids"], *row["completion_ids"]]
        assert said == re.sub("[ ␣\n]", "", "".join(visible(chatml.decode(ids)) for ids in wholes))
