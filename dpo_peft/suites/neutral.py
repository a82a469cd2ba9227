"""What was lost: the loss on neutral text, and how far greedy completions repeat themselves."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import OptionError
from ..forward.scope import invocation_tokens
from ..pairs.engines import ModelSource
from .checkers import words
from .figures import Figure, mean_figure, share_figure
from .options import EvalOptions
from .subject import Evaluate, Subject

logger = logging.getLogger(__name__)

TEXTS = Path(__file__).with_suffix(".txt")
NGRAM = 4


def repeated(sequence: Sequence[object], length: int = NGRAM) -> float:
    """Returns the share of the n-grams of a sequence that stood in it before; 0 where there is none."""
    grams = list(zip(*(sequence[at:] for at in range(length)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def neutral(file: str | None, options: EvalOptions, source: ModelSource) -> Evaluate:
    """Measures the loss per token of a text file's lines (the package's own texts without one), and repetition and
    length of greedy completions."""
    path = Path(file) if file else TEXTS
    if not path.is_file():
        raise OptionError(f"suites=neutral:{file}: there is no such file.")
    on_text = not (source.is_adapter and invocation_tokens({"": source.config}, ""))
    if not on_text:
        same = "the adapter acts on completions alone, so plain text has the base's loss"
        if file:
            raise OptionError(f"suites=neutral:{file}: {same}. Leave the file out.")
        logger.info("Suite neutral: %s, which is left out.", same)
    tokenizer = source.tokenizer()
    texts = [line for line in path.read_text("utf-8").splitlines() if line.strip()][: options.limit]
    encoded = [tokenizer(text)["input_ids"] for text in texts]
    kept = [ids for ids in encoded if len(ids) > 1]  # the first token is given, the others are predicted
    if not kept:
        raise OptionError(f"suites=neutral:{file}: no line has two tokens.")

    seed = options.seed

    def evaluate(subject: Subject) -> dict[str, Any]:
        figures = [_loss(subject, kept, seed)] if on_text else []
        done = subject.open_completions
        written = {side: [each[side] for _, each in done] for side in subject.sides}
        in_words = {side: [words(one.text) for one in samples] for side, samples in written.items()}
        figures += [
            mean_figure("repeated 4-grams", _each(in_words, repeated), seed=seed),
            mean_figure("distinct words", _each(in_words, lambda one: 1 - repeated(one, 1)), seed=seed),
            mean_figure("tokens of a completion", _each(written, lambda one: len(one.ids)), seed=seed),
            share_figure(
                "finished completions",
                {side: [one.finished for one in every] for side, every in written.items()},
                seed,
            ),
        ]
        return {"figures": figures}

    return evaluate


def _loss(subject: Subject, texts: list[list[int]], seed: int) -> Figure:
    lines = [{"prompt_ids": ids[:1], "completion_ids": [ids[1:]], "row": row} for row, ids in enumerate(texts)]
    scores = [score for (score,) in subject.reward.score_rows(lines)]
    losses = {"base": [-(score.ref_logp or 0.0) for score in scores], "adapter": [-score.logp for score in scores]}
    own = {side: losses[side] for side in subject.sides}
    return mean_figure("loss per token, nats", own, [score.tokens for score in scores], seed)


def _each(by_side: dict[str, list[Any]], value: Any) -> dict[str, list[float]]:
    return {side: [float(value(one)) for one in every] for side, every in by_side.items()}
