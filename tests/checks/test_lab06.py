"""Every check of lab 06 takes a right answer written differently from ours, and turns down wrong ones, each with its own message."""

import math
import re

import pytest
import torch
from torch import nn

from labkit import lora
from labkit.checks import CheckFailed, NotWrittenYet
from labkit.checks import lab06 as check

# ---------------------------------------------------------------- LoRALinear


class Right(nn.Module):
    """Written with matrix products, and merging in a way of its own."""

    a_random, b_random, freeze, transposed, in_eval, base_dropout, own_dropout, constant_a = True, False, True, False, True, False, True, False
    own_dtype, float_out, swapped_shapes, detached, extra, always_dropout = True, False, False, False, 0.0, False

    def __init__(self, base, rank, alpha, dropout=0.0):
        super().__init__()
        self.base, self.drop, self.merged = base, dropout, False
        rank = int(rank)
        if self.freeze:
            base.weight.requires_grad = False
            if base.bias is not None:
                base.bias.requires_grad = False
        self.rank, self.alpha = rank, alpha
        dtype = base.weight.dtype if self.own_dtype else torch.float32
        out_features, in_features = base.weight.shape
        a = torch.randn(rank, in_features, dtype=dtype) / math.sqrt(in_features) if self.a_random else torch.zeros(rank, in_features, dtype=dtype)
        a = torch.full_like(a, 0.1) if self.constant_a else a
        b = torch.randn(out_features, rank, dtype=dtype) if self.b_random else torch.zeros(out_features, rank, dtype=dtype)
        self.lora_A, self.lora_B = nn.Parameter(a.T.contiguous() if self.swapped_shapes else a), nn.Parameter(b)

    @property
    def scaling(self):
        return self.alpha / self.rank

    def dropped(self, x):
        return nn.functional.dropout(x, self.drop, self.training or self.always_dropout)

    def forward(self, x):
        if self.merged:
            return self.base(x)
        a, b = (self.lora_A.detach(), self.lora_B.detach()) if self.detached else (self.lora_A, self.lora_B)
        inside = self.dropped(x) if self.own_dropout else x
        update = inside @ (b @ a) if self.transposed else torch.einsum("...i,ri,or->...o", inside, a, b)
        if not self.in_eval and not self.training:
            update = torch.zeros_like(update)
        out = self.base(self.dropped(x) if self.base_dropout else x) + self.scaling * update + self.extra
        return out.float() if self.float_out else out


def fault(**attributes):
    return type("Faulty", (Right,), attributes)


def scaled(factor):
    return fault(scaling=property(lambda self: factor(self.alpha, self.rank)))


class Doubled(Right):
    """Its forward does not know about merging."""

    def forward(self, x):
        merged, self.merged = self.merged, False
        out = super().forward(x)
        self.merged = merged
        return out


# ---------------------------------------------------------------- inject


def injector(
    *, exact=True, freeze="before", head=True, refuse=True, copy=False, names=True, layer=Right, swap=False, first_only=False, check_empty="each"
):
    """A right inject, unlike ours, with one thing wrong at a time."""

    def inject(model, targets, rank, alpha):
        if freeze == "before":
            for p in model.parameters():
                p.requires_grad = False
        found = []
        for target in targets:
            hits = []
            for name, module in model.named_modules():
                fits = ("." + name).endswith("." + target) if exact else target in name.rpartition(".")[2]
                if isinstance(module, nn.Linear) and fits:
                    hits.append(name)
            if refuse and not hits:
                raise ValueError(f"nothing is called {target}")
            found += hits[:1] if first_only else hits
        for name in found:
            parent = model.get_submodule(name.rpartition(".")[0])
            base = getattr(parent, name.rpartition(".")[2])
            if copy:
                base = nn.Linear(base.in_features, base.out_features)
            setattr(parent, name.rpartition(".")[2], layer(base, alpha, rank) if swap else layer(base, rank, alpha))
        if freeze == "after":
            for p in model.parameters():
                p.requires_grad = False
        for p in model.classifier.parameters():
            p.requires_grad = head
        return found if names else None

    return inject


# ---------------------------------------------------------------- merge


def merger(*, scale=True, turned=False, all_layers=True, flag=True, twice=False, change=True, sign=1):
    def merge(model):
        for layer in model.modules():
            if isinstance(layer, Right) and (twice or not layer.merged):
                with torch.no_grad():
                    update = (layer.scaling if scale else 1) * torch.einsum("or,ri->oi", layer.lora_B, layer.lora_A)
                    if turned and update.shape[0] == update.shape[1]:
                        update = update.T
                    if change:
                        layer.base.weight += sign * update
                layer.merged = flag
                if not all_layers:
                    return

    return merge


def unmerger(*, scale=True, flag=True, twice=False, subtract=True):
    def unmerge(model):
        for layer in model.modules():
            if isinstance(layer, Right) and (twice or layer.merged):
                with torch.no_grad():
                    if subtract:
                        layer.base.weight -= (layer.scaling if scale else 1) * (layer.lora_B @ layer.lora_A)
                layer.merged = layer.merged and not flag

    return unmerge


def raising_merge(model):
    if any(getattr(layer, "merged", False) for layer in model):
        raise RuntimeError("merged already")
    merger()(model)


def right_state(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict(keep_vars=True).items() if tensor.requires_grad}


def without(part):
    return (lambda model: {name: tensor for name, tensor in right_state(model).items() if part not in name},)


def right_low_rank(update, rank):
    """Roots of the singular values on both sides, from the eigenvectors of the smaller of the two products."""
    values, vectors = torch.linalg.eigh(update.double().T @ update.double())
    a = vectors[:, -rank:].flip(1).T
    roots = values[-rank:].flip(0).clamp(min=0) ** 0.25
    b = (update.double() @ a.T) / roots
    return b.float(), (a * roots.unsqueeze(1)).float()


def svd_with(change):
    """low_rank with one thing wrong: change(u, s, vh, rank) -> (B, A)."""
    return (lambda update, rank: change(*torch.linalg.svd(update, full_matrices=False), rank),)


def right_combine(states, weights):
    return {
        name: torch.hstack([w * state[name] for w, state in zip(weights, states)])
        if name.endswith("B")
        else torch.vstack([state[name] for state in states])
        for name in states[0]
        if "lora" in name
    }


def combined(*, heads=False, on_a=False, on_b=True, flip=False, turn=False, average=False, in_place=False):
    """combine with one thing wrong at a time."""

    def combine(states, weights):
        weights = weights[::-1] if turn else weights
        out = {}
        for name in states[0]:
            parts = [state[name] for state in states]
            if "classifier" in name:
                if heads:
                    out[name] = parts[0]
                continue
            on = on_b if name.endswith("B") else on_a
            parts = [(part.mul_(w) if in_place else w * part) if on else part for w, part in zip(weights, parts)]
            if average:
                rank = min(min(part.shape) for part in parts)
                parts = [part[:, :rank] if name.endswith("B") else part[:rank] for part in parts]
                out[name] = sum(parts)
                continue
            parts = parts[::-1] if flip and name.endswith("B") else parts
            out[name] = torch.cat(parts, dim=1 if name.endswith("B") else 0)
        return out

    return (combine,)


RIGHT = {
    check.low_rank: (right_low_rank,),
    check.combine: (right_combine,),
    check.lora_linear: (Right,),
    check.inject: (injector(),),
    check.merge: (Right, merger(), unmerger()),
    check.adapter_state: (right_state,),
}

WRONG = {
    check.low_rank: {
        "no singular values": (svd_with(lambda u, s, vh, r: (u[:, :r], vh[:r])), "the singular values are missing"),
        "singular values twice": (svd_with(lambda u, s, vh, r: (u[:, :r] * s[:r], s[:r, None] * vh[:r])), "the singular values are in both matrices"),
        "last directions": (svd_with(lambda u, s, vh, r: (u[:, -r:] * s[-r:], vh[-r:])), "these are the last directions"),
        "A first": (svd_with(lambda u, s, vh, r: (vh[:r], u[:, :r] * s[:r])), "A came first"),
        "the whole matrix": (svd_with(lambda u, s, vh, r: (u * s, vh)), "expected (9, 3) for rank 3"),
        "other order": (svd_with(lambda u, s, vh, r: ((u[:, :r] * s[:r]).flip(1), vh[:r].flip(0))), "keep the order of the singular values"),
        "first columns": ((lambda update, rank: (update[:, :rank], torch.eye(rank, update.shape[1])),), "sum the first terms of the decomposition"),
    },
    check.combine: {
        "no weights": (combined(on_b=False), "the weights are missing"),
        "weights twice": (combined(on_a=True), "the product has their squares"),
        "weights exchanged": (combined(turn=True), "the weights are exchanged"),
        "heads kept": (combined(heads=True), "it holds a head"),
        "A and B added": (combined(average=True), "put the A on top of one another"),
        "orders differ": (combined(flip=True), "in the same order of the states"),
        "in place": (combined(in_place=True), "the states were changed"),
        "only B": ((lambda states, weights: {n: t for n, t in right_combine(states, weights).items() if n.endswith("B")},), "expected every lora_A"),
        "a list": ((lambda states, weights: list(right_combine(states, weights).values()),), "return {name: tensor}"),
    },
    check.lora_linear: {
        "alpha unscaled": ((scaled(lambda alpha, rank: alpha),), "your update is scaled by alpha; LoRA scales by alpha / rank"),
        "no scale": ((scaled(lambda alpha, rank: 1.0),), "your update is not scaled; LoRA scales by alpha / rank"),
        "rank over alpha": ((scaled(lambda alpha, rank: rank / alpha),), "turn it over: alpha / rank"),
        "root of rank": ((scaled(lambda alpha, rank: alpha / math.sqrt(rank)),), "which is rsLoRA"),
        "some scale": ((scaled(lambda alpha, rank: 0.37),), "your update is scaled by 0.37, expected alpha / rank"),
        "both zero": ((fault(a_random=False),), "A and B are both zero"),
        "both random": ((fault(b_random=True),), "A and B are both random"),
        "B random": ((fault(b_random=True, a_random=False),), "A is zero and B random"),
        "A constant": ((fault(constant_a=True),), "the numbers in A are mostly the same"),
        "base left trainable": ((fault(freeze=False),), "base.weight, base.bias trains too"),
        "transposed product": ((fault(transposed=True),), "the product is transposed"),
        "shapes swapped": ((fault(swapped_shapes=True),), "lora_A has shape (12, 4), for rank 4 on 12 features expected (4, 12)"),
        "lost in eval mode": ((fault(in_eval=False),), "in eval() the update is lost"),
        "dropout on the base path": ((fault(base_dropout=True),), "dropout belongs on the LoRA path only"),
        "no dropout": ((fault(own_dropout=False),), "two passes in train() with dropout 0.5 agree"),
        "dropout in eval": ((fault(always_dropout=True),), "in eval() dropout is still on"),
        "detached": ((fault(detached=True),), "A or B gets no gradient"),
        "something added": ((fault(extra=0.5),), "return base(x) + update, with the base's bias once"),
        "always float": ((fault(float_out=True),), "a base in bf16 gives torch.float32"),
        "A and B in float32": ((fault(own_dtype=False),), "a base in bf16 stops with an error"),
    },
    check.inject: {
        "base left trainable": ((injector(freeze="never", layer=fault(freeze=False)),), "still trains: model.requires_grad_(False) before you wrap"),
        "freezes too late": ((injector(freeze="after"),), "rank * (in + out) for each layer, and freeze before you wrap"),
        "head frozen": ((injector(head=False),), "model.classifier is frozen"),
        "returns nothing": ((injector(names=False),), "it returned None"),
        "first layer only": ((injector(first_only=True),), "the whole names of the layers"),
        "a new layer": ((injector(copy=True),), "wrap the layer itself, not a new one"),
        "rank and alpha swapped": ((injector(swap=True),), "rank * (in + out) for each layer"),
        "alpha unscaled": ((injector(layer=scaled(lambda alpha, rank: alpha)),), "alpha 8 at rank 4 must scale by 2"),
        "both random": ((injector(layer=fault(b_random=True)),), "around the layer that stood there gives the same output"),
        "lost in eval mode": ((injector(layer=fault(in_eval=False)),), "an update is lost in one of the modes"),
        "not used": ((injector(layer=fault(detached=True)),), "an A or B gets no gradient"),
        "says nothing": ((injector(refuse=False),), "and nothing was said"),
        "parts of names": ((injector(exact=False),), "'ey' is only the end of a name"),
    },
    check.merge: {
        "forgets the scale": ((Right, merger(scale=False), unmerger(scale=False)), "merge forgets the scale"),
        "transposed product": ((Right, merger(turned=True), unmerger()), "what was added to the weight is transposed"),
        "alpha unscaled": ((Right, merger(sign=4), unmerger()), "your update is scaled by alpha;"),
        "first layer only": ((Right, merger(all_layers=False), unmerger()), "only the first layer was merged"),
        "changes nothing": ((Right, merger(change=False), unmerger()), "merge left the base's weight as it was"),
        "counted twice": ((Doubled, merger(), unmerger()), "after merge the update counts twice"),
        "flag forgotten": ((Right, merger(flag=False), unmerger(twice=True)), "after merge the update counts twice"),
        "merged twice": ((Right, merger(twice=True), unmerger()), "a second merge added the update again"),
        "unmerge forgets the scale": ((Right, merger(), unmerger(scale=False)), "subtract what merge added, or put a copy back"),
        "unmerge does nothing": ((Right, merger(), unmerger(subtract=False)), "after unmerge the weight is off by"),
        "still merged": ((Right, merger(), unmerger(flag=False)), "after unmerge the update is lost: set merged = False"),
        "unmerged twice": ((Right, merger(), unmerger(twice=True)), "a second unmerge subtracted the update again"),
    },
    check.adapter_state: {
        "everything": (
            (lambda model: {n: t.clone() for n, t in model.state_dict().items()},),
            "which every task shares: keep A, B and the head only",
        ),
        "no A": (without("lora_A"), "a task is all A, all B and the head"),
        "no B": (without("lora_B"), "lora_B is missing: a task"),
        "no head": (without("classifier"), "classifier.bias, classifier.weight is missing"),
        "references": ((lambda model: {n: p.detach() for n, p in model.named_parameters() if p.requires_grad},), "detach().clone() every tensor"),
        "graph": ((lambda model: {n: p.clone() for n, p in model.named_parameters() if p.requires_grad},), "the copies ask for gradients"),
        "a list": ((lambda model: list(right_state(model).values()),), "return {name: tensor}"),
    },
}


@pytest.mark.parametrize("checker", RIGHT, ids=lambda c: c.__name__)
def test_takes_a_right_answer_written_differently(checker, capsys):
    checker(*RIGHT[checker])
    assert capsys.readouterr().out.count("✓") >= 5


def test_takes_a_merge_that_raises_when_asked_twice():
    check.merge(Right, raising_merge, unmerger())


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


@pytest.mark.parametrize("which", [1, 2])
def test_merge_or_unmerge_not_written_yet(which):
    def stub(model):
        raise NotImplementedError

    answers = [Right, merger(), unmerger()]
    answers[which] = stub
    with pytest.raises(NotWrittenYet):
        check.merge(*answers)


def test_labkits_own_versions_pass():
    check.lora_linear(lora.LoRALinear)
    check.inject(lambda model, targets, rank, alpha: lora.inject(model, targets, rank=rank, alpha=alpha))
    check.merge(lora.LoRALinear, lora.merge, lora.unmerge)
    check.adapter_state(lora.lora_state_dict)


def test_leaves_the_random_state_alone():
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    check.lora_linear(Right)
    assert torch.equal(torch.rand(1), expected)
