import collections
import json
import re

import pytest
from datasets import ClassLabel

from labkit.data import SPLITS, check_rows, fingerprint, join_articles, load_folder, load_news, load_pretraining_text, load_reviews, subset

SIZES = {"reviews": {"train": 1200, "validation": 200, "test": 600}, "news": {"train": 800, "validation": 120, "test": 480}}
LOADERS = {"reviews": load_reviews, "news": load_news}
LABELS = {"reviews": ["neg", "pos"], "news": ["World", "Sports", "Business", "Sci/Tech"]}
WORDS = {"reviews": (30, 130), "news": (20, 60)}


@pytest.fixture(scope="module", params=["reviews", "news"])
def named(request):
    return request.param, LOADERS[request.param]()


def words(text):
    return re.findall(r"[a-z0-9']+", text.lower())


def test_splits_schema_and_balance(named):
    name, data = named
    assert {split: len(data[split]) for split in SPLITS} == SIZES[name]
    for split in SPLITS:
        label = data[split].features["label"]
        assert isinstance(label, ClassLabel) and label.names == LABELS[name]
        counts = collections.Counter(data[split]["label"])
        assert len(counts) == len(LABELS[name]) and len(set(counts.values())) == 1


def test_lengths(named):
    name, data = named
    low, high = WORDS[name]
    lengths = [len(words(text)) for split in SPLITS for text in data[split]["text"]]
    assert low <= min(lengths) and max(lengths) <= high


def test_no_near_duplicates_within_or_across_splits(named):
    _, data = named
    index, clashes = {}, []
    texts = [(split, i, text) for split in SPLITS for i, text in enumerate(data[split]["text"])]
    shingles = []
    for split, i, text in texts:
        tokens = words(text)
        shingles.append({tuple(tokens[k : k + 5]) for k in range(len(tokens) - 4)})
        shared = collections.Counter(j for s in shingles[-1] for j in index.get(s, ()))
        clashes += [((split, i), texts[j][:2]) for j, n in shared.items() if n >= 0.3 * min(len(shingles[-1]), len(shingles[j]))]
        for s in shingles[-1]:
            index.setdefault(s, []).append(len(shingles) - 1)
    assert not clashes


def test_ratings_agree_with_labels():
    for rows in load_reviews().values():
        assert all((rating >= 7) == bool(label) and rating not in (5, 6) for rating, label in zip(rows["rating"], rows["label"]))


GOOD = {"text": "A fine film.", "label": 1}
BAD = {
    "not json": ("{text: 1}", "not JSON"),
    "no object": ("[1, 2]", "a list, not an object"),
    "no text": ('{"label": 1}', "text is None; give the row a text or remove it"),
    "blank text": ('{"text": "  ", "label": 1}', "text is '  '"),
    "label -1": ('{"text": "x", "label": -1}', r"label is -1; use 0 to 1 \(neg, pos\)"),
    "label 2": ('{"text": "x", "label": 2}', "label is 2; use 0 to 1"),
    "label true": ('{"text": "x", "label": true}', "label is True"),
    "no label": ('{"text": "x"}', "label is None"),
    "rating against label": ('{"text": "x", "label": 1, "rating": 3}', r"rating 3 does not fit label 1 \(pos\)"),
    "rating in the middle": ('{"text": "x", "label": 1, "rating": 6}', "rating 6 does not fit"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_rejected_by_file_and_line(tmp_path, case):
    line, message = BAD[case]
    path = tmp_path / "reviews" / "train.jsonl"
    path.parent.mkdir()
    path.write_text(json.dumps(GOOD) + "\n" + line + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"reviews/train\.jsonl, line 2: " + message):
        check_rows(path, ("neg", "pos"))


def test_an_empty_and_a_missing_file_are_named(tmp_path):
    (tmp_path / "train.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"train\.jsonl is empty: restore it"):
        check_rows(tmp_path / "train.jsonl", ("neg", "pos"))
    with pytest.raises(FileNotFoundError, match=r"train\.jsonl is not there"):
        load_folder(tmp_path / "nothing", ("neg", "pos"))


def test_subset_is_balanced_nested_and_repeatable():
    train = load_news()["train"]
    small, large = subset(train, 40, seed=3), subset(train, 200, seed=3)
    assert set(collections.Counter(small["label"]).values()) == {10}
    assert set(small["text"]) < set(large["text"])
    assert fingerprint(small) == fingerprint(subset(train, 40, seed=3)) != fingerprint(subset(train, 40, seed=4))
    with pytest.raises(ValueError, match="900 rows asked for, but class 0 has too few"):
        subset(train, 900, seed=0)


def test_pretraining_text_is_stories_with_their_bits_and_the_splits_differ():
    corpus = load_pretraining_text(train=12, test=3, seed=5)
    assert {split: len(corpus[split]) for split in corpus} == {"train": 12, "test": 3}
    assert min(corpus["train"]["bits"][:]) > 20 and not set(corpus["train"]["text"][:]) & set(corpus["test"]["text"][:])
    assert load_pretraining_text(train=12, test=3, seed=5)["train"]["text"][:] == corpus["train"]["text"][:]
    assert load_pretraining_text(train=12, test=3, seed=6)["train"]["text"][:] != corpus["train"]["text"][:]


def test_wikitext_lines_become_articles():
    lines = [
        "",
        " = Heron = \n",
        "",
        " A heron is a bird . \n",
        " = = Food = = \n",
        " Fish @-@ eating . \n",
        " = Iron = \n",
        " A metal . \n",
        " = Ivy = \n",
    ]
    assert join_articles(lines, 5) == ["= Heron =\nA heron is a bird .\n= = Food = =\nFish @-@ eating .", "= Iron =\nA metal .", "= Ivy ="]
    assert join_articles(lines, 2) == join_articles(lines, 5)[:2]
