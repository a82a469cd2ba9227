"""What one row may cost, as rows and chat templates are written by others: size, depth, and a template's time."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

MOST_CHARACTERS = 64_000_000  # in the texts of a column
MOST_VALUES = 16_000_000  # in its lists and dicts
DEEPEST = 100  # lists and dicts inside each other
TEMPLATE_SECONDS = 20.0  # of computing, for one rendering: one of 800 turns takes a twentieth of a second


class _OutOfTime(BaseException):
    """Passes whatever a template, or what runs it, catches."""


def size_problem(content: object) -> str | None:
    """Returns what makes a column's content too large or too deep to be read; None if it is neither."""
    characters = values = depth = 0
    level = [content]
    while level:
        below: list[object] = []
        for value in level:
            if isinstance(value, str | bytes):
                characters += len(value)
            elif isinstance(value, dict):
                below += [*value, *value.values()]
            elif isinstance(value, list | tuple):
                values += len(value)
                below += [inner for inner in value if type(inner) is not int]  # token ids, by the thousand
        values, depth, level = values + len(below), depth + 1, below
        if characters > MOST_CHARACTERS or values > MOST_VALUES:
            return f"is too large ({characters:,} characters in {values:,} values)"
        if depth > DEEPEST:
            return f"is nested more than {DEEPEST} levels deep"
    return None


def _stop(*_: object) -> None:
    raise _OutOfTime


@contextmanager
def limited_time(seconds: float) -> Iterator[None]:
    """Raises `TimeoutError` when what is inside computes for longer.

    Outside of the main thread, and on systems without such a timer, nothing is limited. Worker processes have main
    threads of their own.
    """
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return
    if signal.getsignal(signal.SIGVTALRM) is not _stop:  # it stays: a row is rendered several times
        signal.signal(signal.SIGVTALRM, _stop)
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
        yield
    except _OutOfTime:
        raise TimeoutError(f"it takes more than {seconds:g} s, and may never end") from None
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
