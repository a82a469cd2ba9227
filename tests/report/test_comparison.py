"""Several runs on one page: what shares an axis, which run is best beyond noise, reward over KL; worked by hand."""

import math
from pathlib import Path
from typing import Any

import pytest
from report_helpers import chart, examples_of, log_of, make_run, points_of, read_page, table_of, write_lines

from dpo_peft.report.comparison import best_run, evaluated, frontiers, ranking, sign_test
from dpo_peft.report.facts import figures_at_end, loss_name
from dpo_peft.report.page import save_report
from dpo_peft.report.runs import Run

LOSSES = {  # loss, beta, reward
    "dpo": ("sigmoid", 0.1, "log_ratio"),
    "tight": ("sigmoid", 0.5, "log_ratio"),
    "ipo": ("ipo", 0.1, "log_ratio"),
    "wide": ("ipo", 0.01, "log_ratio"),
    "simpo": ("simpo", 2.0, "mean_logp"),
}


def run_of(folder: Path, loss: str = "sigmoid", beta: float = 0.1, reward: str = "log_ratio", **facts: Any) -> Path:
    options = {"loss_type": [loss], "beta": beta}
    objective = f"`{loss}` (Somebody et al. 2020, Some Title, arXiv:2001.00001, eq. 1)"
    return make_run(folder, options=options, objective=objective, beta=beta, reward=reward, **facts)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("losses")
    runs = [run_of(root / name, *of) for name, of in LOSSES.items()]
    save_report(runs, root / "page.html")
    return read_page(root / "page.html")


def named(page: Any, beginning: str) -> dict[str, list[str]]:
    """Title of each chart that begins so -> the runs that are drawn on it."""
    found = {}
    for figure in page.all("figure"):
        if (title := figure.all("h3")[0].text).startswith(beginning):
            labels = [group.attributes["data-label"] for group in figure.all("g") if "data-label" in group.attributes]
            found[title] = [label for label in labels if label in LOSSES]
    return found


def test_losses_that_can_not_share_an_axis_have_their_own(page: Any) -> None:
    """DPO begins at ln 2 with every beta; IPO's (h - 1/(2 beta))^2 at 25 with 0.1 and at 2,500 with 0.01."""
    groups = {"Loss, sigmoid": ["dpo", "tight"], "Loss, ipo, β 0.1": ["ipo"], "Loss, ipo, β 0.01": ["wide"]}
    assert named(page, "Loss") == {**groups, "Loss, simpo, β 2": ["simpo"]}
    assert list(named(page, "Accuracy").values())[0] == list(LOSSES)  # the same for all


def test_margins_are_divided_by_beta_and_rewards_of_two_kinds_are_apart(page: Any) -> None:
    title = "Implicit rewards: margin ÷ β"
    groups = named(page, title)
    assert groups == {
        f"{title}, log-ratios": ["dpo", "tight", "ipo", "wide"],
        f"{title}, log-probabilities per token": ["simpo"],
    }
    figure = chart(page, f"{title}, log-ratios")
    last = [points_of(figure, f"{name}, evaluation")[-1] for name in ("dpo", "tight", "wide")]
    assert last == [(40, 30.0), (40, 6.0), (40, 300.0)]  # a margin of 3, over 0.1, 0.5 and 0.01
    heads, *rows = table_of(page.one("section", id="figures"))
    margins = {row[0]: row[heads.index("margin ÷ β")] for row in rows}
    assert margins == {"dpo": "30.0", "tight": "6.00", "ipo": "30.0", "wide": "300", "simpo": "1.50"}


def test_runs_of_one_loss_and_beta_share_all_axes(tmp_path: Path) -> None:
    runs = [run_of(tmp_path / name) for name in ("a", "b")]
    save_report(runs, tmp_path / "page.html")
    titles = [figure.all("h3")[0].text for figure in read_page(tmp_path / "page.html").all("figure")]
    assert "Loss" in titles and "Implicit rewards: margin" in titles and not [t for t in titles if "÷" in t]


def test_the_name_of_a_loss_has_no_citation(tmp_path: Path) -> None:
    mix = "0.5 × `sigmoid` (Rafailov et al. 2023, arXiv:2305.18290, eq. 7) + 0.1 × `sft`"
    assert loss_name(Run(make_run(tmp_path / "mix", objective=mix))) == "0.5 × sigmoid + 0.1 × sft"
    assert loss_name(Run(make_run(tmp_path / "old", objective=None))) == "sigmoid"


# ---- The best -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("better", "differ", "p"),
    # 2 (1 + 10) / 2^10; both tails of 5 of 10 are everything; 2 / 2^5
    [(9, 10, 22 / 1024), (1, 10, 22 / 1024), (5, 10, 1.0), (5, 5, 2 / 32), (0, 0, 1.0)],
)
def test_sign_test_by_hand(better: int, differ: int, p: float) -> None:
    assert sign_test(better, differ) == pytest.approx(p)


def test_sign_test_of_many_is_the_normal_law() -> None:
    exact = 2 * sum(math.comb(1_200, k) for k in range(561)) / 2**1_200
    assert sign_test(640, 1_200) == pytest.approx(exact, rel=0.01)


def judging(folder: Path, wrong: int, pairs: int = 60, **facts: Any) -> Path:
    """A run that judges the first `wrong` of its pairs wrongly, and says so."""
    log = log_of(40)
    for entry in log:
        if "eval_loss" in entry:
            entry["eval_rewards/accuracies"] = 1 - wrong / pairs
    run_of(folder, log_history=log, **facts)
    rows = examples_of((40,), pairs)
    for i, row in enumerate(rows):
        row |= {"reward_chosen": -1.0 if i < wrong else 1.0, "reward_rejected": 0.0}
    write_lines(folder / "eval_examples.jsonl", rows)
    return folder


def judged(*folders: Path) -> tuple[int | None, str, list[int]]:
    runs = [Run(folder) for folder in folders]
    figures = [figures_at_end(run) for run in runs]
    return *best_run(runs, figures), ranking(figures)


def test_the_best_is_named_only_beyond_noise(tmp_path: Path) -> None:
    """All pairs on which two runs differ speak for one of them: 5 are not enough (p = 2/32), 6 are (2/64)."""
    zero, five, six = (judging(tmp_path / str(n), n) for n in (0, 5, 6))
    best, why, order = judged(five, zero)
    assert (best, order) == (None, [1, 0]) and why.endswith(
        "0 has the highest accuracy, 1.000, but within noise of 5 (0.917)."
    )
    best, why, order = judged(six, zero)
    assert (best, order) == (1, [1, 0]) and why == "0 has the highest accuracy, 1.000, beyond noise."
    # Among three runs each comparison has to be twice as sure: 6 pairs no longer do, 7 (2/128) do.
    assert judged(zero, six, judging(tmp_path / "20", 20))[0] is None
    assert judged(zero, judging(tmp_path / "7", 7), tmp_path / "20")[0] == 0


def test_margins_within_noise_are_never_the_best(tmp_path: Path) -> None:
    still = [{**entry, "eval_rewards/margins": 1e-4, "eval_kl": 1e-4} for entry in log_of(40)]
    one = run_of(tmp_path / "still", log_history=still)
    best, why, order = judged(one, judging(tmp_path / "20", 20))
    assert best is None and order == [1, 0] and why.startswith("Fewer than two runs")


def test_runs_on_other_pairs_are_compared_by_their_intervals(tmp_path: Path) -> None:
    """Wilson's 95 % intervals of 60 of 60 and of 49 of 55 overlap (0.940 and 0.951 at their ends), of 30 of 55 not."""
    zero = judging(tmp_path / "0", 0)
    assert judged(zero, judging(tmp_path / "6", 6, pairs=55))[0] is None
    assert judged(zero, judging(tmp_path / "25", 25, pairs=55))[0] == 0


def test_the_table_is_sorted_and_marks_the_best(tmp_path: Path) -> None:
    alone = [entry for entry in log_of(40) if "eval_loss" not in entry]
    no_evaluation = run_of(tmp_path / "none", log_history=alone)
    (no_evaluation / "eval_examples.jsonl").unlink()
    save_report([no_evaluation, judging(tmp_path / "9", 9), judging(tmp_path / "0", 0)], tmp_path / "page.html")
    heads, *rows = table_of(read_page(tmp_path / "page.html").one("section", id="figures"))
    assert [row[0] for row in rows] == ["0 best", "9", "none"]
    assert [row[heads.index("on")] for row in rows] == ["60 pairs", "60 pairs", "training"]


# ---- Reward over KL -------------------------------------------------------------------------------------------------


def test_a_point_of_the_frontier_is_an_evaluation(page: Any, tmp_path: Path) -> None:
    """The log's KL is 8 t^2, its accuracy 0.5 + 0.4 t, its margin 3 t at t = 1/4, 1/2, 3/4 and 1; beta is 0.1."""
    run = Run(run_of(tmp_path / "run"))
    assert evaluated(run, "rewards/accuracies", 1.0) == [
        (pytest.approx(8 * t * t), pytest.approx(0.5 + 0.4 * t), f"step {round(40 * t)}")
        for t in (0.25, 0.5, 0.75, 1.0)
    ]
    figure = chart(page, "Held-out accuracy over KL")
    marks = [use for group in figure.all("g", data_group="r0") for use in group.all("use")]
    assert [mark.one("title").text for mark in marks] == ["step 10", "step 20", "step 30", "step 40"]
    # On an axis of roots from 0 to 1.1 * 8 over 46 to 350: the root is proportional to t.
    expected = [46 + 304 * math.sqrt(8 * t * t / 8.8) for t in (0.25, 0.5, 0.75, 1.0)]
    assert [float(mark.attributes["x"]) for mark in marks] == pytest.approx(expected, abs=0.06)
    margins = table_of(chart(page, "Held-out margin ÷ β, log-ratios over KL"))
    assert ["tight, step 20", "2", "3"] in margins  # a margin of 1.5 over 0.5
    assert "Without a held-out KL" not in figure.text


def test_a_run_without_a_kl_is_named(tmp_path: Path) -> None:
    log = [{key: value for key, value in entry.items() if "kl" not in key} for entry in log_of(40)]
    runs = [Run(run_of(tmp_path / "a")), Run(run_of(tmp_path / "b", "simpo", 2.0, "mean_logp", log_history=log))]
    (accuracy, margin) = frontiers(runs)
    assert accuracy.notes == ["Without a held-out KL: b."] and margin.notes == []
    assert frontiers(runs[1:]) == []


def test_a_click_brings_out_line_and_marks_of_the_frontier(page: Any) -> None:
    figure = chart(page, "Held-out accuracy over KL")
    kinds = [group.attributes["class"].split()[0] for group in figure.all("g", data_group="r1")]
    assert kinds == ["line", "points"]
