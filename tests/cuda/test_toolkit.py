"""Where CUDA's tools are looked for, with toolkits that are only folders."""

from __future__ import annotations

import pytest
from source_tree import script

toolkit = script("cuda_toolkit")


def make_toolkit(root, library="lib64", shared="libcudart.so"):
    """A folder that looks like an installation of nvcc."""
    for folder in ("bin", "include", library):
        (root / folder).mkdir(parents=True)
    (root / "include" / "cuda_runtime_api.h").touch()
    (root / library / "libcudart_static.a").touch()
    (root / library / shared).touch()
    nvcc = root / "bin" / "nvcc"
    nvcc.write_text(
        f'#!/bin/sh\ncase "$1" in --version) echo "release 13.0, V13.0.88";; *) echo "#\\$ TOP={root}" >&2;; esac\n'
    )
    nvcc.chmod(0o755)
    return nvcc


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """A machine with no toolkit at all, and nothing remembered."""
    for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setattr(toolkit, "USUAL", tmp_path / "nowhere")
    monkeypatch.setattr(toolkit.sys, "path", [str(tmp_path / "site-packages")])
    toolkit.find.cache_clear()
    toolkit.tool.cache_clear()
    yield tmp_path
    toolkit.find.cache_clear()
    toolkit.tool.cache_clear()


def test_none(bare, capsys):
    with pytest.raises(
        toolkit.ToolMissing, match=r"no CUDA compiler: looked for nvcc in CUDACXX.*pip install --no-deps -r"
    ):
        toolkit.find()
    assert toolkit.main(["nvcc"]) == 1
    assert "no CUDA compiler" in capsys.readouterr().err


def test_packages_of_the_environment(bare):
    root = bare / "site-packages" / "nvidia" / "cu13"
    nvcc = make_toolkit(root, library="lib", shared="libcudart.so.13")
    found = toolkit.find()
    assert (found.nvcc, found.root, found.library, found.version) == (nvcc, root, root / "lib", "13.0.88")
    # What cmake cannot find by itself there.
    assert f"-DCMAKE_CUDA_FLAGS=-L{root / 'lib'}" in found.cmake_arguments
    assert f"-DCUDA_CUDART={root / 'lib' / 'libcudart.so.13'}" in found.cmake_arguments


def test_order(bare, monkeypatch):
    make_toolkit(bare / "site-packages" / "nvidia" / "cu13", library="lib")
    usual = make_toolkit(bare / "nowhere")
    assert toolkit.find().nvcc == usual
    assert len(toolkit.find().cmake_arguments) == 2
    home = make_toolkit(bare / "home")
    monkeypatch.setenv("CUDA_HOME", str(bare / "home"))
    toolkit.find.cache_clear()
    assert toolkit.find().nvcc == home
    named = make_toolkit(bare / "named")
    monkeypatch.setenv("CUDACXX", str(named))
    toolkit.find.cache_clear()
    assert toolkit.find().nvcc == named


def test_a_toolkit_without_its_runtime_is_named(bare, monkeypatch):
    nvcc = make_toolkit(bare / "half")
    (bare / "half" / "lib64" / "libcudart_static.a").unlink()
    monkeypatch.setenv("CUDACXX", str(nvcc))
    with pytest.raises(toolkit.ToolMissing, match=r"incomplete: .*half/bin/nvcc \(no libcudart_static.a"):
        toolkit.find()
    with pytest.raises(toolkit.ToolMissing, match=r"no cuobjdump: looked on PATH.*pip install --no-deps -r"):
        toolkit.tool("cuobjdump")
