import copy
import random
from collections import Counter

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, DistilBertConfig, DistilBertForSequenceClassification

from labkit.pruning import (
    apply_masks,
    canonical_words,
    gaps_of_mask,
    head_importance,
    huffman_decode,
    huffman_encode,
    huffman_lengths,
    least_important,
    magnitude_mask,
    magnitude_masks,
    mask_2_4,
    mask_of_gaps,
    neuron_importance,
    prune_heads,
    prune_neurons,
    remove_masks,
)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# ---------------------------------------------------------------- masks


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.8, 0.999, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_magnitude_keeps_the_largest_and_exactly_as_many_as_asked(sparsity, dtype):
    for weight in (torch.randn(17, 31, dtype=dtype), torch.ones(17, 31, dtype=dtype), torch.zeros(17, 31, dtype=dtype)):
        mask = magnitude_mask(weight, sparsity)
        assert mask.shape == weight.shape and (~mask).sum() == round(sparsity * weight.numel())
        if 0 < mask.sum() < mask.numel():
            assert weight[mask].abs().min() >= weight[~mask].abs().max()


def test_global_lets_layers_differ_and_layer_does_not():
    weights = {"small": 0.01 * torch.randn(20, 20), "large": torch.randn(30, 10)}
    together, apart = magnitude_masks(weights, 0.5), magnitude_masks(weights, 0.5, scope="layer")
    assert sum((~m).sum() for m in together.values()) == 350
    assert together["small"].float().mean() < 0.2 < 0.8 < together["large"].float().mean()
    assert all((~mask).sum() == mask.numel() // 2 for mask in apart.values())
    for message, options in {"scope is 'model'": {"scope": "model"}, "sparsity is 80": {"sparsity": 80}, "no weights": {"weights": {}}}.items():
        with pytest.raises(ValueError, match=message):
            magnitude_masks(**({"weights": weights, "sparsity": 0.5} | options))
    with pytest.raises(ValueError, match="holds nan"):
        magnitude_mask(torch.tensor([1.0, torch.nan]), 0.5)


def test_two_of_four():
    weight = torch.randn(6, 3, 16)
    mask = mask_2_4(weight)
    groups, kept = weight.abs().view(-1, 4), mask.view(-1, 4)
    assert (kept.sum(1) == 2).all()
    assert (groups.masked_fill(~kept, 9).amin(1) >= groups.masked_fill(kept, -1).amax(1)).all()
    assert mask_2_4(torch.ones(1, 4)).tolist() == [[True, True, False, False]]
    assert (mask_2_4(torch.randn(2, 8), keep=4, group=8).sum(1) == 4).all()
    with pytest.raises(ValueError, match="the last axis must be a multiple of 4"):
        mask_2_4(torch.randn(8, 6))
    with pytest.raises(ValueError, match="keep is 5 of 4"):
        mask_2_4(torch.randn(8, 4), keep=5)


@pytest.mark.parametrize("make", [torch.optim.AdamW, lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9, weight_decay=0.1)])
def test_masks_survive_training_whatever_the_optimizer_remembers(make):
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    x, y = torch.randn(64, 8), torch.randint(0, 2, (64,))
    optimizer = make(model.parameters(), lr=0.05)

    def step():
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    for _ in range(5):
        step()
    masks = magnitude_masks({"0.weight": model[0].weight, "2.weight": model[2].weight}, 0.8)
    apply_masks(model, masks)
    before = model[0].weight.detach().clone()
    for _ in range(10):
        step()
        assert all(model.get_submodule(n[0]).weight[~m].eq(0).all() for n, m in masks.items())
    assert not torch.equal(before, model[0].weight), "the kept weights do train"
    apply_masks(model, {name: torch.zeros_like(mask) for name, mask in masks.items()})
    assert not model[0].weight.any()
    expected = model(x)
    remove_masks(model)
    assert torch.equal(model(x), expected) and set(model.state_dict()) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert isinstance(model[0].weight, nn.Parameter)


def test_a_mask_of_another_shape_is_named():
    with pytest.raises(ValueError, match=r"the mask of 0.weight is torch.bool of shape \(2, 2\): it must be bool of shape \(4, 3\)"):
        apply_masks(nn.Sequential(nn.Linear(3, 4)), {"0.weight": torch.ones(2, 2, dtype=torch.bool)})


def test_gaps_come_back():
    for sparsity in (0.0, 0.3, 0.95, 1.0):
        mask = magnitude_mask(torch.randn(40, 25), sparsity)
        gaps = gaps_of_mask(mask)
        assert len(gaps) == mask.sum() and (gaps >= 0).all() and torch.equal(mask_of_gaps(gaps, mask.shape), mask)


# ---------------------------------------------------------------- structured


def bert(**options):
    torch.manual_seed(1)
    small = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 24}
    return BertForSequenceClassification(BertConfig(**small | options)).eval()


BATCH = {"input_ids": torch.randint(1, 50, (4, 9)), "attention_mask": torch.tensor([[1] * 9, [1] * 6 + [0] * 3, [1] * 2 + [0] * 7, [1] * 9])}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_pruned_heads_and_neurons_equal_silenced_ones_in_smaller_matrices(attention):
    model = bert(attn_implementation=attention)
    silenced, small = copy.deepcopy(model), copy.deepcopy(model)
    heads, neurons = {0: [1, 3], 2: [0, 1, 2]}, {0: range(20), 1: [5]}
    for number, layer in enumerate(silenced.bert.encoder.layer):
        for head in heads.get(number, []):
            layer.attention.output.dense.weight.data[:, 8 * head : 8 * head + 8] = 0
        for neuron in neurons.get(number, []):
            layer.output.dense.weight.data[:, neuron] = 0
    prune_heads(small, heads)
    prune_neurons(small, neurons)
    assert torch.allclose(small(**BATCH).logits, silenced(**BATCH).logits, atol=1e-6)
    layer = small.bert.encoder.layer[0]
    assert layer.attention.self.query.weight.shape == (16, 32) and layer.attention.output.dense.weight.shape == (32, 16)
    assert layer.intermediate.dense.weight.shape == (4, 32) and layer.output.dense.weight.shape == (32, 4)
    lost = 5 * (4 * 8 * 32 + 3 * 8) + 21 * (2 * 32 + 1)
    assert sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in small.parameters()) == lost
    small.train()(**BATCH, labels=torch.tensor([0, 1, 0, 1])).loss.backward()
    assert all(p.grad is not None for p in small.parameters())
    again = bert()
    prune_heads(again, heads)
    prune_neurons(again, neurons)
    again.load_state_dict(small.state_dict())
    assert torch.allclose(again.eval()(**BATCH).logits, small.eval()(**BATCH).logits, atol=1e-6)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_distilbert_is_pruned_as_well(attention):
    config = DistilBertConfig(vocab_size=50, dim=32, n_layers=3, n_heads=4, hidden_dim=24, attn_implementation=attention)
    model = DistilBertForSequenceClassification(config).eval()
    silenced, small = copy.deepcopy(model), copy.deepcopy(model)
    heads, neurons = {0: [1, 3], 2: [0, 1, 2]}, {1: [5, 7]}
    for number, layer in enumerate(silenced.distilbert.transformer.layer):
        for head in heads.get(number, []):
            layer.attention.out_lin.weight.data[:, 8 * head : 8 * head + 8] = 0
        for neuron in neurons.get(number, []):
            layer.ffn.lin2.weight.data[:, neuron] = 0
    prune_heads(small, heads)
    prune_neurons(small, neurons)
    assert torch.allclose(small(**BATCH).logits, silenced(**BATCH).logits, atol=1e-6)
    assert small.distilbert.transformer.layer[2].attention.q_lin.weight.shape == (8, 32)
    assert small.distilbert.transformer.layer[1].ffn.lin1.weight.shape == (22, 32)
    assert head_importance(model).shape == (3, 4) and neuron_importance(model).shape == (3, 24)
    with pytest.raises(ValueError, match="heads of layer 2: all 1 would go"):
        prune_heads(small, {2: [0]})


@pytest.mark.parametrize("by", ["magnitude", "gradient"])
def test_a_silent_head_and_neuron_are_the_least_important(by):
    model = bert()
    layer = model.bert.encoder.layer[1]
    layer.attention.output.dense.weight.data[:, 16:24] = 0
    layer.attention.self.value.weight.data[16:24] = 0
    layer.output.dense.weight.data[:, 7] = 0
    layer.intermediate.dense.weight.data[7] = 0
    if by == "gradient":
        with pytest.raises(ValueError, match="run a loss.backward"):
            head_importance(model, by)
        model(**BATCH, labels=torch.tensor([0, 1, 0, 1])).loss.backward()
    assert head_importance(model, by).shape == (3, 4) and neuron_importance(model, by).shape == (3, 24)
    assert least_important(head_importance(model, by), 1 / 12) == {1: [2]}
    assert least_important(neuron_importance(model, by), 1 / 72) == {1: [7]}


def test_each_layer_keeps_its_best():
    scores = torch.tensor([[1.0, 2.0, 3.0], [10.0, 11.0, 12.0]])
    assert least_important(scores, 0.0) == {}
    assert least_important(scores, 0.5) == {0: [0, 1], 1: [0]}
    assert least_important(scores, 0.99) == {0: [0, 1], 1: [0, 1]}
    with pytest.raises(ValueError, match="share is 1"):
        least_important(scores, 1)


def test_structured_pruning_names_what_is_wrong():
    for call, message in [
        (lambda: prune_heads(bert(), {0: range(4)}), "heads of layer 0: all 4 would go"),
        (lambda: prune_heads(bert(), {0: [4]}), r"heads of layer 0: \[4\] do not exist, they are numbered 0 to 3"),
        (lambda: prune_neurons(bert(), {3: [0]}), "there is no layer 3: the encoder has layers 0 to 2"),
        (lambda: prune_heads(nn.Linear(2, 2), {}), "Linear has no layers built like BERT's"),
        (lambda: head_importance(bert(), "random"), "by is 'random'"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


# ---------------------------------------------------------------- Huffman


def best_length(counts):
    """Bits of an optimal code: the sum of all joined counts."""
    counts, total = sorted(counts), 0
    while len(counts) > 1:
        joined = counts[0] + counts[1]
        total += joined
        counts = sorted([*counts[2:], joined])
    return total


def test_round_trips_on_random_and_degenerate_rows():
    draw = random.Random(0)
    fibonacci = [1, 1]
    while len(fibonacci) < 20:
        fibonacci.append(fibonacci[-1] + fibonacci[-2])
    rows = [[], [7], [7] * 100, [3, 4], [-5, 5, -5], [2**40, -(2**40), 0], [i for i, c in enumerate(fibonacci) for _ in range(c)], list(range(256))]
    for _ in range(60):
        kinds = draw.randint(1, 40)
        skew = draw.choice([0.1, 1, 5])
        weights = [draw.random() ** skew + 1e-9 for _ in range(kinds)]
        rows.append(draw.choices(range(-3, kinds - 3), weights, k=draw.randint(1, 3000)))
    for row in rows:
        draw.shuffle(row)
        symbols = torch.tensor(row, dtype=torch.long)
        for chunk in (1, 7, 4096):
            coded = huffman_encode(symbols, chunk)
            assert torch.equal(huffman_decode(coded), symbols)
        counts = Counter(row)
        bits = sum(coded.lengths[symbol] * count for symbol, count in counts.items())
        assert bits == (best_length(counts.values()) if len(counts) > 1 else len(row)) and len(coded.data) == -(-bits // 8)


def test_code_words_are_prefix_free_and_whole():
    draw = random.Random(1)
    for _ in range(50):
        counts = {symbol: draw.randint(1, 10 ** draw.randint(0, 6)) for symbol in range(draw.randint(2, 60))}
        words = canonical_words(huffman_lengths(counts))
        assert sum(2.0 ** -len(word) for word in words.values()) == 1
        ordered = sorted(words.values())
        assert not any(b.startswith(a) for a, b in zip(ordered, ordered[1:]))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32])
def test_integer_dtypes_and_bytes(dtype):
    symbols = torch.tensor([0] * 900 + [1] * 90 + [2] * 10, dtype=dtype)
    coded = huffman_encode(symbols)
    assert torch.equal(huffman_decode(coded).to(dtype), symbols)
    assert coded.nbytes == 1100 // 8 + 1 + 4 + 15


def test_huffman_names_what_is_wrong():
    with pytest.raises(ValueError, match="dtype torch.float32 and shape"):
        huffman_encode(torch.zeros(3))
    with pytest.raises(ValueError, match="pass one row of whole numbers"):
        huffman_encode(torch.zeros(3, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="chunk is 0"):
        huffman_encode(torch.zeros(3, dtype=torch.long), 0)
    with pytest.raises(ValueError, match="leave out symbols that do not occur"):
        huffman_lengths({1: 0})
