"""Preference pairs from completions of a model: sample, judge, pair."""

from contextlib import ExitStack

from ..disk import one_writer
from .options import PairsOptions

__all__ = ["PairsOptions", "make_pairs"]


def make_pairs(options: PairsOptions) -> dict[str, object]:
    """Makes pairs, as `dpo-peft pairs` does. Work that was stopped is resumed when the same options are given again.

    Returns:
        What became of prompts and completions, see `building.summarize`; and the files, how many prompts were read
        from unfinished work, and seconds.

    Raises:
        OptionError, DataError, ReferenceMismatchError: with the remedy.
        KeyboardInterrupt: stopped by Ctrl-C; the message says what is kept.
    """
    options.check()
    with ExitStack() as locks:
        for name, path in options.outputs.items():
            locks.enter_context(one_writer(name, path))
        from .run import PairRun  # now: a wrong option should not wait for the slowest imports

        return PairRun(options).run()
