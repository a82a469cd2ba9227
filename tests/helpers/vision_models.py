"""Tiny random models that read images, prompts with images for them, and the oracle: the model's own rows.

`build(name)` gives a model, `samples_for(name)` prompts that hold two images of different sizes, none, and one, as the
processor of that family would lay them out. The oracle feeds every completion alone, with the images of its prompt, to
the model's own forward: it knows nothing of packing, of features made apart, nor of positions and blocks given from
outside.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import zoo
from forward_models import adapter_grads, grad_difference
from peft import LoraConfig
from torch import Tensor, nn
from transformers import LlavaOnevisionConfig

from dpo_peft.forward import Sample, completion_logps
from dpo_peft.forward.images import SampleImages
from dpo_peft.model.loading import attach_adapter, disable_dropout
from dpo_peft.reference.adapter_off import reference_logps

IMAGE, BEGIN, END = zoo.PICTURE, 302, 303
EXACT, EXACT_GRADIENT = 1e-5, 1e-4  # nats a token; of the largest element of a gradient
# Families that training must work for, and others whose inputs are as cheap to make.
REQUIRED = (
    "gemma3 qwen2_5_vl paligemma qwen3_vl qwen2_vl qwen3_vl_moe qwen3_5 gemma4 gemma4_moe llava internvl mistral3 "
    "idefics3 smolvlm"
).split()
MORE = (
    "gemma4_unified pixtral ministral3 llava_next llava_onevision cohere2_vision glm4v qwen3_5_moe lfm2_vl"
).split()
ALL = REQUIRED + MORE
BLOCKS = ["gemma3", "gemma4_moe", "gemma4_unified", "paligemma"]  # tokens that see each other both ways

Inputs = dict[str, Tensor]
Drawn = tuple[Inputs, list[int]]  # what a processor gives for some images, and how many tokens each one has


def _pixels(number: int, sizes: Sequence[int], g: torch.Generator) -> Tensor:
    return torch.randn(number, 3, *sizes, generator=g)


def _fixed(tokens: int) -> Callable[..., Drawn]:
    """Images that are all scaled to 16 x 16."""
    return lambda config, number, g: ({"pixel_values": _pixels(number, (16, 16), g)}, [tokens] * number)


def _patches_by_grid(config: Any, number: int, g: torch.Generator) -> Drawn:
    """Qwen's: patches of all images in one row, and each one's grid, whose neighbors are merged two by two."""
    vision = config.vision_config
    shapes = [(4, 8), (6, 4), (2, 2)][:number]
    grid = torch.tensor([[1, height, width] for height, width in shapes])
    size = 3 * 2 * vision.patch_size**2  # an image stands twice, as a film of two frames
    patches = torch.randn(int(grid.prod(1).sum()), size, generator=g)
    return {"pixel_values": patches, "image_grid_thw": grid}, [height * width // 4 for height, width in shapes]


def _padded_by_size(merged: int) -> Callable[..., Drawn]:
    """Pixtral's: images in the upper left corner of what holds the largest; `merged` patches a side are one token."""

    def draw(config: Any, number: int, g: torch.Generator) -> Drawn:
        sizes = [(16, 24), (8, 16), (8, 8)][:number]
        high, wide = (max(size[axis] for size in sizes) for axis in (0, 1))
        pixels = torch.zeros(number, 3, high, wide)
        for image, (height, width) in zip(pixels, sizes, strict=True):
            image[:, :height, :width] = torch.randn(3, height, width, generator=g)
        counts = [height * width // (4 * merged) ** 2 for height, width in sizes]
        return {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}, counts

    return draw


def _listed(config: Any, number: int, g: torch.Generator) -> Drawn:
    """Idefics 3's: a list of images for each row, and which of their pixels are none."""
    pixels, mask = _pixels(number, (16, 16), g), torch.ones(1, number, 16, 16, dtype=torch.int64)
    return {"pixel_values": pixels[None], "pixel_attention_mask": mask}, [4] * number


def _gemma4_patches(side: int, merged: int) -> Callable[..., Drawn]:
    """Gemma 4's: as many patches for each image, at places of any grid; -1 where there is none."""

    def draw(config: Any, number: int, g: torch.Generator) -> Drawn:
        shapes = [(4, 4), (2, 6), (4, 2)][:number]
        places = torch.full((number, 16, 2), -1)
        pixels = torch.zeros(number, 16, 3 * side**2)
        for i, (height, width) in enumerate(shapes):
            grid = torch.cartesian_prod(torch.arange(height), torch.arange(width)).flip(1)
            places[i, : len(grid)] = grid
            pixels[i, : len(grid)] = torch.rand(len(grid), 3 * side**2, generator=g)
        counts = [height * width // merged for height, width in shapes]
        return {"pixel_values": pixels, "image_position_ids": places}, counts

    return draw


def _tiled(tokens: int) -> Callable[..., Drawn]:
    """LLaVA-NeXT's: the whole image, and beside it the one tile that it has here."""

    def draw(config: Any, number: int, g: torch.Generator) -> Drawn:
        pixels = torch.stack([_pixels(2, (16, 16), g) for _ in range(number)])
        return {"pixel_values": pixels, "image_sizes": torch.tensor([[16, 16]] * number)}, [tokens] * number

    return draw


def _siglip2_patches(config: Any, number: int, g: torch.Generator) -> Drawn:
    shapes = [(4, 4), (2, 6), (4, 2)][:number]
    pixels, mask = torch.zeros(number, 16, 48), torch.zeros(number, 16, dtype=torch.int64)
    for i, (height, width) in enumerate(shapes):
        pixels[i, : height * width] = torch.randn(height * width, 48, generator=g)
        mask[i, : height * width] = 1
    inputs = {"pixel_values": pixels, "spatial_shapes": torch.tensor(shapes), "pixel_attention_mask": mask}
    return inputs, [height * width // 4 for height, width in shapes]


_DRAW: dict[str, Callable[..., Drawn]] = {
    **dict.fromkeys(("gemma3", "internvl", "cohere2_vision"), _fixed(4)),
    **dict.fromkeys(("llava", "paligemma"), _fixed(16)),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5"), _patches_by_grid),
    **dict.fromkeys(("qwen3_5_moe", "glm4v"), _patches_by_grid),
    **dict.fromkeys(("mistral3", "ministral3"), _padded_by_size(2)),
    "pixtral": _padded_by_size(1),
    **dict.fromkeys(("idefics3", "smolvlm"), _listed),
    **dict.fromkeys(("gemma4", "gemma4_moe"), _gemma4_patches(4, merged=4)),
    "gemma4_unified": _gemma4_patches(8, merged=1),
    "llava_next": _tiled(36),
    "llava_onevision": _tiled(36),
    "lfm2_vl": _siglip2_patches,
}
# Type ids that a family's processor gives for the tokens of a row: which are an image's.
_TYPES = {"gemma3": "token_type_ids"} | dict.fromkeys(("gemma4", "gemma4_moe", "gemma4_unified"), "mm_token_type_ids")
_TYPES |= {name: "mm_token_type_ids" for name in ALL if name.startswith(("qwen", "glm4v"))}


def build(name: str, noise: float = 0.1, window: int | None = None) -> Any:
    """Returns a family's model, float32, in eval mode.

    Where images see themselves both ways there are four layers: who saw whom in the last one does not show. Of the two
    models like Gemma 4, only the mixture is told to do so, as among those that were published.

    Args:
        window: of sliding attention, instead of the zoo's.
    """
    if name == "llava_onevision":
        text, vision = zoo.config_of("qwen2").to_dict(), zoo.config_of("gemma3-vl").vision_config.to_dict()
        options = dict(image_token_index=IMAGE, image_grid_pinpoints=[[16, 16]], vision_aspect_ratio="anyres_max_9")
        config = LlavaOnevisionConfig(text_config=text, vision_config=vision, **options)
    else:
        of_text: dict[str, Any] = {}
        if name in BLOCKS:
            of_text = dict(num_hidden_layers=4, layer_types=[zoo.SLIDING, zoo.FULL] * 2)
        if name == "gemma4_moe":
            of_text["use_bidirectional_attention"] = "vision"
        config = zoo.config_of(f"{name}-vl", **of_text, **({"sliding_window": window} if window else {}))
    model = zoo.build(f"{name}-vl", noise, config)
    disable_dropout(model)
    return model.eval()


def images_for(name: str, config: Any, number: int, g: torch.Generator, key: bytes = b"") -> tuple[SampleImages, list]:
    """Returns random images for one prompt, and the number of tokens of each."""
    inputs, counts = _DRAW[name](config, number, g)
    return SampleImages(inputs, IMAGE, key or bytes([number])), counts


def samples_for(
    name: str, config: Any, numbers: Sequence[int] = (2, 0, 1), lengths: Sequence[int] = (7, 11), seed: int = 0
) -> list[Sample]:
    """Returns one prompt for each number of images, with completions of these lengths; text stands before, between and
    after the images."""
    g = torch.Generator().manual_seed(seed)

    def ids(n: int) -> list[int]:
        return torch.randint(4, zoo.PICTURE, (n,), generator=g).tolist()

    samples = []
    for row, number in enumerate(numbers):
        prompt, images = ids(5), None
        if number:
            images, counts = images_for(name, config, number, g, bytes([seed, row]))
            for count in counts:
                prompt += [BEGIN, *[IMAGE] * count, END, *ids(3)]
        samples.append(Sample(prompt, [ids(n + row) for n in lengths], row, images=images))
    return samples


def own_logits(model: Any, name: str, sample: Sample, completion: Sequence[int]) -> Tensor:
    """Returns the model's own logits, (P + C, V), of a prompt with its images and one completion."""
    ids = torch.tensor([[*sample.prompt, *completion]])
    given: dict[str, Any] = dict(sample.images.inputs) if sample.images else {}
    if name in _TYPES:
        given[_TYPES[name]] = (ids == IMAGE).int()
    if name == "paligemma" and sample.images:
        given["token_type_ids"] = (torch.arange(ids.shape[1]) >= len(sample.prompt)).int()[None]
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **given).logits[0]


def own_rows(model: Any, name: str, samples: Sequence[Sample]) -> Tensor:
    """Returns (N,) log-probs of all completions' tokens, each completion computed in a row of its own."""
    found = []
    for sample in samples:
        for completion in sample.completions:
            logps = own_logits(model, name, sample, completion).float().log_softmax(-1)
            before = torch.arange(len(completion)) + len(sample.prompt) - 1
            found.append(logps[before, torch.as_tensor(completion)])
    return torch.cat(found)


# ---- Policy and reference, with gradients ---------------------------------------------------------------------------


def adapted(model: Any, vision: Sample | None = None, config: LoraConfig | None = None) -> Any:
    """The model with an adapter by the default rule, which is not at its start: every weight gets a gradient."""
    peft_model, _ = attach_adapter(model, config, needs_reference=False, vision=vision)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.05)
    return peft_model


def loss(logps_C: Tensor, reference_C: Tensor) -> Tensor:
    """DPO's over pairs of completions that follow each other."""
    chosen, rejected = (logps_C - reference_C).view(-1, 2).T
    return -torch.nn.functional.logsigmoid(0.5 * (chosen - rejected)).sum()


def sums(logps_N: Tensor, samples: Sequence[Sample]) -> Tensor:
    lengths = [len(completion) for sample in samples for completion in sample.completions]
    return torch.stack([part.sum() for part in logps_N.split(lengths)])


class OwnRows:
    """Log-probs of policy and reference from the model's own rows, and the gradients of a DPO loss."""

    def __init__(self, model: Any, name: str, samples: Sequence[Sample]):
        base = model.get_base_model()
        with model.disable_adapter(), torch.no_grad():
            self.reference_N = own_rows(base, name, samples)
        policy_N = own_rows(base, name, samples)
        self.grads = adapter_grads(model, loss(sums(policy_N, samples), sums(self.reference_N, samples))[None])
        self.policy_N = policy_N.detach()

    def assert_same(self, model: Any, batch: Any, backend: Any = "dense") -> None:
        reference = reference_logps(model, batch, backend)
        policy = completion_logps(model, batch, backend)
        assert self.policy_N.std() > 0.1 and (self.policy_N - self.reference_N).abs().max() > 0.01
        assert (reference.token_logps_N - self.reference_N).abs().max() < EXACT
        assert (policy.token_logps_N.detach() - self.policy_N).abs().max() < EXACT
        grads = adapter_grads(model, loss(policy.logps_C, reference.logps_C)[None])
        assert grad_difference(grads, self.grads) < EXACT_GRADIENT
