"""Four-bit weights for QLoRA (Dettmers et al. 2023, arXiv 2305.14314), equal to bitsandbytes bit for bit. Lab 07 builds the parts.

A weight is cut into blocks of `block_size` values, row after row. Each block is divided by its largest magnitude, `absmax`, and every
value becomes the number (0 to 15) of the nearest of sixteen levels between -1 and 1. Two such codes share a byte.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

SMALLEST_ABSMAX = 1e-38  # a block of zeros is divided by this, not by zero
ABSMAX_BLOCK = 256  # double quantization: so many absmax values share one scale
HEADS = ("pre_classifier", "classifier", "score", "lm_head")  # what transformers calls the layers after the body
CHUNK = 1 << 18  # values worked on at a time: intermediate results stay in the processor's cache


def nf4_levels() -> Tensor:
    """(16,) fp32, rising from -1 to 1: quantiles of the normal distribution, so that normally distributed weights use all codes alike.

    Zero is one of them, with seven levels below and eight above. The outermost probability is the mean of 1 - 1/32 and 1 - 1/30, in the
    seven digits that the library gives it: with more digits some levels would differ from its table in the last bit.
    """
    outermost = round(1 - (1 / 32 + 1 / 30) / 2, 7)
    above = torch.special.ndtri(torch.linspace(outermost, 0.5, 9)[:-1].double())
    below = -torch.special.ndtri(torch.linspace(outermost, 0.5, 8)[:-1].double())
    levels = torch.cat([below, torch.zeros(1, dtype=torch.float64), above.flip(0)]).float()
    return levels / levels.max()


def fp4_levels() -> Tensor:
    """(16,) fp32 in the order of the codes, not of size: a sign bit, then three bits for one of eight magnitudes, as bitsandbytes has it.

    Code 8, "minus zero", is plain zero there.
    """
    magnitudes = torch.tensor([0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0]) / 12
    return torch.cat([magnitudes, 0 - magnitudes])


LEVELS = {"nf4": nf4_levels, "fp4": fp4_levels}


def dynamic_levels() -> Tensor:
    """(256,) fp32, rising: the signed 8-bit code of Dettmers 2016 (arXiv 1511.04561), fine near zero and coarse near one.

    Seven decades, from 1e-6 to 1: decade i holds 2**i evenly spaced values of either sign. Zero and 1 are the last two.
    """
    positive = []
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1)
        positive.append(10.0 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2))
    values = torch.cat(positive)
    return torch.cat([-values, values, torch.tensor([0.0, 1.0])]).sort().values


def pack(codes: Tensor) -> Tensor:
    """Two 4-bit codes a byte, the first in the upper half: (n,) uint8 -> (ceil(n / 2),) uint8. An odd one is followed by code 0."""
    if codes.numel() and codes.max() > 15:
        raise ValueError(f"code {codes.max().item()} does not fit in 4 bits: codes go from 0 to 15")
    codes = F.pad(codes.reshape(-1).to(torch.uint8), (0, codes.numel() % 2))
    return codes[::2] << 4 | codes[1::2]


def unpack(packed: Tensor, count: int) -> Tensor:
    """The first `count` codes of packed bytes: (ceil(count / 2),) uint8 -> (count,) uint8."""
    if not 0 <= count <= 2 * packed.numel():
        raise ValueError(f"{count} codes were asked of {packed.numel()} bytes, which hold {2 * packed.numel()}")
    return torch.stack([packed >> 4, packed & 15], dim=-1).reshape(-1)[:count]


@functools.lru_cache
def _cells(kind: str, device: str) -> tuple[int, Tensor, Tensor]:
    """A quick way to the nearest level: cells of equal width on [-1, 1], so narrow that at most one midpoint of two levels is in each.

    Returns the number of cells a unit, each cell's midpoint (infinity where there is none) and, for each cell, the code of the values
    up to the midpoint and the code of those above. A value's cell rises with the value, so the answer is exact.
    """
    levels, order = LEVELS[kind]().sort(stable=True)
    midpoints = (levels[:-1] + levels[1:]) / 2
    per_unit = 8
    while len((cells := ((midpoints + 1) * per_unit).int()).unique()) < len(midpoints):
        per_unit *= 2
    thresholds = torch.full((2 * per_unit + 1,), torch.inf)
    thresholds[cells.long()] = midpoints
    below = (cells[None, :] < torch.arange(len(thresholds))[:, None]).sum(1)  # midpoints in earlier cells
    codes = order[torch.stack([below, (below + 1).clamp(max=15)], dim=1)].to(torch.uint8)
    return per_unit, thresholds.to(device), codes.reshape(-1).to(device)


def nearest_codes(scaled: Tensor, kind: str) -> Tensor:
    """The code of the level nearest to each value of [-1, 1], (n,) fp32 -> (n,) uint8; halfway between two, the lower level.

    The same as counting the midpoints below each value (torch.bucketize), five times faster.
    """
    per_unit, thresholds, codes = _cells(kind, str(scaled.device))
    cell = scaled.add(1).mul_(per_unit).int()
    above = scaled > thresholds.index_select(0, cell)
    return codes.index_select(0, cell.mul_(2).add_(above))


@dataclass(frozen=True)
class QuantizedAbsmax:
    """Double quantization: `absmax` values in 8 bits. codes (blocks,) uint8, scales (ceil(blocks / 256),) fp32, offset () fp32."""

    codes: Tensor
    scales: Tensor
    offset: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and offset."""
        return self.codes.nbytes + self.scales.nbytes + self.offset.nbytes

    def dequantize(self) -> Tensor:
        """(blocks,) fp32."""
        levels = _dynamic(str(self.codes.device))[0].index_select(0, self.codes.int())
        scales = self.scales.repeat_interleave(ABSMAX_BLOCK)[: len(levels)]
        return levels * scales + self.offset


@functools.lru_cache
def _dynamic(device: str) -> tuple[Tensor, Tensor]:
    """The 256 dynamic levels, and for 65,536 evenly spaced numbers from -1 to 1 the code of the nearest one."""
    levels = dynamic_levels()
    grid = torch.arange(65536) / 65535 * 2 - 1
    return levels.to(device), torch.bucketize(grid, (levels[:-1] + levels[1:]) / 2).to(torch.uint8).to(device)


def quantize_absmax(absmax: Tensor) -> QuantizedAbsmax:
    """Quantize (blocks,) fp32 again: minus their mean, in blocks of 256, to the nearest of 256 dynamic levels.

    As in the library a value is first rounded to a grid of 65,536 steps, and a block of equal values gets code 0.
    """
    offset = absmax.mean()
    centred = absmax - offset
    blocks = F.pad(centred, (0, -len(centred) % ABSMAX_BLOCK)).view(-1, ABSMAX_BLOCK)
    scales = blocks.abs().amax(1)
    scaled = (blocks * (1 / scales)[:, None]).view(-1)[: len(centred)]
    scaled = scaled.nan_to_num(nan=-1.0).clamp(-1, 1)  # 0 / 0 in a block without differences
    cell = ((scaled + 1) * 0.5 * 65535 + 0.5).int()
    return QuantizedAbsmax(_dynamic(str(absmax.device))[1].index_select(0, cell), scales, offset)


@dataclass(frozen=True)
class Quantized4bit:
    """A weight in 4 bits: packed (ceil(n / 2),) uint8 and absmax (blocks,) fp32, or that in 8 bits. shape and dtype are the weight's."""

    packed: Tensor
    absmax: Tensor | QuantizedAbsmax
    shape: torch.Size
    dtype: torch.dtype
    kind: str = "nf4"
    block_size: int = 64

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.packed.nbytes + self.absmax.nbytes

    @property
    def bits_per_weight(self) -> float:
        """4 and a little: the scales' share is 32 / block_size bits, or with double quantization about 8 / block_size."""
        return 8 * self.nbytes / self.shape.numel()

    @property
    def codes(self) -> Tensor:
        """The codes one by one: (n,) uint8."""
        return unpack(self.packed, self.shape.numel())


def quantize_4bit(weight: Tensor, kind: str = "nf4", *, block_size: int = 64, double: bool = False) -> Quantized4bit:
    """Quantize a weight of any shape, in fp32, bf16 or fp16, to "nf4" or "fp4". double: quantize the absmax values too.

    Codes and absmax equal those of bitsandbytes.functional.quantize_4bit on the CPU bit for bit.
    Raises ValueError for an unknown kind, a block size below 1, an empty weight, one with nan or infinity; TypeError for another dtype.
    """
    if kind not in LEVELS:
        raise ValueError(f"kind is {kind!r}: choose one of {', '.join(LEVELS)}")
    if block_size < 1:
        raise ValueError(f"block_size is {block_size}: choose at least 1, usually 64")
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"the weight has dtype {weight.dtype}: convert it to float32, bfloat16 or float16")
    if weight.numel() == 0:
        raise ValueError(f"a weight of shape {tuple(weight.shape)} has no values to quantize")
    values = weight.detach().reshape(-1)
    count = len(values)
    whole = count - count % block_size
    absmax = torch.empty(-(-count // block_size), device=weight.device)
    packed = torch.empty((count + 1) // 2, dtype=torch.uint8, device=weight.device)
    step = 2 * block_size * max(1, CHUNK // (2 * block_size))  # whole blocks and whole bytes
    for start in range(0, count, step):
        part = values[start : start + step].float()
        inside = max(0, min(whole - start, step))  # values in whole blocks
        blocks, first = part[:inside].view(-1, block_size), start // block_size
        largest = blocks.abs().amax(1)
        absmax[first : first + len(largest)] = largest
        scaled = (blocks * (1 / largest.clamp(min=SMALLEST_ABSMAX))[:, None]).view(-1)
        if inside < len(part):  # the last, shorter block: the library divides it, and keeps the clamped absmax
            largest = part[inside:].abs().amax().clamp(min=SMALLEST_ABSMAX)
            absmax[-1] = largest
            scaled = torch.cat([scaled, part[inside:] / largest])
        if not bool(absmax[first : -(-(start + len(part)) // block_size)].isfinite().all()):
            bad = int((~part.isfinite()).nonzero()[0]) + start
            place = tuple(int(i) for i in torch.unravel_index(torch.tensor(bad), weight.shape))
            raise ValueError(f"the weight is {values[bad].item()} at {place}: look for the step that broke it, 4 bits cannot hold it")
        codes = nearest_codes(scaled.clamp_(-1, 1), kind)
        if len(codes) % 2:  # a place that is filled up gets the code of the value 0, as in the library
            codes = torch.cat([codes, nearest_codes(scaled.new_zeros(1), kind)])
        pairs = codes.view(torch.int16)  # the first code of a pair is the lower byte
        packed[start // 2 : start // 2 + len(pairs)] = (pairs << 4 | pairs >> 8).to(torch.uint8)
    return Quantized4bit(packed, quantize_absmax(absmax) if double else absmax, weight.shape, weight.dtype, kind, block_size)


@functools.lru_cache
def _pairs(kind: str, device: str) -> Tensor:
    """For each of the 256 bytes its two levels, as one 8-byte number: (256,) int64, two fp32 side by side."""
    levels = LEVELS[kind]()
    byte = torch.arange(256)
    return torch.stack([levels[byte >> 4], levels[byte & 15]], dim=1).view(torch.int64).view(-1).to(device)


def dequantize_4bit(quantized: Quantized4bit, dtype: torch.dtype | None = None) -> Tensor:
    """The weight that the codes stand for, level times absmax, in its own shape; computed in fp32, then rounded to `dtype` (its own)."""
    absmax = quantized.absmax if isinstance(quantized.absmax, Tensor) else quantized.absmax.dequantize()
    count, size = quantized.shape.numel(), quantized.block_size
    packed, pairs = quantized.packed, _pairs(quantized.kind, str(quantized.packed.device))
    out = torch.empty(count, dtype=dtype or quantized.dtype, device=packed.device)
    step = 2 * size * max(1, CHUNK // (2 * size))
    for start in range(0, count, step):
        end = min(start + step, count)
        values = pairs.index_select(0, packed[start // 2 : (end + 1) // 2].int()).view(torch.float32)[: end - start]
        whole = (end - start) // size
        values[: whole * size].view(whole, size).mul_(absmax[start // size : start // size + whole, None])
        values[whole * size :].mul_(absmax[-1])
        out[start:end] = values
    return out.view(quantized.shape)


class _Linear4bitFunction(torch.autograd.Function):
    """x W^T + b with W dequantised anew in each pass. Only the layer is remembered: no copy of W waits for the backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: Linear4bit) -> Tensor:
        ctx.layer = layer
        bias = layer.bias.to(x.dtype) if layer.bias is not None else None
        return F.linear(x, layer.dequantize(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, None]:
        return (gradient @ ctx.layer.dequantize(gradient.dtype) if ctx.needs_input_grad[0] else None), None


class Linear4bit(nn.Module):
    """A frozen linear layer whose weight lies packed in 4 bits: (..., in_features) -> (..., out_features). Gradients reach the input only.

    Put LoRA beside it to train it (QLoRA). It computes in `compute_dtype`, in the autocast dtype where autocast is on, or else in the
    input's dtype. All of its tensors are buffers: they move and are saved with the model, and the scales stay in fp32 under `.to(dtype)`.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, compute_dtype: torch.dtype | None = None, **options):
        """weight (out_features, in_features), bias (out_features,). options: kind, block_size, double, as `quantize_4bit` takes them."""
        super().__init__()
        if weight.ndim != 2:
            raise ValueError(f"a weight of shape {tuple(weight.shape)}: a linear layer needs (out_features, in_features)")
        self.out_features, self.in_features = weight.shape
        self.compute_dtype = compute_dtype
        quantized = quantize_4bit(weight, **options)
        self.weight_dtype, self.kind, self.block_size = quantized.dtype, quantized.kind, quantized.block_size
        self.register_buffer("packed", quantized.packed)
        self.double = isinstance(quantized.absmax, QuantizedAbsmax)
        if self.double:
            for name in ("codes", "scales", "offset"):
                self.register_buffer(f"absmax_{name}", getattr(quantized.absmax, name))
        else:
            self.register_buffer("absmax", quantized.absmax)
        self.register_buffer("bias", bias.detach().clone() if bias is not None else None)

    @classmethod
    def from_linear(cls, linear: nn.Linear, **options) -> Linear4bit:
        """The same layer in 4 bits; options as the class takes them."""
        return cls(linear.weight, linear.bias, **options).train(linear.training)

    @property
    def quantized(self) -> Quantized4bit:
        """Codes and scales, as `quantize_4bit` returns them."""
        absmax = QuantizedAbsmax(self.absmax_codes, self.absmax_scales, self.absmax_offset) if self.double else self.absmax
        return Quantized4bit(self.packed, absmax, torch.Size((self.out_features, self.in_features)), self.weight_dtype, self.kind, self.block_size)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight, (out_features, in_features), made anew."""
        return dequantize_4bit(self.quantized, dtype)

    def forward(self, x: Tensor) -> Tensor:
        if self.compute_dtype is not None:
            return _Linear4bitFunction.apply(x.to(self.compute_dtype), self).to(x.dtype)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return _Linear4bitFunction.apply(x, self)

    def _apply(self, fn, recurse: bool = True) -> Linear4bit:
        # A model's .to(bfloat16) converts every floating buffer. The scales are part of the code and must not be rounded.
        scales = {name: buffer for name, buffer in self.named_buffers(recurse=False) if name.startswith("absmax")}
        super()._apply(fn, recurse)
        for name, scale in scales.items():
            setattr(self, name, scale.to(self.packed.device))
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {self.kind}, double={self.double}"


def quantize_linears(model: nn.Module, *, skip: Iterable[str] = HEADS, **options) -> list[str]:
    """Put a `Linear4bit` in the place of every nn.Linear of a model and return their names. options: as `Linear4bit.from_linear` takes them.

    skip: parts of names to leave alone. Heads stay: they are new or give the answer. transformers' Conv1D (GPT-2) is not replaced.
    Raises ValueError when there is nothing to replace.
    """
    skip = set(skip)
    names = [name for name, module in model.named_modules() if type(module) is nn.Linear and not skip & set(name.split("."))]
    if not names or names == [""]:
        raise ValueError("no nn.Linear to replace (skipped parts: " + ", ".join(sorted(skip)) + "): pass a model that holds some, or another skip")
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, Linear4bit.from_linear(model.get_submodule(name), **options))
    return names
