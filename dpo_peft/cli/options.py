"""How a command reads its options: a dataclass, a YAML file, the command line over it, and a help with examples.

    dpo-peft COMMAND [WORDS] [--config FILE.yaml] [--option value]

Leading words that belong to no option are the value of the command's first option, so `merge DIR` is
`merge --adapter DIR`. Results are printed by `show`; progress and warnings go to stderr, so `--json` can be piped.
"""

import argparse
import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

from ..errors import OptionError
from ..files import strict

EXIT_CODES = """exit codes:
  0    done
  2    an option, a file or a row is wrong; nothing was written
  3    refused or not finished: the message says why, and what to do
  130, 143  stopped by Ctrl-C or SIGTERM"""

Options = TypeVar("Options")


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults where there are any, and leaves the lines of examples alone."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        nothing = action.default is None or action.default in ("", False) or action.nargs == 0
        return action.help if nothing else super()._get_help_string(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        """An option once: the parser takes it with hyphens for underscores too."""
        if not action.option_strings or not action.option_strings[0].startswith("--"):
            return super()._format_action_invocation(action)
        return f"{action.option_strings[0]} {self._format_args(action, 'VALUE')}".rstrip()


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
    argv = split_config_word(argv)
    from_file = check_names(read_config_file(argv), known, command)
    if "--config" in argv:
        at = argv.index("--config")
        argv = argv[:at] + argv[at + 2 :]
    if argv and not argv[0].startswith("-"):
        argv = [f"--{first}", *argv]
    words = f"[{first.upper()}] [--config FILE.yaml] [--option value ...]"
    parser = HfArgumentParser(options, **parser_text(command, words, description, examples))
    refuse_instead_of_exit(parser)
    parsed, unknown = parser.parse_known_args([*_as_words(from_file), *argv])
    check_unknown(unknown, lambda given: check_names(given, known, command))
    return options(**{name: getattr(parsed, name) for name in known})


def parser_text(command: str, words: str, description: str, examples: Sequence[str]) -> dict[str, Any]:
    """Arguments of an `argparse.ArgumentParser` for a help with a short usage line, examples and exit codes."""
    shown = "\n".join(f"  {example}" for example in examples)
    return {
        "prog": f"dpo-peft {command}",
        "usage": f"dpo-peft {command} {words}",
        "description": description,
        "epilog": f"examples:\n{shown}\n\n{EXIT_CODES}",
        "formatter_class": _Formatter,
        "allow_abbrev": False,  # an option that is added later may share the beginning
    }


def refuse_instead_of_exit(parser: argparse.ArgumentParser) -> None:
    """A wrong value becomes an `OptionError` like every other wrong input; argparse would print its usage and exit."""

    def refuse(message: str) -> Any:
        raise OptionError(message)

    parser.error = refuse  # type: ignore[method-assign]


def split_config_word(argv: Sequence[str]) -> list[str]:
    """`--config=FILE` as two words."""
    return [part for word in argv for part in (word.split("=", 1) if word.startswith("--config=") else [word])]


def _as_words(given: Mapping[str, Any]) -> list[str]:
    """Options of a file as words of a command line, so that both are checked alike."""
    words = []
    for name, value in given.items():
        if value is not None:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def check_unknown(unknown: Sequence[str], check: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Refuse the words that a parser could not place; none is all right.

    Args:
        unknown: those words.
        check: refuses options that don't exist, given by name, and returns the others.

    Raises:
        OptionError: naming the first one.
    """
    words = zip(unknown, [*unknown[1:], ""], strict=False)
    check({word[2:].split("=")[0]: value for word, value in words if word.startswith("--")})
    for before, word in zip(["", *unknown], unknown, strict=False):
        is_value = before.startswith("--") and "=" not in before
        if not word.startswith("--") and not is_value:
            raise OptionError(f"{word!r} belongs to no option: write --option value.")


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
