"""The written tasks of data/instructions: each function makes the items of one task from the word lists in data/instructions/written."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from labkit.files import DATA
from labkit.storybook import Dice, with_article

DRAWN = 190  # items of a task that has more than could be listed


@dataclass(frozen=True)
class Item:
    """What a phrasing is filled with, and the answer.

    key: rows with the same key are of the same item; side: what is balanced, the answer if nothing is named; general: whether an item
    that train never saw can be answered from the others (a plural by rule), or must have been learned before (an opposite).
    """

    slots: dict[str, str]
    answer: str
    key: str
    input: str = ""
    side: str = ""
    general: bool = True

    def __post_init__(self):
        if not self.side:
            object.__setattr__(self, "side", self.answer)


@functools.cache
def written(name: str) -> dict:
    """A file of data/instructions/written: phrasings, words or remarks."""
    return json.loads((DATA / "instructions" / "written" / f"{name}.json").read_text(encoding="utf-8"))


def shuffled(dice: Dice, items: Sequence) -> list:
    """The items in random order. (`random.shuffle` may change from one Python to the next.)"""
    rest, out = list(items), []
    while rest:
        position = dice.draw(range(len(rest)))
        rest[position], rest[-1] = rest[-1], rest[position]
        out.append(rest.pop())
    return out


def _some(dice: Dice, words: Sequence[str], count: int) -> list[str]:
    return shuffled(dice, words)[:count]


def _distinct(make: Callable[[int], Item]) -> list[Item]:
    """DRAWN items with different keys; `make` is given how many there are."""
    found: dict[str, Item] = {}
    while len(found) < DRAWN:
        item = make(len(found))
        found.setdefault(item.key, item)
    return list(found.values())


def _opposite(words: dict, dice: Dice) -> list[Item]:
    return [Item({"word": word}, opposite, word, general=False) for word, opposite in words["opposites"]]


def _plural(words: dict, dice: Dice) -> list[Item]:
    return [Item({"word": one}, many, one, general=sort == "rule") for sort, pairs in words["plurals"].items() for one, many in pairs]


def _past(words: dict, dice: Dice) -> list[Item]:
    return [Item({"word": now}, then, now, general=sort == "rule") for sort, pairs in words["pasts"].items() for now, then in pairs]


def _odd_one_out(words: dict, dice: Dice) -> list[Item]:
    def make(number: int) -> Item:
        same, other = _some(dice, list(words["kinds"]), 2)
        odd = dice.draw(words["kinds"][other]["words"])
        shown = shuffled(dice, [*_some(dice, words["kinds"][same]["words"], 3), odd])
        return Item({}, odd, " ".join(sorted(shown)), ", ".join(shown))

    return _distinct(make)


def _first_and_last(words: dict, dice: Dice) -> list[Item]:
    everything = [word for kind in words["kinds"].values() for word in kind["words"]]

    def make(number: int) -> Item:
        shown, which = _some(dice, everything, dice.draw((3, 4, 5))), dice.draw(("first", "last"))
        return Item({"which": which}, shown[0 if which == "first" else -1], " ".join(sorted(shown)), ", ".join(shown))

    return _distinct(make)


def _sentiment(words: dict, dice: Dice) -> list[Item]:
    single = [Item({}, feeling, word, word, general=False) for feeling, listed in words["feel"].items() for word in listed]
    return single + [Item({}, feeling, remark, remark) for feeling, remarks in written("remarks").items() for remark in remarks]


def _sort_words(words: dict, dice: Dice) -> list[Item]:
    def make(number: int) -> Item:
        shown = _some(dice, words["alphabet"], 3)
        return Item({}, ", ".join(sorted(shown)), " ".join(sorted(shown)), ", ".join(shown))

    return _distinct(make)


def _sort_numbers(words: dict, dice: Dice) -> list[Item]:
    def make(number: int) -> Item:
        shown = _some(dice, range(1, 21), 3)
        answer = ", ".join(map(str, sorted(shown)))
        return Item({}, answer, answer, ", ".join(map(str, shown)))

    return _distinct(make)


def _count(words: dict, dice: Dice) -> list[Item]:
    def make(number: int) -> Item:
        count = 2 + number % 9
        shown = _some(dice, words["kinds"]["animal"]["words"], count)
        return Item({}, words["rows"]["number"][count - 1], " ".join(sorted(shown)), ", ".join(shown))

    return _distinct(make)


def _yes_or_no(words: dict, dice: Dice) -> list[Item]:
    """Of each word: is it of its own kind, and is it of another. The reason says what it is."""
    found = []
    for kind, row in words["kinds"].items():
        for word in row["words"]:
            name = word if kind in words["bare_kinds"] else with_article(word)
            others = _some(dice, [other for other in words["kinds"] if other != kind], 2)
            for asked in (kind, *others):
                question = f"Is {name} {words['kinds'][asked]['is']}?"
                side = "yes" if asked == kind else "no"
                found.append(Item({"question": question}, f"{side.capitalize()}, {name} is {row['is']}.", question, side=side))
    return found


def _rhyme(words: dict, dice: Dice) -> list[Item]:
    """Every pair of rhyming words, asked both ways, each with two words that do not rhyme."""
    found = []
    for family in words["rhymes"]:
        others = [word for other in words["rhymes"] if other is not family for word in other]
        for one, two in itertools.permutations(family, 2):
            shown = shuffled(dice, [two, *_some(dice, others, 2)])
            found.append(Item({"word": one}, two, " ".join(sorted((one, two))), ", ".join(shown)))
    return found


def _sequence(words: dict, dice: Dice) -> list[Item]:
    """Four numbers that rise or fall by the same step, four letters, or two or three colours in turn."""
    letters, colours = words["rows"]["letter"], words["kinds"]["colour"]["words"]

    def make(number: int) -> Item:
        sort = dice.draw(("numbers", "numbers", "letters", "two", "two", "three"))
        if sort == "numbers":
            step = dice.draw((1, 1, 2, 5, 10, -1))
            start = dice.draw(range(5, 21)) if step < 0 else step * dice.draw(range(1, 7)) if step > 2 else dice.draw(range(1, 17))
            row = [str(start + step * i) for i in range(5)]
        elif sort == "letters":
            start = dice.draw(range(22))
            row = letters[start : start + 5]
        else:
            turn = _some(dice, colours, 2 if sort == "two" else 3)
            row = (turn * 3)[: 5 + dice.draw((0, 1))]
        return Item({}, row[-1], ", ".join(row[:-1]), ", ".join(row[:-1]))

    return _distinct(make)


def _before_and_after(words: dict, dice: Dice) -> list[Item]:
    found = []
    for kind, row in words["rows"].items():
        pairs = list(zip(row, row[1:])) + ([(row[-1], row[0])] if kind in words["round"] else [])
        for one, two in pairs:
            found.append(Item({"word": one, "side": "after", "kind": kind}, two, f"after {one}", general=False))
            if kind != "letter":  # children say the alphabet forwards only
                found.append(Item({"word": two, "side": "before", "kind": kind}, one, f"before {two}", general=False))
    return found


def _bigger_or_smaller(words: dict, dice: Dice) -> list[Item]:
    """Two things at least two steps of size apart, so that nobody would say otherwise."""

    def make(number: int) -> Item:
        low = dice.draw(range(len(words["sizes"]) - 2))
        high = dice.draw(range(low + 2, len(words["sizes"])))
        small, big = dice.draw(words["sizes"][low]), dice.draw(words["sizes"][high])
        (one, two), which = shuffled(dice, [small, big]), dice.draw(("bigger", "smaller"))
        return Item({"one": one, "two": two, "which": which}, big if which == "bigger" else small, f"{small} {big}")

    return _distinct(make)


def _copy(words: dict, dice: Dice) -> list[Item]:
    def make(number: int) -> Item:
        sentence = f"The {dice.draw(words['copy']['who'])} {dice.draw(words['kinds']['animal']['words'])} {dice.draw(words['copy']['did'])}."
        return Item({}, sentence, sentence, sentence)

    return _distinct(make)


def _repeat(words: dict, dice: Dice) -> list[Item]:
    """Each word of the lists of things, two, three or four times."""
    found = []
    for one, _ in words["plurals"]["rule"]:
        for times in _some(dice, (2, 3, 4), 2):
            found.append(Item({"word": one, "times": words["rows"]["number"][times - 1]}, " ".join([one] * times), one))
    return found


def _colour(words: dict, dice: Dice) -> list[Item]:
    return [Item({"thing": thing}, colour, thing, general=False) for thing, colour in words["colours"]]


WRITTEN_TASKS: dict[str, Callable[[dict, Dice], list[Item]]] = {
    "opposite": _opposite,
    "plural": _plural,
    "past tense": _past,
    "odd one out": _odd_one_out,
    "first and last": _first_and_last,
    "sentiment": _sentiment,
    "sort words": _sort_words,
    "sort numbers": _sort_numbers,
    "count": _count,
    "yes or no": _yes_or_no,
    "rhyme": _rhyme,
    "sequence": _sequence,
    "before and after": _before_and_after,
    "bigger or smaller": _bigger_or_smaller,
    "copy": _copy,
    "repeat": _repeat,
    "colour": _colour,
}
