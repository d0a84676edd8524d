"""Gradients of an adapter under the keys of its file, ours and peft's, so that every one of them is compared."""

from __future__ import annotations

from typing import Any

from tolerance import assert_close
from torch import Tensor

from pyadapt.checkpoint import _places


def our_gradients(model: Any, name: str = "default") -> dict[str, Tensor]:
    """File key -> gradient of each trained parameter."""
    return {key: place.grad for key, place in _places(model, name)}


def peft_gradients(twin: Any, name: str = "default") -> dict[str, Tensor]:
    """The same of a `PeftModel`."""
    found = {}
    others = set(twin.peft_config) - {name}
    for key, parameter in twin.named_parameters():
        if parameter.requires_grad and not others.intersection(key.split(".")):
            key = key.replace(f".modules_to_save.{name}", "").replace(f".{name}", "")
            found[key.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")] = parameter.grad
    return found


# A softmax does not see the bias of its keys: parts of its gradient that cancel to nothing.
CANCELLING = ("key.bias", "k_proj.bias")


def assert_gradients_equal(model: Any, twin: Any, name: str = "default") -> None:
    """Every trained parameter of one is one of the other, with the same gradient."""
    ours, theirs = our_gradients(model, name), peft_gradients(twin, name)
    assert sorted(ours) == sorted(theirs)
    largest = max(theirs.values(), key=lambda gradient: gradient.abs().max())
    for key, gradient in theirs.items():
        part = largest if key.endswith(CANCELLING) else None
        assert_close(ours[key], gradient, "gradient", gradient.dtype, key, part)
