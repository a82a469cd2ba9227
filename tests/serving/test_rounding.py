"""What llama.cpp's rounding of activations makes of a model, and the strength of an adapter beside such noise."""

from types import SimpleNamespace
from typing import Any

import gguf
import pytest
import torch
from gguf_files import dequantized_by_ggml, multiplied_by_ggml, quantized, write_gguf
from torch import nn

from dpo_peft.forward.gguf import GgufHead, GgufLinear, round_activations, rounded
from dpo_peft.forward.logprobs import read_head, token_logps
from dpo_peft.merge.drift import Observed, compare
from dpo_peft.model.base import load_base

pytest.importorskip("xllamacpp")
KINDS = "Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS".split()


@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_of_ggml(kind: str) -> None:
    """Q4_1 and Q5_1 store sums of activations in float16, which is left out here: a twentieth of the rounding."""
    as_type = gguf.GGMLQuantizationType[kind]
    blocks, x = quantized(torch.randn(24, 512), as_type), torch.randn(5, 512) * torch.rand(512)
    x[1, :256] = 0.0
    layer = GgufLinear(512, 24, False, int(as_type), torch.float32)
    layer.blocks.data = blocks
    plain = layer(x)
    assert torch.equal(plain, x @ dequantized_by_ggml(blocks, as_type).T)
    assert round_activations(layer)
    its = multiplied_by_ggml(x, blocks, as_type)
    off, off_plain = ((y - its).norm() / its.norm() for y in (layer(x), plain))
    assert off < (1.5e-3 if kind.endswith("_1") else 1e-6) < 3e-3 < off_plain < 2e-2


def test_the_head_rounds_too(tiny_llama: Any, make_tokenizer: Any, tmp_path: Any) -> None:
    path = str(write_gguf(tmp_path / "model.gguf", tiny_llama(), make_tokenizer(), "Q8_0"))
    model: Any = load_base(path, init_kwargs={"dtype": "float32"})
    head = model.requires_grad_(False).lm_head
    assert type(head) is GgufHead and read_head(model).frozen
    hidden, target = torch.randn(6, head.in_features, requires_grad=True), torch.arange(6)
    plain = nn.functional.linear(hidden, head.weight).log_softmax(1)[target, target]
    assert torch.allclose(token_logps(hidden, target, read_head(model)), plain, atol=1e-6)
    assert torch.autograd.grad(token_logps(hidden, target, read_head(model)).sum(), hidden)[0].norm() > 0
    round_activations(model)
    expected = (rounded(hidden.detach(), 32) @ head.weight.T).log_softmax(1)[target, target]
    assert torch.allclose(token_logps(hidden.detach(), target, read_head(model)), expected, atol=1e-6)
    assert torch.allclose(model.lm_head(hidden.detach()).log_softmax(1)[target, target], expected, atol=1e-6)
    assert (expected - plain).abs().max() > 1e-5


def test_a_file_of_16_bits_rounds_nothing(tiny_llama: Any, make_tokenizer: Any, tmp_path: Any) -> None:
    path = str(write_gguf(tmp_path / "model.gguf", tiny_llama(), make_tokenizer(), "F16"))
    assert not round_activations(load_base(path, init_kwargs={"dtype": "float32"}))


def test_the_strength_of_an_adapter() -> None:
    """By hand: an adapter adds 1 and 2 to the tokens of one text and 1 to the other's; served it adds 0.5, 1 and 2."""
    off = [torch.tensor([-3.0, -4.0]), torch.tensor([-1.0])]
    trained: Any = SimpleNamespace(
        off=off,
        logps=[torch.tensor([-2.0, -2.0]), torch.tensor([0.0])],
        greedy=[],
        rows=SimpleNamespace(name="", pairs=0),
    )
    drift = compare(trained, Observed([torch.tensor([-2.5, -3.0]), torch.tensor([1.0])], []))
    assert drift.strength == pytest.approx((0.5 + 2 + 2) / 6)
    residuals = 0.5 + 2 - 5 * 0.75, 2 - 0.75  # of each text, times what the adapter adds
    assert drift.strength_error == pytest.approx((residuals[0] ** 2 + residuals[1] ** 2) ** 0.5 / 6)
    assert compare(trained, Observed(off, [])).strength == 0.0  # an adapter that isn't loaded
    trained.logps = off
    assert compare(trained, Observed(off, [])).strength is None


def test_the_strength_is_told_beside_noise() -> None:
    """Noise of four times the adapter's size: the interval holds the truth, and not an adapter that is left out."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda scale: [torch.randn(40, generator=generator) * scale for _ in range(200)]  # noqa: E731
    effect, off, covered = draw(0.05), draw(3.0), 0
    trained: Any = SimpleNamespace(
        off=off,
        logps=[o + e for o, e in zip(off, effect, strict=True)],
        greedy=[],
        rows=SimpleNamespace(name="", pairs=0),
    )
    for _ in range(100):
        served = [o + 0.5 * e + n for o, e, n in zip(off, effect, draw(0.2), strict=True)]
        drift = compare(trained, Observed(served, []))
        assert 0.02 < (drift.strength_error or 0) < 0.08
        covered += abs((drift.strength or 0) - 0.5) < 2 * (drift.strength_error or 0)
    assert 88 <= covered <= 99
