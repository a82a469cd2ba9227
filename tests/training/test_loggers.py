"""Trackers get what the trainer logs: every metric, under its name, at its step, with its value. Nothing goes online.

One real run reports to all trackers that are installed; each test reads back the files of one, and is skipped where it
is not installed. The names are transformers': `train/` before a training metric, `eval/` in place of `eval_`.
"""

import json
import os
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from paths import REPO

TRACKERS = [name for name in ("tensorboard", "wandb", "trackio") if find_spec(name)]
# Figures of the whole run: TensorBoard and W&B keep them (W&B as the run's summary), trackio's callback drops them.
TOTALS = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "total_flos"}
Values = dict[tuple[int, str], float]  # (step, name) -> value


def needs(tracker: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(tracker not in TRACKERS, reason=f"{tracker} is not installed")


@pytest.fixture(scope="module")
def folder(base_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the run and its trackers wrote."""
    folder = tmp_path_factory.mktemp("logged")
    script = REPO / "tests" / "helpers" / "logged_run.py"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")])}
    words = [sys.executable, str(script), base_folder, str(folder), *TRACKERS]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def logged(folder: Path) -> Values:
    """What the trainer logged, under the names that a tracker must have."""
    values = {}
    for entry in json.loads((folder / "log.json").read_text()):
        for key, value in entry.items():
            if key != "step" and key not in TOTALS:
                name = f"eval/{key.removeprefix('eval_')}" if key.startswith("eval_") else f"train/{key}"
                values[entry["step"], name] = value
    return values


def check_same(found: Values, folder: Path, exact: bool = True) -> None:
    expected = logged(folder)
    needed = (
        "train/loss",
        "train/rewards/margins",
        "train/kl",
        "eval/near_rewards/accuracies",
        "eval/far_logps/chosen",
    )
    assert {name for _, name in expected} >= set(needed)
    assert {step for step, _ in expected} == {1, 2, 3}
    found = {key: value for key, value in found.items() if key[1] != "train/global_step"}
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] == (value if exact else pytest.approx(value, rel=1e-6)), key


@pytest.mark.slow
@needs("tensorboard")
def test_tensorboard(folder: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    names = [name for name in events.Tags()["scalars"] if name.removeprefix("train/") not in TOTALS]
    found = {(event.step, name): event.value for name in names for event in events.Scalars(name)}
    check_same(found, folder, exact=False)  # it stores float32
    assert '"beta": 0.25' in text_of(events, "args")
    assert {f"train/{name}" for name in TOTALS} <= set(events.Tags()["scalars"])
    assert sample(folder)["prompt"] in text_of(events, "samples")


def text_of(events: Any, name: str) -> str:
    (event, *_) = events.Tensors(f"{name}/text_summary")
    return event.tensor_proto.string_val[0].decode()


@needs("wandb")
def test_wandb(folder: Path) -> None:
    found, tables = {}, 0
    config = ""
    for record in wandb_records(folder):
        if record.WhichOneof("record_type") == "history":
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            tables += "samples/nrows" in row
            metrics = {k: v for k, v in row.items() if not k.startswith(("_", "samples"))}
            found |= {(row["train/global_step"], name): value for name, value in metrics.items()}
        elif record.WhichOneof("record_type") == "run":
            config = " ".join(f"{item.key} {item.value_json}" for item in record.run.config.update)
        elif record.WhichOneof("record_type") == "config":
            config += " ".join(f" {item.key} {item.value_json}" for item in record.config.update)
    check_same(found, folder)
    assert " beta 0.25" in config and tables == 2  # at steps 0 and 3


def wandb_records(folder: Path) -> Iterator[Any]:
    """The records of the one offline run: a log of blocks of 32 KiB, after a head of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    data, at, parts = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:  # too little for the head of a part
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or its last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


@needs("trackio")
def test_trackio(folder: Path) -> None:
    (file,) = (folder / "trackio").glob("*.db")
    with sqlite3.connect(file) as database:
        rows = database.execute("SELECT run_name, metrics FROM metrics ORDER BY id").fetchall()
        ((config,),) = database.execute("SELECT config FROM configs").fetchall()
    assert {name for name, _ in rows} == {"reported"} and json.loads(config)["beta"] == 0.25
    metrics = [json.loads(row) for _, row in rows]
    tables = [row.pop("samples")["_value"] for row in metrics if "samples" in row]
    found = {(row["train/global_step"], name): value for row in metrics for name, value in row.items()}
    check_same(found, folder)
    assert [len(table) for table in tables] == [1, 1]
    assert tables[-1][0]["completion"] == sample(folder)["completion"]


def sample(folder: Path) -> dict[str, Any]:
    """The last line of samples.jsonl."""
    return json.loads((folder / "run" / "samples.jsonl").read_text("utf-8").splitlines()[-1])


def test_a_lost_metric_is_seen(tmp_path: Path) -> None:
    (tmp_path / "log.json").write_text(json.dumps(NEEDED))
    whole = logged(tmp_path)
    check_same(dict(whole), tmp_path)
    for change in ({(1, "train/loss"): 0.5}, {(1, "train/new"): 0.0}):
        with pytest.raises(AssertionError):
            check_same({**whole, **change}, tmp_path)
    del whole[3, "eval/far_logps/chosen"]
    with pytest.raises(AssertionError):
        check_same(whole, tmp_path)


NEEDED = [
    {"step": 1, "loss": 0.7, "rewards/margins": 0.0, "kl": 0.0},
    {"step": 2, "loss": 0.6},
    {"step": 3, "eval_near_rewards/accuracies": 0.5, "eval_far_logps/chosen": -9.0},
]
