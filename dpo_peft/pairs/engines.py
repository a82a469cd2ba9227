"""Who writes the completions: a model in this process, or vLLM. Both take token ids and a seed for each completion."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from peft import PeftConfig
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..data.images import Images
from ..errors import OptionError
from ..forward.images import SampleImages
from ..forward.rotary import fix_rope, rope_length
from ..merge.loaders import VLLM_RANKS, max_lora_rank
from ..model.adapter_source import AdapterSource
from ..model.adapters import is_adapter
from ..model.base import load_base
from ..model.generation import end_tokens, sample_completions
from ..model.gguf import from_named
from ..model.rebuilding import keep_weights
from ..training.arguments import load_processor


class Sampling(NamedTuple):
    """How completions are drawn, see `model.generation.sample_completions`."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


class Sample(NamedTuple):
    """One completion."""

    text: str  # without its end token
    ids: list[int]  # with it
    finished: bool  # False: cut off by max_new_tokens


# Writes one completion of each prompt (token ids, seeds, images if there are some); a prompt that stands several times
# gets one for each of its seeds.
Engine = Callable[..., list[Sample]]


class ModelSource(AdapterSource):
    """Which model to sample from, and how it is loaded: an adapter, or a base model in its place (`adapter` is its
    name), in NF4 and bfloat16 unless `quantize` and `dtype` say otherwise."""

    @cached_property
    def is_adapter(self) -> bool:
        """Whether it is no base model. A `base` of one is refused: it has no effect."""
        found = is_adapter(self.adapter, **self.from_hub)
        if self.base is not None and not found:
            raise OptionError(f"base has no effect: {self.adapter!r} is not an adapter. Leave it out.")
        return found

    @property
    def base_name(self) -> str:
        """Folder or Hub id of the base, or of the model itself."""
        return super().base_name if self.is_adapter else self.adapter

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Returns the adapter's own tokenizer, or its base's; of a base model its own.

        Raises:
            OptionError: there is none.
        """
        if self.is_adapter:
            return super().tokenizer()
        try:
            where = {"trust_remote_code": self.trust_remote_code, **self.from_hub}
            tokenizer: PreTrainedTokenizerBase = from_named(AutoTokenizer, self.adapter, **where)
            return tokenizer
        except (OSError, ValueError) as error:
            raise OptionError(f"No tokenizer can be loaded for {self.adapter!r}: {error}") from error

    def images(self, needed: bool = False) -> Images | None:
        """Returns the processor of images, see `AdapterSource`; of a base model its own, if it is `needed`."""
        if self.is_adapter:
            return super().images(needed)
        return Images(load_processor(self.adapter, self.from_hub, self.trust_remote_code)) if needed else None

    def context(self) -> int | None:
        """Returns the tokens that the model was made for; None if its config doesn't say."""
        where = {} if self.is_adapter else self.from_hub
        try:
            config = from_named(AutoConfig, self.base_name, trust_remote_code=self.trust_remote_code, **where)
        except (OSError, ValueError) as error:
            raise OptionError(f"The config of the model {self.base_name!r} can't be read: {error}") from error
        return getattr(config.get_text_config(), "max_position_embeddings", None)


class TransformersEngine:
    """Batched `generate` of a loaded model. A batch that runs out of memory is halved: seeds are the completions' own,
    so that changes nothing but rounding."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, how: Sampling, batch_size: int):
        self.model, self.tokenizer, self.how, self.batch_size = model, tokenizer, how, batch_size

    @classmethod
    def load(cls, source: ModelSource, how: Sampling, batch_size: int, longest: int = 0) -> "TransformersEngine":
        """Loads the model, onto a GPU if there is one; `longest` is that of the prompts, in tokens. Raises what
        `load_base` and `AdapterSource.load` raise."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if source.is_adapter:
            trained = source.load(device, with_reference=False)
            return cls(trained.model, trained.tokenizer, how, batch_size)
        kwargs = {"dtype": source.dtype, **source.from_hub}
        model = load_base(source.adapter, None, source.quantize is not False, kwargs, source.trust_remote_code, device)
        keep_weights(model)  # it computes as it does in training
        fix_rope(model, rope_length(model.config, longest + how.max_new_tokens))  # as vLLM does
        return cls(model.requires_grad_(False).eval(), source.tokenizer(), how, batch_size)

    def __call__(
        self, prompt_ids: Sequence[list[int]], seeds: Sequence[int], images: Sequence[SampleImages | None] = ()
    ) -> list[Sample]:
        found: list[Sample] = []
        for start in range(0, len(prompt_ids), self.batch_size):
            part = slice(start, start + self.batch_size)
            found += self._sample(prompt_ids[part], seeds[part], images[part])
        return found

    def _sample(
        self, prompt_ids: Sequence[list[int]], seeds: Sequence[int], images: Sequence[SampleImages | None]
    ) -> list[Sample]:
        try:
            completions = sample_completions(self.model, self.tokenizer, prompt_ids, seeds, *self.how, images=images)
        except torch.OutOfMemoryError as error:
            if len(prompt_ids) == 1:
                raise OptionError(
                    f"Out of memory for a single completion of a prompt of {len(prompt_ids[0])} tokens: lower "
                    "max_new_tokens, leave out the longest prompts, or load the model with quantize true."
                ) from error
            completions = None
        if completions is None:  # outside the except clause, which would keep the failed batch's tensors alive
            torch.cuda.empty_cache()
            half = len(prompt_ids) // 2
            parts = (slice(half), slice(half, None))
            return [one for part in parts for one in self._sample(prompt_ids[part], seeds[part], images[part])]
        ends = end_tokens(self.model, self.tokenizer)
        return [decode(self.tokenizer, ids, ids[-1] in ends) for ids in completions]


class VllmEngine:
    """vLLM, which batches by itself. An adapter is served as a LoRA request on its base."""

    def __init__(self, source: ModelSource, how: Sampling, longest_prompt: int, memory: float | None = None):
        """
        Args:
            source: with an adapter, one that vLLM can serve: no DoRA, no modules_to_save.
            how: of the sampling.
            longest_prompt: tokens; with `max_new_tokens` it bounds the cache.
            memory: share of the GPU that vLLM may take; its own default if None.

        Raises:
            OptionError: vLLM isn't installed, or can't serve this adapter.
        """
        try:
            from vllm import LLM, SamplingParams
            from vllm.lora.request import LoRARequest
        except ImportError as error:
            raise OptionError(
                f"engine='vllm' needs the package vllm, which can't be imported ({error}): pip install vllm, or use "
                "engine 'transformers'."
            ) from error
        self.how, self.tokenizer, self._params, self._lora = how, source.tokenizer(), SamplingParams, None
        options: dict[str, object] = {
            "model": source.base_name,
            "dtype": source.dtype or "auto",
            "max_model_len": _served_length(source, longest_prompt + how.max_new_tokens),
            "trust_remote_code": source.trust_remote_code,
        }
        if memory is not None:
            options["gpu_memory_utilization"] = memory
        trained = source.read() if source.is_adapter else None
        if source.quantize or source.quantize is None and (trained is None or trained.quantization):
            options["quantization"] = "bitsandbytes"  # NF4 as it loads
        if source.is_adapter:
            options |= {"enable_lora": True, "max_lora_rank": _served_rank(source.adapter, source.config)}
            self._lora = LoRARequest("policy", 1, source.adapter)
        else:
            options |= source.from_hub
        self._llm = LLM(**options)

    def __call__(self, prompt_ids: Sequence[list[int]], seeds: Sequence[int]) -> list[Sample]:
        how, top_k = self.how, self.how.top_k or -1
        same = {"temperature": how.temperature, "top_p": how.top_p, "top_k": top_k, "max_tokens": how.max_new_tokens}
        params = [self._params(**same, seed=seed) for seed in seeds]
        prompts = [{"prompt_token_ids": list(ids)} for ids in prompt_ids]
        outputs = self._llm.generate(prompts, sampling_params=params, lora_request=self._lora, use_tqdm=False)
        found = [output.outputs[0] for output in outputs]
        return [decode(self.tokenizer, list(one.token_ids), one.finish_reason == "stop") for one in found]


def decode(tokenizer: PreTrainedTokenizerBase, ids: list[int], finished: bool) -> Sample:
    """Makes a sample of its tokens; the end token and other special ones are not part of the text."""
    return Sample(tokenizer.decode(ids, skip_special_tokens=True), ids, finished)


def _served_length(source: ModelSource, longest: int) -> int:
    """Returns what vLLM's `max_model_len` must be, by which it also chooses the frequencies of longrope."""
    trained = source.read() if source.is_adapter else None
    if trained is None or trained.rope_length is None:
        return longest
    config = from_named(AutoConfig, source.base_name, trust_remote_code=source.trust_remote_code)
    if (rope_length(config, longest) or 0) > trained.rope_length:
        raise OptionError(
            f"{source.adapter!r} was trained with the rotary frequencies of rows of up to {trained.rope_length} "
            f"tokens, and vLLM would take those of longer ones for prompts and completions of {longest}: lower "
            "max_new_tokens, leave out the longest prompts, or use engine 'transformers'."
        )
    return max(longest, trained.rope_length)


def _served_rank(name: str, config: PeftConfig) -> int:
    """Returns what vLLM's `max_lora_rank` must be."""
    if config.use_dora or config.modules_to_save or config.alora_invocation_tokens:
        what = (
            "DoRA" if config.use_dora else "modules_to_save" if config.modules_to_save else "alora_invocation_tokens"
        )
        raise OptionError(f"vLLM can't serve {name!r}, an adapter with {what}: use engine 'transformers'.")
    rank = max_lora_rank(config)
    if rank > VLLM_RANKS[-1]:
        raise OptionError(f"vLLM can't serve {name!r}: its rank {rank} is above {VLLM_RANKS[-1]}.")
    return rank
