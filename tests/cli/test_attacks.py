"""Every command under attack: killed before each of its file operations, without room, without rights, beside another
writer, on names that are made to do harm, and in a folder that was moved."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import command_attacks
import pytest
import yaml
from command_attacks import TRAIN, WORDS
from markdown_it import MarkdownIt
from paths import REPO
from report_helpers import make_run, read_page
from trainer_helpers import text_pairs

from dpo_peft.cli import main

GIVEN = [{"prompt": "a?", "completions": [" x", " y"], "rating": [1.0, 3.0]} for _ in range(3)]


def write(path: Path, rows: Any) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def made(base_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, rows, answers that have scores, and a finished run."""
    folder, patch = tmp_path_factory.mktemp("made") / "work", pytest.MonkeyPatch()
    shutil.copytree(base_folder, folder / "base")
    write(folder / "rows.jsonl", text_pairs(8))
    write(folder / "given.jsonl", GIVEN)
    patch.chdir(folder)
    try:
        assert main([*TRAIN, "--output_dir", "run", "--save_strategy", "steps", "--save_steps", "1"]) == 0
    finally:
        patch.undo()
    return folder


# ---- Every file operation -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def attacked(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`attacked(command)`: tries and what got through, by kind; each command is attacked once."""

    @cache
    def run(command: str, *more: str) -> dict[str, tuple[int, list[str]]]:
        scratch = tmp_path_factory.mktemp(command)
        folder = shutil.copytree(made, scratch / "work")
        (scratch / "tmp").mkdir()
        every = 1 if more else {"report": 3, "pairs": 3, "score": 3, "merge": 5, "train": 19}[command]
        done = subprocess.run(
            [sys.executable, command_attacks.__file__, str(folder), command, str(every), *more],
            env={**os.environ, "PYTHONPATH": str(REPO), "TMPDIR": str(scratch / "tmp")},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


every_command = pytest.mark.parametrize("command", WORDS)


@pytest.mark.attack("killed while writing")
@pytest.mark.slow
@pytest.mark.sampled(99, slow=4)
@every_command
def test_killed_before_any_file_operation(attacked: Any, command: str) -> None:
    tries, through = attacked(command)["killed"]
    assert tries > 5 and not through


@pytest.mark.attack("full disk")
@pytest.mark.slow
@pytest.mark.sampled(99, slow=2)
@every_command
def test_no_room_from_any_file_operation_on(attacked: Any, command: str) -> None:
    tries, through = attacked(command)["full"]
    assert tries > 5 and not through


@pytest.mark.attack("full disk")
@pytest.mark.slow
@every_command
def test_the_system_lets_no_file_grow(attacked: Any, command: str) -> None:
    assert attacked(command)["limit"] == [2, []]


@pytest.mark.attack("read-only folder")
@pytest.mark.slow
@every_command
def test_nothing_can_be_written(attacked: Any, command: str) -> None:
    assert attacked(command)["read-only"] == [1, []] and attacked(command)["straight"] == [1, []]


@pytest.mark.slow
def test_the_attacks_find_a_naive_writer(attacked: Any) -> None:
    found = attacked("report", "naive")
    assert "half" in str(found["killed"]) and "half" in str(found["full"])


# ---- Two writers ----------------------------------------------------------------------------------------------------

HOLD = """import sys
from dpo_peft.disk import one_writer
with one_writer("output", sys.argv[1], inside=sys.argv[2] == "train"):
    print("in", flush=True)
    input()
"""


@pytest.fixture
def held(request: Any, tmp_path: Path) -> Iterator[int]:
    """Another process that writes where the command is to write."""
    words = [sys.executable, "-c", HOLD, str(tmp_path / WORDS[request.param][1]), request.param]
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    with subprocess.Popen(words, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "in\n"
        yield other.pid
        other.kill()


@pytest.mark.attack("two writers")
@pytest.mark.parametrize(("held", "command"), [(name, name) for name in WORDS], indirect=["held"])
def test_a_second_command_is_refused_by_name(
    held: int, made: Path, tmp_path: Path, monkeypatch, capsys, command
) -> None:
    for name in ("rows.jsonl", "given.jsonl", "run", "base"):
        (tmp_path / name).symlink_to(made / name)
    monkeypatch.chdir(tmp_path)
    before = sorted(os.listdir(tmp_path))
    assert main(WORDS[command][0]) == 2
    assert f"process {held} on" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == before


# ---- Names ----------------------------------------------------------------------------------------------------------

NAMES = {
    "newline": "a\n---\nlicense: evil\n# b",
    "quotes": "a\"'`b\\",
    "markup": "<script>hacked = 1<!--<img src=x onerror=alert(1)>",
    "dash": "-rf",
    "emoji": "🦙\u202eé",
    "pattern": "a[1-3]*?{b,c}",
    "long": "x" * 200,
    "blanks": "  a  b ",
    "formats": "%s{0}{{ 7*7 }}$HOME",
    "yaml": "!!python object: [&a, *b]",
    "home": "~root",
    "not UTF-8": os.fsdecode(b"caf\xe9"),
    "control": "a\x1b[2J\x07",
}


@pytest.mark.sampled(4)
@pytest.mark.attack("hostile names")
@pytest.mark.parametrize("kind", NAMES)
def test_a_name_is_a_name(kind: str, tmp_path: Path, monkeypatch, capsys) -> None:
    """Rows that are read and written under it, and a report on a run that is called so."""
    name = NAMES[kind]
    monkeypatch.chdir(tmp_path)
    write(tmp_path / f"{name}.jsonl", GIVEN)
    words = [f"--prompts={name}.jsonl", f"--output={name}.out.jsonl", "--score_column=rating"]
    assert main(["pairs", *words]) == 0, capsys.readouterr().err
    rows = [json.loads(line) for line in (tmp_path / f"{name}.out.jsonl").read_text().splitlines()]
    assert [(row["chosen"], row["rejected"]) for row in rows] == [(" y", " x")] * len(GIVEN)
    make_run(tmp_path / name)
    assert main(["report", str(tmp_path / name)]) == 0, capsys.readouterr().err
    said = capsys.readouterr()
    assert not {"\x1b", "\x07"} & {*said.out, *said.err}  # a terminal would obey
    page = read_page(tmp_path / name / "report.html")
    assert len(page.all("script")) == 1 and not page.all("img")
    if kind not in ("not UTF-8", "control", "blanks"):
        assert page.one("h1").text == name
    assert sorted(os.listdir(tmp_path)) == sorted([name, f"{name}.jsonl", f"{name}.out.jsonl"])


@pytest.mark.attack("hostile names")
@pytest.mark.parametrize(
    "kinds",
    ["newline quotes markup", *(pytest.param(k, marks=pytest.mark.slow) for k in ("formats yaml", "pattern emoji"))],
)
def test_a_run_and_its_data_called_so(kinds: str, base_folder: str, tmp_path: Path, monkeypatch, capsys) -> None:
    """It is trained, its card holds no key that the name made up, and it is scored."""
    name = "".join(NAMES[kind] for kind in kinds.split())
    monkeypatch.chdir(tmp_path)
    write(tmp_path / f"{name}.jsonl", text_pairs(8))
    given = dict(zip(TRAIN[1::2], TRAIN[2::2], strict=True))
    given |= {"--model_name_or_path": base_folder, "--dataset_name": f"{name}.jsonl", "--output_dir": name}
    assert main(["train", *(f"{option}={value}" for option, value in given.items())]) == 0, capsys.readouterr().err
    card = (tmp_path / name / "README.md").read_text("utf-8")
    metadata = yaml.safe_load(card.split("---\n")[1])
    assert metadata["library_name"] == "peft" and "license" not in metadata
    shown = MarkdownIt().render(card.split("---\n", 2)[2])  # raw HTML stays as it is; the curves are an image
    assert "<script" not in shown and shown.count("<img") == 1 and "\n# b" not in card
    assert yaml.safe_load((tmp_path / name / "recipe.yaml").read_text("utf-8"))
    assert main(["score", f"--adapter={name}", f"--dataset_name={name}.jsonl", "--output=s.jsonl"]) == 0
    assert len((tmp_path / "s.jsonl").read_text().splitlines()) == 8


@pytest.mark.attack("hostile names")
@pytest.mark.parametrize("name", ["x" * 250 + ".jsonl", "a\0b.jsonl", "/dev/full/x.jsonl", "rows.jsonl/x.jsonl"])
def test_a_name_that_no_file_can_have(name: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "rows.jsonl", GIVEN)
    given = {"prompts": "rows.jsonl", "output": name, "score_column": "rating"}
    (tmp_path / "run.yaml").write_text(json.dumps(given))
    assert main(["pairs", "--config", "run.yaml"]) in (2, 3)
    said = capsys.readouterr().err
    assert "Traceback" not in said and "\0" not in said and sorted(os.listdir(tmp_path)) == ["rows.jsonl", "run.yaml"]


# ---- A moved folder -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def moved(base_folder: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """A base and a run on it, recorded by absolute paths; scores of the run; then all of it is moved."""
    first = tmp_path_factory.mktemp("moved") / "first"
    shutil.copytree(base_folder, first / "base")
    write(first / "rows.jsonl", text_pairs(8))
    assert main(training(first, "--max_steps=1")) == 0
    assert main(scoring(first, "before.jsonl")) == 0
    return first.rename(first.with_name("second")), (first.with_name("second") / "before.jsonl").read_bytes()


def training(folder: Path, *more: str) -> list[str]:
    given = dict(zip(TRAIN[1::2], TRAIN[2::2], strict=True))
    given |= {"--model_name_or_path": folder / "base", "--dataset_name": folder / "rows.jsonl"}
    given |= {"--output_dir": folder / "run", "--save_strategy": "steps", "--save_steps": "1"}
    given |= {"--lr_scheduler_type": "constant"}
    return ["train", *(f"{option}={value}" for option, value in given.items()), *more]


def scoring(folder: Path, output: str) -> list[str]:
    words = ["score", folder / "run", "--dataset_name", folder / "rows.jsonl", "--output", folder / output]
    return [str(word) for word in words]


@pytest.mark.attack("moved folder")
def test_a_moved_run_is_scored_as_before(moved: tuple[Path, bytes]) -> None:
    folder, before = moved
    assert main(scoring(folder, "after.jsonl")) == 0
    assert (folder / "after.jsonl").read_bytes() == before


@pytest.mark.attack("moved folder")
@pytest.mark.slow
def test_a_moved_run_is_merged(moved: tuple[Path, bytes], tmp_path: Path) -> None:
    assert main(["merge", str(moved[0] / "run"), "--output_dir", str(tmp_path / "merged"), "--max_drift", "9"]) == 0


@pytest.mark.attack("moved folder")
@pytest.mark.slow
def test_a_moved_run_is_resumed_as_a_straight_one(moved: tuple[Path, bytes]) -> None:
    folder = Path(shutil.copytree(moved[0], moved[0].with_name("third")))
    assert main(training(folder, "--max_steps=2", "--resume_from_checkpoint=latest")) == 0
    straight = Path(shutil.copytree(moved[0], moved[0].with_name("straight")))
    shutil.rmtree(straight / "run")
    assert main(training(straight, "--max_steps=2")) == 0
    weights = [path / "run" / "adapter_model.safetensors" for path in (folder, straight)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
