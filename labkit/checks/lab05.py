"""Checks of lab 05, adapters."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from labkit.checks import reporting
from labkit.classifier import TransformerClassifier


def bottleneck_adapter(candidate) -> None:
    """`BottleneckAdapter(hidden_size, bottleneck_size)`: (..., hidden_size) -> the same shape."""
    with reporting("BottleneckAdapter") as report:
        adapter, hidden = candidate(16, 4), torch.randn(2, 9, 16)
        out = adapter(hidden)
        report.shape(out, (2, 9, 16))
        report(
            "adds its input back",
            bool((out != 0).any()),
            "a new adapter gives zeros: add the input to the update (the residual), return hidden + update",
        )
        report(
            "no change at the start",
            torch.allclose(out, hidden, atol=1e-6),
            f"a new adapter moves its input by up to {(out - hidden).abs().max().item():.2g}: set weight and bias of the map back up to zero",
        )
        count = sum(p.numel() for p in adapter.parameters())
        report(
            "as many weights as the bottleneck says",
            128 <= count <= 148,
            f"it has {count} parameters for hidden_size 16 and bottleneck_size 4, expected 148: one linear map from 16 to 4, one from 4 back to 16",
        )
        out.square().sum().backward()
        report(
            "learns from the start",
            any(p.ndim == 2 and p.grad is not None and p.grad.abs().sum() > 0 for p in adapter.parameters()),
            "no gradient reaches a weight: with both maps at zero each blocks the other's gradient; set only the map back up to zero",
        )
        _randomize(adapter)
        adapter.zero_grad()
        update = adapter(hidden) - hidden
        update.square().sum().backward()
        report(
            "gradients reach both maps",
            all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter.parameters()),
            "a parameter gets no gradient once both maps are random: use both maps in forward, and nothing under no_grad or detach",
        )
        zero = torch.zeros(1, 1, 16)
        with torch.no_grad():
            bend = (adapter(2 * hidden) - 2 * hidden) - 2 * (adapter(hidden) - hidden) + (adapter(zero) - zero)
        report(
            "bends between the maps",
            bool(bend.abs().max() > 1e-3),
            "the update is a linear function of the input: put a nonlinearity (F.gelu) between the two maps, or they are one",
        )
        report(
            "every token by itself",
            torch.allclose(adapter(hidden[:, 3:4]), adapter(hidden)[:, 3:4], atol=1e-5),
            "a token's output depends on the other tokens: linear maps work on the last axis",
        )
        with torch.no_grad():
            tokens = torch.randn(200, 16)
            spread = torch.linalg.svdvals((adapter(tokens) - tokens) - (adapter(tokens) - tokens).mean(0))
        directions = int((spread > 1e-3 * spread[0]).sum())
        report(
            "everything passes the bottleneck",
            directions <= 4,
            f"updates of many tokens point in {directions} directions where a bottleneck of 4 allows 4: the nonlinearity goes between the maps, "
            "and what is added at the end is the map back up of it",
        )
        half = candidate(16, 4).to(torch.bfloat16)(hidden.to(torch.bfloat16))
        report("keeps the dtype", half.dtype == torch.bfloat16, f"bf16 went in and {half.dtype} came out: do not convert to float32 in forward")


def _randomize(module: nn.Module) -> None:
    with torch.no_grad():
        for p in module.parameters():
            p.normal_()


def _model() -> nn.Module:
    return TransformerClassifier(40, 2, hidden_size=16, num_layers=2, num_heads=2, max_length=10, dropout=0.0)


def _batch() -> dict[str, Tensor]:
    mask = torch.tensor([[1] * 8, [1] * 5 + [0] * 3, [1] * 8])
    return {"input_ids": torch.randint(1, 40, (3, 8)), "attention_mask": mask}


def _logits(model: nn.Module, batch: dict[str, Tensor], training: bool = False) -> Tensor:
    with torch.no_grad():
        return model.train(training)(**batch)


def _shake(parameters) -> None:
    """As training would: every number that may move does."""
    with torch.no_grad():
        for p in parameters:
            if p.requires_grad:
                p += 0.3 * torch.randn_like(p)


def _kind(name: str) -> str:
    """What a parameter of the toy model belongs to."""
    return "head" if name.startswith("classifier.") else "norm" if "norm" in name.split(".")[-2] else "body"


def add_adapters(candidate: Callable) -> None:
    """`add_adapters(model, bottleneck_size)` puts adapters after attention and MLP of every block, and sets what is trained."""
    with reporting("add_adapters") as report:
        model, batch = _model(), _batch()
        kinds = {id(p): (name, _kind(name)) for name, p in model.named_parameters()}
        before = _logits(model, batch)
        candidate(model, 3)
        new = {name: p for name, p in model.named_parameters() if id(p) not in kinds}
        report("puts something in", bool(new), "the model has no new parameters: setattr(parent, child, Adapted(layer, adapter)) for every place")
        gone = [name for i, (name, _) in kinds.items() if i not in {id(p) for p in model.parameters()}]
        report("keeps the layers that stood there", not gone, f"{', '.join(gone[:2])} is no longer part of the model: keep the layer inside Adapted")
        report(
            "no change at the start",
            torch.allclose(_logits(model, batch), before, atol=1e-5),
            "the logits changed, though a new adapter changes nothing: the layer that stood there, then a new adapter, from zero, on its output",
        )
        one, count = 2 * 16 * 3 + 3 + 16, sum(p.numel() for p in new.values())
        report(
            "two adapters a block, each its own",
            4 * one - 4 * 19 <= count <= 4 * one,
            f"{count} new parameters, expected {4 * one}: two adapters of {one} for each of 2 blocks; make a new one for every place in "
            "sublayer_outputs(model), of the width it gives",
        )
        trains = {"body": [], "norm": [], "head": []}
        for p in model.parameters():
            if id(p) in kinds:
                name, kind = kinds[id(p)]
                trains[kind].append((name, p.requires_grad))
        loose = [name for name, on in trains["body"] if on]
        report(
            "the base is frozen", not loose, f"{', '.join(loose[:2])} still trains: model.requires_grad_(False) first, then switch on what is trained"
        )
        report("adapters train", all(p.requires_grad for p in new.values()), "an adapter is frozen: freeze the model before you put the adapters in")
        for kind, what in (("norm", "the layer norms"), ("head", "the head (model.classifier)")):
            still = [name for name, on in trains[kind] if not on]
            report(f"{what} train", not still, f"{', '.join(still[:2])} is frozen: {what} must adapt to the task, switch it on again")
        _shake(model.parameters())
        after = _logits(model, batch)
        report(
            "train and eval agree",
            torch.allclose(_logits(model, batch, training=True), after, atol=1e-5),
            "without dropout the model gives other logits in train() than in eval(): in eval() the adapters are left out, or in train()",
        )
        report(
            "every adapter is used",
            _used(model.eval(), batch, list(new.values())),
            "an adapter gets no gradient, so no forward pass goes through it: it must stand where the layer stood, under the same name",
        )
        double = _model().double()
        candidate(double, 3)
        different = {str(p.dtype) for p in double.parameters()} - {"torch.float64"}
        report("keeps the dtype", not different, f"a model in float64 got adapters in {', '.join(different)}: .to(dtype) of the layer's weight")


def _used(model: nn.Module, batch: dict[str, Tensor], parameters: list[nn.Parameter]) -> bool:
    gradients = torch.autograd.grad(model(**batch).square().sum(), parameters, allow_unused=True)
    return all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)


def remove_adapters(add: Callable, remove: Callable) -> None:
    """`before = add_adapters(model, bottleneck_size)`, then `remove_adapters(model, before)`: the base again, bit for bit."""
    with reporting("remove_adapters") as report:
        model, batch = _model(), _batch()
        weights, types, out = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()], _logits(model, batch)
        before = add(model, 3)
        report("add_adapters keeps what will change", bool(before), "add_adapters returned nothing: return copies of the layer norms and the head")
        _shake(model.parameters())
        report("has learned something", not torch.allclose(_logits(model, batch), out, atol=1e-3), "nothing in the model can be trained")
        remove(model, before)
        now = model.state_dict()
        report(
            "the adapters are out",
            now.keys() == weights.keys() and [type(m) for m in model.modules()] == types,
            f"something was left in the model ({', '.join(sorted(now.keys() - weights.keys())[:2])}): put every layer back under its own name",
        )
        for kind, advice in (
            ("body", "a frozen weight was changed: put the very layer back that stood there"),
            ("norm", "the layer norms kept what they learned: return copies (clone) from add_adapters, and copy them back"),
            ("head", "the head kept what it learned: return copies (clone) of it from add_adapters too, and copy them back"),
        ):
            moved = [name for name, tensor in now.items() if _kind(name) == kind and not torch.equal(tensor, weights[name])]
            report(f"{kind} bit for bit", not moved, f"{advice} ({', '.join(moved[:2])})")
        report(
            "same logits", torch.equal(_logits(model, batch), out), "the weights are the base's and the logits are not: something else was changed"
        )
        frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
        report("everything may train again", not frozen, f"{', '.join(frozen[:2])} stayed frozen: model.requires_grad_(True) at the end")


def task_state(candidate: Callable) -> None:
    """`task_state(model)`: a dict of copies of what trains, by name."""
    with reporting("task_state") as report:
        model, batch = _model(), _batch()
        model.requires_grad_(False)
        trained = {name for name, p in model.named_parameters() if _kind(name) != "body" or name.startswith("blocks.1.down")}
        for name, p in model.named_parameters():
            p.requires_grad_(name in trained)
        _shake(model.parameters())
        out, state = _logits(model, batch), candidate(model)
        report(
            "a dict by name",
            isinstance(state, dict) and state.keys() <= set(model.state_dict()),
            "return {name: tensor}, with names as in named_parameters",
        )
        extra = sorted(state.keys() - trained)
        report("nothing of the base", not extra, f"it holds {', '.join(extra[:2])}, which is frozen: keep only parameters with requires_grad")
        lacking = sorted(trained - state.keys())
        report(
            "all that was trained",
            not lacking,
            f"{', '.join(lacking[:2])} was trained and is missing: the layer norms and the head belong to a task too",
        )
        _shake(model.parameters())
        model.load_state_dict(state, strict=False)
        report(
            "copies, not the model's own tensors",
            torch.equal(_logits(model, batch), out),
            "after more training the kept task has changed as well: detach().clone() every tensor",
        )
        report("no graph attached", not any(t.requires_grad for t in state.values()), "the copies ask for gradients: detach them")
