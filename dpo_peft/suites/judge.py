"""How often a judge behind an OpenAI-compatible server prefers the adapter's completion to the base's.

Each pair is judged twice, with the positions swapped: a win needs both verdicts, all else is half a win. Judges like
what is longer, so a second figure has the influence of length taken out, after the idea of AlpacaEval 2
(Dubois et al. 2024, arXiv:2404.04475): wins are fitted by

    sigmoid(theta + phi * tanh(d / std(d))),    d: tokens of the adapter's completion minus those of the base's

and reported at d = 0, that is sigmoid(theta). A ridge of `RIDGE` on both keeps them finite where one side wins all.

Shape suffixes: N pairs, B draws; a 2 behind them is (theta, phi).
"""

import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from ..data.fields import content_text
from ..data.prompts import Prompt
from ..errors import OptionError
from ..pairs.engines import ModelSource
from ..serving.asking import Endpoint
from ..training.tally import Array, sigmoid, wilson
from .figures import Figure, Statistic, bootstrap, ratio
from .options import EvalOptions
from .subject import Evaluate, Subject, read_some

RIDGE, STEPS = 0.01, 60
WINS = {("adapter", "adapter"): 1.0, ("base", "base"): 0.0}  # by both verdicts; all others are half a win
AT_ONCE, TOKENS = 8, 1024
ASK = """Two replies to the same request stand below. Say which of them serves the person who wrote the request \
better: by doing what was asked, by being right, and by being clear. The order in which they stand, and their length, \
say nothing.

[Request]
{prompt}

[Reply A]
{a}

[Reply B]
{b}

Give your reasons in a few sentences if you need to, and end with one line: "Verdict: A" or "Verdict: B"."""


class Server:
    """The model that judges behind an OpenAI-compatible server."""

    def __init__(self, at: Endpoint, model: str):
        self.at, self.model = at, model

    def prefers(self, prompt: str, a: str, b: str) -> str:
        """Returns "A" or "B", or "" for a reply without a verdict. Raises as `Endpoint.ask`."""
        message = {"role": "user", "content": ASK.format(prompt=prompt, a=a, b=b)}
        body = {"model": self.model, "messages": [message], "temperature": 0, "max_tokens": TOKENS}
        reply = self.at.ask("/chat/completions", body, lambda told: told["choices"][0]["message"]["content"] or "")
        return (["", *re.findall(r"verdict\W*([AB])\b", reply, re.IGNORECASE)][-1]).upper()


def length_controlled(wins_N: Any, longer_N: Any) -> Statistic:
    """Returns the win rate at equal length as a statistic of the pairs.

    Args:
        wins_N: 1 where the adapter wins, 0.5 for a tie, else 0.
        longer_N: by how many tokens its completion is the longer one.
    """
    wins_N, longer_N = np.asarray(wins_N, float), np.asarray(longer_N, float)
    spread = longer_N.std()
    inputs_N2 = np.stack([np.ones_like(wins_N), np.tanh(longer_N / spread) if spread else 0 * longer_N], 1)

    def fitted(drawn_BN: Array) -> Array:
        found_B2 = np.zeros((len(drawn_BN), 2))
        for _ in range(STEPS):  # Newton's, no step longer than 1
            share_BN = sigmoid(found_B2 @ inputs_N2.T)
            slope_B2 = (drawn_BN * (wins_N - share_BN)) @ inputs_N2 - RIDGE * found_B2
            bent_BN = drawn_BN * share_BN * (1 - share_BN)
            bend_B22 = np.einsum("bn,ni,nj->bij", bent_BN, inputs_N2, inputs_N2) + RIDGE * np.eye(2)
            found_B2 += np.clip(np.linalg.solve(bend_B22, slope_B2[..., None])[..., 0], -1, 1)
        return sigmoid(found_B2[:, 0])

    return fitted


def judge(file: str | None, options: EvalOptions, source: ModelSource) -> Evaluate:
    """Has greedy completions of a file's prompts, or of the package's, compared by a judge."""
    if not (options.judge_url and options.judge_model):
        raise OptionError("suites=judge needs judge_url and judge_model.")
    if not source.is_adapter:
        raise OptionError(f"suites=judge compares an adapter with its base, and {source.adapter!r} is a model.")
    rows = read_some(file, options) if file else None
    server = Server(Endpoint(options.judge_url, "judge_url", options.api_key), options.judge_model)
    server.prefers("Say hello.", "Hello.", "No.")  # it answers

    def evaluate(subject: Subject) -> dict[str, Any]:
        done = subject.open_completions if rows is None else subject.complete(rows, "judge")
        asked = [(_text(prompt), each["adapter"].text, each["base"].text) for prompt, each in done]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            verdicts = list(pool.map(lambda one: _twice(server, *one), asked))
        wins = [WINS.get(verdict, 0.5) for verdict in verdicts]
        longer = [len(each["adapter"].ids) - len(each["base"].ids) for _, each in done]
        number, judged = len(wins), [verdict for verdict in verdicts if verdict != ("same", "same")]
        agreeing = sum(verdict in WINS for verdict in judged) / max(len(judged), 1)
        rate, at_equal = (bootstrap(s, number, options.seed) for s in (ratio(wins), length_controlled(wins, longer)))
        figures = [
            Figure("win rate", None, rate, None, number),
            Figure("win rate at equal length", None, at_equal, None, number),
            Figure("same verdict with places swapped", None, wilson(agreeing, max(len(judged), 1)), None, len(judged)),
        ]
        lines = [
            {"prompt": prompt, "adapter_completion": on, "base_completion": off, "verdicts": verdict, "win": win}
            for (prompt, on, off), verdict, win in zip(asked, verdicts, wins, strict=True)
        ]
        return {"figures": figures, "judge": options.judge_model, "rows": lines}

    return evaluate


def _twice(server: Server, prompt: str, on: str, off: str) -> tuple[str, str]:
    """Returns who wins with the adapter's completion first, and with the base's first: "adapter", "base" or "" for no
    verdict; "same" for equal texts, which nobody is asked about."""
    if on == off:
        return "same", "same"
    sides = {"A": "adapter", "B": "base", "": ""}
    swapped = {"A": "base", "B": "adapter", "": ""}
    return sides[server.prefers(prompt, on, off)], swapped[server.prefers(prompt, off, on)]


def _text(prompt: Prompt) -> str:
    """Returns a prompt as a judge reads it."""
    said = prompt.example.prompt
    return said if isinstance(said, str) else "\n\n".join(f"{turn['role']}: {content_text(turn)}" for turn in said)
