"""The model that suites evaluate: one copy of the weights, with its adapter on and off."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property
from typing import Any

from datasets import Dataset
from peft import LoraConfig, get_peft_model

from ..artifacts.card import shown_name
from ..chat.comparing import complete_prompts
from ..data.prompts import Prompt, read_prompts
from ..files import read_rows
from ..model.adapter_source import UNRECORDED, TrainedAdapter, TrainedWith, trained_in
from ..model.loading import disable_dropout
from ..pairs.engines import ModelSource, Sample, Sampling, TransformersEngine
from ..reference.adapter_off import Reference, reference_mode
from ..reward.implicit import ImplicitReward
from .checkers import TASKS
from .options import EvalOptions

logger = logging.getLogger(__name__)

Completed = list[tuple[Prompt, dict[str, Sample]]]  # each prompt with the completion of each side


def setup_of(source: ModelSource) -> TrainedWith:
    """Returns how an adapter was trained; without a record, texts are read as the chat template suggests."""
    trained = source.read() if source.is_adapter else None
    return trained or replace(UNRECORDED, as_chat=None)


def read_some(rows: str | Dataset, options: EvalOptions, split: str = "train") -> Dataset:
    """Returns the rows of a file, or these, up to the limit."""
    found = read_rows(rows, split) if isinstance(rows, str) else rows
    return found.select(range(min(len(found), options.limit or len(found))))


class Subject:
    """A loaded adapter, or a model without one.

    Attributes:
        reward: scores completions under both sides: `logp` is the adapter's, `ref_logp` the base's.
        sides: "base" and "adapter"; of a model without an adapter "base" alone.
        base: what the base is, in words: where the training began.
    """

    def __init__(self, source: ModelSource, options: EvalOptions):
        how = Sampling(options.max_new_tokens, temperature=0.0)
        if source.is_adapter:
            loaded = source.load()
        else:  # an adapter that changes nothing: both sides are the model
            engine = TransformersEngine.load(source, how, options.batch_size)
            idle = get_peft_model(engine.model, LoraConfig(r=1, target_modules="all-linear"))
            loaded = trained_in(idle.requires_grad_(False).eval(), engine.tokenizer)
        disable_dropout(loaded.model)
        self.sides = ("base", "adapter") if source.is_adapter else ("base",)
        self.base = "the model" if not source.is_adapter else _began_with(loaded)
        if loaded.reference is None:  # an objective without one
            loaded = replace(loaded, reference=Reference("base", None))
        beta = None if loaded.trained else 1.0
        self.reward = ImplicitReward(loaded, beta=beta, max_tokens=options.max_tokens)
        self.how, self.options, self.as_chat = how, options, setup_of(source).as_chat

    def complete(self, rows: Dataset, name: str) -> Completed:
        """Returns greedy completions of the rows' prompts; prompts that the context has no room for are left out, and
        counted in the log."""
        reward = self.reward
        prompts, _ = read_prompts(rows, name, None, self.as_chat, reward.tokenizer)
        logger.info("%s: %d prompts are completed by %s.", name, len(prompts), " and ".join(self.sides))
        frozen = reward.reference.adapter if reward.reference else None
        modes: list[AbstractContextManager[None]] = [reference_mode(reward.model, frozen), nullcontext()]
        each = modes[: len(self.sides)]
        kept, _, completions = complete_prompts(reward, prompts, self.how, each, 0, self.options.batch_size)
        both = zip(*completions, strict=True)
        return [(one, dict(zip(self.sides, each, strict=True))) for one, each in zip(kept, both, strict=True)]

    @cached_property
    def open_completions(self) -> Completed:
        """Completions of the prompts that ask for nothing that can be checked."""
        return self.complete(Dataset.from_dict({"prompt": TASKS[: self.options.limit]}), "open prompts")


def _began_with(loaded: TrainedAdapter) -> str:
    if loaded.reference is None or loaded.reference.adapter is None:
        return "the model with the adapter off"
    return f"the adapter {shown_name(loaded.reference.source or loaded.reference.adapter)}"


# A suite reads and checks what it needs, before the model is loaded, and returns what evaluates.
Evaluate = Callable[[Subject], dict[str, Any]]
Suite = Callable[[str | None, EvalOptions, ModelSource], Evaluate]
