"""How far one model is from another, measured on the same rows: log-probs, preference margins and greedy texts.

`observe` runs a model over `Rows`, `compare` puts two observations side by side. The models need not be in memory at
the same time.

Shape suffixes: T tokens of one completion, C completions.
"""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data import prepare_dataset
from ..data.collator import PreferenceCollator
from ..errors import OptionError
from ..forward import PackedBatch, completion_logps
from ..model.adapter_source import TrainedWith
from ..model.generation import sample_completions

logger = logging.getLogger(__name__)

CausalLM: TypeAlias = PreTrainedModel | PeftModel

NEW_TOKENS = 32  # of each text that a model writes here
GREEDY_PROMPTS = 8
ROWS_PER_BATCH = 4

PROBE_PROMPTS = [
    "Explain in two sentences why leaves turn red in autumn.",
    "Write a short review of a small hotel by the sea.",
    "What should I check before I buy a used bicycle?",
    "Give me a recipe for a simple vegetable soup.",
    "Summarise the story of the tortoise and the hare.",
    "Write a Python function that reverses a string.",
    "My friend forgot my birthday. What could I say to her?",
    "List three differences between a lake and a river.",
]


@dataclass(frozen=True)
class Rows:
    """What two models are compared on."""

    name: str  # as a reader should see it
    samples: list[dict[str, Any]]  # prepared rows: `prompt_ids`, `completion_ids`
    prompts: list[list[int]]  # token ids, to be answered greedily
    pairs: bool  # whether each sample is a better completion and a worse one


@dataclass(frozen=True)
class Observed:
    """What a model makes of `Rows`."""

    logps: list[Tensor]  # (T,) float32 log-probs in nats of every completion's tokens
    greedy: list[list[int]]  # the likeliest answer to each prompt


@dataclass(frozen=True)
class Drift:
    """Differences of log-probs in nats; "token" and "completion" say over what the mean or maximum is taken."""

    rows: str
    completions: int
    tokens: int
    mean_token: float
    max_token: float
    mean_completion: float
    max_completion: float
    adapter_token: float  # by how much the adapter itself moves the same tokens, on average: the yardstick
    greedy_prompts: int
    greedy_equal: int
    pairs: int = 0
    accuracy_adapter: float | None = None  # share of pairs whose better completion has the higher reward
    accuracy_merged: float | None = None


def probe_rows(model: CausalLM, tokenizer: PreTrainedTokenizerBase, precision: str) -> Rows:
    """Returns completions of the model itself, sampled with a fixed seed, of a few prompts about everyday things."""
    if tokenizer.chat_template:
        chats = [[{"role": "user", "content": text}] for text in PROBE_PROMPTS]
        encoded = tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=True)["input_ids"]
    else:
        encoded = tokenizer(PROBE_PROMPTS)["input_ids"]
    prompts = [list(ids) for ids in encoded]
    with autocast(model, precision):
        written = sample_completions(model, tokenizer, prompts, max_new_tokens=NEW_TOKENS)
    samples = [{"prompt_ids": p, "completion_ids": [c]} for p, c in zip(prompts, written, strict=True)]
    return Rows("probe texts", samples, prompts, pairs=False)


def labelled_rows(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, name: str, setup: TrainedWith, max_rows: int
) -> Rows:
    """Returns the first rows of a dataset of preference pairs, prepared as for the training. What became of them is
    logged.

    Raises:
        OptionError: `max_rows` is not positive.
        DataError: the rows can't be used.
    """
    if max_rows < 1:
        raise OptionError(f"max_rows={max_rows} must be at least 1.")
    used = dataset.select(range(min(max_rows, len(dataset))))
    prepared, summary = prepare_dataset(used, tokenizer, name, setup.max_length, setup.truncation_mode)
    logger.info("%s", summary)
    samples = list(prepared)
    shown = f"{name} ({len(used):,} of {len(dataset):,} rows)" if len(used) < len(dataset) else name
    prompts = [sample["prompt_ids"] for sample in samples[:GREEDY_PROMPTS]]
    return Rows(shown, samples, prompts, pairs=True)


def autocast(model: CausalLM, precision: str) -> AbstractContextManager[object]:
    """Mixed precision as the trainer had it: "bfloat16", "float16", or "no"."""
    if precision == "no":
        return nullcontext()
    return torch.autocast(model.device.type, getattr(torch, precision))


def observe(
    model: CausalLM, tokenizer: PreTrainedTokenizerBase, rows: Rows, precision: str = "no", what: str = "model"
) -> Observed:
    """Scores the rows and completes the prompts by a model in eval mode, in the precision of `autocast`; `what` names
    the progress bar."""
    with autocast(model, precision):
        logps = score(rows, model, lambda batch: completion_logps(model, batch).token_logps_N, what)
        greedy = sample_completions(model, tokenizer, rows.prompts, max_new_tokens=NEW_TOKENS, temperature=0)
    return Observed(logps, greedy)


def score(rows: Rows, model: CausalLM, token_logps: Callable[[PackedBatch], Tensor], what: str) -> list[Tensor]:
    """Returns (T,) log-probs of every completion of the rows, on the CPU, by a function of a batch of plain padded
    rows."""
    collate = PreferenceCollator(shared=False)
    starts = range(0, len(rows.samples), ROWS_PER_BATCH)
    found: list[Tensor] = []
    with torch.no_grad():
        for start in tqdm(starts, desc=f"Scoring the {what}", unit="batch"):
            batch = PackedBatch(**collate(rows.samples[start : start + ROWS_PER_BATCH])).to(model.device)
            found += token_logps(batch).float().cpu().split(batch.lengths.tolist())
    return found


def compare(
    rows: Rows, adapter: Observed, merged: Observed, off: list[Tensor], reference: list[Tensor], reward: str
) -> Drift:
    """Puts the merged model beside the adapter's.

    Args:
        rows: what both were observed on.
        adapter, merged: the observations.
        off: (T,) log-probs of every completion with the adapter off.
        reference: the same under the reference.
        reward: the implicit reward that decides a pair: "log_ratio", "logp" or "mean_logp", see `Objective.reward`.
    """
    both = list(zip(merged.logps, adapter.logps, strict=True))
    by_token = torch.cat([(m - a).abs() for m, a in both]).double()
    by_completion = torch.stack([(m.double().sum() - a.double().sum()).abs() for m, a in both])
    by_adapter = torch.cat([(a - o).abs() for a, o in zip(adapter.logps, off, strict=True)]).double()
    return Drift(
        rows=rows.name,
        completions=len(by_completion),
        tokens=len(by_token),
        mean_token=by_token.mean().item(),
        max_token=by_token.max().item(),
        mean_completion=by_completion.mean().item(),
        max_completion=by_completion.max().item(),
        adapter_token=by_adapter.mean().item(),
        greedy_prompts=len(adapter.greedy),
        greedy_equal=sum(a == m for a, m in zip(adapter.greedy, merged.greedy, strict=True)),
        pairs=len(rows.samples) if rows.pairs else 0,
        accuracy_adapter=_accuracy(adapter.logps, reference, reward) if rows.pairs else None,
        accuracy_merged=_accuracy(merged.logps, reference, reward) if rows.pairs else None,
    )


def _accuracy(logps: list[Tensor], reference: list[Tensor], reward: str) -> float:
    """Returns the share of pairs (chosen at even, rejected at odd indices) whose chosen completion has the higher
    reward."""
    rewards = [ours.double().sum() for ours in logps]
    if reward == "log_ratio":
        rewards = [r - ref.double().sum() for r, ref in zip(rewards, reference, strict=True)]
    elif reward == "mean_logp":
        rewards = [r / len(ours) for r, ours in zip(rewards, logps, strict=True)]
    rewards_C = torch.stack(rewards)
    return (rewards_C[::2] > rewards_C[1::2]).double().mean().item()
