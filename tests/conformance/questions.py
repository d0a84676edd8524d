"""Inputs for each primitive, and what it must answer by its definition, in numpy and apart from any kernel's code.

An answer is exact, or, for the tensor cores' sums, a value and how far from it a sum may be: SUM_BOUND of the
magnitudes that went into it. The hardware's order of summation and its rounding are not specified; 2^-19 is twice what
17 roundings to fp32 can come to.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

SUM_BOUND = 2.0**-19
LANES = 32
LANE = np.arange(LANES)
G, T = LANE // 4, LANE % 4  # the letters of the PTX ISA's tables

Array = NDArray[np.generic]
Generator = np.random.Generator


@dataclass(frozen=True)
class Question:
    """Operands of one run of a primitive, and its answer: words, or values with a bound."""

    cases: int
    operands: tuple[Array, ...]
    words: NDArray[np.uint32] | None = None
    values: NDArray[np.float64] | None = None
    bound: NDArray[np.float64] | None = None


# --- Interesting numbers ---

SPECIAL = np.array(
    [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 1.1754944e-38, 5.9604645e-08, 6.1035156e-05, 65504.0, 65519.0,
     65520.0, -65536.0, 3.3895314e38, 3.4028235e38, -3.4028235e38, 0.5, 1.5, 2.5, -2.5, 1.0009765625, 8388609.0],
    np.float32,
)  # fmt: skip


def any_floats(random: Generator, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """A third ordinary, a third any bits at all (subnormals, NaN, Inf), a third at the edges of formats."""
    ordinary = random.standard_normal(shape).astype(np.float32)
    bits = random.integers(0, 2**32, shape, np.uint32).view(np.float32)
    edges = random.choice(SPECIAL, shape)
    return np.choose(random.integers(0, 3, shape), [ordinary, bits, edges])


def words_of(x: Array) -> NDArray[np.uint32]:
    """The bits of a 16-bit or fp32 array."""
    unsigned = np.uint16 if x.dtype.itemsize == 2 else np.uint32
    return x.view(unsigned).astype(np.uint32)


def from_bfloat16(words: Array) -> NDArray[np.float32]:
    """The values of bf16 bit patterns."""
    return (np.asarray(words).astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(x: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The bit patterns of values rounded to bf16, by torch."""
    return torch.from_numpy(np.ascontiguousarray(x)).bfloat16().view(torch.int16).numpy().view(np.uint16)


def tf32(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rounded to 10 bits of mantissa, ties away from zero."""
    exact = np.abs(x.astype(np.float64))
    step = 2.0 ** (np.maximum(np.frexp(exact)[1] - 1, -126) - 10)
    return np.copysign(np.where(np.isfinite(x), np.floor(exact / step + 0.5) * step, exact), x).astype(np.float32)


# --- Products ---


def fragments(left: Array, right: Array, sums: Array, depth: int) -> tuple[Array, Array, Array]:
    """Which elements each lane holds, (cases, 32, elements), of left (16, depth), right (depth, 8) and sums (16, 8)."""
    if depth == 16:  # registers of two elements
        rows = np.stack([G, G, G + 8, G + 8, G, G, G + 8, G + 8], 1)
        columns = np.stack([2 * T, 2 * T + 1, 2 * T, 2 * T + 1, 2 * T + 8, 2 * T + 9, 2 * T + 8, 2 * T + 9], 1)
        depths = np.stack([2 * T, 2 * T + 1, 2 * T + 8, 2 * T + 9], 1)
    else:
        rows, columns = np.stack([G, G + 8, G, G + 8], 1), np.stack([T, T, T + 4, T + 4], 1)
        depths = np.stack([T, T + 4], 1)
    down, across = np.stack([G, G, G + 8, G + 8], 1), np.stack([2 * T, 2 * T + 1, 2 * T, 2 * T + 1], 1)
    return left[:, rows, columns], right[:, depths, G[:, None]], sums[:, down, across]


def exact_product(
    left: Array, right: Array, sums: Array, subnormal: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(sums + left right, bound). Factors below ``subnormal`` may count as zero: PTX leaves it open for bf16, tf32."""
    wide = [operand.astype(np.float64) for operand in (left, right, sums)]
    terms = wide[0][:, :, :, None] * wide[1][:, None, :, :]
    values = wide[2] + terms.sum(2)
    small = (np.abs(wide[0]) < subnormal)[:, :, :, None] | (np.abs(wide[1]) < subnormal)[:, None, :, :]
    bound = SUM_BOUND * (np.abs(wide[2]) + np.abs(terms).sum(2)) + np.where(small, np.abs(terms), 0).sum(2)
    return values, bound + (2.0**-120 if subnormal else 0.0)


def product(kind: str) -> Callable[[Generator, int], Question]:
    """Products of ordinary values, of values of every size, and with NaN or Inf in some rows and columns."""
    depth = 8 if kind == "tf32" else 16
    # So that no sum of products leaves fp32: what an overflow gives is not specified.
    largest = {"f16": 15, "bf16": 60, "tf32": 60}[kind]
    smallest = {"f16": -24, "bf16": -133, "tf32": -136}[kind]

    def store(x: NDArray[np.float32]) -> Array:
        return {"f16": lambda: x.astype(np.float16), "bf16": lambda: to_bfloat16(x), "tf32": lambda: tf32(x)}[kind]()

    def operand(random: Generator, shape: tuple[int, ...]) -> NDArray[np.float32]:
        ordinary = random.standard_normal(shape)
        exponents = np.concatenate(
            [random.integers(smallest, largest, shape)[:2], random.integers(smallest, smallest + 12, shape)[2:]]
        )
        x = np.where(np.arange(shape[0])[:, None, None] % 2, ordinary, ordinary.clip(-1, 1) * 2.0**exponents)
        x = x.astype(np.float32)
        for case in range(4, shape[0]):
            x[case, random.integers(shape[1]), random.integers(shape[2])] = random.choice([np.inf, -np.inf, np.nan])
        return x

    def values(stored: Array) -> NDArray[np.float32]:
        return from_bfloat16(stored) if kind == "bf16" else stored.astype(np.float32)

    def question(random: Generator, architecture: int) -> Question:
        cases = 8
        left, right = store(operand(random, (cases, 16, depth))), store(operand(random, (cases, depth, 8)))
        sums = random.standard_normal((cases, 16, 8)).astype(np.float32)
        sums[cases // 2] *= 1e30 if kind != "f16" else 1e6
        subnormal = 0.0 if kind == "f16" or architecture < 80 else 2.0**-126
        exact, bound = exact_product(values(left), values(right), sums, subnormal)
        operands = fragments(left, right, sums, depth)
        held = fragments(left, right, exact, depth)[2], fragments(left, right, bound, depth)[2]
        return Question(cases, operands, values=held[0], bound=held[1])

    return question


# --- Everything else is exact ---


def rounding(random: Generator, architecture: int) -> Question:
    """round_tf32; below compute capability 8.0 there is no tf32, and a value is its own."""
    x = any_floats(random, (64, LANES, 1))
    return Question(64, (x,), words_of(tf32(x) if architecture >= 80 else x))


def matrices(transposed: bool) -> Callable[[Generator, int], Question]:
    """ldmatrix of rows anywhere in 2048 bytes."""

    def question(random: Generator, architecture: int) -> Question:
        cases = 16
        image = random.integers(0, 2**16, (cases, 1024), np.uint16)
        offsets = random.integers(0, 128, (cases, LANES), np.uint32) * 16
        rows = image[np.arange(cases)[:, None, None], offsets[:, :, None] // 2 + np.arange(8)]  # (cases, 32, 8)
        parts = rows.reshape(cases, 4, 8, 8).astype(np.uint32)  # matrix, row, column
        if transposed:
            parts = parts.swapaxes(2, 3)
        words = parts[:, :, G, 2 * T] | parts[:, :, G, 2 * T + 1] << 16
        return Question(cases, (image, offsets), words.swapaxes(1, 2))

    return question


def copies(random: Generator, architecture: int) -> Question:
    """Every count of bytes, 0 to 16, in both groups; a lane reads what its neighbour copied."""
    cases = 17
    source = random.integers(1, 256, (cases, LANES, 2, 16), np.uint8)
    counts = np.stack(
        [(np.arange(cases)[:, None] + LANE) % 17, random.integers(0, 17, (cases, LANES))], 2
    ).astype(np.uint32)  # fmt: skip
    kept = np.where(np.arange(16) < counts[..., None], source, 0).astype(np.uint8)
    return Question(cases, (source, counts), kept[:, LANE ^ 1].reshape(cases, LANES, 32).view(np.uint32))


def exchanges(random: Generator, architecture: int) -> Question:
    """Shuffles by index, xor and down, and a vote."""
    cases = 8
    value = random.integers(0, 2**32, (cases, LANES), np.uint32)
    lane = random.integers(0, LANES, (cases, LANES)).astype(np.uint32)
    out = [np.take_along_axis(value, lane.astype(np.int64), 1)]
    offsets = (16, 8, 4, 2, 1)
    out += [value[:, LANE ^ offset] for offset in offsets]
    out += [value[:, np.where(LANE + offset < LANES, LANE + offset, LANE)] for offset in offsets]
    vote = ((value & 1) << LANE.astype(np.uint32)).sum(1, dtype=np.uint32)
    return Question(cases, (value, lane), np.stack([*out, np.repeat(vote[:, None], LANES, 1)], 2))


def philox(counter: list[Array], key: list[Array]) -> list[Array]:
    """Philox4x32-10 as its authors define it, on arrays of uint64 that hold 32 bits."""
    c, k, word = list(counter), list(key), np.uint64(0xFFFFFFFF)
    for _ in range(10):
        first, second = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        half = np.uint64(32)
        c = [second >> half ^ c[1] ^ k[0], second & word, first >> half ^ c[3] ^ k[1], first & word]
        k = [(k[0] + np.uint64(0x9E3779B9)) & word, (k[1] + np.uint64(0xBB67AE85)) & word]
    return c


def random_numbers(random: Generator, architecture: int) -> Question:
    """The generator for seeds and rows of any size, and thresholds from none to all."""
    cases = 16
    seeds = random.integers(-(2**63), 2**63 - 1, cases)
    seeds[:3] = 0, 1, -1
    rows = random.integers(0, 2**63, (cases, LANES), np.uint64) >> random.integers(0, 63, (cases, LANES), np.uint64)
    rows[0] = 0
    groups = random.integers(0, 2**32, (cases, LANES), np.uint64)
    groups[0] = LANE
    threshold = random.integers(0, 2**32, (cases, LANES), np.uint64)
    threshold[:, 0], threshold[:, 1] = 0, 2**32
    word, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    keys = [
        np.repeat(part[:, None], LANES, 1) for part in (seeds.view(np.uint64) & word, seeds.view(np.uint64) >> half)
    ]
    draws = philox([groups, rows & word, rows >> half, np.zeros_like(rows)], keys)
    kept = sum((draw >= threshold).astype(np.uint64) << np.uint64(i) for i, draw in enumerate(draws))
    asked = np.stack([rows & word, rows >> half, groups, threshold & word, threshold >> half], 2).astype(np.uint32)
    return Question(cases, (seeds, asked), np.stack([*draws, *draws, kept], 2).astype(np.uint32))


def conversions(random: Generator, architecture: int) -> Question:
    """Between fp32 and the 16-bit types, and two of those in a word."""
    cases = 64
    x = any_floats(random, (cases, LANES))
    pair = random.integers(0, 2**32, (cases, LANES), np.uint32)
    low, high = (pair & 0xFFFF).astype(np.uint16), (pair >> 16).astype(np.uint16)
    half = x.astype(np.float16)
    halves = [words_of(part.view(np.float16).astype(np.float32)) for part in (low, high)]
    bfloats = [words_of(from_bfloat16(part)) for part in (low, high)]
    both = np.full_like(pair, 0x3C00 | 0xC000 << 16)
    return Question(cases, (x, pair), np.stack([words_of(half), words_of(to_bfloat16(x)), *halves, *bfloats, both], 2))


def arithmetic(random: Generator, architecture: int) -> Question:
    """Built-in functions of fp32 and of words."""
    cases = 32
    x = any_floats(random, (cases, LANES, 3))
    # No kernel sees a signalling NaN here (a conversion has made it a quiet one), and a host's fmaxf minds them.
    x = np.where(np.isnan(x), np.float32(np.nan), x)
    # Which zero the smaller of two zeros is, is not specified.
    x[..., 1] = np.where((x[..., 0] == 0) & (x[..., 1] == 0), 1, x[..., 1])
    n = random.integers(0, 2**32, (cases, LANES, 3), np.uint32)
    fused = ctypes.CDLL(None).fmaf
    fused.argtypes, fused.restype = [ctypes.c_float] * 3, ctypes.c_float
    out = [
        np.array([fused(*map(float, row)) for row in x.reshape(-1, 3)], np.float32).reshape(cases, LANES),
        np.fmin(x[..., 0], x[..., 1]),
        np.fmax(x[..., 0], x[..., 1]),
        np.rint(x[..., 0]),
        np.abs(x[..., 0]),
        x[..., 0] / x[..., 1],
    ]
    high = (n[..., 0].astype(np.uint64) * n[..., 1] >> np.uint64(32)).astype(np.uint32)
    eight = n[..., :2].copy().view(np.uint8)  # the bytes of n[0], then those of n[1]
    permuted = np.zeros((cases, LANES), np.uint32)
    for i in range(4):
        selector = n[..., 2] >> np.uint32(4 * i) & 15
        byte = np.take_along_axis(eight, (selector & 7)[..., None].astype(np.int64), 2)[..., 0].astype(np.uint32)
        permuted |= np.where(selector & 8, np.where(byte & 128, 255, 0), byte).astype(np.uint32) << np.uint32(8 * i)
    return Question(cases, (x, n), np.stack([*map(words_of, out), high, permuted], 2))


QUESTIONS: dict[str, Callable[[Generator, int], Question]] = {
    "product_f16": product("f16"),
    "product_bf16": product("bf16"),
    "product_tf32": product("tf32"),
    "rounding": rounding,
    "matrices": matrices(False),
    "matrices_transposed": matrices(True),
    "copies": copies,
    "exchanges": exchanges,
    "random_numbers": random_numbers,
    "conversions": conversions,
    "arithmetic": arithmetic,
}


def ask(name: str, architecture: int, seed: int = 0) -> Question:
    """The question for an architecture such as 80; the same each time."""
    # NaN and overflow are among the inputs, and numpy warns of both.
    with np.errstate(all="ignore"):
        return QUESTIONS[name](np.random.default_rng([seed, list(QUESTIONS).index(name)]), architecture)


# The words of an answer that are floating-point numbers, whose NaN may be any NaN: by their place.
FLOAT_WORDS = {"rounding": (0,), "conversions": (2, 3, 4, 5), "arithmetic": (0, 1, 2, 3, 4, 5)}
F16_WORDS, BF16_WORDS = {"conversions": (0,)}, {"conversions": (1,)}


def one_nan(name: str, words: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """The same answer with every NaN the same NaN."""
    words = words.copy()
    kinds = ((FLOAT_WORDS, 0x7F800000, 0x7FFFFFFF), (F16_WORDS, 0x7C00, 0x7FFF), (BF16_WORDS, 0x7F80, 0x7FFF))
    for table, infinity, magnitude in kinds:
        for place in table.get(name, ()):
            column = words[..., place]
            column[(column & magnitude) > infinity] = magnitude
    return words
