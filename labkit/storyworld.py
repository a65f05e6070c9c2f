"""StoryWorld: a small world that writes stories for children, and knows what is true in them.

A *plot* is a list of steps. A step is a *verb* with its arguments, and a verb has needs and effects on the state of the world, as an action has
in STRIPS (Fikes and Nilsson 1971): giving needs that the giver has the thing and that both are in the same place, and afterwards the other
one has it. The narrator finds words for each step among many phrasings. Plots, verbs and words are data, in data/storyworld/.

    for story in stories(3, seed=1):
        print(story.text, f"{story.bits:.0f} bits")

Same seed, same text, on every machine. `storyquestions` asks about the stories and judges how they are continued.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from labkit.storybook import Character, Dice, Place, Thing, book, with_article

SPLITS = ("train", "test")
HELD_OUT_SHARE = 10  # one in ten combinations of hero, thing and plot is told in test only


class PlotError(ValueError):
    """A plot asks for something that cannot happen in the world's present state."""


@dataclass
class Event:
    """Something that happened: a verb and what it was about, and the gist, a clause such as `Tom lost the ball`."""

    verb: str
    bound: dict
    gist: str


@dataclass
class Story:
    """A story and what is true at its end.

    bits: the entropy of the choices that made this text, in bits: -log2 of their probability. It bounds the text's own entropy from above,
    closely, because a choice is counted only when it shows in the text; two different choices may still give the same words.
    where: character or thing -> the place it is at, or who has it. feels: character -> (feeling, the clause that says why).
    """

    text: str
    bits: float
    ending: str
    hero: Character
    plots: tuple[str, ...]
    characters: list[Character]
    things: list[Thing]
    places: list[Place]
    where: dict
    feels: dict
    events: list[Event]


def stories(n: int, seed: int = 0, *, split: str = "train", ending: str | None = None) -> list[Story]:
    """n stories. Combinations of hero, thing and plot that appear in split "test" never appear in "train".

    ending: "happy", "unhappy", or None for either (happy in seven of ten). A longer list begins with the shorter one.
    Raises ValueError for an unknown split or ending, or a negative n.
    """
    if n < 0:
        raise ValueError(f"n is {n}: ask for 0 stories or more")
    teller_of = tellers(seed, split, ending)
    return [next(teller_of).story() for _ in range(n)]


def tellers(seed: int, split: str = "train", ending: str | None = None, recaps: float = 0.0) -> Iterator[Teller]:
    """An endless row of tellers, one a story, all drawing from one random source. recaps: see Teller."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}: choose one of {', '.join(SPLITS)}")
    if ending not in (None, "happy", "unhappy"):
        raise ValueError(f"ending is {ending!r}: choose 'happy', 'unhappy' or None")
    if not 0 <= recaps <= 1:
        raise ValueError(f"recaps is {recaps}: give a probability, 0 to 1")
    dice = Dice(f"storyworld {split} {seed}")
    while True:
        yield Teller(dice, split, ending, recaps)


def held_out(hero: str, thing: str, plot: str) -> bool:
    """Whether this combination is told in split "test" only."""
    return zlib.crc32(f"{hero}|{thing}|{plot}".encode()) % HELD_OUT_SHARE == 0


@dataclass
class Teller:
    """Tells one story: chooses hero and plots, keeps the world's state, finds the words. recaps: how often a reminder of it follows an event."""

    dice: Dice
    split: str = "train"
    ending: str | None = None
    recaps: float = 0.0
    sentences: list[str] = field(default_factory=list)
    where: dict = field(default_factory=dict)
    feels: dict = field(default_factory=dict)
    broken: set = field(default_factory=set)
    events: list[Event] = field(default_factory=list)
    mentioned: list = field(default_factory=list)

    def __post_init__(self):
        self.book = book()
        self.dice.bits = 0.0
        self.owed: dict = {}  # entity -> bits of its choice, counted when it is first mentioned
        self.used_names: set[str] = set()
        self.hero = None
        self.spent: dict[str, set[int]] = {}  # phrasings that this story has used
        self.subject = None
        self.around: list = []  # characters of the last phrasing
        self.time = False
        self.moved: dict = {}  # entities that an event has moved, for recaps
        self.steps_left = math.inf

    # Choosing what the story is about

    def story(self, *, episodes: int | None = None, max_steps: int | None = None) -> Story:
        """A whole story; with max_steps it stops after so many steps, before its end (for questions)."""
        self.hero = self._character("child" if self.dice.chance(0.7) else "animal")
        self.home = Place("home", "indoor", "at home", "home")
        if episodes is None:
            episodes = 2 if self.dice.chance(0.2) else 1
        self.steps_left = math.inf if max_steps is None else max_steps
        self._opening()
        names: list[str] = []
        friend = None
        for number in range(episodes):
            last = number == episodes - 1
            plot, bound = self._plan(names, friend)
            names.append(plot)
            if number:
                self._new_paragraph()
                self._tell(self.book.links, {"A": self.hero}, "links")
            self.where[self.hero] = self.home
            self._steps(self.book.plots[plot]["steps"], bound)
            ending = self.ending if last and self.ending else "happy" if self.dice.chance(0.7) else "unhappy"
            self._new_paragraph()
            self._steps(self.book.plots[plot][ending], bound)
            friend = bound.get("B")
        if self.steps_left > 0 and self.dice.chance(0.8):
            self._tell(self.book.closings[ending], {"A": self.hero}, "closings")
        text = " ".join(self.sentences).replace(" \n\n ", "\n\n").strip()
        kinds = {kind: [entity for entity in self.mentioned if isinstance(entity, kind)] for kind in (Character, Thing, Place)}
        return Story(
            text, self.dice.bits, ending, self.hero, tuple(names), kinds[Character], kinds[Thing], kinds[Place], self.where, self.feels, self.events
        )

    def _opening(self) -> None:
        traits = self.book.lexicon["child_traits"]
        bound = {"A": self.hero, "kind": self.hero.kind, "trait": self._owe(self.dice.draw(traits), len(traits))}
        self._count(self.hero)
        self.where[self.hero] = self.home
        self._tell(self.book.openings[self.hero.group], bound, "openings")
        if self.dice.chance(0.5):
            self._tell(self.book.likes, bound, "likes")

    def _plan(self, before: list[str], friend: Character | None) -> tuple[str, dict]:
        """A plot and its roles: a combination that belongs to this split."""
        fitting = [name for name, plot in self.book.plots.items() if self.hero.group in plot["roles"]["A"].split("|") and name not in before]
        names, owed, bits = set(self.used_names), dict(self.owed), self.dice.bits
        while True:
            plot = self.dice.choose(fitting)
            bound = self._bind(self.book.plots[plot]["roles"], friend)
            thing = bound["T"].name if "T" in bound else ""
            if held_out(self.hero.name, thing, plot) == (self.split == "test"):
                return plot, bound
            self.used_names, self.owed, self.dice.bits = set(names), dict(owed), bits

    def _bind(self, roles: dict[str, str], friend: Character | None) -> dict:
        bound: dict = {"A": self.hero, "H": self.home}
        for role, kinds in roles.items():
            options = kinds.split("|")
            if role in "AH":
                continue
            if role == "B" and friend is not None and friend.group in options and self.dice.chance(0.6):
                bound[role] = friend
            elif role in "BC":
                bound[role] = self._character(self.dice.choose(options) if len(options) > 1 else options[0])
                if role == "C":
                    self.where[bound[role]] = self.home
            elif role in "TU":
                rows = [(noun, kind, adjectives) for kind in options for noun, adjectives in self.book.lexicon["things"][kind]]
                noun, kind, adjectives = self._unused(rows)
                bound[role] = self._owe(Thing(noun, kind, tuple(adjectives)), len(rows))
            elif role in "PQ":
                rows = [(noun, kind, at, to) for kind in options for noun, at, to in self.book.lexicon["places"][kind]]
                bound[role] = self._owe(Place(*self._unused(rows)), len(rows))
            else:
                words = self.book.lexicon["scares" if options == ["scare"] else "skills"]
                bound[role] = self._owe(self.dice.draw(words), len(words))
        return bound

    def _character(self, kind: str) -> Character:
        lexicon = self.book.lexicon
        if kind == "grownup":
            family = self.dice.draw((True, True, True, False))
            rows = [(grown["call"], grown) for grown in lexicon["grownups"] if grown["kin"] == family]
            row = self._unused(rows)[1]
            if family:
                made = Character(f"{self.hero.forms['his']} {row['call']}", "grownup", row["she"], call=row["call"].capitalize())
            else:
                made = Character(row["call"], "grownup", row["she"], introductions=(f"{row['call']} {row['is']}",))
            return self._owe(made, len(rows) / (0.75 if family else 0.25))
        she = self.dice.draw((True, False))
        if kind == "child":
            names, word, kinds = lexicon["girls" if she else "boys"], "girl" if she else "boy", 1
        else:
            names, word, kinds = lexicon["animal_names"], self.dice.draw(lexicon["animals"]), len(lexicon["animals"])
        name = self._unused([(name,) for name in names])[0]
        introductions = (f"{with_article(word)} named {name}", f"{with_article(word)} called {name}")
        if self.hero is not None:
            introductions += (f"{self.hero.forms['his']} friend {name}",)
        return self._owe(Character(name, word, she, introductions), len(names) * kinds * 2)

    def _unused(self, rows: list[tuple]) -> tuple:
        """A row whose first entry, its name, this story has not used."""
        while True:
            row = self.dice.draw(rows)
            if row[0] not in self.used_names:
                self.used_names.add(row[0])
                return row

    def _owe(self, entity, options: float):
        self.owed[entity] = math.log2(options)
        return entity

    def _count(self, entity) -> None:
        """The entity is mentioned: from now on its choice is part of the text."""
        self.dice.bits += self.owed.pop(entity, 0.0)
        if entity not in self.mentioned:
            self.mentioned.append(entity)

    # The world, step by step

    def _steps(self, steps: tuple, bound: dict) -> None:
        for kind, optional, content in steps:
            if self.steps_left <= 0:
                return
            if kind == "either":
                self._steps(self.dice.choose(content), bound)
            elif not optional or self.dice.chance(0.5):
                self._step(content, bound)

    def _step(self, words: tuple[str, ...], bound: dict) -> None:
        name = words[0]
        if name == "say_time":
            self.time = True
            self._new_paragraph()
            return
        if name == "aside":
            place = bound[words[1]]
            self._tell(self.book.asides[place.category], {"P": place}, f"aside {place.category}")
            return
        verb = self.book.verbs[name]
        roles = {letter: bound.get(word, word) for letter, word in zip(verb.roles, words[1:])}
        for subject, relation, other in verb.needs:
            if not self.holds(roles[subject], relation, roles.get(other)):
                raise PlotError(f"{' '.join(words)}: needs that {subject} {relation} {other}, and this is not so")
        feeling = ""
        if name == "feel":
            feeling = roles["F"]
            cause = next((event for event in reversed(self.events) if event.gist), None)
            roles["cause"] = self._gist(cause, self_of=roles["A"]) if cause else ""
            self.feels[roles["A"]] = (feeling, roles["cause"])
        for subject, relation, other in verb.effects:
            self._apply(roles[subject], relation, roles.get(other))
        phrasings = verb.phrasings[feeling]
        if name == "feel" and not roles["cause"]:
            phrasings = tuple(p for p in phrasings if not any(part[0] == "cause" for part in p if type(part) is tuple))
        self._tell(phrasings, roles, f"{name} {feeling}")
        self.events.append(Event(name, roles, ""))
        self.events[-1].gist = self._gist(self.events[-1]) if name != "feel" else ""
        if self.recaps:
            self._recap([roles[other if relation == "has" else subject] for subject, relation, other in verb.effects if relation in ("at", "has")])
        self.steps_left -= 1

    def _recap(self, moved: list) -> None:
        """Perhaps say where an entity is that an event has moved, this one or one before."""
        self.moved.update(dict.fromkeys(moved))
        known = [entity for entity in self.moved if entity in self.mentioned and self.where.get(entity) in (*self.mentioned, self.home)]
        if not known or not self.dice.chance(self.recaps):
            return
        where = self.where[entity := self.dice.choose(known)]
        at, roles = ("recap_at", "AP") if isinstance(entity, Character) else ("recap_lies", "TP")
        name, roles = ("recap_has", "TA") if isinstance(where, Character) else (at, roles)
        self._tell(self.book.verbs[name].phrasings[""], dict(zip(roles, (entity, where))), name)

    def _new_paragraph(self) -> None:
        if self.sentences and self.sentences[-1] != "\n\n":
            self.sentences.append("\n\n")
            self.subject = None

    def holds(self, subject, relation: str, other) -> bool:
        """Whether a fact is true now: at, has, with, broken."""
        if relation == "at":
            return self.where.get(subject) is other
        if relation == "has":
            return self.where.get(other) is subject
        if relation == "with":
            return self.where.get(subject) is not None and self.where.get(subject) is self.where.get(other)
        if relation == "broken":
            return subject in self.broken
        raise PlotError(f"no relation {relation!r}: use at, has, with or broken")

    def _apply(self, subject, relation: str, other) -> None:
        if relation == "at":
            self.where[subject] = other
        elif relation == "has":
            self.where[other] = subject
        elif relation == "gone":
            self.where.pop(subject, None)
        elif relation == "broken":
            self.broken.add(subject)
        elif relation == "mended":
            self.broken.discard(subject)
        elif relation != "feels":
            raise PlotError(f"no effect {relation!r}: use at, has, gone, broken, mended or feels")

    # Finding words

    def _tell(self, phrasings: tuple, bound: dict, key: str) -> None:
        """Render one of the phrasings, one that this story has not used yet if there is one."""
        used = self.spent.setdefault(key, set())
        phrasing = self.dice.choose([phrasing for phrasing in phrasings if id(phrasing) not in used] or phrasings)
        used.add(id(phrasing))
        self.now: list = []
        text = self.render(phrasing, bound)
        if self.time and text[0] != '"':
            names = {word for entity in self.now if isinstance(entity, Character) for word in entity.name.split()[:1]}
            first = text.split(maxsplit=1)[0].strip(",.").removesuffix("'s")
            text = f"{self.dice.choose(self.book.times)} {text if first in names or first == 'I' else text[0].lower() + text[1:]}"
            self.time = False
        self.around = self.now
        self.subject = self.now[0] if self.now else None
        self.sentences.append(text)

    def render(self, phrasing: tuple, bound: dict) -> str:
        """A compiled phrasing as text, its roles filled in."""
        out: list[str] = []
        for part in phrasing:
            if type(part) is str:
                out.append(part)
                continue
            role, form, article, start = part
            word = self.dice.choose(self.book.lexicon["lists"][form]) if role == "+" else self._mention(bound[role], form, leading=not out)
            if article:
                word = with_article(word, article)
            out.append(word[0].upper() + word[1:] if start else word)
        return "".join(out)

    def _mention(self, entity, form: str, leading: bool) -> str:
        first = entity not in self.mentioned
        self._count(entity)
        if isinstance(entity, Character):
            if entity not in self.now:
                self.now.append(entity)
            if form:
                return entity.forms[form]
            if first and entity.introductions:
                return self.dice.choose(entity.introductions)
            others = [other for other in self.around if other is not entity and other.she == entity.she]
            if leading and entity is self.subject and not others and self.dice.chance(0.5):
                return entity.forms["he"]
            return entity.name
        if isinstance(entity, Thing):
            if form in ("noun", "it"):
                return entity.name if form == "noun" else "it"
            if form == "a" or (form == "" and first):
                if not entity.adjective and self.dice.chance(0.6):
                    entity.adjective = self.dice.choose(entity.adjectives)
                return with_article(f"{entity.adjective} {entity.name}".strip())
            return f"the {entity.adjective} {entity.name}" if entity.adjective and self.dice.chance(0.2) else f"the {entity.name}"
        if isinstance(entity, Place):
            return entity.at if form == "at" else entity.to if form == "to" else f"the {entity.name}"
        return str(entity)

    def _gist(self, event: Event, self_of: Character | None = None) -> str:
        """The event as a clause, by names only; its first character as a pronoun if that is `self_of`. Uses no dice."""
        words = []
        for part in self.book.verbs[event.verb].gist:
            if type(part) is str:
                words.append(part)
                continue
            entity, form = event.bound[part[0]], part[1]
            if entity is self_of and form in ("", "name"):
                words.append(entity.forms["him" if words else "he"])
            elif isinstance(entity, Character):
                words.append(entity.forms[form] if form and form != "name" else entity.name)
            elif isinstance(entity, Thing):
                words.append(with_article(entity.name) if form == "a" else entity.name if form == "noun" else f"the {entity.name}")
            elif isinstance(entity, Place):
                words.append(entity.at if form == "at" else entity.to if form == "to" else f"the {entity.name}")
            else:
                words.append(str(entity))
        return "".join(words)
