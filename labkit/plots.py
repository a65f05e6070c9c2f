"""Figures of the labs. Each function draws only the numbers it is given and returns the Figure, which a notebook shows by naming it last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from labkit.measure import Interval
    from labkit.training import History

# Okabe and Ito's colours (2008), told apart with any colour vision.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000")


def _figure(width: float = 7.0, height: float = 3.6, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure that pyplot does not keep, so that a notebook shows it exactly once."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, columns, figsize=(width, height), dpi=90, layout="constrained", squeeze=False)
    plt.close(figure)
    for ax in axes[0]:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color="#dddddd", linewidth=0.8)
        ax.set_axisbelow(True)
    return figure, list(axes[0])


def _title(figure: Figure, text: str) -> None:
    figure.suptitle(text, fontsize=12, fontweight="bold", x=0.01, ha="left")


def training_curves(history: History, title: str) -> Figure:
    """Left: training loss a step (grey) and, at each validation, mean training and validation loss. Right: the learning rate a step."""
    figure, (left, right) = _figure(9.0, 3.4, columns=2)
    steps = [entry["step"] for entry in history.validation]
    left.plot(range(1, len(history.train_loss) + 1), history.train_loss, color="#bbbbbb", linewidth=0.8, label="training, every step")
    left.plot(steps, [entry["train_loss"] for entry in history.validation], "o-", color=COLOURS[0], label="training, mean of the epoch")
    left.plot(steps, [entry["loss"] for entry in history.validation], "s--", color=COLOURS[4], label="validation")
    left.set(xlabel="step", ylabel="loss (nats)", ylim=(0, None))
    left.legend(frameon=False, fontsize=9)
    right.plot(range(1, len(history.learning_rate) + 1), history.learning_rate, color=COLOURS[2])
    right.set(xlabel="step", ylabel="learning rate", ylim=(0, None))
    right.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    _title(figure, title)
    return figure


def loss_panels(histories: Mapping[str, History], title: str) -> Figure:
    """One panel a run, all on one scale: training (solid) and validation (dashed) loss against epochs; a ring marks the kept weights."""
    figure, axes = _figure(3.1 * len(histories), 3.2, columns=len(histories))
    top = max(entry[key] for history in histories.values() for entry in history.validation for key in ("loss", "train_loss"))
    for ax, (name, history) in zip(axes, histories.items()):
        epochs = [entry["epoch"] for entry in history.validation]
        ax.plot(epochs, [entry["train_loss"] for entry in history.validation], "o-", markersize=4, color=COLOURS[0], label="training")
        ax.plot(epochs, [entry["loss"] for entry in history.validation], "s--", markersize=4, color=COLOURS[4], label="validation")
        ax.plot(history.best["epoch"], history.best["loss"], "o", markersize=13, fillstyle="none", color="black", label="kept")
        ax.set(xlabel="epoch", ylim=(0, 1.05 * top), title=name)
    axes[0].set_ylabel("loss (nats)")
    axes[0].legend(frameon=False, fontsize=9)
    _title(figure, title)
    return figure


def label_efficiency(results: Mapping[str, Mapping[int, Interval]], title: str, baselines: Mapping[str, float] | None = None) -> Figure:
    """Accuracy with its interval against the number of labelled rows (log axis), a line a method; baselines as dotted lines."""
    figure, (ax,) = _figure(7.5, 4.2)
    for i, ((name, points), colour) in enumerate(zip(results.items(), COLOURS)):
        rows = sorted(points)
        beside = [n * 1.03 ** (i - (len(results) - 1) / 2) for n in rows]  # a little apart, so that intervals do not hide one another
        values = [points[n].value for n in rows]
        below = [points[n].value - points[n].low for n in rows]
        above = [points[n].high - points[n].value for n in rows]
        ax.errorbar(beside, values, yerr=[below, above], marker="o", capsize=3, color=colour, label=name)
    rows = sorted({n for points in results.values() for n in points})
    for name, value in (baselines or {}).items():
        ax.axhline(value, color="#777777", linestyle=":", linewidth=1)
        ax.text(rows[0], value + 0.004, name, color="#555555", fontsize=9)
    ax.set_xscale("log")
    ax.set_xticks(rows, [f"{n:,}" for n in rows])
    ax.minorticks_off()
    ax.set(xlabel="labelled rows (log scale)", ylabel="test accuracy")
    ax.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _title(figure, title)
    return figure


def intervals(results: Mapping[str, Interval], title: str, xlabel: str, reference: float | None = None) -> Figure:
    """A dot with its interval for each name, top to bottom in the order given; `reference` is a vertical line."""
    figure, (ax,) = _figure(7.0, 0.9 + 0.45 * len(results))
    names: Sequence[str] = list(results)
    for row, name in enumerate(names):
        value = results[name]
        ax.errorbar(value.value, row, xerr=[[value.value - value.low], [value.high - value.value]], marker="o", capsize=3, color=COLOURS[0])
    if reference is not None:
        ax.axvline(reference, color="#777777", linestyle=":", linewidth=1)
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.grid(axis="y", visible=False)
    ax.grid(axis="x", color="#dddddd", linewidth=0.8)
    ax.set_xlabel(xlabel)
    _title(figure, title)
    return figure
