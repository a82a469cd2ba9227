"""A base that is not what its name gives: made again as it was, refused before the training, or said."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from dpo_peft import DPOConfig, DPOTrainer, OptionError, ReferenceMismatchError, quickstart
from dpo_peft.hub.publishing import publish
from dpo_peft.merge import merge_adapter
from dpo_peft.model.adapter_source import TrainedAdapter, load_trained, read_training
from dpo_peft.model.rebuilding import quantization_options

BUNDLED = str(quickstart.model_path())
ROWS = [{"prompt": f"Play {i}?", "chosen": " great fun" + " now" * (i % 3), "rejected": " dull"} for i in range(6)]
IDS = torch.arange(5, 25)[None]


def base(folder: str = BUNDLED) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def options(folder: Path, **changed: Any) -> DPOConfig:
    given = {
        "per_device_train_batch_size": 2,
        "max_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "report_to": "none",
    }
    plain = {"bf16": False, "use_cpu": True, "save_strategy": "no", "gradient_checkpointing": False}
    return DPOConfig(str(folder), **{**given, **plain, "disable_tqdm": True, **changed})


def run(model: Any, folder: Path, rows: Any = ROWS, lora: dict[str, Any] | None = None, **changed: Any) -> DPOTrainer:
    """A short run, saved."""
    more = {name: changed.pop(name) for name in ("processing_class", "quantization_config") if name in changed}
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **(lora or {}))
    rows = Dataset.from_list(rows)
    trainer = DPOTrainer(model, args=options(folder, **changed), train_dataset=rows, peft_config=config, **more)
    trainer.train()
    trainer.save_model()
    return trainer


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def same(loaded: TrainedAdapter, trainer: DPOTrainer, ids: torch.Tensor = IDS) -> bool:
    return torch.equal(logits(loaded.model, ids), logits(trainer.model, ids))


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Llama with a head of its own, in bfloat16, with the bundled tokenizer."""
    folder = tmp_path_factory.mktemp("untied")
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, initializer_range=0.15))
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


# ---- Resized embeddings ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "tied"),
    [
        ("plain", False),
        *(
            pytest.param(kind, tied, marks=getattr(pytest.mark, mark))
            for kind, tied, mark in [
                ("modules_to_save", True, "slow"),
                ("plain", True, "rare"),
                ("modules_to_save", False, "rare"),
                ("trainable_token_indices", True, "slow"),
                ("trainable_token_indices", False, "rare"),
            ]
        ),
    ],
)
def test_added_tokens_come_back(kind: str, tied: bool, untied: str, tmp_path: Path) -> None:
    folder = BUNDLED if tied else untied
    wider = AutoTokenizer.from_pretrained(folder)
    wider.add_special_tokens({"additional_special_tokens": ["<|task|>", "<|end|>"]})
    new = wider.convert_tokens_to_ids(["<|task|>", "<|end|>"])
    rows = [{**row, "prompt": f"<|task|>{row['prompt']}<|end|>"} for row in ROWS]
    lora = {"plain": {}, "modules_to_save": {"modules_to_save": ["embed_tokens"]}}.get(kind, {kind: new})

    def resized() -> Any:
        model = base(folder)
        model.resize_token_embeddings(len(wider))
        return model

    given = {"processing_class": wider, "save_strategy": "steps", "save_steps": 1}
    trainer = run(resized(), tmp_path / "a", rows, lora, **given)
    ids = torch.tensor([[*new, 5, 6, 7]])
    loaded = load_trained(str(tmp_path / "a"), device="cpu")
    assert loaded.setup.vocabulary == len(wider)
    assert same(loaded, trainer, ids)
    assert merge_adapter(str(tmp_path / "a"), tmp_path / "merged", device="cpu").drift.mean_token < 1e-4
    # The rows are drawn at random again, and replaced by those of the checkpoint: the run ends as it did.
    again = DPOTrainer(
        resized(),
        args=options(tmp_path / "a", save_strategy="steps", save_steps=1),
        train_dataset=Dataset.from_list(rows),
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **lora),
        processing_class=wider,
    )
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-1"))
    assert torch.equal(logits(again.model, ids), logits(trainer.model, ids))
    model = {"model_init_kwargs": {"dtype": "float32"}, "quantize_base": False}
    more = DPOTrainer(
        str(tmp_path / "a"),
        args=options(tmp_path / "b", reference="initial", **model),
        train_dataset=Dataset.from_list(rows),
    )
    assert torch.equal(logits(more.model, ids), logits(trainer.model, ids))


def test_fewer_embeddings_come_back(tmp_path: Path) -> None:
    """A vocabulary that was cut, of which the adapter's tokenizer says nothing."""
    model = base()
    model.resize_token_embeddings(2040)
    trainer = run(model, tmp_path)
    assert same(load_trained(str(tmp_path), device="cpu"), trainer)


# ---- Quantization and class -----------------------------------------------------------------------------------------

QUANTIZED = {
    "8 bits": {"load_in_8bit": True},
    "8 bits, parts": {"load_in_8bit": True, "llm_int8_skip_modules": ["lm_head", "o_proj"], "llm_int8_threshold": 3.0},
    "fp4, parts": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "llm_int8_skip_modules": ["lm_head", "v_proj"]},
    "stored": {"load_in_4bit": True, "bnb_4bit_quant_storage": "float32"},
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", QUANTIZED)
def test_a_quantized_base_comes_back(name: str, untied: str, tmp_path: Path) -> None:
    given = BitsAndBytesConfig(**QUANTIZED[name])
    trainer = run(untied, tmp_path / "a", quantization_config=given)
    first = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert first["rewards/margins"] == 0
    assert QUANTIZED[name].items() <= quantization_options(given).items()
    loaded = load_trained(str(tmp_path / "a"), device="cpu")
    assert same(loaded, trainer)
    report = merge_adapter(str(tmp_path / "a"), tmp_path / "merged", dtype="float32", device="cpu")
    assert report.onto == "dequantized" and report.drift.mean_token < 0.03
    again = DPOTrainer(
        str(tmp_path / "a"), args=options(tmp_path / "b", reference="initial"), train_dataset=Dataset.from_list(ROWS)
    )
    assert torch.equal(logits(again.model), logits(trainer.model))


def test_what_is_recorded_of_a_usual_quantization_is_as_before() -> None:
    usual = {"load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype"}
    assert quantization_options(BitsAndBytesConfig(load_in_4bit=True)).keys() == usual
    assert quantization_options(BitsAndBytesConfig()) == quantization_options(None) == {}


def test_a_class_that_is_not_the_usual_one_comes_back(tmp_path: Path) -> None:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    text = {"vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    text |= {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2}
    model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision))
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    given = Qwen2VLForConditionalGeneration.from_pretrained(tmp_path / "base")
    trainer = run(given, tmp_path / "a", processing_class=tokenizer)
    loaded = load_trained(str(tmp_path / "a"), device="cpu")
    assert loaded.setup.base_class == "Qwen2VLForConditionalGeneration"
    assert same(loaded, trainer)


class Own(LlamaForCausalLM):
    """A class that no other program has."""


def test_what_could_not_be_loaded_again_is_refused(untied: str, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    t5 = T5ForConditionalGeneration(T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    for model, said in (
        (Own.from_pretrained(untied), r"a Own of .*: make it known by AutoModelForCausalLM.register"),
        (t5, r"an encoder-decoder \(T5ForConditionalGeneration\): pass a causal LM"),
        (base().model, r"a model without a language-model head \(LlamaModel\): pass a causal LM"),
    ):
        with pytest.raises(OptionError, match=said):
            run(model, tmp_path, processing_class=tokenizer)


# ---- Changed in memory ----------------------------------------------------------------------------------------------


def merged_into(model: Any) -> Any:
    model.model.layers[0].mlp.up_proj.weight.data += 0.001
    return model


def edited(model: Any) -> Any:
    model.model.norm.weight.data[0] += 0.5
    return model


@pytest.mark.sampled(2)
@pytest.mark.parametrize("change", [merged_into, edited])
def test_a_changed_base_is_said_from_start_to_end(change: Any, tmp_path: Path, caplog: Any) -> None:
    with caplog.at_level(logging.WARNING):
        run(change(base()), tmp_path / "a")
    start, *end = [r.getMessage() for r in caplog.records if "1 of " in r.getMessage()]
    assert "is not what the files of" in start and "save the model (save_pretrained)" in start
    assert end and "names" in end[0] and "differs from the model that was trained" in end[0]
    with pytest.raises(ReferenceMismatchError, match="changed in memory .1 of .* give the changed model, saved, as"):
        load_trained(str(tmp_path / "a"), device="cpu")
    card = (tmp_path / "a" / "README.md").read_text()
    assert "**Not the base as published:** 1 of " in card and "fits that changed model alone" in card
    check = publish(tmp_path / "a", "me/adapter", base_model="someone/base", dry_run=True)
    assert any(note.startswith("the base was changed before the training (1 of") for note in check.notes)
    change(base()).save_pretrained(tmp_path / "changed")
    assert load_trained(str(tmp_path / "a"), base=str(tmp_path / "changed"), device="cpu").policy == "default"


def test_without_reference_a_changed_base_is_said_too(tmp_path: Path, caplog: Any) -> None:
    run(edited(base()), tmp_path, loss_type="orpo")
    caplog.clear()
    load_trained(str(tmp_path), device="cpu")
    assert "changed in memory (1 of" in caplog.text


@pytest.mark.sampled(2)
@pytest.mark.parametrize("how", ["4 bits", "8 bits", "bfloat16 widened", "float16"])
def test_a_base_as_it_is_in_its_files_is_not_called_changed(how: str, untied: str, tmp_path: Path) -> None:
    kinds = {"4 bits": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "8 bits": {"load_in_8bit": True}}
    quantization = BitsAndBytesConfig(**kinds[how]) if how in kinds else None
    dtype = torch.float16 if how == "float16" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(untied, dtype=dtype, quantization_config=quantization)
    run(model.float() if "widened" in how else model, tmp_path)
    record = read_training(tmp_path)
    assert record is not None
    assert (record.base_changed, record.vocabulary, record.base_class) == (None, None, None)


def test_a_change_of_4_bit_weights_is_found(untied: str, tmp_path: Path) -> None:
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(untied, dtype=torch.bfloat16, quantization_config=quantization)
    model.model.layers[1].mlp.up_proj.weight.data[:64] = 0
    run(model, tmp_path)
    entry = json.loads((tmp_path / "adapter_config.json").read_text())["auto_mapping"]["dpo_peft_training"]
    assert entry["base_changed"].endswith("such as model.layers.1.mlp.up_proj.weight")
