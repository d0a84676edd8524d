"""Every driver of a kernel family, run to its end: plain in three fiber orders, and under the sanitizers."""

from __future__ import annotations

import pytest
from emulator import source_route

STEMS = source_route.stems()
COMBINATIONS = [(flavour, architecture) for flavour in ("plain", "address", "thread") for architecture in (750, 800)]


@pytest.mark.slow
@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize(("flavour", "architecture"), COMBINATIONS)
def test_driver(stem, flavour, architecture):
    lacking = source_route.why_not()
    if lacking:
        pytest.skip(lacking)
    outcome = source_route.run(source_route.program(stem, flavour, architecture), flavour)
    assert outcome.passed, f"{outcome.reason}\n{outcome.output[-6000:]}"
    assert "\n0 of " in outcome.output  # the driver has counted its cases


def test_every_kernel_file_has_a_driver():
    kernels = {path.stem for path in (source_route.CSRC / "cuda").glob("*.cu")}
    assert kernels == set(STEMS)
