"""Rewards of completions to prompts with images: those of plain transformers and PEFT, with each row's own pixels."""

from pathlib import Path

import pytest
import torch
import vision_processors as vp
from datasets import Dataset
from vision_runs import Served, train

from dpo_peft.errors import DataError
from dpo_peft.model.adapter_source import AdapterSource
from dpo_peft.reward import ImplicitReward
from dpo_peft.reward.judgments import score_dataset

EXACT = 1e-5


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(train(tmp_path_factory.mktemp("llava"), "llava", vp.picture_pairs(8, images=2)).args.output_dir)


def test_rewards_are_those_of_the_served_model_with_each_rows_images(trained: Path) -> None:
    rows, served = vp.picture_pairs(6, seed=1, images=2), Served(trained)
    _, scored = score_dataset(AdapterSource(str(trained)), rows)
    expected = [[served.reward(row, row[side][0]["content"]) for side in ("chosen", "rejected")] for row in rows]
    found = [[score.reward for score in one] for one in scored.scores]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), atol=EXACT, rtol=0)
    swapped = Dataset.from_list([{**row, "images": rows[i - 1]["images"]} for i, row in enumerate(rows)])
    _, others = score_dataset(AdapterSource(str(trained)), swapped)
    assert abs(others.scores[0][0].reward - found[0][0]) > 10 * EXACT  # the pictures matter


def test_rewards_by_call_take_images_beside_the_prompt_or_in_it(trained: Path) -> None:
    reward, served = ImplicitReward(str(trained)), Served(trained)
    rows = list(vp.picture_pairs(3, seed=2, images=1))
    texts = [row["chosen"][0]["content"] for row in rows]
    expected = pytest.approx([served.reward(row, text) for row, text in zip(rows, texts, strict=True)], abs=EXACT)
    images = [row["images"] for row in rows]
    assert reward([row["prompt"] for row in rows], texts, images=images) == expected
    inside = [[{"role": "user", "content": [{"type": "image", "image": row["images"][0]},
              {"type": "text", "text": row["prompt"][0]["content"]}]}] for row in rows]  # fmt: skip
    assert reward(inside, texts, images=images) == expected  # TRL's trainers give both
    text = [{"role": "user", "content": "what is it"}]
    assert reward([text], ["a cat"]) == pytest.approx(
        [served.reward({"prompt": text, "images": []}, "a cat")], abs=EXACT
    )
    best = reward.rank(rows[0]["prompt"], texts, images=images[0])
    by_row = reward([rows[0]["prompt"]] * 3, texts, images=[images[0]] * 3)
    assert [by_row[i] for i in best] == sorted(by_row, reverse=True)
    with pytest.raises(DataError, match="image"):
        reward([text], ["a cat"], images=[[b"no image"]])
