"""The student version: no solution leaks, stubs say so kindly, solutions pasted back pass, and nbgrader grades both ends of the scale."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig

import pytest

from labkit.files import NOTEBOOKS, ROOT
from labkit.release import release

LAB = "00_start_here"  # graded whole, because it runs in seconds
LABS = sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("release") / "course-2027"
    release(folder)
    return folder


def load(path):
    return json.loads(path.read_text(encoding="utf-8"))


def source(cell):
    return "".join(cell["source"])


def solutions(lab):
    """grade_id -> the lines between the marks, of the complete notebook."""
    found = {}
    for cell in load(NOTEBOOKS / f"{lab}.ipynb")["cells"]:
        match = re.search(r"### BEGIN SOLUTION\n(.*?)\n\s*### END SOLUTION", source(cell), re.DOTALL)
        if match and cell["cell_type"] == "code":
            found[cell["metadata"]["nbgrader"]["grade_id"]] = match[1]
    return found


@pytest.mark.parametrize("lab", LABS)
def test_no_solution_and_no_output_leaks(made, lab):
    student = load(made / "students" / f"{lab}.ipynb")
    code = [cell for cell in student["cells"] if cell["cell_type"] == "code"]
    text = "\n".join(source(cell) for cell in code)
    assert solutions(lab)
    for solution in solutions(lab).values():
        lines = [line.strip() for line in solution.splitlines() if len(line.strip()) > 30]
        assert lines and not [line for line in lines if line in text]
    assert "BEGIN SOLUTION" not in text and text.count("raise NotImplementedError()") == len(solutions(lab))
    assert not [cell for cell in code if cell["outputs"] or cell["execution_count"]]


@pytest.mark.parametrize("lab", LABS)
def test_stubs_say_not_written_yet_without_a_traceback_and_solutions_pass(made, lab):
    """Run only the set-up, exercise and definition cells and the checks: nothing that trains."""

    def only_defines(text: str) -> bool:
        return all(isinstance(node, (ast.FunctionDef, ast.ClassDef)) for node in ast.parse(text).body)

    student = load(made / "students" / f"{lab}.ipynb")["cells"]
    complete = load(NOTEBOOKS / f"{lab}.ipynb")["cells"]

    def check(cells):
        from IPython.core.interactiveshell import InteractiveShell

        shell = InteractiveShell.instance()
        shell.reset(new_session=False)
        answers = []
        for cell in cells:
            text, grader = source(cell), cell["metadata"].get("nbgrader", {})
            if cell["cell_type"] != "code":
                continue
            if grader.get("grade"):
                answers.append(shell.run_cell(text).error_in_exec)
            elif grader.get("solution") or text.startswith("import labkit") or (only_defines(text) and "lab." not in text):
                assert shell.run_cell(text.replace("lab = labkit.start", "lab = print")).success, text
        return answers

    unwritten = check(student)
    assert len(unwritten) == len(solutions(lab))
    for error in unwritten:
        assert "not written yet" in str(error) and error._render_traceback_() == [f"○ {error}"]
    assert check(complete) == [None] * len(solutions(lab))


def test_it_never_writes_into_a_folder_with_something_in_it(made, tmp_path):
    learner = tmp_path / "mine" / "students" / f"{LAB}.ipynb"
    learner.parent.mkdir(parents=True)
    learner.write_text("a week of work")
    with pytest.raises(FileExistsError, match=r"mine is not empty, and a learner's work may be in it: name a new folder"):
        release(tmp_path / "mine")
    assert learner.read_text() == "a week of work" and sorted(p.name for p in (tmp_path / "mine").iterdir()) == ["students"]


def test_it_writes_into_an_empty_folder_and_leaves_no_leftovers(made):
    assert sorted(p.name for p in made.iterdir()) == ["course", "students"]
    assert [p.name for p in made.parent.iterdir()] == [made.name]


def test_nbgrader_gives_full_marks_to_the_solved_and_none_to_the_untouched(made, tmp_path):
    course = tmp_path / "course"
    shutil.copytree(made / "course", course)
    for student, notebook in (("solved", NOTEBOOKS / f"{LAB}.ipynb"), ("untouched", made / "students" / f"{LAB}.ipynb")):
        place = course / "submitted" / student / LAB
        place.mkdir(parents=True)
        shutil.copyfile(notebook, place / notebook.name)
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])  # as in an activated environment
    command = [sys.executable, "-m", "nbgrader", "autograde", LAB, "--create"]
    done = subprocess.run(command, cwd=course, capture_output=True, text=True, env=os.environ | {"PATH": path}, timeout=300)
    assert done.returncode == 0, done.stderr
    from nbgrader.api import Gradebook

    with Gradebook(f"sqlite:///{course / 'gradebook.db'}") as gradebook:
        scores = {student: gradebook.find_submission(LAB, student) for student in ("solved", "untouched")}
        assert scores["solved"].score == scores["solved"].max_score >= 1
        assert scores["untouched"].score == 0 and scores["untouched"].max_score == scores["solved"].max_score


def test_the_command_says_what_it_did(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "labkit", "release", str(tmp_path / "new")], cwd=ROOT, capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == 0 and f"wrote {len(LABS)} student notebooks" in done.stdout, done.stderr
    again = subprocess.run(
        [sys.executable, "-m", "labkit", "release", str(tmp_path / "new")], cwd=ROOT, capture_output=True, text=True, env=os.environ
    )
    assert again.returncode == 1 and "is not empty" in again.stderr and "Traceback" not in again.stderr
