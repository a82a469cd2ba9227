"""What tells better completions from worse ones besides what they say: their length, and their form.

A model that is trained on pairs learns whatever tells them apart. So each form is counted on both sides. In pairs and
lists the best and the worst completion of a row are compared, and rows in which just one of them has the form say
which side it is on (McNemar 1947); single completions are two samples. A difference is notable if it is more than
noise at 5 % for all forms together (Bonferroni), and one side has the form in at least 5 % of its completions, and
that is 5 percentage points more than the other side, or twice as much.
"""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from ..reward.agreement import Estimate, Judged, agreement, tally_rows, wilson
from ..training.tally import tally_singles

NOTABLE = 0.05
APOLOGY = re.compile(
    r"\W*(?:i(?:'|’| a)?m (?:very |really |so )?sorry|sorry\b|(?:i|my) (?:sincerely )?apolog|my apologies"
    r"|i (?:can(?:'|’| ?no)t|won(?:'|’)t|am (?:un|not )able|must decline)|unfortunately,? i\b|as an ai\b"
    r"|对不起|抱歉|很抱歉|作为一个人工智能|作为一个ai|我无法|我不能|申し訳|すみません"
    r"|(?:je suis )?désolé|lo siento|es tut mir leid)",
    re.IGNORECASE,
)
_LISTED = re.compile(r"^[ \t]*(?:[-*•+]|\d{1,3}[.)])[ \t]+\S", re.MULTILINE)
_HEADED = re.compile(r"^ {0,3}#{1,6}[ \t]+\S", re.MULTILINE)
_BOLD = re.compile(r"\*\*[^\s*][^*\n]*\*\*")
# What a form is called -> whether a completion has it, given its prompt.
FORMS: dict[str, Callable[[str, str], bool]] = {
    "lists": lambda text, prompt: len(_LISTED.findall(text)) > 1,
    "headings": lambda text, prompt: _HEADED.search(text) is not None,
    "bold": lambda text, prompt: _BOLD.search(text) is not None,
    "code blocks": lambda text, prompt: "```" in text,
    "refusal or apology first": lambda text, prompt: APOLOGY.match(text) is not None,
    "a question last": lambda text, prompt: text.rstrip(" \n\"'”*)").endswith(("?", "？")),
    "another script than the prompt": lambda text, prompt: _differ(script(text), script(prompt)),
}
Z = NormalDist().inv_cdf(1 - 0.05 / 2 / len(FORMS))
LOOKED_AT = 500  # characters of a text, for its script


def script(text: str) -> str:
    """Returns the script that most letters of a text's start are of, such as LATIN or CYRILLIC; "" without letters.

    Chinese and Japanese are one: what they share tells them apart least.
    """
    start = text[:LOOKED_AT]
    if start.isascii():  # what most texts are is told fast
        return "LATIN" if re.search("[A-Za-z]", start) else ""
    counts = Counter(map(_script_of, filter(str.isalpha, start)))
    return max(counts, key=lambda name: counts[name], default="")


def _script_of(char: str) -> str:
    if char < "ɐ":
        return "LATIN"
    word = unicodedata.name(char, "").partition(" ")[0]
    return "CJK" if word in ("HIRAGANA", "KATAKANA") else word


def _differ(one: str, other: str) -> bool:
    return bool(one and other and one != other)


def forms_of(text: str, prompt: str) -> list[bool]:
    """Returns which of `FORMS` a completion has."""
    return [has(text, prompt) for has in FORMS.values()]


class Form(NamedTuple):
    """How often better and worse completions have a form."""

    better: float  # shares
    worse: float
    notable: bool  # whether they differ by more than noise, and much


def compare_forms(better: Sequence[Sequence[bool]], worse: Sequence[Sequence[bool]], paired: bool) -> dict[str, Form]:
    """Returns the shares of each form on both sides.

    Args:
        better, worse: `forms_of` of completions. If `paired`, each stands beside the one that it is compared with.
    """
    a_NF, b_NF = np.array(better, bool), np.array(worse, bool)
    found = {}
    for number, name in enumerate(FORMS):
        a_N, b_N = a_NF[:, number], b_NF[:, number]
        a, b = float(a_N.mean()), float(b_N.mean())
        if paired:
            spread = math.sqrt(float((a_N != b_N).sum())) / len(a_N)
        else:
            share = float(np.concatenate([a_N, b_N]).mean())
            spread = math.sqrt(share * (1 - share) * (1 / len(a_N) + 1 / len(b_N)))
        large = abs(a - b) >= NOTABLE or 2 * min(a, b) <= max(a, b)
        found[name] = Form(a, b, large and max(a, b) >= NOTABLE and abs(a - b) > Z * spread)
    return found


class LengthBias(NamedTuple):
    """How lengths tell better from worse completions."""

    longer: Estimate  # share of comparisons whose better completion is longer
    shorter: float
    length_only: Estimate  # accuracy of "the longer completion is better": ties count half
    mean_difference: float  # mean length of the better ones minus that of the worse ones


def compare_lengths(lengths: Sequence[Sequence[int]], grades: Sequence[Sequence[float]]) -> LengthBias | None:
    """Returns the bias of rows, from the lengths and grades of their completions; None where nothing is compared.

    Rows of one completion each are compared with each other: any desirable with any undesirable one.
    """
    single = all(len(row) == 1 for row in grades)
    if single:
        flat_lengths, flat_grades = [row[0] for row in lengths], [row[0] for row in grades]
        tally = tally_singles(flat_lengths, flat_lengths, flat_grades)
    else:
        tally = tally_rows([Judged(row, row, graded) for row, graded in zip(lengths, grades, strict=True)])
    found = agreement(tally)
    if found is None:
        return None
    longer, shorter = (side[0] / found.comparisons for side in (found.better_longer, found.better_shorter))
    number = min(np.bincount(tally.side_R)) if single else found.rows
    return LengthBias(wilson(longer, int(number)), shorter, found.length_only, found.mean_margin)
