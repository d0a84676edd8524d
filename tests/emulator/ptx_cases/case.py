"""A few PTX instructions with the values that they get and the values that they must give, as one kernel."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from emulator import control

HEADER = ".version 9.0\n.target sm_80\n.address_size 64\n"

# How a numpy type lies in memory and in registers: the type of its register, and of the load and store.
_PTX_TYPES = {
    "int8": ("b16", "s8"),
    "uint8": ("b16", "u8"),
    "int16": ("b16", "b16"),
    "uint16": ("b16", "b16"),
    "int32": ("b32", "b32"),
    "uint32": ("b32", "b32"),
    "int64": ("b64", "b64"),
    "uint64": ("b64", "b64"),
    "float32": ("f32", "f32"),
}


@dataclass(frozen=True)
class Case:
    """`body` computes d from a, b and c, for every element of the inputs; p, q, t, h, w and f are there for its use."""

    name: str
    body: str
    inputs: tuple[np.ndarray, ...]
    expected: np.ndarray

    @property
    def kernel(self) -> str:
        """The kernel's PTX."""
        operands = dict(zip("dabc", (self.expected, *self.inputs), strict=False))
        lines = [f".visible .entry {self.name}({', '.join(f'.param .u64 {self.name}_{o}' for o in operands)})", "{"]
        lines += [".reg .pred p, q;", ".reg .b32 t, u, %i<4>;", ".reg .b64 w, %w<3>;", ".reg .b16 h;", ".reg .f32 f;"]
        lines += [f".reg .{_PTX_TYPES[array.dtype.name][0]} {o};" for o, array in operands.items()]
        lines += ["mov.u32 %i0, %ctaid.x;", "mov.u32 %i1, %ntid.x;", "mov.u32 %i2, %tid.x;"]
        lines += ["mad.lo.s32 %i3, %i0, %i1, %i2;"]
        for o, array in operands.items():
            lines += [f"ld.param.u64 %w0, [{self.name}_{o}];", f"mul.wide.u32 %w1, %i3, {array.itemsize};"]
            lines += [f"add.s64 %w{2 if o == 'd' else 0}, %w0, %w1;"]
            if o != "d":
                lines += [f"ld.global.{_PTX_TYPES[array.dtype.name][1]} {o}, [%w0];"]
        lines += [self.body, f"st.global.{_PTX_TYPES[self.expected.dtype.name][1]} [%w2], d;", "ret;", "}"]
        return "\n".join(lines)

    def run(self, library: Path) -> np.ndarray:
        """What the translated kernel gives."""
        threads = 32
        blocks = -(-self.expected.size // threads)
        arrays = []
        for array in self.inputs:
            arrays.append(np.resize(array, blocks * threads))
        out = np.zeros(blocks * threads, self.expected.dtype)
        arguments = [ctypes.c_uint64(array.ctypes.data) for array in (out, *arrays)]
        error = control.launch(library, self.name, arguments, block=(threads, 1, 1), grid=(blocks, 1, 1))
        assert error == 0, control.last_failure(library)
        return out[: self.expected.size]


def case(name: str, body: str, function: Callable[..., Any], output: str, *inputs: np.ndarray) -> Case:
    """A case over elements given in parallel; `function` takes and gives Python numbers, or numpy's for floats."""
    kind = np.dtype(output)
    values = [function(*items) for items in zip(*(array.tolist() for array in inputs), strict=True)]
    if kind.kind in "iu":
        expected = array(output, values)
    else:
        with np.errstate(all="ignore"):
            expected = np.array(values, np.float64).astype(kind)
    return Case(name, body, inputs, expected)


def cross(*columns: np.ndarray) -> list[np.ndarray]:
    """Every combination of the elements of these arrays, as arrays in parallel."""
    rows = list(itertools.product(*(column.tolist() for column in columns)))
    return [np.array([row[i] for row in rows], column.dtype) for i, column in enumerate(columns)]


def array(kind: str, values: Sequence[int | float]) -> np.ndarray:
    """Values of a numpy type; integers wrap."""
    if np.dtype(kind).kind in "iu":
        bits = 8 * np.dtype(kind).itemsize
        return np.array([int(v) % (1 << bits) for v in values], f"uint{bits}").view(kind)
    return np.array(values, kind)


def signed(value: int, bits: int = 32) -> int:
    """An unsigned number's bits as a signed one."""
    return value - (1 << bits) if value >> (bits - 1) & 1 else value


# --- rounding, from its definition ---


def exponent_of(x: Fraction) -> int:
    """The e with 2**e <= |x| < 2**(e + 1)."""
    exponent = abs(x.numerator).bit_length() - x.denominator.bit_length()
    return exponent if abs(x) >= Fraction(2) ** exponent else exponent - 1


@dataclass(frozen=True)
class Format:
    """A binary floating format: bits of its significand with the leading one, and its least exponent."""

    precision: int
    least: int
    greatest: int
    bits: int

    def nearest(self, x: Fraction) -> float:
        """x to nearest, ties to even, infinite where that is too large."""
        return self._rounded(x, round)

    def toward_zero(self, x: Fraction) -> float:
        """x towards zero; the greatest number where it is larger."""
        limit = Fraction(2) ** (self.greatest + 1) - Fraction(2) ** (self.greatest + 1 - self.precision)
        return self._rounded(max(-limit, min(limit, x)), lambda v: int(v))

    def _rounded(self, x: Fraction, to_integer: Callable[[Fraction], int]) -> float:
        if x == 0:
            return 0.0
        exponent = max(self.least, exponent_of(x))
        unit = Fraction(2) ** (exponent - self.precision + 1)
        result = to_integer(x / unit) * unit
        if abs(result) >= Fraction(2) ** (self.greatest + 1):
            return float("inf") if x > 0 else float("-inf")
        return float(result)

    def encode(self, value: float) -> int:
        """The bits of a value that the format has; 0x7fff for NaN."""
        if value != value:
            return 0x7FFF
        if self is HALF:
            return int(np.float64(value).astype(np.float16).view(np.uint16))
        return int(np.float32(value).view(np.uint32)) >> 16

    def decode(self, bits: int) -> float:
        """The value of 16 bits."""
        if self is HALF:
            return float(np.uint16(bits).view(np.float16))
        return float(np.uint32(bits << 16).view(np.float32))


HALF = Format(11, -14, 15, 16)
BFLOAT = Format(8, -126, 127, 16)
SINGLE = Format(24, -126, 127, 32)


def rounded(format: Format, function: Callable[..., Fraction], *values: float) -> float:
    """An exact function of finite values, rounded once; of others, what IEEE arithmetic gives."""
    if all(np.isfinite(values)):
        exact = function(*(Fraction(v) for v in values))
        if exact == 0:
            return float(function(*(np.float64(v) for v in values)))  # for the sign of zero
        return format.nearest(exact) or float(np.copysign(0.0, float(exact > 0) - 0.5))
    with np.errstate(all="ignore"):
        return float(function(*(np.float64(v) for v in values)))
