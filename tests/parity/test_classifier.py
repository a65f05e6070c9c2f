"""labkit's classifier against PyTorch's own layers, and lab 03's versions against labkit's."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from labkit import classifier, training
from labkit.classifier import SelfAttention, TransformerBlock, TransformerClassifier, attention, masked_mean
from labkit.files import NOTEBOOKS

MASK = torch.tensor([[1] * 9, [1] * 6 + [0] * 3, [1] * 2 + [0] * 7, [1] * 9])


@pytest.mark.parametrize(("heads", "head_size", "seq"), [(1, 4, 9), (2, 16, 9), (8, 8, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_attention_equals_scaled_dot_product_attention_with_gradients(heads, head_size, seq, dtype):
    torch.manual_seed(0)
    ours = [torch.randn(4, heads, seq, head_size, dtype=dtype, requires_grad=True) for _ in range(3)]
    theirs = [tensor.detach().clone().requires_grad_() for tensor in ours]
    out = attention(*ours, MASK)
    expected = F.scaled_dot_product_attention(*theirs, attn_mask=MASK[:, None, None, :].bool())
    tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-5
    assert out.dtype == dtype and torch.allclose(out, expected, atol=tolerance)
    out.float().square().sum().backward()
    expected.float().square().sum().backward()
    for a, b in zip(ours, theirs):
        assert torch.allclose(a.grad, b.grad, atol=0.3 if dtype == torch.bfloat16 else 1e-4)


def test_self_attention_equals_multihead_attention():
    torch.manual_seed(0)
    ours, theirs = SelfAttention(16, 4), nn.MultiheadAttention(16, 4, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.query.weight, ours.key.weight, ours.value.weight]))
        theirs.in_proj_bias.copy_(torch.cat([ours.query.bias, ours.key.bias, ours.value.bias]))
        theirs.out_proj.load_state_dict(ours.output.state_dict())
    hidden = torch.randn(4, 9, 16)
    assert torch.allclose(ours(hidden, MASK), theirs(hidden, hidden, hidden, key_padding_mask=MASK == 0, need_weights=False)[0], atol=1e-5)


def test_block_equals_pytorchs_pre_norm_encoder_layer():
    torch.manual_seed(0)
    ours = TransformerBlock(16, 4, dropout=0.1).eval()
    theirs = nn.TransformerEncoderLayer(16, 4, 64, 0.1, activation="gelu", batch_first=True, norm_first=True).eval()
    attention_layer = ours.attention
    theirs.self_attn.in_proj_weight.data = torch.cat([attention_layer.query.weight, attention_layer.key.weight, attention_layer.value.weight])
    theirs.self_attn.in_proj_bias.data = torch.cat([attention_layer.query.bias, attention_layer.key.bias, attention_layer.value.bias])
    theirs.self_attn.out_proj.load_state_dict(attention_layer.output.state_dict())
    for mine, their in ((ours.up, theirs.linear1), (ours.down, theirs.linear2), (ours.attention_norm, theirs.norm1), (ours.mlp_norm, theirs.norm2)):
        their.load_state_dict(mine.state_dict())
    hidden = torch.randn(4, 9, 16)
    real = MASK.bool()
    assert torch.allclose(ours(hidden, MASK)[real], theirs(hidden, src_key_padding_mask=~real)[real], atol=1e-5)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return TransformerClassifier(60, 3, hidden_size=32, num_layers=2, num_heads=4, max_length=24, dropout=0.3).eval()


def test_logits_do_not_change_with_batch_size_row_order_neighbours_or_padding(model):
    ids = torch.randint(1, 60, (4, 9))
    out = model(ids, MASK)
    alone = torch.cat([model(ids[i : i + 1, : MASK[i].sum()], MASK[i : i + 1, : MASK[i].sum()]) for i in range(4)])
    assert torch.allclose(alone, out, atol=1e-5)
    assert torch.allclose(model(ids.flip(0), MASK.flip(0)).flip(0), out, atol=1e-5)
    assert torch.allclose(model(F.pad(ids, (0, 12), value=59), F.pad(MASK, (0, 12))), out, atol=1e-5)


def test_train_mode_without_dropout_equals_eval_mode():
    torch.manual_seed(0)
    plain = TransformerClassifier(60, 3, hidden_size=32, dropout=0.0)
    ids = torch.randint(1, 60, (4, 9))
    assert torch.equal(plain.train()(ids, MASK), plain.eval()(ids, MASK))


def test_word_vectors_are_taken_over_and_may_be_frozen():
    table = torch.randn(60, 48)
    model = TransformerClassifier(60, 2, hidden_size=32, word_vectors=table, freeze_embeddings=True)
    assert torch.equal(model.token_embedding.weight, table) and not model.token_embedding.weight.requires_grad
    assert model(torch.randint(1, 60, (4, 9)), MASK).shape == (4, 2)
    with pytest.raises(ValueError, match="word_vectors has 60 rows for a vocabulary of 61"):
        TransformerClassifier(61, 2, word_vectors=table)


def test_a_batch_too_long_and_heads_that_do_not_divide_are_named(model):
    with pytest.raises(ValueError, match="a batch of 25 tokens for a model of max_length 24: truncate when tokenizing"):
        model(torch.ones(1, 25, dtype=torch.long), torch.ones(1, 25, dtype=torch.long))
    with pytest.raises(ValueError, match="hidden_size 30 is not a multiple of num_heads 4"):
        SelfAttention(30, 4)


def test_an_empty_row_gives_finite_logits(model):
    mask = MASK.clone()
    mask[2] = 0
    assert model(torch.randint(1, 60, (4, 9)), mask).isfinite().all()


@pytest.fixture(scope="module")
def notebook():
    """What lab 03's definition cells define, solutions included, without running its experiments."""
    names: dict = {}
    for cell in json.loads((NOTEBOOKS / "03_finetuning_pytorch.ipynb").read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] != "code":
            continue
        if text.startswith("import labkit"):
            exec(text.split("lab = labkit.start")[0], names)
        elif cell["metadata"].get("nbgrader", {}).get("solution") or (text.startswith("class ") and "lab." not in text):
            exec(text, names)
    return names


def test_the_notebooks_ideas_equal_labkits(notebook, model):
    torch.manual_seed(1)
    query, key, value = (torch.randn(4, 2, 9, 8) for _ in range(3))
    assert torch.allclose(notebook["attention"](query, key, value, MASK), attention(query, key, value, MASK), atol=1e-6)
    hidden = torch.randn(4, 9, 8)
    assert torch.equal(notebook["masked_mean"](hidden, MASK), masked_mean(hidden, MASK))
    twin = notebook["TransformerClassifier"](60, 3, hidden_size=32, num_layers=2, num_heads=4, max_length=24, dropout=0.3).eval()
    twin.load_state_dict(model.state_dict())
    ids = torch.randint(1, 60, (4, 9))
    assert torch.allclose(twin(ids, MASK), model(ids, MASK), atol=1e-6)


def test_the_notebooks_loop_sees_the_same_losses_as_labkits(notebook):
    rows = [{"input_ids": torch.randint(1, 60, (3 + i % 7,)).tolist(), "label": i % 3} for i in range(50)]
    batch, ours = notebook["collate_batch"](rows), training.collate_batch(rows)
    assert all(torch.equal(batch[name], ours[name]) for name in ours)

    def fresh():
        torch.manual_seed(0)
        return classifier.TransformerClassifier(60, 3, hidden_size=16, num_layers=1, num_heads=2, max_length=24, dropout=0.2)

    options = {"epochs": 3, "learning_rate": 3e-3, "batch_size": 8, "seed": 2}
    by_hand, model = fresh(), fresh()
    history = notebook["train_model"](by_hand, rows, rows[:20], **options)
    reference = training.train_model(model, rows, rows[:20], weight_decay=0.0, keep_best=None, **options)
    assert history["train_loss"] == pytest.approx(reference.train_loss, abs=1e-4)
    assert history["learning_rate"] == pytest.approx(reference.learning_rate)
    loss, accuracy = notebook["evaluate"](by_hand, rows)
    result = training.evaluate(model, rows)
    assert loss == pytest.approx(result.loss, abs=1e-3) and accuracy == pytest.approx(result.accuracy)
