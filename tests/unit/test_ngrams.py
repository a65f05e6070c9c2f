from collections import Counter

import numpy as np
import pytest

from labkit.ngrams import NGramModel, _discounts


def by_hand(tokens: list[int], order: int, vocab_size: int):
    """P(token | history) by counting with dictionaries, straight from Chen and Goodman's formulas."""
    grams = {k: Counter(tuple(tokens[i : i + k]) for i in range(len(tokens) - k + 1)) for k in range(1, order + 1)}
    counts = {k: Counter(gram[1:] for gram in grams[k + 1]) for k in range(1, order)} | {order: grams[order]}
    discounts = {k: _discounts(np.array([counts[k][gram] for gram in grams[k]])) for k in counts}

    def taken(k: int, count: int) -> float:
        return min(discounts[k][min(count, 3)], count)

    def probability(history: list[int], token: int) -> float:
        result = 1 / vocab_size
        for k in range(1, min(order, len(history) + 1) + 1):
            context = tuple(history[len(history) - k + 1 :])
            seen = {gram: count for gram, count in counts[k].items() if gram[:-1] == context and count}
            total = sum(seen.values())
            if total:
                count = seen.get((*context, token), 0)
                result = (count - taken(k, count)) / total + sum(taken(k, c) for c in seen.values()) / total * result
        return result

    return probability


@pytest.mark.parametrize(("vocab_size", "length", "order"), [(4, 25, 1), (4, 25, 3), (6, 300, 2), (6, 900, 5), (50, 400, 4)])
def test_probabilities_equal_those_counted_by_hand(vocab_size, length, order):
    rng = np.random.default_rng(order)
    tokens = rng.zipf(1.5, length) % vocab_size
    model, expected = NGramModel(tokens, order, vocab_size), by_hand(tokens.tolist(), order, vocab_size)
    text = rng.integers(0, vocab_size, 25).tolist()
    wanted = [expected(text[:i], text[i]) for i in range(len(text))]
    assert np.allclose(model.probabilities(text), wanted, rtol=1e-12)
    assert model.bits(text) == pytest.approx(-np.log2(wanted).sum())


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
def test_every_distribution_sums_to_one_with_unseen_words_and_unseen_histories(order):
    rng = np.random.default_rng(order)
    tokens = rng.zipf(1.6, 500) % 17  # ids 17 to 19 are never seen
    model = NGramModel(tokens, order, 20)
    histories = [[], [19], [0, 19], [19, 0], *(rng.integers(0, 20, length) for length in range(7) for _ in range(5))]
    for history in histories:
        distribution = model.distribution(history)
        assert distribution.sum() == pytest.approx(1, abs=1e-12) and distribution.min() > 0
    text = rng.integers(0, 20, 60)
    assert np.allclose(model.probabilities(text), [model.distribution(text[:i])[text[i]] for i in range(60)], rtol=1e-12)


def test_a_longer_history_helps_where_there_is_something_to_learn():
    rng = np.random.default_rng(0)
    phrases = rng.integers(0, 30, (8, 6))
    text = phrases[rng.integers(0, 8, 800)].ravel()
    bits = [NGramModel(text[:4000], order, 30).bits(text[4000:]) for order in (1, 2, 3)]
    assert bits[0] > 1.5 * bits[1] and bits[1] > 1.2 * bits[2]


def test_a_word_seen_in_one_context_only_gets_little_of_a_new_one():
    # Kneser and Ney's point: 7 is as frequent as 8, but only ever follows 6, so after an unseen history it is less likely than 8.
    text = [6, 7] * 20 + [a for i in range(20) for a in (i % 6, 8)]
    model = NGramModel(text, 2, 12)
    assert model.distribution([11])[8] > 2 * model.distribution([11])[7]


def test_what_it_refuses():
    with pytest.raises(ValueError, match="token id 9 is not below the vocabulary size 5"):
        NGramModel([1, 2, 9], 2, 5)
    with pytest.raises(ValueError, match="order is 0"):
        NGramModel([1, 2, 3], 0, 5)
    with pytest.raises(ValueError, match="order is 4 for 3 tokens"):
        NGramModel([1, 2, 3], 4, 5)
    with pytest.raises(ValueError, match="token id -1"):
        NGramModel([1, 2, 3], 2, 5).bits([-1])


def test_fewer_tokens_than_the_order_can_be_measured():
    model = NGramModel(np.array([1, 2, 1, 2, 3], dtype=np.uint16), 3, 5)
    assert len(model.probabilities([1])) == 1 and model.bits([]) == 0
