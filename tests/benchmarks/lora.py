"""LoRA's cost beside peft's: `python tests/benchmarks/lora.py [rounds]`. Steps run in alternation, so that a busy machine slows both.

Prints the median of the ratio of ours to peft's, round by round, best below 1, for a training step and for a forward pass, and the time
that injecting into the encoder takes. Needs one to two minutes.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import nn

import labkit
from labkit import lora
from labkit.models import load_encoder

RANK, ALPHA, BATCH, SEQ = 8, 16, 16, 64


def trainer(model: nn.Module, dtype: torch.dtype) -> Callable[[], None]:
    """One training step on random rows, the same for both."""
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    ids, mask, labels = torch.randint(1000, 20000, (BATCH, SEQ)), torch.ones(BATCH, SEQ, dtype=torch.long), torch.randint(0, 2, (BATCH,))
    model.train()

    def step() -> None:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            logits = model(input_ids=ids, attention_mask=mask).logits
        nn.functional.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def predictor(model: nn.Module, dtype: torch.dtype) -> Callable[[], None]:
    """One forward pass in eval mode."""
    torch.manual_seed(0)
    ids, mask = torch.randint(1000, 20000, (BATCH, SEQ)), torch.ones(BATCH, SEQ, dtype=torch.long)

    @torch.no_grad()
    def predict() -> None:
        model.eval()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            model(input_ids=ids, attention_mask=mask)

    return predict


def paired(name: str, ours: Callable[[], object], theirs: Callable[[], object], rounds: int) -> None:
    """Print the median of the ratio of seconds, round by round, with its quartiles."""
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    for i in range(rounds + 2):
        for which, call in (("ours", ours), ("theirs", theirs)) if i % 2 else (("theirs", theirs), ("ours", ours)):
            started = time.perf_counter()
            call()
            if i > 1:  # the first rounds warm up
                seconds[which].append(time.perf_counter() - started)
    ratios = [a / b for a, b in zip(seconds["ours"], seconds["theirs"])]
    low, median, high = statistics.quantiles(ratios, n=4)
    ours_ms, theirs_ms = (1000 * statistics.median(seconds[which]) for which in ("ours", "theirs"))
    print(f"{name}: {ours_ms:.0f} ms against {theirs_ms:.0f} ms, ratio {median:.3f} (quartiles {low:.3f} to {high:.3f})")


def main() -> None:
    """Time everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rounds", type=int, nargs="?", default=15)
    rounds = parser.parse_args().rounds
    lab = labkit.start("lora_benchmark")
    for dropout in (0.0, 0.1):
        ours = load_encoder(2)
        lora.inject(ours, rank=RANK, alpha=ALPHA, dropout=dropout)
        config = LoraConfig(task_type=TaskType.SEQ_CLS, r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, target_modules="all-linear")
        theirs = get_peft_model(load_encoder(2), config)
        for dtype in {torch.float32, lab.dtype}:
            name = f"{str(dtype).removeprefix('torch.')}, dropout {dropout}"
            paired(f"training step, {name}", trainer(ours, dtype), trainer(theirs, dtype), rounds)
            if not dropout:
                paired(f"forward pass, {name}", predictor(ours, dtype), predictor(theirs, dtype), rounds)
    models, seconds = [load_encoder(2) for _ in range(5)], []
    for model in models:
        started = time.perf_counter()
        lora.inject(model, rank=RANK)
        seconds.append(time.perf_counter() - started)
    print(f"injecting {len(lora.lora_layers(models[0]))} layers into the encoder: {1000 * statistics.median(seconds):.1f} ms")
    models = [load_encoder(2) for _ in range(3)]
    started = time.perf_counter()
    for model in models:
        get_peft_model(model, LoraConfig(task_type=TaskType.SEQ_CLS, r=RANK, target_modules="all-linear"))
    print(f"peft: {1000 * (time.perf_counter() - started) / len(models):.1f} ms")


if __name__ == "__main__":
    main()
