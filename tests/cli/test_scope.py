"""Which tokens and layers an adapter is on, by the command line: what is asked for comes out, and the rest is said."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_peft import answer_only, cli
from dpo_peft.cli import train as cli_train
from dpo_peft.model.loading import attach_adapter
from dpo_peft.planning.run import plan
from dpo_peft.quickstart import model_path

MODEL_DIR = model_path()  # of 4 layers, with a chat template
PAIRS = [{"prompt": f"say {i}", "chosen": f" the {i} and more", "rejected": f" a {i}"} for i in range(24)]


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, PAIRS)))
    data = ["--dataset_name", str(tmp_path / "rows.jsonl"), "--output_dir", str(tmp_path / "run")]
    return ["--model_name_or_path", MODEL_DIR, *data, "--dtype", "float32", "--bf16", "false", "--report_to", "none"]


def refusal(words: list[str], capsys: pytest.CaptureFixture) -> str:
    capsys.readouterr()
    assert cli.main(["train", "--dry_run", *words]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("given", [["0.5"], ["2-3"], ["2", "3"]])
def test_the_adapter_is_as_asked_for(words: list[str], given: list[str]) -> None:
    asked = [*words, "--adapter_scope", "completions", "--lora_layers_to_transform", *given]
    _, args, model = cli_train.parse(asked)
    config = cli_train.lora_config(model, args)
    assert config.alora_invocation_tokens == answer_only(AutoTokenizer.from_pretrained(MODEL_DIR))
    assert config.layers_to_transform == [2, 3]
    _, args, model = cli_train.parse(words)  # control
    config = cli_train.lora_config(model, args)
    assert config.alora_invocation_tokens is None is config.layers_to_transform


def test_a_file_may_hold_numbers(words: list[str], tmp_path: Path) -> None:
    for value in ("0.5", "[2, 3]", "2-3"):
        (tmp_path / "run.yaml").write_text(f"lora_layers_to_transform: {value}\nadapter_scope: completions\n")
        _, args, model = cli_train.parse(["--config", str(tmp_path / "run.yaml"), *words])
        assert cli_train.lora_config(model, args).layers_to_transform == [2, 3]


def test_a_dry_run_and_the_plan_count_the_layers(words: list[str], capsys: pytest.CaptureFixture) -> None:
    """The trained weights are those of the model that is made."""
    base = AutoModelForCausalLM.from_pretrained(MODEL_DIR)
    _, args, model = cli_train.parse([*words, "--lora_layers_to_transform", "0.5"])
    made, _ = attach_adapter(base, cli_train.lora_config(model, args))
    trained = sum(p.numel() for p in made.parameters() if p.requires_grad)
    capsys.readouterr()
    assert cli.main(["train", "--dry_run", "--json", *words, "--lora_layers_to_transform", "0.5"]) == 0
    assert json.loads(capsys.readouterr().out)["model"]["trained"] == trained
    assert plan(model_name_or_path=MODEL_DIR, lora_layers_to_transform="2-3").model.trained == trained
    assert plan(model_name_or_path=MODEL_DIR).model.trained == 2 * trained


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--lora_layers_to_transform", "2-4"], "the model has 4 layers, 0 to 3. Give numbers, ranges such as 2-3"),
        (["--adapter_invocation", "x"], "adapter_invocation: no effect with adapter_scope all"),
        (["--adapter_scope", "completions", "--use_dora", "true"], "goes without use_dora"),
        (["--adapter_scope", "prompts"], "adapter_scope"),
        (["--lora_layers_to_transform", "2", "--lora_target_modules", ".*q_proj"], "beside a pattern"),
    ],
)
def test_what_does_not_fit_is_said_before_any_work(
    words: list[str], more: list[str], said: str, capsys: pytest.CaptureFixture
) -> None:
    assert said in refusal([*words, *more], capsys)


def test_rows_without_the_tokens_are_named_and_the_remedies_work(
    words: list[str], capsys: pytest.CaptureFixture
) -> None:
    scope = ["--adapter_scope", "completions"]
    said = refusal([*words, *scope, "--as_chat", "false"], capsys)
    assert "train row 0, field 'prompt': does not hold" in said and "it ends with 'say 0'" in said
    remedies: list[Any] = [[*scope, "--as_chat", "true"], ["--adapter_scope", "all", "--as_chat", "false"]]
    for remedy in [*remedies, [*scope, "--as_chat", "false", "--adapter_invocation", "say"]]:
        assert cli.main(["train", "--dry_run", *words, *remedy]) == 0
    assert "an adapter and keeps its own" in refusal_of_an_adapter(words, capsys, scope)


def refusal_of_an_adapter(words: list[str], capsys: pytest.CaptureFixture, scope: list[str]) -> str:
    folder = Path(words[5]) / "adapter"
    model, _ = attach_adapter(AutoModelForCausalLM.from_pretrained(MODEL_DIR))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(MODEL_DIR).save_pretrained(folder)
    return refusal([*words, "--model_name_or_path", str(folder), *scope], capsys)
