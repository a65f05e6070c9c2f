"""Running labs without a browser, storing what they measured, and making the tables of README and lab 00 from it."""

from __future__ import annotations

import json
import os
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path

from labkit.files import NOTEBOOKS, RESULTS, ROOT, write_text

CELL_TIMEOUT = 900
COST, TABLE = "cost", "results"
UNTITLED = "not measured yet"


def _labs() -> list[Path]:
    return sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))


def find_labs(numbers: list[str], everything: bool = False) -> list[Path]:
    """The notebooks of the given lab numbers ("3" or "03"), or all of them. Raises ValueError naming a number without a lab."""
    known = {path.name[:2]: path for path in _labs()}
    if everything:
        return list(known.values())
    if not numbers:
        raise ValueError(f"name a lab ({', '.join(known)}) or pass --all")
    unknown = [number for number in numbers if number.zfill(2) not in known]
    if unknown:
        raise ValueError(f"no lab {unknown[0]}: choose from {', '.join(known)}")
    return [known[number.zfill(2)] for number in numbers]


def run_labs(paths: list[Path], *, seed: int = 0, save: bool = False) -> int:
    """Execute labs one after the other. Returns 1 if one failed. With `save`, a clean run's outputs and results are stored."""
    if save and seed != 0:
        raise ValueError(f"--save stores the run of seed 0, this is seed {seed}: use `results --seeds` to measure other seeds")
    failed = 0
    for path in paths:
        outcome = execute(path, seed)
        if outcome is None:
            failed += 1
        elif save:
            notebook, record = outcome
            save_notebook(path, notebook)
            save_result(record)
            write_tables()
    return int(failed > 0)


def measure_labs(paths: list[Path], *, seeds: list[int]) -> int:
    """Execute labs with each seed, store the records together, print how each measured value spreads, make the tables."""
    failed = 0
    for path in paths:
        for seed in seeds:
            outcome = execute(path, seed)
            if outcome is None:
                failed += 1
                continue
            save_result(outcome[1])
        if result_path(path.stem).exists():
            print(seed_table(json.loads(result_path(path.stem).read_text(encoding="utf-8"))))
    write_tables()
    return int(failed > 0)


def execute(path: Path, seed: int):
    """Run a notebook in a fresh kernel, with a progress bar. Returns (notebook, record), or None after printing which cell failed."""
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
    from tqdm import tqdm

    notebook = nbformat.read(path, as_version=4)
    code_cells = sum(cell.cell_type == "code" for cell in notebook.cells)
    spent: list[float] = []
    with tempfile.TemporaryDirectory() as folder, tqdm(total=code_cells, desc=f"{path.stem} seed {seed}", file=sys.stderr, ncols=90) as bar:
        record_path = Path(folder) / "record.json"
        env = os.environ | {"LABKIT_SEED": str(seed), "LABKIT_PROGRESS": "off", "LABKIT_RECORD": str(record_path)}
        last = time.monotonic()

        def executed(cell, cell_index, execute_reply) -> None:
            nonlocal last
            spent.append(time.monotonic() - last)
            last = time.monotonic()
            bar.update()

        client = NotebookClient(
            notebook, timeout=CELL_TIMEOUT, kernel_name="python3", on_cell_executed=executed, resources={"metadata": {"path": str(path.parent)}}
        )
        started = time.monotonic()
        try:
            client.execute(env=env)
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
            print(f"\n{path.name}: cell {len(spent)} of {code_cells} failed\n{error}", file=sys.stderr)
            return None
        seconds = time.monotonic() - started
        if not record_path.exists():
            raise RuntimeError(f"{path.name} recorded nothing: call labkit.start at its top, lab.claim and lab.report at its end")
        record = json.loads(record_path.read_text(encoding="utf-8"))
    record |= {"seconds": round(seconds, 1), "slowest_cell_seconds": round(max(spent), 1)}
    return notebook, record


def save_notebook(path: Path, notebook) -> None:
    """Store an executed notebook: no timings, no widget state, nothing that names the machine; written whole or not at all."""
    import nbformat

    notebook.metadata = nbformat.from_dict(
        {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}, "language_info": {"name": "python"}}
    )
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    write_text(path, nbformat.writes(notebook) + "\n")


def result_path(lab: str, profile: str = "offline", device: str = "cpu") -> Path:
    """Where the result of a lab is stored: plain for the offline profile on a CPU, with profile and device in the name otherwise."""
    suffix = "" if profile == "offline" and device.startswith("cpu") else f".{profile}-{device.split()[0]}"
    return RESULTS / f"{lab}{suffix}.json"


def save_result(record: dict) -> None:
    """Add a run to its lab's result file, in place of an earlier run of the same seed. Runs on another device or dtype start it anew."""
    shared = ("lab", "profile", "device", "dtype", "versions")
    path = result_path(record["lab"], record["profile"], record["device"])
    path.parent.mkdir(parents=True, exist_ok=True)
    runs = []
    if path.exists():
        earlier = json.loads(path.read_text(encoding="utf-8"))
        if all(earlier[key] == record[key] for key in shared):
            runs = [run for run in earlier["runs"] if run["seed"] != record["seed"]]
    runs = sorted([*runs, {key: value for key, value in record.items() if key not in shared}], key=lambda run: run["seed"])
    write_text(path, json.dumps({key: record[key] for key in shared} | {"runs": runs}, indent=1, ensure_ascii=False) + "\n")


def seed_table(result: dict) -> str:
    """How each measured value of each claim spreads over the seeds, as text."""
    lines = [f"{result['lab']}, seeds {', '.join(str(run['seed']) for run in result['runs'])}"]
    for claim in result["runs"][0]["claims"]:
        lines.append(f"  {claim['claim']}")
        for name in claim["measured"]:
            values = [c["measured"].get(name) for run in result["runs"] for c in run["claims"] if c["claim"] == claim["claim"]]
            numbers = [v for v in values if isinstance(v, (int, float))]
            spread = f"   (median {statistics.median(numbers):.4g})" if numbers else ""
            lines.append(f"    {name:28}" + " ".join(f"{v:>9.4g}" if isinstance(v, (int, float)) else str(v) for v in values) + spread)
    return "\n".join(lines)


def lab_title(path: Path) -> str:
    """The text of a notebook's first heading."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    source = "".join(cells[0]["source"])
    return next((line.lstrip("# ").strip() for line in source.splitlines() if line.startswith("# ")), path.stem)


def _first_run(lab: str) -> tuple[dict, dict] | None:
    path = result_path(lab)
    if not path.exists():
        return None
    result = json.loads(path.read_text(encoding="utf-8"))
    run = next((run for run in result["runs"] if run["seed"] == 0), None)
    return (result, run) if run else None


def cost_text(lab: str) -> str:
    """One sentence on a lab's minutes and memory, from its stored result."""
    found = _first_run(lab)
    if found is None:
        return f"Time and memory: {UNTITLED}."
    result, run = found
    return (
        f"Time and memory: {run['seconds'] / 60:.1f} minutes and {run['peak_memory_bytes'] / 1e9:.1f} GB on {result['device']}, "
        f"{result['dtype']}{' autocast' * (result['dtype'] != 'float32')}."
    )


def table_text(link_prefix: str) -> str:
    """The table of labs in Markdown: name, minutes, memory, headline result."""
    lines = ["| lab | minutes | memory | what it measured |", "|---|---|---|---|"]
    where: dict[str, list[str]] = {}
    for path in _labs():
        found = _first_run(path.stem)
        minutes, memory, headline = ("", "", UNTITLED)
        if found is not None:
            result, run = found
            machine = f"{result['device']}, {result['dtype']}{' autocast' * (result['dtype'] != 'float32')}, torch {result['versions']['torch']}"
            where.setdefault(machine, []).append(path.stem[:2])
            minutes, memory = f"{run['seconds'] / 60:.1f}", f"{run['peak_memory_bytes'] / 1e9:.1f} GB"
            headline = run.get("headline") or f"{len(run['claims'])} claims hold"
        lines.append(f"| [{lab_title(path)}]({link_prefix}{path.name}) | {minutes} | {memory} | {headline} |")
    if where:
        usual, *others = sorted(where, key=lambda machine: -len(where[machine]))
        exceptions = "".join(f"; {', '.join(where[machine])} on {machine}" for machine in others)
        lines += ["", f"Measured on {usual}{exceptions}. Seed 0; made by `python -m labkit results`."]
    return "\n".join(lines)


def replace_between(text: str, name: str, new: str) -> str:
    """Put `new` between the markers `<!-- name:begin -->` and `<!-- name:end -->`; text without them comes back unchanged."""
    pattern = re.compile(rf"(<!-- {name}:begin -->)\n.*?\n?(<!-- {name}:end -->)", re.DOTALL)
    return pattern.sub(lambda match: f"{match[1]}\n{new}\n{match[2]}", text)


def generated_files() -> dict[Path, str]:
    """What README and the notebooks should contain: path -> whole text, with the generated parts made from data/results."""
    files = {}
    readme = ROOT / "README.md"
    files[readme] = replace_between(readme.read_text(encoding="utf-8"), TABLE, table_text("notebooks/"))
    for path in _labs():
        notebook = json.loads(path.read_text(encoding="utf-8"))
        for cell in notebook["cells"]:
            if cell["cell_type"] == "markdown":
                source = "".join(cell["source"])
                source = replace_between(source, COST, cost_text(path.stem))
                cell["source"] = replace_between(source, TABLE, table_text("")).splitlines(keepends=True)
        files[path] = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
    return files


def write_tables() -> None:
    """Write the generated parts of README and notebooks where they differ from data/results."""
    for path, text in generated_files().items():
        if path.read_text(encoding="utf-8") != text:
            write_text(path, text)
            print(f"wrote {path.relative_to(ROOT)}")
