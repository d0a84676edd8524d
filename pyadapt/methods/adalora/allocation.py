"""The allocation of ranks: which triplets of an AdaLoRA adapter stay while the budget falls.

After each optimizer step, for each element w of A, B and E with its gradient,

    I = |w dL/dw|                                 what the loss would miss, to first order
    sensitivity = beta1 sensitivity + (1 - beta1) I
    uncertainty = beta2 uncertainty + (1 - beta2) |I - sensitivity|
    score of a triplet = (s u) of its E + mean of (s u) over its row of A + mean over its column of B

and all triplets of all layers are ranked by it. Those beyond the budget get E = 0; as their E keeps its gradient, they
may come back before the last allocation. The budget is the sum of all ranks up to `tinit`, `target_r` a layer from
`total_step - tfinal` on, and cubic in between. All this is PEFT's, number for number, but for where PEFT fails: at a
budget that takes nothing away, and at parameters that had no gradient in a step (it counts as zero).

Source: Zhang et al., "Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", 2023.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .config import AdaLoraConfig
from .unit import AdaLoraUnit


def update_and_allocate(name: str, config: AdaLoraConfig, units: Sequence[AdaLoraUnit], global_step: int) -> None:
    """Take in one optimizer step and, where the schedule says so, allocate the ranks anew.

    Args:
        name: of the adapter, for messages.
        config: its configuration.
        units: its units on all layers.
        global_step: the step that was just taken, counted from 1.

    Raises:
        RuntimeError: no parameter has a gradient, or an engine has sharded the parameters.
    """
    units = [unit for unit in units if unit.is_scheduled]
    if not units:
        # A file whose ranks were allocated before it was saved.
        return
    assert config.total_step is not None
    end = config.total_step - config.tfinal
    with torch.no_grad():
        if global_step < end:
            observe(name, config, units)
            if global_step > config.tinit and global_step % config.deltaT == 0:
                allocate(units, budget_at(config, units, global_step))
        elif global_step == end or not units[0].settled:
            # The loop may have stepped over the end; what was seen is there nonetheless.
            allocate(units, config.target_r * len(units))
            settle(units)
        else:
            for unit in units:
                unit.lora_E.masked_fill_(~unit.kept[:, None], 0.0)


def budget_at(config: AdaLoraConfig, units: Sequence[AdaLoraUnit], step: int) -> int:
    """How many triplets of all layers together may stay at `step`, between `tinit` and the end of the schedule."""
    initial, target = sum(unit.kept.shape[0] for unit in units), config.target_r * len(units)
    assert config.total_step is not None
    left = 1 - (step - config.tinit) / (config.total_step - config.tfinal - config.tinit)
    return int((initial - target) * left**3 + target)


def observe(name: str, config: AdaLoraConfig, units: Sequence[AdaLoraUnit]) -> None:
    """Take the gradients of this step into the sensitivity and the uncertainty of each element, if they are finite.

    Raises:
        RuntimeError: there are no gradients, or not of the whole parameters.
    """
    if all(parameter.grad is None for unit in units for parameter in unit.parameters()):
        raise RuntimeError(
            f"no parameter of adapter {name!r} has a gradient: update_and_allocate comes after loss.backward() and "
            "optimizer.step(), and before optimizer.zero_grad()"
        )
    gradients_of_E = [unit.lora_E.grad for unit in units if unit.lora_E.grad is not None]
    home = units[0].lora_E.device
    if gradients_of_E and not torch.cat([gradient.to(home) for gradient in gradients_of_E]).isfinite().all():
        # A gradient scaler has left this step out; E, through which all goes, tells of an overflow anywhere.
        return
    for unit in units:
        unit.settled.fill_(False)
        parameters = [getattr(unit, f"lora_{factor}") for factor in unit.FACTORS]
        sensitivities = [getattr(unit, f"sensitivity_{factor}") for factor in unit.FACTORS]
        uncertainties = [getattr(unit, f"uncertainty_{factor}") for factor in unit.FACTORS]
        for parameter, sensitivity in zip(parameters, sensitivities, strict=True):
            if parameter.shape != sensitivity.shape:
                raise RuntimeError(
                    f"adapter {name!r} has a parameter of shape {tuple(parameter.shape)} in place of "
                    f"{tuple(sensitivity.shape)}: an engine has sharded it, and its ranks cannot be allocated so"
                )
        # A unit at a time: its tensors stay in the cache from one operation to the next.
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        wide = sensitivities[0].dtype
        importance = torch._foreach_mul([p.to(wide) for p in parameters], [g.to(wide) for g in gradients])
        torch._foreach_abs_(importance)
        torch._foreach_mul_(sensitivities, config.beta1)
        torch._foreach_add_(sensitivities, importance, alpha=1 - config.beta1)
        torch._foreach_sub_(importance, sensitivities)
        torch._foreach_abs_(importance)
        torch._foreach_mul_(uncertainties, config.beta2)
        torch._foreach_add_(uncertainties, importance, alpha=1 - config.beta2)


def scores(unit: Any) -> Tensor:
    """(r,): the score of each triplet of one layer."""
    of_A, of_B, of_E = (
        getattr(unit, f"sensitivity_{factor}") * getattr(unit, f"uncertainty_{factor}") for factor in unit.FACTORS
    )
    return of_E.view(-1) + (of_A.mean(dim=1) + of_B.mean(dim=0))


def allocate(units: Sequence[AdaLoraUnit], budget: int) -> None:
    """Keep the `budget` triplets of the highest scores, and fewer where scores are equal; the others get E = 0."""
    ranked = [scores(unit) for unit in units]
    everything = torch.cat([score.to(ranked[0].device) for score in ranked])
    taken = everything.numel() - budget
    if taken == 0:
        for unit in units:
            unit.kept.fill_(True)
        return
    threshold = torch.kthvalue(everything, taken).values
    for unit, score in zip(units, ranked, strict=True):
        unit.kept.copy_(~(score <= threshold.to(score.device)))
        unit.lora_E.masked_fill_(~unit.kept[:, None], 0.0)


def settle(units: Sequence[AdaLoraUnit]) -> None:
    """Let the latest allocation be the last; what was seen is forgotten."""
    for unit in units:
        for buffer_name, buffer in unit.named_buffers(recurse=False):
            if buffer_name not in ("kept", "settled"):
                buffer.zero_()
        unit.settled.fill_(True)
