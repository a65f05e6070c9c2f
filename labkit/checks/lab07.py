"""Checks of lab 07, QLoRA."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from labkit.checks import reporting
from labkit.nf4 import dequantize_4bit, dynamic_levels, quantize_4bit
from labkit.nf4 import nf4_levels as reference_levels


def absmax_blocks(candidate) -> None:
    """`absmax_blocks(weight, block_size)`: the largest magnitude of each block, (blocks,) fp32."""
    with reporting("absmax_blocks") as report:
        weight = torch.randn(6, 32)
        weight[2, 5], weight[4, 20] = -9.0, 7.0
        out = candidate(weight, 64)
        report.shape(out, (3,))
        report(
            "a minus counts as much as a plus",
            out[1] == 9.0,
            f"block 1 holds -9 and you found {out[1].item():.3f}: take the largest magnitude, weight.abs(), not the largest value",
        )
        report(
            "every block has its own",
            torch.allclose(out, weight.view(3, 64).abs().amax(1)),
            f"you found {[round(v, 3) for v in out.tolist()]}: blocks are 64 neighbours in reading order, flatten row after row and take the "
            "maximum of each",
        )
        ragged = candidate(weight.view(-1)[:150], 64)
        report(
            "a shorter last block counts too",
            tuple(ragged.shape) == (3,) and ragged[2] == weight.view(-1)[128:150].abs().max(),
            "150 weights are two blocks of 64 and one of 22: the last, shorter block was left out or has the wrong maximum",
        )
        report("zeros give zero", candidate(torch.zeros(64), 64).tolist() == [0.0], "a block of zeros has absmax 0: deal with the division elsewhere")
        half = candidate(weight.to(torch.bfloat16), 64)
        report("fp32 scales", half.dtype == torch.float32, f"bf16 weights gave scales of dtype {half.dtype}: convert to float32 first")


def nf4_levels(candidate) -> None:
    """`nf4_levels()`: sixteen numbers, (16,)."""
    with reporting("nf4_levels") as report:
        levels = candidate()
        report.shape(levels, (16,))
        report("finite", levels.isfinite().all(), "a level is infinite: the quantile of probability 1 is infinity, start a little inside")
        report("rising", (levels.diff() > 0).all(), "the levels are not in rising order, or one occurs twice: sort them, and take zero once")
        report(
            "from -1 to 1",
            levels[0] == -1 and levels[-1] == 1,
            f"the levels go from {levels[0].item():.3f} to {levels[-1].item():.3f}: divide by the largest one, so that both ends are exactly 1",
        )
        report(
            "zero is a level",
            bool((levels == 0).any()),
            "no level is exactly 0, so padding and pruned weights would not stay 0: take 8 quantiles on one side and 9 on the other, zero shared",
        )
        report(
            "seven below zero, eight above",
            (levels < 0).sum() == 7 and (levels > 0).sum() == 8,
            f"{(levels < 0).sum()} levels are below zero and {(levels > 0).sum()} above: NF4 has 7 and 8",
        )
        steps = levels.diff()
        report(
            "fine near zero, coarse at the ends",
            steps[0] > 1.5 * steps[6] and steps[14] > 1.5 * steps[8],
            "the levels are about evenly spaced: take quantiles of the normal distribution (torch.special.ndtri) at evenly spaced probabilities",
        )
        error = (levels.double() - reference_levels().double()).abs().max().item()
        report(
            "equal to the library's table",
            error < 1e-6,
            f"the shape is right, and a level is off by {error:.4f}: the outermost probability is the mean of 1 - 1/32 and 1 - 1/30",
        )


def pack_unpack(pack, unpack) -> None:
    """`pack(codes)`: (n,) codes below 16 -> (ceil(n / 2),) uint8, and `unpack(packed, count)` back."""
    with reporting("pack and unpack") as report:
        codes = torch.randint(0, 16, (20,), dtype=torch.uint8)
        codes[:2] = torch.tensor([10, 3], dtype=torch.uint8)
        packed = pack(codes)
        report("bytes", packed.dtype == torch.uint8, f"packed codes have dtype {packed.dtype}: make them torch.uint8, one byte each")
        report("two codes a byte", packed.numel() == 10, f"20 codes became {packed.numel()} bytes, expected 10: put two into one byte")
        first = int(packed.view(-1)[0])
        report(
            "the first code is in the upper half",
            first == 0xA3,
            f"codes 10, 3 became byte {first}, expected {0xA3} = 10 * 16 + 3: shift the first of each pair by 4 bits and add the second",
        )
        back = unpack(packed, 20)
        report(
            "comes back",
            tuple(back.shape) == (20,) and torch.equal(back.long(), codes.long()),
            "unpack(pack(codes)) is not codes: take packed >> 4 and packed & 15 in turn, pair by pair",
        )
        odd = pack(codes[:7])
        report("an odd count fits", odd.numel() == 4, f"7 codes became {odd.numel()} bytes, expected 4: fill the last half byte up")
        report(
            "gives as many as there were",
            torch.equal(unpack(odd, 7).long(), codes[:7].long()),
            "7 codes did not come back as 7: cut what unpack makes to count",
        )


def quantize_dequantize(quantize, dequantize) -> None:
    """`quantize(weight, levels, block_size)` -> codes (n,) uint8, absmax (blocks,); `dequantize(codes, absmax, levels, block_size, shape)`."""
    with reporting("quantize and dequantize") as report:
        levels, weight = reference_levels(), 0.02 * torch.randn(10, 32)
        weight[:2] *= 50
        codes, absmax = quantize(weight, levels, 64)
        report(
            "one code a weight, one byte each",
            tuple(codes.shape) == (320,) and codes.dtype == torch.uint8,
            f"codes have shape {tuple(codes.shape)} and dtype {codes.dtype}, expected (320,) and torch.uint8",
        )
        expected = quantize_4bit(weight)
        largest = weight.view(-1, 64).abs().amax(1)
        report(
            "divided by absmax block by block",
            torch.allclose(absmax.view(-1), largest),
            f"absmax is {[round(v, 3) for v in absmax.view(-1).tolist()]}, expected one for each block: {[round(v, 3) for v in largest.tolist()]}",
        )
        off = (codes.int() - expected.codes.int()).abs()
        report(
            "to the nearest level",
            (off > 0).float().mean() < 0.01,
            f"{(off > 0).float().mean():.0%} of the codes are not the nearest level's: divide by absmax, then compare with the midpoints between "
            "levels, not with the levels",
        )
        back = dequantize(codes, absmax, levels, 64, weight.shape)
        report.shape(back, (10, 32))
        wanted = dequantize_4bit(expected)
        report(
            "level times absmax",
            (back - wanted).abs().max() < 0.01 * wanted.abs().max() and torch.allclose(back[2:], wanted[2:], atol=1e-3),
            "dequantize does not give levels[codes] times the absmax of the code's own block: multiply, and repeat each absmax block_size times",
        )
        short = torch.randn(3, 50)
        found = dequantize(*quantize(short, levels, 64), levels, 64, short.shape)
        report(
            "a shorter last block",
            tuple(found.shape) == (3, 50) and torch.allclose(found, dequantize_4bit(quantize_4bit(short)), atol=0.2),
            "150 weights in blocks of 64: the shorter last block does not come back; fill up before you reshape, and cut again",
        )
        silent = dequantize(*quantize(torch.zeros(2, 64), levels, 64), levels, 64, (2, 64))
        report(
            "a block of zeros stays zero", bool((silent == 0).all()), "a block of zeros came back as nan or as something else: 0 / 0, clamp absmax"
        )
        for bad in (math.nan, math.inf):
            broken = torch.randn(2, 64)
            broken[1, 3] = bad
            try:
                quantize(broken, levels, 64)
            except ValueError:
                continue
            report(f"rejects {bad}", False, f"a weight with {bad} was quantized without a word: raise ValueError, it poisons its whole block")
        report("rejects nan and infinity", True, "")


def double_quantize(quantize_absmax, dequantize_absmax) -> None:
    """`quantize_absmax(absmax, levels, block_size)` -> codes, scales, offset; `dequantize_absmax(codes, scales, offset, levels, block_size)`."""
    with reporting("double quantization") as report:
        levels = dynamic_levels()
        absmax = 3 + 0.2 * torch.rand(600)
        absmax[256:512] *= 1.5
        codes, scales, offset = quantize_absmax(absmax, levels, 256)
        report(
            "one byte each",
            tuple(codes.shape) == (600,) and codes.dtype == torch.uint8,
            f"codes have shape {tuple(codes.shape)} and dtype {codes.dtype}, expected (600,) and torch.uint8",
        )
        report.shape(scales, (3,))
        report(
            "the mean is taken off first",
            abs(float(offset) - absmax.mean()) < 1e-4,
            f"offset is {float(offset):.3f}, the mean is {absmax.mean():.3f}: absmax values are all positive; without their mean both signs of "
            "the code are used",
        )
        rest = absmax - absmax.mean()
        expected = torch.stack([part.abs().max() for part in rest.split(256)])
        report(
            "a scale for each 256",
            torch.allclose(scales, expected, atol=1e-5),
            f"scales are {[round(v, 3) for v in scales.tolist()]}, expected {[round(v, 3) for v in expected.tolist()]}: the largest magnitude of "
            "each block after the mean is off",
        )
        back = dequantize_absmax(codes, scales, offset, levels, 256)
        report.shape(back, (600,))
        report(
            "the mean is put back",
            abs(back.mean() - absmax.mean()) < 0.05,
            f"what comes back has mean {back.mean():.3f} instead of {absmax.mean():.3f}: add the offset at the end",
        )
        nearest = (rest[:, None] - levels * expected.repeat_interleave(256)[:600, None]).abs().amin(1)
        worst = ((back - absmax).abs() - nearest).max().item()
        report(
            "to the nearest of the levels given",
            worst < 2e-3,
            f"a value comes back {worst:.3f} further off than its nearest level: scale to -1 to 1, find the nearest of `levels`, and multiply by the "
            "scale of its own block",
        )
        flat = dequantize_absmax(*quantize_absmax(torch.full((10,), 2.0), levels, 256), levels, 256)
        report(
            "equal values come back",
            torch.allclose(flat, torch.full((10,), 2.0)),
            "equal absmax values leave 0 / 0 after the mean: guard the division",
        )


def _float_bytes(output: Tensor) -> int:
    """Bytes of floating-point tensors remembered by the graph's own nodes, other than those autograd saved."""
    seen, queue, total = set(), [output.grad_fn], 0
    while queue:
        node = queue.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        kept = getattr(node, "__dict__", {}).values()
        total += sum(value.nbytes for value in kept if isinstance(value, Tensor) and value.is_floating_point())
        queue += [following for following, _ in node.next_functions]
    return total


def linear_4bit(candidate) -> None:
    """`Linear4bit(weight, bias=None)`: an nn.Module whose weight lies in NF4, blocks of 64."""
    with reporting("Linear4bit") as report:
        weight, bias = torch.randn(48, 128) / 11, torch.randn(48)
        layer = candidate(weight, bias)
        held = sum(t.nbytes for t in [*layer.parameters(), *layer.buffers()]) - bias.nbytes
        report(
            "half a byte a weight",
            held <= 0.6 * weight.numel(),
            f"the layer holds {held / weight.numel():.2f} bytes a weight, expected 0.56: keep packed codes and absmax only, not the weight, and two "
            "codes a byte",
        )
        report(
            "registered",
            held >= 0.5 * weight.numel(),
            f"only {held} bytes are among the layer's buffers: register_buffer the codes and scales, or they are not saved nor moved with the model",
        )
        report(
            "the base is frozen",
            not any(p.requires_grad for p in layer.parameters()),
            "a parameter of the layer asks for a gradient: the base of QLoRA is frozen, keep its tensors as buffers",
        )
        known = dequantize_4bit(quantize_4bit(weight))
        x = torch.randn(2, 5, 128, requires_grad=True)
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            out = layer(x)
        report.shape(out, (2, 5, 48))
        report(
            "uses the bias",
            not torch.allclose(out, F.linear(x, known), atol=1e-3),
            "the outputs are those of the layer without its bias: add it",
        )
        report(
            "output of the dequantised weight",
            torch.allclose(out, F.linear(x, known, bias), atol=1e-2),
            "the output is not x W^T + b with the dequantised weight: dequantize in forward, shape (out_features, in_features)",
        )
        report(
            "gradient reaches the input",
            out.requires_grad,
            "the output is cut off from the input, so no LoRA below this layer would learn: do not compute forward under no_grad or detach it",
        )
        upstream = torch.randn_like(out)
        kept = max((t.nbytes for t in saved if t.is_floating_point() and t.numel() >= weight.numel()), default=0) + _float_bytes(out)
        report(
            "no dequantised copy is kept",
            kept < weight.numel(),
            "a dequantised copy of the weight waits for the backward pass, four times what was saved: write an autograd Function that dequantizes "
            "again in backward",
        )
        out.backward(upstream)
        report(
            "the right gradient",
            x.grad is not None and torch.allclose(x.grad, upstream @ known, atol=1e-2),
            "the input's gradient is not (gradient of the output) times W: no transpose there, W is (out_features, in_features)",
        )
        report("works without a bias", torch.allclose(candidate(weight)(x), F.linear(x, known), atol=1e-2), "without a bias the output is wrong")
        down, up = nn.Linear(128, 4, bias=False), nn.Linear(4, 48, bias=False)
        (layer(x) + up(down(x))).sum().backward()
        report(
            "LoRA on top learns",
            down.weight.grad is not None and all(t.grad is None for t in [*layer.parameters(), *layer.buffers()]),
            "with LoRA beside the layer gradients must reach A and B only",
        )
