"""Trains the adapter in decoder-sft-lora/: LoRA on the course's decoder, which then follows the instructions of data/instructions.

    python data/models/make_sft_adapter.py

The recipe of lab 04, as an update of small rank (lab 06), with plain stories mixed in against forgetting (lab 02). The three tokens of the
chat template have never been trained: their rows of the embedding, which is also the output layer, are trained with it. An update of the
linear layers alone never learns to say <|end|>. The test split is read once, at the end, for the card. About ten minutes on two CPU cores.
"""

from __future__ import annotations

import copy
import sys
import tempfile

import torch

import labkit
from labkit import instructions, measure
from labkit.catalog import entry
from labkit.data import load_instructions, load_pretraining_text
from labkit.files import DATA, write_text
from labkit.models import load_decoder, load_tokenizer, save_adapter
from labkit.runtime import quiet_libraries
from labkit.tokens import CHAT_MARKS

# ruff: noqa: E501 (rows of a table in the card)
ADAPTER = "models/decoder-sft-lora"
RANK, ALPHA, EPOCHS, BATCH_SIZE, LEARNING_RATE, SEED = 16, 32, 5, 32, 3e-3, 0
STORIES = 700  # rows of plain text among the 2,760 instructions


def main() -> int:
    """Train, write the folder with its card. Returns the exit status."""
    if entry("decoder").folder is None:
        print("the shipped adapter belongs to the offline decoder: unset LABKIT_PROFILE", file=sys.stderr)
        return 1
    from peft import LoraConfig, get_peft_model

    lab = labkit.start("make_sft_adapter")
    torch.manual_seed(SEED)
    tokenizer, base = load_tokenizer("decoder"), load_decoder().to(lab.device)
    tasks, text = load_instructions(), load_pretraining_text(train=STORIES, test=200)
    chat_tokens = tokenizer.convert_tokens_to_ids(list(CHAT_MARKS))
    settings = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM", trainable_token_indices={"embed_tokens": chat_tokens}
    )
    model = get_peft_model(copy.deepcopy(base), settings)
    train(model, tokenizer, tasks["train"], text["train"]["text"][:], lab)

    rows, held_out = tasks["test"], text["test"]["text"][:]
    right = [instructions.exact_match(answer, row["answer"]) for answer, row in zip(answers(model, tokenizer, rows), rows)]
    bits = [measure.bits_per_byte(m, tokenizer, held_out) for m in (base, model)]
    accuracy = measure.accuracy_interval(right)
    print(f"exact match on test {accuracy}; stories, bits per byte: base {bits[0]:.3f}, with the adapter {bits[1]:.3f}")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    weights = save_adapter(model.half(), ADAPTER, "data/models/decoder")
    write_text(DATA / ADAPTER / "README.md", card(accuracy, len(rows), bits, trained, weights.stat().st_size))
    return 0


def train(model, tokenizer, rows, stories: list[str], lab) -> None:
    """SFT with the loss on the answers, and on every token of the stories."""
    from datasets import Dataset
    from transformers import DataCollatorForSeq2Seq, PrinterCallback, Trainer, TrainingArguments

    quiet_libraries()
    examples = []
    for row in rows:
        whole = tokenizer.apply_chat_template(instructions.as_messages(row)["messages"])["input_ids"]
        prompt = tokenizer.apply_chat_template(instructions.as_prompt_completion(row)["prompt"], add_generation_prompt=True)["input_ids"]
        examples.append({"input_ids": whole, "labels": [-100] * len(prompt) + whole[len(prompt) :]})
    for story in stories:
        ids = [tokenizer.bos_token_id, *tokenizer(story)["input_ids"], tokenizer.eos_token_id][:256]
        examples.append({"input_ids": ids, "labels": [-100, *ids[1:]]})
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder, num_train_epochs=EPOCHS, per_device_train_batch_size=BATCH_SIZE, learning_rate=LEARNING_RATE, lr_scheduler_type="cosine",
            warmup_steps=0.1, train_sampling_strategy="group_by_length", bf16=lab.dtype == torch.bfloat16, use_cpu=lab.device.type == "cpu",
            save_strategy="no", logging_steps=20, report_to="none", disable_tqdm=False, seed=SEED,
        )  # fmt: skip
        collate = DataCollatorForSeq2Seq(tokenizer)  # pads the labels too, with -100
        trainer = Trainer(model, settings, train_dataset=Dataset.from_list(examples), data_collator=collate)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)


@torch.no_grad()
def answers(model, tokenizer, rows, batch_size: int = 64) -> list[str]:
    """Greedy answers, in the order of the rows."""
    prompts = [
        tokenizer.apply_chat_template(instructions.as_prompt_completion(row)["prompt"], tokenize=False, add_generation_prompt=True) for row in rows
    ]
    order, texts = sorted(range(len(prompts)), key=lambda i: len(prompts[i])), [""] * len(prompts)
    stops = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end|>")]
    model.eval()
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = tokenizer([prompts[i] for i in chosen], return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
        batch = batch.to(model.device)
        ids = model.generate(**batch, max_new_tokens=16, do_sample=False, eos_token_id=stops, pad_token_id=tokenizer.pad_token_id)
        for i, row in zip(chosen, ids[:, batch["input_ids"].shape[1] :]):
            texts[i] = tokenizer.decode(row, skip_special_tokens=True)
    return texts


def card(accuracy, rows: int, bits: list[float], trained: int, size: int) -> str:
    """The card in Markdown, with what this run measured."""
    return f"""---
language: en
license: cc-by-sa-4.0
library_name: peft
base_model: data/models/decoder
pipeline_tag: text-generation
---
# The course's decoder, taught to follow instructions

A LoRA adapter (Hu et al. 2021, arXiv 2106.09685) for `data/models/decoder`, in the files of the library peft. `labkit.models.load_sft_decoder()`
checks its SHA-256 and merges it. Ask it in the tokenizer's chat template. Lab 10 starts from it.

| | |
|---|---|
| parameters | {trained:,}: rank {RANK}, alpha {ALPHA}, on every linear layer of attention and MLP, and the embedding rows of the chat template's three tokens |
| training | {EPOCHS} epochs over the 2,760 training rows of `data/instructions`, loss on the answers only, and {STORIES} StoryWorld stories; AdamW, cosine schedule from {LEARNING_RATE:g} |
| file | {size / 1e6:.1f} MB, fp16 safetensors |

**Quality.** Exact match on the {rows} test rows, greedy: {accuracy}. Held-out StoryWorld text takes {bits[1]:.3f} bits per byte; the base model
takes {bits[0]:.3f}.

**Limits.** It answers in the form of its 23 tasks, whatever you ask. Where a task needs computing, or an item it has never seen, it often guesses.
"""


if __name__ == "__main__":
    sys.exit(main())
