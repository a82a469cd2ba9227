"""`dpo-peft recipes`: the config files that come with the package, to list, to print or to copy."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..disk import write_atomically
from ..errors import OptionError
from .options import find_recipe, option, parse_options, recipe_files, show

EXAMPLES = (
    "dpo-peft recipes",
    "dpo-peft recipes dpo_qlora_8b --output run.yaml",
    "dpo-peft recipes kto_8b --json",
)
LINES = ("GPU", "Peak", "Time")  # of a recipe's head


@dataclass
class RecipeOptions:
    """Which recipe, and where it goes."""

    name: str | None = option(None, "A recipe's name. Default: all are listed.")
    output: str | None = option(None, "File to copy it to; one that is there is not replaced.")
    json: bool = option(False, "Print the result as JSON.")


def recipes(argv: Sequence[str]) -> None:
    """Show the recipes that come with the package: options for `dpo-peft train --config NAME`, to begin with."""
    options = parse_options(argv, RecipeOptions, "recipes", recipes.__doc__, EXAMPLES)
    if options.name is None:
        if options.output is not None:
            raise OptionError("output has no effect without a recipe's name: give one of those that are listed.")
        found = {name: _head(path) for name, path in recipe_files().items()}
        show(found, "\n\n".join(f"{name}\n{_listed(head)}" for name, head in found.items()), options.json)
        return
    text = find_recipe(options.name).read_text("utf-8")
    if options.output is not None:
        write_new("output", options.output, text)
        shown = f"{options.output}: the recipe {options.name}. Train by: dpo-peft train --config {options.output}"
    else:
        shown = text.rstrip("\n")
    show({"name": options.name, "output": options.output, "text": text}, shown, options.json)


def write_new(option: str, name: str, text: str) -> None:
    """Writes a file; an OptionError where it is there already."""
    if Path(name).exists():
        raise OptionError(f"{option}={name!r} is there already. Give another name, or delete it first.")
    write_atomically(name, text)


def _head(path: Path) -> dict[str, str]:
    """Returns what a recipe's first comment says of it."""
    comment = [line[1:] for line in path.read_text("utf-8").split("\n\n")[0].splitlines() if line.startswith("#")]
    before, *parts = re.split(r"(?m)^ (\w+):", "\n".join(comment))
    about = " ".join(before.split())
    told = dict(zip(parts[::2], (" ".join(part.split()) for part in parts[1::2]), strict=True))
    return {"about": about} | {name.lower(): told[name] for name in LINES if name in told}


def _listed(head: dict[str, str]) -> str:
    """Returns two lines: the first sentence, and the beginning of what it takes."""
    about, *_ = re.split(r"(?<=\.) |: (?=accelerate)", head["about"])
    facts = [f"{name}: {re.split(r'[;,.] ', text)[0]}" for name, text in head.items() if name != "about"]
    return "\n".join(f"  {line}" for line in (about, "; ".join(facts)) if line)
