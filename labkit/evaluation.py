"""`python -m labkit pretrain --evaluate FOLDER`: a pretrained decoder next to what it must beat, in bits per byte of held-out text."""

from __future__ import annotations

import lzma
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from labkit.measure import bits_per_byte
from labkit.ngrams import NGramModel
from labkit.runtime import quiet_libraries
from labkit.tokens import STORYWORLD, Source, encode_documents, held_out_texts, join_documents

NGRAM_ORDER = 5


def print_evaluation(folder: Path, sources: Sequence[Source]) -> int:
    """Print one line a measurement for each held-out source; the exit status 0. Raises FileNotFoundError when there is no model."""
    if not sources:
        raise ValueError("--evaluate needs at least one --validation")
    for name, measured in evaluate_model(folder, sources).items():
        print(f"{name}, bits per byte")
        for what, value in measured.items():
            print(f"  {what:<36} {value:.3f}")
    if not (folder / "run" / "tokens.npy").is_file():
        print(f"no n-gram model: the training tokens, {folder / 'run' / 'tokens.npy'}, are not there")
    return 0


def evaluate_model(folder: Path, sources: Sequence[Source]) -> dict[str, dict[str, float]]:
    """For each source, bits per byte of the model, of the same architecture untrained, of `xz -9` and of a Kneser–Ney 5-gram model.

    The n-gram model has the model's own tokens: `folder`/run/tokens.npy, each document once, because repeated ones would spoil its
    counts. It is left out when they are not there. For StoryWorld the entropy of the storyteller's choices is listed too: no model can
    need fewer bits on average.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(f"{folder} holds no finished model: train one with `python -m labkit pretrain --out {folder}`")
    quiet_libraries()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    untrained = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
    stream = folder / "run" / "tokens.npy"
    ngrams = _ngram_model(np.load(stream), tokenizer) if stream.is_file() else None
    results = {}
    for source in sources:
        texts = held_out_texts(source)
        size = sum(len(text.encode()) for text in texts)
        context = model.config.max_position_embeddings
        measured = {
            "this model": bits_per_byte(model, tokenizer, texts, context=context),
            "untrained": bits_per_byte(untrained, tokenizer, texts, context=context),
            "xz -9": xz_bits_per_byte(texts),
        }
        if ngrams is not None:
            ids = join_documents(encode_documents(tokenizer, texts), tokenizer.eos_token_id)
            bits = -np.log2(ngrams.probabilities(ids))
            measured[f"Kneser–Ney {NGRAM_ORDER}-gram"] = float(bits[ids != tokenizer.eos_token_id].sum()) / size
        measured["a vocabulary of equal tokens"] = _uniform(tokenizer, texts, size)
        if source.path == STORYWORLD:
            measured["the storyteller's choices"] = story_entropy()
        results[source.name] = measured
    return results


def xz_bits_per_byte(texts: Sequence[str]) -> float:
    """What `xz -9` needs for the texts, one after the other, a blank line between two."""
    data = "\n\n".join(texts).encode()
    return 8 * len(lzma.compress(data, preset=9)) / len(data)


def story_entropy() -> float:
    """Bits per byte of the choices that made StoryWorld's held-out stories."""
    from labkit.tokens import held_out_stories

    stories = held_out_stories()
    return sum(story.bits for story in stories) / sum(len(story.text.encode()) for story in stories)


def _ngram_model(stream: np.ndarray, tokenizer) -> NGramModel:
    ends = np.flatnonzero(stream == tokenizer.eos_token_id)
    documents = {stream[start + 1 : end].tobytes(): None for start, end in zip(ends, ends[1:])}  # a dict keeps the order, a set does not
    once = join_documents([np.frombuffer(document, dtype=stream.dtype) for document in documents], tokenizer.eos_token_id)
    return NGramModel(once, NGRAM_ORDER, len(tokenizer))


def _uniform(tokenizer, texts: Sequence[str], size: int) -> float:
    return math.log2(len(tokenizer)) * sum(map(len, encode_documents(tokenizer, texts))) / size
