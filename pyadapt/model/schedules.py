"""Training that follows a schedule: what an adapter does after each optimizer step."""

from __future__ import annotations

from ..distributed.sharding import sharding_of
from ..method import METHODS
from .state import WithAdapters


class Schedules(WithAdapters):
    """Schedules of the adapters in training."""

    def update_and_allocate(self, global_step: int) -> None:
        """Let each active AdaLoRA adapter in training take in one optimizer step, and allocate its ranks anew if due.

            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            model.update_and_allocate(step)  # 1, 2, ..., total_step
            optimizer.zero_grad()

        In PEFT this is `model.base_model.update_and_allocate`; here `base_model` stays what it is in the user's model.
        With transformers' Trainer, `pyadapt.AdaLoraCallback()` does it. Where an engine has sharded the weights, every
        rank has to call; the gradients are those of the step, clipped, as in one process. (DeepSpeed's ZeRO-3 keeps
        them after its step, also where accelerate takes that step inside `backward`.)

        Args:
            global_step: how many optimizer steps have been taken, this one included.

        Raises:
            ValueError: no active adapter in training has a schedule, or `global_step` is no whole number.
            RuntimeError: there are no gradients (any more), or adapters are merged.
        """
        if not isinstance(global_step, int) or isinstance(global_step, bool) or global_step < 0:
            raise ValueError(f"global_step={global_step!r} is no whole number of optimizer steps")
        self.check_not_merged("allocate ranks")
        due = []
        for name in self.adapter_state.active:
            config = self.peft_config[name]
            method = METHODS[config.peft_type]
            if method.has_schedule and not config.inference_mode:
                due.append((name, config, method))
        if not due:
            raise ValueError(
                "no active adapter in training has a schedule: wrap the model with an AdaLoraConfig, or load the "
                "adapter with is_trainable=True"
            )
        sharding = sharding_of(self)
        for name, config, method in due:
            method.after_step(name, config, self.units_of(name), global_step, sharding)
