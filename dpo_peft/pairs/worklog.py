"""A file that long work on numbered items is written to as it goes, so that a killed run goes on where it was.

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

Record = dict[str, Any]


def unfinished(output: Path) -> Path:
    """Where unfinished work on a file is kept."""
    return output.with_name(output.name + ".unfinished")


class WorkLog:
    """Finished records on disk. Only one process may write to it at a time."""

    def __init__(self, path: str | Path, header: Mapping[str, Any]):
        """Begin the work, or go on with it.

        Args:
            path: the file; it is made if it isn't there.
            header: all that decides the records, as JSON values by option.

        Raises:
            OptionError: the file was begun with another header (the first difference is named), or is damaged.
        """
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = self._whole_lines()
        begun = self._header(lines[0]) if lines else {}
        if len(lines) > 1:  # before the first chunk nothing is lost by beginning anew
            self._compare(begun, header)
            self.done = sum(len(self._parse(line, number)) for number, line in enumerate(lines[1:], 2))
            with open(self.path, "r+b") as file:
                file.truncate(sum(map(len, lines)))
        else:
            self.done = 0
            self._write(json.dumps(header), "wb")
            _sync_folder(self.path.parent)

    def append(self, records: Sequence[Record]) -> None:
        """One chunk. When this returns it is on the disk."""
        self._write(json.dumps(list(records), ensure_ascii=False), "ab")
        self.done += len(records)

    def records(self) -> Iterator[Record]:
        """All finished records in order, read from the file."""
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                if number > 1:
                    yield from self._parse(line, number)

    def delete(self) -> None:
        """The work is done and its result is elsewhere."""
        self.path.unlink(missing_ok=True)

    def _whole_lines(self) -> list[bytes]:
        if not self.path.is_file():
            return []
        with open(self.path, "rb") as file:
            lines = list(file)
        return lines if not lines or lines[-1].endswith(b"\n") else lines[:-1]

    def _header(self, line: bytes) -> Record:
        try:
            return dict(json.loads(line))
        except (ValueError, TypeError) as error:
            raise OptionError(f"{self.path} is no work file of this package. Delete it to begin anew.") from error

    def _compare(self, begun: Record, header: Mapping[str, Any]) -> None:
        now = json.loads(json.dumps(header))
        for name in [*now, *begun]:
            if begun.get(name) != now.get(name):
                raise OptionError(
                    f"{self.path} holds {self._chunks()} of unfinished work that was begun with {name} = "
                    f"{begun.get(name)!r}, and now it is {now.get(name)!r}. Give what it was begun with to go on, or "
                    "delete the file to begin anew."
                )

    def _chunks(self) -> str:
        chunks = len(self._whole_lines()) - 1
        return f"{chunks} chunk{'' if chunks == 1 else 's'}"

    def _parse(self, line: bytes, number: int) -> list[Record]:
        try:
            return list(json.loads(line))
        except (ValueError, TypeError) as error:
            raise OptionError(
                f"{self.path} line {number} is damaged. Cut the file off before that line to keep what is above, or "
                "delete it to begin anew."
            ) from error

    def _write(self, line: str, mode: str) -> None:
        with open(self.path, mode) as file:
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """A new file's name is in its folder, which is to be on the disk too."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems can't sync a folder
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
