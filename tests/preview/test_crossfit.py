"""No row is judged by an adapter that saw it, and what the folds give is what runs of their own would."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from trainer_helpers import id_pairs, ours

from dpo_peft import ImplicitReward, OptionError
from dpo_peft.preview.crossfit import cross_fit, held_out_margins, part

ROWS, FOLDS, REPEATS = 10, 3, 2


@pytest.fixture
def build(tiny_llama: Any, make_tokenizer: Any, tmp_path: Path) -> Any:
    """Trainers whose batches hold all rows, so that their order is of no matter."""
    rows = id_pairs(ROWS).to_list()
    rows[4]["prompt_ids"] = rows[1]["prompt_ids"]

    def trainer(numbers: Any = range(ROWS)) -> Any:
        some = Dataset.from_list([rows[n] for n in numbers])
        how = {"max_steps": 3, "per_device_train_batch_size": 16, "cache_ref_log_probs": True}
        return ours(tiny_llama(), some, make_tokenizer(), tmp_path, ref_cache_dir=str(tmp_path / "store"), **how)

    return trainer


def watch(trainer: Any) -> list[tuple[bool, set[int]]]:
    """A list that will hold, for each batch, whether it was trained on, and its rows."""
    passes: list[tuple[bool, set[int]]] = []
    record = trainer.record

    def recorded(batch: Any, *args: Any) -> None:
        passes.append((trainer.model.training, set(batch.rows.tolist())))
        record(batch, *args)

    trainer.record = recorded
    return passes


def leaked(passes: list[tuple[bool, set[int]]]) -> tuple[set[int], list[int]]:
    """Rows that were scored by an adapter that had seen them, and all that were scored. Training after scoring is
    that of the next adapter."""
    seen, both, scored, before = set[int](), set[int](), list[int](), False
    for training, rows in passes:
        seen = (seen if training == before or before else set()) | (rows if training else set())
        if not training:
            scored += sorted(rows)
            both |= seen & rows
        before = training
    return both, scored


def test_no_row_is_scored_by_an_adapter_that_saw_it(build: Any) -> None:
    trainer = build()
    passes = watch(trainer)
    margins_RN = cross_fit(trainer, FOLDS, REPEATS)
    both, scored = leaked(passes)
    assert not both and sorted(scored) == sorted([*range(ROWS)] * REPEATS)
    assert margins_RN.shape == (REPEATS, ROWS) and np.isfinite(margins_RN).all()
    # Each log-prob of the reference was computed once, for all folds and repeats.
    assert trainer.reference.store.misses == 2 * ROWS and trainer.reference.store.hits > 2 * ROWS * REPEATS
    passes.clear()
    held_out_margins(trainer, (rows := trainer.prepare.evaluated["held out"]), rows)  # the watch sees what it should
    assert leaked(passes)[0] == set(rows["row"])


def test_folds_are_as_runs_of_their_own(build: Any) -> None:
    """The last fold too: neither the adapter nor the optimizer keeps anything of the folds before."""
    trainer = build()
    prepared = trainer.train_dataset
    margins_N = cross_fit(trainer, FOLDS, seed=5)[0]
    fold_N = part([tuple(ids) for ids in prepared["prompt_ids"]], FOLDS, 5)
    for fold in (0, FOLDS - 1):
        alone = build(np.flatnonzero(fold_N != fold).tolist())
        alone.train()
        held = np.flatnonzero(fold_N == fold)
        scores = ImplicitReward(alone.model, tokenizer=alone.tokenizer).score_rows(prepared.select(held))
        expected = [one[0].reward - one[1].reward for one in scores]
        assert np.abs(margins_N[held] - expected).max() < 1e-4 and np.abs(expected).max() > 1e-3


def test_rows_of_a_prompt_stay_together() -> None:
    keys = [n % 7 for n in range(30)]
    for seed in range(5):
        fold_N = part(keys, 3, seed)
        assert {0, 1, 2} == set(fold_N.tolist())
        assert all(len({fold_N[i] for i in range(30) if keys[i] == key}) == 1 for key in range(7))
    assert not np.array_equal(part(keys, 3, 0), part(keys, 3, 1))
    with pytest.raises(OptionError, match="2 different prompts"):
        part([1, 2, 1], 3, 0)
