"""Probe, don't list: at start-up the loaded model itself shows whether it can share prompts.

Two tiny samples are scored three ways: by the model's own logits, by our head on padded rows, and packed with shared
prompts. The last must agree with the first, must pass through our attention once per layer, and must not move when
another completion's tokens are edited. A model that fails falls back to one row per completion, with the reason.

Shape suffixes: N predicted tokens.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from ..errors import NonFiniteError, OptionError
from ..wings import wing
from .attention import IMPLEMENTATION, AttentionPlan, CannotShareError, HeadShape, choose_backend
from .images import check_takes_images, own_inputs
from .layout import PackedBatch, Sample, pack, pad_rows
from .lengths import ATTENDING, CARRYING, FarText, kinds_of, random_ids, short_chunks
from .modules import eval_mode, unwrap
from .rotary import beyond_reach, refuse_crossing
from .scope import acting, is_answer_only
from .score import Backend, Decoder, NotRecognizedError, completion_logps
from .states import mixer_difference, read_layouts, read_rows

logger = logging.getLogger(__name__)

# Largest difference of one token's log-prob that rounding explains, by the dtype of the computation.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# In half precision a few tokens of a mixture of experts may go to another expert, so that share of them must agree.
_SHARE = {torch.float64: 1.0, torch.float32: 1.0, torch.float16: 0.8, torch.bfloat16: 0.8}


def token_rounding(model: nn.Module) -> float:
    """Returns the largest difference of one token's log-prob (nats) that rounding explains, by the coarsest of the
    dtypes that a model is computed in: of its weights, of 4-bit products, and of autocast where it is on. 8-bit
    products round like bfloat16, and so do float32 ones where torch may shorten them (TF32)."""
    device = unwrap(model).get_input_embeddings().weight.device.type
    found: set[object] = {parameter.dtype for parameter in model.parameters()}
    found |= {vars(module).get("compute_dtype") for module in model.modules()}
    if torch.is_autocast_enabled(device):
        found.add(torch.get_autocast_dtype(device))
    products = (torch.backends.cuda if device == "cuda" else torch.backends.mkldnn).matmul
    if torch.int8 in found or products.fp32_precision not in ("none", "ieee"):
        found.add(torch.bfloat16)
    return max(tolerance for dtype, tolerance in _TOLERANCE.items() if dtype in found)


@dataclass(frozen=True)
class ForwardPlan:
    """How a model's batches are laid out and its layers computed, as the probe found it.

    `max_difference` is the largest difference of a token's log-prob (nats) between the chosen layout and the model's
    own logits on the probe's samples; in half precision the largest but for a fifth of the tokens.
    """

    shared: bool
    backend: str  # of attention
    max_difference: float
    reason: str = ""  # why prompts aren't shared
    fused: Decoder | None = None  # None: the model's own layers are run
    unfused: str = ""  # why
    tolerance: float = 0.0  # nats: differences that rounding explains

    @cached_property
    def scorer(self) -> str | Decoder:
        """Returns the backend for `completion_logps`."""
        return self.fused or self.backend

    @property
    def shares_work(self) -> bool:
        """Returns whether a policy and its reference have parts of their passes in common."""
        return self.fused is not None and self.fused.shares_work

    def fp8(self, wanted: bool) -> "ForwardPlan":
        """Returns itself, with frozen weights multiplied in FP8 if wanted: the probe would take that for an error."""
        if wanted and self.fused is None:
            raise OptionError(f"fp8_products=True, but {self.unfused or self.reason}: leave it out.")
        if wanted and self.fused is not None:
            self.fused.use_fp8()
        return self

    def __str__(self) -> str:
        if not self.shared:
            return f"One padded row per completion: {self.reason}."
        layers = "fused layers" if self.fused else f"the model's own layers: {self.unfused}"
        attention = self.fused.attention if self.fused else self.backend
        return (
            f"Prompts are computed once per sample (attention backend {attention!r}; {layers}). Log-probs are the "
            f"model's own within rounding: {self.max_difference:.1g} nats a token apart at most, where up to "
            f"{self.tolerance:.1g} is normal in this dtype."
        )


def plan_forward(
    model: nn.Module,
    share_prompts: bool = True,
    dtype: torch.dtype | None = None,
    fused: bool | None = None,
    images: Sequence[Sample] = (),
) -> ForwardPlan:
    """Decides the layout on the loaded model, and sets its attention implementation accordingly.

    Args:
        model: a causal LM or a PEFT model around one, on its device.
        share_prompts: False skips the probe of the packed layout and takes one row per completion.
        dtype: the dtype under autocast, if training uses it.
        fused: whether its layers are computed by the package `fused`; None: if they are recognized.
        images: tiny samples with images, if training rows have some.

    Raises:
        NonFiniteError: the model's log-probs are NaN or infinite.
        OptionError: the model transforms its logits in a way that we don't know, so its log-probs would be wrong; or
            fused layers are asked for and are not right for it.
    """
    causal_lm = unwrap(model)
    weight = causal_lm.get_input_embeddings().weight
    autocast = torch.autocast(weight.device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)
    with torch.no_grad(), eval_mode(model), autocast:
        if images:
            check_takes_images(causal_lm)
        probe = _Probe(model, weight.device, dtype or weight.dtype, images)
        rows_difference = probe.difference(probe.logps(pad_rows(probe.samples)), probe.own_N)
        if not rows_difference <= probe.tolerance:
            raise OptionError(
                f"{type(causal_lm).__name__} changes its logits after the output layer in a way that is not known "
                f"here: log-probs differ by {rows_difference:.3g} from the model's own. It can't be trained with this "
                "version; please report the model's name."
            )
        _check_neighbors(probe)
        if not share_prompts:
            return _unshared(rows_difference, "sharing is turned off (share_prompts=False)", bool(fused))
        original = _implementations(causal_lm.config)
        try:
            _check_layer_types(probe.config)
            difference, heads = probe.shared("dense")
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a model's forward may fail in any way; each means that it can't share
            read_rows(causal_lm, original)
            logger.debug("The packed probe failed.", exc_info=True)
            return _unshared(rows_difference, f"this model can't share prompts ({_short(error)})", bool(fused))
        backend = choose_backend(probe.device, probe.dtype, heads) if heads else "dense"
        if backend != "dense":
            try:
                difference, _ = probe.shared(backend)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # a kernel may refuse this GPU or this shape
                logger.warning("The %s attention backend does not work here (%s).", backend, _short(error))
                backend = "dense"
        plan = ForwardPlan(True, backend, difference, tolerance=probe.tolerance)
        return replace(plan, unfused="fused_layers=False") if fused is False else _with_fused(plan, probe, bool(fused))


def _unshared(difference: float, reason: str, fused: bool) -> ForwardPlan:
    if fused:
        raise OptionError(f"fused_layers=True, but {reason}: leave it out.")
    return ForwardPlan(False, "own", difference, reason)


def _with_fused(plan: ForwardPlan, probe: "_Probe", required: bool) -> ForwardPlan:
    """Returns `plan` with fused layers, if they are there and give what the model's own give."""
    try:
        package = wing("fused")
        if package is None:
            raise NotRecognizedError("this installation has no fused layers")
        decoder: Decoder = package.fused_decoder(probe.causal_lm, probe.dtype, plan.backend)
        batch = pack(probe.samples)
        difference = probe.difference(probe.logps(batch, decoder), probe.logps(batch, plan.backend))
        if not difference <= probe.tolerance:
            raise NotRecognizedError(f"fused log-probs differ by {difference:.2g}, more than {probe.tolerance:.1g}")
        if problem := probe.far_problem(decoder):
            raise NotRecognizedError(f"fused {problem}")
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a model may lack anything that recognized ones have; a kernel may refuse this GPU
        logger.debug("Layers are not fused.", exc_info=True)
        if required:
            raise OptionError(f"fused_layers=True, but {_short(error)}: leave it out.") from error
        return replace(plan, unfused=_short(error))
    return replace(plan, fused=decoder, max_difference=max(difference, plan.max_difference))


def recheck(plan: ForwardPlan, model: nn.Module, dtype: torch.dtype | None = None) -> ForwardPlan:
    """Returns `plan`, without its fused layers if hooks, dropout or other modules came to the model since it was made.

    Args:
        model, dtype: as for `plan_forward`.
    """
    package = wing("fused")
    if plan.fused is None or package is None:
        return plan
    try:
        package.recognize(unwrap(model), dtype or unwrap(model).get_input_embeddings().weight.dtype)
    except NotRecognizedError as error:
        return replace(plan, fused=None, unfused=str(error))
    return plan


class _Probe:
    """Tiny samples with the model's own log-probs of them, and how far others may be from these.

    Raises:
        NonFiniteError: they are NaN or infinite.
    """

    def __init__(self, model: nn.Module, device: torch.device, dtype: torch.dtype, images: Sequence[Sample] = ()):
        self.model, self.device, self.dtype = model, device, dtype
        self.causal_lm = unwrap(model)
        self.config = self.causal_lm.config.get_text_config()
        self.samples = [*_probe_samples(self.config.vocab_size), *images]
        if any(map(is_answer_only, model.modules())):
            self.samples = [sample._replace(adapter_start=len(sample.prompt) - 2) for sample in self.samples]
        self.own_N = self.own_logps(pad_rows(self.samples))
        if not torch.isfinite(self.own_N).all():
            raise NonFiniteError(
                f"The log-probs of {type(self.causal_lm).__name__} are not finite: a weight is NaN or infinite, or "
                "the model overflows in this dtype. Check the checkpoint, or compute in bfloat16 or float32."
            )
        # In batches of other shapes, each completion alone: what moves, as far as rounding explains it, is the noise.
        alone = [sample._replace(completions=[ids]) for sample in self.samples for ids in sample.completions]
        self.tolerance = self.allowed([pad_rows([sample]) for sample in alone], self.own_N)
        self.windows: set[int] = set()  # of attention, as it was told

    def allowed(self, others: Sequence[PackedBatch], own_N: Tensor) -> float:
        """Returns by how much a token's log-prob may be off, from the same completions in batches of other shapes."""
        alone_N = torch.cat([self.own_logps(batch) for batch in others])
        return _TOLERANCE[self.dtype] + 4 * min(self.difference(alone_N, own_N), token_rounding(self.model))

    def own_logps(self, batch: PackedBatch) -> Tensor:
        """Returns (N,) log-probs of the completion tokens from the model's own logits on padded rows."""
        batch = batch.to(self.device)
        given = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
        if batch.position_ids[:, 0].any():
            given["position_ids"] = batch.position_ids
        if batch.images is not None:
            given |= own_inputs(self.causal_lm, batch)
        with acting(self.causal_lm, batch.alora_offsets):
            logits = self.causal_lm(**given).logits
        logps = logits.flatten(0, 1).index_select(0, batch.pred_pos).float().log_softmax(-1)
        return logps.gather(1, batch.target[:, None])[:, 0]

    def logps(self, batch: PackedBatch, backend: Backend = "dense") -> Tensor:
        """Returns (N,) log-probs of the completion tokens as training computes them."""
        return completion_logps(self.model, batch.to(self.device), backend).token_logps_N

    def difference(self, a_N: Tensor, b_N: Tensor) -> float:
        """Returns the largest difference among the share of the tokens that must agree; NaN if any is."""
        return float((a_N - b_N).abs().quantile(_SHARE[self.dtype]))

    @cached_property
    def _far(self) -> tuple[FarText | None, Tensor, float]:
        """Returns a text beyond which nothing changes, its own log-probs, and how far others may be from these."""
        if (text := FarText.of(self.config, self.windows)) is None:
            return None, self.own_N, 0.0
        own_N = self.own_logps(text.rows())
        return text, own_N, self.allowed(text.alone(), own_N)

    def far_problem(self, backend: Backend) -> str | None:
        """Says what is wrong with a backend's log-probs where a config says that a model changes its behavior."""
        with short_chunks(self.config):
            text, own_N, allowed = self._far
            if text is None:
                return None
            difference = self.difference(self.logps(text.packed(), backend), own_N)
        if difference <= allowed:
            return None
        return f"log-probs differ by {difference:.2g}, more than {allowed:.1g}, up to position {text.farthest}"

    def shared(self, backend: str) -> tuple[float, HeadShape | None]:
        """Returns the difference that sharing prompts makes, and the largest heads that the attention function saw.

        Raises:
            CannotShareError: the model can't, or not with this backend.
        """
        mixers, carrying = read_layouts(self.causal_lm), sum(kind in CARRYING for kind in kinds_of(self.config))
        if mixers < carrying:
            raise CannotShareError(f"{carrying - mixers} of its layers carry a state that can't be handed on")
        if self.causal_lm.config._attn_implementation != IMPLEMENTATION:
            raise CannotShareError("it does not use transformers' attention interface")
        batch = pack(self.samples).to(self.device)
        plan = AttentionPlan(batch, backend)
        plan.trace, plan.mixed = [], []
        logps_N = self.logps(batch, plan)
        _check_trace(plan.trace, self.config)
        if len(plan.mixed) != carrying:
            raise CannotShareError(f"{len(plan.mixed)} of its {carrying} layers with a state were told the layout")
        if not (moved := mixer_difference(self.causal_lm, batch)) <= 0.2 * token_rounding(self.model):
            raise CannotShareError(f"its mixers' outputs or gradients differ by {moved:.2g} from those on rows")
        self.windows = {window for window, _ in plan.trace if window is not None}
        difference = self.difference(logps_N, self.own_N)
        if not difference <= self.tolerance:
            raise CannotShareError(f"shared log-probs differ by {difference:.2g}, more than {self.tolerance:.1g}")
        edited_N = self.logps(pack(_edit_second(self.samples)), backend)
        mine = batch.completion_of == 1
        # Same shapes, same kernels: what the others can't see may not move them, whatever the dtype.
        moved = self.difference(edited_N[mine], logps_N[mine])
        if self.difference(edited_N[~mine], logps_N[~mine]) > 0.02 * moved:
            raise CannotShareError("a completion sees its neighbor")
        if problem := self.far_problem(backend):
            raise CannotShareError(f"shared {problem}")
        return difference, max((heads for _, heads in plan.trace), key=lambda heads: heads.size, default=None)


def _check_neighbors(probe: _Probe) -> None:
    """Refuses a model whose log-probs of a row change beside one that is long enough for other rotary frequencies,
    where none were found to fix."""
    if (length := beyond_reach(probe.model)) is None:
        return
    row = probe.samples[0]._replace(completions=probe.samples[0].completions[:1])
    ids = [*row.prompt] * (length // len(row.prompt) + 1)
    alone_N = probe.logps(pad_rows([row]))
    beside_N = probe.logps(pad_rows([row, Sample(ids[: length - 1], [ids[:1]])]))[: len(alone_N)]
    if not (moved := probe.difference(alone_N, beside_N)) <= probe.tolerance:
        refuse_crossing(probe.causal_lm, length - 1, f" (by {moved:.2g} nats per token)")


def _implementations(config: PreTrainedConfig) -> dict[str, Any]:
    """Returns the attention implementations of a config and of those inside it, as `set_attn_implementation` reads
    them: of a model of text and images each part may have its own."""
    parts = {key: getattr(config, key, None) for key in config.sub_configs}
    # A part without attention of its own has none.
    inner = {key: _implementations(part) for key, part in parts.items() if part and part._attn_implementation}
    return {"": config._attn_implementation, **inner}


def _check_layer_types(config: PreTrainedConfig) -> None:
    """Refuses layers whose difference to known ones may show only on longer texts than the probe's."""
    for kind in kinds_of(config):
        if kind not in ATTENDING | CARRYING | {"moe", "mlp"}:
            raise CannotShareError(f"it has layers of the kind {kind}")


def _check_trace(trace: list[tuple[int | None, HeadShape]], config: PreTrainedConfig) -> None:
    """Wants one call per layer that attends, with the sliding window that the config declares (it may be longer than
    the probe's samples)."""
    kinds, window = kinds_of(config), getattr(config, "sliding_window", None)
    declared = [window if "sliding" in kind else None for kind in kinds if kind in ATTENDING]
    if len(trace) != len(declared):
        raise CannotShareError(f"{len(trace)} of its {len(declared)} layers are plain attention")
    if [seen for seen, _ in trace] != declared:
        raise CannotShareError("its attention is not told the sliding window that its config declares")


def _probe_samples(vocab_size: int) -> list[Sample]:
    ids = random_ids(vocab_size)
    return [Sample(ids(9), [ids(4), ids(7)]), Sample(ids(5), [ids(6), ids(2)])]


def _edit_second(samples: list[Sample]) -> list[Sample]:
    """Returns the same samples with other tokens in the first one's second completion."""
    first, *rest = samples
    edited = [token + 1 for token in first.completions[1]]
    return [first._replace(completions=[first.completions[0], edited]), *rest]


def _short(error: Exception) -> str:
    """Returns what an error says in at most 160 characters, after its type unless it is one of ours."""
    first_line = next(iter(str(error).strip().splitlines()), "")
    explained = isinstance(error, (CannotShareError, NotRecognizedError))
    return (first_line if explained else f"{type(error).__name__}: {first_line}")[:160]
