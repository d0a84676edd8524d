"""The weights that a quantised model was made from, read from their checkpoint one at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch
from torch import Tensor

from .files import AdapterFileError, Path


class OriginalWeights:
    """The checkpoint of a model from before it was quantised.

    Args:
        path: a safetensors file, or a folder with `model.safetensors` or an index of shards.
        prefix: the model's `base_model_prefix`, which checkpoints of the bare base model leave out.

    Raises:
        AdapterFileError: no such files, or (on reading) no such weight.
    """

    def __init__(self, path: Path, prefix: str = "") -> None:
        from safetensors import SafetensorError, safe_open

        name = os.fspath(path)
        files = [name] if os.path.isfile(name) else sorted(_safetensors_in(name))
        if not files:
            raise AdapterFileError(f"{name} holds no safetensors files to take the original weights from")
        self._path, self._prefix = name, prefix
        self._where = {}
        for file in files:
            try:
                handle = safe_open(file, framework="pt")
            except SafetensorError as error:
                raise AdapterFileError(f"{file} is damaged or of another format: {error}") from error
            self._where.update(dict.fromkeys(list(handle.keys()), handle))

    def read(self, layer_path: str, plain_shape: torch.Size) -> Tensor:
        """The weight of the layer at `layer_path`, in the orientation of its class."""
        key = f"{layer_path}.weight"
        names = [key, key.removeprefix(self._prefix + "."), f"{self._prefix}.{key}"]
        found = next((name for name in names if name in self._where), None)
        if found is None:
            raise AdapterFileError(f"{self._path} has no weight {key}")
        tensor = self._where[found].get_tensor(found)
        if tensor.shape != plain_shape:
            raise AdapterFileError(f"{self._path}: {found} is {tuple(tensor.shape)}, not {tuple(plain_shape)}")
        return tensor


def _safetensors_in(folder: str) -> Iterator[str]:
    if os.path.isdir(folder):
        for name in os.listdir(folder):
            if name.endswith(".safetensors") and not name.startswith("adapter_"):
                yield os.path.join(folder, name)
