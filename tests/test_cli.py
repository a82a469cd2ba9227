"""The command line: options of file and command line, what it refuses, and what a run leaves behind."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors import safe_open
from transformers import AutoTokenizer

from dpo_peft import cli
from dpo_peft.errors import OptionError


@pytest.fixture
def run_folder(tmp_path: Path, tiny_llama: Any, make_tokenizer: Any) -> Path:
    """A model, twelve training and four evaluation rows, and a config file for them."""
    tiny_llama().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"say {i}", "chosen": f" the {i} and more", "rejected": f" a {i}"} for i in range(16)]
    for name, part in (("train", rows[:12]), ("test", rows[12:])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))
    options = {
        "model_name_or_path": str(tmp_path / "model"),
        "dataset_name": str(tmp_path / "train.jsonl"),
        "eval_dataset_name": str(tmp_path / "test.jsonl"),
        "output_dir": str(tmp_path / "out"),
        "dtype": "float32",
        "bf16": False,
        "use_cpu": True,
        "beta": 0.3,
        "learning_rate": "1e-3",
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "logging_steps": 1,
        "eval_strategy": "epoch",
        "save_steps": 2,
        "lora_r": 4,
        "report_to": "none",
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(options))
    return tmp_path


def train(folder: Path, *options: str) -> Any:
    return cli.train(["--config", str(folder / "run.yaml"), *options])


def test_the_command_line_overrides_the_file(run_folder: Path) -> None:
    data, args, model = cli.parse(["--config", str(run_folder / "run.yaml"), "--beta", "0.2", "--lora_r", "8"])
    assert (args.beta, model.lora_r) == (0.2, 8)
    assert (args.learning_rate, args.num_train_epochs, model.dtype) == (1e-3, 2, "float32")
    assert data.dataset_name.endswith("train.jsonl")
    assert cli.parse([f"--config={run_folder / 'run.yaml'}"])[1].beta == 0.3


def test_a_run_leaves_adapter_card_metrics_and_curves(run_folder: Path) -> None:
    trainer = train(run_folder)
    out = run_folder / "out"
    with safe_open(out / "adapter_model.safetensors", "pt") as saved:
        shapes = {saved.get_slice(name).get_shape()[0] for name in saved.keys() if "lora_A" in name}
        assert shapes == {4}
    assert AutoTokenizer.from_pretrained(out)("the").input_ids == trainer.processing_class("the").input_ids
    metrics = json.loads((out / "metrics.json").read_text())
    assert [entry["step"] for entry in metrics["log_history"] if "loss" in entry] == list(range(1, 7))
    assert metrics["first"]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert metrics["data"]["train"]["kept_rows"] == 12 and metrics["data"]["eval"]["kept_rows"] == 4
    assert metrics["storage_bytes"]["quantized"] > 0
    card = (out / "README.md").read_text()
    assert f"{metrics['eval_last']['rewards/margins']:.4g}" in card and "nf4" in card
    assert (out / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_resume_gives_the_figures_of_the_straight_run(run_folder: Path) -> None:
    straight = train(run_folder)
    weights = {n: p.detach().clone() for n, p in straight.model.named_parameters() if p.requires_grad}
    resumed = train(run_folder, "--resume_from_checkpoint", str(run_folder / "out" / "checkpoint-4"))
    assert resumed.state.global_step == 6
    for name, parameter in resumed.model.named_parameters():
        if parameter.requires_grad:
            assert (parameter == weights[name]).all(), name
    steps = {entry["step"]: entry["loss"] for entry in straight.state.log_history if "loss" in entry}
    again = {entry["step"]: entry["loss"] for entry in resumed.state.log_history if "loss" in entry}
    assert again == steps


@pytest.mark.parametrize(
    ("options", "named", "remedy"),
    [
        (["--betta", "0.2"], "'betta'", "'beta'"),
        (["--lora_rank", "8"], "'lora_rank'", "lora_"),
        (["--pad_token", "x"], "pad_token", "tokenizer.pad_token"),
        (["stray"], "'stray'", "--option value"),
        (["--dataset_name", "nowhere.jsonl"], "nowhere.jsonl", "no such file"),
        (["--dataset_name", "nobody/nothing-here"], "nobody/nothing-here", "can't be read"),
        (["--eval_strategy", "no"], "eval_dataset_name", "eval_strategy"),
        (["--lora_dropout", "0.1"], "lora_dropout", "disable_dropout"),
        (["--model_name_or_path", "no/such/model/here"], "no/such/model/here", "model"),
        (["--model_name_or_path", ""], "model_name_or_path", "--model_name_or_path"),
        (["--beta", "0"], "beta", "above 0"),
        (["--dataset_streaming", "True"], "streaming", "max_steps"),
    ],
)
def test_what_it_refuses(
    run_folder: Path, capsys: pytest.CaptureFixture, options: list[str], named: str, remedy: str
) -> None:
    assert cli.main(["train", "--config", str(run_folder / "run.yaml"), *options]) == 2
    error = capsys.readouterr().err
    assert named in error and remedy in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file"), ("beta: [0.1", "not valid YAML"), ("- 1\n- 2\n", "must hold"), ("betta: 1\n", "'beta'")],
)
def test_bad_config_files(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "bad.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(OptionError, match=message):
        cli.parse(["--config", str(path), "--model_name_or_path", "m", "--dataset_name", "d"])


def test_a_file_without_a_test_split_cannot_be_evaluated_on(run_folder: Path) -> None:
    options = yaml.safe_load((run_folder / "run.yaml").read_text())
    del options["eval_dataset_name"]
    (run_folder / "run.yaml").write_text(yaml.safe_dump(options))
    with pytest.raises(OptionError, match="eval_dataset_name"):
        train(run_folder)


def test_unknown_command_and_help(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["tarin"]) == 2
    assert "'tarin' is not a command" in capsys.readouterr().err
    assert cli.main([]) == 0
    assert "dpo-peft train" in capsys.readouterr().out
