"""Faults for the S pass, csrc/cuda/shrink.cu."""

from emulator.faults import Fault

FAULTS = [
    Fault(
        "no barrier between storing a stage of small and reading it",
        "shrink.cu",
        "piece.store(stage, pass.small.dtype);\n                        __syncthreads();",
        "piece.store(stage, pass.small.dtype);",
    ),
    Fault(
        "one stage of small instead of two",
        "shrink.cu",
        "shared + step / steps_of_stage % 2 * stage_bytes",
        "shared",
        caught_by="thread",
    ),
    Fault(
        "the low part of small left out",
        "shrink.cu",
        "!exact && launch.capability >= 80,  // below",
        "false,  // below",
    ),
    Fault(
        "pairs of depths stored where another lane reads",
        "shrink.cu",
        "threadIdx.x / 32 * (4 * 32) + threadIdx.x % 32;",
        "threadIdx.x / 32 * (4 * 32) + (threadIdx.x % 32 ^ 1);",
    ),
    Fault(
        "the mask of another row",
        "shrink.cu",
        "philox(row + half / 2 * 8, k / 4 + half % 2)",
        "philox(row + half / 2, k / 4 + half % 2)",
    ),
    Fault(
        "x read behind its last row",
        "shrink.cu",
        "row0 + 8 * i + g < pass.M ? pass.K : 0",
        "pass.K",
        caught_by="address",
    ),
    Fault(
        "small read behind its last row",
        "shrink.cu",
        "n < work.pass.rank ? work.pass.K - k : 0",
        "work.pass.K - k",
        caught_by="address",
    ),
    Fault(
        "stored behind the last column of out",
        "shrink.cu",
        "if (row >= pass.M || n >= pass.rank) continue;\n                finite",
        "if (row >= pass.M) continue;\n                finite",
    ),
    Fault(
        "rows of small read 16 bytes wide that are not aligned",
        "shrink.cu",
        "!exact && small.column_stride == 1 && in_chunks(small.data, small.row_stride, 4)",
        "!exact && small.column_stride == 1",
        caught_by="address",
    ),
    Fault(
        "an infinity times two parts left as NaN",
        "shrink.cu",
        "if (finite || !work.two_products) return;",
        "return;",
    ),
    Fault(
        "the last slice of the depth not added",
        "stream.cuh",
        "part < work.count; ++part",
        "part + 1 < work.count; ++part",
    ),
    Fault(
        "quads exchange the wrong half of their ranks",
        "shrink.cu",
        "__shfl_xor_sync(0xffffffffu, upper_half ? low : high, 2)",
        "__shfl_xor_sync(0xffffffffu, upper_half ? high : low, 2)",
        architecture=750,
    ),
]
