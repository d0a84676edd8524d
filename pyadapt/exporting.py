"""Writing a merged model as a plain checkpoint that needs no pyadapt."""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from typing import Any

import torch
from torch import Tensor, nn

from .biases import TrainedBias, biased_modules, check_biases_finite, is_bias_copy
from .distributed import agreement
from .distributed.sharding import Sharding, sharding_of
from .files import Path, write_safetensors
from .integrations.transformers import forget_quantization, is_transformers_model
from .layer import AdaptedLayer, SavedModule, base_modules, unwrapped
from .merged import MergedLayer, MergeReport
from .merging import merged_weights
from .model import forget_adapters, is_wrapped
from .surgery import original_of
from .untying import TiedMerge, say_untied


def export(model: nn.Module, path: Path, original: Path | None = None, **save_options: Any) -> MergeReport:
    """Write `model` with its active adapters folded in; the model itself stays as it is.

    Where an engine has sharded the model, every rank has to call: one layer after the other is gathered (FSDP1: the
    unit that it is in), and the first rank, which holds the result in the memory of its CPU, writes it.

    A transformers model becomes a folder for its `from_pretrained`, any other module a `model.safetensors` with
    the keys that it had before wrapping. Layers over int8 are written dense, in the dtype they had.

    Args:
        model: a wrapped or a quantised model.
        path: the folder to write; existing files of the same names are replaced, each in one step.
        original: checkpoint of the model from before it was quantised, to merge into in place of dequantised weights.
        save_options: passed to transformers' `save_pretrained` (`max_shard_size`, ...).

    Returns:
        Where the weights came from and how exact they are; `print(report)` says it in words.

    Raises:
        ValueError: a merged weight would not be finite, or `path` is a file; nothing was written.
        RankError: it was so, or writing failed, on another rank.
        RuntimeError: adapters are merged in place at the moment.
    """
    model = unwrapped(model)
    sharding = sharding_of(model)
    names: list[str] = []
    with agreement.together("exporting the model", among_ranks=sharding is not None):
        if os.path.isfile(path):
            raise ValueError(f"{os.fspath(path)} is a file; a folder is needed")
        if is_wrapped(model):
            if model.adapter_state.merged:
                raise RuntimeError(
                    "adapters are merged in place: unmerge_adapter() first, so that they are not folded in twice"
                )
            names = list(model.adapter_state.active)
    report = MergeReport()
    ties = TiedMerge(model, names)
    if sharding is None:
        _write(model, path, _plain_state_dict(model, names, original, report, ties), ties, save_options)
        return report
    agreement.agree("exporting the model", {"active adapters": names})
    tensors = _gathered_state_dict(model, sharding, names, original, report, ties)
    with agreement.together("writing the exported model"):
        if agreement.rank() == 0:
            _write(model, path, tensors, ties, save_options)
    return report


def _write(
    model: nn.Module, path: Path, tensors: dict[str, Tensor], ties: TiedMerge, save_options: dict[str, Any]
) -> None:
    """Write `tensors`, those of the plain model, and what a transformers model has beside them."""
    parent = os.path.dirname(os.path.abspath(path))
    os.makedirs(parent, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=parent) as staging:
        if is_transformers_model(model):
            twin = _plain_twin(model)
            if ties.unties:
                say_untied(twin.config)
            type(twin).save_pretrained(twin, staging, state_dict=tensors, **save_options)
        else:
            write_safetensors(os.path.join(staging, "model.safetensors"), tensors)
        os.makedirs(path, exist_ok=True)
        # Weights first: a reader that finds the configuration finds all that it names.
        for name in sorted(os.listdir(staging), key=lambda name: name.endswith(".json")):
            shutil.move(os.path.join(staging, name), os.path.join(path, name))


def _plain_state_dict(
    model: nn.Module, names: list[str], original: Path | None, report: MergeReport, ties: TiedMerge
) -> dict[str, Tensor]:
    """The state dict of the plain merged model, under the keys it had before wrapping."""
    # The keys of what adapters have added, beside the layers' own.
    added = tuple(
        f"{path}.{name}."
        for path, module in base_modules(model)
        if isinstance(module, (AdaptedLayer, SavedModule))
        for name in ("adapters", "copies")
    )
    tensors = {
        key: tensor for key, tensor in model.state_dict().items() if not key.startswith(added) and not is_bias_copy(key)
    }
    check_biases_finite(model, names)
    tensors.update({f"{path}.bias".lstrip("."): of.bias_among(names).detach() for path, of in biased_modules(model)})
    for merged in merged_weights(model, names, original, report):
        _put(merged, tensors, ties, merged.plain())
    for path, module in base_modules(model):
        if isinstance(module, SavedModule):
            live = module.copy_among(names)
            if live is not None:
                tensors.update({f"{path}.{key}": value for key, value in module.copies[live].state_dict().items()})
    return tensors


def _gathered_state_dict(
    model: nn.Module, sharding: Sharding, names: list[str], original: Path | None, report: MergeReport, ties: TiedMerge
) -> dict[str, Tensor]:
    """`_plain_state_dict` of a sharded model, on the CPU of the first rank; on the others without a tensor."""
    tensors: dict[str, Tensor] = {}
    copies: dict[Any, Tensor] = {}
    # Tied tensors stay one, by what is in their place before any is gathered.
    places = {module: _held_by(module) for module in model.modules()}

    def take(prefix: str, module: nn.Module) -> None:
        """Add the own tensors of a module."""
        held = places[module]
        if not held:
            return
        with sharding.whole([module]):
            own: dict[str, Tensor] = {}
            module._save_to_state_dict(own, prefix, keep_vars=False)
            if isinstance(module, TrainedBias):
                own[f"{prefix}bias"] = module.bias_among(names).detach()
            for key, value in own.items() if agreement.rank() == 0 else ():
                if not is_bias_copy(key):
                    shared = id(held.get(key.removeprefix(prefix)))
                    if shared not in copies or shared == id(None):
                        copies[shared] = _copied(value)
                    tensors[key] = copies[shared]

    _check_biases(model, sharding, names)
    for path, module in base_modules(model):
        take(f"{path}.".lstrip("."), module)
    for merged in merged_weights(model, names, original, report):
        if agreement.rank() == 0:
            _put(merged, tensors, ties, {name: _copied(value) for name, value in merged.plain().items()})
    for path, module in base_modules(model):
        live = module.copy_among(names) if isinstance(module, SavedModule) else None
        if live is not None and isinstance(module, SavedModule):
            for below, inner in base_modules(module.copies[live]):
                take(f"{path}.{below}.".replace("..", "."), inner)
    return tensors


def _held_by(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of a module by attribute; FSDP1 may have put plain ones into the place of parameters."""
    held = {**vars(module), **module._buffers, **module._parameters}
    return {name: value for name, value in held.items() if isinstance(value, Tensor)}


def _check_biases(model: nn.Module, sharding: Sharding, names: list[str]) -> None:
    for path, module in biased_modules(model):
        with sharding.whole([module]), agreement.together(f"merging the bias of {path}"):
            check_biases_finite(module, names)


def _put(merged: MergedLayer, tensors: dict[str, Tensor], ties: TiedMerge, plain: dict[str, Tensor]) -> None:
    """Put a merged layer into the place of what its weight was stored in."""
    for name in merged.base.state_names(merged.layer):
        del tensors[f"{merged.path}.{name}"]
    tensors.update({f"{merged.path}.{name}": value for name, value in plain.items()})
    leader = ties.follows(merged.path)
    if leader is not None:
        names_of_weight = merged.base.state_names(merged.layer)
        tensors.update({f"{merged.path}.{name}": tensors[f"{leader}.{name}"] for name in names_of_weight})


def _copied(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="cpu").copy_(tensor.detach())


def _plain_twin(model: nn.Module) -> Any:
    """The model's outer object once more, with its original class and a plain config: for its save method only."""
    sharding = sharding_of(model)
    cls: Any = original_of(type(model) if sharding is None else sharding.class_of(model))
    twin: Any = cls.__new__(cls)
    twin.__dict__.update(model.__dict__)
    forget_adapters(twin)
    twin.config = copy.deepcopy(model.config)
    forget_quantization(twin)
    return twin
