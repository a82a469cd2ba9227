"""An adapter's way back from the disk: its record, its base as in training, its reference."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import load_dataset
from trainer_helpers import lora, options
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_peft import DPOConfig, DPOTrainer, ImplicitReward, OptionError, ReferenceMismatchError, quickstart
from dpo_peft.forward import sequence_logps
from dpo_peft.model import loading
from dpo_peft.model.adapter_source import AdapterSource, TrainedAdapter, load_trained
from dpo_peft.model.options import AdapterOptions
from dpo_peft.model.training_record import RECORD, read_training
from dpo_peft.reference.fingerprint import read_record


def rows(number: int = 8) -> Any:
    return load_dataset("json", data_files=quickstart.train_file(), split=f"train[:{number}]")


def run(model: Any, folder: Path, **changed: Any) -> DPOTrainer:
    """Two steps that move the adapter well away from its start, saved."""
    chosen = {"learning_rate": 3e-3, "max_steps": 2, **changed}
    args = DPOConfig(**options(folder, model_init_kwargs={"dtype": "float32"}, **chosen))
    trainer = DPOTrainer(model, args=args, train_dataset=rows(), peft_config=None)
    trainer.train()
    trainer.save_model()
    return trainer


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("first")
    run(quickstart.model_path(), folder, beta=0.3, max_length=200)
    return folder


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids = torch.randint(5, 200, (3, 12), generator=torch.Generator().manual_seed(0))
    return ids, torch.ones_like(ids), ids


def logps(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return sequence_logps(model, *batch())


def reference_logps(loaded: TrainedAdapter) -> torch.Tensor:
    """Under the loaded reference, by PEFT's own means."""
    if loaded.reference.adapter is None:
        with loaded.model.disable_adapter():
            return logps(loaded.model)
    loaded.model.set_adapter(loaded.reference.adapter)
    found = logps(loaded.model)
    loaded.model.set_adapter(loaded.policy)
    return found


def test_the_record_says_how_it_was_trained(first: Path) -> None:
    record = read_training(first)
    assert (record.loss_type, record.beta, record.reward) == (["sigmoid"], 0.3, "log_ratio")
    assert (record.max_length, record.truncation_mode) == (200, "keep_start")
    assert (record.precision, record.dtype) == ("no", "float32")
    assert record.quantization["bnb_4bit_quant_type"] == "nf4"
    assert (record.discount_gamma, record.ld_alpha) == (1.0, None)
    assert read_training(first.parent) is None  # no adapter there


def test_weights_of_single_tokens_are_recorded_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(quickstart.model_path(), tmp_path, ld_alpha=0.5)
    assert read_training(tmp_path).ld_alpha == 0.5
    ImplicitReward(str(tmp_path))
    assert "ld_alpha=0.5, which weigh single tokens" in caplog.text


def test_it_comes_back_as_it_was_trained(first: Path, tmp_path: Path) -> None:
    trainer = run(quickstart.model_path(), tmp_path, beta=0.3, max_length=200)
    loaded = load_trained(str(first))
    assert not loaded.model.training and not any(p.requires_grad for p in loaded.model.parameters())
    trainer.model.eval()
    assert torch.equal(logps(loaded.model), logps(trainer.model))
    with trainer.model.disable_adapter():
        assert torch.equal(reference_logps(loaded), logps(trainer.model))
    assert (logps(loaded.model) - reference_logps(loaded)).abs().min() > 0.01  # the adapter is on
    assert loaded.tokenizer.chat_template


def test_other_precision_is_another_model(first: Path) -> None:
    """The control of the test above: what the record decides does change the log-probs."""
    unquantized = load_trained(str(first), quantize=False)
    plain = AutoModelForCausalLM.from_pretrained(quickstart.model_path(), dtype=torch.float32)
    assert torch.equal(reference_logps(unquantized), logps(plain))
    assert (reference_logps(unquantized) - reference_logps(load_trained(str(first)))).abs().max() > 1e-3


def test_a_frozen_reference_is_found_or_asked_for(first: Path, tmp_path: Path) -> None:
    second, moved = tmp_path / "second", tmp_path / "moved"
    shutil.copytree(first, moved)
    run(str(moved), second, reference="initial")
    assert read_record(second).adapter == str(moved)
    for loaded in (load_trained(str(second)), load_trained(str(second), reference=str(first))):
        assert torch.allclose(reference_logps(loaded), logps(load_trained(str(first)).model), atol=1e-5)
    shutil.rmtree(moved)
    with pytest.raises(OptionError, match="give its folder as reference"):
        load_trained(str(second))
    with pytest.raises(ReferenceMismatchError, match="give the adapter that the training began with"):
        load_trained(str(second), reference=str(second))
    with pytest.raises(ReferenceMismatchError, match="without adapter"):
        load_trained(str(first), reference=str(second))


def test_another_base_is_noticed(first: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(quickstart.model_path())
    with torch.no_grad():
        base.model.norm.weight[0] += 0.01
    base.save_pretrained(tmp_path)
    with pytest.raises(ReferenceMismatchError, match="not the one that it was trained on: base weights"):
        load_trained(str(first), base=str(tmp_path))
    assert load_trained(str(first), base=str(tmp_path), check_base=False).policy == "default"


def test_other_4_bit_weights_alone_are_said(first: Path, monkeypatch: Any, caplog: pytest.LogCaptureFixture) -> None:
    """As between kinds of device: a code of one quantized weight differs, nothing else of the base does."""
    load = loading.load_base

    def other_codes(*args: Any) -> Any:
        base = load(*args)
        codes = base.model.layers[0].mlp.up_proj.weight
        codes.data[0] = codes.data[0] ^ 1
        return base

    def other_norm(*args: Any) -> Any:
        base = other_codes(*args)
        base.model.norm.weight.data[0] += 0.01
        return base

    monkeypatch.setattr(loading, "load_base", other_codes)
    load_trained(str(first))
    assert "other 4-bit weights than in training, and is the same otherwise" in caplog.text
    monkeypatch.setattr(loading, "load_base", other_norm)
    with pytest.raises(ReferenceMismatchError, match="not the one that it was trained on"):
        load_trained(str(first))


def test_without_reference_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(quickstart.model_path(), tmp_path, loss_type="simpo", beta=2.0)
    loaded = load_trained(str(tmp_path))
    assert loaded.reference is None and loaded.trained.reward == "mean_logp"
    monkeypatch.setattr(loading, "load_base", None)  # it is said before the base is loaded
    with pytest.raises(OptionError, match="reference has no effect"):
        load_trained(str(tmp_path), reference=str(tmp_path))


def test_what_it_refuses(first: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="is not an adapter"):
        load_trained(quickstart.model_path())
    with pytest.raises(OptionError, match="If it lies elsewhere, give base"):
        load_trained(str(first), base=str(tmp_path))
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    config = json.loads((first / "adapter_config.json").read_text())
    del config["auto_mapping"][RECORD]["beta"]
    (damaged / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ReferenceMismatchError, match="is damaged: 'beta'"):
        load_trained(str(damaged))
    (damaged / "adapter_config.json").write_text("{")
    with pytest.raises(ReferenceMismatchError, match="is not valid JSON"):
        read_training(damaged)


def test_an_adapter_of_another_program(base_folder: str, tmp_path: Path) -> None:
    from peft import get_peft_model

    plain = AutoModelForCausalLM.from_pretrained(base_folder)
    get_peft_model(plain, lora()).save_pretrained(tmp_path)
    loaded = load_trained(str(tmp_path), quantize=False, dtype="float32")
    assert loaded.trained is None and loaded.reference.adapter is None
    assert torch.equal(logps(loaded.model), logps(AutoModelForCausalLM.from_pretrained(base_folder)))


def test_a_source_reads_before_it_loads(first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Record, tokenizer and base's name need no weights; what it loads is what `load_trained` loads."""
    source = AdapterSource.of(AdapterOptions(str(first), check_base=False))
    assert source == AdapterSource(str(first), check_base=False)
    with monkeypatch.context() as patch:
        patch.setattr(loading, "load_base", None)
        assert source.read() == read_training(first)
        assert source.base_name == quickstart.model_path() and source.tokenizer().chat_template
        assert AdapterSource(str(first), base="elsewhere").base_name == "elsewhere"
        with pytest.raises(OptionError, match="is not an adapter"):
            AdapterSource(str(tmp_path)).read()
        with pytest.raises(OptionError, match="is not an adapter"):
            AdapterSource("models/no/adapter.gguf").images()
    assert torch.equal(logps(source.load().model), logps(load_trained(str(first)).model))
    with pytest.raises(OptionError, match="reference: no effect for .*AdapterSource"):
        ImplicitReward(source, reference="base")
    prompts, texts = ["Write a review."], ["The room was clean."]
    assert ImplicitReward(source)(prompts, texts) == ImplicitReward(str(first))(prompts, texts)


@pytest.mark.parametrize("made", ["base", "adapter with its tokenizer", "adapter", "adapter at a revision"])
def test_where_the_tokenizer_is_looked_for(made: str, first: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """The token that opens a private base opens its tokenizer too; `revision` is that of the name given."""
    folder, base = tmp_path / "adapter", "company/base"
    given = {"token": "a token", "cache_dir": "/cache", "revision": "v2"}
    name, where = base, given
    if made != "base":
        config = json.loads((first / "adapter_config.json").read_text()) | {"base_model_name_or_path": base}
        config |= {"revision": "v1"} if made == "adapter at a revision" else {}
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps(config))
        where = {key: value for key, value in given.items() if key != "revision"}
        where |= {"revision": "v1"} if made == "adapter at a revision" else {}
    if made == "adapter with its tokenizer":
        (folder / "tokenizer_config.json").write_text("{}")
        name, where = str(folder), given
    calls: list[tuple[str, dict[str, Any]]] = []

    def loads(name: str, trust_remote_code: bool = False, **where: Any) -> Any:
        calls.append((name, where))
        raise OSError("not here")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", loads)
    args = DPOConfig(**options(tmp_path, model_init_kwargs=given))
    with pytest.raises(OptionError, match="No tokenizer can be loaded"):
        DPOTrainer(base if made == "base" else str(folder), args=args, train_dataset=rows(1))
    assert calls == [(name, where)]
    if made != "base":  # to score with it: its base's revision is in its record
        with pytest.raises(OptionError, match="No tokenizer can be loaded"):
            AdapterSource(str(folder)).tokenizer()
        assert calls[-1] == (base, {"revision": "v1"} if made == "adapter at a revision" else {})
