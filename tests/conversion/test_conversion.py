"""Config files of Axolotl and LLaMA-Factory as ours: options that exist, what they mean, nothing lost silently."""

import json
from dataclasses import fields
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpo_peft import DPOConfig, cli, quickstart
from dpo_peft.cli.mixture import DataArguments
from dpo_peft.cli.train import ModelArguments
from dpo_peft.conversion import convert
from dpo_peft.conversion.made import names
from dpo_peft.errors import OptionError

OURS = {f.name for group in (DPOConfig, DataArguments, ModelArguments) for f in fields(group)}
LATER = {"column_map"}

AXOLOTL = f"""
base_model: {quickstart.model_path()}
load_in_4bit: true
adapter: qlora
rl: dpo
rl_beta: 0.3
dpo_label_smoothing: 0.05
datasets:
  - path: {quickstart.train_file()}
    ds_type: json
    split: train
    type: chat_template.default
    field_messages: prompt
val_set_size: 0.1
sequence_len: 256
sample_packing: false
lora_r: 8
lora_alpha: 16
lora_target_linear: true
micro_batch_size: 4
gradient_accumulation_steps: 2
num_epochs: 1
max_steps: 2
optimizer: adamw_torch
learning_rate: 0.0005
bf16: false
tf32: auto
flash_attention: true
warmup_ratio: 0.1
saves_per_epoch: 2
wandb_project:
special_tokens: {{pad_token: "<|pad|>"}}
group_by_length: false
my_own_key: 3
"""
FACTORY = f"""
model_name_or_path: {quickstart.model_path()}
quantization_bit: 4
stage: dpo
do_train: true
finetuning_type: lora
lora_target: all
pref_beta: 0.2
pref_loss: sigmoid
pref_ftx: 0.05
dataset: reviews
dataset_dir: data
template: qwen
cutoff_len: 256
per_device_train_batch_size: 4
learning_rate: 5.0e-4
num_train_epochs: 1.0
max_steps: 2
warmup_ratio: 0.1
bf16: false
eval_dataset: reviews_test
plot_loss: true
"""
INFO = {
    name: {
        "file_name": file,
        "formatting": "sharegpt",
        "ranking": True,
        "columns": {"messages": "prompt", "chosen": "chosen", "rejected": "rejected"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
    }
    for name, file in (("reviews", quickstart.train_file()), ("reviews_test", quickstart.test_file()))
}


def converted(folder: Path, text: str, info: Any = None, **changed: Any) -> tuple[dict[str, Any], list[str]]:
    """Our options and the notes; None takes a key out."""
    given = {**yaml.safe_load(text), **changed}
    file = folder / "theirs.yaml"
    file.write_text(yaml.safe_dump({key: value for key, value in given.items() if value is not None}), "utf-8")
    (folder / "data").mkdir(exist_ok=True)
    (folder / "data" / "dataset_info.json").write_text(json.dumps(INFO if info is None else info), "utf-8")
    made, notes = convert(str(file))
    for key, value in given.items():  # nothing is lost silently
        assert value is None or key in made
    return yaml.safe_load(made), notes


@pytest.mark.parametrize("program", ["axolotl", "llamafactory"])
def test_what_they_are_called_here_exists(program: str) -> None:
    known = names()[program]
    assert {*known["options"].values(), *known.get("same", ()), *known["defaults"]} <= OURS
    taken = [*known["options"], *known.get("same", ()), *known["handled"]]
    assert len(taken) == len({*taken})
    patterns = [pattern for some in known["left_out"].values() for pattern in some]
    assert len(patterns) == len({*patterns})
    plain = [one for one in patterns if "*" not in one]
    assert not {*plain} & {*taken}
    assert not any(fnmatch("my_own_key", pattern) for pattern in patterns)


def test_axolotls_file_by_hand(tmp_path: Path) -> None:
    made, notes = converted(tmp_path, AXOLOTL)
    assert made == {
        "model_name_or_path": quickstart.model_path(),
        "load_in_4bit": True,
        "loss_type": "sigmoid",
        "beta": 0.3,
        "label_smoothing": 0.05,
        "dataset_name": quickstart.train_file(),
        "test_split_size": 0.1,
        "eval_strategy": "epoch",
        "max_length": 256,
        "lora_r": 8,
        "lora_alpha": 16,
        "lora_target_modules": ["all-linear"],
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 1,
        "max_steps": 2,
        "optim": "adamw_torch",
        "learning_rate": 0.0005,
        "lr_scheduler_type": "cosine",
        "bf16": False,
        "warmup_steps": 0.1,
        "save_strategy": "steps",
        "save_steps": 0.5,
        "report_to": "none",
    }
    assert "my_own_key: 3 - not a key that this converter knows" in notes
    assert sorted(note.split(":")[0] for note in notes) == sorted(
        ["my_own_key", "tf32", "flash_attention", "sample_packing", "special_tokens", "group_by_length"]
    )


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"rl": "ipo"}, {"loss_type": "ipo", "ipo_length_normalize": True}),
        ({"rl": "kto", "kto_desirable_weight": 0.2}, {"loss_type": "kto", "desirable_weight": 0.2}),
        ({"rl": "orpo", "rl_beta": None, "orpo_alpha": 0.7}, {"loss_type": "orpo", "beta": 0.7}),
        ({"rl": "simpo"}, {"loss_type": ["simpo", "sft"], "loss_weights": [1.0, 1.0], "simpo_gamma": 0.5}),
        ({"rl": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 1.4}, {"loss_type": "simpo", "simpo_gamma": 1.4}),
        ({"dpo_loss_type": ["hinge"]}, {"loss_type": ["hinge"]}),
        ({"trl": {"beta": 0.9}}, {"beta": 0.9}),
        ({"adapter": "lora", "load_in_4bit": None}, {"load_in_4bit": False}),
        ({"lora_dropout": 0.1}, {"disable_dropout": False, "lora_dropout": 0.1}),
        ({"evals_per_epoch": 4, "num_epochs": 2}, {"eval_strategy": "steps", "eval_steps": 0.125}),
        ({"group_by_length": True}, {"train_sampling_strategy": "group_by_length"}),
        ({"gradient_checkpointing": "offload"}, {"gradient_checkpointing": True}),
        ({"use_wandb": True}, {"report_to": ["wandb"]}),
        ({"save_strategy": False, "saves_per_epoch": None}, {"save_strategy": "no"}),
        ({"warmup_steps": 7}, {"warmup_steps": 7}),
        ({"lora_model_dir": "out/sft"}, {"model_name_or_path": "out/sft"}),
    ],
)
def test_axolotls_meanings(changed: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    made, _ = converted(tmp_path, AXOLOTL, **changed)
    assert {name: made.get(name) for name in expected} == expected
    assert made.keys() <= OURS | LATER


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ({"path": "org/x", "type": "chatml.intel"}, {"column_map": {"question": "prompt"}}),
        (
            {"path": "org/x", "type": "llama3.icr", "split": "a"},
            {"column_map": {"input": "prompt"}, "dataset_train_split": "a"},
        ),
        ({"path": "org/x", "type": "chatml.ultra", "name": "sub"}, {"dataset_config": "sub", "column_map": None}),
        (
            {"path": "org/x", "type": "chat_template.default", "field_chosen": "good", "field_rejected": "bad"},
            {"column_map": {"messages": "prompt", "good": "chosen", "bad": "rejected"}},
        ),
        (
            {
                "path": "org/x",
                "type": "chat_template.default",
                "field_messages": "conversation",
                "message_property_mappings": {"role": "from", "content": "value"},
            },
            {"dataset_format": "sharegpt", "column_map": {"conversation": "conversations"}},
        ),
        (
            {"path": "org/x", "type": {"field_prompt": "q", "field_chosen": "a", "prompt_format": "[INST] {prompt}"}},
            {"column_map": {"q": "prompt", "a": "chosen"}},
        ),
        ({"path": "json", "data_files": ["mine.json"], "type": "passthrough"}, {"dataset_name": "mine.json"}),
    ],
)
def test_axolotls_datasets(part: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    made, notes = converted(tmp_path, AXOLOTL, datasets=[part])
    assert {name: made.get(name) for name in expected} == expected
    if isinstance(part["type"], dict):
        assert any(note.startswith("type.prompt_format") for note in notes)
    two, _ = converted(tmp_path, AXOLOTL, datasets=[part, {"path": "org/y", "type": "zephyr.nectar"}])
    assert [one["path"] for one in two["datasets"]][1] == "org/y" and "dataset_name" not in two


def test_an_unknown_dataset_type_is_named(tmp_path: Path) -> None:
    _, notes = converted(tmp_path, AXOLOTL, datasets=[{"path": "org/y", "type": "zephyr.nectar", "shards": 3}])
    assert 'type: "zephyr.nectar" - not known: the columns are read as they are' in notes
    assert "datasets.shards: 3 - not offered for one dataset" in notes


def test_llama_factorys_file_by_hand(tmp_path: Path) -> None:
    made, notes = converted(tmp_path, FACTORY)
    assert made == {
        "model_name_or_path": quickstart.model_path(),
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "use_bnb_nested_quant": True,
        "loss_type": ["sigmoid", "sft"],
        "loss_weights": [1.0, 0.05],
        "beta": 0.2,
        "lora_r": 8,
        "lora_alpha": 16,
        "lora_target_modules": ["all-linear"],
        "dataset_name": quickstart.train_file(),
        "eval_dataset_name": [quickstart.test_file()],
        "eval_strategy": "epoch",
        "max_length": 256,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.0005,
        "lr_scheduler_type": "linear",
        "num_train_epochs": 1.0,
        "max_steps": 2,
        "warmup_steps": 0.1,
        "bf16": False,
        "gradient_checkpointing": True,
    }
    assert sorted(note.split(":")[0] for note in notes) == ["do_train", "finetuning_type", "plot_loss", "template"]


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"pref_loss": "ipo", "pref_ftx": None}, {"loss_type": "ipo", "ipo_length_normalize": True}),
        ({"pref_loss": "simpo", "pref_ftx": 0.0}, {"loss_type": "simpo", "simpo_gamma": 0.5}),
        (
            {"stage": "kto", "kto_rejected_weight": 2.0, "pref_ftx": None},
            {"loss_type": "kto", "undesirable_weight": 2.0},
        ),
        ({"quantization_bit": None}, {"load_in_4bit": False}),
        ({"quantization_bit": 8}, {"load_in_8bit": True}),
        (
            {"lora_target": "q_proj, v_proj", "additional_target": "lm_head"},
            {"lora_target_modules": ["q_proj", "v_proj"], "lora_modules_to_save": ["lm_head"]},
        ),
        ({"lora_rank": 4}, {"lora_alpha": 8}),
        ({"val_size": 20, "eval_dataset": None}, {"test_split_size": 20, "eval_strategy": "epoch"}),
    ],
)
def test_llama_factorys_meanings(changed: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    made, _ = converted(tmp_path, FACTORY, **changed)
    assert {name: made.get(name) for name in expected} == expected
    assert made.keys() <= OURS | LATER


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        (
            {
                "hf_hub_url": "org/orca",
                "ranking": True,
                "columns": {"prompt": "question", "system": "sys", "chosen": "good", "rejected": "bad"},
            },
            {
                "dataset_name": "org/orca",
                "dataset_format": "alpaca",
                "column_map": {"question": "instruction", "sys": "system", "good": "chosen", "bad": "rejected"},
            },
        ),
        (
            {
                "file_name": "x.json",
                "formatting": "sharegpt",
                "ranking": True,
                "columns": {"messages": "talk", "chosen": "chosen", "rejected": "rejected"},
            },
            {"dataset_format": "sharegpt", "column_map": {"talk": "conversations"}},
        ),
        (
            {
                "file_name": "k.json",
                "formatting": "sharegpt",
                "columns": {"messages": "messages", "kto_tag": "ok"},
                "tags": {"role_tag": "role", "content_tag": "content"},
                "subset": "s",
            },
            {"column_map": {"ok": "label"}, "dataset_config": "s", "dataset_format": None},
        ),
        (
            {"file_name": "a.json", "columns": {"prompt": "q", "response": "a", "kto_tag": "ok"}},
            {"column_map": {"q": "prompt", "a": "completion", "ok": "label"}},
        ),
    ],
)
def test_llama_factorys_datasets(entry: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    made, _ = converted(tmp_path, FACTORY, {"mine": entry}, dataset="mine", eval_dataset=None)
    assert {name: made.get(name) for name in expected} == expected


def test_a_dataset_that_is_not_listed_is_named(tmp_path: Path) -> None:
    made, notes = converted(tmp_path, FACTORY, {}, dataset="a.jsonl, org/b", eval_dataset=None)
    assert [part["path"] for part in made["datasets"]] == ["a.jsonl", "org/b"]
    assert sum("is not in a dataset_info.json" in note for note in notes) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base_model: x\nrl: grpo\n", "rl='grpo' is no training from preferences"),
        ("base_model: x\n", "rl=None"),
        ("model_name_or_path: x\nstage: sft\n", "stage='sft'"),
        ("model_name_or_path: x\nstage: dpo\npref_loss: kto_pair\n", "pref_loss='kto_pair' is not offered"),
        ("model_name_or_path: x\nbeta: 0.1\n", "dpo-peft train --config"),
        ("a: 1\n", "is no config of"),
        ("- a\n", "must hold"),
        ("a: [\n", "can't be read"),
    ],
)
def test_what_is_no_such_config_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(OptionError, match=message):
        convert(str(tmp_path / "x.yaml"))


@pytest.mark.parametrize(
    "text", [FACTORY, pytest.param(AXOLOTL, marks=pytest.mark.slow)], ids=["llamafactory", "axolotl"]
)
def test_what_comes_out_trains(text: str, tmp_path: Path, capsys: Any) -> None:
    info = json.dumps(INFO)
    for file in (quickstart.train_file(), quickstart.test_file()):  # twelve rows of each
        few = tmp_path / Path(file).name
        few.write_text("".join(Path(file).read_text("utf-8").splitlines(keepends=True)[:12]), "utf-8")
        text, info = text.replace(file, str(few)), info.replace(file, str(few))
    converted(tmp_path, text, json.loads(info))
    made, _ = convert(str(tmp_path / "theirs.yaml"))
    (tmp_path / "ours.yaml").write_text(made, "utf-8")
    words = ["--config", str(tmp_path / "ours.yaml"), "--output_dir", str(tmp_path / "run"), "--use_cpu", "--json"]
    assert cli.main(["train", *words]) == 0
    record = json.loads((tmp_path / "run" / "adapter_config.json").read_text("utf-8"))
    trained = record["auto_mapping"]["dpo_peft_training"]
    given = yaml.safe_load(text)
    assert trained["beta"] == given.get("rl_beta", given.get("pref_beta")) and trained["max_length"] == 256
    assert trained["quantization"]["load_in_4bit"] and record["r"] == 8 and record["lora_alpha"] == 16
    assert json.loads(capsys.readouterr().out)["steps"] == 2
