"""A 4-bit base in shards over 2 and 4 processes trains as one process that holds all of it: losses and weights.

The runs of a number of processes share one start; those that are left out of a tier are not done.
"""

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from parallel_run import SCRIPT, child_environment, free_port, launch, start, train, wait_for
from paths import REPO
from peft import PeftModel
from run_figures import TOLERANCE, largest_difference, run, without_comparisons
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

STEPS = {"max_steps": 12, "fsdp": "full_shard", "learning_rate": 0.1}
LIMIT = 300  # seconds for one start; processes that wait for each other would do so for ever


def sharded(name: str, *loss: str, options: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """12 steps on a 4-bit base in shards; the last batch of each epoch is uneven."""
    return run(name, *loss, nf4=True, options={**STEPS, **(options or {})}, **more)


def short(name: str, *loss: str, options: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """Two epochs of 5 rows: 4 steps, of which two leave processes without a row."""
    return sharded(name, *loss, options={"max_steps": -1, **(options or {})}, **{"rows": 5, **more})


OWN = {"fused_layers": False, "gradient_accumulation_steps": 2}
EVERY_OTHER = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
SAMPLED = {"sample_prompts": 2, "sample_max_new_tokens": 4, "load_best_model_at_end": True}
SIGMOID = sharded("sigmoid", eval_rows=5, options={"max_steps": 30, "eval_strategy": "steps", "eval_steps": 10})
FAMILIES = [
    SIGMOID,
    sharded("kto", "kto", rows=27, batch=8, options={"gradient_accumulation_steps": 2}),
    sharded("lists", "multi_negative", rows=11, options={"max_tokens_per_microbatch": 90}),
    sharded("trajectory", "trajectory"),
]
SAVED = short("saved", options={"save_strategy": "steps", "save_steps": 2})
GROUPS: dict[str, list[dict[str, Any]]] = {
    "2": [
        short("caching", cache="cache"),
        short("some cached", cache="cache", cache_lost=True),
        short("memory", broken="memory"),
        *FAMILIES,
        {**SIGMOID, "name": "whole", "options": {**SIGMOID["options"], "fsdp": None}},
        short("own layers", options=OWN, eval_rows=7, metrics=True),
        short("stored", options={"precompute_ref_log_probs": True}),
        short("samples", eval_rows=5, options={**EVERY_OTHER, **SAMPLED}),
        short("no reference", "orpo", options={"save_strategy": "steps", "save_steps": 2}),
        SAVED,
        short("turns", broken="turns"),  # last: it ends the processes
    ],
    "4": [
        *FAMILIES,
        short("within a machine", options={"fsdp": "hybrid_shard"}),
        {**SAVED, "name": "resumed", "resume": "../2/outputs-saved-2/checkpoint-2"},
    ],
}
RARE = {("2", "trajectory"), ("2", "stored"), ("4", "sigmoid"), ("4", "lists"), ("4", "kto")}
COMPARED = [
    pytest.param(group, one["name"], marks=pytest.mark.rare if (group, one["name"]) in RARE else [])
    for group, runs in GROUPS.items()
    for one in runs
    if one["name"] not in ("caching", "whole", "turns", "resumed")
]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Any, make_tokenizer: Any) -> Path:
    """Holds the model that all processes load, below each group's folder."""
    path = tmp_path_factory.mktemp("sharded")
    tiny_llama(num_hidden_layers=3).save_pretrained(path / "model")
    make_tokenizer().save_pretrained(path / "model")
    for group in GROUPS:
        (path / group).mkdir()
        (path / group / "model").symlink_to(path / "model")
    return path


@pytest.fixture(scope="module")
def parallel(folder: Path, pytestconfig: pytest.Config) -> Callable[[str, str], list[dict[str, Any]]]:
    """`parallel(group, name)`: a run's results by rank; the group starts with the first of its runs."""

    @functools.cache
    def begin(group: str) -> None:
        if group == "4":
            begin("2")  # whose checkpoint it resumes
        case = folder / group / "case.json"
        rare = {} if pytestconfig.getoption("--every-case") else RARE
        case.write_text(json.dumps([one for one in GROUPS[group] if (group, one["name"]) not in rare]))
        launch(SCRIPT, [str(case)], folder / group, int(group[0]), LIMIT, LOCAL_WORLD_SIZE="2")

    def results(group: str, name: str) -> list[dict[str, Any]]:
        begin(group)
        files = [folder / group / f"{name}-{rank}.json" for rank in range(int(group[0]))]
        return [json.loads(file.read_text()) for file in files if file.exists()]

    return results


@pytest.fixture(scope="module")
def single(folder: Path) -> Callable[[str], dict[str, Any]]:
    """`single(name)`: the same run in this process alone."""

    @functools.cache
    def result(name: str) -> dict[str, Any]:
        return train(next(one for runs in GROUPS.values() for one in runs if one["name"] == name), str(folder), 1, 0)

    return result


@pytest.mark.parametrize(("group", "name"), COMPARED)
def test_processes_with_a_share_of_the_base_train_as_one(group: str, name: str, parallel: Any, single: Any) -> None:
    alone, *ranks = map(without_counts, (single(name), *parallel(group, name)))
    assert len(ranks) == int(group[0])
    for rank in ranks[1:]:
        assert largest_difference(ranks[0], rank)[0] == 0.0
    if name == "kto":
        alone, *ranks = (without_comparisons(result) for result in (alone, *ranks))
    difference, where = largest_difference(alone, ranks[0])
    assert difference <= TOLERANCE, where


def without_counts(result: dict[str, Any]) -> dict[str, Any]:
    """A result without how often a process found a log-prob."""
    logs = [{key: value for key, value in log.items() if not key.startswith("ref_cache")} for log in result["logs"]]
    return {**result, "logs": logs}


def test_memory_has_run_out_and_passes_differed_in_number(parallel: Any, folder: Path) -> None:
    """What the runs above are about has happened."""
    parallel("2", "memory")
    said = [(folder / "2" / f"output-{rank}.txt").read_text() for rank in range(2)]
    assert ["Out of memory with" in text for text in said] == [False, True]


def test_shares_of_the_base_change_no_bit(parallel: Any) -> None:
    """Two processes that hold the base between them, and two that hold all of it."""
    assert largest_difference(parallel("2", "sigmoid")[0], parallel("2", "whole")[0])[0] == 0.0


def test_processes_that_do_not_agree_whose_pass_is_next_do_not_finish(parallel: Any) -> None:
    """Negative control."""
    assert parallel("2", "turns") == []


def test_a_run_goes_on_in_another_number_of_processes(parallel: Any, folder: Path) -> None:
    """Two saved it; four resume it, or one, which holds the whole base."""
    straight = parallel("2", "saved")[0]["weights"]
    resumed = {**SAVED, "resume": "2/outputs-saved-2/checkpoint-2"}
    for weights in (parallel("4", "resumed")[0]["weights"], train(resumed, str(folder), 1, 0)["weights"]):
        assert largest_difference({"w": straight}, {"w": weights})[0] <= TOLERANCE


def test_the_saved_adapter_is_a_plain_one(parallel: Any, folder: Path) -> None:
    parallel("2", "saved")
    saved, alone = (folder / place / "checkpoint-4" for place in ("2/outputs-saved-2", "outputs-saved-1"))
    train(SAVED, str(folder), 1, 0)
    tensors, expected = (load_file(path / "adapter_model.safetensors") for path in (saved, alone))
    assert {name: (t.shape, t.dtype) for name, t in tensors.items()} == {
        name: (t.shape, t.dtype) for name, t in expected.items()
    }
    ids = torch.tensor([[5, 6, 7, 8]])
    logits = []
    for path in (saved, alone):
        base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
        logits.append(PeftModel.from_pretrained(base, path).eval()(ids).logits)
    assert (logits[0] - logits[1]).abs().max() < 1e-4
    assert (logits[0] - base.eval()(ids).logits).abs().max() == 0 or logits[0].std() > 0


# ---- Started by accelerate ------------------------------------------------------------------------------------------


def test_accelerate_starts_it_by_a_config_of_fsdp_2(folder: Path, single: Any) -> None:
    here = folder / "accelerate"
    here.mkdir()
    (here / "model").symlink_to(folder / "model")
    one = short("by config", rows=5, options={"fsdp": None, "num_train_epochs": 1, "save_strategy": "epoch"})
    (here / "case.json").write_text(json.dumps([one]))
    config = yaml.safe_load((REPO / "recipes" / "accelerate" / "fsdp2.yaml").read_text()) | {"use_cpu": True}
    del config["gpu_ids"]
    (here / "fsdp2.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(here / "fsdp2.yaml")]
    command += ["--main_process_port", str(free_port()), str(SCRIPT), str(here / "case.json")]
    with (here / "output.txt").open("w") as output:
        child = start(command, child_environment(), output)
    wait_for([child], [here / "output.txt"], LIMIT)
    results = [json.loads((here / f"by config-{rank}.json").read_text()) for rank in range(2)]
    assert largest_difference(*results)[0] == 0.0
    difference, where = largest_difference(train(one, str(folder), 1, 0), results[0])
    assert difference <= TOLERANCE, where
    (saved,) = here.glob("outputs-by config-2/checkpoint-*/training_args.json")
    assert json.loads(saved.read_text())["fsdp"] == "full_shard"
