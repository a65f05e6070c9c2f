"""The training loop of the course, and a pure `evaluate`. Lab 03 builds both in short; this version also checkpoints and resumes.

A row is a mapping with `input_ids` (a list of token ids) and `label` (an int); `encode_rows` makes them from a data set.
A model takes `input_ids` and `attention_mask`, (batch, seq) each, and returns logits (batch, num_labels), bare or as `.logits`.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from labkit.checkpoint import load_checkpoint, save_checkpoint

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

Row = dict
Collate = Callable[[Sequence[Row]], dict[str, Tensor]]


class TrainingDiverged(ArithmeticError):
    """The loss became nan or infinite."""


@dataclass
class History:
    """What a run did. `train_loss` and `learning_rate` have one number a step; `validation` one entry an evaluation.

    A validation entry holds step, epoch (fractional), train_loss (mean since the last entry), loss and accuracy (validation).
    """

    train_loss: list[float] = field(default_factory=list)
    learning_rate: list[float] = field(default_factory=list)
    validation: list[dict[str, float]] = field(default_factory=list)
    best_step: int = 0
    stopped_early: bool = False
    seconds: float = 0.0

    @property
    def best(self) -> dict[str, float]:
        """The validation entry whose weights were kept."""
        return next(entry for entry in self.validation if entry["step"] == self.best_step)


@dataclass(frozen=True)
class Evaluation:
    """logits (rows, num_labels) in the order of the rows, on the CPU, and what follows from them. loss is the mean in nats."""

    logits: Tensor
    labels: Tensor

    @property
    def loss(self) -> float:
        return F.cross_entropy(self.logits, self.labels).item()

    @property
    def accuracy(self) -> float:
        return self.correct.float().mean().item()

    @property
    def correct(self) -> Tensor:
        """(rows,) bool: which rows were classified rightly."""
        return self.logits.argmax(-1) == self.labels


def encode_rows(rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int = 128) -> list[Row]:
    """Tokenize a data set's texts, truncated to max_length, without padding: a list of {"input_ids", "label"}."""
    ids = tokenizer(rows["text"][:], truncation=True, max_length=max_length)["input_ids"]
    return [{"input_ids": i, "label": label} for i, label in zip(ids, rows["label"], strict=True)]


def collate_batch(rows: Sequence[Row], pad_token_id: int = 0) -> dict[str, Tensor]:
    """Pad rows to the longest: input_ids, attention_mask (1 for real tokens), both (batch, seq), and labels (batch,)."""
    if not rows:
        raise ValueError("a batch needs at least one row")
    longest = max(1, max(len(row["input_ids"]) for row in rows))
    input_ids = torch.full((len(rows), longest), pad_token_id)
    attention_mask = torch.zeros((len(rows), longest), dtype=torch.long)
    for i, row in enumerate(rows):
        length = len(row["input_ids"])
        input_ids[i, :length] = torch.as_tensor(row["input_ids"])
        attention_mask[i, :length] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": torch.tensor([row["label"] for row in rows])}


def bucket_batches(lengths: Sequence[int], batch_size: int, seed: int, pool: int = 20) -> list[list[int]]:
    """Batches of row numbers with similar lengths, in random order: little padding, and still a new mix every epoch.

    Rows are shuffled, cut into pools of `pool` batches, sorted by length inside a pool, cut into batches, and the batches shuffled.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(lengths), generator=generator).tolist()
    batches = []
    for start in range(0, len(order), pool * batch_size):
        rows = sorted(order[start : start + pool * batch_size], key=lambda i: lengths[i])
        batches += [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def sorted_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Batches of row numbers, shortest rows first: little padding where the order of the rows does not matter."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def linear_schedule(step: int, total_steps: int, warmup: float = 0.1) -> float:
    """The factor on the learning rate at `step` (from 0): up linearly over the first `warmup` share of the steps, then down to 0."""
    warmup_steps = max(1, round(warmup * total_steps))
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return max(0.0, (total_steps - step) / max(1, total_steps - warmup_steps))


def predict_logits(model: nn.Module, batch: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
    """One forward pass on the model's device, under autocast unless dtype is fp32: logits (batch, num_labels) in fp32."""
    device = next(model.parameters()).device
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        out = model(input_ids=batch["input_ids"].to(device), attention_mask=batch["attention_mask"].to(device))
    return getattr(out, "logits", out).float()


@torch.no_grad()
def evaluate(
    model: nn.Module, rows: Sequence[Row], *, batch_size: int = 64, dtype: torch.dtype = torch.float32, collate: Collate = collate_batch
) -> Evaluation:
    """Logits, loss and accuracy on `rows`, each counted once. Pure: no randomness used, every module's train/eval mode given back.

    Rows are batched by length, so that little padding is computed, and returned in their own order.
    """
    if len(rows) == 0:
        raise ValueError("evaluate was given no rows")
    batches = sorted_batches([len(row["input_ids"]) for row in rows], batch_size)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        found = torch.cat([predict_logits(model, collate([rows[i] for i in batch]), dtype).cpu() for batch in batches])
    finally:
        for module, mode in modes:
            module.training = mode
    logits = torch.empty_like(found)
    logits[torch.tensor([i for batch in batches for i in batch])] = found
    return Evaluation(logits, torch.tensor([row["label"] for row in rows]))


def train_model(
    model: nn.Module,
    train_rows: Sequence[Row],
    validation_rows: Sequence[Row],
    *,
    epochs: int = 3,
    batch_size: int = 16,
    learning_rate: float = 5e-4,
    weight_decay: float = 0.01,
    warmup: float = 0.1,
    max_grad_norm: float = 1.0,
    dtype: torch.dtype = torch.float32,
    frozen_dtype: torch.dtype | None = None,
    seed: int = 0,
    collate: Collate = collate_batch,
    evaluate_every: int | None = None,
    patience: int | None = None,
    keep_best: str | None = "loss",
    checkpoint: Path | None = None,
    checkpoint_every: int = 50,
    resume: bool = False,
    label: str = "training",
) -> History:
    """Train with AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101), a warm-up and linear decay, clipped gradients, length buckets.

    The model is validated every `evaluate_every` steps (default: every epoch). At the end it holds the weights with the best
    validation result, by `keep_best`: "loss", "accuracy" (ties go to the lower loss) or None for the last weights; training stops
    after `patience` evaluations without a better one.
    dtype: autocast dtype of the forward pass. frozen_dtype: dtype in which the matrices that do not train are kept meanwhile, so that
    autocast need not convert them in every step (None leaves them as they are); afterwards they are what they were, bit for bit.
    learning_rate is the peak; only parameters with requires_grad are trained; weight decay is not applied to biases, norms and other
    one-dimensional parameters. Order of rows and dropout depend on `seed` alone.
    checkpoint: a file written every `checkpoint_every` steps and on Ctrl-C, removed at the end; with resume=True a run goes on from it,
    to the same final weights bit for bit, and starts from the beginning when there is none.
    Raises TrainingDiverged when the loss is not finite, ValueError when there is nothing to train or the checkpoint is of another run,
    FileExistsError when the checkpoint of an unfinished run is there and resume is not asked for.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("no parameter has requires_grad: unfreeze something before training")
    if epochs < 1 or not len(train_rows) or not len(validation_rows):
        raise ValueError(f"{epochs} epochs on {len(train_rows)} rows, {len(validation_rows)} for validation: each must be at least 1")
    if keep_best not in ("loss", "accuracy", None):
        raise ValueError(f"keep_best is {keep_best!r}: choose 'loss', 'accuracy' or None")
    if resume and checkpoint is None:
        raise ValueError("resume=True needs the checkpoint file to resume from: pass checkpoint=")
    if checkpoint is not None and not resume and Path(checkpoint).exists():
        raise FileExistsError(f"{checkpoint} holds an unfinished run: pass resume=True to go on with it, or delete the file")
    lengths = [len(row["input_ids"]) for row in train_rows]
    steps_per_epoch = math.ceil(len(train_rows) / batch_size)
    total_steps = epochs * steps_per_epoch
    evaluate_every = evaluate_every or steps_per_epoch
    settings = {
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
        "warmup": warmup,
        "max_grad_norm": max_grad_norm,
        "seed": seed,
        "rows": len(train_rows),
        "tokens": sum(lengths),
        "evaluate_every": evaluate_every,
        "keep_best": keep_best,
        "patience": patience,
        "dtype": str(dtype),
        "frozen_dtype": str(frozen_dtype),
    }
    optimizer = _adamw(parameters, learning_rate, weight_decay)
    history, done, best = History(), 0, None
    device = parameters[0].device

    rng = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    with rng, frozen_matrices_in(frozen_dtype, model), interrupt_between_steps() as interrupted:
        torch.manual_seed(seed)
        if resume and Path(checkpoint).exists():
            state, best = load_checkpoint(checkpoint, model, optimizer, settings)
            done, history = state["step"], History(**state["history"])
        started = time.monotonic() - history.seconds
        model.train()
        with progress_bar(total_steps, done, label) as bar:
            for step in range(done, total_steps):
                if history.stopped_early:
                    break
                epoch, position = divmod(step, steps_per_epoch)
                if position == 0 or step == done:
                    batches = bucket_batches(lengths, batch_size, seed=1000 * seed + epoch)
                batch = collate([train_rows[i] for i in batches[position]])
                rate = learning_rate * linear_schedule(step, total_steps, warmup)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                loss = F.cross_entropy(predict_logits(model, batch, dtype), batch["labels"].to(device))
                value = loss.item()
                if not math.isfinite(value):
                    raise TrainingDiverged(
                        f"the loss is {value} at step {step + 1} of {total_steps} (learning rate {rate:.2g}): "
                        "lower learning_rate, lengthen warmup, or look for a bad row in this batch"
                    )
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(parameters, max_grad_norm)
                optimizer.step()
                history.train_loss.append(value)
                history.learning_rate.append(rate)
                bar.update()
                bar.set_postfix_str(f"loss {value:.3f}", refresh=False)

                if (step + 1) % evaluate_every == 0 or step + 1 == total_steps:
                    best = _validate(model, validation_rows, history, step + 1, steps_per_epoch, dtype, collate, best, keep_best)
                    waited = sum(entry["step"] > history.best_step for entry in history.validation)
                    history.stopped_early = patience is not None and waited >= patience
                history.seconds = time.monotonic() - started
                if checkpoint is not None and ((step + 1) % checkpoint_every == 0 or interrupted.is_set()):
                    save_checkpoint(checkpoint, model, optimizer, best, {"step": step + 1, "history": asdict(history), "settings": settings})
                if interrupted.is_set():
                    advice = f"call again with resume=True to go on from {checkpoint}" if checkpoint else "pass checkpoint= to be able to go on later"
                    raise KeyboardInterrupt(f"stopped after step {step + 1} of {total_steps}; {advice}")
        if best is not None:
            model.load_state_dict(best)
    optimizer.zero_grad(set_to_none=True)  # gradients would stay in memory as long as the model
    model.eval()
    if checkpoint is not None:
        Path(checkpoint).unlink(missing_ok=True)
    return history


def _validate(model, rows, history, step, steps_per_epoch, dtype, collate, best, keep_best):
    """Append a validation entry; return the best weights so far (a copy on the CPU)."""
    result = evaluate(model, rows, dtype=dtype, collate=collate)
    since = int(history.validation[-1]["step"]) if history.validation else 0
    recent = history.train_loss[since:]
    history.validation.append(
        {"step": step, "epoch": step / steps_per_epoch, "train_loss": sum(recent) / len(recent), "loss": result.loss, "accuracy": result.accuracy}
    )
    if keep_best is None:
        history.best_step = step
        return None
    if history.best_step == 0 or _score(history.validation[-1], keep_best) > _score(history.best, keep_best):
        history.best_step = step
        return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
    return best


def _score(entry: dict[str, float], keep_best: str) -> tuple[float, float]:
    return (entry["accuracy"] if keep_best == "accuracy" else 0.0, -entry["loss"])


def _adamw(parameters: list[nn.Parameter], learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=learning_rate, fused=parameters[0].device.type in ("cpu", "cuda"))


@contextlib.contextmanager
def frozen_matrices_in(dtype: torch.dtype | None, model: nn.Module) -> Iterator[None]:
    """While open, the floating-point matrices of `model` that do not train are in `dtype`; None changes nothing.

    Afterwards they are the tensors they were. One-dimensional parameters stay as they are: a norm needs weight and bias in one dtype.
    """
    frozen = [p for p in model.parameters() if not p.requires_grad and p.ndim > 1 and p.is_floating_point()] if dtype is not None else []
    originals = [p.data for p in frozen]
    try:
        for p in frozen:
            p.data = p.data.to(dtype)
        yield
    finally:
        for p, original in zip(frozen, originals):
            p.data = original


@contextlib.contextmanager
def interrupt_between_steps() -> Iterator[threading.Event]:
    """While open, Ctrl-C (or the notebook's stop button) sets an event instead of breaking into the middle of a step."""
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return
    earlier = signal.signal(signal.SIGINT, lambda *_: interrupted.set())
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, earlier)


def progress_bar(total: int, done: int, label: str):
    """A text bar on stdout that leaves nothing behind; LABKIT_PROGRESS=off hides it (headless runs)."""
    from tqdm import tqdm

    return tqdm(total=total, initial=done, desc=label, file=sys.stdout, leave=False, ncols=90, disable=os.environ.get("LABKIT_PROGRESS") == "off")
