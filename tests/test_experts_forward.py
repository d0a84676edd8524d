"""How a module runs while its own parameters have adapters: compiled, checkpointed, autocast, and after an error."""

from __future__ import annotations

import pytest
import torch
from models import assert_near
from models.mixtures import IMPLEMENTATIONS, RANDOM, assert_same_step, gradients, logits, pair, step

from pyadapt import LoraConfig


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_autocast(implementation):
    model, twin = pair("mixtral", implementation)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_near(step(model), step(twin), "model", torch.bfloat16)
    for key, gradient in gradients(model).items():
        assert gradient.dtype == torch.float32, key
        assert bool(gradient.any() & gradient.isfinite().all()), key


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_gradient_checkpointing(use_reentrant, implementation):
    model, twin = pair("qwen3_moe", implementation)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert_same_step(model, twin)


def test_the_module_is_itself_again_after_an_error():
    model, _ = pair("mixtral")
    experts = model.model.layers[0].mlp.experts
    attributes = sorted(vars(experts))
    with pytest.raises(RuntimeError):
        experts(torch.randn(3, 5), torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 2))
    assert sorted(vars(experts)) == attributes
    assert experts.gate_up_proj is dict(experts.named_parameters())["gate_up_proj"]


def test_kernels_that_need_tensors_get_them(monkeypatch):
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, batched_mm_experts_forward

    seen = []

    def strict(self, *args):
        seen.append(type(self.gate_up_proj))
        return batched_mm_experts_forward(self, *args)

    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._global_mapping, "strict", strict)
    model, twin = pair("mixtral", "batched_mm")
    for config in (model.config, twin.config):
        config._experts_implementation = "strict"
    assert_same_step(model, twin)
    assert torch.Tensor in seen


@pytest.mark.parametrize(
    ("name", "implementation"),
    # batched_mm itself copies an expert's weight for each token.
    [case for case in IMPLEMENTATIONS if case[1] != "batched_mm"],
)
def test_nothing_of_the_size_of_the_experts_is_made_for_backward(name, implementation):
    """What backward keeps with the adapter beyond what the frozen model keeps is smaller than one expert stack."""

    def largest_kept(model):
        owned = {p.untyped_storage().data_ptr() for p in model.parameters()}
        sizes = []

        def pack(tensor):
            if tensor.untyped_storage().data_ptr() not in owned:
                sizes.append(tensor.numel())
            return tensor

        experts = next(module for module in model.modules() if type(module).__name__.endswith("Experts"))
        x = torch.randn(8, 24, requires_grad=True)
        routing = [torch.arange(8)[:, None] % 4, torch.ones(8, 1)] if name != "llama4" else []
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            experts(x, *routing).sum().backward()
        return max(sizes), experts.gate_up_proj.numel()

    model, _ = pair(name, implementation, r=1)
    kept, stack = largest_kept(model)
    assert kept < stack / 4


@pytest.mark.parametrize(("name", "implementation"), [("mixtral", "batched_mm"), ("gpt_oss", "grouped_mm")])
def test_compiled_whole(name, implementation):
    model, _ = pair(name, implementation)
    model.add_adapter("second", LoraConfig(**RANDOM))
    expected, wanted = step(model), gradients(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    wanted = {key: gradient.clone() for key, gradient in wanted.items()}
    model.zero_grad()
    assert_near(step(compiled), expected, "model")
    for key, gradient in gradients(model).items():
        assert_near(gradient, wanted[key], "gradient")
    model.set_adapter(["default", "second"])
    assert_near(logits(compiled), logits(model), "model")
