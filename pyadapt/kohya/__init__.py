"""Reading the single files of kohya's trainer and of LyCORIS; docs/lycoris.md has the keys and what is refused.

    <prefix>_<path of the module, "_" for ".">.<key of the method>

A file may hold several models: a UNet and its text encoders, each under a prefix of its own. What comes out is a
configuration and tensors under the keys of a PEFT file, so that all that follows is the same as for one.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from ..base import base_of
from ..config import AdapterConfig
from ..layer import base_modules
from .names import PREFIXES, paths_by_name, split
from .reader import READERS, FileLayer, FileUnit, Reader, exactly, number, wide

__all__ = ["PREFIXES", "read"]

logger = logging.getLogger("pyadapt")

# Keys of methods that have no equivalent here -> what they are.
FOREIGN = {
    "diff": "a whole weight's difference (LyCORIS' full)",
    "diff_b": "a bias' difference (LyCORIS' full)",
    "w_norm": "a trained norm",
    "b_norm": "a trained norm",
    "oft_blocks": "OFT or BOFT",
    "a1.weight": "GLoRA",
    "lambda_layer": "T-LoRA",
}

# How many problems an error lists.
LISTED = 12


@dataclass
class Attempt:
    """What the keys of one prefix come to for a model.

    Attributes:
        prefix: the prefix.
        units: path -> what the file's layer comes to.
        readers: the methods of the layers.
        unknown: names that no module of the model has.
        problems: what else does not fit.
    """

    prefix: str
    units: dict[str, FileUnit] = field(default_factory=dict)
    readers: set[type[Reader]] = field(default_factory=set)
    unknown: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        """Whether every key has its place."""
        return not self.unknown and not self.problems


def read(
    model: nn.Module, tensors: Mapping[str, Tensor], before: str, prefix: str | None = None, strict: bool = True
) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """The configuration and tensors of a file, for `model`.

    Args:
        model: what the file is read for.
        tensors: the file's tensors by key.
        before: what stands before a layer's path in the keys of the result.
        prefix: the prefix of the keys to take; by default the one of `PREFIXES` whose keys fit the model.
        strict: refuse keys that mean nothing here; else they are left out.

    Raises:
        ValueError: the keys are of another form, no prefix or more than one fits, or tensors are missing, misshapen or
            of methods that have no equivalent here, all listed.
    """
    prefixes = PREFIXES if prefix is None else (prefix, *PREFIXES)
    groups, others = _grouped(tensors, prefixes)
    if not groups:
        raise ValueError(_no_form(tensors))
    if prefix is not None and prefix not in groups:
        raise ValueError(f"prefix={prefix!r}: the file's keys begin with {', '.join(sorted(groups))}")
    names = paths_by_name(model)
    wanted = groups if prefix is None else {prefix: groups[prefix]}
    chosen = _chosen([_attempt(key, layers, names, model) for key, layers in wanted.items()])
    others += [f"{chosen.prefix}_{name}" for name in chosen.unknown]
    if chosen.problems or (others and strict) or not chosen.units:
        raise ValueError(_told(chosen, others))
    if others:
        logger.warning("left out, as this model has no place for them: %s", _listed(others, ", "))
    aside = sorted(set(groups) - {chosen.prefix})
    if aside:
        logger.info("took the keys of %s and left those of %s aside", chosen.prefix, ", ".join(aside))
    (reader,) = chosen.readers
    config = reader.config(chosen.units, _targets(list(chosen.units), model))
    found = {
        f"{before}{path}.{suffix}": tensor.contiguous()
        for path, unit in chosen.units.items()
        for suffix, tensor in unit.tensors.items()
    }
    return config, found


def _grouped(
    tensors: Mapping[str, Tensor], prefixes: tuple[str, ...]
) -> tuple[dict[str, dict[str, dict[str, Tensor]]], list[str]]:
    """Prefix -> name of a module -> its tensors; and the keys of other forms."""
    groups: dict[str, dict[str, dict[str, Tensor]]] = defaultdict(lambda: defaultdict(dict))
    others = []
    for key, tensor in tensors.items():
        parts = split(key, prefixes)
        if parts is None:
            others.append(key)
        else:
            groups[parts.prefix][parts.name][parts.suffix] = tensor
    return groups, others


def _attempt(
    prefix: str, layers: Mapping[str, dict[str, Tensor]], names: Mapping[str, list[str]], model: nn.Module
) -> Attempt:
    # The readers lie beside their methods.
    from .. import methods  # noqa: F401

    attempt = Attempt(prefix)
    for name, tensors in layers.items():
        paths = names.get(name)
        if paths is None:
            attempt.unknown.append(name)
            continue
        try:
            if len(paths) > 1:
                raise ValueError(f"{' and '.join(paths)} are written alike")
            reader = _reader(tensors)
            layer = model.get_submodule(paths[0])
            base = base_of(layer)
            if base is None or base.form not in ("linear", "conv"):
                raise ValueError(f"{paths[0]} is a {type(layer).__name__}, which such adapters are not put on")
            unit = reader.read(FileLayer(paths[0], layer, base, _with_scalar(tensors, reader)))
        except ValueError as error:
            attempt.problems.append(f"{prefix}_{name}: {error}")
            continue
        attempt.units[paths[0]] = unit
        attempt.readers.add(reader)
    if len(attempt.readers) > 1:
        kinds = ", ".join(sorted(reader.config_class.peft_type for reader in attempt.readers))
        attempt.problems.append(f"layers of several methods ({kinds}); one adapter is of one method")
    return attempt


def _reader(tensors: Mapping[str, Tensor]) -> type[Reader]:
    """The reader of the method whose tensors these are."""
    for key, kind in FOREIGN.items():
        if key in tensors:
            raise ValueError(f"{key} is {kind}, which has no equivalent here")
    found = [reader for reader in READERS if reader.marks & tensors.keys()]
    unknown = sorted(tensors.keys() - found[0].keys) if len(found) == 1 else sorted(tensors)
    if len(found) != 1 or unknown:
        raise ValueError(f"{', '.join(unknown)} is of no method known here")
    return found[0]


def _with_scalar(tensors: dict[str, Tensor], reader: type[Reader]) -> dict[str, Tensor]:
    """The tensors with the trained factor of older files (LyCORIS' use_scalar) multiplied in."""
    rest = {key: tensor for key, tensor in tensors.items() if key != "scalar"}
    if "scalar" in tensors:
        key = next((key for key in reader.scaled if key in rest), None)
        if key is None:
            raise ValueError(f"scalar has nothing to be multiplied into; {', '.join(reader.scaled)} is missing")
        rest[key] = wide(rest[key]) * number("scalar", tensors["scalar"])
    return rest


def _chosen(attempts: list[Attempt]) -> Attempt:
    """The attempt that fits the model, or the one that comes nearest."""
    fitting = [attempt for attempt in attempts if attempt.fits]
    if len(fitting) > 1:
        prefixes = [attempt.prefix for attempt in fitting]
        raise ValueError(
            f"the keys of {' and of '.join(prefixes)} fit it alike; say which are meant: prefix={prefixes[0]!r}"
        )
    return fitting[0] if fitting else max(attempts, key=lambda it: (len(it.units), len(it.problems)))


def _targets(paths: list[str], model: nn.Module) -> list[str] | str:
    """`target_modules` that means these layers and no others: their paths, which a list matches by suffix."""
    chosen = set(paths)
    also = [path for path, _ in base_modules(model) if path not in chosen and any(_ends(path, p) for p in paths)]
    return exactly(paths) if also else paths


def _ends(path: str, suffix: str) -> bool:
    return path.endswith(f".{suffix}")


def _no_form(tensors: Mapping[str, Tensor]) -> str:
    keys = list(tensors)
    if not keys:
        return "the file holds no tensors"
    if any(key.startswith("base_model.model.") for key in keys):
        return "its keys are those of PEFT, but one file alone has no adapter_config.json: give the folder with both"
    return f"its keys ({', '.join(keys[:3])}) begin with none of {', '.join(PREFIXES)}, as kohya's and LyCORIS' do"


def _told(attempt: Attempt, others: list[str]) -> str:
    lines = [f"  {problem}" for problem in attempt.problems]
    lines += [f"  no such module: {name}" for name in others]
    return f"{len(lines)} keys of {attempt.prefix} are not as they should be:\n{_listed(lines, chr(10))}"


def _listed(items: list[str], between: str) -> str:
    more = [f"  and {len(items) - LISTED} more"] if len(items) > LISTED else []
    return between.join([*items[:LISTED], *more])
