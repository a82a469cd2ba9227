"""How the attention kernels cut a batch: the blocks that they are compiled for, and lists of tiles.

Shape suffixes: S segments; R query heads per key head, D head size.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

MAX_HEAD, MAX_GROUP = 256, 16


class Launch(NamedTuple):
    """How one kernel is cut and compiled."""

    rows: int  # of a block of queries: tokens times query heads per key head
    keys: int  # of a block of keys
    warps: int
    stages: int
    hot: int = 1  # blocks without mask: 0 none; 1 those before the gap; 2 all. To keys: 0 none; else all


class Launches(NamedTuple):
    """One for each kernel."""

    forward: Launch
    grad_q: Launch
    grad_kv: Launch


# By head size, padded to a power of 2, and by the KiB of shared memory that a block of threads needs at most, as
# Triton compiles them for sm80 to sm120. Those of 128 are the best for long and short segments alike of eight each
# that were measured on an H100; nobody measured on other cards.
LAUNCHES = {
    64: {82: Launches(Launch(128, 64, 4, 3), Launch(128, 64, 8, 3), Launch(64, 128, 8, 3))},
    128: {82: Launches(Launch(128, 32, 8, 3), Launch(64, 32, 4, 2), Launch(32, 64, 4, 3))},
    256: {
        162: Launches(Launch(64, 64, 8, 2), Launch(64, 32, 8, 2), Launch(32, 64, 8, 2)),
        98: Launches(Launch(64, 32, 8, 2), Launch(32, 32, 8, 2), Launch(32, 32, 8, 2)),
    },
}


class Tiles(NamedTuple):
    """A batch's tiles, the longest work first, for one shape of heads."""

    forward: Tensor  # (tiles, 5) int32: start, end, first key, keys before the gap, length of the gap
    grad_q: Tensor  # the same in the size of that kernel
    grad_kv: Tensor  # (tiles, 3) int32: start, end, end of the queries that see it
    tokens: int  # T, of the queries
    longest: int  # from a sample's first key to its last, in tokens
    group: int  # R
    head: int  # D
    launches: Launches
    given: int = 0  # keys that stand before the first query


def padded_head(head: int) -> int:
    """Returns the power of 2 that the kernels compute with."""
    return max(16, 1 << (head - 1).bit_length())


def launches_for(head: int, device: torch.device | str) -> Launches:
    """Returns the first of `LAUNCHES` for a head size that the device has the shared memory for."""
    limit = 227 * 1024  # an H100's
    if torch.device(device).type == "cuda":
        properties: Any = torch.cuda.get_device_properties(device)  # whose stubs miss this one
        limit = properties.shared_memory_per_block_optin
    fitting = LAUNCHES[max(64, padded_head(head))].items()
    return next(launches for kib, launches in fitting if kib * 1024 <= limit)


def plan_tiles(
    segments_S2: np.ndarray,
    group: int,
    head: int,
    device: torch.device | str,
    launches: Launches | None = None,
    given: int = 0,
) -> Tiles:
    """Cuts a batch into tiles.

    Args:
        segments_S2: length of each segment in tokens and index of its context, the prompt's segment (its own index
            for a prompt and for a completion of an empty prompt), on the host.
        group: R, query heads per key head.
        head: D, size of a head.
        device: where the tiles go.
        launches: sizes of the kernels' blocks; `launches_for` the device by default.
        given: tokens of the prompts where these stand first, and only the completions after them have queries.

    Raises:
        ValueError: heads that the kernels don't do, or completions that don't follow their prompt.
    """
    if not 0 < group <= MAX_GROUP or not 0 < head <= MAX_HEAD:
        raise ValueError(
            f"The attention kernels do up to {MAX_GROUP} query heads per key head of size up to {MAX_HEAD}, not "
            f"{group} of size {head}: use varlen attention."
        )
    launches = launches or launches_for(head, device)
    spans = _Spans.of(segments_S2, given)
    tables = [
        _query_tiles(spans, launches.forward.rows // group),
        _query_tiles(spans, launches.grad_q.rows // group),
        _key_tiles(spans, launches.grad_kv.keys),
    ]
    flat = torch.from_numpy(np.concatenate([table.ravel() for table in tables]).astype(np.int32))
    if torch.device(device).type == "cuda":
        flat = flat.pin_memory()  # or the copy would wait for the kernels before it
    parts = flat.to(device, non_blocking=True).split([table.size for table in tables])
    forward, grad_q, grad_kv = (part.view(table.shape) for part, table in zip(parts, tables, strict=True))
    return Tiles(forward, grad_q, grad_kv, int(spans.end.max()), spans.longest, group, head, launches, given)


class _Spans(NamedTuple):
    """Where each segment stands among the keys, (S,) each, counted from the first query."""

    start: np.ndarray
    end: np.ndarray
    context: np.ndarray
    seen_until: np.ndarray  # end of the queries that see it: of the sample for a prompt, its own for a completion
    longest: int  # sample
    computed: np.ndarray  # whether it is cut into tiles

    @classmethod
    def of(cls, segments_S2: np.ndarray, given: int) -> "_Spans":
        length, context = segments_S2.T.astype(np.int64)
        index = np.arange(len(length))
        latest = np.maximum.accumulate(np.where(context == index, index, -1))
        if (context != latest).any() and not given:
            raise ValueError("A completion must follow its prompt or another completion of it.")
        end = np.cumsum(length) - given
        start = end - length
        seen_until = end.copy()
        np.maximum.at(seen_until, context, end)
        return cls(start, end, context, seen_until, int((seen_until - start).max()), end > 0)

    def cut(self, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Cuts what is computed into pieces of `size` tokens: segment, start and end of each."""
        pieces = -(-(self.end - self.start) // size) * self.computed
        segment = np.repeat(np.arange(len(pieces)), pieces)
        within = np.arange(len(segment)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        start = self.start[segment] + within * size
        return segment, start, np.minimum(start + size, self.end[segment])


def _query_tiles(spans: _Spans, size: int) -> np.ndarray:
    segment, start, end = spans.cut(size)
    prompt = spans.context[segment]
    base = spans.start[prompt]
    has_prompt = prompt != segment
    before_gap = np.where(has_prompt, spans.end[prompt], start) - base
    gap = np.where(has_prompt, spans.start[segment] - spans.end[prompt], 0)
    return _longest_first(np.stack([start, end, base, before_gap, gap], 1), end - base - gap)


def _key_tiles(spans: _Spans, size: int) -> np.ndarray:
    segment, start, end = spans.cut(size)
    seen_until = spans.seen_until[segment]
    return _longest_first(np.stack([start, end, seen_until], 1), seen_until - start)


def _longest_first(table: np.ndarray, work: np.ndarray) -> np.ndarray:
    return table[np.argsort(-work, kind="stable")]
