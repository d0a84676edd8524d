"""Importing pyadapt costs what importing torch costs, and changes nothing in other libraries."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

import pyadapt

HEAVY = (
    "transformers",
    "peft",
    "accelerate",
    "deepspeed",
    "bitsandbytes",
    "diffusers",
    "trl",
    "datasets",
    "huggingface_hub",
)


def run(code):
    """What `code` prints in a process of its own; every warning but that of a missing extension is an error."""
    command = [sys.executable, "-W", "error", "-W", "ignore:pyadapt's native kernels:RuntimeWarning", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_import_brings_in_no_other_library():
    loaded = run("import sys, pyadapt; print(*sys.modules)").split()
    assert not set(HEAVY) & set(loaded)
    assert "torch" not in loaded or "torch" in run("import sys, torch; print(*sys.modules)").split()


def test_any_module_may_be_the_first():
    """No module waits for another one to be imported before it: each is imported alone, in a fork of one process."""
    code = """
import os, pkgutil, traceback
import accelerate, torch.distributed.fsdp, torch.distributed.tensor, transformers.trainer
import pyadapt

names = [module.name for module in pkgutil.walk_packages(pyadapt.__path__, "pyadapt.")]
for name in names:
    if not name.endswith("__main__") and os.fork() == 0:
        try:
            __import__(name)
        except BaseException:
            print(name, traceback.format_exc(), flush=True)
        os._exit(0)
    while True:
        try:
            os.wait()
        except ChildProcessError:
            break
print(len(names), "modules")
"""
    said = run(code)
    assert re.fullmatch(r"\d{3} modules\n", said), said


def test_wrapping_a_plain_module_brings_in_no_other_library():
    code = """
import sys, torch, pyadapt
model = pyadapt.wrap(torch.nn.Sequential(torch.nn.Linear(4, 4)), pyadapt.LoraConfig(target_modules=["0"]))
model(torch.randn(2, 4)).sum().backward()
model.merge_adapter()
pyadapt.unwrap(model)
pyadapt.quantize(model, skip=[])
print(*sys.modules)
"""
    loaded = run(code).split()
    assert not set(HEAVY) & set(loaded)


@pytest.mark.parametrize("name", pyadapt.__all__)
def test_each_public_name_is_there(name):
    value = getattr(pyadapt, name)
    assert name in dir(pyadapt)
    assert name == "__version__" or value.__doc__


def test_names_that_are_not_there():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = pyadapt.nothing
    assert len(set(pyadapt.__all__)) == len(pyadapt.__all__)
    namespace = {}
    exec("from pyadapt import *", namespace)
    assert set(pyadapt.__all__) <= namespace.keys()


def test_type_checkers_see_the_same_names():
    """The names under TYPE_CHECKING are those that are loaded when used."""
    import ast
    import inspect

    tree = ast.parse(inspect.getsource(pyadapt))
    block = next(
        node for node in tree.body if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
    )
    seen = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == {**pyadapt._HOMES, **dict.fromkeys(pyadapt._MODULES)}


def test_version_is_that_of_the_package():
    import pathlib

    project = pathlib.Path(pyadapt.__file__).parent.parent / "pyproject.toml"
    if not project.exists():
        pytest.skip("pyproject.toml is not beside an installed package")
    assert re.search(r'^version = "(.*)"', project.read_text(), re.MULTILINE)[1] == pyadapt.__version__
