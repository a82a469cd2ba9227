"""A row as it is trained on, for people: what is given, what the model is to write, control tokens, what was cut.

In color the prompt is blue, the chosen completion green, the rejected one red, what a trajectory doesn't score dim,
and control tokens stand out. Without color they stand in ⟦ ⟧, and every part has its label in any case. A line's end
is shown as ⏎, blanks at the end of a line as ␣. What a terminal would obey is spelled: rows are other people's.
"""

import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from ..data.images import Images
from ..data.trajectories import GIVEN

CODES = {"prompt": "94", "good": "32", "bad": "31", "between": "33", "given": "2", "control": "1;35", "note": "2;3"}
# Controls, marks that turn the direction of writing, other ends of lines, and halves of characters.
HOSTILE = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
LABEL = 12  # columns
ENDING = 4  # tokens at a completion's end among which its end token is looked for: a line's end may follow it
NARROWEST = 40

Piece = tuple[str, str]  # text, style


class Part(NamedTuple):
    """A part of a row: its label, and its text in pieces of one style each."""

    label: str
    pieces: list[Piece]


def render_row(
    row: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    width: int = 80,
    color: bool = False,
    whole: Mapping[str, Any] | None = None,
    most_lines: int | None = None,
    images: Images | None = None,
) -> str:
    """Renders a prepared row, token for token what is trained on.

    Args:
        row: of a dataset that `prepare_dataset` returned: pairs, lists, single completions, trajectories.
        tokenizer: that it was prepared with.
        width: columns to wrap at, at least 40.
        color: whether ANSI codes mark the parts.
        whole: the same row prepared with `max_length=None`: what truncation took is counted where it was.
        most_lines: of each part, at least 3; what is left out between its start and its last line is counted.
        images: that it was prepared with: each image is shown by its size and the number of its tokens.

    Returns:
        Lines without a line end behind the last. Nothing in them but the colors is obeyed by a terminal.
    """
    labels = completion_labels(row.get("grades"), len(row["completion_ids"]))
    steps = row.get("steps") or [[0] * len(ids) for ids in row["completion_ids"]]
    before = whole or row
    cut = _cut(before["prompt_ids"], row["prompt_ids"])
    shown, at = list[Piece](), 0
    for start, end, what in [*(images.spans(row) if images else ()), (len(row["prompt_ids"]), 0, "")]:
        shown += _pieces(tokenizer, row["prompt_ids"][:at], row["prompt_ids"][at:start], "prompt")
        shown, at = [*shown, *([(what, "control")] if what else [])], end
    parts = [Part("prompt", _around(shown, *cut))]
    for (label, style), ids, full, of in zip(
        labels, row["completion_ids"], before["completion_ids"], steps, strict=True
    ):
        first, last = _cut(full, ids)
        at, runs = 0, [(given, len(list(run))) for given, run in groupby(step == GIVEN for step in of)]
        for number, (given, size) in enumerate(runs):
            context = [*row["prompt_ids"], *ids[:at]]
            pieces = _pieces(tokenizer, context, ids[at : at + size], "given" if given else style)
            ends = first if not number else 0, last if number == len(runs) - 1 else 0
            parts.append(Part("  given" if given else label, _around(pieces, *ends)))
            at += size
        if not last and not any(_is_control(tokenizer, token) for token in ids[-ENDING:]):
            parts[-1].pieces.append((" [no end token]", "note"))
    return render_parts(parts, width, color, most_lines)


def completion_labels(grades: Sequence[float] | None, number: int) -> list[Piece]:
    """Returns the label and the style of each completion of a row, the best first."""
    if not grades:
        return [("chosen", "good"), ("rejected", "bad")] if number == 2 else [("completion", "prompt")] * number
    if number == 1:
        return [("desirable", "good") if grades[0] > 0 else ("undesirable", "bad")]
    places = {grade: place for place, grade in enumerate(sorted(set(grades), reverse=True), 1)}
    named = {1: ("best", "good"), len(places): ("worst", "bad")}
    return [named.get(places[grade], (f"{places[grade]}.", "between")) for grade in grades]


def render_parts(parts: Sequence[Part], width: int = 80, color: bool = False, most_lines: int | None = None) -> str:
    """Renders parts with their labels; arguments as of `render_row`."""
    lines = []
    for label, given in parts:
        pieces = [(f"⟦{text}⟧" if style == "control" and not color else text, style) for text, style in given]
        shown = list(_wrapped(pieces, max(width, NARROWEST) - LABEL))
        if most_lines is not None and len(shown) > most_lines:
            out = len(shown) - most_lines + 1
            shown[most_lines - 2 : -1] = [[(f"… {out} more lines …", "note")]]
        texts = ["".join(f"\x1b[{CODES[of]}m{text}\x1b[0m" if color else text for text, of in line) for line in shown]
        lines += [f"{label if not number else '':<{LABEL}}{text}".rstrip() for number, text in enumerate(texts)]
    return "\n".join(lines)


def _cut(whole: Sequence[int], kept: Sequence[int]) -> tuple[int, int]:
    """Returns how many tokens truncation took from the start and from the end."""
    cut = len(whole) - len(kept)
    return (0, cut) if list(whole[: len(kept)]) == list(kept) else (cut, 0)


def _around(pieces: list[Piece], first: int, last: int) -> list[Piece]:
    before = [(f"[{first:,} tokens cut] ", "note")] if first else []
    return [*before, *pieces, *([(f" [{last:,} tokens cut]", "note")] if last else [])]


def _is_control(tokenizer: PreTrainedTokenizerBase, token: int) -> bool:
    added = tokenizer.added_tokens_decoder.get(token)
    return added is not None and (added.special or str(added).startswith("<"))


def _pieces(tokenizer: PreTrainedTokenizerBase, before: Sequence[int], ids: Sequence[int], style: str) -> list[Piece]:
    """Returns the text of ids behind others, control tokens apart."""
    decode: Callable[[Sequence[int]], str] = lambda some: str(  # noqa: E731
        tokenizer.decode(some, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    )
    pieces, shown, done = [], list(before), 0
    for is_control, run in groupby(_is_control(tokenizer, token) for token in ids):
        size = len(list(run))
        for part in [[token] for token in ids[done : done + size]] if is_control else [ids[done : done + size]]:
            start, text = decode(shown), decode([*shown, *part])
            # A decoder of words takes the blank away that a text begins with: it is asked with what stands before.
            text = text[len(start) :] if text.startswith(start) else decode(part)
            text = str(tokenizer.convert_ids_to_tokens(part[0])) if is_control else text
            pieces.append((text, "control" if is_control else style))
            shown += part
        done += size
    return pieces


# ---- Lines ----------------------------------------------------------------------------------------------------------


def visible(text: str) -> str:
    """Returns a text with its line ends and blanks before them shown, and with what a terminal would obey spelled."""
    text = re.sub(" +(?=\n|$)", lambda blanks: "␣" * len(blanks[0]), text).replace("\n", "⏎\n")
    return HOSTILE.sub(lambda found: ascii(found[0])[1:-1], text)


def _wrapped(pieces: Sequence[Piece], room: int) -> Iterator[list[Piece]]:
    """Yields lines of pieces that fill `room` columns at most, broken at blanks where there are some."""
    line: list[tuple[str, str, int]] = []  # character, style, columns
    filled = 0
    for char, style in ((char, style) for text, style in pieces for char in visible(text)):
        columns = 0 if unicodedata.combining(char) else 1 + (unicodedata.east_asian_width(char) in "WF")
        if char == "\n" or filled + columns > room:
            blanks = [at for at, (one, _, _) in enumerate(line) if one == " "] if char != "\n" else []
            end = blanks[-1] + 1 if blanks and blanks[-1] > len(line) // 2 else len(line)
            yield _joined(line[:end])
            line = line[end:]
            filled = sum(one[2] for one in line)
        if char != "\n":
            line.append((char, style, columns))
            filled += columns
    if line:
        yield _joined(line)


def _joined(line: Sequence[tuple[str, str, int]]) -> list[Piece]:
    return [("".join(char for char, _, _ in run), style) for style, run in groupby(line, key=lambda one: one[1])]
