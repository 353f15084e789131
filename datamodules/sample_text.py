"""The built-in sample: documents in C4's form, written by a generator of ours.

An invented lexicon with Zipfian use, a small grammar with agreement, topics that colour a document's choice of words, and people whose
home, trade and belongings are told once and asked for again later, so that memory pays. Every draw is `random.Random(seed).random()`, the
one method whose sequence Python guarantees for all versions, and `int(x * n)`: the text is the same on every machine.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

GENERATOR_VERSION = 1
_LEXICON_SEED = 20_240_229
_ONSETS = [
    "b", "br", "c", "cl", "d", "dr", "f", "fl", "g", "gl", "gr", "h", "j", "k", "l", "m", "n",
    "p", "pl", "pr", "qu", "r", "s", "sh", "sk", "st", "str", "t", "th", "tr", "v", "w", "z",
]  # fmt: skip
_VOWELS = ["a", "e", "i", "o", "u", "ai", "ea", "oa", "ou"]
_CODAS = ["", "", "", "l", "m", "n", "nd", "nt", "r", "rk", "rn", "s", "st", "t"]
_TABLE = 4096
_NUM_TOPICS = 24
_DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
_SEASONS = ["spring", "summer", "autumn", "winter"]
_NUMBERS = ["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "twenty", "thirty", "forty"]

Draw = Callable[[], float]


@dataclass(frozen=True)
class _Person:
    name: str
    family: str
    pronoun: str
    possessive: str
    trade: str
    home: str
    thing: str
    colour: str


def _zipf_table(words: list[str], exponent: float = 1.0) -> list[str]:
    """`words` repeated in proportion to 1/rank^exponent, so that one uniform draw is one look-up."""
    weights = [1.0 / (rank + 1) ** exponent for rank in range(len(words))]
    total = sum(weights)
    table: list[str] = []
    for word, weight in zip(words, weights, strict=True):
        table.extend([word] * max(1, round(_TABLE * weight / total)))
    return table


class _Lexicon:
    """All invented words, by class; the same in every run."""

    def __init__(self) -> None:
        self._draw = random.Random(_LEXICON_SEED).random
        self._used: set[str] = set()
        self.nouns = self._words(900, 1, 3)
        self.verbs = self._words(420, 1, 2)
        self.adjectives = self._words(320, 2, 2, endings=["ish", "al", "ous", "y", "ful"])
        self.adverbs = self._words(90, 2, 2, endings=["ly"])
        self.names = [word.capitalize() for word in self._words(260, 2, 2, endings=["a", "o", "en", "is"])]
        self.families = [word.capitalize() for word in self._words(200, 2, 2, endings=["son", "er", "man", "wick"])]
        self.places = [word.capitalize() for word in self._words(160, 2, 2, endings=["ton", "ford", "by", "haven"])]
        self.trades = self._words(60, 2, 2, endings=["er", "smith", "wright"])
        self.colours = self._words(16, 1, 1)
        self.topics = [self._topic(topic) for topic in range(_NUM_TOPICS)]

    def _pick(self, items: list[str]) -> str:
        return items[int(self._draw() * len(items))]

    def _words(self, count: int, fewest: int, most: int, endings: list[str] | None = None) -> list[str]:
        words: list[str] = []
        while len(words) < count:
            syllables = fewest + int(self._draw() * (most - fewest + 1))
            word = "".join(self._pick(_ONSETS) + self._pick(_VOWELS) + self._pick(_CODAS) for _ in range(syllables))
            word += self._pick(endings) if endings else ""
            if len(word) > 2 and word not in self._used:
                self._used.add(word)
                words.append(word)
        return words

    def _topic(self, topic: int) -> tuple[list[str], list[str], list[str]]:
        """Zipfian tables of nouns, verbs and adjectives: each topic has its own favourites first, then the common ones."""

        def order(words: list[str]) -> list[str]:
            own = words[topic::_NUM_TOPICS]
            return own[: len(own) // 2] + words[:40] + own[len(own) // 2 :] + words[40:]

        def unique(words: list[str]) -> list[str]:
            return list(dict.fromkeys(words))

        return (
            _zipf_table(unique(order(self.nouns)), 1.1),
            _zipf_table(unique(order(self.verbs)), 1.1),
            _zipf_table(unique(order(self.adjectives)), 1.1),
        )


def _past(verb: str) -> str:
    return verb + ("d" if verb.endswith("e") else "ed")


def _plural(noun: str) -> str:
    return noun + ("es" if noun.endswith(("s", "sh", "th", "z")) else "s")


def _article(word: str) -> str:
    return ("an " if word[0] in "aeiou" else "a ") + word


class SampleText:
    """Documents of the built-in sample.

    Args:
        seed: any int; training and validation use different ones. The lexicon does not depend on it.
    """

    def __init__(self, seed: int) -> None:
        self._lexicon = _lexicon()
        self._seed = seed
        self._draw: Draw = random.Random(seed).random

    def documents(self, count: int) -> Iterator[dict[str, str]]:
        """Yield `count` documents `{"text", "timestamp", "url"}`."""
        for index in range(count):
            text = self._document()
            day, hour = 1 + int(self._draw() * 28), int(self._draw() * 24)
            yield {
                "text": text,
                "timestamp": f"2024-{1 + index % 12:02d}-{day:02d}T{hour:02d}:00:00Z",
                "url": f"sample:{self._seed}/{index:06d}",
            }

    def _pick(self, items: list[str]) -> str:
        return items[int(self._draw() * len(items))]

    def _person(self) -> _Person:
        lexicon = self._lexicon
        name = self._pick(lexicon.names)
        pronoun, possessive = ("she", "her") if name[-1] == "a" else ("he", "his")
        return _Person(
            name,
            self._pick(lexicon.families),
            pronoun,
            possessive,
            self._pick(lexicon.trades),
            self._pick(lexicon.places),
            self._pick(self._nouns),
            self._pick(lexicon.colours),
        )

    def _document(self) -> str:
        self._nouns, self._verbs, self._adjectives = self._lexicon.topics[int(self._draw() ** 2 * _NUM_TOPICS)]
        people = [self._person() for _ in range(1 + int(self._draw() * 3))]
        paragraphs = [" ".join(self._introduction(person) for person in people)]
        for _ in range(2 + int(self._draw() ** 2 * 7)):
            sentences = [self._sentence(people[int(self._draw() * len(people))]) for _ in range(2 + int(self._draw() * 4))]
            sentences.append(self._recall(people[int(self._draw() * len(people))]))
            paragraphs.append(" ".join(sentences))
        return "\n\n".join(paragraphs)

    def _introduction(self, person: _Person) -> str:
        return (
            f"{person.name} {person.family} was {_article(person.trade)} from {person.home}. "
            f"{person.pronoun.capitalize()} kept {_article(person.colour)} {person.thing} in {person.possessive} house."
        )

    def _recall(self, person: _Person) -> str:
        """A sentence whose end is known only from the introduction."""
        kind = int(self._draw() * 5)
        if kind == 0:
            return f"Where did {person.name} come from? {person.name} came from {person.home}."
        if kind == 1:
            return f"What did {person.name} keep? {person.name} kept {_article(person.colour)} {person.thing}."
        if kind == 2:
            return f"In {person.home} everybody knew {person.name} {person.family}."
        if kind == 3:
            return f"As {_article(person.trade)} from {person.home}, {person.name} {person.family} knew that well."
        return f"The {person.colour} {person.thing} still belonged to {person.name} {person.family}."

    def _noun_phrase(self, plural: bool = False) -> str:
        noun = self._pick(self._nouns)
        adjective = f"{self._pick(self._adjectives)} " if self._draw() < 0.4 else ""
        if plural:
            return f"{self._pick(_NUMBERS)} {adjective}{_plural(noun)}"
        return f"the {adjective}{noun}"

    def _sentence(self, person: _Person) -> str:
        verb, kind = self._pick(self._verbs), int(self._draw() * 8)
        if kind == 0:
            return f"On {self._pick(_DAYS)} {person.name} {_past(verb)} {self._noun_phrase()}."
        if kind == 1:
            return f"{person.pronoun.capitalize()} {_past(verb)} {self._noun_phrase(True)} {self._pick(self._lexicon.adverbs)}."
        if kind == 2:
            answer = _past(self._pick(self._verbs))
            return f"When {self._noun_phrase()} {_past(verb)}, {person.name} {answer} {person.possessive} {person.thing}."
        if kind == 3:
            return f"In the {self._pick(_SEASONS)} {self._noun_phrase()} and {self._noun_phrase()} {_past(verb)} near {person.home}."
        if kind == 4:
            return f"{self._noun_phrase(True).capitalize()} {_past(verb)} {self._noun_phrase()} before {person.pronoun} came home."
        if kind == 5:
            return f"{person.name} said that {self._noun_phrase()} was {self._pick(self._adjectives)} and {self._pick(self._adjectives)}."
        if kind == 6:
            return f"There were {self._noun_phrase(True)} in the {self._pick(self._nouns)}, and {person.pronoun} {_past(verb)} them."
        return f"The {person.trade} {_past(verb)} {self._noun_phrase()} with {self._noun_phrase(True)}."


_cache: list[_Lexicon] = []


def _lexicon() -> _Lexicon:
    if not _cache:
        _cache.append(_Lexicon())
    return _cache[0]
