"""Checkpoint folders that are whole or not there, wherever the program is killed.

A checkpoint is written to `.saving-7/checkpoint-7`. Sealing it writes its manifest: every file with size and digest.
Only then does a rename give it its place, `checkpoint-7`. What it replaces waits as `.replaced-7` until that is done,
and what is to be deleted first becomes `.deleting-0`: a folder named `checkpoint-7` is never half written or half
deleted. `recover` brings what a kill has left to one of the two ends.

Everything is synced to the disk before it is relied on, so a power cut does no more harm than a kill. One process
writes a run's folder at a time (`disk.one_writer`). This module knows nothing of models or trainers. A disk that fails
is an `OSError`.
"""

import itertools
import logging
import os
from collections.abc import Iterable
from pathlib import Path

from ..disk import remove, sync
from ..errors import CheckpointError
from ..manifests import MANIFEST, SAVING, problem_with, seal, settle, step_of

logger = logging.getLogger(__name__)


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
    """Seals the staged checkpoint and gives it its place. Returns its folder. One that it replaces is still there if
    the disk fails. Raises `CheckpointError` if nothing is staged for this step."""
    staged = staged_checkpoint(run_dir, step)
    if not any(path.is_file() for path in staged.rglob("*")):
        raise CheckpointError(
            f"Nothing to commit: {staged} has no files. Write it into staging_folder(run_dir, {step}) first."
        )
    seal(staged, step)
    return _install(Path(run_dir), step)


def discard(run_dir: str | Path, step: int) -> None:
    """Deletes the staged checkpoint after a failed attempt to write it. Trouble with that is logged, never raised."""
    saving = Path(run_dir) / f".saving-{step}"
    try:
        _delete(saving)
    except OSError as error:
        logger.warning("%s can't be deleted and is left over: %s", saving, error)


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
    sync(run_dir)
    sync(staged.parent)
    for path in (aside, staged.parent):
        remove(path)
    return target


# ---- After a kill ---------------------------------------------------------------------------------------------------


def recover(run_dir: str | Path) -> list[str]:
    """Brings what a killed process left in a run's folder to an end: call it before anything is read or written there.
    Returns what was found and done, in sentences for the log; nothing if there was nothing to do."""
    run_dir, said = Path(run_dir), []
    if done := settle(run_dir):
        said.append(done)
    if os.path.lexists(run_dir / SAVING):
        remove(run_dir / SAVING)
        said.append("An attempt to save the result had been cut off: what it left is deleted.")
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
            remove(aside)
            said.append(f"A new checkpoint-{step} had taken the place of an old one: the old one is deleted.")
    for _, trash in _numbered(run_dir, ".deleting"):
        remove(trash)
        said.append("A checkpoint had been deleted in part: the rest is deleted too.")
    if said:
        sync(run_dir)
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
        remove(trash)


# ---- Names ----------------------------------------------------------------------------------------------------------


def _numbered(run_dir: str | Path, kind: str) -> list[tuple[int, Path]]:
    """Returns step and path of everything in a run's folder that is named `<kind>-<step>`, lowest step first."""
    found = ((step_of(path, kind), path) for path in Path(run_dir).glob(f"{kind}-*"))
    return sorted((step, path) for step, path in found if step is not None)


def _checkpoints(run_dir: str | Path) -> list[Path]:
    """Returns the folders named like a checkpoint, oldest first."""
    return [path for _, path in _numbered(run_dir, "checkpoint") if path.is_dir()]
