"""The check of lab 00, start here."""

from __future__ import annotations

import torch

from labkit.checks import reporting


def accuracy(candidate) -> None:
    """The share of predictions that equal their label."""
    with reporting("accuracy") as report:
        predictions, labels = torch.tensor([1, 0, 1, 1, 0]), torch.tensor([1, 1, 1, 0, 0])
        value = candidate(predictions, labels)
        report(
            "one number", isinstance(value, (int, float)), f"the answer is a {type(value).__name__}: return a Python number, for example with .item()"
        )
        report("a share, not a count", 0 <= value <= 1, f"the answer is {value}: divide the number of right predictions by the number of all")
        report("counts what is right", abs(value - 0.6) < 1e-6, f"three of five predictions are right, which is 0.6, and the answer is {value:.3g}")
        all_wrong = candidate(1 - labels, labels)
        report(
            "zero when all are wrong",
            abs(all_wrong) < 1e-6,
            f"every prediction is wrong and the answer is {all_wrong:.3g}: compare each with its own label",
        )
