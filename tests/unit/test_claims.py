import json
import math

import numpy as np
import pytest
import torch

from labkit.claims import ClaimFailed, check_claim
from labkit.runtime import Lab


def lab() -> Lab:
    return Lab("99_test", "offline", 0, torch.device("cpu"), torch.float32)


def test_a_claim_that_holds_prints_one_line_without_numbers(capsys):
    record = check_claim("LoRA is near", True, {"lora": torch.tensor(0.81), "full": np.float64(0.82)})
    assert capsys.readouterr().out == "✓ LoRA is near\n"
    assert record == {"claim": "LoRA is near", "measured": {"lora": pytest.approx(0.81, abs=1e-6), "full": 0.82}}


def test_a_claim_that_fails_raises_with_the_values():
    with pytest.raises(ClaimFailed, match=r"✗ LoRA is near\n  measured: lora = 0.5, full = 0.82"):
        check_claim("LoRA is near", np.bool_(False), {"lora": 0.5, "full": 0.82})


@pytest.mark.parametrize("holds", [None, 1, "yes", torch.tensor([True, False])])
def test_a_claim_takes_true_or_false_only(holds):
    with pytest.raises((TypeError, RuntimeError, ValueError)):
        check_claim("x", holds, {"a": 1.0})


@pytest.mark.parametrize("value", [math.nan, math.inf, torch.tensor(math.nan)])
def test_a_failed_measurement_is_no_evidence(value):
    with pytest.raises(ValueError, match="measured value a is (nan|inf): the measurement failed"):
        check_claim("x", True, {"a": value})


def test_a_claim_needs_a_measured_value():
    with pytest.raises(ValueError, match="names no measured value"):
        check_claim("x", True, {})


def test_a_cell_can_run_twice_and_the_record_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LABKIT_RECORD", str(tmp_path / "record.json"))
    run = lab()
    run.claim("b", True, n=1)
    run.claim("a", True, n=1)
    run.claim("b", True, n=2)
    run.report("all is well")
    record = json.loads((tmp_path / "record.json").read_text(encoding="utf-8"))
    assert [(c["claim"], c["measured"]["n"]) for c in record["claims"]] == [("a", 1), ("b", 2)]
    assert record["headline"] == "all is well" and record["peak_memory_bytes"] > 1e6
    assert "2 claims hold" in capsys.readouterr().out


def test_pick_follows_the_profile():
    run = lab()
    assert run.pick(offline=1, hub=2) == 1
    run.profile = "hub"
    assert run.pick(offline=1, hub=2) == 2
