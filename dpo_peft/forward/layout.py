"""Where every token of a batch stands, and which tokens it may see.

A preference sample is one prompt with K completions. `pack` lays a batch out in a single row without padding, each
prompt once, followed by its completions:

    p0 p0 p0 | a0 a0 | b0 b0 b0 | p1 p1 | a1 a1 a1 | b1 ...

Position ids restart after the prompt for each completion. `visible` is the only place where the mask is defined.
`pad_rows` is the plain layout, one padded row per completion, for models that can't share a prompt.

In both layouts log-probs need no label shifting: `pred_pos` holds the flat positions whose hidden states predict,
`target` the predicted tokens and `completion_of` whose tokens they are. The prompt's last position stands once per
completion in `pred_pos`. Tokens of a completion that the model did not write (another speaker's turn in a trajectory)
are read but not predicted. Two trajectories that share no beginning are completions of an empty prompt.

Shape suffixes: R rows, L row length, T = R * L flat positions, S segments (a prompt or a completion), E samples,
B longest sample in tokens, C completions, N predicted tokens, M most copies of a token among the keys.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class Sample(NamedTuple):
    """One prompt with K >= 1 completions, as token ids, and what is known about them.

    The prompt may be empty only where `steps` leaves the first token of every completion unscored.
    """

    prompt: Sequence[int]
    completions: Sequence[Sequence[int]]
    row: int = -1  # the dataset row that it came from
    steps: Sequence[Sequence[int]] | None = None  # step of each completion token, -1 where it isn't scored
    grades: Sequence[float] | None = None  # one per completion, higher is better
    preference: float | None = None  # probability that the first completion is the better one
    margin: float | None = None  # by how much its reward should be ahead
    mismatched: Sequence[Sequence[int]] = ()  # answers to other prompts, laid out as further completions


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
    lengths: Tensor  # (C,) predicted tokens of each completion
    # Labels, where the data have them.
    step: Tensor | None = None  # (N,) step of a trajectory that a token belongs to
    grade: Tensor | None = None  # (C,) float64, higher is better; 0 for mismatched answers
    preference: Tensor | None = None  # (E,) float64, probability that the first completion is the better one
    margin: Tensor | None = None  # (E,) float64, in rewards
    mismatched: Tensor | None = None  # (C,) bool, True for an answer to another prompt
    attention_mask: Tensor | None = None  # (R, L) 1 for tokens, 0 for padding; None when prompts are shared
    # The rest exists only when prompts are shared.
    segment: Tensor | None = None  # (T,) segment of each token
    context: Tensor | None = None  # (T,) the prompt segment that each token may also see
    sample_index: Tensor | None = None  # (E, B) flat positions of each sample's tokens, -1 where shorter than B
    kv_index: Tensor | None = None  # (sum of keys,) flat positions of [prompt; own tokens] for each segment in turn
    kv_copies: Tensor | None = None  # (T, M) places of each token in kv_index, -1 where it has fewer than M
    cu_seq_q: Tensor | None = None  # (S + 1,) int32 bounds of the segments among the queries
    cu_seq_k: Tensor | None = None  # (S + 1,) int32 bounds of the segments in kv_index
    max_q: int = 0  # longest segment
    max_k: int = 0  # longest [prompt; own tokens]
    num_own: int = 0  # completions that are no mismatched answers
    segments: Any = None  # (S,) tuple of (length, index of the segment that is its context), on the host
    keys: Any = None  # (C,) tuple of bytes: content keys, see unpack.py

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
        if not len(sample.completions) or not all(map(len, [*sample.completions, *sample.mismatched])):
            raise ValueError(
                f"Sample {i} of the batch (row {sample.row}) has an empty completion or none: nothing can be "
                "predicted there. Drop the row."
            )
        if not len(sample.prompt) and (sample.steps is None or any(steps[0] >= 0 for steps in sample.steps)):
            raise ValueError(
                f"Sample {i} of the batch (row {sample.row}) has an empty prompt: nothing predicts the first token. "
                "Give the prompt at least one token, such as BOS."
            )
        if sample.steps is not None and not all(max(steps) >= 0 for steps in sample.steps):
            raise ValueError(f"Sample {i} of the batch (row {sample.row}) has a completion without scored tokens.")


def _scored(sample: Sample) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each completion, mismatched ones last: its ids, and the places in it that are predicted."""
    ids = [np.asarray(c) for c in (*sample.completions, *sample.mismatched)]
    if sample.steps is None:
        return [(c, np.arange(len(c))) for c in ids]
    own = [(c, np.flatnonzero(np.asarray(steps) >= 0)) for c, steps in zip(ids, sample.steps, strict=False)]
    return own + [(c, np.arange(len(c))) for c in ids[len(own) :]]


def pack(samples: Sequence[Sample]) -> PackedBatch:
    """Lay samples out in one row, each prompt once (see the head of this file).

    Raises:
        ValueError: no samples, or a sample in which nothing can predict or be predicted.
    """
    _check(samples)
    ids: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    kv_index: list[np.ndarray] = []
    seg_len: list[int] = []
    seg_context: list[int] = []
    pred_pos, target, sample_bounds = [], [], [0]
    end = 0
    for sample in samples:
        p = len(sample.prompt)
        prompt_range = np.arange(end, end + p)
        prompt_segment = len(seg_len)
        if p:
            ids.append(np.asarray(sample.prompt))
            positions.append(np.arange(p))
            kv_index.append(prompt_range)
            seg_len.append(p)
            seg_context.append(prompt_segment)
        end += p
        for completion, scored in _scored(sample):
            c = len(completion)
            own = np.arange(end, end + c)
            ids.append(completion)
            positions.append(np.arange(p, p + c))
            kv_index += [prompt_range, own]
            seg_context.append(prompt_segment if p else len(seg_len))
            seg_len.append(c)
            pred_pos.append(np.concatenate([prompt_range[-1:] if p else [-1], own[:-1]])[scored])
            target.append(completion[scored])
            end += c
        sample_bounds.append(end)
    lengths = np.asarray(seg_len)
    contexts = np.asarray(seg_context)
    keys = np.concatenate(kv_index)
    alone = contexts == np.arange(len(lengths))
    key_lengths = np.where(alone, lengths, lengths + lengths[contexts])
    return PackedBatch(
        input_ids=_long(np.concatenate(ids))[None],
        position_ids=_long(np.concatenate(positions))[None],
        pred_pos=_long(np.concatenate(pred_pos)),
        target=_long(np.concatenate(target)),
        **_labels(samples, target),
        segment=_long(np.repeat(np.arange(len(lengths)), lengths)),
        context=_long(np.repeat(contexts, lengths)),
        sample_index=_long(_ragged_ranges(np.asarray(sample_bounds))),
        kv_index=_long(keys),
        kv_copies=_long(_places_of_values(keys)),
        segments=tuple(zip(seg_len, seg_context, strict=True)),
        cu_seq_q=_bounds(lengths),
        cu_seq_k=_bounds(key_lengths),
        max_q=int(lengths.max()),
        max_k=int(key_lengths.max()),
    )


def pad_rows(samples: Sequence[Sample], pad_token_id: int = 0) -> PackedBatch:
    """Lay samples out as one right-padded row per completion, prompt + completion in each.

    Raises:
        ValueError: no samples, or a sample in which nothing can predict or be predicted.
    """
    _check(samples)
    rows = [(np.asarray(s.prompt), completion, scored) for s in samples for completion, scored in _scored(s)]
    length = max(len(prompt) + len(completion) for prompt, completion, _ in rows)
    input_ids = np.full((len(rows), length), pad_token_id)
    attention_mask = np.zeros((len(rows), length), dtype=np.int64)
    pred_pos, target = [], []
    for r, (prompt, completion, scored) in enumerate(rows):
        p, c = len(prompt), len(completion)
        input_ids[r, :p] = prompt
        input_ids[r, p : p + c] = completion
        attention_mask[r, : p + c] = 1
        pred_pos.append(r * length + p - 1 + scored)
        target.append(completion[scored])
    return PackedBatch(
        input_ids=_long(input_ids),
        position_ids=_long(np.arange(length))[None].expand(len(rows), length).contiguous(),
        pred_pos=_long(np.concatenate(pred_pos)),
        target=_long(np.concatenate(target)),
        **_labels(samples, target),
        attention_mask=_long(attention_mask),
    )


def _labels(samples: Sequence[Sample], target: list[np.ndarray]) -> dict[str, Any]:
    """Whose completion is whose, and what the samples say about them."""
    own = [len(s.completions) for s in samples]
    others = [len(s.mismatched) for s in samples]
    lengths = np.asarray([len(t) for t in target])
    found: dict[str, Any] = {
        "completion_of": _long(np.repeat(np.arange(len(target)), lengths)),
        "sample_of": _long(np.repeat(np.arange(len(samples)), np.add(own, others))),
        "rows": _long(np.asarray([s.row for s in samples])),
        "lengths": _long(lengths),
        "num_own": sum(own),
    }
    first = samples[0]
    if first.steps is not None:
        steps = [np.asarray(step) for s in samples for step in s.steps or ()]
        found["step"] = _long(np.concatenate([step[step >= 0] for step in steps]))
    if first.grades is not None:
        found["grade"] = _double([g for s, m in zip(samples, others, strict=True) for g in (*s.grades, *[0.0] * m)])  # type: ignore[misc]
    if first.preference is not None:
        found["preference"] = _double([s.preference for s in samples])
    if first.margin is not None:
        found["margin"] = _double([s.margin for s in samples])
    if any(others):
        found["mismatched"] = torch.tensor([i >= k for k, m in zip(own, others, strict=True) for i in range(k + m)])
    return found


def _double(values: Sequence[Any]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _long(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.astype(np.int64))


def _bounds(lengths: np.ndarray) -> Tensor:
    return torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))


def _places_of_values(values: np.ndarray) -> np.ndarray:
    """(T, M) places at which each of 0..T-1 stands in `values`, in order, -1 beyond the last."""
    order = np.argsort(values, kind="stable")
    counts = np.bincount(values)
    copy = np.arange(len(values)) - np.repeat(np.cumsum(counts) - counts, counts)
    places = np.full((len(counts), counts.max()), -1)
    places[values[order], copy] = order
    return places


def _ragged_ranges(bounds_E1: np.ndarray) -> np.ndarray:
    """Bounds to an (E, B) table of the positions between them, -1 beyond each range's end."""
    lengths = np.diff(bounds_E1)
    offsets = np.arange(lengths.max())
    return np.where(offsets < lengths[:, None], bounds_E1[:-1, None] + offsets, -1)
