"""Instructions of a block or of a warp: barriers, shuffles, votes, matrices."""

from __future__ import annotations

from .families import family
from .operands import cpp_type
from .operation import Operation
from .parser import Integer, PtxError


@family("bar", "barrier")
def barrier(op: Operation) -> str:
    """bar.sync 0, which is __syncthreads, and bar.warp.sync."""
    if op.flag("warp"):
        op.choose("sync")
        op.expect(1)
        return f"ptx::warp_barrier({op.read(0, 'u32')});"
    op.choose("sync")
    op.flag("aligned", "cta")
    op.expect(1)
    if op.operands[0] != Integer(0):
        raise PtxError("of barriers there is only number 0, for all threads")
    op.names.barriers += 1
    return f"ptx::barrier({op.names.barriers});"


@family("shfl")
def shuffle(op: Operation) -> str:
    """d = the value of another lane of the warp, and whether that lane is in range."""
    op.choose("b32")
    op.choose("sync")
    op.expect(5)
    modes = {"idx": "index", "up": "up", "down": "down", "bfly": "butterfly"}
    mode = modes[op.choose(*modes)]
    value, valid = op.pair(0)
    arguments = f"{op.read(1, 'b32')}, {op.read(2, 'u32')}, {op.read(3, 'u32')}, {op.read(4, 'u32')}"
    stores = op.names.write(value, "got", "b32") if value else ""
    stores += f" {op.names.write(valid, 'valid', 'pred')}" if valid else ""
    got = f"const uint32_t got = ptx::shuffle(ptx::Shuffle::{mode}, {arguments}, valid);"
    return f"{{ bool valid; {got} {stores.strip()} }}"


@family("vote")
def vote(op: Operation) -> str:
    """A predicate of all lanes of the warp."""
    kind = op.type()
    op.choose("sync")
    op.expect(3)
    mode = op.choose(*(("ballot",) if kind == "b32" else ("all", "any", "uni")))
    votes = f"ptx::ballot({op.read(1, 'pred')}, {op.read(2, 'u32')})"
    if mode == "ballot":
        return op.write(votes, "b32")
    return op.write(f"ptx::vote_{mode}({votes})", "pred")


# Shape and types of D, A, B, C: the run-time function, registers of A and of B.
_MATRIX_PRODUCTS = {
    ("m16n8k16", "f32", "f16", "f16", "f32"): ("mma_m16n8k16<ptx::F16>", 4, 2),
    ("m16n8k16", "f32", "bf16", "bf16", "f32"): ("mma_m16n8k16<ptx::BF16>", 4, 2),
    ("m16n8k8", "f32", "f16", "f16", "f32"): ("mma_m16n8k8<ptx::F16>", 2, 1),
    ("m16n8k8", "f32", "bf16", "bf16", "f32"): ("mma_m16n8k8<ptx::BF16>", 2, 1),
    ("m16n8k8", "f32", "tf32", "tf32", "f32"): ("mma_m16n8k8_tf32", 4, 2),
}


@family("mma")
def matrix_product(op: Operation) -> str:
    """D = A B + C in fragments over the warp."""
    types = op.types(4)
    op.choose("sync")
    op.choose("aligned")
    op.choose("row")
    op.choose("col")
    op.expect(4)
    shape = op.choose("m16n8k16", "m16n8k8")
    entry = _MATRIX_PRODUCTS.get((shape, *types))
    if entry is None:
        raise PtxError(f"mma of shape {shape} and types {types}")
    function, a, b = entry
    sums = ", ".join(op.names.read(item, "f32") for item in op.vector(3, 4))
    return (
        f"{{ float d[4] = {{{sums}}}; {op.read_array(1, a, 'b32', 'a')} {op.read_array(2, b, 'b32', 'b')} "
        f"ptx::{function}(d, a, b); {op.write_array(0, 4, 'f32', 'd')} }}"
    )


@family("ldmatrix")
def load_matrix(op: Operation) -> str:
    """8 x 8 matrices of 16-bit elements from shared memory into fragments."""
    op.choose("b16")
    op.choose("sync")
    op.choose("aligned")
    op.choose("m8n8")
    op.choose("shared", "shared::cta")
    op.expect(2)
    count = int(op.choose("x1", "x2", "x4")[1:])
    transposed = str(op.flag("trans")).lower()
    return (
        f"{{ {cpp_type('b32')} r[{count}]; ptx::ldmatrix(r, {count}, {op.shared_address(1)}, {transposed}); "
        f"{op.write_array(0, count, 'b32', 'r')} }}"
    )
