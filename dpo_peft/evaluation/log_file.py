"""Writes what a run shows into a file as well: `log_file`."""

import logging
from pathlib import Path

from ..config import DPOConfig
from ..errors import OptionError

NEWS = logging.getLogger("dpo_peft")
SHOWN = logging.getLogger("dpo_peft.shown")  # what is printed and no news: lines of logs, the final table
SHOWN.propagate = False
SHOWN.setLevel(logging.INFO)


class LogFile(logging.FileHandler):
    """A file that lines are added to."""


class _Lines(logging.Formatter):
    """The time, and a text without what a terminal would obey."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns a record's text, its further lines indented."""
        text = "".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in super().format(record))
        return text.replace("\n", "\n" + " " * 20)


def open_log(args: DPOConfig) -> None:
    """Begins to add to `log_file`; by the main process alone. The file of an earlier run is closed. Raises
    `OptionError` where it can't be written to."""
    for logger in (NEWS, SHOWN):
        for handler in [one for one in logger.handlers if isinstance(one, LogFile)]:
            logger.removeHandler(handler)
            handler.close()
    if args.log_file is None or args.process_index != 0:
        return
    path = Path(args.log_file)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = LogFile(path, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise OptionError(f"log_file={args.log_file!r} can't be written to: {error}. Give another file.") from error
    handler.setFormatter(_Lines("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    if not NEWS.isEnabledFor(logging.INFO):
        NEWS.setLevel(logging.INFO)
    for logger in (NEWS, SHOWN):
        logger.addHandler(handler)
