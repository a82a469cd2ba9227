"""Checkable instructions: prompts made of `instructions.yaml`, and how many of them completions follow."""

import json
from collections.abc import Sequence
from functools import cache
from random import Random
from typing import Any

from datasets import Dataset

from ..errors import OptionError
from ..pairs.engines import ModelSource
from .checkers import CHECKERS, KINDS, TASKS, follows
from .figures import share_figure
from .options import EvalOptions
from .subject import Evaluate, Subject, read_some


def make_prompts(seed: int = 0, number: int = 200) -> list[dict[str, str]]:
    """Returns rows of `prompt` (text) and `instruction` (its kind and parameters, as JSON), the kinds in turn. A seed
    gives the same rows each time; fewer are the beginning of more."""
    rows = []
    for at in range(number):
        kind, draw = list(KINDS)[at % len(KINDS)], Random(f"{seed} {at}")
        task, wording = draw.choice(TASKS), draw.choice(KINDS[kind]["text"])
        chosen = {name: draw.choice(values) for name, values in KINDS[kind].items() if name != "text"}
        chosen = {name: task if value == "{task}" else value for name, value in chosen.items()}
        shown = {name: ", ".join(value) if isinstance(value, list) else value for name, value in chosen.items()}
        rows.append(
            {"prompt": f"{task} {wording.format(**shown)}", "instruction": json.dumps({"kind": kind, **chosen})}
        )
    return rows


@cache
def _read(instruction: str) -> dict[str, Any]:
    """Returns an instruction's kind and parameters. Raises an OptionError for one that can't be checked."""
    try:
        read: dict[str, Any] = json.loads(instruction)
        follows("text", **read)
    except (ValueError, TypeError, KeyError) as error:
        known = ", ".join(CHECKERS)
        raise OptionError(
            f"instruction {instruction!r} can't be checked ({type(error).__name__}: {error}): give JSON with a kind, "
            f"one of {known}, and its parameters."
        ) from error
    return read


def reward(completions: Sequence[Any], instruction: Sequence[str], **_: Any) -> list[float]:
    """Returns 1.0 for each completion that follows its instruction, else 0.0: a reward function of TRL's signature,
    for `dpo-peft pairs --reward dpo_peft.suites.instructions:reward` on rows of `make_prompts`.

    Args:
        completions: texts, or lists of messages.
        instruction: that of each, as in the rows.
    """
    texts = [one if isinstance(one, str) else one[-1]["content"] for one in completions]
    return [float(follows(text, **_read(one))) for text, one in zip(texts, instruction, strict=True)]


def instructions(file: str | None, options: EvalOptions, source: ModelSource) -> Evaluate:
    """Counts the instructions that greedy completions follow: the package's own, or a file's rows of `prompt` and
    `instruction`."""
    rows = read_some(file or Dataset.from_list(make_prompts(options.seed)), options)
    if missing := {"prompt", "instruction"} - {*rows.column_names}:
        raise OptionError(f"suites=instructions:{file}: there is no column {min(missing)!r}.")
    for instruction in rows["instruction"]:
        _read(instruction)

    def evaluate(subject: Subject) -> dict[str, Any]:
        done = subject.complete(rows, "instructions")
        read = [_read(prompt.columns["instruction"]) for prompt, _ in done]
        strict, loose = (
            {
                side: [follows(each[side].text, loose=how, **one) for one, (_, each) in zip(read, done, strict=True)]
                for side in subject.sides
            }
            for how in (False, True)
        )
        figures = [share_figure("strict", strict, options.seed), share_figure("loose", loose, options.seed)]
        for kind in dict.fromkeys(one["kind"] for one in read):
            at = [i for i, one in enumerate(read) if one["kind"] == kind]
            part = {side: [passed[i] for i in at] for side, passed in strict.items()}
            figures.append(share_figure(f"strict, {kind}", part, options.seed, detail=True))
        lines = []
        for i, (prompt, each) in enumerate(done):
            found = {side: {"completion": each[side].text, "strict": strict[side][i]} for side in subject.sides}
            lines.append({**rows[prompt.number], **found})
        return {"figures": figures, "rows": lines}

    return evaluate
