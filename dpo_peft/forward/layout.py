"""Where every token of a batch stands, and which tokens it may see.

A preference sample is one prompt with K completions. `pack` lays a batch out in a single row without padding, each
prompt once, followed by its completions:

    p0 p0 p0 | a0 a0 | b0 b0 b0 | p1 p1 | a1 a1 a1 | b1 ...

Position ids restart after the prompt for each completion. `visible` is the only place where the mask is defined.
`pad_rows` is the plain layout, one padded row per completion, for models that can't share a prompt.

In both layouts log-probs need no label shifting: `pred_pos` holds the flat positions whose hidden states predict,
`target` the predicted tokens and `completion_of` whose tokens they are. The prompt's last position stands once per
completion in `pred_pos`.

Shape suffixes: R rows, L row length, T = R * L flat positions, S segments (a prompt or a completion), E samples,
B longest sample in tokens, C completions, N predicted tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class Sample(NamedTuple):
    """One prompt with K >= 1 completions, as token ids. `row` is the dataset row that it came from."""

    prompt: Sequence[int]
    completions: Sequence[Sequence[int]]
    row: int = -1


@dataclass(frozen=True)
class PackedBatch:
    """A batch laid out for one forward pass. All index tensors are int64 unless said otherwise."""

    input_ids: Tensor  # (R, L); R = 1 when prompts are shared
    position_ids: Tensor  # (R, L)
    pred_pos: Tensor  # (N,) flat positions that predict
    target: Tensor  # (N,) predicted token ids
    completion_of: Tensor  # (N,) index of the completion, 0..C-1
    sample_of: Tensor  # (C,) index of the sample that a completion belongs to, 0..E-1
    rows: Tensor  # (E,) dataset row of each sample
    attention_mask: Tensor | None = None  # (R, L) 1 for tokens, 0 for padding; None when prompts are shared
    # The rest exists only when prompts are shared.
    segment: Tensor | None = None  # (T,) segment of each token
    context: Tensor | None = None  # (T,) the prompt segment that each token may also see
    sample_index: Tensor | None = None  # (E, B) flat positions of each sample's tokens, -1 where shorter than B
    kv_index: Tensor | None = None  # (sum of keys,) flat positions of [prompt; own tokens] for each segment in turn
    cu_seq_q: Tensor | None = None  # (S + 1,) int32 bounds of the segments among the queries
    cu_seq_k: Tensor | None = None  # (S + 1,) int32 bounds of the segments in kv_index
    max_q: int = 0  # longest segment
    max_k: int = 0  # longest [prompt; own tokens]

    @property
    def shared(self) -> bool:
        """Whether each prompt is computed once."""
        return self.attention_mask is None

    @property
    def num_samples(self) -> int:
        """E, the number of prompts."""
        return self.rows.shape[0]

    @property
    def num_completions(self) -> int:
        """C, the number of completions over all samples."""
        return self.sample_of.shape[0]

    def to(self, device: torch.device | str) -> "PackedBatch":
        """The same batch on `device`."""
        moved: dict[str, Any] = {
            k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in self.as_dict().items()
        }
        return PackedBatch(**moved)

    def as_dict(self) -> dict[str, Any]:
        """Field name to value, without the empty fields: what a collator returns."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}


def visible(
    segment_q: Tensor, context_q: Tensor, pos_q: Tensor, segment_k: Tensor, pos_k: Tensor, window: int | None = None
) -> Tensor:
    """The mask predicate: True where a query may see a key.

    A token sees its own segment and its prompt, up to its own position; under a sliding window only keys whose
    position is less than `window` behind. Arguments broadcast against each other; the result is boolean.
    """
    same_or_prompt = (segment_k == segment_q) | (segment_k == context_q)
    mask = same_or_prompt & (pos_k <= pos_q)
    return mask if window is None else mask & (pos_k > pos_q - window)


def _check(samples: Sequence[Sample]) -> None:
    if not samples:
        raise ValueError("A batch needs at least one sample.")
    for i, sample in enumerate(samples):
        if not len(sample.prompt) or not len(sample.completions) or not all(map(len, sample.completions)):
            raise ValueError(
                f"Sample {i} of the batch (row {sample.row}) has an empty prompt or completion, or no completion: "
                "nothing can predict or be predicted there. Give the prompt at least one token, such as BOS, and drop "
                "the empty completion."
            )


def pack(samples: Sequence[Sample]) -> PackedBatch:
    """Lay samples out in one row, each prompt once (see the head of this file).

    Raises:
        ValueError: no samples, or a sample with an empty prompt or completion.
    """
    _check(samples)
    ids: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    kv_index: list[np.ndarray] = []
    seg_len: list[int] = []
    seg_context: list[int] = []
    pred_pos, target, sample_of, sample_bounds = [], [], [], [0]
    start = 0
    for i, (prompt, completions, _) in enumerate(samples):
        p = len(prompt)
        prompt_segment = len(seg_len)
        prompt_range = np.arange(start, start + p)
        ids.append(np.asarray(prompt))
        positions.append(np.arange(p))
        seg_len.append(p)
        seg_context.append(prompt_segment)
        kv_index.append(prompt_range)
        end = start + p
        for completion in completions:
            c = len(completion)
            own = np.arange(end, end + c)
            ids.append(np.asarray(completion))
            positions.append(np.arange(p, p + c))
            seg_len.append(c)
            seg_context.append(prompt_segment)
            kv_index += [prompt_range, own]
            pred_pos.append(np.concatenate([prompt_range[-1:], own[:-1]]))
            target.append(np.asarray(completion))
            sample_of.append(i)
            end += c
        start = end
        sample_bounds.append(end)
    lengths = np.asarray(seg_len)
    contexts = np.asarray(seg_context)
    is_prompt = contexts == np.arange(len(lengths))
    key_lengths = np.where(is_prompt, lengths, lengths + lengths[contexts])
    return PackedBatch(
        input_ids=_long(np.concatenate(ids))[None],
        position_ids=_long(np.concatenate(positions))[None],
        pred_pos=_long(np.concatenate(pred_pos)),
        target=_long(np.concatenate(target)),
        completion_of=_long(np.repeat(np.arange(len(sample_of)), lengths[~is_prompt])),
        sample_of=_long(np.asarray(sample_of)),
        rows=_long(np.asarray([s.row for s in samples])),
        segment=_long(np.repeat(np.arange(len(lengths)), lengths)),
        context=_long(np.repeat(contexts, lengths)),
        sample_index=_long(_ragged_ranges(np.asarray(sample_bounds))),
        kv_index=_long(np.concatenate(kv_index)),
        cu_seq_q=_bounds(lengths),
        cu_seq_k=_bounds(key_lengths),
        max_q=int(lengths.max()),
        max_k=int(key_lengths.max()),
    )


def pad_rows(samples: Sequence[Sample], pad_token_id: int = 0) -> PackedBatch:
    """Lay samples out as one right-padded row per completion, prompt + completion in each.

    Raises:
        ValueError: no samples, or a sample with an empty prompt or completion.
    """
    _check(samples)
    pairs = [(i, s.prompt, c) for i, s in enumerate(samples) for c in s.completions]
    length = max(len(p) + len(c) for _, p, c in pairs)
    input_ids = np.full((len(pairs), length), pad_token_id)
    attention_mask = np.zeros((len(pairs), length), dtype=np.int64)
    pred_pos, target = [], []
    for r, (_, prompt, completion) in enumerate(pairs):
        p, c = len(prompt), len(completion)
        input_ids[r, :p] = prompt
        input_ids[r, p : p + c] = completion
        attention_mask[r, : p + c] = 1
        pred_pos.append(r * length + np.arange(p - 1, p + c - 1))
        target.append(np.asarray(completion))
    return PackedBatch(
        input_ids=_long(input_ids),
        position_ids=_long(np.arange(length))[None].expand(len(pairs), length).contiguous(),
        pred_pos=_long(np.concatenate(pred_pos)),
        target=_long(np.concatenate(target)),
        completion_of=_long(np.repeat(np.arange(len(pairs)), [len(c) for _, _, c in pairs])),
        sample_of=_long(np.asarray([i for i, _, _ in pairs])),
        rows=_long(np.asarray([s.row for s in samples])),
        attention_mask=_long(attention_mask),
    )


def _long(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.astype(np.int64))


def _bounds(lengths: np.ndarray) -> Tensor:
    return torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))


def _ragged_ranges(bounds_E1: np.ndarray) -> np.ndarray:
    """Bounds to an (E, B) table of the positions between them, -1 beyond each range's end."""
    lengths = np.diff(bounds_E1)
    offsets = np.arange(lengths.max())
    return np.where(offsets < lengths[:, None], bounds_E1[:-1, None] + offsets, -1)
