"""The dropout generator: published vectors, the same bits in C++ and torch, the right rate."""

from __future__ import annotations

import pytest
import torch

from pyadapt.ops.kernels import cpu as kernels
from pyadapt.ops.philox import dropout, keep_mask, philox4x32

# Philox4x32-10 of Random123's kat_vectors: counter, key, result.
KNOWN_ANSWERS = [
    (
        (0x00000000, 0x00000000, 0x00000000, 0x00000000),
        (0x00000000, 0x00000000),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS)
def test_known_answers(counter, key, result):
    lanes = philox4x32(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert tuple(int(lane) for lane in lanes) == result


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 0x0123456789ABCDEF])
@pytest.mark.parametrize("p", [1e-9, 0.05, 0.5, 0.999])
def test_native_bits_are_those_of_torch(isa, seed, p):
    """With x of ones and A the identity, S is the mask times 1 / (1 - p)."""
    K, M = 83, 9
    seed = torch.tensor([seed])
    S = kernels.shrink(torch.ones(M, K), torch.eye(K), p, seed)
    assert torch.equal(S != 0, keep_mask(seed, p, M, K))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_rate(p):
    keep = keep_mask(torch.tensor([5]), p, 400, 1003).double()
    sigma = (p * (1 - p) / keep.numel()) ** 0.5
    assert abs(keep.mean().item() - (1 - p)) < 4 * sigma
    # No structure along either axis.
    assert (keep.mean(0) - (1 - p)).abs().max() < 6 * (p * (1 - p) / 400) ** 0.5
    assert (keep.mean(1) - (1 - p)).abs().max() < 6 * (p * (1 - p) / 1003) ** 0.5


def test_ends_of_p(isa):
    x, eye = torch.ones(5, 12), torch.eye(12)
    assert torch.equal(kernels.shrink(x, eye, 0.0, None), x)
    assert torch.equal(kernels.shrink(x, eye, 1.0, torch.tensor([3])), torch.zeros(5, 12))
    assert torch.equal(dropout(x, torch.tensor([3]), 1.0), torch.zeros(5, 12))
    assert dropout(x, None, 0.0) is x


def test_a_dropped_nan_is_dropped(isa):
    x = torch.full((40, 12), float("nan"))
    seed = torch.tensor([3])
    keep = keep_mask(seed, 0.5, 40, 12)
    S = kernels.shrink(x, torch.ones(1, 12), 0.5, seed)[:, 0]
    assert torch.equal(S.isnan(), keep.any(dim=1))
    assert torch.equal(dropout(x, seed, 0.5).isnan(), keep)


def test_rows_are_numbered_beyond_32_bits():
    lanes = [
        philox4x32((torch.tensor(0), torch.tensor(5), torch.tensor(high), torch.tensor(0)), (torch.tensor(1),) * 2)
        for high in (0, 1)
    ]
    assert lanes[0] != lanes[1]


@pytest.mark.parametrize("p", [-0.1, 1.5, float("nan")])
def test_p_outside_its_range(p):
    with pytest.raises(ValueError, match="dropout_p"):
        dropout(torch.ones(2, 2), torch.tensor([1]), p)


def test_missing_seed():
    with pytest.raises(ValueError, match="seed"):
        dropout(torch.ones(2, 2), None, 0.5)
