"""Attention over packed batches: the candidates, and how fast each is alone on this card.

    python benchmarks/attention.py
    python benchmarks/attention.py --sweep --heads 32,8,128

`CANDIDATES` are backends for `dpo_peft.forward.attention`. `speed.py` takes them for whole steps, where a case has the
key `attention`: that decides. Here each runs one layer's attention, forward and backward, on the lengths of
speed_models.py, after its outputs and gradients were held against dense float32. Every line is printed as `RESULT
{...}` and added to `benchmarks/results/attention_<card>.json`. `--sweep` also tries our kernels in other sizes, one
kernel at a time: what a card without figures needs.

- packed: kernels of our own, on any card that they run on.
- varlen: FlashAttention 2 on gathered keys, in one call. The gather itself is not timed here: fused layers do it in
  the pass that turns queries and keys by their positions.
- flex: FlexAttention with a block mask.
- merged: FlashAttention 2 in two calls, as attention_merged.py says.
- packed, completions alone: no candidate, but what adapters that act on completions only would need.

Shape suffixes: T tokens, H query heads, G key heads, D head size, Q blocks of queries, K blocks of keys.
"""

# ruff: noqa: E402

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))  # the checkout's package, where it isn't installed

from attention_merged import attend_merged, parts_of

from dpo_peft.forward import Sample, pack
from dpo_peft.forward.attention import AttentionBackend, AttentionPlan, HeadShape, attend_dense, backend_named
from dpo_peft.forward.layout import PackedBatch, visible
from dpo_peft.fused.attention import PACKED, attend_backward, attend_forward, can_run
from dpo_peft.fused.tiles import Launch, launches_for, plan_tiles

# ---- FlexAttention --------------------------------------------------------------------------------------------------

BLOCK = 128  # queries and keys of a block


def block_mask(batch: PackedBatch) -> BlockMask:
    """Says for each block of queries which blocks of keys it sees in part and which as a whole.

    Counted from the segments' bounds, (T, K) numbers, on the batch's device and without waiting for it.
    """
    segment, context = batch.segment, batch.context
    assert segment is not None and context is not None and batch.cu_seq_q is not None
    tokens, bounds = len(segment), batch.cu_seq_q.long()
    blocks = -(-tokens // BLOCK)
    place = torch.arange(tokens, device=segment.device)
    first = torch.arange(blocks, device=segment.device) * BLOCK

    def seen(start_T: Tensor, end_T: Tensor) -> Tensor:
        """How many of the keys start..end stand in each block, (T, K)."""
        return (torch.minimum(end_T[:, None], first + BLOCK) - torch.maximum(start_T[:, None], first)).clamp(min=0)

    prompt_end = torch.where(context == segment, bounds[context], bounds[context + 1])
    pairs_TK = seen(bounds[segment], place + 1) + seen(bounds[context], prompt_end)
    pairs_QK = F.pad(pairs_TK, (0, 0, 0, blocks * BLOCK - tokens)).view(blocks, BLOCK, blocks).sum(1)
    whole_QK = pairs_QK == BLOCK * BLOCK

    def lists(chosen_QK: Tensor) -> tuple[Tensor, Tensor]:
        order = torch.argsort(chosen_QK.int(), descending=True, stable=True)
        return chosen_QK.sum(1).int()[None, None], order.int()[None, None]

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return visible(segment[q], context[q], q, segment[k], k)  # a prompt stands before its completions

    partly = lists((pairs_QK > 0) & ~whole_QK)
    return BlockMask.from_kv_blocks(
        *partly, *lists(whole_QK), BLOCK_SIZE=BLOCK, mask_mod=mask_mod, seq_lengths=(tokens, tokens)
    )


@cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=True)


def attend_flex(
    plan: AttentionPlan, q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, scaling: float | None, window: None
) -> Tensor:
    mask = plan.once("block mask", lambda: block_mask(plan.batch))
    q, k, v = (x.transpose(0, 1)[None] for x in (q_THD, k_TGD, v_TGD))
    grouped = q.shape[1] != k.shape[1]
    attend = _compiled() if q.is_cuda else flex_attention
    out = attend(q, k, v, block_mask=mask, scale=scaling, enable_gqa=grouped)
    return out[0].transpose(0, 1)


def _flex_runs(device: torch.device, dtype: torch.dtype, heads: HeadShape) -> bool:
    return device.type == "cuda"


_VARLEN = backend_named("varlen")
CANDIDATES: dict[str, AttentionBackend] = {
    "packed": replace(PACKED, supports=can_run),
    "varlen": replace(_VARLEN, name="gathered"),  # where "varlen" is named, fused layers may take "packed"
    "flex": AttentionBackend("flex", _flex_runs, attend_flex, windows=False, otherwise="varlen"),
    "merged": AttentionBackend("merged", _VARLEN.supports, attend_merged, windows=False, otherwise="varlen"),
}

# ---- Each alone -----------------------------------------------------------------------------------------------------

WORKS = {"longprompt 2": ("longprompt", 2), "uf 8": ("uf", 8), "uf 32": ("uf", 32), "hh 64": ("hh", 64)}
# Rows, keys, warps, stages, hot of each kernel, beside the table's own.
SIZES: dict[str, list[tuple[int, ...]]] = {
    "forward": [(128, 64, 4, 3, 1), (128, 64, 8, 2, 1), (128, 32, 4, 2, 1), (64, 64, 4, 2, 1), (64, 32, 4, 2, 1)]
    + [(64, 32, 4, 3, 1), (128, 32, 8, 2, 2), (32, 32, 4, 2, 1)],
    "grad_q": [(64, 64, 4, 2, 1), (64, 64, 8, 2, 1), (64, 32, 4, 3, 1), (128, 32, 8, 2, 1), (32, 32, 4, 2, 1)]
    + [(64, 32, 8, 2, 1), (32, 64, 4, 2, 1)],
    "grad_kv": [(64, 64, 4, 2, 1), (64, 64, 8, 2, 1), (32, 64, 4, 2, 1), (32, 64, 8, 2, 1), (32, 32, 4, 2, 1)]
    + [(32, 64, 4, 2, 0), (64, 32, 4, 2, 1), (32, 128, 8, 2, 1)],
}
HEAD_START = 40_000_000  # cycles that the card waits, so that launching from Python is not what is timed


def batch_of(work: str, samples: int) -> PackedBatch:
    from speed_models import lengths  # which needs bitsandbytes

    return pack([Sample([1] * p, [[1] * n for n in c]) for p, *c in lengths(work, samples)])


def milliseconds(*stages: Callable[[], Any], repeats: int = 15) -> list[float]:
    """Median time of each stage on the card; the stages follow each other without a wait between them."""
    runs = []
    for i in range(repeats + 3):
        torch.cuda._sleep(HEAD_START)
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(stages) + 1)]
        events[0].record()
        for stage, event in zip(stages, events[1:], strict=True):
            stage()
            event.record()
        torch.cuda.synchronize()
        if i >= 3:
            runs.append([a.elapsed_time(b) for a, b in zip(events, events[1:], strict=False)])
    return [statistics.median(times) for times in zip(*runs, strict=True)]


def call(record: AttentionBackend, plan: AttentionPlan, leaves: list[Tensor], gather: bool) -> Tensor:
    q, k, v = leaves
    if gather:
        k, v = (x.index_select(0, plan.batch.kv_index) for x in (k, v))
    return record.attend(plan, q, k, v, None, None)


def errors(record: AttentionBackend, batch: PackedBatch, qkv: list[Tensor], grad: Tensor) -> list[float]:
    """Relative distances of the output and of the gradients to q, k and v from dense attention in float32."""
    found = []
    for attend, dtype in (
        (record, qkv[0].dtype),
        (replace(record, attend=attend_dense, gathers=False), torch.float32),
    ):
        leaves = [x.to(dtype).requires_grad_() for x in qkv]
        out = call(attend, AttentionPlan(batch, attend), leaves, attend.gathers)
        found.append([out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))])
    return [float((a.float() - b).norm() / b.norm()) for a, b in zip(*found, strict=True)]


def measure(record: AttentionBackend, batch: PackedBatch, qkv: list[Tensor], grad: Tensor) -> dict[str, Any]:
    """Milliseconds of one layer; of the first layer of a batch beyond that, which makes what all share."""
    found: dict[str, Any] = {"errors": errors(record, batch, qkv, grad)}
    plan = AttentionPlan(batch, record)
    made = [x.index_select(0, batch.kv_index) if record.gathers and i else x for i, x in enumerate(qkv)]
    leaves, outs = [x.detach().requires_grad_() for x in made], list[Tensor]()

    def forward() -> None:
        outs[:] = [call(record, plan, leaves, False)]

    found["forward_ms"], found["backward_ms"] = milliseconds(forward, lambda: torch.autograd.grad(*outs, leaves, grad))
    start = time.perf_counter()
    with torch.no_grad():
        for _ in range(10):
            forward()
        found["host_forward_ms"] = (time.perf_counter() - start) * 100
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(10):
            call(record, AttentionPlan(batch, record), leaves, False)
            torch.cuda.synchronize()
    found["first_layer_ms"] = (time.perf_counter() - start) * 100 - found["forward_ms"]
    return found


def completions_alone(batch: PackedBatch, qkv: list[Tensor], grad: Tensor) -> dict[str, Any]:
    """Our kernels for queries of completions on all keys, of which prompts' get no gradient."""
    parts, (q, k, v) = parts_of(batch), qkv
    keys, scale = torch.cat([parts.prompt_P, parts.completion_C]), q.shape[2] ** -0.5
    shape = q.shape[1] // k.shape[1], q.shape[2], q.device
    assert batch.segments is not None
    lengths, contexts = zip(*batch.segments, strict=True)
    order = sorted(range(len(lengths)), key=lambda i: contexts[i] != i)  # prompts first
    ordered = np.array([[lengths[i], order.index(contexts[i])] for i in order])
    tiles = plan_tiles(ordered, *shape, given=len(parts.prompt_P))
    given, grad = (q[parts.completion_C], k[keys], v[keys]), grad[parts.completion_C]
    out, lse = attend_forward(*given, tiles, scale)
    forward_ms, backward_ms = milliseconds(
        lambda: attend_forward(*given, tiles, scale),
        lambda: attend_backward(grad, *given, out, lse, tiles, scale),
    )
    return {"forward_ms": forward_ms, "backward_ms": backward_ms}


def sweep(batch: PackedBatch, qkv: list[Tensor], grad: Tensor) -> Iterator[dict[str, Any]]:
    """Our kernels with another size of one of them at a time, the table's own first."""
    group, head, scale = qkv[0].shape[1] // qkv[1].shape[1], qkv[0].shape[2], qkv[0].shape[2] ** -0.5
    table = launches_for(head, qkv[0].device)
    for kernel, sizes in SIZES.items():
        for launch in [getattr(table, kernel), *(Launch(*size) for size in sizes)]:
            launches = table._replace(**{kernel: launch})
            tiles = plan_tiles(np.array(batch.segments), group, head, qkv[0].device, launches)
            found: dict[str, Any] = {"kernel": kernel, "launch": list(launch)}
            try:
                out, lse = attend_forward(*qkv, tiles, scale)
                (found["forward_ms"],) = milliseconds(lambda t=tiles: attend_forward(*qkv, t, scale))
                if kernel != "forward":
                    given = (grad, *qkv, out, lse, tiles, scale)
                    (found["backward_ms"],) = milliseconds(lambda given=given: attend_backward(*given))
            except Exception as error:  # more shared memory than there is: the others go on
                found = found | {"error": f"{type(error).__name__}: {error}"[:200]}
            yield found


def lines(args: argparse.Namespace, device: str) -> Iterator[dict[str, Any]]:
    heads = HeadShape(*map(int, args.heads.split(",")))
    for name, work in WORKS.items():
        batch = batch_of(*work).to(device)
        tokens = batch.input_ids.shape[1]
        torch.manual_seed(0)
        q, k, v, grad = (
            torch.randn(tokens, n, heads.size, device=device, dtype=torch.bfloat16)
            for n in (heads.queries, heads.keys, heads.keys, heads.queries)
        )
        about = {"work": name, "tokens": tokens, "keys": len(batch.kv_index), "heads": list(heads)}
        figures: dict[str, Callable[..., dict[str, Any]]] = {n: partial(measure, x) for n, x in CANDIDATES.items()}
        figures["packed, completions alone"] = completions_alone
        for candidate, measured in figures.items():
            if not re.search(args.only, candidate):
                continue
            try:
                yield {"candidate": candidate, **about, **measured(batch, [q, k, v], grad)}
            except Exception as error:  # whatever a compiler raises: the others go on
                yield {"candidate": candidate, **about, "error": f"{type(error).__name__}: {error}"[:600]}
        if args.sweep:
            yield from ({"work": name, **line} for line in sweep(batch, [q, k, v], grad))


def card_name(device: str) -> str:
    """`NVIDIA H100 80GB HBM3` -> h100, `NVIDIA GeForce RTX 4090` -> 4090."""
    return next(word for word in re.split(r"[\s-]+", device) if re.search(r"\d{2}", word)).lower()


def append(out: Path, run: dict[str, Any]) -> None:
    """Adds a run to the file, or replaces its last one if that is this run's beginning."""
    found = (
        json.loads(out.read_text("utf-8")) if out.exists() else {"what": "See benchmarks/attention.py.", "runs": []}
    )
    kept = [one for one in found.get("runs", []) if one["started"] != run["started"]]
    part = out.with_suffix(".part")
    part.write_text(json.dumps({**found, "runs": [*kept, run]}, indent=1) + "\n", "utf-8")
    part.replace(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/attention_<card>.json")
    parser.add_argument("--heads", default="32,8,128", help="query heads, key heads, head size")
    parser.add_argument("--only", default="", help="candidates whose name this regular expression finds")
    parser.add_argument("--sweep", action="store_true", help="also our kernels in other sizes")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a GPU: tests/benchmarks/test_attention.py holds what can be held without one.")
    device = torch.cuda.get_device_name()
    out = args.out or HERE / "results" / f"attention_{card_name(device)}.json"
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    commit = subprocess.run(command, capture_output=True, text=True, cwd=HERE).stdout.strip()
    run: dict[str, Any] = {"started": time.time(), "device": device, "torch": torch.__version__, "commit": commit}
    run["lines"] = []
    for line in lines(args, "cuda"):
        run["lines"].append({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in line.items()})
        append(out, run)
        print("RESULT " + json.dumps(run["lines"][-1]), flush=True)


if __name__ == "__main__":
    main()
