"""Muon (Jordan et al. 2024): momentum, then the update of every matrix made orthogonal by a Newton–Schulz iteration."""

from __future__ import annotations

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalize(updates: Tensor, steps: int = 5) -> Tensor:
    """The nearest orthogonal matrix to each of (count, rows, columns), roughly: singular values end between about 0.7 and 1.2.

    Works in the dtype it is given. Matrices of one shape go through together, which keeps small ones fast.
    """
    a, b, c = COEFFICIENTS
    wide = updates.mT if updates.shape[-2] > updates.shape[-1] else updates
    wide = wide / wide.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = wide @ wide.mT
        wide = torch.baddbmm(wide, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide.mT if updates.shape[-2] > updates.shape[-1] else wide


class Muon(torch.optim.Optimizer):
    """Muon for matrices. The step of a matrix has a root mean square of 0.2 x lr, about AdamW's, so that both share a learning rate
    (Liu et al. 2025, arXiv 2502.16982).

    The same mathematics as torch.optim.Muon with adjust_lr_fn="match_rms_adamw", which computes in bf16: on a processor without
    bf16 that is many times slower than the fp32 used here. dtype: of the iteration.
    """

    def __init__(self, params, lr: float = 1e-3, weight_decay: float = 0.1, momentum: float = 0.95, dtype: torch.dtype = torch.float32):
        self.dtype = dtype
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        shapes = [tuple(p.shape) for group in self.param_groups for p in group["params"] if p.ndim != 2]
        if shapes:
            raise ValueError(f"a parameter of shape {shapes[0]}: Muon is for matrices, give the others to AdamW")

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            alike: dict[tuple[int, ...], list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike.setdefault(tuple(parameter.shape), []).append(parameter)
            for (rows, columns), parameters in alike.items():
                updates = torch.stack([self._nesterov(p, group["momentum"]) for p in parameters])
                updates = orthogonalize(updates.to(self.dtype)).to(parameters[0].dtype)
                for parameter, update in zip(parameters, updates):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.sub_(update, alpha=0.2 * max(rows, columns) ** 0.5 * group["lr"])

    def _nesterov(self, parameter: nn.Parameter, momentum: float) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        state["momentum_buffer"].lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(state["momentum_buffer"], momentum)
