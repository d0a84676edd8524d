"""torch.compile of a wrapped model: whole, right, and once for all layers that are alike."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._dynamo.testing
from models import assert_near, build, model_batch

import pyadapt
from pyadapt import LoraConfig

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def wrapped(quantised=False, **config):
    model = build("llama")
    if quantised:
        pyadapt.quantize(model)
    return pyadapt.wrap(model, LoraConfig(init_lora_weights=False, **config)).train()


def step(model, batch):
    torch.manual_seed(0)
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {
        name.removeprefix("_orig_mod."): p.grad for name, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize(("backend", "quantised"), [("aot_eager", False), ("aot_eager", True), ("inductor", False)])
def test_fullgraph_gives_the_loss_and_gradients_of_eager(backend, quantised):
    model = wrapped(quantised)
    eager = copy.deepcopy(model)
    batch = model_batch("llama")
    loss, found = step(torch.compile(model, backend=backend, fullgraph=True), batch)
    expected_loss, expected = step(eager, batch)
    assert_near(loss, expected_loss, "loss")
    assert found.keys() == expected.keys()
    assert len(found) == 8
    for name, gradient in expected.items():
        assert_near(found[name], gradient, "gradient")


def test_fullgraph_with_dropout():
    model = wrapped(lora_dropout=0.4)
    eager = copy.deepcopy(model)
    batch = model_batch("llama")
    loss, found = step(torch.compile(model, backend="aot_eager", fullgraph=True), batch)
    expected_loss, expected = step(eager, batch)
    still = model.eval()(**batch).loss
    assert abs(loss - still) > 1e-6
    assert_near(loss, expected_loss, "loss")
    for name, gradient in expected.items():
        assert_near(found[name], gradient, "gradient")


def test_fullgraph_under_autocast():
    model = wrapped()
    eager = copy.deepcopy(model)
    batch = model_batch("llama")
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = step(torch.compile(model, backend="aot_eager", fullgraph=True), batch)
        expected, _ = step(eager, batch)
    assert_near(loss, expected, "loss", torch.bfloat16)


def test_layers_that_are_alike_are_compiled_once():
    """Compiled layer by layer, as regional compilation does: one class, so the second layer finds the first's code."""
    model = wrapped()
    projections = [block.self_attn.q_proj for block in model.model.layers]
    compiled = 0

    def backend(graph, inputs):
        nonlocal compiled
        compiled += 1
        return graph

    @torch.compile(backend=backend, fullgraph=True)
    def run(layer, x):
        return layer(x)

    x = torch.randn(3, 24)
    outputs = [run(layer, x) for layer in projections]
    assert compiled == 1
    for layer, output in zip(projections, outputs, strict=True):
        assert_near(output, layer(x), "layer")


def test_a_second_step_does_not_compile_again():
    model = wrapped()
    count = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=count, fullgraph=True)
    for seed in range(3):
        step(compiled, model_batch("llama", seed))
    assert count.frame_count == 1


def test_switching_adapters_is_seen():
    model = wrapped()
    model.add_adapter("second", LoraConfig(init_lora_weights=False))
    batch = model_batch("llama")
    compiled = torch.compile(model.eval(), backend="aot_eager", fullgraph=True)
    for name in ("default", "second", ["default", "second"]):
        model.set_adapter(name)
        assert_near(compiled(**batch).logits, model(**batch).logits, "model")
    with model.disable_adapter():
        assert_near(compiled(**batch).logits, build("llama")(**batch).logits, "model")
