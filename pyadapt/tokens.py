"""Training some rows of an embedding: `trainable_token_indices`.

    y[t] = rows[i] if ids[t] is the i-th trained token, else W[ids[t]]       embedding
    y[..., i-th token] = x rows[i]', the other columns x W'                  output head

The rows begin as those of the table, hold values and no differences, and are merged by writing them into it. A head
that is tied to the embedding follows the same rows. File key: `<path>.token_adapter.trainable_tokens_delta` (n, d).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import BaseWeight, base_of
from .base.embedding import scaled_as
from .distributed.sharding import whole
from .layer import AdaptedLayer, base_modules
from .method import AdapterUnit
from .placement import home_of
from .tying import input_embedding

OPTION = "trainable_token_indices"
# What is looked for where a model does not say which its input embedding is; PEFT's name.
_USUAL_NAME = "embed_tokens"


class TokenUnit(AdapterUnit):
    """The trained rows of one embedding or output head.

    Attributes:
        rows: (n, d), in the order of the configuration.
        ids: (n,) int64, the tokens that they belong to.
    """

    file_keys: ClassVar[dict[str, str]] = {"rows": "token_adapter.trainable_tokens_delta"}
    writes_mirror: ClassVar[bool] = False
    rows: nn.Parameter
    ids: Tensor
    sorted_ids: Tensor
    order: Tensor

    def __init__(
        self, config: Any, path: str, base: type[BaseWeight], layer: Any, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__(config, path, base, layer, device, dtype)
        listed = ids_of(config, path)
        # Parameters may be made on the meta device, to be given values; these have theirs.
        home = home_of(layer, next(iter(base.stored(layer).values())))
        ordered = torch.tensor(listed).sort()
        self.register_buffer("ids", torch.tensor(listed, device=home), persistent=False)
        self.register_buffer("sorted_ids", ordered.values.to(home), persistent=False)
        self.register_buffer("order", ordered.indices.to(home), persistent=False)
        padding = getattr(layer, "padding_idx", None)
        # The row that gets no gradient, as in the embedding itself.
        self.padding = listed.index(padding) if padding in listed else None

    @classmethod
    def shapes(cls, config: Any, path: str, base: type[BaseWeight], layer: Any) -> dict[str, tuple[int, ...]]:
        """See `AdapterUnit.shapes`."""
        return {"rows": (len(ids_of(config, path)), base.shape(layer)[1])}

    def initialize(self, config: Any, path: str, base: type[BaseWeight], layer: Any) -> None:
        """The rows of the frozen table."""
        with torch.no_grad(), whole(layer, [layer]):
            table = base.matrix(layer) if base.quantized else base.operands(layer).weight
            self.rows.copy_(table[self.ids.to(table.device)])

    def forward(self, x: Tensor, owner: AdaptedLayer, y: Tensor | None = None) -> Tensor:
        """See `AdapterUnit.forward`; x holds ids for an embedding, features for a head."""
        y = owner.frozen(x) if y is None else y
        return self._rows_of(x, owner, y) if owner.base.form == "embedding" else self._columns_of(x, owner, y)

    def _rows_of(self, ids: Tensor, owner: Any, y: Tensor) -> Tensor:
        ids = ids.to(self.sorted_ids.dtype)
        place = torch.searchsorted(self.sorted_ids, ids).clamp(max=len(self.ids) - 1)
        found = self.sorted_ids[place] == ids
        # One more row, for all other tokens, so that options that count or scale tokens see each where it belongs.
        table = torch.cat([self.rows, self.rows.new_zeros(1, self.rows.shape[1])])
        values = F.embedding(
            torch.where(found, self.order[place], len(self.ids)),
            table,
            padding_idx=self.padding,
            max_norm=owner.max_norm,
            norm_type=owner.norm_type,
            scale_grad_by_freq=owner.scale_grad_by_freq,
        )
        return torch.where(found.unsqueeze(-1), scaled_as(owner, values).to(y.dtype), y)

    def _columns_of(self, x: Tensor, owner: Any, y: Tensor) -> Tensor:
        bias = owner.bias
        columns = F.linear(x, self.rows.to(x.dtype), None if bias is None else bias[self.ids].to(x.dtype))
        # In place: logits are large, and nothing else holds these.
        return y.index_copy_(-1, self.ids, columns.to(y.dtype))

    def fold(self, matrix: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See `AdapterUnit.fold`; the rows take the place of what was there."""
        matrix[self.ids.to(matrix.device)] = self.rows.detach().to(matrix)
        return matrix, bias

    @classmethod
    def check_together(cls, units: Mapping[str, AdapterUnit]) -> None:
        """See `AdapterUnit.check_together`: a row has one value."""
        owners: dict[int, str] = {}
        for name, unit in units.items():
            ids = unit.ids.tolist() if isinstance(unit, TokenUnit) else []
            twice = [token for token in ids if token in owners]
            if twice:
                raise ValueError(f"adapters {owners[twice[0]]!r} and {name!r} both train token {twice[0]}")
            owners.update(dict.fromkeys(ids, name))

    def extra_repr(self) -> str:
        """The number of rows, for `print(model)`."""
        return f"rows={len(self.ids)}"


def ids_of(config: Any, path: str) -> list[int]:
    """The trained tokens of the layer at `path`, which the configuration has."""
    wanted = config.trainable_token_indices
    if not isinstance(wanted, dict):
        return list(wanted)
    return list(next(ids for name, ids in wanted.items() if _ends_with(path, name)))


def token_paths(config: Any, model: nn.Module) -> dict[str, list[int]]:
    """Path of each layer of which `config` trains rows -> the ids.

    Raises:
        ValueError: a layer is missing or cannot be trained by rows, or ids are missing, twice there or out of range.
    """
    wanted = getattr(config, OPTION, None)
    if wanted is None:
        return {}
    paths = [path for path, _ in base_modules(model) if path]
    if isinstance(wanted, dict):
        named = {name: [path for path in paths if _ends_with(path, name)] for name in wanted}
    else:
        named = {"the input embedding": _input_paths(model, paths)}
    missing = [name for name, found in named.items() if not found]
    if missing or not named:
        raise ValueError(
            f"{OPTION}: {', '.join(map(repr, missing)) or 'nothing'} is not in this model; a dict from the name of an "
            "embedding to a list of token ids says which is meant"
        )
    for path in (path for found in named.values() for path in found):
        _check(path, model.get_submodule(path), ids_of(config, path))
    return {path: ids_of(config, path) for path in paths if any(path in found for found in named.values())}


def check_apart(tokens: Sequence[str], adapted: Sequence[str], saved: Sequence[str], model: nn.Module) -> None:
    """Refuse rows of a layer that is adapted or trained whole as well, by this adapter or another.

    Raises:
        ValueError: so it is.
    """
    for path in tokens:
        layer: Any = model.get_submodule(path)
        others = list(layer.adapters.values()) if isinstance(layer, AdaptedLayer) else []
        if path in adapted or any(not isinstance(unit, TokenUnit) for unit in others):
            raise ValueError(f"{OPTION}: {path} is adapted as well (target_modules); choose one of the two")
        if any(path == module or path.startswith(module + ".") for module in saved):
            raise ValueError(f"{OPTION}: {path} is trained whole as well (modules_to_save); choose one of the two")
    for path in adapted:
        layer = model.get_submodule(path)
        if isinstance(layer, AdaptedLayer) and any(isinstance(unit, TokenUnit) for unit in layer.adapters.values()):
            raise ValueError(
                f"target_modules: another adapter trains rows of {path} ({OPTION}), beside which it cannot be adapted"
            )


def _check(path: str, layer: nn.Module, ids: list[int]) -> None:
    base = base_of(layer)
    if base is None or base.form not in ("embedding", "linear"):
        raise ValueError(f"{OPTION}: {path} is a {type(layer).__name__}, of which no rows can be trained")
    size = base.shape(layer)[0]
    wrong = [token for token in ids if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < size]
    if wrong or not ids:
        raise ValueError(
            f"{OPTION}: {wrong or 'no'} ids for {path}, which has rows 0 to {size - 1}; after new tokens, "
            "model.resize_token_embeddings comes first"
        )
    if len(set(ids)) < len(ids):
        twice = sorted(token for token in set(ids) if ids.count(token) > 1)
        raise ValueError(f"{OPTION}: {twice} named more than once for {path}")


def _input_paths(model: nn.Module, paths: list[str]) -> list[str]:
    entry = input_embedding(model)
    if entry is None:
        return [path for path in paths if _ends_with(path, _USUAL_NAME)]
    return [path for path in paths if model.get_submodule(path) is entry]


def _ends_with(path: str, name: str) -> bool:
    return path == name or path.endswith("." + name)
