"""A run of pair building: chunk by chunk answers are sampled, judged and put on disk; then pairs are made of them.

What a judge said is kept in a work file beside the output until the pairs are written. Sampling and judging are what
takes long, and they don't depend on how pairs are made: with other rules the same work file is used.
"""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..data.prompts import Prompt, encode_prompts
from ..errors import DataError
from ..files import write_rows
from .building import TOO_LONG, Built, Candidate, Rules, Tally, build_pairs, seed_of
from .engines import Engine, ModelSource, Sample, Sampling, TransformersEngine, VllmEngine
from .judges import Judge, judge_answers, source_of
from .worklog import Record, WorkLog, unfinished

Answer = tuple[Any, Sample | None]  # a completion, and how it was sampled, if it was

GIVEN_AT_ONCE = 64  # prompts in a chunk, where answers are given
EDGE = 1 << 20  # bytes of a weights file, at both ends, that its digest reads


@dataclass
class PairRun:
    """Everything that a run needs; see `cli_pairs.PairsOptions`."""

    prompts: list[Prompt]
    skipped: Counter[str]  # rows without a prompt, by reason
    name: str  # of the prompts, for messages
    source: ModelSource | None  # None: the prompts have answers
    sampling: Sampling
    num_candidates: int
    seed: int
    engine: str
    batch_size: int  # answers that are sampled at once
    gpu_memory_utilization: float | None
    load_judge: Callable[[], Judge | None]  # None: the prompts have scores
    judge_name: dict[str, str]  # the option that names the judge, and its value
    rules: Rules
    outputs: dict[str, Path]
    log: WorkLog | None = field(default=None, init=False)

    def run(self) -> dict[str, Any]:
        """Do it, or the rest of it. Returns the summary.

        Raises:
            OptionError, DataError, ReferenceMismatchError: as `cli_pairs.make_pairs`.
        """
        started = time.monotonic()
        judge = self.load_judge()
        encoded = None if self.source is None else encode_prompts(self.source.tokenizer(), self.prompts, self.name)
        self.log = WorkLog(unfinished(self.outputs["output"]), self._header(judge))
        resumed = self.log.done
        if resumed < len(self.prompts):
            self._answer_all(judge, encoded)
        tally = Tally(prompts=sum(self.skipped.values()), without_pairs=Counter(self.skipped))
        for _, candidates, built, skipped in self._built():
            tally.add(candidates, built, skipped)
        summary = tally.summary()
        if not tally.kept:
            raise DataError(
                f"{self.name}: no pair could be made of {summary['candidates']} answers. Prompts: "
                f"{summary['prompts_without_pairs']}. Answers left out: {summary['candidates_unused']}. They are in "
                f"{self.log.path}; the same command with other rules for pairs uses them."
            )
        self._write()
        self.log.delete()
        files = {name: str(path) for name, path in self.outputs.items()}
        return {**files, **summary, "resumed_prompts": resumed, "seconds": round(time.monotonic() - started, 1)}

    def kept(self) -> str:
        """What a run that was stopped has left."""
        done = 0 if self.log is None else self.log.done
        return f"{done:,} of {len(self.prompts):,} prompts are in {unfinished(self.outputs['output'])}."

    def _header(self, judge: Judge | None) -> dict[str, Any]:
        """All that decides answers and scores."""
        header: dict[str, Any] = {
            "prompts": _digest([[p.fields, p.columns, p.completions, p.scores] for p in self.prompts]),
            "seed": self.seed,
            **self.judge_name,
        }
        if "implicit_reward" in self.judge_name:
            header["weights of implicit_reward"] = _weights_digest(self.judge_name["implicit_reward"])
        if judge is not None and (source := source_of(judge)) is not None:
            header["source of the reward function"] = source
        if self.source is not None:
            header |= {**self.source._asdict(), "weights of the model": _weights_digest(self.source.name)}
            header |= {**self.sampling._asdict(), "num_candidates": self.num_candidates, "engine": self.engine}
        return header

    # ---- Answers ------------------------------------------------------------------------------------------------

    def _answer_all(self, judge: Judge | None, encoded: list[list[int]] | None) -> None:
        assert self.log is not None
        engine, too_long = None, set[int]()
        if encoded is not None:
            assert self.source is not None
            context = self.source.context()
            limit = float("inf") if context is None else context - self.sampling.max_new_tokens
            too_long = {i for i, ids in enumerate(encoded) if len(ids) > limit}
            fitting = [len(ids) for i, ids in enumerate(encoded) if i not in too_long]
            if not fitting:
                raise DataError(
                    f"{self.name}: every prompt with max_new_tokens={self.sampling.max_new_tokens} is longer than the "
                    f"model's {context} tokens. Lower it, or take another model."
                )
            engine = self._engine(max(fitting))
        at_once = GIVEN_AT_ONCE if engine is None else max(1, self.batch_size // self.num_candidates)
        with tqdm(total=len(self.prompts), initial=self.log.done, unit="prompt", desc="pairs") as bar:
            for start in range(self.log.done, len(self.prompts), at_once):
                numbers = range(start, min(start + at_once, len(self.prompts)))
                asked = [i for i in numbers if i not in too_long]
                answers = (
                    self._sample(engine, asked, encoded) if engine is not None and encoded else self._given(asked)
                )
                scores = self._score(judge, asked, answers)
                records = [_record(*each) for each in zip(answers, scores, strict=True)]
                by_number = dict(zip(asked, records, strict=True))
                self.log.append([by_number.get(i, {"skipped": TOO_LONG}) for i in numbers])
                bar.update(len(numbers))

    def _engine(self, longest_prompt: int) -> Engine:
        assert self.source is not None
        if self.engine == "vllm":
            return VllmEngine(self.source, self.sampling, longest_prompt, self.gpu_memory_utilization)
        return TransformersEngine.load(self.source, self.sampling, self.batch_size)

    def _sample(self, engine: Engine, numbers: Sequence[int], encoded: list[list[int]]) -> list[list[Answer]]:
        """The answers to some prompts. Each has a seed of its own, so neither chunks nor a restart change them."""
        each = range(self.num_candidates)
        seeds = [seed_of(self.seed, self.prompts[i].number, k) for i in numbers for k in each]
        samples = iter(engine([encoded[i] for i in numbers for _ in each], seeds))
        found: list[list[Answer]] = []
        for i in numbers:
            own = [next(samples) for _ in each]
            found.append([(self.prompts[i].completion(sample.text), sample) for sample in own])
        return found

    def _given(self, numbers: Sequence[int]) -> list[list[Answer]]:
        return [[(completion, None) for completion in self.prompts[i].completions or ()] for i in numbers]

    def _score(
        self, judge: Judge | None, numbers: Sequence[int], answers: list[list[Answer]]
    ) -> list[list[float | None]]:
        """One score per answer."""
        if judge is None:
            return [list(self.prompts[i].scores or ()) for i in numbers]
        owners = [self.prompts[i] for i, own in zip(numbers, answers, strict=True) for _ in own]
        flat = [answer for own in answers for answer in own]
        # A trained adapter reads the text, as it would in training: its tokens may be others than the sampler's.
        by_text = "implicit_reward" in self.judge_name
        ids = [sample.ids for _, sample in flat if sample is not None and not by_text]
        rewards = judge_answers(
            judge,
            [prompt.example.prompt for prompt in owners],
            [completion for completion, _ in flat],
            ids if len(ids) == len(flat) else None,
            {name: [prompt.columns[name] for prompt in owners] for name in self.prompts[0].columns},
            [prompt.number for prompt in owners],
        )
        left = iter(rewards if flat else [])
        return [[next(left) for _ in own] for own in answers]

    # ---- Pairs --------------------------------------------------------------------------------------------------

    def _built(self) -> Iterator[tuple[Prompt, list[Candidate], Built, str | None]]:
        """Every prompt with what became of it, from the work file."""
        assert self.log is not None
        for prompt, record in zip(self.prompts, self.log.records(), strict=True):
            candidates = _candidates(record)
            yield prompt, candidates, build_pairs(candidates, self.rules, prompt.number), record.get("skipped")

    def _write(self) -> None:
        names = [name for name in ("tools", "chat_template_kwargs") if any(name in p.fields for p in self.prompts)]
        for name, path in self.outputs.items():
            make = {"output": _pair_rows, "sft_output": _accepted_rows, "lists_output": _list_rows}[name]
            write_rows(
                path,
                (
                    {**dict.fromkeys(names), **prompt.fields, **row, "prompt_number": prompt.number}
                    for prompt, _, built, _ in self._built()
                    for row in make(built)
                ),
            )


def _record(answers: Sequence[Answer], scores: Sequence[float | None]) -> Record:
    record: Record = {"completions": [completion for completion, _ in answers], "scores": list(scores)}
    samples = [sample for _, sample in answers if sample is not None]
    if samples:
        record |= {"finished": [s.finished for s in samples], "tokens": [len(s.ids) for s in samples]}
    return record


def _candidates(record: Record) -> list[Candidate]:
    completions = record.get("completions", [])
    finished = record.get("finished", [True] * len(completions))
    return [Candidate(*each) for each in zip(completions, record.get("scores", []), finished, strict=True)]


def _pair_rows(built: Built) -> Iterator[dict[str, Any]]:
    for chosen, rejected in built.pairs:
        assert chosen.score is not None and rejected.score is not None
        yield {
            "chosen": chosen.completion,
            "rejected": rejected.completion,
            "chosen_reward": chosen.score,
            "rejected_reward": rejected.score,
            "reward_margin": chosen.score - rejected.score,
        }


def _accepted_rows(built: Built) -> Iterator[dict[str, Any]]:
    for candidate in built.accepted:
        yield {"completion": candidate.completion, "reward": candidate.score}


def _list_rows(built: Built) -> Iterator[dict[str, Any]]:
    scores = [candidate.score for candidate in built.usable]
    if len(set(scores)) > 1:  # else there is no better one to learn from
        yield {"completions": [candidate.completion for candidate in built.usable], "scores": scores}


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _weights_digest(name: str) -> str | None:
    """A digest of the weights in a folder, from their sizes and both ends of each file (training changes them all);
    None for a Hub id."""
    folder, digest = Path(name), hashlib.blake2b(digest_size=16)
    files = sorted(path for ending in ("safetensors", "bin") for path in folder.glob(f"*.{ending}"))
    for path in files:
        size = path.stat().st_size
        with open(path, "rb") as file:
            digest.update(f"{path.name} {size}".encode() + file.read(EDGE))
            file.seek(max(0, size - EDGE))
            digest.update(file.read(EDGE))
    return digest.hexdigest() if files else None
