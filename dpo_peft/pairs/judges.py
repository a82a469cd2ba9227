"""Who scores the completions: a Python function with TRL's signature, a reward model, or a trained adapter.

All of them are called as TRL's GRPO trainer calls a reward function: `judge(prompts=..., completions=...,
completion_ids=..., **columns)`, lists of equal length, which return one number for each completion, or None for one
that they have no opinion on.
"""

import hashlib
import inspect
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from ..data.prompts import Prompt
from ..data.tokenize import leading_ids, text_ids
from ..errors import DataError, OptionError
from ..losses import load_function
from .options import PairsOptions

Content = str | list[dict[str, object]]  # a text or messages
Judge = Callable[..., object]


def load_judge(options: PairsOptions) -> Judge | None:
    """Returns the judge that the options name; None for scores that the rows have.

    Raises:
        OptionError, ReferenceMismatchError: it can't be loaded.
    """
    if options.reward is not None:
        return load_function(options.reward, "reward")
    if options.reward_model is not None:
        return RewardModel(options.reward_model, trust_remote_code=options.trust_remote_code)
    if options.implicit_reward is not None:
        from ..reward.implicit import ImplicitReward

        return ImplicitReward(options.implicit_reward)
    return None


def source_of(judge: Judge) -> str | None:
    """Returns a digest of the file that a function was written in, to notice that it was changed; None if there is
    none."""
    try:
        file = inspect.getsourcefile(judge)
    except TypeError:  # not a Python function
        return None
    return None if file is None else hashlib.blake2b(Path(file).read_bytes(), digest_size=8).hexdigest()


class RewardModel:
    """A sequence classifier with one output. Conversations are rendered by its own chat template, text is joined."""

    __name__ = "reward_model"

    def __init__(self, name: str, batch_size: int = 16, dtype: str = "auto", trust_remote_code: bool = False):
        """
        Args:
            name: its folder or Hub id.
            batch_size: completions in one pass.
            dtype: that of its weights; "auto" as they are stored.

        Raises:
            OptionError: it can't be loaded, or has another number of outputs.
        """
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
            self.model = AutoModelForSequenceClassification.from_pretrained(
                name, dtype=dtype, trust_remote_code=trust_remote_code
            )
        except (OSError, ValueError) as error:
            raise OptionError(f"reward_model={name!r} can't be loaded: {error}") from error
        if self.model.config.num_labels != 1:
            outputs = self.model.config.num_labels
            raise OptionError(f"reward_model={name!r} has {outputs} outputs: a reward is one number (num_labels=1).")
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.model.config.pad_token_id = self.tokenizer.pad_token_id  # the last token before the padding is judged
        self.model.to(device).requires_grad_(False).eval()
        self.name, self.batch_size, self.leading = name, batch_size, leading_ids(self.tokenizer)

    def __call__(self, prompts: Sequence[Content], completions: Sequence[Content], **columns: object) -> list[float]:
        """Returns one reward per completion, in their order. Nothing is cut off.

        Raises:
            OptionError: conversations, and the model's tokenizer has no chat template.
        """
        ids = [self._encode(*both) for both in zip(prompts, completions, strict=True)]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # alike lengths together: less padding
        rewards = [0.0] * len(ids)
        for start in range(0, len(order), self.batch_size):
            part = order[start : start + self.batch_size]
            batch = self.tokenizer.pad(
                {"input_ids": [ids[i] for i in part]}, padding_side="right", return_tensors="pt"
            )
            with torch.no_grad():
                logits = self.model(**batch.to(self.model.device)).logits[:, 0].float().tolist()
            for i, reward in zip(part, logits, strict=True):
                rewards[i] = reward
        return rewards

    def _encode(self, prompt: Content, completion: Content) -> list[int]:
        if isinstance(prompt, str) and isinstance(completion, str):
            return text_ids(self.tokenizer, prompt + completion, self.leading)
        if not self.tokenizer.chat_template:
            raise OptionError(
                f"reward_model={self.name!r}: its tokenizer has no chat template, and the prompts are messages."
            )
        rendered = self.tokenizer.apply_chat_template([*prompt, *completion], return_dict=True)
        return list(rendered["input_ids"])


def judge_answers(
    judge: Judge,
    prompts: Sequence[Prompt],
    completions: Sequence[object],
    completion_ids: Sequence[list[int]] | None = None,
) -> list[float | None]:
    """Calls a reward function and checks what it returns.

    Args:
        judge: takes keyword arguments alone, as TRL calls it: the prompts' other columns too.
        prompts: one for each completion, at least one.
        completions: texts or lists of messages.
        completion_ids: tokens of each; None if they aren't known.

    Raises:
        OptionError: it can't be called like this, fails, or returns anything but a list of as many numbers.
        DataError: a reward is NaN or infinite.
    """
    name = getattr(judge, "__name__", type(judge).__name__)
    known = {} if completion_ids is None else {"completion_ids": completion_ids}
    columns = {column: [prompt.columns[column] for prompt in prompts] for column in prompts[0].columns}
    try:
        returned = judge(
            prompts=[prompt.example.prompt for prompt in prompts], completions=list(completions), **known, **columns
        )
    except (OptionError, DataError):
        raise
    except Exception as error:  # it is code of someone else's and may raise anything
        raise OptionError(f"The reward function {name} failed: {type(error).__name__}: {error}") from error
    values = returned.tolist() if isinstance(returned, torch.Tensor) else returned
    if not isinstance(values, list | tuple) or len(values) != len(completions):
        what = f"{len(values)} values" if isinstance(values, list | tuple) else f"a {type(values).__name__}"
        raise OptionError(f"The reward function {name} returned {what} for {len(completions)} completions.")
    rewards: list[float | None] = []
    for value, prompt in zip(values, prompts, strict=True):
        try:
            reward = None if value is None else float(value)
        except (TypeError, ValueError):
            wrong = f"The reward function {name} returned {value!r}: a reward is a number or None."
            raise OptionError(wrong) from None
        if reward is not None and not math.isfinite(reward):
            wrong = f"The reward function {name} gave {reward} to a completion of prompt {prompt.number}"
            raise DataError(f"{wrong}: fix it, or the row.")
        rewards.append(reward)
    return rewards
