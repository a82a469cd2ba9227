"""A recognized model's decoder as passes over its fused layers (`decoder.py`).

`FusedModel` reads the loaded model's own weights and adapters at every call, in whatever state they are; it holds no
copy of them. `recognition.py` says which models it is right for.

What policy and reference have in common is the base's, and is computed once, without a gradient: the tokens that an
answer-only adapter doesn't act on, whose keys and values both read in every layer; and what comes before the first
layer with an adapter, where adapters are on the upper layers alone.

Shape suffixes: T tokens, H hidden size, N tokens that predict.
"""

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from transformers import PreTrainedModel

from ..errors import OptionError
from ..forward.attention import AttentionBackend, AttentionPlan
from ..forward.images import Blocks, Embedded, block_ids, embedded, encoder_parts
from ..forward.layout import PackedBatch
from ..forward.modules import bring_in, leaving, text_decoder
from ..forward.scope import split
from ..forward.score import Decoder
from ..reference.frozen_adapter import adapter_layers
from .attention import bind
from .decoder import Checkpointed, DecoderLayer, LayerPass, SelfAttention, without_keeping
from .elementwise import Norm, RMSNorm
from .fp8 import MULTIPLE, FP8Pass
from .heads import Angles
from .lora import kept_weights, prepare
from .own import Surroundings, exchanged


@dataclass
class Parts:
    """What a recognized model's decoder is made of."""

    layers: list[DecoderLayer]
    norm: Norm
    embedding: float  # factor of what is embedded
    # Of hidden states (1, T, H), positions (1, T) or (3, 1, T), and the name of a kind: the angles of its queries and
    # of its keys.
    angles: Callable[[Tensor, Tensor, str], tuple[Angles, Angles]]
    answer_only: bool = False  # its adapter acts on completions


class FusedModel(Decoder):
    """A recognized model's decoder, as a backend of `completion_logps`.

    Args:
        causal_lm: the transformers model inside the PEFT model.
        parts: from `recognize`.
        backend: of attention.
    """

    def __init__(self, causal_lm: PreTrainedModel, parts: Parts, backend: AttentionBackend):
        self.causal_lm = causal_lm
        self.parts = parts
        self.backend = backend
        self.attention = backend.name
        self.modules = list(text_decoder(causal_lm).layers)
        # The last layers' activations are freed first, so the first ones are checkpointed.
        self.checkpointed: Callable[[PackedBatch], tuple[int, int]] = lambda batch: (0, 0)
        self.offload = False
        self.products = ""
        self._only: tuple[str, ...] | None = None  # adapters in the place of the active one

    def __str__(self) -> str:
        return f"fused, {self.attention}{self.products}"

    def use_fp8(self) -> None:
        """See the base class."""
        self.products = ", products in FP8"
        for projection in (p for layer in self.parts.layers for p in layer.projections):
            shape = sum(projection.outputs), projection.inputs
            if any(n % MULTIPLE for n in shape):
                raise OptionError(
                    f"fp8_products=True: a weight of {shape} is no multiple of {MULTIPLE}; leave it out."
                )
            projection.kind = FP8Pass

    @property
    def shares_work(self) -> bool:
        """Whether `with_reference` computes less than two passes."""
        return self.parts.answer_only or not _adapted(self.parts.layers[0], None)

    def reference(self, adapter: str | None) -> "FusedModel":
        """Returns the same with the frozen `adapter` in the place of the active one, or with none."""
        other = copy.copy(self)
        other._only = () if adapter is None else (adapter,)
        return other

    def hidden_states(self, batch: PackedBatch, router_logits: list[Tensor] | None = None) -> Tensor:
        """See the base class."""
        return self._through([self], batch, router_logits)[0]

    def with_reference(
        self, batch: PackedBatch, adapter: str | None, router_logits: list[Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """See the base class."""
        own, other = self._through([self, self.reference(adapter)], batch, router_logits)
        return own, other

    def _through(
        self, decoders: Sequence["FusedModel"], batch: PackedBatch, router_logits: list[Tensor] | None
    ) -> list[Tensor]:
        """Returns the hidden states of the policy, and of the reference if there are two, from one walk over the
        layers. The policy's logits of routers are added."""
        prompts, passes = _passes(decoders, batch, router_logits is not None)
        walking = passes if prompts is None else [prompts, *passes]
        with torch.autocast(batch.input_ids.device.type, enabled=False):
            for i, module in enumerate(self.modules):
                bring_in(module)
                here = [one for one in walking if one.trunk is None or i >= one.first]
                with kept_weights(self.parts.layers[i].projections if len(here) > 1 else []):
                    for one in here:
                        with torch.set_grad_enabled(one.differentiable and i >= one.first):
                            one.run(i)
                            one.x_TH = leaving(module, one.x_TH)
            if router_logits is not None:
                router_logits += passes[0].logits()
            return [one.read_off() for one in passes]


def _passes(decoders: Sequence[FusedModel], batch: PackedBatch, routed: bool) -> tuple["_Pass | None", list["_Pass"]]:
    """Returns the pass over the prompts, where they are left to the base, and those of policy and reference."""
    policy, prompts, found = decoders[0], None, list[_Pass]()
    parts = nn.ModuleList([] if batch.images is None else encoder_parts(policy.causal_lm))
    rows, alone = None, None
    for one in decoders:
        if rows is None or parts:  # in which adapters differ
            with exchanged(parts, one._only) if parts else nullcontext():
                x = embedded(one.causal_lm, batch)
            rows = _Rows(x, batch, batch.pred_pos, block_ids(one.causal_lm.config, batch))
            if batch.alora_offsets is not None:
                alone, rows = rows.split()
        if one is policy and alone is not None:
            with torch.no_grad():
                prompts = _Pass(policy.reference(None), alone, routed)
                prompts.gives = True
        if batch.alora_offsets is None and policy.parts.answer_only:  # as PEFT leaves it off where none invokes it
            one = policy.reference(None)
        with torch.set_grad_enabled(torch.is_grad_enabled() and one is policy):
            found.append(_Pass(one, rows, routed, prompts))
    own, others = found[0], found[1:]
    if own.differentiable:
        own.checkpointed, own.attended = policy.checkpointed(batch)
    if others and 0 < own.first <= others[0].first:
        own.trunk = others[0]
    return prompts, found


def _adapted(layer: DecoderLayer, only: tuple[str, ...] | None) -> bool:
    """Returns whether adapters may be on in a layer; `only` as in `Projection.active`."""
    own = (half for half in layer.own if only != () and any(adapter_layers(half.modules)))
    return any(projection.active(only) for projection in layer.projections) or any(own)


class _Rows(NamedTuple):
    """Tokens that a pass computes: embedded, how they attend, and which of them predict."""

    embedded: Embedded
    batch: PackedBatch
    pred_pos: Tensor
    blocks: Blocks | None  # of tokens that see each other both ways
    given: int = 0  # tokens before them, whose keys and values are given

    def plan(self, backend: AttentionBackend) -> AttentionPlan:
        """Returns what attention reads in one pass."""
        plan = AttentionPlan(self.batch, backend, self.given)
        plan.blocks = self.blocks
        return plan

    def split(self) -> tuple["_Rows | None", "_Rows"]:
        """Returns the prompts, if there are any, and the completions."""
        given, alone, completions = split(self.batch)
        own = _Rows(self._embedded(slice(given, None)), completions, self.pred_pos - given, self.blocks, given)
        if alone is None:
            return None, own
        blocks = self.blocks and self.blocks._replace(ids_T=self.blocks.ids_T[:given])
        return _Rows(self._embedded(slice(given)), alone, self.pred_pos[:0], blocks), own

    def _embedded(self, rows: slice) -> Embedded:
        x_TH, positions, added = self.embedded
        return Embedded(x_TH[rows], positions[..., rows], [one[rows] for one in added])


class _Pass:
    """A pass over the model, layer by layer: the residual stream and what the layers find around them.

    Args:
        decoder: whose layers and adapters.
        rows: the tokens.
        routed: whether it keeps what routers give.
        prompts: the pass that gives it keys and values, which is a layer ahead.

    Attributes:
        first: the first layer that has adapters which are on.
        trunk: the pass that computes the layers below, where that is the same.
        checkpointed: how many of the first layers keep their input alone, of these
        attended: how many of the last keep what attention gave too.
        gives: whether other passes read its keys and values.
    """

    def __init__(self, decoder: FusedModel, rows: _Rows, routed: bool, prompts: "_Pass | None" = None):
        self.decoder, self.pred_pos, self.prompts = decoder, rows.pred_pos, prompts
        self.differentiable, self.gives = torch.is_grad_enabled(), False
        self.trunk: _Pass | None = None
        self.checkpointed = self.attended = 0
        self._routed = list[tuple[int, Tensor]]() if routed else None
        self.keys_values: tuple[Tensor, Tensor] | None = None  # of the layer that it went through last
        self.x_TH, self.added, only = rows.embedded.x_TH, rows.embedded.added, decoder._only
        parts, layers = decoder.parts, decoder.parts.layers
        acts_on = (len(self.x_TH),) if rows.batch.alora_offsets is not None else None
        plan = rows.plan(decoder.backend)
        self.around = Surroundings.now(self.x_TH.device.type, plan, only, acts_on)
        self.mixers = [layer.mixer if isinstance(layer.mixer, SelfAttention) else None for layer in layers]
        with torch.autocast(self.x_TH.device.type, enabled=False):
            if parts.embedding != 1:
                self.x_TH = self.x_TH * parts.embedding
            projections = [p for layer in layers for p in layer.projections]
            prepared = iter(prepare(projections, self.x_TH.dtype, self.x_TH.device, only))
            self.prepared = [[next(prepared) for _ in layer.projections] for layer in layers]
            self.attention = bind(plan, {mixer.kind for mixer in self.mixers if mixer})
            kinds = {mixer.rope for mixer in self.mixers if mixer and mixer.rope}
            at = rows.embedded.positions
            self.angles = {kind: parts.angles(self.x_TH[None], at, kind) for kind in sorted(kinds)}
        adapted = (i for i, layer in enumerate(layers) if _adapted(layer, only))
        # Adapters in a tower are before the first layer.
        self.first = 0 if self.x_TH.requires_grad else next(adapted, len(layers))

    def run(self, i: int) -> None:
        """Runs layer `i`, after the one before it."""
        layer, mixer = self.decoder.parts.layers[i], self.mixers[i]
        if self.trunk is not None and i == self.first:
            self.x_TH = self.trunk.x_TH
        x_TH, given = self.x_TH, None if self.prompts is None else self.prompts.keys_values
        turned = self.angles[mixer.rope] if mixer and mixer.rope else (None, None)
        attention = self.attention[mixer.kind] if mixer else None
        one = LayerPass(layer, self.prepared[i], attention, turned, self.around, given, self.gives)
        if not torch.is_grad_enabled():
            self.x_TH, *logits = without_keeping(one, x_TH)
        elif i < self.checkpointed:
            one.keeps = attention is not None and attention.resumes and i >= self.checkpointed - self.attended
            # Copied while the GPU waits: a hundredth of the time that a layer takes on many tokens.
            with save_on_cpu(pin_memory=x_TH.is_cuda) if self.decoder.offload else nullcontext():
                self.x_TH, *logits = Checkpointed.apply(x_TH, one, *one.parameters)
        else:
            self.x_TH, *logits = one(x_TH)
        self.keys_values = one.keys_values
        if self._routed is not None:
            self._routed += [(i, logits_TX) for logits_TX in logits]
        if i < len(self.added):
            self.x_TH = self.x_TH + self.added[i]

    def logits(self) -> list[Tensor]:
        """Returns the routers' logits (T, X) of each layer: of the prompts, and of its own tokens."""
        below = [] if self.trunk is None else [one for one in self.trunk._routed or () if one[0] < self.first]
        own = [logits_TX for _, logits_TX in [*below, *(self._routed or ())]]
        return own if self.prompts is None else list(map(torch.cat, zip(self.prompts.logits(), own, strict=True)))

    def read_off(self) -> Tensor:
        """Returns the normed hidden states that predict, (N, H)."""
        with torch.set_grad_enabled(self.differentiable):
            return RMSNorm.apply(self.x_TH.index_select(0, self.pred_pos), self.decoder.parts.norm)
