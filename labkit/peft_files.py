"""LoRA in the files of the library `peft`: adapter_config.json with the settings, adapter_model.safetensors with A, B and the heads."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from labkit.lora import HEADS, install, linear_layers, lora_layers, lora_state_dict, refuse_lora, sizes_of, some_of

WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."  # of every name in peft's files
# A setting with another value than one of these makes peft compute something that LoRALinear does not.
PLAIN = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),  # the other ways to begin change the base's weights
}
MUST_BE_OFF = ("use_dora", "use_qalora", "use_bdlora", "lora_bias", "layer_replication", "target_parameters", "trainable_token_indices")
MUST_BE_OFF += ("alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config", "velora_config")


def save_peft(model: nn.Module, folder: Path, *, base_name: str | None = None, heads: Iterable[str] = HEADS) -> None:
    """Write a model's LoRA, and its heads where it has some, into `folder`, each file whole or not at all.

    base_name: the base's name on the Hub or of its package, for whoever loads it. Raises ValueError as `peft_settings` does.
    """
    from safetensors.torch import save_file

    text = json.dumps(peft_settings(model, base_name=base_name, heads=heads), indent=2, sort_keys=True) + "\n"
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".lora-", dir=folder) as parts:
        save_file(peft_tensors(model, heads=heads), Path(parts) / WEIGHTS, metadata={"format": "pt"})
        (Path(parts) / SETTINGS).write_text(text, encoding="utf-8", newline="\n")
        for name in (WEIGHTS, SETTINGS):
            os.replace(Path(parts) / name, folder / name)


def peft_tensors(model: nn.Module, *, heads: Iterable[str] = HEADS) -> dict[str, Tensor]:
    """A, B and the heads under peft's names."""
    state = lora_state_dict(model, heads=heads)
    return {PREFIX + re.sub(r"\.lora_([AB])$", r".lora_\1.weight", name): tensor.contiguous() for name, tensor in state.items()}


def peft_settings(model: nn.Module, *, base_name: str | None = None, heads: Iterable[str] = HEADS) -> dict:
    """What peft's LoraConfig has to say to make these layers again. Layers of another rank or alpha are listed in patterns.

    Raises ValueError when layers differ in dropout or rslora, which peft has once for all of them.
    """
    layers = lora_layers(model)
    kinds = {(layer.rslora, getattr(layer.dropout, "p", 0.0)) for layer in layers.values()}
    if len(kinds) > 1:
        raise ValueError(f"layers differ in (rslora, dropout): {sorted(kinds)}; peft has one of each for all layers, give them the same")
    ((rslora, dropout),) = kinds
    rank, alpha = (Counter(values).most_common(1)[0][0] for values in zip(*((layer.rank, layer.alpha) for layer in layers.values())))
    ends = {name.rpartition(".")[2] for name in layers}
    by_end = {name for name in [*layers, *linear_layers(model)] if name.rpartition(".")[2] in ends}
    saved = sorted({part for name, _ in model.named_parameters() for part in name.split(".") if part in set(heads)})
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if saved and hasattr(model, "config") else None,
        "base_model_name_or_path": base_name,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: layer.rank for name, layer in layers.items() if layer.rank != rank},
        "alpha_pattern": {name: layer.alpha for name, layer in layers.items() if layer.alpha != alpha},
        "lora_dropout": dropout,
        "use_rslora": rslora,
        "target_modules": sorted(ends if by_end == layers.keys() else layers),
        "modules_to_save": saved or None,
        "fan_in_fan_out": any(hasattr(layer.base, "nx") for layer in layers.values()),
        "bias": "none",
        "init_lora_weights": True,
        "inference_mode": True,
    }


def load_peft(model: nn.Module, folder: Path) -> list[str]:
    """Inject the LoRA of a folder, written by peft or by `save_peft`, and load it and its heads. Returns the names of the layers.

    Raises FileNotFoundError when a file is missing, ValueError when the folder holds anything but plain LoRA or does not fit the model.
    The model is then as it was.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    for name in (WEIGHTS, SETTINGS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{name} is not in {folder}: peft writes both {SETTINGS} and {WEIGHTS}")
    settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    _refuse_other_methods(settings, folder)
    state = {re.sub(r"(\.lora_[AB])\.weight$", r"\1", name.removeprefix(PREFIX)): tensor for name, tensor in load_file(folder / WEIGHTS).items()}
    options = {}
    for name in (name.removesuffix(".lora_A") for name in state if name.endswith(".lora_A")):
        rank, alpha = len(state[f"{name}.lora_A"]), _by_pattern(settings.get("alpha_pattern"), name, settings["lora_alpha"])
        options[name] = {"rank": rank, "alpha": alpha, "dropout": settings.get("lora_dropout", 0.0), "rslora": settings.get("use_rslora", False)}
    _check_fit(model, state, options)
    options = {name: options[name] for name in linear_layers(model) if name in options}  # in the model's order; the file's is the alphabet's
    install(model, options, settings.get("modules_to_save") or ())
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in state.items():
            parameters[name].copy_(tensor)
    return list(options)


def _refuse_other_methods(settings: dict, folder: Path) -> None:
    for name, allowed in PLAIN.items():
        if settings.get(name, allowed[0]) not in allowed:
            raise ValueError(f"{folder.name} has {name} {settings[name]!r}, and this reads plain LoRA ({allowed[0]!r}): load it with peft")
    for name in MUST_BE_OFF:
        if settings.get(name):
            raise ValueError(f"{folder.name} uses {name}, and this reads plain LoRA: load it with peft")


def _check_fit(model: nn.Module, state: dict[str, Tensor], options: dict[str, dict]) -> None:
    """Every tensor of the file must have its place in the model."""
    refuse_lora(model)
    linears, places = linear_layers(model), {name: tuple(p.shape) for name, p in model.named_parameters()}
    for name, chosen in options.items():
        if name not in linears:
            raise ValueError(f"the file has LoRA on {name}, and {type(model).__name__} has no such linear layer, but {some_of(linears)}")
        in_features, out_features = sizes_of(linears[name])
        places |= {f"{name}.lora_A": (chosen["rank"], in_features), f"{name}.lora_B": (out_features, chosen["rank"])}
    for name in options.keys() | {name.removesuffix(".lora_B") for name in state if name.endswith(".lora_B")}:
        for part in ("lora_A", "lora_B"):
            if f"{name}.{part}" not in state:
                raise ValueError(f"the file has only one of the two matrices of {name}, {part} is missing: it is damaged")
    for name, tensor in state.items():
        if tuple(tensor.shape) != places.get(name):
            raise ValueError(
                f"the file has {name} of shape {tuple(tensor.shape)}, in the model it is {places.get(name, 'nowhere')}: load the same base"
            )


def _by_pattern(patterns: dict | None, name: str, default: float) -> float:
    """A layer's own value, where a pattern matches the end of its name, as peft looks it up."""
    return next((value for pattern, value in (patterns or {}).items() if re.match(rf"(.*\.)?({pattern})$", name)), default)
