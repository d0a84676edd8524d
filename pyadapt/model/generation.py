"""`generate` of a wrapped model."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..anatomy.cache import cache_among
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
            with self.with_call_arguments(kwargs, repeats=True):
                return self.generate(*args, adapter_names=adapter_names, **kwargs)
        generate = super().generate  # type: ignore[misc]
        if adapter_names is None:
            return generate(*args, **kwargs)
        state = self.adapter_state
        prepended = state.prepended
        with self.mixed(adapter_names, args, kwargs):
            # No row has virtual tokens: such adapters cannot be chosen by row.
            state.prepended = 0
            try:
                return generate(*args, **kwargs)
            finally:
                state.prepended = prepended

    def create_masks_for_generate(self, *args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        """The mask that a step of `generate` gives the model: the text's own where virtual tokens stand before it."""
        n = self.adapter_state.prepended
        make: Any = getattr(super(), "create_masks_for_generate", None)
        if n and (attention_mask is None or attention_mask.dim() == 2):
            # A model that keeps the two dimensions (BLOOM) makes it as long as the cache, virtual tokens included.
            made = None if make is None else make(*args, **{**kwargs, "attention_mask": attention_mask})
            return made[:, :-n] if isinstance(made, Tensor) and made.dim() == 2 else attention_mask
        if make is None:
            from transformers import masking_utils

            make = masking_utils.create_masks_for_generate
        return make(*args, **{**kwargs, "attention_mask": attention_mask})

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        *args: Any,
        next_sequence_length: int | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As transformers', which looks for `inputs_embeds` in this signature.

        It asks for what is longer than the cache, and counts the virtual tokens in that, which are none of the text.
        """
        cache, length, n = cache_among(kwargs), next_sequence_length, self.adapter_state.prepended
        # Asked with virtual tokens alone: a static cache keeps its length on the device.
        if n and length is not None and cache is not None:
            by_embeds = inputs_embeds is not None and kwargs.get("is_first_iteration")
            total = (inputs_embeds if by_embeds else input_ids).shape[1]  # type: ignore[union-attr]
            cached = cache.get_seq_length()
            if cached and total - length == cached:
                length += n
        given = {"next_sequence_length": length, "inputs_embeds": inputs_embeds}
        kwargs.update((name, value) for name, value in given.items() if value is not None)
        return super().prepare_inputs_for_generation(input_ids, *args, **kwargs)  # type: ignore[misc]

    def _prefill(self, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any], **how: Any) -> Any:
        cache: Any = cache_among(model_kwargs)
        n = self.adapter_state.prepended
        cached = cache.get_seq_length() if n and cache is not None else 0
        if cached:
            # Going on from a cache, transformers cuts chunks by its length. From an assistant's it takes as many
            # tokens too many as there are virtual ones, which may be some of these.
            generation_config = copy.copy(generation_config)
            generation_config.prefill_chunk_size = None
            if generation_config.is_assistant and cached <= n:
                cache.reset()
        return super()._prefill(input_ids, generation_config, model_kwargs, **how)  # type: ignore[misc]

    def _prepare_static_cache(self, *args: Any, max_cache_len: int, **kwargs: Any) -> Any:
        parent: Any = super()
        return parent._prepare_static_cache(*args, max_cache_len=max_cache_len + self.adapter_state.prepended, **kwargs)
