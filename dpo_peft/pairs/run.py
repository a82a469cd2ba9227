"""A run of pair building: chunk by chunk completions are sampled, judged and put on disk; then pairs are made of them.

What a judge said is kept in a work file beside the output until the pairs are written. Sampling and judging are what
takes long, and they don't depend on how pairs are made: with other rules the same work file is used.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from tqdm.auto import tqdm

from ..data.prompts import Prompt, encode_prompts, image_columns, read_prompts
from ..errors import DataError, OptionError
from ..files import read_rows, write_rows
from ..forward.images import SampleImages
from ..model.training_record import UNRECORDED
from ..training.arguments import hold_images
from .building import TOO_LONG, Built, Candidate, build_pairs, seed_of, summarize
from .engines import Engine, ModelSource, Sample, Sampling, TransformersEngine, VllmEngine
from .judges import Judge, judge_answers, load_judge, source_of
from .options import PairsOptions
from .worklog import Record, WorkLog, unfinished

Sampler = Callable[[Sequence[Prompt]], list[list[Sample]]]
GIVEN_AT_ONCE = 64  # prompts in a chunk, where completions are given
LOADING = "base quantize dtype revision trust_remote_code check_base".split()  # options of a `ModelSource`
EDGE = 1 << 20  # bytes of a weights file, at both ends, that its digest reads


class PairRun:
    """The work of `make_pairs`.

    Args:
        options: as `PairsOptions.check` took them.

    Raises:
        OptionError, DataError: the rows can't be read, or the options go ill with them.
    """

    def __init__(self, options: PairsOptions):
        self.options, self.outputs = options, options.outputs
        self.name = options.prompts or ""  # for messages
        where = (options.prompts_split, options.prompts_config)
        rows = read_rows(self.name, *where, False, options.dataset_format, options.column_map)
        if options.max_prompts is not None:
            rows = rows.select(range(min(options.max_prompts, len(rows))))
        options.check_for(rows.column_names)
        self.source, self.images = None, None  # the rows have completions
        if hold_images(rows) and (options.model is None or options.engine == "vllm" or options.reward_model):
            raise OptionError(
                f"{self.name}: the rows hold images, which are read where a model writes the completions with engine "
                "'transformers' and is judged by reward or implicit_reward. Choose these, or leave the images out."
            )
        as_chat, tokenizer = options.as_chat, None
        if options.model is not None:
            self.source = ModelSource(options.model, **{name: getattr(options, name) for name in LOADING})
            self.images = self.source.images(needed=hold_images(rows))
            tokenizer = self.images.tokenizer if self.images else self.source.tokenizer()
            if as_chat is None and self.source.is_adapter:
                as_chat = (self.source.read() or UNRECORDED).as_chat
        # The prompts, and how many rows have none, by reason.
        self.prompts, self.skipped = read_prompts(
            rows, self.name, options.score_column, as_chat, tokenizer, self.images
        )
        if options.as_chat and not isinstance(rows[0].get("prompt"), str):
            raise OptionError("as_chat has no effect: the prompts are messages. Leave it out.")
        # Their keys: what they are, and which row, as the same prompt is answered by other seeds in another row.
        self.by_key = {_digest([p.number, p.fields, p.completions, p.scores]): p for p in self.prompts}
        self.sampling = Sampling(*(getattr(options, name) for name in Sampling._fields))

    def run(self) -> dict[str, object]:
        """Does the work, or the rest of it, and returns the summary.

        Raises:
            OptionError, DataError, ReferenceMismatchError, KeyboardInterrupt: as `make_pairs`.
        """
        started, log = time.monotonic(), None
        path = unfinished(self.outputs["output"])
        try:
            if self.options.overwrite:
                path.unlink(missing_ok=True)
            judge = load_judge(self.options)
            encoded = None if self.source is None else self._encode(self.source)
            log = WorkLog(path, self._header(judge), list(self.by_key))
            resumed = len(log.done)
            if resumed < len(self.prompts):
                self._complete_all(log, judge, encoded)
            summary = self._summary(log)
            self._write(log)
            log.delete()
        except KeyboardInterrupt:
            done = 0 if log is None else len(log.done)
            kept = f"{done:,} of {len(self.prompts):,} prompts are in {path}. The same command resumes there."
            raise KeyboardInterrupt(kept) from None
        files = {name: str(path) for name, path in self.outputs.items()}
        return {**files, **summary, "resumed_prompts": resumed, "seconds": round(time.monotonic() - started, 1)}

    def _header(self, judge: Judge | None) -> dict[str, object]:
        """Returns all that decides completions and scores."""
        options = self.options
        header: dict[str, object] = {
            "prompts": _digest([[p.fields, p.columns, p.completions, p.scores] for p in self.prompts]),
            "seed": options.seed,
            **options.judge,
        }
        if options.implicit_reward is not None:
            header["weights of implicit_reward"] = _weights_digest(options.implicit_reward)
        if judge is not None and (source := source_of(judge)) is not None:
            header["source of the reward function"] = source
        if self.source is not None:
            header |= {"name": options.model, **{name: getattr(options, name) for name in LOADING}}
            header |= {"weights of the model": _weights_digest(self.source.adapter), **self.sampling._asdict()}
            header |= {"num_candidates": options.num_candidates, "engine": options.engine}
        return header

    # ---- Completions --------------------------------------------------------------------------------------------

    def _encode(self, source: ModelSource) -> dict[int, list[int]]:
        """Returns the token ids of the prompts that leave room for a completion in the model's context, by number."""
        context, new = source.context(), self.sampling.max_new_tokens
        tokenizer = self.images.tokenizer if self.images else source.tokenizer()
        encoded = encode_prompts(tokenizer, self.prompts, self.name, self.images)
        by_number = {prompt.number: ids for prompt, ids in zip(self.prompts, encoded, strict=True)}
        fitting = {n: ids for n, ids in by_number.items() if context is None or len(ids) + new <= context}
        if not fitting:
            raise DataError(
                f"{self.name}: every prompt with max_new_tokens={new} is longer than the model's {context} tokens. "
                "Lower it, or take another model."
            )
        return fitting

    def _complete_all(self, log: WorkLog, judge: Judge | None, encoded: Mapping[int, list[int]] | None) -> None:
        sample, at_once = None, GIVEN_AT_ONCE
        if self.source is not None and encoded is not None:
            batch_size = self.options.batch_size or (512 if self.options.engine == "vllm" else 32)
            sample = self._sampler(self.source, batch_size, encoded)
            at_once = max(1, batch_size // self.options.num_candidates)
        with tqdm(total=len(self.prompts), initial=len(log.done), unit="prompt", desc="pairs") as bar:
            left = [(key, prompt) for key, prompt in self.by_key.items() if key not in log.done]
            for start in range(0, len(left), at_once):
                chunk = left[start : start + at_once]
                asked = [prompt for _, prompt in chunk if encoded is None or prompt.number in encoded]
                samples = None if sample is None else sample(asked)
                done = dict(zip([prompt.number for prompt in asked], self._judged(judge, asked, samples), strict=True))
                log.append({key: done.get(prompt.number, {"skipped": TOO_LONG}) for key, prompt in chunk})
                bar.update(len(chunk))

    def _sampler(self, source: ModelSource, batch_size: int, encoded: Mapping[int, list[int]]) -> Sampler:
        """Returns what samples for some prompts. Each completion has a seed of its own, so neither chunks nor a
        restart change them."""
        engine: Engine
        longest = max(map(len, encoded.values()))
        if self.options.engine == "vllm":
            memory = self.options.gpu_memory_utilization
            engine = VllmEngine(source, self.sampling, longest, memory)
        else:
            engine = TransformersEngine.load(source, self.sampling, batch_size, longest)
        each = range(self.options.num_candidates)

        def sample(prompts: Sequence[Prompt]) -> list[list[Sample]]:
            seeds = [seed_of(self.options.seed, prompt.number, k) for prompt in prompts for k in each]
            given = [encoded[prompt.number] for prompt in prompts for _ in each]
            pixels = [self._pixels(prompts, len(each))] if any(prompt.files for prompt in prompts) else []
            samples = iter(engine(given, seeds, *pixels))
            return [[next(samples) for _ in each] for _ in prompts]

        return sample

    def _pixels(self, prompts: Sequence[Prompt], times: int) -> list[SampleImages | None]:
        assert self.images is not None
        rows = [{**image_columns(prompt, self.images), "row": prompt.number} for prompt in prompts]
        return [pixels for row in rows for pixels in [self.images.sample(row)] * times]

    def _judged(
        self, judge: Judge | None, prompts: Sequence[Prompt], samples: Sequence[Sequence[Sample]] | None
    ) -> list[Record]:
        """Returns a record for each prompt: its completions, sampled or given, with their scores."""
        if samples is None:
            records: list[Record] = [{"completions": p.completions, "scores": p.scores} for p in prompts]
        else:
            records = [
                {
                    "completions": [prompt.completion(sample.text) for sample in own],
                    "finished": [sample.finished for sample in own],
                    "tokens": [len(sample.ids) for sample in own],
                }
                for prompt, own in zip(prompts, samples, strict=True)
            ]
        if judge is not None:
            owners = [p for p, record in zip(prompts, records, strict=True) for _ in record["completions"]]
            # A trained adapter reads the text, as it would in training: its tokens may be others than the sampler's.
            by_text = samples is None or self.options.implicit_reward is not None
            ids = None if by_text else [sample.ids for own in samples or () for sample in own]
            completions = [completion for record in records for completion in record["completions"]]
            rewards = iter(judge_answers(judge, owners, completions, ids) if owners else [])
            for record in records:
                record["scores"] = [next(rewards) for _ in record["completions"]]
        return records

    # ---- Pairs --------------------------------------------------------------------------------------------------

    def _built(self, log: WorkLog) -> Iterator[tuple[Prompt, Built, str | None]]:
        """Yields every prompt with what became of it, from the work file; and why it was left out, if it was."""
        for prompt, record in zip(self.prompts, log.records(), strict=True):
            completions = record.get("completions", [])
            finished = record.get("finished", [True] * len(completions))
            every = zip(completions, record.get("scores", []), finished, strict=True)
            candidates = [Candidate(*each) for each in every]
            yield prompt, build_pairs(candidates, self.options, prompt.number), record.get("skipped")

    def _summary(self, log: WorkLog) -> dict[str, object]:
        summary = summarize(((built, why) for _, built, why in self._built(log)), self.skipped)
        if not summary["pairs"]:
            raise DataError(
                f"{self.name}: no pair could be made of {summary['candidates']} completions. Prompts: "
                f"{summary['prompts_without_pairs']}. Completions left out: {summary['candidates_unused']}. They are "
                f"in {log.path}; the same command with other rules for pairs uses them."
            )
        return summary

    def _write(self, log: WorkLog) -> None:
        names = [
            name for name in ("tools", "chat_template_kwargs", "images") if any(name in p.fields for p in self.prompts)
        ]
        for name, path in self.outputs.items():
            write_rows(
                path,
                (
                    {**dict.fromkeys(names), **prompt.fields, **row, "prompt_number": prompt.number}
                    for prompt, built, _ in self._built(log)
                    for row in built.rows()[name]
                ),
            )


def _digest(value: object) -> str:
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
