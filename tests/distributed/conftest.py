"""Helpers of these tests lie beside them and are imported by their names."""

import os
import subprocess
import sys

import pytest

sys.path.insert(0, os.path.dirname(__file__))


@pytest.fixture(scope="session", autouse=True)
def _compiled_by_deepspeed():
    """What DeepSpeed compiles when it is first used on a CPU is compiled before the first test's time runs."""
    build = "from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder as Builder; Builder().load(verbose=False)"
    subprocess.run(
        [sys.executable, "-c", build], check=True, capture_output=True, env={**os.environ, "DS_ACCELERATOR": "cpu"}
    )
