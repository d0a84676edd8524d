"""Arithmetic and bits: what C++ each instruction family becomes.

A family is a function of an Operation that gives a C++ statement (families.py). Semantics that C++ operators do not
have are functions of runtime/ptx.hpp and runtime/half.hpp.
"""

from __future__ import annotations

from .families import family
from .operands import HALVES, cpp_type, half_struct, is_float, untyped, width
from .operation import Operation
from .parser import Integer, PtxError


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
        bits = untyped(kind)
        return op.write(
            f"{half_struct(kind)}::apply(ptx::{function}{{}}, {op.read(1, bits)}, {op.read(2, bits)})", bits
        )
    if is_float(kind):
        _nearest(op)
        result = f"{op.read(1, kind)} {symbol} {op.read(2, kind)}"
        return op.write(f"ptx::saturate({result})" if op.flag("sat") else result, kind)
    if op.family == "mul":
        return op.write(*_product(op, kind))
    if kind == "s32" and op.flag("sat"):
        return op.write(f"ptx::clamp<int32_t>(int64_t({op.read(1, kind)}) {symbol} {op.read(2, kind)})", kind)
    bits = untyped(kind)
    return op.write(f"{op.read(1, bits)} {symbol} {op.read(2, bits)}", bits)


def _product(op: Operation, kind: str) -> tuple[str, str]:
    """The low half, the high half or all of an integer product, with its type."""
    part = op.choose("lo", "hi", "wide")
    a, b, n = op.read(1, kind), op.read(2, kind), width(kind)
    if part == "lo":
        bits = untyped(kind)
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
        bits = untyped(kind)
        values = ", ".join(op.read(i, bits) for i in (1, 2, 3))
        return op.write(f"{half_struct(kind)}::apply(ptx::FusedMultiplyAdd{{}}, {values})", bits)
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
        bits = untyped(kind)
        function = f"ptx::{name.capitalize()}{{{'true' if op.flag('NaN') else 'false'}}}"
        return op.write(f"{half_struct(kind)}::apply({function}, {op.read(1, bits)}, {op.read(2, bits)})", bits)
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
        bits, count = untyped(kind), width(kind)
        signs = 0x80008000 if kind.endswith("x2") else 1 << (count - 1)
        mask = signs if op.family == "neg" else ((1 << count) - 1) ^ signs
        suffix = "ull" if count == 64 else "u"
        result = f"{op.read(1, bits)} {'^' if op.family == 'neg' else '&'} {mask:#x}{suffix}"
        return op.write(f"{cpp_type(bits)}({result})", bits)
    if op.family == "neg":
        bits = untyped(kind)
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
