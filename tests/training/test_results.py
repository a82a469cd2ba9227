"""What a run ends with: a finished run is not written over, a moved one finds its best checkpoint and its reference,
and a disk that fails at the end loses nothing.
"""

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_kills import died, in_child
from peft import PeftModel
from safetensors.torch import load_file
from trainer_helpers import StopAt, adapter_weights, id_pairs, lora, ours, text_pairs

import dpo_peft.trainer
from dpo_peft.cli import main
from dpo_peft.disk import one_writer
from dpo_peft.errors import CheckpointError, OptionError
from dpo_peft.evaluation.samples import KeptRows
from dpo_peft.manifests import check_one_run
from dpo_peft.model.adapter_source import load_trained
from dpo_peft.training.checkpoints import recover


def build(tiny_llama: Any, make_tokenizer: Any, folder: Path, **changed: Any) -> Any:
    return ours(tiny_llama(), id_pairs(8), make_tokenizer(), folder, **{"max_steps": 2, **changed})


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- A finished run -------------------------------------------------------------------------------------------------


@pytest.mark.attack("input as output")
def test_a_finished_run_is_replaced_only_if_asked(tiny_llama, make_tokenizer, tmp_path) -> None:
    first = build(tiny_llama, make_tokenizer, tmp_path, save_strategy="steps", save_steps=1)
    first.train()
    first.save_model()
    first.model.save_pretrained(tmp_path)  # as scripts do it once more; the same bytes
    first.processing_class.save_pretrained(tmp_path)
    check_one_run(tmp_path)
    before = contents(tmp_path)
    assert not [name for name in before if name.startswith(".")]
    with pytest.raises(OptionError, match="holds adapter_config.json, metrics.json.*overwrite_output_dir=True"):
        build(tiny_llama, make_tokenizer, tmp_path).train()
    elsewhere = build(tiny_llama, make_tokenizer, tmp_path / "other")
    with pytest.raises(OptionError, match="holds README.md"):  # a file of the user's is no less
        (tmp_path / "other").mkdir(exist_ok=True)
        (tmp_path / "other" / "README.md").write_text("mine")
        elsewhere.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert contents(tmp_path) == {**before, "other/README.md": b"mine"}
    build(tiny_llama, make_tokenizer, tmp_path).train(resume_from_checkpoint="latest")
    first.train()  # its own
    again = build(tiny_llama, make_tokenizer, tmp_path, overwrite_output_dir=True, seed=4)
    again.train()
    again.save_model()
    check_one_run(tmp_path)
    assert contents(tmp_path)["adapter_model.safetensors"] != before["adapter_model.safetensors"]


@pytest.mark.attack("input as output")
def test_rows_of_the_user_are_not_taken_for_samples(tmp_path) -> None:
    class Start:
        global_step = 0

    kept = KeptRows(str(tmp_path), "samples.jsonl")
    (tmp_path / "samples.jsonl").write_text('{"prompt": "mine"}\n')
    with pytest.raises(OptionError, match="samples.jsonl is in the way"):
        kept.on_train_begin(None, Start(), None)  # type: ignore[arg-type]
    (tmp_path / "samples.jsonl").write_text('{"step": 0, "prompt": "of a killed run"}\n')
    kept.on_train_begin(None, Start(), None)  # type: ignore[arg-type]
    assert os.listdir(tmp_path) == []


# ---- A folder that was moved ----------------------------------------------------------------------------------------

# The loss falls, so the greatest one is that of the first step.
BEST_FIRST = {
    "metric_for_best_model": "eval_loss",
    "greater_is_better": True,
    "load_best_model_at_end": True,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "max_steps": 3,
    "learning_rate": 1e-2,
}


def interrupted(tiny_llama: Any, make_tokenizer: Any, folder: Path, **changed: Any) -> None:
    options = {**BEST_FIRST, "callbacks": [StopAt(2)], "eval_dataset": id_pairs(4), **changed}
    build(tiny_llama, make_tokenizer, folder, **options).train()


@pytest.mark.attack("moved folder")
def test_a_moved_run_finds_its_own_best_checkpoint(tiny_llama, make_tokenizer, tmp_path, caplog) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    interrupted(tiny_llama, make_tokenizer, old)
    old.rename(new)
    interrupted(tiny_llama, make_tokenizer, old, seed=4)  # another run, where the best one was
    state = json.loads((new / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == "checkpoint-1"
    best = load_file(new / "checkpoint-1" / "adapter_model.safetensors")

    def resume(folder: Path, **changed: Any) -> Any:
        options = {**BEST_FIRST, "eval_dataset": id_pairs(4), **changed}
        trainer = build(tiny_llama, make_tokenizer, folder, **options)
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
        return trainer

    shutil.copytree(new, tmp_path / "without")
    resumed = resume(new)
    assert resumed.state.best_model_checkpoint == str(new / "checkpoint-1") and resumed.state.global_step == 3
    for name, weight in adapter_weights(resumed).items():
        assert torch.equal(weight, best[name.replace(".default", "")])
    assert "does not exist anymore" not in caplog.text

    without = tmp_path / "without"
    shutil.rmtree(without / "checkpoint-1")
    with pytest.raises(CheckpointError, match="checkpoint-1, can't be used: .*does not exist.*Put it beside"):
        resume(without)
    shutil.copytree(old / "checkpoint-1", without / "checkpoint-1")
    with pytest.raises(CheckpointError, match=r"checkpoint-1 is another run's \(its log differs\)"):
        resume(without)
    with caplog.at_level(logging.WARNING):
        assert resume(without, load_best_model_at_end=False).state.best_global_step == 1
    assert "is another run's (its log differs). It is forgotten." in " ".join(caplog.text.split())


@pytest.mark.attack("input as output")
def test_a_limit_of_one_leaves_other_programs_checkpoints(tiny_llama, make_tokenizer, tmp_path) -> None:
    (tmp_path / "checkpoint-9").mkdir()
    (tmp_path / "checkpoint-9" / "model.safetensors").write_text("TRL's")
    options = {**BEST_FIRST, "save_total_limit": 1, "eval_dataset": id_pairs(4), "max_steps": 2}
    trainer = build(tiny_llama, make_tokenizer, tmp_path, **options)
    trainer.train()
    assert trainer.args.save_total_limit == 1
    assert [path.name for path in sorted(tmp_path.glob("*-*"))] == ["checkpoint-1", "checkpoint-2", "checkpoint-9"]


@pytest.mark.attack("moved folder")
def test_a_moved_reference_is_found_by_its_fingerprint(base_folder, tmp_path) -> None:
    """Recorded as an absolute path, and moved with the run; one of the same name that lies nearer is another."""
    first = tmp_path / "first"
    base_folder = str(shutil.copytree(base_folder, first / "base"))
    for seed, place in ((1, first / "adapters" / "sft"), (2, first / "runs" / "sft")):
        adapted = ours(base_folder, text_pairs(4), None, tmp_path / f"made {seed}", seed=seed, **FLOAT32)
        adapted.train()
        adapted.model.save_pretrained(place)
    options = {**FLOAT32, "reference": str(first / "adapters" / "sft")}
    trainer = ours(base_folder, text_pairs(4), None, first / "runs" / "dpo", **options)
    trainer.train()
    trainer.save_model()
    straight = load_trained(str(first / "runs" / "dpo"))
    assert straight.reference is not None and straight.reference.adapter is not None
    first.rename(tmp_path / "second")
    moved = load_trained(str(tmp_path / "second" / "runs" / "dpo"))
    assert moved.reference is not None and moved.reference.source == str(tmp_path / "second" / "adapters" / "sft")
    assert moved.model.get_base_model().config._name_or_path == str(tmp_path / "second" / "base")
    assert isinstance(moved.model, PeftModel) and len(moved.model.peft_config) == 2
    shutil.rmtree(tmp_path / "second" / "adapters")
    with pytest.raises(ValueError, match="was trained against the reference .*give the adapter that the training"):
        load_trained(str(tmp_path / "second" / "runs" / "dpo"))


FLOAT32: dict[str, Any] = {
    "max_steps": 1,
    "quantize_base": False,
    "model_init_kwargs": {"dtype": "float32"},
    "peft_config": lora(init_lora_weights=False),
}


# ---- A disk that fails at the end -----------------------------------------------------------------------------------


@pytest.mark.attack("full disk")
def test_a_full_disk_at_the_end_loses_nothing(base_folder, tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in text_pairs(8)))
    words = "--use_cpu true --bf16 false --dtype float32 --quantize_base false --max_steps 1 --save_strategy no"
    command = ["train", "--model_name_or_path", base_folder, "--dataset_name", str(tmp_path / "rows.jsonl")]
    command += ["--output_dir", str(tmp_path / "run"), "--report_to", "none", *words.split()]
    save, temporary = dpo_peft.trainer.save_adapter, tmp_path / "temporary"

    def full(trainer: Any, adapter: str, folder: Path) -> None:
        save(trainer, adapter, folder)
        if "run" in folder.parts:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(dpo_peft.trainer, "save_adapter", full)
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    assert main(command) == 3
    said = capsys.readouterr().err
    (rescued,) = temporary.glob("dpo-peft-*/adapter_config.json")
    assert "No space left on device" in said and f"Meanwhile it is in {rescued.parent}." in said
    check_one_run(rescued.parent)
    assert sorted(os.listdir(tmp_path)) == ["rows.jsonl", "temporary"]  # nothing was written, the folder went again


@pytest.mark.attack("killed while writing")
@pytest.mark.slow
def test_a_kill_in_the_final_save_leaves_one_run(tiny_llama, make_tokenizer, tmp_path) -> None:
    """A trainer's own save over an earlier run's, dying before every seventh file operation."""
    saved = []
    for number, options in enumerate(({"peft_config": lora(lora_alpha=8)}, {"peft_config": lora(lora_alpha=64)})):
        trainer = build(tiny_llama, make_tokenizer, tmp_path / str(number) / "run", beta=0.1 + number, **options)
        trainer.train()
        trainer.save_model()
        saved.append(contents(tmp_path / str(number) / "run"))
    ended, moment, found = False, 0, []
    while not ended:
        folder = shutil.copytree(tmp_path / "0" / "run", tmp_path / str(moment) / "again" / "run")
        ended = not died(in_child(lambda folder=folder: trainer.save_model(str(folder)), moment))
        check_one_run(folder)
        with one_writer("output_dir", folder, inside=True):
            recover(folder)
        found.append(saved.index(contents(folder)))  # a mixture is in neither place
        moment += 7
    assert found == sorted(found) and set(found) == {0, 1} and len(found) > 10
