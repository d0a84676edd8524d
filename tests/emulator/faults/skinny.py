"""Faults for the forward of few rows, csrc/cuda/skinny.cu."""

from emulator.faults import Fault

FAULTS = [
    Fault(
        "x used before its copy has come",
        "skinny.cu",
        "copy_async_wait<0>();\n                        __syncthreads();",
        "__syncthreads();",
    ),
    Fault(
        "no barrier between stages of x",
        "skinny.cu",
        "__syncthreads();  // this stage has come, and all are done with the one before",
        "",
    ),
    Fault(
        "one stage of x instead of two",
        "skinny.cu",
        "copy_stage<T, Shape>(shared + stage % 2 * stage_bytes,",
        "copy_stage<T, Shape>(shared,",
    ),
    Fault(
        "no barrier between the turns of the warps",
        "skinny.cu",
        "            __syncthreads();\n            if (turn != warp_deep) continue;",
        "            if (turn != warp_deep) continue;",
        caught_by="thread",
    ),
    Fault(
        "operands of the low-rank term replaced while others read them",
        "skinny.cu",
        "                __syncthreads();\n                fetch_ranks(first);",
        "                fetch_ranks(first);",
        caught_by="thread",
    ),
    Fault(
        "bytes widened in the wrong order",
        "skinny.cu",
        "a[i][2] = widen<T>(second, 0x4140)",
        "a[i][2] = widen<T>(second, 0x4342)",
    ),
    Fault(
        "W read behind its last row",
        "skinny.cu",
        "min(n0 + warp_down * warp_rows + 8 * i + g, product.N - 1)",
        "(n0 + warp_down * warp_rows + 8 * i + g)",
        caught_by="address",
    ),
    Fault(
        "rows read behind their end",
        "stream.cuh",
        "if (aligned && K - k >= count)",
        "if (aligned)",
        caught_by="address",
    ),
    Fault(
        "rows read 16 bytes wide that are not aligned",
        "stream.cuh",
        "% 16 == 0 && row_stride * element_bytes % 16 == 0",
        "% 16 == 0",
        caught_by="address",
    ),
    Fault(
        "the scale of a row of the tile",
        "skinny.cu",
        "product.alpha * product.column_scale[n]",
        "product.alpha * product.column_scale[row]",
    ),
    Fault(
        "the bias added by every slice",
        "skinny.cu",
        "product.bias && leads() ?",
        "product.bias ?",
    ),
    Fault(
        "stored behind the last column of out",
        "skinny.cu",
        "if (n0 + i % Shape::rows < work.product.N) body",
        "body",
        caught_by="address",
    ),
    Fault(
        "ranks of the last step read behind the last one",
        "skinny.cu",
        "if (first + q >= product.rank) {",
        "if (first >= product.rank) {",
        caught_by="address",
    ),
]
