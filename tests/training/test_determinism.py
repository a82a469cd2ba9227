"""`full_determinism`: any split of an optimizer batch, and a run that is resumed with another one, ends in the same
bytes of the adapter's file."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from objective_rows import rows_for
from trainer_helpers import StopAt, adapter_weights, lora, ours, step_logs, text_pairs

from dpo_peft import DPOConfig, OptionError

SPLITS: list[dict[str, Any]] = [
    {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1},
    {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_tokens_per_microbatch": 60},
    {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
]
WHOLE, *OTHERS = SPLITS
STEPS, STOP = 4, 2  # of 8, 8, 4 and 8 rows: a pass over the data ends unevenly
DROPOUT = {"peft_config": lora(lora_dropout=0.2), "disable_dropout": False}
CACHED = {"precompute_ref_log_probs": True, "precompute_ref_tokens": 1}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 2}
CASES: dict[str, dict[str, Any]] = {
    "sigmoid, dropout, evaluated": {"loss_type": "sigmoid", **DROPOUT, **EVALUATED},
    "kto": {"loss_type": "kto"},
    "mix": {"loss_type": ["aot", "sft"], "loss_weights": [1.0, 0.3], "max_grad_norm": 0.01},
    "one row per completion": {"loss_type": "sigmoid", "use_weighting": True, "share_prompts": False},
    "nf4, dropout": {"loss_type": "sigmoid", "nf4": True, **DROPOUT},
    "nf4, cached": {
        "loss_type": "apo_zero",
        "nf4": True,
        "precompute_ref_log_probs": True,
        "precompute_ref_tokens": 1,
    },
}


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Takes back what the option sets for the whole process."""
    environment, cudnn = dict(os.environ), torch.backends.cudnn
    flags = cudnn.deterministic, cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(False)
    cudnn.deterministic, cudnn.benchmark = flags
    os.environ.clear()
    os.environ.update(environment)


class Runs:
    """Trains one case by several splits, each in a folder of its own."""

    def __init__(self, base_folder: str, tiny_llama: Any, tokenizer: Any, folder: Path):
        self.base_folder, self.tiny_llama, self.tokenizer, self.folder = base_folder, tiny_llama, tokenizer, folder

    def trainer(self, name: str, case: dict[str, Any], **changed: Any) -> Any:
        given = {"full_determinism": True, "max_steps": STEPS, **case, **changed}
        loss, nf4 = given["loss_type"], given.pop("nf4", False)
        rows = rows_for(loss if isinstance(loss, str) else loss[0], 20)
        if "eval_strategy" in given:
            given["eval_dataset"] = rows_for(loss, 5, seed=1)
        model = self.base_folder if nf4 else self.tiny_llama()
        if "precompute_ref_log_probs" in given:
            given = {"ref_cache_dir": str(self.folder / name / "cache"), **given}
        given = {"bf16": nf4, **given}
        return ours(model, rows, None if nf4 else self.tokenizer, self.folder / name, **given)

    def train(self, name: str, case: dict[str, Any], resume: Any = None, **changed: Any) -> tuple[bytes, Any]:
        """Returns the bytes of the saved adapter, and the log without counts that a split or a resume moves."""
        trainer = self.trainer(name, case, **changed)
        trainer.train(resume)
        trainer.save_model(str(self.folder / name / "saved"))
        logs = [
            {k: v for k, v in log.items() if not k.startswith(("epoch", "ref_cache/"))} for log in step_logs(trainer)
        ]
        return (self.folder / name / "saved" / "adapter_model.safetensors").read_bytes(), logs

    def interrupted(self, name: str, case: dict[str, Any]) -> tuple[bytes, Any]:
        """The same of a run that is resumed with another split than it began with."""
        saving = {"save_strategy": "steps", "save_steps": STOP}
        before, _ = self.train(name, case, **OTHERS[2], **saving, callbacks=[StopAt(STOP)])
        after, logs = self.train(name, case, resume=True, **OTHERS[0], **saving)
        assert before != after
        return after, logs


@pytest.fixture
def runs(base_folder: str, tiny_llama: Any, make_tokenizer: Any, tmp_path: Path) -> Runs:
    return Runs(base_folder, tiny_llama, make_tokenizer(), tmp_path)


@pytest.mark.slow
@pytest.mark.sampled(6, slow=2)
@pytest.mark.parametrize("name", CASES)
def test_any_split_ends_in_the_same_bytes(name: str, runs: Runs, caplog: Any) -> None:
    """Two runs, each split, and an interrupted run that is resumed with another one. The log is the same too.

    Without the option a run of single rows, which accumulates them, ends in these bytes, and the control, another
    split, in others.
    """
    whole, logs = runs.train("whole", CASES[name], **WHOLE)
    again = {str(split): runs.train(f"split {i}", CASES[name], **split) for i, split in enumerate(SPLITS)}
    again["resumed"] = runs.interrupted("resumed", CASES[name])
    assert {split: weights == whole for split, (weights, _) in again.items()} == dict.fromkeys(again, True)
    for split, (_, other) in again.items():
        assert other == logs, split
    assert "options that change the run" not in caplog.text
    off = [runs.train(f"off {i}", CASES[name], full_determinism=False, **SPLITS[i])[0] for i in (0, 3)]
    assert off[1] == whole != off[0]


def test_another_optimizer_batch_is_told(runs: Runs, caplog: Any) -> None:
    """Only the split is free: 8 rows per step before, 4 now."""
    case = {"loss_type": "sigmoid", "save_strategy": "steps", "save_steps": STOP}
    runs.train("a", case, **WHOLE, callbacks=[StopAt(STOP)])
    runs.train("a", case, resume=True, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert "rows of an optimizer batch: 8 before, 4 now" in caplog.text


@pytest.mark.slow
def test_values_of_other_batches_are_not_read(runs: Runs) -> None:
    """A cache that a run without the option has filled does not change the bytes; the control: it is read without."""
    case = {"loss_type": "sigmoid", "precompute_ref_log_probs": True, "max_steps": 1}
    shared = {"ref_cache_dir": str(runs.folder / "shared")}
    alone, _ = runs.train("alone", case)
    runs.train("filling", case, full_determinism=False, **shared)
    behind = runs.trainer("behind", case, **shared)
    behind._prepare_run()
    assert runs.train("after", case, **shared)[0] == alone
    assert behind.reference.store.stored == 40
    unread = runs.trainer("unread", case, full_determinism=False, **shared)
    unread._prepare_run()
    assert unread.reference.store.stored == 0


def test_masks_that_would_not_repeat_are_refused(tmp_path: Path) -> None:
    given = {
        "output_dir": str(tmp_path),
        "loss_type": "kto",
        "per_device_train_batch_size": 8,
        "disable_dropout": False,
    }
    DPOConfig(**given, use_cpu=True, bf16=False)
    with pytest.raises(OptionError, match="full_determinism"):
        DPOConfig(**given, use_cpu=True, bf16=False, full_determinism=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", CASES)
def test_any_split_ends_in_the_same_bytes_on_a_gpu(name: str, runs: Runs) -> None:
    """The same on a CUDA device, in bfloat16."""
    case = {**CASES[name], "use_cpu": False, "bf16": True}
    whole, _ = runs.train("whole", case, **WHOLE)
    again = {str(split): runs.train(f"split {i}", case, **split)[0] for i, split in enumerate(SPLITS)}
    again["resumed"], _ = runs.interrupted("resumed", case)
    assert {split: weights == whole for split, weights in again.items()} == dict.fromkeys(again, True)
    off = [runs.train(f"off {i}", case, full_determinism=False, **SPLITS[i])[0] for i in (0, 3)]
    assert off[0] != off[1]


def test_a_stream_is_resumed_with_another_split(tiny_llama: Any, make_tokenizer: Any, tmp_path: Path) -> None:
    """In its second pass: 8 rows are 2 steps of 4."""

    def weights(name: str, batch: int, entries: int, stop: int = 0, resume: bool = False) -> dict[str, torch.Tensor]:
        options = {"max_steps": 5, "save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "constant"}
        options |= {"per_device_train_batch_size": batch, "gradient_accumulation_steps": entries}
        given = {"full_determinism": True, "callbacks": [StopAt(stop)] if stop else None}
        rows = text_pairs(8).to_iterable_dataset()
        trainer = ours(tiny_llama(), rows, make_tokenizer(), tmp_path / name, **options, **given)
        trainer.train(resume_from_checkpoint=resume or None)
        return adapter_weights(trainer)

    straight = weights("straight", 4, 1)
    weights("stopped", 4, 1, stop=3)
    resumed = weights("stopped", 2, 2, resume=True)
    assert all(torch.equal(resumed[key], straight[key]) for key in straight)
