"""Preference pairs from several scored completions of a prompt.

| method       | pairs of a prompt                                                                               |
|--------------|-------------------------------------------------------------------------------------------------|
| `best_worst` | one: the highest reward against the lowest                                                      |
| `all`        | every two completions of different reward, the widest margins first, at most `max_pairs`        |
| `rso`        | rejection sampling first, then pairs of what was accepted (`rejection_sampling.py`)             |

Nothing is left out silently: every completion, pair and prompt that gives nothing is counted under one of the reasons
below.
"""

import hashlib
import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from random import Random
from typing import Any, NamedTuple

from ..errors import OptionError
from .rejection_sampling import first_round, rejection_sample, tournament

METHODS = ("best_worst", "all", "rso")
MATCHES = {"first_round": first_round, "tournament": tournament}

# Why a completion is not used.
EMPTY, UNFINISHED, DUPLICATE, UNSCORED = "empty", "unfinished", "same text as another", "no reward"
# Why two completions are not a pair.
TIE, BELOW_MARGIN, BEYOND_MAX = "equal rewards", "margin below min_margin", "beyond max_pairs"
# Why a prompt has no pair, if it isn't one of the above.
TOO_FEW, TOO_LONG = "fewer than two different answers", "prompt too long for the model"


class Candidate(NamedTuple):
    """A completion of a prompt."""

    completion: Any  # text, or a list of messages
    score: float | None
    finished: bool = True
    tokens: int | None = None

    @property
    def text(self) -> str:
        """The text, or what messages say: two completions are the same if this is."""
        if isinstance(self.completion, str):
            return self.completion
        match self.completion:
            case [{"role": _, "content": str(text), **more}] if not more:
                return text
        return json.dumps(self.completion, sort_keys=True)


@dataclass(frozen=True)
class Rules:
    """The rules by which pairs are made of candidates.

    Raises:
        OptionError: a value out of range.
    """

    method: str = "best_worst"
    min_margin: float = 0.0  # least difference of the two rewards; a tie is never a pair
    max_pairs: int | None = None  # of a prompt, with "all"
    require_finished: bool = True
    rso_beta: float = 0.5
    rso_accept: int = 4
    rso_pairs: str = "first_round"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, right, must in (
            ("method", self.method in METHODS, f"be one of {', '.join(METHODS)}"),
            ("rso_pairs", self.rso_pairs in MATCHES, f"be one of {', '.join(MATCHES)}"),
            ("min_margin", 0 <= self.min_margin < math.inf, "be 0 or above"),
            ("max_pairs", self.max_pairs is None or self.max_pairs >= 1, "be at least 1"),
            ("rso_beta", 0 < self.rso_beta < math.inf, "be a number above 0"),
            ("rso_accept", self.rso_accept >= 2, "be at least 2, to make a pair"),
        ):
            if not right:
                raise OptionError(f"{name}={getattr(self, name)!r} must {must}.")


@dataclass
class Built:
    """The pairs of one prompt, and what became of its completions."""

    pairs: list[tuple[Candidate, Candidate]] = field(default_factory=list)  # chosen, rejected
    usable: list[Candidate] = field(default_factory=list)  # all that could be in a pair
    accepted: list[Candidate] = field(default_factory=list)  # by rejection sampling, in that order
    trials: int = 0  # of rejection sampling
    unused: Counter[str] = field(default_factory=Counter)  # completions, by reason
    no_pair: Counter[str] = field(default_factory=Counter)  # twos of completions, by reason


def seed_of(*parts: int | str) -> int:
    """Returns a seed in [0, 2**63) for a part of the work, such as (seed, prompt number, candidate): near numbers give
    unrelated seeds."""
    digest = hashlib.blake2b(" ".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def build_pairs(candidates: Sequence[Candidate], rules: Rules, number: int) -> Built:
    """Makes the pairs of one prompt.

    Args:
        candidates: the completions in the order in which they were sampled.
        rules: as above.
        number: of the prompt; with the rules' seed it decides what is drawn.
    """
    built = Built()
    usable = built.usable = _usable(candidates, rules, built.unused)
    scores = [candidate.score for candidate in usable if candidate.score is not None]
    if rules.method == "all":
        twos = [(i, j) if scores[i] >= scores[j] else (j, i) for i, j in combinations(range(len(usable)), 2)]
        twos.sort(key=lambda two: scores[two[1]] - scores[two[0]])  # a stable sort: ties in order of sampling
    elif rules.method == "rso":
        draw = Random(seed_of(rules.seed, number, "rso"))
        accepted, built.trials = rejection_sample(scores, rules.rso_accept, rules.rso_beta, draw)
        built.accepted = [usable[i] for i in accepted]
        twos = MATCHES[rules.rso_pairs](accepted, scores, draw)
    else:
        best = max(range(len(usable)), key=scores.__getitem__, default=0)
        worst = min(range(len(usable)), key=scores.__getitem__, default=0)
        twos = [(best, worst)] if len(usable) > 1 else []
    for better, worse in twos:
        reason = _refused(scores[better] - scores[worse], len(built.pairs), rules)
        if reason is None:
            built.pairs.append((usable[better], usable[worse]))
        else:
            built.no_pair[reason] += 1
    return built


def _usable(candidates: Sequence[Candidate], rules: Rules, unused: Counter[str]) -> list[Candidate]:
    seen: set[str] = set()
    usable = []
    for candidate in candidates:
        text = candidate.text
        if not text.strip():
            unused[EMPTY] += 1
        elif rules.require_finished and not candidate.finished:
            unused[UNFINISHED] += 1
        elif candidate.score is None:
            unused[UNSCORED] += 1
        elif text in seen:
            unused[DUPLICATE] += 1
        else:
            seen.add(text)
            usable.append(candidate)
    return usable


def _refused(margin: float, pairs: int, rules: Rules) -> str | None:
    if margin <= 0:
        return TIE
    if margin < rules.min_margin:
        return BELOW_MARGIN
    return BEYOND_MAX if rules.max_pairs is not None and pairs >= rules.max_pairs else None


@dataclass
class Tally:
    """The count of what became of all prompts."""

    prompts: int = 0
    with_pairs: int = 0
    candidates: int = 0
    trials: int = 0
    accepted: int = 0
    unused: Counter[str] = field(default_factory=Counter)
    no_pair: Counter[str] = field(default_factory=Counter)
    without_pairs: Counter[str] = field(default_factory=Counter)
    rewards: list[float] = field(default_factory=list)  # of all candidates
    kept: list[tuple[float, float]] = field(default_factory=list)  # rewards of the pairs: chosen, rejected
    lengths: list[tuple[int, int]] = field(default_factory=list)  # characters of the pairs

    def add(self, candidates: Sequence[Candidate], built: Built, skipped: str | None = None) -> None:
        """Counts one prompt; `skipped` is why it was not completed at all."""
        self.prompts += 1
        self.candidates += len(candidates)
        self.rewards += [candidate.score for candidate in candidates if candidate.score is not None]
        self.trials += built.trials
        self.accepted += len(built.accepted)
        self.unused += built.unused
        self.no_pair += built.no_pair
        for chosen, rejected in built.pairs:
            assert chosen.score is not None and rejected.score is not None
            self.kept.append((chosen.score, rejected.score))
            self.lengths.append((len(chosen.text), len(rejected.text)))
        if built.pairs:
            self.with_pairs += 1
        else:  # the reason that came nearest to a pair
            near = next((reason for reason in (BEYOND_MAX, BELOW_MARGIN, TIE) if built.no_pair[reason]), TOO_FEW)
            self.without_pairs[skipped or near] += 1

    def summary(self) -> dict[str, Any]:
        """Returns figures as JSON values. Rewards are means, in the judge's units; None where there are none.

        `longer_chosen` is the share of pairs whose chosen completion has more characters: far from 0.5, length is what
        the judge rewards. `acceptance_rate` is the share of rejection sampling's trials that accepted (Theorem 1 of
        the paper: near the mean of exp((r - r_max) / beta) while many candidates are left).
        """
        chosen, rejected = [c for c, _ in self.kept], [r for _, r in self.kept]
        longer = [(a > b) + (a == b) / 2 for a, b in self.lengths]
        result: dict[str, Any] = {
            "prompts": self.prompts,
            "prompts_with_pairs": self.with_pairs,
            "prompts_without_pairs": dict(self.without_pairs),
            "candidates": self.candidates,
            "candidates_unused": dict(self.unused),
            "pairs": len(self.kept),
            "pairs_refused": dict(self.no_pair),
            "reward": {
                "candidates": _mean(self.rewards),
                "candidates_std": statistics.pstdev(self.rewards) if self.rewards else None,
                "chosen": _mean(chosen),
                "rejected": _mean(rejected),
                "margin": _mean([c - r for c, r in self.kept]),
            },
            "longer_chosen": _mean(longer),
        }
        if self.trials:
            result |= {"accepted": self.accepted, "acceptance_rate": self.accepted / self.trials}
        return result


def _mean(values: Iterable[float]) -> float | None:
    values = list(values)
    return statistics.fmean(values) if values else None
