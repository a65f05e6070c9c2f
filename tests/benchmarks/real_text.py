"""The course's encoder on real text: trained on it, and trained on the course's own written rows and then tested on it.

    python tests/benchmarks/real_text.py reviews FOLDER [--method lora]      (FOLDER holds train.jsonl.gz and test.jsonl.gz of stanfordnlp/imdb)
    python tests/benchmarks/real_text.py news FOLDER                         (the same of fancyzhx/ag_news)

Each row is {"text", "label"} with the Hub's label ids. A script, not a test: it takes minutes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from datasets import load_dataset
from torch import nn

import labkit
from labkit.data import load_news, load_reviews
from labkit.measure import accuracy_interval
from labkit.models import load_encoder, load_tokenizer
from labkit.training import encode_rows, evaluate, train_model

ROWS, MAX_LENGTH = 2000, 128


class EncoderClassifier(nn.Module):
    """The encoder, the masked mean of its vectors, a linear head: logits (batch, num_labels)."""

    def __init__(self, num_labels: int, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.body = load_encoder()
        self.classifier = nn.Linear(self.body.config.hidden_size, num_labels)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = self.body(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None].to(hidden.dtype)
        return self.classifier((hidden * mask).sum(1) / mask.sum(1).clamp(min=1))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("reviews", "news"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--method", choices=("full", "lora"), default="full")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--train-on", choices=("real", "written"), help="one of the two (default: both)")
    parser.add_argument("--test-length", type=int, default=MAX_LENGTH, help="tokens of a test row; training rows are cut at 128")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    lab = labkit.start("real_text")
    tokenizer = load_tokenizer()
    files = {split: str(args.folder / f"{split}.jsonl.gz") for split in ("train", "test")}
    real = load_dataset("json", data_files=files)
    written = load_reviews() if args.task == "reviews" else load_news()
    num_labels = 2 if args.task == "reviews" else 4
    shuffled = real["train"].shuffle(seed=args.seed)
    sets = {
        "real": (shuffled.select(range(ROWS)), shuffled.select(range(ROWS, ROWS + 500))),
        "written": (written["train"], written["validation"]),
    }
    if args.train_on is not None:
        sets = {args.train_on: sets[args.train_on]}
    tests = {"real": real["test"], "written": written["test"]}
    tests = {name: encode_rows(rows, tokenizer, args.test_length) for name, rows in tests.items()}
    for name, parts in sets.items():
        train, validation = (encode_rows(rows, tokenizer, MAX_LENGTH) for rows in parts)
        model = EncoderClassifier(num_labels, args.seed)
        rate = args.learning_rate or 1e-4
        if args.method == "lora":
            from peft import LoraConfig, inject_adapter_in_model

            model.body.requires_grad_(False)
            inject_adapter_in_model(LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", exclude_modules=r".*pooler.*"), model.body)
            rate = args.learning_rate or 1e-3
        epochs = args.epochs if name == "real" else 2 * args.epochs
        settings = {"epochs": epochs, "batch_size": 16, "learning_rate": rate, "seed": args.seed, "dtype": lab.dtype}
        history = train_model(model, train, validation, label=name, **settings)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        for target, rows in tests.items():
            accuracy = accuracy_interval(evaluate(model, rows, dtype=lab.dtype).correct)
            print(f"{trained:,} parameters, {len(train)} {name} rows, {history.seconds:.0f} s; {len(rows)} {target} test rows: {accuracy}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
