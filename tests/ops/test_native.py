"""The extension: loading, instruction sets, linkage, threads, and what it says to bad inputs."""

from __future__ import annotations

import gc
import os
import platform
import re
import struct
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.dlpack import to_dlpack

from ops.oracle import make_layer
from pyadapt import native
from pyadapt.ops.kernels import cpu as kernels

pytestmark = pytest.mark.usefixtures("needs_native")
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="waits for Linux: reads ELF files and /proc")


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter, for what happens once a process."""
    env = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)


# --- description and instruction sets ---


def test_description():
    about = native.describe()
    assert about["available"]
    assert about["isa"] in about["isas"]
    assert about["compiler"].split()[0] in ("GNU", "Clang", "AppleClang")
    assert about["openmp_threads"] == torch.get_num_threads()
    assert about["cuda"] in ("in use", "not built", "built, but torch sees no CUDA device")


def test_the_best_real_instruction_set_is_the_default():
    done = run_python("from pyadapt import native; print(native.isa(), *native.isas())", PYADAPT_CPU_ISA="")
    default, *names = done.stdout.split()
    assert names[0] == "portable"
    assert default == [name for name in names if not name.endswith("-emulated")][-1]


def test_instruction_set_from_the_environment():
    done = run_python("from pyadapt import native; print(native.isa())", PYADAPT_CPU_ISA="portable")
    assert done.stdout.strip() == "portable"


def test_unknown_instruction_set_names_the_usable_ones():
    with pytest.raises(ValueError, match=r"'mmx'.*usable: portable"):
        native.set_isa("mmx")
    done = run_python("from pyadapt import native; native.isa()", PYADAPT_CPU_ISA="mmx")
    assert done.returncode != 0
    assert "PYADAPT_CPU_ISA" in done.stderr
    assert "portable" in done.stderr


def test_switching_back():
    before = native.isa()
    with native.using_isa("portable"):
        assert native.isa() == "portable"
    assert native.isa() == before


# --- doing without ---

SERVE = """
import torch
from pyadapt import native
from pyadapt.ops import linear
y = torch.ops.pyadapt.linear_forward(torch.ones(2, 3), torch.ones(4, 3), None, None, torch.float32)
assert y.tolist() == [[3.0] * 4] * 2
print(native.available())
"""


def test_disabled_by_the_environment():
    done = run_python("import warnings; warnings.simplefilter('error')\n" + SERVE, PYADAPT_NATIVE="0")
    assert done.stdout.strip() == "False", done.stderr


def test_a_failing_load_is_one_warning_and_the_reference_serves():
    block = "import sys; sys.modules['pyadapt._native'] = None\n"
    done = run_python(block + SERVE + SERVE)
    assert done.stdout.split() == ["False", "False"], done.stderr
    assert done.stderr.count("RuntimeWarning") == 1
    assert "Looked for _native" in done.stderr


def test_importing_the_ops_loads_no_extension():
    done = run_python("import sys, pyadapt.ops.lora; print('pyadapt._native' in sys.modules)")
    assert done.stdout.strip() == "False", done.stderr


# --- linkage ---


def needed_libraries(path: Path) -> list[str]:
    """The DT_NEEDED entries of a 64-bit little-endian ELF file."""
    data = path.read_bytes()
    assert data[:6] == b"\x7fELF\x02\x01"
    (section_table,) = struct.unpack_from("<Q", data, 0x28)
    entry_size, count = struct.unpack_from("<HH", data, 0x3A)
    sections = [struct.unpack_from("<IIQQQQIIQQ", data, section_table + i * entry_size) for i in range(count)]
    dynamic = next(section for section in sections if section[1] == 6)
    strings = sections[dynamic[6]][4]
    entries = (struct.unpack_from("<qQ", data, dynamic[4] + at) for at in range(0, dynamic[5], 16))
    return [data[strings + value : data.index(b"\0", strings + value)].decode() for tag, value in entries if tag == 1]


@LINUX
def test_links_neither_torch_nor_cuda():
    needed = needed_libraries(Path(native.describe()["file"]))
    allowed = re.compile(r"(libstdc\+\+|libm|libgcc_s|libc|libgomp|libomp|libpthread|ld-linux[-\w]*)\.so.*")
    assert all(allowed.fullmatch(name) for name in needed), needed
    assert any("omp" in name for name in needed), needed


@LINUX
def test_one_openmp_runtime_serves_torch_and_us():
    """torch's wheel brings the libgomp that we link to by name: two copies would be two teams on the same cores."""
    code = """
import re, torch
from pyadapt import native
assert native.available()
a = torch.randn(300, 300); a @ a
print(*sorted(set(re.findall(r"\\S*libgomp\\S*", open("/proc/self/maps").read()))))
"""
    copies = run_python(code).stdout.split()
    if len(copies) != 1:
        # A torch that renames its copy: both runtimes then live in one process, which the next test covers.
        assert any(Path(copy).name != "libgomp.so.1" for copy in copies), copies


def test_teams_of_torch_and_of_ours_take_turns():
    """Whatever runtimes are loaded: alternating parallel regions neither hang nor change results."""
    torch.set_num_threads(2)
    layer = make_layer(150, 200, 170, 8)
    first = layer.forward()
    for _ in range(20):
        torch.mm(layer.x, layer.weight.t())
        again = layer.forward()
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@LINUX
def test_threads_follow_torch():
    """A process told to use one thread starts none; told to use three, it has a team of three."""
    code = """
import os, torch
from pyadapt.ops import linear
torch.set_num_threads(THREADS)
before = len(os.listdir("/proc/self/task"))
torch.ops.pyadapt.linear_forward(torch.randn(200, 300), torch.randn(400, 300), None, None, torch.float32)
print(len(os.listdir("/proc/self/task")) - before)
"""
    for threads, started in ((1, 0), (3, 2)):
        done = run_python(code.replace("THREADS", str(threads)))
        assert done.stdout.strip() == str(started), done.stderr


@pytest.mark.skipif(platform.machine() != "x86_64", reason="waits for x86: those instruction sets are its own")
def test_every_instruction_set_of_the_processor_is_offered():
    flags = set(re.findall(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.M)[0].split())
    wanted = {"avx2": {"avx2", "fma", "f16c"}, "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"}}
    for name, needs in wanted.items():
        assert (needs <= flags) == (name in native.isas())


# --- bad inputs ---


def bad(operand: str, value: object, match: str, error: type[Exception] = ValueError):
    return pytest.param(operand, value, error, match, id=f"{operand}-{match}")


@pytest.mark.parametrize(
    ("operand", "value", "error", "match"),
    [
        bad("x", torch.zeros(5, 8), r"x has shape \(5, 8\)|weight has shape"),
        bad("x", torch.zeros(5, 7, dtype=torch.int8), "x is int8; wanted float32", TypeError),
        bad("x", torch.zeros(5, 7, dtype=torch.float64), "x has the DLPack type", TypeError),
        bad("x", torch.zeros(()), "x has no dimensions"),
        bad("x", torch.zeros(7), r"y has shape \(5, 9\); wanted \(M, N\) = \(1, 9\)"),
        bad("x", torch.zeros(2, 5, 7), r"y has shape \(5, 9\); wanted \(M, N\) = \(10, 9\)"),
        bad("weight", torch.zeros(1, 9, 7), "weight has 3 dimensions"),
        bad("weight", torch.zeros(9, 6), r"weight has shape \(9, 6\); wanted \(N, K\) = \(9, 7\)"),
        bad("weight", torch.zeros(9, 7, dtype=torch.int8), "weight is int8 but weight_scale is None"),
        bad("weight", torch.zeros(9, 7, dtype=torch.int64), "weight is int64", TypeError),
        bad("weight_scale", torch.zeros(9), "weight_scale is given for a float32 weight"),
        bad("bias", torch.zeros(8), r"bias has shape \(8,\); wanted \(N,\) = \(9,\)"),
        bad("A", torch.zeros(3, 6), r"A has shape \(3, 6\); wanted \(r, K\) = \(3, 7\)"),
        bad("A", torch.zeros(3, 7, dtype=torch.int8), "A is int8", TypeError),
        bad("B", torch.zeros(9, 2), r"B has shape \(9, 2\); wanted \(N, r\) = \(9, 3\)"),
        bad("y", torch.zeros(5, 8), r"y has shape \(5, 8\)"),
        bad("y", torch.zeros(9).expand(5, 9), "rows that do not overlap"),
        bad("y", torch.zeros(9, 5).t(), "y has strides"),
        bad("y", torch.zeros(10, 2, 9)[::2], "y has 3 dimensions with gaps"),
        bad("S", torch.zeros(5, 3, dtype=torch.bfloat16), "S is bfloat16; wanted float32", TypeError),
        bad("seed", None, "no seed was given"),
        bad("seed", torch.tensor([1.0]), "seed is float32; wanted int64", TypeError),
        bad("seed", torch.tensor([1, 2]), r"seed has shape \(2,\); wanted one element"),
        bad("dropout_p", 1.5, "dropout_p is 1.5"),
        bad("dropout_p", float("nan"), "dropout_p is nan"),
        bad("threads", 0, "threads is 0"),
        bad("x", "rubbish", "x is a str; wanted a tensor or an unused DLPack capsule", TypeError),
    ],
)
@pytest.mark.parametrize("form", [lambda tensor: tensor, to_dlpack], ids=["tensor", "capsule"])
def test_a_bad_input_is_one_exception_that_names_it(operand, value, error, match, form):
    operands = forward_operands() | {operand: value}
    arguments = [form(v) if isinstance(v, torch.Tensor) else v for v in operands.values()]
    with pytest.raises(error, match=match):
        native.core().lora_forward(*arguments)


def forward_operands() -> dict[str, object]:
    """The arguments of the extension's lora_forward, in order."""
    return {
        "x": torch.zeros(5, 7),
        "weight": torch.zeros(9, 7),
        "weight_scale": None,
        "bias": torch.zeros(9),
        "A": torch.zeros(3, 7),
        "B": torch.zeros(9, 3),
        "y": torch.zeros(5, 9),
        "S": torch.zeros(5, 3),
        "scaling": 1.0,
        "dropout_p": 0.5,
        "seed": torch.tensor([1]),
        "skinny": False,
        "threads": 1,
    }


def freed() -> torch.Tensor:
    """What a sharding engine leaves of a parameter that it has given back."""
    tensor = torch.zeros(5, 7)
    tensor.untyped_storage().resize_(0)
    return tensor


# x (5, 7) as torch may hold it without memory that could be read.
MEMORYLESS = {
    "freed": freed,
    "meta": lambda: torch.zeros(5, 7, device="meta"),
    "sparse": lambda: torch.zeros(5, 7).to_sparse(),
    "mkldnn": lambda: torch.zeros(5, 7).to_mkldnn(),
    "wrapper": lambda: TwoTensor(torch.zeros(5, 7), torch.zeros(5, 7)),
}


@pytest.mark.parametrize("kind", MEMORYLESS)
@pytest.mark.parametrize("operand", ["x", "A", "y"])
def test_a_tensor_without_memory_is_refused_by_name(operand, kind):
    operands = forward_operands() | {operand: MEMORYLESS[kind]()}
    with pytest.raises(ValueError, match=f"{operand} (has no memory|cannot be read as plain memory)"):
        native.core().lora_forward(*operands.values())


class WithoutTable(torch.Tensor):
    """A tensor as torch before 2.10 has it."""

    __dlpack_c_exchange_api__ = None


@pytest.mark.parametrize("kind", [torch.Tensor, torch.nn.Parameter, WithoutTable])
@pytest.mark.parametrize("grad", [False, True])
def test_every_form_of_a_tensor_is_read_alike(kind, grad):
    layer = make_layer(5, 7, 9, 3)
    expected = kernels.linear_forward(layer.x, layer.weight, None, layer.bias, torch.float32)
    x = layer.x.clone().as_subclass(kind).requires_grad_(grad)
    y = torch.empty(5, 9)
    native.core().linear_forward(x, layer.weight, None, layer.bias, y, False, 1)
    assert torch.equal(y, expected)
    # Any leading dimensions, and any strides of an input.
    native.core().linear_forward(x.reshape(1, 5, 1, 7), layer.weight, None, layer.bias, y.view(5, 1, 9), False, 1)
    assert torch.equal(y, expected)
    y.zero_()
    strided = layer.x.t().contiguous().t().as_subclass(kind)
    native.core().linear_forward(strided, layer.weight, None, layer.bias, y, False, 1)
    assert torch.equal(y, expected)


def test_a_tensor_on_another_device_is_refused():
    from_meta = torch.empty(5, 7, device="meta")
    with pytest.raises(ValueError, match="x cannot be read as plain memory"):
        kernels.linear_forward(from_meta, torch.zeros(9, 7), None, None, torch.float32)
    # Through the op the meta device is served by the fake implementation instead.
    weight = torch.zeros(9, 7, device="meta")
    assert torch.ops.pyadapt.linear_forward(from_meta, weight, None, None, torch.float32).is_meta


def test_capsules_leave_no_tensor_behind():
    """A capsule that the core has read, or refused, still frees its tensor."""
    x = torch.zeros(5, 7)
    storage = weakref.ref(x.untyped_storage())
    kernels.linear_forward(x, torch.zeros(9, 7), None, None, torch.float32)
    with pytest.raises(ValueError, match="weight"):
        kernels.linear_forward(x, torch.zeros(9, 8), None, None, torch.float32)
    capsule = to_dlpack(x)
    del x
    gc.collect()
    alive = storage() is not None
    del capsule
    gc.collect()
    assert alive
    assert storage() is None


def test_computing_releases_the_gil():
    """Another Python thread makes progress while a product runs: it could not, if the product held the lock."""
    layer = make_layer(1000, 1000, 1500, 8)
    ticks, stop = [0], threading.Event()

    def tick():
        while not stop.is_set():
            ticks[0] += 1
            time.sleep(1e-4)

    ticker = threading.Thread(target=tick)
    ticker.start()
    try:
        before = ticks[0]
        layer.forward()
        assert ticks[0] - before >= 5
    finally:
        stop.set()
        ticker.join()
