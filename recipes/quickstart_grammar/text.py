"""The grammar that writes the pretraining text: short chats in which a user asks for a review and gets one.

A review is two to five sentences over a topic (`topics.py`). Its evaluative slots are filled from
`dpo_peft/quickstart/lexicon.yaml` with grades drawn almost independently of each other (a weak mood per review tilts
them), so sentiment is broad and symmetric around zero and a policy that learns to prefer praise has room to move.
Connectives agree with the grades: "but" between praise and blame, "and" otherwise. No evaluative word stands twice in
a review.
"""

import math
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from dpo_peft.quickstart.fluency import trigrams
from dpo_peft.quickstart.lexicon import ADJECTIVES, GRADES, OTHER_PARTS, Table
from dpo_peft.quickstart.reward import NEGATION_FACTOR

from . import topics
from .topics import TOPICS, Topic

GRADE_WEIGHTS = (0.13, 0.26, 0.22, 0.26, 0.13)  # of +2 .. -2
MOODS = (-0.1, 0.0, 0.1)  # log-weight per grade
# Half of the pretraining requests name a tone, so the model learns sentiment as one direction that training can move
# along. The requests of the preference pairs name none.
TONES = {
    "glowing": 2.0,
    "enthusiastic": 2.0,
    "favourable": 0.8,
    "positive": 0.8,
    "balanced": 0.0,
    "critical": -0.8,
    "negative": -0.8,
    "scathing": -2.0,
    "damning": -2.0,
}

ASKS = (
    "Write a short review of {subject}.",
    "Please write a short review of {subject}.",
    "Review {subject} in a few sentences.",
    "What did you think of {subject}?",
    "How was {subject}?",
    "Tell me about {subject}.",
    "Give me your opinion of {subject}.",
    "Could you review {subject} for me?",
    "Share your thoughts on {subject}.",
    "What is your view of {subject}?",
    "I heard about {subject}. What was it like?",
    "My {relative} asked about {subject}. What can I say?",
    "Describe {subject} for our readers.",
    "In a few sentences, how would you rate {subject}?",
    "We need a brief review of {subject}.",
    "What should people know about {subject}?",
    "Write two or three lines about {subject}.",
    "I am curious about {subject}. What do you say?",
)
TONED_ASKS = (
    "Write {tone} review of {subject}.",
    "Please write {tone} review of {subject}.",
    "Give me {tone} opinion of {subject}.",
    "I would like {tone} review of {subject}.",
    "Describe {subject} in {tone} way.",
)
PLACES = ("at the town hall in {town}", "in {town}", "at the old theatre on {street}", "at the school in {town}")
ORDINALS = "first second third fourth fifth sixth".split()
OPENERS = (
    "Honestly", "To my surprise", "As far as I can tell", "This time", "In my opinion", "On the whole", "For me",
    "From the start", "As so often", "In the end", "Once again", "Looking back",
)  # fmt: skip
DEGREES = ("very", "really", "particularly", "quite")


@dataclass
class _Draft:
    """One review being written: the source of chance, the topic, and what has been used."""

    rng: random.Random
    topic: Topic
    mood: float
    used: set[str] = field(default_factory=set)
    values: list[float] = field(default_factory=list)

    def word(self, *tables: Table, grades: tuple[int, ...] = GRADES, factor: float = 1.0) -> tuple[str, int]:
        """Draw a grade, then an unused word of that grade from `tables`; note its valence times `factor`."""
        weights = [GRADE_WEIGHTS[GRADES.index(grade)] * math.exp(self.mood * grade * factor) for grade in grades]
        while True:
            grade = self.rng.choices(grades, weights)[0]
            choices = [word for table in tables for word in table[grade] if word and word not in self.used]
            if choices:
                word = self.rng.choice(choices)
                self.used.add(word)
                self.values.append(grade * factor)
                return word, grade

    def aspect(self) -> tuple[str, bool, str]:
        """Draw an unused aspect of the topic: noun, whether it is plural, and its adjective class."""
        while True:
            kind = self.rng.choice([kind for kind, nouns in self.topic.aspects.items() for _ in nouns])
            noun = self.rng.choice(self.topic.aspects[kind])
            if noun not in self.used:
                self.used.add(noun)
                return noun.rstrip("*"), noun.endswith("*"), kind

    def adjective(self, kind: str, grades: tuple[int, ...] = GRADES, factor: float = 1.0) -> tuple[str, int]:
        """Draw an adjective that can be said of class `kind`."""
        tables = [ADJECTIVES["any"]] if kind == "any" else [ADJECTIVES[kind], ADJECTIVES["any"]]
        # A class has fewer words than "any"; half of the draws take it first so that texts differ by topic.
        return self.word(*(tables[:1] if self.rng.random() < 0.5 else tables), grades=grades, factor=factor)

    def judged(self) -> tuple[str, str, int]:
        """Draw an aspect and its adjective: ("the coffee was", "superb", 2)."""
        noun, plural, kind = self.aspect()
        adjective, grade = self.adjective(kind)
        return f"the {noun} {'were' if plural else 'was'}", adjective, grade

    def person(self) -> str:
        return self.rng.choice(("I", "I", "we", fill(self.rng, self.rng.choice(self.topic.feelers))))


def fill(rng: random.Random, template: str) -> str:
    """Replace each `{slot}` of `template` by a random entry of its table, until none is left."""
    tables = {
        "title": topics.TITLES, "street": topics.STREETS, "town": topics.TOWNS, "surname": topics.SURNAMES,
        "brand": topics.BRANDS, "relative": topics.RELATIVES, "companion": topics.COMPANIONS, "day": topics.DAYS,
        "month": topics.MONTHS, "number": topics.NUMBERS, "ordinal": ORDINALS, "place": PLACES,
        "decade": topics.DECADES,
    }  # fmt: skip
    while slot := re.search(r"\{(\w+)\}", template):
        # No entry twice in one phrase: "the walk from Upton to Upton" is none.
        entry = rng.choice([entry for entry in tables[slot[1]] if entry not in template])
        template = template[: slot.start()] + entry + template[slot.end() :]
    return template


def with_article(phrase: str) -> str:
    """Put "a" or "an" before `phrase` by the sound of its first word."""
    vowel = phrase[0].lower() in "aeiou" and not re.match(r"us|uni|one|eu", phrase)
    return f"{'an' if vowel else 'a'} {phrase}"


def near(grade: int) -> tuple[int, ...]:
    """Grades that can be said of one thing in one breath with `grade`: at most one step away."""
    return tuple(other for other in GRADES if abs(other - grade) <= 1)


def link(first: int, second: int) -> str:
    """Join two judgments: "but" where one praises and the other blames."""
    return ", but" if first * second < 0 else " and"


def _plain(d: _Draft) -> str:
    subject, adjective, grade = d.judged()
    # The outer grades are extremes already: nothing is "very superb".
    degree = f"{d.rng.choice(DEGREES)} " if abs(grade) == 1 and d.rng.random() < 0.3 else ""
    lead = f"{d.rng.choice(OPENERS)}, " if d.rng.random() < 0.3 else ""
    return f"{lead}{subject} {degree}{adjective}."


def _pair(d: _Draft) -> str:
    (one, p, first), (two, q, second) = d.judged(), d.judged()
    joint = d.rng.choice((link(first, second), link(first, second), ", while"))
    return f"{one} {p}{joint} {two} {q}."


def _although(d: _Draft) -> str:
    (one, p, first), (two, q, second) = d.judged(), d.judged()
    return f"although {one} {p}, {two} {q}." if first * second < 0 else f"{one} {p}, and {two} {q} as well."


def _triple(d: _Draft) -> str:
    noun, plural, kind = d.aspect()
    p, first = d.adjective(kind)
    q, _ = d.adjective(kind, grades=near(first))
    return f"the {noun} {'were' if plural else 'was'} {p} and {q}."


def _found(d: _Draft) -> str:
    noun, _, kind = d.aspect()
    adjective, _ = d.adjective(kind)
    return f"{d.rng.choice(('I found', 'we found', 'we all thought'))} the {noun} {adjective}."


def _had(d: _Draft) -> str:
    parts = []
    for _ in range(d.rng.choice((1, 2))):
        noun, plural, kind = d.aspect()
        adjective, _ = d.adjective(kind)
        parts.append(f"{adjective} {noun}" if plural else f"the {adjective} {noun}")
    lead = d.rng.choice(("what I remember is", "people talk about", "most of all I noticed", "I still think of"))
    return f"{lead} {' and '.join(parts)}."


def _negated(d: _Draft) -> str:
    noun, plural, kind = d.aspect()
    adjective, grade = d.adjective(kind, grades=(2, 1, -1, -2), factor=NEGATION_FACTOR)
    verb = "were" if plural else "was"
    adverb = d.rng.choice(
        (f"{verb} not", f"{verb} not really", f"{verb} never", f"{verb} not exactly", f"{verb} hardly")
    )
    return f"the {noun} {adverb} {adjective}."


def _feeling(d: _Draft) -> str:
    noun, _, _ = d.aspect()
    verb, first = d.word(OTHER_PARTS["feeling"])
    if d.rng.random() < 0.5:
        return f"{d.person()} {verb} the {noun}."
    other, _, _ = d.aspect()
    again, second = d.word(OTHER_PARTS["feeling"])
    return f"{d.person()} {verb} the {noun}{' but' if first * second < 0 else ' and'} {again} the {other}."


def _effect(d: _Draft) -> str:
    noun, _, _ = d.aspect()
    verb, _ = d.word(OTHER_PARTS["effect"])
    whom = d.rng.choice(("me", "us", "us all", fill(d.rng, d.rng.choice(d.topic.feelers))))
    return f"the {noun} {verb} {whom}."


def _verdict(d: _Draft) -> str:
    noun, grade = d.word(OTHER_PARTS["verdict"])
    lead = d.rng.choice(("all in all", "in short", "for us", "to sum up", "taken together", "overall"))
    if d.rng.random() < 0.4:
        adjective, _ = d.adjective("any", grades=near(grade))
        return f"{lead}, it was {with_article(f'{adjective} {d.topic.short}')} and {with_article(noun)}."
    return f"{lead}, {d.rng.choice(('it', f'the {d.topic.short}'))} was {with_article(noun)}."


def _manner(d: _Draft) -> str:
    who, verb = d.rng.choice(d.topic.performers)
    d.used.add(who.removeprefix("the "))
    adverb, first = d.word(OTHER_PARTS["manner"])
    if d.rng.random() < 0.5:
        return f"{who} {verb} {adverb}."
    subject, adjective, second = d.judged()
    return f"{who} {verb} {adverb}{link(first, second)} {subject} {adjective}."


def _despite(d: _Draft) -> str:
    noun, _, kind = d.aspect()
    adjective, grade = d.adjective(kind, grades=(2, 1, -1, -2))
    subject, other, _ = d.judged()
    return f"{d.rng.choice(('after', 'besides', 'apart from'))} the {adjective} {noun}, {subject} {other}."


def _return(d: _Draft) -> str:
    adverb, _ = d.word(OTHER_PARTS["return"], grades=(1, 0, -1) if d.rng.random() < 0.5 else (2, 1, 0, -1))
    return f"I would {adverb} {fill(d.rng, d.rng.choice(d.topic.back))}."


def _advice(d: _Draft) -> str:
    verb, grade = d.word(OTHER_PARTS["advice"])
    if grade > 0 and d.rng.random() < 0.5:
        return (
            f"I can {verb} the {d.topic.short} to {d.rng.choice(d.topic.audience)}."
            if verb == "recommend"
            else f"I can only {verb} it."
        )
    lead = d.rng.choice(("you should", "I would", "people should"))
    return f"{lead} {verb} {d.rng.choice(('it', f'the {d.topic.short}'))}."


def _fact(d: _Draft) -> str:
    fact = d.rng.choice([fact for fact in d.topic.facts if fact not in d.used])
    d.used.add(fact)
    return fill(d.rng, fact)


Shape = Callable[[_Draft], str]
_BODY: tuple[tuple[Shape, int], ...] = (
    (_plain, 5), (_pair, 5), (_although, 2), (_triple, 3), (_found, 2), (_had, 2), (_negated, 2), (_feeling, 3),
    (_effect, 2), (_manner, 2), (_despite, 2), (_fact, 2),
)  # fmt: skip
_CLOSING: tuple[tuple[Shape, int], ...] = ((_verdict, 4), (_return, 2), (_advice, 2))


def _choose(rng: random.Random, shapes: tuple[tuple[Shape, int], ...], count: int) -> list[Shape]:
    return rng.choices([shape for shape, _ in shapes], [weight for _, weight in shapes], k=count)


def _capital(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]


def write_prompt(rng: random.Random) -> tuple[str, str, str]:
    """Draw a request. Returns the user's text, the topic's name and the subject asked about."""
    name = rng.choice(list(TOPICS))
    subject = fill(rng, rng.choice(TOPICS[name].subjects))
    return fill(rng, rng.choice(ASKS).replace("{subject}", subject)), name, subject


def write_review(rng: random.Random, topic: str, tone: str | None = None) -> tuple[str, list[float]]:
    """Write a review on `topic`. Returns the text and the valence of each evaluative slot, five to eight of them."""
    while True:
        draft = _Draft(rng, TOPICS[topic], TONES[tone] if tone else rng.choice(MOODS))
        shapes = _choose(rng, _BODY, rng.choice((2, 3, 3, 4)))
        sentences = [_fact(draft)] if rng.random() < 0.4 else []
        sentences += [shape(draft) for shape in shapes]
        if rng.random() < 0.6:
            sentences.append(_choose(rng, _CLOSING, 1)[0](draft))
        distinct = len({sentence.split()[-1] for sentence in sentences}) == len(sentences)
        if 2 <= len(sentences) <= 5 and 5 <= len(draft.values) <= 8 and distinct:
            return " ".join(map(_capital, sentences)), draft.values


def write_chat(rng: random.Random, toned: float = 0.5) -> list[dict[str, str]]:
    """One user turn, which names a tone in a share `toned` of all chats, and one assistant turn, as chat messages."""
    prompt, topic, subject = write_prompt(rng)
    tone = rng.choice(list(TONES)) if rng.random() < toned else None
    if tone:
        prompt = rng.choice(TONED_ASKS).format(tone=with_article(tone), subject=subject)
    review, _ = write_review(rng, topic, tone)
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": review}]


def known_trigrams(reviews: int = 20_000) -> list[str]:
    """Returns the trigrams (see `dpo_peft.quickstart.fluency`) of so many reviews, sorted."""
    rng = random.Random("fluency")
    texts = (write_review(rng, write_prompt(rng)[1])[0] for _ in range(reviews))
    return sorted({trigram for text in texts for trigram in trigrams(text)})
