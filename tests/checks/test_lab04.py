"""Every check of lab 04 takes a right answer written differently from ours, and turns down wrong ones, each with its own message."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score
from torch import nn

from labkit.checks import CheckFailed, NotWrittenYet
from labkit.checks import lab04 as check

# ---------------------------------------------------------------- bad_labels


def bad_labels(rows):
    known = set(range(len(rows.features["label"].names)))
    return [i for i in range(rows.num_rows) if rows[i]["label"] not in known]


def bad_negative_only(rows):
    return [i for i, label in enumerate(rows["label"]) if label is None or label < 0]


def bad_too_large_only(rows):
    return [i for i, label in enumerate(rows["label"]) if label is None or label >= rows.features["label"].num_classes]


def bad_not_missing(rows):
    return [i for i, label in enumerate(rows["label"]) if label is not None and label not in range(rows.features["label"].num_classes)]


def bad_two_classes(rows):
    return [i for i, label in enumerate(rows["label"]) if label not in (0, 1)]


def bad_values(rows):
    return [label for label in rows["label"] if label not in range(rows.features["label"].num_classes)]


# ---------------------------------------------------------------- compute_metrics


def metrics(*, average="macro", columns=True, argmax=-1, keys=("accuracy", "f1"), plain=float):
    def compute_metrics(prediction):
        logits, labels = prediction
        predicted = logits.argmax(argmax)
        classes = range(logits.shape[1]) if columns else None
        f1 = f1_score(labels, predicted, labels=classes, average=average, zero_division=0)
        return {keys[0]: plain(accuracy_score(labels, predicted)), keys[1]: plain(f1)}

    return compute_metrics


# ---------------------------------------------------------------- expected_calibration_error


def calibration(*, gap=abs, weigh=True, ends="upper", middle=False, rows=False, convert=float):
    """A right error from cumulative sums over sorted bins, with one thing wrong at a time."""

    def expected_calibration_error(probabilities, labels, bins=10):
        confidence, right = probabilities.max(1), (probabilities.argmax(1) == labels).astype(float)
        if rows:
            return convert(np.mean(np.abs(right - confidence)))
        edges = np.linspace(0, 1, bins + 1)
        index = np.searchsorted(edges, confidence - 1e-12, side="left") - 1 if ends == "upper" else np.floor(confidence * bins + 1e-12).astype(int)
        total, used = 0.0, 0
        for b in range(bins):
            inside = index == b
            if inside.any():
                mean = (edges[b] + edges[b + 1]) / 2 if middle else confidence[inside].mean()
                total += gap(right[inside].mean() - mean) * (inside.mean() if weigh else 1)
                used += 1
        return convert(total if weigh else total / used)

    return expected_calibration_error


# ---------------------------------------------------------------- train_by_hand


def loop(*, train=True, shuffle=False, drop_last=False, decay="matrices", warm=math.ceil, step_schedule=True, first=0, clip=1.0, zero=True,
         last_epoch=True, keep=torch.Tensor.item, reduction="mean"):  # fmt: skip
    """A right loop with a LambdaLR of its own, with one thing wrong at a time."""

    def train_by_hand(model, rows, collate_fn, *, epochs, batch_size, learning_rate, weight_decay=0.01, warmup=0.1, dtype=torch.float32):
        starts = range(0, len(rows) - (batch_size - 1 if drop_last else 0), batch_size)
        total = len(starts) * (epochs if last_epoch else 1)
        warm_steps = warm(warmup * total)

        def factor(step):
            step += first
            return step / warm_steps if step < warm_steps else max(0.0, (total - step) / (total - warm_steps))

        decayed = {"all": lambda p: True, "none": lambda p: False, "matrices": lambda p: p.ndim > 1}[decay]
        optimizer = torch.optim.AdamW(
            [{"params": [p], "weight_decay": weight_decay if decayed(p) else 0.0} for p in model.parameters()], lr=learning_rate
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        model.train(train)
        losses = []
        for _ in range(epochs):
            order = list(torch.randperm(len(rows))) if shuffle else list(range(len(rows)))
            for start in starts:
                batch = collate_fn([rows[int(i)] for i in order[start : start + batch_size]])
                logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
                loss = nn.functional.cross_entropy(logits, batch["labels"], reduction=reduction)
                if zero:
                    optimizer.zero_grad(set_to_none=False)
                loss.backward()
                if clip:
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                if step_schedule:
                    schedule.step()
                losses.append(keep(loss))
        return losses

    return train_by_hand


# ---------------------------------------------------------------- collate_completions


def completions(*, prompt=-100, padding=-100, shift=False, left=False, by_id=False, no_end=False, mask_by_id=False):
    """A right collator that fills tensors in place, with one thing wrong at a time."""

    def collate_completions(rows, pad_token_id):
        width = max(len(row["prompt_ids"] + row["completion_ids"]) for row in rows)
        ids = torch.full((len(rows), width), pad_token_id)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for i, row in enumerate(rows):
            whole = row["prompt_ids"] + row["completion_ids"]
            at = slice(width - len(whole), width) if left else slice(0, len(whole))
            ids[i, at], mask[i, at] = torch.tensor(whole), 1
            wanted = torch.tensor([prompt if prompt == -100 else t for t in row["prompt_ids"]] + row["completion_ids"])
            labels[i, at] = wanted
            if padding != -100:
                labels[i, len(whole) :] = pad_token_id
            if no_end:
                labels[i, len(whole) - 1] = -100
            if shift:
                labels[i] = labels[i].roll(-1)
        if by_id:
            labels[ids == pad_token_id] = -100
        if mask_by_id:
            mask = (ids != pad_token_id).long()
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    return collate_completions


# ---------------------------------------------------------------- packed_mask_and_positions


def packing(*, blocks=True, causal=True, restart=True, dtype=torch.bool, strict=False, neighbours=False):
    """A right mask from loops, with one thing wrong at a time."""

    def packed_mask_and_positions(lengths):
        total = sum(lengths)
        row_of = [row for row, length in enumerate(lengths) for _ in range(length)]
        mask = torch.zeros(total, total, dtype=torch.bool)
        for i in range(total):
            for j in range(total):
                before = j < i if strict else j <= i
                mask[i, j] = (before or not causal) and (row_of[i] == row_of[j] or not blocks) and (abs(i - j) < 2 or not neighbours)
        places = [place for length in lengths for place in range(length)] if restart else list(range(total))
        return mask.to(dtype), torch.tensor(places)

    return packed_mask_and_positions


RIGHT = [
    (check.bad_labels, bad_labels),
    (check.compute_metrics, metrics()),
    (check.expected_calibration_error, calibration()),
    (check.train_by_hand, loop()),
    (check.collate_completions, completions()),
    (check.packed_mask_and_positions, packing()),
]

WRONG = [
    (check.bad_labels, bad_negative_only, "past the last class|label 2 was not found"),
    (check.bad_labels, bad_too_large_only, "-1 and -100 were not found"),
    (check.bad_labels, bad_not_missing, "no label at all"),
    (check.bad_labels, bad_two_classes, "five classes"),
    (check.bad_labels, bad_values, "not its label"),
    (check.compute_metrics, metrics(average="weighted"), "weighed by how common"),
    (check.compute_metrics, metrics(average="micro"), "weighed by how common"),
    (check.compute_metrics, metrics(columns=False), "columns of the logits"),
    (check.compute_metrics, metrics(keys=("accuracy", "macro_f1")), "keys accuracy and f1"),
    (check.compute_metrics, metrics(plain=np.float64), "Python numbers"),
    (check.expected_calibration_error, calibration(gap=lambda value: value), "expected 0.45: the gap"),
    (check.expected_calibration_error, calibration(gap=lambda value: max(0.0, -value)), "absolute value"),
    (check.expected_calibration_error, calibration(weigh=False), "share of all rows"),
    (check.expected_calibration_error, calibration(middle=True), "not its middle"),
    (check.expected_calibration_error, calibration(rows=True), "take means over a bin|absolute|the gap"),
    (check.expected_calibration_error, calibration(ends="lower"), r"belongs to \(0.6, 0.8\]"),
    (check.expected_calibration_error, calibration(convert=np.float32), "Python number"),
    (check.train_by_hand, loop(train=False), "model.train"),
    (check.train_by_hand, loop(shuffle=True), "another order"),
    (check.train_by_hand, loop(drop_last=True), "expected 8"),
    (check.train_by_hand, loop(decay="none"), "no weight decay is at work"),
    (check.train_by_hand, loop(decay="all"), "biases are decayed too"),
    (check.train_by_hand, loop(warm=math.floor), "round up"),
    (check.train_by_hand, loop(first=1), "first factor is 0"),
    (check.train_by_hand, loop(clip=None), "clip them to norm 1"),
    (check.train_by_hand, loop(zero=False), "zero_grad"),
    (check.train_by_hand, loop(last_epoch=False), "total count"),
    (check.train_by_hand, loop(reduction="sum"), "mean over the batch"),
    (check.train_by_hand, loop(keep=lambda loss: loss.detach()), "loss.item"),
    (check.collate_completions, completions(prompt=0), "labels of the prompt"),
    (check.collate_completions, completions(padding=0), "learns to write padding"),
    (check.collate_completions, completions(shift=True), "labels of the prompt|shifted by one"),
    (check.collate_completions, completions(left=True), "padding|pad_token_id on the right"),
    (check.collate_completions, completions(by_id=True), "go by positions"),
    (check.collate_completions, completions(no_end=True), "end mark most of all"),
    (check.collate_completions, completions(mask_by_id=True), "may have the id of the padding"),
    (check.packed_mask_and_positions, packing(blocks=False), "another row's tokens"),
    (check.packed_mask_and_positions, packing(causal=False), "later one"),
    (check.packed_mask_and_positions, packing(restart=False), "each row counts from 0"),
    (check.packed_mask_and_positions, packing(dtype=torch.long), "make it boolean"),
    (check.packed_mask_and_positions, packing(strict=True), "attend to itself"),
    (check.packed_mask_and_positions, packing(neighbours=True), "all earlier tokens"),
]

CHECKS = [check.bad_labels, check.compute_metrics, check.expected_calibration_error, check.train_by_hand, check.collate_completions,
          check.packed_mask_and_positions]  # fmt: skip


@pytest.mark.parametrize(("verify", "answer"), RIGHT, ids=lambda value: getattr(value, "__name__", ""))
def test_a_right_answer_written_differently_passes(verify, answer, capsys):
    verify(answer)
    assert capsys.readouterr().out.count("✓") >= 4


@pytest.mark.parametrize(("verify", "answer", "message"), WRONG, ids=[f"{verify.__name__}-{i}" for i, (verify, *_) in enumerate(WRONG)])
def test_wrong_answers_are_turned_down_in_their_own_words(verify, answer, message):
    with pytest.raises(CheckFailed, match=message):
        verify(answer)


@pytest.mark.parametrize("verify", CHECKS, ids=lambda verify: verify.__name__)
def test_an_untouched_stub_is_told_apart(verify):
    def stub(*args, **kwargs):
        raise NotImplementedError

    with pytest.raises(NotWrittenYet, match="not written yet"):
        verify(stub)
