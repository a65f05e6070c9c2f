"""The book of StoryWorld: its characters, things and places, its dice, and the plots, verbs and words read from data/storyworld."""

from __future__ import annotations

import functools
import json
import math
import random
import re
from dataclasses import dataclass

from labkit.files import DATA

PRONOUNS = {True: ("she", "her", "her", "herself"), False: ("he", "him", "his", "himself")}
FORMS = ("he", "him", "his", "self")


@dataclass(eq=False)
class Character:
    """A person or animal of a story. `kind` is girl, boy, a species or grownup; `call` how a grown-up of the family is called."""

    name: str
    kind: str
    she: bool
    introductions: tuple[str, ...] = ()
    call: str = ""

    @property
    def group(self) -> str:
        """What plots ask for: child, animal or grownup."""
        return {"girl": "child", "boy": "child", "grownup": "grownup"}.get(self.kind, "animal")

    def __post_init__(self):
        self.forms = dict(zip(FORMS, PRONOUNS[self.she])) | {"s": self.name + "'s", "name": self.call or self.name}
        self.forms |= {"He": self.forms["he"].capitalize(), "His": self.forms["his"].capitalize()}


@dataclass(eq=False)
class Thing:
    """A thing that can be held, given, lost and found. `adjective` is chosen when the story first needs one."""

    name: str
    category: str
    adjectives: tuple[str, ...]
    adjective: str = ""


@dataclass(eq=False)
class Place:
    """A place with the phrases for being there and for going there."""

    name: str
    category: str
    at: str
    to: str


class Dice:
    """A random source that adds up the information in its choices. Only `random.random` is used, which is the same in every Python."""

    def __init__(self, seed: str):
        self._random = random.Random(seed).random
        self.bits = 0.0

    def draw(self, options):
        """One of the options, each as likely as the others; its bits are not counted."""
        return options[int(self._random() * len(options))]

    def choose(self, options):
        """One of the options, each as likely as the others."""
        self.bits += math.log2(len(options))
        return options[int(self._random() * len(options))]

    def chance(self, probability: float) -> bool:
        """True with the given probability."""
        happens = self._random() < probability
        self.bits -= math.log2(probability if happens else 1 - probability)
        return happens


@dataclass(frozen=True)
class Verb:
    """roles: letters of its arguments; needs and effects: (subject, relation, object) letters; phrasings and gist: compiled."""

    roles: tuple[str, ...]
    needs: tuple[tuple[str, str, str], ...]
    effects: tuple[tuple[str, str, str], ...]
    gist: tuple
    phrasings: dict[str, tuple]  # by feeling for `feel`, under "" for all others


@dataclass(frozen=True)
class Book:
    """Everything in data/storyworld, compiled."""

    verbs: dict[str, Verb]
    plots: dict[str, dict]
    lexicon: dict
    asides: dict[str, tuple]
    openings: dict[str, tuple]
    closings: dict[str, tuple]
    likes: tuple
    links: tuple
    times: tuple[str, ...]


SLOT = re.compile(r"\{([^{}]+)\}")
SENTENCE_START = re.compile(r'(^|[.!?] |[.]" |(^|[\s])")$')  # after `!" ` and `?" ` comes who said it


def compile_phrasing(text: str) -> tuple:
    """A phrasing as literals and slots: a slot is (role, form, article, start), role "+" a list; article: a or an goes before it."""
    parts: list = []
    end = 0
    for match in SLOT.finditer(text):
        literal, slot = text[end : match.start()], match[1]
        start = bool(SENTENCE_START.search(text[: match.start()]))
        role, form = ("+", slot[1:]) if slot.startswith("+") else (slot.split("_")[0], slot.partition("_")[2])
        article = re.search(r"(?:^|(?<=[\s\"]))(a|A|an|An) $", literal) if role in ("+", "kind", "trait") else None
        if article:
            literal = literal[: article.start()]
        if literal:
            parts.append(literal)
        parts.append((role, form, article[1][0] if article else "", start))
        end = match.end()
    if text[end:]:
        parts.append(text[end:])
    return tuple(parts)


def compile_steps(steps: list) -> tuple:
    """Plot steps: ("do", optional, words) or ("either", branches)."""
    compiled = []
    for step in steps:
        if isinstance(step, dict):
            compiled.append(("either", False, tuple(compile_steps(branch) for branch in step["either"])))
        else:
            compiled.append(("do", step.startswith("?"), tuple(step.lstrip("?").split())))
    return tuple(compiled)


def _facts(facts: list[str]) -> tuple[tuple[str, str, str], ...]:
    return tuple((*fact.split(), "")[:3] for fact in facts)


@functools.cache
def book() -> Book:
    """Read and compile data/storyworld, once."""

    def read(name: str):
        return json.loads((DATA / "storyworld" / f"{name}.json").read_text(encoding="utf-8"))

    def each(texts: list[str]) -> tuple:
        return tuple(compile_phrasing(text) for text in texts)

    verbs = {}
    for name, verb in (read("verbs_things") | read("verbs_people")).items():
        phrasings = verb["phrasings"] if isinstance(verb["phrasings"], dict) else {"": verb["phrasings"]}
        compiled = {key: each(texts) for key, texts in phrasings.items()}
        verbs[name] = Verb(
            tuple(verb["roles"].split()), _facts(verb["needs"]), _facts(verb["effects"]), compile_phrasing(verb.get("gist") or ""), compiled
        )
    plots = {
        name: {"roles": plot["roles"]} | {part: compile_steps(plot[part]) for part in ("steps", "happy", "unhappy")}
        for name, plot in read("plots").items()
    }
    asides = read("asides")
    return Book(
        verbs=verbs,
        plots=plots,
        lexicon=read("lexicon"),
        asides={kind: each(asides[kind] + asides["any"]) for kind in ("outdoor", "indoor", "water", "wild")},
        openings={kind: each(texts) for kind, texts in asides["openings"].items()},
        closings={kind: each(texts) for kind, texts in asides["closings"].items()},
        likes=each(asides["likes"]),
        links=each(asides["links"]),
        times=tuple(asides["times"]),
    )


def with_article(word: str, article: str = "a") -> str:
    """`word` with a or an before it, by its first letter."""
    vowel = word[0].lower() in "aeiou" and not word.lower().startswith(("uni", "use", "one", "eu"))
    return f"{article}{'n' * vowel} {word}"
