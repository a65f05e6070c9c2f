"""What `keep_freed_memory` saves: `python tests/benchmarks/freed_memory.py [rounds]`. Needs about half a minute a round.

Each round runs two processes, one after the other, with it and without, in changing order. Prints seconds of a training
step of the encoder, full and with LoRA, CPU seconds spent in the system, and the largest resident memory, each as the median ratio of
with to without, best below 1.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import torch
from torch import nn

from labkit import lora
from labkit.models import load_encoder
from labkit.runtime import keep_freed_memory, quiet_libraries
from labkit.training import frozen_matrices_in

BATCH, SEQ, STEPS = 8, 64, 30


def steps(method: str, keep: bool) -> dict[str, float]:
    """Seconds a step, seconds in the system and peak bytes of this process."""
    quiet_libraries()
    if keep and not keep_freed_memory():
        sys.exit("this C library has no mallopt: nothing to measure")
    torch.manual_seed(0)
    model = load_encoder(num_labels=2, dropout=0.0)
    if method == "lora":
        lora.inject(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    ids, mask, labels = torch.randint(1000, 20000, (BATCH, SEQ)), torch.ones(BATCH, SEQ, dtype=torch.long), torch.randint(0, 2, (BATCH,))
    seconds = []
    with frozen_matrices_in(torch.bfloat16, model):
        for _ in range(STEPS):
            started = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(input_ids=ids, attention_mask=mask).logits
            nn.functional.cross_entropy(logits.float(), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds.append(time.perf_counter() - started)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {"seconds a step": statistics.median(seconds[3:]), "system seconds": usage.ru_stime, "peak memory": usage.ru_maxrss}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rounds", nargs="?", type=int, default=5)
    parser.add_argument("--child", nargs=2, metavar=("METHOD", "KEEP"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(steps(arguments.child[0], arguments.child[1] == "with")))
        return
    for method in ("full", "lora"):
        found: dict[str, list[dict[str, float]]] = {"with": [], "without": []}
        for i in range(arguments.rounds):
            for which in ("with", "without") if i % 2 else ("without", "with"):
                command = [sys.executable, __file__, "--child", method, which]
                found[which].append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]))
        for what in found["with"][0]:
            ratios = [a[what] / b[what] for a, b in zip(found["with"], found["without"])]
            print(f"{method:5} {what:15} with / without: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
