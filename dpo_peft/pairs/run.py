"""A run of pair building: chunk by chunk completions are sampled, judged and put on disk; then pairs are made of them.

What a judge said is kept in a work file beside the output until the pairs are written. Sampling and judging are what
takes long, and they don't depend on how pairs are made: with other rules the same work file is used.
"""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..data.prompts import Prompt, encode_prompts, read_prompts
from ..errors import DataError, OptionError
from ..files import read_rows, write_rows
from .building import TOO_LONG, Built, Candidate, Tally, build_pairs, seed_of
from .engines import Engine, ModelSource, Sample, Sampling, TransformersEngine, VllmEngine
from .judges import Judge, judge_answers, load_judge, source_of
from .options import PairsOptions
from .worklog import Record, WorkLog, unfinished

Completion = tuple[Any, Sample | None]  # a text or messages, and how it was sampled, if it was

GIVEN_AT_ONCE = 64  # prompts in a chunk, where completions are given
EDGE = 1 << 20  # bytes of a weights file, at both ends, that its digest reads


class PairRun:
    """The work of `make_pairs`.

    Args:
        options: as `PairsOptions.check` took them.

    Raises:
        OptionError, DataError: the rows can't be read, or the options go ill with them.
    """

    def __init__(self, options: PairsOptions):
        self.options, self.rules, self.outputs = options, options.rules, options.outputs
        self.name = options.prompts or ""  # for messages
        rows = read_rows(self.name, options.prompts_split, options.prompts_config, False, options.dataset_format)
        if options.max_prompts is not None:
            rows = rows.select(range(min(options.max_prompts, len(rows))))
        options.check_for(rows.column_names)
        # The prompts, and how many rows have none, by reason.
        self.prompts, self.skipped = read_prompts(rows, self.name, options.score_column, options.as_chat)
        if options.as_chat and not isinstance(rows[0].get("prompt"), str):
            raise OptionError("as_chat has no effect: the prompts are messages. Leave it out.")
        self.source = None  # the rows have completions
        if options.model is not None:
            made = {name: getattr(options, name) for name in ModelSource._fields[1:]}
            self.source = ModelSource(options.model, **made)
        self.sampling = Sampling(options.max_new_tokens, options.temperature, options.top_p, options.top_k)
        self.log: WorkLog | None = None

    def run(self) -> dict[str, Any]:
        """Does the work, or the rest of it, and returns the summary.

        Raises:
            OptionError, DataError, ReferenceMismatchError, KeyboardInterrupt: as `make_pairs`.
        """
        started = time.monotonic()
        path = unfinished(self.outputs["output"])
        try:
            if self.options.overwrite:
                path.unlink(missing_ok=True)
            judge = load_judge(self.options)
            encoded = None if self.source is None else encode_prompts(self.source.tokenizer(), self.prompts, self.name)
            self.log = WorkLog(path, self._header(judge))
            resumed = self.log.done
            if resumed < len(self.prompts):
                self._complete_all(judge, encoded)
            summary = self._summary()
            self._write()
            self.log.delete()
        except KeyboardInterrupt:
            done = 0 if self.log is None else self.log.done
            kept = f"{done:,} of {len(self.prompts):,} prompts are in {path}. The same command resumes there."
            raise KeyboardInterrupt(kept) from None
        files = {name: str(path) for name, path in self.outputs.items()}
        return {**files, **summary, "resumed_prompts": resumed, "seconds": round(time.monotonic() - started, 1)}

    def _summary(self) -> dict[str, Any]:
        tally = Tally(prompts=sum(self.skipped.values()), without_pairs=Counter(self.skipped))
        for _, candidates, built, skipped in self._built():
            tally.add(candidates, built, skipped)
        summary = tally.summary()
        if not tally.kept:
            raise DataError(
                f"{self.name}: no pair could be made of {summary['candidates']} completions. Prompts: "
                f"{summary['prompts_without_pairs']}. Completions left out: {summary['candidates_unused']}. They are "
                f"in {unfinished(self.outputs['output'])}; the same command with other rules for pairs uses them."
            )
        return summary

    def _header(self, judge: Judge | None) -> dict[str, Any]:
        """Returns all that decides completions and scores."""
        options = self.options
        header: dict[str, Any] = {
            "prompts": _digest([[p.fields, p.columns, p.completions, p.scores] for p in self.prompts]),
            "seed": options.seed,
            **options.judge,
        }
        if options.implicit_reward is not None:
            header["weights of implicit_reward"] = _weights_digest(options.implicit_reward)
        if judge is not None and (source := source_of(judge)) is not None:
            header["source of the reward function"] = source
        if self.source is not None:
            header |= {**self.source._asdict(), "weights of the model": _weights_digest(self.source.name)}
            header |= self.sampling._asdict()
            header |= {"num_candidates": options.num_candidates, "engine": options.engine}
        return header

    # ---- Completions --------------------------------------------------------------------------------------------

    def _complete_all(self, judge: Judge | None, encoded: list[list[int]] | None) -> None:
        assert self.log is not None
        engine, too_long, at_once = None, set[int](), GIVEN_AT_ONCE
        if encoded is not None:
            assert self.source is not None
            context = self.source.context()
            limit = float("inf") if context is None else context - self.sampling.max_new_tokens
            too_long = {i for i, ids in enumerate(encoded) if len(ids) > limit}
            longest = max((len(ids) for ids in encoded if len(ids) <= limit), default=None)
            if longest is None:
                raise DataError(
                    f"{self.name}: every prompt with max_new_tokens={self.sampling.max_new_tokens} is longer than the "
                    f"model's {context} tokens. Lower it, or take another model."
                )
            batch_size = self.options.batch_size or (512 if self.options.engine == "vllm" else 32)
            engine = self._engine(self.source, batch_size, longest)
            at_once = max(1, batch_size // self.options.num_candidates)
        with tqdm(total=len(self.prompts), initial=self.log.done, unit="prompt", desc="pairs") as bar:
            for start in range(self.log.done, len(self.prompts), at_once):
                numbers = range(start, min(start + at_once, len(self.prompts)))
                asked = [i for i in numbers if i not in too_long]
                if engine is not None and encoded is not None:
                    found = self._sample(engine, asked, encoded)
                else:
                    found = [[(one, None) for one in self.prompts[i].completions or ()] for i in asked]
                scores = self._score(judge, asked, found)
                records = dict(zip(asked, map(_record, found, scores), strict=True))
                self.log.append([records.get(i, {"skipped": TOO_LONG}) for i in numbers])
                bar.update(len(numbers))

    def _engine(self, source: ModelSource, batch_size: int, longest_prompt: int) -> Engine:
        if self.options.engine == "vllm":
            return VllmEngine(source, self.sampling, longest_prompt, self.options.gpu_memory_utilization)
        return TransformersEngine.load(source, self.sampling, batch_size)

    def _sample(self, engine: Engine, numbers: Sequence[int], encoded: list[list[int]]) -> list[list[Completion]]:
        """Samples for some prompts. Each completion has a seed of its own, so neither chunks nor a restart change
        them."""
        each = range(self.options.num_candidates)
        seeds = [seed_of(self.options.seed, self.prompts[i].number, k) for i in numbers for k in each]
        samples = iter(engine([encoded[i] for i in numbers for _ in each], seeds))
        of_prompts = ((self.prompts[i], [next(samples) for _ in each]) for i in numbers)
        return [[(prompt.completion(sample.text), sample) for sample in own] for prompt, own in of_prompts]

    def _score(
        self, judge: Judge | None, numbers: Sequence[int], completions: list[list[Completion]]
    ) -> list[list[float | None]]:
        """Returns one score per completion."""
        if judge is None:
            return [list(self.prompts[i].scores or ()) for i in numbers]
        owners = [self.prompts[i] for i, own in zip(numbers, completions, strict=True) for _ in own]
        flat = [completion for own in completions for completion in own]
        # A trained adapter reads the text, as it would in training: its tokens may be others than the sampler's.
        by_text = self.options.implicit_reward is not None
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
        return [[next(left) for _ in own] for own in completions]

    # ---- Pairs --------------------------------------------------------------------------------------------------

    def _built(self) -> Iterator[tuple[Prompt, list[Candidate], Built, str | None]]:
        """Yields every prompt with what became of it, from the work file."""
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


def _record(completions: Sequence[Completion], scores: Sequence[float | None]) -> Record:
    record: Record = {"completions": [completion for completion, _ in completions], "scores": list(scores)}
    samples = [sample for _, sample in completions if sample is not None]
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
    """Returns a digest of the weights in a folder, from their sizes and both ends of each file (training changes them
    all); None for a Hub id."""
    folder, digest = Path(name), hashlib.blake2b(digest_size=16)
    files = sorted(path for ending in ("safetensors", "bin") for path in folder.glob(f"*.{ending}"))
    for path in files:
        size = path.stat().st_size
        with open(path, "rb") as file:
            digest.update(f"{path.name} {size}".encode() + file.read(EDGE))
            file.seek(max(0, size - EDGE))
            digest.update(file.read(EDGE))
    return digest.hexdigest() if files else None
