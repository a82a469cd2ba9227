"""Config files and options as `trl dpo` takes them: which model, adapter and rows they mean here."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset, DatasetDict

from dpo_peft.cli import train as cli_train
from dpo_peft.cli.mixture import load_datasets
from dpo_peft.cli.train import DataArguments, ModelArguments, lora_config, quantization
from dpo_peft.config import DPOConfig
from dpo_peft.errors import OptionError


def rows(name: str, number: int) -> list[dict[str, str]]:
    return [{"prompt": f"say {name}{i}", "chosen": f" the {i} and more", "rejected": f" a {i}"} for i in range(number)]


def write(path: Path, number: int) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(path.stem, number)))
    return str(path)


def parse(tmp_path: Path, *words: str, **options: Any) -> tuple[DataArguments, DPOConfig, ModelArguments]:
    given = {"model_name_or_path": "m", "dataset_name": "d", "output_dir": str(tmp_path), "use_cpu": True, **options}
    (tmp_path / "trl.yaml").write_text(yaml.safe_dump({k: v for k, v in given.items() if v is not ...}))
    return cli_train.parse(["--config", str(tmp_path / "trl.yaml"), *words])


# ---- Model and adapter ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("all-linear", "all-linear"),
        (".*(q|v)_proj", ".*(q|v)_proj"),
        (r"model\.layers\.[01]\..*down_proj", r"model\.layers\.[01]\..*down_proj"),
        ("q_proj", {"q_proj"}),
        ("0.self_attn.q_proj", {"0.self_attn.q_proj"}),
        (None, "all-linear"),
    ],
)
def test_one_target_is_a_name_or_a_pattern(given: str | None, expected: object, tmp_path: Path) -> None:
    """In a file as text or as a list of one, and on the command line."""
    words = [] if given is None else ["--lora_target_modules", given]
    parsed = [parse(tmp_path, *words)]
    if given is not None:
        parsed += [parse(tmp_path, lora_target_modules=value) for value in (given, [given])]
    for _, args, model in parsed:
        assert lora_config(model, args).target_modules == expected


@pytest.mark.parametrize("given", [["all-linear", "lm_head"], [".*q_proj", ".*v_proj"], ["q_proj", "v_.*"]])
def test_a_pattern_stands_alone(given: list[str], tmp_path: Path) -> None:
    _, args, model = parse(tmp_path, "--lora_target_modules", *given)
    with pytest.raises(OptionError, match=r"stands alone.*Join patterns by |"):
        lora_config(model, args)


def test_options_of_the_adapter_are_trl_s(tmp_path: Path) -> None:
    options = {"use_peft": True, "lora_r": 32, "lora_dropout": 0.05, "lora_task_type": "CAUSAL_LM"}
    _, args, model = parse(tmp_path, lora_target_parameters=["experts.down_proj"], **options)
    config = lora_config(model, args)
    assert (config.r, config.lora_dropout, config.target_parameters) == (32, 0.05, ["experts.down_proj"])
    for words in (["--use_peft", "false"], ["--use-peft=False"]):
        with pytest.raises(OptionError, match="use_peft=False asks to train the whole model"):
            lora_config(parse(tmp_path, *words)[2], args)
    with pytest.raises(OptionError, match="lora_task_type='SEQ_CLS' is not one of CAUSAL_LM"):
        parse(tmp_path, lora_task_type="SEQ_CLS")
    with pytest.raises(OptionError, match="dataset_format='chatml' is not one of openai"):  # a sibling in the file
        parse(tmp_path, dataset_format="chatml")


@pytest.mark.parametrize(
    ("options", "expected", "quantize_base"),
    [
        ({}, {}, None),
        ({"load_in_4bit": True}, {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": False}, None),
        (
            {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "use_bnb_nested_quant": True, "dtype": "float16"},
            {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "float16"},
            None,
        ),
        ({"load_in_8bit": True}, {"load_in_8bit": True}, None),
        ({"load_in_4bit": False}, {}, False),
        ({"quantize_base": False}, {}, False),
        ({"load_in_4bit": True, "quantize_base": True}, {"load_in_4bit": True}, True),
    ],
)
def test_quantization_is_trl_s(
    options: dict[str, Any], expected: dict[str, Any], quantize_base: bool | None, tmp_path: Path
) -> None:
    _, args, model = parse(tmp_path, **options)
    config = quantization(model, args)
    found = {} if config is None else config.to_dict()
    assert {name: found[name] for name in expected} == expected and bool(found) == bool(expected)
    assert args.quantize_base == quantize_base


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"load_in_4bit": True, "load_in_8bit": True}, "give one of them"),
        ({"bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type: no effect without load_in_4bit"),
        ({"use_bnb_nested_quant": True, "load_in_8bit": True}, "use_bnb_nested_quant: no effect"),
        ({"load_in_4bit": True, "quantize_base": False}, "quantize_base contradicts"),
        ({"load_in_4bit": False, "quantize_base": True}, "quantize_base contradicts"),
        ({"load_in_8bit": True, "quantize_base": True}, "quantize_base contradicts"),
    ],
)
def test_contradictory_quantization_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    _, args, model = parse(tmp_path, **options)
    with pytest.raises(OptionError, match=message):
        quantization(model, args)


@pytest.mark.parametrize("given", [("multi_gpu", True), ("config_file", "a.yaml"), ("ignore_bias_buffers", True)])
def test_options_of_the_launcher_with_another_name(given: tuple[str, object], tmp_path: Path) -> None:
    name, value = given
    for words, options in (([f"--{name}", str(value)], {}), ([f"--{name}={value}"], {}), ([], {name: value})):
        with pytest.raises(OptionError, match=f"{name}='?{value}'? is an option of TRL that isn't offered"):
            parse(tmp_path, *words, **options)
    assert parse(tmp_path, "--num-processes", "1", accelerate_config="single_gpu", ignore_bias_buffers=False)


@pytest.mark.parametrize("given", [["none"], ["tensorboard", "wandb"]])
def test_several_trackers(given: list[str], tmp_path: Path) -> None:
    expected = [] if given == ["none"] else given
    assert parse(tmp_path, "--report_to", *given)[1].report_to == expected
    assert parse(tmp_path, report_to=given)[1].report_to == expected


# ---- Rows -----------------------------------------------------------------------------------------------------------


def prompts(dataset: Any) -> list[str]:
    return [row["prompt"] for row in dataset]


def test_several_files_and_evaluation_sets(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.jsonl", 3), write(tmp_path / "b.jsonl", 2)
    data = parse(tmp_path, "--dataset_name", a, b, "--eval_dataset_name", b, a)[0]
    train, evaluation = load_datasets(data, evaluate=True)
    assert prompts(train) == ["say a0", "say a1", "say a2", "say b0", "say b1"]
    assert {name: len(rows) for name, rows in evaluation.items()} == {"b": 2, "a": 3}
    one = parse(tmp_path, "--dataset_name", a, eval_dataset_name=[b])[0]
    assert len(load_datasets(one, evaluate=True)[1]) == 2
    again = write(tmp_path / "other" / "b.jsonl", 1)
    with pytest.raises(OptionError, match="Rename some"):
        load_datasets(parse(tmp_path, "--dataset_name", a, "--eval_dataset_name", b, again)[0], evaluate=True)


def test_rows_without_splits_are_not_evaluated_on_by_chance(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{name}.jsonl", 2) for name in "ab"]
    Dataset.from_list(rows("x", 2)).save_to_disk(tmp_path / "one")
    for name in (files[0], str(tmp_path / "*.jsonl"), files, str(tmp_path / "one")):
        with pytest.raises(OptionError, match="no test split: give eval_dataset_name"):
            load_datasets(DataArguments(dataset_name=name), evaluate=True)
    DatasetDict({"train": Dataset.from_list(rows("x", 3)), "test": Dataset.from_list(rows("y", 1))}).save_to_disk(
        tmp_path / "two"
    )
    train, test = load_datasets(DataArguments(dataset_name=str(tmp_path / "two")), evaluate=True)
    assert (len(train), prompts(test)) == (3, ["say y0"])


def test_mixtures(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.jsonl", 9), write(tmp_path / "b.jsonl", 4)
    columns = ["prompt", "chosen", "rejected"]
    parts = [{"path": a, "columns": columns}, {"path": "json", "data_files": {"train": b}, "split": "train"}]
    data = parse(tmp_path, dataset_name=..., datasets=parts)[0]
    assert prompts(load_datasets(data, evaluate=False)[0]) == [f"say a{i}" for i in range(9)] + [
        f"say b{i}" for i in range(4)
    ]
    shares = DataArguments(datasets=[{"path": a, "fraction": 0.5}, {"path": b, "fraction": 0.25}])
    assert prompts(load_datasets(shares, evaluate=False)[0]) == [f"say a{i}" for i in range(8)] + [
        f"say b{i}" for i in range(4)
    ]
    stream = load_datasets(DataArguments(datasets=parts, streaming=True), evaluate=False)[0]
    assert len(prompts(stream)) == 13
    held = DataArguments(datasets=parts, test_split_size=0.25)
    (train, test), (again, _) = load_datasets(held, True, seed=3), load_datasets(held, True, seed=3)
    assert (len(train), len(test)) == (9, 4) and prompts(train) == prompts(again)
    assert not {*prompts(train)} & {*prompts(test)}
    assert load_datasets(DataArguments(dataset_name=a, test_split_size=2.0), evaluate=False)[1] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset_name": "d"}, "give one of them"),
        ({"datasets": [{"name": "x"}]}, "must be a mapping with path"),
        ({"datasets": [{"path": "A", "weight": 1}]}, "must be a mapping with path"),
        ({"datasets": [{"path": "A", "fraction": 1}, {"path": "A"}]}, "of each part or of none"),
        ({"datasets": [{"path": "A", "fraction": 0}]}, "above 0"),
        ({"datasets": [{"path": "A", "columns": ["prompt", "answer"]}]}, "has no columns answer"),
        ({"test_split_size": 1.5e9}, "test_split_size=1.5e"),
        ({"test_split_size": 0.5, "streaming": True}, "a stream does not know"),
        ({"test_split_size": 0.5, "eval_dataset_name": "A"}, "give one of them"),
    ],
)
def test_what_a_mixture_refuses(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", 4)
    given = json.loads(
        json.dumps({"datasets": [{"path": "A"}], "test_split_size": 0.5, **options}).replace('"A"', json.dumps(path))
    )
    with pytest.raises(OptionError, match=message):
        load_datasets(DataArguments(**given), evaluate=True)


def test_a_trl_file_with_lora_runs_and_its_recipe_runs_again(
    tmp_path: Path, tiny_llama: Any, make_tokenizer: Any
) -> None:
    tiny_llama().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    a, b = write(tmp_path / "a.jsonl", 9), write(tmp_path / "b.jsonl", 4)
    options = {
        "model_name_or_path": str(tmp_path / "model"),
        "model_revision": "main",
        "datasets": [{"path": a}, {"path": b}],
        "test_split_size": 0.25,
        "use_peft": True,
        "lora_r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.05,
        "lora_target_modules": "all-linear",
        "load_in_4bit": True,
        "use_bnb_nested_quant": True,
        "attn_implementation": "eager",
        "num_processes": 1,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "use_cpu": True,
        "report_to": "none",
        "output_dir": str(tmp_path / "out"),
    }
    (tmp_path / "trl.yaml").write_text(yaml.safe_dump(options))
    trainer = cli_train.train(["--config", str(tmp_path / "trl.yaml")])
    assert trainer.args.model_init_kwargs["attn_implementation"] == "eager"
    assert trainer.model.peft_config["default"].lora_dropout == 0.05
    assert len(trainer.train_dataset) == 9 and len(trainer.eval_dataset) == 4
    recipe = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    assert recipe["datasets"] == [{"path": "a.jsonl"}, {"path": "b.jsonl"}] and recipe["load_in_4bit"] is True
    card = (tmp_path / "out" / "README.md").read_text()
    assert "a.jsonl" in card and str(tmp_path) not in card
    (tmp_path / "again.yaml").write_text(
        yaml.safe_dump({**recipe, "model_name_or_path": options["model_name_or_path"]})
    )
    parsed = cli_train.parse(["--config", str(tmp_path / "again.yaml"), "--output_dir", str(tmp_path / "new")])
    assert parsed[0].datasets == recipe["datasets"] and parsed[2].use_peft
