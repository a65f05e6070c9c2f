"""An n-gram language model over token ids: interpolated Kneser–Ney smoothing, in NumPy.

Kneser and Ney 1995; the three discounts and the interpolation are those of Chen and Goodman 1999 ("modified Kneser–Ney").
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class NGramModel:
    """P(token | the order - 1 tokens before it), estimated from one stream of ids. 10 million tokens at order 5 take about a minute.

    Every order k from 1 up has a table of its distinct k-grams. A k-gram's number is its place in the table, and its key is
    (number of its first k - 1 tokens) x vocab_size + last token, so that any order fits 64 bits.
    Raises ValueError when an id is not below vocab_size, or there are fewer tokens than the order.
    """

    def __init__(self, tokens: Sequence[int], order: int, vocab_size: int):
        tokens = self._checked(tokens, vocab_size)
        if not 1 <= order <= len(tokens):
            raise ValueError(f"order is {order} for {len(tokens)} tokens: choose at least 1 and at most the number of tokens")
        self.order, self.vocab_size = order, vocab_size
        self.keys: list[np.ndarray] = []  # of each order: the sorted keys of its k-grams
        self.shares: list[np.ndarray] = []  # of each k-gram: its discounted count, divided by its history's
        self.left: list[np.ndarray] = []  # of each history: the probability that the discounts took away, for the order below
        numbers = np.zeros(len(tokens) + 1, dtype=np.int64)  # of the k-gram that starts at each place; before any token there is one history
        for k in range(1, order + 1):
            below, histories = numbers, len(self.keys[-1]) if self.keys else 1
            found, first, numbers, counts = np.unique(
                below[: len(tokens) - k + 1] * vocab_size + tokens[k - 1 :], return_index=True, return_inverse=True, return_counts=True
            )
            if k > 1:  # the order below counts in how many contexts a gram is seen, not how often: "San Francisco" lends little to "Francisco"
                self._estimate(np.bincount(below[first + 1], minlength=histories))
            self.keys.append(found)
        self._estimate(counts)

    def _estimate(self, counts: np.ndarray) -> None:
        """Turn the counts of the newest table's k-grams into probabilities."""
        history = self.keys[-1] // self.vocab_size
        size = len(self.keys[-2]) if len(self.keys) > 1 else 1
        discounts = np.minimum(_discounts(counts)[np.minimum(counts, 3)], counts)
        total = np.bincount(history, weights=counts, minlength=size)
        total_or_one = np.maximum(total, 1)
        self.shares.append((counts - discounts) / total_or_one[history])
        taken = np.bincount(history, weights=discounts, minlength=size)
        self.left.append(np.where(total > 0, taken / total_or_one, 1.0))

    def bits(self, tokens: Sequence[int]) -> float:
        """The total -log2 probability of a stream. Every token counts; the first ones have the shorter history that there is."""
        return float(-np.log2(self.probabilities(tokens)).sum())

    def probabilities(self, tokens: Sequence[int]) -> np.ndarray:
        """(n,): the probability of each token after those before it, at most order - 1 of them."""
        tokens = self._checked(tokens, self.vocab_size)
        result = np.full(len(tokens), 1 / self.vocab_size)  # below the unigrams: every token alike, so that none is impossible
        history = np.zeros(len(tokens) + 1, dtype=np.int64)
        for k in range(1, min(self.order, len(tokens)) + 1):
            history = history[: len(tokens) - k + 1]
            gram = self._find(k, history, tokens[k - 1 :])
            share = np.where(gram >= 0, self.shares[k - 1][gram], 0.0)
            left = np.where(history >= 0, self.left[k - 1][history], 1.0)
            result[k - 1 :] = share + left * result[k - 1 :]
            history = gram
        return result

    def distribution(self, history: Sequence[int]) -> np.ndarray:
        """(vocab_size,): the probability of every token after `history`, of which the last order - 1 tokens matter."""
        result = np.full(self.vocab_size, 1 / self.vocab_size)
        history = list(history)[max(0, len(history) - self.order + 1) :]
        for k in range(1, len(history) + 2):
            number = np.zeros(1, dtype=np.int64)
            for length, token in enumerate(history[len(history) - k + 1 :], start=1):
                number = self._find(length, number, self._checked([token], self.vocab_size))
            if number[0] < 0:
                break  # an unknown history: so are the longer ones that end with it
            start, end = np.searchsorted(self.keys[k - 1], (number[0] + np.arange(2)) * self.vocab_size)
            result *= self.left[k - 1][number[0]]
            result[self.keys[k - 1][start:end] % self.vocab_size] += self.shares[k - 1][start:end]
        return result

    def _find(self, k: int, history: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """The numbers of the k-grams `history` + token, -1 where there is none."""
        keys = history * self.vocab_size + tokens
        place = np.searchsorted(self.keys[k - 1], keys).clip(max=len(self.keys[k - 1]) - 1)
        return np.where((history >= 0) & (self.keys[k - 1][place] == keys), place, -1)

    @staticmethod
    def _checked(tokens: Sequence[int], vocab_size: int) -> np.ndarray:
        tokens = np.asarray(tokens).astype(np.int64)
        bad = tokens[(tokens < 0) | (tokens >= vocab_size)]
        if len(bad):
            raise ValueError(f"token id {bad[0]} is not below the vocabulary size {vocab_size}: use the tokenizer that made the ids")
        return tokens


def _discounts(counts: np.ndarray) -> np.ndarray:
    """What to take from a count of 0, 1, 2, and 3 or more (Chen and Goodman 1999, equation 26), from how many counts are 1 to 4."""
    n1, n2, n3, n4 = np.bincount(np.minimum(counts, 5), minlength=6)[1:5].astype(float)
    if min(n1, n2, n3, n4) == 0:  # too few tokens to estimate them
        return np.array([0, 0.75, 0.75, 0.75])
    y = n1 / (n1 + 2 * n2)
    return np.array([0, *np.clip([1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3], 0.1, [1, 2, 3])])
