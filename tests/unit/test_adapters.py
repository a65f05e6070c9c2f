"""Adapters go into every architecture of the course by its structure, come out without a trace, and a task is only what was trained."""

import copy

import pytest
import torch
from safetensors import safe_open
from torch import nn

from labkit import measure
from labkit.adapters import (
    PLACEMENTS,
    Adapted,
    BottleneckAdapter,
    adapter_state_dict,
    add_adapters,
    heads_of,
    load_adapter_state_dict,
    load_adapters,
    remove_adapters,
    save_adapters,
    sublayer_outputs,
)
from labkit.classifier import TransformerClassifier
from labkit.models import load_encoder

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")

IDS = torch.randint(1, 60, (3, 7), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [1] * 2 + [0] * 5])


class PyTorchs(nn.Module):
    """A classifier on PyTorch's own encoder layers, which in eval mode take a short cut past their parts."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(60, 32)
        layer = nn.TransformerEncoderLayer(32, 2, 64, 0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.classifier = nn.Linear(32, 2)

    def forward(self, input_ids, attention_mask):
        hidden = self.encoder(self.embedding(input_ids), src_key_padding_mask=attention_mask == 0)
        return self.classifier(hidden[:, 0])


def make(kind: str) -> nn.Module:
    """A small model with random weights, its dropout switched off, in eval mode."""
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        BertConfig,
        DistilBertConfig,
        GPT2Config,
        LlamaConfig,
        OPTConfig,
    )

    torch.manual_seed(0)
    small = {"vocab_size": 60, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "pad_token_id": 0}
    if kind == "bert":
        model = AutoModelForSequenceClassification.from_config(BertConfig(intermediate_size=64, **small))
    elif kind == "distilbert":
        model = AutoModelForSequenceClassification.from_config(DistilBertConfig(vocab_size=60, dim=32, n_heads=2, n_layers=2, hidden_dim=64))
    elif kind == "gpt2":
        model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=60, n_embd=32, n_head=2, n_layer=2, bos_token_id=1, eos_token_id=1))
    elif kind == "llama":
        model = AutoModelForCausalLM.from_config(LlamaConfig(intermediate_size=48, **small))
    elif kind == "opt":
        model = AutoModelForCausalLM.from_config(OPTConfig(ffn_dim=64, word_embed_proj_dim=32, dropout=0.0, **small))
    elif kind == "course":
        model = TransformerClassifier(60, 2, hidden_size=32, num_layers=2, num_heads=2)
    else:
        model = PyTorchs()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.eval()


def run(model, training=False):
    model.train(training)
    with torch.no_grad():
        out = model(input_ids=IDS, attention_mask=MASK)
    model.eval()
    return getattr(out, "logits", out)


def shake(model):
    """As if it had been trained: every trainable number moves."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn_like(p)


KINDS = ("bert", "distilbert", "gpt2", "llama", "opt", "course", "pytorch")


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("kind", KINDS)
def test_in_and_out_again(kind, placement):
    model = make(kind)
    weights, before = copy.deepcopy(model.state_dict()), run(model)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    names = add_adapters(model, 4, placement=placement)
    assert len(names) == {"houlsby": 4, "pfeiffer": 2}[placement]
    assert torch.allclose(run(model), before, atol=1e-6), "no change at the start"
    shake(model)
    assert not torch.allclose(run(model), before, atol=1e-3)
    remove_adapters(model)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items()) and model.state_dict().keys() == weights.keys()
    assert torch.equal(run(model), before)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert not any(isinstance(module, Adapted) for module in model.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_train_mode_without_dropout_and_eval_mode_agree(kind):
    """PyTorch's fast path, taken in eval mode only, would leave the adapters out."""
    model = make(kind)
    add_adapters(model, 4)
    shake(model)
    assert torch.allclose(run(model, training=True), run(model), atol=1e-5)


def test_pytorchs_fast_path_is_back_after_removal(monkeypatch):
    model, taken = make("pytorch"), []
    fast = torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *inputs: taken.append(1) or fast(*inputs))
    run(model)
    assert len(taken) == 2, "this test is about a path that is really taken"
    add_adapters(model, 4)
    run(model)
    assert len(taken) == 2
    remove_adapters(model)
    run(model)
    assert len(taken) == 4


def test_the_places_are_the_last_layers_of_attention_and_mlp():
    places = {
        "bert": ["attention.output.dense", "output.dense"],
        "distilbert": ["attention.out_lin", "ffn.lin2"],
        "gpt2": ["attn.c_proj", "mlp.c_proj"],
        "llama": ["self_attn.o_proj", "mlp.down_proj"],
        "opt": ["self_attn.out_proj", "fc2"],
        "course": ["attention.output", "down"],
        "pytorch": ["dropout1", "dropout2"],
    }
    for kind, ends in places.items():
        model = make(kind)
        both = sublayer_outputs(model)
        assert [name.split(".0.")[1] for name in both if ".0." in name] == ends and set(both.values()) == {32}
        assert list(sublayer_outputs(model, "pfeiffer")) == list(both)[1::2]


def test_the_courses_encoder():
    model = load_encoder(2)
    with torch.no_grad():
        before = model(input_ids=IDS + 1000, attention_mask=MASK).logits
        names = add_adapters(model, 64)
        assert len(names) == 12 and torch.equal(model(input_ids=IDS + 1000, attention_mask=MASK).logits, before)
    counted = measure.count_parameters(model)
    norms = 13 * 2 * 384
    assert counted.trainable == 12 * (2 * 384 * 64 + 64 + 384) + norms and counted.head == 2 * 384 + 2
    assert counted.share < 0.04


def test_only_adapters_norms_and_heads_train():
    for kind, heads in (("bert", {"classifier"}), ("distilbert", {"pre_classifier", "classifier"}), ("gpt2", set()), ("course", {"classifier"})):
        model = make(kind)
        add_adapters(model, 4)
        assert set(heads_of(model)) == heads
        for name, p in model.named_parameters():
            expected = ".adapter." in name or any(part in name.lower() for part in ("norm", "ln_")) or name.split(".")[0] in heads
            assert p.requires_grad == expected, name


def test_gradients_reach_every_trainable_parameter():
    model = make("bert")
    add_adapters(model, 4)
    shake(model)
    model(input_ids=IDS, attention_mask=MASK).logits.square().sum().backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None and p.grad.abs().sum() > 0) == p.requires_grad, name


@pytest.mark.parametrize("kind", KINDS)
def test_two_tasks_on_one_base(kind, tmp_path):
    model = make(kind)
    add_adapters(model, 4)
    start = adapter_state_dict(model)
    before = run(model)
    shake(model)
    first, out = adapter_state_dict(model), run(model)
    load_adapter_state_dict(model, start)
    assert torch.equal(run(model), before), "a kept task is a copy: training another does not change it"
    save_adapters_of = tmp_path / "task.safetensors"
    load_adapter_state_dict(model, first)
    save_adapters(model, save_adapters_of)
    twin = make(kind)
    add_adapters(twin, 4)
    load_adapters(twin, save_adapters_of)
    assert torch.equal(run(twin), out)
    with safe_open(save_adapters_of, "pt") as file:
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert set(file.keys()) == trained, "the file holds what was trained, and nothing of the base"
    assert [path.name for path in tmp_path.iterdir()] == ["task.safetensors"]


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    model = make("bert")
    add_adapters(model, 4)
    path = tmp_path / "task.safetensors"
    save_adapters(model, path)
    content = path.read_bytes()

    def broken(tensors, part, metadata):
        part.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", broken)
    with pytest.raises(OSError, match="disk full"):
        save_adapters(model, path)
    assert path.read_bytes() == content and [p.name for p in tmp_path.iterdir()] == ["task.safetensors"]


def test_half_precision():
    adapter = BottleneckAdapter(16, 4).to(torch.bfloat16)
    assert adapter(torch.randn(2, 16, dtype=torch.bfloat16)).dtype == torch.bfloat16
    model = make("bert").to(torch.bfloat16)
    before = run(model)
    names = add_adapters(model, 4)
    assert model.get_submodule(names[0]).adapter.down.weight.dtype == torch.float32, "small updates would be lost in bf16"
    assert run(model).dtype == torch.bfloat16 and torch.equal(run(model), before)
    with torch.autocast("cpu", torch.bfloat16):
        assert run(model).dtype == torch.bfloat16
    double = make("course").double()
    names = add_adapters(double, 4)
    assert double.get_submodule(names[0]).adapter.up.weight.dtype == torch.float64


def test_the_adapter_itself():
    torch.manual_seed(0)
    adapter, hidden = BottleneckAdapter(16, 4), torch.randn(2, 3, 16)
    assert torch.equal(adapter(hidden), hidden)
    nn.init.normal_(adapter.up.weight)
    expected = hidden + torch.nn.functional.gelu(hidden @ adapter.down.weight.T + adapter.down.bias) @ adapter.up.weight.T
    assert torch.allclose(adapter(hidden), expected, atol=1e-5)
    relu = BottleneckAdapter(16, 4, "relu")
    relu.load_state_dict(adapter.state_dict())
    assert not torch.allclose(relu(hidden), expected, atol=1e-3)


def test_errors_name_the_value_and_the_remedy():
    with pytest.raises(ValueError, match="bottleneck_size is 0: an adapter needs at least 1"):
        BottleneckAdapter(8, 0)
    with pytest.raises(ValueError, match="activation is 'swish': choose one of gelu, relu"):
        BottleneckAdapter(8, 2, "swish")
    with pytest.raises(ValueError, match="placement is 'after': choose one of houlsby, pfeiffer"):
        sublayer_outputs(make("bert"), "after")
    with pytest.raises(ValueError, match="Sequential has no transformer block"):
        add_adapters(nn.Sequential(nn.Linear(4, 4)))
    model = make("bert")
    with pytest.raises(ValueError, match=r"BertForSequenceClassification has no adapters: add_adapters\(model\) first"):
        remove_adapters(model)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match="bottleneck_size is -1"):
        add_adapters(model, -1)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags, "a failed call changes nothing"
    add_adapters(model, 4)
    with pytest.raises(ValueError, match=r"has adapters already: remove_adapters\(model\) first"):
        add_adapters(model, 4)
    other = make("bert")
    add_adapters(other, 8)
    state = adapter_state_dict(other)
    with pytest.raises(ValueError, match=r"another model or size: .*adapter\.down\.bias is \(8,\) there and \(4,\) here"):
        load_adapter_state_dict(model, state)
    state = adapter_state_dict(model)
    state.pop("classifier.bias")
    with pytest.raises(ValueError, match=r"classifier.bias is nothing there and \(2,\) here"):
        load_adapter_state_dict(model, state)
