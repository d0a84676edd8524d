"""PTX, instruction by instruction: hand-written kernels against the semantics of the ISA."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from emulator import build, control
from emulator.ptx import PtxError, translate
from emulator.ptx_cases import floats, integers
from emulator.ptx_cases.case import HEADER

CASES = integers.CASES + floats.CASES
HERE = build.ROOT / "tests" / "emulator" / "ptx_cases"


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    """All kernels of this file in one library."""
    cases = tmp_path_factory.mktemp("ptx") / "cases.ptx"
    cases.write_text(HEADER + "\n".join(case.kernel for case in CASES))
    kernels = [cases, HERE / "memory.ptx", HERE / "flow.ptx"]
    return build.build(recipe=build.Recipe("translator.so", kernels))


@pytest.fixture
def launch(library):
    """Launch a kernel whose first parameter is an array; gives the error and the array."""
    control.reset(library)

    def run(kernel, out, *arguments, **configuration):
        pointers = [ctypes.c_uint64(a.ctypes.data) if isinstance(a, np.ndarray) else a for a in (out, *arguments)]
        return control.launch(library, kernel, pointers, **configuration)

    return run


def words(count, kind="uint32"):
    """Aligned memory, zeros."""
    raw = np.zeros(count * 4 + 16, np.uint8)
    start = -raw.ctypes.data % 16
    return raw[start : start + count * 4].view(kind)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_instruction(library, case):
    got = case.run(library)
    if got.dtype.kind == "f":  # NaN is NaN, and zeros have a sign
        np.testing.assert_array_equal(np.isnan(got), np.isnan(case.expected))
        numbers = ~np.isnan(got)
        got, expected = got[numbers].view(np.uint32), case.expected[numbers].view(np.uint32)
    else:
        expected = case.expected
    wrong = np.flatnonzero(got != expected)
    assert wrong.size == 0, [tuple(a[wrong[0]] for a in case.inputs), got[wrong[0]], expected[wrong[0]]]


# --- memory ---


def test_parameters_and_vectors(launch):
    class Struct(ctypes.Structure):
        _fields_ = [("a", ctypes.c_int), ("b", ctypes.c_int8), ("gap", ctypes.c_byte * 11), ("v", ctypes.c_float * 4)]

    out = words(6)
    assert launch("parameters", out, Struct(5, -3, (ctypes.c_byte * 11)(), (1.0, 2.0, 3.0, 4.0)), block=(1, 1, 1)) == 0
    assert out[:2].view(np.int32).tolist() == [5, -3]
    assert out[2:].view(np.float32).tolist() == [4.0, 3.0, 2.0, 1.0]


def test_shared_memory(launch):
    out = words(32)
    assert launch("shared_memory", out, ctypes.c_uint(64), shared=64 + 128) == 0
    assert out.tolist() == [i ^ 1 for i in range(32)]


@pytest.mark.parametrize(
    ("shift", "error", "text"),
    [(186, 716, "not a multiple of 4"), (192, 700, "outside the 192 bytes"), (0xFFFFFFF0, 700, "outside")],
)
def test_wrong_shared_addresses(launch, library, shift, error, text):
    assert launch("shared_memory", words(32), ctypes.c_uint(shift), shared=64 + 128) == error
    assert text in control.last_failure(library)
    assert "shared_memory" in control.last_failure(library)


def test_static_shared_memory(launch):
    out = words(2)
    assert launch("static_shared", out, shared=64, block=(1, 1, 1)) == 0
    assert out.tolist() == [128, 0x21]


def test_shared_memory_starts_as_nan(launch):
    out = words(32)
    assert launch("copies", out, words(4), ctypes.c_uint(16), shared=32, block=(1, 1, 1)) == 0
    assert out[8] == 0xFFFFFFFF


def test_local_memory(launch, library):
    out = words(2)
    assert launch("local_memory", out, ctypes.c_uint(3), block=(1, 1, 1)) == 0
    assert out.tolist() == [22, 0xFFFFFFFF]  # what nothing was written to is NaN
    assert launch("local_memory", out, ctypes.c_uint(8), block=(1, 1, 1)) == 700
    assert "local memory: offset 32, outside of its 32 bytes" in control.last_failure(library)


def test_constants(launch):
    out = words(2)
    assert launch("constants", out, ctypes.c_uint(1), block=(1, 1, 1)) == 0
    assert out.tolist() == [20, 0x80000000]


def test_misaligned_and_null_global_addresses(launch, library):
    out, source = words(4), words(8)
    source[:] = range(8)
    assert launch("load_at", out, source, block=(1, 1, 1)) == 0
    assert out.tolist() == [3, 2, 0, 5]
    assert launch("load_at", out, source[1:], block=(1, 1, 1)) == 716
    assert "is not a multiple of 16" in control.last_failure(library)
    assert launch("load_at", out, ctypes.c_uint64(0), block=(1, 1, 1)) == 700
    assert "global address 0 is outside" in control.last_failure(library)


@pytest.mark.parametrize("size", [0, 4, 9, 16])
def test_copies_arrive_when_they_are_waited_for(launch, size):
    out, source = words(10), words(4)
    source[:] = [0x01020304, 0x05060708, 0x11121314, 0x15161718]
    assert launch("copies", out, source, ctypes.c_uint(size), shared=32, block=(1, 1, 1)) == 0
    assert (out[:4] == 0xFFFFFFFF).all()
    given = np.frombuffer(source.tobytes()[:size].ljust(16, b"\0"), np.uint32)
    assert out[4:8].tolist() == given.tolist()
    assert out[8:].tolist() == [0xFFFFFFFF, 0x01020304]


def test_a_copy_of_more_than_it_moves(launch, library):
    assert launch("copies", words(10), words(4), ctypes.c_uint(17), shared=32, block=(1, 1, 1)) == 719
    assert "17 bytes out of 16" in control.last_failure(library)


# --- control flow and the warp ---


def test_scopes_have_their_own_labels(launch):
    out = words(2)
    assert launch("scopes", out, block=(1, 1, 1)) == 0
    assert out.tolist() == [5, 16]


def test_table_of_labels(launch):
    out = words(4)
    assert launch("table", out, block=(4, 1, 1)) == 0
    assert out.tolist() == [100, 200, 300, 200]


def test_where_a_thread_is(launch):
    out = words(2 * 3 * 64 * 8)
    assert launch("specials", out, block=(16, 4, 1), grid=(2, 3, 1)) == 0
    block, thread = np.divmod(np.arange(6 * 64), 64)
    expected = [thread % 16, thread // 16, block % 2, block // 2, thread % 32, 3, 64, (1 << thread % 32) - 1]
    np.testing.assert_array_equal(out.reshape(-1, 8), np.stack(np.broadcast_arrays(*expected), 1))


@pytest.mark.parametrize("order", control.ORDERS)
@pytest.mark.parametrize("width", [32, 8])
def test_shuffles(launch, library, order, width):
    """With CUDA's encoding of `width`: the segment in bits 8 to 12, the last lane below them."""
    out, by = words(32 * 8), 3
    segment = 32 - width << 8
    control.set_order(library, order)
    error = launch("shuffles", out, ctypes.c_uint(by), ctypes.c_uint(segment), ctypes.c_uint(segment | 31))
    control.set_order(library, "forward")
    assert error == 0
    for lane, (up, down, butterfly, index, *valid) in enumerate(out.reshape(-1, 8).tolist()):
        first, last = lane // width * width, lane // width * width + width - 1
        sources = [lane - by, lane + by, lane ^ by, first + by]
        in_range = [lane - by >= first, lane + by <= last, lane ^ by <= last, True]
        assert valid == [int(v) for v in in_range]
        expected = [100 + (s if v else lane) for s, v in zip(sources, in_range, strict=True)]
        assert [up, down, butterfly, index] == expected


@pytest.mark.parametrize("limit", [0, 7, 32])
def test_votes(launch, limit):
    out = words(32 * 4)
    assert launch("votes", out, ctypes.c_uint(limit)) == 0
    ballot = (1 << limit) - 1
    expected = [ballot, limit == 32, limit > 0, limit in (0, 32)]
    assert (out.reshape(-1, 4) == np.array(expected, np.uint32)).all()


@pytest.mark.parametrize(
    ("how", "text"), [(0, "shfl.bfly"), (1, "divergence: lanes of one warp at different __syncthreads"), (2, "trap")]
)
@pytest.mark.parametrize("order", control.ORDERS)
def test_what_a_kernel_must_not_do(launch, library, how, text, order):
    control.set_order(library, order)
    error = launch("wrong", words(1), ctypes.c_uint(how))
    control.set_order(library, "forward")
    assert error == 719
    assert text in control.last_failure(library)
    assert launch("wrong", words(1), ctypes.c_uint(9)) == 0  # and it goes on


def _fragments(matrix, places, bits):
    """Registers (32 lanes, n) of a matrix of 16-bit or 32-bit elements; places(lane, register, half)."""
    halves = 32 // bits
    registers = np.zeros((32, len(places) // halves), np.uint32)
    for i, (row, column) in enumerate(places):
        for lane in range(32):
            r, c = row(lane), column(lane)
            registers[lane, i // halves] |= np.uint32(int(matrix[r, c]) << bits * (i % halves))
    return registers


@pytest.mark.parametrize(
    ("which", "depth", "kind"), [(0, 16, "f16"), (1, 16, "bf16"), (2, 8, "f16"), (3, 8, "tf32")], ids=str
)
def test_matrix_products(launch, which, depth, kind):
    """Small integers, exact in every format, through fragments laid out here from the ISA's text."""
    random = np.random.default_rng(which)
    a, b = random.integers(-8, 9, (16, depth)), random.integers(-8, 9, (depth, 8))
    c = random.integers(-8, 9, (16, 8)).astype(np.float32)

    def encode(matrix):
        values = matrix.astype(np.float32)
        if kind == "f16":
            return values.astype(np.float16).view(np.uint16)
        return values.view(np.uint32) >> 16 if kind == "bf16" else values.view(np.uint32)

    def group(lane):
        return lane >> 2

    if kind == "tf32":
        columns = [lambda t, j=j: t % 4 + j for j in (0, 0, 4, 4)]
        a_places = [(lambda t, i=i: group(t) + i, column) for i, column in zip((0, 8, 0, 8), columns, strict=True)]
        b_places = [(lambda t, j=j: t % 4 + j, group) for j in (0, 4)]
    else:
        pairs = [(i, j, h) for j in range(0, depth, 8) for i in (0, 8) for h in (0, 1)]
        a_places = [(lambda t, i=i: group(t) + i, lambda t, j=j, h=h: t % 4 * 2 + j + h) for i, j, h in pairs]
        b_places = [(lambda t, j=j, h=h: t % 4 * 2 + j + h, group) for j in range(0, depth, 8) for h in (0, 1)]
    bits = 32 if kind == "tf32" else 16
    c_places = [(lambda t, i=i: group(t) + i, lambda t, j=j: t % 4 * 2 + j) for i in (0, 8) for j in (0, 1)]
    given = words(32 * 12).reshape(32, 12)
    a_registers, b_registers = _fragments(encode(a), a_places, bits), _fragments(encode(b), b_places, bits)
    given[:, : a_registers.shape[1]] = a_registers
    given[:, 4 : 4 + b_registers.shape[1]] = b_registers
    given[:, 8:] = _fragments(c.view(np.uint32), c_places, 32)
    out = words(32 * 4)
    assert launch("products", out, given, ctypes.c_uint(which)) == 0
    expected = _fragments((a @ b + c).astype(np.float32).view(np.uint32), c_places, 32)
    np.testing.assert_array_equal(out.view(np.float32).reshape(32, 4), expected.view(np.float32))


@pytest.mark.parametrize(("stride", "conflicts"), [(16, 0), (32, 32), (128, 56), (144, 0)])
def test_load_matrix(launch, library, stride, conflicts):
    out = words(32 * 8)
    assert launch("matrices", out, ctypes.c_uint(stride), shared=32 * stride) == 0
    for lane, row in enumerate(out.reshape(32, 8).tolist()):
        g, t = lane // 4, lane % 4
        for matrix in range(4):
            plain = [16 * (8 * matrix + g) + 2 * t + h for h in (0, 1)]
            transposed = [16 * (8 * matrix + 2 * t + h) + g for h in (0, 1)]
            assert row[matrix] == plain[0] | plain[1] << 16
            assert row[4 + matrix] == transposed[0] | transposed[1] << 16
    counts = control.launches(library)[-1]
    assert counts["ldmatrix"] == 2
    assert counts["ldmatrix_conflicts"] == 2 * conflicts // 2


# --- what is not known ---


@pytest.mark.parametrize(
    ("instruction", "text"),
    [
        ("tanh.approx.f32 %f1, %f2", "no such instruction is known: tanh.approx.f32 %f1, %f2"),
        ("add.rz.f32 %f1, %f2, %f2", "unknown modifier .rz: add.rz.f32"),
        ("atom.global.add.u32 %r1, [%rd1], 1", "no such instruction is known: atom"),
        ("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%r1}, {%r1}, {%r1}, {%r1}", "m16n8k16.*is wanted"),
        ("prmt.b32.f4e %r1, %r1, %r1, 0", "unknown modifier .f4e"),
        ("add.s32 %r1, %r1", "3 are wanted"),
        ("add.s32 %r1, %r9, 1", "no register %r9"),
        ("add.s64 %rd1, %r1, 1", "too narrow for .b64"),
        ("add.f32 %f1, %r1, %p1", "where .f32 is read"),
        ("mov.u32 %r1, nothing", "nothing is called nothing"),
        ("bar.sync 1", "only number 0"),
        ("cp.async.cg.shared.global [%r1], [%rd1], 8", "copies 16 bytes"),
        ("fence.proxy.async", "proxies"),
        ("call.uni function, ()", "operand"),
        ("bra NOWHERE", "no label NOWHERE"),
    ],
)
def test_what_is_not_known_stops_the_translation(instruction, text):
    registers = ".reg .b32 %r<4>; .reg .b64 %rd<4>; .reg .f32 %f<4>; .reg .pred %p<2>;"
    source = f"{HEADER}.visible .entry broken()\n{{ {registers} {instruction}; ret; }}"
    with pytest.raises(PtxError, match=rf"kernel broken: .*{text}"):
        translate(source)


def test_functions_stop_the_translation():
    with pytest.raises(PtxError, match=r"not: .*\.func helper"):
        translate(f"{HEADER}.func helper() {{ ret; }}")


def test_text_that_is_no_ptx():
    with pytest.raises(PtxError, match=r"no \.target"):
        translate("int main() {}")
