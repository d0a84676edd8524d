"""What the tests of AdaLoRA share: our model and peft's twin of it, and loops that train them."""

from __future__ import annotations

import copy
import warnings

import torch
from models import FAMILIES, build, model_batch

import pyadapt
from pyadapt import AdaLoraConfig

# A schedule with every phase: warm-up, allocations now and then, a few steps after the last.
SCHEDULE = {"init_r": 4, "target_r": 2, "total_step": 14, "tinit": 2, "tfinal": 4, "deltaT": 2, "beta2": 0.7}


def config_of(name="llama", **config):
    family = FAMILIES[name]
    return {"target_modules": list(family.targets), "task_type": family.task, "lora_alpha": 9, **SCHEDULE, **config}


def wrapped(name="llama", model=None, **config):
    """Our model; the seed is that of `twin_of`."""
    model = build(name) if model is None else model
    torch.manual_seed(7)
    return pyadapt.wrap(model, AdaLoraConfig(**config_of(name, **config)))


def twin_of(name="llama", model=None, **config):
    """peft's; a deep copy of `model` under it."""
    import peft

    model = build(name) if model is None else copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False but the target module is `Conv1D`")
        torch.manual_seed(7)
        return peft.get_peft_model(model, peft.AdaLoraConfig(**config_of(name, **config)))


def peft_name(own):
    """peft's parameter name for one of ours: `...adapters.<name>.lora_A` -> `...lora_A.<name>`."""
    path, _, rest = own.partition(".adapters.")
    name, _, factor = rest.partition(".")
    return f"base_model.model.{path}.{factor}.{name}"


def factors(model, name="default"):
    """Our parameters of an adapter, by name."""
    return {key: p for key, p in model.named_parameters() if f".adapters.{name}.lora_" in f".{key}"}


def randomise(model, seed=3):
    """Give every factor values that matter, E among them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in factors(model).values():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def share(model, twin):
    """Give peft's twin the values of our adapter."""
    theirs = dict(twin.named_parameters())
    with torch.no_grad():
        for key, parameter in factors(model).items():
            theirs[peft_name(key)].copy_(parameter)


def zeros_of_E(model):
    """Path of each layer -> which of its E are 0; of our model or of peft's."""
    found = {}
    for key, parameter in model.named_parameters():
        if ".lora_E" in key:
            path = key.removeprefix("base_model.model.").replace(".adapters.default", "").partition(".lora_E")[0]
            found[path] = (parameter == 0).flatten().tolist()
    return found


def optimizer_of(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def train(model, optimizer, steps, allocate, name="llama"):
    """(the losses, the zeros in E after each step) of steps counted from 1."""
    losses, zeros = [], []
    for step in steps:
        loss = model(**model_batch(name, step)).loss
        loss.backward()
        optimizer.step()
        allocate(step)
        optimizer.zero_grad()
        losses.append(loss.detach().clone())
        zeros.append(zeros_of_E(model))
    return torch.stack(losses), zeros
