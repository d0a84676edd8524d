"""Choice, conversion, movement between registers and control flow: what C++ each instruction family becomes."""

from __future__ import annotations

from .families import family
from .operands import HALVES, cpp_type, half_struct, is_float, untyped, width
from .operation import Operation
from .parser import PtxError, Symbol, Vector

# --- choice ---


@family("setp")
def set_predicate(op: Operation) -> str:
    """p = a <comparison> b, combined with another predicate where asked; q the same of the opposite."""
    kind = op.type()
    combine = op.choose("and", "or", "xor", default="none")
    op.expect(3 if combine == "none" else 4)
    ordered = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
    unsigned = {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}
    unordered = ("equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan")
    comparison = op.choose(*ordered, *unsigned, *unordered)
    if kind in ("f16", "bf16"):
        values = [f"{half_struct(kind)}::value({op.read(i, untyped(kind))})" for i in (1, 2)]
    else:
        values = [op.read(i, kind) for i in (1, 2)]
    if is_float(kind) or kind in ("f16", "bf16"):
        result = f"ptx::compare_{comparison}({', '.join(values)})"
    elif comparison in unordered or (comparison in unsigned and kind[0] != "u"):
        raise PtxError(f"comparison .{comparison} of .{kind}")
    else:
        result = f"({values[0]} {(ordered | unsigned)[comparison]} {values[1]})"
    first, second = op.pair(0)

    def combined(value: str) -> str:
        if combine == "none":
            return value
        return f"{value} {dict(zip(('and', 'or', 'xor'), '&|^', strict=True))[combine]} ({op.read(3, 'pred')})"

    if second is None:
        return op.names.write(first, combined(result), "pred")
    # Both predicates are of the operands before either is written.
    return (
        f"{{ const bool first = {combined(result)}, second = {combined(f'!{result}')}; "
        f"{op.names.write(first, 'first', 'pred') if first else ''} {op.names.write(second, 'second', 'pred')} }}"
    )


@family("selp")
def select(op: Operation) -> str:
    """One of two values by a predicate."""
    kind = op.type()
    op.expect(4)
    return op.write(f"{op.read(3, 'pred')} ? {op.read(1, kind)} : {op.read(2, kind)}", kind)


@family("slct")
def select_by_sign(op: Operation) -> str:
    """a where c >= 0, else b."""
    kind, of = op.types(2)
    op.expect(4)
    return op.write(f"{op.read(3, of)} >= 0 ? {op.read(1, kind)} : {op.read(2, kind)}", kind)


# --- movement and conversion ---


@family("mov")
def move(op: Operation) -> str:
    """A copy; of vectors: their elements packed into one register, or one register spread over them."""
    kind = op.type()
    op.expect(2)
    to, source = op.operands
    if isinstance(source, Vector):
        return op.write(_packed(op, source, kind), kind)
    if isinstance(to, Vector):
        part = width(kind) // len(to.items)
        parts = " ".join(
            op.names.write(item, f"{cpp_type(f'b{part}')}(whole >> {part * i})", f"b{part}")
            for i, item in enumerate(to.items)
            if item is not None
        )
        return f"{{ const {cpp_type(untyped(kind))} whole = {op.read(1, untyped(kind))}; {parts} }}"
    return op.write(op.read(1, kind), kind)


def _packed(op: Operation, source: Vector, kind: str) -> str:
    part, whole = width(kind) // len(source.items), cpp_type(untyped(kind))
    terms = [f"{whole}({op.names.read(item, f'b{part}')}) << {part * i}" for i, item in enumerate(source.items)]
    return " | ".join(terms) if not is_float(kind) else f"ptx::bits<{cpp_type(kind)}>({' | '.join(terms)})"


@family("cvta")
def convert_address(op: Operation) -> str:
    """Between an address of a state space and a generic one, which is the host's."""
    op.choose("u64")
    op.expect(2)
    to = op.flag("to")
    space = op.choose("shared", "shared::cta", "global", "local", "const", "param")
    value = op.read(1, "u64")
    if space.startswith("shared"):
        value = f"ptx::{'generic_to_shared' if to else 'shared_to_generic'}({value})"
    return op.write(value, "u64")


@family("isspacep")
def is_space(op: Operation) -> str:
    """Whether a generic address lies in shared memory."""
    op.choose("shared", "shared::cta")
    op.expect(2)
    return op.write(f"ptx::is_shared({op.read(1, 'u64')})", "pred")


@family("cvt")
def convert(op: Operation) -> str:
    """Between number types, with the rounding and saturation that the instruction names."""
    if len(op.operands) == 3:
        return _convert_two(op)
    op.expect(2)
    to, source = op.types(2)
    if to == "tf32":
        op.choose("rna")
        return op.write(f"ptx::round_tf32({op.read(1, source)})", "b32")
    if to in ("f16", "bf16"):
        return _convert_to_half(op, to, source)
    if source in ("f16", "bf16"):
        value, source = f"{half_struct(source)}::value({op.read(1, 'b16')})", "f32"
    else:
        value = op.read(1, source)
    if is_float(source) and not is_float(to):
        rounding = {"rni": "std::nearbyint", "rzi": "std::trunc", "rmi": "std::floor", "rpi": "std::ceil"}
        function = rounding[op.choose(*rounding)]
        op.flag("sat")  # said or not: out of range is the nearest value, NaN is 0
        return op.write(f"ptx::to_integer<{cpp_type(to)}>({function}({value}))", to)
    if is_float(to) and is_float(source):
        return _convert_float(op, to, source, value)
    if is_float(to):
        if op.choose("rn", "rz") == "rz":
            raise PtxError("conversion of integers towards zero")
        return op.write(f"{cpp_type(to)}({value})", to)
    if op.flag("sat"):
        return op.write(f"ptx::clamp<{cpp_type(to)}>({value})", to)
    return op.write(f"{cpp_type(to)}({value})", to)


def _convert_float(op: Operation, to: str, source: str, value: str) -> str:
    rounding = op.choose("rni", "rzi", "rmi", "rpi", "rn", default="none")
    function = {"rni": "std::nearbyint", "rzi": "std::trunc", "rmi": "std::floor", "rpi": "std::ceil"}.get(rounding)
    if rounding == "rn" and width(to) >= width(source):
        raise PtxError("rounding to a type that is no narrower")
    result = f"{function}({value})" if function else f"{cpp_type(to)}({value})"
    return op.write(f"ptx::saturate({result})" if op.flag("sat") else result, to)


def _convert_to_half(op: Operation, to: str, source: str) -> str:
    if source == "f32":
        rounding = op.choose("rn", "rz")
        value = op.read(1, source)
        if op.flag("relu"):
            value = f"ptx::rectify({value})"
        if op.flag("sat"):
            value = f"ptx::saturate({value})"
        return op.write(f"{half_struct(to)}::{'nearest' if rounding == 'rn' else 'toward_zero'}({value})", "b16")
    if is_float(source) or source in HALVES or width(source) > 32:
        raise PtxError(f"conversion of .{source} to .{to}")
    op.choose("rn")
    # Exact in a double; then rounded once.
    return op.write(f"{half_struct(to)}::nearest(ptx::round_to_odd(double({op.read(1, source)})))", "b16")


def _convert_two(op: Operation) -> str:
    """d = two floats as 16-bit ones, the first in the high half."""
    to, source = op.types(2)
    if source != "f32" or to not in ("f16x2", "bf16x2"):
        raise PtxError(f"conversion of two .{source} to .{to}")
    function = f"{half_struct(to)}::{'nearest' if op.choose('rn', 'rz') == 'rn' else 'toward_zero'}"
    relu = op.flag("relu")
    high, low = (f"ptx::rectify({v})" if relu else v for v in (op.read(1, "f32"), op.read(2, "f32")))
    return op.write(f"uint32_t({function}({high})) << 16 | {function}({low})", "b32")


# --- control ---


@family("bra")
def branch(op: Operation) -> str:
    """Go to a label."""
    op.flag("uni")
    op.expect(1)
    (target,) = op.operands
    if not isinstance(target, Symbol):
        raise PtxError("a label is wanted")
    return f"goto {op.names.label(target.name)};"


@family("brx")
def branch_indexed(op: Operation) -> str:
    """Go to one label of a table."""
    op.choose("idx")
    op.flag("uni")
    op.expect(2)
    table = op.operands[1]
    if not isinstance(table, Symbol) or table.name not in op.names.tables:
        raise PtxError("a table of labels is wanted")
    cases = " ".join(f"case {i}: goto {op.names.label(label)};" for i, label in enumerate(op.names.tables[table.name]))
    return f'switch ({op.read(0, "u32")}) {{ {cases} default: ptx::fail("brx.idx outside of its table"); }}'


@family("ret", "exit")
def leave(op: Operation) -> str:
    """The end of a thread."""
    op.flag("uni")
    op.expect(0)
    return "return;"


@family("trap")
def trap(op: Operation) -> str:
    """The end of the launch, with an error."""
    op.expect(0)
    return 'ptx::fail("trap");'
