"""The reference's log-probs on disk: one store that several processes fill at once and that is never wrong.

An entry belongs to a reference (the hex id of its weights, dtype and layout) and a key (a digest of the token ids and
mask). Its checksum covers both and the numbers, so neither a flipped byte nor a mixed-up row can hand out a wrong
value: whatever does not check is a miss, and is computed again. Nor does a fault of the file stop a run (`store.py`).
"""

import hashlib
import math
import os
import sqlite3
import struct
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import NonFiniteError, OptionError
from .store import FILE_NAME, Store, logger

ENTRY_OVERHEAD = 40  # bytes of one entry besides twice its key (row and index) and its tokens
# No id of a reference is kept in memory: another process may have deleted that reference meanwhile.
_REF = "(SELECT id FROM refs WHERE reference = ?)"
# Bytes of the file that are in use, the open transaction included. The file grows only when all of it is.
_USED = (
    "SELECT (page_count - freelist_count) * page_size FROM pragma_page_count, pragma_freelist_count, pragma_page_size"
)

Row = tuple[bytes, bytes | None]  # an entry's sum and tokens as stored: little-endian float64 and float32


class Entry(NamedTuple):
    """The log-probs of one completion under the reference."""

    logp: float  # their sum over the completion's tokens, float64, nats
    token_logps: np.ndarray | None  # float32, one per predicted token


class Usage(NamedTuple):
    """What one reference takes up in a store."""

    reference: str
    about: str
    entries: int
    bytes: int  # about
    last_used: str  # ISO date, UTC


def default_folder() -> Path:
    """Returns `reference` in $DPO_PEFT_CACHE, else in $XDG_CACHE_HOME/dpo-peft, else in ~/.cache/dpo-peft."""
    own, shared = os.environ.get("DPO_PEFT_CACHE"), os.environ.get("XDG_CACHE_HOME")
    root = Path(own) if own else Path(shared or "~/.cache") / "dpo-peft"
    return root.expanduser() / "reference"


class ReferenceCache:
    """The entries of one reference in the store under `folder`.

    Counters, of this process: `hits` and `misses` (keys asked for), `corrupt` (entries found damaged, and deleted),
    `stored`, `refused` (not stored: the store is full, can't be written or was locked).

    Args:
        folder: made where it is missing.
        reference: id of the reference that the entries belong to.
        about: a line for people about this reference, shown by `dpo-peft cache`.
        max_bytes: the file grows to this size at most. Beyond it the references unused for longest are deleted; once
            this reference alone fills it, nothing more is stored.
        tokens: whether entries need `token_logps`. One without is a miss then.

    Raises:
        OptionError: `folder` is a file.
    """

    def __init__(
        self, folder: str | Path, reference: str, about: str = "", max_bytes: int = 4 << 30, tokens: bool = False
    ) -> None:
        self.reference, self.about, self.max_bytes, self.tokens = reference, about, max_bytes, tokens
        self.hits = self.misses = self.corrupt = self.stored = self.refused = 0
        self._full = False
        name = reference.encode()
        self._hash = hashlib.blake2b(struct.pack("<I", len(name)) + name, digest_size=8)
        self.file = Store(folder)
        touch = "UPDATE refs SET last_used = ? WHERE reference = ?"
        self.file.write(lambda db: db.execute(touch, (time.time(), reference)).rowcount, 0)

    def get(self, keys: Sequence[bytes]) -> list[Entry | None]:
        """Returns the entry of each key, or None for a miss. Counts hits and misses."""
        entries = self.peek(keys)
        missed = sum(entry is None for entry in entries)
        self.hits += len(entries) - missed
        self.misses += missed
        return entries

    def peek(self, keys: Sequence[bytes]) -> list[Entry | None]:
        """Returns what `get` does, without counting hits and misses."""
        nothing: dict[bytes, Entry | None] = {}
        found = self.file.run(lambda db: self._find(db, keys), nothing)
        if bad := [(self.reference, key) for key, entry in found.items() if entry is None]:
            self.corrupt += len(bad)
            self.file.warn("entries", "holds damaged entries: they are computed again.")
            deletion = f"DELETE FROM entries WHERE ref = {_REF} AND key = ?"
            self.file.write(lambda db: db.executemany(deletion, bad), None)
        return [e if e and (e.token_logps is not None or not self.tokens) else None for e in map(found.get, keys)]

    def put(self, keys: Sequence[bytes], entries: Sequence[Entry]) -> None:
        """Stores one entry per key: all or, where they don't fit, none. What is stored already stays as it is, but
        an entry with `token_logps` replaces one without. Raises `NonFiniteError` for a log-prob that is NaN or
        infinite."""
        rows: dict[bytes, Row] = {}  # of the same key twice the first counts
        for i, (key, (logp, tokens)) in enumerate(zip(keys, entries, strict=True)):
            if not math.isfinite(logp) or (tokens is not None and not np.isfinite(tokens).all()):
                raise NonFiniteError(f"Entry {i} has a log-prob that is NaN or infinite: it is not stored.")
            stored = None if tokens is None else tokens.astype("<f4", casting="equiv").tobytes()
            rows.setdefault(key, (struct.pack("<d", logp), stored))
        written = None
        while rows and not self._full:
            try:
                written = self.file.write(lambda db: self._insert(db, rows), None)
                break
            except _NoRoomError:
                if not self._make_room():
                    break
        self.stored += written or 0
        self.refused += len(rows) if written is None else 0

    def close(self) -> None:
        """Closes the file. The next call opens it again."""
        self.file.close()

    def _find(self, db: sqlite3.Connection, keys: Iterable[bytes]) -> dict[bytes, Entry | None]:
        """Returns what is stored for these keys; None for an entry that is damaged."""
        query = f"SELECT logp, tokens, checksum FROM entries WHERE ref = {_REF} AND key = ?"
        rows = ((key, row) for key in dict.fromkeys(keys) for row in db.execute(query, (self.reference, key)))
        return {key: self._read(key, *row) for key, row in rows}

    def _read(self, key: bytes, logp: object, tokens: object, checksum: object) -> Entry | None:
        """Returns a row's entry, if it is what was stored for this key. Damage may have changed even its types."""
        if not isinstance(logp, bytes) or not isinstance(tokens, bytes | None) or len(logp) != 8:
            return None
        if checksum != self._checksum(key, logp, tokens):
            return None
        values = None if tokens is None else np.frombuffer(tokens, "<f4").astype(np.float32)
        return Entry(struct.unpack("<d", logp)[0], values)

    def _checksum(self, key: bytes, logp: bytes, tokens: bytes | None) -> bytes:
        """Returns 8 bytes over reference, key and values. The key's length and the kind of entry keep these apart."""
        digest = self._hash.copy()
        digest.update(struct.pack("<B?", len(key), tokens is not None) + key + logp + (tokens or b""))
        return digest.digest()

    def _insert(self, db: sqlite3.Connection, rows: dict[bytes, Row]) -> int:
        """Returns the number of rows written: those that are not there, or damaged, or now have tokens."""
        found = self._find(db, rows)
        new = [
            (self.reference, key, logp, tokens, self._checksum(key, logp, tokens))
            for key, (logp, tokens) in rows.items()
            if (stored := found.get(key)) is None or (tokens is not None and stored.token_logps is None)
        ]
        if new:
            reference = (self.reference, self.about, time.time())
            db.execute("INSERT OR IGNORE INTO refs (reference, about, last_used) VALUES (?, ?, ?)", reference)
            columns = f"(ref, key, logp, tokens, checksum) VALUES ({_REF}, ?, ?, ?, ?)"
            db.executemany(f"INSERT OR REPLACE INTO entries {columns}", new)
            if db.execute(_USED).fetchone()[0] > self.max_bytes:
                raise _NoRoomError
        return len(new)

    def _make_room(self) -> bool:
        """Deletes the other reference that was unused for longest. If there is none, the store is full for good."""
        query = "SELECT reference FROM refs WHERE reference != ? ORDER BY last_used LIMIT 1"

        def evict(db: sqlite3.Connection) -> tuple[int, str | None]:
            (oldest,) = db.execute(query, (self.reference,)).fetchone() or (None,)
            return _delete(db, "reference = ?", oldest), oldest

        not_done: tuple[int, str | None] = 0, ""
        entries, oldest = self.file.write(evict, not_done)
        if oldest:
            logger.info("The reference cache deleted %d entries of reference %s to make room.", entries, oldest)
        elif oldest is None:
            self._full = True
            self.file.warn(
                "full",
                f"is full with this reference alone ({self.max_bytes:,} bytes): what is not in it is computed each "
                "time it is needed. Allow it more bytes, or clear it: `dpo-peft cache --clear`.",
            )
        return bool(oldest)


class _NoRoomError(Exception):
    """The rows don't fit into the store; the transaction is rolled back."""


def summary(folder: str | Path) -> list[Usage]:
    """Returns what is in the store under `folder`, the reference used last first; [] where there is no store."""
    store = Store(folder)
    if not store.path.exists():
        return []
    size = f"SUM(2 * length(key) + coalesce(length(tokens), 0) + {ENTRY_OVERHEAD})"
    query = (
        f"SELECT reference, about, count(key), coalesce({size}, 0), coalesce(date(last_used, 'unixepoch'), 'unknown') "
        "FROM refs LEFT JOIN entries ON ref = id GROUP BY id ORDER BY last_used DESC"
    )
    nothing: list[Usage] = []
    usages = store.run(lambda db: [Usage(str(row[0]), str(row[1]), *row[2:]) for row in db.execute(query)], nothing)
    store.close()
    return usages


def clear(folder: str | Path, reference: str | None = None, unused_days: float | None = None) -> tuple[int, int]:
    """Deletes entries of the store in `folder` and gives their space back to the disk: those of one `reference`, or of
    what no run has opened for `unused_days`. Without either everything goes, and files that were moved aside as
    damaged too.

    Returns the number of entries removed, and by how many bytes the folder shrank. Raises `OptionError` if the store
    has no such reference, or `unused_days` is negative.
    """
    if unused_days is not None and unused_days < 0:
        raise OptionError(f"unused_days is {unused_days}: give a number of days, 0 or more.")
    if reference is not None and reference not in (known := [usage.reference for usage in summary(folder)]):
        raise OptionError(f"The reference cache {folder} has no reference {reference!r}; it has {known or 'none'}.")
    store = Store(folder)
    if not store.path.parent.exists():
        return 0, 0
    before = _folder_bytes(store.path)
    chosen = "(? IS NULL OR last_used <= ?) AND (? IS NULL OR reference = ?)"
    latest = time.time() - (unused_days or 0) * 86400
    removed = store.write(lambda db: _delete(db, chosen, unused_days, latest, reference, reference), 0)
    if removed:
        store.run(lambda db: db.executescript("VACUUM; PRAGMA wal_checkpoint(TRUNCATE);"), None)
    store.close()
    if reference is None and unused_days is None:
        for path in store.path.parent.glob(f"{FILE_NAME}.corrupt-*"):
            path.unlink(missing_ok=True)
    return removed, max(0, before - _folder_bytes(store.path))


def _delete(db: sqlite3.Connection, which: str, *values: object) -> int:
    """Deletes references by an SQL condition, and the entries of none. Returns the number of entries deleted."""
    db.execute(f"DELETE FROM refs WHERE {which}", values)
    return db.execute("DELETE FROM entries WHERE ref NOT IN (SELECT id FROM refs)").rowcount


def _folder_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))
