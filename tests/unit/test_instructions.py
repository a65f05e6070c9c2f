"""The instruction data: rebuilt to the byte, every answer verified from its prompt or the events, the splits apart, the scores exact."""

import json
import re
from collections import Counter

import pytest
from datasets import Dataset, DatasetDict

from labkit import data, storyquestions
from labkit.catalog import Data
from labkit.data import INSTRUCTION_COLUMNS, check_instructions, load_instructions
from labkit.files import DATA
from labkit.instruction_tasks import shuffled, written
from labkit.instructions import (
    OPTIONS,
    PHRASINGS,
    ROWS,
    SPLITS,
    STORY_TASKS,
    TASKS,
    _short_questions,
    as_messages,
    as_prompt_completion,
    chance,
    exact_match,
    give_chat_marks,
    majority_baseline,
    matches_by_task,
    names_in,
    normalise,
    places_named,
    prompt,
    write_files,
)
from labkit.models import load_tokenizer
from labkit.storybook import Dice, book
from labkit.tokens import CHAT_MARKS

WORDS = written("words")
KIND_OF = {word: kind for kind, row in WORDS["kinds"].items() for word in row["words"]}
FAMILY_OF = {word: number for number, family in enumerate(WORDS["rhymes"]) for word in family}
SIZE_OF = {thing: size for size, things in enumerate(WORDS["sizes"]) for thing in things}
NUMBERS = WORDS["rows"]["number"]


@pytest.fixture(scope="module")
def rows():
    return {split: list(part) for split, part in load_instructions().items()}


@pytest.fixture(scope="module")
def everything(rows):
    return [row for split in SPLITS for row in rows[split]]


@pytest.fixture(scope="module")
def rebuilt(tmp_path_factory):
    """The files made anew, and the stories that were told meanwhile, by their text."""
    folder, told, tell = tmp_path_factory.mktemp("instructions"), {}, storyquestions._beginning
    _short_questions.cache_clear()

    def listen(teller):
        story = tell(teller)
        told[" ".join(story.text.split())] = story
        return story

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storyquestions, "_beginning", listen)
        write_files(folder)
    return folder, told


def fields(row):
    """What the phrasing of a row was filled with, read back from its instruction."""
    template = written("phrasings")[row["task"]][int(row["phrasing"].rsplit("-", 1)[1])]
    pattern = re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>.+)", re.escape(template))
    return re.fullmatch(pattern, row["instruction"]).groupdict()


def listed(row):
    return row["input"].split(", ")


# Every answer, verified


def plural_by_rule(word):
    if re.search(r"(s|x|ch|sh)$", word):
        return word + "es"
    return re.sub(r"([^aeiou])y$", r"\1ies", word) if re.search(r"[^aeiou]y$", word) else word + "s"


def past_by_rule(word):
    if word.endswith("e"):
        return word + "d"
    if re.search(r"[^aeiou]y$", word):
        return word[:-1] + "ied"
    return word + word[-1] + "ed" if re.fullmatch(r"[^aeiou]*[aeiou][^aeiouwxy]", word) else word + "ed"


def continued(shown):
    """The next of a row: numbers by their step, letters by the alphabet, anything else by its shortest period."""
    if all(re.fullmatch(r"\d+", one) for one in shown):
        steps = {int(b) - int(a) for a, b in zip(shown, shown[1:])}
        assert len(steps) == 1
        return str(int(shown[-1]) + steps.pop())
    if all(len(one) == 1 for one in shown):
        assert [ord(b) - ord(a) for a, b in zip(shown, shown[1:])] == [1] * (len(shown) - 1)
        return chr(ord(shown[-1]) + 1)
    period = next(p for p in range(1, len(shown)) if all(shown[i] == shown[i - p] for i in range(p, len(shown))))
    return shown[len(shown) - period]


def odd_one(shown):
    kinds = Counter(KIND_OF[word] for word in shown)
    assert sorted(kinds.values()) == [1, 3]
    return next(word for word in shown if kinds[KIND_OF[word]] == 1)


def neighbour(side, word, kind=None):
    place = next(row for row in WORDS["rows"].values() if word in row)
    at = place.index(word) + (1 if side == "after" else -1)
    assert 0 <= at < len(place) or len(place) in (7, 12), "only days and months begin again"
    return place[at % len(place)]


def rhyming(row):
    (found,) = [word for word in listed(row) if FAMILY_OF[word] == FAMILY_OF[fields(row)["word"]]]
    return found


def kind_answer(question):
    name, asked = re.fullmatch(r"Is ((?:an? )?\w+) (.*)\?", question).groups()
    true = WORDS["kinds"][KIND_OF[name.split()[-1]]]["is"]
    return f"{'Yes' if asked == true else 'No'}, {name} is {true}."


def by_size(one, two, which):
    assert abs(SIZE_OF[one] - SIZE_OF[two]) >= 2
    return (max if which == "bigger" else min)((one, two), key=SIZE_OF.__getitem__)


RULE = {"plural": plural_by_rule, "past tense": past_by_rule}
LISTS = {"plural": WORDS["plurals"], "past tense": WORDS["pasts"]}
FEELING = {text: feeling for source in (WORDS["feel"], written("remarks")) for feeling, texts in source.items() for text in texts}


def by_list(task, word):
    return next(RULE[task](word) if sort == "rule" else form for sort, pairs in LISTS[task].items() for one, form in pairs if one == word)


ANSWER = {
    "opposite": lambda row: dict(WORDS["opposites"])[fields(row)["word"]],
    "plural": lambda row: by_list("plural", fields(row)["word"]),
    "past tense": lambda row: by_list("past tense", fields(row)["word"]),
    "odd one out": lambda row: odd_one(listed(row)),
    "first and last": lambda row: listed(row)[{"first": 0, "last": -1}[fields(row)["which"]]],
    "sentiment": lambda row: FEELING[row["input"]],
    "sort words": lambda row: ", ".join(sorted(listed(row))),
    "sort numbers": lambda row: ", ".join(map(str, sorted(map(int, listed(row))))),
    "count": lambda row: NUMBERS[sum(KIND_OF[word] == "animal" for word in listed(row)) - 1],
    "yes or no": lambda row: kind_answer(fields(row)["question"]),
    "rhyme": rhyming,
    "sequence": lambda row: continued(listed(row)),
    "before and after": lambda row: neighbour(**fields(row)),
    "bigger or smaller": lambda row: by_size(**fields(row)),
    "copy": lambda row: row["input"],
    "repeat": lambda row: " ".join([fields(row)["word"]] * (NUMBERS.index(fields(row)["times"]) + 1)),
    "colour": lambda row: dict(WORDS["colours"])[fields(row)["thing"]],
}


@pytest.mark.parametrize("task", ANSWER)
def test_written_answers_follow_from_their_prompts(everything, task):
    ours = [row for row in everything if row["task"] == task]
    assert len(ours) == sum(ROWS.values())
    for row in ours:
        assert row["answer"] == ANSWER[task](row), row
        if task == "sort words":
            assert len({word[0] for word in listed(row)}) == 3, "the first letters decide"


def replayed(story):
    """Where everybody and everything is after the events, from the verbs' effects alone; and who felt what, and why, last."""
    where, feels = {}, {}
    for event in story.events:
        for subject, relation, other in book().verbs[event.verb].effects:
            if relation == "at":
                where[event.bound[subject]] = event.bound[other]
            elif relation == "has":
                where[event.bound[other]] = event.bound[subject]
            elif relation == "gone":
                where.pop(event.bound[subject], None)
        if event.verb == "feel":
            feels[event.bound["A"].name] = (event.bound["F"], f"because {event.bound['cause']}")
    return {f"the {e.name}" if e in story.things else e.name: at for e, at in where.items()}, feels


def holder_or_place(where, named):
    return getattr(where[named], "at", where[named].name)


def story_answer(row, story):
    asked, (where, feels) = fields(row), replayed(story)
    if row["task"] in ("where", "who has"):
        return holder_or_place(where, asked.get("who") or asked["thing"])
    if row["task"] in ("feeling", "why"):
        feeling, reason = feels[asked["who"]]
        assert asked.get("feeling", feeling) == feeling
        return feeling if row["task"] == "feeling" else reason
    if row["task"] == "first event":
        gists = [event.gist for event in story.events]
        assert gists.count(asked["one"]) == gists.count(asked["two"]) == 1
        return min(asked["one"], asked["two"], key=gists.index)
    question = r"(?:Is|Does) (.+?) (?:have )?((?:in|on|at|by|below|under|near|behind|the|beside|inside|up)\b.*)\?"
    name, thing = re.fullmatch(question, asked["question"]).groups()
    if asked["question"].startswith("Is"):
        true = holder_or_place(where, name)
        says, right = f"{name[0].upper() + name[1:]} is {true}.", true == thing
    else:
        true = holder_or_place(where, thing)
        says, right = f"{true} has {thing}.", true == name
    says = says.replace("The ", "the ", 1) if says.startswith("The ") else says
    return f"{'Yes' if right else 'No'}, {says}"


def test_rebuilding_gives_the_committed_files(rebuilt):
    for split in SPLITS:
        assert (rebuilt[0] / f"{split}.jsonl").read_bytes() == (DATA / "instructions" / f"{split}.jsonl").read_bytes(), split


def test_story_answers_follow_from_the_events(everything, rebuilt):
    asked = [row for row in everything if row["source"] == "storyworld"]
    assert Counter(row["task"] for row in asked) == dict.fromkeys(STORY_TASKS, sum(ROWS.values()))
    for row in asked:
        assert row["answer"] == story_answer(row, rebuilt[1][row["input"]]), row


def test_story_answers_can_be_read_in_the_passage(everything):
    for row in everything:
        passage, answer = row["input"], row["answer"]
        if row["task"] == "where":
            assert answer in places_named(passage) and (answer in passage or answer == "at home"), row
        elif row["task"] == "who has":
            assert answer in passage or answer[0].upper() + answer[1:] in passage, row
        elif row["task"] == "feeling":
            assert answer in " ".join(re.split(r'(?<=[.!?])"? ', passage)[-2:]), row
        elif row["task"] == "why":
            assert set(re.findall(r"[\w'-]+", answer)) - {"because"} <= set(re.findall(r"[\w'-]+", passage)), row
        elif row["task"] == "story yes or no":
            question = fields(row)["question"]
            named = places_named(passage) if question.startswith("Is") else names_in(passage)
            assert len(named) > 1 and any(one in question for one in named), "the wrong place or owner is one of the passage"


# The splits


def test_rows_and_columns(rows):
    for split in SPLITS:
        assert Counter(row["task"] for row in rows[split]) == dict.fromkeys(TASKS, ROWS[split])
        assert all(tuple(row) == INSTRUCTION_COLUMNS for row in rows[split])
    assert len(TASKS) >= 14 and sum(map(len, rows.values())) >= 2400 and len(rows["test"]) >= 420
    assert set(OPTIONS) < set(TASKS)


def test_no_prompt_and_no_id_comes_twice(everything):
    prompts = Counter(normalise(prompt(row)) for row in everything)
    assert max(prompts.values()) == 1
    assert len({row["id"] for row in everything}) == len(everything)


def test_phrasings_are_apart(rows):
    assert all(len(set(phrasings)) == 8 for phrasings in written("phrasings").values())
    used = {split: {row["phrasing"] for row in rows[split]} for split in SPLITS}
    assert {split: len(names) for split, names in used.items()} == {"train": 5 * len(TASKS), "validation": len(TASKS), "test": 2 * len(TASKS)}
    assert not used["train"] & used["test"] and not used["train"] & used["validation"] and not used["validation"] & used["test"]
    for split in SPLITS:
        numbers = {int(name.rsplit("-", 1)[1]) for name in used[split]}
        assert numbers == set(range(8)[PHRASINGS[split]])


def item(row):
    """What must not be in two splits, read from the row."""
    asked = fields(row)
    if row["task"] == "rhyme":
        return frozenset((asked["word"], row["answer"]))
    if row["task"] == "bigger or smaller":
        return frozenset((asked["one"], asked["two"]))
    if row["task"] in ("odd one out", "first and last", "sort words", "sort numbers", "count"):
        return frozenset(listed(row))
    if row["task"] == "before and after":
        return asked["side"], asked["word"]
    return row["input"] or asked.get("word") or asked.get("thing") or asked["question"]


def test_items_are_apart_and_held_out_says_so(rows):
    assert {row["held_out"] for row in rows["train"]} == {""}
    seen = {split: {(row["task"], item(row)) for row in rows[split]} for split in SPLITS}
    new = {split: {(row["task"], item(row)) for row in rows[split] if row["held_out"] == "phrasing and item"} for split in SPLITS}
    known = {split: {(row["task"], item(row)) for row in rows[split] if row["held_out"] == "phrasing"} for split in SPLITS}
    assert not new["test"] & (seen["train"] | seen["validation"]) and not new["validation"] & seen["train"]
    assert known["test"] | known["validation"] <= seen["train"], "what cannot be inferred was in train"
    only_known = {task for task, _ in known["test"]} - {task for task, _ in new["test"]}
    assert only_known == {"opposite", "before and after", "colour"}
    assert {task for task, _ in known["test"]} == only_known | {"plural", "past tense", "sentiment"}


def test_passages_are_in_one_split_only(rows):
    passages = {split: {row["input"] for row in rows[split] if row["task"] in STORY_TASKS} for split in SPLITS}
    assert sum(map(len, passages.values())) == len(set().union(*passages.values()))


def test_answers_are_balanced(rows):
    for split in SPLITS:
        baseline = majority_baseline(rows[split])
        assert set(baseline) == set(TASKS)
        assert {task for task, share in baseline.items() if share > 0.4} == {"sentiment"} and baseline["sentiment"] == 0.5
        for task in ("yes or no", "story yes or no"):
            first = [row["answer"].split(",")[0] for row in rows[split] if row["task"] == task]
            assert set(first) == {"Yes", "No"} and abs(first.count("Yes") / len(first) - 0.5) <= 0.03
    for task in ("first event", "bigger or smaller"):
        shown = [row["answer"] == fields(row)["one"] for row in rows["train"] if row["task"] == task]
        assert 0.35 < sum(shown) / len(shown) < 0.65, task
    last = [places_named(row["input"])[-1] == row["answer"] for row in rows["test"] if row["task"] == "where"]
    assert sum(last) == len(last) / 2
    hero = [names_in(row["input"])[:1] == [row["answer"]] for row in rows["test"] if row["task"] == "who has"]
    assert sum(hero) == len(hero) / 2


def test_prompt_and_answer_are_short(everything):
    tokenizer = load_tokenizer("decoder")
    user, assistant, end = CHAT_MARKS
    for row in everything:
        assert len(tokenizer(row["answer"], add_special_tokens=False)["input_ids"]) <= 15, row
        assert len(tokenizer(f"{user}{prompt(row)}{end}{assistant}{row['answer']}{end}", add_special_tokens=False)["input_ids"]) <= 200, row


# The lists


def test_lists_are_consistent():
    assert len(KIND_OF) == sum(len(row["words"]) for row in WORDS["kinds"].values()), "a word is of one kind"
    assert len(FAMILY_OF) == sum(map(len, WORDS["rhymes"])) and len(SIZE_OF) == sum(map(len, WORDS["sizes"]))
    assert len(dict(WORDS["opposites"])) == len(WORDS["opposites"]) <= ROWS["train"], "each has one opposite, and all are in train"
    assert all(word != opposite for word, opposite in WORDS["opposites"])
    assert len(dict(WORDS["colours"])) == len(WORDS["colours"]) and len(FEELING) == 60 + 96
    assert len({word[0] for word in WORDS["alphabet"]}) == len(WORDS["alphabet"])
    for task, lists in LISTS.items():
        assert all(RULE[task](word) == form for word, form in lists["rule"]), task
        assert not [word for word, form in lists["own"] if RULE[task](word) == form], "those that follow the rule belong under rule"
    assert set(written("phrasings")) == set(TASKS)


# Scores, shapes, and the loader


def test_exact_match_forgives_case_spaces_and_end_punctuation_only():
    assert exact_match("  In  the Park. ", "in the park") and exact_match('"Yes, Mia has the ball"', "Yes, Mia has the ball.")
    assert not exact_match("the park", "in the park") and not exact_match("dogs and cats", "dogs, cats")
    assert not exact_match("", "") and not exact_match(".", "!")
    assert normalise("Hop,  hop!") == "hop, hop"


def test_scores_and_baselines_by_task():
    rows = [{"task": "count", "answer": answer} for answer in ("two", "two", "three")] + [{"task": "sentiment", "answer": "sad"}]
    assert matches_by_task(["Two", "three", "three", "happy"], rows) == {"count": [True, False, True], "sentiment": [False]}
    assert majority_baseline(rows) == {"count": pytest.approx(2 / 3), "sentiment": 1.0}
    assert chance([{"task": "rhyme", "answer": answer} for answer in "abcdef"]) == {"rhyme": pytest.approx(1 / 3)}
    with pytest.raises(ValueError, match="1 predictions for 4 rows: give one for each row"):
        matches_by_task(["two"], rows)


def test_the_decoders_tokenizer_knows_the_chat_template():
    tokenizer = load_tokenizer("decoder")
    row = {"instruction": "Which is smaller, a hill or a goat?", "input": "", "answer": "a goat"}
    text = tokenizer.apply_chat_template(as_messages(row)["messages"], tokenize=False)
    assert text == "<|endoftext|><|user|> Which is smaller, a hill or a goat?<|end|><|assistant|> a goat<|end|>"
    asked = tokenizer.apply_chat_template(as_messages(row)["messages"][:1], tokenize=False, add_generation_prompt=True)
    assert text.startswith(asked) and asked.endswith("<|assistant|>")


def test_a_vocabulary_without_chat_marks_grows_by_them_once():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<|endoftext|>": 0, "hello": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<|endoftext|>", eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    config = LlamaConfig(vocab_size=3, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, tie_word_embeddings=True)
    model = LlamaForCausalLM(config)
    for _ in range(2):
        give_chat_marks(tokenizer, model)
        assert len(tokenizer) == 6 == model.get_input_embeddings().num_embeddings == model.get_output_embeddings().out_features
    row = {"instruction": "hello", "input": "", "answer": "hello hello"}
    assert tokenizer.apply_chat_template(as_messages(row)["messages"])["input_ids"] == [0, 3, 1, 5, 4, 1, 1, 5]


def test_chat_shapes_are_those_of_trl():
    from trl import apply_chat_template
    from trl.data_utils import is_conversational

    row = {"instruction": "Count the animals.", "input": "cat, dog", "answer": "two"}
    user, assistant = {"role": "user", "content": "Count the animals.\n\ncat, dog"}, {"role": "assistant", "content": "two"}
    assert as_messages(row) == {"messages": [user, assistant]}
    assert as_prompt_completion(row) == {"prompt": [user], "completion": [assistant]}
    assert prompt(row | {"input": ""}) == "Count the animals."
    assert is_conversational(as_messages(row)) and is_conversational(as_prompt_completion(row))
    tokenizer = load_tokenizer("decoder")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    text = apply_chat_template(as_prompt_completion(row), tokenizer)
    assert text == {"prompt": f"<|user|>{user['content']}<|end|><|assistant|>", "completion": "two<|end|>"}


def test_shuffling_is_repeatable_and_keeps_everything():
    assert sorted(shuffled(Dice("x"), range(50))) == list(range(50))
    assert shuffled(Dice("x"), range(50)) == shuffled(Dice("x"), range(50)) != shuffled(Dice("y"), range(50))


GOOD = dict.fromkeys(INSTRUCTION_COLUMNS, "x") | {"input": "", "held_out": ""}
BAD = {
    "not json": ("{id: 1}", "not JSON"),
    "no object": ("[1]", "has a list; give it exactly id, task"),
    "a column too few": (json.dumps({"id": "y"}), r"has \['id'\]"),
    "no answer": (json.dumps(GOOD | {"id": "y", "answer": " "}), "answer is ' '; give the row a text"),
    "a number": (json.dumps(GOOD | {"id": "y", "answer": 2}), "answer is 2"),
    "the same id": (json.dumps(GOOD), "id 'x' is that of line 1 too"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_rejected_by_file_and_line(tmp_path, case):
    line, message = BAD[case]
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + line + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"train\.jsonl, line 2: .*" + message):
        check_instructions(path)


def test_an_empty_and_a_missing_file_are_named(tmp_path):
    (tmp_path / "train.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"train\.jsonl is empty: restore it"):
        check_instructions(tmp_path / "train.jsonl")
    with pytest.raises(FileNotFoundError, match=r"test\.jsonl is not there"):
        check_instructions(tmp_path / "test.jsonl")


def test_the_twin_on_the_hub_gets_the_same_columns_and_fixed_splits(monkeypatch):
    import datasets

    columns = {"instruction": [f"Do {i}." for i in range(60)], "context": [""] * 60, "response": [*map(str, range(59)), " "], "category": ["qa"] * 60}
    monkeypatch.setattr(data, "entry", lambda role: Data(repo="some/where", labels=()))
    monkeypatch.setattr(datasets, "load_dataset", lambda repo: DatasetDict(train=Dataset.from_dict(columns)))
    parts = load_instructions()
    assert {split: len(parts[split]) for split in parts} == {"train": 49, "validation": 5, "test": 5}
    assert set(parts["train"].column_names) == set(INSTRUCTION_COLUMNS) and parts["test"]["answer"][:] == load_instructions()["test"]["answer"][:]
    monkeypatch.setattr(datasets, "load_dataset", lambda repo: DatasetDict(train=Dataset.from_dict({"text": ["x"]})))
    with pytest.raises(ValueError, match=r"some/where has the columns \['text'\], the course expects"):
        load_instructions()
