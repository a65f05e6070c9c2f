"""Questions about StoryWorld stories, with answers that are certain; pairs that probe a language model; and a judge of continuations."""

from __future__ import annotations

import re
from dataclasses import dataclass

from labkit.storybook import Character, Place, Thing, book
from labkit.storyworld import Story, Teller, tellers

QUESTION_KINDS = ("where", "who has", "feeling", "why", "first")
PROBE_KINDS = ("possessor", "place", "name")


@dataclass(frozen=True)
class Question:
    """A question about a short passage. The answer follows from what the passage tells."""

    passage: str
    question: str
    answer: str
    kind: str


@dataclass(frozen=True)
class Probe:
    """The beginning of a story and two ways to go on, alike but for one word or phrase: a coherent model finds `right` more likely."""

    prefix: str
    right: str
    wrong: str
    kind: str


@dataclass(frozen=True)
class Verdict:
    """What a continuation gets right about names, places and possession; None where it says nothing that can be checked."""

    names: bool | None
    places: bool | None
    possession: bool | None

    @property
    def consistent(self) -> bool:
        """Nothing that can be checked is wrong."""
        return False not in (self.names, self.places, self.possession)


def questions(n: int, seed: int = 0, *, split: str = "train", kinds: tuple[str, ...] = QUESTION_KINDS) -> list[Question]:
    """n questions on as many short passages, each the beginning of a story; kinds: which of QUESTION_KINDS may come.

    Raises ValueError for an unknown kind.
    """
    unknown = [kind for kind in kinds if kind not in QUESTION_KINDS]
    if unknown or not kinds:
        raise ValueError(f"kind {unknown[0] if unknown else kinds!r} is not one of {', '.join(QUESTION_KINDS)}")
    found: list[Question] = []
    for teller in tellers(seed, split):
        if len(found) >= n:
            return found
        story = _beginning(teller)
        possible = {kind: _ASK[kind](teller, story) for kind in kinds}
        possible = {kind: asked for kind, asked in possible.items() if asked}
        if possible:
            kind = teller.dice.draw(list(possible))
            question, answer = teller.dice.draw(possible[kind])
            found.append(Question(story.text, question, answer, kind))
    return found


def probes(n: int, seed: int = 0, *, split: str = "test", kind: str) -> list[Probe]:
    """n probes of one kind: the right possessor, place or name against a wrong one that the story makes plausible.

    possessor: another character of the story. place: another place of the story. name: a name of the same sort that is not in the story.
    Raises ValueError for an unknown kind.
    """
    if kind not in PROBE_KINDS:
        raise ValueError(f"kind is {kind!r}: choose one of {', '.join(PROBE_KINDS)}")
    found: list[Probe] = []
    for teller in tellers(seed, split):
        if len(found) >= n:
            return found
        story = _beginning(teller)
        pairs = _PROBE[kind](teller, story)
        if pairs:
            right, wrong = teller.dice.draw(pairs)
            found.append(Probe(story.text, f" {right}", f" {wrong}", kind))
    return found


def prefers_right(model, tokenizer, probe: Probe) -> bool:
    """Whether a causal language model finds the right continuation likelier than the wrong one, by the sum over its tokens.

    The passage's beginning is cut if passage and continuation do not fit into the model's context.
    """
    import torch

    device = next(model.parameters()).device
    prefix = tokenizer(probe.prefix, add_special_tokens=False)["input_ids"]
    scores = []
    for continuation in (probe.right, probe.wrong):
        ids = tokenizer(continuation, add_special_tokens=False)["input_ids"]
        room = model.config.max_position_embeddings - len(ids) - 1
        whole = torch.tensor([[tokenizer.bos_token_id, *prefix[-room:], *ids]], device=device)
        with torch.no_grad():
            logits = model(whole).logits[0, -len(ids) - 1 : -1].float()
        scores.append(logits.log_softmax(-1).gather(1, whole[0, -len(ids) :, None]).sum().item())
    return scores[0] > scores[1]


def judge(story: Story, continuation: str) -> Verdict:
    """Hold a continuation against what is true at the end of `story`.

    names: every known name in it belongs to someone of the story, or is introduced ("a boy named Tom").
    places and possession: the first sentence that says where someone is, or who has a thing, agrees with the story's end; it counts only
    if nothing before it in the continuation can have changed that (it is in the first sentence). Only plain statements are understood.
    """
    lexicon = book().lexicon
    known = {*lexicon["girls"], *lexicon["boys"], *lexicon["animal_names"]}
    here = {character.name for character in story.characters}
    new = set(re.findall(r"\b(?:named|called|friend) ([A-Z]\w+)", continuation))
    names = [word for word in re.findall(r"[A-Z]\w+", continuation) if word in known]
    first = re.split(r"(?<=[.!?])\s", continuation.strip(), maxsplit=1)[0]
    places = possession = None
    for character in story.characters:
        who = re.escape(character.name)
        for place in story.places:
            if re.search(rf"\b{who} (?:was|stayed|stood|sat|waited|was still) (?:still )?{re.escape(place.at)}\b", first):
                places = story.where.get(character) is place
        for thing in story.things:
            if re.search(rf"\b{who} (?:still )?(?:had|held|was holding|kept) (?:the|his|her) (?:\w+ )?{re.escape(thing.name)}\b", first):
                possession = story.where.get(thing) is character
    return Verdict(all(name in here or name in new for name in names) if names else None, places, possession)


def _beginning(teller: Teller) -> Story:
    return teller.story(episodes=1, max_steps=teller.dice.draw((3, 4, 5, 6, 7, 8, 9)))


def _told(story: Story) -> dict:
    """Characters and things whose present place or holder an event of the story has told, and that are in the text: entity -> where."""
    verbs, told = book().verbs, {}
    for event in story.events:
        for subject, relation, other in verbs[event.verb].effects:
            if relation in ("at", "has"):
                moved = event.bound[subject if relation == "at" else other]
                told[moved] = story.where.get(moved)
    named = {*story.characters, *story.things, *story.places}
    return {entity: where for entity, where in told.items() if entity in named and where in named}


def _where(teller: Teller, story: Story) -> list[tuple[str, str]]:
    return [
        (f"Where is {f'the {entity.name}' if isinstance(entity, Thing) else entity.name}?", where.at)
        for entity, where in _told(story).items()
        if isinstance(where, Place)
    ]


def _who_has(teller: Teller, story: Story) -> list[tuple[str, str]]:
    return [(f"Who has the {thing.name}?", where.name) for thing, where in _told(story).items() if isinstance(where, Character)]


def _feeling(teller: Teller, story: Story) -> list[tuple[str, str]]:
    return [(f"How does {character.name} feel?", feeling) for character, (feeling, _) in story.feels.items()]


def _why(teller: Teller, story: Story) -> list[tuple[str, str]]:
    return [(f"Why was {character.name} {feeling}?", f"because {cause}") for character, (feeling, cause) in story.feels.items() if cause]


def _first(teller: Teller, story: Story) -> list[tuple[str, str]]:
    gists = [event.gist for event in story.events if event.gist]
    once = [gist for gist in gists if gists.count(gist) == 1]
    if len(once) < 2:
        return []
    earlier = int(len(once) * 0.5)
    a, b = teller.dice.draw(once[:earlier]), teller.dice.draw(once[earlier:])
    shown = (a, b) if teller.dice.draw((True, False)) else (b, a)
    return [(f"What happened first: {shown[0]}, or {shown[1]}?", a)]


_ASK = {"where": _where, "who has": _who_has, "feeling": _feeling, "why": _why, "first": _first}


def _plain(verb: str, slots: set[tuple[str, str]]) -> list[tuple]:
    """The phrasings of a verb that have no slots but these, and all of them."""
    found = []
    for phrasing in book().verbs[verb].phrasings[""]:
        used = {part[:2] for part in phrasing if type(part) is tuple}
        if used <= slots and {role for role, _ in used} == {role for role, _ in slots}:
            found.append(phrasing)
    return found


def _filled(phrasing: tuple, words: dict[str, str]) -> str:
    text = "".join(part if type(part) is str else words[part[0]] for part in phrasing)
    return text[0].upper() + text[1:]


def _possessor(teller: Teller, story: Story) -> list[tuple[str, str]]:
    phrasing = teller.dice.draw(_plain("recap_has", {("A", ""), ("A", "name"), ("T", "the")}))
    return [
        tuple(_filled(phrasing, {"A": name, "T": f"the {thing.name}"}) for name in (holder.name, other.name))
        for thing, holder in _told(story).items()
        if isinstance(holder, Character)
        for other in story.characters
        if other is not holder
    ]


def _place(teller: Teller, story: Story) -> list[tuple[str, str]]:
    phrasing = teller.dice.draw(_plain("recap_at", {("A", ""), ("A", "name"), ("P", "at")}))
    return [
        tuple(_filled(phrasing, {"A": entity.name, "P": place.at}) for place in (where, other))
        for entity, where in _told(story).items()
        if isinstance(where, Place) and isinstance(entity, Character)
        for other in story.places
        if other is not where
    ]


def _name(teller: Teller, story: Story) -> list[tuple[str, str]]:
    lexicon = book().lexicon
    here = {character.name for character in story.characters}
    phrasing = teller.dice.draw(_plain("thank", {("A", ""), ("A", "name"), ("B", ""), ("B", "name")}))
    pairs = []
    for thanked in story.characters:
        if thanked is story.hero or thanked.group == "grownup":
            continue
        names = lexicon["animal_names"] if thanked.group == "animal" else lexicon["girls" if thanked.she else "boys"]
        stranger = teller.dice.draw([name for name in names if name not in here])
        pairs.append(tuple(_filled(phrasing, {"A": story.hero.name, "B": name}) for name in (thanked.name, stranger)))
    return pairs


_PROBE = {"possessor": _possessor, "place": _place, "name": _name}
