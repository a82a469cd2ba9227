"""A sweep: what reaches the end is the run that the setting gives alone, and the shared work is done once."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from trainer_helpers import text_pairs

from dpo_peft.cli.sweep import as_text, read_grid, sweep
from dpo_peft.cli.train import train
from dpo_peft.data.worker import RowWorker
from dpo_peft.errors import OptionError
from dpo_peft.model import base
from dpo_peft.reference.policy import ReferencePolicy
from dpo_peft.sweep import _concluded, rank, run_sweep
from dpo_peft.trainer import DPOTrainer

GRID = {"beta": [0.1, 0.4], "learning_rate": [1e-4, 3e-3]}


@pytest.fixture
def grid(base_folder, tmp_path) -> Path:
    """A sweep of four settings of six steps, in a file."""
    for name, rows in {"train": text_pairs(12), "test": text_pairs(9, seed=5)}.items():
        rows.to_json(tmp_path / f"{name}.jsonl")
    options = {
        "model_name_or_path": base_folder,
        "dataset_name": str(tmp_path / "train.jsonl"),
        "eval_dataset_name": str(tmp_path / "test.jsonl"),
        "ref_cache_dir": str(tmp_path / "cache"),
        "as_chat": False,
        "per_device_train_batch_size": 2,
        "max_steps": 6,
        "dtype": "float32",
        "bf16": False,
        "use_cpu": True,
        "lora_r": 2,
        "lora_dropout": 0.1,  # the state of the random numbers counts
        "report_to": "none",
        "output_dir": str(tmp_path / "sweep"),
    }
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump({**options, "disable_dropout": False, "grid": GRID}))
    return tmp_path / "grid.yaml"


def counted(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[int]:
    calls, own = [], getattr(owner, name)

    def count(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return own(*args, **kwargs)

    monkeypatch.setattr(owner, name, count)
    return calls


def test_the_choice_is_what_its_setting_gives_alone(grid, tmp_path, monkeypatch, capsys):
    loads = counted(monkeypatch, base.Checkpoint, "load")
    tokenized = counted(monkeypatch, RowWorker, "record_batch")
    referred = counted(monkeypatch, ReferencePolicy, "fill")
    interrupted: list[int] = []
    trained = DPOTrainer.train

    def stop_once(self: Any, *args: Any, **kwargs: Any) -> Any:
        interrupted.append(1)
        if len(interrupted) == 3:
            raise KeyboardInterrupt
        return trained(self, *args, **kwargs)

    monkeypatch.setattr(DPOTrainer, "train", stop_once)
    words = [str(grid), "--rungs", "0.5", "1", "--keep", "0.5", "--json"]
    with pytest.raises(KeyboardInterrupt):
        sweep(words)
    assert len(loads) == 1 and len(tokenized) == 2 and len(referred) == 2  # of the training and the test rows
    sweep(words)
    found = json.loads(capsys.readouterr().out)
    assert len(loads) == 2 and len(tokenized) == 2 and len(referred) == 2 and len(interrupted) == 3 + 2 + 2
    steps = [entry[-1]["steps"] for entry in found["results"].values()]
    assert sorted(steps) == [3, 3, 6, 6] and found["steps"] == {"trained": 18, "full": 24}
    assert (tmp_path / "sweep" / "comparison.html").is_file()

    monkeypatch.undo()
    options = yaml.safe_load(grid.read_text()) | found["settings"][found["choice"]]
    options |= {"output_dir": str(tmp_path / "alone"), "eval_strategy": "steps", "eval_steps": 0.5}
    options |= {"precompute_ref_log_probs": True, "ref_cache_tokens": True}  # as the sweep does
    del options["grid"]
    (tmp_path / "alone.yaml").write_text(yaml.safe_dump(options))
    train(["--config", str(tmp_path / "alone.yaml")])
    other = next(name for name, entries in found["results"].items() if len(entries) == 2 and name != found["choice"])
    alone, chosen, its = (
        load_file(folder / "adapter_model.safetensors")
        for folder in (tmp_path / "alone", tmp_path / "sweep" / found["choice"], tmp_path / "sweep" / other)
    )
    assert all(torch.equal(alone[name], chosen[name]) for name in alone) and alone.keys() == chosen.keys()
    assert not all(torch.equal(alone[name], its[name]) for name in alone)
    metrics = json.loads((tmp_path / "alone" / "metrics.json").read_text())
    assert metrics["eval_last"]["rewards/accuracies"] == found["results"][found["choice"]][-1]["accuracy"]


def result(accuracy: float, kl: float | None = 1.0, noise: bool = False, nats: float = 1.0, **more: float) -> dict:
    told = {"accuracy": accuracy, "balanced": None, "kl": kl, "margin": nats, "nats": nats, "noise": noise}
    return {"steps": 1, "of": 2, "rows": 100, **told, **more}


def test_settings_are_ranked_by_balanced_accuracy_and_noise_comes_last():
    results = {
        "noisy": result(0.99, noise=True),
        "follows length": result(0.9, balanced=0.5, nats=9.0),
        "best": result(0.8, balanced=0.8, nats=2.0),
        "equal": result(0.7, balanced=0.77, nats=3.0),  # a standard error is sqrt(0.8 * 0.2 / 100) = 0.04
        "worse": result(0.7, balanced=0.75, nats=5.0),
        "too far": result(0.9, balanced=0.95, kl=6.0),
    }
    assert rank(results, max_kl=5.0) == ["equal", "best", "worse", "follows length", "noisy"]
    assert rank(results, max_kl=None)[0] == "too far"
    assert rank({"noisy": results["noisy"]}, None) == ["noisy"] and rank({}, None) == []


def test_none_beyond_the_limit_is_chosen():
    found = {"settings": {"far": {}, "near": {}}, "max_kl": 5.0, "rungs": [1.0]}
    found["results"] = {"far": [result(0.9, kl=9.0)], "near": [result(0.8)]}
    assert _concluded(found, ["near"])["choice"] == "near" and _concluded(found, ["near"])["order"] == ["near", "far"]
    nothing = _concluded(found, [])
    assert nothing["choice"] is None and "max_kl=5" in nothing["reason"]
    assert "far " in as_text({**found, **nothing, "failed": {}})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"grid": {"beta": 0.1}}, "a list of its values"),
        ({"grid": {"beta": [0.1]}}, "fewer than two settings"),
        ({"grid": {"beta": [0.1, 0.1]}}, "a setting twice"),
        ({"grid": {"disable_dropout": [True, False]}}, "can't differ"),
        ({"settings": [{"beta": 0.1}, {"beta": 0.2}]}, "grid and in settings"),
        ({"grid": {"beta": [0.1, -1]}}, r"Setting beta--1: beta"),
        ({"grid": {"bta": [0.1, 1]}}, r"Setting bta-0.1: .*beta"),
        ({"eval_strategy": "no", "eval_dataset_name": None}, "judges runs on held-out rows"),
    ],
)
def test_a_file_that_is_wrong_is_refused_before_anything_is_trained(grid, changed, message):
    options = yaml.safe_load(grid.read_text()) | changed
    grid.write_text(yaml.safe_dump({name: value for name, value in options.items() if value is not None}))
    with pytest.raises(OptionError, match=message):
        sweep([str(grid)])
    assert not (grid.parent / "sweep").exists()


@pytest.mark.parametrize("words", [["--rungs", "0.5"], ["--rungs", "1", "0.5"], ["--keep", "0"], ["--max_kl", "-1"]])
def test_a_schedule_that_is_wrong_is_refused_before_any_setting_is_checked(grid, words):
    with pytest.raises(OptionError, match=f"^{words[0][2:]}="):
        sweep([str(grid), *words, "--dry_run"])


def test_settings_are_crossed_with_the_grid(tmp_path):
    settings = [{"loss_type": "ipo"}, {"loss_type": ["sigmoid", "sft"], "beta": 0.2}]
    (tmp_path / "grid.yaml").write_text(json.dumps({"grid": {"lora_r": [4, 8]}, "settings": settings}))
    names = ["loss_type-ipo_lora_r-4", "loss_type-ipo_lora_r-8"]
    names += ["loss_type-sigmoid+sft_beta-0.2_lora_r-4", "loss_type-sigmoid+sft_beta-0.2_lora_r-8"]
    assert [*read_grid(str(tmp_path / "grid.yaml"))[1]] == names


def test_another_sweep_in_the_folder_is_not_overwritten(tmp_path):
    (tmp_path / "sweep.json").write_text(
        json.dumps({"settings": {"a": {}, "b": {}}, "rungs": [1], "keep": 0.34, "max_kl": None})
    )
    with pytest.raises(OptionError, match=r"holds another sweep \(keep differ\)"):
        run_sweep(lambda name: None, {"a": {}, "b": {}}, tmp_path, rungs=[1], keep=0.5)  # type: ignore[arg-type, return-value]
