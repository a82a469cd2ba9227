"""The Triton kernels against the torch expressions that they stand for.

On a GPU in bfloat16; elsewhere in float16 through Triton's interpreter, in a process of its own, if Triton is there.
"""

from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import torch.nn.functional as F
from interpreter import DEVICE, INTERPRETED, here, instead_of_a_gpu, run_interpreted
from torch import Tensor

from dpo_peft.forward import Sample, pack
from dpo_peft.fused import elementwise as kernels
from dpo_peft.fused import heads as head_kernels
from dpo_peft.fused.elementwise import ACTIVATIONS, Norm
from dpo_peft.fused.heads import Angles, Heads, Places, queries_keys_values

DTYPE = torch.float16 if INTERPRETED else torch.bfloat16  # the interpreter truncates to bfloat16 instead of rounding
ROUNDING = 1e-3 if INTERPRETED else 5e-3  # one rounding more or less, relative


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=DTYPE)


def both(monkeypatch: Any, compute: Callable[[], Any]) -> list[tuple[Tensor, Tensor]]:
    """Each result of the kernels beside that of the torch expressions."""
    results = []
    for used in (True, False):
        for module in (kernels, head_kernels):
            monkeypatch.setattr(module, "uses_kernels", lambda x, used=used: used)
        found = compute()
        results.append(found if isinstance(found, (list, tuple)) else [found])
    return list(zip(*results, strict=True))


def distance(a: Tensor, b: Tensor) -> float:
    assert torch.isfinite(a).all()
    return float((a.double() - b.double()).norm() / b.double().norm())


NORMS = {"plain": {}, "wide": dict(wide=True), "layer": dict(wide=True, centered=True)}


@here
@pytest.mark.parametrize("width", [80, 4096])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("kind", NORMS)
def test_rms_norm(width: int, residual: bool, kind: str, monkeypatch: Any) -> None:
    x, grad = random(7, width) + 0.5, random(7, width + 16)[:, :width]
    norm = Norm(random(width), 1e-5, **NORMS[kind])
    past = random(7, width) if residual else None

    def compute() -> list[Tensor]:
        wide = torch.full((7, width + 8), 5.0, device=DEVICE, dtype=DTYPE)
        kernels.rms_norm(x, norm, wide[:, :width], past)
        return [wide, kernels.rms_norm_backward(x, norm, grad, past)]

    for kernel, expression in both(monkeypatch, compute):
        assert distance(kernel, expression) < ROUNDING


# How heads are normalized and turned: options of Heads, norms (queries, keys, values), numbers turned of 24.
HEADS: dict[str, tuple[dict[str, Any], tuple[bool, bool, bool], int]] = {
    "plain": ({}, (False, False, False), 24),
    "normed": ({}, (True, True, False), 24),
    "values too": ({}, (True, True, True), 24),
    "a part": ({}, (False, False, False), 8),
    "a part, normed and gated": (dict(gated=True), (True, True, False), 6),
    "pairs": (dict(pairs=True), (False, False, False), 24),
    "pairs of a part": (dict(pairs=True), (True, True, False), 16),
    "no positions": (dict(gated=True), (True, True, False), 0),
    "all heads together": (dict(whole=True), (True, True, False), 24),
    "late": (dict(late=True), (True, True, False), 24),
    "values are keys": (dict(tied=True), (True, True, True), 24),
    "values are keys, a part in pairs": (dict(tied=True, pairs=True), (False, False, True), 8),
}
HEADS["layer norms"] = HEADS["normed"]


def heads_of(kind: str, size: int = 24) -> tuple[Heads, Angles | None, int]:
    """Head numbers that are no power of 2; the width of [q; k; v]."""
    options, normed, turned = HEADS[kind]
    widths = [6 * size, 3 * size, size] if options.get("whole") else [size] * 3
    norms = [
        Norm(random(n), 1e-6, wide=i > 0, centered=kind == "layer norms") if used else None
        for i, (n, used) in enumerate(zip(widths, normed, strict=True))
    ]
    heads = Heads(6, 3, size, *norms, **options)
    angles = Angles(random(9, turned), random(9, turned)) if turned else None
    return heads, angles, (12 + 6 * heads.gated - 3 * heads.tied) * size


@here
@pytest.mark.sampled(99, slow=3)
@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("dtype", [DTYPE, torch.float32])  # of the angles
def test_queries_keys_values(kind: str, gathered: bool, dtype: torch.dtype, monkeypatch: Any) -> None:
    """Prompts with two and three answers: rows with one to four copies."""
    batch = pack([Sample([1, 2, 3], [[4, 5], [6, 7, 8]]), Sample([1, 2], [[4], [6, 7, 8], [9]])]).to(DEVICE)
    tokens = batch.input_ids.shape[1]
    heads, angles, width = heads_of(kind)
    if angles is not None:
        angles = Angles(*(x.repeat(2, 1)[:tokens].to(dtype) for x in angles))
    qkv = random(tokens, width)
    assert batch.kv_index is not None and batch.kv_copies is not None
    places = Places(batch.kv_index, batch.kv_copies) if gathered else None
    rows = len(batch.kv_index) if gathered else tokens
    grads = [random(tokens, 6, 24), random(rows, 3, 24), random(rows, 3, 24), random(tokens, 6, 24)]

    def compute() -> list[Tensor]:
        leaf = qkv.clone().requires_grad_()
        out = queries_keys_values(leaf, heads, angles, angles, places)
        assert all(x.dtype == DTYPE for x in out)
        return [*(x.detach() for x in out), *torch.autograd.grad(out, leaf, grads[: len(out)])]

    for kernel, expression in both(monkeypatch, compute):
        assert distance(kernel, expression) < ROUNDING


@here
@pytest.mark.parametrize("width", [64, 2100])
@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False])
def test_activations(width: int, kind: str, gated: bool, monkeypatch: Any) -> None:
    gate_up, grad = random(5, (1 + gated) * width), random(5, width + 16)

    def compute() -> list[Tensor]:
        out = torch.zeros(5, width + 16, device=DEVICE, dtype=DTYPE)
        kernels.activate(gate_up, out[:, :width], kind)
        mine, given = gate_up.clone(), grad.clone()
        kernels.activate_backward_(mine, given[:, :width], kind)
        return [out, mine, given]

    for kernel, expression in both(monkeypatch, compute):
        assert distance(kernel, expression) < ROUNDING


@here
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("shape", [(6, 192), (3, 2112), (4, 4096), (3, 72)])  # rows of 72 don't hold whole blocks
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_dequantized_weights_equal_those_of_bitsandbytes(
    nested: bool, shape: tuple[int, int], quant_type: str, monkeypatch: Any
) -> None:
    linear = bnb.nn.Linear4bit(shape[1], shape[0], bias=False)
    weight = torch.randn(shape, dtype=DTYPE)
    options: dict[str, Any] = dict(quant_type=quant_type, compress_statistics=nested, module=linear)
    linear.weight = bnb.nn.Params4bit(weight, requires_grad=False, **options)._quantize(DEVICE)
    beside = random(shape[0], 16)

    def compute() -> list[Tensor]:
        out = torch.full((2, shape[0], shape[1] + 16), 5.0, device=DEVICE, dtype=DTYPE)
        kernels.weight_into(linear, beside, out[0])
        kernels.weight_into(linear, None, out[1])
        return [out]

    ((kernel, expression),) = both(monkeypatch, compute)
    assert torch.equal(kernel, expression)
    assert torch.equal(kernel[0, :, shape[1] :], beside) and not kernel[1, :, shape[1] :].any()


def same_e4m3(kernel: Tensor, expression: Tensor) -> bool:
    """On a GPU all are. The interpreter rounds ties and the smallest numbers another way, and drops a carry into the
    exponent, which halves the number."""
    step = (kernel.view(torch.uint8).int() - expression.view(torch.uint8).int()).abs()
    differ, halved = step > 0, kernel.float() * 2 == expression.float()
    return (
        bool(differ.float().mean() < 0.1 and (halved | (step == 1))[differ].all()) if INTERPRETED else not differ.any()
    )


@here
@pytest.mark.parametrize("width", [80, 2100, 4096])
def test_rows_in_e4m3(width: int, monkeypatch: Any) -> None:
    x = random(5, width + 16)[:, :width]
    x[1], x[2], x[3] = 0, x[2] * 1e-3, x[3].abs() + 100
    rounded, scales = both(monkeypatch, lambda: kernels.quantize_rows(x))
    assert torch.equal(*scales) and same_e4m3(*rounded)
    assert not same_e4m3(rounded[0], kernels.quantize_rows(x.flip(0))[0])


@here
@pytest.mark.parametrize("nested", [True, False])
def test_weights_in_e4m3(nested: bool, monkeypatch: Any) -> None:
    linear = bnb.nn.Linear4bit(2112, 6, bias=False)
    options: dict[str, Any] = dict(quant_type="nf4", compress_statistics=nested, module=linear)
    weight = torch.randn(6, 2112, dtype=DTYPE)
    linear.weight = bnb.nn.Params4bit(weight, requires_grad=False, **options)._quantize(DEVICE)
    scale = weight.float().abs().max().to(DEVICE) / 400

    def compute() -> list[Tensor]:
        out = torch.empty(6, 2112, device=DEVICE, dtype=kernels.E4M3)
        kernels.weight_into(linear, None, out, scale)
        return [out]

    ((kernel, expression),) = both(monkeypatch, compute)
    assert same_e4m3(kernel, expression)


@here
def test_logps_and_their_gradient() -> None:
    logits, target = random(4, 5000) * 3, torch.tensor([0, 4999, 7, 4096], device=DEVICE)
    logps, lse = kernels.logps_from_logits(logits, target)
    exact = logits.double().log_softmax(-1)
    assert (logps - exact.gather(1, target[:, None])[:, 0]).abs().max() < 1e-5
    grad = kernels.logps_grad_(logits.clone(), target, lse)
    assert distance(grad, F.one_hot(target, 5000) - exact.exp()) < ROUNDING


@instead_of_a_gpu
@pytest.mark.slow
def test_the_tests_above_pass_in_the_interpreter() -> None:
    run_interpreted(__file__)
