"""Kernels take weights that begin anywhere: an engine hands out views into one flat tensor of many layers."""

import pytest
import torch

import pyadapt

N, K = 24, 40


def moved(value, by):
    """The same values, `by` elements behind the start of an allocation."""
    flat = torch.empty(by + value.numel(), dtype=value.dtype)
    view = flat[by:].view(value.shape)
    return view.copy_(value)


@pytest.mark.parametrize("by", [1, 2, 3])
@pytest.mark.parametrize("base", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("method", ["LORA", "IA3", "LOHA", "LOKR"])
def test_a_weight_at_any_address(method, base, by):
    results = []
    for offset in (0, by):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(K, N), torch.nn.Linear(N, N))
        model.to(torch.bfloat16 if base == "bfloat16" else torch.float32)
        if base == "int8":
            pyadapt.quantize(model, skip=[])
        config = {"peft_type": method, "target_modules": ["0", "1"]}
        config |= {"feedforward_modules": []} if method == "IA3" else {"r": 4}
        pyadapt.wrap(model, config)
        torch.manual_seed(1)
        for layer in model:
            for name, value in list(layer.named_parameters()):
                if value.requires_grad:
                    value.data.copy_(torch.randn_like(value))
                place = layer.get_submodule(name.rpartition(".")[0])
                own = torch.nn.Parameter(moved(value.detach(), offset), requires_grad=value.requires_grad)
                setattr(place, name.rpartition(".")[2], own)
        x = moved(torch.randn(7, K).to(model[0].bias.dtype), offset).requires_grad_()
        y = model(x)
        y.square().mean().backward()
        trained = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
        results.append([y.detach(), x.grad, *trained])
    for aligned, unaligned in zip(*results, strict=True):
        assert torch.equal(aligned, unaligned)
