"""Student notebooks from the complete ones, and a course folder for nbgrader, both made by nbgrader's own converters.

FOLDER/students/            03_finetuning_pytorch.ipynb …   solutions out, stubs in, outputs cleared: give these to learners
FOLDER/course/source/       03_finetuning_pytorch/03_finetuning_pytorch.ipynb …   the complete labs, as nbgrader wants them
FOLDER/course/release/      what `nbgrader generate_assignment` made of them
FOLDER/course/nbgrader_config.py, gradebook.db
"""

from __future__ import annotations

import os
import shutil
import sysconfig
import tempfile
from pathlib import Path

from labkit.files import NOTEBOOKS

COURSE = "finetuning"
STUB = "# YOUR CODE HERE\nraise NotImplementedError()"
CONFIG = f'''"""nbgrader settings of this course. Collect into submitted/STUDENT/LAB/LAB.ipynb, then `nbgrader autograde LAB`."""

c = get_config()  # noqa: F821
c.CourseDirectory.course_id = {COURSE!r}
c.ExecutePreprocessor.timeout = 900
c.ClearSolutions.code_stub = {{"python": {STUB!r}}}
'''


def release(folder: Path) -> int:
    """Write student notebooks and the course folder under `folder`, which must be new or empty. Returns 0.

    Everything is made in a temporary folder first, so a failure leaves nothing behind. Raises FileExistsError, before anything is
    written, when `folder` holds a file: it might be a learner's.
    """
    folder = Path(folder).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is not empty, and a learner's work may be in it: name a new folder, and move files over yourself")
    labs = sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".release-") as name:
        made = Path(name) / "made"
        course = made / "course"
        course.mkdir(parents=True)
        (course / "nbgrader_config.py").write_text(CONFIG, encoding="utf-8", newline="\n")
        for lab in labs:
            source = course / "source" / lab.stem
            source.mkdir(parents=True)
            shutil.copyfile(lab, source / lab.name)
        generate(course, [lab.stem for lab in labs])
        students = made / "students"
        students.mkdir()
        for lab in labs:
            shutil.copyfile(course / "release" / lab.stem / lab.name, students / lab.name)
        if folder.exists():
            folder.rmdir()  # it is empty, and Windows does not rename onto a folder
        made.rename(folder)
    print(f"wrote {len(labs)} student notebooks and the nbgrader course to {folder.name}/students and {folder.name}/course")
    return 0


def generate(course: Path, assignments: list[str]) -> None:
    """Run nbgrader's generate_assignment on each assignment of a course folder. Raises RuntimeError with its log when it fails."""
    from nbgrader.apps import NbGraderAPI
    from traitlets.config import Config

    # nbgrader starts the program `alembic` by name, which is found only if this Python's own scripts are on the path.
    scripts = sysconfig.get_path("scripts")
    if scripts not in os.environ["PATH"].split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([scripts, os.environ["PATH"]])
    config = Config()
    config.CourseDirectory.root = str(course)
    config.CourseDirectory.course_id = COURSE
    config.ClearSolutions.code_stub = {"python": STUB}
    api = NbGraderAPI(config=config)
    for assignment in assignments:
        result = api.generate_assignment(assignment, force=False, create=True)
        if not result["success"]:
            raise RuntimeError(f"nbgrader could not make the student version of {assignment}:\n{result['log']}")
    api.gradebook.close()
