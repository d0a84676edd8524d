"""The Hadamard product of two products (LoHa): as a low-rank term, and as a term that is formed a panel at a time.

    D = (w1a w1b) * (w2a w2b)            y = x W' scale + bias + s x D' diag(f)

Shapes: x (M, K), W (N, K), w1a and w2a (N, r), w1b and w2b (r, K), f (N,) or none, g = dL/dy (M, N).

**Khatri-Rao form.** Exactly, D = B A with

    A[(i, j), k] = w1b[i, k] w2b[j, k]   (r r, K)        B[n, (i, j)] = s f[n] w1a[n, i] w2a[n, j]   (N, r r)

so that a LoHa is a LoRA of rank r^2 (``ops/lora.py``) whose factors are formed at each step. Their gradients:

    dw1b[i] = sum_j dA[i, j] * w2b[j]        dw1a[n, i] = s f[n] sum_j dB[n, (i, j)] w2a[n, j]
    dw2b[j] = sum_i dA[i, j] * w1b[i]        dw2a[n, j] = s f[n] sum_i dB[n, (i, j)] w1a[n, i]

**Tiled form.** What r^2 makes dear, M N K does not: D is formed in panels and multiplied, and is never there whole.
With T = s diag(f) g' x, panel by panel,

    dw1a = (T * w2a w2b) w1b'    dw1b = w1a' (T * w2a w2b)    dw2a = (T * w1a w1b) w2b'    dw2b = w2a' (T * w1a w1b)

Saved for backward: x as it was given and the four factors. Where a product is in fp32 or fp64, a panel holds W + D, and
there is no second one; in 16 bits such a sum would round D away.

(Hyeon-Woo et al., "FedPara: low-rank Hadamard product for communication-efficient federated learning", 2022.)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pyadapt.native import device_kind

from . import kernels, registry, routes
from .linear import FrozenOwner, as_rows, compute_dtype, dense, frozen_dx, frozen_forward, like_rows

Factors = tuple[Tensor, Tensor, Tensor, Tensor]

# Elements of D that exist at a time: four megabytes in fp32 a CPU's core, more on a GPU, whose launches cost.
_PANEL_ELEMENTS, _PANEL_ELEMENTS_CUDA = 1 << 20, 1 << 24


def low_rank_dtype(x: Tensor) -> torch.dtype:
    """What A and B are stored in beside x: the kernels multiply bf16 by bf16; in fp16 a product may overflow."""
    return torch.bfloat16 if x.dtype == torch.bfloat16 else compute_dtype(x)


def _is_native(w1a: Tensor, w1b: Tensor, w2a: Tensor, w2b: Tensor, dtype: torch.dtype) -> bool:
    """Whether the CPU's kernel takes these factors."""
    on_cpu = device_kind(w1a) == "cpu" and routes.native_serves(w1a, dtype)
    return on_cpu and w1a.dtype == w1b.dtype == w2a.dtype == w2b.dtype == torch.float32


def khatri_rao(
    w1a: Tensor, w1b: Tensor, w2a: Tensor, w2b: Tensor, factors: Tensor | None, scaling: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(A, B) in ``dtype``, multiplied in fp32 or wider and rounded once."""
    if _is_native(w1a, w1b, w2a, w2b, dtype):
        return kernels.cpu.khatri_rao(w1a, w1b, w2a, w2b, factors, scaling, dtype)
    (w1a, w1b, w2a, w2b), _ = _widened((w1a, w1b, w2a, w2b), dtype)
    w1a = _scaled(w1a, factors, scaling)
    r1, K = w1b.shape
    r2, N = w2b.shape[0], w1a.shape[0]
    A = torch.mul(w1b[:, None], w2b, out=w1b.new_empty(r1, r2, K, dtype=dtype))
    B = torch.mul(w1a[:, :, None], w2a[:, None], out=w1a.new_empty(N, r1, r2, dtype=dtype))
    return A.view(r1 * r2, K), B.view(N, r1 * r2)


def khatri_rao_backward(
    dA: Tensor,
    dB: Tensor,
    w1a: Tensor,
    w1b: Tensor,
    w2a: Tensor,
    w2b: Tensor,
    factors: Tensor | None,
    scaling: float,
) -> Factors:
    """(dw1a, dw1b, dw2a, dw2b), each in the dtype of its factor."""
    if dA.dtype == dB.dtype and _is_native(w1a, w1b, w2a, w2b, dA.dtype):
        return kernels.cpu.khatri_rao_backward(dA, dB, w1a, w1b, w2a, w2b, factors, scaling)
    dtypes = w1a.dtype, w1b.dtype, w2a.dtype, w2b.dtype
    (w1a, w1b, w2a, w2b), wide = _widened((w1a, w1b, w2a, w2b), dA.dtype)
    (r1, K), r2, N = w1b.shape, w2b.shape[0], w1a.shape[0]
    dA, dB = dA.to(wide).reshape(r1, r2, K), dB.to(wide).reshape(N, r1, r2)
    dB = dB * scaling if factors is None else dB * (factors.to(wide) * scaling)[:, None, None]
    dw1b, dw2b = (dA * w2b).sum(1), (dA * w1b[:, None]).sum(0)
    with torch.autocast(dA.device.type, enabled=False):
        dw1a, dw2a = torch.bmm(dB, w2a[:, :, None])[:, :, 0], torch.bmm(w1a[:, None], dB)[:, 0]
    return dw1a.to(dtypes[0]), dw1b.to(dtypes[1]), dw2a.to(dtypes[2]), dw2b.to(dtypes[3])


def loha_forward(
    x: Tensor,
    weight: Tensor | None,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    w1a: Tensor,
    w1b: Tensor,
    w2a: Tensor,
    w2b: Tensor,
    factors: Tensor | None,
    scaling: float,
    y: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """y in the tiled form; without a weight the term is added to the ``y`` given, which is left as it is."""
    dtype = _product_dtype(x, out_dtype)
    with torch.autocast(x.device.type, enabled=False):
        (w1a, w1b, w2a, w2b), wide = _widened((w1a, w1b, w2a, w2b), dtype)
        w1a = _scaled(w1a, factors, scaling)
        folded = weight if dtype != torch.bfloat16 else None
        if folded is not None:
            y = x.new_zeros((x.shape[0], w1a.shape[0]), dtype=out_dtype)
            y = y if bias is None else y.copy_(bias)
        elif weight is not None:
            y = frozen_forward(x, weight, weight_scale, bias, out_dtype)
        else:
            assert y is not None
            y = y.to(out_dtype, copy=True)
        x = x.to(dtype)
        for n in _panels(w1a, w1a.shape[0], w1b.shape[1]):
            D = (w1a[n] @ w1b).mul_(w2a[n] @ w2b)
            if folded is not None:
                D += dense(folded[n], None if weight_scale is None else weight_scale[n], wide)
            _add_product(y[:, n], x, D.to(dtype).t())
        return y


def loha_backward(
    g: Tensor,
    x: Tensor,
    weight: Tensor | None,
    weight_scale: Tensor | None,
    w1a: Tensor,
    w1b: Tensor,
    w2a: Tensor,
    w2b: Tensor,
    factors: Tensor | None,
    scaling: float,
    need_dx: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dx, dw1a, dw1b, dw2a, dw2b) in the tiled form; dx is empty when it is not asked for, and lacks g W without W."""
    dtypes = w1a.dtype, w1b.dtype, w2a.dtype, w2b.dtype
    dtype = _product_dtype(x, g.dtype)
    with torch.autocast(x.device.type, enabled=False):
        (w1a, w1b, w2a, w2b), wide = _widened((w1a, w1b, w2a, w2b), dtype)
        w1a = _scaled(w1a, factors, scaling)
        folded = weight if need_dx and dtype != torch.bfloat16 else None
        if not need_dx:
            dx = x.new_empty(0)
        elif folded is None and weight is not None:
            dx = frozen_dx(g, weight, weight_scale, x.dtype)
        else:
            dx = x.new_zeros(x.shape)
        dw1a, dw2a, dw1b, dw2b = (torch.zeros_like(w) for w in (w1a, w2a, w1b, w2b))
        g, rows = g.to(dtype), x.to(dtype)
        # Columns of D: each panel then finishes its columns of dx, and nothing is summed in 16 bits.
        for k in _panels(w1a, w1b.shape[1], w1a.shape[0]):
            D1, D2 = w1a @ w1b[:, k], w2a @ w2b[:, k]
            T = (g.t() @ rows[:, k]).to(wide)
            if need_dx:
                D = D1 * D2
                if folded is not None:
                    D += dense(folded[:, k], weight_scale, wide)
                _add_product(dx[:, k], g, D.to(dtype))
            E = D2.mul_(T)
            dw1a.addmm_(E, w1b[:, k].t())
            dw1b[:, k] = w1a.t() @ E
            E = D1.mul_(T)
            dw2a.addmm_(E, w2b[:, k].t())
            dw2b[:, k] = w2a.t() @ E
        # What was multiplied into w1a is multiplied into its gradient.
        dw1a = _scaled(dw1a, factors, scaling)
        return dx, dw1a.to(dtypes[0]), dw1b.to(dtypes[1]), dw2a.to(dtypes[2]), dw2b.to(dtypes[3])


def _widened(weights: Factors, dtype: torch.dtype) -> tuple[Factors, torch.dtype]:
    """The factors in fp32 or wider, and which it is."""
    wide = torch.promote_types(torch.promote_types(weights[0].dtype, dtype), torch.float32)
    if weights[0].dtype == weights[1].dtype == weights[2].dtype == weights[3].dtype == wide:
        return weights, wide
    w1a, w1b, w2a, w2b = weights
    return (w1a.to(wide), w1b.to(wide), w2a.to(wide), w2b.to(wide)), wide


def _scaled(w1a: Tensor, factors: Tensor | None, scaling: float) -> Tensor:
    return w1a * scaling if factors is None else w1a * (factors.to(w1a.dtype) * scaling)[:, None]


def _add_product(out: Tensor, left: Tensor, right: Tensor) -> None:
    """out += left right."""
    if out.dtype == left.dtype:
        out.addmm_(left, right)
    else:
        out += left @ right


def _product_dtype(x: Tensor, out_dtype: torch.dtype) -> torch.dtype:
    """bf16 where x or y is; else fp32 or fp64."""
    return torch.bfloat16 if torch.bfloat16 in (x.dtype, out_dtype) else compute_dtype(x)


def _panels(like: Tensor, length: int, across: int) -> Iterator[slice]:
    """The panels of D along a dimension of ``length``."""
    elements = _PANEL_ELEMENTS_CUDA if like.is_cuda else _PANEL_ELEMENTS
    width = max(64, elements // max(across, 1) // 64 * 64)
    for start in range(0, length, width):
        yield slice(start, start + width)


def _khatri_rao_fake(
    w1a: Tensor, w1b: Tensor, w2a: Tensor, w2b: Tensor, factors: Any, scaling: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    rank = w1b.shape[0] * w2b.shape[0]
    return w1b.new_empty((rank, w1b.shape[1]), dtype=dtype), w1a.new_empty((w1a.shape[0], rank), dtype=dtype)


def _loha_backward_fake(
    g: Tensor, x: Tensor, weight: Any, weight_scale: Any, w1a: Tensor, w1b: Tensor, w2a: Tensor, w2b: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    return x.new_empty(x.shape if rest[-1] else (0,)), *(w.new_empty(w.shape) for w in (w1a, w1b, w2a, w2b))


_FOUR = "Tensor w1a, Tensor w1b, Tensor w2a, Tensor w2b, Tensor? factors"

registry.define(
    f"khatri_rao({_FOUR}, float scaling, ScalarType dtype) -> (Tensor A, Tensor B)", khatri_rao, fake=_khatri_rao_fake
)
registry.define(
    f"khatri_rao_backward(Tensor dA, Tensor dB, {_FOUR}, float scaling) "
    "-> (Tensor dw1a, Tensor dw1b, Tensor dw2a, Tensor dw2b)",
    khatri_rao_backward,
    fake=lambda dA, dB, w1a, w1b, w2a, w2b, *rest: tuple(w.new_empty(w.shape) for w in (w1a, w1b, w2a, w2b)),
)
registry.define(
    f"loha_forward(Tensor x, Tensor? weight, Tensor? weight_scale, Tensor? bias, {_FOUR}, float scaling, Tensor? y, "
    "ScalarType out_dtype) -> Tensor",
    loha_forward,
    fake=lambda x, weight, scale, bias, w1a, *rest: x.new_empty((x.shape[0], w1a.shape[0]), dtype=rest[-1]),
)
registry.define(
    f"loha_backward(Tensor g, Tensor x, Tensor? weight, Tensor? weight_scale, {_FOUR}, float scaling, bool need_dx) "
    "-> (Tensor dx, Tensor dw1a, Tensor dw1b, Tensor dw2a, Tensor dw2b)",
    loha_backward,
    fake=_loha_backward_fake,
)


class KhatriRao(registry.Function):
    """A (r r, K) and B (N, r r) of the Khatri-Rao form, of which the four factors are kept and nothing else."""

    @staticmethod
    def forward(
        ctx: Any,
        w1a: Tensor,
        w1b: Tensor,
        w2a: Tensor,
        w2b: Tensor,
        factors: Tensor | None,
        scaling: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        """(A, B) in ``dtype``, with the scaling in B."""
        ctx.scaling = scaling
        ctx.save_for_backward(w1a, w1b, w2a, w2b, factors)
        form = torch.ops.pyadapt.khatri_rao if registry.watched(w1a, w1b, w2a, w2b) else khatri_rao
        return form(w1a, w1b, w2a, w2b, factors, scaling, dtype)

    @staticmethod
    @registry.first_order
    def backward(ctx: Any, dA: Tensor, dB: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of the four factors."""
        w1a, w1b, w2a, w2b, factors = ctx.saved_tensors
        watched = registry.watched(dA, dB, w1a, w1b, w2a, w2b)
        form = torch.ops.pyadapt.khatri_rao_backward if watched else khatri_rao_backward
        return *form(dA, dB, w1a, w1b, w2a, w2b, factors, ctx.scaling), None, None, None


class TiledHadamard(registry.Function):
    """A frozen linear layer with a LoHa in the tiled form, over any leading dimensions of x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w1a: Tensor,
        w1b: Tensor,
        w2a: Tensor,
        w2b: Tensor,
        factors: Tensor | None,
        y: Tensor | None,
        owner: FrozenOwner,
        scaling: float,
        out_dtype: torch.dtype,
        with_bias: bool = True,
    ) -> Tensor:
        """y (..., N) for x (..., K); where a ``y`` is given, the term is added to it and the owner is not asked."""
        weight, weight_scale, bias = owner.operands() if y is None else (None, None, None)
        if not with_bias:
            bias = None
        ctx.saved = owner if y is None else None, scaling
        ctx.save_for_backward(x, w1a, w1b, w2a, w2b, factors)
        before = None if y is None else as_rows(y)
        four = w1a, w1b, w2a, w2b
        out = torch.ops.pyadapt.loha_forward(
            as_rows(x), weight, weight_scale, bias, *four, factors, scaling, before, out_dtype
        )
        return like_rows(out, x)

    @staticmethod
    @registry.first_order
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of x, the four factors and y."""
        x, *four, factors = ctx.saved_tensors
        owner, scaling = ctx.saved
        weight, weight_scale, _ = (None, None, None) if owner is None else owner.operands()
        need_dx = ctx.needs_input_grad[0]
        dx, *gradients = torch.ops.pyadapt.loha_backward(
            as_rows(g), as_rows(x), weight, weight_scale, *four, factors, scaling, need_dx
        )
        dy = g if ctx.needs_input_grad[6] else None
        return dx.view(x.shape) if need_dx else None, *gradients, None, dy, None, None, None, None
