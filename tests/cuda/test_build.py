"""The CUDA extension as cmake builds it for users; two architectures, since test_static.py looks at all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from source_tree import ROOT, script

check, objects, toolkit = script("check_cuda_build"), script("cuda_objects"), script("cuda_toolkit")
ARCHITECTURES = (80, 90)
FOLDER = ROOT / "build" / "cuda-extension"

pytestmark = pytest.mark.slow


def run(*command: str | Path) -> str:
    """Standard output; a failure shows all that was said."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def extension() -> Path:
    """Built with PYADAPT_CUDA=on; what has not changed since the last time is kept."""
    import pybind11

    try:
        arguments = toolkit.find().cmake_arguments
    except toolkit.ToolMissing as error:
        pytest.skip(f"waits for CUDA's tools: {error}")
    run(
        "cmake",
        *("-S", ROOT, "-B", FOLDER, "-G", "Ninja"),
        *arguments,
        "-DPYADAPT_CUDA=on",
        f"-DPYADAPT_CUDA_ARCHITECTURES={';'.join(f'{a}-real' for a in ARCHITECTURES)}",
        "-DPYADAPT_WERROR=ON",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    )
    run("cmake", "--build", FOLDER, "--target", "_cuda", "-j", "2")
    (file,) = FOLDER.glob("_cuda*.so")
    return file


def test_it_needs_no_cuda_library_and_holds_what_was_asked_for(extension):
    assert check.extension_problems(extension, ARCHITECTURES, None) == []


WITHOUT_A_DRIVER = """
import importlib.machinery, sys, torch
_cuda = importlib.machinery.ExtensionFileLoader("_cuda", sys.argv[1]).load_module()
assert _cuda.architectures == "80-real,90-real", _cuda.architectures
x = torch.zeros(4, 8, dtype=torch.float16)
try:
    _cuda.linear_forward(x, x, None, None, x, False, None, 0)
except ValueError as error:
    print(error)
print(_cuda.device_count())
"""


def test_it_imports_where_there_is_no_driver(extension):
    done = run(sys.executable, "-W", "ignore", "-c", WITHOUT_A_DRIVER, extension).splitlines()
    assert done[0] == "x is on the CPU; wanted a CUDA device"
    assert int(done[1]) >= 0
