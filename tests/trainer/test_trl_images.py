"""With pictures too, the trajectory of training is TRL's: same model, pairs, processor and seed, step by step.

TRL encodes each picture four times a step, and computes its tokens twice a pass in rows of the model's own. What TRL's
tests promise for pairs with pictures stands here as well, each in a test of our own.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import vision_processors
from datasets import Dataset
from trainer_helpers import LOGPS, REWARDS, largest_difference, lora, ours, step_logs, text_pairs, theirs
from vision_models import build
from vision_processors import FAMILIES, PaliGemmaProcessor, build_processor, noise, picture_pairs

from dpo_peft import DPOTrainer
from dpo_peft.errors import DataError, OptionError
from dpo_peft.forward import score

DECODER = r".*(language_model|text_model)\.layers.*_proj"  # the vision tower stays as it is, in both


class TakesText(PaliGemmaProcessor):
    """PaliGemma's refuses text without a picture, and TRL gives it the completions so; nor can TRL take its labels."""

    def __call__(self, images: Any = None, text: Any = None, **options: Any) -> Any:
        if images is None:
            made = self.tokenizer(text, **options)
            made["token_type_ids"] = torch.ones_like(made["input_ids"])
        else:
            made = super().__call__(images=images, text=text, **options)
            made.pop("labels")
        return made


def run(make: Callable[..., Any], name: str, rows: Dataset, folder: Path, **changed: Any) -> Any:
    """Trains one of both trainers for six steps on a fresh copy of a family's model."""
    limit = {"max_length": None} if make is theirs else {}
    arguments = {"peft_config": lora(target_modules=DECODER), "max_steps": 6, **limit, **changed}
    trainer = make(build(name), rows, build_processor(name), folder, **arguments)
    trainer.train()
    return trainer


def assert_equal(mine: Any, trl: Any) -> None:
    """The steps are the same, and go somewhere."""
    assert abs(step_logs(mine)[0]["loss"] - step_logs(trl)[0]["loss"]) < 1e-6
    assert largest_difference(mine, trl, REWARDS) < 1e-5
    assert largest_difference(mine, trl, ["grad_norm"], relative=True) < 1e-5
    assert largest_difference(mine, trl, LOGPS) < 1e-4
    assert max(abs(log["rewards/margins"]) for log in step_logs(mine)) > 1e-2


def as_text(rows: Dataset, name: str, end: str = "") -> Dataset:
    """Returns the pairs as text, with the family's own token where the picture stands."""
    place = FAMILIES[name].placeholder

    def text(row: dict[str, Any]) -> dict[str, Any]:
        asked, chosen, rejected = (row[column][0]["content"] for column in ("prompt", "chosen", "rejected"))
        answers = {"chosen": chosen + end, "rejected": rejected + end}
        return {"prompt": f"{place} {asked}\n", **answers, "image": row["images"][0]}

    return Dataset.from_list([text(row) for row in rows])


def several(rows: Dataset) -> Dataset:
    """Returns the pairs with two pictures, none and one in turn, between the words of the question."""
    found = []
    for i, row in enumerate(rows):
        number = (2, 0, 1)[i % 3]
        parts = [{"type": "text", "text": "look "}]
        for j in range(number):
            parts += [{"type": "image"}, {"type": "text", "text": f" number {j} "}]
        pictures = [noise(1000 + 10 * i + j) for j in range(number)]
        found.append({**row, "prompt": [{"role": "user", "content": parts}], "images": pictures})
    return Dataset.from_list(found)


# ---- The same trajectory --------------------------------------------------------------------------------------------


@pytest.mark.sampled(99, slow=2)
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "paligemma"])
def test_steps_are_trls(name, tmp_path):
    mine, trl = (run(make, name, picture_pairs(16), tmp_path) for make in (ours, theirs))
    assert_equal(mine, trl)
    assert mine.forward_plan.shared


@pytest.mark.sampled(6, slow=2)
@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3", "idefics3", "llava", "internvl", "gemma4"])
def test_several_pictures_or_none(name, tmp_path):
    assert_equal(*(run(make, name, several(picture_pairs(16)), tmp_path) for make in (ours, theirs)))


@pytest.mark.sampled(5)
@pytest.mark.parametrize("name", ["paligemma", "qwen2_5_vl", "llava", "gemma3", "mistral3"])
def test_prompts_of_text(name, tmp_path, monkeypatch):
    """A picture stands where the text has the family's token. Ours ends a completion of text, as TRL's does without
    pictures; with some, TRL's does not."""
    mine = run(ours, name, as_text(picture_pairs(16), name), tmp_path)
    if name == "paligemma":
        monkeypatch.setitem(vision_processors.FAMILIES, name, replace(FAMILIES[name], processor=TakesText))
    assert_equal(mine, run(theirs, name, as_text(picture_pairs(16), name, end="</s>"), tmp_path))


def test_rows_without_pictures(tmp_path):
    """A processor stands where a tokenizer does."""
    assert_equal(*(run(make, "qwen2_5_vl", text_pairs(16), tmp_path) for make in (ours, theirs)))


def test_evaluation_and_accumulation(tmp_path):
    changed = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "gradient_checkpointing": True}
    evaluated = {"eval_dataset": picture_pairs(8, seed=1), "eval_strategy": "steps", "eval_steps": 3}
    mine, trl = (run(make, "smolvlm", picture_pairs(16), tmp_path, **changed, **evaluated) for make in (ours, theirs))
    assert_equal(mine, trl)
    found = [[log["eval_loss"] for log in one.state.log_history if "eval_loss" in log] for one in (mine, trl)]
    assert found[0] == pytest.approx(found[1], abs=1e-5)
    assert len(found[0]) == 2


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava"])
def test_the_comparison_sees_other_pictures(name, tmp_path):
    rows = picture_pairs(16)
    moved = [{**row, "images": other["images"]} for row, other in zip(rows, [*rows][1:] + [rows[0]], strict=True)]
    mine, trl = run(ours, name, Dataset.from_list(moved), tmp_path), run(theirs, name, rows, tmp_path)
    assert largest_difference(mine, trl, LOGPS) > 0.1


def test_without_gammas_blocks_prompts_are_not_shared(tmp_path, monkeypatch):
    """Were pictures to see themselves one way only, log-probs would differ; the probe notices before training."""
    trl = run(theirs, "gemma3", picture_pairs(16), tmp_path)
    monkeypatch.setattr(score, "block_ids", lambda config, batch: None)
    mine = run(ours, "gemma3", picture_pairs(16), tmp_path)
    assert not mine.forward_plan.shared
    assert "differ by 0.0" in str(mine.forward_plan)
    assert largest_difference(mine, trl, LOGPS) < 1e-4


# ---- What TRL promises besides --------------------------------------------------------------------------------------


def longest(trainer: DPOTrainer) -> list[int]:
    return [len(row["prompt_ids"]) + max(map(len, row["completion_ids"])) for row in trainer.train_dataset]


def test_a_limit_cuts_completions_and_no_picture(tmp_path):
    """16 pairs whose longest has 75 tokens, prompts at most 55."""
    whole = run(ours, "llava", picture_pairs(16), tmp_path, max_steps=1)
    limit = max(len(row["prompt_ids"]) for row in whole.train_dataset) + 3
    assert limit < max(longest(whole))
    mine, trl = (run(make, "llava", picture_pairs(16), tmp_path, max_length=limit) for make in (ours, theirs))
    assert max(longest(mine)) == limit
    assert_equal(mine, trl)


def test_keep_end_cuts_no_picture(tmp_path):
    """Rows that would lose a part of one are dropped and counted; where none is left, it says so. TRL refuses."""
    whole = run(ours, "llava", picture_pairs(16), tmp_path, max_steps=1)
    limit = sorted(longest(whole))[8]
    cut = run(ours, "llava", picture_pairs(16), tmp_path, max_length=limit, truncation_mode="keep_end", max_steps=1)
    token = build_processor("llava").image_token_id
    assert 0 < len(cut.train_dataset) < 16
    assert {row["prompt_ids"].count(token) for row in cut.train_dataset} == {16}
    with pytest.raises(DataError, match="image_cut.*keep_start"):
        run(ours, "llava", picture_pairs(16), tmp_path, max_length=20, truncation_mode="keep_end")


def test_a_model_of_text_refuses_pictures(tiny_llama, make_tokenizer, tmp_path):
    with pytest.raises(OptionError, match="LlamaForCausalLM takes no images"):
        ours(tiny_llama(), picture_pairs(4), build_processor("llava"), tmp_path)
    with pytest.raises((DataError, OptionError), match="images"):
        ours(tiny_llama(), picture_pairs(4), make_tokenizer(), tmp_path)


def test_the_reference_is_computed_before(tmp_path):
    """TRL refuses it with pictures."""
    rows = picture_pairs(16)
    at_each_step, before = (run(ours, "qwen2_5_vl", rows, tmp_path, precompute_ref_log_probs=p) for p in (False, True))
    assert largest_difference(at_each_step, before) < 1e-6
