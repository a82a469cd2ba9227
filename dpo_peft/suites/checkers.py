"""Whether a text follows a checkable instruction: a pure function of the text for each kind of `instructions.yaml`.

Nothing here judges how good a text is. A reply of blank space follows no instruction.
"""

import json
import re
import unicodedata
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import yaml

_SAID: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("instructions.yaml").read_text("utf-8"))
KINDS: dict[str, dict[str, Any]] = _SAID["kinds"]  # wordings and parameters
TASKS: list[str] = _SAID["tasks"]  # what instructions are added to
# How the Unicode names of a language's letters begin.
SCRIPTS = {
    "Russian": ("CYRILLIC",),
    "Greek": ("GREEK",),
    "Korean": ("HANGUL",),
    "Hindi": ("DEVANAGARI",),
    "Arabic": ("ARABIC",),
    "Japanese": ("HIRAGANA", "KATAKANA", "CJK"),
    "Hebrew": ("HEBREW",),
    "Thai": ("THAI",),
}
SCRIPT_SHARE = 0.9  # of the letters, for a text in a language: names may be spelled as they are at home


def follows(text: str, kind: str, loose: bool = False, **parameters: Any) -> bool:
    """Returns whether a text follows an instruction of this kind.

    Args:
        text: as a model wrote it, without special tokens.
        kind: a key of `CHECKERS`.
        loose: also accept it if it does without its first line, its last line, or asterisks: a greeting, a closing
            remark or markup then costs nothing.
        parameters: of the instruction.
    """
    texts = _variants(text) if loose else [text]
    return any(bool(one.strip()) and CHECKERS[kind](one, **parameters) for one in texts)


def _variants(text: str) -> list[str]:
    lines = text.strip().split("\n")
    cut = ["\n".join(lines[first : len(lines) - last]) for first, last in product((0, 1), (0, 1))]
    return [text, *cut, *(one.replace("*", "") for one in cut)]


def words(text: str) -> list[str]:
    """Returns the words of a text in small letters; an apostrophe or hyphen inside one doesn't part it."""
    return re.findall(r"\w+(?:['’-]\w+)*", text.lower())


def _parts(text: str, separator: str) -> list[str]:
    return [part.strip() for part in re.split(separator, text.strip())]


def _listed(text: str, item: str) -> list[str]:
    """Returns what `item` catches at the beginning of the lines where it fits."""
    return [found[1] for line in text.splitlines() if (found := re.match(item, line.strip()))]


def _json_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def _script(text: str, language: str) -> bool:
    names = [unicodedata.name(letter, "") for letter in text if letter.isalpha()]
    own = sum(name.startswith(SCRIPTS[language]) for name in names)
    return bool(names) and own >= SCRIPT_SHARE * len(names)


def _postscript(text: str, marker: str) -> bool:
    before, found, after = text.strip().rpartition(f"\n{marker}")
    return bool(before.strip() and found and after.strip())


def _sections(text: str, separator: str, number: int) -> bool:
    parts = _parts(text, rf"(?m)^[ \t]*{re.escape(separator)}[ \t]*$")
    return len(parts) == number and all(parts)


def _alternatives(text: str, marker: str) -> bool:
    parts = _parts(text, re.escape(marker))
    return len(parts) == 2 and all(parts) and parts[0] != parts[1]


def _quoted(text: str) -> bool:
    found = text.strip()
    return len(found) > 2 and found[0] == found[-1] == '"' and '"' not in found[1:-1]


def _present(text: str, present: Sequence[str]) -> list[bool]:
    found = set(words(text))
    return [word in found for word in present]


CHECKERS: dict[str, Callable[..., bool]] = {
    "least_words": lambda text, number: len(words(text)) >= number,
    "most_words": lambda text, number: 0 < len(words(text)) <= number,
    "sentences": lambda text, number: sum(map(bool, map(words, re.split(r"[.!?]+(?=\W|$)", text)))) == number,
    "paragraphs": lambda text, number: len(_parts(text, r"\n\s*\n")) == number,
    "keywords": lambda text, present: all(_present(text, present)),
    "forbidden": lambda text, absent: not any(_present(text, absent)),
    "frequency": lambda text, word, number: words(text).count(word) >= number,
    "letters": lambda text, letter, number: text.lower().count(letter) >= number,
    "no_letter": lambda text, letter: letter not in text.lower(),
    "no_commas": lambda text: "," not in text,
    "lowercase": lambda text: text.islower(),
    "uppercase": lambda text: text.isupper(),
    "json_only": _json_object,
    "bullets": lambda text, number: len(_listed(text, r"[-*] (.+)")) == number,
    "numbered": lambda text, number: _listed(text, r"(\d+)\. .") == [str(at + 1) for at in range(number)],
    "starts": lambda text, phrase: text.lstrip().startswith(phrase),
    "ends": lambda text, phrase: text.rstrip().endswith(phrase),
    "postscript": _postscript,
    "title": lambda text: bool(re.match(r"\[\[[^\[\]]*\w[^\[\]]*\]\]\s*\n\s*\S", text.lstrip())),
    "sections": _sections,
    "quoted": _quoted,
    "script": _script,
    "repeats": lambda text, request: text.lstrip().startswith(request) and text.strip() != request,
    "alternatives": _alternatives,
    "bold": lambda text, number: len(re.findall(r"\*\*[^*\n]*\w[^*\n]*\*\*", text)) >= number,
}
