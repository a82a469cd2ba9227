"""Samples and worst pairs of prompts with images: the model sees its picture, and the report shows it."""

import base64
import io
import json
import re
from pathlib import Path

import vision_processors as vp
from datasets import Dataset
from PIL import Image
from vision_runs import Served, train

from dpo_peft.report import save_report


def test_samples_have_their_pictures_in_the_report(tmp_path: Path) -> None:
    rows = [*vp.picture_pairs(5, 4)]
    large = tmp_path / "cat.png"
    Image.effect_noise((900, 300), 90).convert("RGB").save(large)
    rows = [{**row, "images": [str(large)] if i == 1 else row["images"]} for i, row in enumerate(rows)]
    rows[2] = {**rows[2], "prompt": rows[3]["prompt"]}  # one prompt with two pictures is two
    stored = [{**row, "images": [_stored(image) for image in row["images"]]} for row in rows]
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in stored]
    evaluated = Dataset.from_list(swapped)
    changed = {"eval_strategy": "steps", "eval_steps": 3, "sample_prompts": 4, "sample_temperature": 0.0}
    trainer = train(tmp_path, "llava", Dataset.from_list(stored), evaluated, **changed, sample_max_new_tokens=5)
    folder = Path(trainer.args.output_dir)
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text("utf-8").splitlines()]
    assert [name for row in samples[:4] for name in row["images"]][1].startswith("cat.png ")
    assert len({tuple(row["images"]) for row in samples}) == 4
    served = Served(folder)
    for row, sample in zip(rows, (row for row in samples if row["step"] == 3), strict=False):
        opened = {**row, "images": [Image.open(i).convert("RGB") if isinstance(i, str) else i for i in row["images"]]}
        given = served.inputs(opened)
        made = served.model.generate(**given, max_new_tokens=5, do_sample=False, eos_token_id=2, pad_token_id=0)
        text = served.processor.decode(made[0, given["input_ids"].shape[1] :], skip_special_tokens=True)
        assert sample["completion"] == text

    worst = [json.loads(line) for line in (folder / "worst_pairs.jsonl").read_text("utf-8").splitlines()]
    assert worst and all(row["images"] for row in worst)
    save_report([folder], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text("utf-8")
    shown = re.findall(r'src="data:image/jpeg;base64,([^"]+)" alt="([^"]+)"', page)
    assert [name for _, name in shown[-4:]] == [name for row in samples[:4] for name in row["images"]]
    assert len(shown) == 4 + len(worst)
    sizes = {name: Image.open(io.BytesIO(base64.b64decode(data))).size for data, name in shown}
    assert next(size for name, size in sizes.items() if name.startswith("cat.png")) == (256, 85)
    assert max(map(max, sizes.values())) == 256


def _stored(image: object) -> dict[str, object]:
    if isinstance(image, str):
        return {"path": image, "bytes": None}
    held = io.BytesIO()
    image.save(held, "PNG")  # type: ignore[attr-defined]
    return {"path": None, "bytes": held.getvalue()}
