"""Leading the products of an attention through units that see its queries, keys and values.

    AttentionCall        what an attention is about to be computed from
    AttentionUnit        changes that, or adds to its result
    AdaptedAttention     mixin of an attention with units; leads its products through them

The models of transformers compute attention by a function that they look up in a registry, by the name in their
configuration. `AdaptedAttention` gives that name another value for its own module alone (`RoutedConfig`), so that the
module's own forward, with its projections, rotations and cache, runs as it is, and arrives at `attend` with what the
units want to see. The cache holds the text's keys and values only: nothing in `generate` needs to know. Models
that do not use the registry lead their products through `AdaptedAttention.lead` themselves (see `attention.Attention`).
"""

from __future__ import annotations

import abc
import functools
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..layer import AdaptedLayer
from ..method import UnitBeside
from ..surgery import original_class
from .cache import CACHE_NAMES, cache_among

# What computes an attention: call -> ((B, L, H, D), weights or None).
Core = Callable[["AttentionCall"], tuple[Tensor, Any]]

# The name under which `attend` is in transformers' registry.
ROUTED = "pyadapt"
# The implementations of attention that take masks to which columns can be added.
IMPLEMENTATIONS = ("sdpa", "eager")


@dataclass(frozen=True)
class AttentionCall:
    """What an attention is computed from.

    Attributes:
        query: (B, H, L, D), with its positions in it where those are rotations.
        key: (B, H or key/value heads, K, D), the cached ones included.
        value: (B, H or key/value heads, K, D).
        mask: (B or 1, H or 1, L or 1, K), True or 0 where a key is seen; None as transformers means it.
        options: what else the model passes: `scaling`, `sliding_window`, ...
        causal: whether a mask of None stands for a triangle.
        seen: how many tokens of the text came before these queries.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    options: Mapping[str, Any]
    causal: bool = False
    seen: Any = 0

    def changed(self, **changes: Any) -> AttentionCall:
        """A copy with other values."""
        return replace(self, **changes)


class AttentionUnit(UnitBeside):
    """The weights of one adapter on one self-attention."""

    # How many positions the text is moved on by, since keys stand before it.
    before: int = 0

    @staticmethod
    def run(units: Sequence[nn.Module], owner: AdaptedLayer, *args: Any, **kwargs: Any) -> Any:
        """See `AdapterUnit.run`: the attention's own forward, which leads through `forward` of the units."""
        assert isinstance(owner, AdaptedAttention)
        return owner.with_units(units, args, kwargs)

    @abc.abstractmethod
    def forward(self, owner: AdaptedAttention, core: Core, call: AttentionCall) -> tuple[Tensor, Any]:  # type: ignore[override]
        """The attention with this adapter in it.

        Args:
            owner: the attention.
            core: computes an attention, with other units in it.
            call: what it is computed from.

        Returns:
            (B, L, H, D), before the output projection, and the weights or None.
        """


@dataclass
class Work:
    """What the units of an attention are doing during one call of it.

    Attributes:
        units: those at work, in order.
        args, kwargs: the arguments of the attention's forward.
        seen: see `AttentionCall`.
        beside: terms that are added to the output of the forward itself.
        captured: set while keys and values of something else are asked for; then nothing is computed.
    """

    units: Sequence[Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    seen: Any
    beside: list[Tensor]
    captured: list[tuple[Tensor, Tensor]] | None = None


class AdaptedAttention(AdaptedLayer):
    """Mixin of a self-attention that carries units.

    Attributes:
        at_work: set for the length of a call with units.
    """

    further: ClassVar[Mapping[str, Any]] = {"at_work": None}
    # The values of a pair `position_embeddings` that rotate by nothing: of cosines and sines, in most models.
    no_rotation: ClassVar[tuple[float, float]] = (1.0, 0.0)
    at_work: Work | None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Dynamic classes are made when a module is adopted or unpickled, so that transformers is there by then."""
        super().__init_subclass__(**kwargs)
        modeling = sys.modules.get("transformers.modeling_utils")
        if modeling is not None:
            modeling.ALL_ATTENTION_FUNCTIONS.register(ROUTED, attend)

    @property
    def config(self) -> Any:
        """The module's configuration, with another name of the attention function while units are at work."""
        if "config" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__} has no configuration")
        own = self.__dict__["config"]
        return own if self.at_work is None else RoutedConfig(own)

    @config.setter
    def config(self, value: Any) -> None:
        self.__dict__["config"] = value

    def with_units(self, units: Sequence[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The attention's own forward, with `units` at work in it."""
        work = Work(units, args, kwargs, self._seen(kwargs), [])
        outputs = self._run(work, args, kwargs)
        for term in work.beside:
            outputs = (outputs[0] + term.to(outputs[0].dtype), *outputs[1:])
        return outputs

    def keys_and_values(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """What the module makes of other states than the text's, without positions, during a call with units.

        Args:
            states: (1, n, d), in the place of hidden states.

        Returns:
            (1, key/value heads, n, D) each.
        """
        outer = self.at_work
        assert outer is not None
        args, kwargs = self._arguments_for(states, outer)
        work = Work((), args, kwargs, 0, [], captured=[])
        self._run(work, args, kwargs)
        assert work.captured is not None
        return work.captured[0]

    def add_to_output(self, term: Tensor) -> None:
        """Add `term`, (B, L, d), to the output of the module's forward, during a call with units."""
        assert self.at_work is not None
        self.at_work.beside.append(term)

    def lead(self, core: Core, call: AttentionCall) -> tuple[Tensor, Any]:
        """`core` of `call`, with the units at work around it."""
        work = self.at_work
        assert work is not None
        if work.captured is not None:
            work.captured.append((call.key, call.value))
            return torch.zeros_like(call.query).transpose(1, 2), None
        call = call.changed(seen=work.seen)
        for unit in work.units:
            core = functools.partial(unit, self, core)
        return core(call)

    def _run(self, work: Work, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        outer, self.at_work = self.at_work, work
        try:
            return self.frozen(*args, **kwargs)
        finally:
            self.at_work = outer

    def _seen(self, kwargs: Mapping[str, Any]) -> Any:
        cache = cache_among(kwargs)
        if cache is None:
            return 0
        index = getattr(self, "layer_idx", None)
        seen = cache.get_seq_length(getattr(self, "layer_id", 0) if index is None else index)
        # A static cache counts in a tensor, in place.
        return seen.clone() if isinstance(seen, Tensor) else seen

    def _arguments_for(self, states: Tensor, outer: Work) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the call at work, with `states` in the place of the text and nothing said of positions."""
        kwargs = {name: value for name, value in outer.kwargs.items() if name not in CACHE_NAMES}
        hidden = outer.args[0] if outer.args else kwargs.pop("hidden_states")
        length = states.shape[1]
        for name in ("attention_mask", "mask"):
            if name in kwargs:
                kwargs[name] = None
        if kwargs.get("position_embeddings") is not None:
            pair = kwargs["position_embeddings"]
            width = pair[0].shape[-1]
            shape = (length, width) if pair[0].dim() < 3 else (1, length, width)
            kwargs["position_embeddings"] = tuple(
                part.new_full(shape, value) for part, value in zip(pair, self.no_rotation, strict=True)
            )
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = kwargs["position_ids"].new_zeros(1, length)
        return (states.to(hidden.dtype), *outer.args[1:]), kwargs


class RoutedConfig:
    """A configuration as an attention with units at work sees it: its attention function is `attend`."""

    _attn_implementation = ROUTED

    def __init__(self, own: Any) -> None:
        self._own = own

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Any]:
    """The attention function of modules with units at work, in transformers' registry."""
    implementation = module.__dict__["config"]._attn_implementation
    check_implementation(implementation)
    function = _function(original_class(module), implementation)

    def core(call: AttentionCall) -> tuple[Tensor, Any]:
        return function(module, call.query, call.key, call.value, call.mask, **call.options)

    said = options.get("is_causal")
    # Only sdpa makes a triangle of its own.
    causal = implementation != "eager" and bool(module.base.is_causal(module) if said is None else said)
    return module.lead(core, AttentionCall(query, key, value, attention_mask, options, causal))


def check_implementation(name: str | None) -> None:
    """Refuse an implementation of attention whose masks cannot be extended.

    Raises:
        ValueError: so it is.
    """
    if name not in IMPLEMENTATIONS:
        raise ValueError(
            f"attention runs as {name!r}, to which no keys can be added; model.set_attn_implementation('sdpa') (or "
            "'eager') makes it one that takes them"
        )


def _function(cls: type, implementation: str) -> Any:
    names = inspect.unwrap(cls.forward).__globals__  # type: ignore[attr-defined]
    if implementation == "eager":
        return names["eager_attention_forward"]
    return names["ALL_ATTENTION_FUNCTIONS"][implementation]


# Behind `attend`, which making a subclass registers where transformers is there already.
class RewrittenAttention(AdaptedAttention):
    """Mixin of an attention whose products are in the midst of its forward.

    Attributes:
        attention: the forward, written anew for calls with units: it leads its products through `lead`.
    """

    attention: Callable[..., Any]

    def frozen(self, *args: Any, **kwargs: Any) -> Any:
        """See `AdaptedLayer.frozen`."""
        return super().frozen(*args, **kwargs) if self.at_work is None else self.attention(*args, **kwargs)
