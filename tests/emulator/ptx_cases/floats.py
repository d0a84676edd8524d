"""Floating instructions against exact rational arithmetic, rounded by definition (case.py)."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np

from .case import BFLOAT, HALF, SINGLE, Case, Format, array, case, cross, exponent_of, rounded

INF, NAN = float("inf"), float("nan")
RANDOM = np.random.default_rng(5)

FLOATS = array(
    "float32",
    [0.0, -0.0, 1.0, -1.0, 1.5, -2.5, 1e-40, -1.4e-45, 1.17549435e-38, 1e38, 3.4028235e38, 0.1, INF, -INF, NAN],
)
PAIRS = cross(FLOATS, FLOATS)
TRIPLES = cross(FLOATS, FLOATS, FLOATS)

# Around what integers hold, and ties of rounding to integers.
ROUNDED = array(
    "float32",
    [
        0.5,
        1.5,
        2.5,
        -0.5,
        -1.5,
        -2.5,
        0.49999997,
        127.5,
        128.5,
        -128.5,
        -129.0,
        255.5,
        1e9,
        2147483520.0,
        2147483648.0,
        -2147483648.0,
        -2147483904.0,
        4294967040.0,
        4294967296.0,
        1e20,
        -1e20,
        -1.0,
        0.0,
        -0.0,
        INF,
        -INF,
        NAN,
        9.3e18,
    ],
)

# Ties and limits of both 16-bit formats, and of tf32.
NARROWED = array(
    "float32",
    [
        0.0,
        -0.0,
        1 + 2**-11,
        1 + 3 * 2**-11,
        1 + 2**-11 + 2**-23,
        1 + 2**-8,
        1 + 3 * 2**-8,
        -(1 + 2**-8),
        1 + 2**-8 + 2**-23,
        65504.0,
        65519.996,
        65520.0,
        65536.0,
        -65520.0,
        2.0**-14,
        2.0**-14 - 2.0**-25,
        2.0**-24,
        2.0**-25,
        2.0**-25 * 1.001,
        3 * 2.0**-25,
        2.0**-26,
        1e-40,
        3.3895314e38,
        3.4e38,
        3.4028235e38,
        INF,
        -INF,
        NAN,
        1 + 2**-11 - 2**-23,
        0.1,
        -0.1,
        1 + 2**-10 + 2**-11,
        1 - 2**-12,
        2047.9,
        -3.3895316e38,
        9.2e-41,
        4.6e-41,
    ],
)

HALVES = array(
    "uint16", [0, 0x8000, 1, 0x8001, 0x3FF, 0x400, 0x3C00, 0x3C01, 0xBC00, 0x3555, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00]
)
HALVES = np.concatenate([HALVES, array("uint16", [0x7E00, 0x4248, 0x1, 0x83FF])])
BFLOATS = array(
    "uint16", [0, 0x8000, 1, 0x8001, 0x7F, 0x80, 0x3F80, 0x3F81, 0xBF80, 0x3DCD, 0x7F7F, 0xFF7F, 0x7F80, 0xFF80]
)
BFLOATS = np.concatenate([BFLOATS, array("uint16", [0x7FC0, 0x4049, 0x2F80, 0xA001])])


def _to_integer(rounding, low: int, high: int):
    def function(x: float) -> int:
        if math.isnan(x):
            return 0
        return max(low, min(high, rounding(x))) if math.isfinite(x) else (high if x > 0 else low)

    return function


def _least(a: float, b: float) -> float:
    if math.isnan(a) or math.isnan(b):
        return b if math.isnan(a) else a
    return a if a < b or (a == b and math.copysign(1, a) < 0) else b


def _greatest(a: float, b: float) -> float:
    return -_least(-a, -b)


def _nan_wins(function):
    return lambda a, b: NAN if math.isnan(a) or math.isnan(b) else function(a, b)


def _narrow(format: Format, towards_zero: bool = False):
    def function(x: float) -> int:
        if not math.isfinite(x) or x == 0:
            return format.encode(x)
        value = (format.toward_zero if towards_zero else format.nearest)(Fraction(x))
        return format.encode(math.copysign(value, x))

    return function


def _tf32(x: float) -> int:
    """10 bits of mantissa, ties away from zero."""
    if math.isnan(x):
        return 0x7FFFFFFF
    if not math.isfinite(x) or x == 0:
        return int(np.float32(x).view(np.uint32))
    magnitude = abs(Fraction(x))
    unit = Fraction(2) ** (max(-126, exponent_of(magnitude)) - 10)
    value = math.floor(magnitude / unit + Fraction(1, 2)) * unit
    with np.errstate(over="ignore"):
        return int(np.float32(math.copysign(float(value), x)).view(np.uint32))


def _divide(a: float, b: float) -> float:
    if math.isfinite(a) and math.isfinite(b) and a != 0 and b != 0:
        return SINGLE.nearest(Fraction(a) / Fraction(b)) or math.copysign(0.0, a * math.copysign(1, b))
    with np.errstate(all="ignore"):
        return float(np.float64(a) / np.float64(b))


def _root(x: float) -> float:
    with np.errstate(all="ignore"):
        return float(np.sqrt(np.float64(x)))  # rounded to fp32 behind it, which is the same as once


def _add(a, b):
    return a + b


def _product(a, b):
    return a * b


def _fused(a, b, c):
    return a * b + c


def _singles() -> list[Case]:
    def single(function):
        return lambda *values: rounded(SINGLE, function, *values)

    fma_inputs = [np.concatenate([column, extra]) for column, extra in zip(TRIPLES, _hard_singles(), strict=True)]
    return [
        case("add_f32", "add.f32 d, a, b;", single(_add), "float32", *PAIRS),
        case("sub_f32", "sub.rn.f32 d, a, b;", single(lambda a, b: a - b), "float32", *PAIRS),
        case("mul_f32", "mul.f32 d, a, b;", single(_product), "float32", *PAIRS),
        case("fma_f32", "fma.rn.f32 d, a, b, c;", single(_fused), "float32", *fma_inputs),
        case("add_half", "add.f32 d, a, 0f3F000000;", single(lambda a: a + type(a)(0.5)), "float32", FLOATS),
        case("div_f32", "div.rn.f32 d, a, b;", _divide, "float32", *PAIRS),
        case("rcp_f32", "rcp.rn.f32 d, a;", lambda a: _divide(1.0, a), "float32", FLOATS),
        case("sqrt_f32", "sqrt.rn.f32 d, a;", _root, "float32", FLOATS),
        case("abs_f32", "abs.f32 d, a;", abs, "float32", FLOATS),
        case("neg_f32", "neg.f32 d, a;", lambda a: -a, "float32", FLOATS),
        case("min_f32", "min.f32 d, a, b;", _least, "float32", *PAIRS),
        case("max_f32", "max.f32 d, a, b;", _greatest, "float32", *PAIRS),
        case("min_nan_f32", "min.NaN.f32 d, a, b;", _nan_wins(_least), "float32", *PAIRS),
        case("max_nan_f32", "max.NaN.f32 d, a, b;", _nan_wins(_greatest), "float32", *PAIRS),
        case("copysign_f32", "copysign.f32 d, a, b;", lambda a, b: math.copysign(b, a), "float32", *PAIRS),
        case("saturate", "cvt.sat.f32.f32 d, a;", lambda a: min(a, 1.0) if a > 0 else 0.0, "float32", FLOATS),
        case(
            "selp_f32", "setp.gt.f32 p, a, b; selp.f32 d, a, b, p;", lambda a, b: a if a > b else b, "float32", *PAIRS
        ),
        case("bits_f32", "mov.b32 d, a;", lambda a: int(np.float32(a).view(np.uint32)), "uint32", FLOATS[:-1]),
        case("top_half", "mov.b32 d, {0, a};", BFLOAT.decode, "float32", BFLOATS),
    ]


def _hard_singles() -> list[np.ndarray]:
    """Products whose rounding a sum then shows: rounded twice they come out wrong."""
    a = (1 + RANDOM.integers(0, 1 << 23, 200) * 2.0**-23).astype(np.float32)
    b = (1 + RANDOM.integers(0, 1 << 23, 200) * 2.0**-23).astype(np.float32)
    return [a, b, -(a * b)]


def _comparisons() -> list[Case]:
    ordered = {
        "eq": lambda a, b: a == b,
        "ne": lambda a, b: a != b,
        "lt": lambda a, b: a < b,
        "le": lambda a, b: a <= b,
        "gt": lambda a, b: a > b,
        "ge": lambda a, b: a >= b,
    }
    cases = []
    for name, function in ordered.items():
        body = f"setp.{name}{{}}.f32 p, a, b; selp.b32 d, 1, 0, p;"

        def compare(a, b, function=function, unordered=False):
            return int(unordered if math.isnan(a) or math.isnan(b) else function(a, b))

        cases.append(case(f"setp_{name}_f32", body.format(""), compare, "uint32", *PAIRS))
        cases.append(
            case(
                f"setp_{name}u_f32", body.format("u"), lambda a, b, c=compare: c(a, b, unordered=True), "uint32", *PAIRS
            )
        )
    nan = "setp.nan.f32 p, a, b; selp.b32 d, 1, 0, p;"
    cases.append(case("setp_nan_f32", nan, lambda a, b: int(math.isnan(a) or math.isnan(b)), "uint32", *PAIRS))
    half = "setp.lt.f16 p, a, b; selp.b32 d, 1, 0, p;"
    cases.append(
        case("setp_lt_f16", half, lambda a, b: int(HALF.decode(a) < HALF.decode(b)), "uint32", *cross(HALVES, HALVES))
    )
    return cases


def _conversions() -> list[Case]:
    roundings = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}
    cases = []
    for name, function in roundings.items():
        cases.append(
            case(
                f"cvt_{name}_s32",
                f"cvt.{name}.s32.f32 d, a;",
                _to_integer(function, -(2**31), 2**31 - 1),
                "int32",
                ROUNDED,
            )
        )

        def to_float(x, function=function):
            return math.copysign(float(function(x)), x) if math.isfinite(x) else x

        cases.append(case(f"cvt_{name}_f32", f"cvt.{name}.f32.f32 d, a;", to_float, "float32", ROUNDED))
    integers = array(
        "int32", [0, 1, -1, 2**24 + 1, 2**24 + 3, 2**31 - 1, -(2**31), 65504, 65520, 2047, 2049, 4098, 4102]
    )
    longs = array("int64", [0, -1, 2**62 + 1, 2**24 + 1, -(2**63), 2**63 - 1])
    to_s8 = "cvt.rni.sat.s8.f32 h, a; cvt.s32.s16 d, h;"

    def nearest(x: int) -> float:
        return SINGLE.nearest(Fraction(x))

    return [
        *cases,
        case("cvt_u32", "cvt.rzi.u32.f32 d, a;", _to_integer(math.trunc, 0, 2**32 - 1), "uint32", ROUNDED),
        case("cvt_s64", "cvt.rzi.s64.f32 d, a;", _to_integer(math.trunc, -(2**63), 2**63 - 1), "int64", ROUNDED),
        case("cvt_s8", to_s8, _to_integer(round, -128, 127), "int32", ROUNDED),
        case("cvt_rn_s32", "cvt.rn.f32.s32 d, a;", nearest, "float32", integers),
        case("cvt_rn_u32", "cvt.rn.f32.u32 d, a;", nearest, "float32", integers.view(np.uint32)),
        case("cvt_rn_s64", "cvt.rn.f32.s64 d, a;", nearest, "float32", longs),
        case("cvt_rn_s8", "cvt.rn.f32.s8 d, a;", float, "float32", array("int8", range(-128, 128))),
        case("cvt_tf32", "cvt.rna.tf32.f32 d, a;", _tf32, "uint32", np.concatenate([NARROWED, FLOATS])),
        case("cvt_f16", "cvt.rn.f16.f32 d, a;", _narrow(HALF), "uint16", NARROWED),
        case("cvt_rz_f16", "cvt.rz.f16.f32 d, a;", _narrow(HALF, True), "uint16", NARROWED),
        case("cvt_bf16", "cvt.rn.bf16.f32 d, a;", _narrow(BFLOAT), "uint16", NARROWED),
        case("cvt_rz_bf16", "cvt.rz.bf16.f32 d, a;", _narrow(BFLOAT, True), "uint16", NARROWED),
        case("cvt_f16_random", "cvt.rn.f16.f32 d, a;", _narrow(HALF), "uint16", _random_floats()),
        case("cvt_bf16_random", "cvt.rn.bf16.f32 d, a;", _narrow(BFLOAT), "uint16", _random_floats()),
        case("cvt_from_f16", "cvt.f32.f16 d, a;", HALF.decode, "float32", np.arange(1 << 16, dtype=np.uint16)),
        case("cvt_from_bf16", "cvt.f32.bf16 d, a;", BFLOAT.decode, "float32", BFLOATS),
        case(
            "cvt_f16_s32", "cvt.rn.f16.s32 d, a;", lambda x: HALF.encode(HALF.nearest(Fraction(x))), "uint16", integers
        ),
        case("cvt_s16_f16", "cvt.rni.s16.f16 d, a;", _from_half(-(2**15), 2**15 - 1), "int16", HALVES),
        *(
            case(
                f"cvt_{name}",
                f"cvt.rn.{name}.f32 d, a, b;",
                lambda a, b, f=format: _narrow(f)(a) << 16 | _narrow(f)(b),
                "uint32",
                *cross(NARROWED, NARROWED),
            )
            for name, format in (("f16x2", HALF), ("bf16x2", BFLOAT))
        ),
    ]


def _from_half(low: int, high: int):
    convert = _to_integer(round, low, high)
    return lambda bits: convert(HALF.decode(bits))


def _random_floats() -> np.ndarray:
    """All magnitudes that halves have, and ties."""
    scale = 2.0 ** RANDOM.integers(-27, 17, 1000)
    return (RANDOM.integers(-(2**13), 2**13, 1000) * scale * 2.0**-12).astype(np.float32)


def _halves() -> list[Case]:
    functions = {"add": _add, "sub": lambda a, b: a - b, "mul": _product, "fma": _fused}
    cases = []
    for kind, format, edges in (("f16", HALF, HALVES), ("bf16", BFLOAT, BFLOATS)):
        for name, exact in functions.items():
            count = 3 if name == "fma" else 2
            operands = ", ".join("abc"[:count])
            rounding = ".rn" if name == "fma" else ""

            def once(*bits, exact=exact, format=format):
                return format.encode(rounded(format, exact, *(format.decode(b) for b in bits)))

            def twice(*words, once=once):
                return once(*(w >> 16 for w in words)) << 16 | once(*(w & 0xFFFF for w in words))

            inputs = cross(*([edges[::2]] * 3 if count == 3 else [edges] * 2))
            words = [array("uint32", RANDOM.integers(0, 1 << 32, 500)) for _ in range(count)]
            cases.append(case(f"{name}_{kind}", f"{name}{rounding}.{kind} d, {operands};", once, "uint16", *inputs))
            cases.append(case(f"{name}_{kind}x2", f"{name}{rounding}.{kind}x2 d, {operands};", twice, "uint32", *words))
        for name, function in (("min", _least), ("max", _greatest)):

            def extreme(a, b, function=function, format=format):
                return format.encode(function(format.decode(a), format.decode(b)))

            cases.append(case(f"{name}_{kind}", f"{name}.{kind} d, a, b;", extreme, "uint16", *cross(edges, edges)))
        cases.append(case(f"neg_{kind}x2", f"neg.{kind}x2 d, a;", lambda a: a ^ 0x80008000, "uint32", words[0]))
        cases.append(case(f"abs_{kind}", f"abs.{kind} d, a;", lambda a: a & 0x7FFF, "uint16", edges))
    cases.append(_tie_of_fma())
    return cases


def _tie_of_fma() -> Case:
    """In bf16: a product whose sum is a hair above a tie, which is lost where it is first rounded to fp32."""
    a, b = BFLOAT.encode(1.0), BFLOAT.encode(2.0**-30)
    c = BFLOAT.encode(1.0)
    ties = [(BFLOAT.encode(1 + 2.0**-7), BFLOAT.encode(2.0**-8), c), (a, b, c), (BFLOAT.encode(257 / 256 * 1.5), a, b)]
    inputs = [array("uint16", column) for column in zip(*ties, strict=True)]

    def once(*bits):
        return BFLOAT.encode(rounded(BFLOAT, _fused, *(BFLOAT.decode(x) for x in bits)))

    return case("fma_bf16_tie", "fma.rn.bf16 d, a, b, c;", once, "uint16", *inputs)


CASES = _singles() + _comparisons() + _conversions() + _halves()
