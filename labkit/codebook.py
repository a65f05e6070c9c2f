"""Quantization with unevenly spaced levels: a codebook by k-means, or powers of two. Lab 08 builds the parts."""

from __future__ import annotations

import torch
from torch import Tensor

STARTS = ("cells", "quantile", "k-means++")
CELLS = 1024


def nearest_level(values: Tensor, levels: Tensor) -> Tensor:
    """The number of the nearest of the rising `levels` for each value, in uint8 (up to 256 levels) or int32; halfway, the lower one."""
    if levels.ndim != 1 or len(levels) == 0 or (levels.diff() < 0).any():
        raise ValueError(f"levels of shape {tuple(levels.shape)} must be one rising row: sort them")
    codes = torch.bucketize(values.detach().to(levels.dtype), (levels[:-1] + levels[1:]) / 2, out_int32=True)
    return codes.to(torch.uint8) if len(levels) <= 256 else codes


def power_of_two_levels(values: Tensor, bits: int) -> Tensor:
    """(2**bits - 1,) fp32, rising: 0 and powers of two of either sign, so that multiplying becomes a shift.

    The largest is 2**floor(log2(4/3 max|value|)), that is the power nearest to the largest value (Zhou et al. 2017, arXiv 1702.03044).
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"bits is {bits}: choose 2 to 8")
    largest = _finite(values).abs().max()
    top = torch.log2(4 / 3 * largest).floor() if largest > 0 else torch.zeros_like(largest)
    powers = torch.exp2(top - torch.arange(2 ** (bits - 1) - 1, device=values.device))
    return torch.cat([-powers, powers.new_zeros(1), powers.flip(0)])


class _Line:
    """Numbers on a line, sorted once. The sum of any stretch of them is then the difference of two running sums."""

    def __init__(self, values: Tensor):
        self.points, counts = values.double().unique(return_counts=True)
        self.weights = counts.double()
        zero = self.points.new_zeros(1)
        self.running = [torch.cat([zero, (self.weights * self.points**power).cumsum(0)]) for power in (0, 1, 2)]

    def stretches(self, edges: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """How many values lie between neighbouring edges (positions in `points`), their sum and the sum of their squares."""
        count, total, squares = (sums[edges].diff() for sums in self.running)
        return count, total, squares

    def lloyd(self, centres: Tensor, max_iterations: int) -> tuple[Tensor, float]:
        """Lloyd's iteration until nothing moves: centres, and the inertia of the last assignment."""
        for _ in range(max_iterations):
            inner = torch.searchsorted(self.points, (centres[:-1] + centres[1:]) / 2, right=True)
            edges = torch.cat([inner.new_zeros(1), inner, inner.new_tensor([len(self.points)])])
            count, total, squares = self.stretches(edges)
            moved = torch.where(count > 0, total / count.clamp(min=1), centres)  # a cluster without values stays where it is
            if torch.equal(moved, centres):
                break
            centres = moved
        return centres, (squares - 2 * centres * total + centres.square() * count).sum().item()

    def quantiles(self, size: int) -> Tensor:
        """`size` centres with the same number of values around each; among the distinct values where many are equal."""
        ranks = (torch.arange(size, dtype=torch.float64) + 0.5) / size
        chosen = torch.searchsorted(self.running[0][1:], ranks * self.running[0][-1])
        return self.points[chosen if len(chosen.unique()) == size else (ranks * len(self.points)).long()]

    def plus_plus(self, size: int, generator: torch.Generator) -> Tensor:
        """`size` centres, each drawn with probability proportional to the squared distance to the nearest one drawn before."""
        points, weights = self.points, self.weights
        if len(points) > (most := max(1 << 14, 4 * size)):  # a sample is enough to start from
            chosen = torch.randperm(len(points), generator=generator)[:most]
            points, weights = points[chosen], weights[chosen]
        centres = points[torch.multinomial(weights, 1, generator=generator)]
        distance = (points - centres).square()
        for _ in range(size - 1):
            centres = torch.cat([centres, points[torch.multinomial(weights * distance, 1, generator=generator)]])
            distance = torch.minimum(distance, (points - centres[-1]).square())
        return centres.sort().values

    def cells(self, size: int, most: int = CELLS) -> Tensor:
        """`size` centres that are the best possible where clusters are made of whole cells, by dynamic programming (Wang and Song 2011).

        With up to `most` distinct values each is a cell, and the answer is the optimum. Else half of the cells hold equally many values
        and half are equally wide, so that neither the middle nor the tails are coarse.
        """
        count = len(self.points)
        if count <= most:
            edges = torch.arange(count + 1)
        else:
            parts = torch.linspace(0, 1, max(most, 4 * size) // 2 + 1, dtype=torch.float64)
            wide = torch.searchsorted(self.points, self.points[0] + parts * (self.points[-1] - self.points[0]))
            edges = torch.cat([(parts * count).long(), wide, torch.tensor([0, count])]).unique()
        number, total, squares = (sums[edges] for sums in self.running)
        # cost[i, j]: the inertia of one cluster from edge i to edge j
        sums = total[None, :] - total[:, None]
        cost = squares[None, :] - squares[:, None] - sums.square() / (number[None, :] - number[:, None]).clamp(min=1)
        cost = cost.clamp(min=0).masked_fill(torch.ones_like(cost).tril().bool(), torch.inf)
        least, back = cost[0], []
        for _ in range(size - 1):
            least, start = (least[:, None] + cost).min(0)
            back.append(start)
        ends = [len(edges) - 1]
        for start in reversed(back):
            ends.append(int(start[ends[-1]]))
        count, total, _ = self.stretches(edges[torch.tensor([0, *reversed(ends)])])
        return total / count


def kmeans_codebook(values: Tensor, size: int, *, start: str = "cells", seed: int = 0, max_iterations: int = 300) -> Tensor:
    """A codebook of `size` levels by k-means (Lloyd 1982), rising, fp32: the weight clustering of Han et al. 2016 (arXiv 1510.00149).

    Numbers on a line are sorted once; after that an iteration costs `size` binary searches instead of a pass over the values.
    start: "quantile" has equally many values around each centre; "k-means++" draws far-apart ones (Arthur and Vassilvitskii 2007), from
    `seed`; "cells" is near the optimum from the beginning, where the other two may end in a poorer local one.
    With fewer distinct values than `size` the codebook is those values. Raises ValueError for an unknown start and for values that are
    empty or not finite.
    """
    if size < 1 or start not in STARTS:
        raise ValueError(f"size is {size} and start {start!r}: choose a size of at least 1 and one of {', '.join(STARTS)}")
    line = _Line(_finite(values).reshape(-1).cpu())
    if len(line.points) <= size:
        return line.points.float().to(values.device)
    if start == "quantile":
        centres = line.quantiles(size)
    elif start == "k-means++":
        centres = line.plus_plus(size, torch.Generator().manual_seed(seed))
    else:
        centres = line.cells(size)
    return line.lloyd(centres, max_iterations)[0].float().to(values.device)


def _finite(values: Tensor) -> Tensor:
    values = values.detach().float()
    if values.numel() == 0 or not values.isfinite().all():
        raise ValueError(f"values of shape {tuple(values.shape)} are empty or hold nan or infinity: quantize finite numbers only")
    return values
