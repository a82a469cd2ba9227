"""Runs the suites over one copy of the weights: the checks of all, then the model, then one suite after another."""

import json
import logging
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from ..artifacts.card import cell
from ..disk import one_writer, write_atomically
from ..errors import OptionError
from ..files import strict
from ..imports import load_function
from ..manifests import EVAL, weights_digest
from ..model.gguf import gguf_place
from ..pairs.engines import ModelSource
from ..spelling import meant
from .figures import HEADS, as_dict, table
from .instructions import instructions
from .judge import judge
from .neutral import neutral
from .options import EvalOptions
from .pairs import pairs
from .subject import Subject, Suite, setup_of

logger = logging.getLogger(__name__)

SUITES: dict[str, Suite] = {"pairs": pairs, "instructions": instructions, "neutral": neutral, "judge": judge}
BEGIN, END = "<!-- dpo-peft eval: begin -->", "<!-- dpo-peft eval: end -->"
TASKS = "ifeval,gsm8k,hellaswag,truthfulqa_mc2"  # of lm-eval


def find_suite(word: str) -> tuple[str, Suite, str | None]:
    """Returns the name, the function and the file of NAME, NAME:FILE, or of your own: package.module:function or
    file.py:function, either with :FILE behind it.

    Raises:
        OptionError: there is none.
    """
    name, _, rest = word.partition(":")
    if name in SUITES:
        return name, SUITES[name], rest or None
    if not rest:
        raise OptionError(f"suites={word!r} is not one of {', '.join(SUITES)}.{meant(name, SUITES)}")
    function, _, file = rest.partition(":")
    return function, load_function(f"{name}:{function}", "suites"), file or None


def evaluate(options: EvalOptions) -> dict[str, Any]:
    """Evaluates an adapter and its base, or a model, and writes the result: a JSON file, and a part of the card that
    lies beside an adapter.

    Raises:
        OptionError, DataError: a suite, a file, a row or the judge's server is wrong; before the model is loaded.
        ReferenceMismatchError: as `AdapterSource.load`.
        NonFiniteError: a log-prob is NaN or infinite.
    """
    for name in ("limit", "batch_size", "max_new_tokens"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise OptionError(f"{name}={value} must be at least 1.")
    source = cast("ModelSource", ModelSource.of(options))
    folder = Path(options.adapter) if source.is_adapter and Path(options.adapter).is_dir() else Path()
    output = Path(options.output) if options.output else folder / EVAL
    if output.suffix != ".json":
        raise OptionError(f"output={str(output)!r}: the file must end in .json.")
    if output.exists() and not options.overwrite:
        raise OptionError(f"output={str(output)!r} is there already: give another name, or --overwrite.")
    named = [(word, *find_suite(word)) for word in options.suites]
    ready = [(word, _title(name, file, options), suite(file, options, source)) for word, name, suite, file in named]
    with one_writer("output", output):
        subject = Subject(source, options)
        done = []
        for word, title, run in ready:
            logger.info("Suite %s.", title)
            found = run(subject)
            figures = [as_dict(figure) for figure in found.pop("figures")]
            done.append({"suite": word, "name": title, "figures": figures, **found})
        result = {
            "adapter": options.adapter,
            "base": subject.base,
            "reward": str(subject.reward),
            "max_new_tokens": options.max_new_tokens,
            "seed": options.seed,
            "weights": weights_digest(folder),
            "suites": done,
            "lm_eval": lm_eval_commands(source),
        }
        write_atomically(output, json.dumps(strict(result), indent=1, ensure_ascii=False) + "\n", private=True)
    card = folder / "README.md"
    if output == folder / EVAL and source.is_adapter and card.is_file():
        write_atomically(card, with_section(card.read_text("utf-8"), result))
    return {**result, "output": str(output)}


def _title(name: str, file: str | None, options: EvalOptions) -> str:
    """Returns what a suite is called: with its file's name, and its folder's where another file is called so too."""
    if file is None:
        return name
    alike = [word for word in options.suites if word.partition(":")[2] and Path(word).name == Path(file).name]
    return f"{name} {'/'.join(Path(file).parts[-1 - (len(alike) > 1) :])}"


def lm_eval_commands(source: ModelSource) -> list[str]:
    """Returns the commands with which lm-eval judges the base, and the adapter on it, loaded as for the training."""
    setup = setup_of(source)
    quantized = source.quantize if source.quantize is not None else bool(setup.quantization) or not source.is_adapter
    loaded = f"dtype={source.dtype or setup.dtype}" + (",load_in_4bit=True" if quantized else "")
    adapters = {"base": "", **({"adapter": f",peft={source.adapter}"} if source.is_adapter else {})}
    place, gguf = gguf_place(source.base_name)
    loaded += "".join(f",{name}={value}" for name, value in gguf.items())
    template = " --apply_chat_template" if source.tokenizer().chat_template else ""
    return [
        f"lm_eval --model hf --model_args {shlex.quote(f'pretrained={place},{loaded}{adapter}')} "
        f"--tasks {TASKS}{template} --output_path lm_eval/{side}"
        for side, adapter in adapters.items()
    ]


def with_section(card: str, result: Mapping[str, Any]) -> str:
    """Returns a model card with the figures, in front of its part on the training if it has one; an earlier section of
    this kind is replaced."""
    lines = [f"| {' | '.join(map(cell, row))} |" for row in table(result)]
    head = f"| {' | '.join(HEADS)} |\n|---|---:|---:|---:|---:|"
    about = (
        f"By `dpo-peft eval`, with 95 % intervals; the base is {result['base']}. Completions are greedy, up "
        f"to {result['max_new_tokens']} tokens. Differences are of paired rows."
    )
    section = "\n".join([BEGIN, "## Evaluation", "", about, "", head, *lines, END, "", ""])
    card = re.sub(f"{BEGIN}.*?{END}\n*", "", card, flags=re.DOTALL)
    before, heading, after = card.partition("## Training\n")
    return f"{before}{section}{heading}{after}" if heading else f"{card.rstrip()}\n\n{section}"
