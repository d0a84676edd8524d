"""Every kernel test runs once for each instruction set that is there, emulated ones included."""

from __future__ import annotations

import pytest
import torch

from pyadapt import native

ISAS = native.isas()


@pytest.fixture(autouse=True)
def _one_thread():
    """These layers are tiny: a team costs more than it saves, far more on a busy machine. Tests of teams set one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=ISAS or ["no native kernels"])
def isa(request):
    """The instruction set in use during the test."""
    if not ISAS:
        pytest.skip("waits for the native extension: pip install -e .")
    with native.using_isa(request.param):
        yield request.param


@pytest.fixture
def needs_native():
    """For tests of the extension itself."""
    if not ISAS:
        pytest.skip("waits for the native extension: pip install -e .")
