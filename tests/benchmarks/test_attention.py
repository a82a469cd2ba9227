"""The candidates of benchmarks/attention.py, as far as a machine without a GPU can hold them."""

import importlib.util
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from paths import REPO
from torch import Tensor

from dpo_peft.forward import Sample, pack
from dpo_peft.forward.attention import AttentionPlan, HeadShape, attend_dense, backend_named
from dpo_peft.forward.layout import PackedBatch, visible

# Lengths of a prompt and its completions: segments of one token, several blocks, and prompts that end within one.
# After an empty prompt, completions see nobody else.
LENGTHS = [(300, 5, 290), (1, 1, 1), (0, 70, 40), (64, 130, 1, 60)]
SHORT = [(5, 3, 4), (0, 2, 3), (1, 1)]


@pytest.fixture(scope="module")
def scripts() -> Iterator[tuple[ModuleType, ModuleType]]:
    names = ("attention_merged", "attention")
    for name in names:
        spec = importlib.util.spec_from_file_location(name, REPO / "benchmarks" / f"{name}.py")
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)  # one imports the other by this name
        spec.loader.exec_module(sys.modules[name])
    yield sys.modules["attention_merged"], sys.modules["attention"]
    for name in names:
        del sys.modules[name]


def make_batch(lengths: list[tuple[int, ...]]) -> PackedBatch:
    # After an empty prompt the first token has no prediction.
    steps = [[[-1] * (n - 1) + [0] for n in completions] for _, *completions in lengths]
    return pack(
        [
            Sample([1] * prompt, [[1] * n for n in completions], steps=step)
            for (prompt, *completions), step in zip(lengths, steps, strict=True)
        ]
    )


def random_heads(batch: PackedBatch, heads: int = 4, kv_heads: int = 2, size: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    tokens = batch.input_ids.shape[1]
    counts = (heads, kv_heads, kv_heads)
    return [torch.randn(tokens, n, size, generator=generator, dtype=torch.float64) for n in counts]


# ---- FlexAttention


def test_blocks_are_those_of_the_mask_predicate(scripts) -> None:
    batch = make_batch(LENGTHS)
    segment, context, pos = batch.segment, batch.context, batch.position_ids[0]
    mask = visible(segment[:, None], context[:, None], pos[:, None], segment[None], pos[None])
    tokens, size = len(mask), scripts[1].BLOCK
    blocks = -(-tokens // size)
    padded = torch.zeros(blocks * size, blocks * size, dtype=torch.bool)
    padded[:tokens, :tokens] = mask
    counts = padded.view(blocks, size, blocks, size).sum((1, 3))
    found = scripts[1].block_mask(batch)
    assert found.shape == (1, 1, tokens, tokens)
    partly, whole = (torch.zeros(blocks, blocks, dtype=torch.bool) for _ in range(2))
    for chosen, number, indices in (
        (partly, found.kv_num_blocks, found.kv_indices),
        (whole, found.full_kv_num_blocks, found.full_kv_indices),
    ):
        for row in range(blocks):
            chosen[row, indices[0, 0, row, : number[0, 0, row]].long()] = True
    assert torch.equal(whole, counts == size * size) and whole.sum() > 2
    assert torch.equal(partly, (counts > 0) & (counts < size * size))
    place = torch.arange(tokens)
    assert torch.equal(found.mask_mod(0, 0, place[:, None], place[None]), mask)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_equals_dense(scripts) -> None:
    batch = make_batch(LENGTHS)
    qkv = random_heads(batch)
    exact = attend_dense(AttentionPlan(batch, "dense"), *qkv, 0.4, None)
    plan = AttentionPlan(batch, "dense")
    assert (scripts[1].attend_flex(plan, *qkv, 0.4, None) - exact).abs().max() < 1e-12
    assert (scripts[1].attend_flex(plan, *qkv, 0.5, None) - exact).abs().max() > 1e-2


# ---- Two calls


def parts_scores(q: Tensor, k: Tensor, part: Any, scale: float) -> Iterator[tuple[slice, slice, Tensor]]:
    """Of each range of queries, its keys, and the scaled scores (H, n, m); -inf where a causal part hides a key."""
    group = q.shape[1] // k.shape[1]
    bounds = zip(part.cu_q[:-1], part.cu_q[1:], part.cu_k[:-1], part.cu_k[1:], strict=True)
    for first, last, first_k, last_k in bounds:
        at, keys = slice(int(first), int(last)), slice(int(first_k), int(last_k))
        assert last - first <= part.max_q and 0 < last_k - first_k <= part.max_k
        scores = torch.einsum("nhd,mhd->hnm", q[at], k[keys].repeat_interleave(group, 1)) * scale
        if part.causal:
            scores = scores.masked_fill(~torch.ones(scores.shape[1:], dtype=torch.bool).tril(), -torch.inf)
        yield at, keys, scores


def dense_forward(q: Tensor, k: Tensor, v: Tensor, part: Any, scale: float) -> tuple[Tensor, Tensor]:
    out, lse = torch.full_like(q, torch.nan), q.new_full((q.shape[1], len(q)), torch.nan)
    for at, keys, scores in parts_scores(q, k, part, scale):
        values = v[keys].repeat_interleave(q.shape[1] // k.shape[1], 1)
        out[at], lse[:, at] = torch.einsum("hnm,mhd->nhd", scores.softmax(-1), values), scores.logsumexp(-1)
    return out, lse


def dense_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, part: Any, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """FlashAttention's (Dao et al. 2022, algorithm 4): probabilities from `lse`, their shift from `out`."""
    group, grads = q.shape[1] // k.shape[1], tuple(torch.zeros_like(x) for x in (q, k, v))
    for at, keys, scores in parts_scores(q, k, part, scale):
        p = (scores - lse[:, at, None]).exp()
        values, keys_n = (x[keys].repeat_interleave(group, 1) for x in (v, k))
        shift = (grad[at] * out[at]).sum(-1).T[..., None]
        grad_scores = p * (torch.einsum("nhd,mhd->hnm", grad[at], values) - shift) * scale
        grads[0][at] += torch.einsum("hnm,mhd->nhd", grad_scores, keys_n)
        grads[1][keys] += torch.einsum("hnm,nhd->mhd", grad_scores, q[at]).unflatten(1, (-1, group)).sum(2)
        grads[2][keys] += torch.einsum("hnm,nhd->mhd", p, grad[at]).unflatten(1, (-1, group)).sum(2)
    return grads


def with_own_sums(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
    """What a part's gradient would be if it were differentiated alone."""
    grad, q, k, v, _, _, part, scale = given
    return dense_backward(grad, q, k, v, *dense_forward(q, k, v, part, scale), part, scale)


def merged_results(merged: ModuleType, batch: PackedBatch, backward: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Output and gradients of the two calls, and of dense attention."""
    calls, leaves = merged.Calls(dense_forward, backward), [x.requires_grad_() for x in random_heads(batch)]
    outs = [
        merged.Merged.apply(*leaves, merged.parts_of(batch), calls, 0.6),
        attend_dense(AttentionPlan(batch, "dense"), *leaves, 0.6, None),
    ]
    grad = torch.randn(outs[0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = [[out.detach(), *torch.autograd.grad(out, leaves, grad)] for out in outs]
    return found[0], found[1]


@pytest.mark.parametrize("lengths", [LENGTHS, SHORT, [(0, 3, 2)]])
def test_two_calls_equal_dense(scripts, lengths) -> None:
    for a, b in zip(*merged_results(scripts[0], make_batch(lengths), dense_backward), strict=True):
        assert (a - b).abs().max() < 1e-11


def test_parts_differentiated_alone_would_show(scripts) -> None:
    """Negative control: the output is right, the gradients are not."""
    (out, *grads), (exact, *exact_grads) = merged_results(scripts[0], make_batch(SHORT), with_own_sums)
    assert (out - exact).abs().max() < 1e-11
    assert all((a - b).abs().max() > 1e-2 for a, b in zip(grads, exact_grads, strict=True))


def test_gradients_of_two_calls(scripts) -> None:
    merged, batch = scripts[0], make_batch([(3, 2, 1), (0, 2)])
    calls, parts = merged.Calls(dense_forward, dense_backward), merged.parts_of(batch)
    leaves = [x.requires_grad_() for x in random_heads(batch, 2, 1, 3)]
    assert torch.autograd.gradcheck(lambda *qkv: merged.Merged.apply(*qkv, parts, calls, 0.8), leaves)


def test_torch_s_kernels_take_these_arguments(scripts) -> None:
    """On tensors without data: names, order and shapes, in the release that is installed."""
    merged, batch = scripts[0], make_batch(SHORT)
    q, k, v = (x.to("meta", torch.bfloat16) for x in random_heads(batch))
    parts = merged.parts_of(batch)
    for part, rows, keys in ((parts.own, slice(None), slice(None)), (parts.on_prompts, slice(8), slice(6))):
        part = part._replace(cu_q=part.cu_q.to("meta"), cu_k=part.cu_k.to("meta"))
        given = q[rows], k[keys], v[keys]
        out, lse = merged.FLASH.forward(*given, part, 0.5)
        assert out.shape == given[0].shape and lse.shape == (4, len(given[0]))
        grads = merged.FLASH.backward(out, *given, out, lse, part, 0.5)
        assert [x.shape for x in grads] == [x.shape for x in given]


# ---- Records and results


def test_candidates_are_records_that_no_machine_without_a_gpu_supports(scripts) -> None:
    candidates = scripts[1].CANDIDATES
    assert list(candidates) == ["packed", "varlen", "flex", "merged"]
    heads = HeadShape(4, 2, 64)
    assert not any(x.supports(torch.device("cpu"), torch.bfloat16, heads) for x in candidates.values())
    assert candidates["packed"].name == "packed"  # which the memory's prediction goes by
    assert candidates["varlen"].name != "varlen"  # for which fused layers take "packed"
    for record in candidates.values():  # what one can't do is done by one that the package knows
        assert record.windows or AttentionPlan(make_batch(SHORT), record).backend_for(5).name == "varlen"


def test_figures_come_with_distances_from_dense(scripts, monkeypatch) -> None:
    """The timing itself needs a GPU; here each stage runs once. A wrong candidate's distances are large."""
    bench, batch = scripts[1], make_batch(LENGTHS)
    monkeypatch.setattr(bench, "milliseconds", lambda *stages: [float(stage() is None) for stage in stages])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    q, k, v = (x.float() for x in random_heads(batch))
    dense = backend_named("dense")
    scaled = replace(dense, attend=lambda plan, q, k, v, scaling, window: attend_dense(plan, q, k, v, 0.5, window))
    found = [bench.measure(record, batch, [q, k, v], torch.ones_like(q)) for record in (dense, scaled)]
    assert max(found[0]["errors"]) == 0 < 0.05 < min(found[1]["errors"][:2])
    names = {"errors", "forward_ms", "backward_ms", "host_forward_ms", "first_layer_ms"}
    assert set(found[0]) == names


def test_runs_are_added_to_a_file(scripts, tmp_path) -> None:
    out = tmp_path / "attention_h100.json"
    out.write_text('{"what": "older", "lines": ["kept"]}')
    for started, lines in ((1.0, [1]), (2.0, []), (2.0, [5, 6])):
        scripts[1].append(out, {"started": started, "lines": lines})
    found = json.loads(out.read_text())
    assert found["what"] == "older" and found["lines"] == ["kept"]
    assert found["runs"] == [{"started": 1.0, "lines": [1]}, {"started": 2.0, "lines": [5, 6]}]


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("NVIDIA L40S", "l40s"),
    ],
)
def test_names_of_cards(scripts, device, name) -> None:
    assert scripts[1].card_name(device) == name
