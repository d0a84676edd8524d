"""LoHa as LyCORIS writes it: the keys, shapes and letters are those of PEFT, which took them over."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from torch import Tensor

from ...config import AdapterConfig
from ...kohya.reader import FileLayer, FileUnit, Reader, register
from .loha import LoHaConfig

_FACTORS = frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"})
_KERNELS = frozenset({"hada_t1", "hada_t2"})


@register
class LoHaReader(Reader):
    """Reads LoHa; convolutions taken apart (LyCORIS' Tucker form) are `use_effective_conv2d` here."""

    config_class: ClassVar[type[AdapterConfig]] = LoHaConfig
    marks: ClassVar[frozenset[str]] = _FACTORS | _KERNELS
    keys: ClassVar[frozenset[str]] = marks | {"alpha", "scalar", "dora_scale"}
    scaled: ClassVar[tuple[str, ...]] = ("hada_w1_a",)

    @classmethod
    def read(cls, layer: FileLayer) -> FileUnit:
        """See `Reader.read`."""
        layer.refuse("dora_scale", "the norm of DoRA, which LoHa here has not")
        r, (N, K), kernel = layer.rows("hada_w1_b"), layer.base.shape(layer.layer), layer.kernel
        options: dict[str, Any] = {}
        if _KERNELS & layer.tensors.keys():
            channels = K // math.prod(kernel)
            tensors: dict[str, Tensor] = {
                **{key: layer.shaped(key, r, N) for key in ("hada_w1_a", "hada_w2_a")},
                **{key: layer.shaped(key, r, channels) for key in ("hada_w1_b", "hada_w2_b")},
                **{key: layer.kernel_factor(key, r) for key in ("hada_t1", "hada_t2")},
            }
        else:
            tensors = {
                **{key: layer.shaped(key, N, r) for key in ("hada_w1_a", "hada_w2_a")},
                **{key: layer.shaped(key, r, K) for key in ("hada_w1_b", "hada_w2_b")},
            }
        if math.prod(kernel) > 1:
            options["use_effective_conv2d"] = "hada_t1" in tensors
        return FileUnit(tensors, r, layer.alpha(r), options)
