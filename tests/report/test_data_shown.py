"""The page of a run: its verdict, the worst pairs, lengths of the data; and marks of which none hides another."""

import math
from pathlib import Path
from typing import Any

import pytest
from report_helpers import (
    HOSTILE,
    examples_of,
    log_of,
    make_run,
    points_of,
    read_page,
    trace_of,
    write_lines,
)

from dpo_peft import cli
from dpo_peft.report.charts import BOX, MARK, Trace, curve_chart
from dpo_peft.report.facts import brief
from dpo_peft.report.page import save_report
from dpo_peft.report.runs import Run
from dpo_peft.report.views import data_lengths

LENGTHS = {
    "edges": [0, 10, 20, 30],
    "prompt": [3, 1, 0],
    "chosen": [0, 4, 0],
    "rejected": [1, 3, 0],
    "whole row": [0, 1, 3],
}


def page_of(folder: Path) -> Any:
    save_report([folder], folder / "page.html")
    return read_page(folder / "page.html")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (10.03, "10.0"),
        (0.01743, "0.017"),
        (2.038, "2.04"),
        (-6.601, "−6.60"),
        (123.4, "123"),
        (1234.5, "1,234"),
        (0.0, "0"),
        (4.2e-6, "4.2e−06"),
        (math.nan, "not finite"),
    ],
)
def test_figures_of_a_headline(value: float, text: str) -> None:
    assert brief(value) == text


# ---- The verdict ----------------------------------------------------------------------------------------------------


def test_the_verdict_stands_at_the_top_of_the_page(tmp_path: Path, capsys: Any) -> None:
    """Of an older run, that saved none, too; the command's line begins with it."""
    page = page_of(make_run(tmp_path / "run"))
    verdict = page.one("main").all("section")[0]
    assert verdict.attributes["class"] == "verdict good"
    assert verdict.one("h2").text.startswith("good Better than length alone")
    assert [reason.text for reason in verdict.all("li")][0].startswith("Held-out accuracy 0.900")
    still = [{**entry, "eval_rewards/margins": 1e-4, "eval_kl": 1e-4} for entry in log_of(40)]
    other = make_run(tmp_path / "still", log_history=still)
    assert cli.main(["report", str(other)]) == 0
    assert read_page(other / "report.html").one("section", id="verdict").attributes["class"] == "verdict bad"
    assert "still: bad, held-out accuracy 0.900" in capsys.readouterr().out


def test_an_unfinished_run_has_no_verdict(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / "checkpoint-20").mkdir(parents=True)
    make_run(tmp_path / "whole")
    metrics = (tmp_path / "whole" / "metrics.json").read_text()
    (folder / "checkpoint-20" / "trainer_state.json").write_text(metrics)
    assert not page_of(folder).all("section", id="verdict")


def test_the_headline_names_the_loss_alone_and_the_settings_cite_it(tmp_path: Path) -> None:
    cited = "`sigmoid` (Rafailov et al. 2023, Direct Preference Optimization, arXiv:2305.18290, eq. 7)"
    page = page_of(make_run(tmp_path / "run", objective=cited, steps=40, rows_used=64))
    assert "Rafailov" not in page.one("header").text and "loss sigmoid" in page.one("header").text
    assert "Rafailov et al. 2023" in page.one("section", id="settings").text
    tiles = {tile.one("h2").text: tile.one("p", class_="note").text for tile in page.all("div", class_="tile")[:5]}
    assert tiles["steps"] == "1 epoch, 64 of 98 training rows"


# ---- The worst pairs ------------------------------------------------------------------------------------------------


@pytest.mark.attack("hostile rows")
def test_the_worst_pairs_with_their_texts(tmp_path: Path) -> None:
    """Of the newest evaluation alone, the largest first; texts are only text."""
    folder = make_run(tmp_path / "run")
    rows = examples_of((0, 40), 4)
    for row, margin in zip(rows, [-9, -9, -9, -9, 0.5, -0.25, -1.5, math.nan], strict=True):
        row |= {"reward_chosen": margin if math.isfinite(margin) else None, "reward_rejected": 0.0}
    write_lines(folder / "eval_examples.jsonl", rows)
    texts = {"dataset": "eval", "prompt": "user\nWhy?\nassistant\n", "chosen": HOSTILE, "rejected": "No."}
    write_lines(folder / "worst_pairs.jsonl", [{"step": 40, "row": row, **texts} for row in (1, 2)])
    fold = page_of(folder).one("details", class_="worst")
    assert fold.one("summary").text == "2 pairs judged wrong"
    first, second = fold.all("div", class_="pair")
    assert first.one("h3").text == "Pair 2: the rejected completion is ahead by 1.50"
    assert second.one("h3").text == "Pair 1: the rejected completion is ahead by 0.25"
    shown = HOSTILE.replace("\x00", "␀").replace("\x1b", "␛")
    assert [text.text for text in first.all("div", class_="text")] == ["Why?", shown, "No."]
    tokens = [rows[6][f"tokens_{side}"] for side in ("chosen", "rejected")]
    assert [side.one("h4").text for side in first.all("div", class_="side")] == [
        f"chosen {tokens[0]} tokens",
        f"rejected {tokens[1]} tokens",
    ]
    (folder / "worst_pairs.jsonl").unlink()  # an older run
    fold = page_of(folder).one("details", class_="worst")
    assert not fold.all("div", class_="text") and "Their texts weren't recorded" in fold.text
    write_lines(folder / "eval_examples.jsonl", [row | {"reward_chosen": 1.0} for row in rows])
    assert not page_of(folder).all("details", class_="worst")


def test_a_prompt_is_shown_as_turns_without_bare_role_words(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    prompt = "system\nBe kind.\nuser\nHello\n\nassistant of mine\nassistant\nHi.\nuser\nWhy?\nassistant\n"
    row = {"step": 0, "prompt_number": 0, "prompt": prompt, "completion": "So."}
    write_lines(folder / "samples.jsonl", [row])
    (card,) = page_of(folder).all("article")
    texts = ["Be kind.", "Hello\n\nassistant of mine", "Hi.", "Why?", "So."]
    assert [text.text for text in card.all("div", class_="text")] == texts
    assert [head.text for head in card.all("h4")][:4] == ["system", "user", "assistant", "user"]


# ---- Lengths --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "cut", "note", "marked"),
    [
        (25, 1, "max_length is 25. 1 of 4 rows (25.0%) were truncated.", True),
        (400, 0, "max_length is 400. No row was truncated.", False),
        (None, 0, "There is no max_length. No row was truncated.", False),
    ],
)
def test_lengths_of_the_data(limit: int | None, cut: int, note: str, marked: bool, tmp_path: Path) -> None:
    data = {"train": {"kept_rows": 4, "max_length": limit, "rows_truncated": cut}}
    (drawn,) = data_lengths(Run(make_run(tmp_path / "run", data=data, lengths={"train": LENGTHS})))
    page = read_page(f"<figure>{drawn.svg}</figure>".encode())
    assert points_of(page, "prompt") == [(5, 75), (15, 25), (25, 0)]
    assert drawn.rows == [["0 to 9", *"3010"], ["10 to 19", *"1431"], ["20 to 29", *"0003"]]
    assert drawn.notes == [note] and bool(page.all("g", class_="limit")) == marked
    if marked:  # at 25 of 0 to 30
        d = page.one("g", class_="limit").one("path").attributes["d"]
        assert d.startswith(f"M{round(46 + 304 * 25 / 30, 1):g} ")


# ---- Marks ----------------------------------------------------------------------------------------------------------


def test_marks_that_would_lie_over_each_other_stand_side_by_side() -> None:
    """Three at 1.0 at step 10; two at step 20, with the third far below. The axis has room at both ends."""
    series = {"a": [(10, 1.0), (20, 1.0)], "b": [(10, 1.0), (20, 0.99)], "c": [(10, 1.0), (20, 0.2)]}
    traces = [Trace(name, of, points=True, shape=i) for i, (name, of) in enumerate(series.items())]
    drawn = curve_chart("c", "Accuracy", traces, 100, limits=(0.0, 1.0))
    page = read_page(f"<figure>{drawn.svg}</figure>".encode())
    xs = {name: [float(use.attributes["x"]) for use in trace_of(page, name).all("use")] for name in series}
    at = [46 + BOX[0] * share for share in (0.5 / 11, 10.5 / 11)]  # steps 9.5 to 20.5
    expected = {"a": [-1, -0.5], "b": [0, 0.5], "c": [1, 0]}
    for name, moved in expected.items():
        assert xs[name] == pytest.approx([x + MARK * by for x, by in zip(at, moved, strict=True)], abs=0.06), name
    assert points_of(page, "a") == series["a"]  # what is shown when they are pointed at has not moved


def test_a_line_that_ends_before_the_marks_says_why(tmp_path: Path) -> None:
    log = [entry for entry in log_of(40) if "loss" not in entry or entry["step"] <= 35]
    figures = page_of(make_run(tmp_path / "run", log_history=log)).all("figure")
    assert "Training was last logged at step 35." in figures[0].text
    assert "last logged" not in figures[-1].text + figures[-2].text  # without marks
