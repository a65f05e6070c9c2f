"""Lab 07's memory arithmetic on a GPU, at size: `python tests/benchmarks/qlora_gpu.py [--sizes 1B 7B]`. Writes data/results/qlora_gpu.json.

Three parts. The table of lab 7.10 on the encoder, with CUDA's peak beside the sum of weights, gradients and optimizer state. AdamW's
states in 32 bits, in 8, and paged, on a matrix of 67 million weights. QLoRA on Llama-shaped models with random weights: what the arithmetic
says from the config, and what CUDA has allocated. A script, not a test: it needs CUDA, a minute, and 20 GB of GPU memory for 7B.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time

import bitsandbytes as bnb
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import labkit
from labkit import lora, measure, training
from labkit.catalog import entry
from labkit.classifier import masked_mean
from labkit.data import load_reviews, subset
from labkit.files import RESULTS, write_text
from labkit.models import load_encoder, load_tokenizer, model_location
from labkit.quantization import parameters_from_config, training_memory

BF16 = torch.bfloat16
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": BF16}
VARIANTS = {  # as in lab 07
    "full, fp32": ("full", torch.float32, {}),
    "LoRA, fp32": ("lora", torch.float32, {}),
    "LoRA, bf16": ("lora", BF16, {}),
    "LoRA, int8": ("int8", BF16, {"load_in_8bit": True}),
    "LoRA, NF4": ("nf4", BF16, NF4),
    "LoRA, NF4 double": ("nf4-double", BF16, NF4 | {"bnb_4bit_use_double_quant": True}),
}
SIZES = {
    "1B": LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4
    ),
    "7B": LlamaConfig(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32),
}
SEQ, RANK = 512, 16


class Classifier(nn.Module):
    """A body, the masked mean of its vectors, a linear head: logits (batch, 2)."""

    def __init__(self, body: nn.Module):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.classifier = body, nn.Linear(body.config.hidden_size, 2).to(body.device)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = self.body(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return self.classifier(masked_mean(hidden.float(), attention_mask))


def stored_bytes(model: nn.Module) -> int:
    """Bytes of all weights and of the scales that bitsandbytes keeps beside them; what is shared is counted once."""
    tensors = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        own = getattr(module, "weight", None)
        if getattr(own, "quant_state", None) is not None:
            tensors += [t for t in own.quant_state.as_dict().values() if torch.is_tensor(t)]
        tensors += [t for t in (getattr(own, "SCB", None), getattr(getattr(module, "state", None), "SCB", None)) if t is not None]
    return sum({t.data_ptr(): t.nbytes for t in tensors}.values())


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of an optimizer's state, step counters and bitsandbytes' shared tables of levels apart."""
    states = [(name, t) for kept in optimizer.state.values() for name, t in kept.items() if torch.is_tensor(t)]
    return sum(t.nbytes for name, t in states if name != "step" and not name.startswith("qmap"))


def fresh_peak() -> None:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def table() -> list[dict]:
    """The rows of lab 7.10: megabytes of each part, measured and predicted, CUDA's peak in a step, seconds, accuracy after one epoch."""
    tokenizer, reviews, config = load_tokenizer(), load_reviews(), load_encoder().config
    train = training.encode_rows(subset(reviews["train"], 1200, seed=0), tokenizer, max_length=96)
    validation = training.encode_rows(reviews["validation"].select(range(16)), tokenizer, max_length=96)
    test = training.encode_rows(reviews["test"], tokenizer, max_length=96)
    longest = training.collate_batch(sorted(train, key=lambda row: -len(row["input_ids"]))[:16])
    targets = [t.name for t in parameters_from_config(config) if t.kind == "linear" and t.name != "pooler"]
    head, rows = 2 * config.hidden_size + 2, []
    for name, (method, dtype, bits) in VARIANTS.items():
        fresh_peak()
        before = torch.cuda.memory_allocated()
        options = {"quantization_config": BitsAndBytesConfig(**bits)} if bits else {}
        body = AutoModel.from_pretrained(model_location(entry("encoder")), config=config, dtype=dtype, device_map={"": "cuda"}, **options)
        model = Classifier(body)
        if method != "full":
            names = [target for target in lora.target_modules(model) if "pooler" not in target]
            model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=names, modules_to_save=["classifier"]))
        model.train()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer, seconds = torch.optim.AdamW(trained, lr=0.0), []
        for _ in range(12):
            torch.cuda.synchronize()
            started = time.perf_counter()
            loss = F.cross_entropy(training.predict_logits(model, longest, BF16), longest["labels"].cuda())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
        said = training_memory(config, method, dtype=dtype, rank=8, targets=targets)
        row = {
            "method": name,
            "weights": stored_bytes(model),
            "gradients": sum(p.grad.nbytes for p in trained if p.grad is not None),
            "optimizer": state_bytes(optimizer),
            "predicted": {"weights": said.weights + 4 * head, "gradients": said.gradients + 4 * head, "optimizer": said.optimizer + 8 * head},
            "peak_of_a_step": torch.cuda.max_memory_allocated() - before,
            "seconds_a_step": statistics.median(seconds[2:]),
        }
        rate = 3e-4 if method == "full" else 2e-3
        training.train_model(model, train, validation, epochs=1, batch_size=16, learning_rate=rate, dtype=BF16, seed=0, keep_best=None, label=name)
        found = measure.accuracy_interval(training.evaluate(model, test, dtype=BF16).correct)
        rows.append(row | {"accuracy": found.value, "low": found.low, "high": found.high})
        print(json.dumps(rows[-1]), flush=True)
        del model, body, optimizer, trained, loss
    return rows


def optimizers() -> list[dict]:
    """AdamW's states for one matrix of 67 million weights: how many bytes, and how many of them the GPU holds."""
    rows = []
    for make in (torch.optim.AdamW, bnb.optim.AdamW8bit, bnb.optim.PagedAdamW32bit, bnb.optim.PagedAdamW8bit):
        fresh_peak()
        matrix = nn.Parameter(torch.randn(8192, 8192, device="cuda"))
        matrix.grad = torch.randn_like(matrix)
        optimizer, before = make([matrix], lr=1e-3), torch.cuda.memory_allocated()
        optimizer.step()
        torch.cuda.synchronize()
        rows.append({"optimizer": make.__name__, "state": state_bytes(optimizer), "held_by_torch_on_the_gpu": torch.cuda.memory_allocated() - before})
        print(json.dumps(rows[-1]), flush=True)
        del optimizer, matrix
    return rows


def quantize(model: nn.Module) -> None:
    """Every linear layer but the language-model head into bitsandbytes' NF4 with double quantization, one after the other."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            parent, _, child = name.rpartition(".")
            layer = bnb.nn.Linear4bit(
                module.in_features, module.out_features, bias=False, compute_dtype=BF16, compress_statistics=True, quant_type="nf4", device="meta"
            )
            layer.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4", module=layer)
            setattr(model.get_submodule(parent), child, layer.to(module.weight.device))
    model.is_loaded_in_4bit = True  # peft looks here


def at_size(size: str) -> dict:
    """QLoRA on a model of random weights: its bytes, measured and from the config alone, and four steps with gradient checkpointing."""
    fresh_peak()
    config, before, torch_default = SIZES[size], torch.cuda.memory_allocated(), torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(BF16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch_default)
    parameters = sum(p.numel() for p in model.parameters())
    quantize(model)
    model.requires_grad_(False)
    model.config.use_cache = False
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")).train()
    fresh_peak()
    after_loading = torch.cuda.memory_allocated() - before
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, seconds, losses = torch.optim.AdamW(trained, lr=2e-4), [], []
    ids = torch.randint(0, config.vocab_size, (1, SEQ), device="cuda")
    for _ in range(4):
        torch.cuda.synchronize()
        started = time.perf_counter()
        with torch.autocast("cuda", BF16):
            loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        losses.append(loss.item())
    said = training_memory(config, "nf4-double", dtype=BF16, rank=RANK)
    gradients = sum(p.grad.nbytes for p in trained)
    row = {
        "model": size,
        "parameters": parameters,
        "predicted_parameters": said.parameters,
        "weights": stored_bytes(model),
        "allocated_after_loading": after_loading,
        "gradients": gradients,
        "optimizer": state_bytes(optimizer),
        "predicted": {"weights": said.weights, "gradients": said.gradients, "optimizer": said.optimizer},
        "allocated_between_steps": torch.cuda.memory_allocated() - before,
        "peak_of_a_step": torch.cuda.max_memory_allocated() - before,
        "seconds_a_step": statistics.median(seconds[1:]),
        "tokens_in_a_step": SEQ,
        "losses": losses,
    }
    print(json.dumps(row), flush=True)
    return row


def main() -> None:
    """Measure, and write the results whole."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", choices=SIZES, default=list(SIZES))
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device: this script measures a GPU's memory; labs 07 and 08 have what a CPU can show")
    labkit.start("qlora_gpu")
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "bitsandbytes": bnb.__version__}
    result = {"device": torch.cuda.get_device_name(), "versions": versions, "table": table(), "optimizers": optimizers()}
    result["at_size"] = [at_size(size) for size in args.sizes]
    write_text(RESULTS / "qlora_gpu.json", json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
