"""Completions from a model: batched, seeded, in the order of the prompts."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..errors import OptionError
from ..forward.images import SampleImages, merge_inputs
from ..forward.modules import unwrap
from ..forward.scope import invocation_start, invocation_tokens


def sample_completions(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[Sequence[int]],
    seed: int | Sequence[int] = 0,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    images: Sequence[SampleImages | None] = (),
) -> list[list[int]]:
    """Samples one completion per prompt, as token ids with their end token. All prompts are one batch.

    Args:
        model: a causal LM or a PEFT model, its adapter on or off as the caller left it. It runs in eval mode with its
            cache, and is as before afterwards.
        tokenizer: has an end token and a pad token.
        prompt_ids: token ids of each prompt, not empty. A prompt that stands twice gets two samples.
        seed: of the sampling; torch's random state is as before afterwards. A list has one for each prompt, whose
            completion then doesn't depend on what else is in the batch, up to rounding.
        max_new_tokens: a completion that isn't finished by then has no end token.
        temperature: 0 takes the likeliest token each time.
        top_p, top_k: restrict the distribution; 1.0 and 0 leave it whole, and samples are then from the model itself:
            penalties and limits of its `generation_config` are not applied.
        images: of each prompt, whose token ids hold theirs; none if there are none at all.

    Raises:
        OptionError: an empty prompt, one where the adapter would not begin to act, or a number out of range.
    """
    check_sampling(max_new_tokens, temperature, top_p, top_k)
    for number, ids in enumerate(prompt_ids):
        if not ids:
            raise OptionError(f"Prompt {number} has no tokens: give each at least one.")
        check_begins(model, ids, f"Prompt {number}")
    if not isinstance(seed, int) and len(seed) != len(prompt_ids):
        raise OptionError(f"{len(seed)} seeds for {len(prompt_ids)} prompts: give each one, or one number for all.")
    if not prompt_ids:
        return []
    device, longest = model.device, max(map(len, prompt_ids))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    input_ids = torch.tensor([[pad] * (longest - len(ids)) + list(ids) for ids in prompt_ids], device=device)
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompt_ids], device=device)
    how: dict[str, object] = {"do_sample": temperature > 0}
    if temperature > 0:
        how |= {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    if temperature > 0 and not isinstance(seed, int):
        draws = _OwnDraws(seed, device, temperature, top_p, top_k)
        how = {"do_sample": False, "logits_processor": LogitsProcessorList([draws])}
    how |= generation_inputs(model, input_ids, images)
    ends = end_tokens(model, tokenizer)
    base: Any = unwrap(model)
    config = model.config.get_text_config()  # a model of text and images has one inside its own
    training, use_cache, configured = model.training, config.use_cache, base.generation_config
    # PEFT leaves hooks of an answer-only adapter on checkpointed layers until a backward pass, and refuses the next.
    checkpointed = [layer for layer in model.modules() if getattr(layer, "gradient_checkpointing", False)]
    model.eval()
    config.use_cache = True
    base.generation_config = GenerationConfig()
    for layer in checkpointed:
        layer.gradient_checkpointing = False
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed if isinstance(seed, int) else 0)
            ending = {"max_new_tokens": max_new_tokens, "eos_token_id": ends, "pad_token_id": pad}
            output = model.generate(input_ids=input_ids, attention_mask=mask, **ending, **how)
    finally:
        model.train(training)
        config.use_cache, base.generation_config = use_cache, configured
        for layer in checkpointed:
            layer.gradient_checkpointing = True
    completions = output[:, longest:].tolist()
    return [ids[: next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids))] for ids in completions]


def check_begins(model: PreTrainedModel | PeftModel, ids: Sequence[int], name: str) -> None:
    """Raises an OptionError for a prompt without the tokens that an answer-only adapter acts from: PEFT's `generate`
    would leave it off."""
    tokens = invocation_tokens(model.peft_config, model.active_adapters[0]) if isinstance(model, PeftModel) else ()
    if tokens and invocation_start(ids, tokens) is None:
        raise OptionError(
            f"{name} does not hold the tokens {[*tokens]} from which the adapter acts (alora_invocation_tokens): it "
            "would stay off. Give prompts as in training, such as conversations instead of text."
        )


def generation_inputs(model: Any, input_ids: Tensor, images: Sequence[SampleImages | None]) -> dict[str, Tensor]:
    """Returns what `generate` takes beside these (rows, length) prompts: the pixels of their images, and which tokens
    are an image's, where the model wants to be told (PaliGemma: which prompts have none)."""
    given = [one for one in images if one is not None]
    if not given:
        return {}
    base = unwrap(model)
    inputs = merge_inputs([one.inputs for one in given])
    types = (input_ids == given[0].token).int()
    if base.config.model_type == "paligemma":
        types = (types.sum(1, keepdim=True) == 0).int().expand_as(types)
    names = {"token_type_ids", "mm_token_type_ids"} & inspect.signature(type(base).forward).parameters.keys()
    return {name: value.to(input_ids.device) for name, value in {**inputs, **dict.fromkeys(names, types)}.items()}


class _OwnDraws(LogitsProcessor):
    """Takes the steps of `generate` in sampling, in its order, and adds Gumbel noise of a row's own generator to the
    row's log-probs; the largest sum is a sample."""

    def __init__(self, seeds: Sequence[int], device: torch.device, temperature: float, top_p: float, top_k: int):
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self.steps: list[LogitsProcessor] = [TemperatureLogitsWarper(float(temperature))] if temperature != 1 else []
        self.steps += [TopKLogitsWarper(top_k)] if top_k else []
        self.steps += [TopPLogitsWarper(top_p)] if top_p < 1 else []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        for step in self.steps:
            scores = step(input_ids, scores)
        exponential = torch.empty_like(scores)
        for row, generator in zip(exponential, self.generators, strict=True):
            row.exponential_(generator=generator)
        return scores - exponential.log()


def check_sampling(max_new_tokens: int, temperature: float, top_p: float = 1.0, top_k: int = 0) -> None:
    """Raises an OptionError for a number out of range, or one that has no effect."""
    if max_new_tokens < 1:
        raise OptionError(f"max_new_tokens={max_new_tokens} must be at least 1.")
    if not temperature >= 0:
        raise OptionError(f"temperature={temperature} must be 0 (the likeliest token) or above.")
    if not 0 < top_p <= 1:
        raise OptionError(f"top_p={top_p} must be above 0 and at most 1.")
    if top_k < 0:
        raise OptionError(f"top_k={top_k} must be 0 (no limit) or above.")
    if temperature == 0 and (top_p != 1 or top_k):
        raise OptionError("top_p and top_k have no effect with temperature=0: leave them out.")


def end_tokens(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the tokens that end a completion. A model may stop at more than its tokenizer's end token: a chat
    model's end of turn and end of text."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    several = configured if isinstance(configured, list) else [configured]
    return list(dict.fromkeys(token for token in [tokenizer.eos_token_id, *several] if token is not None))
