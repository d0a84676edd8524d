"""Arithmetic, conversion, data movement and control: what C++ each instruction family becomes.

A family is a function of an Operation that gives a C++ statement (families.py). memory.py and warp.py hold the families of
memory and of the warp. Semantics that C++ operators do not have are functions
of runtime/ptx.hpp.
"""

from __future__ import annotations

from .families import family
from .operands import cpp_type, is_float, width
from .operation import Operation
from .parser import Integer, PtxError, Symbol, Vector

HALVES = ("f16", "f16x2", "bf16", "bf16x2")


def _bits(kind: str) -> str:
    return f"b{width(kind)}"


def _half(kind: str) -> str:
    """The run-time struct of a 16-bit float."""
    return "ptx::BFloat" if kind.startswith("bf") else "ptx::Half"


def _nearest(op: Operation) -> None:
    """Floating arithmetic rounds to nearest even, said or not."""
    op.flag("rn")


# --- integers and floats alike ---


@family("add", "sub", "mul")
def arithmetic(op: Operation) -> str:
    """d = a + b and its like; of integers, `mul` has a part to choose."""
    kind = op.type()
    op.expect(3)
    symbol = {"add": "+", "sub": "-", "mul": "*"}[op.family]
    if kind in HALVES:
        _nearest(op)
        function = {"add": "Add", "sub": "Subtract", "mul": "Multiply"}[op.family]
        bits = _bits(kind)
        return op.write(f"{_half(kind)}::apply(ptx::{function}{{}}, {op.read(1, bits)}, {op.read(2, bits)})", bits)
    if is_float(kind):
        _nearest(op)
        result = f"{op.read(1, kind)} {symbol} {op.read(2, kind)}"
        return op.write(f"ptx::saturate({result})" if op.flag("sat") else result, kind)
    if op.family == "mul":
        return op.write(*_product(op, kind))
    if kind == "s32" and op.flag("sat"):
        return op.write(f"ptx::clamp<int32_t>(int64_t({op.read(1, kind)}) {symbol} {op.read(2, kind)})", kind)
    bits = _bits(kind)
    return op.write(f"{op.read(1, bits)} {symbol} {op.read(2, bits)}", bits)


def _product(op: Operation, kind: str) -> tuple[str, str]:
    """The low half, the high half or all of an integer product, with its type."""
    part = op.choose("lo", "hi", "wide")
    a, b, n = op.read(1, kind), op.read(2, kind), width(kind)
    if part == "lo":
        bits = _bits(kind)
        return f"{cpp_type(f'u{max(n, 32)}')}({op.read(1, bits)}) * {op.read(2, bits)}", bits
    if part == "hi":
        return f"ptx::multiply_high<{cpp_type(kind)}>({a}, {b})", kind
    if n == 64:
        raise PtxError("there is no type of 128 bits")
    wide = f"{kind[0]}{2 * n}"
    return f"{cpp_type(wide)}({a}) * {b}", wide


@family("mad")
def multiply_add(op: Operation) -> str:
    """d = a b + c: integers as mul, floats rounded once."""
    kind = op.type()
    op.expect(4)
    if is_float(kind):
        return fused(op, kind)
    product, result = _product(op, kind)
    if result[0] == "b":
        return op.write(f"{product} + {op.read(3, result)}", result)
    unsigned = f"u{width(result)}"
    return op.write(f"{cpp_type(unsigned)}({product}) + {op.read(3, unsigned)}", unsigned)


@family("fma")
def fused_multiply_add(op: Operation) -> str:
    """d = a b + c, rounded once."""
    kind = op.type()
    op.expect(4)
    return fused(op, kind)


def fused(op: Operation, kind: str) -> str:
    """The body of fma and of mad on floats."""
    op.choose("rn")
    if kind in HALVES:
        bits = _bits(kind)
        values = ", ".join(op.read(i, bits) for i in (1, 2, 3))
        return op.write(f"{_half(kind)}::apply(ptx::FusedMultiplyAdd{{}}, {values})", bits)
    if not is_float(kind):
        raise PtxError(f"fma of .{kind}")
    result = f"std::fma({', '.join(op.read(i, kind) for i in (1, 2, 3))})"
    return op.write(f"ptx::saturate({result})" if op.flag("sat") else result, kind)


@family("div", "rem")
def division(op: Operation) -> str:
    """Quotient and remainder; an approximate quotient is as good as an exact one."""
    kind = op.type()
    op.expect(3)
    a, b = op.read(1, kind), op.read(2, kind)
    if not is_float(kind):
        return op.write(f"ptx::{'divide' if op.family == 'div' else 'remainder'}<{cpp_type(kind)}>({a}, {b})", kind)
    if op.family == "rem":
        raise PtxError("rem of floats")
    op.choose("rn", "full", "approx")
    return op.write(_flushed(op, "{} / {}", a, b), kind)


def _flushed(op: Operation, formula: str, *values: str) -> str:
    """A formula of floats, with subnormal operands and results as zeros where the instruction has .ftz."""
    if not op.flag("ftz"):
        return formula.format(*values)
    return f"ptx::flush({formula.format(*(f'ptx::flush({value})' for value in values))})"


@family("rcp", "sqrt", "rsqrt", "ex2", "lg2")
def elementary(op: Operation) -> str:
    """Functions of one float. The approximate ones are computed exactly and rounded."""
    kind = op.type()
    op.expect(2)
    if kind != "f32":
        raise PtxError(f"{op.family} of .{kind}")
    op.choose(*(("rn", "approx") if op.family in ("rcp", "sqrt") else ("approx",)))
    formula = {
        "rcp": "1.0f / {}",
        "sqrt": "std::sqrt({})",
        "rsqrt": "float(1.0 / std::sqrt(double({})))",
        "ex2": "std::exp2({})",
        "lg2": "std::log2({})",
    }[op.family]
    return op.write(_flushed(op, formula, op.read(1, kind)), kind)


@family("min", "max")
def extremum(op: Operation) -> str:
    """Of floats: the number where the other is NaN, NaN with .NaN; -0 below +0."""
    kind = op.type()
    op.expect(3)
    name = "minimum" if op.family == "min" else "maximum"
    if kind in HALVES:
        bits = _bits(kind)
        function = f"ptx::{name.capitalize()}{{{'true' if op.flag('NaN') else 'false'}}}"
        return op.write(f"{_half(kind)}::apply({function}, {op.read(1, bits)}, {op.read(2, bits)})", bits)
    a, b = op.read(1, kind), op.read(2, kind)
    if kind == "f32":
        return op.write(f"ptx::{name.capitalize()}{{{'true' if op.flag('NaN') else 'false'}}}({a}, {b})", kind)
    if is_float(kind):
        raise PtxError(f"{op.family} of .{kind}")
    return op.write(f"std::{op.family}<{cpp_type(kind)}>({a}, {b})", kind)


@family("neg", "abs")
def sign(op: Operation) -> str:
    """Sign changes; on floats they touch the sign bit alone."""
    kind = op.type()
    op.expect(2)
    if is_float(kind) or kind in HALVES:
        bits, count = _bits(kind), width(kind)
        signs = 0x80008000 if kind.endswith("x2") else 1 << (count - 1)
        mask = signs if op.family == "neg" else ((1 << count) - 1) ^ signs
        suffix = "ull" if count == 64 else "u"
        result = f"{op.read(1, bits)} {'^' if op.family == 'neg' else '&'} {mask:#x}{suffix}"
        return op.write(f"{cpp_type(bits)}({result})", bits)
    if op.family == "neg":
        bits = _bits(kind)
        return op.write(f"0u - {op.read(1, bits)}", bits)
    return op.write(f"ptx::absolute<{cpp_type(kind)}>({op.read(1, kind)})", kind)


@family("copysign")
def copysign(op: Operation) -> str:
    """b with the sign of a."""
    kind = op.type()
    op.expect(3)
    return op.write(f"std::copysign({op.read(2, kind)}, {op.read(1, kind)})", kind)


# --- bits ---


@family("and", "or", "xor")
def logic(op: Operation) -> str:
    """Bitwise, or of predicates."""
    kind = op.type()
    op.expect(3)
    symbol = {"and": "&", "or": "|", "xor": "^"}[op.family]
    return op.write(f"{op.read(1, kind)} {symbol} {op.read(2, kind)}", kind)


@family("not")
def complement(op: Operation) -> str:
    """Bitwise, or of a predicate."""
    kind = op.type()
    op.expect(2)
    value = op.read(1, kind)
    return op.write(f"!({value})" if kind == "pred" else f"~{value}", kind)


@family("shl", "shr")
def shift(op: Operation) -> str:
    """Shifts by as much as the width or more move every bit out."""
    kind = op.type()
    op.expect(3)
    direction = "left" if op.family == "shl" else "right"
    amount = op.operands[2]
    if isinstance(amount, Integer) and 0 <= amount.value < width(kind):
        symbol = "<<" if op.family == "shl" else ">>"
        return op.write(f"{op.read(1, kind)} {symbol} {amount.value}", kind)
    return op.write(f"ptx::shift_{direction}<{cpp_type(kind)}>({op.read(1, kind)}, {op.read(2, 'u32')})", kind)


@family("shf")
def funnel_shift(op: Operation) -> str:
    """One word of a pair of words, shifted."""
    op.choose("b32")
    op.expect(4)
    direction = {"l": "left", "r": "right"}[op.choose("l", "r")]
    limit = op.choose("wrap", "clamp")
    values = ", ".join(op.read(i, "b32") for i in (1, 2, 3))
    return op.write(f"ptx::funnel_shift_{direction}({values}, {str(limit == 'wrap').lower()})", "b32")


@family("lop3")
def lookup_logic(op: Operation) -> str:
    """Any function of three bits, by its truth table."""
    op.choose("b32")
    op.expect(5)
    table = op.operands[4]
    if not isinstance(table, Integer):
        raise PtxError("the truth table is a constant")
    return op.write(f"ptx::lop3<{table.value}>({', '.join(op.read(i, 'b32') for i in (1, 2, 3))})", "b32")


@family("prmt")
def permute(op: Operation) -> str:
    """Bytes of two words, picked by four nibbles."""
    op.choose("b32")
    op.expect(4)
    return op.write(f"ptx::permute_bytes({', '.join(op.read(i, 'b32') for i in (1, 2, 3))})", "b32")


@family("bfe")
def extract_field(op: Operation) -> str:
    """Bits position .. position + length - 1, extended by the sign where the type has one."""
    kind = op.type()
    op.expect(4)
    arguments = ", ".join((op.read(1, kind), op.read(2, "u32"), op.read(3, "u32")))
    return op.write(f"ptx::extract_bits<{cpp_type(kind)}>({arguments})", kind)


@family("bfi")
def insert_field(op: Operation) -> str:
    """The low bits of a, put into b."""
    kind = op.type()
    op.expect(5)
    arguments = ", ".join((op.read(1, kind), op.read(2, kind), op.read(3, "u32"), op.read(4, "u32")))
    return op.write(f"ptx::insert_bits<{cpp_type(kind)}>({arguments})", kind)


@family("clz", "popc", "brev")
def bit_functions(op: Operation) -> str:
    """Leading zeros, set bits, bits in reverse."""
    kind = op.type()
    op.expect(2)
    name = {"clz": "leading_zeros", "popc": "count_ones", "brev": "reverse_bits"}[op.family]
    result = kind if op.family == "brev" else "u32"
    return op.write(f"ptx::{name}<{cpp_type(kind)}>({op.read(1, kind)})", result)


@family("bfind")
def find_bit(op: Operation) -> str:
    """The highest bit that differs from the sign, or with .shiftamt how far it is from the top."""
    kind = op.type()
    op.expect(2)
    amount = str(op.flag("shiftamt")).lower()
    return op.write(f"ptx::find_bit<{cpp_type(kind)}>({op.read(1, kind)}, {amount})", "u32")


@family("dp4a")
def dot_product(op: Operation) -> str:
    """d = c + the sum of four products of bytes."""
    a_kind, b_kind = op.types(2)
    op.expect(4)
    if {a_kind, b_kind} - {"s32", "u32"}:
        raise PtxError("dp4a is of .s32 or .u32")
    byte = {"s32": "int8_t", "u32": "uint8_t"}
    values = ", ".join((op.read(1, "b32"), op.read(2, "b32"), op.read(3, "b32")))
    return op.write(f"ptx::dot4<{byte[a_kind]}, {byte[b_kind]}>({values})", "b32")


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
        values = [f"{_half(kind)}::value({op.read(i, _bits(kind))})" for i in (1, 2)]
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
        return f"{{ const {cpp_type(_bits(kind))} whole = {op.read(1, _bits(kind))}; {parts} }}"
    return op.write(op.read(1, kind), kind)


def _packed(op: Operation, source: Vector, kind: str) -> str:
    part, whole = width(kind) // len(source.items), cpp_type(_bits(kind))
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
        value, source = f"{_half(source)}::value({op.read(1, 'b16')})", "f32"
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
        return op.write(f"{_half(to)}::{'nearest' if rounding == 'rn' else 'toward_zero'}({value})", "b16")
    if is_float(source) or source in HALVES or width(source) > 32:
        raise PtxError(f"conversion of .{source} to .{to}")
    op.choose("rn")
    # Exact in a double; then rounded once.
    return op.write(f"{_half(to)}::nearest(ptx::round_to_odd(double({op.read(1, source)})))", "b16")


def _convert_two(op: Operation) -> str:
    """d = two floats as 16-bit ones, the first in the high half."""
    to, source = op.types(2)
    if source != "f32" or to not in ("f16x2", "bf16x2"):
        raise PtxError(f"conversion of two .{source} to .{to}")
    function = f"{_half(to)}::{'nearest' if op.choose('rn', 'rz') == 'rn' else 'toward_zero'}"
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
    cases = " ".join(
        f"case {i}: goto {op.names.label(label)};" for i, label in enumerate(op.names.tables[table.name])
    )
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
