"""A conversation with a trained adapter, token by token, with the adapter on or off.

Decoding is transformers' own `generate`, on the base that the adapter was trained on, made as it was then.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from ..data.fields import RowProblem
from ..data.parse import read_prompt
from ..data.prompts import Prompt, encode_prompts, image_columns, open_images
from ..errors import DataError, OptionError
from ..forward.images import SampleImages
from ..model.adapter_source import TrainedAdapter
from ..model.generation import check_begins, check_sampling, end_tokens, generation_inputs
from ..reference.adapter_off import reference_mode

MAX_NEW_TOKENS = 512  # if neither the settings nor the model's generation_config say
Message = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """How completions are drawn; what is None is as the model's `generation_config` has it.

    Raises:
        OptionError: a value out of range.
    """

    max_new_tokens: int | None = None
    temperature: float | None = None  # 0: the likeliest token each time
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        temperature = 1.0 if self.temperature is None else self.temperature
        check_sampling(self.max_new_tokens or 1, temperature, 1.0 if self.top_p is None else self.top_p)
        if self.max_new_tokens == 0:
            raise OptionError("max_new_tokens=0 must be at least 1.")

    def config(self, trained: TrainedAdapter) -> GenerationConfig:
        """Returns the model's generation config with these settings in it.

        Raises:
            OptionError: top_p, where the likeliest token is taken.
        """
        base: Any = trained.model.get_base_model()
        config = copy.deepcopy(base.generation_config)
        config.max_new_tokens = self.max_new_tokens or config.max_new_tokens or MAX_NEW_TOKENS
        config.max_length, config.use_cache, config.num_beams = None, True, 1  # beams can't be shown as they grow
        config.eos_token_id = end_tokens(trained.model, trained.tokenizer)
        pad = trained.tokenizer.pad_token_id
        config.pad_token_id = config.eos_token_id[0] if pad is None and config.eos_token_id else pad
        if self.temperature is not None:
            config.do_sample = self.temperature > 0
            config.temperature = self.temperature
        if self.top_p is not None:
            config.top_p = self.top_p
        if not config.do_sample:
            if self.top_p is not None:
                raise OptionError("top_p has no effect, as the likeliest token is taken: give a temperature above 0.")
            config.temperature, config.top_p, config.top_k = 1.0, 1.0, 50  # as if not given
        return config

    def describe(self, trained: TrainedAdapter) -> str:
        """Returns in words how completions are drawn, and who says so."""
        config = self.config(trained)
        given = ("temperature", "top_p", "top_k", "min_p")
        values = [(name, value) for name in given if (value := getattr(config, name)) is not None]
        how = ", ".join(f"{name} {value:g}" for name, value in values) or "temperature 1"
        whose = "as given" if self.temperature is not None else "by the model's generation_config"
        return (
            f"{f'sampled ({how})' if config.do_sample else 'greedy'} {whose}, at most {config.max_new_tokens} new "
            f"tokens, seed {self.seed}"
        )


@dataclass(frozen=True)
class Reply:
    """A completion of the model's, and what became of the conversation before it."""

    text: str  # without special tokens
    ids: list[int]  # with its end token
    finished: bool  # by an end token; False: max_new_tokens, the end of the context, or Ctrl-C
    stopped: bool = False  # by Ctrl-C
    dropped: int = 0  # oldest messages that had no room in the context any more


class Session:
    """A conversation that is kept, in the model's chat template.

    Without a template, a message is continued as it is, as in training on texts, and nothing is kept.

    Args:
        trained: from `load_trained`; `with_reference=False` is enough.
        settings: of the decoding; may be exchanged at any time.
        system: a system message.

    Raises:
        OptionError: a system message that the model has no place for, or as `Settings.config`.
    """

    def __init__(self, trained: TrainedAdapter, settings: Settings | None = None, system: str | None = None):
        self.trained, self.settings = trained, settings or Settings()
        self.has_template = bool(trained.tokenizer.chat_template)
        config: Any = trained.model.config
        self.context: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
        self.settings.config(trained)
        self.reset(system)

    def reset(self, system: str | None = None) -> None:
        """Begins anew, with a system message if one is given. Raises an OptionError if the model takes none."""
        messages = [{"role": "system", "content": system}] if system else []
        if system:
            if not self.has_template:
                raise OptionError("system: the model has no chat template, so it has no place for one. Leave it out.")
            try:
                shown = [self.encode([*start, {"role": "user", "content": "Hello."}]) for start in (messages, [])]
            except DataError as error:
                raise OptionError(f"system: {error}") from None
            if shown[0] == shown[1]:
                raise OptionError("system: the model's chat template leaves it out. Put it into the first message.")
        self.messages: list[Message] = messages

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Returns the tokens of a conversation up to where the model begins to write, as training has them.

        Raises:
            DataError: the template refuses it.
        """
        return self._read(messages)[0]

    def _read(self, messages: Sequence[Message]) -> tuple[list[int], SampleImages | None]:
        """Returns the tokens of a conversation, and the pixels of its images.

        Raises:
            DataError: the template refuses it.
        """
        prompt = [*messages] if self.has_template else messages[-1]["content"]
        try:
            files, example = open_images(read_prompt({"prompt": prompt}), {}, self.trained.images)
        except RowProblem as problem:
            raise problem.located("the conversation", 0) from None
        one, images = Prompt(0, example, files=files), self.trained.images
        (ids,) = encode_prompts(self.trained.tokenizer, [one], "the conversation", images)
        return ids, images.sample({"row": 0, **image_columns(one, images)}) if images else None

    def say(
        self,
        text: str,
        show: Callable[[bool, str], None] = lambda on, piece: None,
        sides: Sequence[bool] = (True,),
        images: Sequence[str] = (),
    ) -> list[Reply]:
        """Returns the model's reply to a message, one for each side; the first one is kept in the conversation.

        Args:
            text: the message.
            show: is called with a side and each piece of its text as it is written.
            sides: True for the adapter on, False for off.
            images: files of images that stand before the text.

        Raises:
            OptionError: the message alone is longer than the model's context, or memory runs out.
            DataError: the template refuses the conversation.
        """
        fixed = self.messages[:1] if self.messages and self.messages[0]["role"] == "system" else []
        content = [*({"type": "image", "image": file} for file in images), {"type": "text", "text": text}]
        turns = [*self.messages[len(fixed) :], {"role": "user", "content": content if images else text}]
        if images and not self.has_template:
            raise OptionError("image: the model has no chat template, so there is no place for one. Leave it out.")
        if not self.has_template:
            turns = turns[-1:]
        config, dropped = self.settings.config(self.trained), 0
        prompt_ids, pixels = self._read([*fixed, *turns])
        reserve = min(config.max_new_tokens, (self.context or 0) // 4)  # for the completion
        while self.context and len(prompt_ids) + reserve > self.context and len(turns) > 1:
            turns, dropped = turns[2:], dropped + 2
            prompt_ids, pixels = self._read([*fixed, *turns])
        if self.context:
            room = self.context - len(prompt_ids)
            if room < 1:
                raise OptionError(
                    f"The message has {len(prompt_ids)} tokens, and the model's context {self.context}: shorten it."
                )
            config.max_new_tokens = min(config.max_new_tokens, room)
        check_begins(self.trained.model, prompt_ids, "The message")
        replies = []
        for on in sides:
            replies.append(self._write(prompt_ids, pixels, config, partial(show, on), on, dropped))
            if replies[-1].stopped:
                break
        if self.has_template and replies[0].ids:
            self.messages = [*fixed, *turns, {"role": "assistant", "content": replies[0].text}]
        return replies

    def _write(
        self,
        prompt_ids: list[int],
        pixels: SampleImages | None,
        config: GenerationConfig,
        show: Callable[[str], None],
        on: bool,
        dropped: int,
    ) -> Reply:
        model, tokenizer = self.trained.model, self.trained.tokenizer
        stream, device = Pieces(tokenizer, show), model.device
        inputs = torch.tensor([prompt_ids], device=device)
        stopped = False
        try:
            with nullcontext() if on else reference_mode(model), torch.no_grad(), _seeded(self.settings.seed, device):
                given = {"input_ids": inputs, "attention_mask": torch.ones_like(inputs)}
                given |= generation_inputs(model, inputs, [pixels])
                model.generate(**given, generation_config=config, streamer=stream)
        except KeyboardInterrupt:
            stopped = True
        except torch.OutOfMemoryError as error:
            raise OptionError(
                f"Out of memory: {len(prompt_ids)} tokens of conversation and {len(stream.ids)} of a completion don't "
                "fit. Shorten them (max_new_tokens), or load the base in 4 bits (quantize true)."
            ) from error
        finished = bool(stream.ids) and stream.ids[-1] in config.eos_token_id
        return Reply(stream.close(), stream.ids, finished, stopped, dropped)


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Sets torch's random state inside; afterwards it is as before."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


class Pieces(BaseStreamer):
    """Takes tokens from `generate` and shows what they add to the text.

    Before transformers 5.24 its own `TextStreamer` forgets the tokens before a new line, and with them the spaces that
    some tokenizers write only behind another token: indented code loses one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, show: Callable[[str], None]):
        self.tokenizer, self.show = tokenizer, show
        self.ids: list[int] = []
        self.shown, self._prompt = "", True

    def put(self, value: Tensor) -> None:
        """Takes the prompt first, which is not shown, then each token."""
        if self._prompt:
            self._prompt = False
            return
        self.ids += value.flatten().tolist()
        text = self._text()
        if not text.endswith("\ufffd"):  # a part of a character
            self._show(text)

    def end(self) -> None:
        """Shows what was held back."""
        self._show(self._text())

    def close(self) -> str:
        """Returns the whole text; what was held back, as by Ctrl-C, is shown."""
        self.end()
        return self._text()

    def _text(self) -> str:
        return str(self.tokenizer.decode(self.ids, skip_special_tokens=True))

    def _show(self, text: str) -> None:
        if text.startswith(self.shown) and text != self.shown:
            self.show(text[len(self.shown) :])
            self.shown = text
