"""What all test files share: where the scripts are, one thread, and the fixture `cli`."""

import importlib
import json
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
# Machines are shared, and sums come out alike, also in subprocesses.
os.environ["OMP_NUM_THREADS"] = "1"


def log_of(out):
    """→ the lines of a run's log.jsonl."""
    return [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]


@pytest.fixture(autouse=True)
def seeded():
    import torch
    torch.manual_seed(0)


@pytest.fixture
def cli(request, capsys, monkeypatch):
    """cli(*arguments) runs a script's command line in this process: NAME.py for test_NAME.py, or `script`.
    → exit code, stdout, stderr."""
    def run(*arguments, script=None):
        import common
        script = script or importlib.import_module(request.module.__name__.removeprefix("test_"))
        monkeypatch.setattr(sys, "argv", [Path(script.__file__).name])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            common.entry(lambda: script.main([str(argument) for argument in arguments]))
        return end.value.code, *capsys.readouterr()
    return run
