"""A batch back to its samples, in halves, and the keys of its completions.

What `pack` and `pad_rows` lay out can be read off a batch again, on whatever device it is. `halves` splits a batch
that is too large for the memory; `content_keys` names its completions for a cache of their log-probs.

Shape suffixes: T flat positions, E samples, C completions, N predicted tokens.
"""

import struct
from dataclasses import replace
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from .layout import PackedBatch, Sample, pack, pad_rows

KEY_BYTES = 16
# Hashed into every key. Another number for another way to hash, so that stored keys of the old way are never found.
KEY_VERSION = 1
_MIXED = "Samples with and without steps are in one batch, so it does not hold all of them. Lay them out apart."


class _Places(NamedTuple):
    """Where everything stands, on the host; int64 arrays of flat positions."""

    ids_T: np.ndarray
    prompt_C: np.ndarray  # where the prompt of a completion starts
    prompt_len_C: np.ndarray
    own_C: np.ndarray  # where the completion itself starts
    own_len_C: np.ndarray
    first_E1: np.ndarray  # the first completion of each sample, and C
    bounds_C1: np.ndarray  # bounds of the completions among the predicted tokens
    index_N: np.ndarray  # which token of its completion is predicted


def unpack(batch: PackedBatch) -> list[Sample]:
    """The samples that `pack` or `pad_rows` laid out; laying them out again gives an equal batch.

    Padded trajectories don't show where the prompt ended. There it is the longest common start of the sample's rows
    that is not scored, which leaves every row as it was.

    Returns:
        Samples with int64 arrays as ids and steps (views of the batch where it is on the CPU) and floats as labels.

    Raises:
        ValueError: samples with and without steps are in one batch.
    """
    places = _shared_places(batch) if batch.shared else _padded_places(batch)
    lengths_C = np.diff(places.bounds_C1)
    other_C = np.zeros(len(lengths_C), dtype=bool) if batch.mismatched is None else _host(batch.mismatched)
    ids_C: list[Any] = [_span(places.ids_T, a, n) for a, n in zip(places.own_C, places.own_len_C, strict=True)]
    steps_C = None if batch.step is None else _steps(places, _host(batch.step), other_C)
    if steps_C is None and (lengths_C != places.own_len_C).any():
        raise ValueError(_MIXED)
    rows_E = _host(batch.rows).tolist()
    grade_C, preference_E, margin_E = (
        None if x is None else _host(x).tolist() for x in (batch.grade, batch.preference, batch.margin)
    )
    samples = []
    for e, (row, first, end) in enumerate(zip(rows_E, places.first_E1, places.first_E1[1:], strict=False)):
        last = end - int(other_C[first:end].sum())  # mismatched answers come last
        samples.append(
            Sample(
                _span(places.ids_T, places.prompt_C[first], places.prompt_len_C[first]),
                ids_C[first:last],
                row,
                steps=None if steps_C is None else steps_C[first:last],
                grades=None if grade_C is None else grade_C[first:last],
                preference=None if preference_E is None else preference_E[e],
                margin=None if margin_E is None else margin_E[e],
                mismatched=ids_C[last:end],
            )
        )
    return samples


def halves(batch: PackedBatch) -> list[PackedBatch]:
    """The first and the second half of the samples as two batches: same layout, same device, keys split along.

    Raises:
        ValueError: the batch has one sample only.
    """
    samples = unpack(batch)
    if len(samples) < 2:
        raise ValueError(
            f"A batch of one sample (row {samples[0].row}, {batch.input_ids.numel()} tokens) can't be halved."
        )
    middle = len(samples) // 2
    cut = sum(len(s.completions) + len(s.mismatched) for s in samples[:middle])
    lay_out = pack if batch.shared else pad_rows
    result = []
    for part, own_C in ((samples[:middle], slice(0, cut)), (samples[middle:], slice(cut, None))):
        kept: dict[str, Any] = {}
        if batch.keys is not None:
            kept["keys"] = tuple(batch.keys)[own_C]
        if batch.mismatched is not None:  # stays a field of both, even where one half has no such answer
            kept["mismatched"] = batch.mismatched[own_C].cpu()
        result.append(replace(lay_out(part), **kept).to(batch.input_ids.device))
    return result


def content_keys(batch: PackedBatch) -> tuple[bytes, ...]:
    """One 16-byte digest per completion of what its log-probs depend on, given the model.

    That is the ids of prompt + completion and which of them are predicted. Where the prompt ends counts by the latter
    alone. Labels, row numbers, the other completions, the layout and the padding don't count.
    """
    # A padded row is hashed as a whole: its border is not needed.
    places = _shared_places(batch) if batch.shared else _row_places(batch)
    prompt_len_N = np.repeat(places.prompt_len_C, np.diff(places.bounds_C1))
    ids, predicted = (_little_endian(x) for x in (places.ids_T, prompt_len_N + places.index_N))
    fields = (places.prompt_C, places.prompt_len_C, places.own_C, places.own_len_C, places.bounds_C1)
    keys = []
    for p, p_len, c, c_len, a, b in zip(*(x.tolist() for x in fields), places.bounds_C1[1:].tolist(), strict=False):
        # The two counts come first, so that no two contents are one string of bytes.
        digest = blake2b(struct.pack("<3q", KEY_VERSION, p_len + c_len, b - a), digest_size=KEY_BYTES)
        digest.update(ids[p : p + p_len])
        digest.update(ids[c : c + c_len])
        digest.update(predicted[a:b])
        keys.append(digest.digest())
    return tuple(keys)


def _shared_places(batch: PackedBatch) -> _Places:
    assert batch.cu_seq_q is not None and batch.sample_index is not None
    sample_of_C, bounds_S1 = _host(batch.sample_of), _host(batch.cu_seq_q)
    first_E1 = _first_completions(batch)
    # A sample has one segment more than completions, unless its prompt is empty.
    first_segment_E = np.searchsorted(bounds_S1, _host(batch.sample_index[:, 0]))
    segments_E = np.diff(np.append(first_segment_E, len(bounds_S1) - 1))
    prompts_E = segments_E - np.diff(first_E1)
    own_segment_C = np.arange(len(sample_of_C)) + np.cumsum(prompts_E)[sample_of_C]
    starts_S, lengths_S = bounds_S1[:-1], np.diff(bounds_S1)
    return _places(
        batch,
        prompt_C=starts_S[first_segment_E][sample_of_C],
        prompt_len_C=(lengths_S[first_segment_E] * prompts_E)[sample_of_C],
        own_C=starts_S[own_segment_C],
        own_len_C=lengths_S[own_segment_C],
        first_E1=first_E1,
    )


def _row_places(batch: PackedBatch) -> _Places:
    """Of a padded batch, with every row taken as a completion of an empty prompt."""
    assert batch.attention_mask is not None
    starts_C = np.arange(batch.num_completions) * batch.input_ids.shape[1]
    return _places(
        batch,
        prompt_C=starts_C,
        prompt_len_C=np.zeros_like(starts_C),
        own_C=starts_C,
        own_len_C=_host(batch.attention_mask.sum(1)),
        first_E1=_first_completions(batch),
    )


def _padded_places(batch: PackedBatch) -> _Places:
    rows = _row_places(batch)
    scored_C = rows.index_N[rows.bounds_C1[:-1]]  # a row is not predicted before this place
    prompt_len_C = np.empty_like(scored_C)
    for first, end in zip(rows.first_E1, rows.first_E1[1:], strict=False):
        most = int(scored_C[first:end].min())
        starts = np.stack([_span(rows.ids_T, a, most) for a in rows.own_C[first:end]])
        differing = np.flatnonzero((starts != starts[0]).any(0))
        prompt_len_C[first:end] = differing[0] if len(differing) else most
    return rows._replace(
        prompt_len_C=prompt_len_C,
        own_C=rows.own_C + prompt_len_C,
        own_len_C=rows.own_len_C - prompt_len_C,
        index_N=rows.index_N - np.repeat(prompt_len_C, np.diff(rows.bounds_C1)),
    )


def _places(batch: PackedBatch, own_C: np.ndarray, **rest: np.ndarray) -> _Places:
    lengths_C = _host(batch.lengths)
    # The prompt's last position predicts the first token; it stands before the completion, near or far.
    index_N = np.maximum(_host(batch.pred_pos) - np.repeat(own_C, lengths_C) + 1, 0)
    bounds_C1 = np.append(0, np.cumsum(lengths_C))
    return _Places(_host(batch.input_ids).reshape(-1), own_C=own_C, bounds_C1=bounds_C1, index_N=index_N, **rest)


def _first_completions(batch: PackedBatch) -> np.ndarray:
    return np.searchsorted(_host(batch.sample_of), np.arange(batch.num_samples + 1))


def _steps(places: _Places, step: np.ndarray, other_C: np.ndarray) -> list[Any]:
    """The step of every token of each completion, -1 where it isn't scored. Mismatched answers have none."""
    lengths_C = np.where(other_C, 0, np.diff(places.bounds_C1))
    if len(step) != lengths_C.sum():
        raise ValueError(_MIXED)
    steps_C = [np.full(n, -1) for n in places.own_len_C]
    ends_C = np.cumsum(lengths_C)
    for steps, n, end, first in zip(steps_C, lengths_C, ends_C, places.bounds_C1, strict=False):
        steps[places.index_N[first : first + n]] = step[end - n : end]
    return steps_C


def _span(ids_T: np.ndarray, start: int, length: int) -> Any:
    return ids_T[start : start + length]


def _little_endian(x: Any) -> memoryview:
    """Of int64 numbers; slices of it are cheaper than those of an array."""
    return memoryview(x.astype("<i8", copy=False))


def _host(tensor: Tensor) -> np.ndarray:
    return tensor.cpu().numpy()
