"""Files that an earlier version wrote are read as they were: adapters, a checkpoint, a cache, unfinished work.

`tests/fixtures/written_by_0_1_0/README.md` says how they were made. Figures agree to what another CPU may round
differently; `benchmarks/trajectories.py` compares bit for bit.
"""

import importlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

import dpo_peft
from dpo_peft import DPOConfig, DPOTrainer, ImplicitReward

WRITTEN = Path(__file__).parent / "fixtures" / "written_by_0_1_0"
BUNDLED_MODEL = Path(dpo_peft.__file__).parent / "quickstart" / "model"
EXPECTED = json.loads((WRITTEN / "expected.json").read_text("utf-8"))
WITH_TOKENIZER = ("adapter", "continued", "interrupted/checkpoint-2")

Command = Callable[..., Any]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that everything was written in, as it was, as the working folder: paths in the files are relative."""
    shutil.copytree(WRITTEN, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(BUNDLED_MODEL, tmp_path / "base")
    for name in WITH_TOKENIZER:
        shutil.copyfile(BUNDLED_MODEL / "tokenizer.json", tmp_path / name / "tokenizer.json")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """`command(*words)`: run `dpo-peft` in this process with `--json`, and give the object that it prints."""
    project = (Path(__file__).parent.parent / "pyproject.toml").read_text("utf-8")
    found = re.search(r'^dpo-peft = "([\w.]+):(\w+)"', project, flags=re.MULTILINE)
    assert found is not None
    main = getattr(importlib.import_module(found[1]), found[2])

    def run(*words: str) -> Any:
        capsys.readouterr()
        assert main([*words, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


def numbers(values: Any) -> Any:
    """Figures that were written as `float.hex`, as floats; everything else as it is."""
    if isinstance(values, dict):
        return {name: numbers(value) for name, value in values.items()}
    return float.fromhex(values) if isinstance(values, str) and "0x" in values else values


def near(values: Any) -> Any:
    """Equal to within what another CPU rounds differently."""
    return pytest.approx(values, rel=1e-4, abs=1e-5)


def assert_near(found: Any, expected: Any) -> None:
    """Compare nested JSON values: numbers nearly, everything else exactly."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name in expected:
            assert_near(found[name], expected[name])
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_near(one, other)
    else:
        assert found == (near(expected) if isinstance(expected, float) else expected)


def lines_of(file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(file).read_text("utf-8").splitlines()]


def trainer_of(arguments: str, rows: int, **changed: Any) -> DPOTrainer:
    """The trainer that a file of arguments describes, on the first rows."""
    given = json.loads(Path(arguments).read_text("utf-8"))
    return DPOTrainer(
        "base",
        args=DPOConfig(**{**given["options"], **changed}),
        train_dataset=Dataset.from_list(lines_of("rows.jsonl")[:rows]),
        peft_config=LoraConfig(**given["lora"]),
    )


def losses(log_history: list[dict[str, Any]]) -> dict[str, float]:
    return {str(entry["step"]): entry["loss"] for entry in log_history if "loss" in entry}


@pytest.mark.parametrize("name", ["adapter", "continued"])
def test_adapter_scores_as_it_did(folder: Path, name: str) -> None:
    """With its record, its base in NF4, and the frozen adapter that the second one was trained against."""
    reward = ImplicitReward(name)
    scores = reward.scores(EXPECTED["asked"]["prompts"], EXPECTED["asked"]["completions"])
    assert_near([score._asdict() for score in scores], [numbers(score) for score in EXPECTED[name]["scores"]])
    assert ("adapter switched off" in str(reward)) == (name == "adapter")


@pytest.mark.parametrize("name", [pytest.param("adapter", marks=pytest.mark.slow), "continued"])
def test_recipe_repeats_the_run(folder: Path, command: Command, name: str) -> None:
    """recipe.yaml is a config file whose run logs and answers what the old one did."""
    result = command("train", "--config", f"{name}/recipe.yaml", "--output_dir", "again", "--disable_tqdm", "true")
    assert result["steps"] == 3
    again, before = (json.loads(Path(run, "metrics.json").read_text("utf-8")) for run in ("again", name))
    assert losses(again["log_history"]) == near(numbers(EXPECTED[name]["loss"]))
    assert again["eval_last"]["loss"] == near(numbers(EXPECTED[name]["eval_loss"]))
    assert again.keys() >= before.keys()  # newer versions say more
    assert again["adapter"] == before["adapter"]
    for dataset, counts in before["data"].items():  # newer versions count more
        assert {name: again["data"][dataset][name] for name in counts} == counts
    assert_near(lines_of("again/eval_examples.jsonl"), lines_of(f"{name}/eval_examples.jsonl"))
    samples = lines_of(f"{name}/samples.jsonl")
    for sample in samples:  # the prompt was shown with the template's words for roles
        sample["prompt"] = sample["prompt"].removeprefix("user\n").removesuffix("\nassistant\n")
    assert_near(lines_of("again/samples.jsonl"), samples)


def test_interrupted_run_goes_on(folder: Path) -> None:
    """Adapter, optimizer, schedule, random numbers of dropout, place in the data and logs are all restored."""
    trainer = trainer_of("resume.json", rows=16)
    trainer.train(resume_from_checkpoint="latest")
    expected = numbers(EXPECTED["resumed"])
    assert losses(trainer.state.log_history) == near(expected["loss"])
    assert trainer.state.log_history[-1]["train_loss"] == near(expected["train_loss"])


def test_options_of_a_checkpoint_are_read(folder: Path) -> None:
    options = torch.load("interrupted/checkpoint-2/training_args.bin", weights_only=False)
    assert isinstance(options, DPOConfig) and options.beta == 0.5


def test_cache_is_read(folder: Path) -> None:
    """Nothing of the reference is computed again."""
    trainer = trainer_of("cache.json", rows=8)
    trainer.train()
    expected = numbers(EXPECTED["cached"])
    last = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    assert (last["ref_cache/hits"], last["ref_cache/misses"]) == (expected["hits"], expected["misses"]) == (16, 0)
    assert losses(trainer.state.log_history) == near(expected["loss"])
    assert last["kl"] == near(expected["kl"])


def test_unfinished_pairs_are_finished(folder: Path, command: Command) -> None:
    result = command(*(word for word in EXPECTED["pairs"]["command"] if word != "--json"))
    expected = {name: value for name, value in EXPECTED["pairs"].items() if name != "command"}
    assert expected["resumed_prompts"] == 6
    assert_near({name: value for name, value in result.items() if name != "seconds"}, expected)
    assert lines_of("pairs.jsonl") == lines_of("pairs_finished.jsonl")


def test_scores_are_written_as_they_were(folder: Path, command: Command) -> None:
    words = "score adapter --dataset_name rows.jsonl --output again.jsonl --worst 1"
    found = {**command(*words.split()), "output": "scores.jsonl"}
    assert_near({name: found[name] for name in EXPECTED["score"]}, EXPECTED["score"])  # newer versions say more
    assert_near(lines_of("again.jsonl"), lines_of("scores.jsonl"))


def test_report_shows_both_runs(folder: Path, command: Command) -> None:
    """It reads metrics.json, recipe, samples and examples of either."""
    command("report", "adapter", "continued", "--output", "report.html")
    page = Path("report.html").read_text("utf-8")
    assert "continued" in page and lines_of("adapter/samples.jsonl")[0]["completion"][:20] in page
