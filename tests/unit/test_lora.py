"""LoRA: no change at the start, one scaling everywhere, merged as unmerged, nothing but the update trained or saved."""

import copy
import math
import time

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from labkit import measure
from labkit.classifier import TransformerClassifier
from labkit.lora import (
    KINDS,
    LoRALinear,
    inject,
    linear_layers,
    load_lora_state_dict,
    lora_layers,
    lora_state_dict,
    merge,
    merge_and_unload,
    remove,
    target_modules,
    unmerge,
)
from labkit.models import load_encoder
from labkit.nf4 import Linear4bit

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")

IDS = torch.randint(1, 60, (3, 7), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [1] * 2 + [0] * 5])


class PyTorchs(nn.Module):
    """A classifier on PyTorch's own encoder layers, which in eval mode multiply by their parts' weights themselves."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(60, 32)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, 64, 0.0, batch_first=True), 2)
        self.classifier = nn.Linear(32, 2)

    def forward(self, input_ids, attention_mask):
        hidden = self.encoder(self.embedding(input_ids), src_key_padding_mask=attention_mask == 0)
        return self.classifier(hidden[:, 0])


def make(kind: str) -> nn.Module:
    """A small model with random weights, without dropout, in eval mode."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BertConfig, DistilBertConfig, GPT2Config, LlamaConfig

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


def shake(model, size=0.2):
    """As if it had been trained: every trainable number moves."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += size * torch.randn_like(p)


MODELS = ("bert", "distilbert", "gpt2", "llama", "course", "pytorch")


@pytest.mark.parametrize("kind", MODELS)
def test_in_merged_unmerged_and_out_again(kind):
    model = make(kind)
    weights, before = copy.deepcopy(model.state_dict()), run(model)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    names = inject(model, rank=4, alpha=8, heads=())
    assert names and torch.allclose(run(model), before, atol=1e-6), "no change at the start"
    shake(model)
    out = run(model)
    assert not torch.allclose(out, before, atol=1e-3)
    merge(model)
    assert torch.allclose(run(model), out, atol=1e-5), "merged equals unmerged"
    unmerge(model)
    assert torch.equal(run(model), out), "unmerged again, bit for bit"
    merge(model)
    remove(model)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items()) and model.state_dict().keys() == weights.keys()
    assert torch.equal(run(model), before)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


@pytest.mark.parametrize("kind", MODELS)
def test_train_mode_without_dropout_and_eval_mode_agree(kind):
    """PyTorch's fast path, taken in eval mode only, would lose the update."""
    model = make(kind)
    inject(model)
    shake(model)
    assert torch.allclose(run(model, training=True), run(model), atol=1e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_a_merged_model_is_a_plain_one(kind):
    model, plain = make(kind), make(kind)
    inject(model)
    shake(model)
    out = run(model)
    merge_and_unload(model)
    assert torch.allclose(run(model), out, atol=1e-5)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()] and all(p.requires_grad for p in model.parameters())
    plain.load_state_dict(model.state_dict())
    assert torch.equal(run(plain), run(model))


def test_targets_follow_the_structure():
    counts = {  # layers of each kind in two blocks
        "bert": (13, 8, 4, 4),
        "distilbert": (12, 8, 4, 4),
        "gpt2": (8, 4, 4, 2),
        "llama": (14, 8, 6, 4),
        "course": (12, 8, 4, 4),
    }
    for kind, expected in counts.items():
        assert tuple(len(target_modules(make(kind), which)) for which in KINDS) == expected, kind
    assert target_modules(make("gpt2"), "query-value") == ["transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn"]
    assert target_modules(make("distilbert"), "query-value")[:2] == [f"distilbert.transformer.layer.0.attention.{n}_lin" for n in "qv"]
    assert "lm_head" not in target_modules(make("llama")) and "bert.pooler.dense" in target_modules(make("bert"))
    assert [name[-7:] for name in target_modules(make("pytorch"))] == ["linear1", "linear2"] * 2, "its attention multiplies by its weights itself"


def test_targets_by_name_end_and_regular_expression():
    model = make("bert")
    assert inject(model, ["query", "layer.1.output.dense"]) == [
        "bert.encoder.layer.0.attention.self.query",
        "bert.encoder.layer.1.attention.self.query",
        "bert.encoder.layer.1.output.dense",
    ]
    remove(model)
    assert inject(model, r".*layer\.1\..*(key|value)") == [f"bert.encoder.layer.1.attention.self.{n}" for n in ("key", "value")]
    remove(model)
    one = inject(model, ["bert.encoder.layer.1.attention.self.query"])
    assert one == ["bert.encoder.layer.1.attention.self.query"]


def test_only_the_update_and_the_heads_train():
    for kind, heads in (("bert", {"classifier"}), ("distilbert", {"pre_classifier", "classifier"}), ("gpt2", set()), ("course", {"classifier"})):
        model = make(kind)
        inject(model)
        shake(model)
        out = model(input_ids=IDS, attention_mask=MASK)
        getattr(out, "logits", out).square().sum().backward()
        for name, p in model.named_parameters():
            expected = name.endswith(("lora_A", "lora_B")) or name.split(".")[0] in heads
            assert p.requires_grad == expected, name
            assert (p.grad is not None and p.grad.abs().sum() > 0) == expected, name


@pytest.mark.parametrize("conv1d", [False, True])
def test_the_layer_itself(conv1d):
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    base = Conv1D(6, 10) if conv1d else nn.Linear(10, 6)
    x = torch.randn(4, 3, 10)
    expected = base(x)
    layer = LoRALinear(base, rank=3, alpha=12)
    assert torch.equal(layer(x), expected) and layer.scaling == 4
    assert layer.lora_A.shape == (3, 10) and layer.lora_B.shape == (6, 3)
    assert layer.lora_B.abs().sum() == 0 and 0 < layer.lora_A.abs().max() <= 1 / math.sqrt(10)
    nn.init.normal_(layer.lora_B)
    out = layer(x)
    assert torch.allclose(out, expected + 4 * (x @ layer.lora_A.T @ layer.lora_B.T), atol=1e-5)
    assert layer.delta().shape == base.weight.shape
    layer.eval().merge()
    assert torch.allclose(layer(x), out, atol=1e-5)
    assert math.isclose(LoRALinear(nn.Linear(4, 4), 4, 8, rslora=True).scaling, 4.0)


def test_dropout_is_on_the_update_only():
    torch.manual_seed(0)
    base = nn.Linear(50, 20)
    layer, x = LoRALinear(base, rank=4, alpha=4, dropout=0.5).train(), torch.randn(30, 50)
    assert torch.equal(layer(x), base(x)), "the base path has no dropout"
    nn.init.normal_(layer.lora_B)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    whole = layer(x)
    assert torch.equal(layer(x), whole)
    layer.train()
    mean = torch.stack([layer(x) for _ in range(3000)]).mean(0)
    assert (mean - whole).abs().mean() < 0.05 * (whole - base(x)).abs().mean(), "its mean is the update without dropout"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    torch.manual_seed(0)
    base, x = nn.Linear(16, 8).to(dtype), torch.randn(5, 16, dtype=dtype)
    layer = LoRALinear(base, rank=2)
    assert layer.lora_A.dtype == layer.lora_B.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    nn.init.normal_(layer.lora_B)
    out = layer(x)
    assert out.dtype == dtype
    weight = base.weight.clone()
    exact = x.double() @ (weight.double() + layer.delta().double()).T + base.bias.double()
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 5e-3}[dtype]
    assert torch.allclose(out.double(), exact, atol=tolerance, rtol=tolerance)
    layer.eval().merge()
    assert base.weight.dtype == dtype and torch.allclose(layer(x).double(), exact, atol=2 * tolerance, rtol=2 * tolerance)
    layer.unmerge()
    assert torch.equal(base.weight, weight)


def test_under_autocast_as_without_it_but_for_rounding():
    torch.manual_seed(0)
    layer, x = LoRALinear(nn.Linear(64, 32), rank=4), torch.randn(9, 64)
    nn.init.normal_(layer.lora_B)
    plain = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16 and torch.allclose(out.float(), plain, atol=0.1, rtol=0.05)


def test_on_a_base_in_four_bits():
    torch.manual_seed(0)
    base = Linear4bit.from_linear(nn.Linear(64, 32))
    layer, x = LoRALinear(base, rank=4), torch.randn(5, 64)
    assert torch.equal(layer(x), base(x)) and layer.lora_A.dtype == torch.float32
    layer(x).square().sum().backward()
    assert layer.lora_B.grad.abs().sum() > 0
    with pytest.raises(TypeError, match="Linear4bit has no floating-point weight to add the update to: dequantize it first"):
        layer.merge()


def test_two_tasks_on_one_base():
    model = make("bert")
    inject(model)
    start, before = lora_state_dict(model), run(model)
    assert set(start) == {name for name, p in model.named_parameters() if p.requires_grad}, "A, B and the head, nothing of the base"
    shake(model)
    first, out = lora_state_dict(model), run(model)
    load_lora_state_dict(model, start)
    assert torch.equal(run(model), before), "a kept task is a copy"
    load_lora_state_dict(model, first)
    assert torch.equal(run(model), out)


def test_the_courses_encoder_is_injected_in_under_50_ms():
    models, seconds = [load_encoder(2) for _ in range(3)], []
    for model in models:
        started = time.perf_counter()
        inject(model)
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.05
    counted = measure.count_parameters(models[0])
    square, wide = 8 * (384 + 384), 8 * (384 + 1536)
    assert counted.trainable == 6 * (4 * square + 2 * wide) + square and counted.share < 0.02


def test_errors_name_the_value_and_the_remedy():
    with pytest.raises(ValueError, match="rank is 0: LoRA needs at least 1"):
        LoRALinear(nn.Linear(4, 4), rank=0)
    with pytest.raises(ValueError, match="dropout is 1.5: choose a share from 0 to below 1"):
        LoRALinear(nn.Linear(4, 4), dropout=1.5)
    with pytest.raises(TypeError, match="LoRA wraps a linear layer, and this is a LayerNorm"):
        LoRALinear(nn.LayerNorm(4))
    with pytest.raises(TypeError, match="this is a LoRALinear"):
        LoRALinear(LoRALinear(nn.Linear(4, 4)))
    model = make("bert")
    weights, flags = copy.deepcopy(model.state_dict()), {name: p.requires_grad for name, p in model.named_parameters()}
    wrong = {
        "no linear layer matches 'c_attn'; the model has bert.encoder.layer.0.attention.self.query": ["query", "c_attn"],
        "no linear layer matches 'LayerNorm'": ["LayerNorm"],
        r"targets is '\(query', which is no regular expression": "(query",
    }
    for message, targets in wrong.items():
        with pytest.raises(ValueError, match=message):
            inject(model, targets)
    with pytest.raises(ValueError, match="rank is -2"):
        inject(model, rank=-2)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags and model.state_dict().keys() == weights.keys()
    with pytest.raises(ValueError, match="kind is 'keys': choose one of all-linear, attention, mlp, query-value"):
        target_modules(model, "keys")
    with pytest.raises(ValueError, match="Sequential has no linear layers of kind 'attention'; name some of these: 0"):
        target_modules(nn.Sequential(nn.Linear(4, 4)), "attention")
    with pytest.raises(ValueError, match=r"has no LoRA layers: inject\(model\) first"):
        merge(model)
    inject(model)
    for targets in ("all-linear", ["query"]):
        with pytest.raises(ValueError, match=r"has LoRA already, for example in .*query: remove\(model\) first"):
            inject(model, targets)
    with pytest.raises(RuntimeError, match="this LoRA layer is not merged"):
        unmerge(model)
    merge(model)
    with pytest.raises(RuntimeError, match="merged already, and would get its update twice"):
        merge(model)
    with pytest.raises(ValueError, match="is merged, and its weight would keep the old update: unmerge"):
        load_lora_state_dict(model, lora_state_dict(model))
    with pytest.raises(RuntimeError, match=r"merged, so A and B would get no gradient: unmerge before training, or call model.eval\(\)"):
        model.train()(input_ids=IDS, attention_mask=MASK)
    unmerge(model)
    other = make("bert")
    inject(other, rank=2)
    with pytest.raises(ValueError, match=r"another model or rank: .*lora_A is \(2, \d+\) there and \(8, \d+\) here"):
        load_lora_state_dict(model, lora_state_dict(other))


def test_an_attention_that_cannot_be_wrapped_is_not_offered():
    model = make("pytorch")
    assert not any("self_attn" in name for name in linear_layers(model))
    with pytest.raises(ValueError, match="no linear layer matches 'out_proj'"):
        inject(model, ["out_proj"])


def test_a_few_steps_learn_and_leave_the_base_alone():
    torch.manual_seed(0)
    model = make("course")
    weights = copy.deepcopy(model.state_dict())
    inject(model, rank=4, alpha=8, dropout=0.1)
    labels, losses = torch.tensor([0, 1, 0]), []
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(30):
        loss = F.cross_entropy(model.train()(IDS, MASK), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    out = run(model)
    merge(model)
    assert torch.allclose(run(model), out, atol=1e-5)
    remove(model)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items() if not name.startswith("classifier"))
    with pytest.raises(ValueError, match="no LoRA layers"):
        lora_layers(model)
