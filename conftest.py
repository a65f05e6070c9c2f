"""Every test, and every notebook run as a test, runs as a learner without a network would: offline profile, default settings, no socket."""

import os
from pathlib import Path

import pytest

for name in ("LABKIT_PROFILE", "LABKIT_SEED", "LABKIT_DTYPE", "LABKIT_DEVICE", "LABKIT_RECORD"):
    os.environ.pop(name, None)
os.environ["LABKIT_PROGRESS"] = "off"
# Kernels and subprocesses import tests/offline/sitecustomize.py at their start: it blocks every socket but loopback.
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent / "tests" / "offline"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)

# Without matrix tiles for bf16 (AMX) a lab takes up to four times as long, and the whole series over two hours.
LONG_WITHOUT_TILES = ("05_adapters", "06_lora", "07_qlora", "08_quantization", "09_soft_prompts", "10_alignment")


def pytest_addoption(parser):
    parser.addoption("--every-lab", action="store_true", help="run labs 05 to 10 without matrix tiles for bf16, too: over an hour more")


def pytest_collection_modifyitems(config, items):
    import torch

    if config.getoption("--every-lab") or torch.cpu.get_capabilities().get("amx_bf16"):
        return
    wait = pytest.mark.skip(reason="slow without matrix tiles for bf16 (AMX): pass --every-lab")
    for item in items:
        if item.path.suffix == ".ipynb" and item.path.stem in LONG_WITHOUT_TILES:
            item.add_marker(wait)
