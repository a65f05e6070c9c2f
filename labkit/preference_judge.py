"""A judge of completions that no training has touched: rules, held against what is true in StoryWorld's story.

It scores the pairs of data/preferences and, in lab 10, what a model wrote. `judge(row, completion)` is 1 or 0.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping

from labkit.files import DATA
from labkit.storybook import Character, Place, Thing, book
from labkit.storyquestions import judge as judge_story
from labkit.storyworld import Story

CRITERIA = ("kind", "coherent", "right", "polite")
KIND = (
    "help", "agree", "comfort", "praise", "sorry", "forgive", "thank", "keep_promise", "tell_truth", "bandage", "rescue", "show_way", "teach",
    "invite", "let_join", "make_up", "give", "lend", "give_back", "share", "feed",
)  # fmt: skip
UNKIND = ("refuse", "laugh_at", "leave_out", "quarrel", "tell_lie", "take", "scold", "break_promise", "not_come")


@functools.cache
def written(name: str) -> dict:
    """A file of data/preferences/written: pairs, frames or lexicon."""
    return json.loads((DATA / "preferences" / "written" / f"{name}.json").read_text(encoding="utf-8"))


def judge(row: Mapping[str, str], completion: str) -> int:
    """1 if a completion of this row's prompt meets the row's criterion, else 0. Only `criterion` and `truth` of the row are read.

    kind: every name in it belongs to the story or is introduced, and the last deed it tells is a kind one (`deeds`).
    coherent: it names somebody of the story, no stranger, and its first sentence is not wrong about a place or an owner.
    right, polite: of the answers that the story makes plausible it names the right one last, and it is not rude by the lexicon.
    Raises ValueError for an unknown criterion.
    """
    truth, criterion = json.loads(row["truth"]), row["criterion"]
    if criterion not in CRITERIA:
        raise ValueError(f"criterion is {criterion!r}: choose one of {', '.join(CRITERIA)}")
    if criterion in ("right", "polite"):
        named = {option: _last_place(option, completion) for option in truth["options"]}
        right = named[truth["answer"]] >= 0 and max(named, key=named.__getitem__) == truth["answer"]
        return int(right and not _lexicon("rude").search(completion))
    for name in truth["who"]:  # "her uncle" at the beginning of a sentence
        completion = completion.replace(name[0].upper() + name[1:], name)
    named = _names(completion)
    if named - set(truth["who"]):
        return 0
    if criterion == "coherent":
        return int(bool(named) and judge_story(story_of(truth), completion).consistent)
    told = deeds(completion)
    return int(bool(told) and told[-1])


def deeds(text: str) -> list[bool]:
    """The deeds that a text tells, in its order: True for a kind one.

    A sentence of StoryWorld is known by its phrasing (the verbs of KIND and UNKIND). In any other the words of the lexicon decide.
    """
    told: list[tuple[int, int, bool]] = []
    for pattern, kind in _phrasings():
        spans = [match.span() for match in pattern.finditer(text)]
        told += [(*span, kind) for span in spans if not any(span[0] < end and start < span[1] for start, end, _ in told)]
    sentences = [(start, end) for start, end, _ in told]
    for side in ("kind", "unkind"):
        for match in _lexicon(side).finditer(text):
            if not any(start <= match.start() < end for start, end in sentences):
                told.append((*match.span(), side == "kind"))
    return [kind for _, _, kind in sorted(told)]


def truth_of(story: Story) -> dict:
    """What the judge must know of a story: where each character is, who has each thing, and the places, by their names."""
    at = {who.name: getattr(story.where.get(who), "at", "") for who in story.characters}
    has = {thing.name: story.where[thing].name if isinstance(story.where.get(thing), Character) else "" for thing in story.things}
    return {"who": at, "things": has, "places": [place.at for place in story.places]}


def story_of(truth: dict) -> Story:
    """The reverse of `truth_of`, as far as it goes: a story without text or events."""
    places = {at: Place(at, "", at, "") for at in truth["places"]}
    people = {name: Character(name, "", True) for name in truth["who"]}
    things = {name: Thing(name, "", ()) for name in truth["things"]}
    where: dict = {people[name]: places[at] for name, at in truth["who"].items() if at in places}
    where |= {things[name]: people[owner] for name, owner in truth["things"].items() if owner in people}
    return Story("", 0.0, "", None, (), [*people.values()], [*things.values()], [*places.values()], where, {}, [])


def _names(text: str) -> set[str]:
    """The names of children and animals in a text that it does not introduce. ("called Tom" may say who called.)

    Names are those of StoryWorld, and others that are common in stories for children.
    """
    lexicon = book().lexicon
    known = {*lexicon["girls"], *lexicon["boys"], *lexicon["animal_names"], *written("lexicon")["names"]}
    introduced = re.findall(r"\b(?:[Aa]n? (?:\w+ )*(?:named|called)|friend) ([A-Z]\w+)", text)
    return {word for word in re.findall(r"[A-Z]\w+", text) if word in known} - set(introduced)


@functools.cache
def _phrasings() -> list[tuple[re.Pattern, bool]]:
    """Every phrasing of a deed, with anything short in the place of its slots, and whether it is kind; those with most words of their own first."""
    found = [(phrasing, verb in KIND) for verb in (*KIND, *UNKIND) for phrasing in book().verbs[verb].phrasings[""]]
    found.sort(key=lambda one: -sum(len(part) for part in one[0] if type(part) is str))
    return [(re.compile("".join(re.escape(p) if type(p) is str else r"[\w' -]{1,40}?" for p in phrasing)), kind) for phrasing, kind in found]


@functools.cache
def _lexicon(name: str) -> re.Pattern:
    return re.compile("|".join(rf"(?<!\w)(?:{words})" for words in written("lexicon")[name]), re.IGNORECASE)


def _last_place(option: str, text: str) -> int:
    """Where an answer is named last, ignoring case; -1 if it is not."""
    return max((match.start() for match in re.finditer(rf"\b{re.escape(option)}\b", text, re.IGNORECASE)), default=-1)
