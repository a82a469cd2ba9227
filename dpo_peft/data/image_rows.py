"""The images of rows: where they are, and where in the prompt each one stands.

A row's images stand in its column `images` (a list) or `image`, or in the parts of its messages. Each is a file's
name, a file's bytes, or what `datasets.Image` makes of either; nothing is fetched from the net. They belong to the
prompt: its messages say where each one stands by a part {"type": "image"} or by "<image>" in a text, a prompt of text
by the processor's own token. Where nothing says it, they stand before the text of the first user turn, as in TRL.
"""

import base64
import binascii
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from datasets import Dataset, IterableDataset
from datasets import Image as ImageFeature
from datasets.features.features import _visit
from datasets.features.image import image_to_bytes
from PIL import Image

from .fields import Message, Messages, Row, RowProblem, Values, from_json, shown
from .formats import IMAGE_COLUMNS, Example

AnyRows = TypeVar("AnyRows", Dataset, IterableDataset)
PLACE = {"type": "image"}
MARK = "<image>"  # how texts of published sets say where an image stands, whatever the model
HOLDERS = ("bytes", "path", "url", "image", "base64", "image_url")  # keys under which an image stands


class ImageFile(NamedTuple):
    """An image as a row has it: its bytes, or the name of its file."""

    content: bytes | None
    path: str | None

    def read(self) -> bytes:
        """Returns its bytes. Raises `OSError`."""
        return Path(str(self.path)).read_bytes() if self.content is None else self.content

    @property
    def text(self) -> str:
        """The name of its file, or its bytes as a data URI: what a row of text can hold."""
        whole = base64.b64encode(self.content or b"").decode()
        return str(self.path) if self.content is None else f"data:application/octet-stream;base64,{whole}"

    def digest(self) -> bytes:
        """Returns what tells it from other images: of its bytes, or of its name where there is no such file."""
        try:
            return digest_of(self.read())
        except OSError:
            return digest_of(str(self.path).encode("utf-8", "replace"))


def digest_of(content: bytes) -> bytes:
    """Returns what tells an image's bytes from others'."""
    return blake2b(content, digest_size=16).digest()


def take_images(row: Row) -> list[ImageFile]:
    """Returns the images in a row's columns. Raises `RowProblem` for what is no image."""
    found: list[ImageFile] = []
    for column in sorted(IMAGE_COLUMNS):
        value = row.get(column)
        if isinstance(value, str) and value.lstrip().startswith("["):  # a list in a cell of a table
            value = from_json(row, column)
        if value is not None:
            values = value if isinstance(value, list | tuple) else [value]
            found += [as_file(one, f"{column}[{i}]" if values is value else column) for i, one in enumerate(values)]
    return found


def as_file(value: Any, field: str) -> ImageFile:
    """Returns the file of an image that is given by name, bytes, data URI or as an image of Pillow."""
    if isinstance(value, Mapping):
        key = next((key for key in HOLDERS if value.get(key) is not None), "")
        found = value.get(key)
        return as_file(f"data:,{found}" if key == "base64" and isinstance(found, str) else found, field)
    if isinstance(value, bytes):
        return ImageFile(value, None)
    if isinstance(value, Image.Image):
        return ImageFile(image_to_bytes(value), None)
    if not isinstance(value, str) or not value:
        raise RowProblem(
            field, f"holds no image: {shown(value, 40)}", "give a file's name or bytes, or remove the row"
        )
    if value.startswith("data:"):
        try:
            return ImageFile(base64.b64decode(value.partition(",")[2], validate=True), None)
        except binascii.Error:
            raise RowProblem(field, "holds a data URI that is not base64", "repair it, or remove the row") from None
    if "://" in value and not value.startswith("file://"):
        raise RowProblem(
            field,
            f"is an address ({value[:60]}), and nothing is fetched while training: it might change or be gone",
            "download the images first, and give their files' names",
        )
    path = value.removeprefix("file://")
    if not os.path.isfile(path):
        raise RowProblem(
            field,
            f"there is no file {path[:200]!r}",
            "give the right name (in a data file: as seen from its folder), or remove the row",
        )
    return ImageFile(None, path)


def place_images(
    example: Example, given: Sequence[ImageFile], place_in_text: Callable[[str, int], str] | None
) -> Example:
    """Returns an example whose prompt says where each of its images stands: those that are given, of the row's
    columns, or those that its messages hold. `place_in_text` is the processor's, for prompts of text; without a
    processor there may be no images. Raises `RowProblem` for images without a place, places without images, or an
    image in what the model is to write."""
    if example.kind != "chat":
        if given and place_in_text is None:
            raise _without_processor("prompt")
        if given and place_in_text is not None and example.kind == "text":
            example = replace(example, prompt=place_in_text(example.prompt, len(given)))
        return replace(example, images=given)
    inside: list[ImageFile] = []
    prompt = [_bare(message, f"prompt[{i}]", inside) for i, message in enumerate(example.prompt)]
    first, completions = list(inside), []
    for field, turns in zip(example.fields, example.completions, strict=True):
        theirs: list[ImageFile] = []
        completions.append([_bare(message, f"{field}[{i}]", theirs) for i, message in enumerate(turns)])
        if theirs and prompt or any(_places([turn]) and turn["role"] == "assistant" for turn in completions[-1]):
            raise RowProblem(field, "holds an image", "images stand in the prompt: move it there, or remove the row")
        if not prompt and first and theirs != first:
            raise RowProblem(field, "holds other images than the first conversation", "give both the same ones")
        first = first or theirs
    if first and given:
        raise RowProblem("messages", "hold images, and so does a column of the row", "leave one of the two out")
    files = first or list(given)
    places = max([_places(prompt), *map(_places, completions)])
    if (files or places) and place_in_text is None:
        raise _without_processor("messages")
    if files and not places:
        prompt, completions = _with_places(prompt, completions, len(files))
        places = len(files)
    if len(files) != places:
        raise RowProblem(
            "images",
            f"holds {len(files)} images, and the messages have {places} places for one",
            'give a part {"type": "image"} of a message for each image, or none at all',
        )
    return replace(example, prompt=prompt, completions=completions, images=files)


def _without_processor(field: str) -> RowProblem:
    return RowProblem(
        field,
        "holds images, and there is no processor to read them",
        "pass processing_class=AutoProcessor.from_pretrained(model), or leave processing_class out",
    )


def _bare(message: Message, field: str, found: list[ImageFile]) -> Message:
    """Returns a message whose image parts are nothing but places; the images in them are added to `found`."""
    if not isinstance(message.get("content"), list):
        return message
    parts = []
    for part in message["content"]:
        if part["type"] == "text":
            parts.append(part)
            continue
        held = {key: value for key, value in part.items() if key not in ("type", "text")}
        if unread := sorted(held.keys() - set(HOLDERS)):
            raise RowProblem(field, f"has an image part with {unread[0]!r}, which is not read", "take it out")
        if held:
            found.append(as_file(held, field))
        parts.append(PLACE)
    return {**message, "content": parts}


def _places(messages: Messages) -> int:
    return sum(map(count_images, messages))


def holds_places(value: object) -> bool:
    """Returns whether a value of a row is messages, also as JSON text, of which one has a place for an image."""
    if isinstance(value, str) and value.lstrip().startswith("[") and '"image' in value:
        value = from_json({"": value}, "")
    return any(map(count_images, value if isinstance(value, list) else []))


def count_images(message: object) -> int:
    """Returns how many parts of a message are images."""
    content = message.get("content") if isinstance(message, Mapping) else None
    parts = content if isinstance(content, list) else []
    return sum(isinstance(part, Mapping) and part.get("type") in ("image", "image_url") for part in parts)


def _with_places(prompt: Messages, completions: list[Messages], count: int) -> tuple[Messages, list[Messages]]:
    """Returns messages with places for images: where the texts have marks, or before the first user turn's text."""

    def put(messages: Messages) -> Messages:
        texts = [message["content"] if isinstance(message.get("content"), str) else "" for message in messages]
        if marks := sum(text.count(MARK) for text in texts):
            if marks != count:
                problem = f"has {marks} times {MARK!r} for {count} images"
                raise RowProblem("prompt", problem, "write it once for each image, or never")
            marked = zip(messages, texts, strict=True)
            return [{**one, "content": _split(text)} if MARK in text else one for one, text in marked]
        at = next((i for i, message in enumerate(messages) if message["role"] == "user"), None)
        if at is None:
            raise RowProblem("prompt", "has images and no user turn for them to stand in", "give it one")
        (turn,) = in_parts([messages[at]])
        return [*messages[:at], {**turn, "content": [PLACE] * count + turn["content"]}, *messages[at + 1 :]]

    return (put(prompt), completions) if prompt else (prompt, [put(turns) for turns in completions])


def _split(text: str) -> list[Values]:
    first, *others = text.split(MARK)
    parts = [{"type": "text", "text": first}]
    for other in others:
        parts += [PLACE, {"type": "text", "text": other}]
    return [part for part in parts if part.get("text") != ""]


def in_parts(messages: Messages) -> Messages:
    """Returns messages whose texts are parts, as templates of models of text and images want them."""
    texts = ((message, message.get("content")) for message in messages)
    return [
        {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message
        for message, content in texts
    ]


def undecoded(dataset: AnyRows) -> AnyRows:
    """Returns rows whose images are left as they are stored: bytes, or the name of a file."""
    if isinstance(dataset, IterableDataset):
        return dataset.decode(False) if dataset.features else dataset
    rows = dataset.with_format(None)
    rows.info.features = _visit(dataset.features, _as_stored)
    return rows


def _as_stored(feature: Any) -> Any:
    return ImageFeature(decode=False) if isinstance(feature, ImageFeature) else feature
