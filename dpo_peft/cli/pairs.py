"""The command `dpo-peft pairs`: sample completions, have them judged, and make preference pairs of them."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from ..pairs import PairsOptions, make_pairs
from .options import parse_options, show

__all__ = ["PairsOptions", "describe", "make_pairs", "pairs"]

EXAMPLES = (
    "dpo-peft pairs outputs/quickstart --prompts prompts.jsonl --output pairs.jsonl --reward rewards.py:reward",
    "dpo-peft pairs Qwen/Qwen3-8B --prompts prompts.jsonl --as_chat --output pairs.jsonl --reward_model NAME",
    "dpo-peft pairs outputs/sft --prompts train.jsonl --output pairs.jsonl --implicit_reward outputs/dpo",
    "dpo-peft pairs outputs/sft --prompts train.jsonl --output pairs.jsonl --reward rewards.py:reward \\\n"
    "      --method rso --num_candidates 64 --rso_accept 8 --rso_beta 0.5 --sft_output accepted.jsonl",
    "dpo-peft pairs --prompts answered.jsonl --score_column scores --method all --max_pairs 3 --output pairs.jsonl",
)


def pairs(argv: Sequence[str]) -> None:
    """Samples several completions of each prompt from a model or an adapter, scores them by a reward function, a
    reward model or a trained adapter, and writes preference pairs to train on. Completions and scores that the file of
    prompts has already are used as they are. A killed run is resumed where it was when the same command is given
    again."""
    options = parse_options(argv, PairsOptions, "pairs", pairs.__doc__, EXAMPLES)
    try:
        result = make_pairs(options)
    except KeyboardInterrupt as stopped:
        print(f"\nStopped. {stopped}".rstrip(), file=sys.stderr)
        raise SystemExit(130) from None
    show(result, describe(result), options.json)


def describe(result: Mapping[str, Any]) -> str:
    """Returns the summary for people."""
    reward = result["reward"]
    lines = [
        f"{result['output']}: {result['pairs']:,} pairs from {result['prompts_with_pairs']:,} of "
        f"{result['prompts']:,} prompts, {result['candidates']:,} completions, {result['seconds']:.0f} s",
        f"  mean reward: completions {reward['candidates']:+.3f} (std {reward['candidates_std']:.3f}), chosen "
        f"{reward['chosen']:+.3f}, rejected {reward['rejected']:+.3f}, margin {reward['margin']:.3f}",
        f"  the chosen completion is the longer one in {result['longer_chosen']:.0%} of the pairs",
    ]
    if "acceptance_rate" in result:
        lines.append(f"  accepted {result['accepted']:,} completions, {result['acceptance_rate']:.0%} of the trials")
    if result["resumed_prompts"]:
        lines.append(f"  {result['resumed_prompts']:,} prompts were there from unfinished work")
    for name, what in (
        ("prompts_without_pairs", "prompts without a pair"),
        ("candidates_unused", "completions left out"),
        ("pairs_refused", "pairs left out"),
    ):
        if reasons := result[name]:
            each = ", ".join(f"{number:,} {reason}" for reason, number in reasons.items())
            lines.append(f"  {what}: {each}")
    lines += [f"  {result[name]}" for name in ("sft_output", "lists_output") if name in result]
    return "\n".join(lines)
