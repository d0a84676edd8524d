"""Integer instructions against Python's integers."""

from __future__ import annotations

import numpy as np

from .case import Case, array, case, cross, signed

RANDOM = np.random.default_rng(3)
WORDS = array("uint32", [0, 1, 2, 31, 32, 0x7FFF, 0x8000, 0x7FFFFFFF, 0x80000000, 0x80000001, 0xFFFFFFFF, 0xDEADBEEF])
LONGS = array("uint64", [0, 1, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 32, (1 << 63) - 1, 1 << 63, -1, 0x123456789ABCDEF0])
SHORTS = array("uint16", [0, 1, 0x7F, 0x80, 0xFF, 0x100, 0x7FFF, 0x8000, 0xFFFF, 0xBEEF])
AMOUNTS = array("uint32", [0, 1, 7, 15, 16, 31, 32, 33, 63, 64, 65, 255, 256, 0xFFFFFFFF])
PAIRS = cross(WORDS, WORDS)
TRIPLES = cross(WORDS, WORDS, WORDS)
MASK = 0xFFFFFFFF


def _quotient(a: int, b: int) -> int:
    """Towards zero, as C."""
    magnitude = abs(a) // abs(b)
    return magnitude if (a < 0) == (b < 0) else -magnitude


def _shift_right(bits: int, sign: bool):
    return lambda a, n: (signed(a, bits) if sign else a) >> min(n, bits)


def _shift_left(bits: int):
    return lambda a, n: a << min(n, bits)


def _permute(a: int, b: int, selector: int) -> int:
    source = (b << 32 | a).to_bytes(8, "little")
    result = []
    for i in range(4):
        nibble = selector >> 4 * i & 15
        byte = source[nibble & 7]
        result.append((0xFF if byte & 0x80 else 0) if nibble & 8 else byte)
    return int.from_bytes(bytes(result), "little")


def _extract(a: int, position: int, length: int, sign: bool) -> int:
    """Bit by bit, as the ISA writes it."""
    position, length = position & 0xFF, length & 0xFF
    fill = (a >> min(position + length - 1, 31) & 1) if sign and length else 0
    bits = [(a >> position + i & 1) if i < length and position + i <= 31 else fill for i in range(32)]
    return sum(bit << i for i, bit in enumerate(bits))


def _insert(a: int, b: int, position: int, length: int) -> int:
    position, length = position & 0xFF, length & 0xFF
    for i in range(min(length, 32)):
        if position + i <= 31:
            b = b & ~(1 << position + i) | (a >> i & 1) << position + i
    return b


def _logic(table: int):
    def function(a: int, b: int, c: int) -> int:
        rows = ((a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1) for i in range(32))
        return sum((table >> row & 1) << i for i, row in enumerate(rows))

    return function


def _dot(sign: bool):
    def function(a: int, b: int, c: int) -> int:
        pairs = zip(a.to_bytes(4, "little"), b.to_bytes(4, "little"), strict=True)
        return c + sum(signed(x, 8) * signed(y, 8) if sign else x * y for x, y in pairs)

    return function


def _find_bit(a: int, sign: bool) -> int:
    return (~a & MASK if sign and a >> 31 else a).bit_length() - 1


def _clamp(low: int, high: int):
    return lambda a: max(low, min(high, signed(a)))


def _cases() -> list[Case]:
    s = signed
    cases = [
        case("add_s32", "add.s32 d, a, b;", lambda a, b: a + b, "uint32", *PAIRS),
        case("add_immediate", "add.s32 d, a, -5;", lambda a: a - 5, "uint32", WORDS),
        case("add_s16", "add.s16 d, a, b;", lambda a, b: a + b, "uint16", *cross(SHORTS, SHORTS)),
        case("add_s64", "add.s64 d, a, b;", lambda a, b: a + b, "uint64", *cross(LONGS, LONGS)),
        case("sub_u32", "sub.u32 d, a, b;", lambda a, b: a - b, "uint32", *PAIRS),
        case(
            "add_sat",
            "add.sat.s32 d, a, b;",
            lambda a, b: max(-(1 << 31), min((1 << 31) - 1, s(a) + s(b))),
            "int32",
            *PAIRS,
        ),
        case("mul_lo_s32", "mul.lo.s32 d, a, b;", lambda a, b: a * b, "uint32", *PAIRS),
        case("mul_lo_s16", "mul.lo.s16 d, a, b;", lambda a, b: a * b, "uint16", *cross(SHORTS, SHORTS)),
        case("mul_lo_s64", "mul.lo.s64 d, a, b;", lambda a, b: a * b, "uint64", *cross(LONGS, LONGS)),
        case("mul_hi_s32", "mul.hi.s32 d, a, b;", lambda a, b: s(a) * s(b) >> 32, "uint32", *PAIRS),
        case("mul_hi_u32", "mul.hi.u32 d, a, b;", lambda a, b: a * b >> 32, "uint32", *PAIRS),
        case("mul_hi_u16", "mul.hi.u16 d, a, b;", lambda a, b: a * b >> 16, "uint16", *cross(SHORTS, SHORTS)),
        case(
            "mul_hi_s64", "mul.hi.s64 d, a, b;", lambda a, b: s(a, 64) * s(b, 64) >> 64, "int64", *cross(LONGS, LONGS)
        ),
        case("mul_hi_u64", "mul.hi.u64 d, a, b;", lambda a, b: a * b >> 64, "uint64", *cross(LONGS, LONGS)),
        case("mul_wide_s32", "mul.wide.s32 d, a, b;", lambda a, b: s(a) * s(b), "uint64", *PAIRS),
        case("mul_wide_u32", "mul.wide.u32 d, a, b;", lambda a, b: a * b, "uint64", *PAIRS),
        case(
            "mul_wide_s16", "mul.wide.s16 d, a, b;", lambda a, b: s(a, 16) * s(b, 16), "uint32", *cross(SHORTS, SHORTS)
        ),
        case("mul_wide_u16", "mul.wide.u16 d, a, b;", lambda a, b: a * b, "uint32", *cross(SHORTS, SHORTS)),
        case("mad_lo_s32", "mad.lo.s32 d, a, b, c;", lambda a, b, c: a * b + c, "uint32", *TRIPLES),
        case("mad_hi_u32", "mad.hi.u32 d, a, b, c;", lambda a, b, c: (a * b >> 32) + c, "uint32", *TRIPLES),
        case(
            "mad_wide_s32",
            "mad.wide.s32 d, a, b, c;",
            lambda a, b, c: s(a) * s(b) + c,
            "uint64",
            *cross(WORDS, WORDS, LONGS),
        ),
        case(
            "mad_wide_u16",
            "mad.wide.u16 d, a, b, c;",
            lambda a, b, c: a * b + c,
            "uint32",
            *cross(SHORTS, SHORTS, WORDS),
        ),
        case("div_s32", "div.s32 d, a, b;", lambda a, b: _quotient(s(a), s(b)), "uint32", *cross(WORDS, WORDS[1:])),
        case("div_u32", "div.u32 d, a, b;", lambda a, b: a // b, "uint32", *cross(WORDS, WORDS[1:])),
        case(
            "rem_s32",
            "rem.s32 d, a, b;",
            lambda a, b: s(a) - s(b) * _quotient(s(a), s(b)),
            "uint32",
            *cross(WORDS, WORDS[1:]),
        ),
        case("rem_u64", "rem.u64 d, a, b;", lambda a, b: a % b, "uint64", *cross(LONGS, LONGS[1:])),
        case("min_s32", "min.s32 d, a, b;", lambda a, b: min(s(a), s(b)), "uint32", *PAIRS),
        case("max_u32", "max.u32 d, a, b;", max, "uint32", *PAIRS),
        case("max_s16", "max.s16 d, a, b;", lambda a, b: max(s(a, 16), s(b, 16)), "uint16", *cross(SHORTS, SHORTS)),
        case("abs_s32", "abs.s32 d, a;", lambda a: abs(s(a)), "uint32", WORDS),
        case("neg_s32", "neg.s32 d, a;", lambda a: -a, "uint32", WORDS),
        case("neg_s16", "neg.s16 d, a;", lambda a: -a, "uint16", SHORTS),
        case("and_b32", "and.b32 d, a, 0xFFFF0000U;", lambda a: a & 0xFFFF0000, "uint32", WORDS),
        case("or_b16", "or.b16 d, a, b;", lambda a, b: a | b, "uint16", *cross(SHORTS, SHORTS)),
        case("xor_b64", "xor.b64 d, a, b;", lambda a, b: a ^ b, "uint64", *cross(LONGS, LONGS)),
        case("not_b32", "not.b32 d, a;", lambda a: ~a, "uint32", WORDS),
        case("not_b16", "not.b16 d, a;", lambda a: ~a, "uint16", SHORTS),
        case("clz_b32", "clz.b32 d, a;", lambda a: 32 - a.bit_length(), "uint32", WORDS),
        case("clz_b64", "clz.b64 d, a;", lambda a: 64 - a.bit_length(), "uint32", LONGS),
        case("popc_b64", "popc.b64 d, a;", lambda a: bin(a).count("1"), "uint32", LONGS),
        case("brev_b32", "brev.b32 d, a;", lambda a: int(f"{a:032b}"[::-1], 2), "uint32", WORDS),
        case("bfind_u32", "bfind.u32 d, a;", lambda a: _find_bit(a, False), "uint32", WORDS),
        case("bfind_s32", "bfind.s32 d, a;", lambda a: _find_bit(a, True), "uint32", WORDS),
        case("bfind_amount", "bfind.shiftamt.u32 d, a;", lambda a: 32 - a.bit_length() if a else -1, "uint32", WORDS),
        case(
            "prmt_b32",
            "prmt.b32 d, a, b, c;",
            _permute,
            "uint32",
            *cross(WORDS[4:], WORDS[4:], array("uint32", SELECTORS)),
        ),
        case("dp4a_s32", "dp4a.s32.s32 d, a, b, c;", _dot(True), "uint32", *TRIPLES),
        case("dp4a_u32", "dp4a.u32.u32 d, a, b, c;", _dot(False), "uint32", *TRIPLES),
        case("slct_s32", "slct.b32.s32 d, a, b, c;", lambda a, b, c: a if s(c) >= 0 else b, "uint32", *TRIPLES),
    ]
    for table in (0x00, 0x3C, 0x96, 0xCA, 0xE8, 0xFF, 0x01):
        cases.append(case(f"lop3_{table:02x}", f"lop3.b32 d, a, b, c, {table:#x};", _logic(table), "uint32", *TRIPLES))
    return cases + _shifts() + _fields() + _predicates() + _conversions()


SELECTORS = [0x3210, 0x7654, 0x0123, 0x4140, 0x7531, 0xFEDC, 0x8888, 0xBA98, 0x9F3C, 0x10004321]


def _shifts() -> list[Case]:
    def funnel(left: bool, wrap: bool):
        def function(a: int, b: int, n: int) -> int:
            n = n & 31 if wrap else min(n, 32)
            both = b << 32 | a
            return (both << n >> 32) & MASK if left else (both >> n) & MASK

        return function

    cases = [
        case("shl_b32", "shl.b32 d, a, b;", _shift_left(32), "uint32", *cross(WORDS, AMOUNTS)),
        case("shl_b64", "shl.b64 d, a, b;", _shift_left(64), "uint64", *cross(LONGS, AMOUNTS)),
        case("shl_b16", "shl.b16 d, a, b;", _shift_left(16), "uint16", *cross(SHORTS, AMOUNTS)),
        case("shr_s32", "shr.s32 d, a, b;", _shift_right(32, True), "uint32", *cross(WORDS, AMOUNTS)),
        case("shr_u32", "shr.u32 d, a, b;", _shift_right(32, False), "uint32", *cross(WORDS, AMOUNTS)),
        case("shr_s16", "shr.s16 d, a, b;", _shift_right(16, True), "uint16", *cross(SHORTS, AMOUNTS)),
        case("shr_s64", "shr.s64 d, a, b;", _shift_right(64, True), "uint64", *cross(LONGS, AMOUNTS)),
    ]
    for amount in (0, 3, 31, 32, 40):
        cases.append(case(f"shl_by_{amount}", f"shl.b32 d, a, {amount};", lambda a, n=amount: a << n, "uint32", WORDS))
        cases.append(
            case(f"shr_by_{amount}", f"shr.s32 d, a, {amount};", lambda a, n=amount: signed(a) >> n, "uint32", WORDS)
        )
    for letter, limit in (("l", "wrap"), ("l", "clamp"), ("r", "wrap"), ("r", "clamp")):
        function = funnel(letter == "l", limit == "wrap")
        body = f"shf.{letter}.{limit}.b32 d, a, b, c;"
        cases.append(case(f"shf_{letter}_{limit}", body, function, "uint32", *cross(WORDS[4:], WORDS[4:], AMOUNTS)))
    return cases


def _fields() -> list[Case]:
    return [
        case(
            "bfe_u32",
            "bfe.u32 d, a, b, c;",
            lambda a, p, n: _extract(a, p, n, False),
            "uint32",
            *cross(WORDS, AMOUNTS, AMOUNTS),
        ),
        case(
            "bfe_s32",
            "bfe.s32 d, a, b, c;",
            lambda a, p, n: _extract(a, p, n, True),
            "uint32",
            *cross(WORDS, AMOUNTS, AMOUNTS),
        ),
        case("bfe_byte", "bfe.s32 d, a, 8, 8;", lambda a: signed(a >> 8 & 0xFF, 8), "uint32", WORDS),
        case("bfi_b32", "bfi.b32 d, a, b, 5, 9;", lambda a, b: _insert(a, b, 5, 9), "uint32", *PAIRS),
        case(
            "bfi_edges",
            "bfi.b32 d, a, 0x55555555, b, c;",
            lambda a, p, n: _insert(a, 0x55555555, p, n),
            "uint32",
            *cross(WORDS, AMOUNTS, AMOUNTS),
        ),
    ]


def _predicates() -> list[Case]:
    def chosen(function):
        return lambda *values: int(function(*values))

    one = "selp.b32 d, 1, 0, p;"
    return [
        case(
            "setp_lt_s32", f"setp.lt.s32 p, a, b; {one}", chosen(lambda a, b: signed(a) < signed(b)), "uint32", *PAIRS
        ),
        case("setp_lt_u32", f"setp.lt.u32 p, a, b; {one}", chosen(lambda a, b: a < b), "uint32", *PAIRS),
        case("setp_hs_u32", f"setp.hs.u32 p, a, b; {one}", chosen(lambda a, b: a >= b), "uint32", *PAIRS),
        case("setp_ge_s16", f"setp.ge.s16 p, a, -1; {one}", chosen(lambda a: signed(a, 16) >= -1), "uint32", SHORTS),
        case("setp_eq_b64", f"setp.eq.b64 p, a, b; {one}", chosen(lambda a, b: a == b), "uint32", *cross(LONGS, LONGS)),
        case(
            "setp_and",
            f"setp.gt.s32 q, c, 0; setp.ne.and.s32 p, a, b, q; {one}",
            chosen(lambda a, b, c: a != b and signed(c) > 0),
            "uint32",
            *TRIPLES,
        ),
        case(
            "setp_or_not",
            f"setp.gt.s32 q, c, 0; setp.eq.or.s32 p, a, b, !q; {one}",
            chosen(lambda a, b, c: a == b or not signed(c) > 0),
            "uint32",
            *TRIPLES,
        ),
        case(
            "setp_both",
            "setp.lt.s32 p|q, a, b; selp.b32 t, 1, 0, p; selp.b32 d, 2, 0, q; or.b32 d, d, t;",
            lambda a, b: 1 if signed(a) < signed(b) else 2,
            "uint32",
            *PAIRS,
        ),
        case(
            "guarded",
            "mov.u32 d, 7; setp.lt.u32 p, a, b; @p mov.u32 d, a; @!p add.u32 d, d, b;",
            lambda a, b: a if a < b else 7 + b,
            "uint32",
            *PAIRS,
        ),
        case(
            "predicates",
            f"setp.lt.u32 p, a, b; setp.ne.u32 q, c, 0; xor.pred p, p, q; not.pred p, p; {one}",
            chosen(lambda a, b, c: (a < b) == (c != 0)),
            "uint32",
            *TRIPLES,
        ),
    ]


def _conversions() -> list[Case]:
    s = signed
    pieces = "{ .reg .b16 low, high; mov.b32 {low, high}, a; mov.b32 d, {high, low}; }"
    return [
        case("cvt_s32_s8", "cvt.s32.s8 d, a;", lambda a: s(a & 0xFF, 8), "uint32", SHORTS),
        case("cvt_u32_u8", "cvt.u32.u8 d, a;", lambda a: a & 0xFF, "uint32", WORDS),
        case("cvt_s16_s8", "cvt.s16.s8 d, a;", lambda a: s(a & 0xFF, 8), "uint16", SHORTS),
        case("cvt_s64_s32", "cvt.s64.s32 d, a;", s, "uint64", WORDS),
        case("cvt_u64_u32", "cvt.u64.u32 d, a;", lambda a: a, "uint64", WORDS),
        case("cvt_u16_u32", "cvt.u16.u32 d, a;", lambda a: a, "uint16", WORDS),
        case("cvt_u32_u64", "cvt.u32.u64 d, a;", lambda a: a, "uint32", LONGS),
        case("cvt_s8_s32", "cvt.s8.s32 d, a;", lambda a: s(a & 0xFF, 8), "uint32", WORDS),
        case("cvt_sat_s8", "cvt.sat.s8.s32 d, a;", _clamp(-128, 127), "uint32", WORDS),
        case("cvt_sat_u8", "cvt.sat.u8.s32 d, a;", _clamp(0, 255), "uint32", WORDS),
        case("load_s8", "cvt.s32.s16 d, a;", lambda a: a, "int32", array("int8", range(-128, 128))),
        case("load_u8", "cvt.u32.u16 d, a;", lambda a: a, "uint32", array("uint8", range(256))),
        case("store_u8", "mov.u16 d, a;", lambda a: a, "uint8", SHORTS),
        case("halves", pieces, lambda a: a >> 16 | (a & 0xFFFF) << 16, "uint32", WORDS),
        case("pack_b64", "mov.b64 d, {a, b};", lambda a, b: b << 32 | a, "uint64", *PAIRS),
        case("unpack_b64", "mov.b64 {_, d}, a;", lambda a: a >> 32, "uint32", LONGS),
    ]


CASES = _cases()
