"""LoHa and LoKr on linear layers: starts, losses, gradients and files of peft; the merged layer where peft has none.

What is particular to one is in `test_loha.py` and `test_lokr.py`; what holds of every method, in `test_methods.py`.
"""

from __future__ import annotations

import peft
import pytest
import torch
from lycoris_cases import (
    BOTH_SPLIT,
    FULL,
    KHATRI_RAO,
    SPLIT,
    TILED,
    among,
    assert_gradients_are_those_of_peft,
    both,
    chosen,
    delta,
    every_form,
    every_shape,
    exact,
    given,
    logits,
    main_forms,
    pair,
    small,
    train,
    trained,
    wrap,
)
from models import FAMILIES, assert_near, build, model_batch, snapshot
from tolerance import assert_close

import pyadapt
from pyadapt import AdapterConfig

# Those that peft can adapt: all but GPT-2, whose Conv1D it refuses.
OF_PEFT = [name for name in FAMILIES if name != "gpt2"]


@pytest.fixture
def case(request, monkeypatch):
    return chosen(request, monkeypatch)


# --- configuration ----------------------------------------------------------------------------


@both
def test_defaults_are_those_of_peft(case):
    theirs, ours = case.theirs().to_dict(), case.ours().to_dict()
    theirs["peft_type"] = theirs["peft_type"].value
    assert ours == theirs
    values = {"r": 3, "alpha": 2, "rank_dropout": 0.1, "rank_pattern": {"q_proj": 4}, "target_modules": {"v", "q"}}
    if case.method == "LoKr":
        values |= {"decompose_both": True, "decompose_factor": 4, "rank_dropout_scale": True, "init_weights": "lycoris"}
    assert AdapterConfig.from_peft(case.theirs(**values)) == case.ours(**values)


@both
@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"r": 0}, "r=0: a rank is a whole number of at least 1"),
        ({"r": -2}, "r=-2: a rank"),
        ({"rank_dropout": 1.0}, r"rank_dropout=1.0 is not in \[0, 1\)"),
        ({"module_dropout": -0.1}, r"module_dropout=-0.1 is not in \[0, 1\)"),
        ({"init_weights": "kaiming"}, "init_weights='kaiming': METHOD knows True"),
        ({"lora_alpha": 3}, "METHODConfig has no key 'lora_alpha'; did you mean 'alpha'"),
        ({"layers_pattern": "layers"}, "needs layers_to_transform"),
    ],
)
def test_bad_values(case, values, match):
    with pytest.raises(ValueError, match=match.replace("METHOD", case.method)):
        AdapterConfig.from_dict({"peft_type": case.method.upper(), **values})


@both
@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"rank_pattern": {"nowhere": 2}}, "rank_pattern 'nowhere' matches none"),
        ({"target_modules": ["embed_tokens"]}, "METHOD cannot adapt embedding layers, only conv and linear ones"),
    ],
)
def test_what_does_not_fit_the_model(case, config, match):
    model = build("llama")
    before = snapshot(model)
    with pytest.raises(ValueError, match=match.replace("METHOD", case.method)):
        wrap(case, model=model, **config)
    assert snapshot(model) == before


@every_shape
def test_a_plan_names_the_tensors_that_there_are(case):
    options = {"target_modules": "all-linear"}
    plan = pyadapt.plan(build("llama"), case.config("llama", **options))
    twin = peft.get_peft_model(build("llama"), case.theirs(**case.options("llama", **options)))
    theirs: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, value in peft.get_peft_model_state_dict(twin).items():
        theirs.setdefault(key.split(".")[-2], {})[key.split(".")[-1]] = tuple(value.shape)
    assert {row.path.split(".")[-1]: row.shapes for row in plan.layers} == theirs


# --- values -----------------------------------------------------------------------------------


@every_shape
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_the_same_seed_gives_the_start_of_peft(case, name):
    for init_weights in case.inits:
        torch.manual_seed(3)
        twin = peft.get_peft_model(build(name), case.theirs(**case.options(name, init_weights=init_weights)))
        torch.manual_seed(3)
        model = wrap(case, name, init_weights=init_weights)
        theirs = peft.get_peft_model_state_dict(twin)
        for key, value in model.get_adapter_state_dict().items():
            assert torch.equal(value, theirs[f"base_model.model.{key}"]), (init_weights, key)
        does_nothing = torch.equal(logits(model, name), logits(build(name), name))
        assert does_nothing is (init_weights is not False), init_weights


@main_forms
@pytest.mark.parametrize("name", OF_PEFT)
@pytest.mark.parametrize("targets", ["default", "all-linear"])
def test_gradients_are_those_of_peft(case, name, targets):
    config = {} if targets == "default" else {"target_modules": targets}
    assert_gradients_are_those_of_peft(*pair(case, name, **config), name)


@every_form
def test_every_form_trains_as_in_peft(case):
    patterns = {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"v_proj": 2}}
    for config in ({"target_modules": "all-linear"}, patterns):
        assert_gradients_are_those_of_peft(*pair(case, **config))


@main_forms
@pytest.mark.parametrize("name", OF_PEFT)
def test_losses_are_those_of_peft_step_by_step(case, name):
    model, twin = pair(case, name)
    ours = train(model, name)
    assert_near(ours, train(twin, name), "loss")
    assert ours[0] != ours[1]


@every_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_conv1d_of_gpt2(case, dtype):
    """peft refuses it; the dense layer with dW in it is the oracle."""
    targets = ["c_attn", "c_proj", "c_fc"]
    model = wrap(case, "gpt2", build("gpt2", dtype=dtype), target_modules=targets).train()
    dense = build("gpt2", dtype=torch.float64)
    for path, layer in model.named_modules():
        if hasattr(layer, "adapters"):
            with torch.no_grad():
                dense.get_submodule(path).weight += delta(layer).t()
    assert_near(model(**model_batch("gpt2")).logits, dense(**model_batch("gpt2")).logits.to(dtype), "model")
    model(**model_batch("gpt2")).loss.backward()
    dense(**model_batch("gpt2")).loss.backward()
    layer, twin = model.transformer.h[0].mlp.c_fc, dense.transformer.h[0].mlp.c_fc
    unit = layer.unit("default")
    values = {key: value.detach().double().requires_grad_() for key, value in unit.named_parameters()}
    expected = torch.autograd.grad(delta(layer, values=values), list(values.values()), twin.weight.grad.t())
    for key, gradient in zip(values, expected, strict=True):
        assert_near(unit.get_parameter(key).grad, gradient.to(dtype), "gradient")


@every_form
@pytest.mark.parametrize("shape", [(10,), (1, 10), (0, 10), (2, 3, 10), (2, 0, 10), (2, 1, 3, 10)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_any_leading_dimensions_and_dtype(case, shape, dtype):
    model = small(case, dtype=dtype)
    x = torch.randn(*shape, dtype=torch.float64).to(dtype).requires_grad_()
    y = model(x)
    y.backward(given(y))
    expected, dx, gradients = exact(model, x)
    assert (y.dtype, x.grad.dtype) == (dtype, dtype)
    assert_close(y, expected, "product", dtype)
    assert_close(x.grad, dx, "product", dtype)
    for key, gradient in gradients.items():
        found = model[0].unit("default").get_parameter(key).grad
        assert found.dtype == (dtype if dtype == torch.float64 else torch.float32)
        assert_close(found, gradient, "product", dtype)


@main_forms
def test_double_backward_is_refused(case):
    model = small(case, dtype=torch.float64)
    x = torch.randn(3, 10, dtype=torch.float64, requires_grad=True)
    (dx,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@among([KHATRI_RAO, TILED, SPLIT, BOTH_SPLIT])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_is_that_of_peft(case, base):
    model, twin = pair(case, model=build("llama", dtype=base))
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = model(**model_batch("llama")).logits, twin(**model_batch("llama")).logits
        assert out.dtype == expected.dtype
        assert_near(out, expected, "model", torch.bfloat16)
        assert_near(train(model), train(twin), "loss", torch.bfloat16)
    assert all(p.dtype == torch.float32 for p in trained(model).values())


@both
@pytest.mark.parametrize("adapter_dtype", ["bfloat16", "base", "float32"])
def test_adapter_dtype(case, adapter_dtype):
    model = wrap(case, model=build("llama", dtype=torch.bfloat16), adapter_dtype=adapter_dtype).train()
    wanted = torch.float32 if adapter_dtype == "float32" else torch.bfloat16
    model(**model_batch("llama")).loss.backward()
    assert {p.dtype for p in trained(model).values()} == {wanted}
    assert {p.grad.dtype for p in trained(model).values()} == {wanted}


# --- dropout ----------------------------------------------------------------------------------

# As in peft: LoHa divides what it keeps by the mean of the mask, LoKr where it is told to.
SCALED = {"rank_dropout_scale": True}
dropouts = pytest.mark.parametrize(
    ("case", "scale"),
    [(KHATRI_RAO, {}), (TILED, {}), (SPLIT, {}), (SPLIT, SCALED), (FULL, {}), (FULL, SCALED)],
    ids=lambda value: "scaled" if value is SCALED else str(value or ""),
    indirect=["case"],
)


@dropouts
def test_rank_dropout_drops_rows(case, scale):
    N, p, steps = 50, 0.4, 400
    model = small(case, (N, 8), torch.float64, rank_dropout=p, **scale)
    x = torch.randn(3, 8, dtype=torch.float64)
    kept = torch.zeros(N)
    with torch.no_grad():
        term = x @ delta(model[0]).t()
        frozen = model[0].frozen(x)
        assert_near(model.eval()(x), frozen + term, "layer")
        for _ in range(steps):
            step = model.train()(x) - frozen
            alive = step.abs().amax(0) > 1e-9
            divided = N / alive.sum().clamp(min=1) if scale or case.method == "LoHa" else 1
            assert_near(step, term * alive * divided, "gradient")
            kept += alive
    assert ((kept / steps - (1 - p)).abs() < 5 * (p * (1 - p) / steps) ** 0.5).all()


@dropouts
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_rank_dropout_in_backward_is_that_of_forward(case, scale, dtype):
    model = small(case, (12, 10), dtype, rank_dropout=0.5, **scale).train()
    x = torch.randn(7, 10, dtype=dtype, requires_grad=True)
    torch.manual_seed(4)
    y = model(x)
    y.backward(given(y))
    torch.manual_seed(4)
    factors = model[0].unit("default").output_factors(x, 12)
    assert 0 < (factors == 0).sum() < 12
    expected, dx, gradients = exact(model, x, factors=factors)
    assert_near(y, expected.to(dtype), "merged")
    assert_near(x.grad, dx.to(dtype), "gradient")
    for key, gradient in gradients.items():
        assert_near(model[0].unit("default").get_parameter(key).grad, gradient.to(dtype), "gradient")


@dropouts
def test_a_step_that_drops_every_row_is_the_plain_layer(case, scale):
    """peft divides 0 by 0 there."""
    model = small(case, (2, 8), rank_dropout=0.9, **scale).train()
    x = torch.randn(3, 8)
    with torch.no_grad():
        plain, steps = model[0].frozen(x), [model(x) for _ in range(20)]
    assert all(torch.isfinite(y).all() for y in steps)
    assert any(torch.equal(y, plain) for y in steps)


@main_forms
def test_module_dropout_drops_the_whole_term(case):
    p, steps = 0.3, 400
    model = small(case, (6, 8), module_dropout=p)
    x = torch.randn(3, 8)
    with torch.no_grad():
        plain, with_term = model[0].frozen(x), model.eval()(x)
        outputs = [model.train()(x) for _ in range(steps)]
    dropped = 0
    for y in outputs:
        is_plain = bool((y - plain).abs().max() < (y - with_term).abs().max())
        assert_near(y, plain if is_plain else with_term, "layer")
        dropped += is_plain
    assert abs(dropped / steps - p) < 5 * (p * (1 - p) / steps) ** 0.5


@both
def test_dropout_follows_the_seed(case):
    model = wrap(case, rank_dropout=0.5).train()
    torch.manual_seed(7)
    one, two = logits(model), logits(model)
    torch.manual_seed(7)
    assert torch.equal(logits(model), one)
    assert not torch.equal(two, one)
