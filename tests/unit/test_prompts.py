"""Soft prompts extend mask, places and labels; the base stays as it was; the selective family trains what it says."""

import pytest
import torch
from torch import nn

from labkit.classifier import TransformerClassifier
from labkit.models import load_encoder
from labkit.prompts import (
    SoftPrompt,
    in_heads,
    nearest_tokens,
    positions_of,
    prepend,
    select,
    task_state_dict,
    train_biases,
    train_last_layer,
    vocabulary_start,
)


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=24, bos_token_id=1
    )
    return LlamaForCausalLM(config).eval()


def bert(labels=2):
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=24, num_labels=labels
    )
    return BertForSequenceClassification(config).eval()


def test_prepend_extends_everything():
    vectors, embeddings = torch.randn(3, 8), torch.randn(2, 4, 8)
    mask, labels = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]), torch.tensor([[5, 6, 7, -100], [1, 2, 3, 4]])
    out = prepend(vectors, embeddings, mask, labels)
    assert torch.equal(out.inputs_embeds[0, :3], vectors) and torch.equal(out.inputs_embeds[1, :3], vectors)
    assert torch.equal(out.inputs_embeds[:, 3:], embeddings)
    assert out.attention_mask.tolist() == [[1, 1, 1, 1, 1, 1, 0], [1] * 7] and out.attention_mask.dtype == mask.dtype
    assert out.labels.tolist() == [[-100] * 3 + [5, 6, 7, -100], [-100] * 3 + [1, 2, 3, 4]]
    assert out.position_ids.tolist() == [list(range(7))] * 2
    shifted = prepend(vectors, embeddings, mask, position_ids=torch.tensor([[0, 1, 2, 2], [0, 1, 2, 3]])).position_ids
    assert shifted.tolist() == [[0, 1, 2, 3, 4, 5, 5], [0, 1, 2, 3, 4, 5, 6]]


def test_labels_of_rows_stay():
    out = prepend(torch.randn(3, 8), torch.randn(2, 4, 8), torch.ones(2, 4), torch.tensor([0, 1]))
    assert out.labels.tolist() == [0, 1]
    assert prepend(torch.randn(3, 8), torch.randn(2, 4, 8), torch.ones(2, 4)).labels is None


def test_dtype_of_the_base():
    out = prepend(torch.randn(3, 8), torch.randn(2, 4, 8).bfloat16(), torch.ones(2, 4))
    assert out.inputs_embeds.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("vectors", "embeddings", "mask", "labels", "message"),
    [
        ((3, 7), (2, 4, 8), (2, 4), None, "expected"),
        ((1, 3, 8), (2, 4, 8), (2, 4), None, "expected"),
        ((3, 8), (2, 4, 8), (2, 7), None, "attention_mask has shape"),
        ((3, 8), (2, 4, 8), (2, 4), (2, 7), "labels have shape"),
    ],
)
def test_shapes_that_do_not_fit(vectors, embeddings, mask, labels, message):
    with pytest.raises(ValueError, match=message):
        prepend(torch.zeros(vectors), torch.zeros(embeddings), torch.ones(mask), None if labels is None else torch.zeros(labels).long())


def test_positions_of():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
    assert positions_of(mask).tolist() == [[0, 0, 0, 1], [0, 1, 2, 2]]


def test_left_padding_changes_nothing_when_places_count_real_tokens():
    model = SoftPrompt(llama(), torch.randn(3, 16))
    ids = torch.randint(2, 50, (1, 5))
    alone = model(ids).logits[:, -5:]
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], 1)
    mask = torch.tensor([[0] * 4 + [1] * 5])
    counted = model(padded, mask, position_ids=positions_of(mask)).logits[:, -5:]
    assert torch.allclose(counted, alone, atol=1e-5)
    assert not torch.allclose(model(padded, mask).logits[:, -5:], alone, atol=1e-5)  # as in peft: the text stands further away


def test_vectors_that_are_words_do_what_the_words_do():
    for base, read in ((llama(), lambda out: out.logits), (bert(), lambda out: out.logits)):
        ids = torch.randint(1, 50, (2, 6))
        words = torch.tensor([7, 8, 9])
        model = SoftPrompt(base, base.get_input_embeddings().weight[words])
        assert torch.allclose(read(model(ids)), read(base(torch.cat([words.expand(2, -1), ids], 1))), atol=1e-5)


def test_only_vectors_and_heads_train_and_the_base_does_not_move():
    base = bert()
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    model = SoftPrompt(base, torch.randn(3, 16))
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["vectors", "base.classifier.weight", "base.classifier.bias"]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(torch.randint(1, 50, (2, 6)), labels=torch.tensor([0, 1])).loss.backward()
    optimizer.step()
    moved = {name for name, p in base.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"classifier.weight", "classifier.bias"}
    assert task_state_dict(model).keys() == {"vectors", "base.classifier.weight", "base.classifier.bias"}


def test_task_state_is_a_copy():
    model = SoftPrompt(llama(), torch.randn(3, 16))
    state = task_state_dict(model)
    with torch.no_grad():
        model.vectors.add_(1)
    assert not torch.equal(state["vectors"], model.vectors)


def test_generation_goes_on_from_the_prompt():
    base = llama()
    words = torch.tensor([7, 8, 9])
    model, ids = SoftPrompt(base, base.get_input_embeddings().weight[words]), torch.randint(2, 50, (1, 4))
    given = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    written = base.generate(torch.cat([words[None], ids], 1), **given)[:, 7:]
    assert torch.equal(model.generate(ids, **given), written)


def test_soft_prompt_refuses():
    with pytest.raises(ValueError, match=r"expected \(n, 16\)"):
        SoftPrompt(llama(), torch.randn(3, 8))
    with pytest.raises(ValueError, match="at least one vector"):
        SoftPrompt(llama(), torch.randn(0, 16))
    with pytest.raises(ValueError, match="more than the 24 places"):
        SoftPrompt(bert(), torch.randn(10, 16))(torch.ones(1, 15, dtype=torch.long))


def test_vocabulary_start():
    table = torch.randn(30, 4)
    start = vocabulary_start(table, 6, seed=1)
    assert torch.equal(start, vocabulary_start(table, 6, seed=1)) and not torch.equal(start, vocabulary_start(table, 6, seed=2))
    found = nearest_tokens(start, table)
    assert len(set(found[1].flatten().tolist())) == 6 and torch.allclose(found[0], torch.ones(6, 1))
    for n in (0, 31):
        with pytest.raises(ValueError, match="vocabulary of 30"):
            vocabulary_start(table, n)


def test_nearest_tokens_by_angle():
    table = torch.tensor([[1.0, 0.0], [0.0, 100.0], [1.0, 1.0]])
    cosines, rows = nearest_tokens(torch.tensor([[5.0, 1.0]]), table, k=2)
    assert rows.tolist() == [[0, 2]]
    assert torch.allclose(cosines, torch.tensor([[5 / 26**0.5, 6 / 52**0.5]]))
    with pytest.raises(ValueError, match="k is 4"):
        nearest_tokens(table, table, k=4)
    with pytest.raises(ValueError, match="expected"):
        nearest_tokens(torch.zeros(2, 3), table)


def test_bitfit_and_last_layer():
    model = bert()
    names = train_biases(model)
    assert set(names) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(name.endswith(".bias") or name == "classifier.weight" for name in names)
    assert "bert.encoder.layer.0.output.LayerNorm.bias" in names and "classifier.weight" in names
    assert train_last_layer(model) == ["classifier.weight", "classifier.bias"]
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["classifier.weight", "classifier.bias"]
    course = TransformerClassifier(40, 2, hidden_size=16, num_layers=1, num_heads=2, max_length=10)
    assert train_last_layer(course) == ["classifier.weight", "classifier.bias"]
    assert train_biases(nn.ModuleDict({"body": nn.Linear(3, 3), "out": nn.Linear(3, 2)}), heads=["out"]) == ["body.bias", "out.weight", "out.bias"]


def test_what_has_no_bias_or_no_head_is_refused():
    with pytest.raises(ValueError, match="LlamaForCausalLM has no bias"):
        train_biases(llama())
    with pytest.raises(ValueError, match="LlamaForCausalLM has no part called"):
        train_last_layer(llama())


def test_in_heads_and_select():
    assert in_heads("classifier.weight") and in_heads("base.score.bias") and not in_heads("my_classifier.weight")
    model = nn.Linear(2, 2)
    assert select(model, lambda name: name == "bias") == ["bias"]
    assert not model.weight.requires_grad and model.bias.requires_grad


def test_the_course_encoder_takes_a_prompt():
    base = load_encoder()
    model = SoftPrompt(base, vocabulary_start(base.get_input_embeddings().weight, 4))
    ids = torch.randint(1000, 2000, (2, 6))
    assert model(ids, torch.ones_like(ids)).last_hidden_state.shape == (2, 10, 384)
    assert list(task_state_dict(model)) == ["vectors"]
