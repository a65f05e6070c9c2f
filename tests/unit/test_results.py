"""Running notebooks and storing what they measured."""

import json

import nbformat
import pytest

from labkit import results
from labkit.__main__ import main

SETUP = 'import labkit\nlab = labkit.start("90_tiny")'


def notebook(folder, *cells):
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# 90 Tiny"), *map(nbformat.v4.new_code_cell, (SETUP, *cells))])
    path = folder / "90_tiny.ipynb"
    nbformat.write(made, path)
    return path


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "NOTEBOOKS", tmp_path)
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(results, "ROOT", tmp_path)
    (tmp_path / "README.md").write_text("# R\n<!-- results:begin -->\n<!-- results:end -->\n")
    return tmp_path


def test_a_clean_run_is_stored_with_its_results_and_tables(place):
    path = notebook(place, 'lab.claim("seeds are seeds", True, seed=lab.seed)', 'lab.report(headline="all well")')
    assert results.run_labs([path], save=True) == 0
    stored = nbformat.read(path, as_version=4)
    assert [cell.execution_count for cell in stored.cells[1:]] == [1, 2, 3] and all("execution" not in cell.metadata for cell in stored.cells)
    record = json.loads((place / "results" / "90_tiny.json").read_text(encoding="utf-8"))
    assert record["runs"][0]["claims"] == [{"claim": "seeds are seeds", "measured": {"seed": 0}}] and record["runs"][0]["seconds"] > 0
    assert "[90 Tiny](notebooks/90_tiny.ipynb)" in (place / "README.md").read_text(encoding="utf-8")


def test_a_failing_run_says_which_cell_and_leaves_the_notebook_alone(place, capsys):
    path = notebook(place, "1 / 0")
    before = path.read_bytes()
    assert results.run_labs([path], save=True) == 1
    assert path.read_bytes() == before and not (place / "results").exists()
    assert "90_tiny.ipynb: cell 2 of 2 failed" in capsys.readouterr().err


def test_seeds_are_stored_together_and_their_spread_is_printed(place, capsys):
    path = notebook(place, 'lab.claim("seeds are seeds", True, seed=lab.seed)', 'lab.report(headline="x")')
    before = path.read_bytes()
    assert results.measure_labs([path], seeds=[0, 1]) == 0
    assert path.read_bytes() == before
    record = json.loads((place / "results" / "90_tiny.json").read_text(encoding="utf-8"))
    assert [run["seed"] for run in record["runs"]] == [0, 1]
    assert "seeds 0, 1" in capsys.readouterr().out


def test_only_seed_0_is_saved(place):
    path = notebook(place, 'lab.claim("x", True, a=1)')
    with pytest.raises(ValueError, match="--save stores the run of seed 0, this is seed 3"):
        results.run_labs([path], seed=3, save=True)


def test_unknown_labs_are_named(place, capsys):
    notebook(place)
    with pytest.raises(ValueError, match="no lab 77: choose from 90"):
        results.find_labs(["77"])
    with pytest.raises(ValueError, match=r"name a lab \(90\) or pass --all"):
        results.find_labs([])
    assert main(["run", "77"]) == 1 and "error: no lab 77" in capsys.readouterr().err


def test_generated_text_replaces_only_what_is_between_its_marks():
    assert results.replace_between("a\n<!-- x:begin -->\nold\n<!-- x:end -->\nb", "x", "new") == "a\n<!-- x:begin -->\nnew\n<!-- x:end -->\nb"
    assert results.replace_between("no marks", "x", "new") == "no marks"


def test_the_table_says_which_labs_were_measured_elsewhere(place):
    (place / "results").mkdir()
    for lab, dtype in (("01_a", "bfloat16"), ("02_b", "bfloat16"), ("03_c", "float32")):
        nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(f"# {lab}")]), place / f"{lab}.ipynb")
        run = {"seed": 0, "seconds": 60, "peak_memory_bytes": 1e9, "headline": "h", "claims": []}
        record = {"device": "cpu (X)", "dtype": dtype, "versions": {"torch": "2"}, "runs": [run]}
        (place / "results" / f"{lab}.json").write_text(json.dumps(record), encoding="utf-8")
    last = results.table_text("").splitlines()[-1]
    assert last.startswith("Measured on cpu (X), bfloat16 autocast, torch 2; 03 on cpu (X), float32, torch 2. Seed 0")
    assert results.cost_text("03_c").endswith("on cpu (X), float32.")
