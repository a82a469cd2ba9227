"""A 4-bit base in shards over 2 and 4 processes trains as one process that holds all of it: losses and weights.

The runs of a group share one start of the processes.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from parallel_run import SCRIPT, launch, train
from run_figures import TOLERANCE, largest_difference, run, without_comparisons

STEPS = {"max_steps": 30, "fsdp": "full_shard"}


def sharded(name: str, *loss: str, options: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """30 steps on a 4-bit base in shards; the last batch of each epoch is uneven."""
    return run(name, *loss, nf4=True, options={**STEPS, **(options or {})}, **more)


RUNS = [
    sharded("sigmoid", eval_rows=5, options={"eval_strategy": "steps", "eval_steps": 10}),
    sharded("kto", "kto", rows=27, batch=8, options={"gradient_accumulation_steps": 2}),
    sharded("lists", "multi_negative", rows=11, options={"max_tokens_per_microbatch": 90}),
    sharded("trajectory", "trajectory"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Any, make_tokenizer: Any) -> Path:
    """Holds the model that all processes load."""
    path = tmp_path_factory.mktemp("sharded")
    tiny_llama(num_hidden_layers=3).save_pretrained(path / "model")
    make_tokenizer().save_pretrained(path / "model")
    return path


@pytest.fixture(scope="module")
def parallel(folder: Path) -> Callable[[str, int], list[dict[str, Any]]]:
    """`parallel(name, processes)`: the run's results by rank."""
    started: set[int] = set()

    def results(name: str, processes: int) -> list[dict[str, Any]]:
        if processes not in started:
            started.add(processes)
            (folder / f"{processes}").mkdir()
            (folder / f"{processes}" / "model").symlink_to(folder / "model")
            (folder / f"{processes}" / "case.json").write_text(json.dumps(RUNS))
            launch(SCRIPT, [str(folder / f"{processes}" / "case.json")], folder / f"{processes}", processes)
        files = [folder / f"{processes}" / f"{name}-{rank}.json" for rank in range(processes)]
        return [json.loads(file.read_text()) for file in files]

    return results


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [one["name"] for one in RUNS])
def test_processes_with_a_share_of_the_base_train_as_one(
    name: str, processes: int, parallel: Any, folder: Path
) -> None:
    ranks = parallel(name, processes)
    alone = train(next(one for one in RUNS if one["name"] == name), str(folder), 1, 0)
    for rank in ranks[1:]:
        assert largest_difference(ranks[0], rank)[0] == 0.0
    if name == "kto":
        alone, *ranks = (without_comparisons(result) for result in (alone, *ranks))
    difference, where = largest_difference(alone, ranks[0])
    print(name, processes, difference, where)
    assert difference <= TOLERANCE, where
