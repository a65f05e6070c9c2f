"""LoRA (Hu et al. 2021, arXiv 2106.09685): a frozen linear layer W and a trained update of low rank, W x + scaling * B A x. Lab 06 builds it.

`labkit.peft_files` reads and writes it as the library `peft` does.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

KINDS = ("all-linear", "attention", "mlp", "query-value")
HEADS = ("pre_classifier", "classifier", "score")  # what transformers calls the layers that a new classification task needs
QUERY_OR_VALUE = re.compile(r"(q|v|query|value)(_proj|_lin)?|c_attn|qkv(_proj)?|Wqkv|query_key_value")  # the last five hold all three


class LoRALinear(nn.Module):
    """base(x) + scaling * B A dropout(x): (..., in_features) -> (..., out_features), in the dtype of base(x). Only A and B are trained.

    base: an nn.Linear, transformers' Conv1D (its weight is transposed), or another layer with in_features and out_features, such as one
    in 4 bits. lora_A (rank, in_features) begins Kaiming-uniform, as peft's does, lora_B (out_features, rank) at zero: no change at first.
    They are fp32 where the base is in half precision or less. scaling is alpha / rank, or alpha / sqrt(rank) with rslora
    (Kalajdzievski 2023, arXiv 2312.03732).
    It has no `weight` on purpose: code that multiplies by a layer's weight itself would lose the update in silence.
    Raises TypeError when base is no linear layer, ValueError for a rank below 1 or a dropout outside [0, 1).
    """

    def __init__(self, base: nn.Module, rank: int = 8, alpha: float = 16.0, dropout: float = 0.0, *, rslora: bool = False):
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank is {rank}: LoRA needs at least 1")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout}: choose a share from 0 to below 1")
        if sizes_of(base) is None:
            raise TypeError(f"LoRA wraps a linear layer, and this is a {type(base).__name__}: choose its linear layers instead")
        self.in_features, self.out_features = sizes_of(base)
        self.rank, self.alpha, self.rslora = rank, alpha, rslora
        self.scaling = alpha / (math.sqrt(rank) if rslora else rank)
        self.base = base.requires_grad_(False)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        tensor = next((t for t in (*base.parameters(), *base.buffers())), torch.empty(0))
        dtype = torch.promote_types(tensor.dtype, torch.float32) if tensor.is_floating_point() else torch.float32
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, dtype=dtype, device=tensor.device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, dtype=dtype, device=tensor.device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self._unmerged: Tensor | None = None
        self.train(base.training)

    @property
    def merged(self) -> bool:
        """Whether the update is in the base's weight now."""
        return self._unmerged is not None

    def forward(self, x: Tensor) -> Tensor:
        out = self.base(x)
        if self.merged:
            if self.training and torch.is_grad_enabled():
                raise RuntimeError("this LoRA layer is merged, so A and B would get no gradient: unmerge before training, or call model.eval()")
            return out
        inside = x if torch.is_autocast_enabled(x.device.type) else x.to(self.lora_A.dtype)
        # The scaling on the narrow side, where it touches rank numbers a token and not out_features.
        update = F.linear(F.linear(self.dropout(inside), self.lora_A) * self.scaling, self.lora_B)
        return (out + update).to(out.dtype)

    def delta(self) -> Tensor:
        """The update as a matrix, scaling * B A, in the layout of the base's weight: (out_features, in_features), transposed for Conv1D."""
        update = self.scaling * (self.lora_B @ self.lora_A).detach()
        return update.T if hasattr(self.base, "nx") else update

    def merge(self) -> None:
        """Add the update to the base's weight: the layer is then as fast as the base. A copy of the weight is kept until `unmerge`.

        Raises RuntimeError when it is merged already, TypeError when the weight is not made of floating-point numbers.
        """
        if self.merged:
            raise RuntimeError("this LoRA layer is merged already, and would get its update twice: unmerge first")
        weight = getattr(self.base, "weight", None)
        if weight is None or not weight.is_floating_point():
            raise TypeError(f"{type(self.base).__name__} has no floating-point weight to add the update to: dequantize it first")
        with torch.no_grad():
            kept, delta = weight.detach().clone(), self.delta()
            weight.copy_(weight.to(delta.dtype) + delta)
        self._unmerged = kept

    def unmerge(self) -> None:
        """Give the base its own weight back, bit for bit. (Subtracting the update would leave rounding errors.)"""
        if not self.merged:
            raise RuntimeError("this LoRA layer is not merged: there is nothing to take out")
        with torch.no_grad():
            self.base.weight.copy_(self._unmerged)
        self._unmerged = None

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha:g}, scaling={self.scaling:g}, merged={self.merged}"


def sizes_of(layer: nn.Module) -> tuple[int, int] | None:
    """(in_features, out_features) of a linear layer, None for anything else."""
    if hasattr(layer, "nx") and hasattr(layer, "nf"):  # transformers' Conv1D
        return layer.nx, layer.nf
    if hasattr(layer, "in_features") and hasattr(layer, "out_features") and not isinstance(layer, LoRALinear):
        return layer.in_features, layer.out_features
    return None


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every layer that LoRA can wrap, by name. Not those of nn.MultiheadAttention, which multiplies by their weights itself."""
    closed = tuple(name + "." for name, module in model.named_modules() if isinstance(module, (nn.MultiheadAttention, LoRALinear)))
    return {name: module for name, module in model.named_modules() if name and sizes_of(module) and not name.startswith(closed)}


def in_head(name: str, heads: Iterable[str] = HEADS) -> bool:
    """Whether a part of this dotted name is called like one of the heads."""
    return not set(heads).isdisjoint(name.split("."))


def target_modules(model: nn.Module, kind: str = "all-linear", *, heads: Iterable[str] = HEADS) -> list[str]:
    """Names of the linear layers of one kind, found in the model itself, whatever its type calls them.

    "all-linear": all but heads and the output embedding; "attention": those inside a module whose class is called an Attention; "mlp": the
    others inside a list of blocks; "query-value": the attention's query and value, as in the paper, or the one layer that holds both.
    Raises ValueError for another kind, or when there is none of it.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}: choose one of {', '.join(KINDS)}")
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    body = [name for name, module in linear_layers(model).items() if not in_head(name, heads) and module is not output]
    attention = tuple(name + "." for name, module in model.named_modules() if "Attention" in type(module).__name__)
    blocks = tuple(name + "." for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
    chosen = {
        "all-linear": body,
        "attention": [name for name in body if name.startswith(attention)],
        "mlp": [name for name in body if name.startswith(blocks) and not name.startswith(attention)],
        "query-value": [name for name in body if name.startswith(attention) and QUERY_OR_VALUE.fullmatch(name.rpartition(".")[2])],
    }[kind]
    if not chosen:
        raise ValueError(f"{type(model).__name__} has no linear layers of kind {kind!r}; name some of these: {some_of(linear_layers(model))}")
    return chosen


def some_of(names: Iterable[str], count: int = 6) -> str:
    """The first few names, for an error message."""
    names = list(names)
    return ", ".join(names[:count]) + (f" … ({len(names)} in all)" if len(names) > count else "") if names else "none"


def _matching(model: nn.Module, targets: str | Iterable[str], heads: Iterable[str]) -> list[str]:
    if isinstance(targets, str) and targets in KINDS:
        return target_modules(model, targets, heads=heads)
    names, chosen = linear_layers(model), set()
    for target in [targets] if isinstance(targets, str) else targets:
        pattern = target if isinstance(targets, str) else rf"(.*\.)?{re.escape(target)}"
        try:
            found = {name for name in names if re.fullmatch(pattern, name)}
        except re.error as error:
            raise ValueError(f"targets is {target!r}, which is no regular expression ({error}): mend it, or pass a list of names") from error
        if not found:
            raise ValueError(f"no linear layer matches {target!r}; the model has {some_of(names)}")
        chosen |= found
    return [name for name in names if name in chosen]


def inject(
    model: nn.Module,
    targets: str | Iterable[str] = "all-linear",
    *,
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    rslora: bool = False,
    heads: Iterable[str] = HEADS,
) -> list[str]:
    """Put LoRA on layers of a model, in place, and freeze everything but A, B and the task heads. Returns the names of the layers.

    targets: one of KINDS, or, as in peft, a list of names (each the whole path or its end), or a regular expression for the whole path.
    The first A come from torch's global generator. Raises ValueError, and changes nothing, when a name matches no linear layer, when the
    model has LoRA already, or for a rank or dropout that LoRALinear does not take.
    """
    refuse_lora(model)
    names = _matching(model, targets, heads)
    install(model, {name: {"rank": rank, "alpha": alpha, "dropout": dropout, "rslora": rslora} for name in names}, heads)
    return names


def refuse_lora(model: nn.Module) -> None:
    """Raise ValueError when the model has LoRA."""
    name = next((name for name, module in model.named_modules() if isinstance(module, LoRALinear)), None)
    if name is not None:
        raise ValueError(f"{type(model).__name__} has LoRA already, for example in {name}: remove(model) first")


def install(model: nn.Module, options: Mapping[str, dict], heads: Iterable[str] = HEADS) -> None:
    """What `inject` does once the layers are chosen. options: {name of a layer: how LoRALinear is made for it}."""
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    layers = {name: LoRALinear(model.get_submodule(name), **chosen) for name, chosen in options.items()}
    model._before_lora = trainable  # a plain attribute, for `remove`
    model.requires_grad_(False)
    for name, layer in layers.items():
        _put(model, name, layer)
    for name, p in model.named_parameters():
        if in_head(name, heads) or name.endswith((".lora_A", ".lora_B")):
            p.requires_grad_(True)
    _allow_fast_path(model, False)


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


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The model's LoRA layers by name. Raises ValueError when it has none."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no LoRA layers: inject(model) first")
    return layers


def merge(model: nn.Module) -> None:
    """Add every update to its base weight: same outputs, the base's speed. `unmerge` takes them out again."""
    for layer in lora_layers(model).values():
        layer.merge()


def unmerge(model: nn.Module) -> None:
    """Take every update out of its base weight again, bit for bit."""
    for layer in lora_layers(model).values():
        layer.unmerge()


def remove(model: nn.Module) -> None:
    """Take LoRA out: the layers are the base's again, bit for bit, and every parameter has the requires_grad it had. Heads stay as trained."""
    for name, layer in lora_layers(model).items():
        if layer.merged:
            layer.unmerge()
        _put(model, name, layer.base)
    _finish(model)


def merge_and_unload(model: nn.Module) -> None:
    """Put the updates into the base weights for good: a plain model again, of the base's own classes."""
    for name, layer in lora_layers(model).items():
        if not layer.merged:
            layer.merge()
        _put(model, name, layer.base)
    _finish(model)


def _finish(model: nn.Module) -> None:
    for name, p in model.named_parameters():
        p.requires_grad_(model._before_lora[name])
    del model._before_lora
    _allow_fast_path(model, True)


def lora_state_dict(model: nn.Module, *, heads: Iterable[str] = HEADS) -> dict[str, Tensor]:
    """Copies of A and B of every layer and of the heads: a task, without the base."""
    own = {f"{name}.{part}" for name in lora_layers(model) for part in ("lora_A", "lora_B")}
    return {name: p.detach().clone() for name, p in model.named_parameters() if name in own or in_head(name, heads)}


def load_lora_state_dict(model: nn.Module, state: Mapping[str, Tensor], *, heads: Iterable[str] = HEADS) -> None:
    """Switch to another task: copy in what `lora_state_dict` gave. Raises ValueError, and changes nothing, when it does not fit."""
    merged = [name for name, layer in lora_layers(model).items() if layer.merged]
    if merged:
        raise ValueError(f"{merged[0]} is merged, and its weight would keep the old update: unmerge(model) first")
    own = {name: tuple(tensor.shape) for name, tensor in lora_state_dict(model, heads=heads).items()}
    given = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if own != given:
        name = min(name for name in own.keys() | given.keys() if own.get(name) != given.get(name))
        there, here = (sizes.get(name, "nothing") for sizes in (given, own))
        raise ValueError(f"this LoRA is of another model or rank: {name} is {there} there and {here} here; inject the same layers and rank first")
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in state.items():
            parameters[name].copy_(tensor)
