"""Trains the adapter in reviews-lora/: LoRA on the course's encoder, for the sentiment of data/reviews.

    python data/models/make_reviews_adapter.py

Every choice is made on the validation split; the test split is read once, at the end, for the card.
"""

from __future__ import annotations

import sys

import labkit
from labkit.catalog import Model, entry
from labkit.data import load_reviews
from labkit.files import DATA, write_text
from labkit.measure import accuracy_interval, bytes_on_disk, count_parameters
from labkit.models import load_encoder, load_tokenizer, save_adapter
from labkit.training import encode_rows, evaluate, train_model

ADAPTER = "models/reviews-lora"
OUT = DATA / ADAPTER
RANK, ALPHA = 8, 16
EPOCHS, BATCH_SIZE, LEARNING_RATE, MAX_LENGTH, SEED = 4, 16, 1e-3, 96, 0


def main() -> int:
    """Train, choose the epoch on validation, write the folder with its card. Returns the exit status."""
    from peft import LoraConfig, TaskType, get_peft_model

    source = entry("encoder")
    if not isinstance(source, Model) or source.package is None:
        print("the shipped adapter belongs to the offline encoder: unset LABKIT_PROFILE", file=sys.stderr)
        return 1
    lab = labkit.start("make_reviews_adapter")
    reviews, tokenizer = load_reviews(), load_tokenizer()
    train, validation, test = (encode_rows(reviews[split], tokenizer, MAX_LENGTH) for split in ("train", "validation", "test"))
    names = reviews["train"].features["label"].names

    encoder = load_encoder(len(names), seed=SEED)
    encoder.config.id2label, encoder.config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
    total = count_parameters(encoder).total
    # "all-linear" finds every linear layer of attention and MLP in the model itself, whatever its type calls them.
    config = LoraConfig(task_type=TaskType.SEQ_CLS, r=RANK, lora_alpha=ALPHA, target_modules="all-linear")
    config.base_model_name_or_path = source.package
    model = get_peft_model(encoder, config)
    settings = {"epochs": EPOCHS, "batch_size": BATCH_SIZE, "learning_rate": LEARNING_RATE, "seed": SEED, "dtype": lab.dtype}
    history = train_model(model, train, validation, keep_best="accuracy", label="adapter", **settings)
    for done in history.validation:
        kept = " (kept)" if done["step"] == history.best_step else ""
        print(f"epoch {done['epoch']:.0f}: training loss {done['train_loss']:.3f}, validation {done['loss']:.3f}, {done['accuracy']:.3f}{kept}")

    accuracy = accuracy_interval(evaluate(model, test, dtype=lab.dtype).correct)
    print(f"test accuracy {accuracy}")
    save_adapter(model, ADAPTER, source.package)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    write_text(OUT / "README.md", card(source, history.best, accuracy, len(test), trained, total))
    return 0


def card(source: Model, chosen: dict, accuracy, rows: int, trained: int, total: int) -> str:
    """The card in Markdown, with what this run measured."""
    return f"""---
language: en
license: cc-by-4.0
library_name: peft
pipeline_tag: text-classification
---

# Sentiment of movie reviews: a LoRA adapter

For the encoder in the package `{source.requirement}` (MiniLM-L6-H384). It classifies a review as `neg` (0) or `pos` (1).
`labkit.models.load_classifier()` puts the two together. Made by `python data/models/make_reviews_adapter.py`.

| | |
|---|---|
| data | `data/reviews`, train split |
| method | LoRA, rank {RANK}, alpha {ALPHA}, on every linear layer of attention and MLP; pooler by LoRA, head whole |
| training | {EPOCHS} epochs, batches of {BATCH_SIZE}, AdamW, peak learning rate {LEARNING_RATE:g}, at most {MAX_LENGTH} tokens, seed {SEED} |
| chosen | the epoch with the best validation accuracy, {chosen["accuracy"]:.3f} (epoch {chosen["epoch"]:.0f}) |
| trained numbers | {trained:,}; a full copy of the model has {total:,} |
| size on disk | {bytes_on_disk(OUT / "adapter_model.safetensors") / 1e6:.1f} MB |
| test accuracy | {accuracy}, with its 95% interval, on {rows} reviews |

It has learned from reviews of films that do not exist, written by one language model, and is as sure of itself on any other text.
Do not use it to judge people or what they wrote.

Licence: CC BY 4.0.
"""


if __name__ == "__main__":
    sys.exit(main())
