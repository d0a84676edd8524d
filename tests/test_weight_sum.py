"""W + L R that is hardly ever formed: whatever is done with it gives what the sum itself gives."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from models import assert_near

from pyadapt.methods.lora.weight_sum import WeightSum

# Names of what is done with W + L R of shape (4, 8, 12), given x (4, 5, 8).
USES = {
    "matmul": lambda x, w: x @ w,
    "bmm": lambda x, w: torch.bmm(x, w),
    "bmm from the left": lambda x, w: torch.bmm(w.transpose(1, 2), x.mT),
    "linear": lambda x, w: F.linear(x[0], w.transpose(-2, -1)[2]),
    "linear with bias": lambda x, w: F.linear(x[0], w.transpose(-2, -1)[torch.tensor(1)], torch.ones(12)),
    "linear by keyword": lambda x, w: F.linear(input=x[0], weight=w[2].T),
    "some experts": lambda x, w: torch.bmm(x[:3], w[torch.tensor([3, 0, 3])]),
    "experts by a mask": lambda x, w: x[:2] @ w[torch.tensor([True, False, False, True])],
    "slice": lambda x, w: x[1:3] @ w[1:3],
    "vector": lambda x, w: w[0].transpose(0, 1) @ x[0, 0],
    "grouped_mm": lambda x, w: F.grouped_mm(x[0], w, offs=torch.tensor([2, 2, 3, 5], dtype=torch.int32)),
    "einsum": lambda x, w: torch.einsum("eni,eti->etn", w.mT, x),
    "other dimensions": lambda x, w: w.transpose(0, 1)[2],
    "index of two": lambda x, w: w[1, 2] + w[..., 0, :].sum(0),
    "operators": lambda x, w: -w * 2 + 3 * w / (1 + w * w),
    "list": lambda x, w: torch.cat([w, w]) + torch.stack(list(w) * 2),
    "sizes": lambda x, w: torch.tensor([*w.shape, w.size(1), w.dim(), len(w), w.dtype == torch.float32]),
}


@pytest.mark.parametrize("adapters", [1, 2])
@pytest.mark.parametrize("use", USES)
def test_what_is_read_behaves_as_the_sum(use, adapters):
    if use == "grouped_mm" and not hasattr(F, "grouped_mm"):
        pytest.skip("torch has grouped_mm from 2.10 on")
    weight = exact = torch.randn(4, 8, 12)
    for _ in range(adapters):
        left, right = torch.randn(4, 8, 3), torch.randn(4, 3, 12)
        weight, exact = WeightSum(weight, left, right), exact + left @ right
    x = torch.randn(4, 5, 8)
    value, wanted = USES[use](x, weight), USES[use](x, exact)
    assert type(value) is torch.Tensor
    assert_near(value, wanted, "product", torch.float32)


def test_products_do_not_form_the_sum(monkeypatch):
    monkeypatch.setattr(WeightSum, "dense", lambda self: pytest.fail("formed"))
    weight = WeightSum(torch.randn(4, 8, 12), torch.randn(4, 8, 3), torch.randn(4, 3, 12))
    for use in [*list(USES)[:5], "some experts", "experts by a mask", "slice", "vector", "grouped_mm"]:
        USES[use](torch.randn(4, 5, 8), weight)
