"""Every notebook runs from a fresh copy, with less training, and its stored outputs are of today's cells.

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

# A notebook that finds no trained model makes one in about a minute. In a test the same cells run with fewer
# images and steps. For each notebook: the code to replace, and what stands in its place.
SHORTER = {
    "mae": {
        '"3000", "--epochs", "5"': '"100", "--epochs", "1"',
        "range(151)": "range(11)",
        "range(100)": "range(5)",
    },
    "automae": {
        '"1500", "--epochs", "4"': '"100", "--epochs", "1"',
        "steps=600": "steps=60",
    },
    "mixedae": {'"2400", "--epochs", "4"': '"100", "--epochs", "1"'},
    "mra": {
        "data = Scenes(400": "data = Scenes(20",
        '"--limit", "600"': '"--limit", "50"',
        '"--epochs", "8"': '"--epochs", "1"',
        '"--labels", "50", "--epochs", "5"': '"--labels", "5", "--epochs", "1"',
    },
    "detection": {'"800", "--epochs", "2"': '"100", "--epochs", "1"'},
}


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


def execute(path, shorter=False):
    """→ the notebook, run in its folder, with new outputs. shorter: with the changes of SHORTER. Raises
    CellExecutionError if a cell fails."""
    notebook = nbformat.read(path, as_version=4)
    changes = SHORTER[path.stem] if shorter else {}
    for cell in code_cells(notebook):
        for old, new in changes.items():
            cell.source = cell.source.replace(old, new)
    resources = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    notebook.metadata["fingerprint"] = fingerprint(notebook)
    for cell in code_cells(notebook):
        cell.metadata.pop("execution", None)                # when it ran: noise in a diff
    return notebook


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """→ {name: a notebook that is being run, shorter, in a copy without runs/}. Two run at a time, with one
    thread each."""
    copy = tmp_path_factory.mktemp("copy")
    (copy / "notebooks").mkdir()
    for path in [*ROOT.glob("*.py"), *ROOT.glob("notebooks/*.ipynb")]:
        shutil.copy(path, copy / path.relative_to(ROOT))
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(2) as pool:
        patch.setenv("OMP_NUM_THREADS", "1")
        paths = {name: copy / f"notebooks/{name}.ipynb" for name in NAMES}
        yield {name: pool.submit(execute, path, shorter=True) for name, path in paths.items()}


@pytest.mark.parametrize("name", NAMES)
def test_the_stored_outputs_are_of_todays_cells(name):
    notebook, path = read(name), ROOT / f"notebooks/{name}.ipynb"
    assert notebook.metadata["fingerprint"] == fingerprint(notebook), f"stale: tests/test_notebooks.py {name}"
    code = "\n\n".join(cell.source for cell in code_cells(notebook))
    assert all(old in code for old in SHORTER[name]), "a long training is in the notebook with other numbers"
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    assert not any(output.output_type == "error" or output.get("name") == "stderr" for output in outputs)
    assert sum("image/jpeg" in output.get("data", {}) for output in outputs) >= 5
    assert path.stat().st_size < 1_000_000
    texts = [str(output.get("text")) for output in outputs] + [cell.source for cell in notebook.cells]
    assert not any(str(ROOT) in text or "/tmp" in text for text in texts)


@pytest.mark.parametrize("name", NAMES)
def test_it_runs_from_a_fresh_copy_and_shows_todays_scripts(name, executed):
    fresh = executed[name].result()
    assert printed_sources(fresh) == printed_sources(read(name)), f"stale: tests/test_notebooks.py {name}"


if __name__ == "__main__":
    for name in sys.argv[1:] or NAMES:
        path = ROOT / f"notebooks/{name}.ipynb"
        nbformat.write(execute(path), path)
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")
