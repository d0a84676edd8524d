"""LoRA, LoCon and DoRA as kohya's trainer and LyCORIS write them.

    delta W = alpha / r * up (mid) down,   down (r, in, *kernel), up (out, r, 1, ...)

With a mid (r, r, *kernel), LyCORIS' Tucker form of a convolution, down is (r, in, 1, ...), and A is the product of the
two: LoRA's own A, exactly.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch

from ...config import AdapterConfig
from ...kohya.reader import FileLayer, FileUnit, Reader, register, wide
from .config import LoraConfig


@register
class LoraReader(Reader):
    """Reads LoRA, its convolutions and DoRA."""

    config_class: ClassVar[type[AdapterConfig]] = LoraConfig
    marks: ClassVar[frozenset[str]] = frozenset({"lora_up.weight", "lora_down.weight", "lora_mid.weight"})
    keys: ClassVar[frozenset[str]] = marks | {"alpha", "scalar", "dora_scale"}
    scaled: ClassVar[tuple[str, ...]] = ("lora_up.weight",)

    @classmethod
    def read(cls, layer: FileLayer) -> FileUnit:
        """See `Reader.read`."""
        layer.need("lora_down.weight", "lora_up.weight")
        r, (N, K), kernel = layer.rows("lora_down.weight"), layer.base.shape(layer.layer), layer.kernel
        if layer.groups > 1:
            raise ValueError(f"a LoRA on a convolution with {layer.groups} groups sees one group here, and all there")
        channels = K // math.prod(kernel)
        if "lora_mid.weight" in layer.tensors:
            down = wide(layer.shaped("lora_down.weight", r, channels))
            A = torch.einsum("oi...,ic->oc...", wide(layer.shaped("lora_mid.weight", r, r, *kernel)), down)
        else:
            A = layer.shaped("lora_down.weight", r, channels, *kernel)
        ones = [1 for _ in kernel]
        tensors = {"lora_A.weight": A, "lora_B.weight": layer.shaped("lora_up.weight", N, r, *ones)}
        dora = layer.tensors.get("dora_scale")
        if dora is not None:
            if dora.shape[:1] != (N,) or dora.numel() != N:
                raise ValueError(
                    f"dora_scale is {tuple(dora.shape)}: DoRA here has the norm of each of the {N} rows, not that of "
                    "columns (wd_on_output=False)"
                )
            tensors["lora_magnitude_vector"] = dora.reshape(1, N, *ones) if kernel else dora.reshape(N)
        return FileUnit(tensors, r, layer.alpha(r), {"use_dora": dora is not None})
