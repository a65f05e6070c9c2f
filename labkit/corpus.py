"""`python -m labkit corpus`: StoryWorld text as a file, and what a text is like: its words, its 5-grams, how far it can be compressed."""

from __future__ import annotations

import lzma
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from labkit.files import whole_file

END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class Description:
    """Counts over a text. five_grams: distinct runs of five words, for each million words. xz and ngram: bits per byte, None if not measured.

    ngram: a Kneser–Ney 5-gram over tokens, trained on the first nine tenths of the text and measured on the last.
    """

    bytes: int
    words: int
    distinct_words: int
    five_grams: float
    xz: float
    ngram: float | None

    def __str__(self) -> str:
        ngram = "" if self.ngram is None else f", 5-gram {self.ngram:.3f} bits per byte"
        return (
            f"{self.bytes / 1e6:.1f} MB, {self.words:,} words, {self.distinct_words:,} distinct, "
            f"{self.five_grams:,.0f} distinct 5-grams per million words, xz -9 {self.xz:.3f} bits per byte{ngram}"
        )


def write_corpus(path: Path, megabytes: float, *, seed: int = 0, split: str = "train", recaps: float = 0.0) -> float:
    """Write at least so many megabytes of stories, <|endoftext|> on a line of its own after each. Returns their entropy in bits per byte.

    recaps: the probability that a sentence on who has what, or is where, follows an event.
    Raises FileExistsError when `path` is there, ValueError when megabytes is not positive or recaps is not a probability.
    """
    from labkit.storyworld import tellers

    if megabytes <= 0:
        raise ValueError(f"megabytes is {megabytes}: ask for more than 0")
    if Path(path).exists():
        raise FileExistsError(f"{path} is there already: name a new file")
    size = bits = 0
    with whole_file(Path(path)) as part, part.open("w", encoding="utf-8", newline="\n") as file:
        for teller in tellers(seed, split, recaps=recaps):
            story = teller.story()
            file.write(f"{story.text}\n{END_OF_TEXT}\n")
            size += len(story.text.encode())
            bits += story.bits
            if size >= megabytes * 1e6:
                return bits / size
    raise RuntimeError("the world ran out of stories")


def describe(text: str, tokenizer=None, words: int = 1_000_000) -> Description:
    """What the first `words` words of a text are like. tokenizer: for the 5-gram's tokens; without one it is not measured."""
    pieces = re.findall(r"\S+\s*", text.replace(END_OF_TEXT, "\n"))[:words]
    text = "".join(pieces)
    plain = [piece.strip().strip(".,!?\"'").lower() for piece in pieces]
    number = {word: i for i, word in enumerate(dict.fromkeys(plain))}
    ids = np.array([number[word] for word in plain])
    runs = len(np.unique(np.lib.stride_tricks.sliding_window_view(ids, 5), axis=0)) if len(ids) >= 5 else 0
    data = text.encode()
    return Description(
        len(data),
        len(plain),
        len(number),
        runs / max(1, len(plain)) * 1e6,
        8 * len(lzma.compress(data, preset=9)) / max(1, len(data)),
        _ngram(text, tokenizer) if tokenizer is not None else None,
    )


def _ngram(text: str, tokenizer) -> float:
    from labkit.ngrams import NGramModel

    cut = text.rfind(" ", 0, len(text) * 9 // 10)
    train, held_out = (np.array(tokenizer(part)["input_ids"]) for part in (text[:cut], text[cut:]))
    return NGramModel(train, 5, len(tokenizer)).bits(held_out) / len(text[cut:].encode())
