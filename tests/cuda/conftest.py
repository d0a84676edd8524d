"""Where the CUDA kernels run: on the GPU where there is one, else on an emulated one (docs/cuda-testing.md).

The emulated device works on CPU tensors: the kernels are executed from the PTX that nvcc made of them, as sm_80 and as
sm_75. The same tests run on both, values and gradients.
"""

from __future__ import annotations

import pytest
import torch
from places import GPU, PLACES, Place

from pyadapt import native


@pytest.fixture(scope="session")
def emulated():
    """The CUDA module on the emulated device, built when it is first asked for."""
    from emulator import build

    return build.load()


@pytest.fixture(params=PLACES)
def place(request):
    """A place where the CUDA kernels serve during the test."""
    if GPU:
        if native.cuda_isa() is None:
            pytest.fail("there is a GPU, but pyadapt's CUDA kernels do not serve it: build with PYADAPT_CUDA=on")
        yield Place(torch.device("cuda", 0), native.cuda_isa())
        return
    from emulator import control

    module = request.getfixturevalue("emulated")
    control.set_capability(module, int(request.param.removeprefix("sm_")))
    control.set_order(module, "random")  # threads run in no order that a kernel could lean on
    control.set_multiprocessors(module, 4)
    control.reset(module)
    with native.emulating_cuda(module):
        yield Place(torch.device("cpu"), request.param)
