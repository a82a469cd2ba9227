"""Graded evaluative words (`lexicon.yaml`): what the grammar fills into its slots and the true reward reads."""

from pathlib import Path

import yaml

GRADES = (2, 1, 0, -1, -2)
NEGATORS = frozenset({"not", "never", "hardly"})
# May stand between a negator and its word: "not especially good".
DEGREE_WORDS = frozenset({"very", "really", "especially", "particularly", "exactly", "quite", "all", "that"})

Table = dict[int, list[str]]  # grade, best first, to its words


def _tables(content: dict[str, dict[int, str | None]]) -> dict[str, Table]:
    return {name: {grade: (words[grade] or "").split() for grade in GRADES} for name, words in content.items()}


_CONTENT = yaml.safe_load(Path(__file__).with_name("lexicon.yaml").read_text("utf-8"))
ADJECTIVES = _tables(_CONTENT.pop("adjective"))  # by what they can be said of
OTHER_PARTS = _tables(_CONTENT)  # by part of speech
# (word, part of speech, valence) of every table.
ENTRIES = [
    (word, part, grade)
    for part, table in [*(("adjective", table) for table in ADJECTIVES.values()), *OTHER_PARTS.items()]
    for grade, words in table.items()
    for word in words
]
VALENCE = {word: grade for word, _, grade in ENTRIES}
PART_OF_SPEECH = {word: part for word, part, _ in ENTRIES}
