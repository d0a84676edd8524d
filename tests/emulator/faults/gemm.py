"""Faults in gemm.cu and its headers."""

from emulator.faults import Fault

FAULTS = [
    # The pipeline.
    Fault(
        "no barrier between a stage's arrival and its use",
        "gemm.cu",
        "            __syncthreads();  // this stage has come",
        "            // this stage has come",
        "thread",
    ),
    Fault("three stages: the wait is one short", "gemm.cu", "copy_async_wait<1>();", "copy_async_wait<2>();"),
    Fault("four stages: the wait is one short", "gemm.cu", "copy_async_wait<2>();", "copy_async_wait<3>();"),
    Fault("copies go to the stage that is read", "gemm.cu", "copy(step + ahead, write);", "copy(step + ahead, read);"),
    Fault(
        "sm_75: no barrier between two stages",
        "gemm.cu",
        "            __syncthreads();\n            unsigned char* stage",
        "            unsigned char* stage",
        "thread",
        750,
    ),
    Fault(
        "sm_75: the next step overwrites this one",
        "gemm.cu",
        "store(shared + (step + 1) % 2 * stage_bytes)",
        "store(stage)",
        "plain",
        750,
    ),
    # The panels.
    Fault("chunks are not exchanged", "gemm_tile.cuh", "16 * (chunk ^ row / (8 / spread) % spread)", "16 * chunk"),
    Fault(
        "a chunk is copied whole past the end of a row",
        "gemm_copy.cuh",
        "max(0, min(columns, chunk_elements))",
        "chunk_elements",
        "address",
    ),
    Fault("rows past the last are copied", "gemm_copy.cuh", "i * apart < rows ?", "true ?", "address"),
    Fault(
        "the right panel's rows are not in fragment order",
        "gemm_copy.cuh",
        "fragment_order ? fragment_column<false>(row) : row",
        "row",
    ),
    # Fragments.
    Fault("int8 to fp16: the bias is one off", "element.cuh", "1024 + 128", "1024 + 127"),
    Fault("int8 to bf16: the sign is lost", "element.cuh", "raw & 0xff80ff80u", "raw & 0xff00ff00u"),
    Fault("int8 along the columns: odd columns are even ones", "gemm_tile.cuh", "0x4341", "0x4240"),
    Fault(
        "the exchange between neighbours goes the wrong way", "gemm_tile.cuh", "odd ? x[e] : y[e]", "odd ? y[e] : x[e]"
    ),
    # What follows the depth loop.
    Fault(
        "the scale of another column", "gemm_epilogue.cuh", "product.column_scale[column]", "product.column_scale[n]"
    ),
    Fault("the mask of the row above", "gemm_epilogue.cuh", "philox(m, n / 4)", "philox(m + 1, n / 4)"),
    Fault(
        "a dropped element is multiplied by 0",
        "gemm_epilogue.cuh",
        "& 1 ? part[e] : 0;",
        "& 1 ? part[e] : 0 * part[e];",
    ),
    Fault(
        "ranks past the last are read", "gemm_epilogue.cuh", "int(rank + s) < product.rank - first", "true", "address"
    ),
    Fault(
        "the low-rank factors overwrite panels that are still read",
        "gemm_epilogue.cuh",
        "            __syncthreads();  // all have read what lies there\n",
        "",
        "thread",
    ),
    Fault("stores past the last column", "gemm_epilogue.cuh", "if (c < columns - column(p)) to[c]", "to[c]", "address"),
    Fault(
        "stores past the last row",
        "gemm_epilogue.cuh",
        "if (row(i, h) < rows && column(p) < columns)",
        "if (column(p) < columns)",
        "address",
    ),
    # The grid.
    Fault(
        "the last group of tiles is taken for whole",
        "gemm.cu",
        "min(tile_group, work.tiles_down - group * tile_group)",
        "tile_group",
    ),
]
