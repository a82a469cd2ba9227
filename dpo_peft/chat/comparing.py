"""Completions of the same prompts before and after training, side by side, with the adapter's own reward of both."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from ..data.prompts import Prompt, encode_prompts, image_columns
from ..errors import OptionError
from ..model.adapters import load_frozen
from ..pairs.engines import Sample, Sampling, TransformersEngine
from ..reference.adapter_off import reference_mode
from ..reward.implicit import ImplicitReward

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Compared:
    """A prompt with its completions. Rewards are implicit ones, under the adapter that is looked at."""

    row: int  # of the file
    prompt: Any  # a text or messages, as in training rows
    before: str
    after: str
    before_reward: float
    after_reward: float
    before_tokens: int  # with the end token
    after_tokens: int
    before_finished: bool  # False: cut off by max_new_tokens
    after_finished: bool

    @property
    def same(self) -> bool:
        """Whether both completions are the same text."""
        return self.before == self.after


@dataclass(frozen=True)
class Comparison:
    """The completions of all prompts, and what they were made by."""

    rows: list[Compared]
    before: str  # whose completions stand on the left, in words
    reward: str  # what the rewards are, in words
    too_long: int  # prompts left out, as the context has no room for a completion

    def figures(self) -> dict[str, Any]:
        """Returns counts, the share of prompts whose completion after training has the higher implicit reward, and
        means of rewards and tokens."""
        higher = sum(row.after_reward > row.before_reward for row in self.rows if not row.same)
        same = sum(row.same for row in self.rows)
        found: dict[str, Any] = {
            "prompts": len(self.rows),
            "too_long": self.too_long,
            "higher": higher,
            "same": same,
            "lower": len(self.rows) - higher - same,
            "share_higher": higher / len(self.rows),
        }
        names = [f"{side}_{what}" for what in ("reward", "tokens") for side in ("before", "after")]
        return found | {f"mean_{name}": fmean(getattr(row, name) for row in self.rows) for name in names}

    def lines(self) -> list[Mapping[str, Any]]:
        """Returns a row of plain values for each prompt."""
        return [{**asdict(row), "same": row.same} for row in self.rows]


def compare_completions(
    reward: ImplicitReward,
    prompts: Sequence[Prompt],
    how: Sampling,
    *,
    against: str | None = None,
    seed: int = 0,
    batch_size: int = 16,
) -> Comparison:
    """Completes prompts with the adapter and without it, and scores both completions by the adapter's implicit reward.

    Args:
        reward: of the adapter, with its model.
        prompts: from `read_prompts`.
        how: of the sampling; with temperature 0 completions are the likeliest tokens.
        against: folder or Hub id of another adapter of the same base, whose completions stand on the left. If None,
            they are the reference's: those of the model with the adapter off, or of the frozen adapter that the
            training began with; for an objective without a reference, of the model with the adapter off.
        seed: each prompt has a seed of its own, this plus its row, so a completion doesn't depend on the batch.
        batch_size: completions that are made at once.

    Raises:
        OptionError: `against` doesn't fit, or the context has room for no prompt's completion.
        DataError: a prompt can't be rendered.
    """
    other = reward.reference.adapter if reward.reference else None
    if against is not None:
        other = load_frozen(reward.model, against)
    modes, given = (reference_mode(reward.model, other), nullcontext()), len(prompts)
    prompts, prompt_ids, sides = complete_prompts(reward, prompts, how, modes, seed, batch_size)
    images = reward.images
    scored = reward.score_rows(
        [
            {
                "prompt_ids": ids,
                "completion_ids": list({tuple(one.ids): one.ids for one in pair}.values()),
                "row": i,
                **image_columns(prompts[i], images),
            }
            for i, (ids, pair) in enumerate(zip(prompt_ids, zip(*sides, strict=True), strict=True))
        ]
    )
    rows = [
        Compared(
            *(prompt.number, prompt.example.prompt, before.text, after.text, scores[0].reward, scores[-1].reward),
            *(len(before.ids), len(after.ids), before.finished, after.finished),
        )
        for prompt, before, after, scores in zip(prompts, *sides, scored, strict=True)
    ]
    left = "the base, with the adapter off"
    if against or other:
        left = f"the adapter {against or (reward.reference and reward.reference.source)}"
    return Comparison(rows, left, str(reward), given - len(prompts))


def complete_prompts(
    reward: ImplicitReward,
    prompts: Sequence[Prompt],
    how: Sampling,
    modes: Sequence[AbstractContextManager[None]],
    seed: int = 0,
    batch_size: int = 16,
) -> tuple[list[Prompt], list[list[int]], list[list[Sample]]]:
    """Returns the prompts that the context has room for, their token ids, and for each mode, inside which the model is
    as it is to be, a completion of each. Arguments and errors are those of `compare_completions`."""
    model, tokenizer, images = reward.model, reward.tokenizer, reward.images
    prompt_ids = encode_prompts(tokenizer, prompts, "prompts", images)
    config: Any = model.config
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    kept = [i for i, ids in enumerate(prompt_ids) if not context or len(ids) + how.max_new_tokens <= context]
    if not kept:
        raise OptionError(f"max_new_tokens={how.max_new_tokens} leaves no room for a prompt in {context}: lower it.")
    if too_long := len(prompts) - len(kept):
        logger.warning(
            "%d of %d prompts are left out: with max_new_tokens=%d they are beyond the model's context of %d tokens.",
            *(too_long, len(prompts), how.max_new_tokens, context),
        )
    prompts, prompt_ids = [prompts[i] for i in kept], [prompt_ids[i] for i in kept]
    # Prompts of about one length together; what is computed beside a prompt doesn't change its completion.
    order = sorted(range(len(kept)), key=lambda i: -len(prompt_ids[i]))
    engine = TransformersEngine(model, tokenizer, how, batch_size)
    sides: list[list[Sample]] = []
    for mode in modes:
        with mode:
            pixels = [images.sample(image_columns(prompts[i], images)) for i in order] if images else ()
            found = engine([prompt_ids[i] for i in order], [seed + prompts[i].number for i in order], pixels)
        sides.append([sample for _, sample in sorted(zip(order, found, strict=True), key=lambda one: one[0])])
    return prompts, prompt_ids, sides
