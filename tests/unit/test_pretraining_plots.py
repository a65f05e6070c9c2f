"""The figures of lab 02 draw the numbers they are given, and nothing else."""

import numpy as np

from labkit import plots


def drawn(ax, index):
    line = ax.get_lines()[index]
    return np.asarray(line.get_xdata()).tolist(), np.asarray(line.get_ydata()).tolist()


def test_language_curve_draws_every_curve_and_names_its_lines():
    figure = plots.language_curve({"training": {1: 2.0, 2: 1.0}, "held out": {2: 1.5}}, "a title", "x", "y", {"floor": 0.1})
    (ax,) = figure.axes
    assert drawn(ax, 0) == ([1, 2], [2.0, 1.0]) and drawn(ax, 1) == ([2], [1.5])
    assert drawn(ax, 2)[1] == [0.1, 0.1] and "floor" in [text.get_text() for text in ax.texts]
    assert figure.get_suptitle() == "a title" and ax.get_yscale() == "log"
    assert plots.language_curve({"a": {0: 0.0}}, "", "", "", log=False).axes[0].get_yscale() == "linear"


def test_scaling_shows_one_point_and_one_curve_a_model():
    left, right = plots.scaling({100: 2.0, 1000: 1.0}, {"small": {1e6: 3.0, 2e6: 2.0}, "large": {1e7: 1.0}}, "", "loss").axes
    assert drawn(left, 0) == ([100, 1000], [2.0, 1.0]) and drawn(left, 2) == ([1000], [1.0])
    assert drawn(right, 0) == ([1e6, 2e6], [3.0, 2.0]) and {ax.get_xscale() for ax in (left, right)} == {"log"}


def test_forgetting_marks_where_each_text_began():
    runs = {"plain": {0: 10.0, 5: 20.0}, "replay": {0: 10.0, 5: 12.0}}
    for ax in plots.forgetting({"stories": runs, "reviews": runs}, "", "x", "y").axes:
        assert drawn(ax, 0) == ([0, 5], [10.0, 20.0]) and drawn(ax, 1) == ([0, 5], [10.0, 12.0])
        assert drawn(ax, 2)[1] == [10.0, 10.0]


def test_lines_begin_at_zero_unless_a_value_is_negative():
    above = plots.lines({"a": {1: 0.5, 2: 3.0}}, "title", "x", "y").axes[0]
    below = plots.lines({"a": {1: 0.5, 2: 3.0}, "b": {1: -0.4, 2: 1.0}}, "title", "x", "y").axes[0]
    assert above.get_ylim()[0] == 0 and below.get_ylim()[0] < -0.4
    assert list(above.get_xticks()) == [int(x) for x in above.get_xticks()]
