"""Bottleneck adapters (Houlsby et al. 2019, arXiv 1902.00751): small networks put into a frozen transformer. Lab 05 builds the parts.

A place for an adapter is found by the structure of a model, not by the names of one: a block is a module that holds an attention part
and linear layers beside it, and an adapter follows the last linear layer of the attention part, or of the rest.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PLACEMENTS = ("houlsby", "pfeiffer")
ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu}
HEADS = ("pre_classifier", "classifier", "score")  # what transformers calls the layers that a new classification task needs


class BottleneckAdapter(nn.Module):
    """hidden + up(activation(down(hidden))): (..., hidden_size) -> the same shape and dtype. `up` starts at zero, so nothing changes at first.

    Raises ValueError when bottleneck_size is below 1 or the activation is not one of ACTIVATIONS.
    """

    def __init__(self, hidden_size: int, bottleneck_size: int, activation: str = "gelu"):
        super().__init__()
        if bottleneck_size < 1:
            raise ValueError(f"bottleneck_size is {bottleneck_size}: an adapter needs at least 1")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation is {activation!r}: choose one of {', '.join(ACTIVATIONS)}")
        self.activation = ACTIVATIONS[activation]
        self.down = nn.Linear(hidden_size, bottleneck_size)
        self.up = nn.Linear(bottleneck_size, hidden_size)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        inside = hidden if torch.is_autocast_enabled(hidden.device.type) else hidden.to(self.down.weight.dtype)
        return (hidden + self.up(self.activation(self.down(inside)))).to(hidden.dtype)


class Adapted(nn.Module):
    """A layer of the base, and an adapter on its output. It stands where the layer stood.

    It has no `weight` on purpose: code that multiplies by a layer's weight itself would leave the adapter out in silence.
    """

    def __init__(self, base: nn.Module, adapter: BottleneckAdapter):
        super().__init__()
        self.base = base
        self.adapter = adapter

    def forward(self, *inputs, **options) -> Tensor:
        return self.adapter(self.base(*inputs, **options))


def sublayer_outputs(model: nn.Module, placement: str = "houlsby") -> dict[str, int]:
    """The layers that an adapter follows: {name: width of its output}, two a block for "houlsby", one for "pfeiffer".

    "houlsby": the last linear layer of the attention part, and that of the MLP, before the residual addition and the layer norm.
    "pfeiffer" (Pfeiffer et al. 2020, arXiv 2005.00247): that of the MLP only. (Their adapter reads the normed sum; ours reads what it
    corrects, in both placements.) In the originals the sublayer's dropout comes before the adapter, here after it where the model has one
    there; in PyTorch's TransformerEncoderLayer it comes before.
    Raises ValueError for another placement, or when the model has no such block.
    """
    if placement not in PLACEMENTS:
        raise ValueError(f"placement is {placement!r}: choose one of {', '.join(PLACEMENTS)}")
    found = {}
    for name, block in model.named_modules():
        places = _places(block)
        for place, width in places[-1:] if placement == "pfeiffer" else places:
            found[f"{name}.{place}" if name else place] = width
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no transformer block: a module with a child whose class is called an Attention, and linear layers beside it"
        )
    return found


def _places(block: nn.Module) -> list[tuple[str, int]]:
    """[(name, width)] of the outputs of a block's attention and MLP; empty when the module is no block."""
    if isinstance(block, nn.TransformerEncoderLayer):  # multiplies by the weight of its attention's last layer itself
        return [("dropout1", block.self_attn.embed_dim), ("dropout2", block.self_attn.embed_dim)]
    attention = [name for name, child in block.named_children() if "Attention" in type(child).__name__]
    if "Attention" in type(block).__name__ or not attention:
        return []
    widths = {name: getattr(m, "out_features", getattr(m, "nf", None)) for name, m in block.named_modules()}  # nf: GPT-2's Conv1D
    inside = [(name, width) for name, width in widths.items() if width and name.startswith(attention[0] + ".")]
    beside = [(name, width) for name, width in widths.items() if width and not any(name.startswith(part + ".") for part in attention)]
    beside = [place for place in beside if inside and place[1] == inside[-1][1]]
    return [inside[-1], beside[-1]] if beside else []


def heads_of(model: nn.Module, heads: Iterable[str] = HEADS) -> dict[str, nn.Module]:
    """The model's task heads by name: the modules that are called like one of `heads`."""
    return {name: module for name, module in model.named_modules() if name.rpartition(".")[2] in set(heads)}


def add_adapters(
    model: nn.Module, bottleneck_size: int = 64, *, placement: str = "houlsby", activation: str = "gelu", heads: Iterable[str] = HEADS
) -> list[str]:
    """Put adapters into a model, in place, and freeze everything but them, the layer norms and the task heads. Returns the adapted names.

    The adapters' first weights come from torch's global generator; they are in fp32 on a base in half precision, where small updates
    would be lost. Raises ValueError when there are adapters already, and as `sublayer_outputs` and `BottleneckAdapter` do.
    """
    if any(isinstance(module, Adapted) for module in model.modules()):
        raise ValueError(f"{type(model).__name__} has adapters already: remove_adapters(model) first")
    widths = sublayer_outputs(model, placement)
    adapters = {name: BottleneckAdapter(width, bottleneck_size, activation) for name, width in widths.items()}
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    model.requires_grad_(False)
    for module in [*_norms(model), *heads_of(model, heads).values()]:
        module.requires_grad_(True)
    kept = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    # A plain attribute of the model, not a buffer: it is what removal gives back, and no part of the model's state.
    model._before_adapters = (trainable, kept)
    like = next(p for p in model.parameters() if p.is_floating_point())
    for name, adapter in adapters.items():
        base = model.get_submodule(name)
        weight = next(base.parameters(), like)
        dtype = weight.dtype if weight.is_floating_point() else torch.float32
        adapter.to(weight.device, torch.promote_types(dtype, torch.float32)).train(base.training)
        _put(model, name, Adapted(base, adapter).train(base.training))
    _allow_fast_path(model, False)
    return list(adapters)


def remove_adapters(model: nn.Module) -> None:
    """Take the adapters out; layer norms and heads get the values they had before, and every parameter its requires_grad.

    The model is then bit for bit what it was. Raises ValueError when it has no adapters.
    """
    names = _adapted(model)
    for name in names:
        _put(model, name, model.get_submodule(name).base)
    trainable, kept = model._before_adapters
    del model._before_adapters
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in kept:
                p.copy_(kept[name])
            p.requires_grad_(trainable[name])
    _allow_fast_path(model, True)


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Copies of what was trained, and of nothing else: adapters, layer norms, heads. A task is this dict, and the base is shared."""
    names = _adapted(model)
    own = tuple(f"{name}.adapter." for name in names)
    kept = model._before_adapters[1]
    return {name: p.detach().clone() for name, p in model.named_parameters() if name in kept or name.startswith(own)}


def load_adapter_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Switch to another task: copy in what `adapter_state_dict` gave. Raises ValueError, and changes nothing, when it does not fit."""
    own = {name: tuple(tensor.shape) for name, tensor in adapter_state_dict(model).items()}
    given = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if own != given:
        name = min(name for name in own.keys() | given.keys() if own.get(name) != given.get(name))
        there, here = (sizes.get(name, "nothing") for sizes in (given, own))
        raise ValueError(f"these adapters are of another model or size: {name} is {there} there and {here} here; add adapters of the same size first")
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in state.items():
            parameters[name].copy_(tensor)


def save_adapters(model: nn.Module, path: Path) -> None:
    """Write `adapter_state_dict` as a safetensors file, whole or not at all."""
    from safetensors.torch import save_file

    path = Path(path)
    with tempfile.TemporaryDirectory(prefix=".adapters-", dir=path.parent) as folder:
        part = Path(folder) / path.name
        save_file({name: tensor.contiguous() for name, tensor in adapter_state_dict(model).items()}, part, metadata={"format": "pt"})
        os.replace(part, path)


def load_adapters(model: nn.Module, path: Path) -> None:
    """Read a file of `save_adapters` into a model that has adapters of the same size and placement."""
    from safetensors.torch import load_file

    load_adapter_state_dict(model, load_file(path))


def _adapted(model: nn.Module) -> list[str]:
    names = [name for name, module in model.named_modules() if isinstance(module, Adapted)]
    if not names:
        raise ValueError(f"{type(model).__name__} has no adapters: add_adapters(model) first")
    return names


def _norms(model: nn.Module) -> Iterator[nn.Module]:
    return (module for module in model.modules() if type(module).__name__.endswith("Norm"))  # LayerNorm, RMSNorm, LlamaRMSNorm …


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _allow_fast_path(model: nn.Module, allowed: bool) -> None:
    """PyTorch's encoder multiplies by its layers' weights itself in eval mode, past whatever stands in their place: switch that off, or on again."""
    for module in model.modules():
        for kind, switch in ((nn.TransformerEncoderLayer, "activation_relu_or_gelu"), (nn.TransformerEncoder, "use_nested_tensor")):
            if isinstance(module, kind) and not allowed:
                module.__dict__.setdefault(f"_{switch}_before", getattr(module, switch))
                setattr(module, switch, 0)
            elif isinstance(module, kind):
                setattr(module, switch, module.__dict__.pop(f"_{switch}_before"))
