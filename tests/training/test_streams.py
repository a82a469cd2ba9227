"""Streams: resumed in whichever pass, what they drop is counted in all processes, and held to `max_unusable_share`."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from trainer_helpers import StopAt, adapter_weights, ours, text_pairs

from dpo_peft.errors import DataError
from dpo_peft.training import building

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "whole batches": {"rows": 8},
    "shuffled": {"shuffle": True},
    "accumulated": {"gradient_accumulation_steps": 2},
    "in shards, with workers": {"shards": 3, "shuffle": True, "dataloader_num_workers": 2},
}


@pytest.fixture
def run(tiny_llama: Any, make_tokenizer: Any, tmp_path: Path) -> Any:
    """`run("name", stop=3, resume=True, **case)`: 10 rows are 3 batches, so 9 steps are 3 passes."""

    def train(name: str, stop: int = 0, resume: bool = False, rows: Any = 10, shards: int = 1, **changed: Any) -> Any:
        data = text_pairs(rows) if isinstance(rows, int) else rows
        stream = data.to_iterable_dataset(num_shards=shards)
        if changed.pop("shuffle", False):
            stream = stream.shuffle(seed=5, buffer_size=4)
        options = {
            "max_steps": 9,
            "save_strategy": "steps",
            "save_steps": 1,
            "lr_scheduler_type": "constant",
            **changed,
        }
        given = {"callbacks": [StopAt(stop)] if stop else None}
        trainer = ours(tiny_llama(), stream, make_tokenizer(), tmp_path / name, **options, **given)
        trainer.train(resume_from_checkpoint=resume or None)
        return trainer

    return train


@pytest.mark.attack("killed while writing")
@pytest.mark.sampled(99, slow=2)
@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=[pytest.mark.slow] if name != "shuffled" else []) for name in CASES]
)
def test_a_resumed_stream_is_the_straight_one(run: Any, case: str) -> None:
    """Inside the first pass, at its end, at the start, in the middle and at the end of a later one."""
    straight = adapter_weights(run("straight", **CASES[case]))
    for stop in (2, 3, 4, 5, 6) if case != "shuffled" else (3, 5):
        name = f"stopped {stop}"
        run(name, stop=stop, **CASES[case])
        resumed = adapter_weights(run(name, resume=True, **CASES[case]))
        assert all(torch.equal(resumed[key], straight[key]) for key in straight), stop


def test_another_max_steps_finds_the_same_place(run: Any) -> None:
    """The place is counted by the steps that the interrupted run was to take."""
    straight = run("straight", max_steps=8)
    run("stopped", stop=5, max_steps=20)
    resumed = run("stopped", resume=True, max_steps=8)
    assert all(
        torch.equal(a, b) for a, b in zip(*(adapter_weights(t).values() for t in (straight, resumed)), strict=True)
    )


def some_empty(good: int, bad: int) -> Dataset:
    rows = [*text_pairs(good)] + [{**row, "chosen": ""} for row in text_pairs(bad)]
    order = sorted(range(len(rows)), key=lambda number: (number * 7919) % len(rows))
    first = next(number for number in order if number < good)
    return Dataset.from_list([rows[first], *(rows[number] for number in order if number != first)])


@pytest.mark.attack("hostile rows")
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_what_a_stream_drops_is_counted(run: Any, workers: int, caplog: pytest.LogCaptureFixture) -> None:
    """In the workers too: 3 passes over 12 rows of which 4 are empty; the numbers are of the last pass."""
    caplog.set_level("INFO")
    options = {"rows": some_empty(8, 4), "shards": 2, "max_steps": 6, "dataloader_num_workers": workers}
    report = run("counted", **options).data_reports["train"]
    assert (report.source_rows, report.kept_rows, report.dropped) == (12, 8, {"empty_completion": 4})
    assert report.completions == 16 and report.longest > 0 and len(report.dropped_rows["empty_completion"]) > 0
    report.check()
    assert "train: a stream in" in caplog.text
    assert "train: 8 of 12 rows kept" in caplog.text and "0 of 0" not in caplog.text


@pytest.mark.attack("hostile rows")
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_the_share_holds_for_a_short_stream(run: Any, workers: int) -> None:
    """Too short to be judged on its way, it is judged when the first pass is over."""
    options = {"rows": some_empty(8, 40), "shards": 2, "dataloader_num_workers": workers}
    with pytest.raises(DataError, match="train: 40 of 48 rows are unusable, more than max_unusable_share=0.5"):
        run("short", **options)
    assert run("allowed", **options, max_unusable_share=0.9, max_steps=3).state.global_step == 3


@pytest.mark.attack("hostile rows")
def test_the_share_holds_on_the_way(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what worker processes have counted, by the main one."""
    monkeypatch.setattr(building, "STREAM_PATIENCE", 20)
    options = {"rows": some_empty(60, 240), "dataloader_num_workers": 1, "max_steps": 8}
    with pytest.raises(DataError, match="rows are unusable, more than max_unusable_share=0.5"):
        run("long", **options)


def test_a_run_that_is_over_keeps_what_it_trained(run: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A share beyond the limit is found at its end: a warning, and the adapter can be saved."""
    trainer = run("over", rows=some_empty(4, 40), max_steps=1)
    assert trainer.state.global_step == 1
    assert "unusable, more than max_unusable_share=0.5" in caplog.text
