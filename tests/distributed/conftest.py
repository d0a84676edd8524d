"""Helpers of these tests lie beside them and are imported by their names."""

import os
import subprocess
import sys

import pytest

sys.path.insert(0, os.path.dirname(__file__))

# Where ninja is, which DeepSpeed compiles with when it is first used.
os.environ["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])

COMPILE = """
from deepspeed.ops.op_builder.cpu import CPUAdamBuilder, ShareMemCommBuilder
ShareMemCommBuilder().load(verbose=False)
CPUAdamBuilder().load(verbose=False)
"""


@pytest.fixture(scope="session", autouse=True)
def _compiled_by_deepspeed():
    """What DeepSpeed compiles when it is first used on a CPU is compiled before the first test's time runs."""
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
