"""At which lengths a model changes its behavior, by its config, and a text that the probe takes there.

Windows, and states with their convolutions, are crossed by a text that is long enough, if few tokens are; attention
within chunks by making them short; positions from which queries or angles are scaled otherwise by short texts there
and far behind. A longer window is known from what the attention function is told.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from .layout import PackedBatch, Sample, pack, pad_rows
from .rotary import rope_length

# Kinds of layers (in `config.layer_types`) that attend, and that carry a state along the text; some do both.
ATTENDING = {"full_attention", "sliding_attention", "chunked_attention", "hybrid", "hybrid_sliding"}
CARRYING = {"linear_attention", "conv", "hybrid", "hybrid_sliding"}
# The tokens that the text may have before it crosses something; those of the chunks in which states are computed; and
# those that attention within chunks gets.
_FEW, _STATE, _CHUNK = 600, 64, 16


def kinds_of(config: Any) -> list[str]:
    """Returns the kind of each layer."""
    given = getattr(config, "layer_types", None)
    return list(given or ["sliding_attention"] * config.num_hidden_layers)  # without a window it is full attention


@dataclass(frozen=True)
class FarText:
    """Samples, and the position of each one's first token."""

    samples: list[Sample]
    starts: list[int]

    @classmethod
    def of(cls, config: Any, windows: Iterable[int]) -> "FarText | None":
        """Returns what crosses everything of a text config and these windows; None: there is nothing."""
        ids, last = random_ids(config.vocab_size), getattr(config, "max_position_embeddings", None) or math.inf
        lengths, turns = [*windows], _turns(config)
        for kind in kinds_of(config):
            lengths += [_STATE] * (kind in CARRYING) + [_CHUNK] * (kind == "chunked_attention")
        longest = max((length for length in [*lengths, *turns] if length <= min(_FEW, last - 90)), default=None)
        found = [] if longest is None else [(Sample(ids(longest + 12), [ids(67), ids(9)]), 0)]
        starts = [turn - 12 for turn in turns if _FEW < turn <= last - 8]
        if turns:  # what grows with the position shows far behind it
            starts.append(int(min(last, 64 * max(turns))) - 20)
        found += [(Sample(ids(9), [ids(7), ids(11)]), start) for start in starts]
        return cls(*map(list, zip(*found, strict=True))) if found else None

    def rows(self) -> PackedBatch:
        """Returns one padded row per completion."""
        return _rows(self.samples, self.starts)

    def alone(self) -> list[PackedBatch]:
        """Returns the same rows, each in a batch of its own."""
        of_each = zip(self.samples, self.starts, strict=True)
        return [_rows([sample._replace(completions=[c])], [at]) for sample, at in of_each for c in sample.completions]

    def packed(self) -> PackedBatch:
        """Returns each prompt once."""
        batch = pack(self.samples)
        assert batch.sample_index is not None
        start_T = torch.tensor(self.starts).repeat_interleave((batch.sample_index >= 0).sum(1))
        return replace(batch, position_ids=batch.position_ids + start_T)

    @property
    def farthest(self) -> int:
        """The last position."""
        of_each = zip(self.samples, self.starts, strict=True)
        return max(at + len(sample.prompt) + max(map(len, sample.completions)) - 1 for sample, at in of_each)


def _rows(samples: Sequence[Sample], starts: Sequence[int]) -> PackedBatch:
    batch = pad_rows(samples)
    return replace(batch, position_ids=batch.position_ids + torch.tensor(starts)[batch.sample_of][:, None])


def _turns(config: Any) -> set[int]:
    """Returns the positions from which on angles or queries may be scaled otherwise."""
    if rope_length(config, 1) is not None:  # by the length of a batch, which `rotary.py` fixes
        return set()
    given = getattr(config, "rope_parameters", None) or {}
    parts = [given, *(part for part in given.values() if isinstance(part, dict))]  # some have one per kind of layer
    return {part["original_max_position_embeddings"] for part in parts if "original_max_position_embeddings" in part}


@contextmanager
def short_chunks(config: Any) -> Iterator[None]:
    """Inside, attention within chunks has short ones: masks and our attention read it from the config at each call."""
    chunk = getattr(config, "attention_chunk_size", None)
    try:
        if chunk is not None:
            config.attention_chunk_size = _CHUNK
        yield
    finally:
        if chunk is not None:
            config.attention_chunk_size = chunk


def random_ids(vocab_size: int) -> Callable[[int], list[int]]:
    """Returns what draws so many token ids, always the same ones, neither rare nor special."""
    generator = torch.Generator().manual_seed(0)
    low, high = vocab_size // 4, max(vocab_size // 2, vocab_size // 4 + 2)
    return lambda n: torch.randint(low, high, (n,), generator=generator).tolist()
