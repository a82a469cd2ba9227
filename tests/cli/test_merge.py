"""`dpo-peft merge` and what is said about other programs' LoRA loaders."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from safetensors import safe_open
from trainer_helpers import lora, ours, text_pairs
from transformers import AutoModelForCausalLM

from dpo_peft import cli
from dpo_peft.merge import drift
from dpo_peft.serving import max_lora_rank, serving_problems


@pytest.fixture(scope="module")
def adapter(base_folder, make_tokenizer, tmp_path_factory) -> str:
    """A trained adapter on a tiny base in NF4."""
    folder = str(tmp_path_factory.mktemp("adapter"))
    options = {"max_steps": 3, "learning_rate": 2e-2, "model_init_kwargs": {"dtype": "float32"}}
    trainer = ours(base_folder, text_pairs(8), make_tokenizer(), folder, **options)
    trainer.train()
    trainer.save_model()
    return folder


@pytest.fixture(autouse=True)
def short_texts(monkeypatch) -> None:
    monkeypatch.setattr(drift, "NEW_TOKENS", 8)


@pytest.fixture
def pairs_file(tmp_path: Path) -> str:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in text_pairs(6, seed=1)))
    return str(path)


# ---- The command ----------------------------------------------------------------------------------------------------


def test_json_is_all_of_stdout(adapter, pairs_file, tmp_path, capsys, caplog) -> None:
    out = tmp_path / "merged"
    assert cli.main(["merge", adapter, "--output_dir", str(out), "--dataset_name", pairs_file, "--json"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert (result["onto"], result["dtype"], result["output_dir"]) == ("dequantized", "float32", str(out))
    assert (result["drift"]["rows"], result["drift"]["pairs"]) == ("pairs.jsonl", 6)
    assert result["drift"]["mean_token"] < result["max_drift"] == 0.001
    assert "6 of 6 rows kept" in caplog.text and "Merging" in captured.err  # what became of rows, and progress bars
    assert result["files"] == {"model.safetensors": (out / "model.safetensors").stat().st_size}
    assert AutoModelForCausalLM.from_pretrained(out).config.vocab_size == 320


def test_text_and_options_of_a_file(adapter, tmp_path, capsys) -> None:
    config = tmp_path / "merge.yaml"
    config.write_text(f"adapter: {adapter}\noutput_dir: {tmp_path / 'merged'}\nonto: base16\nmax_drift: 99\n")
    assert cli.main(["merge", "--config", str(config), "--dtype", "bfloat16"]) == 0
    text = capsys.readouterr().out
    for part in ("the original base", "bfloat16", "allowed: 99", "of 8 completions", "vLLM's and llama.cpp's"):
        assert part in text


def test_refusal_exits_with_3(adapter, tmp_path, capsys) -> None:
    out = tmp_path / "merged"
    assert cli.main(["merge", adapter, "--output_dir", str(out), "--onto", "base16"]) == 3
    captured = capsys.readouterr()
    assert "nats per token" in captured.err and "onto='dequantized'" in captured.err
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--output_dir", "{out}"], "adapter is missing"),
        (["{adapter}"], "output_dir is missing"),
        (["{adapter}", "--output_dir", "{adapter}"], "is not an empty folder"),
        (["{out}", "--output_dir", "{out}2"], "is not an adapter"),
        (["{adapter}", "--output_dir", "{out}", "--onto", "nf4"], "--onto"),
        (["{adapter}", "--output_dir", "{out}", "--max_rows", "3"], "max_rows: no effect without dataset_name"),
        (["{adapter}", "--output_dir", "{out}", "--dataset_name", "none.jsonl"], "there is no such file"),
        (
            ["{adapter}", "--output_dir", "{out}", "--dataset_name", "{pairs}", "--dataset_split", "test"],
            "dataset_split has no effect",
        ),
        (["{adapter}", "--output_dir", "{out}", "--base", "{out}"], "If it lies elsewhere, give base"),
        (["{adapter}", "--output_dir", "{out}", "--quantize", "false", "--onto", "base16"], "has no effect"),
        (["{adapter}", "--output_dir", "{out}", "--max_drfit", "1"], "Did you mean 'max_drift'"),
    ],
)
def test_wrong_input_exits_with_2(adapter, pairs_file, tmp_path, capsys, words: list[str], message: str) -> None:
    names = {"adapter": adapter, "out": str(tmp_path / "merged"), "pairs": pairs_file}
    before = sorted(tmp_path.iterdir())
    assert cli.main(["merge", *(word.format(**names) for word in words)]) == 2
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_another_base_exits_with_2(adapter, tiny_llama, make_tokenizer, tmp_path, capsys) -> None:
    tiny_llama(seed=1).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    words = ["merge", adapter, "--base", str(tmp_path / "base"), "--output_dir", str(tmp_path / "merged")]
    assert cli.main(words) == 2
    assert "is not the one that it was trained on" in capsys.readouterr().err


def test_help(capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["merge", "--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    assert "dpo-peft merge outputs/quickstart --output_dir" in text and "exit codes" in text
    assert text.count("--onto") >= 2


# ---- Loaders of others ----------------------------------------------------------------------------------------------


def saved_config(adapter: str) -> dict[str, Any]:
    return json.loads((Path(adapter) / "adapter_config.json").read_text())


def test_our_adapters_suit_the_loaders(adapter) -> None:
    """By the rules of the two loaders: required keys, names of tensors that they parse, a rank within the limit."""
    config = saved_config(adapter)
    assert serving_problems(config) == []
    assert serving_problems(LoraConfig(target_modules=["q_proj"])) == []
    # vLLM's PEFTHelper needs these and takes no other value of the rest; unknown keys, such as our record, it drops.
    assert isinstance(config["r"], int) and isinstance(config["lora_alpha"], int | float)
    assert isinstance(config["target_modules"], list) and config["auto_mapping"]["dpo_peft_training"]
    assert (config["bias"], config["modules_to_save"], config["use_dora"]) == ("none", None, False)
    with safe_open(f"{adapter}/adapter_model.safetensors", "pt") as file:
        names, dtypes = list(file.keys()), {file.get_tensor(name).dtype for name in file.keys()}
    assert len(names) == 28 and {str(dtype) for dtype in dtypes} == {"torch.float32"}
    for name in names:  # base_model.model.<module of the base>.lora_A.weight, both halves there
        start, module = name.split("base_model.model.")
        assert start == "" and module.endswith((".lora_A.weight", ".lora_B.weight"))
        assert name.replace("lora_A", "lora_B") in names and name.replace("lora_B", "lora_A") in names
    assert max_lora_rank(config) == 8  # the least value that vLLM takes for a rank of 4


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"use_dora": True}, ["vLLM and llama.cpp refuse DoRA"]),
        ({"modules_to_save": ["lm_head"]}, ["refuse modules_to_save (lm_head)"]),
        ({"trainable_token_indices": [1, 2]}, ["--max-lora-trainable-tokens"]),
        ({"use_rslora": True, "r": 64}, ["llama.cpp overlooks use_rslora", "a factor of 8,"]),
        ({"rank_pattern": {"q_proj": 8}}, ["vLLM overlooks rank_pattern"]),
        ({"alpha_pattern": {"q_proj": 8}}, ["vLLM and llama.cpp overlook alpha_pattern"]),
        ({"r": 1024}, ["vLLM takes ranks up to 512, and this one's is 1024"]),
        ({"init_lora_weights": "pissa_niter_4"}, ["add the adapter to the original base"]),
        ({"target_modules": ["lm_head", "q_proj"]}, ["llama.cpp refuses an adapter on lm_head"]),
        ({"target_modules": ["model.embed_tokens"]}, ["vLLM takes an adapter on embed_tokens"]),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, ["target_parameters"]),
        ({"lora_bias": True}, ["biases"]),
        ({"init_lora_weights": False}, []),
    ],
)
def test_what_loaders_refuse_or_overlook(options: dict[str, Any], expected: list[str]) -> None:
    config = LoraConfig(**{"target_modules": ["q_proj"], **options})
    for source in (config, json.loads(json.dumps(config.to_dict(), default=list))):
        found = serving_problems(source)
        assert len(found) == bool(expected)
        assert all(part in found[0] for part in expected)


def test_rank_for_vllm_and_the_factor_for_llama_cpp() -> None:
    assert [max_lora_rank(LoraConfig(r=r)) for r in (1, 2, 16, 17, 300, 512)] == [1, 8, 16, 32, 320, 512]
    assert max_lora_rank(LoraConfig(r=4, rank_pattern={"q_proj": 40})) == 64
    # What rsLoRA scales by, over what llama.cpp computes from the same two numbers.
    assert (32 / math.sqrt(16)) / (32 / 16) == 4
    assert "a factor of 4," in serving_problems(lora(r=16, lora_alpha=32, use_rslora=True))[0]
