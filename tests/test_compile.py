"""torch.compile of a wrapped model: whole, right, and once for all layers that are alike."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._dynamo.testing
from models import FAMILIES, assert_near, build, model_batch

import pyadapt
from pyadapt import LoraConfig

pytestmark = pytest.mark.slow


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


def base(family):
    """A model that transformers itself lets compile whole and once."""
    model = build(family)
    if family == "gpt2":
        # Its class name says no loss; transformers then warns at each call, which no graph can hold.
        model.loss_type = "ForCausalLM"
    if family in ("bert", "vit"):
        # Else the first call writes it into the configuration, and the second compiles again.
        model.config.problem_type = "single_label_classification"
    return model


@pytest.mark.parametrize("family", ["llama", "t5", "bert", "gpt2", "vit"])
def test_every_family_whole_in_training_and_evaluation(family):
    model = base(family)
    pyadapt.wrap(model, LoraConfig(init_lora_weights=False, task_type=FAMILIES[family].task))
    eager = copy.deepcopy(model)
    batch = model_batch(family)
    count = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=count, fullgraph=True)
    for training in (True, False):
        loss, found = step(compiled.train(training), batch)
        expected_loss, expected = step(eager.train(training), batch)
        assert_near(loss, expected_loss, "loss")
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert_near(found[name], gradient, "gradient")
        model.zero_grad()
        eager.zero_grad()
    # Training and evaluation are two graphs at most.
    assert count.frame_count <= 2
    with torch.no_grad():
        assert_near(compiled(**batch).logits, eager(**batch).logits, "model")


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_switch_does_not_compile_again(family):
    """Adapters of equal shapes share their code, also the trained copies of a head; only what differs is compiled."""
    task = FAMILIES[family].task
    model = pyadapt.wrap(base(family), LoraConfig(init_lora_weights=False, task_type=task))
    for name in ("second", "third"):
        model.add_adapter(name, LoraConfig(init_lora_weights=False, task_type=task))
    batch = model_batch(family)
    count = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model.eval(), backend=count, fullgraph=True)
    seen = []
    for name in ("default", "second", "third", "default"):
        model.set_adapter(name)
        with torch.no_grad():
            seen.append(compiled(**batch).logits)
            assert_near(seen[-1], model(**batch).logits, "model")
    assert not torch.allclose(seen[0], seen[1])
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
