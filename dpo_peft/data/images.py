"""A model's processor, which makes of images what the model reads: tokens in the prompt, and pixels.

Preparation opens every image once, to see that it can be read, and keeps its tokens; pixels are made when a batch is
laid out, in the data loader's workers, and are not stored. The processor sees all images of a prompt at once.
"""

import base64
import copy
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import transformers
from datasets import Dataset
from PIL import Image, ImageOps
from torch import Tensor
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from ..errors import DataError, OptionError
from ..forward.images import SampleImages
from ..forward.layout import Sample
from .fields import Row, RowProblem
from .formats import Encoded, Example
from .image_rows import MARK, ImageFile, digest_of
from .summary import UNREADABLE_IMAGE
from .tokenize import plain_ids

SIZES_KEPT = 256
# What a processor returns beside the images' own inputs.
TEXT_INPUTS = set("input_ids attention_mask labels token_type_ids mm_token_type_ids text_replacement_offsets".split())


class OpenedImage(NamedTuple):
    """What preparation keeps of an image."""

    size: tuple[int, int]  # width, height in pixels
    digest: bytes


class Images:
    """A model's processor, and where the images of prepared rows are found. Raises `OptionError` for a processor
    without a tokenizer, or that takes no images or does not say which token stands for one."""

    def __init__(self, processor: ProcessorMixin):
        name, tokenizer = type(processor).__name__, getattr(processor, "tokenizer", None)
        if not isinstance(tokenizer, PreTrainedTokenizerBase) or not hasattr(processor, "image_processor"):
            raise OptionError(
                f"processing_class is a {name}, which has no tokenizer or takes no images: pass the tokenizer, or the "
                "processor of a model of text and images."
            )
        if getattr(processor, "image_token", None) is None:
            raise OptionError(f"processing_class={name}: it names no image token (image_token), so it can't be used.")
        self.processor = processor
        self.tokenizer = tokenizer
        if processor.chat_template and processor.chat_template != tokenizer.chat_template:
            self.tokenizer = copy.copy(tokenizer)
            self.tokenizer.chat_template = processor.chat_template
        self.mark: str = processor.image_token  # stands for an image in a text
        self.token: int = processor.image_token_ids[0]  # in whose places features stand
        settings = [name, processor.to_dict(), transformers.__version__]  # the tokenizer's ids are another key
        self.settings = digest_of(json.dumps(settings, sort_keys=True, default=str).encode()).hex()
        self._by_sizes: dict[tuple[tuple[int, int], ...], tuple[list[str], int]] = {}
        self.seen = False  # whether prepared rows have images; of a stream, whether they may have
        self._places: dict[str, tuple[int, int]] = {}  # key of a row's images -> source, row
        self._sources: list[Callable[[int], list[ImageFile]]] = []

    # ---- Preparation ------------------------------------------------------------------------------------------------

    def opened(self, example: Example) -> Example | str:
        """Returns the example with its images opened, or the reason why one can't be."""
        found = []
        for image in example.images:
            try:
                content = image.read()
                found.append(OpenedImage(decode(content).size, digest_of(content)))
            except Exception:  # Pillow's readers raise anything: the bytes are other people's
                return UNREADABLE_IMAGE
        return replace(example, images=found)

    def key(self, images: Sequence[OpenedImage]) -> str:
        """Returns a name for a prompt's images: of their bytes and the processor's settings. None has none."""
        if not images:
            return ""
        return digest_of(b"".join([self.settings.encode(), *(image.digest for image in images)])).hex()

    def checked(self, encoded: Encoded, example: Example) -> Encoded:
        """Returns the ids of an example with the name of its images. Raises `RowProblem` where its prompt does not
        hold the tokens of all of them, or a completion holds some."""
        for field, ids in zip(example.fields, encoded.completion_ids, strict=False):
            if self.token in ids:
                raise RowProblem(
                    field,
                    f"holds the image token {self.tokenizer.convert_ids_to_tokens(self.token)!r} (id {self.token})",
                    "images stand in the prompt, before the completions differ: take it out, or remove the row",
                )
        found, wanted = encoded.prompt_ids.count(self.token), self.count(example.images)
        if found != wanted:
            raise RowProblem(
                "prompt",
                f"holds {found} image tokens, and its {len(example.images)} images have {wanted}",
                "give an image for each place, or take the image token out of the text",
            )
        return replace(encoded, images=self.key(example.images))

    def expand(self, text: str, images: Sequence[OpenedImage]) -> str:
        """Returns a text with the tokens of these images in place of their marks."""
        if not images:
            return text
        (expanded,), _ = self.processor.get_text_with_replacements([text], self._replacements(images)[0])
        return str(expanded)

    def count(self, images: Sequence[OpenedImage]) -> int:
        """Returns how many tokens the features of these images take."""
        return self._replacements(images)[1] if images else 0

    def _replacements(self, images: Sequence[OpenedImage]) -> tuple[list[str], int]:
        """Returns what the processor writes for each image, and the number of features. Both depend on sizes alone."""
        sizes = tuple(image.size for image in images)
        if sizes not in self._by_sizes:
            if len(self._by_sizes) >= SIZES_KEPT:
                self._by_sizes.clear()
            made = self._process([Image.new("RGB", size) for size in sizes], return_text_replacement_offsets=True)
            written = [one["replacement"] for one in made["text_replacement_offsets"][0]]
            self._by_sizes[sizes] = written, list(made["input_ids"][0]).count(self.token)
        return self._by_sizes[sizes]

    def _process(self, images: Sequence[Image.Image], **options: Any) -> Mapping[str, Any]:
        text = self.mark * len(images)
        made: Mapping[str, Any] = self.processor(images=[[*images]], text=[text], add_special_tokens=False, **options)
        return made

    def place_in_text(self, text: str, count: int) -> str:
        """Returns a prompt of text with marks for so many images, as the processor lays it out: PaliGemma's puts them
        and a start token first. Raises `RowProblem` where there are others."""
        if self.mark not in text and text.count(MARK) == count:
            text = text.replace(MARK, self.mark)
        blank = [[Image.new("RGB", (32, 32))] * count]
        _, (laid_out,), *_ = self.processor.prepare_inputs_layout(images=blank, text=[text])
        if laid_out.count(self.mark) != count:
            raise RowProblem(
                "prompt",
                f"holds {laid_out.count(self.mark)} times {self.mark!r}, an image's place, for {count} images",
                f"write {self.mark!r} where each image stands, or set as_chat to true",
            )
        return str(laid_out)

    # ---- Batches ----------------------------------------------------------------------------------------------------

    def remember(self, prepared: Dataset, files: Callable[[int], list[ImageFile]]) -> None:
        """Keeps where the images of prepared rows are found: `files` gives those of a row of their source."""
        self._sources.append(files)
        for batch in prepared.select_columns(["row", "images"]).iter(batch_size=10_000):
            places = ((len(self._sources) - 1, row) for row in batch["row"])
            self._places.update(zip(batch["images"], places, strict=True))
            self.seen |= any(batch["images"])

    def files(self, row: Row) -> list[ImageFile]:
        """Returns the images of a prepared row."""
        if (files := row.get("image_files")) is not None:
            return [ImageFile(**file) for file in files]
        source, number = self._places[row["images"]] if row.get("images") else (0, -1)
        return self._sources[source](number) if number >= 0 else []

    def sample(self, row: Row) -> SampleImages | None:
        """Returns the pixels of a prepared row's images. Raises `DataError` if one of them changed since the rows were
        prepared."""
        if not (key := row.get("images")):
            return None
        try:
            contents = [file.read() for file in self.files(row)]
        except OSError as error:
            raise DataError(f"Row {row['row']}: an image can't be read any more: {error}. Put it back.") from error
        if self.key([OpenedImage((0, 0), digest_of(content)) for content in contents]) != key:
            raise DataError(
                f"Row {row['row']}: its images are not those of its preparation any more. Start again: the rows are "
                "then prepared anew."
            )
        found = [decode(content) for content in contents]
        return SampleImages(_pixels(self._process(found, return_tensors="pt")), self.token, bytes.fromhex(key))

    def spans(self, row: Row) -> list[tuple[int, int, str]]:
        """Returns where in a prepared row's prompt the tokens of each image stand, and what they are, for people."""
        if not row.get("images"):
            return []
        sizes = [decode(file.read()).size for file in self.files(row)]
        places = iter([place for place, token in enumerate(row["prompt_ids"]) if token == self.token])
        found = []
        written = self._replacements([OpenedImage(size, b"") for size in sizes])[0]
        for (width, height), text in zip(sizes, written, strict=True):
            taken = list(islice(places, plain_ids(self.tokenizer, text).count(self.token)))
            found.append((taken[0], taken[-1] + 1, f"<image {width}x{height}, {len(taken):,} tokens>"))
        return found

    def cuts(self, prompt_ids: Sequence[int], cut: int) -> bool:
        """Says whether taking so many tokens from a prompt's start takes an image's, or the marks at its start."""
        if self.token not in prompt_ids:
            return False
        first, marks = list(prompt_ids).index(self.token), self.tokenizer.added_tokens_decoder
        while first and prompt_ids[first - 1] in marks:
            first -= 1
        return cut > first

    def probe_samples(self, anyhow: bool = False) -> list[Sample]:
        """Returns tiny samples with an image, for `plan_forward`; none if no rows have images, unless `anyhow`."""
        if not self.seen and not anyhow:
            return []
        noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
        image = Image.fromarray(noise)
        opened = [OpenedImage(image.size, b"")]
        texts = "Look: ", self.expand(self.mark, opened), "What is it?", "A b", "c"
        before, places, after, first, second = (plain_ids(self.tokenizer, text) for text in texts)
        pixels = SampleImages(_pixels(self._process([image], return_tensors="pt")), self.token, b"")
        return [Sample([*before, *places, *after], [first, second], images=pixels)]


def _pixels(made: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in made.items() if name not in TEXT_INPUTS}


def thumbnail(content: bytes, side: int = 256) -> str:
    """Returns an image as a data URI of a JPEG whose sides are at most so many pixels long."""
    image, held = decode(content), io.BytesIO()
    image.thumbnail((side, side))
    image.save(held, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(held.getvalue()).decode()


def decode(content: bytes) -> Image.Image:
    """Returns an image in RGB, turned as its camera says. Raises what Pillow does for one that can't be read.

    Of 16 bits the upper 8 are kept; Pillow would make all that is above 255 white.
    """
    with Image.open(io.BytesIO(content)) as opened:
        image: Image.Image = opened
        if image.mode in ("I", "F"):
            raise ValueError(f"mode {image.mode} says nothing of its brightest value")
        if image.mode.startswith("I;16"):
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        return ImageOps.exif_transpose(image).convert("RGB")
