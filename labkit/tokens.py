"""From text to token ids: documents, a tokenizer of our own, and one memory-mapped stream that pretraining reads rows from."""

from __future__ import annotations

import bz2
import functools
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from labkit.files import sha256, whole_file, write_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT, PAD = "<|endoftext|>", "<|pad|>"
# A conversation in the chat marks (Jinja, as transformers reads it). A message begins with a space, as words in running text do.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|> ' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
CHAT_MARKS = ("<|user|>", "<|assistant|>", "<|end|>")  # no text holds them; reserved for supervised fine-tuning
STORYWORLD = "storyworld"
STORIES_AT_ONCE = 2000
HELD_OUT_STORIES = 500
LONGEST_DOCUMENT = 6000  # characters; longer ones are cut between paragraphs, so that few tokens still sample many books
_BYTES_PER_TOKEN = 4.0  # a guess, only for how much text the tokenizer is trained on
_STRAIGHT = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "—": "--", "\u00a0": " ", "\r": None})


@dataclass(frozen=True)
class Source:
    """Text to train or to measure on: a .txt or .txt.bz2 file, or StoryWorld. weight: its share of the tokens, before normalising."""

    path: str
    weight: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Source:
        """Read `PATH` or `PATH:WEIGHT`. Raises ValueError for a weight that is not above 0, FileNotFoundError for a missing file."""
        path, colon, weight = text.rpartition(":")
        if not colon or not re.fullmatch(r"-?[\d.]+(e-?\d+)?", weight):
            path, weight = text, "1"
        source = cls(path, float(weight))
        if not source.weight > 0:
            raise ValueError(f"{text!r}: the weight is {weight}; give a number above 0, or leave the source out")
        if path != STORYWORLD:
            if not Path(path).is_file():
                raise FileNotFoundError(f"{path} does not exist: give a .txt or .txt.bz2 file, or `{STORYWORLD}`")
            if not path.endswith((".txt", ".txt.bz2")):
                raise ValueError(f"{path}: only .txt and .txt.bz2 files are read")
        return source

    @property
    def name(self) -> str:
        return Path(self.path).name.removesuffix(".bz2").removesuffix(".txt")

    def fingerprint(self) -> str:
        """A hash of the text this source gives: of the file, or of StoryWorld's first stories."""
        if self.path != STORYWORLD:
            return sha256(Path(self.path))
        from labkit.storyworld import stories

        return hashlib.sha256("\n".join(story.text for story in stories(20, seed=0)).encode()).hexdigest()


def read_documents(source: Source) -> list[str]:
    """The documents of a text file, cleaned, each once, in the file's order."""
    opener = bz2.open if source.path.endswith(".bz2") else open
    with opener(source.path, "rt", encoding="utf-8") as file:
        return split_documents(file.read())


def held_out_texts(source: Source) -> list[str]:
    """The documents of a held-out file, or StoryWorld's held-out stories."""
    return [story.text for story in held_out_stories()] if source.path == STORYWORLD else read_documents(source)


def held_out_stories() -> list:
    """Stories whose hero, thing and plot come together in no training story."""
    from labkit.storyworld import stories

    return stories(HELD_OUT_STORIES, seed=0, split="test")


def split_documents(text: str) -> list[str]:
    """Cut a text into documents and clean them; a document met before (or whose first 200 characters were) is dropped.

    With `<|endoftext|>` in the text, that is the boundary. Else a heading begins a document: a line of at most 100 characters
    between blank lines, without a sentence's final mark. A document over LONGEST_DOCUMENT characters is cut between paragraphs.
    A paragraph wrapped at 80 columns is joined to one line, and a blank line set between paragraphs; curly quotes and dashes
    become the typewriter's.
    """
    text = text.translate(_STRAIGHT)
    parts = [_blocks(part) for part in text.split(END_OF_TEXT)] if END_OF_TEXT in text else _by_headings(_blocks(text))
    documents, seen = [], set()
    for document in (piece for part in parts for piece in _cut(part)):
        key = re.sub(r"\W+", " ", document[:200])
        if document and key not in seen:
            seen.add(key)
            documents.append(document)
    return documents


def _blocks(text: str) -> list[str]:
    """The paragraphs of a text, each on one line; short lines (verse, lists) stay as they are."""
    blocks = []
    for block in re.split(r"\n\s*\n", text):
        lines = [line.strip() for line in block.split("\n") if line.strip()]
        longest = max(map(len, lines), default=0)
        if longest > 80:
            blocks += lines
        elif len(lines) > 1 and min(map(len, lines[:-1])) >= 45:
            blocks.append(" ".join(lines))
        elif lines:
            blocks.append("\n".join(lines))
    return blocks


def _by_headings(blocks: list[str]) -> Iterator[list[str]]:
    part: list[str] = []
    has_body = False
    for block in blocks:
        heading = len(block) <= 100 and "\n" not in block and not block.endswith((".", "!", "?", '"', "'", ":", ";", ",", "-", "*"))
        if heading and has_body:
            yield part
            part, has_body = [], False
        part.append(block)
        has_body |= not heading
    yield part


def _cut(blocks: list[str]) -> Iterator[str]:
    """Join paragraphs, with a blank line between two, to documents of LONGEST_DOCUMENT characters at most (or of one paragraph)."""
    part: list[str] = []
    length = 0
    for block in blocks:
        if part and length + len(block) > LONGEST_DOCUMENT:
            yield "\n\n".join(part)
            part, length = [], 0
        part.append(block)
        length += len(block) + 2
    yield "\n\n".join(part)


def _draw(source: Source, documents: list[str] | None, seed: int) -> Iterator[str]:
    """Documents without end: a file's in a new random order at every pass; StoryWorld's are always new ones."""
    turn = 0
    while True:
        if source.path == STORYWORLD:
            from labkit.storyworld import stories

            yield from (story.text for story in stories(STORIES_AT_ONCE, seed=1000 * seed + turn))
        else:
            yield from (documents[i] for i in np.random.default_rng([seed, turn]).permutation(len(documents)))
        turn += 1


def train_tokenizer(texts: Iterator[str], vocab_size: int, context: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer (Sennrich et al. 2016, arXiv 1508.07909; bytes as in GPT-2): no text is unknown to it.

    `<|endoftext|>` is the first and last token of a document (bos and eos); padding has an id of its own.
    Raises ValueError when vocab_size cannot hold the 256 bytes and the special tokens, or does not fit 16 bits.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = [END_OF_TEXT, PAD, *CHAT_MARKS]
    if not 256 + len(special) <= vocab_size <= 65536:
        raise ValueError(f"vocab_size is {vocab_size}: choose {256 + len(special)} to 65536")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        extra_special_tokens=list(CHAT_MARKS),
        chat_template=CHAT_TEMPLATE,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def encode_documents(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[np.ndarray]:
    """The ids of each document, uint16, without `<|endoftext|>`."""
    encoded = tokenizer.backend_tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return [np.array(one.ids, dtype=np.uint16) for one in encoded]


def join_documents(documents: Sequence[np.ndarray], end_of_text: int) -> np.ndarray:
    """One stream with `<|endoftext|>` before the first, between all and after the last document."""
    mark = np.array([end_of_text], dtype=np.uint16)
    return np.concatenate([mark] + [part for document in documents for part in (document, mark)])


def prepare(
    sources: Sequence[Source],
    *,
    tokens: int,
    vocab_size: int,
    context: int,
    seed: int,
    folder: Path,
    tokenizer_from: Path | None = None,
) -> tuple[np.ndarray, dict]:
    """Make, or find, `folder`/tokens.npy (uint16, memory-mapped: it is returned) and the tokenizer; and a description of them.

    The tokenizer is trained on the texts, or is that of the model in the folder `tokenizer_from`.
    Each source gives its share of `tokens`, repeated in a new order when it runs out; then all documents are shuffled together.
    What is found is used only if it was made from the same texts and settings and is undamaged; else it is made again.
    """
    wanted = {
        "sources": [[source.name, source.weight, source.fingerprint()] for source in sources],
        "tokens": tokens,
        "vocab_size": vocab_size,
        "context": context,
        "seed": seed,
    }
    if tokenizer_from is not None:
        wanted["tokenizer"] = sha256(tokenizer_from / "tokenizer.json")
    path, record = folder / "tokens.npy", folder / "tokens.json"
    if record.is_file() and path.is_file():
        found = json.loads(record.read_text(encoding="utf-8"))
        if found["made_from"] == wanted and found["sha256"] == sha256(path):
            return np.load(path, mmap_mode="r"), found
    pools = [None if source.path == STORYWORLD else read_documents(source) for source in sources]
    total = sum(source.weight for source in sources)
    shares = [tokens * source.weight / total for source in sources]
    if tokenizer_from is not None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(tokenizer_from)
    else:
        tokenizer = train_tokenizer(_tokenizer_texts(sources, pools, shares, seed), vocab_size, context)
    drawn, counts = [], {}
    for source, pool, share in zip(sources, pools, shares):
        documents = _draw_tokens(tokenizer, _draw(source, pool, seed), int(share) + 1)
        counts[source.name] = {"tokens": sum(len(d) + 1 for d in documents), "documents": len(documents)}
        if pool is not None:
            counts[source.name]["passes"] = round(len(documents) / len(pool), 2)
        drawn += documents
    order = np.random.default_rng(seed).permutation(len(drawn))
    stream = join_documents([drawn[i] for i in order], tokenizer.eos_token_id)
    tokenizer.save_pretrained(folder)
    with whole_file(path) as part, part.open("wb") as file:
        np.save(file, stream)
    description = {"made_from": wanted, "sha256": sha256(path), "sources": counts, "vocabulary": len(tokenizer)}
    write_text(record, json.dumps(description, indent=1) + "\n")
    return np.load(path, mmap_mode="r"), description


def _tokenizer_texts(sources: Sequence[Source], pools: list, shares: list[float], seed: int) -> Iterator[str]:
    """The documents that will be drawn, each source's once at most."""
    for source, pool, share in zip(sources, pools, shares):
        room = share * _BYTES_PER_TOKEN
        for number, document in enumerate(_draw(source, pool, seed)):
            if room <= 0 or (pool is not None and number == len(pool)):
                break
            room -= len(document)
            yield document


def _draw_tokens(tokenizer: PreTrainedTokenizerFast, texts: Iterator[str], count: int) -> list[np.ndarray]:
    """Encode documents in batches until there are `count` tokens, their `<|endoftext|>` counted."""
    documents: list[np.ndarray] = []
    while count > 0:
        for ids in encode_documents(tokenizer, [next(texts) for _ in range(256)]):
            if count > 0:
                documents.append(ids)
                count -= len(ids) + 1
    return documents


def training_rows(stream: np.ndarray, step: int, *, rows: int, context: int, seed: int) -> np.ndarray:
    """The batch of `step` (from 0): (rows, context + 1) ids, int64; a pure function of its arguments.

    The stream is cut into rows that share one token, so that every token but the first is predicted once; rows come in random order,
    drawn anew at each pass over the stream.
    """
    available = (len(stream) - 1) // context
    if available < rows:
        raise ValueError(
            f"{len(stream)} tokens make {available} rows of {context}, a batch needs {rows}: train on more tokens, or lower batch tokens"
        )
    per_pass = available // rows
    turn, position = divmod(step, per_pass)
    chosen = _order(seed, turn, available)[position * rows : (position + 1) * rows]
    return np.stack([stream[i * context : (i + 1) * context + 1] for i in chosen]).astype(np.int64)


@functools.lru_cache(maxsize=1)  # of a long stream it takes milliseconds, and a GPU's step takes no more
def _order(seed: int, turn: int, available: int) -> np.ndarray:
    return np.random.default_rng([seed, turn]).permutation(available)
