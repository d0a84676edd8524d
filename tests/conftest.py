"""What every test shares: no network, quiet libraries, one thread a worker, one seed a test."""

from __future__ import annotations

import os
import sys

import pytest

# Nothing in the tests may look for anything on the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("ACCELERATE_USE_CPU", "true")
# Routes by the table alone: no test depends on what was measured, and none writes to the user's cache folder.
os.environ["PYADAPT_AUTOTUNE"] = "0"
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config):
    """Without a native extension plain torch serves, and says so once; results are the same."""
    config.addinivalue_line("filterwarnings", "ignore:pyadapt's (native|CUDA) kernels:RuntimeWarning")


@pytest.fixture(autouse=True)
def _seed():
    """Each test starts from the same random state, alone or in any order."""
    import torch

    torch.manual_seed(1234)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    """No test finds code that an earlier one has compiled: a limit on recompilation counts it."""
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()
