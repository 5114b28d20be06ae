"""Every notebook runs from a fresh copy, and what is stored in it is what its cells give today.

python tests/test_notebooks.py [NAME …] runs notebooks where they are, with the checkpoints in runs/, and
stores the outputs.
"""

import hashlib
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NAMES = ["mae", "automae", "mixedae", "mra", "detection"]


def read(name):
    return nbformat.read(ROOT / f"notebooks/{name}.ipynb", as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def fingerprint(notebook):
    """→ a hash of all code: it shows that a cell was edited after the notebook was last run."""
    source = "\n\n".join(cell.source for cell in code_cells(notebook))
    return hashlib.sha256(source.encode()).hexdigest()[:16]


def printed_sources(notebook):
    """→ what each cell prints that shows a piece of a script."""
    shown = [cell for cell in code_cells(notebook) if "inspect.getsource" in cell.source]
    return ["".join(output.get("text", "") for output in cell.outputs) for cell in shown]


def execute(path):
    """→ the notebook, run in its folder, with new outputs. Raises CellExecutionError if a cell fails."""
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    notebook.metadata["fingerprint"] = fingerprint(notebook)
    for cell in code_cells(notebook):
        cell.metadata.pop("execution", None)                # when it ran: noise in a diff
    return notebook


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """→ {name: a notebook that is being run in a copy without runs/}, two at a time, with one thread each."""
    copy = tmp_path_factory.mktemp("copy")
    (copy / "notebooks").mkdir()
    for path in [*ROOT.glob("*.py"), *ROOT.glob("notebooks/*.ipynb")]:
        shutil.copy(path, copy / path.relative_to(ROOT))
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(2) as pool:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield {name: pool.submit(execute, copy / f"notebooks/{name}.ipynb") for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_the_stored_outputs_are_of_todays_cells(name):
    notebook, path = read(name), ROOT / f"notebooks/{name}.ipynb"
    assert notebook.metadata["fingerprint"] == fingerprint(notebook), f"stale: tests/test_notebooks.py {name}"
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    assert not any(output.output_type == "error" or output.get("name") == "stderr" for output in outputs)
    assert sum("image/jpeg" in output.get("data", {}) for output in outputs) >= 5
    assert path.stat().st_size < 1_000_000
    assert str(ROOT) not in path.read_text() and "/tmp" not in path.read_text()


@pytest.mark.parametrize("name", NAMES)
def test_it_runs_from_a_fresh_copy_and_shows_todays_scripts(name, executed):
    fresh = executed[name].result()
    assert printed_sources(fresh) == printed_sources(read(name)), f"stale: tests/test_notebooks.py {name}"


if __name__ == "__main__":
    for name in sys.argv[1:] or NAMES:
        path = ROOT / f"notebooks/{name}.ipynb"
        nbformat.write(execute(path), path)
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")
