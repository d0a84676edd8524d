"""The emulator itself: what it lets pass, what it finds and by which net, and what its instructions compute."""

from __future__ import annotations

import pytest
from emulator import source_route

# Right kernels, which every flavour has to let pass.
RIGHT = [
    "all shared memory",
    "different barriers by warp",
    "hand over",
    "overwrite",
    "partial copies",
    "rows",
    "rows, all the same",
    "rows, padded",
    "stages",
    "syncwarp",
    "throwing",
    "two host threads",
    "warp exits before a barrier",
]

# Wrong ones that the emulator itself finds in every flavour, and what it says.
STOPPED = {
    "barrier for half a warp": "deadlock|divergence",
    "copy before the start": "16 bytes at -16, outside",
    "copy misaligned in global memory": "global address is not a multiple of 16",
    "copy misaligned in shared memory": "shared address 8 is not a multiple of 16",
    "copy outside": "16 bytes at 16, outside the 16 bytes",
    "different barriers": "lanes of one warp at different __syncthreads",
    "different instructions": "lanes of one warp in",
    "exit before a shuffle": "exited",
    "exit in flight": "copy_async still in flight",
    "exit with an open group": "copy_async still in flight",
    "half a mask": "not full",
    "launch in a kernel": "inside a kernel",
    "mma in part of a warp": "a warp of 16 lanes",
    "no blocks": "a grid of 0",
    "rows, misaligned": "is not a multiple of 16",
    "rows, one outside": "outside the 496 bytes",
    "too many threads": "1056 threads",
    "too much shared memory": "shared memory, where a block has at most",
}

# Wrong ones that hang on the flavour: what each says, None where it finds nothing.
FOUND = {
    "hand over without barrier": {"plain": "exit status 1", "thread": "data race"},
    "overwrite without barrier": {"plain": None, "thread": "data race"},
    "shuffle for syncwarp": {"plain": None, "thread": "data race"},
    "stages, wait one short": {"plain": "exit status 1", "thread": "data race"},
    "stages without barrier": {"plain": "exit status 1", "thread": "data race"},
    "blocks share memory": {"plain": None, "thread": "data race"},
    "store outside": {"plain": "outside the block's shared memory", "address": "use-after-poison"},
    "store outside an operand": {"plain": "outside an operand", "address": "use-after-poison"},
    "load outside": {"plain": "exit status 1", "address": "use-after-poison"},
    "load of what nobody stored": {"plain": "exit status 1", "address": "exit status 1", "thread": "exit status 1"},
    "copy beyond the source": {"plain": None, "address": "use-after-poison"},
    "stack overrun": {"plain": "SIGSEGV"},
}
FOUND_BY = [(mode, flavour, says) for mode, found in FOUND.items() for flavour, says in found.items()]

ORDERS = ["forward", "reverse", "random"]


@pytest.fixture(autouse=True)
def _needs_compiler():
    """Skip where there is nothing to compile with."""
    lacking = source_route.why_not()
    if lacking:
        pytest.skip(lacking)


def outcome_of(mode: str, flavour: str, **environment: str) -> source_route.Outcome:
    """One kernel of drivers/runtime.cpp."""
    return source_route.run(source_route.program("runtime", flavour), flavour, mode, timeout=60, **environment)


def test_every_mode_is_tested():
    output = source_route.run(source_route.program("runtime", "plain"), "plain").output
    others = {"bf16", "order", "rows, 128 bytes apart"}
    assert set(output.splitlines()) == {*RIGHT, *STOPPED, *FOUND, *others}


@pytest.mark.parametrize("flavour", source_route.FLAVOURS)
@pytest.mark.parametrize("mode", RIGHT)
def test_right_kernel_passes(mode, flavour):
    for order in ORDERS:
        outcome = outcome_of(mode, flavour, PYADAPT_EMULATOR_ORDER=order)
        assert outcome.passed, f"{order}: {outcome.reason}\n{outcome.output}"


@pytest.mark.parametrize("flavour", source_route.FLAVOURS)
@pytest.mark.parametrize("mode", STOPPED)
def test_emulator_stops(mode, flavour):
    for order in ORDERS:
        outcome = outcome_of(mode, flavour, PYADAPT_EMULATOR_ORDER=order)
        assert outcome.reason.startswith("emulator: "), outcome
        assert any(words in outcome.reason for words in STOPPED[mode].split("|"))


@pytest.mark.parametrize(("mode", "flavour", "says"), FOUND_BY)
def test_net_that_finds(mode, flavour, says):
    outcome = outcome_of(mode, flavour)
    if says is None:
        assert outcome.passed, outcome
    else:
        assert says in outcome.reason


def test_bank_conflicts_are_counted():
    assert "conflicts 28" in outcome_of("rows, 128 bytes apart", "plain").output  # four matrices, seven rows too many
    for mode in ("rows", "rows, padded", "rows, all the same"):
        assert "conflicts 0" in outcome_of(mode, "plain").output


def test_fiber_orders():
    assert outcome_of("order", "plain").passed


@pytest.mark.parametrize("flavour", source_route.FLAVOURS)
def test_switching_without_assembly(flavour):
    """What other processors than x86-64 use."""
    binary = source_route.program("runtime", flavour, more=("-DPYADAPT_EMULATOR_UCONTEXT",))
    for mode in ("stages", "throwing"):
        outcome = source_route.run(binary, flavour, mode)
        assert outcome.passed, outcome
    assert not source_route.run(binary, flavour, "hand over without barrier").passed


def test_unknown_order_is_refused():
    assert "not forward, reverse or random" in outcome_of("rows", "plain", PYADAPT_EMULATOR_ORDER="sideways").reason


@pytest.mark.parametrize(("architecture", "says"), [(750, "bf16, which this architecture does not have"), (800, "")])
def test_bf16_waits_for_sm_80(architecture, says):
    outcome = source_route.run(source_route.program("runtime", "plain", architecture), "plain", "bf16")
    assert says in outcome.reason
    assert outcome.passed == (not says)


@pytest.mark.parametrize("architecture", source_route.ARCHITECTURES)
@pytest.mark.parametrize("flavour", ["plain", "address"])
def test_instructions(flavour, architecture):
    outcome = source_route.run(source_route.program("instructions", flavour, architecture), flavour)
    assert outcome.passed, f"{outcome.reason}\n{outcome.output[-4000:]}"


def test_end_without_an_end(tmp_path):
    endless = tmp_path / "endless"
    endless.write_text("#!/bin/sh\nexec sleep 60\n")
    endless.chmod(0o755)
    outcome = source_route.run(endless, "plain", timeout=0.2)
    assert outcome.reason.startswith("no end within")


def test_source_that_does_not_compile(tmp_path):
    (tmp_path / "cuda").mkdir()
    (tmp_path / "cuda" / "wrong.cu").write_text("int main() { return nothing; }")
    with pytest.raises(source_route.CompileError, match="nothing"):
        source_route.kernel_object("wrong", "plain", 800, tmp_path)
