"""How a command reads its options: a dataclass, a YAML file, the command line over it, and a help with examples.

    dpo-peft COMMAND [WORDS] [--config FILE.yaml] [--option value]

Leading words that belong to no option are the value of the command's first option, so `merge DIR` is
`merge --adapter DIR`. Results are printed by `show`; progress and warnings go to stderr, so `--json` can be piped.
"""

import argparse
import json
import logging
import os
import re
import shutil
import sys
import textwrap
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, get_args, get_type_hints

import yaml
from tqdm import tqdm

from ..errors import OptionError
from ..files import CONVERTERS, read_rows, strict, without_splits
from ..model.options import option
from ..spelling import meant
from . import help

if TYPE_CHECKING:
    from datasets import Dataset

CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tabs and the ends of lines
Options = TypeVar("Options")


class _Lines(logging.Handler):
    """Plain lines on stderr, above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        lines = printable(self.format(record)).split("\n")
        if sys.stderr.isatty():  # a terminal would break words
            width = shutil.get_terminal_size().columns
            lines = [part for line in lines for part in textwrap.wrap(line, width, subsequent_indent="  ") or [""]]
        tqdm.write("\n".join(lines), file=sys.stderr)


def show_progress() -> None:
    """Shows the package's news on stderr, once per job: further processes keep to warnings. A program that has
    handlers of its own gets them there. For the command line and for scripts; call it before torch is imported."""
    logger = logging.getLogger("dpo_peft")
    logger.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
    if not logger.hasHandlers():
        logger.addHandler(_Lines())
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it asks for an optional kernel that isn't used here
    warnings.filterwarnings("ignore", category=FutureWarning)  # for those who write programs


@dataclass(frozen=True)
class RowOptions:
    """Which rows a command reads."""

    dataset_name: None | str | list[str] = option(
        None, "Hub id, JSON(L), Parquet or CSV files, a folder of such, or a folder of save_to_disk."
    )
    dataset_split: str | None = option(None, "Split of a Hub dataset or folder; 'test' if not given.")
    dataset_config: str | None = option(None, "Configuration of a Hub dataset.")
    dataset_format: str | None = option(
        None, "What the rows are, where their columns don't say it (docs/data.md).", choices=list(CONVERTERS)
    )
    column_map: list[str] | None = option(
        None, "Columns of other names, as old:new: question:prompt good:chosen bad:rejected. In a file a mapping."
    )


def load_rows(options: RowOptions) -> "Dataset":
    """Returns the rows that the options name, converted if they say so; an OptionError where there is no such file or
    dataset, or for an option of a Hub dataset with a file."""
    name = options.dataset_name or ""
    if without_splits(name):
        for option in ("dataset_split", "dataset_config"):
            if getattr(options, option) is not None:
                raise OptionError(f"{option} has no effect: {name} has no splits. Leave it out.")
    split = options.dataset_split or "test"
    return read_rows(name, split, options.dataset_config, False, options.dataset_format, options.column_map)


def option_of(options: type, name: str, **metadata: object) -> Any:
    """Returns a field like another options class has; `metadata`, such as `help`, replaces what that says."""
    (found,) = (f for f in fields(options) if f.name == name)
    return field(default=found.default, metadata={**found.metadata, **metadata})


def parse_options(
    argv: Sequence[str],
    options: type[Options],
    command: str,
    description: str | None,
    examples: Sequence[str],
    *needed: str,
) -> Options:
    """Returns the options of a command.

    Args:
        argv: words after the command's name.
        options: a dataclass whose fields have `metadata={"help": ...}`; its first field takes leading words.
        command: its name, for messages.
        description: for the help; the docstring of the command's function.
        examples: full command lines for the help.
        needed: options that must be given.

    Raises:
        OptionError: an unknown option (with the one that was probably meant), a value of the wrong type, one that is
            missing, or a config file that can't be read.
        SystemExit: `--help` was asked for and printed.
    """
    names = [f.name for f in fields(options) if f.init]  # type: ignore[arg-type]

    def check(given: Mapping[str, object]) -> None:
        for name in given:
            if name not in names:
                hint = meant(name, names) or f" `dpo-peft {command} --help` lists them all."
                raise OptionError(f"{name!r} is not an option of `dpo-peft {command}`.{hint}")

    words, from_file = split_config(argv)
    check(from_file)
    if words and not words[0].startswith("-"):
        words = [f"--{names[0]}", *words]
    usage = f"[{names[0].upper()}] [--config FILE.yaml] [--option value ...]"
    text = {"command": command, "usage": usage, "description": description, "examples": [*examples]}
    found = made(options, _parse([*as_words(from_file), *words], {}, [options], check, text))
    required(found, *needed)
    return found


def parse_groups(
    argv: Sequence[str],
    groups: Sequence[type],
    command: str,
    usage: str,
    description: str | None,
    examples: Sequence[str],
    unread: Sequence[type] = (),
) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Returns the options that several dataclasses hold, `DPOConfig` among them, and those of the file alone.

    Values of the file are taken as YAML has them, null included. A file may hold options of `unread` dataclasses too,
    which have no effect. Other arguments, and errors, are those of `parse_options`.
    """
    from ..config_checks import check_option_names

    known = {f.name for group in groups for f in fields(group)}
    words, given = split_config(argv)
    elsewhere = {f.name for group in unread for f in fields(group)} - known
    from_file = check_option_names(refuse_launcher(given), known | elsewhere)
    from_file = {name: value for name, value in from_file.items() if name in known}
    own = (f for group in groups for f in fields(group) if "rule" not in f.metadata)  # `DPOConfig` checks its rules
    for f in own:  # argparse checks the choices of the command line alone
        choices, value = f.metadata.get("choices"), from_file.get(f.name)
        if choices and value is not None and str(value) not in map(str, choices):
            raise OptionError(f"{f.name}={value!r} is not one of {', '.join(map(str, choices))}.")
    text = {"command": command, "usage": usage, "description": description, "examples": [*examples]}

    def check(given: Mapping[str, str]) -> None:
        if idle := elsewhere & given.keys():
            raise OptionError(f"{idle.pop()} has no effect on `dpo-peft {command}`: leave it out.")
        check_option_names(refuse_launcher(given), known)

    return _parse(words, from_file, groups, check, text), from_file


# Options of `trl dpo` on processes: what they may be here, and the remedy.
_LAUNCHER: dict[str, tuple[str, str]] = {
    "config_file": ("", "Give it as accelerate_config."),
    "multi_gpu": ("false", "Give num_processes, and leave it out."),
    "ignore_bias_buffers": ("false", "Leave it out: no model is wrapped."),
}


def refuse_launcher(given: Mapping[str, object]) -> dict[str, object]:
    """Returns options without those of TRL's launcher that change nothing; an OptionError where one would."""
    for name, (harmless, remedy) in _LAUNCHER.items():
        if name in given and str(given[name]).lower() != harmless:
            raise OptionError(f"{name}={given[name]!r} is an option of TRL that isn't offered here. {remedy}")
    return {name: value for name, value in given.items() if name not in _LAUNCHER}


def _parse(
    words: Sequence[str],
    defaults: Mapping[str, object],
    groups: Sequence[type],
    check: Callable[[dict[str, str]], object],
    text: Mapping[str, Any],
) -> argparse.Namespace:
    """Returns the values of words over defaults; `check` refuses an option by its name."""
    from transformers import HfArgumentParser

    def refuse(message: str) -> NoReturn:
        raise OptionError(message)

    if asked := [word for word in words if word in help.ASKED]:
        help.show(text, groups, asked[0])
    # An option that is added later may share a beginning: no abbreviations.
    parser = HfArgumentParser(groups, prog=f"dpo-peft {text['command']}", add_help=False, allow_abbrev=False)
    parser.error = refuse  # argparse would print its usage, hundreds of lines, and exit
    hints = {name: hint for group in groups for name, hint in get_type_hints(group).items()}
    # Where one text or a list may stand, `HfArgumentParser` takes the text alone.
    several = {name for name, hint in hints.items() if {str, list[str]} <= {*get_args(hint)}}
    for action in parser._actions:
        if action.dest in several:
            action.nargs = "+"
        elif bool in get_args(hints.get(action.dest)) and action.nargs is None:  # alone it says yes, as other flags do
            action.nargs, action.const = "?", True
    parser.set_defaults(**defaults)
    parsed, unknown = parser.parse_known_args(words)
    for before, word, after in zip(["", *unknown], unknown, [*unknown[1:], ""], strict=False):
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            check({name.replace("-", "_"): value if equals else after})
        elif not before.startswith("--") or "=" in before:
            raise OptionError(f"{word!r} belongs to no option: write --option value.")
    for name in several:
        if isinstance(value := getattr(parsed, name), list) and len(value) == 1:
            setattr(parsed, name, value[0])
    return parsed


def made(options: type[Options], parsed: object) -> Options:
    """Returns one of the dataclasses that were parsed, filled, or of those whose options are among them."""
    return options(**{f.name: getattr(parsed, f.name) for f in fields(options) if f.init})  # type: ignore[arg-type]


def as_words(given: Mapping[str, object]) -> list[str]:
    """Returns options of a file as words of a command line, so that both are checked alike."""
    words = []
    for name, value in given.items():
        if value is not None:
            pairs = [f"{old}:{new}" for old, new in value.items()] if isinstance(value, dict) else value
            words += [f"--{name}", *map(str, pairs if isinstance(pairs, list) else [pairs])]
    return words


class _NoKeyTwice(yaml.SafeLoader):
    """Reads plain YAML, and refuses a key that stands twice: the first value would be lost."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Returns a mapping, as of the parent."""
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} stands twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def recipe_files() -> dict[str, Path]:
    """Returns name to file of the recipes, and of the config files for accelerate: they lie inside the package, or
    beside it in a checkout."""
    here = Path(__file__).parents[1]
    found = sorted(path for place in (here, here.parent) for path in (place / "recipes").rglob("*.yaml"))
    return {
        path.stem: path for path in found if path.parent.name == "accelerate" or "\ndataset_name:" in path.read_text()
    }


def find_recipe(name: str) -> Path:
    """Returns the file of a recipe; an OptionError where there is none of that name."""
    if (path := recipe_files().get(name)) is None:
        raise OptionError(f"{name!r} is not a recipe.{meant(name, recipe_files())} `dpo-peft recipes` lists them.")
    return path


def split_config(argv: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Returns the words without `--config FILE.yaml` (or `--config=FILE.yaml`), and the options of that file; an
    OptionError where there is no such file, or it is not a YAML mapping."""
    words = [part for word in argv for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    if "--config" not in words:
        return words, {}
    at = words.index("--config")
    path = Path([*words, ""][at + 1])
    if not path.is_file() and (given := path.stem) in recipe_files():
        if str(path) != given:
            raise OptionError(
                f"--config {path}: there is no such file. For the recipe give its name: --config {given}"
            )
        path = find_recipe(given)
    if not path.is_file():
        raise OptionError(
            f"--config {path}: there is no such file, and no such recipe (`dpo-peft recipes` lists them)."
        )
    try:
        options = yaml.load(path.read_text("utf-8"), _NoKeyTwice)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise OptionError(f"--config {path} is not valid YAML: {error}") from error
    if not isinstance(options, dict):
        raise OptionError(f"--config {path} must hold `option: value` lines.")
    if any("\0" in value for value in options.values() if isinstance(value, str)):
        raise OptionError(f"--config {path} holds a NUL character, which no name can. Take it out.")
    if "env" in options:
        raise OptionError(
            f"--config {path}: env would set environment variables, which a file from elsewhere must not. Take it "
            "out, and set them in the shell: NAME=value dpo-peft ..."
        )
    return words[:at] + words[at + 2 :], options


def known(command: str, argv: Sequence[str]) -> bool:
    """Returns whether the kept help knows every option that is given, by name; a newer transformers may have more."""
    words, from_file = split_config(argv)
    given = {word[2:].partition("=")[0].replace("-", "_") for word in words if word.startswith("--")}
    return given | from_file.keys() <= {*(help.kept(command) or {}).get("names", "").split()}


def required(options: object, *names: str) -> None:
    """Raises an OptionError that names the first of these options that isn't given."""
    for name in names:
        if not getattr(options, name):
            raise OptionError(f"{name} is missing: give it by --{name} or in the config file.")


def show(result: Mapping[str, object], text: str, as_json: bool) -> None:
    """Prints a command's result: `text` for people, or `result` as one JSON object, NaN and infinity as null."""
    print(unpaired(json.dumps(strict(result), indent=2, ensure_ascii=False)) if as_json else printable(text))


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns the lines of a table: the first column begins at the left, the others end at the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = ([cell.rjust(width) for cell, width in zip(row, widths, strict=True)] for row in rows)
    return ["  ".join([row[0].ljust(widths[0]), *cells[1:]]).rstrip() for row, cells in zip(rows, padded, strict=True)]


def printable(text: str) -> str:
    """Returns a text with what a terminal would obey, or UTF-8 can't hold, spelled: names and rows are others'."""
    return unpaired(CONTROLS.sub(lambda found: f"\\x{ord(found[0]):02x}", text))


def unpaired(text: str) -> str:
    """Returns a text with the bytes of file names that are no UTF-8 spelled."""
    return text.encode("utf-8", "backslashreplace").decode()
