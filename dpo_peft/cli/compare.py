"""`dpo-peft compare`: completions before and after training, side by side, with the adapter's own reward of both."""

import logging
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unicodedata import east_asian_width

from ..data.fields import content_text
from ..disk import one_writer
from ..errors import OptionError
from ..files import check_output, read_rows, write_rows
from ..model.options import AdapterOptions
from .chat import repeated
from .options import option, parse_options, printable, show

if TYPE_CHECKING:
    from ..chat import Compared, Comparison

EXAMPLES = (
    "dpo-peft compare outputs/quickstart --prompts test.jsonl --limit 10",
    'dpo-peft compare outputs/run --prompt "Write a haiku about rain." --temperature 0.7',
    "dpo-peft compare outputs/run --prompts prompts.txt --against outputs/other --output compared.jsonl --json",
)
logger = logging.getLogger(__name__)

WIDEST = 200  # columns; wider texts are hard to read


@dataclass(frozen=True)
class CompareOptions(AdapterOptions):
    """Options of `dpo-peft compare`."""

    prompts: str | None = option(
        None,
        "Hub id, or a file of rows with prompt as text or messages, or pairs; or a .txt file, a prompt a line.",
    )
    prompt: list[str] | None = option(None, "A prompt; may be given several times.")
    image: list[str] | None = option(None, "Image files that go with each prompt given by prompt or a .txt file.")
    prompts_split: str = option("train", "Split of a Hub dataset.")
    as_chat: bool | None = option(None, "Make a prompt that is text a user's message: as in training if not given.")
    limit: int | None = option(None, "Take the first so many prompts.")
    against: str | None = option(None, "Another adapter of the same base, in the place of the model before training.")
    max_new_tokens: int = option(256, "Longest completion.")
    temperature: float = option(0.0, "0 takes the likeliest token each time; others sample.")
    top_p: float = option(1.0, "Sample from the likeliest tokens of this total probability.")
    seed: int = option(0, "Each prompt has a seed of its own, made from this one.")
    batch_size: int = option(16, "Completions that are made at once.")
    beta: float | None = option(None, "Replaces the beta of the training in the reward; 1 if none is recorded.")
    output: str | None = option(None, "File for the completions: .jsonl or .parquet.")
    overwrite: bool = option(False, "Replace output.")
    json: bool = option(False, "Print the result as JSON.")


def compare(argv: Sequence[str]) -> None:
    """Show completions of the same prompts before and after training, with the implicit reward of both."""
    words, given = repeated(argv, "prompt")
    options = parse_options(words, CompareOptions, "compare", compare.__doc__, EXAMPLES, "adapter")
    texts = given or options.prompt or []
    if bool(texts) == bool(options.prompts):
        raise OptionError("Give either prompts, a file, or prompt, a text.")
    for name in ("limit", "batch_size"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise OptionError(f"{name}={value} must be at least 1.")
    if options.output is None:
        compared = run(options, texts)
    else:
        check_output("output", options.output, [options.prompts or ""], options.overwrite)
        with one_writer("output", options.output):
            compared = run(options, texts)
            write_rows(options.output, compared.lines())
    figures = {"before": compared.before, "reward": compared.reward, **compared.figures(), "output": options.output}
    text = "" if options.json else describe(compared, figures)
    show({"adapter": options.adapter, **figures, "rows": compared.lines()}, text, options.json)


def run(options: CompareOptions, texts: Sequence[str]) -> "Comparison":
    """Returns the completions of the prompts that the options name."""
    rows = _read(options, texts)
    if not len(rows):
        raise OptionError(f"prompts={options.prompts!r} holds no rows: give a file with a prompt.")
    from ..chat import compare_completions
    from ..data.prompts import read_prompts
    from ..model.adapter_source import AdapterSource
    from ..model.generation import check_sampling
    from ..pairs.engines import Sampling
    from ..reward import ImplicitReward
    from ..training.arguments import hold_images

    check_sampling(options.max_new_tokens, options.temperature, options.top_p)
    source = AdapterSource.of(options)
    trained = source.read()
    as_chat = options.as_chat
    if as_chat is None and trained is not None:
        as_chat = trained.as_chat
    elif as_chat is not None and not isinstance(rows[0].get("prompt"), str):
        raise OptionError("as_chat has no effect: the prompts are no texts. Leave it out.")
    images = source.images(needed=hold_images(rows))
    tokenizer = images.tokenizer if images else source.tokenizer()
    prompts, skipped = read_prompts(rows, options.prompts or "prompt", None, as_chat, tokenizer, images)
    if skipped:
        each = ", ".join(f"{number:,} {reason}" for reason, number in skipped.items())
        logger.warning("%d rows without a prompt are left out: %s.", sum(skipped.values()), each)
    beta = 1.0 if options.beta is None and trained is None else options.beta
    how = Sampling(options.max_new_tokens, options.temperature, options.top_p)
    reward = ImplicitReward(source, beta=beta, tokenizer=images)
    return compare_completions(
        reward, prompts, how, against=options.against, seed=options.seed, batch_size=options.batch_size
    )


def _read(options: CompareOptions, texts: Sequence[str]) -> Any:
    from datasets import Dataset

    name = options.prompts or ""
    if options.image and name and not name.endswith(".txt"):
        raise OptionError("image has no effect with a file of rows: put the images into its column images.")
    if name.endswith(".txt"):
        if not Path(name).is_file():
            raise OptionError(f"prompts={name!r}: there is no such file.")
        try:
            texts = [line for line in Path(name).read_text("utf-8").splitlines() if line.strip()]
        except UnicodeDecodeError as error:
            raise OptionError(f"prompts={name!r} is not UTF-8 ({error}): save it as such.") from error
    elif name:
        rows = read_rows(name, options.prompts_split)
        return rows.select(range(min(options.limit, len(rows)))) if options.limit else rows
    texts = list(texts)[: options.limit]
    images = {"images": [options.image] * len(texts)} if options.image else {}
    return Dataset.from_dict({"prompt": texts, **images})


# ---- For people -----------------------------------------------------------------------------------------------------


def describe(compared: "Comparison", figures: Mapping[str, Any]) -> str:
    """Returns the completions side by side, as wide as the terminal, and what they come to."""
    width = (min(shutil.get_terminal_size((100, 24)).columns, WIDEST) - 3) // 2
    lines = [line for row in compared.rows for line in _beside(row, width)]
    same = f", {figures['same']} the same" if figures["same"] else ""
    lines += [
        f"Before is {compared.before}. Reward: {compared.reward}.",
        f"The completion after training has the higher reward for {figures['higher']} of {figures['prompts']} prompts "
        f"({figures['share_higher']:.0%}), the lower for {figures['lower']}{same}.",
        f"Mean reward {figures['mean_before_reward']:+.3f} before, {figures['mean_after_reward']:+.3f} after; mean "
        f"length {figures['mean_before_tokens']:.0f} tokens before, {figures['mean_after_tokens']:.0f} after.",
    ]
    return "\n".join([*lines, f"Completions: {figures['output']}"] if figures["output"] else lines)


def _beside(row: "Compared", width: int) -> list[str]:
    prompt = row.prompt
    if not isinstance(prompt, str):
        prompt = "\n".join(f"{message['role']}: {content_text(message)}" for message in prompt)
        prompt = prompt.removeprefix("user: ") if len(row.prompt) == 1 else prompt
    heads = [
        f"{name}, reward {reward:+.3f}, {tokens} tokens{'' if finished else ' (cut)'}"
        for name, reward, tokens, finished in (
            ("BEFORE", row.before_reward, row.before_tokens, row.before_finished),
            ("AFTER", row.after_reward, row.after_tokens, row.after_finished),
        )
    ]
    lines = [*_wrapped(f"> {prompt}", 2 * width + 3), ""]
    if row.same:
        return [*lines, f"BOTH{heads[0].removeprefix('BEFORE')}", *_wrapped(row.before, 2 * width + 3), ""]
    columns = [
        [*_wrapped(head, width), *_wrapped(text, width)]
        for head, text in zip(heads, (row.before, row.after), strict=True)
    ]
    return [
        *lines,
        *(
            f"{left}{' ' * (width - _cells(left))} | {right}".rstrip()
            for left, right in zip_longest(*columns, fillvalue="")
        ),
        "",
    ]


def _cells(text: str) -> int:
    return sum(1 + (east_asian_width(letter) in "WF") for letter in text)


def _wrapped(text: str, width: int) -> list[str]:
    """Returns the lines of a text; letters that take two columns count as two."""
    found: list[str] = []
    for line in printable(text).expandtabs(4).splitlines() or [""]:
        parts = textwrap.wrap(line, width, drop_whitespace=True) or [""]
        for part in parts:
            while _cells(part) > width:
                cut = next(n for n in range(len(part), 0, -1) if _cells(part[:n]) <= width)
                found.append(part[:cut])
                part = part[cut:]
            found.append(part)
    return found
