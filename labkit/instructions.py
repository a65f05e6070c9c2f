"""Small closed instructions with certain answers: how data/instructions was made, how it is scored, and the shape SFTTrainer takes.

`build(seed)` is a pure function of its seed, of the lists in data/instructions/written and of StoryWorld (data/storyworld): the same seed gives
the same bytes in `write_files`. The files in the repository have seed 0. The passage questions are those of `storyquestions`; the other tasks
are in `instruction_tasks`.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from labkit.files import DATA, write_rows
from labkit.instruction_tasks import WRITTEN_TASKS, Item, shuffled, written
from labkit.storybook import Dice, book
from labkit.storyquestions import Question, questions
from labkit.tokens import CHAT_MARKS, CHAT_TEMPLATE

SPLITS = ("train", "validation", "test")
ROWS = {"train": 120, "validation": 8, "test": 30}  # of each task
PHRASINGS = {"train": slice(0, 5), "validation": slice(5, 6), "test": slice(6, 8)}  # of the eight of each task
STORY_TASKS = ("where", "who has", "feeling", "why", "first event", "story yes or no")
TASKS = (*STORY_TASKS, *WRITTEN_TASKS)
TWO_WAY = ("story yes or no", "sentiment", "yes or no", "where", "who has")  # each side makes up one half; see _where and _who_has
OPTIONS = {"odd one out": 4, "rhyme": 3, "first event": 2, "sentiment": 2, "bigger or smaller": 2, "yes or no": 2, "story yes or no": 2}
LARGEST_SHARE = 0.3  # of one answer in a task and split
LONGEST_PASSAGE = 100  # words; with the question and the answer that stays under 200 tokens of the course's decoder
LONGEST_ANSWER = 48  # characters; under 15 tokens
ASKED = {"where": 60, "who has": 14, "why": 48, "first": 30}  # questions drawn for each row wanted: most passages are too long
STATES = re.compile(r"\b(?:had|was afraid|wanted|practised)\b")  # gists of how things were, or went on: they have no moment of their own
RAN_OFF = re.compile(r"\b(?:ran|run|running|runs) (?:away )?from\b")  # no passage says where to


def build(seed: int = 0) -> dict[str, list[dict[str, str]]]:
    """The rows of train, validation and test: id, task, source, phrasing, held_out, instruction, input, answer; all of them text.

    held_out says what train has not seen of a row: "" (train), "phrasing", or "phrasing and item". Raises ValueError when a task has too
    few items for its rows.
    """
    phrasings = written("phrasings")
    rows: dict[str, list[dict[str, str]]] = {split: [] for split in SPLITS}
    for task in TASKS:
        dice = Dice(f"instructions {task} {seed}")
        source = "storyworld" if task in STORY_TASKS else "written"
        for split, chosen in _share_out(task, dice, seed, {split: phrasings[task][part] for split, part in PHRASINGS.items()}).items():
            for item, words, number in chosen:
                instruction = words.format(**item.slots)
                name = f"{task}-{number + PHRASINGS[split].start}".replace(" ", "-")
                held_out = "" if split == "train" else "phrasing and item" if item.general else "phrasing"
                digest = hashlib.sha256(f"{name}\n{instruction}\n{item.input}".encode()).hexdigest()[:8]
                row = {"id": f"{name}-{digest}", "task": task, "source": source, "phrasing": name, "held_out": held_out}
                rows[split].append(row | {"instruction": instruction, "input": item.input, "answer": item.answer})
    return {split: shuffled(Dice(f"instructions order {split} {seed}"), rows[split]) for split in SPLITS}


def write_files(folder: Path = DATA / "instructions", seed: int = 0) -> None:
    """Write train.jsonl, validation.jsonl and test.jsonl. Afterwards make data/SHA256SUMS anew."""
    for split, rows in build(seed).items():
        write_rows(folder / f"{split}.jsonl", rows)


def prompt(row: Mapping[str, str]) -> str:
    """What the user says: the instruction and, under a blank line, the input if there is one."""
    return f"{row['instruction']}\n\n{row['input']}" if row["input"] else row["instruction"]


def as_messages(row: Mapping[str, str]) -> dict[str, list[dict[str, str]]]:
    """A row as a conversation, `{"messages": [user, assistant]}`, a shape trl's SFTTrainer takes. Its loss is on all tokens unless told otherwise."""
    user, assistant = {"role": "user", "content": prompt(row)}, {"role": "assistant", "content": row["answer"]}
    return {"messages": [user, assistant]}


def as_prompt_completion(row: Mapping[str, str]) -> dict[str, list[dict[str, str]]]:
    """A row as `{"prompt": [user], "completion": [assistant]}`: from this shape trl's SFTTrainer takes the loss on the completion only."""
    user, assistant = as_messages(row)["messages"]
    return {"prompt": [user], "completion": [assistant]}


def give_chat_marks(tokenizer, model) -> None:
    """Give a tokenizer without a chat template the course's own, and tokenizer and model the three tokens it needs. Twice changes nothing.

    The course's decoder has them already. GPT-2's vocabulary grows by three; their embeddings start at the mean of the others.
    """
    if tokenizer.chat_template is None:
        tokenizer.chat_template = CHAT_TEMPLATE
        tokenizer.add_special_tokens({"extra_special_tokens": list(CHAT_MARKS)})
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))


def normalise(text: str) -> str:
    """Lower case, single spaces, without punctuation or quotes at the ends."""
    return " ".join(text.lower().split()).strip(" .,;:!?\"'")


def exact_match(prediction: str, answer: str) -> bool:
    """Whether a prediction is the answer, whatever its case, spaces and punctuation at the ends. An empty prediction never is."""
    return normalise(prediction) == normalise(answer) != ""


def matches_by_task(predictions: Sequence[str], rows: Iterable[Mapping[str, str]]) -> dict[str, list[bool]]:
    """For each task, which of its rows were answered with an exact match, in the order of `rows`; `measure` makes intervals of them.

    Raises ValueError when there are not as many predictions as rows.
    """
    rows = list(rows)
    if len(predictions) != len(rows):
        raise ValueError(f"{len(predictions)} predictions for {len(rows)} rows: give one for each row, in the same order")
    found: dict[str, list[bool]] = {}
    for prediction, row in zip(predictions, rows):
        found.setdefault(row["task"], []).append(exact_match(prediction, row["answer"]))
    return found


def majority_baseline(rows: Iterable[Mapping[str, str]]) -> dict[str, float]:
    """For each task, the share of its commonest answer in these very rows: no constant answer can match more of them."""
    answers: dict[str, Counter[str]] = {}
    for row in rows:
        answers.setdefault(row["task"], Counter())[normalise(row["answer"])] += 1
    return {task: max(counts.values()) / counts.total() for task, counts in answers.items()}


def chance(rows: Iterable[Mapping[str, str]]) -> dict[str, float]:
    """For each task, the better of the majority baseline and a blind guess among the options the prompt names (OPTIONS).

    For the yes-or-no tasks the guess gets yes or no right in half of the rows; their answers also give the reason, so this is generous.
    """
    return {task: max(share, 1 / OPTIONS.get(task, 1e9)) for task, share in majority_baseline(rows).items()}


def _share_out(task: str, dice: Dice, seed: int, phrasings: dict[str, list[str]]) -> dict[str, list[tuple[Item, str, int]]]:
    """(item, phrasing, its number) for each split. Items that generalise are in one split only; the others are all in train."""
    if task in STORY_TASKS:
        drawn = {split: _story_items(task, split, seed) for split in ("train", "test")}
        pool, apart = shuffled(dice, drawn["train"]), shuffled(dice, drawn["test"])
    else:
        pool, apart = shuffled(dice, WRITTEN_TASKS[task](written("words"), dice)), None
    general, known = [item for item in pool if item.general], [item for item in pool if not item.general]
    share = len(general) / len(pool)
    chosen = {}
    for split in ("test", "validation"):
        new = round(share * ROWS[split])
        first = _choose(task, (apart if apart is not None and split == "test" else general), new, phrasings[split])
        taken = {item.key for item, _, _ in first}
        general = [item for item in general if item.key not in taken]
        chosen[split] = first + _choose(task, shuffled(dice, known), ROWS[split] - new, phrasings[split])
    new = min(round(share * ROWS["train"]), ROWS["train"] - len(known)) if known else ROWS["train"]
    chosen["train"] = _choose(task, known, ROWS["train"] - new, phrasings["train"]) + _choose(task, general, new, phrasings["train"])
    return chosen


def _choose(task: str, items: list[Item], count: int, phrasings: list[str]) -> list[tuple[Item, str, int]]:
    """`count` pairs of item and phrasing, each item once before one comes twice, and no answer (or side) above its share."""
    most = (count + 1) // 2 if task in TWO_WAY else max(2, int(LARGEST_SHARE * count))
    sides: Counter[str] = Counter()
    chosen: list[tuple[Item, str, int]] = []
    for turn in range(len(phrasings)):
        for position, item in enumerate(items):
            if len(chosen) == count:
                return chosen
            if sides[item.side] < most:
                sides[item.side] += 1
                number = (position + turn) % len(phrasings)
                chosen.append((item, phrasings[number], number))
    if len(chosen) < count:
        raise ValueError(f"{task}: {len(chosen)} of {count} rows; write more items in data/instructions/written, or raise ASKED for passages")
    return chosen


# Questions about passages of StoryWorld


@functools.cache
def _short_questions(kind: str, rows: int, seed: int, split: str) -> tuple[Question, ...]:
    """Questions on short passages about somebody with a name, or a thing; an item's passage comes once."""
    found = {}
    for asked in questions(rows * ASKED[kind], seed=seed, split=split, kinds=(kind,)):
        passage = " ".join(asked.passage.split())
        if len(passage.split()) <= LONGEST_PASSAGE and len(asked.answer) <= LONGEST_ANSWER:
            found.setdefault(passage, Question(passage, asked.question, asked.answer, kind))
    return tuple(found.values())


def _story_items(task: str, split: str, seed: int) -> list[Item]:
    """The items of a story task in train (and validation) or in test, which tells combinations that train never tells."""
    rows = ROWS["test"] if split == "test" else ROWS["train"] + ROWS["validation"]
    if task == "story yes or no":
        half = rows // 2
        asked = [*_short_questions("where", half, seed * 10 + 1, split), *_short_questions("who has", half, seed * 10 + 2, split)]
        return _yes_or_no(asked, Dice(f"instructions {task} {split} {seed}"))
    if task == "where":
        return _where(_short_questions("where", rows, seed * 10 + 3, split))
    if task == "who has":
        return _who_has(_short_questions("who has", rows, seed * 10 + 4, split))
    if task == "first event":
        return _first_event(_short_questions("first", rows, seed * 10 + 5, split), rows)
    # A question why tells the feeling too. Those whose reason stands in the passage word for word ask for the reason, the others for the feeling.
    return _feelings(_short_questions("why", rows, seed * 10 + 6, split), reason=task == "why")


def plain_place(one: Question) -> bool:
    """Whether a question where is about a name or a thing, and its answer is in the passage word for word, and nobody ran off to nowhere.

    "Went home" stands for "at home".
    """
    read = one.answer in one.passage or (one.answer == "at home" and "home" in one.passage)
    return read and bool(re.match(r"Where is (?:the |[A-Z])", one.question)) and not RAN_OFF.search(one.passage)


def _where(asked: Iterable[Question]) -> list[Item]:
    """Items on passages with several places, whose side says whether the one named last is the answer: neither yes nor no is a rule."""
    found = []
    for one in asked:
        places = places_named(one.passage) if plain_place(one) else []
        if len(places) > 1:
            side = "last" if places[-1] == one.answer else "another"
            found.append(Item({"who": _slot(r"Where is (.*)\?", one)[0]}, one.answer, one.passage, one.passage, side))
    return found


def _who_has(asked: Iterable[Question]) -> list[Item]:
    """Items whose side says whether the first name of the passage is the answer: half are, so that naming the hero is worth no more."""
    found = []
    for one in asked:
        side = "hero" if names_in(one.passage)[:1] == [one.answer] else "another"
        found.append(Item({"thing": _slot(r"Who has (.*)\?", one)[0]}, one.answer, one.passage, one.passage, side))
    return found


def _feelings(asked: Iterable[Question], reason: bool) -> list[Item]:
    """Asked for a feeling, only passages that name it in one of their last two sentences: nothing afterwards can have changed it."""
    found = []
    for one in asked:
        who, feeling = _slot(r"Why was (.*) (\w+)\?", one)
        told = set(re.findall(r"[\w'-]+", one.answer)) <= {*re.findall(r"[\w'-]+", one.passage), "because"}
        end = one.passage if reason else " ".join(re.split(r"(?<=[.!?])\"? ", one.passage)[-2:])
        if who[0].isupper() and told == reason and re.search(rf"\b{feeling}\b", end):
            slots = {"who": who, "feeling": feeling} if reason else {"who": who}
            found.append(Item(slots, one.answer if reason else feeling, one.passage, one.passage))
    return found


def _first_event(asked: Iterable[Question], rows: int) -> list[Item]:
    """Stories begin with somebody going somewhere: rows in which "went" alone tells the first event come last."""
    found = []
    for one in asked:
        first, second = _slot(r"What happened first: (.*), or (.*)\?", one)
        if not STATES.search(first) and not STATES.search(second):
            told = " went " in one.answer and not (" went " in first and " went " in second)
            found.append((told, Item({"one": first, "two": second}, one.answer, one.passage, one.passage)))
    return [item for _, item in sorted(found, key=lambda pair: pair[0])][:rows]


def _yes_or_no(asked: Iterable[Question], dice: Dice) -> list[Item]:
    """Each asks for the truth or for another place or owner that the passage names; "no" is followed by what is true."""
    found = []
    for one in asked:
        if one.kind == "where":
            who = _slot(r"Where is (.*)\?", one)[0]
            true, ask, say = one.answer, f"Is {who} {{}}?", f"{who[0].upper()}{who[1:]} is {{}}."
            others = places_named(one.passage) if plain_place(one) else []
        else:
            thing = _slot(r"Who has (.*)\?", one)[0]
            true, ask, say = one.answer, f"Does {{}} have {thing}?", f"{{}} has {thing}."
            others = names_in(one.passage)
        others = [other for other in others if other != true] if true in others else []
        if others:
            yes = dice.draw((True, False))
            question, answer = ask.format(true if yes else dice.draw(others)), say.format(true)
            answer = f"{'Yes' if yes else 'No'}, {answer[0].lower() + answer[1:] if answer.startswith('The ') else answer}"
            found.append(Item({"question": question}, answer, one.passage, one.passage, "yes" if yes else "no"))
    return found


def names_in(passage: str) -> list[str]:
    """The names of children and animals in a passage, in the order in which they first come."""
    lexicon = book().lexicon
    known = {*lexicon["girls"], *lexicon["boys"], *lexicon["animal_names"]}
    return list(dict.fromkeys(word for word in re.findall(r"[A-Z]\w+", passage) if word in known))


def places_named(passage: str) -> list[str]:
    """The places of StoryWorld in a passage, as `in the park`, in the order in which they are last named."""
    rows = [(noun, at) for rows in book().lexicon["places"].values() for noun, at, _ in rows] + [("home", "at home")]
    last = {}
    for noun, at in rows:
        named = list(re.finditer(rf"(?:the |\b(?=home)){noun}\b", passage))
        if named:
            last[at] = named[-1].start()
    return sorted(last, key=last.__getitem__)


def _slot(pattern: str, asked: Question) -> tuple[str, ...]:
    match = re.fullmatch(pattern, asked.question)
    if match is None:
        raise ValueError(f"{asked.question!r} is not a question of the form {pattern}: StoryWorld asks in other words now; change the pattern")
    return match.groups()
