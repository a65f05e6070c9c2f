"""What a cache with room saves when many texts are written: `python tests/benchmarks/generation.py [rounds]`. Needs about a minute.

The instruction-tuned decoder in bf16 goes on from prompts of 128 tokens. Every way takes its turn in every round, so that a busy machine
slows all of them. Prints the median of the ratio of seconds to those with transformers' DynamicCache and plain attention, best below 1.
"""

import argparse
import statistics
import time

import torch
from transformers import Cache, DynamicCache

from labkit.kv_cache import roomy_cache
from labkit.models import load_sft_decoder
from labkit.runtime import keep_freed_memory, quiet_libraries

PROMPT, NEW = 128, 40
WAYS = {
    "DynamicCache, plain attention": (DynamicCache, "eager"),
    "DynamicCache, fused attention": (DynamicCache, "sdpa"),
    "room, plain attention": (roomy_cache, "eager"),
    "room, fused attention": (roomy_cache, "sdpa"),
}


@torch.inference_mode()
def write(model, cache: Cache, prompts: int, samples: int) -> None:
    """Greedy tokens for `samples` rows of each prompt."""
    ids = torch.randint(10, 4000, (prompts, PROMPT))
    new = model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True).repeat_interleave(samples, 0)
    cache.batch_repeat_interleave(samples)
    for _ in range(NEW):
        new = model(new, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rounds", nargs="?", type=int, default=5)
    rounds = parser.parse_args().rounds
    quiet_libraries()
    keep_freed_memory()
    torch.manual_seed(0)
    model = load_sft_decoder(dtype=torch.bfloat16)
    for prompts, samples in ((6, 8), (64, 3)):
        seconds: dict[str, list[float]] = {name: [] for name in WAYS}
        for i in range(rounds + 1):
            for name, (make, attention) in WAYS.items():
                model.set_attn_implementation(attention)
                started = time.perf_counter()
                write(model, make(), prompts, samples)
                if i:  # the first round warms up
                    seconds[name].append(time.perf_counter() - started)
        first = next(iter(WAYS))
        for name, values in seconds.items():
            ratio = statistics.median(value / base for value, base in zip(values, seconds[first]))
            print(f"{prompts * samples:4} rows, {name}: {1000 * statistics.median(values) / NEW:.0f} ms a token, ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
