"""LoHa on linear layers: which form serves, and what each keeps. The rest: `test_lycoris.py`."""

from __future__ import annotations

import pytest
import torch
from lycoris_cases import KHATRI_RAO, TILED, among, chosen, kept_beside, small
from torch import nn

import pyadapt
from pyadapt import LoHaConfig
from pyadapt.methods.lycoris import loha_linear


@pytest.fixture
def case(request, monkeypatch):
    return chosen(request, monkeypatch)


@among([KHATRI_RAO, TILED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saved_beside_x_are_r_squared_values_a_row(case, dtype):
    """Khatri-Rao: A, B and the M x r^2 of S; tiled: nothing. No mask, no cast copy, no dW."""
    M, K, N, r = 96, 48, 40, 3
    model = small(case, (N, K), dtype, r=r).train()
    beside = kept_beside(model, torch.randn(M, K).to(dtype).requires_grad_())
    assert beside == (0 if case is TILED else r * r * (M * 4 + (N + K) * dtype.itemsize))


def test_the_route(monkeypatch):
    def planned(r):
        model = nn.Sequential(nn.Linear(256, 512))
        return pyadapt.plan(model, LoHaConfig(r=r, target_modules=["0"])).layers[0].kernel

    assert planned(4).startswith("khatri-rao, ")
    assert planned(24) == "tiled"
    asked = []
    monkeypatch.setattr(loha_linear.TiledHadamard, "apply", lambda *a: asked.append("tiled") or a[0].new_zeros(1))
    # A few rows do not pay for a dW.
    for r, rows in ((4, 512), (24, 512), (24, 8)):
        model = pyadapt.wrap(nn.Sequential(nn.Linear(256, 512)), LoHaConfig(r=r, target_modules=["0"]))
        asked.append(rows)
        model(torch.randn(rows, 256))
    assert asked == [512, 512, "tiled", 8]
