"""A running training's state in one safetensors file, written whole or not at all. No pickle."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from labkit.files import whole_file

Optimizers = torch.optim.Optimizer | Sequence[torch.optim.Optimizer]


def save_checkpoint(path: Path, model: nn.Module, optimizer: Optimizers, best: dict[str, Tensor] | None, state: dict) -> None:
    """Write model, optimizer or optimizers, best weights, the random generators' states and `state` (plain JSON) to `path`."""
    from safetensors.torch import save_file

    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    tensors |= {f"best.{name}": tensor for name, tensor in (best or {}).items()}
    for prefix, one in _by_prefix(optimizer):
        for index, slots in one.state_dict()["state"].items():
            tensors |= {f"{prefix}{index}.{name}": value for name, value in slots.items()}
    tensors["rng.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    # Clones, because safetensors refuses tensors that share memory (tied weights).
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    with whole_file(Path(path)) as part:
        save_file(tensors, part, metadata={"state": json.dumps(state)})


def load_checkpoint(path: Path, model: nn.Module, optimizer: Optimizers, settings: dict) -> tuple[dict, dict[str, Tensor] | None]:
    """Put back what `save_checkpoint` wrote; return its `state` and the best weights.

    Raises ValueError naming the first setting that differs from the interrupted run's, or that the file is not a checkpoint.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            state = json.loads((file.metadata() or {}).get("state", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no dict)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a checkpoint ({error}): delete it and start again") from error
    if not state:
        raise ValueError(f"{path} holds weights but no training state: delete it and start again")
    for name, value in settings.items():
        if state["settings"].get(name) != value:
            raise ValueError(
                f"the run in {path} had {name} {state['settings'].get(name)!r}, this one has {value!r}: "
                "use the same setting to go on, or delete the file to start again"
            )

    def part(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

    model.load_state_dict(part("model."))
    for prefix, one in _by_prefix(optimizer):
        slots: dict[int, dict[str, Tensor]] = {}
        for name, tensor in part(prefix).items():
            index, slot = name.split(".", 1)
            slots.setdefault(int(index), {})[slot] = tensor
        one.load_state_dict({"state": slots, "param_groups": one.state_dict()["param_groups"]})
    torch.set_rng_state(tensors["rng.cpu"])
    if "rng.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng.cuda"])
    return state, part("best.") or None


def _by_prefix(optimizer: Optimizers) -> list[tuple[str, torch.optim.Optimizer]]:
    """Each optimizer with the prefix of its tensors' names: `optimizer.`, then `optimizer1.` and so on."""
    optimizers = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else list(optimizer)
    return [(f"optimizer{number or ''}.", one) for number, one in enumerate(optimizers)]
