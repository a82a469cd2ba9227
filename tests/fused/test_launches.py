"""How the attention kernels are cut for a card: by the shared memory that they need, as Triton's compiler confirms."""

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dpo_peft.forward.attention import HeadShape
from dpo_peft.fused.attention import can_run, supports
from dpo_peft.fused.tiles import LAUNCHES, Launch, Launches, launches_for, padded_head

TABLE = [(head, kib) for head, table in LAUNCHES.items() for kib in table]
compiles = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@pytest.mark.parametrize(("kib", "taken"), [(227, 162), (163, 162), (99, 98)])  # H100; A100; 4090, 5090 and A10
def test_launches_are_chosen_by_the_card_s_shared_memory(kib: int, taken: int, monkeypatch: Any) -> None:
    found = SimpleNamespace(shared_memory_per_block_optin=kib * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    assert launches_for(256, "cuda") == LAUNCHES[256][taken]
    assert launches_for(64, "cuda:1") == launches_for(17, "cuda") == LAUNCHES[64][82]
    assert launches_for(80, "cuda") == LAUNCHES[128][82]


def needed_kib(head: int, launches: Launches) -> float:
    """What the kernels keep in shared memory: 2 bytes of each element of the tile's own blocks, and of those of the
    loop once for each stage; for the keys' gradient also two float32 sums for each row, in whole KiB."""
    blocks = {"forward": (1, 2), "grad_q": (2, 2), "grad_kv": (2, 2)}
    found = []
    for name, (own, loop) in blocks.items():
        x = getattr(launches, name)
        tile, block = (x.keys, x.rows) if name == "grad_kv" else (x.rows, x.keys)
        sums = -(-8 * x.rows * x.stages // 1024) if name == "grad_kv" else 0
        found.append(2 * head * (own * tile + loop * block * x.stages) / 1024 + sums)
    return max(found)


@pytest.mark.parametrize(("head", "kib"), TABLE)
def test_stated_shared_memory_is_enough_and_no_more_than_needed(head: int, kib: int) -> None:
    assert needed_kib(head, LAUNCHES[head][kib]) <= kib <= needed_kib(head, LAUNCHES[head][kib]) + 2


@compiles
def test_kernels_run_from_sm80_on_and_are_taken_on_hopper(monkeypatch: Any) -> None:
    cuda, bf16, heads = torch.device("cuda"), torch.bfloat16, HeadShape(32, 8, 128)
    for capability, runs, taken in [((7, 5), 0, 0), ((8, 0), 1, 0), ((8, 9), 1, 0), ((9, 0), 1, 1), ((12, 0), 1, 0)]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert (can_run(cuda, bf16, heads), supports(cuda, bf16, heads)) == (runs, taken)
    assert not can_run(cuda, torch.float32, heads) and not can_run(cuda, bf16, HeadShape(34, 2, 128))


@pytest.mark.slow
@compiles
@pytest.mark.parametrize(
    ("head", "kib", "capability"),
    [*((head, kib, 90) for head, kib in TABLE), (256, 98, 89)],  # Hopper takes most: it multiplies from there
)
def test_compiled_kernels_need_no_more_shared_memory_than_stated(
    head: int, kib: int, capability: int, tmp_path: Any, monkeypatch: Any
) -> None:
    """Triton's compiler says what a kernel takes; it needs no GPU."""
    from dpo_peft.fused import attention_triton as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    pairs = zip((kernels.attend, kernels.grad_queries, kernels.grad_keys), LAUNCHES[head][kib], strict=True)
    taken = [compiled_shared(kernel, launch, head, capability) / 1024 for kernel, launch in pairs]
    assert max(taken) <= kib
    if capability == 90:  # and the arithmetic above is the compiler's own
        assert max(taken) == pytest.approx(needed_kib(head, LAUNCHES[head][kib]), abs=1)


def compiled_shared(kernel: Any, launch: Launch, head: int, capability: int) -> int:
    """Bytes of shared memory that a kernel takes on bfloat16 with 4 query heads per key head."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = dict(GROUP=4, HEAD=head, WIDTH=padded_head(head), ROWS=launch.rows, KEYS=launch.keys, HOT=launch.hot)
    kinds = {"tiles_ptr": "*i32", "lse_ptr": "*fp32", "delta_ptr": "*fp32", "scale": "fp32", "score_scale": "fp32"}
    signature = {name: kinds.get(name, "*bf16" if name.endswith("_ptr") else "i32") for name in kernel.arg_names}
    signature |= dict.fromkeys(constants, "constexpr")
    whole = [i for i, name in enumerate(kernel.arg_names) if name not in (*constants, "tiles_ptr", "T", *kinds)]
    source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in whole})
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).metadata.shared
