"""Checks of lab 06, LoRA."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from labkit import lora
from labkit.checks import reporting
from labkit.classifier import TransformerClassifier


def _times(update: Tensor, raw: Tensor) -> float | None:
    """The number that makes `raw` into `update`; None where no number does."""
    factor = ((update * raw).sum() / raw.square().sum()).item()
    return factor if torch.allclose(update, factor * raw, atol=1e-3 * raw.abs().max().item()) else None


def _scale_advice(factor: float, rank: int, alpha: float) -> str:
    known = {
        alpha: "your update is scaled by alpha; LoRA scales by alpha / rank",
        1.0: "your update is not scaled; LoRA scales by alpha / rank",
        rank / alpha: "your update is scaled by rank / alpha; turn it over: alpha / rank",
        alpha / math.sqrt(rank): "your update is scaled by alpha / sqrt(rank), which is rsLoRA; plain LoRA scales by alpha / rank",
        (alpha / rank) ** 2: "your update is scaled by alpha / rank twice: once is enough",
        0.0: "there is no update: A and B are random and the output is the base's",
    }
    near = min(known, key=lambda value: abs(value - factor))
    return known[near] if abs(near - factor) < 0.01 * max(1, abs(near)) else f"your update is scaled by {factor:.3g}, expected alpha / rank"


def _gradients(out: Tensor, parameters: list[nn.Parameter]) -> list[Tensor | None]:
    """What reaches each parameter from `out`; None where nothing does."""
    return list(torch.autograd.grad(out.square().sum(), parameters, allow_unused=True)) if out.requires_grad else [None] * len(parameters)


def lora_linear(candidate) -> None:
    """`LoRALinear(base, rank, alpha, dropout=0.0)` with parameters lora_A (rank, in_features) and lora_B (out_features, rank)."""
    with reporting("LoRALinear") as report:
        base, x = nn.Linear(12, 12), torch.randn(5, 7, 12)
        expected, weight = base(x).detach(), base.weight.detach().clone()
        layer = candidate(base, 4, 10.0)
        for name, shape in (("lora_A", (4, 12)), ("lora_B", (12, 4))):
            p = getattr(layer, name, None)
            report(
                f"{name} trains",
                isinstance(p, nn.Parameter) and p.requires_grad,
                f"{name} is no parameter that trains: self.{name} = nn.Parameter(...)",
            )
            report(f"{name} is {shape}", tuple(p.shape) == shape, f"{name} has shape {tuple(p.shape)}, for rank 4 on 12 features expected {shape}")
        a, b = layer.lora_A.detach(), layer.lora_B.detach()
        report(
            "not both zero",
            bool((a != 0).any() or (b != 0).any()),
            "A and B are both zero: the gradient of each is multiplied by the other, so neither will ever learn; draw A at random",
        )
        report(
            "not both random",
            not ((a != 0).any() and (b != 0).any()),
            "A and B are both random, so a new layer does not give the base's output: set B to zero",
        )
        report("A random, B zero", bool((b == 0).all()), "A is zero and B random: it would work, but everyone's files have it the other way round")
        report(
            "A is drawn at random", len(a.unique()) > 24, "the numbers in A are mostly the same: draw them, for example with nn.init.kaiming_uniform_"
        )
        out = layer(x)
        report.shape(out, (5, 7, 12))
        report(
            "no change at the start",
            torch.allclose(out, expected, atol=1e-5),
            "a new layer does not give the base's output: return base(x) + update, with the base's bias once",
        )
        loose = [name for name, p in layer.named_parameters() if p.requires_grad and p is not layer.lora_A and p is not layer.lora_B]
        report("the base is frozen", not loose, f"{', '.join(loose)} trains too: base.requires_grad_(False), only A and B are trained")
        layer.eval()
        with torch.no_grad():
            layer.lora_B.normal_()
            update, raw = layer(x) - expected, x @ (layer.lora_B @ layer.lora_A).T
            swapped = x @ (layer.lora_B @ layer.lora_A)
            report(
                "the update counts in eval mode",
                bool(update.abs().max() > 1e-4) or not bool((layer.train()(x) - expected).abs().max() > 1e-4),
                "in eval() the update is lost: what was learned must count when the model is used; only dropout depends on the mode",
            )
            layer.eval()
            report(
                "B A x, in this order",
                _times(update, swapped) is None,
                "the product is transposed: the update's matrix is B A, of shape (out, in), so x is multiplied by (B A).T: x @ A.T @ B.T",
            )
        factor = _times(update, raw)
        report("the update is B A x", factor is not None, "the update is no multiple of x @ A.T @ B.T: use nothing but A, B and the scaling")
        report("scaled by alpha / rank", abs(factor - 2.5) < 0.01, _scale_advice(factor, 4, 10.0))
        gradients = _gradients(layer.train()(x), [layer.lora_A, layer.lora_B])
        report(
            "gradients reach A and B",
            all(g is not None and g.abs().sum() > 0 for g in gradients),
            "A or B gets no gradient: do not detach them, and compute the update in forward",
        )
        report("leaves the base's weight alone", torch.equal(base.weight, weight), "the base's weight was changed: the update is added to the output")
        _dropout(report, candidate)
        wide = candidate(nn.Linear(6, 20, bias=False), 3, 3.0)
        report.shape(wide(torch.randn(2, 6)), (2, 20))
        _bf16(report, candidate(nn.Linear(12, 12).to(torch.bfloat16), 4, 8.0), x.to(torch.bfloat16))


def _bf16(report, layer: nn.Module, x: Tensor) -> None:
    try:
        found = f"gives {layer(x).dtype}"
    except RuntimeError as error:  # what torch says of two dtypes in one product names neither
        found = f"stops with an error ({str(error).splitlines()[0]})"
    report(
        "keeps the dtype",
        found == "gives torch.bfloat16",
        f"a base in bf16 {found}: make A and B in the dtype of base.weight, or convert x to theirs",
    )


def _dropout(report, candidate) -> None:
    base, x = nn.Linear(40, 30), torch.randn(50, 40)
    layer = candidate(base, 4, 4.0, dropout=0.5)
    with torch.no_grad():
        report(
            "no dropout on the base path",
            torch.allclose(layer.train()(x), base(x), atol=1e-5),
            "with B at zero the output differs from the base's in train(): dropout belongs on the LoRA path only, on the x that A gets",
        )
        layer.lora_B.normal_()
        report(
            "dropout on the LoRA path",
            not torch.allclose(layer(x), layer(x), atol=1e-5),
            "two passes in train() with dropout 0.5 agree: apply nn.Dropout(dropout) to the x that A gets",
        )
        raw = x @ layer.lora_A.T @ layer.lora_B.T
        report(
            "no dropout in eval",
            torch.allclose(layer.eval()(x) - base(x), raw, atol=1e-3),
            "in eval() dropout is still on: use nn.Dropout, which knows the mode",
        )


def _model() -> nn.Module:
    return TransformerClassifier(40, 2, hidden_size=16, num_layers=2, num_heads=2, max_length=10, dropout=0.0)


def _batch() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(1, 40, (3, 8)), "attention_mask": torch.tensor([[1] * 8, [1] * 5 + [0] * 3, [1] * 8])}


def _logits(model: nn.Module, batch: dict[str, Tensor], training: bool = False) -> Tensor:
    with torch.no_grad():
        return model.train(training)(**batch)


def _shake(model: nn.Module) -> None:
    """As training would: every number that may move does."""
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.3 * torch.randn_like(p)


def inject(candidate: Callable) -> None:
    """`inject(model, targets, rank, alpha)`: LoRA on the linear layers whose name is, or ends in, one of `targets`; returns their names."""
    with reporting("inject") as report:
        model, batch = _model(), _batch()
        base, before = {id(p): name for name, p in model.named_parameters()}, _logits(model, batch)
        names = candidate(model, ["query", "up"], 4, 8.0)
        expected = [f"blocks.{i}.{part}" for i in range(2) for part in ("attention.query", "up")]
        report(
            "returns the names",
            isinstance(names, (list, tuple)) and sorted(names) == sorted(expected),
            f"for the targets query and up it returned {names}, expected {expected}: the whole names of the layers, from named_modules",
        )
        found = sorted(name.removesuffix(".lora_A") for name, _ in model.named_parameters() if name.endswith(".lora_A"))
        report(
            "these layers and no others",
            found == sorted(expected),
            f"LoRA stands on {', '.join(found) or 'no layer'}: setattr(parent, child, LoRALinear(...)) for the layers that match, and only those",
        )
        gone = [name for i, name in base.items() if i not in {id(p) for p in model.parameters()}]
        report(
            "keeps the layers that stood there",
            not gone,
            f"{', '.join(gone[:2])} is no longer part of the model: wrap the layer itself, not a new one",
        )
        report(
            "no change at the start",
            torch.allclose(_logits(model, batch), before, atol=1e-5),
            "the logits changed: LoRALinear(layer, rank, alpha) around the layer that stood there gives the same output",
        )
        loose = [base[id(p)] for p in model.parameters() if p.requires_grad and id(p) in base and not base[id(p)].startswith("classifier.")]
        report("the base is frozen", not loose, f"{', '.join(loose[:2])} still trains: model.requires_grad_(False) before you wrap anything")
        report(
            "the head trains",
            all(p.requires_grad for p in model.classifier.parameters()),
            "model.classifier is frozen: a new task needs its head, switch it on",
        )
        new = [p for p in model.parameters() if id(p) not in base]
        count, right = sum(p.numel() for p in new), 2 * (4 * (16 + 16) + 4 * (16 + 64))
        report(
            "A and B of the rank asked for, for every layer",
            count == right and all(p.requires_grad for p in new),
            f"{count} new numbers, expected {right}, all of them trained: rank * (in + out) for each layer, and freeze before you wrap",
        )
        _shake(model)
        after = _logits(model, batch)
        report(
            "train and eval agree",
            torch.allclose(_logits(model, batch, training=True), after, atol=1e-5),
            "without dropout the model gives other logits in train() than in eval(): an update is lost in one of the modes",
        )
        gradients = _gradients(model.eval()(**batch), new)
        report(
            "every update is used", all(g is not None and g.abs().sum() > 0 for g in gradients), "an A or B gets no gradient: its layer is not in use"
        )
        layer = model.blocks[0].up
        with torch.no_grad():
            layer.lora_B.normal_()
            x = torch.randn(4, 16)
            factor = _times(layer.eval()(x) - nn.functional.linear(x, *_weight_and_bias(layer, base)), x @ layer.lora_A.T @ layer.lora_B.T)
        report(
            "rank and alpha are handed on",
            factor is not None and abs(factor - 2) < 0.02,
            "alpha 8 at rank 4 must scale by 2: pass rank, then alpha, to LoRALinear",
        )
        for target, why in (("keys", "matches no layer"), ("ey", "is only the end of a name"), ("norm", "is no linear layer")):
            report(
                f"refuses {target!r}",
                _raises(candidate, target),
                f"the target {target!r} {why}, and nothing was said: a run without LoRA would follow; raise ValueError naming the target",
            )


def _weight_and_bias(layer: nn.Module, base: dict[int, str]) -> tuple[Tensor, Tensor]:
    return tuple(next(p for p in layer.parameters() if base.get(id(p), "").endswith(end)) for end in ("weight", "bias"))


def _raises(candidate: Callable, target: str) -> bool:
    try:
        candidate(_model(), [target], 4, 8.0)
    except ValueError as error:
        return target in str(error)
    return False


def merge(lora_linear: type, merge: Callable, unmerge: Callable) -> None:
    """`merge(model)` and `unmerge(model)`, on a model with layers of the learner's `LoRALinear(base, rank, alpha)`."""
    with reporting("merge") as report:
        first, second = nn.Linear(8, 8), nn.Linear(8, 5)
        model = nn.Sequential(lora_linear(first, 4, 10.0), nn.Tanh(), lora_linear(second, 2, 3.0)).eval()
        with torch.no_grad():
            for layer in (model[0], model[2]):
                layer.lora_B.normal_()
        x = torch.randn(6, 8)
        weights = [base.weight.detach().clone() for base in (first, second)]
        update = (model[0].lora_B @ model[0].lora_A).detach()
        with torch.no_grad():
            out = model(x)
            merge(model)
            moved = first.weight - weights[0]
            report(
                "merge changes the weight",
                bool((moved != 0).any()),
                "merge left the base's weight as it was: add scaling * B A to base.weight, in place",
            )
            report(
                "B A, not transposed",
                _times(moved, update.T) is None,
                "what was added to the weight is transposed: B A has the shape (out, in) of the weight, as lora_B @ lora_A",
            )
            factor = _times(moved, update)
            report("adds a multiple of B A", factor is not None, "what was added to the weight is no multiple of lora_B @ lora_A")
            forgotten = "merge forgets the scale: forward scales by alpha / rank, so the weight gets scaling * B A"
            report("with the scale of forward", abs(factor - 2.5) < 0.01, forgotten if abs(factor - 1) < 0.01 else _scale_advice(factor, 4, 10.0))
            report(
                "every layer is merged",
                not torch.equal(second.weight, weights[1]),
                "only the first layer was merged: go through model.modules() and merge every LoRALinear",
            )
            again = model(x)
            doubled = torch.allclose(model[0](x), nn.functional.linear(x, weights[0] + 5.0 * update, first.bias), atol=1e-3)
            report(
                "counted once",
                not doubled,
                "after merge the update counts twice: set merged = True, and let forward return base(x) alone then",
            )
            report("merged equals unmerged", torch.allclose(again, out, atol=1e-4), "the merged model gives other outputs than before")
            with contextlib.suppress(RuntimeError, ValueError, AssertionError):
                merge(model)
            report(
                "merging twice does no harm",
                torch.allclose(model(x), out, atol=1e-4),
                "a second merge added the update again: do nothing, or raise an error, where a layer is merged already",
            )
            unmerge(model)
            for base, weight in zip((first, second), weights):
                off = (base.weight - weight).abs().max().item()
                report(
                    "unmerge gives the weight back",
                    off < 1e-5,
                    f"after unmerge the weight is off by {off:.2g}: subtract what merge added, or put a copy back",
                )
            report("the update counts again", torch.allclose(model(x), out, atol=1e-4), "after unmerge the update is lost: set merged = False")
            with contextlib.suppress(RuntimeError, ValueError, AssertionError):
                unmerge(model)
            report("unmerging twice does no harm", torch.allclose(model(x), out, atol=1e-4), "a second unmerge subtracted the update again")
        model.train()
        gradients = _gradients(model(x), [model[0].lora_A, model[2].lora_B])
        report("can be trained on", all(g is not None and g.abs().sum() > 0 for g in gradients), "after unmerge A and B get no gradient")


def adapter_state(candidate: Callable) -> None:
    """`adapter_state(model)`: copies of A, B and the head, by name, and nothing of the base."""
    with reporting("adapter_state") as report:
        model, batch = _model(), _batch()
        twin = copy.deepcopy(model)
        lora.inject(model, ["query", "value"], rank=4, alpha=8)
        lora.inject(twin, ["query", "value"], rank=4, alpha=8)
        _shake(model)
        out, state = _logits(model, batch), candidate(model)
        names = {name for name, p in model.named_parameters() if p.requires_grad}
        report(
            "a dict by name",
            isinstance(state, dict) and state.keys() <= set(model.state_dict()),
            "return {name: tensor}, with names as in named_parameters",
        )
        extra = sorted(state.keys() - names)
        report("nothing of the base", not extra, f"it holds {', '.join(extra[:2])}, which every task shares: keep A, B and the head only")
        for part in ("lora_A", "lora_B", "classifier"):
            lacking = sorted(name for name in names - state.keys() if part in name)
            report(f"{part} is in it", not lacking, f"{', '.join(lacking[:2])} is missing: a task is all A, all B and the head")
        _shake(model)
        twin.load_state_dict(state, strict=False)
        report(
            "copies, which bring the task back",
            torch.allclose(_logits(twin, batch), out, atol=1e-6),
            "after more training the kept task had changed as well: detach().clone() every tensor",
        )
        report("no graph attached", not any(t.requires_grad for t in state.values()), "the copies ask for gradients: detach them")


def low_rank(candidate: Callable) -> None:
    """`low_rank(update, rank)`: B (out_features, rank) and A (rank, in_features), B A the closest matrix of that rank, strongest direction first."""
    with reporting("low_rank") as report:
        for rows, columns in ((9, 14), (14, 9)):
            update = torch.randn(rows, columns)
            u, s, vh = torch.linalg.svd(update, full_matrices=False)
            b, a = candidate(update, 3)
            turned = tuple(b.shape) == (3, columns) and tuple(a.shape) == (rows, 3)
            report("B before A", not turned, "A came first: return B (out_features, rank), then A (rank, in_features)")
            for name, matrix, shape in (("B", b, (rows, 3)), ("A", a, (3, columns))):
                report(f"{name} is {shape}", tuple(matrix.shape) == shape, f"{name} has shape {tuple(matrix.shape)}, expected {shape} for rank 3")
            known = {
                "the singular values are missing: multiply the columns of U, or the rows of Vh, by them": u[:, :3] @ vh[:3],
                "the singular values are in both matrices: put them into one, or their roots into both": (u[:, :3] * s[:3] ** 2) @ vh[:3],
                "these are the last directions: the singular values come largest first, take the first ones": (u[:, -3:] * s[-3:]) @ vh[-3:],
            }
            _product(report, b @ a, (u[:, :3] * s[:3]) @ vh[:3], known, "as close as rank 3 can be", "sum the first terms of the decomposition")
            weaker = "the first column of B and the first row of A are not the strongest direction: keep the order of the singular values"
            _product(report, b[:, :1] @ a[:1], (u[:, :1] * s[:1]) @ vh[:1], {}, "the strongest direction first", weaker)


def combine(candidate: Callable) -> None:
    """`combine(states, weights)`: A and B, by name, of one LoRA whose product is the weighted sum of the others' products."""
    with reporting("combine") as report:
        states = [{"classifier.bias": torch.randn(rank), "up.lora_A": torch.randn(rank, 7), "up.lora_B": torch.randn(12, rank)} for rank in (2, 3)]
        before, products = copy.deepcopy(states), [state["up.lora_B"] @ state["up.lora_A"] for state in states]
        combined = candidate(states, [0.5, -2.0])
        report("a dict by name", isinstance(combined, dict), "return {name: tensor}, with the names of the states")
        report("leaves heads out", "classifier.bias" not in combined, "it holds a head, and heads of two tasks cannot be added: leave it out")
        report("every A and B", combined.keys() == {"up.lora_A", "up.lora_B"}, f"it holds {sorted(combined)}, expected every lora_A and lora_B")
        a, b = combined["up.lora_A"], combined["up.lora_B"]
        advice = f"A is {tuple(a.shape)} and B {tuple(b.shape)}: put the A on top of one another, (5, 7), and the B side by side, (12, 5)"
        report("rank 2 + 3", tuple(a.shape) == (5, 7) and tuple(b.shape) == (12, 5), advice)
        known = {
            "the weights are missing: multiply each B, or each A, by its weight": products[0] + products[1],
            "the weights are in A and in B, so the product has their squares: put them into one of the two": 0.25 * products[0] + 4 * products[1],
            "the weights are exchanged: the first weight belongs to the first state": -2 * products[0] + 0.5 * products[1],
        }
        advice = "B A is not the weighted sum of the products: A and B must be put together in the same order of the states"
        _product(report, b @ a, 0.5 * products[0] - 2 * products[1], known, "the weighted sum of the updates", advice)
        same = all(torch.equal(state[name], kept[name]) for state, kept in zip(states, before) for name in kept)
        report("leaves the states alone", same, "the states were changed: multiply into a new tensor, not in place")


def _product(report, product: Tensor, right: Tensor, known: dict[str, Tensor], what: str, advice: str) -> None:
    found = next((message for message, wrong in known.items() if torch.allclose(product, wrong, atol=1e-4)), advice)
    report(what, torch.allclose(product, right, atol=1e-4), found)
