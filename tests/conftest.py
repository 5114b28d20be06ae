import importlib
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
torch.set_num_threads(1)                                                # machines are shared, and sums come out alike

def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "ignore:The image decoding and encoding capabilities:DeprecationWarning")
    config.addinivalue_line("markers", "slow: minutes of training, left out unless asked for with -m slow")

def pytest_collection_modifyitems(config, items):
    for item in items:
        if "slow" in item.keywords and "slow" not in config.getoption("markexpr"):
            item.add_marker(pytest.mark.skip(reason="minutes of training: -m slow"))

@pytest.fixture
def cli(request, capsys, monkeypatch):
    """Runs a script's command line in this process, test_NAME.py's NAME.py or another → exit code, stdout, stderr."""
    def run(*arguments, script=None):
        import common
        script = script or importlib.import_module(request.module.__name__.removeprefix("test_"))
        monkeypatch.setattr(sys, "argv", [Path(script.__file__).name])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            common.entry(lambda: script.main([str(argument) for argument in arguments]))
        return end.value.code, *capsys.readouterr()
    return run
