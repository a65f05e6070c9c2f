"""The corpus command's two halves: a file of stories written whole, and counts over a text."""

import pytest

from labkit.corpus import END_OF_TEXT, describe, write_corpus


def test_stories_are_written_whole_and_only_once(tmp_path):
    path = tmp_path / "stories.txt"
    floor = write_corpus(path, 0.02, seed=1)
    text = path.read_text(encoding="utf-8")
    assert len(text.encode()) >= 20_000 and text.rstrip().endswith(END_OF_TEXT) and 0.01 < floor < 1
    with pytest.raises(FileExistsError, match=r"stories\.txt"):
        write_corpus(path, 0.02)
    with pytest.raises(ValueError, match="0"):
        write_corpus(tmp_path / "none.txt", 0)
    write_corpus(tmp_path / "recaps.txt", 0.02, seed=1, recaps=0.5)
    assert (tmp_path / "recaps.txt").read_text(encoding="utf-8") != text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["recaps.txt", "stories.txt"]


def test_description_counts_words_and_runs():
    found = describe("The cat sat. The cat sat down, and the cat slept well.")
    assert (found.words, found.distinct_words) == (12, 7)
    assert found.five_grams == pytest.approx(8 / 12 * 1e6)
    assert found.ngram is None and found.xz > 0 and "12 words" in str(found)
    repeated = describe("one two three four five " * 400)
    assert repeated.five_grams == pytest.approx(5 / 2000 * 1e6) and repeated.xz < 1
