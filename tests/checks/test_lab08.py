"""Every check of lab 08 takes a right answer written differently from ours, and turns down wrong ones, each with its own message."""

import re

import pytest
import torch
from sklearn.cluster import KMeans

from labkit.checks import CheckFailed, NotWrittenYet
from labkit.checks import lab08 as check

# ---------------------------------------------------------------- symmetric, affine, per channel


def symmetric(values, bits, *, top=None, absolute=True, rounding=torch.round, guard=True, low=None):
    top = top or 2 ** (bits - 1) - 1
    scale = (values.abs() if absolute else values).max() / top
    if guard and scale == 0:
        scale = torch.ones(())
    return rounding(values / scale).clamp(-top if low is None else low, top), scale


def symmetric_not_rounded(values, bits):
    codes, scale = symmetric(values, bits, rounding=lambda x: x)
    return codes, scale


def symmetric_all_codes(values, bits):
    scale = values.abs().max().clamp(min=1e-9) / (2 ** (bits - 1) - 1)
    return (values / scale).round() - (values == values.min()).float(), scale


def affine(values, bits, *, steps=None, with_zero=True, shift=True, whole=True, low=0, early=False):
    smallest, largest = values.min().item(), values.max().item()
    if with_zero:
        smallest, largest = min(smallest, 0.0), max(largest, 0.0)
    scale = (largest - smallest) / (steps or 2**bits - 1)
    zero_point = -smallest / scale
    zero_point = round(zero_point) if whole else zero_point
    codes = torch.floor(values / scale + 0.5)
    if shift:
        codes = codes + zero_point
    return codes.clamp(low, low + 2**bits - 1), scale, zero_point


def affine_fractional_zero(values, bits):
    codes, scale, zero_point = affine(values, bits)
    return codes, scale, zero_point + 0.25


def affine_zero_moved(values, bits):
    codes, scale, zero_point = affine(values, bits)
    return codes, scale, max(zero_point - 1, 0)


def channels(weight, bits):
    pairs = [symmetric(row, bits) for row in weight]
    return torch.stack([codes for codes, _ in pairs]), torch.stack([scale.view(1) for _, scale in pairs])


def channels_one_scale(weight, bits):
    codes, scale = symmetric(weight, bits)
    return codes, scale.expand(len(weight), 1)


def channels_of_columns(weight, bits):
    codes, scale = channels(weight.T, bits)
    return codes.T, scale


def channels_scaled_by_the_whole(weight, bits):
    _, scale = channels(weight, bits)
    return symmetric(weight, bits)[0], scale


def channels_nan(weight, bits):
    scale = weight.abs().amax(1, keepdim=True) / 127
    return (weight / scale).round(), scale


def channels_not_rounded(weight, bits):
    codes, scale = channels(weight, bits)
    return codes + 0.1, scale


# ---------------------------------------------------------------- k-means


def right_codebook(values, size):
    size_found = min(size, len(values.unique()))
    centres = KMeans(size_found, n_init=10, random_state=0).fit(values.view(-1, 1).numpy()).cluster_centers_
    return torch.tensor(centres.ravel(), dtype=torch.float32).sort().values


def lloyd(values, centres, rounds, *, middle="mean", keep=True):
    for _ in range(rounds):
        nearest = (values[:, None] - centres).abs().argmin(1)
        moved = []
        for i in range(len(centres)):
            part = values[nearest == i]
            if len(part) == 0 and keep:
                moved.append(centres[i])
            else:
                moved.append(part.mean() if middle == "mean" else part.median() if middle == "median" else (part.max() + part.min()) / 2)
        centres = torch.stack(moved)
    return centres


def quantile_start(values, size):
    return values.quantile((torch.arange(size) + 0.5) / size)


def codebook_unsorted(values, size):
    return right_codebook(values, size).flip(0)


def codebook_from_copies(values, size):
    return lloyd(values, values[:1].expand(size).clone(), 5).sort().values


def codebook_nan(values, size):
    return lloyd(values, torch.linspace(-100, 100, size), 3, keep=False)


def codebook_nan_for_few(values, size):
    return right_codebook(values, size) if len(values.unique()) > size else torch.full((size,), torch.nan)


def codebook_medians(values, size):
    return lloyd(values, quantile_start(values, size), 60, middle="median").sort().values


def codebook_of_quantiles(values, size):
    return right_codebook(values, size) if size == 4 else quantile_start(values, size)


def codebook_two_rounds_from_equal_steps(values, size):
    if size == 4:
        return right_codebook(values, size)
    return lloyd(values, torch.linspace(values.min(), values.max(), size), 2).sort().values


def codebook_middles(values, size):
    return lloyd(values, quantile_start(values, size), 60, middle="middle").sort().values


# ---------------------------------------------------------------- straight-through


class Rounded(torch.autograd.Function):
    factor, masked, blocked = 1.0, True, False

    @classmethod
    def make(cls, **settings):
        kind = type("Rounded", (cls,), settings)
        return lambda values, scale, bits: kind.apply(values, scale, bits, kind)

    @staticmethod
    def forward(ctx, values, scale, bits, kind):
        top = 2 ** (bits - 1) - 1
        ctx.kind, ctx.inside = kind, (values / scale).abs() <= top + 0.5
        return (values / scale).round().clamp(-top, top) * scale

    @staticmethod
    def backward(ctx, gradient):
        if ctx.kind.blocked:
            gradient = gradient * 0
        return gradient * ctx.kind.factor * (ctx.inside if ctx.kind.masked else 1.0), None, None, None


def detach_trick(values, scale, bits):
    top = 2 ** (bits - 1) - 1
    clipped = values.clamp(-(top + 0.49) * scale, (top + 0.49) * scale)
    return clipped + ((clipped / scale).round() * scale - clipped).detach()


def not_clipped(values, scale, bits):
    return values + ((values / scale).round() * scale - values).detach()


def not_scaled(values, scale, bits):
    top = 2 ** (bits - 1) - 1
    return values + (values.round().clamp(-top, top) - values).detach()


def plain_rounding(values, scale, bits):
    top = 2 ** (bits - 1) - 1
    return (values / scale).round().clamp(-top, top) * scale


def detached(values, scale, bits):
    return plain_rounding(values.detach(), scale, bits)


# ---------------------------------------------------------------- masks


def right_magnitude(weight, sparsity):
    keep = weight.numel() - round(sparsity * weight.numel())
    mask = torch.zeros(weight.numel(), dtype=torch.bool)
    mask[weight.abs().flatten().topk(keep).indices] = True
    return mask.view(weight.shape)


def magnitude_inverted(weight, sparsity):
    return ~right_magnitude(weight, sparsity)


def magnitude_signed(weight, sparsity):
    return right_magnitude(weight - weight.min() if weight.min() < 0 else weight, sparsity)


def magnitude_by_rows(weight, sparsity):
    return torch.stack([right_magnitude(row, sparsity) for row in weight])


def magnitude_threshold(weight, sparsity):
    if sparsity in (0.0, 1.0):
        return torch.full_like(weight, sparsity == 0.0, dtype=torch.bool)
    return weight.abs() > weight.abs().flatten().sort().values[round(sparsity * weight.numel()) - 1]


def magnitude_in_place(weight, sparsity):
    mask = right_magnitude(weight, sparsity)
    weight.mul_(mask)
    return mask


def magnitude_off_by_some(weight, sparsity):
    return right_magnitude(weight, sparsity * 0.9)


def right_2_4(weight):
    rows = []
    for row in weight.tolist():
        kept = []
        for start in range(0, len(row), 4):
            four = [abs(v) for v in row[start : start + 4]]
            best = sorted(range(4), key=lambda i: (-four[i], i))[:2]
            kept += [i in best for i in range(4)]
        rows.append(kept)
    return torch.tensor(rows)


def signed_2_4(weight):
    return right_2_4(weight - weight.min())


def threshold_2_4(weight):
    groups = weight.abs().reshape(-1, 4)
    return (groups > groups.sort(1).values[:, 1:2]).view(weight.shape)


# ---------------------------------------------------------------- Huffman


class Node:
    def __init__(self, count, symbol=None, children=()):
        self.count, self.symbol, self.children = count, symbol, children


def tree(counts, *, pick=lambda nodes: sorted(nodes, key=lambda n: n.count), alone="0", sum_goes_back=True):
    if not counts:
        return {}
    nodes = [Node(count, symbol) for symbol, count in counts.items()]
    if len(nodes) == 1:
        return {nodes[0].symbol: alone}
    while len(nodes) > 1:
        first, second, *rest = pick(nodes)
        nodes = [*rest, Node(first.count + second.count if sum_goes_back else 0, None, (first, second))]
    words = {}

    def walk(node, word):
        if node.children:
            for bit, child in zip("01", node.children):
                walk(child, word + bit)
        else:
            words[node.symbol] = word

    walk(nodes[0], "")
    return words


def binary_numbers(counts):
    return {symbol: f"{i:b}" for i, symbol in enumerate(sorted(counts, key=counts.get, reverse=True))}


def fixed_length(counts):
    size = max(1, (len(counts) - 1).bit_length())
    return {symbol: f"{i:0{size}b}" for i, symbol in enumerate(counts)}


def shannon_fano(counts):
    """Halves by count, from the top: prefix-free, and not the shortest."""

    def split(items, word):
        if len(items) == 1:
            return {items[0][0]: word or "0"}
        total, running, cut = sum(n for _, n in items), 0, 1
        for i, (_, n) in enumerate(items[:-1], 1):
            running += n
            cut = i
            if running * 2 >= total:
                break
        return split(items[:cut], word + "0") | split(items[cut:], word + "1")

    return split(sorted(counts.items(), key=lambda item: -item[1]), "") if counts else {}


RIGHT = {
    check.quantize_symmetric: symmetric,
    check.quantize_affine: affine,
    check.quantize_per_channel: channels,
    check.kmeans_codebook: right_codebook,
    check.straight_through: Rounded.make(),
    check.magnitude_mask: right_magnitude,
    check.mask_2_4: right_2_4,
    check.huffman: tree,
}


def variant(function, **options):
    return lambda *args: function(*args, **options)


WRONG = {
    check.quantize_symmetric: {
        "not rounded": (symmetric_not_rounded, "codes are not whole numbers"),
        "without abs": (variant(symmetric, absolute=False), "the largest magnitude (here of a negative value)"),
        "2**bits levels": (lambda v, b: symmetric(v, b, top=2 ** (b - 1)), "over the largest code, 2**(bits - 1) - 1 = 7"),
        "one code more below": (symmetric_all_codes, "clamp both sides alike"),
        "cuts off": (variant(symmetric, rounding=torch.trunc), "round to the nearest code, do not cut"),
        "always 4 bits": (lambda v, b: symmetric(v, 4), "with 8 bits the largest code is 127"),
        "nan": (variant(symmetric, guard=False), "a scale of 0 divides by zero"),
    },
    check.quantize_affine: {
        "16 steps": (lambda v, b: affine(v, b, steps=2**b), "over 2**bits - 1 = 15 steps"),
        "signed codes": (lambda v, b: affine(v, b, low=-(2 ** (b - 1))), "expected 0 to 15"),
        "not shifted": (variant(affine, shift=False), "add the zero point, then clamp"),
        "fractional zero point": (affine_fractional_zero, "a whole number that is itself a code"),
        "zero moved": (affine_zero_moved, "its code must be the zero point"),
        "without zero": (variant(affine, with_zero=False), "let the range include 0"),
        "not rounded": (lambda v, b: (affine(v, b)[0] + 0.3, *affine(v, b)[1:]), "codes are not whole numbers"),
    },
    check.quantize_per_channel: {
        "one scale": (channels_one_scale, "the largest magnitude along a row (axis 1)"),
        "columns": (channels_of_columns, "the answer has shape (40, 1), expected (6, 1)"),
        "flat scales": (lambda w, b: (channels(w, b)[0], channels(w, b)[1].view(-1)), "the answer has shape (6,), expected (6, 1)"),
        "codes of one scale": (channels_scaled_by_the_whole, "divide each row by its own scale"),
        "not rounded": (channels_not_rounded, "round, then clamp"),
        "nan": (channels_nan, "a row of zeros came back as nan"),
    },
    check.kmeans_codebook: {
        "unsorted": (codebook_unsorted, "sort the levels"),
        "copies of one value": (codebook_from_copies, "start from quantiles (or k-means++)"),
        "nan": (codebook_nan, "the mean of a cluster without values is 0 / 0"),
        "nan for few values": (codebook_nan_for_few, "leave empty clusters alone"),
        "medians": (codebook_medians, "a level is the median of"),
        "quantiles only": (codebook_of_quantiles, "assign and take means until nothing moves"),
        "stops early": (codebook_two_rounds_from_equal_steps, "assign and take means until nothing moves"),
        "middles": (codebook_middles, "a level is the middle of"),
        "equal steps": (lambda v, n: torch.linspace(v.min(), v.max(), n), "start from quantiles (or k-means++)"),
        "too many": (lambda v, n: torch.linspace(-1, 1, n + 1), "the answer has shape (5,), expected (4,)"),
    },
    check.straight_through: {
        "not scaled": (not_scaled, "divide by scale, round, multiply by scale"),
        "not clipped": (not_clipped, "clamp to -7 and 7"),
        "detached": (detached, "do not detach it"),
        "plain rounding": (plain_rounding, "because rounding is flat"),
        "blocked": (Rounded.make(blocked=True), "because rounding is flat"),
        "times scale": (Rounded.make(factor=0.5), "pass it on unchanged, no factor"),
        "gradient when clipped": (Rounded.make(masked=False), "set the gradient to 0 where you clip"),
    },
    check.magnitude_mask: {
        "inverted": (magnitude_inverted, "True marks what stays"),
        "signed": (magnitude_signed, "compare magnitudes (weight.abs())"),
        "by rows": (magnitude_by_rows, "over the whole matrix, not row by row"),
        "threshold": (magnitude_threshold, "a threshold takes all or none"),
        "in place": (magnitude_in_place, "only return the mask"),
        "too many stay": (magnitude_off_by_some, "expected 120"),
        "floats": (lambda w, s: right_magnitude(w, s).float(), "a comparison gives torch.bool"),
    },
    check.mask_2_4: {
        "half of all": (lambda w: right_magnitude(w, 0.5), "half of the matrix is not enough"),
        "along columns": (lambda w: right_2_4(w.T).T, "groups lie along the last axis"),
        "signed": (signed_2_4, "a large negative weight counts"),
        "threshold": (threshold_2_4, "choose by rank (topk)"),
        "floats": (lambda w: right_2_4(w).float(), "make it torch.bool"),
    },
    check.huffman: {
        "binary numbers": (binary_numbers, "a decoder cannot tell them apart"),
        "fixed length": (fixed_length, "no shorter word than the rarest"),
        "joins the largest": (variant(tree, pick=lambda nodes: sorted(nodes, key=lambda n: -n.count)), "not the two largest"),
        "top down": (shannon_fano, "the sum goes back among the counts"),
        "sum forgotten": (variant(tree, sum_goes_back=False), "the sum goes back among the counts"),
        "empty word": (variant(tree, alone=""), "it needs one bit"),
        "numbers": (lambda counts: {s: int(w, 2) for s, w in tree(counts).items()}, "a string of 0 and 1"),
    },
}


@pytest.mark.parametrize("checker", RIGHT, ids=lambda c: c.__name__)
def test_takes_a_right_answer_written_differently(checker, capsys):
    checker(RIGHT[checker])
    assert capsys.readouterr().out.count("✓") >= 5


def test_takes_the_detach_trick_too():
    check.straight_through(detach_trick)


@pytest.mark.parametrize(
    ("checker", "wrong"), [(c, name) for c, answers in WRONG.items() for name in answers], ids=lambda x: getattr(x, "__name__", x)
)
def test_turns_down_a_wrong_answer_with_its_own_message(checker, wrong):
    candidate, advice = WRONG[checker][wrong]
    with pytest.raises(CheckFailed, match="(?s).*" + re.escape(advice)):
        checker(candidate)


@pytest.mark.parametrize("checker", RIGHT, ids=lambda c: c.__name__)
def test_says_not_written_yet_without_a_traceback(checker):
    def stub(*args, **kwargs):
        raise NotImplementedError

    with pytest.raises(NotWrittenYet, match="not written yet") as caught:
        checker(stub)
    assert caught.value._render_traceback_() == [f"○ {caught.value}"]


def test_labkits_own_versions_pass():
    from labkit import codebook, pruning, quantization

    def ours(values, bits, **options):
        quantized = quantization.quantize_uniform(values, bits, **options)
        return quantized.codes, quantized.scale

    def affine_of_ours(values, bits):
        quantized = quantization.quantize_uniform(values, bits, symmetric=False)
        return quantized.codes, quantized.scale, quantized.zero_point

    def words(counts):
        numbers = {symbol: i for i, symbol in enumerate(counts)}
        found = pruning.canonical_words(pruning.huffman_lengths({numbers[s]: n for s, n in counts.items()}))
        return {symbol: found[i] for symbol, i in numbers.items()}

    check.quantize_symmetric(ours)
    check.quantize_affine(affine_of_ours)
    check.quantize_per_channel(variant(ours, axis=0))
    check.kmeans_codebook(codebook.kmeans_codebook)
    check.magnitude_mask(pruning.magnitude_mask)
    check.mask_2_4(pruning.mask_2_4)
    check.huffman(words)
