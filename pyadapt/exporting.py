"""Writing a merged model as a plain checkpoint that needs no pyadapt."""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from typing import Any

from torch import Tensor, nn

from .biases import biased_modules, check_biases_finite, is_bias_copy
from .files import Path, write_safetensors
from .integrations.transformers import forget_quantization, is_transformers_model
from .layer import AdaptedLayer, SavedModule, base_modules
from .merging import MergeReport, merged_weights
from .model import forget_adapters, is_wrapped
from .surgery import original_class
from .untying import TiedMerge, say_untied


def export(model: nn.Module, path: Path, original: Path | None = None, **save_options: Any) -> MergeReport:
    """Write `model` with its active adapters folded in; the model itself stays as it is.

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
        RuntimeError: adapters are merged in place at the moment.
    """
    if os.path.isfile(path):
        raise ValueError(f"{os.fspath(path)} is a file; a folder is needed")
    names: list[str] = []
    if is_wrapped(model):
        if model.adapter_state.merged:
            raise RuntimeError(
                "adapters are merged in place: unmerge_adapter() first, so that they are not folded in twice"
            )
        names = list(model.adapter_state.active)
    report = MergeReport()
    ties = TiedMerge(model, names)
    tensors = _plain_state_dict(model, names, original, report, ties)
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
    return report


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
        for name in merged.base.state_names(merged.layer):
            del tensors[f"{merged.path}.{name}"]
        tensors.update({f"{merged.path}.{name}": value for name, value in merged.plain().items()})
        leader = ties.follows(merged.path)
        if leader is not None:
            names_of_weight = merged.base.state_names(merged.layer)
            tensors.update({f"{merged.path}.{name}": tensors[f"{leader}.{name}"] for name in names_of_weight})
    for path, module in base_modules(model):
        if isinstance(module, SavedModule):
            live = module.copy_among(names)
            if live is not None:
                tensors.update({f"{path}.{key}": value for key, value in module.copies[live].state_dict().items()})
    return tensors


def _plain_twin(model: nn.Module) -> Any:
    """The model's outer object once more, with its original class and a plain config: for its save method only."""
    twin = copy.copy(model)
    twin.__class__ = original_class(model)
    forget_adapters(twin)
    twin.config = copy.deepcopy(model.config)
    forget_quantization(twin)
    return twin
