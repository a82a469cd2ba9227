"""Small processors of vision-language families: their real classes, with tiny pictures and a byte-level tokenizer.

Each fits the tiny model of its family: id 300 is the image token, and a picture has as many of them as the model makes
features. There is no torchvision: pictures are processed by PIL. Where a class wants a video processor as well, it
gets one that does nothing, since the real ones need torchvision.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import transformers
from datasets import Dataset
from PIL import Image, ImageDraw
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, ProcessorMixin, processing_utils
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.gemma3.processing_gemma3 import Gemma3Processor
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil
from transformers.models.gemma4.processing_gemma4 import Gemma4Processor
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor
from transformers.models.internvl.processing_internvl import InternVLProcessor
from transformers.models.llava.processing_llava import LlavaProcessor
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor
from transformers.models.paligemma.processing_paligemma import PaliGemmaProcessor
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm import processing_smolvlm
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.video_processing_utils import BaseVideoProcessor, VideoProcessorMixin

IMAGE_TOKEN_ID = 300
SQUARE = {"height": 16, "width": 16}
TEMPLATE = (
    "{%% for message in messages %%}<|im_start|>{{ message['role'] }}\n"
    "{%% if message['content'] is string %%}{{ message['content'] }}{%% else %%}{%% for part in message['content'] %%}"
    "{%% if part['type'] == 'image' %%}%s{%% else %%}{{ part['text'] }}{%% endif %%}"
    "{%% endfor %%}{%% endif %%}<|im_end|>\n{%% endfor %%}"
    "{%% if add_generation_prompt %%}<|im_start|>assistant\n{%% endif %%}"
)

SmolVLMProcessor = processing_smolvlm.SmolVLMProcessor
# The class asks for a package that it needs only to say in words how many frames a video has.
processing_smolvlm.num2words = processing_smolvlm.num2words or str
# Without torchvision, transformers does not find by its name the class that it checks video processors for.
processing_utils.transformers_module.VideoProcessorMixin = VideoProcessorMixin


def _pixtral_processor() -> Any:
    """Returns the class of Pixtral and Mistral 3. Its module imports torchvision, and uses nothing of it."""
    absent = [] if find_spec("torchvision") else ["torchvision", "torchvision.transforms", "torchvision.transforms.v2"]
    sys.modules.update({name: MagicMock() for name in absent})
    try:
        return import_module("transformers.models.pixtral.processing_pixtral").PixtralProcessor
    finally:
        for name in absent:
            del sys.modules[name]


class NoVideos(BaseVideoProcessor):
    """Stands where a processor must have a video processor."""

    merge_size, num_frames, fps = 2, 1, 1

    def __init__(self) -> None:
        pass


@dataclass(frozen=True)
class Family:
    """How the processor of a family is made."""

    processor: type[ProcessorMixin]
    pictures: Callable[[], Any]  # its image processor
    tokens: tuple[str, ...]  # from id 300 on; the first one is the image's
    placeholder: str  # what the chat template writes for an image
    named: dict[str, str] = field(default_factory=dict)  # tokens that the tokenizer gives as attributes
    options: dict[str, Any] = field(default_factory=dict)  # of the processor


def _qwen(processor: type[ProcessorMixin]) -> Family:
    return Family(
        processor,
        lambda: Qwen2VLImageProcessorPil(
            patch_size=4, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 64, "longest_edge": 1024}
        ),
        ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"),
        "<|vision_start|><|image_pad|><|vision_end|>",
        options={"video_processor": NoVideos},
    )


def _pixtral(merge: int) -> Family:
    return Family(
        _pixtral_processor(),
        lambda: PixtralImageProcessorPil(size={"longest_edge": 32}, patch_size={"height": 4, "width": 4}),
        ("[IMG]", "[IMG_BREAK]", "[IMG_END]"),
        "[IMG]",
        options={"patch_size": 4, "spatial_merge_size": merge},
    )


def _idefics(processor: type[ProcessorMixin], pictures: Callable[..., Any], splits: bool, **options: Any) -> Family:
    parts = [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
    return Family(
        processor,
        lambda: pictures(size={"longest_edge": 32}, max_image_size={"longest_edge": 16}, do_image_splitting=splits),
        ("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *parts),
        "<image>",
        options={"image_seq_len": 4, **options},
    )


def _paligemma_pictures() -> SiglipImageProcessorPil:
    pictures = SiglipImageProcessorPil(size=SQUARE)
    pictures.image_seq_length = 16
    return pictures


_GEMMA = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
_GEMMA4 = {"image_token": "<|image|>", "boi_token": "<|image>", "eoi_token": "<image|>"}
_AUDIO = {"boa_token": "<|audio>", "eoa_token": "<audio|>", "audio_token": "<|audio|>"}
_INTERN = {
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
    "start_image_token": "<img>",
    "end_image_token": "</img>",
}
_CLIP = {"size": {"shortest_edge": 16}, "crop_size": SQUARE}
_LLAVA = {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
FAMILIES = {
    "llava": Family(LlavaProcessor, lambda: CLIPImageProcessorPil(**_CLIP), ("<image>",), "<image>", options=_LLAVA),
    "llava_next": Family(
        LlavaNextProcessor,
        lambda: LlavaNextImageProcessorPil(**_CLIP, image_grid_pinpoints=[[16, 16]]),
        ("<image>",),
        "<image>",
        options=_LLAVA,
    ),
    "gemma3": Family(
        Gemma3Processor,
        lambda: Gemma3ImageProcessorPil(size=SQUARE, do_pan_and_scan=False),
        ("<image_soft_token>", "<unused>", "<start_of_image>", "<end_of_image>"),
        "<start_of_image>",
        named=_GEMMA,
        options={"image_seq_length": 4},
    ),
    "gemma4": Family(
        Gemma4Processor,
        lambda: Gemma4ImageProcessorPil(patch_size=4, pooling_kernel_size=2, max_soft_tokens=70),
        ("<|image|>", "<|video|>", "<|image>", "<image|>", "<|audio>", "<audio|>", "<|audio|>"),
        "<|image|>",
        named={**_GEMMA4, **_AUDIO},
        options={
            "video_processor": NoVideos,
            "feature_extractor": transformers.Gemma4AudioFeatureExtractor,
            "image_seq_length": 70,
        },
    ),
    "qwen2_vl": _qwen(Qwen2VLProcessor),
    "qwen2_5_vl": _qwen(Qwen2_5_VLProcessor),
    "qwen3_vl": _qwen(Qwen3VLProcessor),
    "internvl": Family(
        InternVLProcessor,
        lambda: GotOcr2ImageProcessorPil(size=SQUARE, crop_to_patches=False),
        ("<IMG_CONTEXT>", "<video>", "<img>", "</img>"),
        "<IMG_CONTEXT>",
        named=_INTERN,
        options={"video_processor": NoVideos, "image_seq_length": 4},
    ),
    "mistral3": _pixtral(merge=2),
    "pixtral": _pixtral(merge=1),
    "idefics3": _idefics(Idefics3Processor, Idefics3ImageProcessorPil, splits=True),
    "smolvlm": _idefics(
        processing_smolvlm.SmolVLMProcessor, SmolVLMImageProcessorPil, splits=False, video_processor=NoVideos
    ),
    "paligemma": Family(PaliGemmaProcessor, _paligemma_pictures, ("<image>",), "<image>", {"image_token": "<image>"}),
}


def build_tokenizer(family: Family) -> PreTrainedTokenizerFast:
    """Returns a byte-level tokenizer: pad, bos, eos and chat tokens from id 0, bytes from 5, the family's from 300."""
    special = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    known = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    known += [f"<unused{i}>" for i in range(len(known), IMAGE_TOKEN_ID)] + list(family.tokens)
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(known)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    added = [AddedToken(token, special=True, normalized=False) for token in (*special, *family.tokens)]
    tokenizer.add_special_tokens(added)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=[token for token in family.tokens if token not in family.named.values()],
        **family.named,
    )


def build_processor(name: str) -> ProcessorMixin:
    """Returns the processor of a family of `FAMILIES`, with a chat template that takes text and image parts."""
    family = FAMILIES[name]
    parts = {key: make() if isinstance(make, type) else make for key, make in family.options.items()}
    processor: ProcessorMixin = family.processor(
        image_processor=family.pictures(),
        tokenizer=build_tokenizer(family),
        chat_template=TEMPLATE % family.placeholder,
        **parts,
    )
    return processor


# ---- Rows -----------------------------------------------------------------------------------------------------------

COLORS = {"red": (230, 20, 20), "green": (20, 200, 20), "blue": (30, 30, 230), "yellow": (240, 220, 20)}
SHAPES = ("disk", "cross")


def noise(seed: int) -> Image.Image:
    """Returns a picture of random pixels; every other one is twice as wide."""
    size = (16, 32 if seed % 2 else 16, 3)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8))


def colored_shape(color: str, shape: str, draw: np.random.Generator, side: int = 16) -> Image.Image:
    """Returns a square picture of one shape on gray, somewhat small and off its middle."""
    picture = Image.new("RGB", (side, side), tuple(int(level) for level in draw.integers(90, 140, 3)))
    size = int(draw.integers(side * 3 // 4, side + 1))
    left, top = (int(at) for at in draw.integers(0, side - size + 1, 2))
    right, bottom, third = left + size - 1, top + size - 1, size // 3
    pen, fill = ImageDraw.Draw(picture), COLORS[color]
    if shape == "disk":
        pen.ellipse((left, top, right, bottom), fill=fill)
    else:
        pen.rectangle((left, top + third, right, bottom - third), fill=fill)
        pen.rectangle((left + third, top, right - third, bottom), fill=fill)
    return picture


def picture_pairs(number: int, seed: int = 0, images: int = 1) -> Dataset:
    """Returns conversational pairs of random words, each with `images` pictures of random pixels."""
    draw = np.random.default_rng(seed)
    words = "the cat sat on a mat and saw another thing in one old tree while it rained".split()

    def said(role: str, longest: int) -> list[dict[str, str]]:
        return [{"role": role, "content": " ".join(draw.choice(words, draw.integers(1, longest)))}]

    rows = [
        {
            "prompt": said("user", 6),
            "chosen": said("assistant", 5),
            "rejected": said("assistant", 5),
            "images": [noise(1000 * seed + images * i + j) for j in range(images)],
        }
        for i in range(number)
    ]
    return Dataset.from_list(rows)
