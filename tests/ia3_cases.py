"""Models with an IA3 adapter of ours and of peft, for the tests of IA3."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import peft
import torch
from models import FAMILIES, assert_near, build, copy_adapter_to_peft
from torch import nn

import pyadapt
from pyadapt import IA3Config


def quietly(function: Any, *args: Any, **options: Any) -> Any:
    """Call peft without what it says of each Conv1D, and of base models that have no config file."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        warnings.filterwarnings("ignore", message="Could not find a config file in")
        return function(*args, **options)


def randomise(model: Any, name: str = "default", seed: int = 0) -> None:
    """Give the factors of an adapter values around 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith(f"adapters.{name}.ia3_l"):
                parameter.copy_(1 + 0.4 * torch.randn(parameter.shape, generator=generator))


def options_of(name: str, **options: Any) -> dict[str, Any]:
    """Options for either library; targets outright where peft's tables have none for the family."""
    found: dict[str, Any] = {"task_type": FAMILIES[name].task}
    if name in ("vit", "olmo"):
        last = {"vit": "fc2", "olmo": "down_proj"}[name]
        found |= {"target_modules": ["k_proj", "v_proj", last], "feedforward_modules": [last]}
    return found | options


def wrapped(name: str, model: Any = None, seed: int = 0, **options: Any) -> Any:
    """A wrapped model whose factors are not ones."""
    model = pyadapt.wrap(build(name) if model is None else model, IA3Config(**options_of(name, **options)))
    randomise(model, seed=seed)
    return model


def twin_of(model: Any, base: nn.Module, adapter: str = "default", **options: Any) -> Any:
    """peft's adapter with the same values on a copy of the plain `base`."""
    twin = quietly(peft.get_peft_model, copy.deepcopy(base), peft.IA3Config(**options), adapter)
    copy_adapter_to_peft(model, twin, adapter)
    return twin.train(model.training)


def pair(name: str, base: Any = None, twin_base: Any = None, **options: Any) -> tuple[Any, Any]:
    """Our wrapped model and peft's, with the same weights everywhere, in training mode."""
    base = build(name) if base is None else base
    twin_base = copy.deepcopy(base if twin_base is None else twin_base)
    model = wrapped(name, base, **options)
    return model.train(), twin_of(model, twin_base, **options_of(name, **options)).train()


def key_of(own_name: str) -> str:
    """peft's parameter name for one of ours."""
    path, marker, rest = own_name.partition(".adapters.")
    if marker:
        adapter, _, attribute = rest.partition(".")
        return f"base_model.model.{path}.{attribute}.{adapter}"
    path, _, rest = own_name.partition(".copies.")
    return f"base_model.model.{path}.modules_to_save.{rest}"


def assert_gradients_equal(model: Any, twin: Any, batch: dict[str, Any], dtype: Any = None) -> None:
    """One step of either: the gradients of all that is trained."""
    model(**batch).loss.backward()
    twin(**batch).loss.backward()
    theirs = dict(twin.named_parameters())
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(names) == sum(parameter.requires_grad for parameter in theirs.values())
    for name in names:
        assert_near(model.get_parameter(name).grad, theirs[key_of(name)].grad, "gradient", dtype)


def train(model: Any, batches: list[dict[str, Any]]) -> torch.Tensor:
    """The loss before each step of AdamW."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)
