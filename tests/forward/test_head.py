"""Log-probs from hidden states: against a float64 oracle, with and without a trained head, in bounded memory.

Tolerance in half precision (the rule of ml-cross-entropy): our error against a float64 oracle may not exceed the error
of the plain implementation in the same dtype by more than an epsilon.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from forward_models import SHARING, adapter_grads, add_lora, build, grad_difference, own_token_logps, random_samples
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dpo_peft.forward import completion_logps, pack, plan_forward
from dpo_peft.forward.logprobs import Head, read_head, token_logps
from dpo_peft.reference.adapter_off import reference_logps

SAMPLES = random_samples([(11, (5, 8, 1)), (6, (7, 3))])
# (rows, hidden, vocabulary, chunk): odd sizes, a chunk of one, a chunk that does not divide, one that is larger.
SIZES = [(252, 64, 507, 64), (123, 33, 252, 1), (507, 16, 123, 100), (1, 8, 507, 1024), (252, 64, 123, 252)]
# Scale, soft-cap and bias of the head.
HEADS = {
    "plain": (1.0, None, False),
    "scaled": (0.25, None, False),
    "capped": (1.0, 3.0, False),
    "bias": (1.0, None, True),
    "all": (1.7, 2.5, True),
}


def make_head(hidden: int, vocab: int, kind: str, dtype: torch.dtype = torch.float32, frozen: bool = True) -> Head:
    scale, softcap, bias = HEADS[kind]
    linear = nn.Linear(hidden, vocab, bias=bias).to(dtype).requires_grad_(not frozen)
    nn.init.normal_(linear.weight, std=hidden**-0.5)
    return Head(linear, scale, softcap)


def plain_logps(hidden: Tensor, target: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """The whole (N, V) logits, then PyTorch's log_softmax: in float64 the oracle, in less the plain implementation."""
    scale, softcap, _ = HEADS[kind]
    logits = F.linear(hidden, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.log_softmax(-1).gather(1, target[:, None])[:, 0]


def oracle(hidden: Tensor, target: Tensor, head: Head, kind: str, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs and the gradient to the hidden states, in float64."""
    x = hidden.detach().double().requires_grad_()
    bias = head.module.bias
    logps = plain_logps(x, target, head.module.weight.double(), None if bias is None else bias.double(), kind)
    (grad,) = torch.autograd.grad(logps, x, upstream.double())
    return logps.detach(), grad


def ours(hidden: Tensor, target: Tensor, head: Head, chunk: int, upstream: Tensor) -> tuple[Tensor, Tensor]:
    x = hidden.detach().requires_grad_()
    logps = token_logps(x, target, head, chunk)
    (grad,) = torch.autograd.grad(logps, x, upstream.to(logps.dtype))
    return logps.detach(), grad


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_matches_float64(size: tuple, kind: str, frozen: bool) -> None:
    rows, hidden, vocab, chunk = size
    head = make_head(hidden, vocab, kind, frozen=frozen)
    assert head.frozen == frozen
    x, y, up = torch.randn(rows, hidden) * 2, torch.randint(vocab, (rows,)), torch.randn(rows)
    logps, grad = ours(x, y, head, chunk, up)
    true_logps, true_grad = oracle(x, y, head, kind, up)
    assert logps.dtype == torch.float32 and logps.shape == (rows,)
    assert (logps - true_logps).abs().max() < 5e-6
    assert (grad - true_grad).abs().max() < 5e-6 * max(1.0, float(true_grad.abs().max()))
    with torch.no_grad():
        assert torch.equal(token_logps(x, y, head, chunk), logps)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_gradcheck(kind: str, frozen: bool) -> None:
    head = make_head(5, 11, kind, torch.float64, frozen)
    x, y = torch.randn(7, 5, dtype=torch.float64, requires_grad=True), torch.randint(11, (7,))
    assert torch.autograd.gradcheck(lambda x: token_logps(x, y, head, 3), (x,))


def test_a_second_derivative_is_refused_not_wrong() -> None:
    head = make_head(5, 11, "plain")
    x = torch.randn(7, 5, requires_grad=True)
    (grad,) = torch.autograd.grad(token_logps(x, torch.randint(11, (7,)), head).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_half_precision_is_no_worse_than_plain(kind: str, dtype: torch.dtype, frozen: bool) -> None:
    epsilon = 1e-3
    rows, hidden, vocab = 252, 123, 507
    head = make_head(hidden, vocab, kind, dtype, frozen)
    x, y, up = (torch.randn(rows, hidden) * 2).to(dtype), torch.randint(vocab, (rows,)), torch.randn(rows)
    true_logps, true_grad = oracle(x, y, head, kind, up)

    plain_x = x.clone().requires_grad_()
    plain = plain_logps(plain_x, y, head.module.weight, head.module.bias, kind)
    (plain_grad,) = torch.autograd.grad(plain, plain_x, up)
    logps, grad = ours(x, y, head, 100, up)
    assert logps.dtype == torch.float32 and grad.dtype == dtype
    assert (logps - true_logps).abs().max() <= (plain - true_logps).abs().max() + epsilon
    assert (grad - true_grad).abs().mean() <= (plain_grad - true_grad).abs().mean() + epsilon
    assert (grad - true_grad).abs().max() <= 1.5 * (plain_grad - true_grad).abs().max() + epsilon


def test_autocast_computes_in_half_and_returns_float32() -> None:
    head = make_head(64, 252, "plain")
    x, y, up = torch.randn(123, 64), torch.randint(252, (123,)), torch.randn(123)
    true_logps, true_grad = oracle(x, y, head, "plain", up)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logps, grad = ours(x, y, head, 50, up)
        logits = head.module(x)
    assert logits.dtype == torch.bfloat16 and logps.dtype == grad.dtype == torch.float32
    plain = logits.float().log_softmax(-1).gather(1, y[:, None])[:, 0]
    assert 1e-4 < (logps - true_logps).abs().max() <= (plain - true_logps).abs().max() + 1e-3
    assert (grad - true_grad).abs().max() < 0.02 * true_grad.abs().max()


def test_frozen_head_gets_no_gradient_and_a_trained_one_the_right_one() -> None:
    x, y = torch.randn(123, 16), torch.randint(252, (123,))
    up = torch.randn(123)
    frozen = make_head(16, 252, "all")
    (token_logps(x.requires_grad_(), y, frozen, 50) * up).sum().backward()
    assert frozen.module.weight.grad is None and frozen.module.bias.grad is None
    trained = make_head(16, 252, "all", frozen=False)
    (token_logps(x.detach(), y, trained, 50) * up).sum().backward()
    weight, bias = (p.detach().double().requires_grad_() for p in (trained.module.weight, trained.module.bias))
    (plain_logps(x.detach().double(), y, weight, bias, "all") * up).sum().backward()
    assert (trained.module.weight.grad - weight.grad).abs().max() < 1e-5
    assert (trained.module.bias.grad - bias.grad).abs().max() < 1e-5


def test_modules_that_are_more_than_a_linear_layer_are_called() -> None:
    """Subclasses (4-bit layers), adapters, hooks and replaced forwards (offloading) must not be bypassed."""
    assert make_head(8, 9, "plain").frozen

    class Quantized(nn.Linear):
        pass

    assert not Head(Quantized(8, 9).requires_grad_(False)).frozen
    x, y = torch.randn(5, 8), torch.randint(9, (5,))
    for hook in ("register_forward_pre_hook", "register_forward_hook", "forward"):
        head = make_head(8, 9, "plain")
        before = token_logps(x, y, head)
        if hook == "forward":
            head.module.forward = lambda x, module=head.module: F.linear(x, module.weight) * 2
        elif hook == "register_forward_hook":
            head.module.register_forward_hook(lambda module, inputs, output: output * 2)
        else:
            head.module.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
        after = token_logps(x, y, head)
        expected = (2 * x @ head.module.weight.T).log_softmax(-1).gather(1, y[:, None])[:, 0]
        assert not head.frozen and torch.allclose(after, expected, atol=1e-6) and not torch.allclose(after, before)


# ---- Memory ---------------------------------------------------------------------------------------------------------


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes, forward or backward."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_full_logits_never_exist(frozen: bool) -> None:
    rows, hidden, vocab, chunk = 507, 8, 252, 41
    head = make_head(hidden, vocab, "all", frozen=frozen)
    x, y = torch.randn(rows, hidden, requires_grad=True), torch.randint(vocab, (rows,))
    with LargestTensor() as measured:
        token_logps(x, y, head, chunk).sum().backward()
    assert measured.elements == chunk * vocab
    with LargestTensor() as control:
        plain_logps(x, y, head.module.weight, head.module.bias, "all").sum().backward()
    assert control.elements == rows * vocab


@pytest.mark.parametrize("save", [None, ["lm_head"]], ids=["frozen", "trained"])
def test_full_logits_never_exist_in_a_model(save: list[str] | None) -> None:
    model = add_lora(build("Llama", dict(vocab_size=2003, hidden_size=16, head_dim=4)), modules_to_save=save)
    plan_forward(model)
    batch = pack(random_samples([(5, (40, 31)), (7, (29, 50))]))
    with LargestTensor() as measured:
        completion_logps(model, batch, chunk_rows=16).logps_C.sum().backward()
    assert measured.elements == max(16 * 2003, 2003 * 16)  # a chunk's logits; the (vocabulary, hidden) weights
    assert batch.target.numel() == 150


# ---- A trained or adapted head in a model (T17) ---------------------------------------------------------------------

HEAD_ADAPTERS: dict[str, dict[str, Any]] = {
    "modules_to_save": dict(modules_to_save=["lm_head"]),
    "lora": dict(target_modules=["q_proj", "lm_head"]),
    "lora with dropout off": dict(target_modules=["q_proj", "lm_head"], lora_dropout=0.2),
    "lora on embeddings": dict(target_modules=["q_proj", "embed_tokens"]),
    "saved embeddings": dict(target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
    "trained tokens": dict(target_modules=["q_proj"], trainable_token_indices=list(range(3, 60))),
}


def adapted(kind: str, tied: bool) -> tuple[Any, Tensor]:
    """A model whose head or embedding is adapted, all trained weights perturbed; and the original's log-probs (N,)."""
    model = build("Llama", dict(tie_word_embeddings=tied, logits_scaling=None))
    with torch.no_grad():
        original_N = torch.cat(own_token_logps(model, SAMPLES))
    model = get_peft_model(model, LoraConfig(r=4, task_type="CAUSAL_LM", **HEAD_ADAPTERS[kind])).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model, original_N


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", HEAD_ADAPTERS)
def test_adapted_heads(kind: str, tied: bool) -> None:
    model, original_N = adapted(kind, tied)
    own = own_token_logps(model, SAMPLES)
    own_grads = adapter_grads(model, torch.stack([x.sum() for x in own]))
    plan = plan_forward(model)
    assert plan.shared
    batch = pack(SAMPLES)
    scores = completion_logps(model, batch, chunk_rows=5)
    grads = adapter_grads(model, scores.logps_C)
    own_N = torch.cat(own).detach()
    assert (scores.token_logps_N.detach() - own_N).abs().max() < 1e-5
    assert grad_difference(grads, own_grads) < 1e-5
    assert (own_N - original_N).abs().max() > 0.1  # the perturbed adapter matters
    # T17: the reference is the original, whatever is trained on the head.
    assert (reference_logps(model, batch).token_logps_N - original_N).abs().max() < 1e-5


def test_bypassing_the_trained_head_would_show() -> None:
    """Control of T17: what code that reads the base head's weight would give."""
    model, _ = adapted("modules_to_save", tied=False)
    wrapper = model.get_base_model().lm_head
    own_N = torch.cat(own_token_logps(model, SAMPLES)).detach()
    model.get_base_model().lm_head = wrapper.original_module
    with torch.no_grad():
        bypassed_N = torch.cat(own_token_logps(model, SAMPLES))
    assert (bypassed_N - own_N).abs().max() > 0.1


@pytest.mark.parametrize(
    ("name", "scale", "softcap"),
    [
        ("llama", 1.0, None),
        ("cohere", 0.25, None),
        ("granite", 0.5, None),
        ("gemma3", 1.0, 3.0),
        ("nanochat", 1.0, 3.0),
        ("gemma4", 1.0, 3.0),
    ],
)
def test_logit_transforms_are_read_from_the_config(name: str, scale: float, softcap: float | None) -> None:
    head = read_head(build(*SHARING[name]))
    assert (head.scale, head.softcap) == (scale, softcap)
