"""Making models smaller by leaving out: masks, structured pruning of an encoder, and Huffman coding. Lab 08 builds the parts.

A mask has the shape of its weight: True is kept, False is pruned.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


def magnitude_mask(weight: Tensor, sparsity: float) -> Tensor:
    """Keep the largest magnitudes: exactly round(sparsity * n) values are pruned; among equal ones the later go first.

    Raises ValueError when sparsity is not between 0 and 1 or the weight holds nan.
    """
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity is {sparsity}: choose the share to prune, 0 to 1")
    magnitudes = weight.detach().abs().reshape(-1)
    if magnitudes.isnan().any():
        raise ValueError(f"the weight of shape {tuple(weight.shape)} holds nan: nan has no magnitude to compare")
    keep = len(magnitudes) - round(sparsity * len(magnitudes))
    if keep == 0:
        return torch.zeros_like(weight, dtype=torch.bool)
    # kthvalue knows no bf16 on some devices
    threshold = magnitudes.float().kthvalue(len(magnitudes) - keep + 1).values
    mask = magnitudes > threshold
    ties = (magnitudes == threshold).nonzero()[: keep - int(mask.sum()), 0]
    mask[ties] = True
    return mask.view(weight.shape)


def magnitude_masks(weights: Mapping[str, Tensor], sparsity: float, *, scope: str = "global") -> dict[str, Tensor]:
    """A mask for each named weight (Han et al. 2015, arXiv 1506.02626).

    scope: "layer" prunes the same share of each weight; "global" compares all of them, so that some layers lose more than others.
    """
    if scope not in ("global", "layer"):
        raise ValueError(f"scope is {scope!r}: choose 'global' or 'layer'")
    if not weights:
        raise ValueError("no weights were given: pass a dict from names to weights")
    if scope == "layer":
        return {name: magnitude_mask(weight, sparsity) for name, weight in weights.items()}
    together = magnitude_mask(torch.cat([weight.detach().float().reshape(-1) for weight in weights.values()]), sparsity)
    parts = together.split([weight.numel() for weight in weights.values()])
    return {name: part.view(weight.shape) for (name, weight), part in zip(weights.items(), parts)}


def mask_2_4(weight: Tensor, keep: int = 2, group: int = 4) -> Tensor:
    """Keep the `keep` largest magnitudes of every `group` neighbours in a row: 2 of 4 is what NVIDIA's sparse tensor cores read
    (Mishra et al. 2021, arXiv 2104.08378). Among equal ones the earlier stay. Raises ValueError when a row is not made of whole groups.
    """
    if not 0 < keep <= group:
        raise ValueError(f"keep is {keep} of {group}: choose 1 to {group}")
    if weight.ndim == 0 or weight.shape[-1] % group:
        raise ValueError(f"rows of shape {tuple(weight.shape)} are not made of groups of {group}: the last axis must be a multiple of {group}")
    groups = weight.detach().abs().reshape(-1, group)
    order = groups.argsort(dim=1, descending=True, stable=True)[:, :keep]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, order, True).view(weight.shape)


class _Masked(nn.Module):
    """The parametrization weight -> weight where the mask is, 0 elsewhere."""

    def __init__(self, mask: Tensor):
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return torch.where(self.mask, weight, torch.zeros((), dtype=weight.dtype, device=weight.device))


def apply_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Prune parameters by name and keep them pruned: whatever an optimizer does, a masked weight is computed as 0 in every pass.

    Its gradient is 0 too. Until `remove_masks`, the state dict holds the parameter and its mask under `parametrizations`. Masks that
    were there before are replaced. Raises ValueError when a mask does not have its parameter's shape, AttributeError for unknown names.
    """
    for name, mask in masks.items():
        path, _, parameter = name.rpartition(".")
        module = model.get_submodule(path)
        weight = getattr(module, parameter)
        if mask.shape != weight.shape or mask.dtype != torch.bool:
            raise ValueError(f"the mask of {name} is {mask.dtype} of shape {tuple(mask.shape)}: it must be bool of shape {tuple(weight.shape)}")
        if parametrize.is_parametrized(module, parameter):
            parametrize.remove_parametrizations(module, parameter, leave_parametrized=True)
        parametrize.register_parametrization(module, parameter, _Masked(mask.to(weight.device)))


def remove_masks(model: nn.Module) -> None:
    """Make the masks permanent: plain parameters again, with zeros where they were pruned."""
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            for name, steps in list(module.parametrizations.items()):
                if any(isinstance(step, _Masked) for step in steps):
                    parametrize.remove_parametrizations(module, name, leave_parametrized=True)


def gaps_of_mask(mask: Tensor) -> Tensor:
    """Where the kept values are, as the number of pruned ones before each: (kept,) int64, what Deep Compression stores beside the values."""
    kept = mask.reshape(-1).nonzero()[:, 0]
    return kept.diff(prepend=kept.new_tensor([-1])) - 1


def mask_of_gaps(gaps: Tensor, shape: Iterable[int]) -> Tensor:
    """The mask of this shape that has these gaps."""
    mask = torch.zeros(torch.Size(shape), dtype=torch.bool)
    mask.view(-1)[(gaps + 1).cumsum(0) - 1] = True
    return mask


@dataclass(frozen=True)
class _Layer:
    """The parts of an encoder layer under one set of names. A linear layer is (the module that holds it, its name there)."""

    attention: nn.Module
    heads: str
    width: str
    inputs: tuple[str, str, str]
    output: tuple[nn.Module, str]
    up: tuple[nn.Module, str]
    down: tuple[nn.Module, str]

    @property
    def value_and_output(self) -> tuple[nn.Parameter, nn.Parameter]:
        """Weights before and after the mixing of tokens: rows of the first and columns of the second belong to a head."""
        return getattr(self.attention, self.inputs[2]).weight, getattr(*self.output).weight

    @property
    def up_and_down(self) -> tuple[nn.Parameter, nn.Parameter]:
        """Weights of the MLP: a row of the first and a column of the second belong to a neuron."""
        return getattr(*self.up).weight, getattr(*self.down).weight


def _layers(model: nn.Module) -> list[_Layer]:
    """The layers of a BERT or DistilBERT encoder, found by their parts."""
    layers = []
    for m in model.modules():
        attention, inner = getattr(m, "attention", None), getattr(getattr(m, "attention", None), "self", None)
        if hasattr(inner, "attention_head_size") and hasattr(m, "intermediate"):
            names, output = ("query", "key", "value"), (attention.output, "dense")
            layers.append(_Layer(inner, "num_attention_heads", "all_head_size", names, output, (m.intermediate, "dense"), (m.output, "dense")))
        elif hasattr(attention, "q_lin") and hasattr(m, "ffn"):
            names, output = ("q_lin", "k_lin", "v_lin"), (attention, "out_lin")
            layers.append(_Layer(attention, "n_heads", "dim", names, output, (m.ffn, "lin1"), (m.ffn, "lin2")))
    if not layers:
        raise ValueError(f"{type(model).__name__} has no layers built like BERT's or DistilBERT's: pass such an encoder, or a model that holds one")
    return layers


def _scores(first: nn.Parameter, second: nn.Parameter, by: str) -> Tensor:
    """One score for each row of `first`, which feeds the column of `second` with the same number."""
    if by == "magnitude":
        return (first.detach().float().square().sum(1) + second.detach().float().square().sum(0)).sqrt()
    if by != "gradient":
        raise ValueError(f"by is {by!r}: choose 'magnitude' or 'gradient'")
    if second.grad is None:
        raise ValueError("there are no gradients: run a loss.backward() on some training rows first")
    return (second.detach() * second.grad).float().sum(0)


def head_importance(model: nn.Module, by: str = "magnitude") -> Tensor:
    """(layers, heads). "magnitude": the norm of a head's value and output weights. "gradient": how much the loss would change, to first
    order, without the head, from the gradients at hand (Michel et al. 2019, arXiv 1905.10650). All layers need as many heads.
    """
    rows = []
    for layer in _layers(model):
        scores = _scores(*layer.value_and_output, by).view(-1, layer.attention.attention_head_size)
        rows.append(scores.square().sum(1).sqrt() if by == "magnitude" else scores.sum(1).abs())
    return torch.stack(rows)


def neuron_importance(model: nn.Module, by: str = "magnitude") -> Tensor:
    """(layers, intermediate_size): the same for the neurons between the two matrices of each MLP."""
    return torch.stack([_scores(*layer.up_and_down, by).abs() for layer in _layers(model)])


def least_important(importance: Tensor, share: float) -> dict[int, list[int]]:
    """The round(share * n) lowest scores of (layers, n a layer), compared over all layers: {layer: numbers}. Each layer keeps its best."""
    if not 0 <= share < 1:
        raise ValueError(f"share is {share}: choose 0 to below 1")
    scores = importance.clone()
    scores.scatter_(1, scores.argmax(1, keepdim=True), torch.inf)
    count = min(round(share * scores.numel()), scores.numel() - len(scores))
    chosen = [divmod(i, scores.shape[1]) for i in scores.view(-1).argsort()[:count].tolist()]
    return {layer: sorted(i for at, i in chosen if at == layer) for layer in sorted({at for at, _ in chosen})}


def prune_heads(model: nn.Module, heads: Mapping[int, Iterable[int]]) -> None:
    """Take attention heads out of a BERT or DistilBERT encoder, in place: {layer: numbers of heads}. The matrices really get smaller.

    The config still says the old number: to load such weights again, build the model, prune the same heads, then load the state dict.
    Raises ValueError for a head that is not there, or when a layer would lose all.
    """
    for number, layer in _chosen(model, heads):
        attention, size = layer.attention, layer.attention.attention_head_size
        keep = _kept(heads[number], getattr(attention, layer.heads), f"heads of layer {number}")
        rows = (keep[:, None] * size + torch.arange(size)).view(-1)
        for name in layer.inputs:
            _shrink((attention, name), rows, 0)
        _shrink(layer.output, rows, 1)
        setattr(attention, layer.heads, len(keep))
        setattr(attention, layer.width, len(rows))


def prune_neurons(model: nn.Module, neurons: Mapping[int, Iterable[int]]) -> None:
    """Take neurons out of the MLPs of a BERT or DistilBERT encoder, in place: {layer: numbers}; loading and errors as in `prune_heads`."""
    for number, layer in _chosen(model, neurons):
        keep = _kept(neurons[number], getattr(*layer.up).out_features, f"neurons of layer {number}")
        _shrink(layer.up, keep, 0)
        _shrink(layer.down, keep, 1)


def _chosen(model: nn.Module, numbers: Mapping[int, Iterable[int]]) -> list[tuple[int, _Layer]]:
    layers = _layers(model)
    unknown = [number for number in numbers if not 0 <= number < len(layers)]
    if unknown:
        raise ValueError(f"there is no layer {unknown[0]}: the encoder has layers 0 to {len(layers) - 1}")
    return [(number, layers[number]) for number in numbers]


def _kept(pruned: Iterable[int], count: int, what: str) -> Tensor:
    pruned = set(pruned)
    if not pruned <= set(range(count)):
        raise ValueError(f"{what}: {sorted(pruned - set(range(count)))} do not exist, they are numbered 0 to {count - 1}")
    if len(pruned) == count:
        raise ValueError(f"{what}: all {count} would go, keep at least one")
    return torch.tensor([i for i in range(count) if i not in pruned])


def _shrink(place: tuple[nn.Module, str], keep: Tensor, axis: int) -> None:
    """Put a smaller layer, with the kept rows (axis 0) or columns (axis 1), in the place of a linear layer."""
    linear: nn.Linear = getattr(*place)
    weight, bias = linear.weight.detach(), linear.bias
    small = nn.utils.skip_init(nn.Linear, 1, 1, bias=bias is not None, device=weight.device, dtype=weight.dtype)
    keep = keep.to(weight.device)
    small.weight = nn.Parameter(weight.index_select(axis, keep), requires_grad=linear.weight.requires_grad)
    if bias is not None:
        small.bias = nn.Parameter(bias.detach()[keep] if axis == 0 else bias.detach().clone(), requires_grad=bias.requires_grad)
    small.out_features, small.in_features = small.weight.shape
    setattr(*place, small.train(linear.training))


def huffman_lengths(counts: Mapping[int, int]) -> dict[int, int]:
    """Bits of each symbol's code word in an optimal prefix code (Huffman 1952): the two rarest are joined, again and again.

    A symbol that is alone gets 1 bit. Raises ValueError when a count is below 1.
    """
    if any(count < 1 for count in counts.values()):
        raise ValueError("a symbol was counted less than once: leave out symbols that do not occur")
    if len(counts) == 1:
        return dict.fromkeys(counts, 1)
    lengths = dict.fromkeys(counts, 0)
    # The second entry decides between equal counts, so that the same counts give the same code everywhere.
    heap = [(count, symbol, [symbol]) for symbol, count in sorted(counts.items())]
    heapq.heapify(heap)
    while len(heap) > 1:
        few, first, left = heapq.heappop(heap)
        more, second, right = heapq.heappop(heap)
        for symbol in left + right:
            lengths[symbol] += 1
        heapq.heappush(heap, (few + more, min(first, second), left + right))
    return lengths


def canonical_words(lengths: Mapping[int, int]) -> dict[int, str]:
    """Code words of "0" and "1" with these lengths, counted upwards from the shortest: a decoder needs to be told the lengths only."""
    words, code, before = {}, 0, 0
    for length, symbol in sorted((length, symbol) for symbol, length in lengths.items()):
        code <<= length - before
        words[symbol], before = f"{code:0{length}b}", length
        code += 1
    return words


@dataclass(frozen=True)
class HuffmanCoded:
    """Symbols as one row of bits. data: uint8. Every `chunk` symbols `starts` notes the bit, so that chunks can be decoded side by side."""

    data: Tensor
    starts: Tensor
    lengths: dict[int, int]
    count: int
    chunk: int

    @property
    def nbytes(self) -> int:
        """Bytes of the bits, of 4 a chunk for its start, and of 5 a symbol for the table (the symbol and the length of its word)."""
        return self.data.numel() + 4 * self.starts.numel() + 5 * len(self.lengths)


def huffman_encode(symbols: Tensor, chunk: int = 4096) -> HuffmanCoded:
    """Encode whole numbers, (n,) of an integer dtype, by their own frequencies. An empty row gives no bits."""
    if symbols.ndim != 1 or symbols.dtype.is_floating_point or symbols.dtype.is_complex:
        raise ValueError(f"symbols of dtype {symbols.dtype} and shape {tuple(symbols.shape)}: pass one row of whole numbers")
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}: choose at least 1")
    values, places, counts = symbols.long().unique(return_inverse=True, return_counts=True)
    lengths = huffman_lengths(dict(zip(values.tolist(), counts.tolist())))
    words = canonical_words(lengths)
    size = torch.tensor([lengths[v] for v in values.tolist()], dtype=torch.long)[places]
    word = torch.tensor([int(words[v], 2) for v in values.tolist()], dtype=torch.long)[places]
    ends = size.cumsum(0)
    total = int(ends[-1]) if len(ends) else 0
    starts = ends - size
    bits = torch.zeros(total + -total % 8, dtype=torch.uint8)
    for i in range(max(lengths.values(), default=0)):
        ones = (size > i) & (word >> (size - 1 - i).clamp(min=0) & 1).bool()
        bits[starts[ones] + i] = 1
    weights = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8)
    data = (bits.view(-1, 8) * weights).sum(1, dtype=torch.uint8)
    return HuffmanCoded(data, starts[::chunk].clone(), lengths, len(symbols), chunk)


def huffman_decode(coded: HuffmanCoded) -> Tensor:
    """The symbols again, (n,) int64, exactly.

    All chunks are read side by side, a symbol of each at a time. In a canonical code, words filled up with zeros to one length rise from
    symbol to symbol, so that a binary search finds whose word the next bits begin with.
    """
    if coded.count == 0:
        return torch.zeros(0, dtype=torch.long)
    order = sorted(coded.lengths, key=lambda symbol: (coded.lengths[symbol], symbol))
    words, longest = canonical_words(coded.lengths), max(coded.lengths.values())
    if longest > 56:
        raise ValueError(f"a code word has {longest} bits: words of up to 56 can be read")
    first = torch.tensor([int(words[symbol], 2) << (longest - coded.lengths[symbol]) for symbol in order])
    sizes, symbols = torch.tensor([coded.lengths[symbol] for symbol in order]), torch.tensor(order)
    data = torch.cat([coded.data, coded.data.new_zeros(8)]).long()
    at = coded.starts.clone()
    out = torch.empty(len(at), coded.chunk, dtype=torch.long)
    for i in range(min(coded.chunk, coded.count)):
        byte, window = at >> 3, torch.zeros_like(at)
        for k in range(8):  # the next 64 bits; the first 8 of the sum overflow harmlessly
            window = window << 8 | data[(byte + k).clamp(max=len(data) - 1)]
        window = (window >> (64 - longest - (at & 7))) & ((1 << longest) - 1)
        place = torch.searchsorted(first, window, right=True) - 1
        out[:, i] = symbols[place]
        at += sizes[place]
    return out.view(-1)[: coded.count]
