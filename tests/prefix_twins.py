"""A model with a prefix, ours and peft's, of the same weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from prefix_cases import CASES
from torch import Tensor, nn

import pyadapt
from pyadapt.methods.prefix import PrefixTuningConfig

N = 4
# The attributes of ours by peft's names of the same parameters, with and without the MLP.
MLP = {
    "embedding.weight": "embedding",
    "transform.0.weight": "hidden_weight",
    "transform.0.bias": "hidden_bias",
    "transform.2.weight": "output_weight",
    "transform.2.bias": "output_bias",
}
PLAIN = {"embedding.weight": "prefix"}


def prefixed(name: str, model: nn.Module | None = None, seed: int = 0, **config: Any) -> Any:
    """The case's model with a prefix of `N` tokens, in evaluation mode."""
    case = CASES[name]
    model = case.make() if model is None else model
    torch.manual_seed(seed)
    options = {"task_type": case.task, "num_virtual_tokens": N, **config}
    return pyadapt.wrap(model, PrefixTuningConfig(**options)).eval()


def twins(name: str, implementation: str | None = None, **config: Any) -> tuple[Any, Any]:
    """Ours and peft's, with the same prefix, in evaluation mode."""
    import peft

    case = CASES[name]
    plain = case.make(attn_implementation=implementation or case.implementations[0])
    ours = prefixed(name, copy.deepcopy(plain), **config)
    options = {"task_type": case.task, "num_virtual_tokens": N, **config}
    theirs = peft.get_peft_model(plain, peft.PrefixTuningConfig(**options)).eval()
    values = weights(ours)
    with torch.no_grad():
        for key, parameter in peft_weights(theirs).items():
            parameter.copy_(values[key])
    return ours, theirs


def weights(model: Any, name: str = "default") -> dict[str, nn.Parameter]:
    """What is trained of our prefix, and of modules that are trained whole, by peft's names."""
    found = {}
    names = {attribute: key for form in (MLP, PLAIN) for key, attribute in form.items()}
    for path, parameter in model.named_parameters():
        _, unit, attribute = path.partition(f".adapters.{name}.")
        module, copied, rest = path.partition(f".copies.{name}.")
        if unit:
            found[names[attribute]] = parameter
        elif copied:
            found[f"{module}.{rest}"] = parameter
    return found


def peft_weights(model: Any, name: str = "default") -> dict[str, nn.Parameter]:
    """The same of a `PeftModel`."""
    found = dict(model.prompt_encoder[name].named_parameters())
    for path, parameter in model.base_model.named_parameters():
        module, copied, rest = path.partition(f".modules_to_save.{name}.")
        if copied:
            found[f"{module}.{rest}"] = parameter
    return found


def gradients(found: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Gradient of each parameter; all must have one."""
    return {key: parameter.grad.clone() for key, parameter in found.items()}  # type: ignore[union-attr]
