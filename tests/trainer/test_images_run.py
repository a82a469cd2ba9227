"""Runs over pairs with images: whatever way rows come, are batched, cached or resumed, the steps are the same.

The steps themselves are compared with TRL's in test_trl_images.py; here a plain run of ours is the measure, and for
data that TRL does not train with images, rows of the model's own, without shared prompts.
"""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from trainer_helpers import LOGPS, REWARDS, StopAt, adapter_weights, largest_difference, lora, ours, step_logs
from vision_models import build
from vision_processors import build_processor, noise, picture_pairs

from dpo_peft import DPOTrainer
from dpo_peft.data import images as data_images
from dpo_peft.errors import DataError

DECODER = r".*(language_model|text_model)\.layers.*_proj"


def run(rows: Any, folder: Path, family: str = "qwen2_5_vl", resume: str | None = None, **changed: Any) -> DPOTrainer:
    """Trains a fresh copy of a tiny model for four steps."""
    changed = {"max_steps": 4, "peft_config": lora(target_modules=DECODER), **changed}
    trainer = ours(build(family), rows, build_processor(family), folder, **changed)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def as_files(rows: Dataset, folder: Path) -> Dataset:
    """Returns the pairs with their images in files."""
    found = []
    for number, row in enumerate(rows):
        row["images"][0].save(folder / f"{number}.png")
        found.append({**row, "images": [str(folder / f"{number}.png")]})
    return Dataset.from_list(found)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> DPOTrainer:
    return run(picture_pairs(16), tmp_path_factory.mktemp("plain"))


WAYS: dict[str, dict[str, Any]] = {
    "workers": {"dataloader_num_workers": 2},
    "processes": {"dataset_num_proc": 2},
    "budget": {"max_tokens_per_microbatch": 400},
    "halves": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "rows": {"share_prompts": False},
    "own layers": {"fused_layers": False},
    "cached": {"cache_ref_log_probs": True},
    "before": {"precompute_ref_log_probs": True},
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("way", WAYS)
def test_the_way_makes_no_difference(way: str, plain: DPOTrainer, tmp_path: Path) -> None:
    other = run(picture_pairs(16), tmp_path, **WAYS[way])
    assert largest_difference(plain, other, REWARDS) < 1e-5
    assert abs(step_logs(plain)[-1]["loss"] - step_logs(other)[-1]["loss"]) < 1e-6


def test_a_stream_brings_its_images_along(tmp_path: Path) -> None:
    rows, ordered = picture_pairs(16), {"train_sampling_strategy": "sequential"}
    stored, streamed = run(rows, tmp_path, **ordered), run(rows.to_iterable_dataset(), tmp_path / "s", **ordered)
    assert largest_difference(stored, streamed, LOGPS) < 1e-5


def lists(rows: Dataset) -> Dataset:
    def three(row: dict[str, Any]) -> dict[str, Any]:
        worst = [{"role": "assistant", "content": row["rejected"][0]["content"] + " no"}]
        answers = [row["chosen"], row["rejected"], worst]
        return {"prompt": row["prompt"], "images": row["images"], "scores": [3.0, 2.0, 1.0], "completions": answers}

    return Dataset.from_list([three(row) for row in rows])


def singles(rows: Dataset) -> Dataset:
    return Dataset.from_list(
        [
            {"prompt": row["prompt"], "images": row["images"], "completion": row[side], "label": side == "chosen"}
            for row in rows
            for side in ("chosen", "rejected")
        ]
    )


def conversations(rows: Dataset) -> Dataset:
    """Whole conversations, whose first turn is shared and holds the image; the last one is asked again."""
    again = [{"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes."}]
    whole = [{side: [*row["prompt"], *row[side], *again] for side in ("chosen", "rejected")} for row in rows]
    return Dataset.from_list([{**one, "images": row["images"]} for one, row in zip(whole, rows, strict=True)])


KINDS: dict[str, tuple[Callable[[Dataset], Dataset], dict[str, Any]]] = {
    "kto": (singles, {"loss_type": "kto"}),
    "unpaired": (lambda rows: rows, {"loss_type": "kto", "unpair_preferences": True}),
    "lists": (lists, {"loss_type": "plackett_luce"}),
    "trajectories": (conversations, {"loss_type": "trajectory"}),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", KINDS)
def test_other_data_equal_rows_of_the_models_own(kind: str, tmp_path: Path) -> None:
    make, changed = KINDS[kind]
    shared, apart = (
        run(make(picture_pairs(8)), tmp_path / str(share), share_prompts=share, **changed) for share in (True, False)
    )
    assert shared.forward_plan.shared and not apart.forward_plan.shared
    losses = [[log["loss"] for log in step_logs(one)] for one in (shared, apart)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert len({round(loss, 6) for loss in losses[0]}) > 1


def test_a_resumed_run_ends_as_one_that_nobody_stopped(plain: DPOTrainer, tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2}
    run(picture_pairs(16), tmp_path, callbacks=[StopAt(2)], **saving)
    resumed = run(picture_pairs(16), tmp_path, resume="latest", **saving)
    ends = adapter_weights(plain)
    assert all(torch.equal(value, ends[name]) for name, value in adapter_weights(resumed).items())


def test_other_images_are_noticed_on_resume(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2}
    run(picture_pairs(16), tmp_path, callbacks=[StopAt(2)], **saving)
    rows = picture_pairs(16)
    moved = [{**row, "images": other["images"]} for row, other in zip(rows, [*rows][1:] + [rows[0]], strict=True)]
    for resumed, noticed in ((rows, False), (Dataset.from_list(moved), True)):
        caplog.clear()
        run(resumed, tmp_path, resume=str(tmp_path / "checkpoint-2"), **saving)
        assert ("train_dataset" in caplog.text) == noticed


def test_the_cache_is_told_by_the_image(tmp_path: Path) -> None:
    cache = {"cache_ref_log_probs": True, "ref_cache_dir": str(tmp_path / "cache"), "max_steps": 4}
    misses = []
    rows = as_files(picture_pairs(16), tmp_path)
    for number in range(3):
        if number == 2:
            noise(99).save(tmp_path / "0.png")
        trainer = run(rows, tmp_path / str(number), **cache)
        misses.append(trainer.reference.store.misses)
    assert misses == [32, 0, 2]


def test_a_changed_file_stops_the_run(tmp_path: Path) -> None:
    """Keys of the cache and the tokens of the prompt were made of the image that was there before."""
    rows = as_files(picture_pairs(4), tmp_path)
    trainer = ours(build("qwen2_5_vl"), rows, build_processor("qwen2_5_vl"), tmp_path / "out", max_steps=1)
    noise(99).save(tmp_path / "2.png")
    with pytest.raises(DataError, match="Row 2: its images are not those"):
        trainer.train()


def test_pixels_are_made_in_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tmp_path / "made"
    decode = data_images.decode

    def noted(content: bytes) -> Any:
        with made.open("a") as file:
            file.write(f"{os.getpid()}\n")
        return decode(content)

    trainer = ours(
        build("qwen2_5_vl"),
        picture_pairs(8),
        build_processor("qwen2_5_vl"),
        tmp_path / "out",
        dataloader_num_workers=1,
        max_steps=2,
        loss_type="kto",
        unpair_preferences=True,
    )
    monkeypatch.setattr(data_images, "decode", noted)
    loader = trainer.get_train_dataloader()
    next(iter(loader))
    assert made.exists() and str(os.getpid()) not in made.read_text().split()


def test_rows_that_are_left_out_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = as_files(picture_pairs(16), tmp_path)
    (tmp_path / "3.png").write_bytes((tmp_path / "3.png").read_bytes()[:200])
    (tmp_path / "5.png").write_bytes(b"")
    caplog.set_level(logging.INFO)
    trainer = run(rows, tmp_path / "out")
    assert trainer.data_reports["train"].dropped == {"unreadable_image": 2}
    assert trainer.data_reports["train"].dropped_rows["unreadable_image"] == [3, 5]
    with pytest.raises(DataError, match="row 3: unreadable_image"):
        run(rows, tmp_path / "other", on_unusable="error")
