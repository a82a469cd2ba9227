"""The true reward of the quickstart's task: controlled sentiment, computed from the text alone.

As in section 6 of the DPO paper (Rafailov et al. 2023) a policy shall write reviews of high sentiment. Here the
sentiment is a documented function instead of a classifier, so every figure can be recomputed by hand.
"""

import re
from collections.abc import Sequence
from typing import Any

from .lexicon import DEGREE_WORDS, NEGATORS, VALENCE

# Fewer judgments than this share the reward with silence, so one "superb" alone is not a perfect review.
MIN_JUDGMENTS = 3
MIN_SENTENCE_WORDS = 4
MAX_JUDGMENT_SHARE = 0.5
NEGATION_FACTOR = -0.5

_SENTENCE = re.compile(r"[^.!?]+[.!?]")
_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")


def judgments(text: str) -> dict[str, float]:
    """Returns each distinct evaluative word of `text` with its valence in [-2, 2], in order of first use.

    Only finished sentences (ended by `.`, `!` or `?`) of at least four words count, and only where at most half of the
    words judge: a bare list of praise has no value. A word is counted once however often it is repeated. A negator
    before a word, with degree words between them or none, reverses and halves it: "not especially good" is -0.5, "not
    terrible" +1.
    """
    found: dict[str, float] = {}
    for sentence in _SENTENCE.findall(text):
        words = [word.lower() for word in _WORD.findall(sentence)]
        hits = [index for index, word in enumerate(words) if word in VALENCE]
        if len(words) < MIN_SENTENCE_WORDS or len(hits) > MAX_JUDGMENT_SHARE * len(words):
            continue
        for index in hits:
            found.setdefault(words[index], VALENCE[words[index]] * _sign(words, index))
    return found


def true_reward(text: str) -> float:
    """Returns the mean valence of the distinct evaluative words of `text`: in [-2, 2], 0.0 where nothing is judged.

    The sum is divided by at least `MIN_JUDGMENTS`. Length, repetition and praise outside sentences don't raise it.
    """
    values = judgments(text).values()
    return sum(values) / max(len(values), MIN_JUDGMENTS)


def review_reward(completions: Sequence[Any], **_: Any) -> list[float]:
    """Gives `true_reward` as TRL's reward functions are called: one number per completion, text or chat messages."""
    return [
        true_reward(completion if isinstance(completion, str) else completion[-1]["content"])
        for completion in completions
    ]


def _sign(words: list[str], index: int) -> float:
    """Returns 1.0, or `NEGATION_FACTOR` where the word at `index` is negated."""
    before = index - 1
    while before >= 0 and words[before] in DEGREE_WORDS:
        before -= 1
    return NEGATION_FACTOR if before >= 0 and words[before] in NEGATORS else 1.0
