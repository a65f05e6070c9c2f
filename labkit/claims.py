"""A lab's claims: sentences that are checked against what this run measured, printed the same on every machine, and recorded."""

from __future__ import annotations

import math
from numbers import Number


class ClaimFailed(AssertionError):
    """The measurement of this run does not support the sentence."""


def plain_number(name: str, value) -> float | int | str:
    """A measured value as JSON can hold it; a one-element tensor or NumPy scalar becomes a Python number.

    Raises ValueError for nan and infinity (the measurement failed) and TypeError for anything that is not a number or a string.
    """
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, str):
        return value
    if not isinstance(value, Number):
        raise TypeError(f"measured value {name} is a {type(value).__name__}: pass a number, or a string that describes it")
    if not math.isfinite(value):
        raise ValueError(f"measured value {name} is {value}: the measurement failed, look at the cell that made it")
    return float(f"{value:.6g}") if isinstance(value, float) else value


def check_claim(text: str, holds, measured: dict) -> dict:
    """Print `✓ text` if the claim holds, else raise ClaimFailed with the measured values. Returns the record."""
    if hasattr(holds, "item"):
        holds = holds.item()
    if not isinstance(holds, bool):
        raise TypeError(f"claim {text!r} was given {holds!r}: pass True or False, the result of a comparison")
    if not measured:
        raise ValueError(f"claim {text!r} names no measured value: pass what it compares, for example full=0.83")
    values = {name: plain_number(name, value) for name, value in measured.items()}
    if not holds:
        listed = ", ".join(f"{name} = {value:.4g}" if isinstance(value, float) else f"{name} = {value}" for name, value in values.items())
        raise ClaimFailed(f"✗ {text}\n  measured: {listed}")
    print(f"✓ {text}")
    return {"claim": text, "measured": values}
