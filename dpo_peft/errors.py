"""Every error this package raises on purpose, so that callers can tell a wrong input from a defect.

All but `TrainingInterrupted` derive from `ValueError`. A message names where the trouble is (option, or dataset, row
and field), what is wrong, and the remedy.
"""

from collections.abc import Mapping


class OptionError(ValueError):
    """An option is unknown, contradictory, of the wrong type, or would have no effect."""


def refuse(problems: Mapping[str, object]) -> None:
    """Raises `OptionError` with the first of these messages whose condition holds."""
    for message, holds in problems.items():
        if holds:
            raise OptionError(message)


class DataError(ValueError):
    """A dataset, row or field can't be used. `str(error)` names dataset, row and field and the remedy."""


class ReferenceMismatchError(ValueError):
    """The adapter-off model is not the reference that the run needs (see `reference.py`)."""


class NonFiniteError(ValueError):
    """A loss or gradient became NaN or infinite. The message names the rows of the batch."""


class CheckpointError(ValueError):
    """A checkpoint can't be written, or is not whole. The message names the last one that is."""


class DriftError(ValueError):
    """A merged or served model is further from the adapter's model than allowed; of a merge nothing is left."""


class PublishError(ValueError):
    """The Hub could not be written to. The message says what is there by now, and how to go on."""


class StrictError(ValueError):
    """`--strict` was given, and something of what was looked at is to be acted on."""


class TrainingInterrupted(SystemExit):
    """The run was told to stop (SIGTERM, Ctrl-C), finished its step and saved a checkpoint. `code` is the exit status
    that a shell gives for the signal, so a script that lets it pass ends quietly and is seen as interrupted."""
