"""`dpo-peft data`: what it prints of files, what it takes of a training run's config, and how it exits."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from dpo_peft import cli
from dpo_peft.cli.train import first_row
from dpo_peft.data import prepare_dataset
from dpo_peft.quickstart import model_path, train_file
from dpo_peft.training.tally import wilson


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pairs(number: int, word: str = "walk") -> list[dict[str, Any]]:
    return [
        {"prompt": f"The {word} {n}?", "chosen": f" A treat {n}.", "rejected": f" Awful {n}."} for n in range(number)
    ]


@pytest.fixture
def file(tmp_path: Path) -> str:
    return write(tmp_path / "pairs.jsonl", pairs(4))


def test_it_looks_at_a_file(file: str, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["data", file]) == 0
    shown = capsys.readouterr().out
    assert "4 rows, 4 usable: pairs (text format)" in " ".join(shown.split()) and "Lengths in characters" in shown
    assert (
        "row 0\nprompt      The walk 0?\nchosen       A treat 0.\nrejected     Awful 0." in shown
        and "row 2" not in shown
    )
    assert "\x1b" not in shown


def test_json_holds_the_facts(file: str, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["data", file, "--json", "--rows", "1", "--model_name_or_path", str(model_path())]) == 0
    found = json.loads(capsys.readouterr().out)
    train = found["sets"]["train"]
    assert (train["usable"], train["lengths"]["unit"], train["template"]["family"]) == (4, "tokens", "chatml")
    assert len(found["first_rows"]) == 1 and "chosen" in found["first_rows"][0]


def test_strict_exits_with_3(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    fine = write(tmp_path / "fine.jsonl", [{**row, "rejected": row["chosen"][::-1]} for row in pairs(4)])
    assert cli.main(["data", fine, "--strict"]) == 0
    assert "Nothing to be acted on." in capsys.readouterr().out
    turned = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in pairs(1)]
    file = write(tmp_path / "bad.jsonl", [*pairs(4), *turned])
    assert cli.main(["data", file]) == 0
    assert cli.main(["data", file, "--strict"]) == 3
    printed = capsys.readouterr()
    assert "say the opposite of another (rows 4 and 0)" in printed.out and "--strict" in printed.err


def test_several_files_and_a_leak(tmp_path: Path, file: str, capsys: pytest.CaptureFixture) -> None:
    broken = write(tmp_path / "more.jsonl", [*pairs(2, "bus"), {"prompt": "x", "chosen": "y", "rejected": "y"}])
    held_out = write(tmp_path / "test.jsonl", [*pairs(1), *pairs(2, "tram")])
    assert cli.main(["data", file, broken, "--eval_dataset_name", held_out, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["sets"]["train"]["rows"] == 7
    assert [one["rows"] for one in found["files"]] == [4, 3]
    assert found["files"][1]["unusable"]["identical_completions"]["first"] == [2]  # of this file
    leak = found["leaks"]["eval"]
    assert (leak["rows"], leak["of"], leak["first"]) == (1, 3, [[0, 0]])
    assert leak["near_prompts"]["rows"] == 0 and leak["near_rows"]["first"] == [[0, 0]]
    assert leak["near_rows"]["texts"] == [["(the same words)"] * 2]


def test_the_config_of_a_run_works_as_it_is(tmp_path: Path, file: str, capsys: pytest.CaptureFixture) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model_name_or_path: {model_path()}\ndataset_name: {file}\noutput_dir: out\nbeta: 0.2\nlora_r: 8\n"
        "max_length: 64\nloss_type: [sigmoid]\neval_strategy: 'no'\nreport_to: none\nuse_cpu: true\n"
    )
    assert cli.main(["data", "--config", str(config), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sets"]["train"]["tokens"]["max_length"] == 64
    config.write_text(config.read_text() + "betta: 1\n")
    assert cli.main(["data", "--config", str(config)]) == 2
    assert "'beta'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "dataset_name"),
        (["nowhere.jsonl"], "no such file"),
        (["FILE", "--beta", "0.2"], "beta has no effect on `dpo-peft data`"),
        (["FILE", "--rowz", "2"], "Did you mean 'rows'"),
        (["FILE", "--rows", "-1"], "0 or more"),
        (["FILE", "--loss_type", "sigmod"], "loss_type"),
        (["FILE", "--loss_type", "kto", "--column_map", "chosen:completion"], "label"),
    ],
)
def test_what_it_refuses(file: str, capsys: pytest.CaptureFixture, words: list[str], message: str) -> None:
    assert cli.main(["data", *[file if word == "FILE" else word for word in words]]) == 2
    assert message in capsys.readouterr().err


def test_rows_of_other_kinds_say_what_they_need(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    singles = [{"prompt": "p", "completion": text, "label": bool(n)} for n, text in enumerate(("good", "bad"))]
    assert cli.main(["data", write(tmp_path / "singles.jsonl", singles)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "2 usable: singles" in shown and "(loss_type 'kto' or 'apo_zero_unpaired')" in shown


def test_colors(file: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    codes = {}
    for choice, no_color in (("auto", ""), ("auto", "1"), ("never", ""), ("always", "1")):
        monkeypatch.setenv("NO_COLOR", no_color)
        cli.main(["data", file, "--color", choice])
        codes[choice, no_color] = "\x1b[32m" in capsys.readouterr().out
    assert codes == {("auto", ""): True, ("auto", "1"): False, ("never", ""): False, ("always", "1"): True}


@pytest.mark.attack("hostile text")
def test_rows_and_names_cannot_write_to_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = [{**row, "chosen": "\x1b[2Jgone\x07", "evil\x1b[31m": 1} for row in pairs(2)]
    assert cli.main(["data", write(tmp_path / "a\x1b[31m.jsonl", rows)]) == 0
    shown = capsys.readouterr().out
    assert "\\x1b[2Jgone\\x07" in shown and not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f]", shown)


def test_training_shows_its_first_row_in_twelve_lines() -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    rows = [{"prompt": "\n".join("abcdefgh"), "chosen": "\n".join("ijklmnop"), "rejected": "\n".join("qrstuvwx")}]
    prepared, _ = prepare_dataset(Dataset.from_list(rows), tokenizer)
    trainer: Any = SimpleNamespace(train_dataset=prepared, tokenizer=tokenizer, images=None)
    lines = first_row(trainer).splitlines()
    assert len(lines) == 12 and [line.split()[0] for line in lines[::4]] == ["prompt", "chosen", "rejected"]


def test_folds_say_how_hard_each_row_is(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = [json.loads(line) for line in Path(train_file()).read_text().splitlines()[:24]]
    file, out = write(tmp_path / "pairs.jsonl", rows), tmp_path / "audit"
    given = {"cross_fit": 2, "cross_fit_repeats": 1, "keep_easiest": 0.5, "output_dir": out, "max_steps": 2}
    given |= {"model_name_or_path": model_path(), "learning_rate": 1e-3, "dtype": "float32", "bf16": False}
    given |= {"ref_cache_dir": tmp_path / "store", "gradient_checkpointing": False, "use_cpu": True}
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    assert cli.main(["data", file, *words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    lines = [json.loads(line) for line in (out / "difficulty.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == list(range(24)) and found["labels"]["rows"] == 24
    hardest = sorted(lines, key=lambda line: line["margin"])
    wrong = [line["row"] for line in hardest if line["mislabelled"]]
    assert found["labels"]["mislabelled"] == {"rows": len(wrong), "first": wrong[:5]}
    assert any(f"{len(wrong)} labels are probably wrong" in line for line in found["to_do"]) == bool(wrong)
    assert [one["row"] for one in found["labels"]["texts"]] == wrong[:5]
    agreeing = sum(line["margin"] > 0 for line in lines)
    assert found["labels"]["accuracy"]["value"] == agreeing / 24
    chance = wilson(agreeing / 24, 12).low <= 0.5
    assert found["labels"]["chance"] == chance == any("that may be chance" in line for line in found["to_do"])
    assert (found["labels"]["kept"], found["labels"]["dropped"]) == (12, 12) and not (chance and wrong)
    kept = [json.loads(line) for line in (out / "easiest.jsonl").read_text().splitlines()]
    assert kept == [rows[n] for n in sorted(line["row"] for line in hardest[12:])]
    assert cli.main(["data", file, *words]) == 2
    assert "holds difficulty.jsonl, easiest.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--cross_fit", "1"], "2 or more"),
        (["--cross_fit", "2", "--keep_easiest", "60"], "above 0 and below 1"),
        (["--cross_fit", "2"], "model_name_or_path is missing"),
        (["--cross_fit", "2", "--loss_type", "kto", "--model_name_or_path", "M", "--output_dir", "O"], "for pairs"),
        (["--keep_easiest", "0.6"], "cross_fit"),
    ],
)
def test_what_folds_refuse(file: str, capsys: pytest.CaptureFixture, words: list[str], message: str) -> None:
    assert cli.main(["data", file, *words]) == 2
    assert message in capsys.readouterr().err
