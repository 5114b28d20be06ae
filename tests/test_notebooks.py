"""notebooks/: each runs from a fresh clone, and what stands in it is what its cells make.

python tests/test_notebooks.py [NAME …] runs them where they lie, with the checkpoints in runs/, and writes them with pictures.
"""

import hashlib
import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAMES = ["mae", "automae", "mixedae", "mra"]

def read(name):
    return json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text())

def code(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]

def fingerprint(notebook):
    """Of the code, so that a cell changed after it last ran is found out."""
    return hashlib.sha256("\n\n".join("".join(cell["source"]) for cell in code(notebook)).encode()).hexdigest()[:16]

def kinds(notebook):
    """What each cell left: pictures or text."""
    return [["picture" if any(kind.startswith("image/") for kind in output.get("data", {})) else "text"
             for output in cell["outputs"] if output["output_type"] != "stream"] for cell in code(notebook)]

def execute(path):
    """Runs a notebook in its folder → it, with its outputs."""
    import nbformat
    from nbclient import NotebookClient
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}).execute()
    notebook.metadata["fingerprint"] = fingerprint(notebook)
    for cell in code(notebook):
        cell.metadata.pop("execution", None)                                             # when it ran: noise in a diff
    return notebook

def test_there_is_a_notebook_for_each_script_and_no_other():
    assert sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb")) == sorted(NAMES)

@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_stands_with_the_pictures_of_its_own_cells(name):
    notebook = read(name)
    assert [cell["execution_count"] for cell in code(notebook)] == list(range(1, 1 + len(code(notebook))))   # in one go
    assert notebook["metadata"]["fingerprint"] == fingerprint(notebook), f"stale: python tests/test_notebooks.py {name}"
    assert sum("picture" in found for found in kinds(notebook)) >= 5
    outputs = [output for cell in code(notebook) for output in cell["outputs"]]
    assert not any(output["output_type"] == "error" or output.get("name") == "stderr" for output in outputs)
    assert (ROOT / "notebooks" / f"{name}.ipynb").stat().st_size < 1_000_000
    assert str(ROOT) not in json.dumps(notebook) and "/tmp" not in json.dumps(notebook)

@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """{name: a notebook being run in a tree without runs/}, two at a time, a thread each."""
    root = tmp_path_factory.mktemp("clone")
    (root / "notebooks").mkdir()
    for path in [*ROOT.glob("*.py"), *(ROOT / "notebooks" / f"{name}.ipynb" for name in NAMES)]:
        shutil.copy(path, root / path.relative_to(ROOT))
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(2) as pool:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield {name: pool.submit(execute, root / "notebooks" / f"{name}.ipynb") for name in NAMES}

@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_from_a_fresh_clone(name, executed):
    assert kinds(executed[name].result()) == kinds(read(name)), f"stale: python tests/test_notebooks.py {name}"

if __name__ == "__main__":
    import nbformat
    for name in sys.argv[1:] or NAMES:
        nbformat.write(execute(path := ROOT / "notebooks" / f"{name}.ipynb"), path)
        print(f"{path}: {path.stat().st_size / 1e3:.0f} kB")
