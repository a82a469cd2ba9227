"""A run that is stopped and resumed on another number of processes, with the same rows in a step, is the straight one.

The straight runs are those of one process, without a stop. Each number of processes is started once, four of them
only with --every-case; test_sharded_base.py resumes in four what two saved.
"""

import json
from typing import Any

import pytest
from parallel_run import SCRIPT, launch, train
from run_figures import TOLERANCE, largest_difference, run, without_comparisons

pytestmark = pytest.mark.slow

ADAM = {"optim": "adamw_torch", "learning_rate": 1e-3, "adam_epsilon": 1e-4}
SAVED = {**ADAM, "save_strategy": "steps", "save_steps": 3, "logging_steps": 2}
TWICE = {"gradient_accumulation_steps": 2}
# Each takes 8 rows a step: 4 at a time before the stop, all 8 at once after it. 27 rows are 3 steps and an uneven one;
# the stream is stopped in its second pass.
RUNS = {
    "evaluated": run(
        "evaluated", rows=27, eval_rows=5, options={**SAVED, **TWICE, "eval_strategy": "steps", "eval_steps": 4}
    ),
    "cached": run("cached", "kto", rows=27, options={**SAVED, **TWICE, "cache_ref_log_probs": True}),
    "packed": run("packed", "multi_negative", rows=27, options={**SAVED, **TWICE, "max_tokens_per_microbatch": 90}),
    "stream": run("stream", rows=32, stream=3, options={**SAVED, **TWICE, "max_steps": 8}),
}
STOPS = {"evaluated": 3, "cached": 3, "packed": 3, "stream": 6}
WAYS = [(1, 2), (2, 1), pytest.param(2, 4, marks=pytest.mark.rare)]


def resumed(name: str, before: int) -> dict[str, Any]:
    one = RUNS[name]
    options = {**one["options"], "gradient_accumulation_steps": 1}
    stopped = f"outputs-{name}-{before}/checkpoint-{STOPS[name]}"
    return {**one, "name": f"{name}-from-{before}", "batch": 8, "options": options, "resume": stopped}


@pytest.fixture(scope="module")
def results(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: Any, make_tokenizer: Any, pytestconfig: pytest.Config
) -> dict[str, Any]:
    """By name and number of processes: what came of a run, the same in all of them."""
    folder = tmp_path_factory.mktemp("resumed")
    tiny_llama().save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    found: dict[str, Any] = {}

    def do(processes: int, runs: list[dict[str, Any]]) -> None:
        if processes == 1:
            found.update({f"{one['name']} on 1": train(one, str(folder), 1, 0) for one in runs})
            return
        case = folder / f"case-{processes}.json"
        case.write_text(json.dumps(runs))
        launch(SCRIPT, [str(case)], folder, processes)
        for one in runs:
            ranks = [json.loads((folder / f"{one['name']}-{rank}.json").read_text()) for rank in range(processes)]
            assert all(rank["weights"] == ranks[0]["weights"] for rank in ranks)
            found[f"{one['name']} on {processes}"] = ranks[0]

    half = {**resumed("evaluated", 2), "name": "half", "batch": 4}  # 4 on each of two, and now on one
    do(1, list(RUNS.values()))
    do(2, [*RUNS.values(), *(resumed(name, 1) for name in RUNS)])
    do(1, [*(resumed(name, 2) for name in RUNS), half])
    if pytestconfig.getoption("--every-case"):
        do(4, [resumed(name, 2) for name in RUNS])
    return found


def without_counts(result: dict[str, Any]) -> dict[str, Any]:
    """A result without the epoch, which transformers counts in batches of the data loader, and without what the
    reference's cache found: the resumed run has another folder."""
    own = ("epoch", "ref_cache/")
    logs = [{name: figure for name, figure in log.items() if not name.startswith(own)} for log in result["logs"]]
    return {**result, "logs": logs, "eval": {**result["eval"], "epoch": 0}}


@pytest.mark.parametrize("before, after", WAYS)
@pytest.mark.parametrize("name", list(RUNS))
def test_resumed_on_another_number_is_the_straight_run(
    name: str, before: int, after: int, results: dict[str, Any]
) -> None:
    straight, found = results[f"{name} on 1"], results[f"{name}-from-{before} on {after}"]
    assert found.pop("warnings", []) == [], "nothing changes for the run"
    straight, found = without_counts(straight), without_counts(found)
    if name == "cached":
        straight, found = without_comparisons(straight), without_comparisons(found)
    difference, where = largest_difference(straight, found)
    assert difference <= TOLERANCE, where


def test_a_smaller_batch_is_told_and_changes_the_run(results: dict[str, Any]) -> None:
    """The control: one process instead of two, with the options of before. Steps have half as many rows."""
    half = results["half on 1"]
    (said,) = half["warnings"]
    assert "number of processes: 2 before, 1 now" in said and "optimizer batch: 8 before, 4 now" in said
    assert "per_device_train_batch_size=4, gradient_accumulation_steps=2" in said
    weights = {"weights": results["evaluated on 1"]["weights"]}
    assert largest_difference(weights, {"weights": half["weights"]})[0] > 100 * TOLERANCE
