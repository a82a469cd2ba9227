"""Completions of prompts with images are those of the model's own `generate`; saved adapters are served and merged."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import vision_models as vm
import vision_processors as vp
from vision_runs import Served, train

from dpo_peft.data.collator import PreferenceCollator
from dpo_peft.data.images import Images
from dpo_peft.data.prepare import prepare_dataset
from dpo_peft.forward import PackedBatch, completion_logps
from dpo_peft.merge import merge_adapter
from dpo_peft.model.generation import sample_completions
from dpo_peft.reference.adapter_off import reference_logps


def own_text(model: Any, processor: Any, row: Any, ids: list[int], new: int = 6) -> list[int]:
    """The likeliest completion by transformers alone: the processor's inputs, the model's `generate`."""
    content = [*({"type": "image"} for _ in row["images"]), {"type": "text", "text": row["prompt"][0]["content"]}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    given = processor(images=[row["images"]] if row["images"] else None, text=[text], return_tensors="pt")
    if "labels" in given:  # PaliGemma, whose processor lays out a template's text otherwise than a text
        ids_1P = torch.tensor([ids])
        given = {"input_ids": ids_1P, "token_type_ids": 0 * ids_1P, "pixel_values": given["pixel_values"]}
    ends = [processor.tokenizer.eos_token_id]
    made = model.generate(**given, max_new_tokens=new, do_sample=False, eos_token_id=ends, pad_token_id=0)
    return made[0, given["input_ids"].shape[1] :].tolist()


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", ["llava", "gemma3", "paligemma", "qwen2_5_vl", "qwen3_vl", "idefics3", "internvl"])
def test_a_batch_of_prompts_is_completed_as_each_alone(name: str) -> None:
    model, images = vm.build(name), Images(vp.build_processor(name))
    rows = [*vp.picture_pairs(2, 5, images=2), *vp.picture_pairs(2, 6)]
    rows += [{**row, "images": []} for row in vp.picture_pairs(2, 7)] * (name != "paligemma")  # which wants one
    prepared, _ = prepare_dataset(vp.Dataset.from_list(rows), images.tokenizer, images=images)
    rows = [rows[number] for number in prepared["row"]]  # random words may be the same twice
    assert len(rows) > 2
    pixels, prompts = [images.sample(row) for row in prepared], list(prepared["prompt_ids"])
    found = sample_completions(model, images.tokenizer, prompts, max_new_tokens=6, temperature=0, images=pixels)
    assert found == [own_text(model, images.processor, *both) for both in zip(rows, prompts, strict=True)]
    inverted = {key: -value if key == "pixel_values" else value for key, value in pixels[0].inputs.items()}
    pixels[0] = replace(pixels[0], inputs=inverted)
    wrong = sample_completions(model, images.tokenizer, prompts, max_new_tokens=6, temperature=0, images=pixels)
    assert wrong[0] != found[0] and wrong[1:] == found[1:]


@pytest.mark.slow
def test_the_saved_adapter_is_served_and_merged_with_its_processor(tmp_path: Path) -> None:
    rows = vp.picture_pairs(6, 3)
    trainer = train(tmp_path, "gemma3", rows)
    folder = Path(trainer.args.output_dir)
    served = Served(folder)
    batch = batch_of(trainer)
    policy = completion_logps(trainer.model, batch, trainer.forward_plan.scorer).logps_C.tolist()
    reference = reference_logps(trainer.model, batch, trainer.forward_plan.scorer).logps_C.tolist()
    expected = [served.logp(row, row[side][0]["content"]) for row in rows for side in ("chosen", "rejected")]
    assert policy == pytest.approx(expected, abs=1e-4)
    assert max(abs(p - r) for p, r in zip(policy, reference, strict=True)) > 0.1
    served.model.generate(**served.inputs(rows[0]), max_new_tokens=4)

    report = merge_adapter(str(folder), tmp_path / "merged", device="cpu", dataset=rows)
    assert report.drift.pairs == 6 and report.drift.mean_token < 1e-4 < report.drift.adapter_token
    merged = Served(tmp_path / "merged", adapter=False)
    assert merged.logp(rows[0], "a cat") == pytest.approx(served.logp(rows[0], "a cat"), abs=1e-4)
    assert "image-text-to-text" in Path(tmp_path, "merged", "README.md").read_text("utf-8")
    probed = merge_adapter(str(folder), tmp_path / "again", device="cpu").drift
    assert probed.mean_token < 1e-4 and probed.greedy_prompts == 9  # one of them with an image


def batch_of(trainer: Any) -> PackedBatch:
    rows = [trainer.train_dataset[i] for i in range(6)]
    return PackedBatch(**PreferenceCollator(trainer.forward_plan.shared, 0, trainer.images)(rows))
