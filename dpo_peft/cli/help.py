"""The help of every command, shown at once: `help.json` holds what it says, made of the classes of options.

`python dev/write_help.py` makes that file, and docs/config.schema.json, anew; a test says when they are behind.
Which options stand where, and better words for inherited ones, are in `help.yaml`. Nothing slow is imported here.
"""

import fnmatch
import json
import re
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

KEPT, WORDS = Path(__file__).with_name("help.json"), Path(__file__).with_name("help.yaml")
ASKED = ("-h", "--help", "--help-all", "--help=json")
INDENT, NARROW, WIDE = 34, 80, 112  # columns of the names; of the whole
EXIT_CODES = """exit codes:
  0    done
  2    an option, a file or a row is wrong; nothing was trained or written
  3    refused or not finished: the message says why, and what to do
  130, 143  stopped by Ctrl-C or SIGTERM"""
CONFIG = {
    "name": "--config FILE.yaml",
    "help": "Lines of `option: value`, or a recipe's name; what the command line says overrides them.",
    "first": True,
}


def kept(command: str) -> dict[str, Any] | None:
    """Returns what `help.json` holds of a command; None for one that is newer."""
    return json.loads(KEPT.read_text("utf-8")).get(command)


def show(text: Mapping[str, Any], groups: Sequence[type], word: str) -> NoReturn:
    """Prints a command's help as one of `ASKED` wants it, made of its classes of options, and exits.

    Args:
        text: `command`, and its `usage`, `description` and `examples`.
        groups: dataclasses that hold the options.
        word: "--help-all" for all options, "--help=json" for the same as JSON, else those that come first.
    """
    description = " ".join((text["description"] or "").split())
    made = {**text, "description": description, "groups": _placed(text["command"], _described(groups))}
    print(json.dumps(made) if word == "--help=json" else render(made, every=word == "--help-all"))
    raise SystemExit(0)


def render(help: Mapping[str, Any], every: bool = False, width: int | None = None) -> str:
    """Returns a help as text of `width` columns, the terminal's if None: what comes first in it, or `every` option."""
    width = width or min(max(shutil.get_terminal_size((WIDE, 24)).columns, NARROW), WIDE)
    command, left_out = help["command"], help.get("left_out", 0)
    lines = [*textwrap.wrap(f"usage: dpo-peft {command} {help['usage']}", width, subsequent_indent=" " * 7), ""]
    lines += textwrap.wrap(help["description"], width)
    for title, entries in {"file": [CONFIG], **help["groups"]}.items():
        shown = [entry for entry in entries if every or entry["first"]]
        left_out += len(entries) - len(shown)
        lines += ["", f"{title}:"] * bool(shown) + [line for entry in shown for line in _lines(entry, width)]
    if left_out and not every:
        lines += ["", f"{left_out} more options: dpo-peft {command} --help-all"]
    return "\n".join([*lines, "", "examples:", *(f"  {one}" for one in help["examples"]), "", EXIT_CODES])


def _lines(entry: Mapping[str, str], width: int) -> Iterator[str]:
    """Yields the lines of an option."""
    name = f"  {entry['name']}"
    if len(name) >= INDENT:
        yield name
        name = ""
    for line in textwrap.wrap(entry["help"], width - INDENT) or [""]:
        yield f"{name:<{INDENT}}{line}".rstrip()
        name = ""


# ---- Made of the classes of options ---------------------------------------------------------------------------------


def all_fields(groups: Sequence[type]) -> Iterator[tuple[Field[Any], Any]]:
    """Yields every option that some classes have and that isn't refused whatever its value, with its type."""
    from ..config_checks import NOT_AVAILABLE

    hidden = {*NOT_AVAILABLE, *words()["hidden"].split()}
    for group in groups:
        hints = get_type_hints(group)
        yield from ((f, hints[f.name]) for f in fields(group) if f.init and f.name not in hidden)


def words() -> dict[str, Any]:
    """Returns what `help.yaml` says."""
    import yaml

    return yaml.safe_load(WORDS.read_text("utf-8"))


def _described(groups: Sequence[type]) -> dict[str, dict[str, Any]]:
    """Returns name to name as it is typed, help and default."""
    described = {}
    for f, hint in all_fields(groups):
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        default = default.value if isinstance(default, Enum) else default
        kinds = (hint, *get_args(hint))
        value = "N" if {int, float} & {*kinds} else "X"
        if bool in kinds and str not in kinds:
            value = "" if default is False else "BOOL"
        several = any(list in (kind, get_origin(kind)) for kind in kinds)
        typed = f"--{f.name} {value}{' ...' if several else ''}".rstrip()
        text = re.sub(r"\s+", " ", str(f.metadata.get("help", ""))).replace("%%", "%")
        choices = [*map(str, f.metadata.get("choices") or ())]
        told = {"option": f.name, "name": typed, "help": text, "default": default, "first": True, "choices": choices}
        described[f.name] = told
    return described


def _placed(command: str, entries: dict[str, dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Returns title to options; those of training are placed by `help.yaml`."""
    said, placed = words(), dict[str, list[dict[str, Any]]]()
    places, more = {"options": dict.fromkeys(entries)}, {}
    of_plan: set[str] = set()
    if command in ("train", "plan"):
        places, more = said["first"], said["more"]
    if command == "plan":
        from ..planning.run import PlanOptions

        of_plan = {f.name for f in fields(PlanOptions)}
        places = {"the prediction": {n: None for n in entries if n in of_plan}, **places}
    ahead = [(title, name, text, True) for title, named in places.items() for name, text in named.items()]
    behind = [(title, name, text, False) for title, named in more.items() for name, text in named.items()]
    ahead += sorted(behind, key=lambda one: "*" in one[1])  # names before patterns
    for title, pattern, text, first in [*ahead, ("others", "*", None, False)]:
        for name in fnmatch.filter([*entries], pattern):
            entry = entries.pop(name)
            shown, default = text or entry["help"], entry["default"]
            if not all(re.search(rf"\b{re.escape(choice)}\b", shown) for choice in entry["choices"]):
                shown = f"{shown.removesuffix('.')}: {', '.join(entry['choices'])}."
            if default not in (None, "", False, []) and "default" not in shown.lower():
                shown = f"{shown} (default {' '.join(map(str, default)) if isinstance(default, list) else default})"
            if command == "plan":
                first = name in of_plan or name in said["plan"].split()
            placed.setdefault(title, []).append(entry | {"help": shown, "first": first})
    return placed
