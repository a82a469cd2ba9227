"""Measures how far a merged model is from the adapter's, on the same rows: log-probs, margins and greedy texts.

`observe_adapter` and `observe` run the models over `Rows`, `compare` puts both side by side. The models need not be in
memory at the same time.

Shape suffixes: T tokens of one completion, C completions, P pairs.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data import prepare_dataset
from ..data.collator import PreferenceCollator
from ..data.images import Images
from ..errors import OptionError
from ..forward import PackedBatch, Scores, completion_logps
from ..forward.images import SampleImages
from ..forward.scope import invocation_start, invocation_tokens
from ..model.adapter_source import TrainedAdapter, TrainedWith
from ..model.generation import sample_completions
from ..reference.adapter_off import reference_logps

logger = logging.getLogger(__name__)

CausalLM: TypeAlias = PreTrainedModel | PeftModel

NEW_TOKENS = 32  # of each text that a model writes here
GREEDY_PROMPTS = 8  # in a batch, and of a dataset
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
    images: Images | None = None  # the processor of the prompts' images
    pixels: Sequence[SampleImages | None] = ()  # of each prompt


@dataclass(frozen=True)
class Observed:
    """What a model makes of `Rows`."""

    logps: list[Tensor]  # (T,) float32 log-probs in nats of every completion's tokens
    greedy: list[list[int]]  # the likeliest completion to each prompt


@dataclass(frozen=True)
class AdapterObserved(Observed):
    """What the adapter's model makes of its rows, and what is needed to compare once it had to make room."""

    rows: Rows
    off: list[Tensor]  # (T,) log-probs with the adapter off
    reference: list[Tensor]  # and under its reference
    setup: TrainedWith
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    dtype: torch.dtype  # of the base's weights that were not quantized


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
    strength: float | None  # how much of what the adapter adds to log-probs it adds here; None: it adds nothing
    strength_error: float | None  # its standard error
    greedy_prompts: int
    greedy_equal: int
    pairs: int = 0
    accuracy_adapter: float | None = None  # share of pairs whose better completion has the higher reward
    accuracy_merged: float | None = None
    signs_equal: int = 0  # pairs whose two completions are in the same order


def probe_rows(
    model: CausalLM, tokenizer: PreTrainedTokenizerBase, precision: str, images: Images | None = None
) -> Rows:
    """Returns completions of the model itself, sampled with a fixed seed, of a few prompts about everyday things, and
    with a processor, of one with an image."""
    if tokenizer.chat_template:
        chats = [[{"role": "user", "content": text}] for text in PROBE_PROMPTS]
        encoded = tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=True)["input_ids"]
    else:
        encoded = tokenizer(PROBE_PROMPTS)["input_ids"]
    prompts = [list(ids) for ids in encoded]
    pixels: list[SampleImages | None] = [None] * len(prompts)
    for tiny in images.probe_samples(anyhow=True) if images else ():
        prompts.append([*tiny.prompt])
        pixels.append(tiny.images)
    with autocast(model, precision):
        written = sample_completions(model, tokenizer, prompts, max_new_tokens=NEW_TOKENS, images=pixels)
    each = zip(prompts, written, pixels, strict=True)
    samples = [{"prompt_ids": p, "completion_ids": [c], "pixels": image} for p, c, image in each]
    return Rows("probe texts", samples, prompts, False, images, pixels)


def pair_rows(
    dataset: Dataset, reader: PreTrainedTokenizerBase | Images, name: str, setup: TrainedWith, max_rows: int
) -> Rows:
    """Returns the first rows of a dataset of preference pairs, prepared as for the training. What became of them is
    logged.

    Raises:
        OptionError: `max_rows` is not positive.
        DataError: the rows can't be used.
    """
    if max_rows < 1:
        raise OptionError(f"max_rows={max_rows} must be at least 1.")
    images = reader if isinstance(reader, Images) else None
    used = dataset.select(range(min(max_rows, len(dataset))))
    prepared, summary = prepare_dataset(
        used,
        images.tokenizer if images else reader,
        name,
        setup.max_length,
        setup.truncation_mode,
        unneeded_columns=used.column_names,  # two models are compared, whatever the text
        as_chat=setup.as_chat,
        images=images,
    )
    logger.info("%s", summary)
    samples = list(prepared)
    shown = f"{name} ({len(used):,} of {len(dataset):,} rows)" if len(used) < len(dataset) else name
    prompts = [sample["prompt_ids"] for sample in samples[:GREEDY_PROMPTS]]
    pixels = [images.sample(sample) for sample in samples[:GREEDY_PROMPTS]] if images else []
    return Rows(shown, samples, prompts, True, images, pixels)


def autocast(model: CausalLM, precision: str) -> torch.autocast:
    """Returns mixed precision as the trainer had it: "bfloat16", "float16", or "no"."""
    return torch.autocast(model.device.type, getattr(torch, precision, torch.bfloat16), enabled=precision != "no")


def observe_adapter(loaded: TrainedAdapter, rows: Rows | None) -> AdapterObserved:
    """Observes an adapter's model, without rows on completions that it writes itself (`probe_rows`)."""
    model, tokenizer, setup = loaded.model, loaded.tokenizer, loaded.setup
    rows = rows or probe_rows(model, tokenizer, setup.precision, loaded.images)
    if tokens := invocation_tokens(model.peft_config, loaded.policy):
        starts = (invocation_start(row["prompt_ids"], tokens) for row in rows.samples)
        rows = replace(
            rows, samples=[{**row, "adapter_start": at} for row, at in zip(rows.samples, starts, strict=True)]
        )
    seen = observe(model, tokenizer, rows, setup.precision, "adapter's model")
    with autocast(model, setup.precision):
        off = reference = score(rows, partial(reference_logps, model), model.device, "base")
        if loaded.reference and (frozen := loaded.reference.adapter) is not None:
            reference = score(rows, partial(reference_logps, model, adapter=frozen), model.device, "reference")
    dtype = model.get_input_embeddings().weight.dtype
    return AdapterObserved(seen.logps, seen.greedy, rows, off, reference, setup, tokenizer, model.device, dtype)


def observe(
    model: CausalLM, tokenizer: PreTrainedTokenizerBase, rows: Rows, precision: str = "no", what: str = "model"
) -> Observed:
    """Scores the rows and completes the prompts by a model in eval mode, in the precision of `autocast`; `what` names
    the progress bar."""
    with autocast(model, precision):
        logps = score(rows, partial(completion_logps, model), model.device, what)
        greedy: list[list[int]] = []
        for start in range(0, len(rows.prompts), GREEDY_PROMPTS):
            part = slice(start, start + GREEDY_PROMPTS)
            how: Any = {"max_new_tokens": NEW_TOKENS, "temperature": 0, "images": rows.pixels[part]}
            greedy += sample_completions(model, tokenizer, rows.prompts[part], **how)
    return Observed(logps, greedy)


def score(rows: Rows, logps: Callable[[PackedBatch], Scores], device: torch.device, what: str) -> list[Tensor]:
    """Returns (T,) log-probs of every completion of the rows, on the CPU, by a function of a batch of plain padded
    rows on the device."""
    collate = PreferenceCollator(shared=False, images=rows.images)
    starts = range(0, len(rows.samples), ROWS_PER_BATCH)
    found: list[Tensor] = []
    with torch.no_grad():
        for start in tqdm(starts, desc=f"Scoring the {what}", unit="batch"):
            batch = PackedBatch(**collate(rows.samples[start : start + ROWS_PER_BATCH])).to(device)
            found += logps(batch).token_logps_N.float().cpu().split(batch.lengths.tolist())
    return found


def compare(adapter: AdapterObserved, merged: Observed, off: list[Tensor] | None = None) -> Drift:
    """Puts the merged model beside the adapter's. `off`: log-probs of the merged one without the adapter, if they are
    not the base's."""
    both = list(zip(merged.logps, adapter.logps, strict=True))
    by_token = torch.cat([(m - a).abs() for m, a in both]).double()
    by_completion = torch.stack([(m.double().sum() - a.double().sum()).abs() for m, a in both])
    by_adapter = torch.cat([(a - o).abs() for a, o in zip(adapter.logps, adapter.off, strict=True)]).double()
    strength, error = _strength(adapter, merged, adapter.off if off is None else off)
    return Drift(
        rows=adapter.rows.name,
        completions=len(by_completion),
        tokens=len(by_token),
        mean_token=by_token.mean().item(),
        max_token=by_token.max().item(),
        mean_completion=by_completion.mean().item(),
        max_completion=by_completion.max().item(),
        adapter_token=by_adapter.mean().item(),
        strength=strength,
        strength_error=error,
        greedy_prompts=len(adapter.greedy),
        greedy_equal=sum(a == m for a, m in zip(adapter.greedy, merged.greedy, strict=True)),
        **(_margins_beside(adapter, merged) if adapter.rows.pairs else {}),
    )


def _strength(adapter: AdapterObserved, merged: Observed, off: list[Tensor]) -> tuple[float | None, float | None]:
    """Returns by how much of what the adapter adds to log-probs it does so in the other model, and the standard error:
    the slope through 0 of least squares over tokens, its error with completions as clusters (Liang and Zeger 1986)."""
    sides = (adapter.logps, adapter.off), (merged.logps, off)
    own, seen = ([(on - base).double() for on, base in zip(*side, strict=True)] for side in sides)
    if not (squares := sum(float(a @ a) for a in own)):
        return None, None
    slope = sum(float(a @ m) for a, m in zip(own, seen, strict=True)) / squares
    by_completion = (float(a @ (m - slope * a)) for a, m in zip(own, seen, strict=True))
    return slope, sum(value**2 for value in by_completion) ** 0.5 / squares


def strength(drift: Drift) -> str:
    """Returns the adapter's strength with its 95 % interval, for people."""
    return f"{drift.strength:.2f} ± {2 * (drift.strength_error or 0):.2f}"


def _margins_beside(adapter: AdapterObserved, merged: Observed) -> dict[str, Any]:
    own_P, other_P = (_chosen_wins(observed, adapter) for observed in (adapter, merged))
    shares = {"accuracy_adapter": own_P.double().mean().item(), "accuracy_merged": other_P.double().mean().item()}
    return {"pairs": len(own_P), **shares, "signs_equal": int((own_P == other_P).sum())}


def _chosen_wins(observed: Observed, adapter: AdapterObserved) -> Tensor:
    """Returns (P,) bool, whether the chosen completion of each pair (chosen at even, rejected at odd indices) has the
    higher implicit reward, see `Objective.reward`."""
    rewards_C = torch.stack([logps.double().sum() for logps in observed.logps])
    if adapter.setup.reward == "log_ratio":
        rewards_C -= torch.stack([logps.double().sum() for logps in adapter.reference])
    elif adapter.setup.reward == "mean_logp":
        rewards_C /= torch.tensor([len(logps) for logps in observed.logps])
    return rewards_C[::2] > rewards_C[1::2]
