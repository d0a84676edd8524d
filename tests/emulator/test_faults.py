"""The net is tested too: each seeded fault has to be found, plain or by a sanitizer."""

from __future__ import annotations

import pytest
from emulator import faults, source_route

ALL = [(stem, fault) for stem in faults.stems() for fault in faults.faults_of(stem)]


@pytest.mark.slow
@pytest.mark.parametrize(("stem", "fault"), ALL, ids=[f"{stem}: {fault.name}" for stem, fault in ALL])
def test_fault_is_found(stem, fault, tmp_path):
    lacking = source_route.why_not()
    if lacking:
        pytest.skip(lacking)
    csrc = faults.seed(fault, source_route.CSRC, tmp_path)
    flavours = sorted(source_route.FLAVOURS, key=lambda flavour: flavour != fault.caught_by)
    for flavour in flavours:
        binary = source_route.program(stem, flavour, fault.architecture, csrc)
        outcome = source_route.run(binary, flavour, timeout=120, stop_at_first=True)
        if not outcome.passed:
            print(f"{flavour}: {outcome.reason}")
            return
    pytest.fail(f"nothing found this: in {fault.file}, {fault.new!r} for {fault.old!r}")


@pytest.mark.parametrize("stem", source_route.stems())
def test_every_driver_has_faults(stem):
    listed = faults.faults_of(stem)
    assert len(listed) >= 3
    assert len({fault.name for fault in listed}) == len(listed)
    assert {fault.caught_by for fault in listed} <= set(source_route.FLAVOURS)


@pytest.mark.parametrize(("stem", "fault"), ALL, ids=[f"{stem}: {fault.name}" for stem, fault in ALL])
def test_fault_has_its_place(stem, fault, tmp_path):
    """Also where nothing can be compiled: an edit of a kernel must not leave a fault without its text."""
    faults.seed(fault, source_route.CSRC, tmp_path)


def test_a_fault_without_its_place_is_refused(tmp_path):
    fault = faults.Fault("nowhere", "primitives.cuh", "this text stands nowhere", "")
    with pytest.raises(ValueError, match="0 times"):
        faults.seed(fault, source_route.CSRC, tmp_path)
