"""What a server makes of token ids: log-probs of completions that it is given, and the completions that it writes.

llama.cpp's server tells the log-probs of tokens that it writes alone, taken before any change to the logits (`n_probs`
without `post_sampling_probs`). So it is made to write the completion, by a grammar of its tokens. vLLM tells those of
a prompt (`prompt_logprobs`). Both were read off their sources in autumn 2026.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import takewhile
from typing import Any, Protocol

import torch
from tqdm.auto import tqdm

from ..errors import OptionError
from ..merge.drift import NEW_TOKENS, Observed, Rows
from .asking import Endpoint

AT_ONCE = 256  # tokens that one request has llama.cpp's server write
LOWEST = -104.0  # nats: a probability that float32 does not hold; llama.cpp says -3e38 then, vLLM -9999


class Server(Protocol):
    """A model that runs elsewhere."""

    def logps(self, prompt: Sequence[int], completion: Sequence[int]) -> list[float]:
        """Returns the log-prob of every token of a completion, in nats."""

    def greedy(self, prompt: Sequence[int], most: int) -> list[int]:
        """Returns the likeliest tokens after a prompt, with the end token, `most` at most."""


class LlamaServer:
    """llama.cpp's `llama-server`, with what adapters it was started with."""

    def __init__(self, url: str, key: str | None = None):
        self.at = Endpoint(url, key=key)

    def logps(self, prompt: Sequence[int], completion: Sequence[int]) -> list[float]:
        """See `Server`."""
        found: list[float] = []
        while len(found) < len(completion):
            before, ids = [*prompt, *completion[: len(found)]], completion[len(found) :][:AT_ONCE]
            told = self._written(before, len(ids), **self._forcing(ids))
            right = [one for one, _ in takewhile(lambda pair: pair[0]["id"] == pair[1], zip(told, ids, strict=False))]
            found += [max(one["logprob"], LOWEST) for one in right or [self._single(before, ids[0])]]
        return found

    @cached_property
    def _letter(self) -> int:
        """A token that is a whole character."""
        return int(self.at.ask("/tokenize", {"content": "a"}, lambda told: told["tokens"][-1]))

    def _forcing(self, ids: Sequence[int]) -> dict[str, Any]:
        """Returns options by which these tokens are written up to the first that grammars don't know, and something
        else from there on: one that ends a text (but for the last), ends within a character, or is a zero byte."""
        *first, last = (f"r{at} ::= <[{token}]> " for at, token in enumerate(ids))
        rules = [f"{rule} r{at} | stray" for at, rule in enumerate(first, 1)]
        rules += [f'{last} | ""', f"stray ::= <[{self._letter}]> | <[{self._letter}]> stray", "root ::= r0"]
        return {"grammar": "\n".join(rules), "logit_bias": [[self._letter, -1e9], [ids[-1], 1e9]]}

    def _single(self, before: Sequence[int], token: int) -> dict[str, Any]:
        """Returns what is told of a token that is forced by its logit alone. The server keeps silent of one that ends
        within a character until that is whole: it is found among all others, beside one that is forced."""
        if written := self._written(before, 1, logit_bias=[[token, 1e9]]):
            if (found := written[0]["id"]) != token:
                raise OptionError(f"{self.at.url} wrote the token {found} where {token} was forced: another model.")
            return written[0]
        (one,) = self._written(before, 1, logit_bias=[[self._letter, 1e9]], n_probs=1 << 20)
        return next(each for each in one["top_logprobs"] if each["id"] == token)

    def greedy(self, prompt: Sequence[int], most: int) -> list[int]:
        """See `Server`."""
        return [one["id"] for one in self._written(prompt, most)]

    def _written(self, ids: Sequence[int], most: int, **more: Any) -> list[dict[str, Any]]:
        how = {"n_predict": most, "n_probs": 1, "temperature": 0, "samplers": ["temperature"], "cache_prompt": True}
        told = self.at.ask("/completion", {"prompt": [*ids], **how, **more})
        return told.get("completion_probabilities", [])


class VllmServer:
    """vLLM's server, by OpenAI's completions and vLLM's own additions to them."""

    def __init__(self, url: str, model: str, key: str | None = None):
        self.at, self.model = Endpoint(url.rstrip("/").removesuffix("/v1"), key=key), model

    def logps(self, prompt: Sequence[int], completion: Sequence[int]) -> list[float]:
        """See `Server`."""
        told = self._choice([*prompt, *completion], 1, prompt_logprobs=1)["prompt_logprobs"][len(prompt) :]
        return [max(one[str(token)]["logprob"], LOWEST) for one, token in zip(told, completion, strict=True)]

    def greedy(self, prompt: Sequence[int], most: int) -> list[int]:
        """See `Server`."""
        ids: list[int] = self._choice(prompt, most, return_token_ids=True)["token_ids"]
        return ids

    def _choice(self, ids: Sequence[int], most: int, **more: Any) -> dict[str, Any]:
        penalties = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}  # not its own
        how = {"max_tokens": most, "temperature": 0, **penalties, **more}
        body = {"model": self.model, "prompt": [*ids], **how}
        choice: dict[str, Any] = self.at.ask("/v1/completions", body, lambda told: told["choices"][0])
        return choice


@contextmanager
def llama_cpp_server(base: str, adapter: str | None, context: int) -> Iterator[LlamaServer]:
    """Runs llama.cpp's server in this process, with the settings that it has unless told otherwise, on a free port.

    Args:
        base, adapter: GGUF files.
        context: tokens of the longest row.

    Raises:
        OptionError: xllamacpp isn't installed, or the files don't go together.
    """
    try:
        import xllamacpp
    except ImportError as error:
        raise OptionError(
            f"engine='llama.cpp' needs the package xllamacpp ({error}): pip install 'dpo-peft[llamacpp]', or start a "
            "llama-server and give its --url."
        ) from error
    params = xllamacpp.CommonParams()
    params.model.path = base
    if adapter is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(adapter, 1.0)]
    params.n_ctx, params.n_parallel, params.port, params.verbosity, params.warmup = context, 1, 0, 0, False
    for threads in (params.cpuparams, params.cpuparams_batch):
        threads.n_threads = torch.get_num_threads()
    try:
        server = xllamacpp.Server(params)
    except RuntimeError as error:
        raise OptionError(f"llama.cpp can't load {base!r} with {adapter!r}: {error}.") from error
    try:
        yield LlamaServer(server.listening_address)
    finally:
        del server


def observe_server(server: Server, rows: Rows) -> Observed:
    """Scores the rows and completes the prompts by a server."""
    logps = [
        torch.tensor(server.logps(sample["prompt_ids"], ids))
        for sample in tqdm(rows.samples, desc="Scoring by the server", unit="row")
        for ids in sample["completion_ids"]
    ]
    return Observed(logps, [server.greedy(prompt, NEW_TOKENS) for prompt in rows.prompts])
