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
import statistics
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from random import Random
from typing import NamedTuple

from .options import PairsOptions
from .rejection_sampling import MATCHES, rejection_sample

# Why a completion is not used.
EMPTY, UNFINISHED, DUPLICATE, UNSCORED = "empty", "unfinished", "same text as another", "no reward"
# Why two completions are not a pair.
TIE, BELOW_MARGIN, BEYOND_MAX = "equal rewards", "margin below min_margin", "beyond max_pairs"
# Why a prompt has no pair, if it isn't one of the above.
TOO_FEW, TOO_LONG = "fewer than two different completions", "prompt too long for the model"


class Candidate(NamedTuple):
    """A completion of a prompt."""

    completion: object  # text, or a list of messages
    score: float | None
    finished: bool = True

    @property
    def text(self) -> str:
        """The text, or what messages say: two completions are the same if this is."""
        if isinstance(self.completion, str):
            return self.completion
        match self.completion:
            case [{"role": _, "content": str(text), **more}] if not more:
                return text
        return json.dumps(self.completion, sort_keys=True)

    @property
    def reward(self) -> float:
        """The score; whatever is usable has one."""
        assert self.score is not None
        return self.score


@dataclass
class Built:
    """The pairs of one prompt, and what became of its completions."""

    candidates: Sequence[Candidate]
    usable: list[Candidate] = field(default_factory=list)  # all that could be in a pair
    accepted: list[Candidate] = field(default_factory=list)  # by rejection sampling, in that order
    pairs: list[tuple[Candidate, Candidate]] = field(default_factory=list)  # chosen, rejected
    trials: int = 0  # of rejection sampling
    unused: Counter[str] = field(default_factory=Counter)  # completions, by reason
    no_pair: Counter[str] = field(default_factory=Counter)  # twos of completions, by reason

    def rows(self) -> dict[str, list[dict[str, object]]]:
        """Returns what is written of the completions, by the option that names the file."""
        scores = [candidate.reward for candidate in self.usable]
        whole: dict[str, object] = {"completions": [one.completion for one in self.usable], "scores": scores}
        return {
            "output": [
                {
                    "chosen": chosen.completion,
                    "rejected": rejected.completion,
                    "chosen_reward": chosen.reward,
                    "rejected_reward": rejected.reward,
                    "reward_margin": chosen.reward - rejected.reward,
                }
                for chosen, rejected in self.pairs
            ],
            "sft_output": [{"completion": one.completion, "reward": one.reward} for one in self.accepted],
            "lists_output": [whole] if len(set(scores)) > 1 else [],  # else there is no better one to learn from
        }


def seed_of(*parts: int | str) -> int:
    """Returns a seed in [0, 2**63) for a part of the work, such as (seed, prompt number, candidate): near numbers give
    unrelated seeds."""
    digest = hashlib.blake2b(" ".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def build_pairs(candidates: Sequence[Candidate], options: PairsOptions, number: int) -> Built:
    """Makes the pairs of one prompt.

    Args:
        candidates: the completions in the order in which they were sampled.
        options: how pairs are made.
        number: of the prompt; with the options' seed it decides what is drawn.
    """
    built, usable = Built(candidates), dict[str, Candidate]()
    for candidate in candidates:
        if reason := _unusable(candidate, options, usable):
            built.unused[reason] += 1
        else:
            usable[candidate.text] = candidate
    built.usable = list(usable.values())
    scores = [candidate.reward for candidate in built.usable]
    every = range(len(scores))
    if options.method == "all":
        twos = [(i, j) if scores[i] >= scores[j] else (j, i) for i, j in combinations(every, 2)]
        twos.sort(key=lambda two: scores[two[1]] - scores[two[0]])  # a stable sort: ties in order of sampling
    elif options.method == "rso":
        draw = Random(seed_of(options.seed, number, "rso"))
        accepted, built.trials = rejection_sample(scores, options.rso_accept, options.rso_beta, draw)
        built.accepted = [built.usable[i] for i in accepted]
        twos = MATCHES[options.rso_pairs](accepted, scores, draw)
    else:
        twos = [(max(every, key=scores.__getitem__), min(every, key=scores.__getitem__))] if len(scores) > 1 else []
    for better, worse in twos:
        if reason := _refused(scores[better] - scores[worse], len(built.pairs), options):
            built.no_pair[reason] += 1
        else:
            built.pairs.append((built.usable[better], built.usable[worse]))
    return built


def _unusable(candidate: Candidate, options: PairsOptions, others: Container[str]) -> str | None:
    if not candidate.text.strip():
        return EMPTY
    if not candidate.finished and options.require_finished is not False:
        return UNFINISHED
    if candidate.score is None:
        return UNSCORED
    return DUPLICATE if candidate.text in others else None


def _refused(margin: float, pairs: int, options: PairsOptions) -> str | None:
    if margin <= 0:
        return TIE
    if margin < options.min_margin:
        return BELOW_MARGIN
    return BEYOND_MAX if options.max_pairs is not None and pairs >= options.max_pairs else None


def summarize(results: Iterable[tuple[Built, str | None]], skipped: Mapping[str, int]) -> dict[str, object]:
    """Returns what became of all prompts, as JSON values. Rewards are means, in the judge's units; None where there
    are none.

    `longer_chosen` is the share of pairs whose chosen completion has more characters: far from 0.5, length is what
    the judge rewards. `acceptance_rate` is the share of rejection sampling's trials that accepted (Theorem 1 of the
    paper: near the mean of exp((r - r_max) / beta) while many candidates are left).

    Args:
        results: of each prompt, and why it was not completed at all, if it wasn't.
        skipped: how many rows have no prompt, by reason.
    """
    numbers, without_pairs = Counter(prompts=sum(skipped.values())), Counter(skipped)
    unused, refused = Counter[str](), Counter[str]()
    rewards: list[float] = []  # of all candidates
    pairs: list[tuple[float, float, float]] = []  # rewards of chosen and rejected, share of "chosen is longer"
    for built, why in results:
        found = {"candidates": built.candidates, "accepted": built.accepted, "pairs": built.pairs}
        numbers.update({name: len(found[name]) for name in found}, prompts=1, trials=built.trials)
        unused += built.unused
        refused += built.no_pair
        rewards += [candidate.score for candidate in built.candidates if candidate.score is not None]
        for chosen, rejected in built.pairs:
            longer = len(chosen.text) - len(rejected.text)
            pairs.append((chosen.reward, rejected.reward, (longer > 0) + (longer == 0) / 2))
        if not built.pairs:  # the reason that came nearest to a pair
            near = next((reason for reason in (BELOW_MARGIN, TIE) if built.no_pair[reason]), TOO_FEW)
            without_pairs[why or near] += 1
    rates = {"accepted": numbers["accepted"], "acceptance_rate": numbers["accepted"] / (numbers["trials"] or 1)}
    return {
        "prompts": numbers["prompts"],
        "prompts_with_pairs": numbers["prompts"] - sum(without_pairs.values()),
        "prompts_without_pairs": dict(without_pairs),
        "candidates": numbers["candidates"],
        "candidates_unused": dict(unused),
        "pairs": numbers["pairs"],
        "pairs_refused": dict(refused),
        "reward": {
            "candidates": _mean(rewards),
            "candidates_std": statistics.pstdev(rewards) if rewards else None,
            "chosen": _mean([chosen for chosen, _, _ in pairs]),
            "rejected": _mean([rejected for _, rejected, _ in pairs]),
            "margin": _mean([chosen - rejected for chosen, rejected, _ in pairs]),
        },
        "longer_chosen": _mean([longer for _, _, longer in pairs]),
        **(rates if numbers["trials"] else {}),
    }


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None
