"""Commands over rows with images: pairs that training reads, completions side by side, a conversation, the card."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import vision_models as vm
import vision_processors as vp
import yaml
from datasets import load_dataset
from paths import REPO
from PIL import Image
from vision_runs import Served, train

from dpo_peft import DPOConfig, DPOTrainer
from dpo_peft.chat import Session, Settings
from dpo_peft.cli import main
from dpo_peft.errors import OptionError
from dpo_peft.hub.upload_files import collect
from dpo_peft.model.adapter_source import AdapterSource
from dpo_peft.pairs import PairsOptions, make_pairs


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(train(tmp_path_factory.mktemp("gemma3"), "gemma3", vp.picture_pairs(8)).args.output_dir)


def written(served: Served, row: Any, new: int) -> list[int]:
    given = served.inputs(row)
    made = served.model.generate(**given, max_new_tokens=new, do_sample=False, eos_token_id=2, pad_token_id=0)
    return list(made[0, given["input_ids"].shape[1] :].tolist())


def text_of(served: Served, row: Any, new: int) -> str:
    return str(served.processor.decode(written(served, row, new), skip_special_tokens=True))


def test_pairs_are_sampled_and_judged_with_images_and_trained_on(trained: Path, tmp_path: Path) -> None:
    rows = vp.picture_pairs(4, 8).select_columns(["prompt", "images"])
    rows.to_parquet(tmp_path / "prompts.parquet")
    output = tmp_path / "pairs.jsonl"
    options: dict[str, Any] = {
        "prompts": str(tmp_path / "prompts.parquet"),
        "max_new_tokens": 6,
        "require_finished": False,
        "implicit_reward": str(trained),
    }
    result = make_pairs(PairsOptions(str(trained), output=str(output), num_candidates=4, temperature=1.5, **options))
    pairs = load_dataset("json", data_files=str(output), split="train")
    assert len(pairs) == result["pairs"] > 1 and {len(images) for images in pairs["images"]} == {1}
    served = Served(trained)
    for row in pairs:
        asked = rows[row["prompt_number"]]
        text = row["chosen"][0]["content"]
        assert row["chosen_reward"] == pytest.approx(served.reward(asked, text), abs=1e-4)
    short = {"max_steps": 1, "use_cpu": True, "bf16": False, "report_to": "none", "quantize_base": False}
    args = DPOConfig(output_dir=str(tmp_path / "next"), **short)
    rows = pairs.select_columns(["prompt", "chosen", "rejected", "images"])
    again = DPOTrainer(str(trained.parent / "base"), args=args, train_dataset=rows)
    assert again.train_dataset[0]["images"] and again.images is not None
    with pytest.raises(OptionError, match="images"):
        options |= {"implicit_reward": None, "reward_model": "x"}
        make_pairs(PairsOptions(str(trained), output=str(tmp_path / "b.jsonl"), **options))


def test_compare_and_chat_show_the_model_an_image(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, served = str(tmp_path / "cat.png"), Served(trained)
    vp.noise(77).save(file)
    row = {"prompt": [{"role": "user", "content": "the cat"}], "images": [Image.open(file).convert("RGB")]}
    expected = text_of(served, row, 5)
    given = ["--prompt", "the cat", "--image", file, "--max_new_tokens", "5", "--temperature", "0", "--json"]
    assert not main(["compare", str(trained), *given, "--as_chat", "true"])
    (compared,) = json.loads(capsys.readouterr().out)["rows"]
    assert compared["after"] == expected
    assert compared["after_reward"] == pytest.approx(served.reward(row, written(served, row, 5)), abs=1e-4)
    assert not main(["chat", str(trained), *given])
    assert json.loads(capsys.readouterr().out)["completions"][0]["completion"] == expected
    session = Session(AdapterSource(str(trained)).load("cpu", with_reference=False), Settings(5, 0.0))
    assert session.say("the cat", images=[file])[0].text == expected
    session.reset()
    assert session.say("the cat")[0].text == text_of(served, {**row, "images": []}, 5)


def test_the_cards_example_shows_the_model_a_picture(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    card = (trained / "README.md").read_text("utf-8")
    assert yaml.safe_load(card.split("---")[1])["pipeline_tag"] == "image-text-to-text"
    assert re.search(r"Rows with images:\*\* 8 of 8 for training, 4 image tokens each", card)
    code = re.search(r"```python\n(.*?)```", card, flags=re.S)
    assert code is not None
    monkeypatch.chdir(trained)
    vp.noise(5).save("picture.jpg")
    exec(code[1], {})
    shown = capsys.readouterr().out
    row = {
        "prompt": [{"role": "user", "content": "What is in the picture?"}],
        "images": [Image.open("picture.jpg").convert("RGB")],
    }
    assert shown[:5] == text_of(Served(trained), row, 64)[:5]
    files = collect(trained, "me/adapter", "me/base", [], {"datasets": []}).files
    assert {"processor_config.json", "tokenizer.json"} <= files.keys() and "picture.jpg" not in files


@pytest.mark.slow
def test_the_pages_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    vp.noise(5).save("cat.jpg")
    vm.build("gemma3").save_pretrained("base")
    vp.build_processor("gemma3").save_pretrained("base")
    page = (REPO / "docs" / "images.md").read_text("utf-8")
    code = "\n".join(re.findall(r"```python\n(.*?)```", page, flags=re.S))
    code = code.replace("Qwen/Qwen2.5-VL-3B-Instruct", "base")
    code = code.replace("DPOConfig(", "DPOConfig(use_cpu=True, bf16=False, max_steps=1, report_to='none', ")
    known: dict[str, Any] = {}
    exec(compile(code, "images.md", "exec"), known)
    assert known["trainer"].data_reports["train"].kept_rows == 2 and known["output"].shape[1] > 10
