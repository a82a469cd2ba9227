"""Who writes the answers: a model in this process, or vLLM. Both take token ids and a seed for each answer."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from ..errors import OptionError
from ..model.adapter_source import adapter_tokenizer, load_trained, read_training
from ..model.generation import end_tokens, sample_completions
from ..model.loading import is_adapter, keep_weights, load_base
from ..model.serving import VLLM_RANKS, max_lora_rank
from ..reference.frozen_adapter import read_config


class Sampling(NamedTuple):
    """How answers are drawn, see `sampling.sample_completions`."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


class Sample(NamedTuple):
    """One answer."""

    text: str  # without its end token
    ids: list[int]  # with it
    finished: bool  # False: cut off by max_new_tokens


class Engine(Protocol):
    """Writes one answer for each prompt; a prompt that stands several times gets one for each of its seeds."""

    tokenizer: PreTrainedTokenizerBase

    def __call__(self, prompt_ids: Sequence[list[int]], seeds: Sequence[int]) -> list[Sample]: ...


class ModelSource(NamedTuple):
    """Which model to sample from, and how it is loaded."""

    name: str  # a base model's or an adapter's folder or Hub id
    base: str | None = None  # of an adapter, if it isn't where its config says
    quantize: bool | None = None  # None: as an adapter was trained; NF4 for a base model
    dtype: str | None = None  # None: as an adapter was trained; bfloat16 for a base model
    revision: str | None = None
    trust_remote_code: bool = False
    check_base: bool = True  # the base must be the one that the adapter was trained on

    @property
    def from_hub(self) -> dict[str, Any]:
        return {} if self.revision is None else {"revision": self.revision}

    def bare(self) -> tuple[str, Any]:
        """The base's name, and the adapter's config if there is an adapter.

        Raises:
            OptionError: `base` without effect, or an adapter that doesn't say what it belongs to.
        """
        if not is_adapter(self.name, **self.from_hub):
            if self.base is not None:
                raise OptionError(f"base has no effect: {self.name!r} is not an adapter. Leave it out.")
            return self.name, None
        config = read_config(self.name, **self.from_hub)
        base = self.base or config.base_model_name_or_path
        if not base:
            raise OptionError(f"The adapter {self.name!r} does not say which base it belongs to: give base.")
        return base, config

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The adapter's own, or its base's; of a base model its own.

        Raises:
            OptionError: there is none.
        """
        base, adapter = self.bare()
        if adapter is not None:
            return adapter_tokenizer(self.name, base, self.trust_remote_code, self.from_hub)
        try:
            return AutoTokenizer.from_pretrained(base, trust_remote_code=self.trust_remote_code, **self.from_hub)
        except (OSError, ValueError) as error:
            raise OptionError(f"No tokenizer can be loaded for {base!r}: {error}") from error

    def context(self) -> int | None:
        """Tokens that the model was made for; None if its config doesn't say."""
        base, adapter = self.bare()
        where = self.from_hub if adapter is None else {}
        try:
            config = AutoConfig.from_pretrained(base, trust_remote_code=self.trust_remote_code, **where)
        except (OSError, ValueError) as error:
            raise OptionError(f"The config of the model {base!r} can't be read: {error}") from error
        return getattr(config.get_text_config(), "max_position_embeddings", None)


class TransformersEngine:
    """Batched `generate` of a loaded model. A batch that runs out of memory is halved: seeds are the answers' own, so
    that changes nothing but rounding."""

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, how: Sampling, batch_size: int):
        self.model, self.tokenizer, self.how, self.batch_size = model, tokenizer, how, batch_size

    @classmethod
    def load(cls, source: ModelSource, how: Sampling, batch_size: int) -> "TransformersEngine":
        """Raises OptionError or ReferenceMismatchError: as `load_base` and `load_trained`."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if source.bare()[1] is not None:
            trained = load_trained(
                source.name,
                base=source.base,
                quantize=source.quantize,
                dtype=source.dtype,
                with_reference=False,
                check_base=source.check_base,
                device=device,
                trust_remote_code=source.trust_remote_code,
                revision=source.revision,
            )
            return cls(trained.model, trained.tokenizer, how, batch_size)
        kwargs = {"dtype": source.dtype, **source.from_hub}
        quantize = source.quantize is not False
        model = load_base(source.name, None, quantize, kwargs, source.trust_remote_code, device)
        keep_weights(model)  # it computes as it does in training
        return cls(model.requires_grad_(False).eval(), source.tokenizer(), how, batch_size)

    def __call__(self, prompt_ids: Sequence[list[int]], seeds: Sequence[int]) -> list[Sample]:
        found: list[Sample] = []
        for start in range(0, len(prompt_ids), self.batch_size):
            part = slice(start, start + self.batch_size)
            found += self._sample(prompt_ids[part], seeds[part])
        return found

    def _sample(self, prompt_ids: Sequence[list[int]], seeds: Sequence[int]) -> list[Sample]:
        try:
            completions = sample_completions(self.model, self.tokenizer, prompt_ids, seeds, *self.how)
        except torch.OutOfMemoryError as error:
            if len(prompt_ids) == 1:
                raise OptionError(
                    f"Out of memory for a single answer to a prompt of {len(prompt_ids[0])} tokens: lower "
                    "max_new_tokens, leave out the longest prompts, or load the model with quantize true."
                ) from error
            completions = None
        if completions is None:  # outside the except clause, which would keep the failed batch's tensors alive
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            half = len(prompt_ids) // 2
            return self._sample(prompt_ids[:half], seeds[:half]) + self._sample(prompt_ids[half:], seeds[half:])
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
        base, adapter = source.bare()
        self.how, self.tokenizer, self._params, self._lora = how, source.tokenizer(), SamplingParams, None
        options: dict[str, Any] = {
            "model": base,
            "dtype": source.dtype or "auto",
            "max_model_len": longest_prompt + how.max_new_tokens,
            "trust_remote_code": source.trust_remote_code,
        }
        if source.revision is not None and adapter is None:
            options["revision"] = source.revision
        if memory is not None:
            options["gpu_memory_utilization"] = memory
        if _in_4_bits(source, adapter):
            options["quantization"] = "bitsandbytes"  # NF4 as it loads
        if adapter is not None:
            options |= {"enable_lora": True, "max_lora_rank": _served_rank(source.name, adapter)}
            self._lora = LoRARequest("policy", 1, source.name)
        self._llm = LLM(**options)

    def __call__(self, prompt_ids: Sequence[list[int]], seeds: Sequence[int]) -> list[Sample]:
        how = self.how
        params = [
            self._params(
                temperature=how.temperature,
                top_p=how.top_p,
                top_k=how.top_k or -1,
                max_tokens=how.max_new_tokens,
                seed=seed,
            )
            for seed in seeds
        ]
        prompts = [{"prompt_token_ids": list(ids)} for ids in prompt_ids]
        outputs = self._llm.generate(prompts, sampling_params=params, lora_request=self._lora, use_tqdm=False)
        answers = [output.outputs[0] for output in outputs]
        return [decode(self.tokenizer, list(a.token_ids), a.finish_reason == "stop") for a in answers]


def decode(tokenizer: PreTrainedTokenizerBase, ids: list[int], finished: bool) -> Sample:
    """A sample of its tokens; the end token and other special ones are not part of the text."""
    return Sample(tokenizer.decode(ids, skip_special_tokens=True), ids, finished)


def _in_4_bits(source: ModelSource, adapter: Any) -> bool:
    if source.quantize is not None:
        return source.quantize
    trained = None if adapter is None else read_training(adapter)
    return trained is None or bool(trained.quantization)


def _served_rank(name: str, config: Any) -> int:
    """What `max_lora_rank` must be."""
    if config.use_dora or config.modules_to_save:
        what = "DoRA" if config.use_dora else "modules_to_save"
        raise OptionError(f"vLLM can't serve {name!r}, an adapter with {what}: use engine 'transformers'.")
    rank = max_lora_rank(config)
    if rank > VLLM_RANKS[-1]:
        raise OptionError(f"vLLM can't serve {name!r}: its rank {rank} is above {VLLM_RANKS[-1]}.")
    return rank
