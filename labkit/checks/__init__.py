"""Property checks for the exercises, one module a lab: `from labkit.checks import lab03 as check`, then `check.masked_mean(masked_mean)`.

A check feeds the learner's code fresh input and tests what must be true of any right answer. It prints what it verified, and on a
failure says in words what is probably wrong. Code still unwritten gives "not written yet"; neither shows a traceback.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from pathlib import Path

from labkit.files import ROOT


class NotWrittenYet(NotImplementedError):
    """The exercise's stub is untouched."""

    def _render_traceback_(self) -> list[str]:  # IPython shows this instead of a traceback
        return [f"○ {self}"]


class CheckFailed(AssertionError):
    """The answer lacks a property it must have."""

    def _render_traceback_(self) -> list[str]:
        return [f"✗ {self}"]


class Report:
    """Collects the properties that were verified; the first that is missing raises CheckFailed with its advice."""

    def __init__(self, exercise: str):
        self.exercise = exercise
        self.verified: list[str] = []

    def __call__(self, what: str, holds, advice: str) -> None:
        """`what` was looked at; where it does not hold, `advice` says what is probably wrong."""
        if not bool(holds):
            raise CheckFailed(f"{self.exercise}: {advice}")
        self.verified.append(what)

    def shape(self, tensor, expected: tuple[int, ...]) -> None:
        """The answer is a tensor of the expected shape."""
        found = tuple(tensor.shape) if hasattr(tensor, "shape") else type(tensor).__name__
        self(f"shape {expected}", found == expected, f"the answer has shape {found}, expected {expected}")


def _learners_line(error: Exception) -> str:
    """Where in the learner's own code the error arose: the last line of its traceback that is neither labkit's nor a library's."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if "site-packages" not in frame.filename and not Path(frame.filename).is_relative_to(ROOT / "labkit") and frame.line:
            return f"\n  in {frame.name}, at: {frame.line.strip()}"
    return ""


@contextlib.contextmanager
def reporting(exercise: str) -> Iterator[Report]:
    """Run a check: print what was verified, or stop with a sentence. torch's random state is put back afterwards."""
    import torch

    report = Report(exercise)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2718)
        try:
            yield report
        except CheckFailed as failure:
            raise failure.with_traceback(None) from None
        except Exception as error:
            # A stub raises it bare; torch raises it with a message, for example when a ModuleList is called.
            if isinstance(error, NotImplementedError) and not str(error):
                raise NotWrittenYet(f"{exercise}: not written yet") from None
            raise CheckFailed(f"{exercise}: your code stopped with {type(error).__name__}: {error}{_learners_line(error)}") from error
    print("   ".join(f"✓ {what}" for what in report.verified))
