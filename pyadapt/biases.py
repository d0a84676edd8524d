"""Training the biases that a model has already: `bias="lora_only"` (of the adapted layers) and `bias="all"`.

The adapter owns a trained copy of each bias; the model's own biases stay as they are:

    layer.own_bias             the module's own bias, frozen; `bias` in state dicts, as before (but for FSDP1's)
    layer.bias_of_default      the copy of the adapter "default"
    layer.bias                 whichever of them answers

All of them are parameters of the module that reads them, so `.to(device)`, deepcopy, pickling and every engine that
gathers a module's parameters for its forward find them there. `bias` itself is a property, as any class of module may
read its bias, or another module's; no parameter bears that name, since engines take the attribute of a parameter's name
for the parameter. Where several adapters with a copy are at work, the copy of the first answers, as with modules that
are trained whole. PEFT trains the model's own biases in place and allows one such adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .distributed.sharding import goes_by_attribute, whole
from .layer import AdaptedLayer, SavedModule, base_modules
from .surgery import adopt, release

OWN, COPY = "own_bias", "bias_of_"


class TrainedBias(nn.Module):
    """Mixin of a module whose bias some adapter trains.

    Attributes:
        own_bias: the module's own bias.
        live_bias: name of the attribute that answers as `bias` in its place, or None.
    """

    own_bias: nn.Parameter
    live_bias: str | None = None

    @property
    def bias(self) -> Tensor:
        """The bias at work."""
        return getattr(self, self.live_bias or OWN)

    def copy_among(self, names: Sequence[str]) -> str | None:
        """The attribute that holds the copy of the first of the adapters `names` that has one."""
        return next((COPY + name for name in names if COPY + name in self._parameters), None)

    def bias_among(self, names: Sequence[str]) -> Tensor:
        """The bias that answers when the adapters `names` are at work."""
        return getattr(self, self.copy_among(names) or OWN)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if goes_by_attribute(self._parameters[OWN]):
            super()._save_to_state_dict(destination, prefix, keep_vars)
            return
        own: dict[str, Any] = {}
        super()._save_to_state_dict(own, prefix, keep_vars)
        destination.update({f"{prefix}bias" if key == prefix + OWN else key: value for key, value in own.items()})

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str], *rest: Any
    ) -> None:
        if f"{prefix}bias" in state_dict:
            state_dict[prefix + OWN] = state_dict.pop(f"{prefix}bias")
        missing: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, *rest)
        missing_keys += [f"{prefix}bias" if key == prefix + OWN else key for key in missing]


def plan_biases(config: Any, model: nn.Module, adapted: Sequence[str], saved: Sequence[str]) -> list[str]:
    """Paths of the modules whose bias `config` trains.

    Args:
        config: a configuration; one without a `bias` trains none.
        model: the model.
        adapted: paths of the layers that get an adapter.
        saved: paths of the modules that are trained whole, with the biases in them.

    Raises:
        RuntimeError: a bias is offloaded, so that there are no values to copy.
    """
    wanted = getattr(config, "bias", "none")
    if wanted == "none":
        return []
    paths = []
    for path, module in base_modules(model):
        of_saved = any(path == outer or path.startswith(outer + ".") for outer in saved)
        if of_saved or not (wanted == "all" or path in adapted) or not _has_bias(module):
            continue
        if "_hf_hook" in module.__dict__ and own_bias(module).is_meta:
            raise RuntimeError(
                f"bias={wanted!r}: the bias of {path} is offloaded and at hand during its forward only; load the model "
                "without offloading to the CPU or the disk"
            )
        paths.append(path)
    return paths


def copy_biases(model: nn.Module, paths: Sequence[str]) -> list[tuple[nn.Module, nn.Parameter]]:
    """Each module at `paths` with a trainable copy of its bias; modules that share a bias share the copy."""
    copies: dict[int, nn.Parameter] = {}
    made = []
    for module in map(model.get_submodule, paths):
        own = own_bias(module)
        if id(own) not in copies:
            with whole(module, [module]):
                copies[id(own)] = nn.Parameter(own_bias(module).detach().clone())
        made.append((module, copies[id(own)]))
    return made


def add_bias(module: nn.Module, name: str, copy: nn.Parameter) -> None:
    """Let `copy` answer as the bias of `module` when the adapter called `name` is at work."""
    if not isinstance(module, TrainedBias):
        _rename_parameter(module, "bias", OWN)
        module = adopt(module, TrainedBias)
    module.register_parameter(COPY + name, copy)


def remove_biases(root: nn.Module, name: str | None = None) -> None:
    """Take the copies of the adapter `name` (of all adapters) off the modules in `root`."""
    for _, module in list(biased_modules(root)):
        copies = [key for key in module._parameters if key.startswith(COPY)]
        removed = [key for key in copies if name is None or key == COPY + name]
        for attribute in removed:
            if module.live_bias == attribute:
                module.live_bias = None
            delattr(module, attribute)
        if removed == copies:
            module.__dict__.pop("live_bias", None)
            release(module, TrainedBias)
            _rename_parameter(module, OWN, "bias")


def rename_biases(model: nn.Module, old: str, new: str) -> None:
    """Let the copies of the adapter `old` be those of `new`."""
    for _, module in biased_modules(model):
        if COPY + old in module._parameters:
            _rename_parameter(module, COPY + old, COPY + new)
            if module.live_bias == COPY + old:
                module.live_bias = COPY + new


def choose_biases(model: nn.Module, names: Sequence[str]) -> None:
    """Let the copies of the adapters `names` answer, where they have one and it is not merged."""
    for _, module in biased_modules(model):
        folded = isinstance(module, AdaptedLayer) and "bias" in (module.unmerged or {})
        module.live_bias = None if folded else module.copy_among(names)


def take_over_biases(model: nn.Module, names: Sequence[str]) -> None:
    """Write the copies that answer when `names` are at work into the modules' own biases."""
    with torch.no_grad():
        for _, module in biased_modules(model):
            module.own_bias.copy_(module.bias_among(names))


def check_biases_finite(model: nn.Module, names: Sequence[str]) -> None:
    """Refuse a NaN or an infinity in a copy that answers when `names` are at work."""
    for path, module in biased_modules(model):
        if not bool(torch.isfinite(module.bias_among(names)).all()):
            raise ValueError(
                f"merging would put a NaN or an infinity into the bias of {path}; the model is unchanged. "
                "Look for a NaN in the adapter's weights"
            )


def biased_modules(root: nn.Module) -> list[tuple[str, TrainedBias]]:
    """(path, module) of each module whose bias some adapter trains."""
    return [(path, module) for path, module in base_modules(root) if isinstance(module, TrainedBias)]


def own_bias(layer: nn.Module) -> Tensor:
    """The bias that `layer` has itself, whatever answers at the moment."""
    return layer.get_parameter(OWN if isinstance(layer, TrainedBias) else "bias")


def bias_among(layer: nn.Module, names: Sequence[str]) -> Tensor | None:
    """The bias of `layer` when the adapters `names` are at work; None where it has none."""
    if isinstance(layer, TrainedBias):
        return layer.bias_among(names)
    return getattr(layer, "bias", None)


def is_bias_copy(key: str) -> bool:
    """Whether a name in a state dict is that of a copy."""
    return key.rpartition(".")[2].startswith(COPY)


def _has_bias(module: nn.Module) -> bool:
    has_one = isinstance(module, TrainedBias) or module._parameters.get("bias") is not None
    return has_one and not isinstance(module, SavedModule)


def _rename_parameter(module: nn.Module, old: str, new: str) -> None:
    """Register a parameter under another name, in its place among the others."""
    parameters = [(new if name == old else name, value) for name, value in module._parameters.items()]
    module._parameters.clear()
    module._parameters.update(parameters)
