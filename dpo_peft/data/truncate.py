"""Cuts a prompt with its K completions to `max_length` tokens. The prompt stays one for all completions of a row.

- `keep_start`: the first `max_length` tokens of prompt + completion, as TRL does. Ends of long completions are lost.
- `keep_end`: the prompt loses its start, by what its longest completion needs; only when one prompt token is left is a
  completion cut, and then it keeps its end. TRL cuts chosen and rejected each on its own, so that the shorter one sees
  more of the prompt; here both answer the same context.
- `trim_prompt`: like `keep_end`, but completions are never cut: a row with one that can't fit is unusable.
"""

from dataclasses import replace

from ..errors import OptionError
from .formats import Encoded
from .summary import COMPLETION_TOO_LONG, IDENTICAL_AFTER, PROMPT_TOO_LONG

TRUNCATION_MODES = ("keep_start", "keep_end", "trim_prompt")


def check_truncation(max_length: int | None, mode: str) -> None:
    """Raises `OptionError` for an unknown mode or a length that can't hold one prompt and one completion token."""
    if mode not in TRUNCATION_MODES:
        raise OptionError(f"truncation_mode={mode!r} is unknown. Use one of {', '.join(TRUNCATION_MODES)}.")
    if max_length is None:
        return
    if type(max_length) is not int or max_length < 2:
        raise OptionError(f"max_length={max_length!r} must be None or an integer of at least 2 (tokens).")


def fit(encoded: Encoded, max_length: int | None, mode: str) -> Encoded | str:
    """Fits one row, or names the reason why nothing useful is left of it."""
    prompt, longest = len(encoded.prompt_ids), max(map(len, encoded.completion_ids))
    if max_length is None or prompt + longest <= max_length:
        return encoded
    left = prompt
    if mode == "keep_start":
        if prompt >= max_length:
            return PROMPT_TOO_LONG
    elif mode == "trim_prompt" and longest > max_length - min(prompt, 1):
        return COMPLETION_TOO_LONG
    else:
        left = min(prompt, max(max_length - longest, 1))
    room = max_length - left
    kept = slice(room) if mode == "keep_start" else slice(-room, None)
    cut = sum(len(ids) > room for ids in encoded.completion_ids)
    fitted = replace(
        encoded,
        prompt_ids=encoded.prompt_ids[prompt - left :],
        completion_ids=[ids[kept] for ids in encoded.completion_ids],
        steps=[values[kept] for values in encoded.steps],
        prompt_cut=prompt - left,
        completions_cut=cut,
        ends_lost=cut if mode == "keep_start" else 0,
    )
    return IDENTICAL_AFTER if all_same(fitted.completion_ids) else fitted


def all_same(completion_ids: list[list[int]]) -> bool:
    """Says whether there are several completions and they don't differ."""
    return len(completion_ids) > 1 and all(ids == completion_ids[0] for ids in completion_ids[1:])
