"""labkit: the small package behind the labs. Import it first: it sets the offline switches before any library reads them.

    import labkit
    lab = labkit.start("03_finetuning_pytorch")

The profile is read once, here, from LABKIT_PROFILE: `offline` (default) or `hub`. Nothing heavy is imported until it is used.
"""

import os

__version__ = "0.1.0"

PROFILES = ("offline", "hub")
PROFILE = os.environ.get("LABKIT_PROFILE", "offline").strip().lower() or "offline"
if PROFILE not in PROFILES:
    raise ValueError(f"LABKIT_PROFILE is {PROFILE!r}: set it to 'offline' (default) or 'hub', or unset it")

# Read by huggingface_hub, transformers, datasets and tokenizers when they are first imported.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
if PROFILE == "offline":
    for switch in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
        os.environ[switch] = "1"

from labkit.claims import ClaimFailed  # noqa: E402
from labkit.runtime import Lab, quiet_imports, start  # noqa: E402

quiet_imports()

__all__ = ["PROFILE", "ClaimFailed", "Lab", "start"]
