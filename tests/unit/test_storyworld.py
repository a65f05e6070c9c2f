"""StoryWorld: every plot can happen, the same seed gives the same text, the answers are true, the splits are apart."""

import itertools
import json
import subprocess
import sys
from collections import Counter

import pytest

from labkit.files import DATA
from labkit.storybook import Character, Dice, Place, Thing, book, compile_phrasing, with_article
from labkit.storyquestions import PROBE_KINDS, QUESTION_KINDS, Probe, judge, prefers_right, probes, questions
from labkit.storyworld import PlotError, Teller, held_out, stories, tellers

FORMS = {
    "character": {"", "name", "he", "him", "his", "self", "s", "He", "His"},
    "thing": {"", "the", "a", "noun", "it"},
    "place": {"", "at", "to"},
    "home": {"at", "to"},
}


def branches(steps, optional=True):
    """Every way through compiled steps: optional steps all taken or all left out, every branch of an either."""
    ways = [[]]
    for kind, may_skip, content in steps:
        if kind == "either":
            ways = [way + tail for way in ways for branch in content for tail in branches(branch, optional)]
        elif not may_skip or optional:
            ways = [[*way, content] for way in ways]
    return ways


@pytest.mark.parametrize("plot", sorted(book().plots))
def test_every_branch_of_every_plot_can_happen(plot):
    rows = book().plots[plot]
    for ending, optional in itertools.product(("happy", "unhappy"), (True, False)):
        for way in branches((*rows["steps"], *rows[ending]), optional):
            teller = Teller(Dice(f"{plot} {ending}"))
            teller.hero = teller._character(rows["roles"]["A"].split("|")[0])
            teller.home = Place("home", "indoor", "at home", "home")
            teller.where[teller.hero] = teller.home
            bound = teller._bind(rows["roles"], None)
            for step in way:
                teller._step(step, bound)
            assert way[-1][0] == "feel", "an ending ends with a feeling"


def test_there_are_enough_plots_and_phrasings():
    assert len(book().plots) >= 30
    for name, verb in book().verbs.items():
        assert all(len(phrasings) >= 5 for phrasings in verb.phrasings.values()), name


def slots(phrasing):
    return [part for part in phrasing if type(part) is tuple]


def test_every_slot_can_be_filled():
    lists = book().lexicon["lists"]
    sort = {"A": "character", "B": "character", "C": "character", "T": "thing", "U": "thing", "P": "place", "Q": "place", "H": "home"}
    for name, verb in book().verbs.items():
        for phrasing in itertools.chain.from_iterable(verb.phrasings.values()):
            for role, form, _, _ in slots(phrasing):
                if role == "+":
                    assert form in lists, (name, form)
                elif role in sort:
                    assert role in verb.roles and form in FORMS[sort[role]], (name, role, form)
                else:
                    assert role in ("S", "F", "cause"), (name, role)
    for kind in ("outdoor", "indoor", "water", "wild"):
        for phrasing in book().asides[kind]:
            assert all((role == "+" and form in lists) or role == "P" for role, form, _, _ in slots(phrasing))


def test_same_seed_same_text_in_another_process():
    here = stories(3, seed=5)[2].text
    code = "from labkit.storyworld import stories; print(stories(3, seed=5)[2].text, end='')"
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8", env=None, check=True).stdout
    assert here == there
    assert stories(2, seed=6)[0].text != stories(2, seed=5)[0].text
    assert [s.text for s in stories(2, seed=5)] == [s.text for s in stories(3, seed=5)][:2]


def test_the_splits_tell_different_combinations():
    for split in ("train", "test"):
        for story in stories(150, seed=1, split=split):
            assert story.text
            if len(story.plots) == 1 and "T" not in book().plots[story.plots[0]]["roles"]:
                assert held_out(story.hero.name, "", story.plots[0]) == (split == "test")
    assert 0.05 < sum(held_out(str(i), "ball", "plot") for i in range(2000)) / 2000 < 0.15


def test_text_is_clean():
    for story in stories(300, seed=2):
        assert "{" not in story.text and "  " not in story.text and story.text.lstrip(chr(34))[0].isupper(), story.text
        assert story.text.count('"') % 2 == 0, story.text
        assert not [word for word in (" a a", " a e", " a i", " a o", " the the ", " ,", " .") if word in story.text.replace("a one", "")], story.text
        assert story.bits > 50


def test_the_ending_can_be_chosen():
    for ending, good in (("happy", True), ("unhappy", False)):
        told = stories(60, seed=3, ending=ending)
        assert {story.ending for story in told} == {ending}
        last = Counter(next(event.bound["F"] for event in reversed(story.events) if event.verb == "feel") for story in told)
        glad = {"happy", "proud", "grateful", "brave", "excited", "surprised"}
        assert (sum(last[f] for f in glad) > 48) == good, last
    assert {story.ending for story in stories(60, seed=3)} == {"happy", "unhappy"}


def test_bits_are_those_of_the_choices():
    dice = Dice("x")
    dice.choose(range(8))
    dice.draw(range(1000))
    assert dice.bits == 3
    assert dice.chance(0.25) in (True, False) and dice.bits in (5, pytest.approx(3.415, abs=1e-3))


def test_recaps_say_what_is_true_and_are_off_unless_asked_for():
    told = []

    class Watched(Teller):
        def _tell(self, phrasings, bound, key):
            if key in ("recap_has", "recap_at", "recap_lies"):
                told.append(key)
                subject, other = bound.get("A", bound.get("T")), bound.get("P", bound.get("T"))
                assert self.where[other] is subject if key == "recap_has" else self.where[subject] is other
            super()._tell(phrasings, bound, key)

    dice = Dice("recaps")
    texts = [Watched(dice, recaps=0.5).story().text for _ in range(60)]
    assert set(told) == {"recap_has", "recap_at", "recap_lies"}
    assert len(told) > 100 and all(texts)
    assert [next(tellers(3)).story().text for _ in range(1)] == [stories(1, 3)[0].text]
    with pytest.raises(ValueError, match=r"recaps is 1\.5"):
        next(tellers(0, recaps=1.5))


def test_bad_requests_name_the_value():
    for call, word in (
        (lambda: stories(-1), "-1"),
        (lambda: stories(1, split="dev"), "dev"),
        (lambda: stories(1, ending="sad"), "sad"),
        (lambda: questions(1, kinds=("when",)), "when"),
        (lambda: probes(1, kind="colour"), "colour"),
    ):
        with pytest.raises(ValueError, match=word):
            call()


def test_a_step_that_cannot_happen_is_refused():
    teller = Teller(Dice("x"))
    teller.hero = teller._character("child")
    other = teller._character("child")
    with pytest.raises(PlotError, match="give A B T"):
        teller._step(("give", "A", "B", "T"), {"A": teller.hero, "B": other, "T": Thing("ball", "toy", ("red",))})


def test_questions_have_answers_in_their_passage():
    asked = questions(400, seed=4)
    assert set(QUESTION_KINDS) == {question.kind for question in asked}
    for question in asked:
        assert question.passage and question.question.endswith("?") and question.answer
        if question.kind == "who has":
            name = question.answer.split()[-1].rstrip(".")
            assert name in question.passage, question
        if question.kind == "first":
            assert question.answer in question.question


def test_answers_do_not_follow_from_the_order_in_the_question():
    first = questions(200, seed=5, kinds=("first",))
    said_first = sum(question.question.startswith(f"What happened first: {question.answer}") for question in first)
    assert 60 < said_first < 140


@pytest.mark.parametrize("kind", PROBE_KINDS)
def test_probes_differ_in_what_they_probe_only(kind):
    for probe in probes(60, seed=6, kind=kind):
        assert probe.right != probe.wrong and probe.right[0] == probe.wrong[0] == " "
        assert probe.prefix


def test_a_model_is_asked_for_both_continuations():
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    class Letters:
        bos_token_id = 0

        def __call__(self, text, add_special_tokens):
            return {"input_ids": [1 + ord(letter) % 50 for letter in text]}

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)).eval()
    model.config.max_position_embeddings = 40
    ids = Letters()(" b" * 60 + " b", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        likely, unlikely = (chr(int(k) - 1 + 50) for k in model(torch.tensor([[*ids[-38:]]])).logits[0, -1, 1:51].topk(50).indices[[0, -1]] + 1)
    probe = Probe(" b" * 60 + " b", likely, unlikely, "name")
    assert prefers_right(model, Letters(), probe)
    assert not prefers_right(model, Letters(), Probe(probe.prefix, unlikely, likely, "name"))


def test_the_judge_sees_wrong_names_places_and_owners():
    story = next(
        s for s in stories(200, seed=7) if any(isinstance(w, Character) and t in s.things for t, w in s.where.items() if isinstance(t, Thing))
    )
    thing, holder = next((t, w) for t, w in story.where.items() if isinstance(t, Thing) and t in story.things and isinstance(w, Character))
    assert judge(story, f"{holder.name} had the {thing.name}.").possession is True
    other = next((c for c in story.characters if c is not holder), None)
    if other:
        assert judge(story, f"{other.name} had the {thing.name}.").possession is False
    stranger = next(name for name in book().lexicon["girls"] if name not in story.text)
    assert judge(story, f"{stranger} laughed.").names is False
    assert judge(story, f"Then came a girl named {stranger}. {stranger} laughed.").names is True
    assert judge(story, "It was late.").consistent


def test_small_words():
    assert with_article("apple") == "an apple" and with_article("unicorn") == "a unicorn" and with_article("hat", "A") == "A hat"
    assert compile_phrasing('It was a {+weather} day. {A} said, "Hi."') == (
        "It was ",
        ("+", "weather", "a", False),
        " day. ",
        ("A", "", "", True),
        ' said, "Hi."',
    )


def test_data_is_json_with_a_card():
    assert (DATA / "storyworld" / "README.md").exists()
    for path in (DATA / "storyworld").glob("*.json"):
        json.loads(path.read_text(encoding="utf-8"))
