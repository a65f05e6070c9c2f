"""Paired timings: `python tests/benchmarks/quantization.py [rounds]`. Prints medians of the ratio of ours to the library's, best below 1.

What is compared runs in alternation, so that a busy machine slows both. Needs a few minutes.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import bitsandbytes.functional as library
import torch
from sklearn.cluster import KMeans

from labkit.codebook import kmeans_codebook, nearest_level
from labkit.models import load_encoder
from labkit.nf4 import dequantize_4bit, quantize_4bit
from labkit.pruning import huffman_decode, huffman_encode


def paired(name: str, ours: Callable[[], object], theirs: Callable[[], object], rounds: int) -> None:
    """Print the median of the ratio of seconds, round by round, with the lowest and the highest."""
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    for i in range(rounds + 1):
        for which, call in (("ours", ours), ("theirs", theirs)) if i % 2 else (("theirs", theirs), ("ours", ours)):
            started = time.perf_counter()
            call()
            if i:  # the first round warms up
                seconds[which].append(time.perf_counter() - started)
    ratios = [a / b for a, b in zip(seconds["ours"], seconds["theirs"])]
    ours_ms, theirs_ms = (1000 * statistics.median(seconds[which]) for which in ("ours", "theirs"))
    print(f"{name}: {ours_ms:.0f} ms against {theirs_ms:.0f} ms, ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


def main() -> None:
    """Time everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rounds", type=int, nargs="?", default=7)
    rounds = parser.parse_args().rounds
    matrices = [p.detach() for p in load_encoder().parameters() if p.ndim == 2]
    print(f"{sum(m.numel() for m in matrices):,} weights of the encoder, {torch.get_num_threads()} threads")
    for kind in ("nf4", "fp4"):
        for double in (False, True):

            def ours(kind=kind, double=double):
                return [quantize_4bit(m, kind, double=double) for m in matrices]

            def theirs(kind=kind, double=double):
                return [library.quantize_4bit(m, blocksize=64, quant_type=kind, compress_statistics=double) for m in matrices]

            paired(f"quantize to {kind}{', double' if double else ''}", ours, theirs, rounds)
        mine, its = ours(), theirs()
        paired(
            f"dequantize {kind}, double",
            lambda mine=mine: [dequantize_4bit(q) for q in mine],
            lambda its=its: [library.dequantize_4bit(p, s) for p, s in its],
            rounds,
        )
    torch.manual_seed(0)
    million = 0.05 * torch.randn(1_000_000)
    column = million.view(-1, 1).numpy()
    paired(
        "k-means, 16 levels, a million weights",
        lambda: kmeans_codebook(million, 16),
        lambda: KMeans(16, n_init=1, random_state=0).fit(column),
        min(3, rounds),
    )
    codebook = kmeans_codebook(million, 16)
    inertia = (codebook[nearest_level(million, codebook).long()].double() - million.double()).square().sum().item()
    print(f"inertia: ratio {inertia / KMeans(16, n_init=1, random_state=0).fit(column).inertia_:.6f}")
    codes = nearest_level(million, codebook)
    started = time.perf_counter()
    coded = huffman_encode(codes)
    encoded = time.perf_counter()
    back = huffman_decode(coded)
    decoded = time.perf_counter()
    assert torch.equal(back, codes.long())
    print(f"Huffman, a million codes: encode {encoded - started:.2f} s, decode {decoded - encoded:.2f} s, {8 * coded.nbytes / 1e6:.2f} bits each")


if __name__ == "__main__":
    main()
