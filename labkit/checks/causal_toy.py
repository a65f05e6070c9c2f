"""What the checks of lab 02 try a learner's code on: a toy language model, sequences it can learn, and a byte pair encoding to compare with."""

from __future__ import annotations

import math
from collections import Counter
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F


class Toy(nn.Module):
    """A causal language model small enough to train in a check: (batch, seq) -> .logits (batch, seq, vocab_size).

    A position sees its own token and the mean of all tokens up to it. Records the ids it was given in train mode.
    """

    def __init__(self, vocab_size: int = 12, dropout: float = 0.0, scale: float = 1.0):
        super().__init__()
        self.scale = scale
        self.embedding, self.dropout = nn.Embedding(vocab_size, 16), nn.Dropout(dropout)
        self.lm_head = nn.Linear(32, vocab_size)
        self.seen: list[torch.Tensor] = []
        self.longest = 0

    def forward(self, input_ids, labels=None, **unused):
        if self.training:
            self.seen.append(input_ids.clone())
        self.longest = max(self.longest, input_ids.shape[1])
        hidden = self.embedding(input_ids)
        before = hidden.cumsum(1) / torch.arange(1, input_ids.shape[1] + 1).view(1, -1, 1)
        logits = self.scale * self.lm_head(self.dropout(torch.cat([hidden, before], -1)))
        loss = None if labels is None else F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return SimpleNamespace(logits=logits, loss=loss)


def window_bits(model: nn.Module, ids: torch.Tensor, window: int) -> torch.Tensor:
    """(len(ids) - 1,) bits of each token after the first, read in windows that overlap by one token."""
    parts = []
    for start in range(0, len(ids) - 1, window):
        piece = ids[start : start + window + 1]
        logp = model(piece[None, :-1]).logits[0].log_softmax(-1)
        parts.append(-logp.gather(-1, piece[1:, None])[:, 0] / math.log(2))
    return torch.cat(parts)


def toy_blocks(count: int) -> torch.Tensor:
    """(count, 9) blocks in which every token but the first follows from the one before it."""
    start = torch.randint(0, 12, (count, 1))
    return (start + 5 * torch.arange(9)) % 12


def next_token_loss(model: nn.Module, blocks: torch.Tensor) -> float:
    """Mean nats of every next token of (count, length) blocks."""
    return F.cross_entropy(model(blocks).logits[:, :-1].flatten(0, 1), blocks[:, 1:].flatten()).item()


def steps_are_small(candidate) -> bool:
    """With learning rate 0 nothing moves; what is stored at the end must be the last step's gradient (perhaps clipped), or none."""
    model, seen = Toy(), []
    model.lm_head.weight.register_hook(lambda gradient: seen.append(gradient.clone()))
    candidate(model, toy_blocks(64), learning_rate=0.0, batch_size=8, seed=1, watch=None)
    stored = model.lm_head.weight.grad
    return stored is None or bool(F.cosine_similarity(stored.flatten(), seen[-1].flatten(), dim=0) > 0.9999)


def gradients_are_clipped(candidate) -> bool:
    """On a model with very large gradients and learning rate 0: what is stored after the last step has at most norm 1, or is gone."""
    model = Toy(scale=1000.0)
    candidate(model, toy_blocks(64), learning_rate=0.0, batch_size=8, seed=1, watch=None)
    stored = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return not stored or float(torch.cat(stored).norm()) < 1.01


def first_wrong_merge(words: dict, merges: list) -> str:
    """What is wrong with the first merge that does not take a most frequent pair, or "" when all do."""
    pieces = {word: [bytes([byte]) for byte in word] for word in words}
    for number, pair in enumerate(merges, start=1):
        counts = _pair_counts(pieces, words)
        most = max(counts.values())
        if counts[pair] != most:
            return f"merge {number} is {pair}, which occurs {counts[pair]} times, while another pair occurs {most} times"
        pieces = {word: _merged(parts, pair) for word, parts in pieces.items()}
    return ""


def _pair_counts(pieces: dict, words: dict) -> Counter:
    counts: Counter = Counter()
    for word, parts in pieces.items():
        for pair in zip(parts, parts[1:]):
            counts[pair] += words[word]
    return counts


def _merged(parts: list[bytes], pair: tuple[bytes, bytes]) -> list[bytes]:
    out: list[bytes] = []
    i = 0
    while i < len(parts):
        both = tuple(parts[i : i + 2]) == pair
        out.append(parts[i] + parts[i + 1] if both else parts[i])
        i += 1 + both
    return out
