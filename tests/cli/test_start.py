"""The first commands: `init`, `recipes`, `train --dry_run`, `plan` of a dataset; errors that blame the right thing."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from datasets import Dataset
from paths import REPO
from transformers import AutoTokenizer

from dpo_peft import DPOConfig, OptionError, cli
from dpo_peft.cli.init import _less
from dpo_peft.cli.measure import measure
from dpo_peft.cli.options import recipe_files
from dpo_peft.data import prepare_dataset
from dpo_peft.planning.gpus import parse_gpu
from dpo_peft.planning.run import DEFAULTS
from dpo_peft.quickstart import model_path

MODEL_DIR = model_path()
PAIRS = [{"prompt": f"say {i}", "chosen": f" the {i} and more", "rejected": f" a {i}"} for i in range(24)]
SINGLES = [{"prompt": f"say {i}", "completion": f" the {i}", "label": i % 3 > 0} for i in range(24)]
LISTS = [{"prompt": f"say {i}", "chosen": f" the {i}", "rejected": [f" a {i}", f" no {i}"]} for i in range(24)]


def written(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def run(capsys: pytest.CaptureFixture, *words: Any, code: int = 0) -> tuple[str, str]:
    capsys.readouterr()
    found = cli.main([*map(str, words)])
    out, err = capsys.readouterr()
    assert found == code, err
    assert "Traceback" not in err
    return out, err


@pytest.mark.parametrize(("rows", "loss"), [(PAIRS, "sigmoid"), (SINGLES, "kto"), (LISTS, "multi_negative")])
def test_a_file_that_init_writes_trains_as_it_is(
    rows: list[dict[str, Any]], loss: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    data = written(tmp_path / "rows.jsonl", rows)
    out, _ = run(capsys, "init", "--model_name_or_path", MODEL_DIR, "--dataset_name", data, "--gpu", "24GB")
    options = yaml.safe_load(out)
    assert options["loss_type"] == loss and options["max_tokens_per_microbatch"] == "auto"
    assert options["max_length"] == 256 and options["learning_rate"] == 1e-4  # of a small model; rows are short
    # To choose, each with what it saves: 1.5 with the upper half; three passes over all, or over completions alone.
    assert "# lora_layers_to_transform: 0.5 " in out and "lora_layers_to_transform" not in options
    Path("run.yaml").write_text(out)
    checked, _ = run(capsys, "train", "--config", "run.yaml", "--dry_run", "--json")
    assert json.loads(checked)["rows"]["train"]["kept"] == 21 and not Path("outputs").exists()
    if loss == "sigmoid":  # that the loss fits the rows is checked by the dry run
        run(capsys, "train", "--config", "run.yaml", "--sample_prompts", 0, "--max_steps", 1)
        assert Path("outputs/run/adapter_model.safetensors").is_file()


def test_init_proposes_adapters_that_act_on_less_by_what_they_save() -> None:
    """Three passes over prompts of 300 and answers of 2 x 50, against one over prompts and three over answers: 2 times
    less; no more than 1.2 times where prompts are short; nothing where no reference shares a pass."""
    lengths = {"prompt_tokens": 300, "answers": 2, "answer_tokens": 50}
    both = _less(lengths, "sigmoid")
    assert [(one.name, one.value, one.off) for one in both] == [
        ("lora_layers_to_transform", 0.5, True),
        ("adapter_scope", "completions", True),
    ]
    assert both[1].why.startswith("2.0 times less work")
    assert len(_less({**lengths, "answer_tokens": 500}, "sigmoid")) == 1
    assert not _less(lengths, "simpo") and not _less({}, "sigmoid")


def test_init_does_not_replace_a_file_and_says_what_it_can_not_know(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    data, model = written(tmp_path / "rows.jsonl", PAIRS), tmp_path / "config-alone"
    model.mkdir()
    (model / "config.json").write_bytes((Path(MODEL_DIR) / "config.json").read_bytes())
    words = ["init", "--model_name_or_path", model, "--dataset_name", data, "--output", tmp_path / "run.yaml"]
    out, _ = run(capsys, *words)
    assert "not known: lengths of the rows" in out
    assert yaml.safe_load((tmp_path / "run.yaml").read_text())["loss_type"] == "sigmoid"
    assert "is there already" in run(capsys, *words, code=2)[1]
    out, _ = run(capsys, "init", "--model_name_or_path", "nobody/none", "--dataset_name", "nobody/rows")
    assert out.count("# Not known: ") == 4  # rows, lengths, GPU, memory
    missing = run(capsys, "init", "--model_name_or_path", MODEL_DIR, "--dataset_name", tmp_path / "no.jsonl", code=2)
    assert "no such file" in missing[1]


def test_a_dry_run_counts_what_the_run_would_do_and_finds_what_stops_it(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    data = written(tmp_path / "rows.jsonl", [*PAIRS, {"prompt": "p", "chosen": " same", "rejected": " same"}])
    base = ["train", "--dry_run", "--model_name_or_path", MODEL_DIR, "--dataset_name", data]
    base += ["--output_dir", tmp_path / "out", "--num_train_epochs", 2, "--per_device_train_batch_size", 5]
    out, _ = run(capsys, *base, "--warmup_steps", 0.2, "--lora_r", 4, "--json")
    told = json.loads(out)
    assert told["rows"]["train"]["dropped"] == {"identical_completions": 1}
    # 24 rows by 5 are 5 steps an epoch, twice; a fifth of 10 is 2.
    assert told["steps"] == {"rows": 5, "total": 10, "warmup": 2}
    config = json.loads((Path(MODEL_DIR) / "config.json").read_text())
    hidden, mlp, layers = (config[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    q, kv = head * config["num_attention_heads"], head * config["num_key_value_heads"]
    sizes = [(hidden, q), (hidden, kv), (hidden, kv), (q, hidden), (hidden, mlp), (hidden, mlp), (mlp, hidden)]
    assert told["model"]["trained"] == layers * sum(4 * (k + n) for k, n in sizes)
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("")
    for wrong, named in {
        ("--lora_target_modules", "q_prj"): "q_prj",
        ("--output_dir", tmp_path / "file" / "out"): "output_dir",
        ("--loss_type", "kto", "--per_device_eval_batch_size", 1): "per_device_eval_batch_size",
        ("--eval_strategy", "steps"): "eval_strategy",
        ("--push_to_hub",): "push_to_hub",
        ("--resume_from_checkpoint", "true"): "nothing to go on with",
    }.items():
        assert named in run(capsys, *base, *wrong, code=2)[1]


def test_plan_reads_the_lengths_of_the_dataset(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data = written(tmp_path / "rows.jsonl", PAIRS)
    base = ["plan", "--json", "--model_name_or_path", MODEL_DIR]
    alone = json.loads(run(capsys, *base)[0])
    assert "lengths" not in alone and alone["micro_batch"]["tokens"] == 8 * 800
    read = json.loads(run(capsys, *base, "--dataset_name", data)[0])
    assert "24 rows" in read["lengths"] and read["micro_batch"]["tokens"] < 8 * 60
    given = json.loads(run(capsys, *base, "--dataset_name", data, "--prompt_tokens", 100)[0])
    assert given["micro_batch"]["tokens"] == 8 * 700
    out, _ = run(capsys, "plan", "--shape", "1b", "--dataset_name", data)
    assert "The dataset was not read" in out and "200 and 2 x 300 tokens are assumed" in out


def test_a_number_alone_is_no_size_of_a_gpu() -> None:
    assert parse_gpu("4090") == parse_gpu("RTX4090") != parse_gpu("24GB")
    with pytest.raises(OptionError, match="24GB"):
        parse_gpu("24")


def test_recipes_are_listed_copied_and_trained_by_name(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out, _ = run(capsys, "recipes")
    for name in ("dpo_qlora_8b", "kto_8b", "ddp"):
        assert f"\n{name}\n" in f"\n{out}"
    assert "gpu: one of 24 GB; peak: at most 22.77 GiB; time: not measured" in out and "quickstart" not in out
    path = tmp_path / "mine.yaml"
    run(capsys, "recipes", "dpo_qlora_8b", "--output", path)
    assert path.read_bytes() == recipe_files()["dpo_qlora_8b"].read_bytes()
    assert "is there already" in run(capsys, "recipes", "dpo_qlora_8b", "--output", path, code=2)[1]
    assert "Did you mean 'dpo_qlora_8b'" in run(capsys, "recipes", "dpo_qlora_8", code=2)[1]
    by_name = json.loads(run(capsys, "plan", "--config", "dpo_qlora_8b", "--shape", "8b", "--json")[0])
    assert by_name == json.loads(run(capsys, "plan", "--config", path, "--shape", "8b", "--json")[0])
    assert "--config kto_8b" in run(capsys, "train", "--config", "elsewhere/kto_8b.yaml", code=2)[1]


def test_every_recipe_goes_into_the_wheel() -> None:
    text = (REPO / "pyproject.toml").read_text("utf-8").split("force-include]")[1].split("\n[")[0]
    placed = dict(line.replace('"', "").split(" = ") for line in text.splitlines() if line.startswith('"'))
    for path in recipe_files().values():
        source = path.relative_to(REPO) if path.parent.name == "recipes" else path.parent.relative_to(REPO)
        assert placed[str(source)] == f"dpo_peft/{source}"


@pytest.mark.slow
def test_recipes_are_in_a_wheel(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    build = "import sys; from hatchling.builders.wheel import WheelBuilder as W; "
    build += "print(next(W(sys.argv[1]).build(directory=sys.argv[2], versions=['standard'])))"
    subprocess.run([sys.executable, "-c", build, REPO, tmp_path], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(tmp_path / "site")
    words = [sys.executable, "-m", "dpo_peft.cli", "recipes", "--json"]
    done = subprocess.run(words, cwd=tmp_path / "site", capture_output=True, text=True, check=True)
    assert {*json.loads(done.stdout)} == {*recipe_files()}
    assert (tmp_path / "site" / "dpo_peft" / "cli" / "help.json").is_file()


@pytest.mark.parametrize(
    ("option", "meant"),
    [
        ("epochs", "num_train_epochs"),
        ("lr", "learning_rate"),
        ("batch_size", "per_device_train_batch_size"),
        ("lora_rank", "lora_r"),
        ("cutoff_len", "max_length"),
        ("sequence_len", "max_length"),
        ("val_size", "test_split_size|eval_share"),
        ("outptu_dir", "output_dir"),
    ],
)
def test_names_of_other_tools_are_understood(option: str, meant: str, capsys: pytest.CaptureFixture) -> None:
    err = run(capsys, "train", f"--{option}", "3", code=2)[1]
    assert any(f"Did you mean '{one}'?" in err for one in meant.split("|"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"loss_type": "sigmod"}, "Did you mean 'sigmoid'"),
        ({"loss_type": "dpo"}, "Did you mean 'sigmoid'"),
        ({"lr_scheduler_type": "cosin"}, "lr_scheduler_type='cosin'.*Did you mean 'cosine'"),
        ({"optim": "adamw_8bits"}, "optim=.*Did you mean 'adamw_8bit'"),
        ({"per_device_train_batch_size": 2.5}, "per_device_train_batch_size=2.5 must be a whole number"),
        ({"num_train_epochs": 0}, "num_train_epochs=0"),
        ({"max_steps": -5}, "max_steps=-5 trains nothing"),
        ({"fp16": "no"}, "fp16='no' must be True or False"),
        ({"seed": 1.5}, "seed=1.5 must be a whole number"),
        ({"save_steps": 0}, "save_steps=0"),
        ({"eval_strategy": "steps", "eval_steps": 0}, "eval_steps=0"),
        ({"lora_rank": 8}, "'lora_rank' is not an option. `dpo-peft train --help-all`"),  # not local_rank
    ],
)
def test_values_that_would_fail_late_or_puzzle(given: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        DPOConfig(output_dir="out", report_to="none", **given)


def test_without_a_gpu_it_is_the_cpu(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    from dpo_peft import config

    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    config._warn_of_cpu.cache_clear()
    assert DPOConfig(output_dir="out").use_cpu and DPOConfig(output_dir="out").use_cpu
    assert [record.message.count("No GPU is found") for record in caplog.records] == [1]
    caplog.clear()
    config._warn_of_cpu.cache_clear()
    assert DPOConfig(output_dir="out", use_cpu=True).use_cpu and not caplog.records


def test_an_unquoted_no_and_several_trackers(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model_name_or_path: m\ndataset_name: d\neval_strategy: no\nsave_strategy: off\n")
    args = cli.import_module("dpo_peft.cli.train").parse(
        ["--config", str(path), "--report_to", "wandb", "trackio", "--output_dir", str(tmp_path)]
    )[1]
    assert (args.eval_strategy, args.save_strategy, args.report_to) == ("no", "no", ["wandb", "trackio"])
    path.write_text("model_name_or_path: m\ndataset_name: d\nreport_to: [tensorboard, wandb]\n")
    assert cli.import_module("dpo_peft.cli.train").parse(["--config", str(path)])[1].report_to == [
        "tensorboard",
        "wandb",
    ]


def test_a_mistyped_command_is_guessed(capsys: pytest.CaptureFixture) -> None:
    assert "Did you mean 'train'?" in run(capsys, "trian", code=2)[1]
    assert "model_name_or_path is missing" in run(capsys, "train", "--dataset_name", "rows.jsonl", code=2)[1]


def test_lengths_of_texts_are_those_that_are_trained() -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    rows = Dataset.from_list([{"prompt": "Hello there.", "chosen": "Good day to you.", "rejected": "No."}] * 3)
    o = SimpleNamespace(**DEFAULTS)
    in_template, as_text = (prepare_dataset(rows, tokenizer, as_chat=one)[1].longest for one in (None, False))
    assert measure(rows, tokenizer, o).longest == in_template > as_text
