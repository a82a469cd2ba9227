"""What a run will compare with the reference, known before it begins: the rows, and mismatched completions.

The order of the rows follows from seed and epoch, so the batches that will be drawn can be told ahead, and with them
which prompt meets the completion of which other one (`data.collator.mismatch`).
"""

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from typing import Any

from transformers import Trainer

from ..data.collator import chunks, mismatch
from ..distributed import world_size
from .accumulation import OptimizerStep
from .arguments import AnyDataset
from .packing import Row


def rows_ahead(trainer: Trainer, evaluated: Mapping[str, AnyDataset], step: OptimizerStep) -> dict[str, Iterable[Row]]:
    """Returns the rows whose completions the reference will score, by the name of their dataset; those of evaluation
    are `evaluated`, prepared. Rows with mismatched completions are read as they are asked for: of all epochs, or of
    one if the order is the same in each. `step` says which objective there is, and how long a row may be."""
    datasets: dict[str, Any] = {"train": trainer.train_dataset, **evaluated}
    if not step.objective.needs_mismatched:
        return datasets
    batches = {"train": _optimizer_batches(trainer)}
    size = trainer.args.per_device_eval_batch_size * world_size()
    batches |= {name: chunks(rows, size) for name, rows in evaluated.items()}
    return datasets | {
        f"{name}, mismatched": _mismatched(of_set, step.max_length, name != "train")
        for name, of_set in batches.items()
    }


def _optimizer_batches(trainer: Trainer) -> Iterator[list[Row]]:
    """Yields the rows of each optimizer batch as training will draw them, without drawing a random number."""
    loader, args = trainer.get_train_dataloader(), trainer.args
    epochs, *_, steps = trainer.set_initial_training_values(args, loader)

    def of_epoch(epoch: int) -> Iterator[list[Row]]:
        loader.set_epoch(epoch)  # of accelerate's loaders
        for part in chunks(loader.batch_sampler, args.gradient_accumulation_steps):
            yield [row for indices in part for row in loader.dataset.__getitems__(indices)]

    same = args.train_sampling_strategy == "sequential"
    return islice(chain.from_iterable(map(of_epoch, range(1 if same else epochs))), steps)


def _mismatched(batches: Iterable[list[Row]], max_length: int | None, held_out: bool) -> Iterator[Row]:
    """Yields a row for each prompt and the completions that it meets, which are its own here."""
    before: list[Row] = []
    for rows in batches:
        for row in mismatch(rows, before, max_length)[0]:
            if others := row.get("mismatched_ids"):
                kept: Row = {name: row[name] for name in ("prompt_ids", "row", "adapter_start") if name in row}
                yield {**kept, "completion_ids": others}
        before = rows[-1:] if held_out else []
