"""Checkpoints are whole or not there: after a kill at any moment, whichever file is damaged, however many are rotated.

What a checkpoint should hold is known without its manifest: every byte of it follows from its generation's number.
"""

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoint_kills
import pytest
from checkpoint_kills import NAMES, content, generation_in, save, save_in_place, survivor, write
from paths import REPO

from dpo_peft import manifests
from dpo_peft.errors import CheckpointError
from dpo_peft.training import checkpoints
from dpo_peft.training.checkpoints import (
    MANIFEST,
    commit,
    discard,
    newest_whole,
    problem_with,
    recover,
    rotate,
    staging_folder,
)

NO_MANIFEST = "has no manifest: it was not written to its end, or by another program"


# ---- Whole ones -----------------------------------------------------------------------------------------------------


def test_a_committed_checkpoint_holds_what_was_staged(tmp_path: Path) -> None:
    staging = staging_folder(tmp_path, 7)
    assert staging == tmp_path / ".saving-7" and list(staging.iterdir()) == []
    write(staging / "checkpoint-7", 1)
    assert newest_whole(tmp_path) == (None, [])  # not before it is committed

    assert commit(tmp_path, 7) == tmp_path / "checkpoint-7"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-7"]
    assert problem_with(tmp_path / "checkpoint-7") is None
    assert generation_in(tmp_path / "checkpoint-7") == 1
    manifest = json.loads((tmp_path / "checkpoint-7" / MANIFEST).read_text())
    assert manifest["step"] == 7
    assert {name: file["bytes"] for name, file in manifest["files"].items()} == {
        name: len(content(1, name)) for name in NAMES
    }


def test_committing_replaces_a_checkpoint_whole_or_not(tmp_path: Path) -> None:
    for generation in (1, 2):
        save(tmp_path, 7, generation)
        assert generation_in(tmp_path / "checkpoint-7") == generation
    (tmp_path / "checkpoint-7" / MANIFEST).unlink()
    (tmp_path / "checkpoint-7" / "left over").write_text("from the old one")
    save(tmp_path, 7, 3)
    assert generation_in(tmp_path / "checkpoint-7") == 3
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-7"]


def test_staging_again_starts_empty(tmp_path: Path) -> None:
    write(staging_folder(tmp_path, 7) / "checkpoint-7", 1)
    (tmp_path / ".saving-7" / "checkpoint-7" / "rng_state.pth").write_bytes(b"of the attempt that failed")
    save(tmp_path, 7, 2)
    assert generation_in(tmp_path / "checkpoint-7") == 2


@pytest.mark.parametrize("empty_folder", [False, True])
def test_committing_nothing_is_an_error(tmp_path: Path, empty_folder: bool) -> None:
    save(tmp_path, 7, 1)
    if empty_folder:
        (staging_folder(tmp_path, 7) / "checkpoint-7").mkdir()
    with pytest.raises(CheckpointError, match=r"\.saving-7/checkpoint-7 has no files"):
        commit(tmp_path, 7)
    assert generation_in(tmp_path / "checkpoint-7") == 1


def test_discard_leaves_the_committed_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    save(tmp_path, 7, 1)
    write(staging_folder(tmp_path, 7) / "checkpoint-7", 2)
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", failing(lambda path: True))
        discard(tmp_path, 7)
    assert ".saving-7 can't be deleted and is left over" in caplog.text
    discard(tmp_path, 7)
    discard(tmp_path, 7)  # nothing there
    discard(tmp_path / "no such run", 7)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-7"]
    assert generation_in(tmp_path / "checkpoint-7") == 1


def failing(when: Callable[[Path], bool]) -> Callable[..., None]:
    """An `os.rename` of a disk that fails for some paths."""
    rename = os.rename

    def wrapped(source: Path, target: Path) -> None:
        if when(Path(source)):
            raise OSError(28, "No space left on device")
        rename(source, target)

    return wrapped


@pytest.mark.attack("full disk")
def test_a_disk_error_propagates_and_keeps_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 7, 1)
    write(staging_folder(tmp_path, 7) / "checkpoint-7", 2)
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", failing(lambda path: path.parent.name == ".saving-7"))
        with pytest.raises(OSError, match="No space left"):
            commit(tmp_path, 7)
    assert generation_in(tmp_path / "checkpoint-7") == 1
    discard(tmp_path, 7)
    assert survivor(tmp_path) == 1


def test_all_is_on_the_disk_before_the_checkpoint_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order that a power cut asks for: bytes and names of everything below, then the rename, then its folder."""
    save(tmp_path, 7, 1)
    write(staging_folder(tmp_path, 7) / "checkpoint-7", 2)
    synced: list[int] = []
    at_rename: dict[str, set[int]] = {}
    fsync, rename = os.fsync, os.rename

    def note_sync(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def note_rename(source: Path, target: Path) -> None:
        at_rename[Path(target).name] = set(synced)
        synced.clear()
        rename(source, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "rename", note_rename)
    committed = commit(tmp_path, 7)
    inodes = {path.stat().st_ino for path in [committed, *committed.rglob("*"), tmp_path]}
    assert len(inodes) == len(NAMES) + 4  # the manifest, two folders, the run's folder
    assert list(at_rename) == [".replaced-7", "checkpoint-7"]
    assert at_rename[".replaced-7"] >= inodes  # the old one is not touched before the new one is safe
    assert tmp_path.stat().st_ino in synced


# ---- Damaged ones ---------------------------------------------------------------------------------------------------


def files_of(folder: Path) -> list[str]:
    return [*NAMES, MANIFEST] if (folder / MANIFEST).exists() else NAMES


@pytest.mark.attack("damaged or mixed files")
def test_every_flipped_bit_is_found_in_its_file(tmp_path: Path) -> None:
    folder, draw = save(tmp_path, 7, 1), random.Random(0)
    for name in files_of(folder):
        whole = (folder / name).read_bytes()
        places = {0, len(whole) - 1} | {draw.randrange(len(whole)) for _ in range(60)}
        for at in places:
            flipped = bytearray(whole)
            flipped[at] ^= 1 << draw.randrange(8)
            (folder / name).write_bytes(flipped)
            problem = problem_with(folder)
            assert problem is not None and name in problem, (name, at, problem)
            if name != MANIFEST:
                assert problem == f"is damaged: {name} was changed (its digest differs)"
                assert problem_with(folder, hashed=False) is None  # the sizes alone don't tell
        (folder / name).write_bytes(whole)
    assert problem_with(folder) is None


@pytest.mark.attack("damaged or mixed files")
def test_every_cut_file_is_found(tmp_path: Path) -> None:
    folder = save(tmp_path, 7, 1)
    for name in files_of(folder):
        whole = (folder / name).read_bytes()
        for length in range(0, len(whole), 97):
            (folder / name).write_bytes(whole[:length])
            problem = problem_with(folder)
            if name == MANIFEST:
                assert problem is not None and MANIFEST in problem
            else:
                assert problem == f"is damaged: {name} has {length} of {len(whole)} bytes"
        (folder / name).write_bytes(whole)


@pytest.mark.attack("damaged or mixed files")
def test_every_missing_file_is_found(tmp_path: Path) -> None:
    folder = save(tmp_path, 7, 1)
    for name in files_of(folder):
        whole = (folder / name).read_bytes()
        (folder / name).unlink()
        assert problem_with(folder) == (NO_MANIFEST if name == MANIFEST else f"is damaged: {name} is missing")
        (folder / name).mkdir()  # neither is a folder of that name the file
        assert name in str(problem_with(folder))
        (folder / name).rmdir()
        (folder / name).write_bytes(whole)
    shutil.rmtree(folder / "reference")
    assert problem_with(folder) == f"is damaged: {NAMES[3]} is missing"


@pytest.mark.attack("damaged or mixed files")
@pytest.mark.parametrize(
    "text", ["", "{", "[]", "7", '{"format": 1}', '{"format": 1, "step": 7, "files": 3}', "\0" * 9]
)
def test_an_unreadable_manifest_is_named(tmp_path: Path, text: str) -> None:
    folder = save(tmp_path, 7, 1)
    (folder / MANIFEST).write_text(text)
    assert str(problem_with(folder)).startswith("is damaged: manifest.json ")


def test_other_reasons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(tmp_path, 7, 1)
    assert problem_with(tmp_path / "checkpoint-8") == "does not exist"
    assert problem_with(folder / NAMES[0]) == "is not a folder"
    shutil.copytree(folder, tmp_path / "checkpoint-8")
    assert problem_with(tmp_path / "checkpoint-8") == "is not what its name says: it was written as checkpoint-7"
    shutil.copytree(folder, tmp_path / "best")  # any other name may be given to a copy
    (tmp_path / "best" / "notes.txt").write_text("a file of the user's")
    assert problem_with(str(tmp_path / "best")) is None
    monkeypatch.setattr(manifests, "FORMAT", 2)
    assert problem_with(folder) == ("has a manifest.json of format 1, and this version of the package reads format 2")


@pytest.mark.attack("damaged or mixed files")
def test_newest_whole_passes_over_the_broken_ones_by_step(tmp_path: Path) -> None:
    assert newest_whole(tmp_path) == newest_whole(tmp_path / "no such run") == (None, [])
    for step in (9, 10, 100, 20):  # not in the order of their names
        save(tmp_path, step, step)
    (tmp_path / "checkpoint-200").write_text("a file")
    (tmp_path / "checkpoint-best").mkdir()
    assert newest_whole(tmp_path) == (tmp_path / "checkpoint-100", [])
    (tmp_path / "checkpoint-100" / NAMES[1]).unlink()
    (tmp_path / "checkpoint-20" / MANIFEST).unlink()
    newest, passed_over = newest_whole(tmp_path)
    assert newest == tmp_path / "checkpoint-10"
    assert passed_over == [
        (tmp_path / "checkpoint-100", f"is damaged: {NAMES[1]} is missing"),
        (tmp_path / "checkpoint-20", NO_MANIFEST),
    ]


# ---- Rotation -------------------------------------------------------------------------------------------------------


def steps_in(run_dir: Path) -> list[int]:
    assert all(path.name.startswith("checkpoint-") for path in run_dir.iterdir())
    return sorted(int(path.name.split("-")[1]) for path in run_dir.iterdir())


def flip(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))


@pytest.mark.parametrize(
    ("limit", "keep", "left"),
    [
        (None, [], [5, 9, 10, 11]),
        (0, [], [5, 9, 10, 11]),
        (-1, [], [5, 9, 10, 11]),
        (9, [], [5, 9, 10, 11]),
        (2, [], [10, 11]),
        (1, [], [11]),
        (2, [5], [5, 11]),  # the kept ones count
        (1, [9], [9, 11]),  # but stay beyond the limit, as the newest does
    ],
)
def test_rotation_deletes_the_oldest(tmp_path: Path, limit: int | None, keep: list[int], left: list[int]) -> None:
    for step in (9, 5, 11, 10):
        save(tmp_path, step, step)
    # Another way to write a kept path is the same path.
    link = tmp_path.with_name(f"{tmp_path.name}-link")
    link.symlink_to(tmp_path)
    deleted = rotate(link, limit, [tmp_path / "checkpoint-9" / ".." / f"checkpoint-{step}" for step in keep])
    assert steps_in(tmp_path) == left
    assert deleted == [link / f"checkpoint-{step}" for step in (5, 9, 10, 11) if step not in left]


@pytest.mark.attack("input as output")
def test_rotation_never_deletes_the_newest_whole_one(tmp_path: Path, caplog) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step, step)
    for step in (3, 4):
        flip(tmp_path / f"checkpoint-{step}" / NAMES[0])
    rotate(tmp_path, 1, keep=[tmp_path / "checkpoint-4"])
    assert steps_in(tmp_path) == [2, 4]
    assert newest_whole(tmp_path)[0] == tmp_path / "checkpoint-2"
    assert "checkpoint-3 is deleted: it " in caplog.text and "checkpoint-1 is deleted" not in caplog.text


@pytest.mark.attack("input as output")
def test_rotation_leaves_other_programs_checkpoints_alone(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step, step)
    for step in (1, 4):
        (tmp_path / f"checkpoint-{step}" / MANIFEST).unlink()
    assert rotate(tmp_path, 1) == [tmp_path / "checkpoint-2"]
    assert steps_in(tmp_path) == [1, 3, 4]


def test_broken_ones_go_first_and_do_not_count(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step, step)
    os.truncate(tmp_path / "checkpoint-2" / NAMES[1], 10)
    assert rotate(tmp_path, 3) == [tmp_path / "checkpoint-2"]
    assert steps_in(tmp_path) == [1, 3, 4]


def test_rotation_deletes_nothing_where_none_is_whole(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        flip(save(tmp_path, step, step) / NAMES[2])
    assert rotate(tmp_path, 1) == []
    assert steps_in(tmp_path) == [1, 2, 3]


def test_what_can_not_be_deleted_does_not_stop_a_run(tmp_path: Path, monkeypatch, caplog) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, step)
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", failing(lambda path: path.name == "checkpoint-1"))
        assert rotate(tmp_path, 1) == [tmp_path / "checkpoint-2"]
    assert "checkpoint-1 can't be deleted: [Errno 28]" in caplog.text

    def broken(path: Path) -> None:
        raise OSError(39, "Directory not empty")  # a network file system, while a file is still open somewhere

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", broken)
        assert rotate(tmp_path, 1) == [tmp_path / "checkpoint-1"]
    assert ".deleting-0 can't be deleted and is left over" in caplog.text
    assert recover(tmp_path) == ["A checkpoint had been deleted in part: the rest is deleted too."]
    assert steps_in(tmp_path) == [3]


# ---- Recovery -------------------------------------------------------------------------------------------------------


def test_recovery_says_what_it_did(tmp_path: Path) -> None:
    assert recover(tmp_path) == recover(tmp_path / "no such run") == []
    for step in (1, 2, 3):
        save(tmp_path, step, step)
    # 1 was replaced and the old one not deleted yet; 2 moved aside and its replacement damaged since; 3 is untouched;
    # 4 was being written; 5 was sealed; a deletion was cut off.
    shutil.copytree(tmp_path / "checkpoint-3", tmp_path / ".replaced-1")
    (tmp_path / "checkpoint-2").rename(tmp_path / ".replaced-2")
    for step, sealed in ((2, True), (4, False), (5, True)):
        staged = staging_folder(tmp_path, step) / f"checkpoint-{step}"
        write(staged, 10 * step)
        if sealed:
            checkpoints.seal(staged, step)
    flip(tmp_path / ".saving-2" / "checkpoint-2" / NAMES[0])
    (tmp_path / ".deleting-0").mkdir()
    (tmp_path / ".saving-x").mkdir()  # not ours
    said = recover(tmp_path)
    assert said == [
        "An attempt to save checkpoint-2 had been cut off: what it left is deleted.",
        "An attempt to save checkpoint-4 had been cut off: what it left is deleted.",
        "checkpoint-5 was written to its end, but had not got its place yet: it has now.",
        "A new checkpoint-1 had taken the place of an old one: the old one is deleted.",
        "The new checkpoint-2 is not there or not whole: the old one is back in its place.",
        "A checkpoint had been deleted in part: the rest is deleted too.",
    ]
    (tmp_path / ".saving-x").rmdir()
    assert steps_in(tmp_path) == [1, 2, 3, 5]
    assert [generation_in(tmp_path / f"checkpoint-{step}") for step in (1, 2, 3, 5)] == [1, 2, 3, 50]


def test_the_old_one_comes_back_for_a_damaged_replacement(tmp_path: Path) -> None:
    save(tmp_path, 7, 1).rename(tmp_path / ".replaced-7")
    flip(save_in_place(tmp_path, 7, 2) / NAMES[0])
    assert survivor(tmp_path) == 1


@pytest.mark.attack("killed while writing")
@pytest.mark.parametrize("damaged", ["checkpoint-7", ".replaced-7"])
def test_committing_over_an_unrecovered_kill_keeps_a_whole_one_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: str
) -> None:
    """Both the place and the one moved aside are taken, one of them is damaged, and the next rename is the last."""
    save(tmp_path, 7, 1).rename(tmp_path / ".replaced-7")
    save_in_place(tmp_path, 7, 2)
    flip(tmp_path / damaged / NAMES[0])
    write(staging_folder(tmp_path, 7) / "checkpoint-7", 3)
    monkeypatch.setattr(os, "rename", failing(lambda path: path.parent.name == ".saving-7"))
    with pytest.raises(OSError, match="No space left"):
        commit(tmp_path, 7)
    discard(tmp_path, 7)
    assert survivor(tmp_path) == (1 if damaged == "checkpoint-7" else 2)


# ---- Kills ----------------------------------------------------------------------------------------------------------


def killed(experiment: str, *arguments: object) -> Any:
    """Run an experiment of `checkpoint_kills` in a process of its own; its result."""
    command = [sys.executable, checkpoint_kills.__file__, experiment, *map(str, arguments)]
    path = os.pathsep.join(filter(None, [str(REPO), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.attack("killed while writing")
def test_a_kill_before_any_file_operation_loses_nothing(tmp_path: Path) -> None:
    found = killed("sweep", tmp_path, "save")
    assert found["moments"] > 100
    assert found["losses"] == []
    # The sweep met every state that recovery is there for.
    assert {
        "checkpoint-7",
        ".saving-7 checkpoint-7",
        ".replaced-7 .saving-7",
        ".replaced-7 .saving-7 checkpoint-7",
        ".saving-8 checkpoint-7",
        "checkpoint-7 checkpoint-8",
        ".deleting-0 checkpoint-8",
        "checkpoint-8",
    } <= set(found["states"])


@pytest.mark.parametrize("writer", ["save_in_place", "save_after_deleting"])
def test_the_sweep_finds_a_naive_writer(tmp_path: Path, writer: str) -> None:
    assert len(killed("sweep", tmp_path, writer)["losses"]) >= 3


@pytest.mark.attack("killed while writing")
def test_a_kill_during_recovery_loses_nothing(tmp_path: Path) -> None:
    found = killed("sweep_recovery", tmp_path)
    assert found["starts"] > 15 and found["moments"] > 100
    assert found["losses"] == []


@pytest.mark.attack("killed while writing")
def test_a_kill_at_any_file_operation_of_the_final_save_leaves_one_run(tmp_path: Path) -> None:
    """And a second kill at any one of what brings it to an end: old or new, never both; nothing of the user's goes."""
    found = killed("sweep_result", tmp_path, "save_result", 4)
    assert found["starts"] > 50 and found["moments"] > 250
    assert found["losses"] == []


def test_the_sweep_finds_a_result_written_in_place(tmp_path: Path) -> None:
    assert len(killed("sweep_result", tmp_path, "save_result_in_place", 1)["losses"]) >= 3


@pytest.mark.attack("killed while writing")
@pytest.mark.slow
def test_a_kill_at_any_moment_loses_nothing(tmp_path: Path) -> None:
    found = killed("torture", tmp_path, "save", 300)
    assert found["losses"] == []
    assert found["unfinished"] >= 30  # the kills did land in saves
    assert found["generations"] >= 30  # and saves were made in between


def test_random_kills_find_a_naive_writer(tmp_path: Path) -> None:
    assert killed("torture", tmp_path, "save_in_place", 300)["losses"]
