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

Of an answer-only adapter (`scope.py`) the tokens that it acts on are the row's last ones: all prompts stand first, and
each completion begins with the tokens of its prompt from the invocation on:

    p0 p0 | p1 | p0 a0 a0 | p0 b0 b0 b0 | p1 a1 | p1 b1 ...

A batch keeps its samples, so that it can be laid out again in two (`halves`) and its completions be named for a cache
of their log-probs (`content_keys`).

Shape suffixes: R rows, L row length, T = R * L flat positions, S segments (a prompt or a completion), E samples,
B longest sample in tokens, C completions, N predicted tokens, M most copies of a token among the keys.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .images import BatchImages, SampleImages, kept_images

_long = partial(torch.as_tensor, dtype=torch.int64)
_int32 = partial(torch.as_tensor, dtype=torch.int32)
_double = partial(torch.as_tensor, dtype=torch.float64)


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
    mismatched: Sequence[Sequence[int]] = ()  # completions of other prompts, laid out as further completions
    images: SampleImages | None = None  # whose tokens the prompt holds
    adapter_start: int | None = None  # place in the prompt from which an answer-only adapter acts

    @property
    def alone(self) -> int:
        """Returns how many of the prompt's tokens are laid out once for all completions."""
        return len(self.prompt) if self.adapter_start is None else self.adapter_start


@dataclass(frozen=True)
class Samples:
    """The samples of a batch. What moves batches between processes and devices does not look inside."""

    kept: tuple[Sample, ...]


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
    grade: Tensor | None = None  # (C,) float64, higher is better; 0 for mismatched completions
    preference: Tensor | None = None  # (E,) float64, probability that the first completion is the better one
    margin: Tensor | None = None  # (E,) float64, in rewards
    mismatched: Tensor | None = None  # (C,) bool, True for a completion of another prompt
    attention_mask: Tensor | None = None  # (R, L) 1 for tokens, 0 for padding; None when prompts are shared
    alora_offsets: Sequence[int] | None = None  # (R,) last positions of each row that an answer-only adapter acts on
    # The rest exists only when prompts are shared.
    segment: Tensor | None = None  # (T,) segment of each token
    context: Tensor | None = None  # (T,) the prompt segment that each token may also see
    sample_index: Tensor | None = None  # (E, B) flat positions of each sample's tokens, -1 where shorter than B
    query_index: Tensor | None = None  # the same of its completions, where all prompts stand first
    kv_index: Tensor | None = None  # (sum of keys,) flat positions of [prompt; own tokens] for each segment in turn
    kv_copies: Tensor | None = None  # (T, M) places of each token in kv_index, -1 where it has fewer than M
    cu_seq_q: Tensor | None = None  # (S + 1,) int32 bounds of the segments among the queries
    cu_seq_k: Tensor | None = None  # (S + 1,) int32 bounds of the segments in kv_index
    max_q: int = 0  # longest segment
    max_k: int = 0  # longest [prompt; own tokens]
    num_own: int = 0  # completions that are not mismatched
    segments: Sequence[tuple[int, int]] | None = None  # (S,) length, and index of the segment that is its context
    keys: Any = None  # (C,) bytes, from `content_keys`
    router_slopes: Tensor | None = None  # (E, X), from `routing.slopes`, where more micro-batches belong together
    samples: Samples | None = None  # what was laid out, on the host
    images: BatchImages | None = None  # of the samples, on the host until they are encoded

    @cached_property
    def shared(self) -> bool:
        """Whether each prompt is computed once."""
        return self.attention_mask is None

    @cached_property
    def num_samples(self) -> int:
        """Returns the number of prompts, E."""
        return self.rows.shape[0]

    @cached_property
    def num_completions(self) -> int:
        """Returns the number of completions over all samples, C."""
        return self.sample_of.shape[0]

    def to(self, device: torch.device | str) -> "PackedBatch":
        """Returns the same batch on `device`."""
        tensors = {name: value for name, value in self.as_dict().items() if isinstance(value, Tensor)}
        moved: dict[str, Any] = {name: x.to(device, non_blocking=True) for name, x in tensors.items()}
        return replace(self, **moved)

    def as_dict(self) -> dict[str, Any]:
        """Returns the fields that are not empty by their names, as a collator does."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}


def visible(
    segment_q: Tensor,
    context_q: Tensor,
    pos_q: Tensor,
    segment_k: Tensor,
    pos_k: Tensor,
    window: int | None = None,
    chunk: int | None = None,
    blocks: tuple[Tensor, Tensor, bool] | None = None,
) -> Tensor:
    """Returns the mask predicate: True where a query may see a key.

    A token sees its own segment and its prompt, up to its own position; under a sliding window only keys whose
    position is less than `window` behind, with chunks only keys of its own `chunk` positions. Tokens of one block,
    given as the `blocks` of queries and of keys (0: in none), see each other whatever their positions are; only down
    to the window's end if it cuts blocks, the third of the tuple. Arguments broadcast against each other; the result
    is boolean.
    """
    same_or_prompt = (segment_k == segment_q) | (segment_k == context_q)
    mask = same_or_prompt & (pos_k <= pos_q)
    if chunk is not None:
        mask &= pos_k // chunk == pos_q // chunk
    if blocks is not None and blocks[2]:
        mask |= (blocks[0] == blocks[1]) & (blocks[0] > 0)
    if window is not None:
        mask &= pos_k > pos_q - window
    return mask if blocks is None or blocks[2] else mask | ((blocks[0] == blocks[1]) & (blocks[0] > 0))


def _check(samples: Sequence[Sample]) -> None:
    if not samples:
        raise ValueError("A batch needs at least one sample.")
    if len({sample.steps is None for sample in samples}) > 1:  # the batch would hold the steps of some only
        raise ValueError("Samples with and without steps can't be in one batch. Lay them out apart.")
    for i, sample in enumerate(samples):
        if problem := _problem(sample):
            raise ValueError(f"Sample {i} of the batch (row {sample.row}) has {problem}")


def _problem(sample: Sample) -> str | None:
    if not len(sample.completions) or not all(map(len, [*sample.completions, *sample.mismatched])):
        return "an empty completion or none: nothing can be predicted there. Drop the row."
    if not len(sample.prompt) and (sample.steps is None or any(steps[0] >= 0 for steps in sample.steps)):
        return "an empty prompt: nothing predicts the first token. Give the prompt at least one token, such as BOS."
    if sample.steps is not None and not all(max(steps) >= 0 for steps in sample.steps):
        return "a completion without scored tokens."
    return None


def scored_places(sample: Sample) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns for each completion, mismatched ones last, its ids and the places in it that are predicted."""
    ids = [np.asarray(c) for c in (*sample.completions, *sample.mismatched)]
    if sample.steps is None:
        return [(c, np.arange(len(c))) for c in ids]
    own = [(c, np.flatnonzero(np.asarray(steps) >= 0)) for c, steps in zip(ids, sample.steps, strict=False)]
    return own + [(c, np.arange(len(c))) for c in ids[len(own) :]]


def pack(samples: Sequence[Sample]) -> PackedBatch:
    """Lays samples out in one row, each prompt once (see the head of this file).

    Raises:
        ValueError: no samples, or a sample in which nothing can predict or be predicted.
    """
    _check(samples)
    parts: list[_Segment] = []
    for sample in samples:
        first, again = len(parts), np.asarray(sample.prompt[sample.alone :], dtype=np.int64)
        if sample.alone:
            parts.append(_Segment(np.asarray(sample.prompt[: sample.alone]), first, None))
        for completion, places in scored_places(sample):
            prompt = first if sample.alone else len(parts)
            parts.append(_Segment(np.append(again, completion), prompt, len(again) + places))
    sizes = [bool(s.alone) + len(s.completions) + len(s.mismatched) for s in samples]  # in segments
    members = np.repeat(np.arange(len(samples)), sizes)
    scoped = samples[0].adapter_start is not None
    if scoped:  # prompts first
        order = np.argsort([part.scored is not None for part in parts], kind="stable")
        moved, members = np.argsort(order).tolist(), members[order]
        parts = [parts[i]._replace(context=moved[parts[i].context]) for i in order]
    lengths, context = np.array([len(part.ids) for part in parts]), np.array([part.context for part in parts])
    bounds = np.append(0, lengths.cumsum())
    starts, ends = bounds[:-1], bounds[1:]
    before = np.where(context == np.arange(len(parts)), 0, lengths[context])  # tokens of the context
    # The keys of a segment are its context's tokens and then its own.
    keys = _ranges(np.stack([starts[context], starts], 1).ravel(), np.stack([before, lengths], 1).ravel())
    own = [i for i, part in enumerate(parts) if part.scored is not None]
    scored = [part.scored for part in parts if part.scored is not None]
    # A token is predicted by the one before it, a completion's first token by the last one of the prompt.
    place_N, segment_N = np.concatenate(scored), np.repeat(own, [len(places) for places in scored])
    pred_pos = np.where(place_N == 0, ends[context[segment_N]], starts[segment_N] + place_N) - 1
    target = [parts[segment].ids[places] for segment, places in zip(own, scored, strict=True)]
    tokens_E = np.bincount(members, lengths, len(samples)).astype(np.int64)
    sample_index = _table_of_ranges(np.append(0, tokens_E.cumsum()))
    found: dict[str, Any] = {}
    if scoped:
        by_sample = np.argsort(np.repeat(members, lengths), kind="stable")
        sample_index = np.where(sample_index < 0, -1, by_sample[sample_index])
        acted_E = np.bincount(members[own], lengths[own], len(samples)).astype(np.int64)
        query_index = _table_of_ranges(bounds[own[0]] + np.append(0, acted_E.cumsum()))
        found = {"alora_offsets": (int(lengths[own].sum()),), "query_index": _long(query_index)}
    return PackedBatch(
        input_ids=_long(np.concatenate([part.ids for part in parts]))[None],
        position_ids=_long(_ranges(before, lengths))[None],
        pred_pos=_long(pred_pos),
        target=_long(np.concatenate(target)),
        **_labels(samples, target),
        **found,
        segment=_long(np.repeat(np.arange(len(parts)), lengths)),
        context=_long(np.repeat(context, lengths)),
        sample_index=_long(sample_index),
        kv_index=_long(keys),
        kv_copies=_long(_places_of_values(keys)),
        segments=tuple(zip(lengths.tolist(), context.tolist(), strict=True)),
        cu_seq_q=_int32(bounds),
        cu_seq_k=_int32(np.append(0, (before + lengths).cumsum())),
        max_q=int(lengths.max()),
        max_k=int((before + lengths).max()),
    )


class _Segment(NamedTuple):
    """A prompt or a completion in the packed row."""

    ids: np.ndarray
    context: int  # index of its prompt's segment, or its own where there is none
    scored: np.ndarray | None  # places of its predicted tokens; None of a prompt


def pad_rows(samples: Sequence[Sample], pad_token_id: int = 0) -> PackedBatch:
    """Lays samples out as one right-padded row per completion, prompt + completion in each.

    Raises:
        ValueError: no samples, or a sample in which nothing can predict or be predicted.
    """
    _check(samples)
    rows = [(sample.prompt, completion, places) for sample in samples for completion, places in scored_places(sample)]
    starts = np.array([len(prompt) for prompt, _, _ in rows])  # of the completions
    ends = starts + [len(completion) for _, completion, _ in rows]
    length = ends.max()
    filled = np.arange(length) < ends[:, None]
    input_ids = np.full(filled.shape, pad_token_id)
    input_ids[filled] = np.concatenate([ids for prompt, completion, _ in rows for ids in (prompt, completion)])
    pred_pos = [r * length + starts[r] - 1 + places for r, (_, _, places) in enumerate(rows)]
    target = [completion[places] for _, completion, places in rows]
    acts_from = [
        sample.adapter_start for sample in samples for _ in scored_places(sample) if sample.adapter_start is not None
    ]
    return PackedBatch(
        input_ids=_long(input_ids),
        position_ids=_long(np.arange(length)).repeat(len(rows), 1),
        pred_pos=_long(np.concatenate(pred_pos)),
        target=_long(np.concatenate(target)),
        **_labels(samples, target),
        attention_mask=_long(filled),
        alora_offsets=tuple(int(length) - start for start in acts_from) or None,
    )


def _labels(samples: Sequence[Sample], target: list[np.ndarray]) -> dict[str, Any]:
    """Returns the fields that say whose completion is whose, and what the samples say about them."""
    own = [len(s.completions) for s in samples]
    others = [len(s.mismatched) for s in samples]
    lengths = np.array([len(t) for t in target])
    found: dict[str, Any] = {
        "completion_of": _long(np.repeat(np.arange(len(target)), lengths)),
        "sample_of": _long(np.repeat(np.arange(len(samples)), np.add(own, others))),
        "rows": _long(np.array([s.row for s in samples])),
        "lengths": _long(lengths),
        "num_own": sum(own),
        "samples": Samples(tuple(samples)),
        "images": kept_images(samples),
    }
    first = samples[0]
    if first.steps is not None:
        steps = np.concatenate([np.asarray(step) for s in samples for step in s.steps or ()])
        found["step"] = _long(steps[steps >= 0])
    if first.grades is not None:
        found["grade"] = _double([g for s in samples for g in (*(s.grades or ()), *[0.0] * len(s.mismatched))])
    if first.preference is not None:
        found["preference"] = _double([s.preference for s in samples])
    if first.margin is not None:
        found["margin"] = _double([s.margin for s in samples])
    if any(others):
        found["mismatched"] = torch.tensor([i >= k for k, m in zip(own, others, strict=True) for i in range(k + m)])
    return found


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Returns ranges of these lengths, one after the other."""
    offsets = starts - (lengths.cumsum() - lengths)
    return np.repeat(offsets, lengths) + np.arange(lengths.sum())


def _places_of_values(values: np.ndarray) -> np.ndarray:
    """Returns the (T, M) places at which each of 0..T-1 stands in `values`, in order, -1 beyond the last."""
    order = np.argsort(values, kind="stable")
    counts = np.bincount(values)
    copy = np.arange(len(values)) - np.repeat(np.cumsum(counts) - counts, counts)
    places = np.full((len(counts), counts.max()), -1)
    places[values[order], copy] = order
    return places


def _table_of_ranges(bounds_E1: np.ndarray) -> np.ndarray:
    """Returns an (E, B) table of the positions between bounds, -1 beyond each range's end."""
    lengths = np.diff(bounds_E1)
    offsets = np.arange(lengths.max())
    return np.where(offsets < lengths[:, None], bounds_E1[:-1, None] + offsets, -1)


# ---- A batch again, from its samples --------------------------------------------------------------------------------


def kept_samples(batch: PackedBatch) -> tuple[Sample, ...]:
    """Returns the samples that a batch was laid out from; a batch without them is a ValueError."""
    if batch.samples is None:
        raise ValueError(
            "This batch does not hold its samples. A collator of your own should return all fields of what `pack` or "
            "`pad_rows` gives (`as_dict`), `samples` among them."
        )
    return batch.samples.kept


def halves(batch: PackedBatch) -> list[PackedBatch]:
    """Lays the first and the second half of the samples out as two batches: same layout, same device, keys cut along.

    Raises:
        ValueError: the batch has one sample only, or does not hold its samples.
    """
    samples = kept_samples(batch)
    if len(samples) < 2:
        raise ValueError(
            f"A batch of one sample (row {samples[0].row}, {batch.input_ids.numel()} tokens) can't be halved."
        )
    middle = len(samples) // 2
    cut = sum(len(s.completions) + len(s.mismatched) for s in samples[:middle])
    result = []
    for part, own_C in ((samples[:middle], slice(cut)), (samples[middle:], slice(cut, None))):
        half = pack(part) if batch.shared else pad_rows(part)
        if batch.keys is not None:
            half = replace(half, keys=tuple(batch.keys[own_C]))
        if batch.mismatched is not None:  # stays a field of both: the micro-batches of a step hold the same fields
            half = replace(half, mismatched=batch.mismatched[own_C].cpu())
        result.append(half.to(batch.input_ids.device))
    return result
