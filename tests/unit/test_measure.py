import time

import numpy as np
import pytest
import torch
from torch import nn

from labkit import measure
from labkit.measure import accuracy_interval, bytes_on_disk, count_parameters, median_latency, paired_bootstrap, peak_memory


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.tied, self.classifier = nn.Linear(10, 10, bias=False), nn.Linear(10, 10, bias=False), nn.Linear(10, 3)
        self.tied.weight = self.body.weight


def test_parameters_are_counted_once_and_the_head_apart():
    model = Model()
    counted = count_parameters(model)
    assert (counted.total, counted.trainable, counted.head) == (133, 100, 33)
    model.body.requires_grad_(False)
    assert count_parameters(model).share == 0
    assert str(count_parameters(Model())) == "100 of 133 trainable (75.19%), and a head of 33"
    with pytest.raises(ValueError, match="the head is not part of this model"):
        count_parameters(model, nn.Linear(2, 2))


def test_bytes_on_disk_of_files_and_folders(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_bytes(b"12345")
    (tmp_path / "y").write_bytes(b"123")
    assert bytes_on_disk(tmp_path / "y") == 3 and bytes_on_disk(tmp_path) == 8
    with pytest.raises(FileNotFoundError, match="nothing does not exist: save it first"):
        bytes_on_disk(tmp_path / "nothing")


def test_latency_leaves_the_warm_up_out():
    calls = []

    def call():
        calls.append(1)
        time.sleep(0.05 if len(calls) <= 2 else 0.001)

    assert median_latency(call, repeats=5, warmup=2) < 0.04 and len(calls) == 7
    with pytest.raises(ValueError, match="repeats 0"):
        median_latency(call, repeats=0)


def test_peak_memory_sees_what_a_block_allocates():
    with peak_memory() as memory:
        block = torch.ones(64, 1024, 1024)  # 256 MiB
        time.sleep(0.05)
        del block
    assert 200e6 < memory.bytes < 600e6


def test_intervals_cover_what_they_should():
    rng = np.random.default_rng(0)
    hits = 0
    for seed in range(100):
        interval = accuracy_interval(rng.random(200) < 0.8, seed=seed)
        hits += interval.low <= 0.8 <= interval.high
    assert 88 <= hits <= 100


def test_a_paired_comparison_is_sharper_than_two_bare_accuracies():
    rng = np.random.default_rng(0)
    a = rng.random(600) < 0.8
    b = a & (rng.random(600) > 0.05)  # b fails where a fails, and now and then elsewhere
    paired = paired_bootstrap(a, b)
    assert paired.value == pytest.approx(a.mean() - b.mean()) and paired.low > 0 and paired.excludes_zero
    assert accuracy_interval(a).low < accuracy_interval(b).high, "the bare intervals overlap"
    assert str(paired).startswith("+0.0") and not str(accuracy_interval(a)).startswith("+")
    assert paired_bootstrap(a, b, seed=1) == paired_bootstrap(a, b, seed=1)
    with pytest.raises(ValueError, match="600 rows against 500"):
        paired_bootstrap(a, b[:500])


def test_confusion_matrix_counts_true_classes_down_and_predicted_ones_across():
    labels, predicted = [0, 0, 1, 2, 2, 2], [0, 1, 1, 2, 0, 2]
    assert measure.confusion_matrix(labels, predicted, 3).tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 2]]
    with pytest.raises(ValueError, match="a prediction is 3, and the classes are 0 to 2"):
        measure.confusion_matrix([0, 1], [0, 3], 3)
    with pytest.raises(ValueError, match="give one of each for every row"):
        measure.confusion_matrix([0, 1], [0], 3)


def test_expected_calibration_error_is_the_mean_gap_weighted_by_rows():
    certain = [[0.95, 0.05]] * 4 + [[0.6, 0.4]] * 6
    labels = [0, 0, 0, 1, 0, 0, 0, 1, 1, 1]
    bins = measure.calibration_bins(certain, labels)
    assert [(round(one.confidence, 2), one.accuracy, one.count) for one in bins] == [(0.6, 0.5, 6), (0.95, 0.75, 4)]
    assert measure.expected_calibration_error(certain, labels) == pytest.approx(0.6 * 0.1 + 0.4 * 0.2)
    assert measure.expected_calibration_error([[1.0, 0.0], [0.0, 1.0]], [0, 1]) == 0
    with pytest.raises(ValueError, match="do not sum to 1"):
        measure.expected_calibration_error([[2.0, 1.0]], [0])
    with pytest.raises(ValueError, match="bins is 0"):
        measure.calibration_bins(certain, labels, bins=0)
