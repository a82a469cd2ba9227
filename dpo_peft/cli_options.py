"""How a command reads its options: a dataclass, a YAML file, the command line over it, and a help with examples.

    dpo-peft COMMAND [WORDS] [--config FILE.yaml] [--option value]

Leading words that belong to no option are the value of the command's first option, so `merge DIR` is
`merge --adapter DIR`. Results are printed by `show`; progress and warnings go to stderr, so `--json` can be piped.
"""

import argparse
import difflib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

from .errors import OptionError

EXIT_CODES = """exit codes:
  0    done
  2    an option, a file or a row is wrong; nothing was written
  3    refused or not finished: the message says why, and what to do
  130, 143  stopped by Ctrl-C or SIGTERM"""

Options = TypeVar("Options")


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and leaves the lines of examples alone."""


def parse_options(
    argv: Sequence[str], options: type[Options], command: str, description: str, examples: Sequence[str]
) -> Options:
    """The options of a command.

    Args:
        argv: words after the command's name.
        options: a dataclass whose fields have `metadata={"help": ...}`; its first field takes leading words.
        command: its name, for messages.
        description: one or two sentences for the help.
        examples: full command lines for the help.

    Raises:
        OptionError: an unknown option (with the one that was probably meant), a value of the wrong type, or a config
            file that can't be read.
        SystemExit: `--help` was asked for and printed.
    """
    from transformers import HfArgumentParser

    names = [f.name for f in fields(options)]  # type: ignore[arg-type]
    first, known = names[0], set(names)
    argv = [part for word in argv for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    from_file = check_names(read_config_file(argv), known, command)
    if "--config" in argv:
        at = argv.index("--config")
        argv = argv[:at] + argv[at + 2 :]
    if argv and not argv[0].startswith("-"):
        argv = [f"--{first}", *argv]
    shown = "\n".join(f"  {example}" for example in examples)
    parser = HfArgumentParser(
        options,
        prog=f"dpo-peft {command}",
        usage=f"dpo-peft {command} [{first.upper()}] [--config FILE.yaml] [--option value ...]",
        description=description,
        epilog=f"examples:\n{shown}\n\n{EXIT_CODES}",
        formatter_class=_Formatter,
        exit_on_error=False,
        allow_abbrev=False,  # an option that is added later may share the beginning
    )
    parser.error = _refuse
    try:
        parsed, unknown = parser.parse_known_args([*_as_words(from_file), *argv])
    except argparse.ArgumentError as error:
        raise OptionError(f"dpo-peft {command}: {error}") from error
    words = zip(unknown, [*unknown[1:], ""], strict=False)
    check_names({word[2:].split("=")[0]: value for word, value in words if word.startswith("--")}, known, command)
    if unknown:
        raise OptionError(f"{unknown[0]!r} belongs to no option: write --option value.")
    return options(**{name: getattr(parsed, name) for name in known})


def _as_words(given: Mapping[str, Any]) -> list[str]:
    """Options of a file as words of a command line, so that both are checked alike."""
    words = []
    for name, value in given.items():
        if value is not None:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def _refuse(message: str) -> Any:
    raise OptionError(message)


def check_names(given: dict[str, Any], known: set[str], command: str) -> dict[str, Any]:
    """`given`, if every name of it is known.

    Raises:
        OptionError: one isn't.
    """
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"Did you mean {close[0]!r}?" if close else f"`dpo-peft {command} --help` lists them all."
            raise OptionError(f"{name!r} is not an option of `dpo-peft {command}`. {hint}")
    return given


def read_config_file(argv: Sequence[str]) -> dict[str, Any]:
    """The options of `--config FILE.yaml`; none without one.

    Raises:
        OptionError: there is no such file, or it is not a YAML mapping.
    """
    argv = list(argv)
    if "--config" not in argv:
        return {}
    path = Path(argv[argv.index("--config") + 1]) if argv[-1] != "--config" else Path()
    if not path.is_file():
        raise OptionError(f"--config {path}: there is no such file.")
    try:
        options = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise OptionError(f"--config {path} is not valid YAML: {error}") from error
    if not isinstance(options, dict):
        raise OptionError(f"--config {path} must hold `option: value` lines.")
    return options


def required(options: Any, *names: str) -> None:
    """Refuse options that must be given and aren't.

    Raises:
        OptionError: naming the first one.
    """
    for name in names:
        if not getattr(options, name):
            raise OptionError(f"{name} is missing: give it by --{name} or in the config file.")


def show(result: Mapping[str, Any], text: str, as_json: bool) -> None:
    """Print a command's result: `text` for people, or `result` as one JSON object, NaN and infinity as null."""
    print(json.dumps(strict(result), indent=2, ensure_ascii=False) if as_json else text)


def strict(value: Any) -> Any:
    """JSON has no NaN or infinity: they become null."""
    if isinstance(value, Mapping):
        return {key: strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
