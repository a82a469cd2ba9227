"""The only forward pass: a model and a packed batch in, log-probs out.

Shape suffixes: N predicted tokens, C completions, H hidden size; in `sequence_logps` B sequences, L padded length.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .attention import AttentionPlan, layout_marker
from .images import block_ids, row_inputs, shared_inputs
from .layout import PackedBatch, Sample, pad_rows
from .logprobs import CHUNK_ROWS, read_head, token_logps
from .modules import eval_mode, text_decoder, unwrap
from .routing import Routing, read_routing
from .scope import acting


class NotRecognizedError(Exception):
    """A decoder of another kind can't be used on this model; the message says why."""


class Decoder(ABC):
    """Decoder layers that stand for a model's own, and read its weights and adapters as they are at every call."""

    attention: str  # name of its attention backend
    checkpointed: Callable[[PackedBatch], tuple[int, int]]  # of a batch: see `MemoryBudget.checkpointed`
    offload: bool  # keep those inputs in the CPU's memory

    @property
    def shares_work(self) -> bool:
        """Whether `with_reference` computes less than two passes."""
        return False

    @abstractmethod
    def hidden_states(self, batch: PackedBatch, router_logits: list[Tensor] | None = None) -> Tensor:
        """Returns the normed hidden states that predict, (N, H), for a shared batch on the model's device.

        What each router computes, (T, X), is added to `router_logits`.
        """

    def with_reference(
        self, batch: PackedBatch, adapter: str | None, router_logits: list[Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns `hidden_states`, and those of `reference(adapter)` without a gradient.

        A decoder that goes through its layers once for both needs weights that come and go once."""
        with torch.no_grad():
            reference_NH = self.reference(adapter).hidden_states(batch)
        return self.hidden_states(batch, router_logits), reference_NH

    @abstractmethod
    def reference(self, adapter: str | None) -> "Decoder":
        """Returns the same with the frozen `adapter` in the place of the active one, or with none."""

    @abstractmethod
    def use_fp8(self) -> None:
        """Multiplies frozen weights in FP8 from now on. Raises OptionError where their shapes don't allow it."""


Backend = str | AttentionPlan | Decoder


@dataclass(frozen=True)
class Scores:
    """Log-probs of a batch from one forward pass, in nats."""

    token_logps_N: Tensor  # log-prob of every predicted token, float32; empty where a cache kept the sums only
    logps_C: Tensor  # their sum per completion (docs/derivations.md, eq. 49), float64
    log_sum_sq_N: Tensor | None = None  # log of the sum over the vocabulary of squared probabilities, float32
    routing: Routing | None = None  # of a mixture of experts


def completion_logps(
    model: nn.Module,
    batch: PackedBatch,
    backend: Backend = "dense",
    chunk_rows: int = CHUNK_ROWS,
    log_sum_sq: bool = False,
    routing: bool = False,
) -> Scores:
    """Returns log-probs of every completion of a batch under `model`, in whatever state its adapter is.

    Args:
        model: a causal LM or a PEFT model around one. For a shared batch its attention implementation must be
            `forward.attention.IMPLEMENTATION`.
        batch: from `pack` or `pad_rows`, on the model's device.
        backend: how a shared batch is read: by the model's own modules with an attention backend, "dense", "varlen" or
            one that was added (or a plan already made for this batch), or by a `Decoder` made of `model`.
        chunk_rows: rows of logits that exist at a time.
        log_sum_sq: whether to fill `Scores.log_sum_sq_N`, which WPO's weights read.
        routing: whether to fill `Scores.routing`, which the routers' auxiliary loss reads.

    Raises:
        CannotShareError: the model's attention can't read a shared batch.
    """
    causal_lm = unwrap(model)
    logits: list[Tensor] = []
    if isinstance(backend, Decoder) and batch.shared:
        hidden_NH = backend.hidden_states(batch, logits)
    else:
        outputs = _run(causal_lm, batch, backend.attention if isinstance(backend, Decoder) else backend, routing)
        hidden_NH = outputs.last_hidden_state.flatten(0, 1).index_select(0, batch.pred_pos)
        logits = outputs.router_logits if routing else []
    return _read(causal_lm, batch, hidden_NH, logits, chunk_rows, log_sum_sq, routing)


def logps_with_reference(
    model: nn.Module,
    batch: PackedBatch,
    backend: Decoder,
    adapter: str | None,
    chunk_rows: int = CHUNK_ROWS,
    log_sum_sq: bool = False,
    routing: bool = False,
) -> tuple[Scores, Scores]:
    """Returns `completion_logps` of a shared batch, and the reference's, from one walk over the decoder's layers.

    `adapter` is the reference's, or None for none; the other arguments are those of `completion_logps`.
    """
    causal_lm, logits = unwrap(model), list[Tensor]()
    own_NH, reference_NH = backend.with_reference(batch, adapter, logits)
    with torch.no_grad():
        reference = _read(causal_lm, batch, reference_NH, [], chunk_rows, False, False)
    return _read(causal_lm, batch, own_NH, logits, chunk_rows, log_sum_sq, routing), reference


def _read(
    causal_lm: PreTrainedModel,
    batch: PackedBatch,
    hidden_NH: Tensor,
    logits: Sequence[Tensor],
    chunk_rows: int,
    log_sum_sq: bool,
    routing: bool,
) -> Scores:
    head = read_head(causal_lm)
    chosen = causal_lm.config.get_text_config().num_experts_per_tok if routing else 0
    routed = read_routing(logits, batch, chosen) if routing else None
    log_sum_sq_N = torch.empty_like(batch.target, dtype=torch.float32) if log_sum_sq else None
    token_logps_N = token_logps(hidden_NH, batch.target, head, chunk_rows, log_sum_sq_N)
    return Scores(token_logps_N, sum_by_completion(token_logps_N, batch), log_sum_sq_N, routed)


def has_routers(model: nn.Module) -> bool:
    """Returns whether a causal LM is a mixture of experts whose forward gives what its routers computed."""
    causal_lm = unwrap(model)
    config = causal_lm.config.get_text_config()
    chosen = getattr(config, "num_experts_per_tok", None)
    if not hasattr(config, "output_router_logits") or not isinstance(chosen, int):
        return False
    batch = pad_rows([Sample([0], [[1]])]).to(causal_lm.get_input_embeddings().weight.device)
    with torch.no_grad(), eval_mode(model):
        logits: Any = getattr(_run(causal_lm, batch, "dense", routing=True), "router_logits", None)
    return bool(logits) and all(layer.shape == (2, logits[0].shape[-1]) for layer in logits)


def sum_by_completion(x_N: Tensor, batch: PackedBatch) -> Tensor:
    """Adds (N,) values of predicted tokens up to (C,) float64 sums.

    float32 loses 1e-4 nats over 60 tokens, and on a GPU another amount each time.
    """
    zeros_C = x_N.new_zeros(batch.num_completions, dtype=torch.float64)
    return zeros_C.index_add(0, batch.completion_of, x_N.double())


def _run(causal_lm: PreTrainedModel, batch: PackedBatch, backend: str | AttentionPlan, routing: bool) -> Any:
    kwargs: dict[str, Any] = {"input_ids": batch.input_ids, "use_cache": False}
    if routing or getattr(causal_lm.config.get_text_config(), "output_router_logits", False):
        kwargs["output_router_logits"] = routing  # the reference needs none, whatever the config says
    if batch.shared:
        kwargs["attention_mask"] = layout_marker(batch.input_ids.device)
        kwargs["position_ids"] = batch.position_ids
        plan = AttentionPlan(batch, backend) if isinstance(backend, str) else backend
        plan.blocks = block_ids(causal_lm.config, batch)
        kwargs["prefix_layout"] = plan
    else:
        kwargs["attention_mask"] = batch.attention_mask
    if batch.images is not None:
        kwargs |= (shared_inputs if batch.shared else row_inputs)(causal_lm, batch)
    backbone = causal_lm.base_model
    if backbone is causal_lm:  # its declared prefix names another class's attribute (Llama 4)
        backbone = text_decoder(causal_lm)
    with acting(causal_lm, batch.alora_offsets):
        return backbone(**kwargs)


def sequence_logps(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
    """Returns the log-probability of each labeled sequence under any causal LM (docs/derivations.md, eq. 49).

    The plain path, from the model's own logits: for small jobs and as an oracle. Training uses `completion_logps`.

    Args:
        model: anything whose call returns `.logits`, (B, L, V).
        input_ids: (B, L) int64.
        attention_mask: (B, L), 1 for tokens and 0 for padding.
        labels: (B, L) int64, `input_ids` where a token counts and -100 on prompt and padding.

    Returns:
        (B,) float32 sums of log-probs in nats; 0 for a row without labels.
    """
    logits = model(input_ids=input_ids, attention_mask=attention_mask).logits[:, :-1].float()
    labels = labels[:, 1:]
    token_logps = logits.log_softmax(-1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
    return torch.where(labels == -100, 0.0, token_logps).sum(1)
