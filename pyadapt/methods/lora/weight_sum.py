"""What a module reads in place of a parameter W that has adapters: W + L R, which is hardly ever formed.

    x (W + L R)  = x W  + (x L) R           matmul, bmm, grouped_mm
    x (W + L R)' = x W' + (x R') L'         linear

so a product costs what it costs the frozen module and two thin ones, and nothing of the size of W is made or kept for
backward. Indexing chooses experts, of W as of L and R. All else is done with the sum itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Functions f(x, W, ...) that multiply by W as it is stored; by name, for torch and transformers each have several.
_GROUPED = ("grouped_mm", "_grouped_mm", "grouped_mm_fallback")
_PRODUCTS = ("matmul", "__matmul__", "mm", "bmm", *_GROUPED)

# What can be asked of W alone, since the sum has the same.
_SAME_AS_WEIGHT = frozenset(
    {"dtype", "device", "shape", "ndim", "dim", "size", "numel", "is_floating_point", "is_meta"}
)

# torch's grouped_mm takes rows whose length in bytes is a multiple of this.
_ALIGNMENT = 16


class WeightSum:
    """W + L R, to torch's functions a tensor.

    Attributes:
        weight: W, (n, k) or (E, n, k); another `WeightSum` where several adapters are at work.
        left: L, (n, r) or (E, n, r), in the dtype of W.
        right: R, (r, k) or (E, r, k), in the dtype of W.
    """

    weight: Any
    left: Tensor
    right: Tensor

    def __init__(self, weight: Any, left: Tensor, right: Tensor) -> None:
        self.weight, self.left, self.right = weight, left, right
        self._experts: tuple[tuple[Tensor, ...], tuple[Tensor, ...]] | None = None

    def dense(self) -> Tensor:
        """The sum as one tensor; backward keeps L and R alone."""
        weight = self.weight.dense() if isinstance(self.weight, WeightSum) else self.weight
        add = torch.baddbmm if weight.dim() == 3 else torch.addmm
        # The dtype of a parameter is not autocast's to change.
        with torch.autocast(weight.device.type, enabled=False):
            return add(weight, self.left, self.right)

    def __getitem__(self, index: Any) -> Any:
        """The sums of one expert or several; any other index is taken of the sum itself."""
        if self.ndim != 3 or not isinstance(index, (int, slice, Tensor)):
            return self.dense()[index]
        if isinstance(index, Tensor) and index.dim() == 0 and index.dtype != torch.bool:
            # Read once: each of the three indexings would wait for the device.
            index = int(index)
        if not isinstance(index, int):
            return WeightSum(self.weight[index], self.left[index], self.right[index])
        if self._experts is None:
            # One stack in backward, not a tensor of zeros as large as all experts for each of them.
            self._experts = self.left.unbind(), self.right.unbind()
        left, right = self._experts
        return WeightSum(self.weight[index], left[index], right[index])

    def transpose(self, first: int, second: int) -> Any:
        """As `Tensor.transpose`."""
        if {first % self.ndim, second % self.ndim} != {self.ndim - 2, self.ndim - 1}:
            return self.dense().transpose(first, second)
        swapped = (tensor.transpose(-2, -1) for tensor in (self.weight, self.right, self.left))
        return WeightSum(*swapped)

    def __matmul__(self, other: Any) -> Tensor:
        return torch.matmul(self, other)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        """All else that a tensor has."""
        return getattr(self.weight if name in _SAME_AS_WEIGHT else self.dense(), name)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """See https://docs.pytorch.org/docs/stable/notes/extending.html."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if len(args) >= 2 and isinstance(args[0], cls) != isinstance(args[1], cls):
            x, w, *rest = args
            if name == "linear" and isinstance(w, cls):
                y = func(x, w.weight, *rest, **kwargs)
                return y + F.linear(F.linear(x, w.right), w.left)
            if name in _PRODUCTS and isinstance(w, cls):
                left, right = w.aligned() if name in _GROUPED else (w.left, w.right)
                y = func(x, w.weight, *rest, **kwargs)
                return y + func(func(x, left, *rest, **kwargs), right, *rest, **kwargs)
            if name in _PRODUCTS and not rest and not kwargs:
                w, x = args
                return func(w.weight, x) + func(w.left, func(w.right, x))
        return func(*_formed(args), **_formed(kwargs))

    def aligned(self) -> tuple[Tensor, Tensor]:
        """L and R with zeros up to a rank that grouped_mm takes."""
        missing = -self.left.shape[-1] % (_ALIGNMENT // self.left.element_size())
        if missing == 0:
            return self.left, self.right
        # The rank is the contiguous dimension of both, so that no other needs to be aligned for their sake.
        return F.pad(self.left, (0, missing)), F.pad(self.right.transpose(-2, -1), (0, missing)).transpose(-2, -1)


def _formed(value: Any) -> Any:
    """`value` with each sum in it formed."""
    if isinstance(value, WeightSum):
        return value.dense()
    if isinstance(value, (tuple, list)):
        return type(value)(_formed(item) for item in value)
    if isinstance(value, dict):
        return {key: _formed(item) for key, item in value.items()}
    return value


def _formed_first(name: str) -> Callable[..., Any]:
    def operate(self: WeightSum, *args: Any) -> Any:
        return getattr(self.dense(), name)(*_formed(args))

    operate.__name__ = name
    return operate


# Python looks operators up on the class, past `__getattr__`.
for _name in ("add", "sub", "mul", "truediv", "radd", "rsub", "rmul", "neg", "abs", "pow", "len", "iter"):
    setattr(WeightSum, f"__{_name}__", _formed_first(f"__{_name}__"))
