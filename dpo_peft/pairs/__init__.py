"""Preference pairs from completions of a model: sample, judge, pair."""

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
    from .run import PairRun  # now: a wrong option should not wait for the slowest imports

    return PairRun(options).run()
