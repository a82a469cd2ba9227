"""Training in two processes gives the result of one with the same global batch: losses, metrics, weights.

All runs share one start of the processes, as a user's, by `accelerate launch`; those of `RARE` are done with
--every-case alone.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from parallel_run import SCRIPT, child_environment, free_port, start, train, wait_for
from paths import REPO
from run_figures import TOLERANCE, largest_difference, run, without_comparisons

pytestmark = pytest.mark.slow


ACCUMULATED = {"gradient_accumulation_steps": 2}
RUNS = {
    one["name"]: one
    for one in (
        run("sigmoid", eval_rows=5),
        run("one_row_left", rows=9, options=ACCUMULATED),  # rank 1 has nothing in all of the last step
        run("all_even", rows=16, options=ACCUMULATED),
        run("logged_rarely", rows=14, options={"logging_steps": 3}),
        run("token_means", "sigmoid", "sft", options=ACCUMULATED, eval_rows=5),
        run("orpo", "orpo", rows=14, options=ACCUMULATED),
        run("lists", "multi_negative", rows=11, options=ACCUMULATED, eval_rows=5),
        run("adamw", options={"optim": "adamw_torch", "learning_rate": 1e-3, "adam_epsilon": 1e-4}),
        run("stream", stream=1, options={"max_steps": 8}),
        run("stream_in_shards", stream=3, options={"max_steps": 8}),
        run("predictions", eval_rows=7, metrics=True),
        run("saved", options={"save_strategy": "steps", "save_steps": 3}),
        run("resumed", resume="outputs-saved-2/checkpoint-3"),
        run("own_seed", own_seed=True),
        run("kto", "kto", eval_rows=5),
        run("kto_accumulated", "kto", options=ACCUMULATED),
        run("kto_one_row_left", "kto", rows=9, options=ACCUMULATED),
        run("aot", "aot", eval_rows=5),
        run("aot_accumulated", "aot", options=ACCUMULATED),
        run("nan", broken="nan"),
        run("gradients_stay", broken="gradients"),  # last: it changes the process
    )
}
RARE = "one_row_left orpo adamw stream_in_shards own_seed kto_accumulated aot".split()
COMPARED = [
    pytest.param(name, marks=pytest.mark.rare if name in RARE else [])
    for name in RUNS
    if name not in ("saved", "resumed", "nan", "gradients_stay")
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Any, make_tokenizer: Any) -> Path:
    """Holds the model that all processes load."""
    path = tmp_path_factory.mktemp("parallel")
    tiny_llama().save_pretrained(path / "model")
    make_tokenizer().save_pretrained(path / "model")
    return path


@pytest.fixture(scope="module")
def parallel(folder: Path, pytestconfig: pytest.Config) -> Callable[[str], list[dict[str, Any]]]:
    """`parallel(name)`: the run's results in two processes, by rank."""
    rare = () if pytestconfig.getoption("--every-case") else RARE
    (folder / "case.json").write_text(json.dumps([one for name, one in RUNS.items() if name not in rare]))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    command += [str(REPO / "recipes/accelerate/ddp_cpu.yaml"), "--main_process_port", str(free_port())]
    log = folder / "accelerate.txt"
    with log.open("w") as output:
        child = start([*command, str(SCRIPT), str(folder / "case.json")], child_environment(), output)
    wait_for([child], [log], timeout=300)
    return lambda name: [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def single(folder: Path) -> Callable[[str], dict[str, Any]]:
    """`single(name)`: the same run in this process alone, with the same global batch."""
    known: dict[str, dict[str, Any]] = {}

    def result(name: str) -> dict[str, Any]:
        if name not in known:
            known[name] = train(RUNS[name], str(folder), 1, 0)
        return known[name]

    return result


# ---- Comparing ------------------------------------------------------------------------------------------------------


def test_largest_difference_sees_every_figure() -> None:
    a = {"logs": [{"loss": 0.5, "grad_norm": 2.0, "train_runtime": 1.0}], "weights": {"w": [1.0, 2.0]}}
    b = {"logs": [{"loss": 0.5, "grad_norm": 2.1, "train_runtime": 9.0}], "weights": {"w": [1.0, 2.0]}}
    assert largest_difference(a, b)[0] == pytest.approx(0.05)
    b["weights"]["w"][1] = 3.0
    assert largest_difference(a, b) == (0.5, ".weights.w.1")
    with pytest.raises(AssertionError, match="grad_norm"):
        largest_difference(a, {"logs": [{"loss": 0.5}], "weights": {"w": [1.0, 2.0]}})


# ---- The same result ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMPARED)
def test_two_processes_train_as_one_with_the_same_global_batch(name: str, parallel: Any, single: Any) -> None:
    ranks, alone = parallel(name), single(name)
    assert ranks[0]["weights"] == ranks[1]["weights"], "the processes have drifted apart"
    assert largest_difference(ranks[0], ranks[1])[0] == 0.0, "the processes report different figures"
    if name.startswith("kto"):
        alone, *ranks = (without_comparisons(result) for result in (alone, *ranks))
    difference, where = largest_difference(alone, ranks[0])
    assert difference <= TOLERANCE, where


def test_a_row_more_is_seen(parallel: Any, single: Any) -> None:
    """Negative control: what the tolerance above would catch, the loss of one row of the last batch."""
    difference, _ = largest_difference(
        {"weights": single("sigmoid")["weights"]}, {"weights": single("logged_rarely")["weights"]}
    )
    assert difference > 1000 * TOLERANCE


def test_without_the_sum_of_gradients_the_processes_drift_apart(parallel: Any, single: Any) -> None:
    """Negative control: the same run with the sending of gradients broken."""
    ranks, alone = parallel("gradients_stay"), single("sigmoid")
    assert largest_difference({"w": ranks[0]["weights"]}, {"w": ranks[1]["weights"]})[0] > 1000 * TOLERANCE
    assert largest_difference({"w": alone["weights"]}, {"w": ranks[0]["weights"]})[0] > 1000 * TOLERANCE


def test_a_run_that_was_stopped_goes_on_in_two_processes(parallel: Any) -> None:
    straight, resumed = parallel("saved"), parallel("resumed")
    assert resumed[0]["weights"] == straight[0]["weights"]
    steps = [[log["loss"] for log in result[0]["logs"] if "loss" in log] for result in (straight, resumed)]
    assert steps[0] == steps[1]
    assert len(steps[0]) == 8


def test_a_loss_that_is_lost_in_one_process_stops_both(parallel: Any, single: Any) -> None:
    assert single("nan") == {"error": "NonFiniteError", "step": 2}
    assert parallel("nan") == [single("nan")] * 2
