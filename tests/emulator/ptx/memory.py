"""Instructions of memory: loads, stores, asynchronous copies, fences. There are no atomics: the kernels have none."""

from __future__ import annotations

from .families import family
from .operands import storage_type
from .operation import Operation
from .parser import Integer, PtxError, Register

# What says how an access is ordered or cached. Threads run one at a time here, so that it changes nothing.
_ORDER = ("weak", "relaxed", "acquire", "release", "volatile", "cta", "gpu", "sys")
_CACHE = ("ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc")
_HINTS = tuple(
    f"L{level}::{hint}"
    for level in (1, 2)
    for hint in ("no_allocate", "evict_first", "evict_last", "evict_normal", "evict_unchanged", "64B", "128B", "256B")
)


def _space(op: Operation) -> str:
    """The state space; none stands for generic addresses."""
    space = op.choose("global", "shared::cta", "shared", "local", "param", "const", default="generic")
    return "shared" if space.startswith("shared") else space


def _count(op: Operation) -> int:
    return int(op.choose("v2", "v4", "v8", default="v1")[1:])


@family("ld", "ldu")
def load(op: Operation) -> str:
    """Registers from memory."""
    kind = op.type()
    op.expect(2)
    op.flag(*_ORDER, *_CACHE, *_HINTS)
    space, count = _space(op), _count(op)
    pointer = op.pointer(1, space, kind, count)
    element = storage_type(kind)
    if count == 1:
        items = op.vector(0, 1)
        return op.names.write(items[0], f"*{pointer}", kind)
    values = op.write_array(0, count, kind, "values")
    # Copied first: the address may lie in one of the registers.
    return f"{{ {element} values[{count}]; std::memcpy(values, {pointer}, sizeof values); {values} }}"


@family("st")
def store(op: Operation) -> str:
    """Memory from registers."""
    kind = op.type()
    op.expect(2)
    op.flag(*_ORDER, *_CACHE, *_HINTS)
    space, count = _space(op), _count(op)
    if space in ("param", "const"):
        raise PtxError(f"a store to .{space}")
    pointer = op.pointer(0, space, kind, count)
    values = [op.names.read(item, kind) for item in op.vector(1, count)]
    if count == 1:
        return f"*{pointer} = {values[0]};"
    stores = " ".join(f"to[{i}] = {value};" for i, value in enumerate(values))
    return f"{{ auto* const to = {pointer}; {stores} }}"


@family("prefetch", "prefetchu", "membar", "fence")
def no_effect(op: Operation) -> str:
    """Hints, and orders of memory between threads that here never run at the same time."""
    if op.family == "fence" and "proxy" in op.modifiers:
        raise PtxError("fences between proxies are not modelled")
    op.flag(*_ORDER, *_HINTS, "global", "local", "L1", "L2", "sc", "acq_rel", "gl")
    return ";"


@family("cp")
def copy_async(op: Operation) -> str:
    """cp.async: a copy from global to shared memory, which arrives when its group is waited for."""
    if not op.flag("async"):
        raise PtxError("of cp there is only cp.async")
    if op.flag("commit_group"):
        op.expect(0)
        return "ptx::close_async_group();"
    if op.flag("wait_all"):
        op.expect(0)
        return "ptx::wait_all_async();"
    if op.flag("wait_group"):
        op.expect(1)
        if not isinstance(op.operands[0], Integer):
            raise PtxError("the number of groups is a constant")
        return f"ptx::wait_async({op.operands[0].value});"
    cached = op.choose("ca", "cg")
    op.choose("shared", "shared::cta")
    op.choose("global")
    op.flag(*_HINTS)
    op.expect(3, 4)
    size = op.operands[2]
    if not isinstance(size, Integer) or size.value not in ((4, 8, 16) if cached == "ca" else (16,)):
        raise PtxError(f"cp.async.{cached} copies {'4, 8 or 16' if cached == 'ca' else '16'} bytes, a constant")
    given = str(size.value)
    if len(op.operands) == 4:
        last = op.operands[3]
        if isinstance(last, Register) and op.names.declared(last.name) == "pred":
            given = f"({op.read(3, 'pred')}) ? 0 : {size.value}"  # ignore-src
        else:
            given = f"int({op.read(3, 'u32')})"
    return f"ptx::copy_async({op.shared_address(0)}, {op.global_address(1)}, {size.value}, {given});"
