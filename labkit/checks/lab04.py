"""Checks of lab 04, fine-tuning with Hugging Face."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from labkit.checks import reporting


def bad_labels(candidate) -> None:
    """Rows whose label is missing or is not one of the classes."""
    import pyarrow
    from datasets import ClassLabel, Dataset, DatasetInfo, Features

    def rows(labels: list, classes: int) -> Dataset:
        info = DatasetInfo(features=Features({"label": ClassLabel(num_classes=classes)}))
        return Dataset(pyarrow.table({"label": pyarrow.array(labels, pyarrow.int64())}), info=info)  # as files are read: numbers are not looked at

    with reporting("bad_labels") as report:
        found = candidate(rows([0, 1, -1, 2, None, 1, -100], 2))
        report("a list of row numbers", isinstance(found, list), f"the answer is a {type(found).__name__}: return a list of row numbers")
        report(
            "row numbers, not labels",
            all(isinstance(i, int) and 0 <= i < 7 for i in found),
            f"{found} holds something else than row numbers: return i, the row's place, not its label",
        )
        report("missing labels", 4 in found, "row 4 has no label at all (None) and was not found")
        report("negative labels", {2, 6} <= set(found), "labels -1 and -100 were not found: a class has a number from 0 up")
        report("labels past the last class", 3 in found, "there are two classes, 0 and 1, and label 2 was not found")
        report("good rows stay", found == [2, 3, 4, 6], f"the bad rows are 2, 3, 4 and 6, you named {found}")
        report(
            "any number of classes",
            candidate(rows([4, 5, 0], 5)) == [1],
            "with five classes label 4 is good and 5 is not: take the number of classes from the features",
        )
        report("none bad, none named", candidate(rows([1, 0], 2)) == [], "two good rows, and some were named")


def compute_metrics(candidate) -> None:
    """Accuracy and macro F1."""
    with reporting("compute_metrics") as report:
        labels = np.array([0] * 6 + [1] * 3 + [2])
        predicted = np.array([0] * 5 + [1] * 3 + [0, 2])
        answer = candidate((np.eye(3)[predicted] * 4 - 1, labels))
        report(
            "a dict with accuracy and f1",
            isinstance(answer, dict) and {"accuracy", "f1"} <= answer.keys(),
            "return a dict with the keys accuracy and f1",
        )
        report(
            "Python numbers",
            all(type(answer[key]) in (float, int) for key in ("accuracy", "f1")),
            "the values are NumPy's or torch's: make them Python numbers with float()",
        )
        report(
            "accuracy",
            _close(answer["accuracy"], 0.8),
            f"8 of 10 rows are right and accuracy is {answer['accuracy']:.4f}: compare argmax with labels",
        )
        each = [2 * 5 / (6 + 6), 2 * 2 / (3 + 3), 1.0]
        weighted = (6 * each[0] + 3 * each[1] + each[2]) / 10
        report(
            "every class weighs the same",
            not any(_close(answer["f1"], value) for value in (weighted, 0.8)),
            "F1 is weighed by how common a class is, or taken over all rows at once: take the mean of the classes' F1",
        )
        report(
            "F1 of a class",
            _close(answer["f1"], np.mean(each)),
            f"f1 is {answer['f1']:.4f}, expected {np.mean(each):.4f}: 2 TP / (2 TP + FP + FN) for each class",
        )
        absent = candidate((np.eye(4)[predicted], labels))["f1"]
        report(
            "a class that never occurs gets 0",
            _close(absent, np.sum(each) / 4),
            f"with four columns of logits and three classes seen f1 is {absent:.4f}, expected {np.sum(each) / 4:.4f}: "
            "go through the columns of the logits; a class neither there nor predicted counts 0",
        )


def expected_calibration_error(candidate) -> None:
    """Mean gap between confidence and accuracy, over bins of confidence."""
    with reporting("expected_calibration_error") as report:

        def two(confidences: list[float], right: list[bool]) -> tuple[np.ndarray, np.ndarray]:
            values = np.array(confidences)
            return np.stack([values, 1 - values], 1), np.array([0 if good else 1 for good in right])

        sure = candidate(*two([0.95] * 10, [True] * 5 + [False] * 5))
        report(
            "one number",
            isinstance(sure, (float, int)),  # NumPy's float64 is one, too
            "return a Python number, with float()",
        )
        report(
            "surer than right",
            _close(sure, 0.45),
            f"ten rows at 0.95, half of them right, give {sure:.4f}, expected 0.45: the gap |accuracy - confidence|",
        )
        shy = candidate(*two([0.55] * 4, [True] * 4))
        report(
            "less sure than right counts too",
            _close(shy, 0.45),
            f"four rows at 0.55, all right, give {shy:.4f}, expected 0.45: take the gap's absolute value",
        )
        uneven = candidate(*two([0.93] * 9 + [0.58], [True] * 9 + [False]))
        report(
            "bins weigh as they are full",
            _close(uneven, 0.9 * 0.07 + 0.1 * 0.58),
            f"nine rows in one bin and one in another give {uneven:.4f}, expected 0.121: weigh a bin's gap by its share of all rows; "
            "the mean confidence of its rows counts, not its middle",
        )
        cancel = candidate(*two([0.91, 0.99], [False, True]))
        report(
            "within a bin gaps may cancel",
            _close(cancel, 0.45),
            f"0.91 wrong and 0.99 right give {cancel:.4f}, expected 0.45: take means over a bin, then the gap",
        )
        edge = candidate(*two([0.8, 0.85], [True, False]), bins=5)
        report(
            "a bin holds its upper end",
            _close(edge, 0.5 * 0.2 + 0.5 * 0.85),
            f"with 5 bins, 0.8 belongs to (0.6, 0.8] and 0.85 to (0.8, 1.0]; the answer is {edge:.4f}, expected 0.525: index is ceil(p * bins) - 1",
        )
        certain = candidate(*two([1.0] * 4, [True, True, True, False]))
        report(
            "confidence 1 has a bin",
            _close(certain, 0.25),
            f"four rows at 1.0, three right, give {certain:.4f}, expected 0.25: is there a bin for 1.0?",
        )
        three = candidate(np.array([[0.1, 0.2, 0.7], [0.5, 0.3, 0.2]]), np.array([2, 1]))
        report(
            "any number of classes",
            _close(three, 0.5 * 0.3 + 0.5 * 0.5),
            "with three classes: confidence is the largest probability, right is argmax equal to the label",
        )


class _Watched(nn.Module):
    """A tiny classifier of token ids that keeps its batches and records the mode it ran in."""

    def __init__(self, scale: float = 1.0):
        super().__init__()
        self.table, self.classifier, self.scale = nn.Embedding(20, 6), nn.Linear(6, 2), scale
        nn.init.constant_(self.classifier.bias, 2.0)  # large enough for weight decay to show
        self.classifier.bias.data[1] = -2.0
        self.seen: list[list[int]] = []
        self.modes: list[bool] = []

    def forward(self, input_ids, attention_mask, **unused):
        self.seen.append(input_ids[:, 0].tolist())
        self.modes.append(self.training)
        mask = attention_mask.unsqueeze(-1).float()
        return SimpleNamespace(logits=self.scale * self.classifier((self.table(input_ids) * mask).sum(1) / mask.sum(1)))


def _rows() -> list[dict]:
    return [{"input_ids": [i, (7 * i) % 20, 3][: 2 + i % 2], "attention_mask": [1, 1, 1][: 2 + i % 2], "label": i % 2} for i in range(20)]


def _collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)
    padded = {name: torch.tensor([row[name] + [0] * (longest - len(row[name])) for row in rows]) for name in ("input_ids", "attention_mask")}
    return padded | {"labels": torch.tensor([row["label"] for row in rows])}


def _reference(model: nn.Module, *, epochs: int = 2, rate: float = 0.05, decay: float = 0.5, clip: float = 1.0, warmup: int = 2) -> list[float]:
    """The losses of a right loop over the toy rows in batches of 6, eight steps."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0},
    ]
    optimizer, rows, losses, total = torch.optim.AdamW(groups, lr=rate), _rows(), [], 4 * epochs
    for step in range(total):
        factor = step / warmup if step < warmup else (total - step) / (total - warmup)
        for group in optimizer.param_groups:
            group["lr"] = rate * factor
        start = 6 * (step % 4)
        batch = _collate(rows[start : start + 6])
        loss = F.cross_entropy(model(**batch).logits, batch["labels"])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        losses.append(loss.item())
    return losses


def train_by_hand(candidate) -> None:
    """The loop inside Trainer."""
    with reporting("train_by_hand") as report:

        def run(scale: float = 1.0, seed: int = 1) -> tuple[list[float], _Watched]:
            torch.manual_seed(seed)
            model = _Watched(scale).eval()
            return candidate(model, _rows(), _collate, epochs=2, batch_size=6, learning_rate=0.05, weight_decay=0.5, warmup=0.2), model

        def reference(scale: float = 1.0, seed: int = 1, **changes) -> list[float]:
            torch.manual_seed(seed)
            return _reference(_Watched(scale), **changes)

        losses, model = run()
        report(
            "a list of losses",
            isinstance(losses, list) and all(type(loss) is float for loss in losses),
            "return a list of Python numbers: loss.item() of every step",
        )
        report(
            "one loss a step",
            len(losses) == 8,
            f"20 rows in batches of 6 are 4 steps an epoch, the last one smaller; two epochs gave {len(losses)} losses, expected 8",
        )
        firsts = [row["input_ids"][0] for row in _rows()]
        report(
            "rows in their order, every epoch",
            [i for batch in model.seen for i in batch] == firsts * 2,
            "the rows came in another order, or some were left out: go through rows from first to last in every epoch",
        )
        report("trains in train mode", all(model.modes), "the model ran in eval mode: call model.train() first, or dropout stays off")
        right = reference()
        report(
            "the first loss",
            _close(losses[0], right[0]),
            f"the first loss is {losses[0]:.4f}, expected {right[0]:.4f}: cross-entropy of logits and labels, the mean over the batch",
        )
        report(
            "the first step moves nothing",
            _close(losses[1], right[1]),
            f"the second loss is {losses[1]:.4f}, expected {right[1]:.4f}: the schedule's first factor is 0, so set it up before the first step, "
            "and call schedule.step() after each optimizer.step()",
        )
        report("the schedule's total", not _all_close(losses, reference(warmup=1)), "warm-up lasts ceil(0.2 * 8) = 2 steps here: round up, not down")
        without, everywhere = reference(decay=0.0), _decay_everywhere()
        report("weight decay on matrices", not _all_close(losses, without), "no weight decay is at work: give the group of matrices weight_decay")
        report("none on biases", not _all_close(losses, everywhere), "biases are decayed too: parameters with fewer than two axes get weight_decay 0")
        big, clipped, free = run(scale=40.0)[0], reference(scale=40.0), reference(scale=40.0, clip=1e9)
        report(
            "clips gradients to norm 1",
            not _all_close(big, free) or _all_close(clipped, free),
            "large gradients get through: clip them to norm 1 between backward and step",
        )
        report(
            "the losses of a right loop",
            _all_close(losses, right) and _all_close(big, clipped),
            f"the losses {', '.join(f'{loss:.3f}' for loss in losses)} should be {', '.join(f'{loss:.3f}' for loss in right)}: "
            "is optimizer.zero_grad() called every step, and does total count the steps of all epochs?",
        )


def _decay_everywhere() -> list[float]:
    """The losses when the biases are decayed like the matrices."""
    torch.manual_seed(1)
    model = _Watched()
    optimizer, rows, losses = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.5), _rows(), []
    for step in range(8):
        optimizer.param_groups[0]["lr"] = 0.05 * (step / 2 if step < 2 else (8 - step) / 6)
        batch = _collate(rows[6 * (step % 4) : 6 * (step % 4) + 6])
        loss = F.cross_entropy(model(**batch).logits, batch["labels"])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def collate_completions(candidate) -> None:
    """Prompt and completion as one row, and labels for the completion only."""
    rows = [
        {"prompt_ids": [5, 6, 7], "completion_ids": [8, 9]},
        {"prompt_ids": [5], "completion_ids": [1, 4]},
        {"prompt_ids": [6, 8], "completion_ids": [9, 9, 2, 4]},
    ]
    with reporting("collate_completions") as report:
        batch = candidate(rows, pad_token_id=1)
        report(
            "has the three keys",
            isinstance(batch, dict) and {"input_ids", "attention_mask", "labels"} <= batch.keys(),
            "return a dict with input_ids, attention_mask and labels",
        )
        ids, mask, labels = (batch[name] for name in ("input_ids", "attention_mask", "labels"))
        report(
            "whole-number tensors",
            all(isinstance(t, torch.Tensor) and t.dtype == torch.long for t in (ids, mask, labels)),
            "make all three torch.long tensors",
        )
        report.shape(ids, (3, 6))
        report(
            "prompt, completion, padding",
            ids.tolist() == [[5, 6, 7, 8, 9, 1], [5, 1, 4, 1, 1, 1], [6, 8, 9, 9, 2, 4]],
            f"input_ids is {ids.tolist()}: prompt, then completion, then pad_token_id on the right",
        )
        report(
            "mask marks real tokens",
            mask.tolist() == [[1] * 5 + [0], [1] * 3 + [0] * 3, [1] * 6],
            f"the mask is {mask.tolist()}: 1 for every token of prompt and completion, 0 for padding (a real token may have the id of the padding)",
        )
        report.shape(labels, (3, 6))
        report(
            "prompts do not count",
            (labels[0, :3] == -100).all() and (labels[2, :2] == -100).all(),
            f"labels of the prompt are {labels[0, :3].tolist()}: make them -100",
        )
        report(
            "padding does not count",
            (labels[0, 5:] == -100).all() and (labels[1, 3:] == -100).all(),
            f"labels at the padding are {labels[1, 3:].tolist()}: make them -100, or the model learns to write padding",
        )
        report(
            "not shifted",
            labels[2].tolist()[1:5] != [9, 9, 2, 4],
            "the labels are shifted by one: the model does that itself; labels[i, t] is input_ids[i, t]",
        )
        report(
            "the whole completion, to its end mark",
            labels[2].tolist() == [-100, -100, 9, 9, 2, 4] and labels[0].tolist() == [-100] * 3 + [8, 9, -100],
            f"labels are {labels[2].tolist()}, expected [-100, -100, 9, 9, 2, 4]: every token of the completion counts, the end mark most of all",
        )
        report(
            "positions decide, not ids",
            labels[1].tolist() == [-100, 1, 4, -100, -100, -100],
            "a token of the completion whose id is that of the padding lost its label: go by positions",
        )


def packed_mask_and_positions(candidate) -> None:
    """Rows packed end to end that do not see each other."""
    with reporting("packed_mask_and_positions") as report:
        answer = candidate([3, 1, 2])
        report("mask and positions", isinstance(answer, tuple) and len(answer) == 2, "return two tensors: the mask and the positions")
        mask, positions = answer
        report.shape(mask, (6, 6))
        report.shape(positions, (6,))
        report(
            "a boolean mask",
            mask.dtype == torch.bool,
            f"the mask has dtype {mask.dtype}: make it boolean (ones and zeros would be added to the scores)",
        )
        report("a token sees itself", bool(mask.diagonal().all()), "some token may not attend to itself: a line without any true entry gives nan")
        report("nothing later", not mask.triu(1).any(), "a token may attend to a later one: the lower triangle only (.tril())")
        report(
            "no other row",
            not mask[3, :3].any() and not mask[4:, :4].any(),
            "a token may attend to another row's tokens: true only where both belong to the same row",
        )
        expected = torch.block_diag(*(torch.ones(n, n).tril() for n in (3, 1, 2))).bool()
        report(
            "everything before it in its row",
            torch.equal(mask, expected),
            "a token must see all earlier tokens of its own row, not only the one before it",
        )
        report(
            "positions start anew",
            positions.dtype == torch.long and positions.tolist() == [0, 1, 2, 0, 0, 1],
            f"positions are {positions.tolist()}, expected [0, 1, 2, 0, 0, 1] (whole numbers): each row counts from 0",
        )
        one = candidate([4])
        report(
            "one row is plain causal attention",
            torch.equal(one[0], torch.ones(4, 4).tril().bool()),
            "for a single row the mask must be the lower triangle",
        )


def _close(a, b) -> bool:
    return math.isclose(float(a), float(b), rel_tol=1e-5, abs_tol=1e-6)


def _all_close(a: list[float], b: list[float]) -> bool:
    return len(a) == len(b) and all(math.isclose(x, y, rel_tol=1e-4, abs_tol=1e-5) for x, y in zip(a, b))
