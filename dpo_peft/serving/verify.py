"""Whether a server gives the model that was trained: log-probs, margins and greedy texts of both on the same rows.

The trained model is loaded as it was made for the training, and computes in float32: what is compared is the weights.
A training's own arithmetic in bfloat16 is further from that than llama.cpp's is. What comes out is kept beside the
adapter, in serving.json, and in its card.
"""

import gc
import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel

from ..artifacts.card import cell, shown_name
from ..disk import write_atomically
from ..errors import OptionError
from ..forward.gguf import round_activations
from ..manifests import SERVING, weights_digest
from ..merge.drift import (
    NEW_TOKENS,
    AdapterObserved,
    Drift,
    Observed,
    Rows,
    compare,
    observe,
    observe_adapter,
    pair_rows,
    strength,
)
from ..model.adapter_source import UNRECORDED, AdapterSource
from ..model.base import load_base
from ..model.gguf import is_gguf
from ..reference.fingerprint import adapter_fingerprint
from .exporting import check_servable, write_adapter
from .servers import LlamaServer, Server, VllmServer, llama_cpp_server, observe_server

# Engines, and the options of `Served` that each takes.
ENGINES = {
    "llama.cpp": ("base_gguf", "adapter_gguf", "llama_cpp", "merged", "url", "api_key"),
    "vllm": ("url", "api_key", "served_model"),
    "transformers": ("served_base", "merged"),
}
MAX_TOKEN_DIFFERENCE = 0.02  # nats; see docs/serving.md for what was measured
MAX_STRENGTH_ERROR = 0.1  # by how much the adapter's strength may be off, or by twice its standard error
ROUNDING_ROOM = 1.25  # of what llama.cpp's rounding of activations makes of a model, which differs by chance
PROBE_CONTEXT = 512  # tokens; what the trained model writes is short
_CARD_LINE = re.compile(r"^- \*\*Served:\*\* .*\n", re.MULTILINE)
_CARD_PLACE = re.compile(r"^- \*\*Base weights:\*\* .*\n", re.MULTILINE)


@dataclass(frozen=True)
class Served:
    """Where the model is served.

    Attributes:
        engine: one of `ENGINES`.
        base_gguf: file of llama.cpp's base; the base itself if that is one.
        adapter_gguf: file of its adapter; made by llama.cpp's converter if None.
        llama_cpp: folder of llama.cpp, for the converter.
        url: of a running llama-server or vLLM.
        served_model: vLLM's name of the adapter or the merged model.
        served_base: folder or Hub id of transformers' base; that of the training, as published, if None.
        merged: what is served as the base holds the adapter already.
        api_key: key of the server at url; that of `OPENAI_API_KEY` if None.
    """

    engine: str = "llama.cpp"
    base_gguf: str | None = None
    adapter_gguf: str | None = None
    llama_cpp: str | None = None
    url: str | None = None
    served_model: str | None = None
    served_base: str | None = None
    merged: bool = False
    api_key: str | None = field(default=None, repr=False)

    def check(self, source: AdapterSource) -> "Served":
        """Returns it with the base filled in. Raises an OptionError for options that are missing or have no effect."""
        if self.engine not in ENGINES:
            raise OptionError(f"engine={self.engine!r}: use one of {', '.join(ENGINES)}.")
        takes = set(ENGINES[self.engine])
        if self.engine == "llama.cpp":
            takes = {"url", "api_key"} if self.url else takes - {"api_key"}
        for name, value in asdict(self).items():
            if name != "engine" and value and name not in takes:
                server = f"{'a' if self.url else 'no'} running server"
                where = server if name in ENGINES[self.engine] else f"engine={self.engine!r}"
                raise OptionError(f"{name} has no effect with {where}: leave it out.")
        if self.engine == "vllm" and not (self.url and self.served_model):
            raise OptionError("engine='vllm' needs url and served_model: where it runs, and its name of the model.")
        if self.engine == "transformers" and self.merged and not self.served_base:
            raise OptionError("merged needs served_base: the folder of the merged model.")
        if self.engine != "llama.cpp" or self.url:
            return self
        base = self.base_gguf or (source.base_name if is_gguf(source.base_name) and not self.merged else None)
        if base is None:
            raise OptionError("base_gguf is missing: give the GGUF file that is served, or the url of a llama-server.")
        for name, file in (("base_gguf", base), ("adapter_gguf", self.adapter_gguf)):
            if file is not None and not Path(file).is_file():
                raise OptionError(f"{name}={file!r}: there is no such file.")
        if self.merged and self.adapter_gguf:
            raise OptionError("adapter_gguf has no effect with merged: leave one of them out.")
        if not self.merged and self.adapter_gguf is None:
            check_servable(source)
        return replace(self, base_gguf=base)

    def on_base_of(self, source: AdapterSource) -> bool:
        """Whether llama.cpp adds the adapter to the GGUF file that it was trained on."""
        same = self.url is not None or self.base_gguf == source.base_name
        return self.engine == "llama.cpp" and is_gguf(source.base_name) and same and not self.merged

    def __str__(self) -> str:
        parts = (self.base_gguf, self.served_base, self.served_model or self.url)
        named = [shown_name(part) for part in parts if part]
        return " ".join([self.engine, *(f"with {name}" for name in named), *(["(merged)"] if self.merged else [])])


@dataclass(frozen=True)
class ServingReport:
    """How far a served model is from the one that was trained, and whether that is within the limits."""

    adapter: str
    adapter_fingerprint: str
    served: str
    max_token_difference: float  # the limit, in nats per token on average
    min_signs: float  # the least share of pairs whose completions are in the same order
    drift: Drift
    rounding: Drift | None  # what llama.cpp's rounding of activations alone makes of the trained model
    problems: list[str]  # empty: what is served is what was trained


def verify_serving(
    source: AdapterSource,
    served: Served,
    *,
    dataset: Dataset | None = None,
    dataset_name: str = "the dataset",
    max_rows: int = 64,
    max_token_difference: float | None = None,
    min_signs: float = 0.98,
    device: torch.device | str | None = None,
) -> ServingReport:
    """Compares what is served with what was trained; keeps the report beside an adapter in a folder.

    Args:
        source: the adapter.
        served: where it is served.
        dataset: preference pairs to compare on; None compares on completions that the trained model writes.
        dataset_name: how the report calls it.
        max_rows: so many rows of it, from the start.
        max_token_difference: most nats per token, on average, that log-probs may differ by; None is
            `MAX_TOKEN_DIFFERENCE`, or half of what the adapter itself moves them by if that is less; for llama.cpp on
            the quantized file that was trained on, what its rounding of activations alone does, if that is more.
        min_signs: least share of pairs whose margin has the same sign; there also what the rounding leaves.
        device: where the trained model runs; a GPU if there is one.

    Raises:
        OptionError: an option that can't be honored, or a server that can't be asked.
        ReferenceMismatchError: the base is not the one of the training.
        DataError: rows that can't be used.
    """
    served = served.check(source)
    if source.reference is not None and dataset is None:
        raise OptionError("reference has no effect without a dataset: leave it out.")
    if source.images() is not None:
        raise OptionError(f"{source.adapter!r} was trained on images, which are not sent to servers yet.")
    rows = None
    if dataset is not None:
        rows = pair_rows(dataset, source.tokenizer(), dataset_name, source.read() or UNRECORDED, max_rows)
        rows = replace(rows, prompts=[sample["prompt_ids"] for sample in rows.samples])
    with _opened(served, source, PROBE_CONTEXT if rows is None else _longest(rows)) as server:
        loaded = source.load(device, with_reference=dataset is not None)
        in_float32(loaded.model)
        loaded.trained = replace(loaded.setup, precision="no")
        seen = observe_adapter(loaded, rows)
        rounding = off = None
        if max_token_difference is None and served.on_base_of(source) and round_activations(loaded.model):
            rounded = observe_adapter(loaded, seen.rows)
            rounding, off = compare(seen, rounded, rounded.off), rounded.off
        fingerprint = adapter_fingerprint(loaded.model, loaded.policy)
        del loaded  # makes room for what is served
        gc.collect()
        other = observe_server(server, seen.rows) if server else _observe_transformers(served, source, seen)
    drift = compare(seen, other, off)
    limit, expected = max_token_difference, None
    if limit is None:
        limit, expected = min(MAX_TOKEN_DIFFERENCE, drift.adapter_token / 2), 1.0
    if rounding is not None:
        expected = rounding.strength
        limit = max(limit, ROUNDING_ROOM * rounding.mean_token)
        min_signs = min(min_signs, _least_share(rounding.signs_equal, rounding.pairs))
    problems, name = _problems(drift, limit, min_signs, expected), shown_name(source.adapter)
    report = ServingReport(name, fingerprint, str(served), limit, min_signs, drift, rounding, problems)
    if Path(source.adapter).is_dir():
        _keep(Path(source.adapter), report)
    return report


def in_float32(model: PeftModel) -> None:
    """Has a model compute in float32, with weights of 4 bits unpacked as they are in training."""
    model.float()
    for module in model.modules():
        if getattr(module, "compute_dtype", None) is not None:  # of bitsandbytes
            module.compute_dtype = torch.float32


@contextmanager
def _opened(served: Served, source: AdapterSource, context: int) -> Iterator[Server | None]:
    """Yields the server, which has answered; None for transformers. `context`: tokens of the longest row."""
    if served.engine == "transformers":
        yield None
        return
    with ExitStack() as stack:
        server: Server
        if served.engine == "vllm":
            server = VllmServer(str(served.url), str(served.served_model), served.api_key)
        elif served.url:
            server = LlamaServer(served.url, served.api_key)
        else:
            work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            adapter = served.adapter_gguf
            if not served.merged and adapter is None:
                adapter = str(work / "adapter.gguf")
                write_adapter(source, Path(adapter), served.llama_cpp, work)
            server = stack.enter_context(llama_cpp_server(str(served.base_gguf), adapter, context))
        server.greedy(source.tokenizer()("A")["input_ids"], 1)
        yield server


def _longest(rows: Rows) -> int:
    return max(len(row["prompt_ids"]) + max(NEW_TOKENS, *map(len, row["completion_ids"])) for row in rows.samples) + 1


def _observe_transformers(served: Served, source: AdapterSource, seen: AdapterObserved) -> Observed:
    """Observes the adapter on its base as anybody would load them: in the dtype of the base's files."""
    name = served.served_base or source.base_name
    model: Any = load_base(name, None, False, {"dtype": "auto"}, source.trust_remote_code, seen.device)
    if not served.merged:
        model = PeftModel.from_pretrained(model, source.adapter, **source.from_hub)
    return observe(model.eval(), seen.tokenizer, seen.rows, what="served model")


def _least_share(of: int, pairs: int) -> float:
    """Returns the share of pairs that chance takes no further down than that in 39 of 40 cases."""
    share = of / max(pairs, 1)
    return share - 2 * (share * (1 - share) / max(pairs, 1)) ** 0.5


def _problems(drift: Drift, limit: float, min_signs: float, expected: float | None) -> list[str]:
    """Returns what is beyond the limits, a sentence each. `expected`: the strength, if it decides."""
    found = []
    if not drift.mean_token <= limit:
        found.append(
            f"It is {drift.mean_token:.3g} nats per token from the trained model, on average over {drift.tokens:,} "
            f"tokens; at most {limit:.3g} are allowed, and the adapter itself moves them by {drift.adapter_token:.3g}."
        )
    if expected is not None and drift.strength is not None and drift.strength_error is not None:
        if abs(drift.strength - expected) > max(MAX_STRENGTH_ERROR, 2 * drift.strength_error):
            found.append(f"The adapter acts with {strength(drift)} of the strength that was trained.")
        elif drift.strength_error > MAX_STRENGTH_ERROR:
            found.append(
                f"Whether the adapter acts as it was trained can't be told: {strength(drift)} of its strength was "
                "seen. Give more rows (max_rows), or verify an adapter that does more."
            )
    if drift.signs_equal < min_signs * drift.pairs:
        found.append(
            f"{drift.signs_equal} of {drift.pairs} pairs have a margin of the same sign; at least {min_signs:.0%} are "
            "needed."
        )
    return found


def _keep(folder: Path, report: ServingReport) -> None:
    """Writes the report into serving.json, beside those of other places where the same adapter is served, and the
    verdicts into the card."""
    path, kept = folder / SERVING, {}
    if path.is_file():
        kept = json.loads(path.read_text("utf-8"))
    same = {place: one for place, one in kept.items() if one["adapter_fingerprint"] == report.adapter_fingerprint}
    told = {**same, report.served: {**asdict(report), "weights": weights_digest(folder)}}
    write_atomically(path, json.dumps(told, indent=2, ensure_ascii=False) + "\n")
    card = folder / "README.md"
    if card.is_file():
        line = f"- **Served:** {'; '.join(_sentence(one) for one in told.values())}.\n"
        text = _CARD_LINE.sub("", card.read_text("utf-8"))
        write_atomically(card, _CARD_PLACE.sub(lambda found: found[0] + line, text, count=1))


def _sentence(one: Mapping[str, Any]) -> str:
    drift = one["drift"]
    verdict = "is **not** the trained model" if one["problems"] else "is the trained model"
    signs = f", {drift['signs_equal']} of {drift['pairs']} margins of the same sign" if drift["pairs"] else ""
    apart, limit = (f"{value:.2g}" for value in (drift["mean_token"], one["max_token_difference"]))
    greedy = f"{drift['greedy_equal']} of {drift['greedy_prompts']} greedy texts equal"
    return f"{cell(one['served'])} {verdict}: {apart} nats per token from it (allowed {limit}){signs}, {greedy}"
