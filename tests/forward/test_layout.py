"""`pack`, `pad_rows` and `visible`: a batch worked by hand, then random ones against a slow walk over the tokens."""

import random

import numpy as np
import pytest
import torch
from forward_models import random_samples
from torch import Tensor

from dpo_peft.forward import PackedBatch, Sample, pack, pad_rows
from dpo_peft.forward.attention import AttentionPlan, by_sample
from dpo_peft.forward.layout import visible

# Two prompts; the first with two completions, the second with one.
BY_HAND = [Sample([10, 11, 12], [[20, 21], [30]], row=7), Sample([13], [[40, 41, 42]], row=3)]
INDEX_FIELDS = (
    "input_ids position_ids pred_pos target completion_of sample_of rows segment context sample_index kv_index"
)


def token_mask(batch: PackedBatch, window: int | None = None) -> Tensor:
    """(T, T) booleans from the predicate: may token q (row) see token k (column)?"""
    segment, context, pos = batch.segment, batch.context, batch.position_ids[0]
    return visible(segment[:, None], context[:, None], pos[:, None], segment[None], pos[None], window)


def walk(samples: list[Sample]) -> list[dict]:
    """Every token of the packed row in order: its id, position, owner and the packed positions that it may see.

    A completion's token sees what it would see if prompt + completion stood alone: all before it, and itself.
    """
    tokens: list[dict] = []
    for e, sample in enumerate(samples):
        before: list[int] = []
        for token in sample.prompt:
            before = [*before, len(tokens)]
            tokens.append(dict(id=token, pos=len(before) - 1, sample=e, completion=None, sees=before))
        for c, completion in enumerate(sample.completions):
            path = before
            for token in completion:
                path = [*path, len(tokens)]
                tokens.append(dict(id=token, pos=len(path) - 1, sample=e, completion=(e, c), sees=path))
    return tokens


def random_batch(rng: random.Random) -> list[Sample]:
    shape = [
        (rng.choice([1, 2, 3, 7, 13]), [rng.choice([1, 1, 2, 5, 9, 17]) for _ in range(rng.randint(1, 5))])
        for _ in range(rng.randint(1, 5))
    ]
    return random_samples(shape, seed=rng.randint(0, 10**6))


BATCHES = [random_batch(random.Random(seed)) for seed in range(40)]


def test_pack_by_hand() -> None:
    batch = pack(BY_HAND)
    expected = dict(
        input_ids=[[10, 11, 12, 20, 21, 30, 13, 40, 41, 42]],
        position_ids=[[0, 1, 2, 3, 4, 3, 0, 1, 2, 3]],
        pred_pos=[2, 3, 2, 6, 7, 8],  # the prompt's last token predicts the first token of each completion
        target=[20, 21, 30, 40, 41, 42],
        completion_of=[0, 0, 1, 2, 2, 2],
        sample_of=[0, 0, 1],
        rows=[7, 3],
        segment=[0, 0, 0, 1, 1, 2, 3, 4, 4, 4],
        context=[0, 0, 0, 0, 0, 0, 3, 3, 3, 3],
        sample_index=[[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, -1, -1]],
        kv_index=[0, 1, 2] + [0, 1, 2, 3, 4] + [0, 1, 2, 5] + [6] + [6, 7, 8, 9],
        cu_seq_q=[0, 3, 5, 6, 7, 10],
        cu_seq_k=[0, 3, 8, 12, 13, 17],
    )
    for field, value in expected.items():
        assert getattr(batch, field).tolist() == value, field
    assert (batch.max_q, batch.max_k, batch.num_samples, batch.num_completions) == (3, 5, 2, 3)
    assert batch.shared and batch.attention_mask is None
    assert all(getattr(batch, field).dtype == torch.int64 for field in INDEX_FIELDS.split())
    assert batch.cu_seq_q.dtype == batch.cu_seq_k.dtype == torch.int32


def test_mask_by_hand() -> None:
    mask = [
        "1.........",  # prompt
        "11........",
        "111.......",
        "1111......",  # first completion
        "11111.....",
        "111..1....",  # second completion: not the first
        "......1...",  # the other sample
        "......11..",
        "......111.",
        "......1111",
    ]
    assert ["".join(".1"[x] for x in row) for row in token_mask(pack(BY_HAND)).tolist()] == mask
    windowed = ["1", "11", ".11", "..11", "...11", "..1..1", "......1", "......11", ".......11", "........11"]
    rows = token_mask(pack(BY_HAND), window=2).tolist()
    assert ["".join(".1"[x] for x in row) for row in rows] == [row.ljust(10, ".") for row in windowed]


def test_pad_rows_by_hand() -> None:
    batch = pad_rows(BY_HAND, pad_token_id=99)
    expected = dict(
        input_ids=[[10, 11, 12, 20, 21], [10, 11, 12, 30, 99], [13, 40, 41, 42, 99]],
        attention_mask=[[1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1, 1, 0]],
        lengths=[2, 1, 3],
        position_ids=[[0, 1, 2, 3, 4]] * 3,
        pred_pos=[2, 3, 7, 10, 11, 12],
        target=[20, 21, 30, 40, 41, 42],
        completion_of=[0, 0, 1, 2, 2, 2],
        sample_of=[0, 0, 1],
        rows=[7, 3],
    )
    for field, value in expected.items():
        assert getattr(batch, field).tolist() == value, field
    assert not batch.shared and set(batch.as_dict()) == {*expected, "max_q", "max_k", "num_own", "samples"}


@pytest.mark.parametrize("window", [None, 1, 4])
def test_visible_matches_the_walk(window: int | None) -> None:
    for samples in BATCHES:
        tokens = walk(samples)
        expected = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
        for q, token in enumerate(tokens):
            expected[q, token["sees"] if window is None else token["sees"][-window:]] = True
        assert torch.equal(token_mask(pack(samples), window), expected)


def test_pack_matches_the_walk() -> None:
    for samples in BATCHES:
        batch, tokens = pack(samples), walk(samples)
        assert batch.input_ids.tolist() == [[t["id"] for t in tokens]]
        assert batch.position_ids.tolist() == [[t["pos"] for t in tokens]]
        predicted = [t for t in tokens if t["completion"] is not None]
        names = sorted({t["completion"] for t in predicted})
        assert batch.pred_pos.tolist() == [t["sees"][-2] for t in predicted]  # whoever stands right before it
        assert batch.target.tolist() == [t["id"] for t in predicted]
        assert batch.completion_of.tolist() == [names.index(t["completion"]) for t in predicted]
        assert batch.sample_of.tolist() == [e for e, _ in names]
        assert batch.rows.tolist() == [s.row for s in samples]


def test_segments_match_the_walk() -> None:
    """A segment's keys are exactly what its last token sees: a causal kernel aligned at the bottom right is right."""
    for samples in BATCHES:
        batch, tokens = pack(samples), walk(samples)
        cu_q, cu_k = batch.cu_seq_q.tolist(), batch.cu_seq_k.tolist()
        assert cu_q[0] == cu_k[0] == 0 and cu_q[-1] == len(tokens) and cu_k[-1] == len(batch.kv_index)
        assert len(cu_q) == len(cu_k) == 1 + sum(1 + len(s.completions) for s in samples)
        for i in range(len(cu_q) - 1):
            own = [(t["sample"], t["completion"]) for t in tokens[cu_q[i] : cu_q[i + 1]]]
            assert len(set(own)) == 1
            assert batch.kv_index[cu_k[i] : cu_k[i + 1]].tolist() == tokens[cu_q[i + 1] - 1]["sees"]
        assert batch.max_q == np.diff(cu_q).max() and batch.max_k == np.diff(cu_k).max()
        for e, row in enumerate(batch.sample_index.tolist()):
            own = [i for i, t in enumerate(tokens) if t["sample"] == e]
            assert row == own + [-1] * (len(row) - len(own))


@pytest.mark.parametrize("window", [None, 3])
def test_dense_mask_is_the_predicate_cut_into_samples(window: int | None) -> None:
    for samples in BATCHES[:15]:
        batch = pack(samples)
        mask, whole = by_sample(AttentionPlan(batch, "dense"), window).mask_EQB, token_mask(batch, window)
        assert bool(mask.any(2).all())  # no empty row, which would give NaN
        for e, row in enumerate(batch.sample_index.tolist()):
            own = [i for i in row if i >= 0]
            assert torch.equal(mask[e, : len(own), : len(own)], whole[own][:, own])
            assert not mask[e, : len(own), len(own) :].any()  # no one sees padding
            outside = [i for i in range(len(whole)) if i not in own]
            assert not whole[own][:, outside].any()  # nothing is lost by cutting


def test_pad_rows_matches_the_rows() -> None:
    for samples in BATCHES:
        batch, packed = pad_rows(samples, pad_token_id=2), pack(samples)
        rows = [list(s.prompt) + list(c) for s in samples for c in s.completions]
        assert batch.input_ids.tolist() == [row + [2] * (batch.input_ids.shape[1] - len(row)) for row in rows]
        assert batch.attention_mask.sum(1).tolist() == [len(row) for row in rows]
        # Labels, completions and samples are the same as packed; only positions differ.
        for field in ("target", "completion_of", "sample_of", "rows"):
            assert torch.equal(getattr(batch, field), getattr(packed, field)), field
        row_of = batch.pred_pos // batch.input_ids.shape[1]
        assert torch.equal(row_of, batch.completion_of)
        assert torch.equal(batch.input_ids.flatten()[batch.pred_pos + 1], batch.target)


def test_arrays_and_tensors_are_taken_as_ids() -> None:
    lists = pack(BY_HAND)
    arrays = [Sample(np.array(s.prompt), [np.array(c, dtype=np.int32) for c in s.completions], s.row) for s in BY_HAND]
    for other in (pack(arrays), pack([Sample(torch.tensor(s.prompt), *s[1:]) for s in BY_HAND])):
        for field, value in lists.as_dict().items():
            assert field == "samples" or torch.equal(torch.as_tensor(getattr(other, field)), torch.as_tensor(value))


def test_as_dict_gives_the_batch_back() -> None:
    for batch in (pack(BY_HAND), pad_rows(BY_HAND)):
        again = PackedBatch(**batch.as_dict()).to("cpu")
        assert again.shared == batch.shared and again.samples is batch.samples
        for field, value in batch.as_dict().items():
            assert field == "samples" or torch.equal(torch.as_tensor(getattr(again, field)), torch.as_tensor(value))


@pytest.mark.parametrize("layout", [pack, pad_rows])
@pytest.mark.parametrize(
    "bad",
    [Sample([], [[1]], 41), Sample([1], [[2], []], 41), Sample([1], [], 41), Sample(np.array([]), [[1]], 41)],
    ids=["empty prompt", "empty completion", "no completion", "empty array"],
)
def test_empty_parts_are_refused_by_row(layout, bad: Sample) -> None:
    with pytest.raises(
        ValueError, match=r"Sample 1 of the batch \(row 41\).*empty.*(Drop the row|at least one token)"
    ):
        layout([BY_HAND[0], bad])


@pytest.mark.parametrize("layout", [pack, pad_rows])
def test_empty_batch_is_refused(layout) -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        layout([])


# A trajectory pair that shares its first two tokens; in both, another speaker's turn is read and not predicted.
SHARED = Sample([10, 11], [[20, 21, 22], [30, 31]], 5, steps=[[0, -1, 1], [0, 0]], preference=0.5, margin=0.25)
# One that shares nothing: nobody predicts the first tokens.
APART = Sample([], [[40, 41, 42], [50, 51]], 6, steps=[[-1, 0, 1], [-1, 0]], preference=1.0, margin=-1.0)


def test_trajectories_by_hand() -> None:
    batch = pack([SHARED, APART])
    assert batch.input_ids.tolist() == [[10, 11, 20, 21, 22, 30, 31, 40, 41, 42, 50, 51]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 2, 3, 0, 1, 2, 0, 1]]
    assert batch.pred_pos.tolist() == [1, 3, 1, 5, 7, 8, 10]
    assert batch.target.tolist() == [20, 22, 30, 31, 41, 42, 51]
    assert batch.step.tolist() == [0, 1, 0, 0, 0, 1, 0]
    assert batch.completion_of.tolist() == [0, 0, 1, 1, 2, 2, 3]
    assert batch.lengths.tolist() == [2, 2, 2, 1]
    assert batch.preference.tolist() == [0.5, 1.0]
    assert batch.margin.tolist() == [0.25, -1.0]
    rows = ["1", "11", "111", "1111", "11111", "11...1", "11...11"]
    rows += [".......1", ".......11", ".......111", "..........1", "..........11"]
    assert ["".join(".1"[x] for x in row) for row in token_mask(batch).tolist()] == [
        row.ljust(12, ".") for row in rows
    ]
    assert batch.cu_seq_q.tolist() == [0, 2, 5, 7, 10, 12]
    assert batch.cu_seq_k.tolist() == [0, 2, 7, 11, 14, 16]
    assert batch.kv_index.tolist() == [0, 1] + [0, 1, 2, 3, 4] + [0, 1, 5, 6] + [7, 8, 9] + [10, 11]
    padded = pad_rows([SHARED, APART])
    flat = padded.input_ids.flatten()
    assert flat[padded.pred_pos + 1].tolist() == padded.target.tolist() == batch.target.tolist()
    assert padded.step.tolist() == batch.step.tolist()


def test_mismatched_answers_stand_last_and_are_marked() -> None:
    sample = Sample([10], [[20, 21]], 3, grades=[1.0], mismatched=[[30, 31, 32]])
    other = Sample([11], [[30, 31, 32]], 4, grades=[0.0], mismatched=[[20, 21]])
    for batch in (pack([sample, other]), pad_rows([sample, other])):
        assert batch.mismatched.tolist() == [False, True, False, True]
        assert batch.grade.tolist() == [1.0, 0.0, 0.0, 0.0]
        assert batch.sample_of.tolist() == [0, 0, 1, 1]
        assert batch.target.tolist() == [20, 21, 30, 31, 32, 30, 31, 32, 20, 21]
        assert batch.num_own == 2


@pytest.mark.parametrize("layout", [pack, pad_rows])
def test_an_unpredictable_token_is_refused(layout) -> None:
    with pytest.raises(ValueError, match=r"row 6.*nothing predicts the first token"):
        layout([SHARED, APART._replace(steps=[[0, 0, 1], [-1, 0]])])
    with pytest.raises(ValueError, match=r"row 5.*without scored tokens"):
        layout([SHARED._replace(steps=[[-1, -1, -1], [0, 0]])])


def test_a_list_costs_its_prompt_once() -> None:
    """P + the sum of C tokens go through the model, for lists of 1 + m answers, m from 1 to 7."""
    samples = [Sample([1] * 50, [[2] * (3 + k) for k in range(1 + m)]) for m in range(1, 8)]
    tokens = sum(len(s.prompt) + sum(map(len, s.completions)) for s in samples)
    assert pack(samples).input_ids.shape == (1, tokens)
    assert int(pad_rows(samples).attention_mask.sum()) == tokens + 50 * sum(range(1, 8))
