"""Checks of lab 03, fine-tuning with PyTorch."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from labkit.checks import reporting


def collate_batch(candidate) -> None:
    """Rows of different lengths become one padded batch."""
    rows = [{"input_ids": [101, 7, 8, 102], "label": 1}, {"input_ids": [101, 102], "label": 0}, {"input_ids": [101, 5, 102], "label": 1}]
    with reporting("collate_batch") as report:
        batch = candidate(rows)
        report(
            "has the three keys",
            isinstance(batch, dict) and {"input_ids", "attention_mask", "labels"} <= batch.keys(),
            "return a dict with input_ids, attention_mask and labels",
        )
        ids, mask, labels = batch["input_ids"], batch["attention_mask"], batch["labels"]
        report("whole-number mask", mask.dtype == torch.long, f"attention_mask has dtype {mask.dtype}: make it torch.long, ones and zeros")
        report(
            "pads to the longest row",
            tuple(ids.shape) == (3, 4),
            f"input_ids has shape {tuple(ids.shape)}, expected (3, 4): pad to the longest row of this batch, and cut nothing off",
        )
        report(
            "tokens first, then padding",
            ids[1].tolist()[:2] == [101, 102],
            f"row 1 became {ids[1].tolist()}: its tokens come first, the padding after them",
        )
        report(
            "pads with pad_token_id",
            ids[1].tolist() == [101, 102, 0, 0] and candidate(rows, pad_token_id=9)["input_ids"][1, 2] == 9,
            "fill the empty places with pad_token_id, whatever it is",
        )
        report(
            "mask marks real tokens",
            mask.tolist() == [[1] * 4, [1, 1, 0, 0], [1, 1, 1, 0]],
            f"the mask is {mask.tolist()}: 1 for a real token, 0 for padding (count tokens; do not compare ids with pad_token_id)",
        )
        zero = candidate([{"input_ids": [101, 0, 102], "label": 0}, {"input_ids": [1] * 4, "label": 0}])["attention_mask"][0]
        report(
            "mask does not look at ids",
            zero.tolist() == [1, 1, 1, 0],
            "a token whose id happens to equal pad_token_id lost its mask: build the mask from lengths",
        )
        report(
            "whole-number labels",
            labels.dtype == torch.long and labels.tolist() == [1, 0, 1],
            f"labels are {labels.tolist()} of dtype {labels.dtype}: cross-entropy needs the rows' labels as torch.long",
        )


def attention(candidate) -> None:
    """Scaled dot-product attention with a padding mask."""
    with reporting("attention") as report:
        query, key, value = (torch.randn(2, 3, 5, 4) for _ in range(3))
        mask = torch.tensor([[1, 1, 1, 0, 0], [1] * 5])
        out = candidate(query, key, value, mask)
        report.shape(out, (2, 3, 5, 4))
        ones = candidate(query, key, torch.ones_like(value), mask)
        report(
            "weights sum to one",
            torch.allclose(ones[0, :, :3], torch.ones(3, 3, 4), atol=1e-5) and torch.allclose(ones[1], torch.ones(3, 5, 4), atol=1e-5),
            "with all values 1 the result is not 1, so a token's weights do not sum to 1: take the softmax over keys (the last axis), after masking",
        )
        noisy_key, noisy_value = key.clone(), value.clone()
        noisy_key[0, :, 3:], noisy_value[0, :, 3:] = 50.0, -50.0
        report(
            "ignores padding",
            torch.allclose(candidate(query, noisy_key, noisy_value, mask)[0, :, :3], out[0, :, :3], atol=1e-5),
            "the result changes when only padded keys and values change: mask the scores of padded keys before the softmax",
        )
        swapped = candidate(query.flip(0), key.flip(0), value.flip(0), mask.flip(0)).flip(0)
        report(
            "rows stay apart",
            torch.allclose(swapped, out, atol=1e-5),
            "a text's result depends on the other texts in the batch: multiply over the last two axes",
        )
        weights = (query @ key.transpose(-2, -1) / math.sqrt(4)).masked_fill(mask[:, None, None] == 0, -1e9).softmax(-1)
        report(
            "scaled by the root of head_size",
            torch.allclose(out[1], (weights @ value)[1], atol=1e-5),
            "the weights have the wrong sharpness: divide the scores by the square root of head_size, the last axis of query",
        )
        empty = candidate(query, key, value, torch.tensor([[0] * 5, [1] * 5]))
        report(
            "survives an empty row", bool(empty.isfinite().all()), "a text without tokens gives nan: mask with a large negative number, not with -inf"
        )


def masked_mean(candidate) -> None:
    """Mean over real tokens."""
    with reporting("masked_mean") as report:
        hidden, mask = torch.randn(3, 7, 5), torch.tensor([[1] * 4 + [0] * 3, [1] * 7, [0] * 7])
        out = candidate(hidden, mask)
        report.shape(out, (3, 5))
        noisy = hidden.masked_fill(mask.unsqueeze(-1) == 0, 1e3)
        report(
            "ignores padding",
            torch.allclose(candidate(noisy, mask)[:2], out[:2], atol=1e-5),
            "the result changes when only padding changes: multiply by the mask before you sum",
        )
        report(
            "divides by the number of real tokens",
            torch.allclose(out[0], hidden[0, :4].mean(0), atol=1e-5),
            "the sum is right but the divisor is not: divide by mask.sum, not by the sequence length",
        )
        report("survives an empty row", bool(out[2].isfinite().all()), "a row without tokens divides zero by zero: clamp the divisor at 1")
        half = candidate(hidden.to(torch.bfloat16), mask)
        report("keeps the dtype", half.dtype == torch.bfloat16, f"bf16 went in and {half.dtype} came out: convert the mask to hidden.dtype")


def transformer_classifier(candidate) -> None:
    """The classifier's class: built with small sizes and tried on random token ids."""
    with reporting("TransformerClassifier") as report:
        ids = torch.randint(1, 50, (4, 9))
        mask = torch.tensor([[1] * 9, [1] * 6 + [0] * 3, [1] * 3 + [0] * 6, [1] * 9])
        model = candidate(50, 3, hidden_size=16, num_layers=2, num_heads=2, max_length=14, dropout=0.5)
        trained = model(ids, mask)
        report.shape(trained, (4, 3))
        report(
            "dropout in training only",
            not torch.equal(trained, model(ids, mask)) and torch.equal(model.eval()(ids, mask), model(ids, mask)),
            "two passes should differ in train() and agree in eval(): apply self.dropout, which knows the mode by itself",
        )
        out = model(ids, mask)
        longer = F.pad(ids, (0, 5), value=7), F.pad(mask, (0, 5))
        report(
            "ignores padding",
            torch.allclose(model(*longer), out, atol=1e-5),
            "the logits change when a row gets more padding: pass attention_mask to every block and to masked_mean",
        )
        report(
            "does not look at its neighbours",
            torch.allclose(torch.cat([model(ids[i : i + 1], mask[i : i + 1]) for i in range(4)]), out, atol=1e-5),
            "a row alone and the same row in a batch get different logits: attention is running across the batch",
        )
        reordered = ids.clone()
        reordered[0] = ids[0].flip(0)
        report(
            "word order matters",
            not torch.allclose(model(reordered, mask)[0], out[0], atol=1e-5),
            "a reversed text gets the same logits: add the position embeddings to the token embeddings",
        )
        report(
            "every weight is used",
            all(p.grad is not None and p.grad.abs().sum() > 0 for p in _gradients(model, ids, mask)),
            f"no gradient reaches {_unused(model, ids, mask)}: use every layer in forward",
        )
        total = model(ids, mask).sum(-1)
        report(
            "logits, not probabilities",
            not torch.allclose(total, total[:1].expand(4), atol=1e-4),
            "the outputs of every row sum to the same number: return the classifier's logits, without a softmax",
        )


def _gradients(model: nn.Module, ids, mask) -> list[nn.Parameter]:
    model.zero_grad()
    (model(ids, mask) ** 2).sum().backward()
    # A key's bias shifts all scores of a query alike, and the softmax does not see it: its gradient is zero in a right answer too.
    return [p for name, p in model.named_parameters() if not name.endswith("key.bias")]


def _unused(model: nn.Module, ids, mask) -> str:
    _gradients(model, ids, mask)
    names = [name for name, p in model.named_parameters() if not name.endswith("key.bias") and (p.grad is None or p.grad.abs().sum() == 0)]
    return ", ".join(names[:3])


class _Toy(nn.Module):
    """A classifier small enough to train in a check: (batch, seq) -> (batch, 2). Counts its passes in train mode."""

    def __init__(self, dropout: float = 0.5, scale: float = 1.0):
        super().__init__()
        self.scale = scale
        self.embedding, self.frozen = nn.Embedding(20, 8), nn.Linear(8, 8)
        self.dropout, self.classifier = nn.Dropout(dropout), nn.Linear(8, 2)
        self.frozen.requires_grad_(False)
        self.passes_training = self.passes_eval = 0

    def forward(self, input_ids, attention_mask):
        self.passes_training += self.training
        self.passes_eval += not self.training
        mask = attention_mask.unsqueeze(-1).float()
        mean = (self.embedding(input_ids) * mask).sum(1) / mask.sum(1)
        return self.scale * self.classifier(self.dropout(self.frozen(mean)))


def _toy_rows(count: int) -> list[dict]:
    """Rows whose label is told by which half of the vocabulary they use; lengths 2 to 6."""
    labels = torch.randint(0, 2, (count,)).tolist()
    return [{"input_ids": torch.randint(1 + 10 * label, 10 + 10 * label, (2 + i % 5,)).tolist(), "label": label} for i, label in enumerate(labels)]


def evaluate(candidate) -> None:
    """Mean loss and accuracy of a model on rows, without side effects."""
    with reporting("evaluate") as report:
        rows, model = _toy_rows(23), _Toy()
        model.train()
        first = candidate(model, rows, batch_size=8)
        report(
            "returns loss and accuracy",
            isinstance(first, tuple) and len(first) == 2 and all(isinstance(value, (int, float)) for value in first),
            "return two Python numbers: (loss, accuracy)",
        )
        report(
            "same twice", first == candidate(model, rows, batch_size=8), "two calls give different numbers: dropout is on, call model.eval() first"
        )
        report(
            "gives the mode back",
            model.training,
            "the model came in train mode and left in eval mode: its next training step would run without dropout",
        )
        with torch.no_grad():
            logits = torch.cat([model.eval()(torch.tensor([row["input_ids"]]), torch.ones(1, len(row["input_ids"]))) for row in rows])
        labels = torch.tensor([row["label"] for row in rows])
        accuracy = (logits.argmax(-1) == labels).float().mean().item()
        loss = F.cross_entropy(logits, labels).item()
        swapped = abs(first[0] - accuracy) < 1e-6 and abs(first[1] - loss) < 1e-5
        report("loss first, then accuracy", not swapped, "the two numbers are right and in the wrong order: return loss, then accuracy")
        report(
            "every row counts once",
            abs(first[1] - accuracy) < 1e-6,
            f"accuracy {first[1]:.4f}, expected {accuracy:.4f}: the last, smaller batch is "
            "left out or weighs too much; count right answers and divide by the number of rows",
        )
        report(
            "loss is the mean over rows",
            abs(first[0] - loss) < 1e-5,
            f"loss {first[0]:.4f}, expected {loss:.4f}: sum the rows' losses and divide by their number",
        )
        other = candidate(model.eval(), rows, batch_size=5)
        report("leaves eval mode alone too", not model.training, "the model came in eval mode and left in train mode: put back the mode it had")
        report("any batch size", abs(other[0] - first[0]) < 1e-5 and abs(other[1] - first[1]) < 1e-6, "the numbers change with the batch size")
        report("leaves no gradients", model.classifier.weight.grad is None, "gradients were computed: decorate the function with @torch.no_grad()")


def train_model(candidate) -> None:
    """The training loop, on a toy task it must learn."""
    with reporting("train_model") as report:
        train, validation = _toy_rows(60), _toy_rows(24)
        model = _Toy(dropout=0.1)
        before = {name: p.clone() for name, p in model.named_parameters()}
        history = candidate(model, train, validation, epochs=6, learning_rate=0.05, batch_size=8, seed=1)
        report(
            "keeps a history",
            {"train_loss", "learning_rate", "validation_loss", "validation_accuracy"} <= set(history),
            "return a dict with train_loss, learning_rate, validation_loss and validation_accuracy",
        )
        report(
            "one entry a step",
            len(history["train_loss"]) == 48 and len(history["learning_rate"]) == 48,
            f"60 rows in batches of 8 for 6 epochs are 48 steps, the history has {len(history['train_loss'])}",
        )
        report(
            "validates every epoch",
            len(history["validation_accuracy"]) == len(history["validation_loss"]) == 6,
            f"6 epochs, {len(history['validation_loss'])} validation losses: evaluate on validation_rows after every epoch",
        )
        changed = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
        report("trains", "classifier.weight" in changed, "the weights did not change: loss.backward() and optimizer.step() every step")
        report("leaves frozen weights alone", not any(name.startswith("frozen") for name in changed), "a weight with requires_grad=False changed")
        rates = history["learning_rate"]
        peak = rates.index(max(rates))
        report(
            "warms up and decays",
            rates[0] < rates[peak] and rates[-1] < 0.2 * rates[peak],
            f"the learning rate goes {rates[0]:.3g} … {rates[peak]:.3g} … {rates[-1]:.3g}: "
            "record it, and call schedule.step() after every optimizer.step(), with total counting all steps of all epochs",
        )
        report(
            "no step at rate zero",
            min(rates) > 0,
            "the last steps run with learning rate 0: the last, smaller batch of an epoch is a step too, so round the steps of an epoch up",
        )
        report(
            "clips gradients",
            _gradients_are_clipped(candidate, train, validation),
            "gradients of any size get through: call nn.utils.clip_grad_norm_(parameters, 1.0) between backward and step",
        )
        report(
            "dropout stays on",
            model.passes_training == 48,
            f"{model.passes_training} of 48 steps ran in train mode: call model.train() at the start of every epoch",
        )
        report(
            "starts every step from zero gradients",
            _steps_are_small(candidate, train, validation),
            "gradients of earlier steps are still in there: call optimizer.zero_grad() every step",
        )
        report(
            "learns",
            history["validation_accuracy"][-1] > 0.9,
            f"validation accuracy is {history['validation_accuracy'][-1]:.2f} on a task any right loop "
            "learns: look at the labels and at the order of backward, step and zero_grad",
        )
        torch.manual_seed(5)
        one, two = _Toy(dropout=0.5), _Toy(dropout=0.5)
        two.load_state_dict(one.state_dict())
        for twin in (one, two):
            candidate(twin, train, validation, epochs=1, learning_rate=0.01, batch_size=8, seed=3)
        report(
            "same seed, same weights",
            torch.equal(one.classifier.weight, two.classifier.weight),
            "two runs with the same seed end in different weights: seed torch before the first step (dropout), and the order of the batches too",
        )


def _steps_are_small(candidate, train, validation) -> bool:
    """With learning rate 0 nothing moves; what is stored at the end must be the last step's gradient (perhaps clipped), or none."""
    model, seen = _Toy(dropout=0.0), []
    model.classifier.weight.register_hook(lambda gradient: seen.append(gradient.clone()))
    candidate(model, train, validation, epochs=1, learning_rate=0.0, batch_size=8, seed=1)
    stored = model.classifier.weight.grad
    return stored is None or bool(F.cosine_similarity(stored.flatten(), seen[-1].flatten(), dim=0) > 0.9999)


def _gradients_are_clipped(candidate, train, validation) -> bool:
    """On a model with very large gradients and learning rate 0: what is stored after the last step has at most norm 1, or is gone."""
    model = _Toy(dropout=0.0, scale=1000.0)
    candidate(model, train, validation, epochs=1, learning_rate=0.0, batch_size=8, seed=1)
    stored = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return not stored or float(torch.cat(stored).norm()) < 1.01
