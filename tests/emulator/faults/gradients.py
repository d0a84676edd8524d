"""Faults for the g pass, the dA pass and the sum that they share."""

from emulator.faults import Fault

FAULTS = [
    # The sum of both passes.
    Fault(
        "wait one tile short",
        "transposed_product.cuh",
        "copy_async_wait<stages - 2>()",
        "copy_async_wait<stages - 1>()",
    ),
    Fault(
        "no padding of the tiles",
        "transposed_product.cuh",
        "tile_stride = columns + group_size;",
        "tile_stride = columns;",
    ),
    Fault(
        "rows behind the last are copied",
        "transposed_product.cuh",
        "row < place.row_end ? own_count : 0;",
        "own_count;",
        "address",
    ),
    Fault(
        "ranks behind the last are read",
        "transposed_product.cuh",
        "row < place.row_end && j < rank ?",
        "row < place.row_end ?",
        "address",
    ),
    Fault(
        "one buffer for small instead of two",
        "transposed_product.cuh",
        "(tile % 2 * 2 + half)",
        "half",
        "thread",
    ),
    Fault(
        "small multiplied by the wrong rows",
        "transposed_product.cuh",
        "step * 8 + 2 * t + i / 2",
        "step * 8 + t + i / 2 * 4",
    ),
    Fault(
        "a half that is 0 meets an infinity",
        "transposed_product.cuh",
        "value == high ? value * 0x1p-30f : value - high",
        "value - high",
    ),
    Fault(
        "the last partial sum is left out",
        "gradients.cu",
        "chunk < sum.chunks; ++chunk",
        "chunk < sum.chunks - 1; ++chunk",
    ),
    Fault(
        "scaled in both stages",
        "gradients.cu",
        "DType::f32, 1.0f, sum.count}",
        "DType::f32, sum.alpha, sum.count}",
    ),
    Fault(
        "workspace one chunk short",
        "transposed_product.cuh",
        "chunks * count * sizeof(float) : 0",
        "(chunks - 1) * count * sizeof(float) : 0",
        "address",
    ),
    # The g pass.
    Fault(
        "g pass: no barrier before a tile is used",
        "gradients.cu",
        "__syncthreads();\n            walk.load_ahead(tile);\n            if (tile > 0)",
        "walk.load_ahead(tile);\n            if (tile > 0)",
        "thread",
    ),
    Fault(
        "g pass: no barrier before the last products are added",
        "gradients.cu",
        "__syncthreads();\n        if (walk.tiles > 0)",
        "if (walk.tiles > 0)",
        "thread",
    ),
    Fault(
        "g pass: one buffer for the products instead of two",
        "gradients.cu",
        "products + tile % 2 * warps * product_elements<ranks>",
        "products + tile * 0",
        "thread",
    ),
    Fault(
        "g pass: no barrier behind the factors of the columns",
        "gradients.cu",
        "            }\n            __syncthreads();\n",
        "            }\n",
        "thread",
    ),
    Fault(
        "g pass: the low half of B is not multiplied",
        "gradients.cu",
        "half == 1 && !B.split",
        "half == 1",
    ),
    Fault(
        "g pass: ldmatrix with rows and columns of its matrices exchanged",
        "gradients.cu",
        "lane % 16 * Shape<ranks>::tile_stride + pair * 16 + lane / 16 * 8",
        "(lane % 8 + lane / 16 * 8) * Shape<ranks>::tile_stride + pair * 16 + lane / 8 % 2 * 8",
    ),
    Fault(
        "g pass: dS in the wrong rows",
        "gradients.cu",
        "lane / 4 + element / 2 * 8",
        "lane / 4 * 2 + element / 2",
    ),
    Fault(
        "g pass: scaled_g written below its last row",
        "gradients.cu",
        "if (row >= place.row_end) return;",
        "",
        "address",
    ),
    # The dA pass.
    Fault(
        "dA pass: no barrier before a tile is used",
        "gradients.cu",
        "__syncthreads();\n            walk.load_ahead(tile);\n            walk.add_tile(tile);",
        "walk.load_ahead(tile);\n            walk.add_tile(tile);",
        "thread",
    ),
    Fault(
        "dA pass: drops before the tile has come",
        "gradients.cu",
        "walk.wait();\n            if (drops)",
        "if (drops)",
    ),
    Fault(
        "dA pass: one draw for two groups",
        "gradients.cu",
        "philox(row, column / 4 + 1)",
        "philox(row, column / 4)",
    ),
    Fault(
        "dA pass: draws of the wrong elements",
        "gradients.cu",
        "i % 2 ? draw.z : draw.x",
        "i % 2 ? draw.y : draw.x",
    ),
    Fault(
        "dA pass: not scaled by dropout",
        "gradients.cu",
        "pass.dropout.scale, pass.dA",
        "1.0f, pass.dA",
    ),
]
