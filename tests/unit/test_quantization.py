import math
from itertools import combinations

import pytest
import torch
from sklearn.cluster import KMeans
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
)

from labkit import nf4
from labkit.codebook import kmeans_codebook, nearest_level, power_of_two_levels
from labkit.nf4 import Linear4bit, dequantize_4bit, pack, quantize_4bit, quantize_linears, unpack
from labkit.quantization import activation_memory, fake_quantize, parameters_from_config, quantize_uniform, straight_through, training_memory


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# ---------------------------------------------------------------- four bits


@pytest.mark.parametrize("count", [0, 1, 2, 7, 64])
def test_packing_comes_back(count):
    codes = torch.randint(0, 16, (count,), dtype=torch.uint8)
    packed = pack(codes)
    assert len(packed) == math.ceil(count / 2) and torch.equal(unpack(packed, count), codes)
    with pytest.raises(ValueError, match="codes were asked of"):
        unpack(packed, 2 * len(packed) + 1)


def test_a_code_above_15_is_named():
    with pytest.raises(ValueError, match="code 16 does not fit in 4 bits"):
        pack(torch.tensor([3, 16]))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("block_size", [1, 3, 64])
def test_every_value_gets_the_nearest_level(kind, block_size):
    weight = torch.randn(11, 13)
    quantized = quantize_4bit(weight, kind, block_size=block_size)
    back = dequantize_4bit(quantized)
    levels = nf4.LEVELS[kind]()
    absmax = quantized.absmax.repeat_interleave(block_size)[:143]
    nearest = (weight.view(-1, 1) - levels * absmax[:, None]).abs().amin(1)
    assert torch.allclose((back - weight).abs().view(-1), nearest, atol=1e-6)
    assert quantized.codes.max() <= 15 and back.shape == weight.shape


def test_the_quick_search_equals_counting_midpoints():
    levels = nf4.nf4_levels()
    midpoints = (levels[:-1] + levels[1:]) / 2
    edges = torch.cat([midpoints, torch.nextafter(midpoints, torch.tensor(2.0)), torch.nextafter(midpoints, torch.tensor(-2.0)), levels])
    values = torch.cat([edges, torch.rand(100_000) * 2 - 1])
    assert torch.equal(nf4.nearest_codes(values, "nf4").int(), torch.bucketize(values, midpoints, out_int32=True))


def test_long_weights_are_worked_on_in_parts_and_come_out_the_same(monkeypatch):
    weight = torch.randn(1001, 7)
    whole = quantize_4bit(weight, double=True)
    expected = dequantize_4bit(whole)
    monkeypatch.setattr(nf4, "CHUNK", 256)
    parts = quantize_4bit(weight, double=True)
    assert torch.equal(parts.packed, whole.packed) and torch.equal(parts.absmax.codes, whole.absmax.codes)
    assert torch.equal(dequantize_4bit(parts), expected)


def test_bytes_by_arithmetic():
    weight = torch.randn(384, 1536)
    plain, double = quantize_4bit(weight), quantize_4bit(weight, double=True)
    assert plain.nbytes == weight.numel() // 2 + 4 * weight.numel() // 64 and plain.bits_per_weight == 4.5
    assert double.nbytes == weight.numel() // 2 + weight.numel() // 64 + 4 * 36 + 4
    assert 4.127 < double.bits_per_weight < 4.128


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [(0, 0), (2, 64), (2, 65)])
def test_a_weight_that_is_not_finite_is_named_with_its_place(bad, place):
    weight = torch.randn(3, 66)
    weight[place] = bad
    with pytest.raises(ValueError, match=rf"the weight is {bad} at \({place[0]}, {place[1]}\)"):
        quantize_4bit(weight)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="kind is 'int4': choose one of nf4, fp4"):
        quantize_4bit(torch.ones(4), "int4")
    with pytest.raises(ValueError, match="block_size is 0"):
        quantize_4bit(torch.ones(4), block_size=0)
    with pytest.raises(TypeError, match="dtype torch.float64: convert it"):
        quantize_4bit(torch.ones(4, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"shape \(0, 4\) has no values"):
        quantize_4bit(torch.ones(0, 4))
    with pytest.raises(ValueError, match="a linear layer needs"):
        Linear4bit(torch.ones(4))
    with pytest.raises(ValueError, match=r"no nn.Linear to replace \(skipped parts: head\)"):
        quantize_linears(nn.Sequential(nn.LayerNorm(4)), skip=["head"])


# ---------------------------------------------------------------- Linear4bit


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_the_layer_equals_a_linear_layer_with_the_dequantised_weight(double, bias):
    linear = nn.Linear(96, 40, bias=bias)
    layer = Linear4bit.from_linear(linear, double=double)
    plain = nn.Linear(96, 40, bias=bias)
    plain.load_state_dict(linear.state_dict() | {"weight": layer.dequantize()})
    ours, theirs = torch.randn(2, 5, 96, requires_grad=True), None
    theirs = ours.detach().clone().requires_grad_()
    out, expected = layer(ours), plain(theirs)
    assert torch.equal(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    assert torch.equal(ours.grad, theirs.grad)
    assert not list(layer.parameters()), "nothing of the base trains"


def test_no_dequantised_copy_waits_for_the_backward_pass():
    layer, saved = Linear4bit(torch.randn(64, 64)), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = layer(torch.randn(3, 64, requires_grad=True))
    assert saved == [] and not any(isinstance(value, torch.Tensor) for value in vars(out.grad_fn).values())


def test_scales_stay_in_fp32_when_the_model_changes_its_dtype():
    for double in (False, True):
        model = nn.Sequential(Linear4bit(torch.randn(8, 64), torch.randn(8), double=double), nn.LayerNorm(8))
        before = model[0].dequantize(torch.float32)
        model.to(torch.bfloat16)
        assert model[1].weight.dtype == torch.bfloat16
        assert torch.equal(model[0].dequantize(torch.float32), before)
        assert model(torch.randn(3, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_autocast_and_compute_dtype():
    weight, x = torch.randn(8, 64), torch.randn(3, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = Linear4bit(weight)(x)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert x.grad.dtype == torch.float32 and x.grad.abs().sum() > 0
    layer = Linear4bit(weight, compute_dtype=torch.bfloat16)
    assert layer(x).dtype == torch.float32 and torch.equal(layer(x).bfloat16(), Linear4bit(weight)(x.bfloat16()))


def test_both_layers_of_distilberts_head_stay_whole():
    model = AutoModelForSequenceClassification.from_config(DistilBertConfig(vocab_size=50, dim=64, n_layers=1, n_heads=4, hidden_dim=64))
    assert len(quantize_linears(model)) == 6
    assert type(model.pre_classifier) is type(model.classifier) is nn.Linear


def test_state_dict_comes_back():
    one, two = (Linear4bit(torch.randn(8, 64), torch.randn(8), double=True) for _ in range(2))
    two.load_state_dict(one.state_dict())
    x = torch.randn(3, 64)
    assert torch.equal(one(x), two(x))


class LoRA(nn.Module):
    """What lab 07 puts on top."""

    def __init__(self, base, rank=2):
        super().__init__()
        self.base, self.A, self.B = base, nn.Parameter(torch.randn(rank, base.in_features)), nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x):
        return self.base(x) + x @ self.A.T @ self.B.T


def test_lora_on_top_trains_and_the_base_stays_bit_identical():
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU())
    model.add_module("classifier", nn.Linear(64, 2))
    assert quantize_linears(model, double=True) == ["0", "2"] and type(model.classifier) is nn.Linear
    model[0], model[2] = LoRA(model[0]), LoRA(model[2])
    model.classifier.requires_grad_(False)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items() if ".A" not in name and ".B" not in name}
    x, y = torch.randn(32, 64), torch.randint(0, 2, (32,))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(20):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in base.items())


# ---------------------------------------------------------------- uniform levels


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8, 12])
@pytest.mark.parametrize("group", [{}, {"axis": 0}, {"axis": 1}, {"axis": -1}, {"group_size": 8}])
def test_no_value_moves_more_than_half_a_step(symmetric, bits, group):
    values = torch.randn(6, 5, 16) + 0.3
    quantized = quantize_uniform(values, bits, symmetric=symmetric, **group)
    back = quantized.dequantize()
    assert back.shape == values.shape and quantized.codes.shape == values.shape
    groups = {"axis": values.shape[group["axis"]]} if "axis" in group else {"group_size": values.numel() // 8} if group else {"all": 1}
    assert quantized.scale.shape == (next(iter(groups.values())), 1)
    # An affine range is moved by the rounding of its zero point, up to half a step more at one end.
    steps = 0.5 if symmetric else 1.0
    assert ((back - values).abs() <= (steps + 1e-4) * quantized.scale.max()).all()
    low, high = (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
    assert low <= quantized.codes.min() and quantized.codes.max() <= high and high - quantized.codes.max() <= 1


@pytest.mark.parametrize("symmetric", [True, False])
def test_zero_stays_zero_and_a_group_of_zeros_too(symmetric):
    values = torch.rand(4, 8) + 5
    values[1] = 0
    values[2, 3] = 0
    back = quantize_uniform(values, 3, symmetric=symmetric, axis=0).dequantize()
    assert (back[1] == 0).all() and back[2, 3] == 0 and back.isfinite().all()


def test_channels_equal_pytorchs_own():
    values = torch.randn(5, 40)
    for symmetric, low, high in ((True, -127, 127), (False, 0, 255)):
        quantized = quantize_uniform(values, 8, axis=0, symmetric=symmetric)
        scale, zero_point = quantized.scale[:, 0], quantized.zero_point[:, 0]
        expected = torch.fake_quantize_per_channel_affine(values, scale, zero_point, 0, low, high)
        assert torch.allclose(quantized.dequantize(), expected, atol=1e-7)


def test_finer_groups_and_searched_ranges_lose_less():
    torch.manual_seed(1)
    values = torch.randn(64, 128) * torch.logspace(-1, 1, 64)[:, None]
    values[5, 7] = 60.0

    def error(**options):
        return (quantize_uniform(values, 4, **options).dequantize() - values).square().mean().item()

    assert error(group_size=32) < error(axis=0) < error()
    for symmetric in (True, False):
        assert error(clip="mse", axis=0, symmetric=symmetric) < error(axis=0, symmetric=symmetric)
    row = torch.cat([torch.randn(9999), torch.tensor([1000.0])])
    tight = quantize_uniform(row, 4, clip="percentile", percentile=99.9)
    assert tight.scale < 1 and tight.codes[-1] == 7 and quantize_uniform(row, 4).scale > 100
    both = quantize_uniform(row, 4, clip="percentile", percentile=99.9, symmetric=False)
    assert both.codes[-1] == 15 and both.scale < 1


def test_bytes_of_uniform_codes():
    values = torch.randn(64, 128)
    assert quantize_uniform(values, 8).nbytes == 64 * 128 + 4
    assert quantize_uniform(values, 3, axis=0, symmetric=False).nbytes == 64 * 128 * 3 // 8 + 64 * 5
    assert quantize_uniform(values, 4, group_size=32).nbytes == 64 * 64 + 4 * 256


def test_uniform_names_what_is_wrong():
    values = torch.randn(4, 6)
    for options, message in [
        ({"bits": 1}, "bits is 1: choose 2 to 16"),
        ({"group_size": 4}, r"group_size 4 does not divide the last axis of \(4, 6\)"),
        ({"axis": 0, "group_size": 3}, "choose channels or groups"),
        ({"axis": 2}, r"axis is 2 for values of shape \(4, 6\)"),
        ({"clip": "max"}, "clip is 'max': choose one of minmax, percentile, mse"),
        ({"percentile": 0.999}, "percentile is 0.999: choose more than 50"),
    ]:
        with pytest.raises(ValueError, match=message):
            quantize_uniform(values, **options)
    with pytest.raises(ValueError, match="hold nan or infinity"):
        quantize_uniform(torch.tensor([1.0, math.nan]))


# ---------------------------------------------------------------- training through it


def test_fake_quantize_equals_pytorchs_with_gradients():
    for symmetric in (True, False):
        ours = (torch.randn(3, 50) * 2).requires_grad_()
        theirs = ours.detach().clone().requires_grad_()
        options = {"symmetric": symmetric, "clip": "percentile", "percentile": 90}
        plan = quantize_uniform(ours, 4, **options)
        low, high = (-7, 7) if symmetric else (0, 15)
        out = fake_quantize(ours, 4, **options)
        expected = torch.fake_quantize_per_tensor_affine(theirs, plan.scale.item(), plan.zero_point.item(), low, high)
        assert torch.allclose(out, expected, atol=1e-6) and torch.equal(out, plan.dequantize())
        upstream = torch.randn_like(out)
        out.backward(upstream)
        expected.backward(upstream)
        assert torch.equal(ours.grad, theirs.grad) and (ours.grad == 0).any() and (ours.grad != 0).any()


def test_straight_through_gives_the_gradient_on():
    values = torch.randn(5, requires_grad=True)
    out = straight_through(values, values.round())
    assert torch.equal(out, values.detach().round())
    out.backward(torch.arange(5.0))
    assert torch.equal(values.grad, torch.arange(5.0))
    half = fake_quantize(torch.randn(4, 8, dtype=torch.bfloat16), 4)
    assert half.dtype == torch.bfloat16


def test_training_recovers_what_two_bits_lose():
    torch.manual_seed(3)
    x = torch.randn(256, 8)
    y = (x[:, :4] * x[:, 4:]).sum(1, keepdim=True)
    first, second = (torch.randn(64, 8) / 3).requires_grad_(), (torch.randn(1, 64) / 8).requires_grad_()

    def train(steps, quantize):
        optimizer = torch.optim.Adam([first, second], lr=0.01)
        for _ in range(steps):
            loss = (torch.relu(x @ quantize(first).T) @ quantize(second).T - y).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            return (torch.relu(x @ quantize(first).T) @ quantize(second).T - y).square().mean().item()

    full = train(200, lambda weight: weight)
    two_bits = train(0, lambda weight: fake_quantize(weight, 2, axis=0))
    trained = train(200, lambda weight: fake_quantize(weight, 2, axis=0))
    assert full < 0.2 * two_bits and trained < 0.5 * two_bits


# ---------------------------------------------------------------- codebooks


def inertia(values, codebook):
    return (codebook[nearest_level(values, codebook).long()].double() - values.double()).square().sum().item()


@pytest.mark.parametrize("size", [2, 4, 16, 64])
@pytest.mark.parametrize("name", ["normal", "heavy tails", "two hills", "uniform", "mostly zero"])
def test_kmeans_is_no_worse_than_scikit_learns(size, name):
    normal = torch.randn(3000)
    values = {
        "normal": normal,
        "heavy tails": normal / torch.rand(3000).clamp(min=0.05),
        "two hills": normal + 8 * (torch.rand(3000) < 0.3),
        "uniform": torch.rand(3000),
        "mostly zero": normal * (torch.rand(3000) < 0.2),
    }[name]
    codebook = kmeans_codebook(values, size)
    assert len(codebook) == size and (codebook.diff() > 0).all()
    theirs = KMeans(size, n_init=1, random_state=0).fit(values.view(-1, 1).numpy())
    # A codebook in fp32 rounds the seventh digit.
    assert inertia(values, codebook) <= (1 + 1e-5) * theirs.inertia_


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_few_values_get_the_best_of_all_codebooks(size):
    values = torch.randn(9).sort().values
    best = min(sum((part - part.mean()).square().sum().item() for part in values.tensor_split(cuts)) for cuts in combinations(range(1, 9), size - 1))
    assert inertia(values, kmeans_codebook(values, size)) == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("start", ["quantile", "k-means++", "cells"])
def test_every_start_ends_where_nothing_moves(start):
    values = torch.randn(5000)
    codebook = kmeans_codebook(values, 16, start=start, seed=1)
    codes = nearest_level(values, codebook).long()
    means = torch.stack([values[codes == i].mean() for i in range(16)])
    assert torch.allclose(codebook, means, atol=1e-5)


def test_kmeans_of_few_values_and_the_same_seed():
    assert kmeans_codebook(torch.tensor([3.0, 1.0, 3.0]), 8).tolist() == [1.0, 3.0]
    assert kmeans_codebook(torch.full((10,), 2.0), 4).tolist() == [2.0]
    assert kmeans_codebook(torch.tensor([0.0, 1.0, 10.0, 11.0]), 2).tolist() == [0.5, 10.5]
    values = torch.randn(500)
    assert torch.equal(kmeans_codebook(values, 8, start="k-means++", seed=3), kmeans_codebook(values, 8, start="k-means++", seed=3))
    with pytest.raises(ValueError, match="size is 0"):
        kmeans_codebook(values, 0)
    with pytest.raises(ValueError, match="start 'random': .*one of cells, quantile, k-means"):
        kmeans_codebook(values, 2, start="random")
    with pytest.raises(ValueError, match="empty or hold nan"):
        kmeans_codebook(torch.tensor([math.inf]), 2)


def test_powers_of_two():
    levels = power_of_two_levels(torch.tensor([0.1, -0.9]), 4)
    assert levels.tolist() == [-1.0, -0.5, -0.25, -0.125, -0.0625, -0.03125, -0.015625, 0.0, 0.015625, 0.03125, 0.0625, 0.125, 0.25, 0.5, 1.0]
    assert len(power_of_two_levels(torch.zeros(3), 2)) == 3
    codes = nearest_level(torch.tensor([0.3, 0.0, -2.0]), levels)
    assert levels[codes.long()].tolist() == [0.25, 0.0, -1.0] and codes.dtype == torch.uint8
    with pytest.raises(ValueError, match="one rising row: sort them"):
        nearest_level(torch.zeros(2), torch.tensor([1.0, 0.0]))


# ---------------------------------------------------------------- memory

SMALL = {"vocab_size": 1000, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 176}
LLAMA_7B = LlamaConfig(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
LLAMA_70B = LlamaConfig(
    vocab_size=32000, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8
)
CONFIGS = {
    "7B": (LLAMA_7B, None),
    "70B": (LLAMA_70B, None),
    "tied": (LlamaConfig(**SMALL, tie_word_embeddings=True, attention_bias=True, mlp_bias=True), None),
    "mistral": (MistralConfig(**SMALL, num_key_value_heads=2, head_dim=32), None),
    "qwen2": (Qwen2Config(**SMALL, num_key_value_heads=2, tie_word_embeddings=False), None),
    "bert": (BertConfig(**SMALL), None),
    "bert classifier": (BertConfig(**SMALL), 3),
    "distilbert": (DistilBertConfig(vocab_size=1000, dim=64, n_layers=3, n_heads=4, hidden_dim=176), None),
    "distilbert classifier": (DistilBertConfig(vocab_size=1000, dim=64, n_layers=3, n_heads=4, hidden_dim=176), 2),
    "gpt2": (GPT2Config(vocab_size=1000, n_embd=64, n_layer=3, n_head=4), None),
}


def built(config, num_labels, device="meta"):
    with torch.device(device):
        if num_labels:
            config.num_labels = num_labels
            return AutoModelForSequenceClassification.from_config(config)
        return (AutoModel if "bert" in config.model_type else AutoModelForCausalLM).from_config(config)


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_from_the_config_alone_equal_those_of_the_model(name):
    config, num_labels = CONFIGS[name]
    tensors = parameters_from_config(config, num_labels)
    model = built(config, num_labels)
    assert sum(t.count * t.each for t in tensors) == sum(p.numel() for p in model.parameters())
    if name != "gpt2":  # its Conv1D holds weights the other way round
        assert sorted(t.shape for t in tensors for _ in range(t.count)) == sorted(tuple(p.shape) for p in model.parameters())


def test_an_unknown_model_type_is_named():
    with pytest.raises(ValueError, match="the layout of model type 'strange' is not known here"):
        parameters_from_config(type("Config", (), {"model_type": "strange"})())


def tensor_bytes(tensors):
    return sum(t.nbytes for t in tensors)


@pytest.mark.parametrize("method", ["full", "lora", "nf4", "nf4-double"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_predicted_bytes_equal_measured_ones(method, dtype):
    config = BertConfig(**SMALL)
    model = built(config, 2, "cpu").to(dtype)
    rank = 4
    if method != "full":
        model.requires_grad_(False)
        linears = [n for n, m in model.named_modules() if type(m) is nn.Linear and n != "classifier"]
        if method != "lora":
            assert quantize_linears(model, double=method == "nf4-double") == linears
        for name in linears:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, LoRA(model.get_submodule(name), rank))
        model.classifier.to(torch.float32).requires_grad_(True)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for p in trained:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    counted = {id(t) for t in trained}
    buffers = [b for n, b in model.named_buffers() if "position_ids" not in n and "token_type_ids" not in n]
    weights = tensor_bytes(trained) + tensor_bytes(p for p in model.parameters() if id(p) not in counted) + tensor_bytes(buffers)
    state = tensor_bytes(t for s in optimizer.state.values() for n, t in s.items() if n != "step")
    predicted = training_memory(config, method, num_labels=2, dtype=dtype, rank=rank)
    assert (predicted.weights, predicted.gradients, predicted.optimizer) == (weights, tensor_bytes(p.grad for p in trained), state)
    assert predicted.trainable == sum(p.numel() for p in trained) and predicted.total == weights + predicted.gradients + state


@pytest.mark.parametrize("method", ["full", "nf4-double"])
@pytest.mark.parametrize("config", [BertConfig(**SMALL), DistilBertConfig(vocab_size=1000, dim=64, n_layers=3, n_heads=4, hidden_dim=176)])
def test_predicted_activations_are_within_two_percent_of_what_autograd_keeps(config, method):
    config._attn_implementation, config.num_labels = "eager", 2
    config.attention_probs_dropout_prob = config.attention_dropout = 0.0
    model = AutoModelForSequenceClassification.from_config(config).train()
    if method != "full":
        model.requires_grad_(False)
        for name in quantize_linears(model):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, LoRA(model.get_submodule(name), 8))
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.randint(1, 1000, (4, 24))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=torch.tensor([0, 1, 0, 1])).loss
    assert activation_memory(config, 4, 24, method) == pytest.approx(sum(kept.values()), rel=0.02)
    assert loss.requires_grad


def test_a_gpu_keeps_a_dropout_mask_in_a_byte():
    config = BertConfig(**SMALL)
    masks = 4 * 24 * config.hidden_size * (2 * config.num_hidden_layers + 1)  # numbers in them, one mask more after the embeddings
    assert activation_memory(config, 4, 24) - activation_memory(config, 4, 24, device="cuda") == 3 * masks


def test_activations_name_what_is_wrong():
    with pytest.raises(ValueError, match="what 'llama' keeps .* is not known here: use bert or distilbert"):
        activation_memory(LLAMA_7B, 1, 8)
    with pytest.raises(ValueError, match="method is 'qlora'"):
        activation_memory(BertConfig(**SMALL), 1, 8, "qlora")


def test_memory_of_large_models():
    full = training_memory(LLAMA_7B, "full")
    assert full.parameters == full.trainable == 6_738_415_616 and full.total == 16 * full.parameters
    qlora = training_memory(LLAMA_7B, "nf4-double", dtype=torch.bfloat16, rank=16)
    assert 0.5 < qlora.weights / 2 / full.parameters * 4 < 1.2 and qlora.total < full.total / 20
    big = training_memory(LLAMA_70B, "nf4-double", dtype=torch.bfloat16, rank=16)
    assert big.parameters == 68_976_648_192 and big.total < 48e9, "a 70B model trains on one 48 GB card, before activations"
    small = training_memory(LLAMA_7B, "nf4", dtype=torch.bfloat16, rank=16, optimizer="adamw8bit")
    assert small.optimizer < 0.27 * training_memory(LLAMA_7B, "nf4", dtype=torch.bfloat16, rank=16).optimizer
    two = training_memory(LLAMA_7B, "lora", rank=16, targets=["q_proj", "v_proj"])
    assert two.trainable == 32 * 2 * 16 * (4096 + 4096)


def test_memory_names_what_is_wrong():
    for options, message in [
        ({"method": "qlora"}, "method is 'qlora': choose one of full, lora, int8, nf4, nf4-double"),
        ({"method": "lora", "optimizer": "sgd"}, "optimizer is 'sgd'"),
        ({"method": "lora", "targets": ["query"]}, r"unknown targets \['query'\].*among q_proj"),
        ({"method": "lora", "rank": 0}, "rank 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            training_memory(LLAMA_7B, **options)
