"""With pictures too, the trajectory of training is TRL's: same model, pairs, processor and seed, step by step.

TRL encodes each picture four times a step and computes its tokens twice a pass, by the models' own rows; ours encodes
it once, and computes a prompt once. What TRL's trainer promises for pairs with pictures stands here as well.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from PIL import Image
from trainer_helpers import LOGPS, REWARDS, largest_difference, lora, ours, step_logs, text_pairs, theirs
from vision_models import build
from vision_processors import FAMILIES, build_processor, noise, picture_pairs

from dpo_peft import DPOTrainer
from dpo_peft.forward import images

# TRL can't: PaliGemma's processor takes no text without pictures, and TRL gives it the completions so.
TRAINED_BY_TRL = [name for name in FAMILIES if name != "paligemma"]
DECODER = r".*(language_model|text_model)\.layers.*_proj"  # a tower stays as it is, in both


def both(name: str, rows: Dataset, folder: Path, **changed: Any) -> tuple[Any, Any]:
    """Trains both trainers on fresh copies of a family's model."""
    trainers = []
    for make, others in ((ours, rows), (theirs, changed.pop("theirs", rows))):
        limit = {} if make is ours else {"max_length": None}
        arguments = {"peft_config": lora(target_modules=DECODER), "max_steps": 6, **limit, **changed}
        trainers.append(make(build(name), others, build_processor(name), folder, **arguments))
        trainers[-1].train()
    return trainers[0], trainers[1]


def trained(name: str, rows: Dataset, folder: Path, **changed: Any) -> DPOTrainer:
    """Trains ours."""
    arguments = {"peft_config": lora(target_modules=DECODER), "max_steps": 3, **changed}
    trainer = ours(build(name), rows, build_processor(name), folder, **arguments)
    trainer.train()
    return trainer


def assert_equal(mine: Any, trl: Any) -> None:
    """The steps are equal, and they move: within less than a thousandth of the way that they go."""
    assert largest_difference(mine, trl, [*REWARDS, "grad_norm"]) < 1e-4
    assert abs(step_logs(mine)[0]["loss"] - step_logs(trl)[0]["loss"]) < 1e-5
    assert largest_difference(mine, trl, ["loss"]) < 1e-5
    assert largest_difference(mine, trl, LOGPS) < 2e-4
    assert abs(step_logs(mine)[-1]["rewards/margins"]) > 1e-2


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", TRAINED_BY_TRL)
def test_losses_are_trls(name, tmp_path):
    mine, trl = both(name, picture_pairs(16), tmp_path)
    assert_equal(mine, trl)
    assert mine.forward_plan.shared or name == "none", "rows, as this family was not recognized"
