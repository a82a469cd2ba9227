"""Cuts a prompt with its K completions to `max_length` tokens. The prompt stays one for all completions of a row.

- `keep_start`: the first `max_length` tokens of prompt + completion, as TRL does. Ends of long completions are lost.
- `keep_end`: the prompt loses its start, by what its longest completion needs; only when one prompt token is left is a
  completion cut, and then it keeps its end. TRL cuts chosen and rejected each on its own, so that the shorter one sees
  more of the prompt; here both answer the same context.
- `trim_prompt`: like `keep_end`, but completions are never cut: a row with one that can't fit is unusable.
"""

from dataclasses import dataclass, field

from ..errors import OptionError
from .summary import COMPLETION_TOO_LONG, IDENTICAL_AFTER, PROMPT_TOO_LONG

TRUNCATION_MODES = ("keep_start", "keep_end", "trim_prompt")


@dataclass(frozen=True)
class Fitted:
    """A row's ids after truncation, a step for each of its completions' tokens, and how much it took."""

    prompt_ids: list[int]
    completion_ids: list[list[int]]
    prompt_cut: int = 0  # tokens
    completions_cut: int = 0  # completions
    ends_lost: int = 0  # completions
    steps: list[list[int]] = field(default_factory=list)  # of trajectories


def check_truncation(max_length: int | None, mode: str) -> None:
    """Raises `OptionError` for an unknown mode or a length that can't hold one prompt and one completion token."""
    if mode not in TRUNCATION_MODES:
        raise OptionError(f"truncation_mode={mode!r} is unknown. Use one of {', '.join(TRUNCATION_MODES)}.")
    if max_length is None:
        return
    if type(max_length) is not int or max_length < 2:
        raise OptionError(f"max_length={max_length!r} must be None or an integer of at least 2 (tokens).")


def fit(
    prompt_ids: list[int],
    completion_ids: list[list[int]],
    max_length: int | None,
    mode: str,
    steps: list[list[int]] | None = None,
) -> Fitted | str:
    """Fits one row, or names the reason why nothing useful is left of it."""
    steps, longest = steps or [], max(map(len, completion_ids))
    if max_length is None or len(prompt_ids) + longest <= max_length:
        return Fitted(prompt_ids, completion_ids, steps=steps)
    prompt_left = len(prompt_ids)
    if mode == "keep_start":
        if len(prompt_ids) >= max_length:
            return PROMPT_TOO_LONG
    elif mode == "trim_prompt" and longest > max_length - min(len(prompt_ids), 1):
        return COMPLETION_TOO_LONG
    else:
        prompt_left = min(len(prompt_ids), max(max_length - longest, 1))
    room = max_length - prompt_left
    kept = slice(room) if mode == "keep_start" else slice(-room, None)
    cut = sum(len(ids) > room for ids in completion_ids)
    fitted = Fitted(
        prompt_ids[len(prompt_ids) - prompt_left :],
        [ids[kept] for ids in completion_ids],
        len(prompt_ids) - prompt_left,
        cut,
        ends_lost=cut if mode == "keep_start" else 0,
        steps=[values[kept] for values in steps],
    )
    return IDENTICAL_AFTER if all_same(fitted.completion_ids) else fitted


def all_same(completion_ids: list[list[int]]) -> bool:
    """Says whether there are several completions and they don't differ."""
    return len(completion_ids) > 1 and all(ids == completion_ids[0] for ids in completion_ids[1:])
