"""The emulator's fragment tables against an independent oracle: the layouts of CuTe, from PyPI's nvidia-cutlass."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from emulator import source_route


def cutlass_include() -> Path | None:
    """CUTLASS's headers; the package is not imported, which would take what it depends on."""
    found = importlib.util.find_spec("cutlass_library")
    folders = found.submodule_search_locations if found else None
    return Path(next(iter(folders)), "source", "include") if folders else None


@pytest.mark.slow
def test_fragments_are_cutes():
    lacking = source_route.why_not() or (None if cutlass_include() else "waits for nvidia-cutlass (headers only)")
    if lacking:
        pytest.skip(lacking)
    binary = source_route.program("fragments", "plain", more=("-isystem", str(cutlass_include())))
    outcome = source_route.run(binary, "plain")
    assert outcome.passed, outcome.output
    assert "\n0 of 1792 wrong" in outcome.output
