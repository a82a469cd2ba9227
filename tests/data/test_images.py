"""Rows with images: where they may stand, what they become, which are refused or counted; the oracle is the processor
itself, which is given the same messages and images."""

import base64
import io
from pathlib import Path
from typing import Any

import pytest
import torch
import vision_processors
from datasets import Dataset, Features, IterableDataset, Value
from datasets import Image as ImageFeature
from datasets import List as ListFeature
from PIL import Image
from vision_processors import build_processor, noise

from dpo_peft.data import prepare_dataset
from dpo_peft.data.images import Images
from dpo_peft.errors import DataError
from dpo_peft.training.arguments import hold_images

Turns = list[dict[str, Any]]
ONE, TWO = noise(0), noise(1)  # 16 x 16 and 32 x 16
ANSWERS = {"chosen": [{"role": "assistant", "content": "red"}], "rejected": [{"role": "assistant", "content": "blue"}]}
PLACE = {"type": "image"}
OF_TEXT = ("attention_mask", "token_type_ids", "mm_token_type_ids")


@pytest.fixture(scope="module")
def qwen() -> Any:
    return build_processor("qwen2_5_vl")


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def uri(image: Image.Image) -> str:
    return "data:image/png;base64," + base64.b64encode(png(image)).decode()


def user(content: Any) -> Turns:
    return [{"role": "user", "content": content}]


def as_stream(rows: list[dict[str, Any]]) -> IterableDataset:
    return IterableDataset.from_generator(lambda: iter(rows))


def prepared(processor: Any, rows: Any, **options: Any) -> tuple[list[dict[str, Any]], Images, Any]:
    images = Images(processor)
    made, summary = prepare_dataset(rows, images.tokenizer, images=images, **{"max_length": None, **options})
    return list(made), images, summary


def expected(
    processor: Any, messages: Turns, pictures: list[Image.Image]
) -> tuple[list[int], dict[str, torch.Tensor]]:
    """Returns what the processor makes of messages with places for these images."""
    left = iter(pictures)
    filled = [
        {**turn, "content": [{**part, "image": next(left)} if part["type"] == "image" else part for part in parts]}
        for turn in messages
        if isinstance(parts := [text(turn["content"])] if isinstance(turn["content"], str) else turn["content"], list)
    ]
    how = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    made = dict(processor.apply_chat_template(filled, **how))
    ids = made.pop("input_ids")[0].tolist()
    return ids, {name: value for name, value in made.items() if name not in OF_TEXT}


def same_as(processor: Any, row: dict[str, Any], images: Images, messages: Turns, pictures: list[Image.Image]) -> None:
    ids, pixels = expected(processor, messages, pictures)
    assert row["prompt_ids"] == ids
    made = images.sample(row)
    found = dict(made.inputs) if made else {}
    assert found.keys() == (pixels.keys() if pictures else set())
    assert all(torch.equal(value, pixels[name]) for name, value in found.items())


# ---- Where images stand ---------------------------------------------------------------------------------------------

EARLIER = [*user("Look."), {"role": "assistant", "content": "At what?"}, *user("This.")]
SYSTEM = {"role": "system", "content": "Be brief."}
PAIR_OF_PARTS = [text("First "), PLACE, text(" then "), PLACE, text(".")]
# Columns of a row -> the messages that the processor is given, with places for the images.
WAYS: dict[str, tuple[dict[str, Any], Turns, list[Image.Image]]] = {
    "image": ({"prompt": user("Q"), "image": ONE}, user([PLACE, text("Q")]), [ONE]),
    "images": ({"prompt": user("Q"), "images": [TWO, ONE]}, user([PLACE, PLACE, text("Q")]), [TWO, ONE]),
    "behind the system turn": (
        {"prompt": [SYSTEM, *user("Q")], "image": ONE},
        [SYSTEM, *user([PLACE, text("Q")])],
        [ONE],
    ),
    "first of several turns": (
        {"prompt": EARLIER, "image": ONE},
        [*user([PLACE, text("Look.")]), *EARLIER[1:]],
        [ONE],
    ),
    "parts": ({"prompt": user(PAIR_OF_PARTS), "images": [ONE, TWO]}, user(PAIR_OF_PARTS), [ONE, TWO]),
    "marks": (
        {"prompt": [*EARLIER[:2], *user("<image>This <image>")], "images": [ONE, TWO]},
        [*EARLIER[:2], *user([PLACE, text("This "), PLACE])],
        [ONE, TWO],
    ),
    "text": ({"prompt": "Q", "image": ONE, "chosen": "red", "rejected": "blue"}, user([PLACE, text("Q")]), [ONE]),
    "marked text": (
        {"prompt": "Is <image> it?", "images": [ONE], "chosen": "red", "rejected": "blue"},
        user([text("Is "), PLACE, text(" it?")]),
        [ONE],
    ),
    "no prompt column": (
        {
            "images": [ONE],
            "chosen": [*user("Q"), *ANSWERS["chosen"]],
            "rejected": [*user("Q"), *ANSWERS["rejected"]],
        },
        user([PLACE, text("Q")]),
        [ONE],
    ),
    "ShareGPT": (
        {
            "conversations": [{"from": "human", "value": "<image>Q"}],
            "chosen": {"from": "gpt", "value": "red"},
            "rejected": {"from": "gpt", "value": "blue"},
            "images": [ONE],
        },
        user([PLACE, text("Q")]),
        [ONE],
    ),
    "RLAIF-V": (
        {"question": "Q", "image": ONE, "chosen": "red", "rejected": "blue", "origin_split": "x"},
        user([PLACE, text("Q")]),
        [ONE],
    ),
    "OpenAI": (
        {
            "input": {"messages": user([text("Q"), {"type": "image_url", "image_url": {"url": uri(ONE)}}])},
            "preferred_output": ANSWERS["chosen"],
            "non_preferred_output": ANSWERS["rejected"],
        },
        user([text("Q"), PLACE]),
        [ONE],
    ),
    "none": ({"prompt": user("Q"), "images": []}, user("Q"), []),
    "null": ({"prompt": user("Q"), "image": None}, user("Q"), []),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("streamed", [False, True], ids=["table", "stream"])
def test_a_row_becomes_what_the_processor_makes_of_it(qwen: Any, way: str, streamed: bool) -> None:
    columns, messages, pictures = WAYS[way]
    row = {**({} if {"conversations", "question", "input"} & columns.keys() else ANSWERS), **columns}
    rows = as_stream([row]) if streamed else Dataset.from_list([row])
    made, images, _ = prepared(qwen, rows, as_chat=None)
    same_as(qwen, made[0], images, messages, pictures)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": uri(ONE)},
        {"type": "image", "url": uri(ONE)},
        {"type": "image", "base64": base64.b64encode(png(ONE)).decode()},
        {"type": "image", "image": {"bytes": png(ONE), "path": None}},
        {"type": "image_url", "image_url": {"url": uri(ONE)}},
        {"type": "image_url", "image_url": uri(ONE)},
        {"type": "image", "path": "one.png"},
        {"type": "image", "image": "file://{}/one.png"},
    ],
    ids=lambda part: "/".join(part),
)
def test_a_part_may_hold_its_image(qwen: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: Any) -> None:
    (tmp_path / "one.png").write_bytes(png(ONE))
    monkeypatch.chdir(tmp_path)
    part = {
        key: value.replace("{}", str(tmp_path)) if isinstance(value, str) else value for key, value in part.items()
    }
    rows = Dataset.from_list([{"prompt": user([text("Q"), part]), **ANSWERS}])
    assert hold_images(rows)
    made, images, _ = prepared(qwen, rows)
    same_as(qwen, made[0], images, user([text("Q"), PLACE]), [ONE])


def test_images_are_stored_in_any_way(qwen: Any, tmp_path: Path) -> None:
    file = tmp_path / "two.png"
    file.write_bytes(png(TWO))
    for value in (TWO, png(TWO), {"bytes": png(TWO)}, str(file), {"path": str(file), "bytes": None}, uri(TWO)):
        made, images, _ = prepared(qwen, as_stream([{"prompt": user("Q"), "image": value, **ANSWERS}]))
        same_as(qwen, made[0], images, user([PLACE, text("Q")]), [TWO])
    for feature in (ImageFeature(), ImageFeature(decode=False)):
        rows = Dataset.from_list([{"prompt": user("Q"), "images": [str(file), str(file)], **ANSWERS}])
        rows = rows.cast_column("images", ListFeature(feature))
        made, images, _ = prepared(qwen, rows)
        same_as(qwen, made[0], images, user([PLACE, PLACE, text("Q")]), [TWO, TWO])


def test_parts_of_a_table_may_be_images_of_datasets(qwen: Any) -> None:
    part = {"type": Value("string"), "text": Value("string"), "image": ImageFeature()}
    turn = {"role": Value("string"), "content": [part]}
    plain = {name: [{"role": Value("string"), "content": Value("string")}] for name in ANSWERS}
    row = {"prompt": user([{**text("Q"), "image": None}, {**PLACE, "text": None, "image": ONE}]), **ANSWERS}
    rows = Dataset.from_list([row], features=Features({"prompt": [turn], **plain}))
    made, images, _ = prepared(qwen, rows)
    same_as(qwen, made[0], images, user([text("Q"), PLACE]), [ONE])
    assert isinstance(rows[0]["prompt"][0]["content"][1]["image"], Image.Image)  # the user's rows are as they were


def test_rows_with_no_one_or_several_images_stand_side_by_side(qwen: Any) -> None:
    each = [[], [ONE], [TWO, ONE], [ONE]]
    rows = Dataset.from_list([{"prompt": user("Q"), "images": some, **ANSWERS} for some in each])
    made, images, _ = prepared(qwen, rows)
    for row, some in zip(made, each, strict=True):
        same_as(qwen, row, images, user([*[PLACE] * len(some), text("Q")]), some)
    assert made[1]["images"] == made[3]["images"] != made[2]["images"] and made[0]["images"] == ""


@pytest.mark.sampled(4)
@pytest.mark.parametrize("family", [name for name in vision_processors.FAMILIES if name != "paligemma"])
def test_every_family_agrees_with_its_processor(family: str) -> None:
    processor = build_processor(family)
    made, images, _ = prepared(processor, Dataset.from_list([{"prompt": user("Q"), "images": [TWO, ONE], **ANSWERS}]))
    same_as(processor, made[0], images, user([PLACE, PLACE, text("Q")]), [TWO, ONE])


def test_a_prompt_of_text_is_laid_out_by_the_processor() -> None:
    processor = build_processor("paligemma")  # puts its images, then its start token, in front
    row = {"prompt": "caption", "image": ONE, "chosen": "red", "rejected": "blue"}
    made, images, _ = prepared(processor, Dataset.from_list([row]))
    wanted = processor(images=ONE, text="caption", return_tensors="pt")
    assert made[0]["prompt_ids"] == wanted["input_ids"][0].tolist()
    assert torch.equal(images.sample(made[0]).inputs["pixel_values"], wanted["pixel_values"])
    processor = build_processor("llava")
    marked = {**row, "prompt": "a<image>b"}
    made, images, _ = prepared(processor, Dataset.from_list([marked]), as_chat=False)
    wanted = processor(images=ONE, text="a<image>b", return_tensors="pt")
    assert made[0]["prompt_ids"] == wanted["input_ids"][0].tolist()
    with pytest.raises(DataError, match="row 0, field 'prompt': holds 0 times '<image>'.*write '<image>' where"):
        prepared(processor, Dataset.from_list([row]), as_chat=False)


# ---- What is refused, and what is counted ---------------------------------------------------------------------------

PAIR = {"prompt": user("Q"), **ANSWERS}
SHOWN = [{"role": "assistant", "content": [PLACE, text("red")]}]
SPELLED = [{"role": "assistant", "content": "<|image_pad|>"}]
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "address": (
        {**PAIR, "images": ["https://example.org/a.png"]},
        r"'images\[0\]': is an address .*download",
    ),
    "no file": ({**PAIR, "image": "gone.png"}, "'image': there is no file 'gone.png'"),
    "no image": ({**PAIR, "images": [""]}, r"'images\[0\]': holds no image"),
    "broken URI": ({**PAIR, "image": "data:image/png;base64,!"}, "'image': holds a data URI that is not base64"),
    "too few": ({**PAIR, "prompt": user([PLACE, PLACE]), "images": [uri(ONE)]}, "holds 1 images, and .* 2 places"),
    "too many": ({**PAIR, "prompt": user([PLACE]), "images": [uri(ONE), uri(TWO)]}, "holds 2 images, and .* 1 places"),
    "marks": ({**PAIR, "prompt": user("<image> <image>"), "image": uri(ONE)}, "has 2 times '<image>' for 1 images"),
    "completion": ({**PAIR, "chosen": SHOWN, "image": uri(ONE)}, "'chosen': holds an image.*prompt"),
    "spelled": (
        {**PAIR, "chosen": [{"role": "assistant", "content": "<|image_pad|>"}], "image": uri(ONE)},
        "image_pad",
    ),
    "spelled in the prompt": ({**PAIR, "prompt": user("<|image_pad|>")}, "image_pad"),
    "twice": ({**PAIR, "prompt": user([{**PLACE, "image": uri(ONE)}]), "images": [uri(ONE)]}, "so does a column"),
}


def stored(content: bytes) -> dict[str, Any]:
    return {**PAIR, "images": [{"bytes": content, "path": None}]}


@pytest.mark.parametrize("problem", REFUSED)
def test_what_is_wrong_is_named_with_its_row(qwen: Any, problem: str) -> None:
    row, message = REFUSED[problem]
    with pytest.raises(DataError, match=f"row 0.*{message}"):
        prepared(qwen, Dataset.from_list([row]))


def test_there_is_one_column_of_images(qwen: Any) -> None:
    with pytest.raises(DataError, match=r"a column 'image' and one 'images'.*remove_columns\('image'\)"):
        prepared(qwen, Dataset.from_list([{**PAIR, "image": uri(ONE), "images": [uri(ONE)]}]))


def test_damaged_images_are_counted_or_named(qwen: Any) -> None:
    """Half a file, none of it, no image at all, and one of more pixels than Pillow opens."""
    whole, large = png(ONE), Image.new("1", (20_000, 20_000))
    bad = [whole[: len(whole) // 2], b"\x89PNG", b"plain text", png(large)]
    rows = Dataset.from_list([stored(one) for one in [whole, *bad, whole]])
    made, _, summary = prepared(qwen, rows, max_unusable_share=0.9)
    assert [row["row"] for row in made] == [0, 5]
    assert summary.dropped == {"unreadable_image": 4} and summary.dropped_rows == {"unreadable_image": [1, 2, 3, 4]}
    with pytest.raises(DataError, match="row 1: unreadable_image"):
        prepared(qwen, rows, on_unusable="error")


@pytest.mark.parametrize("mode", ["RGBA", "P", "L", "1", "CMYK", "I;16"])
def test_other_modes_are_read_as_their_colors(qwen: Any, mode: str) -> None:
    """A gray of half the brightness stays that, whatever it is stored as."""
    gray = Image.new("L", (16, 16), 128)
    stored_as = {"I;16": Image.new("I;16", (16, 16), 128 << 8), "P": gray.convert("RGB").quantize(4)}
    shown = stored_as.get(mode) or gray.convert("RGB").convert(mode)
    file = io.BytesIO()
    shown.save(file, "TIFF" if mode == "CMYK" else "PNG")
    made, images, _ = prepared(qwen, Dataset.from_list([stored(file.getvalue())]))
    wanted = qwen.image_processor([gray.convert("RGB")], return_tensors="pt")["pixel_values"]
    apart = (images.sample(made[0]).inputs["pixel_values"] - wanted).abs().max()
    assert apart < (4 if mode == "1" else 0.05)  # dithered to black and white


def test_an_image_stands_as_its_camera_was_held(qwen: Any) -> None:
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6  # turned by 90 degrees
    TWO.transpose(Image.Transpose.ROTATE_90).save(file, "PNG", exif=exif)
    made, images, _ = prepared(qwen, Dataset.from_list([stored(file.getvalue())]))
    same_as(qwen, made[0], images, user([PLACE, text("Q")]), [TWO])


def test_other_settings_of_a_processor_are_other_images() -> None:
    """Its own, and those of its image processor: prepared rows and cached log-probs are told by them."""
    first, own, inner = (build_processor("llava") for _ in range(3))
    own.patch_size += 1
    inner.image_processor.image_mean = [0.1, 0.2, 0.3]
    assert len({Images(one).settings for one in (first, own, inner, build_processor("llava"))}) == 3
