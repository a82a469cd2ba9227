"""The attention kernels for the packed layout against dense attention under the mask predicate, in float64.

On a GPU in bfloat16; elsewhere through Triton's interpreter, in a process of its own, if Triton is there. The lists of
tiles are held against the mask predicate everywhere.
"""

from typing import Any

import numpy as np
import pytest
import torch
from interpreter import DEVICE, INTERPRETED, here, instead_of_a_gpu, run_interpreted
from torch import Tensor

from dpo_peft.forward import Sample, pack
from dpo_peft.forward.attention import AttentionPlan, HeadShape, attend_dense
from dpo_peft.forward.layout import PackedBatch, visible
from dpo_peft.fused.attention import attend_backward, attend_forward, shared_attention, supports
from dpo_peft.fused.tiles import LAUNCHES, Launch, Launches, Tiles, launches_for, plan_tiles

DTYPES = [torch.float32, torch.float16] if INTERPRETED else [torch.bfloat16]
ROUNDING = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
STRETCH = 1 if INTERPRETED else 9  # on a GPU blocks are larger

# Lengths of the prompt and its completions. Blocks are 16 rows or keys (SMALL): there are segments of one token, whole
# blocks, several blocks and a rest, prompts that end within a block, and empty ones.
PAIRS = [(19, 5, 37), (1, 1, 1), (32, 16, 3)]
LISTS = [(7, 20, 1, 9), (0, 18, 4), (40, 3, 2, 33), (0, 2)]


if INTERPRETED:  # its loops to a bound read from memory: int(array) of one element, which numpy 2.4 refuses
    from triton.runtime import interpreter

    _patch = interpreter._patch_lang_tensor

    def _patch_with_index(tensor: Any, scope: Any) -> None:
        _patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = _patch_with_index


def small(hot: int) -> Launches:
    """Blocks of 16, those of the three kernels of different shapes."""
    return Launches(Launch(16, 16, 4, 1, hot), Launch(32, 16, 4, 1, hot), Launch(16, 32, 4, 1, hot))


def make_batch(lengths: list[tuple[int, ...]], stretch: int = 1) -> PackedBatch:
    samples = []
    for prompt, *completions in lengths:
        ids = [[1] * (stretch * n) for n in completions]
        steps = [[-1] * (len(c) - 1) + [0] for c in ids]  # after an empty prompt the first token has no prediction
        samples.append(Sample([1] * (stretch * prompt), ids, steps=steps))
    return pack(samples)


def segments(batch: PackedBatch) -> np.ndarray:
    assert batch.cu_seq_q is not None and batch.context is not None
    bounds = batch.cu_seq_q.numpy()
    return np.stack([np.diff(bounds), batch.context.numpy()[bounds[:-1]]], 1)


def tiles_for(batch: PackedBatch, group: int, head: int, hot: int = 1) -> Tiles:
    sizes = small(hot) if INTERPRETED else Launches(*(x._replace(hot=hot) for x in launches_for(64, DEVICE)))
    return plan_tiles(segments(batch), group, head, DEVICE, sizes)


def random(*shape: int, dtype: torch.dtype = DTYPES[0]) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=dtype)


def oracle(batch: PackedBatch, q: Tensor, k: Tensor, v: Tensor, grad: Tensor, scale: float | None) -> list[Tensor]:
    """Output and gradients of dense attention in float64."""
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    out = attend_dense(AttentionPlan(batch.to(DEVICE), "dense"), *exact, scale, None)
    return [out.detach(), *torch.autograd.grad(out, exact, grad.double())]


def distances(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    assert all(torch.isfinite(x).all() for x in found)
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]


def compute(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, tiles: Tiles, scale: float | None) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = shared_attention(*leaves, tiles, scale)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


@here
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, kv_heads, head", [(4, 1, 16), (2, 2, 16), (6, 2, 24)])  # 3 rows a token: 5 in 16
@pytest.mark.parametrize("lengths", [PAIRS, LISTS])
def test_output_and_gradients(lengths: Any, heads: int, kv_heads: int, head: int, dtype: torch.dtype) -> None:
    batch = make_batch(lengths, STRETCH)
    tokens = batch.input_ids.shape[1]
    q, grad = random(tokens, heads, head, dtype=dtype), random(tokens, heads, head, dtype=dtype)
    k, v = random(tokens, kv_heads, head, dtype=dtype), random(tokens, kv_heads, head, dtype=dtype)
    found = compute(q, k, v, grad, tiles_for(batch, heads // kv_heads, head), None)
    assert max(distances(found, oracle(batch, q, k, v, grad, None))) < ROUNDING[dtype]


@here
@pytest.mark.parametrize("hot", [0, 1, 2])
def test_blocks_without_mask_change_nothing(hot: int) -> None:
    """Large scores, so that a key too many or too few shows."""
    batch = make_batch([(50, 37, 3), (0, 40), (3, 35, 1)], STRETCH)
    tokens = batch.input_ids.shape[1]
    q, k, v, grad = random(tokens, 2, 16), random(tokens, 1, 16), random(tokens, 1, 16), random(tokens, 2, 16)
    found = compute(q, k, v, grad, tiles_for(batch, 2, 16, hot), 0.7)
    assert max(distances(found, oracle(batch, q, k, v, grad, 0.7))) < 2 * ROUNDING[q.dtype]


@here
def test_parts_of_wider_matrices_are_read_in_place() -> None:
    batch = make_batch(PAIRS, STRETCH)
    tokens, size, tiles = batch.input_ids.shape[1], 16, tiles_for(batch, 2, 16)
    qkv = random(tokens, 8 * size)
    q, k, v = (x.unflatten(1, (-1, size)) for x in qkv.split([4 * size, 2 * size, 2 * size], 1))
    grad = random(4, tokens, size).transpose(0, 1)
    out, lse = attend_forward(q, k, v, tiles, 0.25)
    grads = attend_backward(grad, q, k, v, out, lse, tiles, 0.25)
    assert max(distances([out, *grads], oracle(batch, q, k, v, grad, 0.25))) < ROUNDING[q.dtype]


@here
def test_sums_of_exponentials_are_in_powers_of_two() -> None:
    """Hand-worked: with queries of zero every key counts 1, so lse is the logarithm of the number of keys."""
    batch = make_batch([(3, 2, 1)])
    tiles = plan_tiles(segments(batch), 2, 16, DEVICE, small(1) if INTERPRETED else None)
    _, lse_GTR = attend_forward(0 * random(6, 4, 16), random(6, 2, 16), random(6, 2, 16), tiles, 1.0)
    counts = torch.tensor([1.0, 2, 3, 4, 5, 4], device=DEVICE)
    assert torch.allclose(lse_GTR, counts.log2()[None, :, None].expand(2, 6, 2), atol=1e-5)


@here
@pytest.mark.parametrize("table, column", [("forward", 3), ("grad_q", 3), ("grad_kv", 2)])
def test_a_key_or_query_too_few_would_be_noticed(table: str, column: int) -> None:
    """Negative control: one wrong bound in one tile."""
    batch = make_batch([(19, 5, 17)], STRETCH)
    tokens, tiles = batch.input_ids.shape[1], tiles_for(batch, 2, 16)
    wrong = getattr(tiles, table).clone()
    with_gap = (wrong[:, 4] > 0).nonzero()[0, 0] if table != "grad_kv" else 0
    wrong[with_gap, column] -= 1
    q, k, v, grad = random(tokens, 2, 16), random(tokens, 1, 16), random(tokens, 1, 16), random(tokens, 2, 16)
    found = compute(q, k, v, grad, tiles._replace(**{table: wrong}), 0.25)
    errors = distances(found, oracle(batch, q, k, v, grad, 0.25))
    affected = {"forward": [0], "grad_q": [1], "grad_kv": [2, 3]}[table]
    assert min(errors[i] for i in affected) > 2 * ROUNDING[q.dtype]


# Each of the table that this device can run, by head size: all of them in the interpreter.
TABLE = [(head, kib) for head, table in LAUNCHES.items() for kib in table]


def table_case(head: int) -> tuple[PackedBatch, list[Tensor]]:
    """Segments of several blocks, of less than one, and of one token; q, k, v and the output's gradient."""
    batch = make_batch([(150, 140, 1), (0, 9)])
    shapes = [(4, head), (1, head), (1, head), (4, head)]
    return batch, [random(batch.input_ids.shape[1], *shape) for shape in shapes]


@here
@pytest.mark.parametrize(("head", "kib"), TABLE)
def test_every_launch_of_the_table(head: int, kib: int) -> None:
    if kib > max(k for k, x in LAUNCHES[head].items() if x == launches_for(head, DEVICE)):
        pytest.skip("this card has not the shared memory for it")
    launches, (batch, given) = LAUNCHES[head][kib], table_case(head)
    exact = oracle(batch, *given, None)
    tiles = plan_tiles(segments(batch), 4, head, DEVICE, launches)
    assert max(distances(compute(*given, tiles, None), exact)) < ROUNDING[given[0].dtype]


@here
def test_tiles_of_another_launch_would_be_noticed() -> None:
    """Negative control: a tile of more rows or keys than the kernel has."""
    batch, given = table_case(64)
    (launches,) = LAUNCHES[64].values()
    tiles = plan_tiles(segments(batch), 4, 64, DEVICE, launches)
    halved = Launches(*(x._replace(rows=x.rows // 2, keys=x.keys // 2) for x in launches))
    q, k, v, grad = given
    poisoned = compute(q, k, v, grad, tiles._replace(launches=halved), None)
    exact = oracle(batch, q, k, v, grad, None)
    assert all(not (a.double() - b).norm() / b.norm() < 0.1 for a, b in zip(poisoned, exact, strict=True))


def prompts_first(batch: PackedBatch) -> tuple[Tensor, int]:
    """Flat positions of the prompts' tokens and then the completions', and how many are the prompts'."""
    assert batch.segment is not None and batch.context is not None
    a_prompt = set(batch.context[batch.context != batch.segment].tolist())
    of_prompt_T = torch.tensor([s in a_prompt for s in batch.segment.tolist()])
    order = torch.cat([of_prompt_T.nonzero()[:, 0], (~of_prompt_T).nonzero()[:, 0]])
    return order, int(of_prompt_T.sum())


def in_that_order(batch: PackedBatch) -> np.ndarray:
    """The segments, as `segments` gives them."""
    assert batch.segment is not None and batch.context is not None
    order, _ = prompts_first(batch)
    numbers = torch.unique_consecutive(batch.segment[order]).tolist()
    context = {int(s): int(c) for s, c in zip(batch.segment, batch.context, strict=True)}
    sizes = segments(batch)[:, 0]
    return np.array([[sizes[number], numbers.index(context[number])] for number in numbers])


@here
@pytest.mark.parametrize(("lengths", "hot"), [(PAIRS, 1), (LISTS, 0), (LISTS, 2)])
def test_completions_alone_on_their_prompts_keys(lengths: Any, hot: int) -> None:
    """Against the whole row, whose prompts' outputs get no gradient and whose prompts' keys give none."""
    batch = make_batch(lengths, STRETCH)
    order, before = prompts_first(batch)
    order = order.to(DEVICE)
    tokens, own = len(order), order[before:]
    q, k, v, grad = random(tokens, 4, 16), random(tokens, 2, 16), random(tokens, 2, 16), random(tokens, 4, 16)
    grad[order[:before]] = 0
    exact = [x[own] for x in oracle(batch, q, k, v, grad, 0.4)]
    sizes = tiles_for(batch, 2, 16, hot).launches
    tiles = plan_tiles(in_that_order(batch), 2, 16, DEVICE, sizes, given=before)
    assert (tiles.given, tiles.tokens) == (before, tokens - before)
    found = compute(q[own], k[order], v[order], grad[own], tiles, 0.4)
    assert not any(x[:before].any() for x in found[2:])
    found[2:] = [x[before:] for x in found[2:]]
    assert max(distances(found, exact)) < 2 * ROUNDING[q.dtype]
    others = compute(q[own], k, v[order], grad[own], tiles, 0.4)  # negative control: keys in the packed row's order
    assert distances(others[:1], exact[:1])[0] > 0.1


@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="programs run one by one in the interpreter")
def test_results_are_the_same_in_every_run() -> None:
    batch = make_batch(LISTS, STRETCH)
    tokens = batch.input_ids.shape[1]
    q, k, v, grad = random(tokens, 4, 16), random(tokens, 1, 16), random(tokens, 1, 16), random(tokens, 4, 16)
    first, second = (compute(q, k, v, grad, tiles_for(batch, 4, 16), None) for _ in range(2))
    assert all(map(torch.equal, first, second))


# ---- Tiles, without kernels -----------------------------------------------------------------------------------------


def mask_of(batch: PackedBatch) -> np.ndarray:
    segment, context, pos = batch.segment, batch.context, batch.position_ids[0]
    assert segment is not None and context is not None
    return visible(segment[:, None], context[:, None], pos[:, None], segment[None], pos[None]).numpy()


@pytest.mark.parametrize("lengths", [PAIRS, LISTS, [(1, 1)], [(0, 33)]])
@pytest.mark.parametrize("group", [1, 3])
def test_tiles_hold_exactly_what_the_mask_predicate_lets_through(lengths: Any, group: int) -> None:
    batch = make_batch(lengths)
    tiles = plan_tiles(segments(batch), group, 16, "cpu", small(1))
    mask = mask_of(batch)
    for table, rows in ((tiles.forward, 16), (tiles.grad_q, 32)):
        rebuilt = np.zeros_like(mask)
        for start, end, base, before_gap, gap in table.tolist():
            assert 0 < end - start <= rows // group
            keys = np.arange(end - base - gap) + base
            keys[before_gap:] += gap
            for token in range(start, end):
                rebuilt[token, keys[keys <= token]] = True
                assert not rebuilt[token, keys[keys > token]].any()
            assert mask[start:end, base : base + before_gap].all()  # what the hot loop takes for granted
        assert (rebuilt == mask).all()
    rebuilt = np.zeros_like(mask)
    for start, end, seen_until in tiles.grad_kv.tolist():
        assert 0 < end - start <= 32
        for key in range(start, end):
            rebuilt[key:seen_until, key] = True
    assert (rebuilt == mask).all()


def test_tiles_worked_by_hand() -> None:
    """A prompt of 20 with answers of 3 and 17 tokens; two rows a token, so 8 tokens in 16 rows and 16 in 32."""
    tiles = plan_tiles(np.array([[20, 0], [3, 0], [17, 0]]), 2, 16, "cpu", small(1))
    assert tiles.forward.dtype == torch.int32
    assert tiles.forward.tolist() == [
        [39, 40, 0, 20, 3],  # sees 37 keys
        [31, 39, 0, 20, 3],  # 36
        [23, 31, 0, 20, 3],  # 28
        [20, 23, 0, 20, 0],  # 23
        [16, 20, 0, 16, 0],  # 20: of a prompt, so what stands before the tile is "before the gap"
        [8, 16, 0, 8, 0],
        [0, 8, 0, 0, 0],
    ]
    assert tiles.grad_kv.tolist() == [[0, 20, 40], [23, 40, 40], [20, 23, 23]]
    assert (tiles.tokens, tiles.longest) == (40, 40)


@pytest.mark.parametrize("lengths", [PAIRS, LISTS])
@pytest.mark.parametrize("group", [1, 3])
def test_tiles_of_completions_hold_their_rows_of_the_mask(lengths: Any, group: int) -> None:
    batch = make_batch(lengths)
    order, before = prompts_first(batch)
    tiles = plan_tiles(in_that_order(batch), group, 16, "cpu", small(1), given=before)
    mask = mask_of(batch)[order[before:]][:, order]
    for table in (tiles.forward, tiles.grad_q):
        rebuilt = np.zeros_like(mask)
        for start, end, base, before_gap, gap in table.tolist():
            keys = np.arange(end - base - gap) + base  # counted from the first completion
            keys[before_gap:] += gap
            for token in range(start, end):
                rebuilt[token, keys[keys <= token] + before] = True
        assert (rebuilt == mask).all()
    rebuilt = np.zeros_like(mask)
    for start, end, seen_until in tiles.grad_kv.tolist():
        for key in range(start, end):
            rebuilt[key:seen_until, key + before] = True
    assert (rebuilt[:, before:] == mask[:, before:]).all() and not rebuilt[:, :before].any()


def test_what_the_kernels_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match="follow its prompt"):
        plan_tiles(np.array([[4, 0], [3, 1], [2, 0]]), 1, 16, "cpu")
    for group, head in ((17, 64), (1, 272)):
        with pytest.raises(ValueError, match="use varlen"):
            plan_tiles(np.array([[4, 0]]), group, head, "cpu")
    tiles = plan_tiles(np.array([[4, 0], [3, 0]]), 2, 64, "cpu")
    x = torch.zeros(7, 2, 64, dtype=torch.float16)
    for q, k in ((x, x), (x[:6], x[:6, :1]), (x[..., :32], x[:, :1, :32])):
        with pytest.raises(ValueError, match="don't fit tiles"):
            attend_forward(q, k, k, tiles, 1.0)
    with pytest.raises(ValueError, match="positive"):
        attend_forward(x, x[:, :1], x[:, :1], tiles, -1.0)
    long = Tiles(*tiles[:4], longest=2**24, group=2, head=64, launches=tiles.launches)
    with pytest.raises(ValueError, match="too long"):
        attend_forward(x, x[:, :1], x[:, :1], long, 1.0)
    assert not supports(torch.device("cpu"), torch.float16, HeadShape(2, 1, 64))


@instead_of_a_gpu
@pytest.mark.slow
def test_the_tests_above_pass_in_the_interpreter() -> None:
    run_interpreted(__file__)
