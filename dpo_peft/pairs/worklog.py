"""A file that long work on numbered items is written to as it goes, so that a killed run resumes where it was.

The first line says what the work is (`header`); each further line is one finished chunk, a JSON list with a record per
item, in the order of the items. A chunk is on the disk before the next one begins. One that was being written when the
process died is an unfinished last line, and is cut off: a chunk is there as a whole or not at all.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import OptionError
from ..files import write_atomically

Record = dict[str, Any]


def unfinished(output: Path) -> Path:
    """Returns the path where unfinished work on a file is kept."""
    return output.with_name(output.name + ".unfinished")


class WorkLog:
    """Finished records on disk. Only one process may write to it at a time."""

    def __init__(self, path: str | Path, header: Mapping[str, object]):
        """Begins the work, or resumes it.

        Args:
            path: the file; it is made if it isn't there.
            header: all that decides the records, as JSON values by option.

        Raises:
            OptionError: the file was begun with another header (the first difference is named), or is damaged.
        """
        self.path, self.done = Path(path), 0
        there = self.path.read_bytes() if self.path.is_file() else b""
        whole = there[: there.rfind(b"\n") + 1]  # the last line may be cut off
        begun, *chunks = whole.split(b"\n")[:-1] or [b"{}"]
        found = self._parse(begun, dict, "is no work file of this package. Delete it")
        for number, line in enumerate(chunks, 2):
            wrong = f"line {number} is damaged. Cut the file off before that line to keep what is above, or delete it"
            self.done += len(self._parse(line, list, wrong))
        if chunks:  # before the first chunk nothing is lost by beginning anew
            self._compare(found, json.loads(json.dumps(header)), len(chunks))
            os.truncate(self.path, len(whole))
        else:
            write_atomically(self.path, json.dumps(header) + "\n", private=True)
            _sync_folder(self.path.parent)

    def append(self, records: Sequence[Record]) -> None:
        """Writes one chunk. When this returns it is on the disk."""
        with open(self.path, "ab") as file:
            file.write(json.dumps(list(records), ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.done += len(records)

    def records(self) -> Iterator[Record]:
        """Yields all finished records in order, read from the file."""
        with open(self.path, "rb") as file:
            next(file)  # the header
            for line in file:
                yield from json.loads(line)

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


def _sync_folder(folder: Path) -> None:
    """Waits until a new file's name, which is in its folder, is on the disk too."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems can't sync a folder
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
