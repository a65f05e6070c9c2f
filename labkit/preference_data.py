"""Pairs of completions, one better than the other: how data/preferences was made.

`build(seed)` is a pure function of its seed, of the files in data/preferences/written and of StoryWorld: the same seed gives the same bytes in
`write_files`. The files in the repository have seed 0. A prompt is the beginning of a story, or a question about one. There are four criteria,
which `preference_judge` checks:

kind: the story goes on with a kind deed, against an unkind one, or against a kind deed by somebody who is not in the story.
coherent: it agrees with what was told, against one that is wrong about a name, a place or an owner, or that makes no sense.
right: the answer is right, against a wrong one that the story makes plausible.
polite: the answer is right and polite, against a wrong or a rude one. All of these are written.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from labkit.files import DATA, write_rows
from labkit.instructions import SPLITS, names_in, places_named, plain_place
from labkit.preference_judge import truth_of, written
from labkit.storybook import Character, Dice, Place, Thing, book, compile_phrasing
from labkit.storyquestions import Question, questions
from labkit.storyworld import Story, Teller, tellers

GENERATED = {"train": 190, "validation": 38, "test": 66}  # pairs of each of kind, coherent and right
WRITTEN_SHARE = {"test": 0.23, "validation": 0.13}  # of each situation's written pairs; the rest is train
LONGEST_PASSAGE = 110  # words; with question and completion that stays under 256 tokens of the course's decoder
TRIES = 60  # draws of the two sides until the chosen one is longer, or shorter, as wanted
AT_ONCE = 500  # questions drawn at once; of most the passage is too long, or names one place only

# What the last event of a beginning is, its name in written/pairs.json, and the verb's roles of who may act and of whom it is about;
# "?" is anybody else who is there.
SITUATIONS = {
    "ask_help": ("help", "B", "A"), "ask_for": ("wants", "B", "A"), "stuck": ("stuck", "?", "A"), "get_lost": ("lost", "?", "A"),
    "feel": ("sad", "?", "A"), "laugh_at": ("mocked", "A", "B"), "leave_out": ("left out", "A", "B"), "refuse": ("refused", "A", "B"),
    "try_fail": ("failed", "?", "A"), "meet": ("met", "B", "A"), "take": ("took", "A", "B"), "tell_lie": ("lied", "A", "B"),
    "show": ("showed", "A", "B"), "lend": ("lent", "A", "B"), "play": ("together", "A", "B"), "build": ("together", "A", "B"),
}  # fmt: skip
SAD = ("sad", "lonely", "worried")
DEEDS = {  # kind and unkind steps for each situation, X acting on Y
    "help": (("agree X Y", "help X Y", "comfort X Y"), ("refuse X Y", "laugh_at X Y", "tell_lie X Y")),
    "wants": (("agree X Y", "lend X Y T", "give X Y T"), ("refuse X Y", "laugh_at X Y", "quarrel X Y")),
    "stuck": (("rescue X Y P", "help X Y", "comfort X Y"), ("laugh_at X Y", "refuse X Y")),
    "lost": (("comfort X Y", "help X Y", "invite X Y H"), ("laugh_at X Y", "refuse X Y", "tell_lie X Y")),
    "sad": (("comfort X Y", "praise X Y", "help X Y"), ("laugh_at X Y", "leave_out X Y", "quarrel X Y")),
    "mocked": (("sorry X Y", "make_up X Y", "comfort X Y", "praise X Y"), ("laugh_at X Y", "leave_out X Y", "quarrel X Y")),
    "left out": (("sorry X Y", "let_join X Y", "comfort X Y"), ("laugh_at X Y", "leave_out X Y", "quarrel X Y")),
    "refused": (("sorry X Y", "comfort X Y", "help X Y"), ("refuse X Y", "laugh_at X Y", "quarrel X Y")),
    "failed": (("teach X Y S", "comfort X Y", "praise X Y"), ("laugh_at X Y", "leave_out X Y")),
    "met": (("praise X Y", "help X Y", "invite X Y H"), ("laugh_at X Y", "leave_out X Y", "quarrel X Y")),
    "took": (("sorry X Y", "make_up X Y", "give_back X Y T"), ("laugh_at X Y", "quarrel X Y", "refuse X Y")),
    "lied": (("sorry X Y", "tell_truth X Y"), ("laugh_at X Y", "quarrel X Y", "tell_lie X Y")),
}
KIND_SORTS = ("plain", "turn", "stranger", "turn", "plain")
COHERENT_SORTS = ("name", "place", "holder")
NEUTRAL = ("play X Y", "praise X Y", "say_bye X Y", "invite X Y H", "thank X Y", "ask_help X Y")


@dataclass(eq=False)
class Beginning:
    """A story that stops at a situation. bound: X, who may act, Y, P, where they are, H, home, and what it is about: T, S or F."""

    teller: Teller
    story: Story
    situation: str
    bound: dict

    @property
    def passage(self) -> str:
        return " ".join(self.story.text.split())


def build(seed: int = 0) -> dict[str, list[dict[str, str]]]:
    """The rows of train, validation and test: id, criterion, source, prompt, chosen, rejected, truth; all of them text, truth as JSON."""
    shared, rows = _share_out(seed), {}
    for number, split in enumerate(SPLITS):
        dice, world = Dice(f"preferences {split} {seed}"), "test" if split == "test" else "train"
        begun = _beginnings(1000 * (seed + 1) + number, world)
        asked = {kind: _asked(kind, 1000 * (seed + 1) + 100 * number, world) for kind in ("where", "who has")}
        spare: list[Beginning] = []
        made = [*_written(shared[split], begun, asked, dice, spare)]
        acted = [one for one in spare if one.situation in DEEDS and one.situation != "met"]
        made += _take(itertools.chain(acted, begun), _kind, dice, GENERATED[split])
        made += _take(itertools.chain((one for one in spare if one not in acted), begun), _coherent, dice, GENERATED[split])
        both = (one for pair in zip(asked["where"], asked["who has"]) for one in pair)
        made += _take(both, _right, dice, GENERATED[split])
        rows[split] = [made.pop(dice.draw(range(len(made)))) for _ in range(len(made))]
        for row in rows[split]:
            row["id"] = f"{row['criterion']}-{split}-{hashlib.sha256(json.dumps(row).encode()).hexdigest()[:8]}"
    return rows


def write_files(folder: Path = DATA / "preferences", seed: int = 0) -> None:
    """Write train.jsonl, validation.jsonl and test.jsonl. Afterwards make data/SHA256SUMS anew."""
    for split, rows in build(seed).items():
        write_rows(folder / f"{split}.jsonl", rows)


def as_messages(row: Mapping[str, str]) -> dict[str, list[dict[str, str]]]:
    """A row as conversations, `{"prompt": [user], "chosen": [assistant], "rejected": [assistant]}`, a shape trl's preference trainers take."""
    speakers = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return {column: [{"role": role, "content": row[column]}] for column, role in speakers.items()}


# The written pairs


def _share_out(seed: int) -> dict[str, dict[str, dict[str, list]]]:
    """Which written pairs are in which split: split -> criterion -> situation or kind of question -> pairs."""
    dice = Dice(f"written preferences {seed}")
    shared: dict = {split: {criterion: {} for criterion in written("pairs")} for split in SPLITS}
    for criterion, situations in written("pairs").items():
        for situation, pairs in situations.items():
            rest = list(pairs)
            for split, share in WRITTEN_SHARE.items():
                shared[split][criterion][situation] = [rest.pop(dice.draw(range(len(rest)))) for _ in range(round(share * len(pairs)))]
            shared["train"][criterion][situation] = rest
    return shared


def _written(pairs: dict, begun: Iterator[Beginning], asked: dict[str, Iterator], dice: Dice, spare: list[Beginning]) -> Iterator[dict[str, str]]:
    """Each written pair on a beginning, or a question, of its own. Beginnings that no pair waits for go to `spare`."""
    waiting = [(criterion, situation, pair) for criterion in ("kind", "coherent") for situation, ps in pairs[criterion].items() for pair in ps]
    while waiting:
        here = next(begun)
        found = next((one for one in waiting if one[1] == here.situation), None)
        if found is None:
            spare.append(here)
        else:
            waiting.remove(found)
            chosen, rejected = (_fill(text, here.bound) for text in found[2])
            yield _row(found[0], "written", _go_on(here, dice), chosen, rejected, truth_of(here.story))
    for kind, ps in pairs["polite"].items():
        for pair, (question, options) in zip(ps, asked[kind]):
            slots, ask = _slots(question, options, dice), written("frames")["ask"][kind]
            chosen, rejected = (_fill(text, slots) for text in pair)
            truth = {"answer": question.answer, "options": options}
            yield _row("polite", "written", f"{_fill(dice.draw(ask), slots)}\n\n{question.passage}", chosen, rejected, truth)


def _fill(text: str, bound: dict) -> str:
    """A written text with its slots filled: characters, things and places in the form the slot asks for, plain words as they are."""
    out = []
    for part in compile_phrasing(text):
        if type(part) is str:
            out.append(part)
            continue
        entity, form = bound[part[0]], part[1]
        if isinstance(entity, Character):
            word = entity.forms[form] if form else entity.name
        elif isinstance(entity, Thing):
            word = f"the {entity.name}"
        else:
            word = getattr(entity, form) if isinstance(entity, Place) else entity
        out.append(word[0].upper() + word[1:] if part[3] else word)
    return "".join(out)


def _row(criterion: str, source: str, prompt: str, chosen: str, rejected: str, truth: dict) -> dict[str, str]:
    row = {"id": "", "criterion": criterion, "source": source, "prompt": prompt, "chosen": chosen, "rejected": rejected}
    return row | {"truth": json.dumps(truth, ensure_ascii=False)}


# Beginnings and questions


def _beginnings(seed: int, split: str) -> Iterator[Beginning]:
    """Beginnings short enough for a prompt, without end, that stop where somebody may do something for somebody."""
    for teller in tellers(seed, split):
        story = teller.story(episodes=1, max_steps=teller.dice.draw((3, 4, 5, 6, 7, 8, 9)))
        event = story.events[-1]
        if event.verb not in SITUATIONS or len(story.text.split()) > LONGEST_PASSAGE:
            continue
        situation, who, whom = SITUATIONS[event.verb]
        about, there = event.bound[whom], story.where.get(event.bound[whom])
        beside = [other for other in story.characters if other is not about and story.where.get(other) is there]
        acting = event.bound[who] if who != "?" else beside[-1] if beside else None
        if acting not in beside or "grownup" in (acting.group, about.group) or not isinstance(there, Place):
            continue
        bound = {role: value for role, value in event.bound.items() if role in "TSF"} | {"X": acting, "Y": about, "P": there, "H": teller.home}
        if "T" in bound and (bound["T"].category == "dish" or story.where.get(bound["T"]) is not (about if situation == "lent" else acting)):
            continue
        if situation != "sad" or bound["F"] in SAD:
            yield Beginning(teller, story, situation, bound)


def _asked(kind: str, seed: int, split: str) -> Iterator[tuple[Question, list[str]]]:
    """Questions without end, on passages that name more than one place, or child or animal, and the possible answers."""
    for one in itertools.chain.from_iterable(questions(AT_ONCE, seed=seed + part, split=split, kinds=(kind,)) for part in itertools.count()):
        one = Question(" ".join(one.passage.split()), one.question, one.answer, kind)
        if len(one.passage.split()) > LONGEST_PASSAGE or (kind == "where" and not plain_place(one)):
            continue
        options = places_named(one.passage) if kind == "where" else names_in(one.passage)
        if one.answer in options and len(options) > 1:
            yield one, options


def _slots(question: Question, options: list[str], dice: Dice) -> dict[str, str]:
    name, asked = re.fullmatch(r"(Where is|Who has) (.*)\?", question.question).groups()
    wrong = dice.draw([option for option in options if option != question.answer])
    return {"who" if name == "Where is" else "thing": asked, "answer": question.answer, "wrong": wrong}


# The pairs from StoryWorld


def _take(source: Iterator, make: Callable, dice: Dice, count: int) -> list[dict[str, str]]:
    """`count` rows; `make` is given one of the source, how many rows there are, and may find that it does not fit."""
    found: list[dict[str, str]] = []
    while len(found) < count:
        row = make(next(source), len(found), dice)
        if row is not None:
            found.append(row)
    return found


def _pair(longer: bool, chosen: Callable[[], str | None], rejected: Callable[[], str | None]) -> tuple[str, str] | None:
    """A chosen and a rejected side, of which the chosen one has more words, or fewer, as wanted: so length tells nothing.

    None if a side cannot be told (None), or if no draw fits; "" is drawn again.
    """
    for _ in range(TRIES):
        one, two = chosen(), rejected()
        if one is None or two is None:
            return None
        if not one or not two:
            continue
        lengths = len(one.split()), len(two.split())
        if lengths[0] != lengths[1] and (lengths[0] > lengths[1]) == longer:
            return one, two
    return None


def _kind(begun: Beginning, number: int, dice: Dice) -> dict[str, str] | None:
    """plain: two kind deeds against two unkind ones. turn: one of each, kind at the end against kind at first. stranger: see `_stranger`."""
    if begun.situation not in DEEDS:
        return None
    sort, longer = KIND_SORTS[number % 5], number // 5 % 2 == 0
    kind, unkind = DEEDS[begun.situation]

    def told(good: bool) -> str | None:
        if sort == "turn":
            steps = [dice.draw(unkind), dice.draw(kind)]
            return _told_on(begun, steps if good else steps[::-1])
        steps = _two(kind if good or sort == "stranger" else unkind, dice)
        return _told_on(begun, steps, _stranger(begun, "X", dice) if sort == "stranger" and not good else None)

    pair = _pair(longer, lambda: told(True), lambda: told(False))
    return pair and _row("kind", "storyworld", _go_on(begun, dice), *pair, truth_of(begun.story))


def _coherent(begun: Beginning, number: int, dice: Dice) -> dict[str, str] | None:
    """name: the same step with a stranger. place, holder: a first sentence that names another place or owner of the story; then a step."""
    sort, longer = COHERENT_SORTS[number % 3], number // 3 % 2 == 0
    step, story = [dice.draw(NEUTRAL)], begun.story
    if sort == "name":
        swap = _stranger(begun, dice.draw("XY"), dice)
        pair = _pair(longer, lambda: _told_on(begun, step), lambda: _told_on(begun, step, swap))
        return pair and _row("coherent", "storyworld", _go_on(begun, dice), *pair, truth_of(story))
    if sort == "place":
        others = [place for place in story.places if place is not begun.bound["P"]]
        facts = [({"X": begun.bound[who], "P": begun.bound["P"]}, {"X": begun.bound[who], "P": other}) for who in "XY" for other in others]
    else:
        held = [(thing, story.where[thing]) for thing in story.things if isinstance(story.where.get(thing), Character)]
        facts = [({"X": who, "T": thing}, {"X": other, "T": thing}) for thing, who in held for other in story.characters if other is not who]
    if not facts:
        return None
    true, false = dice.draw(facts)

    def told(fact: dict) -> str | None:
        then = _told_on(begun, step)
        return then and f"{_fill(dice.draw(written('frames')[sort]), fact)} {then}"

    pair = _pair(longer, lambda: told(true), lambda: told(false))
    return pair and _row("coherent", "storyworld", _go_on(begun, dice), *pair, truth_of(story))


def _right(asked: tuple[Question, list[str]], number: int, dice: Dice) -> dict[str, str] | None:
    """The right answer and a wrong one, each in one of the same frames."""
    question, options = asked
    slots, frames = _slots(question, options, dice), written("frames")
    answers, ask = frames["answer"][question.kind], frames["ask"][question.kind]
    wrong = slots | {"answer": slots["wrong"]}
    pair = _pair(number // 2 % 2 == 0, lambda: _fill(dice.draw(answers), slots), lambda: _fill(dice.draw(answers), wrong))
    prompt = f"{_fill(dice.draw(ask), slots)}\n\n{question.passage}"
    return pair and _row("right", "storyworld", prompt, *pair, {"answer": question.answer, "options": options})


def _two(steps: tuple[str, ...], dice: Dice) -> list[str]:
    first = dice.draw(steps)
    return [first, dice.draw([step for step in steps if step != first])]


def _go_on(begun: Beginning, dice: Dice) -> str:
    return f"{dice.draw(written('frames')['tell'])}\n\n{begun.passage}"


def _stranger(begun: Beginning, role: str, dice: Dice) -> dict[str, Character]:
    """For a role, somebody of the same sort whom the story does not know, told of as if they had always been there."""
    lexicon, instead_of = book().lexicon, begun.bound[role]
    names = lexicon["animal_names"] if instead_of.group == "animal" else lexicon["girls" if instead_of.she else "boys"]
    here = {who.name for who in begun.story.characters}
    return {role: Character(dice.draw([name for name in names if name not in here]), instead_of.kind, instead_of.she)}


def _told_on(begun: Beginning, steps: list[str], swap: dict[str, Character] | None = None) -> str | None:
    """How the narrator tells these steps after the beginning; afterwards the narrator forgets them.

    swap: a stranger in the place of a role; "" if the telling happens not to name them. None if the steps cannot happen.
    """
    teller, bound = begun.teller, begun.bound | (swap or {})
    kept = dict(vars(teller))
    for name, value in kept.items():
        if isinstance(value, (list, dict, set)):
            setattr(teller, name, value.copy())
    teller.sentences, teller.spent = [], {key: set(used) for key, used in kept["spent"].items()}
    for role, character in (swap or {}).items():
        teller.where[character] = teller.where[begun.bound[role]]
        for thing in [thing for thing, holder in teller.where.items() if holder is begun.bound[role]]:
            teller.where[thing] = character
        teller.mentioned.append(character)
    try:
        for step in steps:
            verb, *words = step.split()
            roles = dict(zip(book().verbs[verb].roles, (bound[word] for word in words)))
            if not all(teller.holds(roles[one], relation, roles.get(other)) for one, relation, other in book().verbs[verb].needs):
                return None
            teller._step((verb, *words), bound)
        text = " ".join(" ".join(teller.sentences).split())
        return text if all(character.name in text for character in (swap or {}).values()) else ""
    finally:
        vars(teller).update(kept)
