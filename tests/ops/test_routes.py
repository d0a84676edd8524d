"""The route table: what serves which case, how it is forced, and that it can be printed."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch

from ops.test_native import run_python
from pyadapt.ops import autotune, routes

F32, F16, BF16, I8, F64 = torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.float64

# A machine with native kernels and no bf16 instructions, in the middle of a training step.
USUAL = routes.Case(
    op="forward",
    device="cpu",
    x=BF16,
    weight=BF16,
    out=BF16,
    adapters=(F32, F32),
    weight_rows=True,
    weight_columns=False,
    M=512,
    N=2048,
    K=2048,
    r=16,
    isa="avx2",
    library_bf16=False,
)


@pytest.mark.parametrize(
    ("change", "route"),
    [
        ({}, "fused"),
        ({"x": F64, "weight": F64}, "reference"),
        ({"adapters": (F32, F64)}, "reference"),
        ({"x": torch.complex64}, "reference"),
        ({"device": "cuda", "isa": None}, "library"),
        ({"device": "cuda", "isa": None, "weight": I8}, "library"),
        ({"device": "cuda", "isa": None, "x": F32, "weight": F32}, "reference"),
        ({"device": "xpu", "isa": None}, "library"),
        ({"device": "cuda", "isa": "sm_80"}, "fused"),
        ({"device": "cuda", "isa": "sm_80", "weight": I8}, "fused"),
        ({"device": "cuda", "isa": "sm_80", "weight": F32}, "library"),
        ({"device": "cuda", "isa": None, "weight": F32}, "library"),
        ({"device": "cuda", "isa": "sm_80", "out": F32}, "library"),
        ({"device": "cuda", "isa": "sm_80", "x": F32, "weight": F32, "out": F32}, "reference"),
        ({"device": "cuda", "isa": "sm_80", "M": 16}, "skinny"),
        ({"device": "cuda", "isa": "sm_80", "M": 16, "op": "backward"}, "fused"),
        ({"device": "cuda", "isa": "sm_80", "M": 16, "weight_rows": False, "weight_columns": True}, "fused"),
        ({"device": "cuda", "isa": "sm_80", "weight_rows": False}, "library"),
        ({"device": "cuda", "isa": "sm_75"}, "library"),
        ({"device": "cuda", "isa": "sm_75", "x": F16, "weight": I8, "out": F16}, "fused"),
        ({"device": "cuda", "isa": "sm_90"}, "library"),
        ({"device": "cuda", "isa": "sm_90", "M": 511}, "fused"),
        ({"isa": None}, "reference"),
        ({"isa": None, "library_bf16": True}, "library"),
        ({"isa": None, "library_bf16": True, "weight": F32}, "reference"),
        ({"M": 32}, "skinny"),
        ({"M": 32, "weight": I8}, "skinny"),
        ({"M": 32, "weight_rows": False}, "fused"),
        ({"M": 32, "op": "backward"}, "fused"),
        ({"M": 33}, "fused"),
        ({"library_bf16": True}, "library"),
        ({"library_bf16": True, "weight": I8}, "library"),
        ({"library_bf16": True, "weight": F32}, "fused"),
        ({"library_bf16": True, "x": F32, "weight": F32}, "fused"),
        ({"isa": "avx512", "M": 8}, "skinny"),
        ({"isa": "avx512", "M": 9}, "fused"),
        ({"library_bf16": True, "isa": "avx512_bf16", "M": 2}, "skinny"),
        ({"library_bf16": True, "isa": "avx512_bf16", "M": 3}, "library"),
        ({"library_bf16": True, "isa": "avx512_bf16", "M": 3, "N": 1023, "K": 2048}, "fused"),
        ({"library_bf16": True, "isa": "avx512_bf16", "weight": I8, "M": 8}, "skinny"),
        ({"library_bf16": True, "isa": "avx512_bf16", "weight": I8, "M": 255}, "fused"),
        ({"library_bf16": True, "isa": "avx512_bf16", "weight": I8, "M": 256}, "library"),
    ],
    ids=str,
)
def test_table(change, route):
    case = replace(USUAL, **change)
    rule = routes.explain(case)
    assert rule.route == route
    assert rule.reason
    assert case.can(route)


def test_the_table_prints():
    rows = routes.table()
    assert {route for route, _ in rows} == {"fused", "skinny", "library", "reference"}
    assert all(reason for _, reason in rows)


def choose(x, weight):
    return routes.choose(routes.case_of("forward", x, weight, 4, F32, (F32, F32)))


@pytest.mark.usefixtures("needs_native")
def test_forcing():
    x, weight = torch.zeros(50, 8, dtype=BF16), torch.zeros(6, 8, dtype=BF16)
    for route in routes.FORCIBLE:
        with routes.forced(route):
            assert choose(x, weight) == route
    # Where the forced route cannot serve, the table decides.
    with routes.forced("library"):
        assert choose(x, weight.float()) == "fused"
    with routes.forced("fused"):
        assert choose(x.double(), weight.double()) == "reference"


def test_unknown_route():
    with pytest.raises(ValueError, match=r"'fast'.*fused, library, reference"), routes.forced("fast"):
        pass


class Tuned:
    """Measurements that time by a table, and count."""

    def __init__(self, **microseconds):
        self.machine = autotune.Measurements("a machine", None)
        self.microseconds, self.measured = microseconds, 0

    def remembered(self, *arguments):
        return self.machine.remembered(*arguments)

    def best(self, key, candidates, timer):
        self.measured += 1
        return self.machine.best(key, candidates, lambda candidate: self.microseconds[candidate()])


@pytest.fixture
def tuned(monkeypatch):
    """Measurements in the place of a GPU's, by which torch's GEMM is the faster one."""
    known = Tuned(fused=9.0, library=4.0)
    monkeypatch.setattr(autotune, "measurements", lambda device: known)
    monkeypatch.delenv("PYADAPT_AUTOTUNE", raising=False)
    return known


GPU = torch.device("cuda", 0)
FORMS = {name: lambda x, name=name: name for name in ("fused", "skinny", "library", "reference")}
ON_GPU = replace(USUAL, device="cuda", isa="sm_80")


def test_on_cuda_the_faster_route_is_measured_once_a_shape(tuned):
    assert routes.choose(ON_GPU) == "fused"
    for _ in range(3):
        assert routes.run(ON_GPU, FORMS, GPU, (0,)) == "library"
    assert tuned.measured == 1
    assert routes.run(replace(ON_GPU, M=513), FORMS, GPU, (0,)) == "library"
    assert tuned.measured == 2


@pytest.mark.parametrize(
    ("change", "route"),
    [({"M": 16}, "skinny"), ({"M": 17}, "fused"), ({"out": F32}, "library"), ({"isa": "sm_75"}, "library")],
    ids=str,
)
def test_what_has_one_good_route_is_not_measured(tuned, change, route):
    assert routes.run(replace(ON_GPU, **change), FORMS, GPU, (0,)) == route
    assert tuned.measured == 0


def test_a_forced_or_switched_off_choice_is_not_measured(tuned, monkeypatch):
    with routes.forced("fused"):
        assert routes.run(ON_GPU, FORMS, GPU, (0,)) == "fused"
    assert tuned.measured == 0
    monkeypatch.setenv("PYADAPT_AUTOTUNE", "0")
    assert routes.run(ON_GPU, FORMS, GPU, (0,)) == "fused"


CHOOSE = """
import torch
from pyadapt.ops import autotune, routes
print(routes.choose(routes.case_of("forward", torch.zeros(50, 8), torch.zeros(6, 8), 0, torch.float32)))
"""


def test_environment():
    assert run_python(CHOOSE, PYADAPT_ROUTE="library").stdout.strip() == "library"
    done = run_python(CHOOSE, PYADAPT_ROUTE="fast")
    assert done.returncode != 0
    assert "PYADAPT_ROUTE is 'fast'" in done.stderr


def test_without_native_kernels_the_library_route_is_right():
    code = """
import torch
from ops.oracle import make_layer
from ops.test_lora import check
from pyadapt import native
from pyadapt.ops import autotune, routes
assert not native.available()
for dtype in (torch.bfloat16, torch.int8):
    with routes.forced("library"):
        check(make_layer(40, 70, 45, 5, torch.bfloat16, dtype).with_dropout(0.3))
print("right")
"""
    path = next(p for p in sys.path if p.endswith("tests"))
    assert run_python(code, PYADAPT_NATIVE="0", PYTHONPATH=path).stdout.strip() == "right"
