"""`generate` of a wrapped model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..layer import adapted_layers
from .calls import Calls


class Generation(Calls):
    """What `generate` asks of a wrapped model otherwise than of a plain one.

    Virtual tokens before the text are put there by the model itself, in the first step. transformers, which knows of
    none, is told where it sizes a cache or counts what lies in one; a mask of four dimensions that it would make of
    the text's for a static cache is left to the model.
    """

    def generate(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """The model's own `generate`; `adapter_names` as in `AdaptedModel.__call__`, one for each row of the input."""
        if any(name in kwargs for name in self.adapter_state.arguments):
            with self.with_call_arguments(kwargs):
                return self.generate(*args, adapter_names=adapter_names, **kwargs)
        generate = super().generate  # type: ignore[misc]
        if adapter_names is None:
            return generate(*args, **kwargs)
        with self.mixed(adapter_names, args, kwargs):
            return generate(*args, **kwargs)

    def virtual_tokens(self) -> int:
        """How many virtual tokens the active adapters put before each sequence that the model decodes."""
        live = (unit for _, layer in adapted_layers(self) for unit in layer.adapters.live)
        return sum(getattr(unit, "prepended", 0) for unit in live)

    def create_masks_for_generate(self, *args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        """The mask that a step of `generate` gives the model: the text's own where virtual tokens stand before it."""
        if self.virtual_tokens() and (attention_mask is None or attention_mask.dim() == 2):
            return attention_mask
        make: Any = getattr(super(), "create_masks_for_generate", None)
        if make is None:
            from transformers import masking_utils

            make = masking_utils.create_masks_for_generate
        return make(*args, **{**kwargs, "attention_mask": attention_mask})

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        is_first_iteration: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As transformers'; a cache of an earlier call holds its virtual tokens, which are none of the text."""
        cache, length = kwargs.get("past_key_values"), next_sequence_length
        if is_first_iteration and length is not None and cache is not None and cache.get_seq_length():
            length += self.virtual_tokens()
        return super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids, next_sequence_length=length, is_first_iteration=is_first_iteration, **kwargs
        )

    def _prepare_static_cache(self, *args: Any, max_cache_len: int, **kwargs: Any) -> Any:
        parent: Any = super()
        return parent._prepare_static_cache(*args, max_cache_len=max_cache_len + self.virtual_tokens(), **kwargs)
