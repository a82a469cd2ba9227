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
from dpo_peft.fused.elementwise import Heads, Norm, Places

DTYPE = torch.float16 if INTERPRETED else torch.bfloat16  # the interpreter truncates to bfloat16 instead of rounding
ROUNDING = 1e-3 if INTERPRETED else 5e-3  # one rounding more or less, relative


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=DTYPE)


def both(monkeypatch: Any, compute: Callable[[], Any]) -> list[tuple[Tensor, Tensor]]:
    """Each result of the kernels beside that of the torch expressions."""
    results = []
    for used in (True, False):
        monkeypatch.setattr(kernels, "uses_kernels", lambda x, used=used: used)
        found = compute()
        results.append(found if isinstance(found, (list, tuple)) else [found])
    return list(zip(*results, strict=True))


def distance(a: Tensor, b: Tensor) -> float:
    assert torch.isfinite(a).all()
    return float((a.double() - b.double()).norm() / b.double().norm())


@here
@pytest.mark.parametrize("width", [80, 4096])
@pytest.mark.parametrize("residual", [False, True])
def test_rms_norm(width: int, residual: bool, monkeypatch: Any) -> None:
    x, norm, grad = random(7, width), Norm(random(width), 1e-5), random(7, width + 16)[:, :width]
    past = random(7, width) if residual else None

    def compute() -> list[Tensor]:
        wide = torch.full((7, width + 8), 5.0, device=DEVICE, dtype=DTYPE)
        kernels.rms_norm(x, norm, wide[:, :width])
        return [wide, kernels.rms_norm_backward(x, norm, grad, past)]

    for kernel, expression in both(monkeypatch, compute):
        assert distance(kernel, expression) < ROUNDING


@here
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("gathered", [False, True])
def test_queries_keys_values(normed: bool, gathered: bool, monkeypatch: Any) -> None:
    """Head numbers that are no power of 2, prompts with two and three answers: rows with one to four copies."""
    batch = pack([Sample([1, 2, 3], [[4, 5], [6, 7, 8]]), Sample([1, 2], [[4], [6, 7, 8], [9]])]).to(DEVICE)
    tokens, size = batch.input_ids.shape[1], 16
    norms = (Norm(random(size), 1e-6), Norm(random(size), 1e-6)) if normed else ()
    heads, qkv = Heads(6, 3, size, *norms), random(tokens, 12 * size)
    angle = torch.randn(tokens, size // 2, device=DEVICE).repeat(1, 2)
    cos, sin = angle.cos().to(DTYPE), angle.sin().to(DTYPE)
    assert batch.kv_index is not None and batch.kv_copies is not None
    places = Places(batch.kv_index, batch.kv_copies) if gathered else None
    rows = len(batch.kv_index) if gathered else tokens
    grads = [random(tokens, 6, size), random(rows, 3, size), random(rows, 3, size)]

    def compute() -> list[Tensor]:
        leaf = qkv.clone().requires_grad_()
        out = kernels.queries_keys_values(leaf, heads, cos, sin, places)
        return [*(x.detach() for x in out), *torch.autograd.grad(out, leaf, grads)]

    for kernel, expression in both(monkeypatch, compute):
        assert distance(kernel, expression) < ROUNDING


@here
@pytest.mark.parametrize("width", [64, 2100])
def test_swiglu(width: int, monkeypatch: Any) -> None:
    gate_up, grad = random(5, 2 * width), random(5, width + 16)

    def compute() -> list[Tensor]:
        out = torch.zeros(5, width + 16, device=DEVICE, dtype=DTYPE)
        kernels.swiglu(gate_up, out[:, :width])
        mine, given = gate_up.clone(), grad.clone()
        kernels.swiglu_backward_(mine, given[:, :width])
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
