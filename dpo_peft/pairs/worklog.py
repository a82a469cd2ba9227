"""A file that long work on many items is written to as it goes, so that a killed run resumes where it was.

The first line says what the work is (`header`); each further line is one finished chunk, a JSON list with a record per
item, which holds the item's key. Records without keys, of older files, are those of the first items. A chunk is on the
disk before the next one begins. One that was being written when the
process died is an unfinished last line, and is cut off: a chunk is there as a whole or not at all.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..disk import write_atomically
from ..errors import OptionError

Record = dict[str, Any]


def unfinished(output: Path) -> Path:
    """Returns the path where unfinished work on a file is kept."""
    return output.with_name(output.name + ".unfinished")


class WorkLog:
    """Finished records on disk. Only one process may write to it at a time.

    Attributes:
        done: keys of the items that have a record, to where it is: the byte of its line, and its place there.
    """

    def __init__(self, path: str | Path, header: Mapping[str, object], keys: Sequence[str]):
        """Begins the work, or resumes it.

        Args:
            path: the file; it is made if it isn't there.
            header: all that decides the records, as JSON values by option.
            keys: of the items, in their order.

        Raises:
            OptionError: the file was begun with another header (the first difference is named), is damaged, or holds
                records of other items.
        """
        self.path, self.keys, self.done = Path(path), keys, dict[str, tuple[int, int]]()
        there = self.path.read_bytes() if self.path.is_file() else b""
        whole = there[: there.rfind(b"\n") + 1]  # the last line may be cut off
        begun, *chunks = whole.split(b"\n")[:-1] or [b"{}"]
        found = self._parse(begun, dict, "is no work file of this package. Delete it")
        known, byte = set(keys), len(begun) + 1
        for number, line in enumerate(chunks, 2):
            cut = "Cut the file off before that line to keep what is above, or delete it"
            for place, record in enumerate(self._parse(line, list, f"line {number} is damaged. {cut}")):
                key = record.get("key") or next(iter(keys[len(self.done) : len(self.done) + 1]), "")
                if key not in known:
                    raise OptionError(
                        f"{self.path} line {number} is of an item that isn't there. {cut} to begin anew."
                    )
                self.done.setdefault(key, (byte, place))
            byte += len(line) + 1
        if chunks:  # before the first chunk nothing is lost by beginning anew
            self._compare(found, json.loads(json.dumps(header)), len(chunks))
            os.truncate(self.path, len(whole))
        else:
            write_atomically(self.path, json.dumps(header) + "\n", private=True)

    def append(self, records: Mapping[str, Record]) -> None:
        """Writes one chunk, records by their items' keys. When this returns it is on the disk."""
        chunk = [{"key": key, **record} for key, record in records.items()]
        with open(self.path, "ab") as file:
            byte = file.tell()
            file.write(json.dumps(chunk, ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.done |= {key: (byte, place) for place, key in enumerate(records)}

    def records(self) -> Iterator[Record]:
        """Yields the records of all items, in the items' order, read from the file."""
        at, chunk = -1, list[Record]()
        with open(self.path, "rb") as file:
            for byte, place in map(self.done.__getitem__, self.keys):
                if byte != at:
                    file.seek(byte)
                    at, chunk = byte, json.loads(file.readline())
                yield chunk[place]

    def delete(self) -> None:
        """Deletes the file: the work is done and its result is elsewhere."""
        self.path.unlink(missing_ok=True)

    def _compare(self, begun: Record, now: Record, chunks: int) -> None:
        for name in [*now, *begun]:
            if begun.get(name) != now.get(name):
                raise OptionError(
                    f"{self.path} holds {chunks} chunk{'s' * (chunks > 1)} of unfinished work that was begun with "
                    f"{name} = {begun.get(name)!r}, and now it is {now.get(name)!r}. Give what it was begun with to "
                    "resume it, or delete the file to begin anew."
                )

    def _parse(self, line: bytes, kind: type, wrong: str) -> Any:
        with suppress(ValueError):
            if isinstance(found := json.loads(line), kind):
                return found
        raise OptionError(f"{self.path} {wrong} to begin anew.")
