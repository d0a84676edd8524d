"""Where the CUDA kernels can run, and layers there."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from ops.oracle import Layer, make_layer

GPU = torch.cuda.is_available()
PLACES = ["cuda"] if GPU else ["sm_80", "sm_75"]


@dataclass(frozen=True)
class Place:
    """A device and what its kernels run as."""

    device: torch.device
    isa: str

    @property
    def dtypes(self) -> list[torch.dtype]:
        """The dtypes of activations that the kernels take here."""
        return [torch.float16] if self.isa == "sm_75" else [torch.float16, torch.bfloat16]

    @property
    def dtype(self) -> torch.dtype:
        """The one that most tests use."""
        return self.dtypes[-1]

    def layer(self, *sizes: int, dtype: torch.dtype | None = None, **options: object) -> Layer:
        """A layer of ``ops.oracle`` here, of the usual dtype."""
        return make_layer(*sizes, dtype or self.dtype, **options).to(self.device)
