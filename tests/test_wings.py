"""The core trains without its wings: each folder is deleted in a copy of the package, and the losses are the same."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from paths import REPO

from dpo_peft.quickstart import model_path, train_file

WINGS = (
    "evaluation fused planning artifacts reward merge hub pairs chat conversion report preview quickstart cli".split()
)

TRAIN = """
import json, sys
import dpo_peft
from datasets import Dataset
from dpo_peft import DPOConfig, DPOTrainer
loaded = {name.split(".")[1] for name in sys.modules if name.startswith("dpo_peft.")}
model, rows, folder = sys.argv[1:]
args = DPOConfig(folder, max_steps=2, per_device_train_batch_size=4, logging_steps=1, report_to="none", use_cpu=True,
                 bf16=False, quantize_base=False, optim="sgd", learning_rate=0.1, max_length=128,
                 train_sampling_strategy="sequential", model_init_kwargs={"dtype": "float32"})
trainer = DPOTrainer(model, args=args, train_dataset=Dataset.from_list(json.loads(rows)))
trainer.train()
trainer.save_model()
losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
print(json.dumps({"package": dpo_peft.__file__, "loaded": sorted(loaded), "losses": losses}))
"""


pytestmark = pytest.mark.slow


def train_without(wings: list[str], folder: Path) -> dict[str, object]:
    """Trains two steps with a copy of the package that lacks some folders."""
    copy = folder / "dpo_peft"
    shutil.copytree(REPO / "dpo_peft", copy, ignore=shutil.ignore_patterns("__pycache__"))
    for wing in wings:
        shutil.rmtree(copy / wing)
    lines = Path(train_file()).read_text("utf-8").splitlines()[:8]
    rows = json.dumps([json.loads(line) for line in lines])
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, str(model_path()), rows, str(folder / "run")],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (folder / "run" / "adapter_model.safetensors").is_file()
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["package"] == str(copy / "__init__.py")
    return result


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """The run with all wings."""
    return train_without([], tmp_path_factory.mktemp("whole"))


def test_the_trainer_loads_no_wing(whole: dict[str, object]) -> None:
    assert not set(whole["loaded"]) & set(WINGS)  # type: ignore[call-overload]


def test_the_trainer_trains_without_any_wing(whole: dict[str, object], tmp_path: Path) -> None:
    losses = train_without(WINGS, tmp_path)["losses"]
    assert losses == pytest.approx(whole["losses"], abs=1e-5)
    assert losses[0] != losses[1]  # type: ignore[index]


@pytest.mark.sampled(99, slow=14)
@pytest.mark.parametrize("wing", WINGS)
def test_the_trainer_trains_without_one_wing(wing: str, whole: dict[str, object], tmp_path: Path) -> None:
    losses = train_without([wing], tmp_path)["losses"]
    assert losses == (pytest.approx(whole["losses"], abs=1e-5) if wing == "fused" else whole["losses"])
