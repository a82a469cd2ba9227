"""Bytes that are on the disk when a function returns, and one process that writes to a place at a time."""

import errno
import hashlib
import json
import logging
import os
import shutil
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from .errors import OptionError

logger = logging.getLogger(__name__)

Content = dict[str, int | str]  # of a file: its bytes and their blake2b
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}  # of some network disks
_held: set[tuple[int, Path]] = set()  # processes (a fork is another one) and the places that they write to


# ---- Files ----------------------------------------------------------------------------------------------------------


def pieces(path: str | Path) -> Iterator[bytes]:
    """Yields a file's bytes, at most 1 MiB at a time."""
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            yield piece


def content(path: str | Path) -> Content:
    """Returns a file's size and digest."""
    digest, size = hashlib.blake2b(digest_size=16), 0
    for piece in pieces(path):
        digest.update(piece)
        size += len(piece)
    return {"bytes": size, "blake2b": digest.hexdigest()}


def write_atomically(path: str | Path, content: str | bytes | Iterable[str], private: bool = False) -> Path:
    """Writes a file that appears once it is whole and on the disk; a reader, or a kill, never meets a part of it.

    The folder is made if there is none. An iterable is written piece by piece. Text is UTF-8. Until it is whole it is
    called as `part_of` says; what a killed writer left there is replaced. One that is `private`, as it holds rows,
    can't be read by other users of the machine; its group can by umask.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part, parts = part_of(path), [content] if isinstance(content, str | bytes) else content
    part.unlink(missing_ok=True)
    mode = 0o660 if private else 0o666
    try:
        # "x": never through a link that lies there.
        with open(part, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            file.writelines(piece if isinstance(piece, bytes) else piece.encode() for piece in parts)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    sync(path.parent)
    return path


def part_of(path: Path) -> Path:
    """Returns how a file is called while it is written."""
    return path.with_name(f".{path.name}.part")


def open_by_umask(folder: Path) -> None:
    """Lets those read the weights in a new folder who may read the folder: safetensors writes for its owner alone."""
    for path in folder.rglob("*.safetensors"):
        path.chmod(folder.stat().st_mode & 0o666)


def sync(path: Path) -> None:
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


def remove(path: Path) -> None:
    """Deletes something that has a hidden name, if it is there. Trouble is logged: the next start tries again."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("%s can't be deleted and is left over: %s", path, error)


# ---- One writer -----------------------------------------------------------------------------------------------------


@contextmanager
def one_writer(option: str, place: str | Path, inside: bool = False, wait: float = 0.0) -> Iterator[None]:
    """Keeps other processes from writing to the same place. The lock dies with its process.

    A second `with` in the same process passes. Its folders are made, and go again if nothing is in them.

    Args:
        option: what names the place, for messages.
        place: a file or a folder.
        inside: the lock lies in the folder and moves with it, instead of beside the place.
        wait: seconds for another process to end.

    Raises:
        OptionError: another process writes there, which is named; or it can't be written to.
    """
    path = Path(os.path.abspath(place))
    mark = path / ".writer" if inside else path.with_name(f".{path.name}")
    lock, holder = FileLock(f"{mark}.lock", thread_local=False), Path(f"{mark}.holder")
    key = os.getpid(), Path(os.path.realpath(mark))
    if key in _held:
        yield
        return
    made = [folder for folder in (mark.parent, *mark.parent.parents) if not folder.exists()]
    try:
        _acquire(lock, holder, f"{option}={str(place)!r}", wait)
        _held.add(key)
        yield
    finally:
        _held.discard(key)
        if lock.is_locked:
            for left in (holder, Path(lock.lock_file)):
                left.unlink(missing_ok=True)
            lock.release()
        with suppress(OSError):
            for folder in made:
                folder.rmdir()


def _acquire(lock: FileLock, holder: Path, what: str, wait: float) -> None:
    facts = {"process": os.getpid(), "host": socket.gethostname(), "since": f"{datetime.now():%Y-%m-%d %H:%M:%S}"}
    try:
        holder.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=wait)
        except Timeout:
            raise OptionError(
                f"{what}: {_who(holder)} is writing there. Wait until it has ended, or give another place."
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            logger.warning("%s: this disk has no locks (%s). See to it that nobody else writes there.", what, error)
            return
        if holder.exists():
            logger.info("%s: %s was writing there and is gone. Its place is taken over.", what, _who(holder))
        write_atomically(holder, json.dumps(facts))
    except OSError as error:
        raise OptionError(f"{what} can't be written to: {error}. Give another place, or mend this one.") from error


def _who(holder: Path) -> str:
    """Returns the process that a lock's facts name."""
    try:
        facts = json.loads(holder.read_bytes())
        return f"process {facts['process']} on {facts['host']} (since {facts['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
