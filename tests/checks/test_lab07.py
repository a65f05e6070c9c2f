"""Every check of lab 07 takes a right answer written differently from ours, and turns down wrong ones, each with its own message."""

import re
from statistics import NormalDist

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from labkit.checks import CheckFailed, NotWrittenYet
from labkit.checks import lab07 as check
from labkit.nf4 import dynamic_levels
from labkit.nf4 import nf4_levels as library_levels

# ---------------------------------------------------------------- absmax_blocks


def right_absmax(weight, block_size):
    return torch.stack([block.abs().max() for block in weight.float().flatten().split(block_size)])


def absmax_drops_the_rest(weight, block_size):
    whole = weight.float().flatten()
    return whole[: len(whole) // block_size * block_size].view(-1, block_size).abs().amax(1)


def absmax_by_columns(weight, block_size):
    return right_absmax(weight.T if weight.ndim == 2 else weight, block_size)


def absmax_clamped(weight, block_size):
    return right_absmax(weight, block_size).clamp(min=1e-3)


# ---------------------------------------------------------------- nf4_levels


def quantile_levels(outermost=1 - (1 / 32 + 1 / 30) / 2, below=7, above=8, zero=True, divide=True):
    normal = NormalDist()

    def side(count):
        return [normal.inv_cdf(0.5 + (outermost - 0.5) * (i + 1) / count) for i in range(count)]

    values = [-v for v in side(below)] + ([0.0] if zero else []) + side(above)
    levels = torch.tensor(values, dtype=torch.float64).sort().values
    return (levels / levels.max() if divide else levels).float()


def levels_unsorted():
    levels = quantile_levels()
    return torch.cat([levels[8:], levels[:8]])


# ---------------------------------------------------------------- pack, unpack


def right_pack(codes):
    values = codes.tolist() + [0] * (len(codes) % 2)
    return torch.tensor([16 * a + b for a, b in zip(values[::2], values[1::2])], dtype=torch.uint8)


def right_unpack(packed, count):
    return torch.tensor([half for byte in packed.tolist() for half in divmod(byte, 16)], dtype=torch.uint8)[:count]


def pack_low_first(codes):
    return (right_pack(codes) >> 4) | (right_pack(codes) << 4)


def pack_drops_the_odd_one(codes):
    return right_pack(codes[: len(codes) // 2 * 2])


def unpack_halves_apart(packed, count):
    return torch.cat([packed >> 4, packed & 15])[:count]


# ---------------------------------------------------------------- quantize, dequantize


def right_quantize(weight, levels, block_size, *, rule="nearest", check_finite=True, clamp=True, one_scale=False, normalise=True, dtype=torch.uint8):
    if check_finite and not weight.isfinite().all():
        raise ValueError("not finite")
    codes, scales = [], []
    for block in weight.flatten().split(block_size):
        absmax = weight.abs().max() if one_scale else block.abs().max()
        scaled = block / (absmax.clamp(min=1e-30) if clamp else absmax) if normalise else block
        distance = scaled[:, None] - levels
        if rule == "nearest":
            codes.append(distance.abs().argmin(1))
        elif rule == "floor":
            codes.append((distance >= 0).sum(1).sub(1).clamp(min=0))
        scales.append(absmax)
    return torch.cat(codes).to(dtype), torch.stack(scales)


def right_dequantize(codes, absmax, levels, block_size, shape):
    blocks = levels[codes.long()].split(block_size)
    return torch.cat([block * scale for block, scale in zip(blocks, absmax)]).view(shape)


def quantize_nan_for_zeros(weight, levels, block_size):
    codes, absmax = right_quantize(weight, levels, block_size)
    return codes, torch.where(absmax == 0, torch.nan, absmax)


def quantize_whole_blocks_only(weight, levels, block_size):
    return right_quantize(weight.flatten()[: weight.numel() // block_size * block_size], levels, block_size)


def dequantize_divides(codes, absmax, levels, block_size, shape):
    return right_dequantize(codes, 1 / absmax.clamp(min=1e-9), levels, block_size, shape)


def dequantize_tiles_the_scales(codes, absmax, levels, block_size, shape):
    return (levels[codes.long()] * absmax.repeat(block_size)[: len(codes)]).view(shape)


def dequantize_flat(codes, absmax, levels, block_size, shape):
    return right_dequantize(codes, absmax, levels, block_size, (-1,))


# ---------------------------------------------------------------- double quantization


def right_absmax_codes(absmax, levels, block_size, *, centre=True, one_scale=False, linear=False, guard=True):
    offset = absmax.mean() if centre else absmax.new_zeros(())
    rest = absmax - offset
    codes, scales = [], []
    for block in rest.split(block_size):
        scale = rest.abs().max() if one_scale else block.abs().max()
        scaled = block / (scale.clamp(min=1e-12) if guard else scale)
        codes.append(((scaled + 1) * 127.5).round() if linear else (scaled[:, None] - levels).abs().argmin(1))
        scales.append(scale)
    return torch.cat(codes).to(torch.uint8), torch.stack(scales), offset


def right_absmax_back(codes, scales, offset, levels, block_size):
    return levels[codes.long()] * torch.cat([scale.expand(block_size) for scale in scales])[: len(codes)] + offset


def absmax_back_without_offset(codes, scales, offset, levels, block_size):
    return right_absmax_back(codes, scales, 0.0, levels, block_size)


def absmax_back_first_scale(codes, scales, offset, levels, block_size):
    return levels[codes.long()] * scales[0] + offset


def absmax_nan(absmax, levels, block_size):
    codes, scales, offset = right_absmax_codes(absmax, levels, block_size)
    return codes, torch.where(scales == 0, torch.nan, scales), offset


# ---------------------------------------------------------------- Linear4bit


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return x @ layer.weight_now().T

    @staticmethod
    def backward(ctx, gradient):
        return torch.einsum("...o,oi->...i", gradient, ctx.layer.weight_now()), None


class Right(nn.Module):
    """Blocks as rows of a table, the bias added outside the function."""

    def __init__(self, weight, bias=None):
        super().__init__()
        self.shape = weight.shape
        codes, absmax = right_quantize(weight, library_levels(), 64)
        self.register_buffer("bytes", right_pack(codes))
        self.register_buffer("scales", absmax)
        self.register_buffer("bias", bias)

    def weight_now(self):
        codes = torch.stack([self.bytes >> 4, self.bytes & 15], 1).flatten()
        return (library_levels()[codes.long()].view(-1, 64) * self.scales[:, None]).view(self.shape)

    def forward(self, x):
        out = Product.apply(x, self)
        return out if self.bias is None else out + self.bias


class KeepsTheWeight(Right):
    def __init__(self, weight, bias=None):
        super().__init__(weight, bias)
        self.register_buffer("original", weight)


class NotPacked(Right):
    def __init__(self, weight, bias=None):
        super().__init__(weight, bias)
        self.register_buffer("bytes", right_quantize(weight, library_levels(), 64)[0])


class NotRegistered(Right):
    def __init__(self, weight, bias=None):
        super().__init__(weight, bias)
        packed = self.bytes
        del self.bytes
        self.bytes = [packed]


class TrainableScales(Right):
    def __init__(self, weight, bias=None):
        super().__init__(weight, bias)
        scales = self.scales
        del self.scales
        self.scales = nn.Parameter(scales)


class ForgetsTheBias(Right):
    def forward(self, x):
        return Product.apply(x, self)


class PlainLinear(Right):
    def forward(self, x):
        return F.linear(x, self.weight_now(), self.bias)


class SavesTheCopy(Right):
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            ctx.weight = weight
            return x @ weight.T

        @staticmethod
        def backward(ctx, gradient):
            return gradient @ ctx.weight, None

    def forward(self, x):
        out = self.Function.apply(x, self.weight_now())
        return out if self.bias is None else out + self.bias


class Detached(Right):
    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


class WrongGradient(Right):
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, layer):
            ctx.layer = layer
            return x @ layer.weight_now().T

        @staticmethod
        def backward(ctx, gradient):
            return gradient @ ctx.layer.weight_now().sign(), None

    def forward(self, x):
        out = self.Function.apply(x, self)
        return out if self.bias is None else out + self.bias


class WrongOrder(Right):
    def weight_now(self):
        codes = torch.stack([self.bytes & 15, self.bytes >> 4], 1).flatten()
        return (library_levels()[codes.long()].view(-1, 64) * self.scales[:, None]).view(self.shape)


RIGHT = {
    check.absmax_blocks: (right_absmax,),
    check.nf4_levels: (quantile_levels,),
    check.pack_unpack: (right_pack, right_unpack),
    check.quantize_dequantize: (right_quantize, right_dequantize),
    check.double_quantize: (right_absmax_codes, right_absmax_back),
    check.linear_4bit: (Right,),
}


def variant(function, **options):
    return lambda *args: function(*args, **options)


WRONG = {
    check.absmax_blocks: {
        "without abs": ((lambda w, b: right_absmax(w, b) * 0 + torch.stack([p.max() for p in w.float().flatten().split(b)]),), "weight.abs(), not"),
        "one for all": ((lambda w, b: right_absmax(w, b) * 0 + w.float().abs().max(),), "blocks are 64 neighbours in reading order"),
        "by columns": ((absmax_by_columns,), "blocks are 64 neighbours in reading order|block 1 holds -9"),
        "drops the rest": ((absmax_drops_the_rest,), "the last, shorter block was left out"),
        "clamped": ((absmax_clamped,), "a block of zeros has absmax 0"),
        "bf16 scales": ((lambda w, b: right_absmax(w, b).to(w.dtype),), "scales of dtype torch.bfloat16"),
        "a column": ((lambda w, b: right_absmax(w, b)[:, None],), "the answer has shape (3, 1), expected (3,)"),
    },
    check.nf4_levels: {
        "infinite": ((lambda: quantile_levels().where(quantile_levels() < 1, torch.inf),), "the quantile of probability 1 is infinity"),
        "unsorted": ((levels_unsorted,), "not in rising order"),
        "not divided": ((lambda: quantile_levels(divide=False),), "divide by the largest one"),
        "no zero": ((lambda: quantile_levels(below=8, zero=False),), "no level is exactly 0"),
        "eight below": ((lambda: quantile_levels(below=8, above=7),), "NF4 has 7 and 8"),
        "evenly spaced": ((lambda: torch.cat([torch.arange(-7, 0) / 7, torch.arange(9) / 8]),), "about evenly spaced"),
        "another end": ((lambda: quantile_levels(outermost=0.99),), "the outermost probability is the mean"),
        "fifteen": ((lambda: quantile_levels(above=7),), "the answer has shape (15,)"),
    },
    check.pack_unpack: {
        "int64": ((lambda c: right_pack(c).long(), right_unpack), "make them torch.uint8"),
        "one a byte": ((lambda c: c, lambda p, n: p[:n]), "put two into one byte"),
        "low half first": ((pack_low_first, right_unpack), "shift the first of each pair by 4 bits"),
        "halves apart": ((right_pack, unpack_halves_apart), "in turn, pair by pair"),
        "drops the odd one": ((pack_drops_the_odd_one, right_unpack), "fill the last half byte up"),
        "ignores count": ((right_pack, lambda p, n: right_unpack(p, None)), "cut what unpack makes to count"),
    },
    check.quantize_dequantize: {
        "codes in int64": ((variant(right_quantize, dtype=torch.long), right_dequantize), "expected (320,) and torch.uint8"),
        "one scale": ((variant(right_quantize, one_scale=True), right_dequantize), "expected one for each block"),
        "next level below": ((variant(right_quantize, rule="floor"), right_dequantize), "compare with the midpoints"),
        "not divided": ((variant(right_quantize, normalise=False), right_dequantize), "are not the nearest level's"),
        "divides": ((right_quantize, dequantize_divides), "levels[codes] times the absmax"),
        "scales tiled": ((right_quantize, dequantize_tiles_the_scales), "repeat each absmax block_size times"),
        "flat": ((right_quantize, dequantize_flat), "the answer has shape (320,), expected (10, 32)"),
        "nan for zeros": ((quantize_nan_for_zeros, right_dequantize), "0 / 0, clamp absmax"),
        "takes nan": ((variant(right_quantize, check_finite=False), right_dequantize), "a weight with nan was quantized without a word"),
        "whole blocks only": ((quantize_whole_blocks_only, right_dequantize), "stopped with RuntimeError"),
    },
    check.double_quantize: {
        "no mean": ((variant(right_absmax_codes, centre=False), right_absmax_back), "without their mean"),
        "one scale": ((variant(right_absmax_codes, one_scale=True), right_absmax_back), "the largest magnitude of"),
        "offset forgotten": ((right_absmax_codes, absmax_back_without_offset), "add the offset at the end"),
        "evenly spaced": ((variant(right_absmax_codes, linear=True), right_absmax_back), "find the nearest of `levels`"),
        "first scale only": ((right_absmax_codes, absmax_back_first_scale), "the scale of its own block|add the offset"),
        "nan": ((absmax_nan, right_absmax_back), "guard the division"),
        "floats": (
            (lambda *a: (right_absmax_codes(*a)[0].float(), *right_absmax_codes(*a)[1:]), right_absmax_back),
            "expected (600,) and torch.uint8",
        ),
    },
    check.linear_4bit: {
        "keeps the weight": ((KeepsTheWeight,), "keep packed codes and absmax only"),
        "not packed": ((NotPacked,), "two codes a byte"),
        "not registered": ((NotRegistered,), "register_buffer the codes"),
        "trainable scales": ((TrainableScales,), "keep its tensors as buffers"),
        "forgets the bias": ((ForgetsTheBias,), "those of the layer without its bias"),
        "plain linear": ((PlainLinear,), "dequantizes again in backward"),
        "saves the copy": ((SavesTheCopy,), "dequantizes again in backward"),
        "detached": ((Detached,), "cut off from the input"),
        "wrong gradient": ((WrongGradient,), "the input's gradient is not"),
        "halves swapped": ((WrongOrder,), "the output is not x W^T + b"),
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
    candidate, advice = WRONG[checker][wrong]
    with pytest.raises(CheckFailed, match="(?s).*(" + "|".join(re.escape(part) for part in advice.split("|")) + ")"):
        checker(*candidate)


@pytest.mark.parametrize("checker", RIGHT, ids=lambda c: c.__name__)
def test_says_not_written_yet_without_a_traceback(checker):
    def stub(*args, **kwargs):
        raise NotImplementedError

    with pytest.raises(NotWrittenYet, match="not written yet") as caught:
        checker(*[stub] * len(RIGHT[checker]))
    assert caught.value._render_traceback_() == [f"○ {caught.value}"]


def test_labkits_own_versions_pass():
    from labkit import nf4

    def quantize(weight, levels, block_size):
        quantized = nf4.quantize_4bit(weight, block_size=block_size)
        return quantized.codes, quantized.absmax

    def dequantize(codes, absmax, levels, block_size, shape):
        return nf4.dequantize_4bit(nf4.Quantized4bit(nf4.pack(codes), absmax, torch.Size(shape), torch.float32, "nf4", block_size))

    def absmax_codes(absmax, levels, block_size):
        quantized = nf4.quantize_absmax(absmax)
        return quantized.codes, quantized.scales, quantized.offset

    check.nf4_levels(nf4.nf4_levels)
    check.pack_unpack(nf4.pack, nf4.unpack)
    check.quantize_dequantize(quantize, dequantize)
    check.double_quantize(absmax_codes, lambda codes, scales, offset, levels, size: nf4.QuantizedAbsmax(codes, scales, offset).dequantize())
    check.linear_4bit(nf4.Linear4bit)
    assert len(dynamic_levels()) == 256
