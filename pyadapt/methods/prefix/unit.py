"""The units of prefix tuning: one holds what is trained, and hands each attention its keys and values."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ...anatomy import AdaptedAttention, AttentionCall, AttentionUnit, Core
from ...layer import AdaptedLayer, unwrapped
from ...method import AdapterUnit, UnitBeside
from ...prompt_learning import PROMPT_KEY
from ...remembering import Remembered

# The parameters of the MLP, in the order of its arguments.
_MLP = ("embedding", "hidden_weight", "hidden_bias", "output_weight", "output_bias")


def _mlp(embedding: Tensor, hidden_weight: Tensor, hidden_bias: Tensor, output_weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(torch.tanh(F.linear(embedding, hidden_weight, hidden_bias)), output_weight, bias)


class _Projection(torch.autograd.Function):
    """tanh(E W1' + b1) W2' + b2, with a backward that may run more than once.

    It does where reentrant checkpointing goes backward through each block apart, all of which lead here. What torch
    saves for a backward is gone after the first; so the parameters are kept as they are.
    """

    @staticmethod
    def forward(ctx: Any, *parameters: Tensor) -> Tensor:
        """P, (n, features)."""
        embedding, hidden_weight, hidden_bias, output_weight, output_bias = parameters
        hidden = torch.tanh(F.linear(embedding, hidden_weight, hidden_bias))
        ctx.kept = embedding, hidden_weight, hidden, output_weight
        return F.linear(hidden, output_weight, output_bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """Gradients of the parameters."""
        embedding, hidden_weight, hidden, output_weight = ctx.kept
        # Under autocast the products of forward are of another dtype.
        gradient, hidden = gradient.to(output_weight.dtype), hidden.to(output_weight.dtype)
        inner = (gradient @ output_weight) * (1 - hidden * hidden)
        return inner @ hidden_weight, inner.T @ embedding, inner.sum(0), gradient.T @ hidden, gradient.sum(0)


class _Copy(torch.autograd.Function):
    """A copy of P that knows whether its gradient comes in parts, which an engine may not take.

    So it does under reentrant checkpointing, block by block. DDP would average the first part alone over the ranks, and
    FSDP1 has let go of the weights behind P after it.
    """

    @staticmethod
    def forward(ctx: Any, prefix: Tensor, parameters: tuple[Tensor, ...]) -> Tensor:
        """P as a tensor of its own; `parameters` are those that it was made of, where that is more than P itself."""
        ctx.parts, ctx.parameters = 0, parameters
        ctx.in_ddp = nn.parallel.DistributedDataParallel._get_active_ddp_module() is not None
        return prefix.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """The gradient as it is."""
        ctx.parts += 1
        gone = any(parameter.untyped_storage().nbytes() == 0 for parameter in ctx.parameters)
        if ctx.parts > 1 and (ctx.in_ddp or gone):
            raise RuntimeError(
                "prefix tuning under DistributedDataParallel, or with prefix_projection under FSDP1, cannot have "
                "reentrant gradient checkpointing, which brings the prefix a gradient for each block apart: set "
                'gradient_checkpointing_kwargs={"use_reentrant": False}'
            )
        return gradient, None


class PrefixUnit(UnitBeside):
    """The prefixes of all layers, side by side.

        P                                                     plain, or finished
        P = tanh(E W1' + b1) W2' + b2                         prefix_projection

    It lies where the blocks are run, outside of them, so that what is trained is in one place whatever the blocks are
    to an engine, and is read once a forward. Source: Li and Liang 2021; Liu et al. 2022 (P-Tuning v2).

    Attributes:
        prefix: P, (n, sum of 2 key/value heads D).
        embedding: E, (n, token_dim).
        hidden_weight, hidden_bias: W1 (hidden, token_dim), b1.
        output_weight, output_bias: W2 (features of P, hidden), b2.
    """

    file_keys: ClassVar[dict[str, str]] = {
        "prefix": PROMPT_KEY,
        "embedding": "prefix_encoder.embedding.weight",
        "hidden_weight": "prefix_encoder.transform.0.weight",
        "hidden_bias": "prefix_encoder.transform.0.bias",
        "output_weight": "prefix_encoder.transform.2.weight",
        "output_bias": "prefix_encoder.transform.2.bias",
    }
    hidden_weight: nn.Parameter
    output_weight: nn.Parameter

    def __init__(self, config: Any, *rest: Any) -> None:
        super().__init__(config, *rest)
        self.widths, self.blocks = config.widths, config.blocks
        self.readers: tuple[PrefixReader, ...] = ()
        self.handed_out = Remembered()

    @classmethod
    def shapes(cls, config: Any, path: str, base: Any, layer: Any) -> dict[str, tuple[int, ...]]:
        """See `AdapterUnit.shapes`."""
        n, d, hidden, width = (
            config.num_virtual_tokens,
            config.token_dim,
            config.encoder_hidden_size,
            sum(config.widths),
        )
        if config.finished or not config.prefix_projection:
            return {"prefix": (n, width)}
        return {
            "embedding": (n, d),
            "hidden_weight": (hidden, d),
            "hidden_bias": (hidden,),
            "output_weight": (width, hidden),
            "output_bias": (width,),
        }

    def initialize(self, config: Any, path: str, base: Any, layer: Any) -> None:
        """N(0, 1) for a prefix and for embeddings, and what torch gives linear layers; see `init_weights`."""
        for attribute, value in self.named_parameters(recurse=False):
            if attribute in ("prefix", "embedding"):
                nn.init.normal_(value)
            else:
                inputs = self.output_weight if attribute.startswith("output") else self.hidden_weight
                bound = 1 / math.sqrt(inputs.shape[1])
                nn.init.uniform_(value, -bound, bound)
            if config.init_weights == "zero" and (attribute == "prefix" or attribute.startswith("output")):
                nn.init.zeros_(value)

    def join(self, units: Sequence[AdapterUnit]) -> None:
        """See `AdapterUnit.join`."""
        self.readers = tuple(unit for unit in units if isinstance(unit, PrefixReader))

    @staticmethod
    def made(weights: Mapping[str, Tensor]) -> Tensor:
        """P from the parameters of a unit."""
        if "prefix" in weights:
            return weights["prefix"]
        run: Any = _mlp if torch.compiler.is_compiling() else _Projection.apply
        return run(*(weights[name] for name in _MLP))

    @staticmethod
    def run(units: Sequence[nn.Module], owner: AdaptedLayer, *args: Any, **kwargs: Any) -> Any:
        """See `AdapterUnit.run`: the prefixes are at hand while the blocks run."""
        for unit in units:
            inner: Any = unwrapped(unit)
            # The unit itself is called, whatever an engine has put around it: what it reads is at hand in its forward.
            inner.handed_out.get(unit.parameters(), functools.partial(inner.hand_out, unit, owner))
        return owner.frozen(*args, **kwargs)

    def forward(self, owner: AdaptedLayer) -> Tensor:  # type: ignore[override]
        """P, as a copy: engines take back the memory of a parameter after this call."""
        weights = self.weights()
        prefix = self.made(weights)
        if torch.compiler.is_compiling():
            return prefix.clone()
        # A parameter itself has to be seen as such by what gathers its gradient.
        return _Copy.apply(prefix, () if "prefix" in weights else tuple(weights.values()))

    def hand_out(self, unit: nn.Module, owner: AdaptedLayer) -> None:
        """Give each attention its keys and values of P, (1, heads, n, D) each; P comes of calling `unit`."""
        blocks = unit(owner).split(self.widths, dim=1)
        for reader, block in zip(self.readers, self.blocks, strict=True):
            reader.handed.pair = blocks[block].unflatten(1, (2, reader.heads, -1)).permute(1, 2, 0, 3).unsqueeze(1)

    @classmethod
    def check_together(cls, units: Mapping[str, AdapterUnit]) -> None:
        """See `AdapterUnit.check_together`: which of two prefixes comes first is not defined."""
        prefixes = [name for name, unit in units.items() if isinstance(unit, PrefixUnit)]
        if len(prefixes) > 1:
            raise ValueError(f"adapters {' and '.join(map(repr, prefixes))} each put a prefix before the text")

    def extra_repr(self) -> str:
        """The number of layers, for `print(model)`."""
        return f"layers={len(self.readers)}"


class Handed:
    """What one unit hands another for the length of a forward and its backward; a copy of a model has none yet.

    Attributes:
        pair: (2, 1, heads, n, D), keys and values; None before the first forward.
    """

    pair: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Handed:
        return Handed()

    def __reduce__(self) -> Any:
        return Handed, ()


class PrefixReader(AttentionUnit):
    """Attention over [K_p; K] and [V_p; V], with n keys and values before those of the text.

    The text's positions count on from n, and a window that slides counts the prefix as tokens before the text; the
    keys of the prefix bear no rotation (as in PEFT).

    Attributes:
        before: n.
        heads: of keys and values.
        handed: by the `PrefixUnit`.
    """

    def __init__(self, config: Any, path: str, base: Any, layer: Any, *rest: Any) -> None:
        super().__init__(config, path, base, layer, *rest)
        self.before = int(config.num_virtual_tokens)
        self.heads = base.heads(layer)[0]
        self.handed = Handed()

    @classmethod
    def shapes(cls, config: Any, path: str, base: Any, layer: Any) -> dict[str, tuple[int, ...]]:
        """See `AdapterUnit.shapes`: it has none of its own."""
        return {}

    def initialize(self, config: Any, path: str, base: Any, layer: Any) -> None:
        """See `AdapterUnit.initialize`: there is nothing to give values to."""

    def forward(self, owner: AdaptedAttention, core: Core, call: AttentionCall) -> tuple[Tensor, Any]:  # type: ignore[override]
        """See `AttentionUnit.forward`.

        Raises:
            RuntimeError: this attention is called by itself.
        """
        pair = self.handed.pair
        if pair is None:
            raise RuntimeError("a prefix is made where the blocks are run: call the model, not one of its blocks")
        key, value = pair.to(call.key.dtype)
        rows = call.key.shape[0]
        return core(
            call.changed(
                key=torch.cat([key.expand(rows, -1, -1, -1), call.key], dim=2),
                value=torch.cat([value.expand(rows, -1, -1, -1), call.value], dim=2),
                mask=self._mask(call),
            )
        )

    def _mask(self, call: AttentionCall) -> Tensor | None:
        """The mask with n columns more, on the left; None where all may be seen and transformers' None means so."""
        queries, keys, n = call.query.shape[2], call.key.shape[2], self.before
        window = self._window(call)
        mask = call.mask
        if mask is None and queries > 1 and call.causal:
            # None would stand for a triangle from the first column on.
            rows = torch.arange(queries, device=call.query.device)
            mask = (rows[:, None] >= torch.arange(keys, device=call.query.device))[None, None]
        if mask is None and window is not None:
            mask = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=call.query.device)
        if mask is None:
            return None
        if window is None:
            before = torch.ones(n, dtype=torch.bool, device=mask.device).expand(*mask.shape[:-1], n)
        else:
            mask = mask.expand(*mask.shape[:2], queries, mask.shape[3])
            before = window.to(mask.device).expand(*mask.shape[:-1], n)
        if mask.dtype != torch.bool:
            before = torch.zeros_like(before, dtype=mask.dtype).masked_fill(~before, torch.finfo(mask.dtype).min)
        return torch.cat([before, mask], dim=-1)

    def _window(self, call: AttentionCall) -> Tensor | None:
        """(queries, n), which of the prefix a window that slides lets each query see; None where it is all."""
        width = call.options.get("sliding_window")
        if width is None:
            return None
        positions = self.before + call.seen + torch.arange(call.query.shape[2], device=call.query.device)
        return positions[:, None] - torch.arange(self.before, device=call.query.device) < width

    @classmethod
    def route(cls, config: Any, path: str, base: Any, layer: Any, tokens: int) -> str:
        """See `AdapterUnit.route`."""
        return str(getattr(getattr(layer, "config", None), "_attn_implementation", None) or "torch")

    def extra_repr(self) -> str:
        """The length, for `print(model)`."""
        return f"virtual_tokens={self.before}"
