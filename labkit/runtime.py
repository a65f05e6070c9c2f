"""`start()`: seed, device, dtype, profile and quiet logs, in one call at the top of a lab; and the `Lab` it returns."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import labkit
from labkit.claims import check_claim
from labkit.files import write_text

if TYPE_CHECKING:
    import torch


def start(name: str) -> Lab:
    """Seed everything, choose device and dtype, quieten known messages, keep freed memory, print three lines on what runs where.

    name: the notebook's name without its ending, for example "03_finetuning_pytorch".
    Settings come from the environment: LABKIT_SEED (0), LABKIT_DTYPE (bf16 autocast where the device is faster in it, else fp32),
    LABKIT_DEVICE (cuda if there is one, else cpu). Raises ValueError when one of them cannot be read.
    """
    import torch

    quiet_libraries()
    keep_freed_memory()
    seed = _seed_from_environment()
    device = choose_device()
    dtype = choose_dtype(device)
    seed_everything(seed)
    lab = Lab(name=name, profile=labkit.PROFILE, seed=seed, device=device, dtype=dtype)
    threads = torch.get_num_threads()
    print(f"{name}: profile {lab.profile}, seed {seed}")
    print(f"device {lab.device_name()}, autocast {str(dtype).removeprefix('torch.')}, {threads} thread{'s' * (threads != 1)}")
    print(", ".join(f"{package} {version}" for package, version in versions().items()))
    return lab


@dataclass
class Lab:
    """What a notebook knows about this run. Made by `start`."""

    name: str
    profile: str
    seed: int
    device: torch.device
    dtype: torch.dtype
    claims: dict[str, dict] = field(default_factory=dict)
    headline: str = ""
    started: float = field(default_factory=time.monotonic)

    def pick(self, *, offline: Any, hub: Any) -> Any:
        """The value for the profile in force: a budget, a batch size, a number of rows."""
        return hub if self.profile == "hub" else offline

    def claim(self, text: str, holds: bool, **measured: float) -> None:
        """Check a sentence against what was measured: print `✓ text`, or raise ClaimFailed with the values.

        Running the cell again replaces the claim's earlier record.
        """
        self.claims.pop(text, None)
        self.claims[text] = check_claim(text, holds, measured)
        self._write_record()

    def report(self, headline: str) -> None:
        """Print every claim of this run with its measured values, and record the headline for the table of labs.

        headline: the lab's main result in one line, made from this run's numbers.
        """
        self.headline = headline
        for record in self.claims.values():
            shown = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in record["measured"].items())
            print(f"✓ {record['claim']}\n    {shown}")
        minutes = (time.monotonic() - self.started) / 60
        count = "1 claim holds" if len(self.claims) == 1 else f"{len(self.claims)} claims hold"
        print(f"{count}; {minutes:.1f} minutes since the start, peak memory {peak_memory_bytes() / 1e9:.1f} GB")
        self._write_record()

    def autocast(self) -> contextlib.AbstractContextManager:
        """The autocast context for a forward pass: bf16 where it pays, nothing in fp32."""
        import torch

        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def device_name(self) -> str:
        """A short name of the device, for example `cpu (AMD EPYC, 2 cores)`."""
        import torch

        if self.device.type == "cuda":
            return f"cuda ({torch.cuda.get_device_name(self.device)})"
        model = torch.cpu.get_capabilities().get("cpu_name") or platform.machine()
        return f"{self.device.type} ({model}, {os.cpu_count()} cores)"

    def _write_record(self) -> None:
        """Write what was claimed so far to LABKIT_RECORD, where `python -m labkit run` reads it."""
        path = os.environ.get("LABKIT_RECORD")
        if not path:
            return
        record = {
            "lab": self.name,
            "profile": self.profile,
            "seed": self.seed,
            "device": self.device_name(),
            "dtype": str(self.dtype).removeprefix("torch."),
            "versions": versions(),
            "peak_memory_bytes": peak_memory_bytes(),
            "headline": self.headline,
            "claims": list(self.claims.values()),
        }
        write_text(Path(path), json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's global generators (CPU and CUDA)."""
    import random

    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide a lab's numbers."""
    from importlib.metadata import version

    packages = ("torch", "transformers", "datasets", "peft")
    return {"python": platform.python_version()} | {package: version(package) for package in packages}


def peak_memory_bytes() -> int:
    """The largest resident memory of this process so far, in bytes."""
    import psutil

    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def keep_freed_memory() -> bool:
    """Let the C library keep up to 512 MiB that tensors have freed, for the next ones. Returns whether it could be asked to.

    PyTorch frees a CPU tensor to the C library, and glibc soon gives the pages back to the system. The next step of a training gets
    them anew, and waits while they are zeroed. Blocks above 32 MiB still go back at once, so that large tensors leave no holes behind.
    Does nothing without glibc (macOS, Windows, musl). Source: mallopt(3); measured by tests/benchmarks/freed_memory.py.
    """
    import ctypes

    if platform.libc_ver()[0] != "glibc":
        return False
    trim_threshold, mmap_threshold = -1, -3  # their numbers in glibc's malloc.h
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(mmap_threshold, 32 * 2**20) and mallopt(trim_threshold, 512 * 2**20))


def quiet_libraries() -> None:
    """Switch off, by name, the messages that say nothing to a learner. Warnings of every other kind stay on.

    - transformers' progress bar over weight shards, and its report that a classification head is new: `models` checks the
      missing weights itself and raises when one is missing that should not be.
    - datasets' progress bars (reading 1,200 rows).
    - a deprecation that peft 0.21 meets inside transformers 5.23 whenever it wraps a model; nothing a learner could change.
    - what bitsandbytes says in every step of an int8 layer on bf16 input: that it computes in fp16.
    - what PyTorch 2.13 says of its int8 layers and its sparse matrices: that they are to be replaced, or new. Lab 08 says so in its text.
    """
    import logging
    import warnings

    import datasets
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    for logger in ("transformers.modeling_utils", "transformers.utils.loading_report"):
        target = logging.getLogger(logger)
        if not any(getattr(f, "__name__", "") == "_not_a_load_report" for f in target.filters):
            target.addFilter(_not_a_load_report)
    logging.getLogger("bitsandbytes.autograd._functions").addFilter(_not_a_cast)
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    warnings.filterwarnings("ignore", message="torch.ao.quantization is deprecated", category=DeprecationWarning)
    warnings.filterwarnings("ignore", message="torch.quantize_per_tensor, torch.quantize_per_channel", category=UserWarning)
    warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state", category=UserWarning)


def quiet_imports() -> None:
    """Switch off, by name, what libraries say while they are imported; called before any of them is.

    - bitsandbytes reports on processors with bf16 that it cannot fetch a faster 4-bit kernel from the Hub. It then uses its own.
    """
    import logging

    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_not_a_missing_kernel)


def _not_a_load_report(record) -> bool:
    return "LOAD REPORT" not in record.getMessage()


def _not_a_cast(record) -> bool:
    return "inputs will be cast" not in record.getMessage()


def _not_a_missing_kernel(record) -> bool:
    return "from kernels-community" not in record.getMessage()


def _seed_from_environment() -> int:
    text = os.environ.get("LABKIT_SEED", "0")
    if not text.strip().isdecimal():
        raise ValueError(f"LABKIT_SEED is {text!r}: set it to a whole number from 0 up, or unset it")
    return int(text)


def choose_device() -> torch.device:
    """LABKIT_DEVICE, or cuda where there is one, else cpu. Raises ValueError when it cannot be used."""
    import torch

    text = os.environ.get("LABKIT_DEVICE", "cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(text)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"LABKIT_DEVICE is {text!r} and cannot be used here ({error}): unset it, or set it to 'cpu'") from error
    return device


def choose_dtype(device: torch.device) -> torch.dtype:
    """LABKIT_DTYPE, or bf16 where the device computes faster in it, else fp32. Raises ValueError when it cannot be read."""
    import torch

    names = {"bf16": torch.bfloat16, "bfloat16": torch.bfloat16, "fp32": torch.float32, "float32": torch.float32}
    text = os.environ.get("LABKIT_DTYPE", "").strip().lower()
    if text:
        if text not in names:
            raise ValueError(f"LABKIT_DTYPE is {text!r}: set it to one of {', '.join(names)}, or unset it")
        return names[text]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    # Matrix tiles (AMX) make bf16 three to four times as fast as fp32. With AVX-512's bf16 alone it depends on the processor: on an AMD EPYC
    # (Zen 4) training steps took 0.55 to 0.77 of fp32's time; in an earlier measurement elsewhere bf16 had 0.7 to 0.9 of fp32's speed.
    able = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    faster = able.get("amx_bf16") or (able.get("avx512_bf16") and "AMD" in able.get("cpu_name", ""))
    return torch.bfloat16 if faster else torch.float32
