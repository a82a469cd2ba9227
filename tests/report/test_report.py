"""The report of a run and of several: what stands on the page is what was logged, and nothing on it can act."""

import json
import math
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_helpers import (
    HOSTILE,
    METRICS,
    chart,
    examples_of,
    log_of,
    make_run,
    points_of,
    read_page,
    samples_of,
    table_of,
    trace_of,
    write_json,
    write_lines,
)

from dpo_peft import cli
from dpo_peft.artifacts.curves import source_of
from dpo_peft.errors import DataError, OptionError
from dpo_peft.report.charts import MOST_TRACES, Trace, curve_chart, style_of, thin
from dpo_peft.report.distributions import histogram_chart, scatter_chart
from dpo_peft.report.facts import duration, length_check
from dpo_peft.report.page import save_report
from dpo_peft.report.runs import Run
from dpo_peft.report.samples import PAGE_CHARACTERS, TEXT_CHARACTERS


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("report") / "run")


@pytest.fixture(scope="module")
def page(run_folder: Path) -> Any:
    save_report([run_folder], run_folder / "report.html")
    return read_page(run_folder / "report.html")


def page_of(*folders: Path, output: Path) -> tuple[Any, dict[str, Any]]:
    result = save_report(folders, output)
    return read_page(output), result


# ---- What was logged is what is shown -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("title", "label", "key"),
    [
        ("Loss", "loss", "loss"),
        ("Loss", "loss, evaluation", "eval_loss"),
        ("Accuracy", "chosen reward is higher", "rewards/accuracies"),
        ("Accuracy", "pick the longer, evaluation", "eval_accuracies/length_only"),
        ("Implicit rewards", "margin", "rewards/margins"),
        ("Implicit rewards", "rejected, evaluation", "eval_rewards/rejected"),
        ("Log-probability of a completion (nats)", "chosen", "logps/chosen"),
        ("Sample weight 1 − σ(margin)", "mean weight", "sample_weight"),
        ("KL to the reference on the data (nats)", "estimate, evaluation", "eval_kl"),
        ("Learning rate", "learning rate", "learning_rate"),
        ("Gradient norm", "gradient norm", "grad_norm"),
    ],
)
def test_a_curve_is_the_log(page: Any, title: str, label: str, key: str) -> None:
    """The values to hover, and the line itself read back through the chart's scales."""
    logged = [(entry["step"], entry[key]) for entry in log_of(40) if key in entry]
    figure = chart(page, title)
    shown = points_of(figure, label)
    assert [step for step, _ in shown] == [step for step, _ in logged]
    assert np.allclose([v for _, v in shown], [v for _, v in logged], rtol=1e-3, atol=1e-12)
    svg = figure.one("svg", class_="chart")
    x0, x1, y0, y1 = map(float, svg.attributes["data-domain"].split())
    left, right, top, bottom = map(float, svg.attributes["data-box"].split())
    trace = trace_of(figure, label)
    if "evaluation" in label:
        drawn = np.array([[float(use.attributes[name]) for name in "xy"] for use in trace.all("use")])
    else:
        drawn = np.array(re.findall(r"[ML]([\d.]+) ([\d.]+)", trace.one("path").attributes["d"]), float)
    expected = [(left + (s - x0) / (x1 - x0) * (right - left), (v - y0) / (y1 - y0)) for s, v in logged]
    pixels = [(x, bottom - share * (bottom - top)) for x, share in expected]
    assert np.abs(drawn - pixels).max() < 0.06  # a tenth of a pixel, rounded


def test_headline_figures(page: Any, run_folder: Path) -> None:
    tiles = {tile.one("h2").text: tile for tile in page.all("div", class_="tile")}
    assert tiles["held-out accuracy"].one("p", class_="figure").text == "0.900"
    about = tiles["held-out accuracy"].one("p", class_="note").text
    # Wilson's interval of 54 of 60, from the formula in Wilson (1927) worked by hand: (0.93201 +- 0.08238) / 1.06402
    assert about.startswith("pick the longer: 0.470; length-balanced: ")
    assert about.endswith("95\u00a0% interval 0.799 to 0.953, 60 pairs")
    assert tiles["held-out margin"].one("p", class_="figure").text == "3.00"
    assert tiles["held-out KL"].one("p", class_="figure").text == "8.00"
    assert tiles["steps"].one("p", class_="figure").text == "40"
    assert tiles["training time"].one("p", class_="figure").text == "2 min 5 s"


def test_a_real_run(tmp_path: Path, tiny_llama: Any, make_tokenizer: Any) -> None:
    """What the trainer saves is what the report reads: figures, pairs and options of a run of four steps."""
    from trainer_helpers import ours, text_pairs

    trainer = ours(
        tiny_llama(),
        text_pairs(12),
        make_tokenizer(),
        tmp_path,
        max_steps=4,
        eval_dataset=text_pairs(8, seed=1),
        eval_strategy="steps",
        eval_steps=2,
    )
    trainer.train()
    trainer.save_model()
    page, result = page_of(tmp_path, output=tmp_path / "report.html")
    last = [entry for entry in trainer.state.log_history if "eval_loss" in entry][-1]
    (figures,) = result["runs"]
    assert figures["accuracy"] == last["eval_rewards/accuracies"]
    assert figures["margin"] == pytest.approx(last["eval_rewards/margins"], rel=1e-6)
    assert (figures["steps"], figures["finished"], figures["source"]) == (4, True, "eval")
    losses = [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    shown = points_of(chart(page, "Loss"), "loss")
    assert [step for step, _ in shown] == [1, 2, 3, 4]
    assert np.allclose([v for _, v in shown], [v for _, v in losses], rtol=1e-3)
    settings = {dt.text: dd.text for dt, dd in zip(page.all("dt"), page.all("dd"), strict=True)}
    assert settings["beta"] == "0.1" and settings["rank"] == "4"
    pairs = table_of(_by_length(page))
    assert sum(int(row[1]) for row in pairs[1:]) == 8  # every held-out pair, by length


def _by_length(page: Any) -> Any:
    """The card "Accuracy by length" beside the scatter."""
    cards = [card for card in page.all("div", class_="card") if card.all("h3")]
    return next(card for card in cards if card.all("h3")[0].text == "Accuracy by length")


# ---- Margins and length ---------------------------------------------------------------------------------------------


def example(margin: float, chosen: int, rejected: int) -> dict[str, Any]:
    lengths = {"tokens_chosen": chosen, "tokens_rejected": rejected}
    return {"reward_chosen": margin, "reward_rejected": 0.0, **lengths}


def test_accuracy_by_length_worked_by_hand() -> None:
    """Two pairs with a shorter chosen answer (one won), one of equal lengths that ties, three longer (all won)."""
    pairs = [
        example(1, 3, 9),
        example(-2, 4, 5),
        example(0, 5, 5),
        example(1, 6, 5),
        example(2, 7, 5),
        example(3, 9, 5),
    ]
    check = length_check([*pairs, example(math.nan, 5, 4)])  # what isn't finite doesn't count
    assert check.rows == [
        ["chosen is shorter", "2", "0.500", "−0.5"],
        ["chosen is as long", "1", "0.500", "0"],
        ["chosen is longer", "3", "1.000", "2"],
    ]
    assert check.balanced is not None and check.balanced.value == 0.75
    # x = -6 -1 0 1 2 4, y = 1 -2 0 1 2 3; sums of products about the means: 15, 58, 137/6
    x, y = np.array([-6, -1, 0, 1, 2, 4]), np.array([1, -2, 0, 1, 2, 3])
    by_hand = (x * y).sum() - x.sum() * y.sum() / 6
    by_hand /= math.sqrt(((x**2).sum() - x.sum() ** 2 / 6) * ((y**2).sum() - y.sum() ** 2 / 6))
    assert check.correlation == pytest.approx(by_hand)


def test_no_correlation_where_lengths_are_all_the_same() -> None:
    check = length_check([example(1, 5, 5), example(2, 5, 5)])
    assert math.isnan(check.correlation) and check.balanced is None


def test_a_histogram_counts_every_pair() -> None:
    draw = random.Random(0)
    values = [draw.gauss(1, 2) for _ in range(500)] + [1e9, -1e9, math.nan]
    drawn = histogram_chart(
        "h", "Margins", [Trace("step 9", [(0.0, value) for value in values], filled=True)], "margin"
    )
    edges = [[float(edge.replace("−", "-")) for edge in row[0].split(" to ")] for row in drawn.rows]
    counts = [int(row[1].replace(",", "")) for row in drawn.rows]
    assert sum(counts) == 502  # both far ones in the last bins
    assert 0.0 in [low for low, _ in edges]  # margins of either sign never share a bar
    for (low, high), count in list(zip(edges, counts, strict=True))[1:-1]:
        assert count == sum(low <= value < high for value in values)
    assert any("beyond the ends" in note for note in drawn.notes) and any("1 not finite" in n for n in drawn.notes)


def test_margins_that_are_all_zero_do_not_flatten_the_others(page: Any) -> None:
    """Before training every margin is 0: a bar of 100 % would hide the distribution after it."""
    figure = chart(page, "Margins of pairs, evaluation")
    labels = ("step 0, before training", "step 40")
    before, after = (trace_of(figure, label).one("path").attributes["d"] for label in labels)
    assert re.fullmatch(r"M([\d.]+) [\d.]+L\1 [\d.]+", before)
    heights = [float(y) for y in re.findall(r"L[\d.]+ ([\d.]+)", after)]
    svg = figure.one("svg", class_="chart")
    _, _, top, bottom = map(float, svg.attributes["data-box"].split())
    assert min(heights) < top + 0.2 * (bottom - top)  # the highest bar fills the chart


def test_a_scatter_tells_how_many_points_it_draws() -> None:
    points = [(float(i), float(i % 7 - 3), f"pair {i}") for i in range(2500)] + [(1.0, math.inf, "bad")]
    drawn = scatter_chart("s", "Margin", points, "tokens", 1000)
    assert len(re.findall("<use", drawn.svg)) == len(re.findall("<title>pair", drawn.svg)) == 834  # every third
    assert drawn.notes == ["834 of 2,500 points are drawn; figures are of all.", "1 are not finite and left out."]


# ---- Drawing --------------------------------------------------------------------------------------------------------


def test_thinning_keeps_peaks_gaps_and_ends() -> None:
    draw = random.Random(1)
    series = [(float(i), draw.gauss(0, 1)) for i in range(20_000)]
    series[7_777], series[9_999], series[12_345] = (7777.0, 50.0), (9999.0, -60.0), (12345.0, math.nan)
    kept = thin(series, 100)
    assert len(kept) <= 2 * 100 + 3 and kept == sorted(kept, key=lambda point: point[0])
    assert {series[7_777], series[9_999], series[0], series[-1]} <= set(kept)
    assert any(math.isnan(value) for _, value in kept)
    every_100th = series[::100]  # what would lose them
    assert max(value for _, value in every_100th) < 50
    assert thin(series[:200], 100) == series[:200]


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (0.0, 1.0, ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (-30, 20, ["−30", "−20", "−10", "0", "10", "20"]),
        (0, 1e-4, ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0", "1e−4"]),
        (0, 5e6, ["0", "1", "2", "3", "4", "5", "1e6"]),
    ],
)
def test_ticks_are_round(low: float, high: float, labels: list[str]) -> None:
    drawn = curve_chart("c", "Chart", [Trace("trace", [(1, low), (2, high)])], 100, limits=(low, high))
    assert re.findall(r'<text [^>]*text-anchor="(?:end|start)">([^<s]*)<', drawn.svg) == labels


def test_runs_are_told_apart() -> None:
    assert len({style_of(i) for i in range(MOST_TRACES)}) == MOST_TRACES


@pytest.mark.parametrize(
    ("seconds", "text"), [(9.6, "10 s"), (125, "2 min 5 s"), (3599, "59 min 59 s"), (4 * 3600 + 600, "4 h 10 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    """As JSON's null, as Python's NaN, and so large that differences overflow: gaps, named, and no broken drawing."""
    log = log_of(40)
    for step, value in {5: math.nan, 6: None, 7: math.inf, 8: 1e308, 9: -1e308}.items():
        next(entry for entry in log if entry["step"] == step)["loss"] = value
    for entry in log:
        entry["rewards/margins"] = None
    folder = make_run(tmp_path / "run", log_history=log)
    rows = examples_of((40,), 20)
    rows[3]["reward_chosen"] = None
    write_lines(folder / "eval_examples.jsonl", rows)
    page, _ = page_of(folder, output=tmp_path / "page.html")
    figure = chart(page, "Loss")
    assert "not finite at steps 5, 6, 7, 8, 9" in figure.text
    line = trace_of(figure, "loss").one("path").attributes["d"]
    assert line.count("M") == 2 and len(re.findall("[ML]", line)) == 35  # two stretches, five values missing
    assert ["7", "not finite", ""] in table_of(figure)
    for element in page.all():
        for name in ("d", "x", "y", "cx", "cy", "data-points", "data-domain"):
            assert not re.search("nan|inf", element.attributes.get(name, ""), flags=re.IGNORECASE)


# ---- Nothing can act, nothing is loaded -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose every text is an attack."""
    folder = tmp_path_factory.mktemp("hostile") / "run <b>"
    log = log_of(40)
    for entry in log:
        entry[HOSTILE] = 1.0
        entry[f"eval_{HOSTILE}_loss"] = 2.0
    make_run(
        folder,
        log_history=log,
        options={HOSTILE: HOSTILE, "nested": {HOSTILE: [HOSTILE]}},
        objective=HOSTILE,
        base_model=HOSTILE,
        reference=HOSTILE,
        adapter={HOSTILE: HOSTILE},
        environment={HOSTILE: HOSTILE},
        warnings=[{"step": 20, "name": HOSTILE, "message": HOSTILE}],
        data={"train": {HOSTILE: HOSTILE}, f"eval_{HOSTILE}": {"kept_rows": 5}},
    )
    samples = samples_of((0, 20, 40), (HOSTILE,))
    write_lines(folder / "samples.jsonl", [{**row, "completion": HOSTILE} for row in samples])
    write_lines(folder / "eval_examples.jsonl", examples_of((0, 40), 20, dataset=f"eval_{HOSTILE}"))
    return folder


def check_harmless(page: Any) -> None:
    """One script and one style, ours; no attribute acts; every address is inside the page."""
    assert len(page.all("script")) == len(page.all("style")) == 1
    assert not page.all("img") and not page.all("iframe") and not page.all("object") and not page.all("base")
    policy = page.all("meta", http_equiv="Content-Security-Policy")[0].attributes["content"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    for element in page.all():
        for name, value in element.attributes.items():
            assert not name.startswith("on") and name not in ("style", "src", "action", "srcset")
            if name in ("href", "xlink:href"):
                assert value.startswith("#") or value == "data:,"
            assert name == "content" or element.tag == "svg" or "url(" not in value or HOSTILE in value


@pytest.mark.attack("hostile rows")
def test_hostile_text_is_only_text(hostile: Path, tmp_path: Path) -> None:
    page, _ = page_of(hostile, output=tmp_path / "page.html")
    check_harmless(page)
    shown = HOSTILE.replace("\x00", "␀").replace("\x1b", "␛")
    texts = [text.text for text in page.all("div", class_="text")]
    assert texts == [shown] * 4  # prompt, before, after, one step between: unchanged
    assert page.one("h1").text == "run <b>"
    assert chart(page, shown).one("svg", class_="chart")
    two, _ = page_of(hostile, make_run(tmp_path / "other"), output=tmp_path / "two.html")
    check_harmless(two)


def test_the_check_sees_what_is_harmful() -> None:
    head = "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'\"><style></style><script></script>"
    for bad in ("<script>1</script>", "<img src='x'>", "<b onclick='1'>x</b>", "<a href='http://x'>x</a>"):
        check_harmless(read_page(head.encode()))
        with pytest.raises(AssertionError):
            check_harmless(read_page((head + bad).encode()))


@pytest.mark.attack("hostile rows")
def test_text_that_utf8_cannot_hold(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    (folder / "samples.jsonl").write_text(
        '{"step": 0, "prompt_number": 0, "prompt": "a\\ud800b", "completion": "c"}\n', "utf-8"
    )
    page, _ = page_of(folder, output=tmp_path / "page.html")
    assert page.all("div", class_="text")[0].text == "a\\ud800b"


@pytest.mark.slow
def test_same_runs_same_bytes(run_folder: Path, hostile: Path, tmp_path: Path) -> None:
    """Also in a process that orders its sets differently."""
    runs, pages = [str(run_folder), str(hostile)], [tmp_path / "here.html", tmp_path / "there.html"]
    save_report(runs, pages[0])
    code = f"from dpo_peft.report.page import save_report; save_report({runs!r}, {str(pages[1])!r})"
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONHASHSEED": seed})
    assert pages[0].read_bytes() == pages[1].read_bytes()


# ---- Size -----------------------------------------------------------------------------------------------------------


def test_a_long_run_makes_a_small_page(tmp_path: Path) -> None:
    log = log_of(5_000, every=50)
    folder = make_run(tmp_path / "run", log_history=log)
    write_lines(folder / "eval_examples.jsonl", examples_of((0, 5_000), 3_000))
    text = "word " * 400
    rows = [{**row, "completion": text} for row in samples_of(range(0, 2001, 10), [str(i) for i in range(10)])]
    write_lines(folder / "samples.jsonl", rows)
    page, result = page_of(folder, output=tmp_path / "page.html")
    assert result["bytes"] < 2_000_000
    loss = chart(page, "Loss")
    assert "5,000 values: the lowest and highest of each of 200 stretches are drawn." in loss.text
    assert len(points_of(loss, "loss")) <= 2 * 200 + 2
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert max(v for _, v in points_of(loss, "loss")) == pytest.approx(max(losses), rel=1e-3)
    assert "1,000 of 3,000 points are drawn" in page.text
    between = int(re.search(r"(\d+) of 199 steps between are shown", page.text)[1])  # type: ignore[index]
    shown = sum(len(text.text) for text in page.all("div", class_="text"))
    assert between == (PAGE_CHARACTERS - 2 * 10 * len(text) - 10) // (10 * len(text)) and shown <= PAGE_CHARACTERS


@pytest.mark.slow
def test_as_many_runs_as_can_be_told_apart_make_a_small_page(tmp_path: Path) -> None:
    log = log_of(200, every=10)
    folders = [make_run(tmp_path / f"run{i}", log_history=log) for i in range(MOST_TRACES)]
    _, result = page_of(*folders, output=tmp_path / "page.html")
    assert result["bytes"] < 2_000_000
    with pytest.raises(OptionError, match="25 are too many.*at most 24"):
        save_report([*folders, make_run(tmp_path / "one more")], tmp_path / "x.html")


def test_a_long_text_is_cut_and_counted(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    long = "a" * (TEXT_CHARACTERS + 1_234)
    write_lines(folder / "samples.jsonl", [{**samples_of((0,), ("x",))[0], "completion": long}])
    page, _ = page_of(folder, output=tmp_path / "page.html")
    assert [len(text.text) for text in page.all("div", class_="text")] == [1, TEXT_CHARACTERS]
    assert "1,234 more characters are in samples.jsonl." in page.text


def test_prompts_that_do_not_fit_are_counted(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    rows = samples_of((0, 40), [str(i) for i in range(100)])
    write_lines(folder / "samples.jsonl", [{**row, "completion": "b" * TEXT_CHARACTERS} for row in rows])
    page, _ = page_of(folder, output=tmp_path / "page.html")
    shown = len(page.all("article"))
    assert shown == PAGE_CHARACTERS // (2 * TEXT_CHARACTERS + 2)
    assert f"{100 - shown} further prompts are in samples.jsonl." in page.text


# ---- Samples --------------------------------------------------------------------------------------------------------


def test_samples_before_after_and_between(page: Any) -> None:
    first, second = page.all("article")
    sides = [side.one("h4").text for side in first.all("div", class_="side")]
    assert sides == ["before training 7 tokens, not finished", "after step 40 7 tokens", "step 20 7 tokens"]
    texts = [text.text for text in second.all("div", class_="text")]
    assert texts == ["Second?", "Answer to 1 after 0.", "Answer to 1 after 40.", "Answer to 1 after 20."]
    assert [text.text for text in second.one("details").all("div", class_="text")] == ["Answer to 1 after 20."]


# ---- What is missing ------------------------------------------------------------------------------------------------


def test_a_run_that_left_only_metrics(tmp_path: Path) -> None:
    """As older versions did."""
    folder = tmp_path / "run"
    folder.mkdir()
    write_json(folder / "metrics.json", {"log_history": log_of(40)})
    page, result = page_of(folder, output=tmp_path / "page.html")
    assert len(result["runs"][0]["missing"]) == 4
    for name in ("adapter_config.json", "samples.jsonl", "eval_examples.jsonl", "recipe.yaml"):
        assert any(name in note for note in result["runs"][0]["missing"]) and name in page.text
    assert not page.all("article") and chart(page, "Loss")
    write_text = (folder / "recipe.yaml").write_text
    write_text("beta: 0.25\nlearning_rate: 1.0e-05\n")
    page, result = page_of(folder, output=tmp_path / "page.html")
    assert len(result["runs"][0]["missing"]) == 3
    assert dict(zip([x.text for x in page.all("dt")], [x.text for x in page.all("dd")], strict=True))["beta"] == "0.25"


def test_an_empty_log_and_one_without_evaluation(tmp_path: Path) -> None:
    page, result = page_of(make_run(tmp_path / "a", log_history=[], seconds=None), output=tmp_path / "page.html")
    assert "The log is empty" in page.text and "steps" not in result["runs"][0]
    log = [entry for entry in log_of(40) if "eval_loss" not in entry]
    folder = make_run(tmp_path / "b", log_history=log)
    (folder / "eval_examples.jsonl").unlink()
    page, result = page_of(folder, output=tmp_path / "page.html")
    assert result["runs"][0]["source"] == "train"
    assert result["runs"][0]["accuracy"] == [entry for entry in log if "loss" in entry][-1]["rewards/accuracies"]
    assert any(tile.one("h2").text == "training accuracy" for tile in page.all("div", class_="tile"))


def test_an_unfinished_run_is_read_from_its_newest_whole_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for step in (10, 20, 30):
        (folder / f"checkpoint-{step}").mkdir(parents=True)
        state = {"log_history": log_of(step), "global_step": step, "max_steps": 40}
        write_json(folder / f"checkpoint-{step}" / "trainer_state.json", state)
    (folder / "checkpoint-30" / "trainer_state.json").write_text('{"log_his')  # killed while it was written
    (folder / "checkpoint-old").mkdir()
    page, result = page_of(folder, output=tmp_path / "page.html")
    assert not result["runs"][0]["finished"] and result["runs"][0]["steps"] == 20
    assert "the log is that of checkpoint-20, step 20 of 40" in page.text
    for step in (10, 20):
        (folder / f"checkpoint-{step}" / "trainer_state.json").write_text("[]")
    with pytest.raises(DataError, match="checkpoint-30/trainer_state.json can't be read"):
        Run(folder)


@pytest.mark.attack("damaged or mixed files")
def test_a_half_written_last_line_is_noted_and_any_other_is_an_error(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    whole = (folder / "samples.jsonl").read_text()
    (folder / "samples.jsonl").write_text(whole + '{"step": 60, "promp')
    run = Run(folder)
    assert len(run.samples) == 6 and run.notes == ["The last line of samples.jsonl is not whole and was left out."]
    (folder / "samples.jsonl").write_text('{"step": 60, "promp\n' + whole)
    with pytest.raises(DataError, match="run/samples.jsonl, line 1: .*Correct or delete"):
        Run(folder)


@pytest.mark.attack("damaged or mixed files")
@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("samples.jsonl", {"step": "1"}, "step is '1', not of type int"),
        ("samples.jsonl", {"prompt": None}, "prompt is None, not of type str"),
        ("eval_examples.jsonl", {"reward_chosen": True}, "reward_chosen is True, not of type float"),
        ("eval_examples.jsonl", {"tokens_chosen": "many"}, "tokens_chosen is 'many', not of type float"),
    ],
)
def test_a_wrong_field_names_file_line_and_field(
    file: str, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = make_run(tmp_path / "run")
    rows = [json.loads(line) for line in (folder / file).read_text().splitlines()]
    write_lines(folder / file, [rows[0], {**rows[1], **change}, *rows[2:]])
    with pytest.raises(DataError, match=re.escape(f"run/{file}, line 2: {message}")):
        Run(folder)


# ---- Several evaluation sets, warnings ------------------------------------------------------------------------------


def test_sources_of_metrics() -> None:
    sets = ["eval_help", "eval_help_more"]
    assert source_of("loss", sets) == ("train", "loss")
    assert source_of("eval_loss", sets) == ("eval", "loss")
    assert source_of("eval_help_rewards/margins", sets) == ("eval_help", "rewards/margins")
    assert source_of("eval_help_more_loss", sets) == ("eval_help_more", "loss")


def test_each_evaluation_set_has_its_marks_and_margins(tmp_path: Path) -> None:
    log = log_of(40, prefix="eval_help_") + [e for e in log_of(40, prefix="eval_harm_") if "eval_harm_loss" in e]
    data = {"train": {}, "eval_help": {}, "eval_harm": {}}
    folder = make_run(tmp_path / "run", log_history=log, data=data)
    rows = [row for name in ("eval_help", "eval_harm") for row in examples_of((40,), 10, dataset=name)]
    write_lines(folder / "eval_examples.jsonl", rows)
    page, result = page_of(folder, output=tmp_path / "page.html")
    loss = chart(page, "Loss")
    marks = [trace_of(loss, f"loss, evaluation on {name}") for name in ("help", "harm")]
    shapes = [mark.one("path").attributes["d"] for mark in marks]
    assert "C" in shapes[0] and "C" not in shapes[1]  # circles and squares
    assert result["runs"][0]["source"] == "eval_help"
    assert [chart(page, f"Margins of pairs, evaluation on {name}").tag for name in ("help", "harm")] == ["figure"] * 2


def test_warnings_are_listed_and_marked(tmp_path: Path) -> None:
    warning = {"step": 30, "name": "likelihood-displacement", "message": "Chosen completions fell."}
    other = {"step": 30, "name": "high-kl", "message": "See docs/diagnostics.md#high-kl."}
    page, result = page_of(make_run(tmp_path / "run", warnings=[warning, other]), output=tmp_path / "page.html")
    assert result["runs"][0]["warnings"] == ["high-kl", "likelihood-displacement"]
    listed = " ".join(page.one("ul", class_="warnings").text.split())
    assert listed.startswith("likelihood-displacement at step 30: Chosen completions fell. docs/diagnostics.md#")
    assert listed.count("docs/diagnostics.md#high-kl") == 1  # named by the message already
    for title in ("Loss", "Implicit rewards"):
        mark = chart(page, title).one("g", class_="mark")
        assert mark.one("title").text == "step 30: likelihood-displacement, high-kl"


# ---- Several runs ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Any]]:
    root = tmp_path_factory.mktemp("three")
    options = {"beta": 0.1, "learning_rate": 1e-4, "seed": 0, "output_dir": "x"}
    make_run(root / "a" / "run", options=options)
    make_run(root / "b" / "run", options={**options, "beta": 0.5, "warmup_steps": 10, "output_dir": "y"})
    last = make_run(root / "c", log_history=log_of(80, seed=1), adapter={"rank": 8, "alpha": 32}, options=options)
    write_lines(last / "samples.jsonl", samples_of((0, 80), ("First?", "Another?")))
    return page_of(root / "a" / "run", root / "b" / "run", root / "c", output=root / "page.html")


def test_settings_that_differ_and_no_others(three: Any) -> None:
    page, result = three
    assert table_of(page.one("section", id="differences")) == [
        ["setting", *(run["name"] for run in result["runs"])],
        ["beta", "0.1", "0.5", "0.1"],
        ["warmup_steps", "default", "10", "default"],
        ["rank", "16", "16", "8"],
    ]


def test_runs_with_one_name_are_told_apart(three: Any) -> None:
    names = [run["name"] for run in three[1]["runs"]]
    assert names[0].endswith("a/run") and names[1].endswith("b/run") and len(set(names)) == 3


def test_curves_of_all_runs_lie_over_each_other(three: Any) -> None:
    page, result = three
    names = [run["name"] for run in result["runs"]]
    figure = chart(page, "Loss")
    for i, (name, steps) in enumerate(zip(names, (40, 40, 80), strict=True)):
        trace = trace_of(figure, name)
        assert trace.attributes["data-group"] == f"r{i}" and points_of(figure, name)[-1][0] == steps
    dashes = [trace_of(figure, name).attributes.get("stroke-dasharray", "") for name in names]
    colors = [trace_of(figure, name).attributes["class"] for name in names]
    assert len(set(dashes)) == len(set(colors)) == 3
    key = page.one("ul", class_="key")
    assert [button.text for button in key.all("button")] == names
    plotted = {key for key in METRICS if key != "accuracies/length_only"}
    assert len(page.one("section", id="curves").all("figure")) == len(plotted) + 2  # and learning rate, gradient norm


def test_compared_samples_are_of_shared_prompts(three: Any) -> None:
    page, result = three
    first, second = page.all("article")
    heads = [side.one("h4").text for side in first.all("div", class_="side")]
    assert len(heads) == 4 and heads[0].startswith("before training")
    assert sum("step 80" in head for head in heads) == 1 and sum("step 40" in head for head in heads) == 2
    assert len(second.all("div", class_="side")) == 3
    assert "1 prompts were sampled in one run only." in page.text


# ---- The command ----------------------------------------------------------------------------------------------------


def test_the_command_writes_where_it_says(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    one, two = make_run(tmp_path / "one"), make_run(tmp_path / "two", warnings=[{"step": 1, "name": "high-kl"}])
    assert cli.main(["report", str(one)]) == 0
    out = capsys.readouterr().out
    assert (
        "one: good, held-out accuracy 0.900 (pick the longer 0.470), margin 3.00, KL 8.00, 40 steps, 2 min 5 s" in out
    )
    assert f"{one / 'report.html'}: " in out and (one / "report.html").is_file()
    assert cli.main(["report", str(one), str(two), "--title", "Two <runs>", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["output"] == "report.html" and result["bytes"] == (tmp_path / "report.html").stat().st_size
    assert [run["warnings"] for run in result["runs"]] == [[], ["high-kl"]]
    page = read_page(tmp_path / "report.html")
    assert page.one("h1").text == page.one("head").one("title").text == "Two <runs>"


def test_an_accuracy_of_margins_within_noise_is_shown_as_such(tmp_path: Path, capsys: Any) -> None:
    """In the command's line, the tile and the table of a comparison; beside the accuracy, which stays as it is."""
    still = {"rewards/margins": 1e-3, "kl": 1e-3}  # of 3 and 8, at a beta of 0.1: 0.03 and 0.008 nats
    log = [{key: v * still.get(key.removeprefix("eval_"), 1) for key, v in entry.items()} for entry in log_of(40)]
    one, two = make_run(tmp_path / "one", log_history=log), make_run(tmp_path / "two")
    assert cli.main(["report", str(one), "--output", str(tmp_path / "page.html")]) == 0
    assert "one: bad, held-out accuracy 0.900 (margins within noise; pick the longer 0.470)" in capsys.readouterr().out
    tile = read_page(tmp_path / "page.html").all("div", class_="tile")[0]
    assert tile.one("p", class_="figure").text == "0.900"
    assert tile.one("p", class_="note").text.startswith("margins within noise; pick the longer")
    page, result = page_of(one, two, output=tmp_path / "both.html")
    rows = [row.text for row in page.one("section", id="figures").all("tr")]
    assert ["within noise" in row for row in rows] == [False, False, True]  # behind the other
    assert [run.get("note") for run in result["runs"]] == ["margins within noise", None]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "runs is missing"),
        (["no/such"], "runs: 'no/such' is not a folder"),
        (["."], "has neither metrics.json nor a checkpoint"),
        (["run", "run"], "'run' is given twice"),
        (["run", "--output", "page.pdf"], "must end in .html"),
        (["run", "--output", "folder.html"], "is a folder: give a file"),
        (["run", "--titel", "x"], "Did you mean 'title'?"),
    ],
)
def test_wrong_input_ends_with_2_and_its_remedy(
    words: list[str], message: str, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "run")
    (tmp_path / "folder.html").mkdir()
    assert cli.main(["report", *words]) == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.html", "run"]


def test_a_damaged_file_ends_with_2(tmp_path: Path, capsys: Any) -> None:
    folder = make_run(tmp_path / "run")
    (folder / "metrics.json").write_text("{")
    assert cli.main(["report", str(folder)]) == 2
    assert "run/metrics.json can't be read" in capsys.readouterr().err
    assert not (folder / "report.html").exists()


def test_help_has_examples_and_exit_codes(capsys: Any) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["report", "--help"])
    out = capsys.readouterr().out
    assert stopped.value.code == 0 and "dpo-peft report outputs/run" in out and "exit codes:" in out
