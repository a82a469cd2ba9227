"""The SQLite file under `cache.py`: opened, shared by several processes, replaced when damaged.

The file keeps a write-ahead log: a process killed at any moment leaves it whole. Its locks work among the processes of
one host; give hosts that share a network disk a folder each. Nothing but SQLite may open the file in a process that
uses it: closing any other handle on it would drop the process's locks.
"""

import logging
import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar
from weakref import WeakSet

from ..errors import OptionError

logger = logging.getLogger(__name__)
T = TypeVar("T")

FILE_NAME = "logps.sqlite"
SCHEMA_VERSION = 1  # in the file's user_version; a file of another version is moved aside
BUSY_SECONDS = 60.0  # how long to wait for another process; after one wait in vain, AFTER_BUSY_SECONDS
AFTER_BUSY_SECONDS = 1.0

_SCHEMA = f"""BEGIN;
CREATE TABLE refs (id INTEGER PRIMARY KEY, reference TEXT NOT NULL UNIQUE, about TEXT, last_used REAL NOT NULL);
CREATE TABLE entries (ref INTEGER NOT NULL, key BLOB NOT NULL, logp BLOB NOT NULL, tokens BLOB, checksum BLOB NOT NULL,
 UNIQUE (ref, key));
PRAGMA user_version = {SCHEMA_VERSION};
COMMIT;"""
_SETTINGS = ("synchronous = NORMAL", "secure_delete = OFF", "cell_size_check = ON", "journal_size_limit = 16777216")
_UNWRITABLE = ("readonly", "is full", "unable to open", "disk I/O")  # in SQLite's messages


class Store:
    """The file under `folder`: opened on first use, closed over a fork, only read where it can't be written."""

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder).expanduser().absolute() / FILE_NAME
        if self.path.parent.exists() and not self.path.parent.is_dir():
            raise OptionError(f"The reference cache's folder {self.path.parent} is a file. Give a folder.")
        self.writable = True
        self._db: sqlite3.Connection | None = None
        self._file: tuple[int, int] | None = None  # which file was opened
        self._wait = BUSY_SECONDS
        self._warned: set[str] = set()
        _STORES.add(self)

    def run(self, work: Callable[[sqlite3.Connection], T], otherwise: T) -> T:
        """Returns what `work` gives, on a new file if this one turns out damaged; `otherwise` if none can be used."""
        for _ in range(3):
            try:
                db = self._connection()
                return otherwise if db is None else work(db)
            except sqlite3.ProgrammingError:  # a mistake in the program or a second thread, no fault of the file
                raise
            except (OSError, sqlite3.DatabaseError, UnicodeDecodeError) as error:  # the last where damage is quoted
                # By the message, as error codes came with Python 3.11. A damaged header can forbid writing.
                text = str(error) if isinstance(error, sqlite3.OperationalError) else ""
                forbidden = "readonly" in text and all(os.access(p, os.W_OK) for p in (self.path, self.path.parent))
                if "lock" in text:
                    self.warn("locked", f"stayed locked for {self._wait:g} s: continuing without it.")
                    self._wait = AFTER_BUSY_SECONDS
                    self.close()
                    break
                if isinstance(error, OSError) or (any(words in text for words in _UNWRITABLE) and not forbidden):
                    self.warn("unwritable", f"can't be written ({error}): nothing more is stored.")
                    self.writable = False
                else:
                    self._replace(error)
        return otherwise

    def write(self, work: Callable[[sqlite3.Connection], T], otherwise: T) -> T:
        """Runs `work` wholly or not at all; returns `otherwise` also if the store is read-only or the disk full."""

        def in_transaction(db: sqlite3.Connection) -> T:
            if not self.writable:
                return otherwise
            db.execute("BEGIN IMMEDIATE")  # waits for other writers now, never in the middle
            with db:
                return work(db)

        return self.run(in_transaction, otherwise)

    def close(self) -> None:
        """Closes the file. The next use opens it again."""
        db, self._db = self._db, None
        if db is not None:
            with suppress(sqlite3.Error):
                db.close()

    def warn(self, kind: str, message: str) -> None:
        """Logs what is the matter with the file, once of each kind."""
        if kind not in self._warned:
            self._warned.add(kind)
            logger.warning("The reference cache %s %s", self.path, message)

    def _connection(self) -> sqlite3.Connection | None:
        if self.writable and self._file != _file_id(self.path):
            self.close()  # someone moved or deleted the file: no one would find what we add to it
        if self._db is None and self.writable:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _folder_lock(self.path.parent, self._wait):
                self._db = _connect(self.path, self._wait, self._prepare)
        elif self._db is None:
            self._db = _open_read_only(self.path)
        return self._db

    def _prepare(self, db: sqlite3.Connection) -> None:
        """Sets a connection up, and makes the tables of a new file."""
        self._file = _file_id(self.path)
        for setting in _SETTINGS:
            db.execute(f"PRAGMA {setting}")
        if db.execute("SELECT 1 FROM sqlite_master").fetchone() is None:
            db.executescript(_SCHEMA)
        _check_version(db)
        db.execute("PRAGMA journal_mode = WAL")

    def _replace(self, error: Exception) -> None:
        """Moves the damaged file aside, unless another process has done so already."""
        self.close()
        try:
            with _folder_lock(self.path.parent, self._wait):
                if self._file != _file_id(self.path):
                    return
                n = 1
                while (aside := self.path.with_name(f"{FILE_NAME}.corrupt-{n}")).exists():
                    n += 1
                for suffix in ("-wal", "-shm", ""):
                    with suppress(FileNotFoundError):
                        os.replace(f"{self.path}{suffix}", f"{aside}{suffix}")
        except (OSError, sqlite3.Error) as reason:
            self.writable = False
            self.warn("damaged", f"can't be used ({error}) nor moved away ({reason}).")
        else:
            self.warn(
                "damaged",
                f"can't be used ({error}). It was moved to {aside.name} and a new one started. `dpo-peft cache "
                "--clear` deletes what was moved.",
            )


_STORES: WeakSet[Store] = WeakSet()


def _close_all() -> None:
    for store in list(_STORES):
        store.close()


# A connection must not live on in a forked child: parent and child would take each other's locks for their own, and
# the first to close would delete the log that the other writes to. Both open it again when they need it.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_close_all)


@contextmanager
def _folder_lock(folder: Path, wait: float) -> Iterator[None]:
    """Lets one process at a time open or move the file. The lock, an empty database, dies with its holder."""
    lock = _connect(folder / "logps.lock", wait, lambda db: db.execute("BEGIN EXCLUSIVE"))
    try:
        yield
    finally:
        lock.close()


def _connect(
    path: Path | str, wait: float, prepare: Callable[[sqlite3.Connection], object], uri: bool = False
) -> sqlite3.Connection:
    db = sqlite3.connect(path, timeout=wait, isolation_level=None, uri=uri)  # None: transactions are begun by hand
    db.text_factory = lambda text: text.decode("utf-8", "replace")  # damaged text must not fail to decode
    try:
        prepare(db)
    except BaseException:
        db.close()
        raise
    return db


def _check_version(db: sqlite3.Connection) -> None:
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if version != SCHEMA_VERSION:
        raise sqlite3.DatabaseError(f"it has version {version}, this program writes version {SCHEMA_VERSION}")


def _open_read_only(path: Path) -> sqlite3.Connection | None:
    """Opens a store in a folder or on a disk that can't be written; None if even that fails."""
    for how in ("mode=ro", "immutable=1"):  # the second where SQLite can't make its shared-memory file
        with suppress(sqlite3.Error):
            return _connect(f"{path.as_uri()}?{how}", AFTER_BUSY_SECONDS, _check_version, uri=True)
    return None


def _file_id(path: Path) -> tuple[int, int] | None:
    with suppress(OSError):
        status = path.stat()
        return status.st_dev, status.st_ino
    return None
