"""Checkpoint folders that are whole or not there, wherever the program is killed.

A checkpoint is written to `.saving-7/checkpoint-7`. Sealing it writes its manifest: every file with size and digest.
Only then does a rename give it its place, `checkpoint-7`. What it replaces waits as `.replaced-7` until that is done,
and what is to be deleted first becomes `.deleting-0`: a folder named `checkpoint-7` is never half written or half
deleted. `recover` brings what a kill has left to one of the two ends.

Everything is synced to the disk before it is relied on, so a power cut does no more harm than a kill. One process
writes a run's folder at a time. This module knows nothing of models or trainers. A disk that fails is an `OSError`.
"""

import errno
import hashlib
import itertools
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..errors import CheckpointError

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
FORMAT = 1  # of the manifest
Content = dict[str, int | str]  # a file's entry in the manifest: its bytes and their blake2b


# ---- Writing --------------------------------------------------------------------------------------------------------


def staging_folder(run_dir: str | Path, step: int) -> Path:
    """Makes a new, empty folder `.saving-<step>`; what an earlier attempt left there is deleted.

    A writer that takes it for its run folder writes `checkpoint-<step>` into it, as `commit` expects.
    """
    saving = Path(run_dir) / f".saving-{step}"
    _delete(saving)
    saving.mkdir(parents=True)
    return saving


def staged_checkpoint(run_dir: str | Path, step: int) -> Path:
    """Returns where a checkpoint is written until `commit` gives it its place."""
    return Path(run_dir) / f".saving-{step}" / f"checkpoint-{step}"


def commit(run_dir: str | Path, step: int) -> Path:
    """Seals the staged checkpoint and gives it its place. Returns its folder.

    One that it replaces is still there if the disk fails.

    Raises:
        CheckpointError: nothing is staged for this step.
    """
    staged = staged_checkpoint(run_dir, step)
    if not any(path.is_file() for path in staged.rglob("*")):
        raise CheckpointError(
            f"Nothing to commit: {staged} has no files. Write it into staging_folder(run_dir, {step}) first."
        )
    _seal(staged, step)
    return _install(Path(run_dir), step)


def discard(run_dir: str | Path, step: int) -> None:
    """Deletes the staged checkpoint after a failed attempt to write it. Trouble with that is logged, never raised."""
    saving = Path(run_dir) / f".saving-{step}"
    try:
        _delete(saving)
    except OSError as error:
        logger.warning("%s can't be deleted and is left over: %s", saving, error)


def _seal(staged: Path, step: int) -> None:
    """Writes the manifest, and brings everything to the disk: files first, then the folders that name them."""

    def fail(error: OSError) -> None:  # unlike a plain walk, which passes over what it can't read
        raise error

    walked = list(os.walk(staged, topdown=False, onerror=fail))
    paths = [Path(folder, name) for folder, _, names in walked for name in names]
    manifest = staged / MANIFEST  # there from an earlier attempt to commit it, perhaps
    files = {path.relative_to(staged).as_posix(): _content(path) for path in paths if path != manifest}
    for path in paths:
        _sync(path)
    manifest.write_bytes(_manifest(step, files))
    folders = [Path(folder) for folder, _, _ in walked]
    for path in (manifest, *folders, staged.parent, staged.parent.parent):
        _sync(path)


def _install(run_dir: Path, step: int) -> Path:
    """Moves a sealed checkpoint from the staging folder to its place."""
    staged, target = staged_checkpoint(run_dir, step), run_dir / f"checkpoint-{step}"
    aside = run_dir / f".replaced-{step}"
    if os.path.lexists(target):
        if os.path.lexists(aside):  # from a kill that nobody recovered: keep one that is whole
            _delete(aside if problem_with(target) is None else target)
        if os.path.lexists(target):
            os.rename(target, aside)
    try:
        os.rename(staged, target)
    except OSError:
        if os.path.lexists(aside):
            os.rename(aside, target)
        raise
    _sync(run_dir)
    _sync(staged.parent)
    for path in (aside, staged.parent):
        _remove(path)
    return target


# ---- After a kill ---------------------------------------------------------------------------------------------------


def recover(run_dir: str | Path) -> list[str]:
    """Brings what a killed process left in a run's folder to an end: call it before anything is read or written there.

    Returns:
        What was found and done, in sentences for the log; nothing if there was nothing to do.
    """
    run_dir, said = Path(run_dir), []
    for step, saving in _numbered(run_dir, ".saving"):
        if problem_with(staged_checkpoint(run_dir, step)) is None:
            _install(run_dir, step)
            said.append(f"checkpoint-{step} was written to its end, but had not got its place yet: it has now.")
        else:
            _delete(saving)
            said.append(f"An attempt to save checkpoint-{step} had been cut off: what it left is deleted.")
    for step, aside in _numbered(run_dir, ".replaced"):
        target = run_dir / f"checkpoint-{step}"
        if not os.path.lexists(target) or (problem_with(target) is not None and problem_with(aside) is None):
            _delete(target)
            os.rename(aside, target)
            said.append(f"The new checkpoint-{step} is not there or not whole: the old one is back in its place.")
        else:
            _remove(aside)
            said.append(f"A new checkpoint-{step} had taken the place of an old one: the old one is deleted.")
    for _, trash in _numbered(run_dir, ".deleting"):
        _remove(trash)
        said.append("A checkpoint had been deleted in part: the rest is deleted too.")
    if said:
        _sync(run_dir)
    return said


def newest_whole(run_dir: str | Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """Returns the whole checkpoint of the highest step, and the newer ones that aren't, each with its `problem_with`.

    Reads every byte of the checkpoints that it looks at.
    """
    passed_over: list[tuple[Path, str]] = []
    for path in reversed(_checkpoints(run_dir)):
        if (problem := problem_with(path)) is None:
            return path, passed_over
        passed_over.append((path, problem))
    return None, passed_over


def problem_with(folder: str | Path, hashed: bool = True) -> str | None:
    """Returns what keeps a checkpoint from being whole, as the rest of a sentence about it; None if it is whole.

    Args:
        folder: the checkpoint. Files that its manifest does not name are no problem.
        hashed: read every byte and compare digests; otherwise names and sizes only.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return "is not a folder" if os.path.lexists(folder) else "does not exist"
    try:
        written = (folder / MANIFEST).read_bytes()
        manifest = json.loads(written)
        version, step, files = manifest["format"], manifest["step"], manifest["files"]
    except FileNotFoundError:
        return "has no manifest: it was not written to its end, or by another program"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"is damaged: {MANIFEST} can't be read ({type(error).__name__}: {error})"
    if version != FORMAT:
        return f"has a {MANIFEST} of format {version}, and this version of the package reads format {FORMAT}"
    if written != _manifest(step, files):
        return f"is damaged: {MANIFEST} was changed (its seal differs)"
    if _step_of(folder, "checkpoint") not in (None, step):
        return f"is not what its name says: it was written as checkpoint-{step}"
    name = ""
    try:
        for name, content in files.items():  # all names and sizes before the first digest
            if not (folder / name).is_file():
                return f"is damaged: {name} is missing"
            if (size := (folder / name).stat().st_size) != content["bytes"]:
                return f"is damaged: {name} has {size} of {content['bytes']} bytes"
        for name, content in files.items() if hashed else ():
            if _content(folder / name) != content:
                return f"is damaged: {name} was changed (its digest differs)"
    except OSError as error:
        return f"is damaged: {name} can't be read ({error})"
    return None


# ---- Deleting -------------------------------------------------------------------------------------------------------


def rotate(run_dir: str | Path, limit: int | None, keep: Iterable[str | Path] = ()) -> list[Path]:
    """Deletes checkpoints beyond `limit`. Returns the folders that are gone.

    First go all that are damaged, which do not count; then the oldest. Never one of `keep`, never the newest whole
    one, nothing at all where none is whole, and none without a manifest, which is another program's and does not count
    either. Digests are compared down to the newest whole one, sizes below it.

    Args:
        limit: how many to leave; None or less than 1: all.
    """
    if limit is None or limit < 1:
        return []
    newest, passed_over = newest_whole(run_dir)
    if newest is None:
        return []
    kept = {Path(path).resolve() for path in [*keep, newest]}
    ours = [path for path in _checkpoints(run_dir) if (path / MANIFEST).exists()]
    known = dict(passed_over)
    problems = {path: known.get(path) or problem_with(path, hashed=False) for path in ours}
    excess = list(problems.values()).count(None) - limit
    deleted = []
    for path, problem in sorted(problems.items(), key=lambda item: item[1] is None):  # the damaged ones first
        if path.resolve() in kept or (problem is None and excess <= 0):
            continue
        try:
            _delete(path)
        except OSError as error:
            logger.warning("%s can't be deleted: %s", path, error)
            continue
        deleted.append(path)
        excess -= problem is None
        if problem is not None:
            logger.warning("%s is deleted: it %s.", path, problem)
    return deleted


def _delete(path: Path) -> None:
    """Deletes something in a run's folder, if it is there. It loses its name first, so it is never found in parts.

    Works on a full disk too. OSError if it can't be renamed; what can't be deleted after that is logged.
    """
    if os.path.lexists(path):
        names = (path.with_name(f".deleting-{number}") for number in itertools.count())
        trash = next(name for name in names if not os.path.lexists(name))
        os.rename(path, trash)
        _remove(trash)


def _remove(path: Path) -> None:
    """Deletes something that has a hidden name, if it is there. Trouble is logged: the next `recover` tries again."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("%s can't be deleted and is left over: %s", path, error)


# ---- Names, files and digests ---------------------------------------------------------------------------------------


def _step_of(path: Path, kind: str) -> int | None:
    """Returns 7 for `<kind>-7`; None for any other name."""
    found = re.fullmatch(rf"{re.escape(kind)}-(\d+)", path.name, re.ASCII)
    return int(found[1]) if found else None


def _numbered(run_dir: str | Path, kind: str) -> list[tuple[int, Path]]:
    """Returns step and path of everything in a run's folder that is named `<kind>-<step>`, lowest step first."""
    found = ((_step_of(path, kind), path) for path in Path(run_dir).glob(f"{kind}-*"))
    return sorted((step, path) for step, path in found if step is not None)


def _checkpoints(run_dir: str | Path) -> list[Path]:
    """Returns the folders named like a checkpoint, oldest first."""
    return [path for _, path in _numbered(run_dir, "checkpoint") if path.is_dir()]


def _content(path: Path) -> Content:
    """Returns a file's entry in the manifest: its size and digest."""
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        for chunk in iter(lambda: file.read(1 << 20), b""):
            digest.update(chunk)
        return {"bytes": file.tell(), "blake2b": digest.hexdigest()}


def _manifest(step: int, files: Mapping[str, Content]) -> bytes:
    """Returns the manifest's bytes. They end with a digest of the rest, so that damage to them is seen as such."""
    content = {"format": FORMAT, "step": step, "files": files}
    seal = hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()
    return (json.dumps({**content, "seal": seal}, indent=1, sort_keys=True) + "\n").encode()


def _sync(path: Path) -> None:
    """Waits until a file's bytes, or a folder's list of names, are on the disk."""
    if os.name == "nt":  # syncs neither folders nor what is open for reading
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems can't sync a folder. A file that can't be synced is not written.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)
