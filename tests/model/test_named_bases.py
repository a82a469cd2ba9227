"""A base by its name: the class that its files name, all of its weights, and a life that ends in what people serve."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import zoo
from family_matrix import logits, pairs, run_options, words
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from trainer_helpers import lora

from dpo_peft import DPOConfig, DPOTrainer, OptionError
from dpo_peft.merge import merge_adapter
from dpo_peft.model.adapter_source import load_trained
from dpo_peft.model.base import load_base
from dpo_peft.model.loading import keep_weights, storage_report

FLOAT32 = {"dtype": "float32"}


def saved(name: str, folder: Path) -> str:
    """The folder of a family's tiny model with a tokenizer."""
    zoo.build(name).save_pretrained(folder / "base")
    words().save_pretrained(folder / "base")
    return str(folder / "base")


def changed_file(folder: str, to: Path, change: Any) -> str:
    """A copy of a model's folder whose tensors went through `change`."""
    shutil.copytree(folder, to)
    tensors = load_file(to / "model.safetensors")
    change(tensors)
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
    return str(to)


# ---- The class ------------------------------------------------------------------------------------------------------


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("qwen3_5-vl", "Qwen3_5ForCausalLM"),  # a text class is registered for its config
        ("mistral3-vl", None),
        ("mistral4", None),
        ("internlm3", "LlamaForCausalLM"),  # the class has another config
    ],
)
def test_the_class_is_the_one_that_the_files_name(name: str, known: str | None, tmp_path: Path) -> None:
    folder = saved(name, tmp_path)
    named = json.loads(Path(folder, "config.json").read_text())["architectures"]
    assert [type(load_base(folder)).__name__] == named
    if known:  # as a record of before says
        assert type(load_base(folder, class_name="AutoModelForCausalLM")).__name__ == known


@pytest.mark.parametrize("named", [["NoSuchModel"], ["LlamaModel"], ["LlamaForSequenceClassification"], None])
def test_a_class_without_a_language_models_head_is_not_taken(named: Any, base_folder: str, tmp_path: Path) -> None:
    shutil.copytree(base_folder, tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps({**config, "architectures": named}))
    assert type(load_base(str(tmp_path / "base"))).__name__ == "LlamaForCausalLM"


# ---- Its weights ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantize", [True, False])
def test_a_weight_that_the_files_lack_is_named(quantize: bool, base_folder: str, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    folder = changed_file(base_folder, tmp_path / "a", lambda tensors: tensors.pop(name))
    with pytest.raises(OptionError, match=f"lack 1 weights, such as {name}"):
        load_base(folder, quantize=quantize)
    folder = changed_file(base_folder, tmp_path / "b", lambda tensors: tensors.update({name: tensors[name][:-2]}))
    with pytest.raises(OptionError, match=rf"{name} is \[\d+, 64\] there and \[\d+, 64\] in the model"):
        load_base(folder, quantize=quantize)


def test_tied_weights_and_surplus_ones_are_no_loss(tmp_path: Path, caplog: Any) -> None:
    zoo.build("qwen3").save_pretrained(tmp_path / "untied")
    tied = zoo.build("gemma")  # its file has no head
    tied.save_pretrained(tmp_path / "tied")
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")
    with caplog.at_level(logging.INFO, "dpo_peft"):
        load_base(str(tmp_path / "tied"))
        assert "have no place" not in caplog.text
        more = {"model.mtp.0.weight": torch.zeros(2)}
        load_base(changed_file(str(tmp_path / "untied"), tmp_path / "more", lambda tensors: tensors.update(more)))
    assert "1 weights in the files of" in caplog.text and "such as model.mtp.0.weight" in caplog.text


# ---- In 4 bits ------------------------------------------------------------------------------------------------------


def four_bit(model: Any) -> set[str]:
    found = [name for name, parameter in model.named_parameters() if hasattr(parameter, "quant_state")]
    return {".".join(name.split(".")[-3:-1]) for name in found}


def test_what_the_model_reads_itself_stays_in_16_bits(tmp_path: Path, caplog: Any) -> None:
    with caplog.at_level(logging.INFO, "dpo_peft"):
        model = load_base(saved("gemma3n_text", tmp_path))
    assert {"self_attn.q_proj", "mlp.up_proj"} <= four_bit(model)
    assert not [name for name in four_bit(model) if "coefs" in name]
    assert "altup.correction_coefs, altup.prediction_coefs, as the model reads their weights itself" in caplog.text
    assert model.train()(input_ids=torch.arange(20)[None]).logits.isfinite().all()  # where it clamps them


def test_linear_layers_of_its_own_kind_are_quantized_and_found_again(tmp_path: Path) -> None:
    folder = saved("falcon", tmp_path)
    first = load_base(folder, init_kwargs=FLOAT32)
    assert four_bit(first) == {
        "self_attention.query_key_value",
        "self_attention.dense",
        "mlp.dense_h_to_4h",
        "mlp.dense_4h_to_h",
    }
    assert type(zoo.build("falcon").transformer.h[0].mlp.dense_4h_to_h).__name__ == "FalconLinear"  # and is again
    again = load_base(folder, first.config.quantization_config, True, FLOAT32, class_name="AutoModelForCausalLM")
    keep_weights(first)
    keep_weights(again)
    assert torch.equal(logits(first.eval()), logits(again.eval()))
    # A record of before names nothing that is left out: then these layers were not quantized.
    before = transformers.BitsAndBytesConfig(load_in_4bit=True)
    old = load_base(folder, before, class_name="AutoModelForCausalLM")
    assert storage_report(old).quantized == 0


# ---- A life ---------------------------------------------------------------------------------------------------------


def trainer(model: str, folder: Path, **changed: Any) -> DPOTrainer:
    given = {"model_init_kwargs": FLOAT32, "save_strategy": "steps", "save_steps": 2, **changed}
    args = DPOConfig(**run_options(folder, **given))
    return DPOTrainer(model, args=args, train_dataset=pairs(), processing_class=words())


@pytest.mark.parametrize(
    "name",
    [
        "deepseek_v3",
        pytest.param("qwen3_5-vl", marks=pytest.mark.slow),
        pytest.param("gemma3-vl", marks=pytest.mark.slow),
    ],
)
def test_a_life_by_name(name: str, tmp_path: Path) -> None:
    """In NF4: trained, scored, merged, resumed, trained again, and served by PEFT on the class that the files name."""
    folder = saved(name, tmp_path)
    run = trainer(folder, tmp_path / "a")
    run.train()
    run.save_model()
    adapter = str(tmp_path / "a")
    trained = logits(run.model.eval())
    loaded = load_trained(adapter, device="cpu")
    assert type(loaded.model.get_base_model()) is type(run.model.get_base_model())
    assert torch.equal(logits(loaded.model), trained)

    report = merge_adapter(adapter, tmp_path / "merged", device="cpu")
    assert report.drift.mean_token < 1e-4
    named: Any = getattr(transformers, json.loads(Path(folder, "config.json").read_text())["architectures"][0])
    merged = logits(named.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval())
    assert (merged - trained).abs().max() < 1e-3

    resumed = trainer(folder, tmp_path / "a")
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert torch.equal(logits(resumed.model.eval()), trained)
    second = trainer(adapter, tmp_path / "b", reference="initial")
    assert torch.equal(logits(second.model.eval()), trained)

    # The base as the merge has it, in 16 bits: the adapter alone, by PEFT alone.
    plain = logits(named.from_pretrained(folder, dtype=torch.float32).eval())
    served = PeftModel.from_pretrained(named.from_pretrained(folder, dtype=torch.float32), adapter)
    onto = merge_adapter(adapter, tmp_path / "base16", "base16", dtype="float32", max_drift=9, device="cpu")
    merged = logits(named.from_pretrained(tmp_path / "base16", dtype=torch.float32).eval())
    assert onto.onto == "base16"
    torch.testing.assert_close(logits(served.eval()), merged, atol=2e-5, rtol=0)
    assert (merged - plain).abs().max() > 0.1


def test_peft_alone_would_put_such_an_adapter_on_the_experts() -> None:
    """Negative control of the life of DeepSeek V3: why its dense layers are saved as parameters."""
    layers = ["q_b_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(zoo.build("deepseek_v3"), lora(target_modules=layers))
    adapted = {name.split(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A." in name}
    assert any(".experts" in name for name in adapted)
    assert not any(name.endswith("mlp.gate_proj") for name in adapted)
