"""Every test, and every notebook run as a test, runs as a learner without a network would: offline profile, default settings, no socket."""

import os
from pathlib import Path

for name in ("LABKIT_PROFILE", "LABKIT_SEED", "LABKIT_DTYPE", "LABKIT_DEVICE", "LABKIT_RECORD"):
    os.environ.pop(name, None)
os.environ["LABKIT_PROGRESS"] = "off"
# Kernels and subprocesses import tests/offline/sitecustomize.py at their start: it blocks every socket but loopback.
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent / "tests" / "offline"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
