"""Which module of a model a key of kohya's or LyCORIS' files means: a prefix, then the module's path, "_" for "."."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from ..base import base_of
from ..layer import base_modules

# What stands before a module's name, by what is adapted: the denoiser, its text encoders (SDXL has two, SD3 three), and
# any module at all, as LyCORIS' own wrapper writes it.
PREFIXES = ("lora_unet", "lora_te", "lora_te1", "lora_te2", "lora_te3", "lycoris")

# transformers 5 has taken a level out of CLIPTextModel; files are older than that.
_CLIP_LEVEL = "text_model_"

# Inside a block of a UNet: diffusers' names and the original ones.
_RESNET = {
    "norm1": "in_layers_0", "conv1": "in_layers_2", "time_emb_proj": "emb_layers_1",
    "norm2": "out_layers_0", "conv2": "out_layers_3", "conv_shortcut": "skip_connection",
}  # fmt: skip
# Outside the blocks.
_AROUND = {
    "conv_in": "input_blocks_0_0",
    "conv_norm_out": "out_0", "conv_out": "out_2",
    "time_embedding.linear_1": "time_embed_0", "time_embedding.linear_2": "time_embed_2",
    "add_embedding.linear_1": "label_emb_0_0", "add_embedding.linear_2": "label_emb_0_2",
}  # fmt: skip
_IN_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
_IN_MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")


class Key(NamedTuple):
    """A key of a file, taken apart."""

    prefix: str
    name: str
    suffix: str


def split(key: str, prefixes: tuple[str, ...] = PREFIXES) -> Key | None:
    """`<prefix>_<name>.<suffix>` as its parts; None for a key of another form."""
    module, dot, suffix = key.partition(".")
    for prefix in prefixes:
        if dot and module.startswith(f"{prefix}_"):
            return Key(prefix, module[len(prefix) + 1 :], suffix)
    return None


def paths_by_name(model: nn.Module) -> dict[str, list[str]]:
    """Name in a file -> paths of the modules that it can mean; those with a weight to adapt where there are any."""
    modules = {path: module for path, module in base_modules(model) if path}
    own, other = defaultdict(list), defaultdict(list)
    for path in modules:
        own[path.replace(".", "_")].append(path)
        for name in _other_names(path):
            other[name].append(path)
    for path, name in _original_names(modules):
        other[name].append(path)
    found = {**other, **own}
    return {name: [path for path in paths if base_of(modules[path])] or paths for name, paths in found.items()}


def _other_names(path: str) -> Iterator[str]:
    name = path.replace(".", "_")
    yield _CLIP_LEVEL + name
    if name.startswith(_CLIP_LEVEL):
        yield name.removeprefix(_CLIP_LEVEL)


def _original_names(modules: dict[str, nn.Module]) -> Iterator[tuple[str, str]]:
    """(path, name) of the layers of diffusers' UNet, which the original code numbers in one row of blocks.

    The row going down begins with the first convolution; a block's resnets follow each with its attention, then what
    halves the size. The row going up has each resnet with its attention, and what doubles the size in the last of them.
    """
    resnets: dict[str, int] = defaultdict(int)
    for path in modules:
        if re.fullmatch(r"(down|up)_blocks\.\d+\.resnets\.\d+", path):
            resnets[path.rpartition(".resnets")[0]] += 1

    def first(side: str, block: int) -> int:
        before = [resnets[f"{side}_blocks.{i}"] for i in range(block)]
        return 1 + sum(count + 1 for count in before) if side == "down" else sum(before)

    for path in modules:
        block, middle = _IN_BLOCK.fullmatch(path), _IN_MIDDLE.fullmatch(path)
        if path in _AROUND:
            yield path, _AROUND[path]
        elif middle:
            kind, i, rest = middle.groups()
            position = 1 if kind == "attentions" else 2 * int(i)
            yield path, f"middle_block_{position}_{_inner(kind, rest)}"
        elif block:
            side, number, kind, i, rest = block.groups()
            start, count = first(side, int(number)), resnets[f"{side}_blocks.{number}"]
            if kind == "downsamplers":
                yield path, f"input_blocks_{start + count}_0_{'op' if rest == 'conv' else _inner(kind, rest)}"
            elif kind == "upsamplers":
                place = 2 if f"{side}_blocks.{number}.attentions" in modules else 1
                yield path, f"output_blocks_{start + count - 1}_{place}_{_inner(kind, rest)}"
            else:
                row, place = "input" if side == "down" else "output", int(kind == "attentions")
                yield path, f"{row}_blocks_{start + int(i)}_{place}_{_inner(kind, rest)}"


def _inner(kind: str, rest: str) -> str:
    return _RESNET.get(rest, rest) if kind == "resnets" else rest.replace(".", "_")
