"""The term of orthogonality: peft's value, the plain formula's gradient, and in which losses it is."""

from __future__ import annotations

import copy

import pytest
import torch
from adalora_cases import config_of, factors, randomise, share, twin_of, wrapped
from models import assert_near, build, model_batch, plain_module
from tolerance import assert_close
from torch import nn
from transformers.modeling_outputs import CausalLMOutput

import pyadapt
from pyadapt import AdaLoraConfig, LoraConfig


def formula(model, weight=0.5, name="default"):
    """The definition, in the dtype of the factors."""
    norms = []
    for key, P in factors(model, name).items():
        if not key.endswith("lora_E"):
            G = P @ P.t() if key.endswith("lora_A") else P.t() @ P
            norms.append((G - torch.eye(len(G), dtype=G.dtype)).norm())
    return weight * sum(norms) / len(norms)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("start", ["fresh", "random"])
def test_value_and_gradient_are_the_formula(dtype, start):
    model = wrapped(model=build("llama", dtype=dtype), target_modules="all-linear")
    model = randomise(model) if start == "random" else model
    exact = copy.deepcopy(model).double()
    term, expected = pyadapt.orthogonality(model), formula(exact)
    assert term.dtype == dtype
    assert_close(term, expected, "loss" if dtype == torch.float32 else "model", dtype)
    (3 * term).backward()
    (3 * expected).backward()
    for key, parameter in factors(model).items():
        if key.endswith("lora_E"):
            assert parameter.grad is None
        else:
            assert_close(parameter.grad, exact.get_parameter(key).grad, "gradient", dtype)


def test_the_gradient_is_checked():
    from pyadapt.methods.adalora.orthogonality import Orthogonality

    A, B = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 7), (5, 3)))
    assert torch.autograd.gradcheck(lambda A, B: Orthogonality.apply(0.7, A, B), (A, B))


def test_orthogonal_factors_have_no_gradient():
    from pyadapt.methods.adalora.orthogonality import Orthogonality

    A = torch.eye(3, 7).requires_grad_()
    B = torch.zeros(5, 0, requires_grad=True)
    term = Orthogonality.apply(0.5, A, B)
    term.backward()
    assert term == 0
    assert torch.equal(A.grad, torch.zeros(3, 7))
    assert B.grad.shape == (5, 0)


def test_a_second_backward_is_refused():
    model = wrapped()
    A = model.units_of("default")[0].lora_A
    (grad,) = torch.autograd.grad(pyadapt.orthogonality(model).square(), A, create_graph=True)
    with pytest.raises(RuntimeError, match=r"differentiate twice|once_differentiable"):
        grad.sum().backward()


def test_16_bit_factors_and_autocast():
    """Under autocast peft makes its Grams in 16 bits."""
    model = randomise(wrapped(adapter_dtype="bfloat16"))
    exact = copy.deepcopy(model).double()
    expected = formula(exact)
    expected.backward()
    with torch.autocast("cpu", torch.bfloat16):
        term = pyadapt.orthogonality(model)
    assert_close(term, expected, "loss", torch.float32)
    term.backward()
    for key, parameter in factors(model).items():
        if not key.endswith("lora_E"):
            assert parameter.grad.dtype == torch.bfloat16
            assert_close(parameter.grad, exact.get_parameter(key).grad, "gradient", torch.bfloat16)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("weight", [0.5, 0.02, 0.0])
def test_the_loss_is_that_of_peft(train, weight):
    """In evaluation mode, too, the term is in the loss, there as here."""
    model, twin = (f(orth_reg_weight=weight).train(train) for f in (wrapped, twin_of))
    share(randomise(model), twin)
    batch = model_batch("llama")
    assert_near(model(**batch).loss, twin(**batch).loss, "loss")
    assert bool(pyadapt.orthogonality(model) == 0) == (weight == 0)


def test_where_it_is_not(tmp_path):
    """Not in the base model's loss, nor where the adapter is not trained (there peft cannot be called with labels)."""
    model = randomise(wrapped())
    batch = model_batch("llama")
    term = pyadapt.orthogonality(model).detach()
    assert term > 0.1
    with_term = model(**batch).loss.detach()
    with model.disable_adapter():
        assert torch.equal(model(**batch).loss, build("llama")(**batch).loss)
    model.save_pretrained(tmp_path)
    served = pyadapt.load(build("llama"), tmp_path)
    assert_near(served(**batch).loss + term, with_term, "loss")
    assert pyadapt.orthogonality(served) == 0
    model.add_adapter("other", LoraConfig())
    model.set_adapter("other")
    assert pyadapt.orthogonality(model) == 0
    model.set_adapter("default")
    assert torch.equal(model(**batch).loss, with_term)
    model.merge_adapter()
    assert_near(model(**batch).loss + term, with_term, "loss")
    model.unmerge_adapter()
    assert torch.equal(model(**batch).loss, with_term)
    model.delete_adapter("default")
    assert pyadapt.orthogonality(model) == 0


def test_each_adapter_in_training_adds_its_own():
    model = randomise(wrapped())
    first = pyadapt.orthogonality(model)
    model.add_adapter("second", AdaLoraConfig(**config_of(orth_reg_weight=0.1)))
    model.set_adapter(["default", "second"])
    assert_near(pyadapt.orthogonality(model), first + formula(model, 0.1, "second"), "loss")
    model.rename_adapter("second", "third")
    assert_near(pyadapt.orthogonality(model), first + formula(model, 0.1, "third"), "loss")


class Answers(nn.Module):
    """A model whose output is what it is told."""

    def __init__(self, answer):
        super().__init__()
        self.layer, self.answer = nn.Linear(5, 4), answer

    def forward(self, x):
        return self.answer(self.layer(x).square().mean())


class Named:
    def __init__(self, loss):
        self.loss = loss


@pytest.mark.parametrize(
    ("answer", "loss_of"),
    [
        (lambda loss: CausalLMOutput(loss=loss), lambda out: out.loss),
        (lambda loss: CausalLMOutput(loss=loss), lambda out: out["loss"]),
        (lambda loss: {"loss": loss}, lambda out: out["loss"]),
        (Named, lambda out: out.loss),
    ],
    ids=["attribute", "item", "dict", "object"],
)
def test_outputs_that_name_a_loss(answer, loss_of):
    torch.manual_seed(0)
    model = Answers(answer)
    x = torch.randn(3, 5)
    without = loss_of(model(x)).detach()
    pyadapt.wrap(model, AdaLoraConfig(target_modules=["layer"], total_step=5))
    loss = loss_of(model(x))
    assert_near(loss, without + pyadapt.orthogonality(model), "loss")
    loss.backward()
    assert bool(model.layer.adapters["default"].lora_A.grad.abs().sum() > 0)


@pytest.mark.parametrize(
    "answer",
    [lambda loss: (loss,), lambda loss: loss, lambda loss: {"loss": None}, lambda loss: CausalLMOutput(logits=loss)],
    ids=["tuple", "tensor", "none", "no loss"],
)
def test_outputs_that_name_none(answer):
    """As in peft nothing is added there; `pyadapt.orthogonality` is for those loops."""
    torch.manual_seed(0)
    model = Answers(answer)
    x = torch.randn(3, 5)
    expected = model(x)
    pyadapt.wrap(model, AdaLoraConfig(target_modules=["layer"], total_step=5))
    found = model(x)
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
    elif isinstance(expected, tuple):
        assert torch.equal(found[0], expected[0])
    else:
        assert found.get("loss") is None


def test_sharded_factors_are_refused():
    """ZeRO-3 leaves empty vectors in the place of the factors, whose products are no error, but 0."""
    model = wrapped()
    model.units_of("default")[2].lora_B = nn.Parameter(torch.empty(0))
    with pytest.raises(RuntimeError, match="orth_reg_weight=0 leaves it out"):
        pyadapt.orthogonality(model)


def test_a_model_without_adapters():
    with pytest.raises(ValueError, match="this PlainNet carries no adapters of pyadapt"):
        pyadapt.orthogonality(plain_module())
