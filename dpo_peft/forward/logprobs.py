"""Log-probs of given tokens from hidden states, in chunks: full logits never exist.

With a frozen head (the usual case: LoRA leaves it alone) the gradient to the hidden states is formed in the forward
pass, while a chunk's probabilities are at hand: d logp(y) / d hidden = (onehot(y) - softmax) @ W. The backward then
only scales it, so the head costs two matrix products instead of three and its weight gets no gradient. A head that is
trained, adapted or quantized goes through its own module, chunk by chunk, each recomputed in the backward.

Shape suffixes: N predicted tokens, H hidden size, V vocabulary, K one chunk of N.
"""

from dataclasses import dataclass
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from ..wings import wing
from .gguf import GgufHead, as_read
from .modules import class_source

# 1024 rows of a 128k vocabulary are 0.25 GiB in bfloat16 (0.5 in float32), the largest buffer that the head needs.
CHUNK_ROWS = 1024


@dataclass(frozen=True)
class Head:
    """A causal LM's output layer and what its `forward` does to the logits afterwards.

    `scale` multiplies the logits, `softcap` c replaces them by c * tanh(logits / c) after that.
    """

    module: nn.Module
    scale: float = 1.0
    softcap: float | None = None

    @property
    def frozen(self) -> bool:
        """Whether the head is a bare linear layer: nothing to train, to switch off, or to run around its forward."""
        module = self.module
        # Offloading replaces forward; other hooks may change what goes in or comes out.
        hooked = "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks
        return (
            type(module) in (nn.Linear, GgufHead)
            and not hooked
            and not any(p.requires_grad for p in module.parameters())
        )

    @property
    def plain(self) -> bool:
        """Whether the logits are the matrix product alone."""
        return self.module.bias is None and self.scale == 1.0 and self.softcap is None

    def logits(self, hidden: Tensor) -> Tensor:
        """Turns (K, H) hidden states into (K, V) logits in at least float32, through the module itself."""
        return self.post(_at_least_float32(self.module(hidden)))

    def post(self, logits: Tensor) -> Tensor:
        """Scales and soft-caps raw float32 logits."""
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def read_head(model: nn.Module) -> Head:
    """Returns the head of a (bare, not PEFT-wrapped) causal LM, with the logit transforms that its config declares.

    Models differ in how they name them; whatever this list misses is caught by the start-up probe, which compares with
    the model's own logits.
    """
    config: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
    whole, kind = config is model.config, cast(Any, type(model))

    # The code of a model of text and images says which transforms of its text config it applies: some leave them out
    # that their text model has.
    def declared(*names: str) -> Any:
        values = (getattr(config, name, None) for name in names if whole or name in class_source(kind))
        return next((value for value in values if value is not None), None)

    scale = declared("logit_scale", "output_multiplier", "lm_head_multiplier")
    if scale is None and (scaling := declared("logits_scaling", "logits_mup_width_multiplier")) is not None:
        scale = scaling if config.model_type == "hyperclovax" else 1.0 / scaling
    module = model.get_output_embeddings()  # type: ignore[operator]
    return Head(module, 1.0 if scale is None else float(scale), declared("final_logit_softcapping", "logits_soft_cap"))


def token_logps(
    hidden_NH: Tensor,
    target_N: Tensor,
    head: Head,
    chunk_rows: int = CHUNK_ROWS,
    log_sum_sq_N: Tensor | None = None,
) -> Tensor:
    """Returns the log-prob of each target token given the hidden state that predicts it (docs/derivations.md, eq. 49,
    by term).

    Args:
        hidden_NH: (N, H) hidden states, any float dtype.
        target_N: (N,) token ids.
        head: from `read_head`.
        chunk_rows: rows of logits that exist at a time.
        log_sum_sq_N: (N,) float32; if given, filled with the log of the sum over the vocabulary of squared
            probabilities, without a gradient.

    Returns:
        (N,) float32 log-probs in nats, differentiable in the hidden states and in the head where it is trained.
    """
    if head.frozen:
        return _FrozenHeadLogps.apply(as_read(head.module, hidden_NH), target_N, head, chunk_rows, log_sum_sq_N)
    chunks = zip(hidden_NH.split(chunk_rows), target_N.split(chunk_rows), strict=True)
    extra = log_sum_sq_N is not None
    if torch.is_grad_enabled():
        parts = [checkpoint(_module_chunk, h, y, head, extra, use_reentrant=False) for h, y in chunks]
    else:
        parts = [_module_chunk(h, y, head, extra) for h, y in chunks]
    if log_sum_sq_N is not None:
        log_sum_sq_N.copy_(torch.cat([log_sum_sq for _, log_sum_sq in parts]))
    return torch.cat([logps for logps, _ in parts])


def _module_chunk(hidden_KH: Tensor, target_K: Tensor, head: Head, extra: bool) -> tuple[Tensor, Tensor]:
    logits_KV = head.logits(hidden_KH)
    lse_K1 = logits_KV.logsumexp(1, keepdim=True)
    logps_K = (logits_KV.gather(1, target_K[:, None]) - lse_K1)[:, 0]
    return logps_K, _log_sum_sq(logits_KV.detach(), lse_K1.detach()) if extra else logps_K.detach()


def _log_sum_sq(logits_KV: Tensor, lse_K1: Tensor) -> Tensor:
    return (2 * logits_KV).logsumexp(1) - 2 * lse_K1[:, 0]


def _kernels_for(logits_KV: Tensor) -> ModuleType | None:
    """Returns the fused layers' element-wise functions if they have kernels for these logits."""
    fused = wing("fused") if logits_KV.is_cuda else None
    return fused.elementwise if fused is not None and fused.elementwise.uses_kernels(logits_KV) else None


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _FrozenHeadLogps(torch.autograd.Function):
    """See the head of this file. Works in the dtype that a linear layer would use here, sums in float32."""

    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, target_N: Tensor, head: Head, chunk_rows: int, log_sum_sq_N: Tensor | None
    ) -> Tensor:
        linear = cast(nn.Linear, head.module)
        weight_VH: Tensor = linear.weight
        bias_V = linear.bias
        device = hidden_NH.device.type
        if torch.is_autocast_enabled(device):
            weight_VH = weight_VH.to(torch.get_autocast_dtype(device))
        needs_grad = ctx.needs_input_grad[0]
        sum_dtype = torch.promote_types(weight_VH.dtype, torch.float32)
        logps_N = torch.empty(hidden_NH.shape[0], dtype=sum_dtype, device=hidden_NH.device)
        grad_NH = torch.empty_like(hidden_NH) if needs_grad else None
        with torch.autocast(device, enabled=False):
            for start in range(0, hidden_NH.shape[0], chunk_rows):
                rows = slice(start, start + chunk_rows)
                raw_KV = hidden_NH[rows].to(weight_VH.dtype) @ weight_VH.T
                if log_sum_sq_N is None and head.plain and (kernels := _kernels_for(raw_KV)):
                    logps_N[rows], lse_K = kernels.logps_from_logits(raw_KV, target_N[rows])
                    if grad_NH is not None:
                        grad_NH[rows] = kernels.logps_grad_(raw_KV, target_N[rows], lse_K) @ weight_VH
                    continue
                raw_KV = _at_least_float32(raw_KV)
                if bias_V is not None:
                    raw_KV += bias_V
                logits_KV = head.post(raw_KV)
                target_K1 = target_N[rows, None]
                lse_K1 = logits_KV.logsumexp(1, keepdim=True)
                logps_N[rows] = (logits_KV.gather(1, target_K1) - lse_K1)[:, 0]
                if log_sum_sq_N is not None:
                    log_sum_sq_N[rows] = _log_sum_sq(logits_KV, lse_K1)
                if grad_NH is not None:
                    grad_NH[rows] = _grad_to_hidden(logits_KV, lse_K1, target_K1, head, weight_VH).to(grad_NH.dtype)
        ctx.save_for_backward(grad_NH)
        return logps_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_NH,) = ctx.saved_tensors
        return (grad_NH * grad_outputs[0][:, None]).to(grad_NH.dtype), None, None, None, None


def _grad_to_hidden(logits_KV: Tensor, lse_K1: Tensor, target_K1: Tensor, head: Head, weight_VH: Tensor) -> Tensor:
    grad_KV = (logits_KV - lse_K1).exp_().neg_()
    grad_KV.scatter_add_(1, target_K1, torch.ones_like(target_K1, dtype=grad_KV.dtype))
    if head.softcap is not None:
        grad_KV *= 1 - (logits_KV / head.softcap) ** 2
    if head.scale != 1.0:
        grad_KV *= head.scale
    return grad_KV.to(weight_VH.dtype) @ weight_VH
