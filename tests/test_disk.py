"""One writer at a time, by real processes; files that are whole or not there; adapters whose files belong together."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from paths import REPO

from dpo_peft.cli import main
from dpo_peft.disk import one_writer, part_of, write_atomically
from dpo_peft.errors import OptionError
from dpo_peft.files import check_output
from dpo_peft.manifests import MANIFEST, check_one_run, problem_with, seal, whole_result
from dpo_peft.merge.merging import _unfinished as unfinished_merge

HOLD = """import sys
from dpo_peft.disk import one_writer
with one_writer("output", sys.argv[1], inside=True):
    print("in", flush=True)
    input()
"""


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that writes to `tmp_path / "run"`, as a folder of its own."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")],
        env={**os.environ, "PYTHONPATH": str(REPO)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "in\n"
    yield process
    process.kill()
    process.wait()


@pytest.mark.attack("two writers")
def test_a_second_process_is_refused_by_name_and_a_dead_one_is_not(other, tmp_path: Path, caplog) -> None:
    who = rf"output='.*run': process {other.pid} on {socket.gethostname()} \(since 20.*\) is writing there"
    with pytest.raises(OptionError, match=who), one_writer("output", tmp_path / "run", inside=True):
        pass
    os.symlink(tmp_path / "run", tmp_path / "link")  # the same folder by another name
    with pytest.raises(OptionError, match=who.replace("run'", "link'")):
        one_writer("output", tmp_path / "link", inside=True).__enter__()
    other.send_signal(signal.SIGKILL)
    other.wait()
    caplog.set_level("INFO")
    with one_writer("output", tmp_path / "run", inside=True):
        assert f"process {other.pid}" in caplog.text and "is gone. Its place is taken over" in caplog.text
        with one_writer("output", tmp_path / "link", inside=True):  # the same process again
            pass
        child = os.fork()
        if not child:  # a fork is another process
            try:
                one_writer("output", tmp_path / "run", inside=True).__enter__()
            except OptionError:
                os._exit(7)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert os.listdir(tmp_path / "run") == []


@pytest.mark.attack("read-only folder")
def test_what_can_not_be_written_to_is_said_and_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file" / "pairs.jsonl", tmp_path / "file"):
        with pytest.raises(OptionError, match="can't be written to: .* Give another place"):
            one_writer("output", place, inside=True).__enter__()
    with one_writer("output", tmp_path / "new" / "pairs.jsonl"):
        assert (tmp_path / "new").is_dir()
    assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "mine"


@pytest.mark.attack("links")
def test_a_file_is_not_written_through_a_link_and_leaves_no_half(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    part_of(tmp_path / "scores.jsonl").symlink_to(tmp_path / "precious")
    write_atomically(tmp_path / "scores.jsonl", "scores")
    assert (tmp_path / "precious").read_text() == "mine" and not (tmp_path / "scores.jsonl").is_symlink()

    def broken() -> Iterator[str]:
        yield "half"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "scores.jsonl", broken())
    assert (tmp_path / "scores.jsonl").read_text() == "scores"
    assert sorted(os.listdir(tmp_path)) == ["precious", "scores.jsonl"]


@pytest.mark.attack("input as output")
@pytest.mark.parametrize("name", ["rows.jsonl", "row?.jsonl", ".", "link.jsonl"])
def test_an_input_is_never_written_over(tmp_path: Path, monkeypatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "rows.jsonl")
    with pytest.raises(OptionError, match="is what is read"):
        check_output("output", tmp_path / "rows.jsonl", [name])
    with pytest.raises(OptionError, match="is there already"):
        check_output("output", tmp_path / "rows.jsonl", ["org/rows"], overwrite=False)
    assert check_output("output", tmp_path / "rows.jsonl", ["org/rows"]) == tmp_path / "rows.jsonl"


# ---- Files that belong together -------------------------------------------------------------------------------------

FILES = {"adapter_model.safetensors": "weights", "tokenizer.json": "{}", "README.md": "card", "metrics.json": "{}"}
SETTINGS = {"r": 8, "lora_alpha": 16, "base_model_name_or_path": "/a/base", "revision": None}


@pytest.fixture
def result(tmp_path: Path) -> Path:
    with whole_result(tmp_path / "run") as staged:
        assert staged.name == "run"  # the card is titled by it
        for name, text in {**FILES, "adapter_config.json": json.dumps(SETTINGS)}.items():
            (staged / name).write_text(text)
    return tmp_path / "run"


@pytest.mark.attack("damaged or mixed files")
def test_what_belongs_together_is_told_from_what_may_be_edited(result: Path, tmp_path: Path) -> None:
    (result / "README.md").write_text("my card")
    (result / "metrics.json").unlink()
    moved = json.dumps({**SETTINGS, "base_model_name_or_path": "me/base", "revision": "main"}, indent=1)
    (result / "adapter_config.json").write_text(moved)
    check_one_run(result)
    shutil.copytree(result, tmp_path / "checkpoint-3")
    assert "the result of a run" in str(problem_with(tmp_path / "checkpoint-3"))  # nothing to resume
    for name, text in {
        "adapter_model.safetensors": "others_",
        "adapter_config.json": json.dumps({**SETTINGS, "lora_alpha": 32}),
        "tokenizer.json": "[]",
    }.items():
        before = (result / name).read_text()
        (result / name).write_text(text)
        with pytest.raises(OptionError, match=f"{name} was changed .* two runs.* delete its manifest.json"):
            check_one_run(result)
        (result / name).write_text(before)
    (result / "adapter_model.safetensors").unlink()
    with pytest.raises(OptionError, match="is missing"):
        check_one_run(result)
    (result / MANIFEST).unlink()
    check_one_run(result)  # another program's
    check_one_run("org/adapter")


@pytest.mark.attack("damaged or mixed files")
def test_an_adapter_in_a_checkpoint_or_under_a_name(result: Path, tmp_path: Path) -> None:
    checkpoint = result / "checkpoint-7"
    shutil.copytree(result, checkpoint, ignore=shutil.ignore_patterns(MANIFEST, "checkpoint-7"))
    (checkpoint / "optimizer.pt").write_text("state")
    seal(checkpoint, 7)
    (checkpoint / "optimizer.pt").unlink()  # not needed for the adapter
    check_one_run(checkpoint)
    (checkpoint / "adapter_model.safetensors").write_text("others")
    with pytest.raises(OptionError, match="adapter_model.safetensors has 6 of 7 bytes"):
        check_one_run(checkpoint)
    with whole_result(tmp_path / "named") as staged:
        (staged / "policy").mkdir()
        (staged / "policy" / "adapter_config.json").write_text("{}")
    check_one_run(tmp_path / "named" / "policy")
    (tmp_path / "named" / "policy" / "adapter_config.json").write_text('{"r": 1}')
    with pytest.raises(OptionError, match="policy/adapter_config.json was changed"):
        check_one_run(tmp_path / "named" / "policy")


@pytest.mark.attack("full disk")
def test_a_result_that_fails_changes_nothing(result: Path) -> None:
    before = {path: path.read_bytes() for path in result.iterdir()}
    with pytest.raises(OSError, match="No space"), whole_result(result) as staged:
        (staged / "adapter_model.safetensors").write_text("new")
        raise OSError(28, "No space left on device")
    assert {path: path.read_bytes() for path in result.iterdir()} == before


# ---- Commands -------------------------------------------------------------------------------------------------------


@pytest.mark.attack("two writers")
def test_a_second_training_is_refused_before_anything_is_read(other, tmp_path: Path, capsys) -> None:
    words = ["--model_name_or_path", "no model", "--dataset_name", "no rows.jsonl", "--use_cpu", "true"]
    assert main(["train", "--output_dir", str(tmp_path / "run"), *words]) == 2
    assert f"process {other.pid}" in capsys.readouterr().err


@pytest.mark.attack("input as output")
@pytest.mark.parametrize(
    "words",
    [
        "score ADAPTER --dataset_name rows.jsonl --output rows.jsonl --overwrite",
        "score ADAPTER --dataset_name others.jsonl --output rows.jsonl",
        "pairs --prompts rows.jsonl --score_column scores --output rows.jsonl --overwrite",
        "pairs --prompts rows.jsonl --score_column scores --output new.jsonl --lists_output rows.jsonl --overwrite",
        "report . --output page.html",
        "train --model_name_or_path MODEL --dataset_name rows.jsonl --use_cpu true --output_dir .",
        "merge ADAPTER --output_dir .",
    ],
)
def test_no_command_writes_over_its_input_or_over_others_files(tmp_path: Path, monkeypatch, capsys, words) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("rows.jsonl", "page.html", "README.md"):
        (tmp_path / name).write_text('{"prompt": "a", "completions": ["b", "c"], "scores": [1.0, 2.0]}\n')
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert main(words.split()) == 2
    said = capsys.readouterr().err
    assert any(part in said for part in ("is what is read", "is there already", "no report", "README", "not an empty"))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.attack("killed while writing")
def test_sigterm_takes_half_written_things_away(tmp_path: Path, monkeypatch, capsys) -> None:
    """And what a kill left of a merge goes at the next one's start."""
    left = tmp_path / ".merged.unfinished" / "merged"
    left.mkdir(parents=True)

    def report(argv: list[str]) -> None:
        with unfinished_merge(tmp_path / "merged") as folder:
            assert os.listdir(left) == []
            (folder / "model.safetensors").write_text("half")
            os.kill(os.getpid(), signal.SIGTERM)
            pytest.fail("the signal was ignored")

    left.joinpath("model.safetensors").write_text("of a killed one")
    monkeypatch.setattr("dpo_peft.cli.report.report", report)
    with pytest.raises(SystemExit) as ended:
        main(["report"])
    assert ended.value.code == 143 and os.listdir(tmp_path) == []
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.attack("full disk")
@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied", "s.jsonl"), OSError(28, "No space left")])
def test_an_error_of_the_system_is_one_sentence(monkeypatch, capsys, error: OSError) -> None:
    def report(argv: list[str]) -> None:
        raise error

    monkeypatch.setattr("dpo_peft.cli.report.report", report)
    assert main(["report"]) == 3
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(error) in said and "Traceback" not in said


@pytest.mark.attack("hostile config")
def test_a_config_that_is_not_utf_8(tmp_path: Path, capsys) -> None:
    (tmp_path / "c.yaml").write_bytes("title: é".encode("latin-1"))
    assert main(["report", "--config", str(tmp_path / "c.yaml")]) == 2
    assert "c.yaml is not valid YAML: 'utf-8' codec" in capsys.readouterr().err
