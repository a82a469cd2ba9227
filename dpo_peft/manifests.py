"""Folders whose manifest lists each file with its size and digest: checkpoints, and the result of a run.

A checkpoint is a folder of its own, which gets its name when it is whole (`training/checkpoints.py`). A result lies in
a folder that holds other things too. It is written to `.saving-result`; sealed, that becomes `.saved-result`, and its
files are moved to their places one by one, the manifest last. `settle` brings that to an end after a kill. Until then
everything that reads the adapter refuses it or settles it first: old and new files are never taken for one run's.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from .disk import Content, content, one_writer, open_by_umask, remove, sync, write_atomically
from .errors import OptionError

MANIFEST = "manifest.json"
FORMAT = 1  # of the manifest
SAVING, SAVED = ".saving-result", ".saved-result"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
EVAL, SERVING = "eval.json", "serving.json"  # what was measured of the weights beside them, with their digest
# What an adapter is used with, by how the names of its files begin; the rest may be edited, or go.
_ADAPTER = ("adapter_", "tokenizer", "special_tokens", "added_tokens", "vocab", "merges", "chat_template")
_EDITED = ("base_model_name_or_path", "revision")  # entries of the config that change where the base is elsewhere


def weights_digest(folder: Path) -> str | None:
    """Returns the digest of a folder's adapter; None where there is none."""
    return content(folder / WEIGHTS)["blake2b"] if (folder / WEIGHTS).is_file() else None  # type: ignore[return-value]


def seal(folder: Path, step: int | None) -> None:
    """Writes the manifest, and brings everything to the disk: files first, then the folders that name them.

    Args:
        folder: whose files are listed.
        step: of a checkpoint; None for a result.
    """

    def fail(error: OSError) -> None:  # unlike a plain walk, which passes over what it can't read
        raise error

    walked = list(os.walk(folder, topdown=False, onerror=fail))
    paths = [Path(inner, name) for inner, _, names in walked for name in names]
    manifest, entry = folder / MANIFEST, _entry(step)  # the file is there from an earlier attempt, perhaps
    files = {path.relative_to(folder).as_posix(): entry(path) for path in paths if path != manifest}
    open_by_umask(folder)
    for path in paths:
        sync(path)
    write_atomically(manifest, _manifest(step, files))
    for path in (*(Path(inner) for inner, _, _ in walked), folder.parent, folder.parent.parent):
        sync(path)


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
    if step_of(folder, "checkpoint") not in (None, step):
        what = "the result of a run" if step is None else f"checkpoint-{step}"
        return f"is not what its name says: it was written as {what}"
    return _difference(folder, step, files, hashed)


def _difference(folder: Path, step: int | None, files: Mapping[str, Content], hashed: bool = True) -> str | None:
    entry, name = _entry(step), ""
    try:
        for name, known in files.items():  # all names and sizes before the first digest
            if not (folder / name).is_file():
                return f"is damaged: {name} is missing"
            if (size := (folder / name).stat().st_size) != known.get("bytes", size):
                return f"is damaged: {name} has {size} of {known['bytes']} bytes"
        for name, known in files.items() if hashed else ():
            if entry(folder / name) != known:
                return f"is damaged: {name} was changed (its digest differs)"
    except OSError as error:
        return f"is damaged: {name} can't be read ({error})"
    return None


def step_of(path: Path, kind: str) -> int | None:
    """Returns 7 for `<kind>-7`; None for any other name."""
    found = re.fullmatch(rf"{re.escape(kind)}-(\d+)", path.name, re.ASCII)
    return int(found[1]) if found else None


def _manifest(step: int | None, files: Mapping[str, Content]) -> bytes:
    """Returns the manifest's bytes. They end with a digest of the rest, so that damage to them is seen as such."""
    listed = {"format": FORMAT, "step": step, "files": files}
    digest = hashlib.blake2b(json.dumps(listed, sort_keys=True).encode(), digest_size=16).hexdigest()
    return (json.dumps({**listed, "seal": digest}, indent=1, sort_keys=True) + "\n").encode()


def _entry(step: int | None) -> Callable[[Path], Content]:
    """Returns what gives a file's entry in the manifest of a checkpoint, or of a result."""
    return content if step is not None else _result_entry


def _result_entry(path: Path) -> Content:
    """Returns a file's size and digest; of an adapter's config the digest without what says where its base is."""
    if path.name != CONFIG:
        return content(path)
    try:
        config = {name: value for name, value in json.loads(path.read_bytes()).items() if name not in _EDITED}
    except (ValueError, AttributeError):
        return content(path)
    return {"blake2b": hashlib.blake2b(json.dumps(config, sort_keys=True).encode(), digest_size=16).hexdigest()}


# ---- Results --------------------------------------------------------------------------------------------------------


@contextmanager
def whole_result(folder: str | Path, sealed: bool = True) -> Iterator[Path]:
    """Yields an empty folder of the same name; what is written there replaces, at the end, its namesakes in `folder`,
    all together. After an exception nothing has changed.

    Args:
        folder: of the result; made if it isn't there.
        sealed: with a manifest. Files that an earlier result had and this one has not are deleted, if nobody changed
            them.
    """
    folder = Path(folder)
    saving = folder / SAVING
    with one_writer("output_dir", folder, inside=True):
        settle(folder)
        remove(saving)
        try:
            staged = saving / folder.resolve().name
            staged.mkdir(parents=True)
            yield staged
            if sealed:
                seal(staged, None)
            os.rename(saving, folder / SAVED)
        except BaseException:
            remove(saving)
            raise
        sync(folder)
        settle(folder)


def settle(folder: Path) -> str | None:
    """Gives a saved result its places, where that was cut off. Returns what was done, for the log.

    Raises:
        OptionError: another process is at it, or the folder can't be written to.
    """
    saved = folder / SAVED
    if not saved.is_dir():
        return None
    with one_writer("output_dir", folder, inside=True, wait=10):  # the processes of a job come here together
        if not saved.is_dir():
            return None
        for staged in saved.iterdir():  # one; none if the kill came after the last file
            names = [path.relative_to(staged) for path in staged.rglob("*") if path.is_file()]
            if (staged / MANIFEST).is_file():
                _delete_left_over(folder, staged)
            for name in sorted(names, key=lambda name: str(name) == MANIFEST):  # the manifest last
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(staged / name, folder / name)
            for inner in {(folder / name).parent for name in names}:
                sync(inner)
        remove(saved)
    return f"The result in {folder} had been saved, but not all of its files had got their places: they have now."


def _delete_left_over(folder: Path, staged: Path) -> None:
    """Deletes what an earlier result wrote and the staged one does not replace."""
    before, now = _files_of(folder), _files_of(staged)
    for name in before.keys() - now.keys():
        if (folder / name).is_file() and _result_entry(folder / name) == before[name]:
            (folder / name).unlink()


def _files_of(folder: Path) -> dict[str, Content]:
    """Returns what the manifest of a result lists; nothing where there is none."""
    step, files = _listed(folder)
    return files if step is None else {}


def _listed(folder: Path) -> tuple[int | None, dict[str, Content]]:
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        return manifest["step"], dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return None, {}


def check_one_run(folder: str | Path) -> None:
    """Refuses an adapter whose files are not those that one run wrote together; one without a manifest passes.

    Raises:
        OptionError: naming the file, with the remedy.
    """
    folder = Path(folder)
    for root in (folder, folder.parent):  # an adapter that has a name lies in a folder of the result
        settle(root)
        step, files = _listed(root)
        inner = folder.relative_to(root).as_posix()
        own = {name: known for name, known in files.items() if root == folder or name.startswith(f"{inner}/")}
        own = {name: known for name, known in own.items() if Path(name).name.startswith(_ADAPTER)}
        if problem := _difference(root, step, own):
            raise OptionError(
                f"The adapter {str(folder)!r} {problem}: its files are not those that were saved together, so weights "
                f"and config may be of two runs. Save it again; if you changed it on purpose, delete its {MANIFEST}."
            )
