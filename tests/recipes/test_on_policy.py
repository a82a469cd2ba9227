"""The recipe of on-policy rounds on the bundled task: each round raises the true reward, on fresh held-out samples."""

import importlib.util
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from paths import REPO

from dpo_peft.errors import ReferenceMismatchError
from dpo_peft.model.adapter_source import load_trained

RECIPE = REPO / "recipes" / "on_policy.py"


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("on_policy_recipe", RECIPE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def words(options: dict[str, Any]) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def reference_of(adapter: Path) -> str | None:
    """The frozen adapter that it was trained against; None for the base."""
    saved = json.loads((adapter / "adapter_config.json").read_text())
    return saved["auto_mapping"]["dpo_peft_reference"]["adapter"]


def deviations(before: dict[str, float], after: dict[str, float]) -> float:
    """Difference of two means of independent samples in its standard errors."""
    spread = math.hypot(before["standard_error"], after["standard_error"])
    return (after["reward"] - before["reward"]) / spread


@pytest.mark.slow
def test_each_round_raises_the_true_reward(recipe: ModuleType, tmp_path: Path) -> None:
    """Two rounds of six steps on 64 pairs each, judged by 64 fresh answers to held-out prompts."""
    options = {"rounds": 2, "prompts_per_round": 16, "candidates": 6, "steps": 6, "learning_rate": 2e-3}
    base, first, second = recipe.main(words({**options, "held_out": 64, "output_dir": tmp_path}))
    assert deviations(base, first) > 3 and deviations(first, second) > 3
    assert min(first["fluency"], second["fluency"]) > 0.9
    # On policy: the completions that a round learns from are as good as those of the adapter before it.
    spread = 0.62 / math.sqrt(96)  # of the mean of a round's answers, their standard deviation being that at the start
    assert abs(first["answers"] - base["reward"]) < 4 * math.hypot(spread, base["standard_error"])
    assert abs(second["answers"] - first["reward"]) < 4 * math.hypot(spread, first["standard_error"])
    assert second["answers"] - first["answers"] > 3 * spread  # and not those of the base
    # What the second round was trained against is the first one's adapter, frozen.
    assert reference_of(tmp_path / "round-1") is None
    assert load_trained(str(tmp_path / "round-2"), reference=str(tmp_path / "round-1")).reference.chosen
    with pytest.raises(ReferenceMismatchError):
        load_trained(str(tmp_path / "round-2"), reference=str(tmp_path / "round-2"))


@pytest.mark.slow
def test_against_the_base_in_two_steps(recipe: ModuleType, tmp_path: Path, monkeypatch: Any) -> None:
    """The other choice of the header; and by rejection sampling."""
    monkeypatch.setattr(recipe, "LONGEST", 40)
    options = {"rounds": 2, "prompts_per_round": 3, "candidates": 4, "steps": 2, "held_out": 2}
    figures = recipe.main(words({**options, "output_dir": tmp_path, "reference": "base", "method": "rso"}))
    assert json.loads((tmp_path / "rounds.json").read_text()) == figures and len(figures) == 3
    assert reference_of(tmp_path / "round-2") is None
