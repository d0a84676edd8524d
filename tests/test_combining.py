"""Combining adapters: A and B of each kind are those of peft's `add_weighted_adapter` from the same adapters.

What an SVD leaves free is compared as the product BA.
"""

from __future__ import annotations

import contextlib
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import model as peft_lora
from tolerance import assert_close, assert_near
from torch import nn
from transformers.pytorch_utils import Conv1D

from pyadapt.methods.lora.combining import KINDS, Combination, combine_deltas, combine_factors, delta

SEED = 7
OVER_DELTAS = [kind for kind in KINDS if kind.endswith("svd")]
OVER_FACTORS = [kind for kind in KINDS if not kind.endswith("svd")]
PRUNING = [kind for kind in KINDS if KINDS[kind].pruning]
NEED_EQUAL_RANKS = [kind for kind in OVER_FACTORS if kind != "cat"]
# Two adapters adapt all layers, the third only some.
TARGETS = {
    "a": ["embedding", "linear", "transposed", "conv", "pointwise"],
    "b": ["embedding", "linear", "transposed", "conv", "pointwise"],
    "c": ["linear", "conv"],
}
WEIGHTS = [(0.7, 0.4, 1.0), (-1.5, 0.3, 2), (0.0, -0.6, 0.0)]


class Layers(nn.Module):
    """One layer of each form."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(13, 7)
        self.linear = nn.Linear(7, 11)
        self.transposed = Conv1D(9, 11)
        self.conv = nn.Conv2d(5, 6, 3)
        self.pointwise = nn.Conv2d(6, 8, 1)


def peft_model(ranks=(4, 4, 4), dtype=torch.float32, **config):
    """peft's model over `Layers` with the adapters a, b and c, their A and B random."""
    torch.manual_seed(0)
    configs = {
        name: LoraConfig(r=r, lora_alpha=alpha, target_modules=TARGETS[name], init_lora_weights=False, **config)
        for name, r, alpha in zip("abc", ranks, (8, 3, 5), strict=True)
    }
    with silent():
        model = get_peft_model(Layers(), configs["a"], "a")
        for name in "bc":
            model.add_adapter(name, configs[name])
    return model.to(dtype)


@contextlib.contextmanager
def silent():
    """peft speaks of each Conv1D."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def combined_by_peft(model, monkeypatch, adapters=("a", "b", "c"), weights=(0.7, 0.4, 1.0), **options):
    """peft's new adapter, by layer; its masks are drawn from a generator that starts at SEED."""

    def seeded(*args):
        # peft has just initialised the new adapter, which draws as well.
        torch.manual_seed(SEED)

    monkeypatch.setattr(peft_lora, "_freeze_adapter", seeded)
    with silent():
        model.base_model.add_weighted_adapter(list(adapters), list(weights), "new", **options)
    return {path: factors(layer, "new") for path, layer in adapted(model)}


def combined_here(model, adapters=("a", "b", "c"), weights=(0.7, 0.4, 1.0), **options):
    """Ours of the same adapters, by layer."""
    combination = Combination(adapters, weights, **options)
    rank = combination.rank_of([model.peft_config[name].r for name in adapters])
    torch.manual_seed(SEED)
    results = {}
    for path, layer in adapted(model):
        present = [i for i, name in enumerate(adapters) if has(layer, name)]
        pairs = [factors(layer, adapters[i]) for i in present]
        scalings = [layer.scaling[adapters[i]] for i in present]
        of_present = [weights[i] for i in present]
        if combination.over_deltas:
            deltas = [delta(A, B, s) for (A, B), s in zip(pairs, scalings, strict=True)]
            transposed = path in ("embedding", "transposed")
            results[path] = combine_deltas(deltas, of_present, combination, rank, stored_transposed=transposed)
        else:
            results[path] = combine_factors(pairs, scalings, of_present, combination, rank)
    return results


def adapted(model):
    return [
        (path.removeprefix("base_model.model."), layer)
        for path, layer in model.named_modules()
        if isinstance(layer, peft_lora.LoraLayer)
    ]


def has(layer, name):
    return name in layer.lora_A or name in layer.lora_embedding_A


def factors(layer, name):
    if name in layer.lora_A:
        return layer.lora_A[name].weight, layer.lora_B[name].weight
    return layer.lora_embedding_A[name], layer.lora_embedding_B[name]


def product(A, B):
    return B.detach().flatten(1).double() @ A.detach().flatten(1).double()


def options_of(kind):
    return {"combination_type": kind, **({"density": 0.6} if kind in PRUNING else {})}


def random_pairs(ranks, n=6, k=9, dtype=torch.float32):
    return [(torch.randn(r, k, dtype=dtype), torch.randn(n, r, dtype=dtype)) for r in ranks]


def exact_sum(pairs, scalings, weights):
    return sum(w * s * product(A, B) for (A, B), s, w in zip(pairs, scalings, weights, strict=True))


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", OVER_FACTORS)
def test_factors_are_those_of_peft(kind, dtype, weights, monkeypatch):
    model = peft_model(dtype=dtype)
    ours = combined_here(model, weights=weights, **options_of(kind))
    theirs = combined_by_peft(model, monkeypatch, weights=weights, **options_of(kind))
    assert ours.keys() == theirs.keys() == set(TARGETS["a"])
    for path in theirs:
        for mine, other in zip(ours[path], theirs[path], strict=True):
            assert mine.dtype == other.dtype == dtype
            assert torch.equal(mine, other), path


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", OVER_DELTAS)
def test_deltas_are_those_of_peft(kind, dtype, weights, monkeypatch):
    model = peft_model((2, 4, 3), dtype=dtype)
    ours = combined_here(model, weights=weights, **options_of(kind))
    theirs = combined_by_peft(model, monkeypatch, weights=weights, **options_of(kind))
    assert ours.keys() == theirs.keys() == set(TARGETS["a"])
    for path in theirs:
        for mine, other in zip(ours[path], theirs[path], strict=True):
            assert mine.shape == other.flatten(1).shape, path
            assert mine.dtype == other.dtype == torch.float32
        assert_near(product(*ours[path]), product(*theirs[path]), "merged", dtype)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if KINDS[kind].elects])
def test_a_sign_is_elected_by_number_as_in_peft(kind, monkeypatch):
    model = peft_model()
    options = {**options_of(kind), "majority_sign_method": "frequency"}
    ours, theirs = combined_here(model, **options), combined_by_peft(model, monkeypatch, **options)
    for path in theirs:
        assert_near(product(*ours[path]), product(*theirs[path]), "merged", torch.float32)
    by_total = combined_here(model, **options_of(kind))
    assert not torch.equal(product(*by_total["linear"]), product(*ours["linear"]))


@pytest.mark.parametrize("ranks", [(2, 4, 3), (1, 1, 5)])
def test_cat_takes_any_ranks_as_peft_does(ranks, monkeypatch):
    model = peft_model(ranks)
    ours = combined_here(model, combination_type="cat")
    theirs = combined_by_peft(model, monkeypatch, combination_type="cat")
    for path in theirs:
        for mine, other in zip(ours[path], theirs[path], strict=True):
            assert torch.equal(mine, other), path
    # The third adapter is not on every layer; what it does not fill is zero.
    assert ours["embedding"][0].shape == (sum(ranks), 13)
    assert not ours["embedding"][0][ranks[0] + ranks[1] :].any()


@pytest.mark.parametrize("full_matrices", [True, False])
@pytest.mark.parametrize("svd_rank", [1, 5])
def test_svd_rank_and_clamp_are_those_of_peft(svd_rank, full_matrices, monkeypatch):
    """Clamping depends on the signs that an SVD leaves free: factors are equal only if the decomposition is."""
    model = peft_model((2, 4, 3))
    options = {"svd_rank": svd_rank, "svd_clamp": 0.8}
    ours = combined_here(model, **options)
    theirs = combined_by_peft(model, monkeypatch, svd_full_matrices=full_matrices, **options)
    for path in ("embedding", "linear", "transposed"):
        assert ours[path][0].shape[0] == svd_rank
        for mine, other in zip(ours[path], theirs[path], strict=True):
            assert_near(mine, other, "merged")
        unclamped = combined_here(model, svd_rank=svd_rank)[path]
        assert not torch.equal(product(*unclamped), product(*ours[path]))


@pytest.mark.parametrize("kind", list(KINDS))
def test_one_adapter_is_combined_by_linear(kind, monkeypatch):
    model = peft_model()
    options = {"adapters": ("b",), "weights": (-0.3,), "combination_type": kind}
    ours, theirs = combined_here(model, **options), combined_by_peft(model, monkeypatch, **options)
    for path in theirs:
        for mine, other in zip(ours[path], theirs[path], strict=True):
            assert torch.equal(mine, other), path


@pytest.mark.parametrize("kind", ["dare_linear", "dare_ties_svd"])
def test_random_kinds_draw_anew_each_time(kind):
    model = peft_model()
    combination = Combination(("a", "b"), (1.0, 1.0), **options_of(kind))
    layer = model.base_model.model.linear
    pairs = [factors(layer, name) for name in "ab"]

    def combine():
        if combination.over_deltas:
            return product(*combine_deltas([delta(*pair, 1.0) for pair in pairs], (1.0, 1.0), combination, 4))
        return product(*combine_factors(pairs, (1.0, 1.0), (1.0, 1.0), combination, 4))

    assert not torch.equal(combine(), combine())


@pytest.mark.parametrize("kind", ["magnitude_prune", "dare_linear"])
def test_a_density_of_one_is_linear_and_draws_nothing(kind):
    pairs, state = random_pairs((3, 3)), torch.get_rng_state()
    results = [
        combine_factors(pairs, (2.0, 1.0), (0.5, -1.0), Combination(("a", "b"), (0.5, -1.0), **options), 3)
        for options in ({"combination_type": kind, "density": 1.0}, {"combination_type": "linear"})
    ]
    for mine, other in zip(*results, strict=True):
        assert torch.equal(mine, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_cat_and_svd_of_full_rank_are_exact_in_fp64():
    """peft rounds the weights of an svd to fp32; fp64 mathematics is the oracle."""
    pairs, scalings, weights = random_pairs((2, 4), dtype=torch.float64), (0.5, 3.0), (-0.7, 0.1)
    exact = exact_sum(pairs, scalings, weights)
    by_cat = combine_factors(pairs, scalings, weights, Combination(("a", "b"), weights, "cat"), 6)
    assert_close(product(*by_cat), exact, "merged", torch.float64)
    deltas = [delta(A, B, s) for (A, B), s in zip(pairs, scalings, strict=True)]
    by_svd = combine_deltas(deltas, weights, Combination(("a", "b"), weights, svd_rank=6), 6)
    assert by_svd[0].dtype == torch.float64
    assert_close(product(*by_svd), exact, "merged", torch.float64)


def test_a_rank_beyond_the_layer_is_filled_with_zeros():
    """peft fails there; fp64 mathematics is the oracle."""
    pairs, scalings, weights = random_pairs((2, 4), n=3), (1.0, 1.0), (0.7, 0.4)
    deltas = [delta(A, B, s) for (A, B), s in zip(pairs, scalings, strict=True)]
    A, B = combine_deltas(deltas, weights, Combination(("a", "b"), weights, svd_rank=8), 8)
    assert (A.shape, B.shape) == ((8, 9), (3, 8))
    assert not A[3:].any()
    assert not B[:, 3:].any()
    assert_close(product(A, B), exact_sum(pairs, scalings, weights), "merged", torch.float32)


def test_a_layer_of_smaller_rank_is_filled_with_zeros(monkeypatch):
    """peft leaves such a layer smaller than its configuration says; the product is the same."""
    model = peft_model(rank_pattern={"linear": 2})
    ours = combined_here(model, combination_type="linear")
    theirs = combined_by_peft(model, monkeypatch, combination_type="linear")
    assert (ours["linear"][0].shape, theirs["linear"][0].shape) == ((4, 7), (2, 7))
    assert_near(product(*ours["linear"]), product(*theirs["linear"]), "merged", torch.float32)


def test_results_do_not_reach_back_to_the_adapters():
    model = peft_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for kind in KINDS:
        for A, B in combined_here(model, **options_of(kind)).values():
            assert not A.requires_grad
            assert not B.requires_grad
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("kind", NEED_EQUAL_RANKS)
def test_kinds_that_add_factors_need_equal_ranks(kind):
    combination = Combination(("a", "b"), (1.0, 1.0), **options_of(kind))
    assert combination.rank_of([4, 4]) == 4
    with pytest.raises(ValueError, match=rf"{kind}.*equal ranks, not \[4, 8\].*cat"):
        combination.rank_of([4, 8])
    with pytest.raises(ValueError, match=r"equal ranks, not \[2, 3\]"):
        combine_factors(random_pairs((2, 3)), (1.0, 1.0), (1.0, 1.0), combination, 4)


def test_rank_of_the_other_kinds():
    assert Combination(("a", "b"), (1.0, 1.0), "cat").rank_of([4, 8]) == 12
    for kind in OVER_DELTAS:
        assert Combination(("a", "b"), (1.0, 1.0), **options_of(kind)).rank_of([4, 8]) == 8
        assert Combination(("a", "b"), (1.0, 1.0), **options_of(kind), svd_rank=3).rank_of([4, 8]) == 3


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"combination_type": "sum"}, ValueError, "combination_type='sum' is not one of linear, cat, svd"),
        ({"adapters": []}, ValueError, "adapters is empty; name at least one"),
        ({"adapters": "ab"}, TypeError, r"adapters='ab' is a string.*\['ab'\]"),
        ({"weights": [1.0]}, ValueError, r"weights has 1 numbers for 2 adapters \(a, b\)"),
        ({"weights": [1.0, float("nan")]}, ValueError, "weight of adapter 'b' is nan; give a finite"),
        ({"density": 0.0}, ValueError, r"density=0.0 is not in \(0, 1\]"),
        ({"density": 1.5, "combination_type": "ties"}, ValueError, r"density=1.5 is not in \(0, 1\]"),
        ({"majority_sign_method": "most"}, ValueError, "majority_sign_method='most' is not one of total, frequency"),
        ({"svd_rank": 0}, ValueError, "svd_rank=0: a rank is a whole number of at least 1; None"),
        ({"svd_rank": 2.5}, ValueError, "svd_rank=2.5"),
        ({"svd_clamp": 99}, ValueError, r"svd_clamp=99 is not in \(0, 1\]"),
        ({"svd_driver": "qr"}, ValueError, "svd_driver='qr' is not one of gesvd, gesvdj, gesvda; None"),
        *(
            ({"combination_type": kind}, ValueError, rf"combination_type='{kind}' prunes and needs density.*\(0, 1\]")
            for kind in PRUNING
        ),
    ],
)
def test_a_bad_combination_is_refused(changes, error, message):
    with pytest.raises(error, match=message):
        Combination(**{"adapters": ["a", "b"], "weights": [1.0, 1.0], **changes})
