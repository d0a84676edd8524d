"""Folding the adapters of a wrapped model into its weights, and getting the plain model back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import nn

from .. import attach, merging
from ..distributed.sharding import engine_of
from ..files import Path
from ..integrations.transformers import forget_quantization, is_transformers_model
from ..surgery import release
from .arguments import check_only
from .checkpoints import need_base_in_state_dicts
from .state import WithAdapters, forget_adapters


class MergeVerbs(WithAdapters):
    """Merging, unmerging and unloading."""

    def merge_adapter(self, adapter_names: Sequence[str] | None = None) -> None:
        """Fold adapters (by default the active ones) into the weights in place.

        The old weights are kept beside the merged ones, so that `unmerge_adapter` can put them back exactly. An int8
        weight is quantised again. Where an engine has sharded the model, every rank has to call: one layer after the
        other is gathered (FSDP1: the unit that it is in), and each rank keeps the part that it holds (FSDP1 with
        use_orig_params=False: of whole units).

        Raises:
            RuntimeError: adapters are merged already.
            ValueError: an unknown name, a merged weight would not be finite, or a sharded model's tied weights would
                come apart; the model is unchanged.
        """
        names = tuple(self.adapter_state.active if adapter_names is None else adapter_names)
        self.check_names(names)
        self.check_not_merged("merge again")
        attach.check_together(self, names)
        attach.check_foldable(self, names)
        self.adapter_state.parts_before = merging.merge_in_place(self, names)
        self.adapter_state.merged = names
        self.refresh()

    def unmerge_adapter(self) -> None:
        """Take merged adapters out of the weights again, bit for bit.

        Raises:
            RuntimeError: nothing is merged.
        """
        if not self.adapter_state.merged:
            raise RuntimeError("no adapter is merged, so there is nothing to unmerge")
        merging.unmerge_in_place(self, self.adapter_state.parts_before)
        self.adapter_state.merged, self.adapter_state.parts_before = (), []
        self.refresh()

    def merge_and_unload(
        self, adapter_names: Sequence[str] | None = None, original: Path | None = None, **unused: Any
    ) -> nn.Module:
        """Fold adapters (by default the active ones) in and give back the plain model, the same object.

        Layers over int8 become dense. The report of sources and errors is left in `model.merge_report`.

        Args:
            adapter_names: the adapters to fold in.
            original: checkpoint of the model from before it was quantised, to merge into instead of dequantised
                weights.
            unused: `safe_merge` and `progressbar` of PEFT; every merge here is a safe one.

        Raises:
            RuntimeError: an engine has sharded the model; `pyadapt.export` writes the merged one.
        """
        check_only(unused, "safe_merge", "progressbar")
        merging.refuse_sharded(self, "merge for good")
        names = tuple(self.adapter_state.active if adapter_names is None else adapter_names)
        self.check_names(names)
        attach.check_together(self, names)
        attach.check_foldable(self, names)
        if self.adapter_state.merged:
            self.unmerge_adapter()
        report = merging.merge_to_plain(self, names, original)
        model = self.unload()
        if is_transformers_model(model):
            forget_quantization(model)
        cast(Any, model).merge_report = report
        return model

    def unload(self) -> nn.Module:
        """Remove every adapter and give back the base model: the same object, its original class.

        Raises:
            RuntimeError: an engine that shards it has the model in hand.
        """
        if engine_of(self) is not None:
            merging.refuse_sharded(self, "unload")
        if self.adapter_state.merged:
            self.unmerge_adapter()
        for name in list(self.peft_config):
            attach.detach(self, name)
        for name, parameter in self.named_parameters():
            # LoftQ may have made a weight int8 since.
            if name in self.adapter_state.trained_before and parameter.is_floating_point():
                parameter.requires_grad_(True)
        release(self, WithAdapters)
        need_base_in_state_dicts(self)
        forget_adapters(self)
        return self

    def get_base_model(self) -> nn.Module:
        """The user's model, which a wrapped model still is."""
        return self
