"""Probe, don't list: at start-up the loaded model itself shows whether it can share prompts.

Two tiny samples are scored three ways: by the model's own logits, by our head on padded rows, and packed with shared
prompts. The last must agree with the first, must pass through our attention once per layer, and must not move when
another completion's tokens are edited. A model that fails falls back to one row per completion, with the reason.

Shape suffixes: N predicted tokens.
"""

import logging
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import NonFiniteError, OptionError
from ..fused.attention import supports
from ..fused.decoder import FusedModel
from ..fused.recognition import NotRecognizedError, recognize
from .attention import IMPLEMENTATION, AttentionPlan, CannotShareError, choose_backend
from .layout import PackedBatch, Sample, pack, pad_rows
from .score import completion_logps, eval_mode, unwrap

logger = logging.getLogger(__name__)

# Largest difference of one token's log-prob that rounding explains, by the dtype of the computation.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# In half precision a few tokens of a mixture of experts may go to another expert, so that share of them must agree.
_SHARE = {torch.float64: 1.0, torch.float32: 1.0, torch.float16: 0.8, torch.bfloat16: 0.8}


@dataclass(frozen=True)
class ForwardPlan:
    """How a model's batches are laid out and its layers computed: what the probe found.

    `max_difference` is the largest difference of a token's log-prob (nats) between the chosen layout and the model's
    own logits on the probe's samples; in half precision the largest but for a fifth of the tokens.
    """

    shared: bool
    backend: str  # of attention
    max_difference: float
    reason: str = ""  # why prompts aren't shared
    fused: FusedModel | None = None  # None: the model's own layers are run
    unfused: str = ""  # why

    @property
    def scorer(self) -> str | FusedModel:
        """The backend for `completion_logps`."""
        return self.fused or self.backend

    def __str__(self) -> str:
        if self.shared:
            layers = "fused layers" if self.fused else f"the model's own layers: {self.unfused}"
            attention = self.fused.attention if self.fused else self.backend
            return (
                f"Prompts are computed once per sample (attention backend {attention!r}; {layers}; largest "
                f"difference to the model's own log-probs {self.max_difference:.1e})."
            )
        return f"One padded row per completion: {self.reason}."


def plan_forward(
    model: nn.Module, share_prompts: bool = True, dtype: torch.dtype | None = None, fused: bool | None = None
) -> ForwardPlan:
    """Decide the layout on the loaded model, and set its attention implementation accordingly.

    Args:
        model: a causal LM or a PEFT model around one, on its device.
        share_prompts: False skips the probe of the packed layout and takes one row per completion.
        dtype: the dtype under autocast, if training uses it.
        fused: whether its layers are computed by `fused.py`; None: if they are recognised.

    Raises:
        NonFiniteError: the model's log-probs are NaN or infinite.
        OptionError: the model transforms its logits in a way that we don't know, so its log-probs would be wrong; or
            fused layers are asked for and are not right for it.
    """
    causal_lm = unwrap(model)
    device = causal_lm.get_input_embeddings().weight.device
    compute_dtype = dtype or causal_lm.get_input_embeddings().weight.dtype
    autocast = torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)
    samples = _probe_samples(causal_lm.config.get_text_config().vocab_size)
    with torch.no_grad(), eval_mode(model), autocast:
        plain = pad_rows(samples).to(device)
        own_N = _own_logps(causal_lm, plain)
        if not torch.isfinite(own_N).all():
            raise NonFiniteError(
                f"The log-probs of {type(causal_lm).__name__} are not finite: a weight is NaN or infinite, or the "
                "model overflows in this dtype. Check the checkpoint, or compute in bfloat16 or float32."
            )
        share = _SHARE[compute_dtype]
        tolerance = _TOLERANCE[compute_dtype] + 4 * _difference(_alone(causal_lm, samples, device), own_N, share)
        rows_difference = _difference(completion_logps(model, plain).token_logps_N, own_N, share)
        if not rows_difference <= tolerance:
            raise OptionError(
                f"{type(causal_lm).__name__} changes its logits after the output layer in a way that is not known "
                f"here: log-probs differ by {rows_difference:.3g} from the model's own. It can't be trained with this "
                "version; please report the model's name."
            )
        if not share_prompts:
            return ForwardPlan(False, "own", rows_difference, "sharing is turned off (share_prompts=False)")
        original = causal_lm.config._attn_implementation
        try:
            _check_layer_types(causal_lm.config.get_text_config())
            difference, head_dim = _probe_shared(model, samples, own_N, "dense", tolerance, share)
        except Exception as error:  # a model's forward may fail in any way; each means that it can't share
            causal_lm.set_attn_implementation(original)
            logger.debug("The packed probe failed.", exc_info=True)
            return ForwardPlan(False, "own", rows_difference, f"this model can't share prompts ({_short(error)})")
        backend = choose_backend(device, compute_dtype, head_dim)
        if backend != "dense":
            try:
                difference, _ = _probe_shared(model, samples, own_N, backend, tolerance, share)
            except Exception as error:  # a kernel may refuse this GPU or this shape
                logger.warning("The %s attention backend does not work here (%s).", backend, _short(error))
                backend = "dense"
        plan = ForwardPlan(True, backend, difference)
        return _plan_layers(model, plan, fused, compute_dtype, samples, tolerance)


def _plan_layers(
    model: nn.Module,
    plan: ForwardPlan,
    fused: bool | None,
    dtype: torch.dtype,
    samples: list[Sample],
    tolerance: float,
) -> ForwardPlan:
    """`plan` with fused layers, if they may be and give what the model's own give."""
    if fused is False:
        return replace(plan, unfused="fused_layers=False")
    try:
        layers = recognize(unwrap(model), dtype)
        heads, device = layers[0].heads, unwrap(model).get_input_embeddings().weight.device
        packed = plan.backend == "varlen" and supports(device, dtype, heads.queries, heads.keys, heads.size)
        fused_model = FusedModel(unwrap(model), layers, "packed" if packed else plan.backend)
        batch = pack(samples).to(device)
        plain_N = completion_logps(model, batch, plan.backend).token_logps_N
        difference = _difference(completion_logps(model, batch, fused_model).token_logps_N, plain_N, _SHARE[dtype])
        if not difference <= tolerance:
            raise NotRecognizedError(f"fused log-probs differ by {difference:.2g}, more than {tolerance:.1g}")
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a model may lack anything that recognised ones have; a kernel may refuse this GPU
        logger.debug("Layers are not fused.", exc_info=True)
        if fused:
            raise OptionError(f"fused_layers=True, but {_short(error)}: leave it out.") from error
        return replace(plan, unfused=_short(error))
    return replace(plan, fused=fused_model, max_difference=max(difference, plan.max_difference))


def recheck(plan: ForwardPlan, model: nn.Module, dtype: torch.dtype | None = None) -> ForwardPlan:
    """`plan`, without its fused layers if hooks, dropout or other modules came to the model since it was made.

    Args:
        model, dtype: as for `plan_forward`.
    """
    if plan.fused is None:
        return plan
    try:
        recognize(unwrap(model), dtype or unwrap(model).get_input_embeddings().weight.dtype)
    except NotRecognizedError as error:
        return replace(plan, fused=None, unfused=str(error))
    return plan


def _check_layer_types(config: Any) -> None:
    """Refuse layers whose difference to plain attention may show only on longer texts than the probe's."""
    for kind in getattr(config, "layer_types", None) or []:
        if kind not in ("full_attention", "sliding_attention"):
            raise CannotShareError(f"it has layers of the kind {kind}")


def _probe_shared(
    model: nn.Module, samples: list[Sample], own_N: Tensor, backend: str, tolerance: float, share: float
) -> tuple[float, int]:
    """The difference of the token log-probs, and the largest head size that the attention function saw."""
    causal_lm = unwrap(model)
    causal_lm.set_attn_implementation(IMPLEMENTATION)
    if causal_lm.config._attn_implementation != IMPLEMENTATION:
        raise CannotShareError("it does not use transformers' attention interface")
    batch = pack(samples).to(own_N.device)
    plan = AttentionPlan(batch, backend)
    trace: list[tuple[int | None, int]] = []
    plan.trace = trace
    token_logps_N = completion_logps(model, batch, plan).token_logps_N
    _check_trace(trace, causal_lm.config.get_text_config())
    difference = _difference(token_logps_N, own_N, share)
    if not difference <= tolerance:
        raise CannotShareError(f"shared log-probs differ by {difference:.2g}, more than {tolerance:.1g}")
    edited_N = completion_logps(model, _edit_second(samples).to(own_N.device), backend).token_logps_N
    mine, others = batch.completion_of == 1, batch.completion_of != 1
    # Same shapes, same kernels: what the others can't see may not move them, whatever the dtype.
    moved = _difference(edited_N[mine], token_logps_N[mine], share)
    if _difference(edited_N[others], token_logps_N[others], share) > 0.02 * moved:
        raise CannotShareError("a completion sees its neighbour")
    return difference, max(head_dim for _, head_dim in trace)


def _check_trace(trace: list[tuple[int | None, int]], config: Any) -> None:
    """One call per layer, each with the sliding window that the config declares (longer than the probe's samples)."""
    layers, window = config.num_hidden_layers, getattr(config, "sliding_window", None)
    if len(trace) != layers:
        raise CannotShareError(f"{len(trace)} of its {layers} layers are plain attention")
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * layers
    declared = [window if kind == "sliding_attention" else None for kind in kinds]
    if [seen for seen, _ in trace] != declared:
        raise CannotShareError("its attention is not told the sliding window that its config declares")


def _probe_samples(vocab_size: int) -> list[Sample]:
    generator = torch.Generator().manual_seed(0)
    low, high = vocab_size // 4, max(vocab_size // 2, vocab_size // 4 + 2)

    def ids(n: int) -> list[int]:
        return torch.randint(low, high, (n,), generator=generator).tolist()

    return [Sample(ids(9), [ids(4), ids(7)]), Sample(ids(5), [ids(6), ids(2)])]


def _edit_second(samples: list[Sample]) -> PackedBatch:
    """The same batch with other tokens in the first sample's second completion."""
    first, *rest = samples
    edited = [token + 1 for token in first.completions[1]]
    return pack([first._replace(completions=[first.completions[0], edited]), *rest])


def _own_logps(causal_lm: Any, batch: PackedBatch) -> Tensor:
    """(N,) log-probs of the completion tokens from the model's own logits."""
    logits = causal_lm(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    logps = logits.flatten(0, 1).index_select(0, batch.pred_pos).float().log_softmax(-1)
    return logps.gather(1, batch.target[:, None])[:, 0]


def _alone(causal_lm: Any, samples: list[Sample], device: torch.device) -> Tensor:
    """(N,) the same in other batch shapes, each completion alone: what rounding makes of it is the noise floor."""
    parts = [pad_rows([s._replace(completions=[c])]) for s in samples for c in s.completions]
    return torch.cat([_own_logps(causal_lm, part.to(device)) for part in parts])


def _difference(a_N: Tensor, b_N: Tensor, share: float) -> float:
    """The largest difference among that share of the tokens that differ least; NaN if any is."""
    return float((a_N - b_N).abs().quantile(share))


def _short(error: Exception) -> str:
    text = str(error).strip().splitlines()[0] if str(error).strip() else ""
    explained = isinstance(error, (CannotShareError, NotRecognizedError))
    return (text if explained else f"{type(error).__name__}: {text}")[:160]
