"""Tables of embeddings that several modules have, made one module, as FSDP2 under accelerate needs them."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..layer import AdaptedLayer, SavedModule


def unite_tied_tables(model: nn.Module) -> list[str]:
    """Let embeddings that share their table, and are alike in all else, be one module in several places.

    accelerate puts the model's input embedding into an FSDP2 group of its own. Of T5, whose encoder and decoder have
    embeddings of the same table, these are then in another group, which FSDP2 refuses ("Parameter 'shared.weight' is
    shared with a parameter already managed by another FSDP group"). One module is in one group. Names in state dicts
    stay.

    Returns:
        The paths that have another module now; empty where nothing was tied, or what is tied carries adapters.
    """
    first: dict[int, nn.Embedding] = {}
    changed = []
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if not isinstance(module, nn.Embedding) or isinstance(module, AdaptedLayer | SavedModule):
            continue
        kept = first.setdefault(id(module.weight), module)
        if kept is not module and type(kept) is type(module) and _traits(kept) == _traits(module):
            owner, _, name = path.rpartition(".")
            setattr(model.get_submodule(owner), name, kept)
            changed.append(path)
    return changed


def _traits(module: nn.Module) -> dict[str, Any]:
    """What a module's forward may depend on beside its parameters."""
    return {name: value for name, value in vars(module).items() if not name.startswith("_") and name != "training"}
