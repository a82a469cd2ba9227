"""How hard each pair is: its margin under adapters that were trained on other rows (cross-fitting).

The rows are parted into folds; an adapter is trained on all folds but one and scores that one, so no row is judged by
an adapter that has seen it, or another row of its prompt. One trainer does it all: one base in memory, rows tokenized
once, the reference's log-probs computed once, the adapter put back to its start for each fold.

Shape suffixes: R repeats, N rows.
"""

import logging
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from datasets import Dataset

from ..errors import OptionError
from ..trainer import DPOTrainer

logger = logging.getLogger(__name__)
Array = np.ndarray[Any, Any]


def part(keys: Sequence[Hashable], folds: int, seed: int) -> Array:
    """Returns (N,) int: the fold of each row, at random. Rows of equal keys are in one fold.

    Raises:
        OptionError: there are fewer different keys than folds.
    """
    number: dict[Hashable, int] = {}
    group_N = [number.setdefault(key, len(number)) for key in keys]
    if len(number) < folds:
        raise OptionError(f"cross_fit={folds}: the rows have {len(number)} different prompts. Give fewer folds.")
    return (np.random.default_rng(seed).permutation(len(number)) % folds)[group_N]


def cross_fit(trainer: DPOTrainer, folds: int, repeats: int = 1, seed: int = 0) -> Array:
    """Trains an adapter on the rows outside each fold, and scores those inside.

    Args:
        trainer: untrained, with all rows as its training rows, which are pairs. Its adapter is left at its start.
        folds: how many parts; each adapter is trained on all but one.
        repeats: how often, with other folds each time.
        seed: of the folds.

    Returns:
        (R, N) float64: the implicit reward of the chosen less that of the rejected completion of each prepared row.

    Raises:
        OptionError, NonFiniteError: as training.
    """
    rows = trainer.train_dataset
    keys = [tuple(row["prompt_ids"] or row["completion_ids"][0]) for row in rows]
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    margins_RN = np.full((repeats, len(rows)), np.nan)
    for repeat in range(repeats):
        fold_N = part(keys, folds, seed + repeat)
        for fold in range(folds):
            seen, unseen = (np.flatnonzero(found) for found in (fold_N != fold, fold_N == fold))
            where = (fold + 1, folds, repeat + 1, repeats, len(seen), len(unseen))
            logger.info("Fold %d of %d, repeat %d of %d: training on %d rows, scoring %d others.", *where)
            margins_RN[repeat, unseen] = held_out_margins(trainer, rows.select(seen), rows.select(unseen))
            trainer.model.load_state_dict(start, strict=False)
    return margins_RN


def held_out_margins(trainer: DPOTrainer, seen: Dataset, unseen: Dataset) -> Array:
    """Returns the margins of rows under the trainer's adapter, once it is trained on others; both are prepared."""
    trainer.train_dataset, trainer.prepare.evaluated = seen, {"held out": unseen}
    trainer.optimizer = None
    trainer.train()
    rewards_NS = trainer.predict(unseen).predictions
    return rewards_NS[:, 0] - rewards_NS[:, 1]
