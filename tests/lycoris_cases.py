"""LoHa and LoKr in every form, for their tests: our model, peft's twin of it, and both by the definition in fp64."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import Any

import peft
import pytest
import torch
from models import FAMILIES, assert_near, build, copy_adapter_to_peft, model_batch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import pyadapt
from pyadapt import LoHaConfig, LoKrConfig
from pyadapt.methods.lycoris import loha_conv, loha_linear


@dataclass(frozen=True)
class Case:
    """A method and one of the forms that it has.

    Attributes:
        method: as in the names of its configurations.
        form: a name for the rest.
        values: options that lead to it.
        choice: module, name and value of what is put in a rule's place: tiny layers would never choose some forms.
    """

    method: str
    form: str
    values: dict[str, Any] = field(default_factory=dict)
    choice: tuple[Any, ...] = ()

    def __str__(self) -> str:
        return f"{self.method} {self.form}"

    @property
    def ours(self) -> type[LoHaConfig] | type[LoKrConfig]:
        return {"LoHa": LoHaConfig, "LoKr": LoKrConfig}[self.method]

    @property
    def theirs(self) -> Any:
        return {"LoHa": peft.LoHaConfig, "LoKr": peft.LoKrConfig}[self.method]

    @property
    def inits(self) -> list[bool | str]:
        """The starts that there are."""
        return [True, False] if self.method == "LoHa" else [True, False, "lycoris"]

    def options(self, name=None, **more):
        """For either library, and for a family's model, or for one layer alone."""
        found = {"target_modules": ["0"], "init_weights": False, "r": 3 if self.method == "LoHa" else 2, "alpha": 5}
        if name is not None:
            found |= {"target_modules": list(FAMILIES[name].targets), "task_type": FAMILIES[name].task}
        return {**found, **self.values, **more}

    def config(self, name=None, **more):
        return self.ours(**self.options(name, **more))


# Tiny layers would choose the tiled form, if they had rows enough.
KHATRI_RAO = Case("LoHa", "khatri-rao", {}, (loha_linear, "is_tiled", lambda *case: False))
TILED = Case("LoHa", "tiled", {}, (loha_linear, "is_tiled", lambda *case: True))
# Each combination of full and split factors: 24 features are 4 * 6, or 8 * 3 where 8 is asked for.
LOKR = {
    "w2 split": {},
    "both full": {"r": 8},
    "both split": {"r": 1, "decompose_both": True},
    "w1 split": {"r": 3, "decompose_both": True, "decompose_factor": 8},
    "factor 2": {"decompose_factor": 2},
    "factor 5": {"decompose_factor": 5, "r": 3},
}
LOKR_FORMS = [Case("LoKr", form, values) for form, values in LOKR.items()]
LINEAR = [KHATRI_RAO, TILED, *LOKR_FORMS]
SPLIT, FULL, BOTH_SPLIT = LOKR_FORMS[:3]

# From 8 to 12 channels. With a factor of 2 these are 2 * 4 and 2 * 6, so that a rank of 2 splits w2; else 2 * 4 and
# 3 * 4, where a rank of 1 does. (At rank 1 peft's effective form fails where a side of the kernel is 1, as in Conv1d.)
LOKR_CONV = {
    "split": {"r": 1},
    "effective": {"r": 2, "decompose_factor": 2, "use_effective_conv2d": True},
    "full": {"r": 3, "use_effective_conv2d": True},
    "both split": {"r": 1, "decompose_both": True},
    "factor 2": {"r": 2, "decompose_factor": 2},
}
LOKR_CONVS = [Case("LoKr", form, values) for form, values in LOKR_CONV.items()]
# A grouped convolution has one form only.
LOHA_CONVS = [
    Case("LoHa", f"{kind} {form}", {"r": 2, "use_effective_conv2d": kind == "effective"}, (loha_conv, *rule))
    for kind in ("flat", "effective")
    for form, rule in {
        "khatri-rao": ("is_low_rank", lambda *case: case[-1] == 1),
        "with dW": ("is_low_rank", lambda *case: False),
    }.items()
]
CONVS = [*LOHA_CONVS, *LOKR_CONVS]


def among(cases):
    """Parametrise by these; where one has a choice, the fixture `case` of the test's file makes it."""
    return pytest.mark.parametrize("case", cases, ids=str, indirect=any(case.choice for case in cases))


def chosen(request, monkeypatch):
    """What that fixture does."""
    if request.param.choice:
        monkeypatch.setattr(*request.param.choice)
    return request.param


# Of linear layers.
both = among([KHATRI_RAO, SPLIT])
main_forms = among([KHATRI_RAO, TILED, SPLIT])
# How a LoHa runs changes neither its values nor its files.
every_shape = among([KHATRI_RAO, *LOKR_FORMS])
every_form = among(LINEAR)


# --- models -----------------------------------------------------------------------------------


def wrap(case, name="llama", model=None, **config):
    return pyadapt.wrap(build(name) if model is None else model, case.config(name, **config))


def pair(case, name="llama", model=None, base=None, **config):
    """Our wrapped model and peft's, on `base` where that is another, with the same values, in training mode."""
    model = build(name) if model is None else model
    base = copy.deepcopy(model) if base is None else base
    model = wrap(case, name, model, **config)
    twin = peft.get_peft_model(base, case.theirs(**case.options(name, **config)))
    copy_adapter_to_peft(model, twin)
    return model.train(), twin.train()


def small(case, features=(6, 10), dtype=torch.float32, **config):
    """One linear layer of so many output and input features."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(features[1], features[0])).to(dtype)
    return pyadapt.wrap(model, case.config(**config))


CLASSES = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
SIZES = {1: (11,), 2: (9, 7), 3: (5, 6, 4)}


def net(dims, dtype=torch.float32, **layer):
    """One convolution in so many dimensions."""
    torch.manual_seed(0)
    return nn.Sequential(CLASSES[dims](8, 12, **{"kernel_size": 3, **layer})).to(dtype).eval()


def data(dims, dtype=torch.float32, rows=2):
    """What it takes."""
    return torch.randn(rows, 8, *SIZES[dims], dtype=dtype, generator=torch.Generator().manual_seed(3))


def wrapped(case, dims=2, dtype=torch.float32, config=(), **layer):
    return pyadapt.wrap(net(dims, dtype, **layer), case.config(**dict(config)))


def twin_of(case, model, dims=2, **layer):
    twin = peft.get_peft_model(net(dims, **layer), case.theirs(**case.options()))
    copy_adapter_to_peft(model, twin)
    return twin.train(model.training)


# --- by the definition ------------------------------------------------------------------------


def delta(layer, name="default", values=None):
    """dW as a linear layer or a convolution has its weight; in fp64, or of other values that autograd follows."""
    unit = layer.unit(name)
    values = {key: value.detach().double() for key, value in unit.named_parameters()} if values is None else values
    kernel = layer.weight.shape[2:]
    dW = hadamard(values) if "hada_w1_a" in values else kronecker(values, math.prod(kernel))
    return unit.scaling * dW.reshape(len(dW), -1, *kernel)


def hadamard(values):
    products = []
    for i in (1, 2):
        a, b, t = (values.get(f"hada_{name}") for name in (f"w{i}_a", f"w{i}_b", f"t{i}"))
        products.append(a @ b if t is None else torch.einsum("ijkl,io,jc->ockl", t, a, b).flatten(1))
    return products[0] * products[1]


def kronecker(values, places):
    w1 = values["lokr_w1"] if "lokr_w1" in values else values["lokr_w1_a"] @ values["lokr_w1_b"]
    if "lokr_w2" in values:
        w2 = values["lokr_w2"]
    elif "lokr_t2" in values:
        t2 = values["lokr_t2"].flatten(2)
        w2 = torch.einsum("ijs,iq,jk->qks", t2, values["lokr_w2_a"], values["lokr_w2_b"])
    else:
        w2 = values["lokr_w2_a"] @ values["lokr_w2_b"]
    w2 = w2.reshape(len(w2), -1, places)
    return torch.einsum("pi,qks->pqiks", w1, w2).reshape(len(w1) * len(w2), -1)


def exact(model, x, g=None, factors=None):
    """What one adapted layer gives for x in fp64, and where g is the gradient of that: of x, and of each factor.

    Args:
        model: a `Sequential` of the layer.
        x: its input.
        g: None for a random one, which `given` finds again.
        factors: what each output feature of the term is multiplied by.
    """
    unit = model[0].unit("default")
    values = {key: value.detach().double().requires_grad_() for key, value in unit.named_parameters()}
    dW = delta(model[0], values=values)
    if factors is not None:
        dW = dW * factors.double().view(-1, *(1 for _ in dW.shape[1:]))
    plain, x = pyadapt.unwrap(copy.deepcopy(model)).double(), x.detach().double().requires_grad_()
    y = torch.func.functional_call(plain, {"0.weight": plain[0].weight + dW}, (x,))
    g = given(y) if g is None else g.double()
    dx, *gradients = torch.autograd.grad(y, [x, *values.values()], g)
    return y.detach(), dx, dict(zip(values, gradients, strict=True))


def given(y: Tensor, seed: int = 6) -> Tensor:
    """A gradient for y that every dtype can hold."""
    return torch.randint(-8, 9, y.shape, generator=torch.Generator().manual_seed(seed)).to(y.dtype) / 8


# --- training ---------------------------------------------------------------------------------


def of_peft(own_name):
    """`...adapters.<name>.<factor>` -> `...<factor>.<name>`."""
    path, adapters, rest = own_name.partition(".adapters.")
    if adapters:
        name, _, factor = rest.partition(".")
        return f"base_model.model.{path}.{factor}.{name}"
    path, _, rest = own_name.partition(".copies.")
    return f"base_model.model.{path}.modules_to_save.{rest}"


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def train(model, name="llama", seeds=range(4), rate=1e-2):
    """The loss before each step of AdamW, on the batches of these seeds."""
    optimizer, losses = torch.optim.AdamW(trained(model).values(), lr=rate), []
    for seed in seeds:
        loss = model(**model_batch(name, seed)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


def assert_gradients_are_those_of_peft(model, twin, name="llama", dtype=None):
    model(**model_batch(name)).loss.backward()
    twin(**model_batch(name)).loss.backward()
    theirs = trained(twin)
    assert len(theirs) == len(trained(model)) > 0
    for key, parameter in trained(model).items():
        assert_near(parameter.grad, theirs[of_peft(key)].grad, "gradient", dtype)


def logits(model, name="llama"):
    with torch.no_grad():
        return model(**model_batch(name)).logits


def kept_beside(model, x, *known):
    """Bytes that autograd keeps of a call of one layer besides x, the factors and what is known."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    assert x.data_ptr() in storages
    places = {tensor.data_ptr() for tensor in (x, *known, *model[0].unit("default").parameters())}
    return sum(size for place, size in storages.items() if place not in places)
