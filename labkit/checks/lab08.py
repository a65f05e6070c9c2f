"""Checks of lab 08, quantization and compression."""

from __future__ import annotations

import math

import torch

from labkit.checks import reporting
from labkit.codebook import kmeans_codebook as reference_codebook
from labkit.codebook import nearest_level


def quantize_symmetric(candidate) -> None:
    """`quantize_symmetric(values, bits)` -> whole-number codes in the shape of the values, and one scale; value = code * scale."""
    with reporting("quantize_symmetric") as report:
        values = torch.randn(8, 25)
        values[3, 4] = -4.0
        codes, scale = candidate(values, 4)
        scale = float(scale)
        report.shape(codes, (8, 25))
        whole = codes.double()
        report("whole numbers", torch.equal(whole, whole.round()), "codes are not whole numbers: round values / scale")
        report(
            "the largest magnitude sets the scale",
            abs(scale - 4 / 7) < 1e-4,
            f"scale is {scale:.4f}, expected {4 / 7:.4f}: the largest magnitude (here of a negative value) over the largest code, "
            "2**(bits - 1) - 1 = 7",
        )
        report(
            "as many codes below as above",
            whole.min() >= -7 and whole.max() <= 7,
            f"codes go from {int(whole.min())} to {int(whole.max())}, with 4 bits they may go from -7 to 7: clamp both sides alike",
        )
        off = (whole * scale - values).abs().max().item()
        report(
            "no value moves more than half a step",
            off <= 0.5001 * scale,
            f"a value moved by {off / scale:.2f} steps: round to the nearest code, do not cut decimals off",
        )
        report("any number of bits", candidate(values, 8)[0].double().abs().max() == 127, "with 8 bits the largest code is 127: 2**(bits - 1) - 1")
        zeros, scale = candidate(torch.zeros(3, 4), 8)
        report(
            "zeros stay zero",
            bool((zeros.double() * float(scale) == 0).all()),
            "values that are all 0 came back as nan: a scale of 0 divides by zero, use 1 there",
        )


def quantize_affine(candidate) -> None:
    """`quantize_affine(values, bits)` -> codes, scale, zero_point; value = (code - zero_point) * scale."""
    with reporting("quantize_affine") as report:
        values = torch.rand(40, 20) * 5 - 1
        values[0, :3] = torch.tensor([-1.0, 4.0, 0.0])
        codes, scale, zero_point = candidate(values, 4)
        whole, scale, zero_point = codes.double(), float(scale), float(zero_point)
        report.shape(codes, (40, 20))
        report("whole numbers", torch.equal(whole, whole.round()), "codes are not whole numbers: round values / scale")
        report(
            "the range has 2**bits - 1 steps",
            abs(scale - 5 / 15) < 1e-4,
            f"scale is {scale:.4f}, expected {5 / 15:.4f}: (largest - smallest value) over 2**bits - 1 = 15 steps between 16 codes",
        )
        report(
            "codes from 0",
            whole.min() == 0 and whole.max() == 15,
            f"codes go from {int(whole.min())} to {int(whole.max())}, expected 0 to 15: add the zero point, then clamp",
        )
        report(
            "the zero point is a code",
            zero_point == round(zero_point) and 0 <= zero_point <= 15,
            f"zero_point is {zero_point}: round(-smallest / scale), a whole number that is itself a code",
        )
        back = (whole - zero_point) * scale
        report("zero stays zero", back[0, 2] == 0, f"the value 0 came back as {back[0, 2].item():.3f}: its code must be the zero point")
        off = (back - values).abs().max().item()
        report(
            "no value moves more than a step",
            off <= 1.0001 * scale,
            f"a value moved by {off / scale:.1f} steps: code = round(value / scale) + zero_point",
        )
        positive = torch.rand(50) + 10
        codes, scale, zero_point = candidate(positive, 8)
        back = (codes.double() - float(zero_point)) * float(scale)
        report(
            "values of one sign",
            0 <= float(zero_point) <= 255 and (back - positive).abs().max() < 0.05,
            f"values from 10 to 11 gave zero point {float(zero_point):.0f}: let the range include 0, so that the zero point is one of the codes",
        )


def quantize_per_channel(candidate) -> None:
    """`quantize_per_channel(weight, bits)` -> codes (out, in), scale (out, 1): symmetric, a scale for each row."""
    with reporting("quantize_per_channel") as report:
        weight = torch.randn(6, 40) * torch.logspace(-2, 1, 6)[:, None]
        codes, scale = candidate(weight, 8)
        report.shape(codes, (6, 40))
        report.shape(scale, (6, 1))
        expected = weight.abs().amax(1, keepdim=True) / 127
        report(
            "every row has its own scale",
            torch.allclose(scale, expected, rtol=1e-3),
            f"scales are {[round(v, 4) for v in scale.view(-1).tolist()]}, expected {[round(v, 4) for v in expected.view(-1).tolist()]}: the "
            "largest magnitude along a row (axis 1), over 2**(bits - 1) - 1",
        )
        report(
            "whole numbers within range",
            torch.equal(codes.double(), codes.double().round()) and codes.double().abs().max() <= 127,
            "codes are not whole numbers from -127 to 127: round, then clamp",
        )
        off = ((codes.double() * scale - weight).abs() / expected).max().item()
        report("no value moves more than half a step", off <= 0.501, f"a value moved by {off:.1f} steps of its row: divide each row by its own scale")
        weight[2] = 0
        codes, scale = candidate(weight, 8)
        report("a row of zeros stays zero", bool((codes.double()[2] * scale[2] == 0).all()), "a row of zeros came back as nan: use scale 1 there")


def kmeans_codebook(candidate) -> None:
    """`kmeans_codebook(values, size)` -> (size,) levels."""
    with reporting("kmeans_codebook") as report:
        hills = torch.cat([centre + 0.1 * torch.randn(200) for centre in (-5.0, 0.0, 1.0, 9.0)])
        hills = hills[torch.randperm(len(hills))]
        book = candidate(hills, 4)
        report.shape(book, (4,))
        report("finite", book.isfinite().all(), "a level is nan: the mean of a cluster without values is 0 / 0, leave its level where it was")
        report("rising", (book.diff() >= 0).all(), "sort the levels: later steps search them by halving")
        centres = torch.tensor([-5.0, 0.0, 1.0, 9.0])
        report(
            "finds four hills",
            torch.allclose(book, centres, atol=0.1),
            f"values around -5, 0, 1 and 9 gave the levels {[round(v, 2) for v in book.tolist()]}: start from quantiles (or k-means++), assign each "
            "value to the nearest level, and repeat",
        )
        values = torch.randn(3000)
        book = candidate(values, 8)
        parts = [part if len(part := values[nearest_level(values, book) == i]) else book[i : i + 1] for i in range(8)]
        off = {
            "mean": max(abs(part.mean() - level).item() for part, level in zip(parts, book)),
            "median": max(abs(part.median() - level).item() for part, level in zip(parts, book)),
            "middle": max(abs((part.min() + part.max()) / 2 - level).item() for part, level in zip(parts, book)),
        }
        found = min(off, key=off.get)
        report(
            "a level is the mean of its values",
            found == "mean" or off[found] > 0.01,
            f"a level is the {found} of the values nearest to it: the mean is what makes the squared error least",
        )
        ratio = _inertia(values, book) / _inertia(values, reference_codebook(values, 8))
        report(
            "nothing moves any more",
            off["mean"] < 0.02 and ratio < 1.1,
            f"a level is {off['mean']:.3f} away from the mean of the values nearest to it, and the squared error {ratio:.2f} times what is possible: "
            "from the start values on, assign and take means until nothing moves",
        )
        few = candidate(torch.tensor([1.0, 1.0, 1.0, 2.0] * 10), 4)
        report(
            "few distinct values", bool(few.isfinite().all()), "with fewer distinct values than levels a level became nan: leave empty clusters alone"
        )


def _inertia(values, levels) -> float:
    return (levels[nearest_level(values, levels).long()] - values).square().sum().item()


def straight_through(candidate) -> None:
    """`fake_quantize(values, scale, bits)`: rounds in the forward pass, hands the gradient on in the backward pass."""
    with reporting("fake_quantize") as report:
        values = torch.tensor([-9.0, -3.4, -0.26, 0.0, 0.6, 2.2, 3.6, 8.0], requires_grad=True)
        out = candidate(values, 0.5, 4)
        expected = torch.tensor([-3.5, -3.5, -0.5, 0.0, 0.5, 2.0, 3.5, 3.5])
        report.shape(out, (8,))
        report(
            "rounds to steps of scale",
            torch.allclose(out[1:6], expected[1:6], atol=1e-5),
            f"0.6 with scale 0.5 became {out[4].item():.3f}, expected 0.5: divide by scale, round, multiply by scale",
        )
        report(
            "clips to the codes there are",
            torch.allclose(out, expected, atol=1e-5),
            f"8.0 became {out[7].item():.2f}, expected 3.5: with 4 bits codes end at 7, clamp to -7 and 7 before you multiply",
        )
        report("in the graph", out.requires_grad, "the result has no gradient: do not detach it or compute it under no_grad")
        upstream = torch.randn(8)
        (gradient,) = torch.autograd.grad(out, values, upstream, allow_unused=True)
        report(
            "the gradient gets through",
            gradient is not None and gradient[1:6].abs().sum() > 0,
            "the gradient is zero everywhere, because rounding is flat: pass it on in backward as if nothing had been rounded",
        )
        report(
            "unchanged",
            torch.allclose(gradient[1:6], upstream[1:6], atol=1e-6),
            "the gradient inside the range is not the one that came in: pass it on unchanged, no factor",
        )
        report(
            "and zero where clipped",
            gradient[0] == 0 and gradient[7] == 0,
            "a value far beyond the range still gets a gradient, though moving it changes nothing: set the gradient to 0 where you clip",
        )


def magnitude_mask(candidate) -> None:
    """`magnitude_mask(weight, sparsity)`: bool, True is kept."""
    with reporting("magnitude_mask") as report:
        weight = torch.randn(20, 30)
        before = weight.clone()
        mask = candidate(weight, 0.8)
        report.shape(mask, (20, 30))
        report("a bool mask", mask.dtype == torch.bool, f"the mask has dtype {mask.dtype}: a comparison gives torch.bool")
        report("leaves the weight alone", torch.equal(weight, before), "the weight was changed: only return the mask")
        kept = int(mask.sum())
        report(
            "sparsity is the share that goes",
            kept != 480,
            "480 of 600 are kept at sparsity 0.8: that is the share to prune; True marks what stays",
        )
        report("as many as asked for", kept == 120, f"{kept} of 600 weights are kept at sparsity 0.8, expected 120")
        report(
            "the largest magnitudes stay",
            weight[mask].abs().min() >= weight[~mask].abs().max(),
            "a weight was pruned that is larger than one that stayed: compare magnitudes (weight.abs()) over the whole matrix, not row by row",
        )
        ties = int(candidate(torch.ones(10, 10), 0.3).sum())
        report(
            "equal magnitudes",
            ties == 70,
            f"of 100 equal weights {ties} stayed at sparsity 0.3, expected 70: a threshold takes all or none of them, choose by rank (topk)",
        )
        report(
            "nothing and everything", candidate(weight, 0.0).all() and not candidate(weight, 1.0).any(), "sparsity 0 keeps all, sparsity 1 nothing"
        )


def mask_2_4(candidate) -> None:
    """`mask_2_4(weight)`: bool, two of every four neighbours in a row are kept."""
    with reporting("mask_2_4") as report:
        weight = torch.randn(8, 16)
        mask = candidate(weight)
        report.shape(mask, (8, 16))
        report("a bool mask", mask.dtype == torch.bool, f"the mask has dtype {mask.dtype}: make it torch.bool, True is kept")
        per_group = mask.reshape(-1, 4).sum(1)
        report(
            "two of every four",
            bool((per_group == 2).all()),
            f"a group of four neighbours in a row keeps {[int(n) for n in per_group.unique()]}: 2 each; half of the matrix is not enough, and groups "
            "lie along the last axis",
        )
        groups, kept = weight.abs().reshape(-1, 4), mask.reshape(-1, 4)
        report(
            "the larger two",
            bool((groups.masked_fill(~kept, 99.0).amin(1) >= groups.masked_fill(kept, -1.0).amax(1)).all()),
            "the two that stay are not the larger ones of their four: compare magnitudes, a large negative weight counts",
        )
        report(
            "equal magnitudes",
            bool((candidate(torch.ones(2, 8)).reshape(-1, 4).sum(1) == 2).all()),
            "four equal weights do not keep two: choose by rank (topk), not by a threshold",
        )


def huffman(candidate) -> None:
    """`huffman(counts)`: {symbol: count} -> {symbol: word of "0" and "1"}."""
    with reporting("huffman") as report:
        counts = {"a": 45, "b": 13, "c": 12, "d": 16, "e": 9, "f": 5}
        words = candidate(counts)
        report(
            "a word for every symbol",
            isinstance(words, dict) and set(words) == set(counts) and all(isinstance(w, str) and set(w) <= {"0", "1"} for w in words.values()),
            "return a dict from every symbol to a string of 0 and 1",
        )
        ordered = sorted(words.values())
        clash = next((pair for pair in zip(ordered, ordered[1:]) if pair[1].startswith(pair[0])), None)
        report(
            "no word begins another",
            clash is None,
            f"word {clash and clash[0]!r} is the beginning of {clash and clash[1]!r}, so a decoder cannot tell them apart: put symbols at the "
            "leaves only",
        )
        report(
            "frequent is short",
            len(words["a"]) < len(words["f"]),
            "the most frequent symbol has no shorter word than the rarest: join the two smallest counts, not the two largest",
        )
        draw = torch.randint(1, 1000, (30,)).tolist()
        trials = [counts, dict(enumerate(draw)), {i: 2**i for i in range(12)}, dict.fromkeys(range(16), 7)]
        for trial in trials:
            words = candidate(trial)
            bits, least = sum(len(words[s]) * n for s, n in trial.items()), _least_bits(trial.values())
            report(
                f"shortest for {len(trial)} symbols",
                bits == least,
                f"{len(trial)} symbols need {bits} bits with your code, {least} with the best: after joining two, the sum goes back among the counts",
            )
        entropy = -sum(n / 100 * math.log2(n / 100) for n in counts.values())
        report("within a bit of the entropy", entropy <= _least_bits(counts.values()) / 100 < entropy + 1, "")
        alone = candidate({"x": 9})
        report(
            "one symbol",
            alone in ({"x": "0"}, {"x": "1"}),
            f"a single symbol got the word {alone.get('x')!r}: it needs one bit, or nine of them vanish",
        )
        report("no symbols", candidate({}) == {}, "no counts: return an empty dict")


def _least_bits(counts) -> int:
    counts, total = sorted(counts), 0
    while len(counts) > 1:
        joined = counts[0] + counts[1]
        counts, total = sorted([*counts[2:], joined]), total + joined
    return total
