"""The images of a batch: encoded once for all passes, and placed where a prompt holds their tokens.

A prompt with images holds as many image tokens as its images have features. `features` gets these from the model's own
tower and projector by `get_image_features`, once for a batch: the reference and the policy read the same ones, unless
adapters inside the tower tell them apart. The model's forward takes them as `mm_encoder_outputs`.

What else images change is said here too: positions on three axes (M-RoPE), which completions continue from the
largest one of their prompt, and blocks of tokens that see each other both ways (Gemma's images, PaliGemma's prompts).

Shape suffixes: R rows, L row length, T packed tokens, P tokens of a prompt, F image tokens, H hidden size.
"""

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import OptionError
from .modules import eval_mode, text_decoder


@dataclass(frozen=True)
class SampleImages:
    """The images of one prompt, as the processor of their model makes them."""

    inputs: Mapping[str, Tensor]  # arguments of the model's `get_image_features` and forward, on the host
    token: int  # the id in whose places the features stand
    key: bytes  # digest of the images and of the processor's settings


def merge_inputs(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Returns the inputs of several samples as one, along the first dimension; where others differ, zeros are added at
    their ends, as processors do."""
    merged = {}
    for name in parts[0]:
        tensors = [part[name] for part in parts]
        most = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
        padded = []
        for tensor in tensors:
            missing = [most_ - size for most_, size in zip(most, tensor.shape[1:], strict=True)]
            padded.append(F.pad(tensor, [size for one in reversed(missing) for size in (0, one)]))
        merged[name] = torch.cat(padded)
    return merged


class BatchImages:
    """The images of a batch's samples, in their order; None for a sample without. Features are kept once they are
    made, on the model's device."""

    def __init__(self, samples: Sequence[SampleImages | None]):
        self.samples = samples
        self._made: dict[str, Any] = {}

    @property
    def token(self) -> int:
        """Returns the id in whose places the features stand."""
        return next(images.token for images in self.samples if images is not None)

    def release(self) -> None:
        """Frees what was made of the images; they are encoded again if they are needed again."""
        self._made.clear()

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """Returns what `make` gives; calls it once for all passes."""
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]


def encoder_parts(causal_lm: PreTrainedModel) -> list[nn.Module]:
    """Returns the parts of a model's body that are not its text decoder: tower and projector."""
    decoder = text_decoder(causal_lm)
    return [part for part in causal_lm.base_model.children() if part is not decoder]


def features(causal_lm: PreTrainedModel, images: BatchImages) -> Any:
    """Returns what the model's tower and projector make of a batch's images.

    They are made in eval mode without gradients, once for all passes; where adapters act in the tower, in each pass.
    """
    parts = encoder_parts(causal_lm)
    adapters = BaseTunerLayer, AuxiliaryTrainingWrapper
    if any(isinstance(module, adapters) for part in parts for module in part.modules()):
        return _encode(causal_lm, images)

    def encode() -> Any:
        with torch.no_grad(), eval_mode(nn.ModuleList(parts)):
            return _encode(causal_lm, images)

    return images.once("features", encode)


def _encode(causal_lm: PreTrainedModel, images: BatchImages) -> Any:
    body: Any = causal_lm.base_model
    inputs = merge_inputs([sample.inputs for sample in images.samples if sample is not None])
    taken = _arguments(type(body).get_image_features)
    device = causal_lm.get_input_embeddings().weight.device
    given = {name: value.to(device, non_blocking=True) for name, value in inputs.items() if name in taken}
    return body.get_image_features(**given, return_dict=True)


def check_takes_images(causal_lm: PreTrainedModel) -> None:
    """Raises `OptionError` for a model whose forward does not take encoded images."""
    body: Any = causal_lm.base_model
    if not hasattr(body, "get_image_features") or "mm_encoder_outputs" not in _arguments(type(body).forward):
        raise OptionError(
            f"{type(causal_lm).__name__} takes no images here (its forward has no mm_encoder_outputs), and the rows "
            "hold some. Take a model of text and images, or remove the column from the rows: "
            "dataset.remove_columns('images')."
        )


@cache
def _arguments(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


# ---- What the forward gets ------------------------------------------------------------------------------------------


def shared_inputs(causal_lm: PreTrainedModel, batch: Any) -> dict[str, Any]:
    """Returns the arguments of a model's forward for a packed batch (`layout.pack`) with images."""
    given = {"mm_encoder_outputs": {"image": features(causal_lm, batch.images)}}
    position_ids = rotary_positions(causal_lm, batch)
    return given if position_ids is None else {**given, "position_ids": position_ids}


class Embedded(NamedTuple):
    """The embedded tokens of a packed batch, for decoder layers other than the model's."""

    x_TH: Tensor
    positions: Tensor  # (1, T), or (3, 1, T) on the axes of `rotary_positions`
    added: Sequence[Tensor] = ()  # (T, H) what is added to the output of each of the first layers (deepstack)


def embedded(causal_lm: PreTrainedModel, batch: Any) -> Embedded:
    """Returns the tokens of a packed batch as the model's own forward hands them to its decoder, detached but for what
    adapters in the tower made."""
    embed_tokens, ids_T = causal_lm.get_input_embeddings(), batch.input_ids[0]
    if batch.images is None:
        return Embedded(embed_tokens(ids_T).detach(), batch.position_ids)
    of_image_T = ids_T == batch.images.token  # which the vocabulary may lack
    x_TH = embed_tokens(ids_T.masked_fill(of_image_T, 0)).detach()
    encoded = features(causal_lm, batch.images)
    if (found := len(_flat(encoded.pooler_output))) != (wanted := sum(_image_tokens(batch))):
        raise ValueError(f"{wanted} image tokens, and the model makes {found} features of the images.")

    def placed(onto_TH: Tensor, pooled: Any) -> Tensor:
        return onto_TH.masked_scatter(of_image_T[:, None], _flat(pooled).to(onto_TH.dtype))

    positions = rotary_positions(causal_lm, batch)
    deepstack = getattr(encoded, "deepstack_features", None) or ()
    added = [placed(torch.zeros_like(x_TH), layer) for layer in deepstack]
    x_TH = placed(x_TH, encoded.pooler_output)
    return Embedded(x_TH, batch.position_ids if positions is None else positions, added)


def _flat(pooled: Any) -> Tensor:
    """Returns features, which are a tensor or a list of some, one a row."""
    return pooled.flatten(0, -2) if isinstance(pooled, Tensor) else torch.cat(tuple(pooled)).flatten(0, -2)


def _image_tokens(batch: Any) -> list[int]:
    """Returns how many image tokens each prompt holds."""
    return [sum(id_ == batch.images.token for id_ in sample.prompt) for sample in batch.samples.kept]


def row_inputs(causal_lm: PreTrainedModel, batch: Any) -> dict[str, Any]:
    """Returns the arguments of a model's forward for padded rows (`layout.pad_rows`) with images."""
    encoded, counts = features(causal_lm, batch.images), _image_tokens(batch)
    starts = [sum(counts[:i]) for i in range(len(counts))]
    places = [range(starts[i], starts[i] + counts[i]) for i in batch.sample_of.tolist()]
    index_F = torch.tensor([place for row in places for place in row], device=batch.input_ids.device)
    repeated = copy.copy(encoded)
    repeated.pooler_output = _repeated(encoded.pooler_output, index_F)
    if getattr(encoded, "deepstack_features", None) is not None:
        repeated.deepstack_features = [_repeated(layer, index_F) for layer in encoded.deepstack_features]
    given = {"mm_encoder_outputs": {"image": repeated}, **_token_types(causal_lm, batch)}
    position_ids = rotary_positions(causal_lm, batch)
    return given if position_ids is None else {**given, "position_ids": position_ids}


def _repeated(pooled: Any, index_F: Tensor) -> Any:
    """Returns the features of these tokens, in the form that they came in: a tensor, or a list of some."""
    rows = _flat(pooled).index_select(0, index_F)
    return rows if isinstance(pooled, Tensor) else [rows]


def own_inputs(causal_lm: PreTrainedModel, batch: Any) -> dict[str, Any]:
    """Returns the arguments with which a model computes padded rows all by itself, each with images of its own."""
    samples = [batch.images.samples[i] for i in batch.sample_of.tolist()]
    device = batch.input_ids.device
    inputs = merge_inputs([sample.inputs for sample in samples if sample is not None])
    return {**{name: value.to(device) for name, value in inputs.items()}, **_token_types(causal_lm, batch)}


def _token_types(causal_lm: PreTrainedModel, batch: Any) -> dict[str, Tensor]:
    """Returns what a model wants to be told of the tokens of padded rows: which are an image's; for PaliGemma which
    are no prompt with images."""
    names = {"token_type_ids", "mm_token_type_ids"} & _arguments(type(causal_lm.base_model).forward)
    of_image_RL = batch.input_ids == batch.images.token
    rule = _block_rule(causal_lm.config)
    if rule is not None and rule.of == "prompt":
        prompts = [len(sample.prompt) if sample.images else 0 for sample in batch.samples.kept]
        prompt_R = torch.tensor(prompts, device=batch.input_ids.device)[batch.sample_of]
        of_image_RL = torch.arange(batch.input_ids.shape[1], device=prompt_R.device) >= prompt_R[:, None]
    return {name: of_image_RL.int() for name in names}


def rotary_positions(causal_lm: PreTrainedModel, batch: Any) -> Tensor | None:
    """Returns (3, R, L) positions on the axes of time, height and width; None for models that have one axis.

    An image's tokens stand on a grid, so a completion's positions are not their numbers in the sequence.
    """
    body: Any = causal_lm.base_model
    if not hasattr(body, "get_rope_index"):
        return None

    def make() -> Tensor:
        first, found = list[Tensor](), list[Tensor]()
        for sample in batch.samples.kept:
            prompt_3P, end = _prompt_positions(body, sample)
            alone = sample.alone if batch.shared else 0
            if alone:  # before all completions, for an answer-only adapter
                (found if sample.adapter_start is None else first).append(prompt_3P[:, :alone])
            again_3P = prompt_3P[:, alone:]
            lengths = [len(ids) for ids in (*sample.completions, *sample.mismatched)]
            found += [torch.cat([again_3P, end + torch.arange(length).expand(3, -1)], 1) for length in lengths]
        if batch.shared:
            return torch.cat([*first, *found], 1)[:, None]
        length = batch.input_ids.shape[1]
        return torch.stack([F.pad(row, (0, length - row.shape[1])) for row in found], 1)

    positions: Tensor = batch.images.once(f"positions, {batch.shared}", make)
    return positions.to(batch.input_ids.device, non_blocking=True)


def _prompt_positions(body: Any, sample: Any) -> tuple[Tensor, int]:
    if sample.images is None:
        return torch.arange(len(sample.prompt)).expand(3, -1), len(sample.prompt)
    ids_1P = torch.as_tensor(sample.prompt, dtype=torch.int64)[None]
    inputs = {name: value for name, value in sample.images.inputs.items() if name.endswith("_grid_thw")}
    types_1P = (ids_1P == sample.images.token).int()
    positions, _ = body.get_rope_index(ids_1P, mm_token_type_ids=types_1P, **inputs)
    return positions[:, 0], int(positions.max()) + 1


# ---- Blocks that see each other both ways ---------------------------------------------------------------------------


class Blocks(NamedTuple):
    """Tokens of a packed batch that see each other both ways."""

    ids_T: Tensor  # (T,) the block of each token, 0 for none
    everywhere: bool  # in all layers; or in those with a window alone
    cut: bool  # a window hides tokens of the block too


class _BlockRule(NamedTuple):
    of: str  # the tokens of an "image", or of a "prompt" that holds some
    everywhere: bool = True
    cut: bool = False


# By model type, as transformers' masks are.
_BLOCK_RULES = {
    "gemma3": _BlockRule("image", cut=True),
    "gemma4": _BlockRule("image", everywhere=False, cut=True),
    "gemma4_unified": _BlockRule("image"),
    "paligemma": _BlockRule("prompt"),
}


def _block_rule(config: PreTrainedConfig) -> _BlockRule | None:
    """Returns which tokens a model lets see each other both ways; None: none."""
    told = getattr(config.get_text_config(), "use_bidirectional_attention", None)
    chosen = not config.model_type.startswith("gemma4") or told == "vision"
    return _BLOCK_RULES.get(config.model_type) if chosen else None


def block_ids(config: PreTrainedConfig, batch: Any) -> Blocks | None:
    """Returns the blocks of a packed batch; None if there are none."""
    rule = _block_rule(config)
    if rule is None or batch.images is None:
        return None
    segment_T, of_prompt_T = batch.segment, batch.segment == batch.context
    of_image_T = (batch.input_ids[0] == batch.images.token) & of_prompt_T
    if rule.of == "prompt":
        holds_S = torch.zeros_like(batch.cu_seq_q, dtype=torch.bool).index_fill(0, segment_T[of_image_T], True)
        ids_T = torch.where(holds_S[segment_T] & of_prompt_T, segment_T + 1, 0)
    else:
        goes_on_T = F.pad(of_image_T[:-1] & (segment_T[1:] == segment_T[:-1]), (1, 0))
        ids_T = torch.where(of_image_T, (of_image_T & ~goes_on_T).cumsum(0), 0)
    return Blocks(ids_T, rule.everywhere, rule.cut)


def kept_images(samples: Iterable[Any]) -> BatchImages | None:
    """Returns the images of samples; None if none of them has any."""
    found = [sample.images for sample in samples]
    return BatchImages(found) if any(images is not None for images in found) else None
