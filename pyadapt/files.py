"""Reading and writing files so that a crash never leaves half of one, and a bad one never crashes the reader."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

ADAPTER_WEIGHTS_FILE = "adapter_model.safetensors"
ADAPTER_PICKLE_FILE = "adapter_model.bin"

Path = str | os.PathLike[str]


class AdapterFileError(ValueError):
    """A file of an adapter or a checkpoint is missing, damaged, or belongs to something else."""


def write_atomically(path: Path, write: Callable[[str], None]) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in its place in one step."""
    folder = os.path.dirname(os.path.abspath(path))
    handle, temporary = tempfile.mkstemp(prefix=f".{os.path.basename(path)}.", dir=folder)
    os.close(handle)
    try:
        write(temporary)
        # mkstemp makes files that only their owner can read; a shared checkpoint should follow the umask.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""

    def write(temporary: str) -> None:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)

    write_atomically(path, write)


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as PEFT and transformers do: safetensors, sorted, marked `{"format": "pt"}`."""
    from safetensors.torch import save_file

    # Copies where two names share memory or a tensor has gaps, which the format cannot hold.
    ready: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key in sorted(tensors):
        tensor = tensors[key].detach().cpu()
        shared = tensor.data_ptr() in seen and tensor.numel() > 0
        seen.add(tensor.data_ptr())
        ready[key] = tensor.clone() if shared else tensor.contiguous()
    write_atomically(path, lambda temporary: save_file(ready, temporary, metadata={"format": "pt"}))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a `.safetensors` file, or a `.bin` one with pickles confined to tensors.

    Raises:
        AdapterFileError: the file is missing, truncated, or of another format.
    """
    name = os.fspath(path)
    if not os.path.isfile(name):
        raise AdapterFileError(f"there is no file {name}")
    try:
        if name.endswith(".bin"):
            import torch

            return _only_tensors(torch.load(name, map_location="cpu", weights_only=True))
        from safetensors.torch import load_file

        return load_file(name)
    except Exception as error:
        raise AdapterFileError(f"{name} is damaged or of another format: {error}") from error


def _only_tensors(content: Any) -> dict[str, Tensor]:
    """`content` if it is a state dict, which a pickle need not be."""
    if not isinstance(content, dict):
        raise TypeError(f"it holds a {type(content).__name__}, not a dict of tensors")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise TypeError(f"it holds a {type(value).__name__} under {key!r}, not a tensor under a name")
    return content


def adapter_weights_path(folder: Path) -> str:
    """The weights file of an adapter folder: safetensors, else the older pickle."""
    names = (ADAPTER_WEIGHTS_FILE, ADAPTER_PICKLE_FILE)
    found = [name for name in names if os.path.isfile(os.path.join(folder, name))]
    if not found:
        raise AdapterFileError(f"{os.fspath(folder)} holds neither {names[0]} nor {names[1]}")
    return os.path.join(folder, found[0])


def single_weights_file(path: Path) -> str | None:
    """The file of an adapter that has no configuration beside it: `path`, or the one such file in the folder `path`.

    Returns:
        None for a folder with a configuration, and for what is not here.

    Raises:
        AdapterFileError: a folder without a configuration holds several files, or none.
    """
    name = os.fspath(path)
    if os.path.isfile(name):
        return name
    if not os.path.isdir(name) or os.path.isfile(os.path.join(name, "adapter_config.json")):
        return None
    found = sorted(file for file in os.listdir(name) if file.endswith(".safetensors"))
    if len(found) > 1:
        raise AdapterFileError(
            f"{name} has no adapter_config.json and {len(found)} files: name one ({', '.join(found)})"
        )
    return os.path.join(name, found[0]) if found else None


def resolve_adapter_folder(path: Path, **hub: Any) -> str:
    """A local folder that holds `adapter_config.json`: `path` itself, or a download of the hub repository of that name.

    Args:
        path: a folder, or `owner/name` on the hub.
        hub: passed to `huggingface_hub.snapshot_download` (`revision`, `token`, `cache_dir`, ...).
    """
    name = os.fspath(path)
    config = os.path.join(name, "adapter_config.json")
    if os.path.isfile(config):
        return name
    if os.path.isdir(name):
        raise AdapterFileError(f"{name} is no adapter folder: it has no adapter_config.json")
    looks_like_a_hub_name = name.count("/") <= 1 and not name.startswith((".", "~", os.sep))
    if not looks_like_a_hub_name:
        raise AdapterFileError(f"there is no folder {name}")
    try:
        from huggingface_hub import snapshot_download

        patterns = ["adapter_config.json", ADAPTER_WEIGHTS_FILE, ADAPTER_PICKLE_FILE]
        return snapshot_download(name, allow_patterns=patterns, **hub)
    except ImportError:
        raise AdapterFileError(f'there is no folder {name}; to look on the hub, pip install "pyadapt[hub]"') from None
    except Exception as error:
        raise AdapterFileError(f"there is no folder {name}, and the hub gave no such adapter: {error}") from error
