"""Graded evaluative words: what the grammar (`text.py`) fills into its slots and the true reward (`reward.py`) reads.

Valence runs from -2 (dreadful) to +2 (superb); 0 is a judgement too ("ordinary") and pulls a mean towards nothing. A
word stands here only if no neutral sentence of the grammar uses it, so finding it in a text is finding a judgement.
"""

GRADES = (2, 1, 0, -1, -2)


def _graded(*words_by_grade: str) -> dict[int, list[str]]:
    """Map each grade, best first, to its words."""
    return {grade: words.split() for grade, words in zip(GRADES, words_by_grade, strict=True)}


# Adjectives by what they can be said of. "any" goes with everything.
ADJECTIVES: dict[str, dict[int, list[str]]] = {
    "any": _graded(
        "superb wonderful excellent outstanding marvellous magnificent splendid fantastic delightful glorious",
        "good pleasant nice decent solid enjoyable likeable agreeable satisfying",
        "ordinary average typical standard unremarkable acceptable",
        "weak dull poor disappointing mediocre forgettable tiresome unconvincing",
        "terrible awful dreadful horrible appalling abysmal atrocious ghastly",
    ),
    "food": _graded(
        "delicious exquisite heavenly irresistible",
        "tasty fresh wholesome crisp",
        "plain filling",
        "bland stale greasy soggy lukewarm",
        "inedible disgusting revolting vile",
    ),
    "people": _graded(
        "phenomenal inspiring unforgettable",
        "friendly polite helpful cheerful attentive",
        "businesslike reserved",
        "careless grumpy distracted impatient clumsy",
        "rude hostile insulting contemptuous",
    ),
    "story": _graded(
        "gripping dazzling enthralling unforgettable",
        "clever touching witty charming thoughtful",
        "familiar conventional",
        "thin predictable confusing muddled tedious",
        "pointless unbearable ludicrous insufferable",
    ),
    "place": _graded(
        "stunning gorgeous breathtaking",
        "cosy tidy clean airy comfortable",
        "modest basic",
        "cramped noisy dusty gloomy shabby",
        "filthy squalid hideous rotten",
    ),
    "device": _graded(
        "flawless ingenious faultless",
        "handy sturdy reliable neat practical",
        "basic functional",
        "flimsy sluggish fiddly awkward",
        "useless worthless unusable hopeless",
    ),
    "music": _graded(
        "spellbinding electrifying sublime",
        "lively graceful catchy tuneful",
        "conventional restrained",
        "shaky uneven lifeless monotonous",
        "unlistenable painful excruciating",
    ),
}

# "We loved the garden."
FEELING_VERBS = _graded(
    "loved adored treasured", "liked enjoyed appreciated", "tolerated", "disliked resented", "hated loathed detested"
)
# "The garden bored us."
EFFECT_VERBS = _graded(
    "thrilled enchanted delighted",
    "pleased charmed impressed cheered",
    "surprised",
    "bored annoyed irritated disappointed",
    "appalled horrified infuriated disgusted",
)
# "The visit was a joy."
VERDICTS = _graded(
    "triumph masterpiece marvel joy",
    "pleasure treat success delight",
    "compromise",
    "letdown bore nuisance chore",
    "disaster nightmare disgrace catastrophe",
)
# "The band played beautifully."
MANNER_ADVERBS = _graded(
    "beautifully brilliantly superbly",
    "nicely capably skilfully",
    "adequately passably",
    "badly clumsily carelessly",
    "terribly appallingly horribly",
)
# "I would gladly go back." and "I would recommend it."
RETURN_ADVERBS = _graded("eagerly joyfully", "gladly happily", "perhaps", "reluctantly hesitantly", "")
ADVICE_VERBS = _graded("celebrate cherish", "recommend praise", "consider", "skip criticise", "avoid condemn")

NEGATORS = frozenset({"not", "never", "hardly"})
# May stand between a negator and its word: "not especially good".
DEGREE_WORDS = frozenset({"very", "really", "especially", "particularly", "exactly", "quite", "all", "that"})


def _flatten() -> tuple[dict[str, int], dict[str, str]]:
    """Return word -> valence and word -> part of speech over all tables; a word graded twice is a defect."""
    tables = [("adjective", table) for table in ADJECTIVES.values()]
    tables += [("feeling", FEELING_VERBS), ("effect", EFFECT_VERBS), ("verdict", VERDICTS)]
    tables += [("manner", MANNER_ADVERBS), ("return", RETURN_ADVERBS), ("advice", ADVICE_VERBS)]
    valence: dict[str, int] = {}
    part: dict[str, str] = {}
    for name, table in tables:
        for grade, words in table.items():
            for word in words:
                if valence.setdefault(word, grade) != grade or part.setdefault(word, name) != name:
                    raise ValueError(f"lexicon: {word!r} is graded or classed twice")
    return valence, part


VALENCE, PART_OF_SPEECH = _flatten()
