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

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...distributed.sharding import Sharding, whole_under
from .config import AdaLoraConfig
from .unit import AdaLoraUnit


def update_and_allocate(
    name: str, config: AdaLoraConfig, units: Sequence[AdaLoraUnit], global_step: int, sharding: Sharding | None = None
) -> None:
    """Take in one optimizer step and, where the schedule says so, allocate the ranks anew.

    Where an engine has sharded the parameters, every rank gathers them with their gradients, and so allocates the same:
    what was seen is whole on each of them, in buffers.

    Args:
        name: of the adapter, for messages.
        config: its configuration.
        units: its units on all layers.
        global_step: the step that was just taken, counted from 1.
        sharding: how the parameters are sharded, if they are.

    Raises:
        RuntimeError: no parameter has a gradient.
    """
    units = [unit for unit in units if unit.is_scheduled]
    if not units:
        # A file whose ranks were allocated before it was saved.
        return
    assert config.total_step is not None
    end = config.total_step - config.tfinal
    is_seen = global_step < end
    allocates = not is_seen or (global_step > config.tinit and global_step % config.deltaT == 0)
    gradients = gradients_of(units, sharding) if is_seen else []
    with torch.no_grad(), whole_under(sharding, units, write=allocates):
        if is_seen:
            observe(name, config, units, gradients)
            if allocates:
                allocate(units, budget_at(config, units, global_step))
        elif global_step == end or not units[0].settled:
            # The loop may have stepped over the end; what was seen is there nonetheless.
            allocate(units, config.target_r * len(units))
            settle(units)
        else:
            for unit in units:
                unit.lora_E.masked_fill_(~unit.kept[:, None], 0.0)


def gradients_of(units: Sequence[AdaLoraUnit], sharding: Sharding | None) -> list[dict[str, Tensor | None]]:
    """The gradients of each unit's factors by the names of these, whole; None where there is none."""
    if sharding is None:
        return [{factor: getattr(unit, f"lora_{factor}").grad for factor in unit.FACTORS} for unit in units]
    gathered = zip(units, sharding.gradients(units), strict=True)
    return [{factor: own.get(f"lora_{factor}") for factor in unit.FACTORS} for unit, own in gathered]


def budget_at(config: AdaLoraConfig, units: Sequence[AdaLoraUnit], step: int) -> int:
    """How many triplets of all layers together may stay at `step`, between `tinit` and the end of the schedule."""
    initial, target = sum(unit.kept.shape[0] for unit in units), config.target_r * len(units)
    assert config.total_step is not None
    left = 1 - (step - config.tinit) / (config.total_step - config.tfinal - config.tinit)
    return int((initial - target) * left**3 + target)


def observe(
    name: str,
    config: AdaLoraConfig,
    units: Sequence[AdaLoraUnit],
    gradients: Sequence[Mapping[str, Tensor | None]],
) -> None:
    """Take the gradients of this step into the sensitivity and the uncertainty of each element, if they are finite.

    Args:
        name: of the adapter.
        config: its configuration.
        units: its units.
        gradients: those of each unit, as `gradients_of` gives them.

    Raises:
        RuntimeError: there are no gradients, or the parameters are not whole.
    """
    if all(gradient is None for own in gradients for gradient in own.values()):
        raise RuntimeError(
            f"no parameter of adapter {name!r} has a gradient: update_and_allocate comes after loss.backward() and "
            "optimizer.step(), and before optimizer.zero_grad()"
        )
    gradients_of_E = [own["E"] for own in gradients if own["E"] is not None]
    home = units[0].kept.device
    if gradients_of_E and not torch.cat([gradient.to(home) for gradient in gradients_of_E]).isfinite().all():
        # A gradient scaler has left this step out; E, through which all goes, tells of an overflow anywhere.
        return
    for unit, own in zip(units, gradients, strict=True):
        unit.settled.fill_(False)
        parameters = [getattr(unit, f"lora_{factor}") for factor in unit.FACTORS]
        _widen(unit)
        sensitivities = [getattr(unit, f"sensitivity_{factor}") for factor in unit.FACTORS]
        uncertainties = [getattr(unit, f"uncertainty_{factor}") for factor in unit.FACTORS]
        for parameter, sensitivity in zip(parameters, sensitivities, strict=True):
            if parameter.shape != sensitivity.shape:
                raise RuntimeError(
                    f"adapter {name!r} has a parameter of shape {tuple(parameter.shape)} in place of "
                    f"{tuple(sensitivity.shape)}: an engine has sharded it in a way that is not known here, and its "
                    "ranks cannot be allocated"
                )
        # A unit at a time: its tensors stay in the cache from one operation to the next.
        of_unit = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, own.values(), strict=True)]
        wide = sensitivities[0].dtype
        importance = torch._foreach_mul([p.to(wide) for p in parameters], [g.to(wide) for g in of_unit])
        torch._foreach_abs_(importance)
        torch._foreach_mul_(sensitivities, config.beta1)
        torch._foreach_add_(sensitivities, importance, alpha=1 - config.beta1)
        torch._foreach_sub_(importance, sensitivities)
        torch._foreach_abs_(importance)
        torch._foreach_mul_(uncertainties, config.beta2)
        torch._foreach_add_(uncertainties, importance, alpha=1 - config.beta2)


def _widen(unit: AdaLoraUnit) -> None:
    """Give the buffers their 32 bits again, where the mixed precision of FSDP1 has cast them as it started."""
    for name, buffer in unit.named_buffers(recurse=False):
        if buffer.is_floating_point() and buffer.dtype.itemsize < 4:
            setattr(unit, name, buffer.float())


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
