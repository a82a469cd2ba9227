"""The varlen backend without a GPU: its kernel replaced by an emulation, written from torch's description of it."""

from typing import Any

import pytest
import torch
from forward_models import (
    SHARING,
    WINDOW,
    adapter_grads,
    add_lora,
    build,
    grad_difference,
    own_token_logps,
    random_samples,
)
from torch import Tensor
from varlen_kernel import emulated_kernel

from dpo_peft.forward import attention, completion_logps, pack, plan_forward, probe
from dpo_peft.forward.attention import AttentionPlan, HeadShape, choose_backend, prefix_shared_attention

SAMPLES = random_samples([(11, (5, 8, 1)), (6, (7, 3)), (1, (2,))])


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "varlen_kernel", emulated_kernel)


def attend(backend: str, heads: int, kv_heads: int, window: int | None, v_size: int = 16) -> list[Tensor]:
    """The output, and the gradients to q, k and v, of one attention call on the packed samples."""
    batch = pack(SAMPLES)
    generator = torch.Generator().manual_seed(3)
    tokens = batch.input_ids.shape[1]
    shapes = [(heads, 16), (kv_heads, 16), (kv_heads, v_size)]
    qkv = [
        torch.randn(1, h, tokens, d, generator=generator, dtype=torch.float64, requires_grad=True) for h, d in shapes
    ]
    out, _ = prefix_shared_attention(
        torch.nn.Module(),
        *qkv,
        attention_mask=None,
        scaling=0.3,
        prefix_layout=AttentionPlan(batch, backend),
        sliding_window=window,
    )
    assert out.shape == (1, tokens, heads, v_size)
    upstream = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    return [out.detach(), *torch.autograd.grad(out, qkv, upstream)]


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("window", [None, 1, 4, 9])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)], ids=str)
def test_varlen_equals_dense(heads: tuple[int, int], window: int | None) -> None:
    for a, b in zip(attend("varlen", *heads, window), attend("dense", *heads, window), strict=True):
        assert (a - b).abs().max() < 1e-12


@pytest.mark.usefixtures("emulated")
def test_narrow_values_are_padded_to_the_kernel_s_head_size() -> None:
    for a, b in zip(attend("varlen", 4, 4, None, v_size=8), attend("dense", 4, 4, None, v_size=8), strict=True):
        assert (a - b).abs().max() < 1e-12


@pytest.mark.usefixtures("emulated")
def test_a_shifted_window_would_show() -> None:
    a, b = attend("varlen", 4, 2, 4)[0], attend("dense", 4, 2, 5)[0]
    assert (a - b).abs().max() > 1e-2


@pytest.mark.sampled(2)
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gemma4", "qwen3-moe", "gpt2", "deepseek-v3"])
def test_models_are_exact_on_varlen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "choose_backend", lambda *args: "varlen")
    model = add_lora(build(*SHARING[name]))
    own = own_token_logps(model, SAMPLES)
    own_grads = adapter_grads(model, torch.stack([x.sum() for x in own]))
    plan = plan_forward(model)
    assert plan.shared and plan.backend == "varlen" and "'varlen'" in str(plan)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    scores = completion_logps(model.train(), pack(SAMPLES), plan.backend)
    assert (scores.token_logps_N - torch.cat(own)).abs().max() < 1e-5
    assert grad_difference(adapter_grads(model, scores.logps_C), own_grads) < 1e-5


def test_kernel_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def record(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.update(kwargs, shapes=(q.shape, k.shape, v.shape), max=args)
        return q

    monkeypatch.setattr(attention, "varlen_kernel", record)
    batch = pack(SAMPLES)
    for window, size in [(None, (-1, 0)), (1, (0, 0)), (WINDOW, (WINDOW - 1, 0))]:
        attend_once = dict(attention_mask=None, scaling=0.5, sliding_window=window)
        q, k = torch.randn(1, 4, 44, 8), torch.randn(1, 2, 44, 8)
        prefix_shared_attention(
            torch.nn.Module(), q, k, k, prefix_layout=AttentionPlan(batch, "varlen"), **attend_once
        )
        keys = batch.kv_index.shape[0]
        assert seen["window_size"] == size and seen["scale"] == 0.5 and seen["max"] == (batch.max_q, batch.max_k)
        assert seen["shapes"] == ((44, 4, 8), (keys, 2, 8), (keys, 2, 8))  # grouped heads are not repeated


def test_attention_dropout_goes_to_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel has no dropout: where the user keeps it on in training, the dense path takes the call."""
    monkeypatch.setattr(attention, "varlen_kernel", refusing_kernel)
    q = torch.randn(1, 4, 44, 8)
    outs = []
    for backend in ("varlen", "dense"):
        torch.manual_seed(5)
        layout = AttentionPlan(pack(SAMPLES), backend)
        outs.append(prefix_shared_attention(torch.nn.Module(), q, q, q, None, dropout=0.5, prefix_layout=layout)[0])
    assert torch.equal(*outs) and (outs[0] == 0).any()


def wrong_kernel(*args: Any, window_size: tuple[int, int], **kwargs: Any) -> Tensor:
    return emulated_kernel(*args, window_size=(-1, -1), **kwargs)  # not causal


def refusing_kernel(*args: Any, **kwargs: Any) -> Tensor:
    raise RuntimeError("head size not supported")


@pytest.mark.parametrize("kernel", [wrong_kernel, refusing_kernel])
def test_a_kernel_that_fails_the_probe_gives_way_to_dense(kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "choose_backend", lambda *args: "varlen")
    monkeypatch.setattr(attention, "varlen_kernel", kernel)
    model = build("Llama")
    plan = plan_forward(model)
    assert (plan.shared, plan.backend) == (True, "dense")
    with torch.no_grad():
        logps_N = completion_logps(model, pack(SAMPLES), plan.backend).token_logps_N
        assert (logps_N - torch.cat(own_token_logps(model, SAMPLES))).abs().max() < 1e-5


@pytest.mark.parametrize("known", [True, False])
def test_grouped_heads_are_announced_where_torch_wants_it(known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    def newer(q: Tensor, k: Tensor, v: Tensor, *args: Any, enable_gqa: bool = False) -> Tensor:
        calls.append(dict(enable_gqa=enable_gqa))
        return q

    def older(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> Tensor:
        calls.append({})
        return q

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", newer if known else older)
    attention._needs_enable_gqa.cache_clear()
    q, k = torch.randn(5, 4, 8), torch.randn(5, 2, 8)
    attention.varlen_kernel(q, k, k)
    attention.varlen_kernel(q, q, q)
    attention._needs_enable_gqa.cache_clear()
    assert calls == ([dict(enable_gqa=True), dict(enable_gqa=False)] if known else [{}, {}])


CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "capability", "backend"),
    [
        (CUDA, torch.bfloat16, 128, (9, 0), "varlen"),
        (CUDA, torch.float16, 64, (8, 0), "varlen"),
        (CUDA, torch.bfloat16, 256, (8, 6), "varlen"),
        (CUDA, torch.bfloat16, 128, (7, 5), "dense"),  # too old
        (CUDA, torch.float32, 128, (9, 0), "dense"),  # no half precision
        (CUDA, torch.bfloat16, 257, (9, 0), "dense"),
        (CUDA, torch.bfloat16, 512, (9, 0), "dense"),  # too large
        (CUDA, torch.bfloat16, 20, (9, 0), "dense"),  # no multiple of 8
        (CPU, torch.bfloat16, 128, (9, 0), "dense"),
        (torch.device("mps"), torch.float16, 128, (9, 0), "dense"),
    ],
)
def test_choice_of_backend(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    capability: tuple[int, int],
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert choose_backend(device, dtype, HeadShape(4, 2, head_dim)) == backend


def test_backend_is_chosen_by_the_largest_head_that_attention_saw(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 4's full-attention layers have larger heads than its config's head_dim; latent attention has its own."""
    asked = []
    monkeypatch.setattr(probe, "choose_backend", lambda device, dtype, heads: asked.append(heads.size) or "dense")
    for name in ("llama", "gemma4", "deepseek-v3"):
        assert plan_forward(build(*SHARING[name])).shared
    assert asked == [16, 32, 24]
