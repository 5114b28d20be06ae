import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

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

@pytest.fixture
def one_graph(monkeypatch):
    """Checks that what `Run.wrap` compiles is one graph without a break, and computes the same loss and gradients as the model
    itself, also with --checkpoint-blocks. Kernels are not written: that is the compiler's own business."""
    compiling = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda model, **how: compiling(
        model, **how, fullgraph=True, backend="aot_eager"))

    def check(make, loss, again):
        import common
        run = SimpleNamespace(device=torch.device("cpu"), world=1)
        found = []
        for compiled in (False, True):
            run.args = SimpleNamespace(compile=compiled, checkpoint_blocks=again)
            torch._dynamo.reset()
            torch.manual_seed(0)
            model = common.Run.wrap(run, make())
            torch.manual_seed(1)
            value = loss(model)
            if value.requires_grad:
                value.backward()
            found.append([value.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
        torch.testing.assert_close(*found, rtol=1e-5, atol=1e-7)
    return check
