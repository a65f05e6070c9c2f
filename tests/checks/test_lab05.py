"""Every check of lab 05 takes a right answer written differently from ours, and turns down wrong ones, each with its own message."""

import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from labkit import adapters
from labkit.checks import CheckFailed, NotWrittenYet
from labkit.checks import lab05 as check

# ---------------------------------------------------------------- BottleneckAdapter


class Right(nn.Module):
    """Written with bare matrices."""

    random_up, zero_down, residual, scale_weights, linear, outside, mix, upcast = False, False, True, 1, False, False, False, False

    def __init__(self, hidden_size, bottleneck_size):
        super().__init__()
        size = bottleneck_size * self.scale_weights
        self.inward = nn.Parameter(torch.zeros(hidden_size, size) if self.zero_down else torch.randn(hidden_size, size) / 10)
        self.shift = nn.Parameter(torch.zeros(size) if self.zero_down else torch.randn(size) / 10)
        self.outward = nn.Parameter(torch.randn(size, hidden_size) if self.random_up else torch.zeros(size, hidden_size))

    def forward(self, hidden):
        dtype = hidden.dtype
        x = hidden.mean(-2, keepdim=True).expand_as(hidden) if self.mix else hidden
        if self.upcast:
            x = hidden = hidden.float()
        inside = x @ self.inward.to(x.dtype) + self.shift.to(x.dtype)
        if not self.linear and not self.outside:
            inside = torch.relu(inside)
        update = inside @ self.outward.to(x.dtype)
        if self.outside:
            update = torch.tanh(update)
        out = hidden + update if self.residual else update
        return out if self.upcast else out.to(dtype)


def with_fault(base, **attributes):
    return type("Faulty", (base,), attributes)


class NoGradient(Right):
    def forward(self, hidden):
        inside = F.gelu(hidden @ self.inward.detach().to(hidden.dtype) + self.shift.to(hidden.dtype))
        return hidden + inside @ self.outward.to(hidden.dtype)


# ---------------------------------------------------------------- add and remove


class Wrapped(nn.Sequential):
    """The layer, then the adapter."""


class InTrainingOnly(nn.Module):
    def __init__(self, layer, adapter):
        super().__init__()
        self.layer, self.adapter = layer, adapter

    def forward(self, x):
        return self.adapter(self.layer(x)) if self.training else self.layer(x)


class Beside(nn.Module):
    """Holds an adapter and does not use it."""

    def __init__(self, layer, adapter):
        super().__init__()
        self.layer, self.adapter = layer, adapter

    def forward(self, x):
        return self.layer(x)


def adapter_for(width, size, dtype=torch.float32, start=0.0):
    new = nn.Sequential(nn.Linear(width, size), nn.GELU(), nn.Linear(size, width))
    nn.init.normal_(new[2].weight, std=start)
    nn.init.zeros_(new[2].bias)

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside = new.to(dtype)

        def forward(self, x):
            return x + self.inside(x)

    return Residual()


def adder(
    *,
    wrap=Wrapped,
    freeze="before",
    norms=True,
    head=True,
    placement="houlsby",
    share=False,
    dtype=True,
    drop=False,
    clone=True,
    keep="all",
    start=0.0,
):
    """A right add_adapters, unlike ours, with one thing wrong at a time."""

    def add_adapters(model, bottleneck_size):
        places = adapters.sublayer_outputs(model, placement)
        if freeze == "before":
            for p in model.parameters():
                p.requires_grad = False
        one = None
        for name, width in places.items():
            parent = model.get_submodule(name.rpartition(".")[0])
            layer = getattr(parent, name.rpartition(".")[2])
            new = one if share and one is not None else adapter_for(width, bottleneck_size, layer.weight.dtype if dtype else torch.float32, start)
            one = new
            setattr(parent, name.rpartition(".")[2], new if drop else wrap(layer, new))
        if freeze == "after":
            for p in model.parameters():
                p.requires_grad = False
        for module in model.modules():
            if norms and isinstance(module, nn.LayerNorm):
                module.weight.requires_grad = module.bias.requires_grad = True
        for p in model.classifier.parameters():
            p.requires_grad = head
        kept = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad and ".inside." not in name}
        kept = {name: p for name, p in kept.items() if keep == "all" or keep in name}
        return {name: p.clone() if clone else p for name, p in kept.items()}

    return add_adapters


def remover(*, unwrap=True, give_back=True, thaw=True, anew=False):
    def remove_adapters(model, before):
        if unwrap:
            for name, module in list(model.named_modules()):
                if isinstance(module, Wrapped):
                    parent = model.get_submodule(name.rpartition(".")[0])
                    layer = module[0]
                    if anew:
                        layer = nn.Linear(layer.in_features, layer.out_features)
                    setattr(parent, name.rpartition(".")[2], layer)
        if give_back:
            model.load_state_dict(before, strict=False)
        if thaw:
            for p in model.parameters():
                p.requires_grad = True

    return remove_adapters


def add_nothing(model, bottleneck_size):
    model.requires_grad_(False)
    return {"x": torch.zeros(1)}


def add_returns_none(model, bottleneck_size):
    adder()(model, bottleneck_size)


def right_state(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict(keep_vars=True).items() if tensor.requires_grad}


RIGHT = {
    check.bottleneck_adapter: (Right,),
    check.add_adapters: (adder(),),
    check.remove_adapters: (adder(), remover()),
    check.task_state: (right_state,),
}

WRONG = {
    check.bottleneck_adapter: {
        "no residual": ((with_fault(Right, residual=False),), "add the input to the update (the residual)"),
        "up at random": ((with_fault(Right, random_up=True),), "set weight and bias of the map back up to zero"),
        "both at zero": ((with_fault(Right, zero_down=True),), "with both maps at zero each blocks the other's gradient"),
        "no bottleneck": ((with_fault(Right, scale_weights=4),), "one linear map from 16 to 4, one from 4 back to 16"),
        "no nonlinearity": ((with_fault(Right, linear=True),), "put a nonlinearity (F.gelu) between the two maps"),
        "nonlinearity after": ((with_fault(Right, outside=True),), "the nonlinearity goes between the maps"),
        "mixes tokens": ((with_fault(Right, mix=True),), "a token's output depends on the other tokens"),
        "always float": ((with_fault(Right, upcast=True),), "bf16 went in and torch.float32 came out"),
        "detached": ((NoGradient,), "nothing under no_grad or detach"),
    },
    check.add_adapters: {
        "nothing": ((add_nothing,), "the model has no new parameters"),
        "in the layer's stead": ((adder(drop=True),), "is no longer part of the model: keep the layer inside Adapted"),
        "a random start": ((adder(start=1.0),), "a new adapter, from zero, on its output"),
        "pfeiffer's placement": ((adder(placement="pfeiffer"),), "two adapters of 115 for each of 2 blocks"),
        "one adapter for all": ((adder(share=True),), "make a new one for every place"),
        "base left trainable": ((adder(freeze="never"),), "still trains: model.requires_grad_(False) first"),
        "freezes too late": ((adder(freeze="after"),), "freeze the model before you put the adapters in"),
        "norms frozen": ((adder(norms=False),), "the layer norms must adapt to the task"),
        "head frozen": ((adder(head=False),), "the head (model.classifier) must adapt to the task"),
        "not used": ((adder(wrap=Beside),), "no forward pass goes through it"),
        "lost in eval mode": ((adder(wrap=InTrainingOnly),), "in eval() the adapters are left out"),
        "always float32": ((adder(dtype=False),), "a model in float64 got adapters in torch.float32"),
    },
    check.remove_adapters: {
        "references kept": ((adder(clone=False), remover()), "the layer norms kept what they learned: return copies (clone)"),
        "norms not given back": ((adder(keep="classifier"), remover()), "the layer norms kept what they learned"),
        "head not given back": ((adder(keep="norm"), remover()), "the head kept what it learned"),
        "nothing given back": ((adder(), remover(give_back=False)), "the layer norms kept what they learned"),
        "adapters left in": ((adder(), remover(unwrap=False)), "put every layer back under its own name"),
        "a new layer": ((adder(), remover(anew=True)), "put the very layer back that stood there"),
        "stays frozen": ((adder(), remover(thaw=False)), "stayed frozen: model.requires_grad_(True) at the end"),
        "returns nothing": ((add_returns_none, remover()), "return copies of the layer norms and the head"),
    },
    check.task_state: {
        "everything": (
            (lambda model: {n: t.clone() for n, t in model.state_dict().items()},),
            "which is frozen: keep only parameters with requires_grad",
        ),
        "references": ((lambda model: {n: p.detach() for n, p in model.named_parameters() if p.requires_grad},), "detach().clone() every tensor"),
        "no head": (
            (lambda model: {n: t for n, t in right_state(model).items() if "classifier" not in n},),
            "classifier.bias, classifier.weight was trained and",
        ),
        "no norms": (
            (lambda model: {n: t for n, t in right_state(model).items() if "norm" not in n},),
            "the layer norms and the head belong to a task too",
        ),
        "graph": ((lambda model: {n: p.clone() for n, p in model.named_parameters() if p.requires_grad},), "the copies ask for gradients"),
        "a list": ((lambda model: [p.detach().clone() for p in model.parameters() if p.requires_grad],), "return {name: tensor}"),
    },
}


@pytest.mark.parametrize("checker", RIGHT, ids=lambda c: c.__name__)
def test_takes_a_right_answer_written_differently(checker, capsys):
    checker(*RIGHT[checker])
    assert capsys.readouterr().out.count("✓") >= 5


@pytest.mark.parametrize(
    ("checker", "wrong"), [(c, name) for c, answers in WRONG.items() for name in answers], ids=lambda x: getattr(x, "__name__", x)
)
def test_turns_down_a_wrong_answer_with_its_own_message(checker, wrong):
    candidates, advice = WRONG[checker][wrong]
    with pytest.raises(CheckFailed, match="(?s).*" + re.escape(advice)):
        checker(*candidates)


@pytest.mark.parametrize("checker", RIGHT, ids=lambda c: c.__name__)
def test_says_not_written_yet_without_a_traceback(checker):
    def stub(*args, **kwargs):
        raise NotImplementedError

    with pytest.raises(NotWrittenYet, match="not written yet") as caught:
        checker(*[stub] * len(RIGHT[checker]))
    assert caught.value._render_traceback_() == [f"○ {caught.value}"]


def test_removal_not_written_yet():
    def stub(*args):
        raise NotImplementedError

    with pytest.raises(NotWrittenYet):
        check.remove_adapters(adder(), stub)


def test_labkits_own_versions_pass():
    def add(model, bottleneck_size):
        adapters.add_adapters(model, bottleneck_size)
        return model._before_adapters[1]

    check.bottleneck_adapter(adapters.BottleneckAdapter)
    check.add_adapters(add)
    check.remove_adapters(add, lambda model, before: adapters.remove_adapters(model))


def test_leaves_the_random_state_alone():
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    check.bottleneck_adapter(Right)
    assert torch.equal(torch.rand(1), expected)
