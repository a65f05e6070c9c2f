"""Figures of the labs. Each function draws only the numbers it is given and returns the Figure, which a notebook shows by naming it last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from labkit.measure import CalibrationBin, Interval
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


def before_after(
    results: Mapping[str, Sequence[Interval]], title: str, xlabel: str, names: tuple[str, str], guess: Mapping[str, float] | None = None
) -> Figure:
    """Two dots with their intervals for each row, the second above; a grey mark at a guess. From top to bottom in the order given."""
    figure, (ax,) = _figure(7.0, 1.2 + 0.3 * len(results))
    for row, pair in enumerate(results.values()):
        for value, colour, offset, marker in zip(pair, (COLOURS[1], COLOURS[0]), (0.15, -0.15), "so"):
            bars = [[value.value - value.low], [value.high - value.value]]
            ax.errorbar(value.value, row + offset, xerr=bars, marker=marker, markersize=5, linewidth=1.2, color=colour)
    for name, colour, marker in zip(names, (COLOURS[1], COLOURS[0]), "so"):
        ax.plot([], [], marker=marker, markersize=5, color=colour, label=name)
    if guess:
        ax.plot([guess[name] for name in results], range(len(results)), "|", markersize=11, color="#555555", label="a guess among the options")
    ax.set_yticks(range(len(results)), list(results), fontsize=9)
    ax.set(xlabel=xlabel, xlim=(-0.03, 1.03), ylim=(len(results) - 0.5, -0.5))
    ax.grid(axis="y", visible=False)
    ax.grid(axis="x", color="#dddddd", linewidth=0.8)
    ax.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.35 / max(1, 0.3 * len(results)) - 0.02), ncols=3)
    _title(figure, title)
    return figure


def lines(series: Mapping[str, Mapping[float, float]], title: str, xlabel: str, ylabel: str) -> Figure:
    """A line through the points {x: y} of each name, from zero up unless a y is negative; a single unnamed series has no legend.

    The points are joined in the order given. Whole numbers x get whole ticks.
    """
    from matplotlib.ticker import MaxNLocator

    figure, (ax,) = _figure(7.0, 3.4)
    for (name, points), colour, mark in zip(series.items(), COLOURS, "os^Dv"):
        ax.plot(list(points), list(points.values()), marker=mark, markersize=4, color=colour, label=name)
    if all(isinstance(x, int) for points in series.values() for x in points):
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    negative = any(y < 0 for points in series.values() for y in points.values())
    ax.set(xlabel=xlabel, ylabel=ylabel, ylim=(None if negative else 0, None))
    if list(series) != [""]:
        ax.legend(frameon=False, fontsize=9)
    _title(figure, title)
    return figure


def line_panels(series: Mapping[str, Mapping[float, float]], title: str, xlabel: str) -> Figure:
    """One panel a name, each with its own scale from zero up: a line through the points {x: y}; the name says what y is."""
    figure, axes = _figure(4.2 * len(series), 3.2, columns=len(series))
    for ax, (name, points), colour in zip(axes, series.items(), COLOURS):
        ax.plot(list(points), list(points.values()), "o-", color=colour)
        ax.set(xlabel=xlabel, ylabel=name, ylim=(0, None))
        ax.set_xticks(list(points))
    _title(figure, title)
    return figure


def bar_panels(panels: Mapping[str, Sequence[float]], names: Sequence[str], title: str, xlabel: str) -> Figure:
    """One panel of horizontal bars a name, all on one scale: one value for each of `names`, top to bottom."""
    figure, axes = _figure(2.1 * len(panels) + 0.8, 0.9 + 0.25 * len(names), columns=len(panels))
    top = max(max(values) for values in panels.values())
    for ax, (name, values) in zip(axes, panels.items()):
        ax.barh(range(len(names)), values, color=COLOURS[0])
        ax.set_yticks(range(len(names)), names if ax is axes[0] else [])
        ax.set(xlim=(0, 1.05 * top), ylim=(len(names) - 0.5, -0.5), title=name, xlabel=xlabel)
        ax.grid(axis="y", visible=False)
        ax.grid(axis="x", color="#dddddd", linewidth=0.8)
    _title(figure, title)
    return figure


def token_strip(tokens: Sequence[str], entropy: Sequence[float], surprise: Sequence[float], title: str) -> Figure:
    """A bar for the entropy and a dot for the surprise (nats) of each token of a text, the tokens themselves below."""
    figure, (ax,) = _figure(max(7.0, 0.27 * len(tokens)), 3.6)
    ax.bar(range(len(tokens)), entropy, color=COLOURS[5], label="entropy: what the model expects")
    ax.plot(range(len(tokens)), surprise, "o", markersize=5, color=COLOURS[4], label="surprise: what came")
    ax.set_xticks(range(len(tokens)), [token.strip(" ") if token.strip() else repr(token) for token in tokens], rotation=90, fontsize=9)
    ax.set(ylabel="nats", xlim=(-0.7, len(tokens) - 0.3), ylim=(0, None))
    ax.legend(frameon=False, fontsize=9, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, borderpad=0)
    _title(figure, title)
    return figure


def language_curve(
    curves: Mapping[str, Mapping[float, float]], title: str, xlabel: str, ylabel: str, lines: Mapping[str, float] | None = None, log: bool = True
) -> Figure:
    """A line for each name through its points {x: y}, the first one thin, as a noisy curve is; `lines` are horizontal, with their names."""
    figure, (ax,) = _figure(8.0, 4.2)
    for i, ((name, points), colour) in enumerate(zip(curves.items(), ("#bbbbbb", *COLOURS))):
        ax.plot(list(points), list(points.values()), "o-" if i else "-", linewidth=1.5 if i else 1, color=colour, label=name)
    for name, value in (lines or {}).items():
        ax.axhline(value, color="#777777", linestyle=":", linewidth=1)
        ax.annotate(name, (1.01, value), xycoords=("axes fraction", "data"), va="center", color="#555555", fontsize=9)
    if log:
        _log_axis(ax.yaxis)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.legend(frameon=False, fontsize=9)
    _title(figure, title)
    return figure


def scaling(finals: Mapping[int, float], curves: Mapping[str, Mapping[float, float]], title: str, ylabel: str) -> Figure:
    """Log axes. Left: the loss at the end against parameters. Right: the loss against compute (floating point operations), a line a model."""
    figure, (left, right) = _figure(9.0, 3.8, columns=2)
    left.plot(list(finals), list(finals.values()), "-", color="#bbbbbb")
    for (count, value), colour in zip(finals.items(), COLOURS):
        left.plot(count, value, "o", color=colour)
    left.set_xscale("log")
    left.set_xticks(list(finals), [f"{count / 1e6:.2g}M" for count in finals])
    left.minorticks_off()
    left.set(xlabel="parameters (log scale)", ylabel=ylabel)
    for (name, points), colour in zip(curves.items(), COLOURS):
        right.plot(list(points), list(points.values()), "o-", markersize=4, color=colour, label=name)
    right.set_xscale("log")
    right.set(xlabel="training compute, operations (log scale)")
    right.legend(frameon=False, fontsize=9)
    for ax in (left, right):
        _log_axis(ax.yaxis)
    _title(figure, title)
    return figure


def forgetting(panels: Mapping[str, Mapping[str, Mapping[float, float]]], title: str, xlabel: str, ylabel: str) -> Figure:
    """One panel a text, each with its own log scale: a line a run through its points {x: y}; a dotted line marks the value at the start."""
    figure, axes = _figure(4.5 * len(panels), 3.4, columns=len(panels))
    for ax, (text, runs) in zip(axes, panels.items()):
        for (name, points), colour, style in zip(runs.items(), (COLOURS[4], COLOURS[0]), ("o-", "s--")):
            ax.plot(list(points), list(points.values()), style, markersize=5, color=colour, label=name)
        ax.axhline(next(iter(points.values())), color="#777777", linestyle=":", linewidth=1)
        _log_axis(ax.yaxis)
        ax.set(xlabel=xlabel, title=text)
    axes[0].set_ylabel(ylabel)
    axes[-1].legend(frameon=False, fontsize=9)
    _title(figure, title)
    return figure


def confusion(counts: Sequence[Sequence[int]], names: Sequence[str], title: str) -> Figure:
    """A square table of counts, the true class down and the predicted one across; darker is more."""
    figure, (ax,) = _figure(1.6 + 1.1 * len(names), 1.4 + 0.8 * len(names))
    most = max(max(row) for row in counts)
    ax.imshow(counts, cmap="Blues", vmin=0, vmax=most)
    for i, row in enumerate(counts):
        for j, count in enumerate(row):
            ax.text(j, i, f"{count:,}", ha="center", va="center", color="white" if count > most / 2 else "black")
    ax.set_xticks(range(len(names)), names)
    ax.set_yticks(range(len(names)), names)
    ax.set(xlabel="predicted", ylabel="true")
    ax.grid(visible=False)
    _title(figure, title)
    return figure


def reliability(curves: Mapping[str, Sequence[CalibrationBin]], title: str) -> Figure:
    """Accuracy against confidence, a line a model, a dot a bin whose area shows its number of rows; on the diagonal the two agree."""
    figure, (ax,) = _figure(5.4, 4.4)
    ax.plot([0, 1], [0, 1], color="#777777", linestyle=":", linewidth=1)
    for (name, bins), colour in zip(curves.items(), COLOURS):
        confidence, accuracy = [one.confidence for one in bins], [one.accuracy for one in bins]
        total = sum(one.count for one in bins)
        ax.plot(confidence, accuracy, "-", color=colour, label=name)
        ax.scatter(confidence, accuracy, s=[15 + 400 * one.count / total for one in bins], color=colour, alpha=0.5)
    low = min(min(one.confidence, one.accuracy) for bins in curves.values() for one in bins)
    ax.set(xlabel="confidence: the largest probability", ylabel="accuracy", xlim=(low - 0.05, 1.03), ylim=(low - 0.05, 1.03))
    ax.legend(frameon=False, fontsize=9, loc="upper left")
    _title(figure, title)
    return figure


def stacked_bars(
    parts: Mapping[str, Mapping[str, float]], title: str, xlabel: str, marks: Mapping[str, float] | None = None, log: bool = False
) -> Figure:
    """A horizontal bar a name, made of parts side by side: {part: {name: value}}, top to bottom; `marks` are vertical lines with names.

    log: on a log scale parts cannot be told apart by length, so each bar is drawn whole.
    """
    names = list(next(iter(parts.values())))
    figure, (ax,) = _figure(8.0, 1.0 + 0.36 * len(names))
    if log:
        ax.barh(names, [sum(values[name] for values in parts.values()) for name in names], color=COLOURS[0])
        ax.set_xscale("log")
    else:
        left = dict.fromkeys(names, 0.0)
        for (part, values), colour in zip(parts.items(), COLOURS):
            ax.barh(names, [values[name] for name in names], left=list(left.values()), color=colour, label=part)
            left = {name: left[name] + values[name] for name in names}
        ax.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
    for name, value in (marks or {}).items():
        ax.axvline(value, color="#777777", linestyle=":", linewidth=1)
        ax.annotate(name, (value, 1.0), xycoords=("data", "axes fraction"), ha="center", va="bottom", color="#555555", fontsize=9)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.grid(axis="y", visible=False)
    ax.grid(axis="x", color="#dddddd", linewidth=0.8)
    ax.set_xlabel(xlabel)
    _title(figure, title)
    return figure


def pareto(groups: Mapping[str, Mapping[str, tuple[float, float]]], title: str, xlabel: str, ylabel: str, best: str = "high") -> Figure:
    """A named dot for each (cost, quality), a colour a group; a line joins those that no other beats in both. Cost on a log axis, less is better.

    best: "high" where more quality is better, "low" where less is.
    """
    figure, (ax,) = _figure(9.0, 5.0)
    sign = 1 if best == "high" else -1
    points = [(cost, quality) for group in groups.values() for cost, quality in group.values()]
    front = [p for p in points if not any(q[0] <= p[0] and sign * q[1] >= sign * p[1] and q != p for q in points)]
    ax.step(*zip(*sorted(set(front))), where="post", color="#bbbbbb", linewidth=2, zorder=1, label="nothing is better in both")
    for (name, group), colour, mark in zip(groups.items(), COLOURS, "os^DvPX"):
        ax.scatter(*zip(*group.values()), color=colour, marker=mark, s=36, zorder=2, label=name)
    ax.set_xscale("log")
    ticks = [value * 10**power for power in range(-3, 7) for value in (1, 2, 5)]
    low, high = 0.85 * min(p[0] for p in points), 1.35 * max(p[0] for p in points)
    ax.set_xticks([t for t in ticks if low <= t <= high], [f"{t:g}" for t in ticks if low <= t <= high])
    ax.minorticks_off()
    ax.set(xlabel=xlabel, ylabel=ylabel, xlim=(low, high))
    ax.margins(y=0.1)
    ax.legend(frameon=False, fontsize=9, loc="lower right")
    _title(figure, title)
    _label_dots(ax, [(label, *point, colour) for group, colour in zip(groups.values(), COLOURS) for label, point in group.items()])
    return figure


def _label_dots(ax: Axes, dots: Sequence[tuple[str, float, float, str]]) -> None:
    """Write each (text, x, y, colour) beside its dot, off all dots and the texts before it; a thin line leads to a text that is far away."""
    ax.figure.draw_without_rendering()
    scale, places = ax.figure.dpi / 72, ax.transData.transform([dot[1:3] for dot in dots])
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in places]
    left, bottom, right, top = ax.bbox.extents
    for (text, *point, colour), (x, y) in sorted(zip(dots, places), key=lambda one: -one[1][1]):
        width, height, tried = 4.7 * scale * len(text), 9 * scale, []
        for rise in sorted(range(-80, 81, 5), key=lambda r: abs(r - 3)):
            for side in (1, -1):
                start = x + 7 * scale if side > 0 else x - 7 * scale - width
                box = (start, y + (rise - 3) * scale, start + width, y + (rise - 3) * scale + height)
                hidden = sum(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken)
                outside = box[0] < left or box[2] > right or box[1] < bottom or box[3] > top
                tried.append((hidden + 10 * outside, len(tried), rise, side, box))
        _, _, rise, side, box = min(tried)
        taken.append(box)
        line = {"arrowstyle": "-", "color": colour, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 2} if abs(rise) > 12 else None
        options = {"textcoords": "offset points", "ha": "left" if side > 0 else "right", "fontsize": 8, "color": colour, "arrowprops": line}
        ax.annotate(text, point, xytext=(7 * side, rise - 3), **options)


def _log_axis(axis) -> None:
    """A log scale whose ticks are plain numbers."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.axes.set_yscale("log")
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())
