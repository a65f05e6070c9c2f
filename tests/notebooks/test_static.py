"""What must be true of every stored notebook, found by reading it."""

import ast
import json
import re
from pathlib import Path

import pytest

from labkit.files import NOTEBOOKS, ROOT
from labkit.results import generated_files

LABS = sorted(NOTEBOOKS.glob("*.ipynb"))
START = "00_start_here"


def load(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def source(cell: dict) -> str:
    return "".join(cell["source"])


def cells(path: Path, kind: str) -> list[dict]:
    return [cell for cell in load(path)["cells"] if cell["cell_type"] == kind]


def grader(cell: dict) -> dict:
    return cell["metadata"].get("nbgrader", {})


every_lab = pytest.mark.parametrize("path", LABS, ids=lambda p: p.stem)


@every_lab
def test_named_and_small(path):
    assert re.fullmatch(r"\d\d_[a-z0-9_]+\.ipynb", path.name)
    assert path.stat().st_size < 1_000_000


@every_lab
def test_stored_from_one_clean_run(path):
    code = cells(path, "code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert not [out for cell in code for out in cell["outputs"] if out["output_type"] == "error"]
    assert not [out for cell in code for out in cell["outputs"] if out.get("name") == "stderr"], "something printed to stderr"


@every_lab
def test_metadata_is_plain(path):
    notebook = load(path)
    assert notebook["metadata"]["kernelspec"] == {"display_name": "Python 3", "language": "python", "name": "python3"}
    assert "widgets" not in notebook["metadata"]
    text = path.read_text(encoding="utf-8")
    assert "application/vnd.jupyter.widget" not in text
    assert all("execution" not in cell["metadata"] for cell in notebook["cells"])


@every_lab
def test_outputs_name_no_machine(path):
    outputs = json.dumps([cell["outputs"] for cell in cells(path, "code")])
    outputs = re.sub(r'"image/png": "[^"]*"', "", outputs)
    assert not re.search(r"(?<![\w.])/(home|root|Users|usr|work|tmp|opt|var|mnt|private)/", outputs)
    assert not re.search(r"[A-Z]:\\\\", outputs)


@every_lab
def test_cell_sizes(path):
    notebook = load(path)
    sizes = sorted(len([line for line in source(cell).splitlines() if line.strip()]) for cell in cells(path, "code"))
    assert sizes[-1] <= 25 and sizes[len(sizes) // 2] <= 10
    assert all(sizes)
    if path.stem != START:
        assert 40 <= len(notebook["cells"]) <= 70, f"{len(notebook['cells'])} cells"


@every_lab
def test_sections(path):
    first = source(load(path)["cells"][0])
    assert re.match(rf"# {path.name[:2]} \S", first) and "You will be able to" in first and "<!-- cost:begin -->" in first
    headings = [line for cell in cells(path, "markdown") for line in source(cell).splitlines() if line.startswith("## ")]
    assert headings[-3:] == ["## What we measured", "## Where this breaks", "## Going further"]
    setup = source(cells(path, "code")[0])
    assert setup.startswith("import labkit\n") and f'lab = labkit.start("{path.stem}")' in setup
    assert any("lab.report(" in source(cell) for cell in cells(path, "code")[-1:]), "the last code cell is the report"
    assert sum("lab.claim(" in source(cell) for cell in cells(path, "code")) >= 1
    assert sum("**Guess first.**" in source(cell) for cell in cells(path, "markdown")) >= 2


@every_lab
def test_measured_numbers_are_not_compared_and_claims_are(path):
    for cell in cells(path, "code"):
        tags = cell["metadata"].get("tags", [])
        text = source(cell)
        if "lab.claim(" in text or grader(cell).get("grade"):
            assert tags == [], f"its output must be compared: {text[:60]}"
        if "plots." in text or "lab.report(" in text:
            assert "nbval-ignore-output" in tags, text[:60]
        assert set(tags) <= {"nbval-ignore-output"}


@every_lab
def test_exercises_have_marks_hints_and_a_check(path):
    notebook = load(path)["cells"]
    solutions = [i for i, cell in enumerate(notebook) if grader(cell).get("solution")]
    assert len(solutions) >= (1 if path.stem == START else 3)
    for i in solutions:
        text = source(notebook[i])
        assert text.count("### BEGIN SOLUTION") == text.count("### END SOLUTION") == 1
        assert re.match(r"(@torch\.no_grad\(\)\n)?(def|class) ", text), "an untouched stub must not raise when the cell runs"
        following = next(cell for cell in notebook[i + 1 :] if cell["cell_type"] == "code")
        assert grader(following).get("grade") and grader(following)["points"] >= 1 and "check." in source(following)
        before = source(notebook[i - 1])
        assert re.search(r"### Exercise \d+\.\d+ ★+ \(\d+ minutes\)", before) and "<details><summary>Hint</summary>" in before
    for i, cell in enumerate(notebook):
        if "BEGIN SOLUTION" in source(cell) and cell["cell_type"] == "code":
            assert i in solutions
        if grader(cell):
            assert grader(cell)["schema_version"] == 3


def test_grade_ids_are_unique_in_the_course():
    ids = [grader(cell)["grade_id"] for path in LABS for cell in cells(path, "code") if grader(cell)]
    assert len(ids) == len(set(ids))


@every_lab
def test_links_resolve(path):
    for cell in cells(path, "markdown"):
        for target in re.findall(r"\]\(([^)#]+)\)", source(cell)):
            if not target.startswith("http"):
                assert (path.parent / target).exists(), target


@every_lab
def test_code_is_as_we_write_it(path):
    for cell in cells(path, "code"):
        text = source(cell)
        tree = ast.parse(text)  # no magics, no shell
        assert not re.search(r"pip install|warnings\.(filter|simplefilter|warn\s*=)|trust_remote_code|pickle", text)
        assert not [node for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler) and node.type is None]
        assert not re.search(r"^\s*#\s*\w+(\.\w+)*\(.*\)\s*$", text, re.MULTILINE), "commented-out code"
        assert "LABKIT_PROFILE" not in text and "lab.profile" not in text, "a notebook never branches on the profile"


@every_lab
def test_prose_types_no_measured_accuracy(path):
    for cell in cells(path, "markdown"):
        prose = re.sub(r"<!-- (\w+):begin -->.*?<!-- \1:end -->", "", source(cell), flags=re.DOTALL)
        prose = re.sub(r"\$.*?\$|`.*?`|arXiv [\d.]+", "", prose, flags=re.DOTALL)
        assert not re.findall(r"\b0\.\d{2,3}\b", prose), "a number measured elsewhere, typed by hand"


def test_generated_parts_agree_with_the_results():
    stale = [path.relative_to(ROOT).as_posix() for path, text in generated_files().items() if path.read_text(encoding="utf-8") != text]
    assert not stale, "run `python -m labkit results --tables`"


def test_every_lab_has_a_stored_result_with_all_its_claims():
    for path in LABS:
        result = json.loads((ROOT / "data" / "results" / f"{path.stem}.json").read_text(encoding="utf-8"))
        run = next(run for run in result["runs"] if run["seed"] == 0)
        printed = [
            line[2:]
            for cell in cells(path, "code")
            if "lab.claim(" in source(cell)
            for out in cell["outputs"]
            for line in "".join(out.get("text", [])).splitlines()
            if line.startswith("✓ ")
        ]
        assert printed == [claim["claim"] for claim in run["claims"]]
        assert run["headline"]


def test_readme_names_both_commands_and_only_what_exists():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "pip install -r requirements.txt && .venv/bin/python -m jupyterlab notebooks/00_start_here.ipynb" in text
    assert "pip install -r requirements.txt && .venv/bin/python -m pytest" in text
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("http") or (ROOT / target).exists(), target
