"""The weights that a quantised model was made from, read from their checkpoint."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .base import BaseWeight
from .files import AdapterFileError, Path
from .integrations.transformers import is_transformers_model
from .surgery import original_class


class OriginalWeights:
    """The checkpoint of a model from before it was quantised.

    A weight is read alone where the checkpoint has it under its present name. Where it does not, because transformers
    renames or joins weights as it loads them, the whole checkpoint is loaded once by transformers itself.

    Args:
        path: a safetensors file, or a folder with `model.safetensors` or an index of shards.
        model: the quantised model.

    Raises:
        AdapterFileError: no such files, or (on reading) no such weight.
    """

    def __init__(self, path: Path, model: nn.Module) -> None:
        from safetensors import SafetensorError, safe_open

        self._path, self._model = os.fspath(path), model
        files = [self._path] if os.path.isfile(self._path) else sorted(_safetensors_in(self._path))
        if not files:
            raise AdapterFileError(f"{self._path} holds no safetensors files to take the original weights from")
        self._where: dict[str, Any] = {}
        self._loaded: nn.Module | None = None
        for file in files:
            try:
                handle = safe_open(file, framework="pt")
            except SafetensorError as error:
                raise AdapterFileError(f"{file} is damaged or of another format: {error}") from error
            self._where.update(dict.fromkeys(list(handle.keys()), handle))

    def read(self, layer_path: str, plain_shape: torch.Size) -> Tensor:
        """The weight of the layer at `layer_path`, in the orientation of its class."""
        key = f"{layer_path}.weight"
        # Checkpoints of a bare base model leave its prefix out.
        prefix = getattr(self._model, "base_model_prefix", "") + "."
        found = next((name for name in (key, key.removeprefix(prefix), prefix + key) if name in self._where), None)
        tensor = self._where[found].get_tensor(found) if found is not None else self._read_loaded(layer_path)
        if tensor.shape != plain_shape:
            raise AdapterFileError(f"{self._path}: {key} is {tuple(tensor.shape)}, not {tuple(plain_shape)}")
        return tensor

    def matrix(self, layer_path: str, layer: nn.Module, base: type[BaseWeight]) -> Tensor:
        """The weight of `layer` as a new tensor of the shape of `base.matrix(layer)`, at least as wide as fp32."""
        n, k = base.shape(layer)
        transposed = base.plain_is_transposed(layer)
        plain = self.read(layer_path, torch.Size((k, n) if transposed else (n, k)))
        wide = torch.promote_types(base.dtype(layer), torch.float32)
        return (plain.t() if transposed else plain).to(wide, copy=True)

    def _read_loaded(self, layer_path: str) -> Tensor:
        if not is_transformers_model(self._model) or not os.path.isdir(self._path):
            raise AdapterFileError(f"{self._path} has no weight {layer_path}.weight")
        if self._loaded is None:
            config = copy.deepcopy(self._model.config)
            if hasattr(config, "quantization_config"):
                del config.quantization_config
            load: Any = original_class(self._model)
            # A head of another size in the checkpoint is no obstacle: it is not read.
            self._loaded, info = load.from_pretrained(
                self._path, config=config, ignore_mismatched_sizes=True, output_loading_info=True
            )
            self._missing = set(info["missing_keys"])
        assert self._loaded is not None
        if f"{layer_path}.weight" in self._missing:
            raise AdapterFileError(f"{self._path} has no weight {layer_path}.weight")
        return self._loaded.get_parameter(f"{layer_path}.weight").detach()


def _safetensors_in(folder: str) -> Iterator[str]:
    if os.path.isdir(folder):
        for name in os.listdir(folder):
            if name.endswith(".safetensors") and not name.startswith("adapter_"):
                yield os.path.join(folder, name)
