"""The reference's log-probs from the disk: computed once for each reference and completion, whatever else changes.

`CachedReference` stands where the reference's forward pass does. `precompute` fills the store before training.

Shape suffixes: C completions, N predicted tokens.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ..distributed import rank, world_size
from ..errors import ReferenceMismatchError
from ..forward import PackedBatch, Scores
from .adapter_off import check_finite, noise_floor
from .cache import Entry, ReferenceCache

logger = logging.getLogger(__name__)

Row = dict[str, Any]  # prepared
CHUNK_ROWS = 1024  # rows that `precompute` sorts by length at a time


class CachedReference:
    """The reference's log-probs of a batch, from the store where it has them all.

    Args:
        store: of this reference.
        score: the forward pass under the reference, for batches that the store lacks something of.
    """

    def __init__(self, store: ReferenceCache, score: Callable[[PackedBatch], Scores]):
        self.store = store
        self.score = score

    def __call__(self, batch: PackedBatch) -> Scores:
        """Returns log-probs of a batch whose `keys` are filled; `token_logps_N` is empty if the store has sums only.

        Values are those that were stored first, also for the part of a batch that had to be computed again: a run that
        was interrupted reads what the straight one did.

        Raises:
            NonFiniteError: a log-prob is NaN or infinite, with the dataset rows.
        """
        entries = self.store.get(batch.keys)
        if None in entries:
            computed = self.fill(batch)
            entries = [entry or computed[key] for key, entry in zip(batch.keys, entries, strict=True)]
        found = [entry for entry in entries if entry is not None]
        logps_C = torch.tensor([entry.logp for entry in found], dtype=torch.float64)
        own = [entry.token_logps for entry in found if entry.token_logps is not None] if self.store.tokens else []
        token_logps_N = torch.from_numpy(np.concatenate(own)) if own else torch.empty(0)
        return Scores(token_logps_N.to(batch.input_ids.device), logps_C.to(batch.input_ids.device))

    def fill(self, batch: PackedBatch) -> dict[bytes, Entry]:
        """Computes a batch and stores what the store lacks of it. Returns what was computed, by key."""
        entries = self._compute(batch)
        self.store.put(batch.keys, entries)
        return dict(
            zip(reversed(batch.keys), reversed(entries), strict=True)
        )  # of the same key twice the first counts

    def _compute(self, batch: PackedBatch) -> list[Entry]:
        scores = self.score(batch)
        check_finite(scores.logps_C, batch, "The reference's log-probs of rows")
        logps_C = scores.logps_C.tolist()
        if not self.store.tokens:
            return [Entry(logp, None) for logp in logps_C]
        tokens = np.split(scores.token_logps_N.float().cpu().numpy(), np.cumsum(batch.lengths.tolist())[:-1])
        return [Entry(logp, own) for logp, own in zip(logps_C, tokens, strict=True)]

    def counts(self) -> dict[str, float]:
        """Returns how many completions were read from the store and computed so far, for the log."""
        return {"ref_cache/hits": self.store.hits, "ref_cache/misses": self.store.misses}

    def check(self, batches: Sequence[PackedBatch]) -> None:
        """Compares what the store has of a few completions with the reference's forward pass.

        Args:
            batches: the first holds the same samples as the others together, in another shape.

        Raises:
            ReferenceMismatchError: they differ by more than the shape of a batch makes them.
        """
        whole, *parts = batches
        computed_C = self.score(whole).logps_C
        # The stored values come from batches of a third shape.
        floor = 4 * noise_floor(computed_C, torch.cat([self.score(part).logps_C for part in parts]))
        stored = self.store.peek(whole.keys)
        differences = [abs(e.logp - c) for e, c in zip(stored, computed_C.tolist(), strict=True) if e is not None]
        if max(differences, default=0.0) > floor:
            raise ReferenceMismatchError(
                "The cached reference is not this one: stored and computed log-probs differ by up to "
                f"{max(differences):.3g} nats per completion (noise floor {floor:.2g}). Clear it by `dpo-peft cache "
                "--clear`, and please report how it came about."
            )

    def precompute(
        self,
        dataset: Sequence[Row],
        collate: Callable[[list[Row]], dict[str, Any]],
        max_tokens: int,
        device: torch.device,
        name: str,
        progress: bool,
    ) -> None:
        """Fills the store for a dataset. What is there already is kept: after a kill it continues where it was.

        Args:
            dataset: prepared rows.
            collate: rows to `PackedBatch` fields, `keys` among them.
            max_tokens: tokens of a forward pass; a longer row gets one of its own.
            device: where the model is.
            name: of the dataset, for the log.
            progress: whether to show a bar.
        """
        # Batches are cut from all rows, not from the missing ones: their shapes, and so the last bits of the values,
        # do not depend on when a run was interrupted.
        computed = total = 0
        with tqdm(total=len(dataset), desc=f"reference of {name}", disable=not progress) as bar:
            for rows in _budget(dataset, max_tokens):
                if total % world_size() == rank():
                    batch = PackedBatch(**collate(rows))
                    if None in self.store.peek(batch.keys):
                        self.fill(batch.to(device))
                        computed += 1
                total += 1
                bar.update(len(rows))
        message = "Reference of %s (%d rows): %d of %d batches computed, the rest was in %s."
        logger.info(message, name, len(dataset), computed, total, self.store.file.path)


def _budget(dataset: Sequence[Row], max_tokens: int) -> Iterator[list[Row]]:
    """Yields rows of about equal length, as many as fit into a forward pass."""
    for start in range(0, len(dataset), CHUNK_ROWS):
        rows = [dataset[i] for i in range(start, min(start + CHUNK_ROWS, len(dataset)))]
        rows.sort(key=_tokens, reverse=True)
        batch: list[Row] = []
        held = 0
        for row in rows:
            if batch and held + _tokens(row) > max_tokens:
                yield batch
                batch, held = [], 0
            batch.append(row)
            held += _tokens(row)
        yield batch


def _tokens(row: Row) -> int:
    return len(row["prompt_ids"]) + sum(map(len, row["completion_ids"]))
