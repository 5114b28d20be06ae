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
