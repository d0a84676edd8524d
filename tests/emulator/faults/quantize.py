"""Faults for quantize and dequantize."""

from emulator.faults import Fault

FAULTS = [
    Fault(
        "quantize: no barrier before the warps' maxima are read",
        "quantize.cu",
        "    __syncthreads();\n",
        "",
        "thread",
    ),
    Fault(
        "quantize: half of a warp has no say in the maximum",
        "quantize.cu",
        "int step = warp_size / 2; step > 0",
        "int step = warp_size / 4; step > 0",
    ),
    Fault(
        "quantize: a product with the reciprocal",
        "quantize.cu",
        "rintf(value / divisor)",
        "rintf(value * (1.0f / divisor))",
    ),
    Fault(
        "quantize: divided by the 0 of a row of zeros",
        "quantize.cu",
        "scale > 0.0f ? scale : 1.0f",
        "scale",
    ),
    Fault(
        "quantize: an infinity taken for finite",
        "quantize.cu",
        "peak < infinity_bits",
        "peak <= infinity_bits",
    ),
    Fault(
        "quantize: 16-byte reads of rows at other addresses",
        "quantize.cu",
        "rows_aligned(pass.w, pass.w_stride, sizeof(T), 16)",
        "rows_aligned(pass.w, 0, sizeof(T), 16)",
        "address",
    ),
    Fault(
        "columns behind the last are written",
        "quantize.cu",
        "if (i < count) to[i]",
        "to[i]",
    ),
    Fault(
        "dequantize: one scale for all rows of a thread",
        "quantize.cu",
        "pass.scale[row] : 1.0f",
        "pass.scale[first] : 1.0f",
    ),
    Fault(
        "dequantize: without the factor",
        "quantize.cu",
        "* scale[i] * pass.factor",
        "* scale[i]",
    ),
    Fault(
        "dequantize: rows behind the last are written",
        "quantize.cu",
        "if (row >= pass.rows) return;",
        "",
        "address",
    ),
    Fault(
        "dequantize: 16-byte writes to rows at other addresses",
        "quantize.cu",
        "rows_aligned(pass.out, pass.out_stride, sizeof(T), 16)",
        "true",
        "address",
    ),
]
