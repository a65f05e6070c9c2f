"""`python -m labkit doctor`: is this machine ready for the labs? One line a check; what fails says how to mend it."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import labkit
from labkit.files import DATA, ROOT, read_sums, sha256

PYTHON_FROM, PYTHON_BELOW = (3, 11), (3, 14)
FREE_DISK_GB = 2.0
FREE_MEMORY_GB = 4.0


class Problem(Exception):
    """A check failed; the text says what and how to mend it."""


def doctor() -> int:
    """Run every check and print its line. Returns 1 if one failed."""
    failed = 0
    for check in (python, packages, encoder, decoder, data, memory, disk, gpu):
        try:
            print(f"✓ {check()}")
        except Problem as problem:
            failed += 1
            print(f"✗ {problem}")
    print("all well: open notebooks/00_start_here.ipynb" if not failed else f"{failed} to mend; run `python -m labkit doctor` again afterwards")
    return int(failed > 0)


def python() -> str:
    found = sys.version_info[:2]
    if not PYTHON_FROM <= found < PYTHON_BELOW:
        raise Problem(
            f"Python {found[0]}.{found[1]}: the labs need 3.11 to 3.13. Make the environment with one of those, "
            "for example `python3.12 -m venv .venv`"
        )
    return f"Python {found[0]}.{found[1]}"


def pinned(requirements: Path) -> Iterator[tuple[str, str]]:
    """The (name, version) pairs pinned with == in a requirements file."""
    for line in requirements.read_text(encoding="utf-8").splitlines():
        match = re.match(r"([A-Za-z0-9._-]+)==(\S+)", line.strip())
        if match:
            yield match[1], match[2]


def packages(requirements: Path = ROOT / "requirements.txt") -> str:
    wrong = []
    count = 0
    for name, version in pinned(requirements):
        count += 1
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{name} is missing (needs {version})")
            continue
        if found.split("+")[0] != version:
            wrong.append(f"{name} is {found} (needs {version})")
    if wrong:
        raise Problem(f"packages: {'; '.join(wrong)}. Run `python -m pip install -r requirements.txt`")
    return f"packages: {count} pinned versions installed"


def encoder() -> str:
    from labkit.catalog import entry
    from labkit.models import model_location

    source = entry("encoder")
    try:
        model_location(source)
    except (FileNotFoundError, ValueError) as error:
        raise Problem(f"encoder: {error}") from error
    return f"encoder: {source.repo or source.requirement}{'' if source.repo else ', weights as published'}"


def decoder() -> str:
    from labkit.catalog import entry
    from labkit.models import model_location

    source = entry("decoder")
    if (
        source.folder is not None
        and not (DATA / source.folder).exists()
        and f"{source.folder}/model.safetensors" not in read_sums(DATA / "SHA256SUMS")
    ):
        return f"decoder: data/{source.folder} is not part of this copy of the course, so labs that generate text cannot run"
    try:
        model_location(source)
    except (FileNotFoundError, ValueError) as error:
        raise Problem(f"decoder: {error}") from error
    return f"decoder: {source.repo or f'data/{source.folder}, weights as published'}"


def data(folder: Path = DATA) -> str:
    sums = read_sums(folder / "SHA256SUMS")
    for name, expected in sums.items():
        path = folder / name
        if not path.is_file():
            raise Problem(f"data: data/{name} is missing. Run `git restore data`")
        if sha256(path) != expected:
            raise Problem(
                f"data: data/{name} was changed. Run `git restore data` for the original "
                "(a line-ending conversion also changes it: clone again with `git -c core.autocrlf=false clone`)"
            )
    return f"data: {len(sums)} files as published"


def memory() -> str:
    import psutil

    total = psutil.virtual_memory().total / 1e9
    if total < FREE_MEMORY_GB:
        raise Problem(f"memory: {total:.1f} GB in all; a lab uses up to {FREE_MEMORY_GB:.0f} GB. Close other programs, or use a larger machine")
    return f"memory: {total:.0f} GB"


def disk() -> str:
    free = shutil.disk_usage(ROOT).free / 1e9
    if free < FREE_DISK_GB:
        raise Problem(f"disk: {free:.1f} GB free; checkpoints and caches need {FREE_DISK_GB:.0f} GB. Free some space")
    return f"disk: {free:.0f} GB free"


def gpu() -> str:
    import torch

    if torch.cuda.is_available():
        name, total = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory / 1e9
        return f"GPU: {name}, {total:.0f} GB"
    if labkit.PROFILE == "hub":
        raise Problem("GPU: none found, and the hub profile is made for one. Unset LABKIT_PROFILE to use the offline profile")
    return "GPU: none, and the offline profile needs none"
