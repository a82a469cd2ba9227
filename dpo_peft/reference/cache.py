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
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import NonFiniteError, OptionError
from .store import FILE_NAME, Store, logger, used_bytes

MAX_KEYS_PER_QUERY = 500
ENTRY_OVERHEAD = 40  # bytes of one entry besides twice its key (row and index) and its tokens
# No id of a reference is kept in memory: another process may have deleted that reference meanwhile.
_REF = "(SELECT id FROM refs WHERE reference = ?)"

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
    """`reference` in $DPO_PEFT_CACHE, else in $XDG_CACHE_HOME/dpo-peft, else in ~/.cache/dpo-peft."""
    own, shared = os.environ.get("DPO_PEFT_CACHE"), os.environ.get("XDG_CACHE_HOME")
    root = Path(own) if own else Path(shared or "~/.cache") / "dpo-peft"
    return root.expanduser() / "reference"


class ReferenceCache:
    """The entries of one reference in the store under `folder`.

    Counters, of this process: `hits` and `misses` (keys asked for), `corrupt` (entries found damaged, and deleted),
    `stored`, `refused` (not stored: the store is full, can't be written or was locked), `evicted` (entries of other
    references deleted to make room).

    Args:
        folder: made where it is missing.
        reference: id of the reference that the entries belong to.
        about: a line for people about this reference, shown by `dpo-peft cache`.
        max_bytes: the file grows to this size at most. Beyond it the references unused for longest are deleted; once
            this reference alone fills it, nothing more is stored.
        tokens: whether entries need `token_logps`. One without is a miss then.

    Raises:
        OptionError: `folder` is a file, `reference` is empty, or `max_bytes` is not positive.
    """

    def __init__(
        self, folder: str | Path, reference: str, about: str = "", max_bytes: int = 4 << 30, tokens: bool = False
    ) -> None:
        if not reference:
            raise OptionError("reference is empty: entries without the id of their reference can't be told apart.")
        if max_bytes <= 0:
            raise OptionError(f"max_bytes is {max_bytes}: give the reference cache room, or don't use it.")
        self.reference, self.about, self.max_bytes, self.tokens = reference, about, max_bytes, tokens
        self.hits = self.misses = self.corrupt = self.stored = self.refused = self.evicted = 0
        self._full = False
        name = reference.encode()
        self._hash = hashlib.blake2b(struct.pack("<I", len(name)) + name, digest_size=8)
        self._store = Store(folder)
        touch = "UPDATE refs SET last_used = ? WHERE reference = ?"
        self._store.write(lambda db: db.execute(touch, (time.time(), reference)).rowcount, 0)

    def get(self, keys: Sequence[bytes]) -> list[Entry | None]:
        """The entry of each key, or None for a miss. Counts hits and misses.

        Raises:
            ValueError: a key is not 16 to 32 bytes.
        """
        entries = self._read(keys)
        missed = sum(entry is None for entry in entries)
        self.hits += len(entries) - missed
        self.misses += missed
        return entries

    def peek(self, keys: Sequence[bytes]) -> list[Entry | None]:
        """What `get` gives, without counting hits and misses."""
        return self._read(keys)

    def missing(self, keys: Sequence[bytes]) -> list[int]:
        """Indices of the keys that `get` would miss. Counts neither hits nor misses."""
        return [i for i, entry in enumerate(self._read(keys)) if entry is None]

    @property
    def path(self) -> Path:
        """The file."""
        return self._store.path

    def put(self, keys: Sequence[bytes], entries: Sequence[Entry]) -> None:
        """Store one entry per key: all or, where they don't fit, none. What is stored already stays as it is.

        The exception: an entry with `token_logps` replaces one without.

        Raises:
            NonFiniteError: a log-prob is NaN or infinite.
            ValueError: keys and entries don't match, a key is not 16 to 32 bytes, `token_logps` are not a float32
                vector, or are missing although this cache was opened with `tokens=True`.
        """
        rows = self._rows(keys, entries)
        while rows and not self._full:
            try:
                stored = self._store.write(lambda db: self._insert(db, rows), None)
            except _NoRoomError:
                if not self._make_room():
                    break
            else:
                self.stored += stored or 0
                self.refused += len(rows) if stored is None else 0
                return
        self.refused += len(rows)

    def close(self) -> None:
        """Close the file. The next call opens it again."""
        self._store.close()

    def __enter__(self) -> "ReferenceCache":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self, keys: Sequence[bytes]) -> list[Entry | None]:
        for key in keys:
            _check_key(key)
        nothing: tuple[dict[bytes, Entry], list[bytes]] = {}, []
        found, bad = self._store.run(lambda db: self._find(db, keys), nothing)
        if bad:
            self.corrupt += len(bad)
            self._store.warn("entries", "The reference cache %s holds damaged entries: they are computed again.")
            deletion = f"DELETE FROM entries WHERE ref = {_REF} AND key = ?"
            self._store.write(lambda db: db.executemany(deletion, [(self.reference, key) for key in bad]), None)
        usable = {key: entry for key, entry in found.items() if entry.token_logps is not None or not self.tokens}
        return [usable.get(key) for key in keys]

    def _find(self, db: sqlite3.Connection, keys: Sequence[bytes]) -> tuple[dict[bytes, Entry], list[bytes]]:
        """The entries stored for these keys, and the keys whose entries are damaged."""
        found: dict[bytes, Entry] = {}
        bad: list[bytes] = []
        for start in range(0, len(keys), MAX_KEYS_PER_QUERY):
            part = keys[start : start + MAX_KEYS_PER_QUERY]
            marks = ",".join("?" * len(part))
            query = f"SELECT key, logp, tokens, checksum FROM entries WHERE ref = {_REF} AND key IN ({marks})"
            for key, logp, tokens, checksum in db.execute(query, (self.reference, *part)):
                if self._is_whole(key, logp, tokens, checksum):
                    values = None if tokens is None else np.frombuffer(tokens, "<f4").astype(np.float32)
                    found[key] = Entry(struct.unpack("<d", logp)[0], values)
                else:
                    bad.append(key)
        return found, bad

    def _is_whole(self, key: Any, logp: Any, tokens: Any, checksum: Any) -> bool:
        """Whether a row is what was once stored for this reference. Damage may have changed even its types."""
        if not all(isinstance(value, bytes) for value in (key, logp, b"" if tokens is None else tokens)):
            return False
        return len(logp) == 8 and checksum == self._checksum(key, (logp, tokens))

    def _checksum(self, key: bytes, row: Row) -> bytes:
        """8 bytes over reference, key and values. The key's length and the kind of entry keep these apart."""
        logp, tokens = row
        digest = self._hash.copy()
        digest.update(struct.pack("<B?", len(key), tokens is not None) + key + logp + (tokens or b""))
        return digest.digest()

    def _rows(self, keys: Sequence[bytes], entries: Sequence[Entry]) -> dict[bytes, Row]:
        """Entries as stored, by key. Of the same key twice the first counts."""
        if len(keys) != len(entries):
            raise ValueError(f"put() got {len(keys)} keys and {len(entries)} entries: give one entry per key.")
        rows: dict[bytes, Row] = {}
        for i, (key, (logp, values)) in enumerate(zip(keys, entries, strict=True)):
            _check_key(key)
            if values is None and self.tokens:
                raise ValueError(f"Entry {i} has no token_logps, but the cache was opened with tokens=True.")
            if values is not None and (values.dtype != np.float32 or values.ndim != 1):
                raise ValueError(f"Entry {i}: token_logps are {values.dtype} {values.shape}, not a float32 vector.")
            if not math.isfinite(logp) or (values is not None and not np.isfinite(values).all()):
                raise NonFiniteError(f"Entry {i} has a log-prob that is NaN or infinite: it is not stored.")
            rows.setdefault(key, (struct.pack("<d", logp), None if values is None else values.astype("<f4").tobytes()))
        return rows

    def _insert(self, db: sqlite3.Connection, rows: dict[bytes, Row]) -> int:
        """Number of rows written: those that are not there, or damaged, or now have tokens."""
        found, _ = self._find(db, list(rows))
        new = [
            (self.reference, key, *row, self._checksum(key, row))
            for key, row in rows.items()
            if key not in found or (row[1] is not None and found[key].token_logps is None)
        ]
        if new:
            reference = (self.reference, self.about, time.time())
            db.execute("INSERT OR IGNORE INTO refs (reference, about, last_used) VALUES (?, ?, ?)", reference)
            db.executemany(
                f"INSERT OR REPLACE INTO entries (ref, key, logp, tokens, checksum) VALUES ({_REF}, ?, ?, ?, ?)", new
            )
            if used_bytes(db) > self.max_bytes:
                raise _NoRoomError
        return len(new)

    def _make_room(self) -> bool:
        """Delete the other reference that was unused for longest. If there is none, the store is full for good."""
        oldest = "SELECT id, reference FROM refs WHERE reference != ? ORDER BY last_used LIMIT 1"

        def evict(db: sqlite3.Connection) -> tuple[int, str] | None:
            row = db.execute(oldest, (self.reference,)).fetchone()
            self._full = row is None
            return None if row is None else (_delete_reference(db, row[0]), _text(row[1]))

        if (evicted := self._store.write(evict, None)) is not None:
            self.evicted += evicted[0]
            logger.info("The reference cache deleted %d entries of reference %s to make room.", *evicted)
        if self._full:
            self._store.warn(
                "full",
                f"The reference cache %s is full with this reference alone ({self.max_bytes:,} bytes): what is not in "
                "it is computed each time it is needed. Allow it more bytes, or clear it: `dpo-peft cache --clear`.",
            )
        return evicted is not None


class _NoRoomError(Exception):
    """The rows don't fit into the store; the transaction is rolled back."""


def summary(folder: str | Path) -> list[Usage]:
    """What is in the store under `folder`, the reference used last first. Empty where there is no store."""
    store = Store(folder)
    if not store.path.exists():
        return []
    size = f"SUM(2 * length(key) + coalesce(length(tokens), 0) + {ENTRY_OVERHEAD})"
    query = (
        f"SELECT reference, about, count(key), coalesce({size}, 0), last_used "
        "FROM refs LEFT JOIN entries ON ref = id GROUP BY id ORDER BY last_used DESC"
    )
    nothing: list[Any] = []
    rows = store.run(lambda db: db.execute(query).fetchall(), nothing)
    store.close()
    return [Usage(_text(row[0]), _text(row[1]), row[2], row[3], _date(row[4])) for row in rows]


def clear(folder: str | Path, reference: str | None = None, unused_days: float | None = None) -> tuple[int, int]:
    """Delete entries and give their space back to the disk.

    Args:
        folder: the store's folder.
        reference: delete this reference only.
        unused_days: delete only what no run has opened for so many days.
            Without either everything goes, and files that were moved aside as damaged too.

    Returns:
        Entries removed, and by how many bytes the folder shrank.

    Raises:
        OptionError: the store has no such reference, or `unused_days` is negative.
    """
    if unused_days is not None and unused_days < 0:
        raise OptionError(f"unused_days is {unused_days}: give a number of days, 0 or more.")
    if reference is not None and reference not in (known := [usage.reference for usage in summary(folder)]):
        raise OptionError(f"The reference cache {folder} has no reference {reference!r}; it has {known or 'none'}.")
    store = Store(folder)
    if not store.path.parent.exists():
        return 0, 0
    before = _folder_bytes(store.path)
    everything = reference is None and unused_days is None
    latest = time.time() - (unused_days or 0) * 86400

    def delete(db: sqlite3.Connection) -> int:
        if everything:  # also what no reference owns any more
            db.execute("DELETE FROM refs")
            return db.execute("DELETE FROM entries").rowcount
        query = "SELECT id FROM refs WHERE (? IS NULL OR last_used <= ?) AND (? IS NULL OR reference = ?)"
        chosen = db.execute(query, (unused_days, latest, reference, reference)).fetchall()
        return sum(_delete_reference(db, row[0]) for row in chosen)

    removed = store.write(delete, 0)
    if removed:
        store.shrink()
    store.close()
    if everything:
        for path in store.path.parent.glob(f"{FILE_NAME}.corrupt-*"):
            path.unlink(missing_ok=True)
    return removed, max(0, before - _folder_bytes(store.path))


def _delete_reference(db: sqlite3.Connection, ref: int) -> int:
    """Number of entries deleted."""
    db.execute("DELETE FROM refs WHERE id = ?", (ref,))
    return db.execute("DELETE FROM entries WHERE ref = ?", (ref,)).rowcount


def _folder_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))


def _check_key(key: bytes) -> None:
    if not isinstance(key, bytes) or not 16 <= len(key) <= 32:
        raise ValueError(f"The key {key!r} is not 16 to 32 bytes: use a digest of the token ids and mask.")


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _date(seconds: Any) -> str:
    """An ISO date. A damaged one must not stop the listing."""
    try:
        return datetime.fromtimestamp(seconds, timezone.utc).date().isoformat()
    except (TypeError, ValueError, OverflowError, OSError):
        return "unknown"
