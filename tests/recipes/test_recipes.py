"""Every recipe runs for two steps on stand-ins for its model and data, and its header says what it takes.

Only what belongs to the machine is overridden: model, data, folders, CPU, number of steps. The folder is listed, so a
recipe that nobody runs fails `test_every_recipe_is_run`.
"""

import importlib.util
import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import vision_models
import vision_processors
import yaml
from paths import REPO
from safetensors.torch import load_file
from transformers import Qwen3Config

from dpo_peft import quickstart
from dpo_peft.cli import main
from dpo_peft.cli import quickstart as cli_quickstart
from dpo_peft.cli import train as cli
from dpo_peft.model.adapter_source import load_trained

RECIPES = REPO / "recipes"

# Recipes of `dpo-peft train`: the rows that stand in for their dataset, and the loss that they start with (none where
# there is no reference; DPO: log 2; a list of n answers: log n).
CONFIGS: dict[str, tuple[str, float | None]] = {
    "dpo_qlora_8b.yaml": ("pairs", math.log(2)),
    "dpo_qlora_70b.yaml": ("pairs", math.log(2)),
    "dpo_qlora_70b_24gb.yaml": ("pairs", math.log(2)),
    "dpo_answers_8b.yaml": ("pairs", math.log(2)),
    "dpo_from_sft_8b.yaml": ("pairs", math.log(2)),
    "kto_8b.yaml": ("singles", 0.5),
    "simpo_8b.yaml": ("pairs", None),
    "orpo_8b.yaml": ("pairs", None),
    "lists_8b.yaml": ("trees", math.log(3)),
    "images_7b.yaml": ("images", math.log(2)),
    "images_smolvlm.yaml": ("images", math.log(2)),
}
# Run below.
SCRIPTS = {
    "dpo_qlora.py": "test_the_trl_script",
    "build_quickstart_model.py": "test_rebuilding_the_quickstart",
    "quickstart.py": "test_judged_runs",
    "quickstart.yaml": "test_judged_runs",
    "objectives.py": "test_judged_runs",
    "whole_life.sh": "test_the_whole_life",
    "dpo_then_grpo.py": "test_dpo_then_grpo",
    "smollm2_tulu.py": "test_human_judgments",
    "accelerate/ddp.yaml": "test_both_configs_of_accelerate_start_the_same_run",
    "accelerate/fsdp2.yaml": "test_both_configs_of_accelerate_start_the_same_run",
}
# Run by other tests.
ELSEWHERE = {
    "on_policy.py": "recipes/test_on_policy.py",
    "accelerate/ddp_cpu.yaml": "training/test_processes.py",
    **{f"objectives/{path.name}": "quickstart/test_forms.py" for path in RECIPES.glob("objectives/*.yaml")},
}
# Options that a script or launcher reads; what they take stands in the script's header.
PARTS = ("quickstart.yaml", "objectives/", "accelerate/")


def files() -> list[str]:
    found = [path for path in RECIPES.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    # Those of build_quickstart_model.py, and those that test_notebooks.py runs.
    found = [path for path in found if path.parent.name not in ("quickstart_grammar", "notebooks")]
    return sorted(str(path.relative_to(RECIPES)) for path in found if path.name != "README.md")


def header(name: str) -> str:
    """The docstring or the comment that a recipe begins with, in one line."""
    text = (RECIPES / name).read_text("utf-8")
    if name.endswith(".py"):
        lines = text.split('"""')[1].splitlines()
    else:
        lines = re.match(r"(?:#.*\n)*", text)[0].replace("#!/usr/bin/env bash", "").splitlines()
    return " ".join(line.lstrip("#").strip() for line in lines)


def words(options: dict[str, Any]) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"recipe_{Path(name).stem}", RECIPES / name)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_script(module: ModuleType, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [module.__file__, *arguments])
    module.main()


# ---- The folder -----------------------------------------------------------------------------------------------------


def test_every_recipe_is_run() -> None:
    known = {**CONFIGS, **SCRIPTS, **ELSEWHERE}
    assert sorted(known) == files(), "a recipe that no test runs, or a test of a recipe that is gone"
    for name, test in SCRIPTS.items():
        assert test in globals(), f"{name}: {test} is not a test of this file"
    for name, file in ELSEWHERE.items():
        folder = name.split("/")[0]
        assert folder in (REPO / "tests" / file).read_text("utf-8"), f"{name}: {file} does not mention {folder}"


@pytest.mark.parametrize("name", files())
def test_headers(name: str) -> None:
    found = header(name)
    if name.startswith(PARTS):
        script = {"quickstart.yaml": "quickstart.py", "objectives": "objectives.py", "accelerate": "accelerate launch"}
        assert script[name.split("/")[0]] in found
        return
    for field in ("GPU", "Peak", "Time", "Expected"):
        assert field.lower() in found.lower(), f"{name}: its header has no {field}"
    assert f"recipes/{name}" in found, f"{name}: its header has no command"
    assert not re.search(r"\b(PEAK|TIME|EXPECTED)", found), f"{name}: its header has a gap"


def test_the_list_of_recipes_is_whole() -> None:
    listed = (RECIPES / "README.md").read_text("utf-8")
    for name in files():
        assert name.split("/")[0] in listed, f"recipes/README.md does not list {name}"


@pytest.mark.parametrize("name", [name for name in files() if "predicted by" in header(name)])
def test_peaks_are_those_of_the_plan(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    peak, options = re.search(r"([\d.]+) GiB\D*predicted by `dpo-peft plan ([^`]*)`", header(name)).groups()
    config = Qwen3Config(  # Qwen3-8B
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=False,
    )
    config.save_pretrained(tmp_path / "Qwen3-8B")
    (tmp_path / "sft").mkdir()
    modules = [f"{part}_proj" for part in ("q", "k", "v", "o", "gate", "up", "down")]
    adapter = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 16, "lora_alpha": 32, "target_modules": modules}
    adapter["base_model_name_or_path"] = str(tmp_path / "Qwen3-8B")
    (tmp_path / "sft" / "adapter_config.json").write_text(json.dumps(adapter))
    (tmp_path / "sft" / "adapter_model.safetensors").touch()
    stand_in = ["--model_name_or_path", str(tmp_path / ("sft" if "from_sft" in name else "Qwen3-8B"))]
    stand_in = ["--shape", "70b"] if "70b" in name else stand_in
    arguments = [str(REPO / word) if word.startswith("recipes/") else word for word in shlex.split(options)]
    assert main(["plan", "--json", *arguments, *stand_in]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["peak"] / 2**30 == pytest.approx(float(peak), abs=0.006)
    assert plan["step"] is None or plan["step"]["fits"]
    if "--model_name_or_path" in stand_in:
        assert plan["weights"] == pytest.approx(8.19e9, rel=1e-3)  # as its publisher counts it: 8.2 billion


# ---- Stand-ins ------------------------------------------------------------------------------------------------------


def message(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def stand_in_rows(kind: str, number: int) -> list[dict[str, Any]]:
    """Chat rows of the kind that a recipe's dataset has."""
    rows: list[dict[str, Any]] = []
    for i in range(number):
        prompt, good, bad = f"say the {i}", f"the {i} and another", f"no {i * 7}"
        if kind == "pairs":
            answers = {"chosen": message("assistant", good), "rejected": message("assistant", bad)}
            rows.append({"prompt": message("user", prompt), **answers})
        elif kind == "singles":
            answer = good if i % 2 else bad
            row = {"prompt": message("user", prompt), "completion": message("assistant", answer)}
            rows.append({**row, "label": bool(i % 2)})
        else:
            texts = enumerate((good, bad, "in"))
            replies = [{"role": "assistant", "text": text, "rank": rank} for rank, text in texts]
            rows.append({"prompt": {"role": "prompter", "text": prompt, "replies": replies}})
    return rows


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`pairs`, `singles`, `trees` and `images`: folders with train.jsonl and test.jsonl."""
    folder = tmp_path_factory.mktemp("data")
    for kind in ("pairs", "singles", "trees"):
        (folder / kind).mkdir()
        for name, number in (("train", 64), ("test", 4)):
            lines = [json.dumps(row) + "\n" for row in stand_in_rows(kind, number)]
            (folder / kind / f"{name}.jsonl").write_text("".join(lines))
    (folder / "images").mkdir()
    for name, number in (("train", 64), ("test", 4)):
        rows = [{**row, "images": [f"{i % 4}.png"]} for i, row in enumerate(stand_in_rows("pairs", number))]
        (folder / "images" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for i in range(4):
        vision_processors.noise(i).save(folder / "images" / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def vision_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model of text and images with its processor; one that is found by name without torchvision."""
    folder = tmp_path_factory.mktemp("gemma3")
    vision_models.build("gemma3").save_pretrained(folder)
    vision_processors.build_processor("gemma3").save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def sft_adapter(base_folder: str, data: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An adapter that was trained on the chosen completions, well away from the base."""
    folder = tmp_path_factory.mktemp("sft")
    options = {"model_name_or_path": base_folder, "dataset_name": data / "pairs" / "train.jsonl", "output_dir": folder}
    options |= {"loss_type": "sft", "learning_rate": 1e-2, "max_steps": 3, "use_cpu": True, "lora_r": 4}
    options |= {"lora_alpha": 8, "report_to": "none", "disable_tqdm": True}
    cli.train(words(options))
    return str(folder)


# ---- Recipes of `dpo-peft train` ------------------------------------------------------------------------------------


def on_the_machine(name: str, model: str, data: Path, folder: Path) -> dict[str, Any]:
    """What the recipe's run is given that belongs to the machine."""
    recipe = yaml.safe_load((RECIPES / name).read_text("utf-8"))
    kind, _ = CONFIGS[name]
    options = {"model_name_or_path": model, "dataset_name": data / kind / "train.jsonl", "output_dir": folder}
    if "eval_strategy" in recipe:
        options["eval_dataset_name"] = data / kind / "test.jsonl"
    return {**options, "max_steps": 2, "logging_steps": 1, "use_cpu": True, "disable_tqdm": True}


@pytest.mark.sampled(6)
@pytest.mark.parametrize("name", CONFIGS)
def test_configs(
    name: str,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    request: pytest.FixtureRequest,
) -> None:
    """Two steps; options, adapter and record are the recipe's; the loss starts where it must."""
    recipe = yaml.safe_load((RECIPES / name).read_text("utf-8"))
    model = "sft_adapter" if "from_sft" in name else "vision_folder" if "images" in name else "base_folder"
    given = on_the_machine(name, request.getfixturevalue(model), data, tmp_path / "out")
    capsys.readouterr()  # what making the model printed
    trainer = cli.train(["--config", str(RECIPES / name), *words(given), "--json"])
    result = json.loads(capsys.readouterr().out)
    start = CONFIGS[name][1]
    assert result["steps"] == 2
    if start is not None:
        assert result["first"]["loss"] == pytest.approx(start, abs=1e-3)
        assert result["first"]["rewards/margins"] == pytest.approx(0, abs=1e-3)
    assert (start is None) == ("kl" not in result["first"])  # no reference, no distance from it
    of_model = {"lora_r": "r", "lora_alpha": "lora_alpha"}
    less = {"adapter_scope", "lora_layers_to_transform"}
    if less <= recipe.keys():
        adapter = trainer.model.peft_config["default"]
        assert adapter.alora_invocation_tokens and adapter.layers_to_transform == [1]  # of two layers
    for option in recipe.keys() - given.keys() - of_model.keys() - less - {"dataset_format"}:
        value = getattr(trainer.args, option)
        listed = [recipe[option]] if option == "loss_type" else recipe[option]
        assert value == listed or option == "report_to" and value in ([], ["none"]), option
    saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert all(saved[key] == recipe.get(option, saved[key]) for option, key in of_model.items())
    record = saved["auto_mapping"]["dpo_peft_training"]
    assert record["loss_type"] == [recipe.get("loss_type", "sigmoid")] and record["beta"] == recipe["beta"]
    assert record["quantization"]["bnb_4bit_quant_type"] == "nf4"
    weights = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(w.dtype == torch.float32 for w in weights.values())
    assert any(w.any() for name, w in weights.items() if "lora_B" in name)  # a fresh adapter begins with 0 here


def test_the_sft_adapter_is_the_reference(base_folder: str, sft_adapter: str, data: Path, tmp_path: Path) -> None:
    """What was trained against it is loaded with it. The control: a run against the base does not start at log 2."""
    given = on_the_machine("dpo_from_sft_8b.yaml", sft_adapter, data, tmp_path)
    config = ["--config", str(RECIPES / "dpo_from_sft_8b.yaml"), *words({**given, "max_steps": 1})]
    cli.train(config)
    found = load_trained(str(tmp_path))
    assert found.reference is not None and found.reference.source == sft_adapter
    against_base = cli.train([*config, "--reference", "base", "--overwrite_output_dir", "true"]).state.log_history[0][
        "loss"
    ]
    assert abs(against_base - math.log(2)) > 0.01


# ---- Scripts --------------------------------------------------------------------------------------------------------


def test_the_trl_script(base_folder: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command of its header, with a stand-in for model and dataset."""
    command = re.search(r"python recipes/dpo_qlora\.py (.*) Expected:", header("dpo_qlora.py"))[1].replace("\\ ", "")
    given = {"model_name_or_path": base_folder, "dataset_name": data / "pairs", "output_dir": tmp_path / "out"}
    given |= {"max_steps": 2, "logging_steps": 1, "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    run_script(load_script("dpo_qlora.py"), [*shlex.split(command), *words(given)], monkeypatch)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["first"]["loss"] == pytest.approx(math.log(2), abs=1e-3)
    saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (saved["r"], saved["lora_alpha"]) == (16, 32)
    assert saved["auto_mapping"]["dpo_peft_training"]["quantization"]["bnb_4bit_use_double_quant"]


@pytest.mark.parametrize("name", ["quickstart.py", pytest.param("objectives.py", marks=pytest.mark.slow)])
def test_judged_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sample, train, sample again and report; four samples and eight held-out pairs here."""
    script = load_script(name)
    monkeypatch.setattr(cli_quickstart if name == "quickstart.py" else script, "SAMPLES", 4)
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("".join(Path(quickstart.test_file()).read_text().splitlines(keepends=True)[:8]))
    options = {"output_dir": tmp_path / "out", "eval_dataset_name": held_out, "max_steps": 2, "disable_tqdm": True}
    config = [] if name == "quickstart.py" else ["--config", str(RECIPES / "objectives" / "pairs.yaml")]
    run_script(script, [*config, *words(options)], monkeypatch)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert len(report["samples"]) == 4
    assert {"accuracy_after", "reward_before", "reward_after", "kl_to_reference"} <= report["figures"].keys()
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_rebuilding_the_quickstart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps give a model that loads and writes nothing of use, which is said; the shipped one gives pairs."""
    script = load_script("build_quickstart_model.py")
    few = {"train_prompts": 3, "test_prompts": 3, "eval_batches": 1, "tokenizer_chats": 300}
    with pytest.raises(SystemExit, match="No pairs in 18 answers"):
        run_script(script, words({"output": tmp_path / "new", "steps": 2, **few}), monkeypatch)
    assert (tmp_path / "new" / "model" / "model.safetensors").is_file()
    assert not (tmp_path / "new" / "data").exists()
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "model").symlink_to(quickstart.model_path())
    run_script(script, [*words({"output": tmp_path / "old", **few}), "--pairs_only"], monkeypatch)
    rows = [json.loads(line) for line in (tmp_path / "old" / "data" / "train.jsonl").read_text().splitlines()]
    assert rows and all(row["chosen_reward"] - row["rejected_reward"] >= script.MIN_GAP for row in rows)


@pytest.mark.slow
def test_the_whole_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """The script's own commands, written down by a stand-in for dpo-peft and then run in this process."""
    (tmp_path / "bin").mkdir()
    stand_in = tmp_path / "bin" / "dpo-peft"
    stand_in.write_text('#!/usr/bin/env bash\nprintf "%s\\0" "$@" >> "$LOG"; printf "\\n" >> "$LOG"\n')
    stand_in.chmod(0o755)
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("".join(Path(quickstart.test_file()).read_text().splitlines(keepends=True)[:8]))
    given = {"PROMPTS": "6", "STEPS": "2", "HELD_OUT": str(held_out), "LOG": str(tmp_path / "log")}
    environment = {**os.environ, **given, "PATH": f"{stand_in.parent}{os.pathsep}{os.environ['PATH']}"}
    out = tmp_path / "out"
    subprocess.run(["bash", str(RECIPES / "whole_life.sh"), str(out)], check=True, env=environment)
    commands = [line.split("\0")[:-1] for line in (tmp_path / "log").read_text().splitlines()]
    assert [command[0] for command in commands] == ["pairs", "train", "score", "report", "merge", "push"]
    monkeypatch.chdir(REPO)
    said = {}
    for command in commands:
        assert main([*command, "--json"]) == 0, capsys.readouterr().err
        said[command[0]] = json.loads(capsys.readouterr().out)
    assert said["train"]["steps"] == 2
    assert len((out / "scores.jsonl").read_text().splitlines()) == 8
    assert "<html" in (out / "report.html").read_text()
    assert (out / "merged" / "config.json").is_file() and not (out / "merged" / "adapter_config.json").exists()


@pytest.mark.slow
def test_dpo_then_grpo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both trainings take two steps and move their adapters; base, DPO and GRPO answer the same prompts."""
    short = {"dpo_steps": 2, "grpo_steps": 2, "judged": 4, "output_dir": tmp_path}
    run_script(load_script("dpo_then_grpo.py"), words(short), monkeypatch)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["figures"].keys() == {"base", "dpo", "grpo"} == report["answers"].keys()
    assert all(len(texts) == 4 for texts in report["answers"].values())
    for name in ("dpo", "grpo"):
        weights = load_file(tmp_path / name / "adapter_model.safetensors")
        assert any(w.any() for weight, w in weights.items() if "lora_B" in weight)


@pytest.mark.slow
def test_human_judgments(base_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two parts are held out one after the other, and the adapter of the first is kept."""
    said = ("a-is-better", "b-is-slightly-better", "tie")
    rows = [
        {"prompt": f"say {i}", "completion_a": f"the {i}", "completion_b": f"an {i}", "preference": said[i % 3]}
        for i in range(60)
    ]
    (tmp_path / "judgments.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"model_name_or_path": base_folder, "judgments": tmp_path / "judgments.jsonl", "folds": 2}
    given |= {"output_dir": tmp_path / "out", "max_steps": 2, "use_cpu": True, "disable_tqdm": True}
    run_script(load_script("smollm2_tulu.py"), words(given), monkeypatch)
    result = json.loads((tmp_path / "out" / "cross_validation.json").read_text())
    assert result["parts_held_out"] == 2 and result["comparisons"] == 16  # of 40 that are no ties, in five parts
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_both_configs_of_accelerate_start_the_same_run() -> None:
    """The one for GPUs can't be run here: it is the CPU's but for what picks the device."""
    gpu, cpu = (yaml.safe_load((RECIPES / "accelerate" / name).read_text()) for name in ("ddp.yaml", "ddp_cpu.yaml"))
    assert {**gpu, "use_cpu": True} == {**cpu, "gpu_ids": "all"}
    sharded = yaml.safe_load(
        (RECIPES / "accelerate" / "fsdp2.yaml").read_text()
    )  # run in training/test_sharded_base.py
    assert sharded.pop("distributed_type") == "FSDP" and sharded.pop("fsdp_config")["fsdp_version"] == 2
    assert {**sharded, "distributed_type": "MULTI_GPU"} == gpu
