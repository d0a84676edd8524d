"""Live modules with another class: copies, pickles, hooks, and what is refused."""

from __future__ import annotations

import copy
import io
import pickle
import types

import pytest
import torch
from models import assert_near, build, model_batch, plain_module, snapshot
from torch import nn

import pyadapt
from pyadapt import LoraConfig


def wrapped(**config):
    return pyadapt.wrap(build("llama"), LoraConfig(init_lora_weights=False, **config))


def logits(model):
    return model(**model_batch("llama")).logits.detach()


def test_one_class_for_each_pair():
    model = wrapped()
    layers = [block.self_attn for block in model.model.layers]
    assert len({type(projection) for layer in layers for projection in (layer.q_proj, layer.v_proj)}) == 1
    assert type(wrapped()) is type(model)
    assert type(wrapped().model.layers[0].self_attn.q_proj) is type(layers[0].q_proj)


def test_deepcopy_is_independent():
    model = wrapped(modules_to_save=["lm_head"])
    expected = logits(model)
    twin = copy.deepcopy(model)
    assert type(twin) is type(model)
    assert pyadapt.is_wrapped(twin)
    assert torch.equal(logits(twin), expected)
    optimizer = torch.optim.SGD([p for p in twin.parameters() if p.requires_grad], lr=1.0)
    twin(**model_batch("llama")).loss.backward()
    optimizer.step()
    assert not torch.equal(logits(twin), expected)
    assert torch.equal(logits(model), expected)
    twin.add_adapter("second", LoraConfig())
    twin.set_adapter("second")
    assert list(model.peft_config) == ["default"]
    assert model.active_adapters == ["default"]
    pyadapt.unwrap(twin)
    assert pyadapt.is_wrapped(model)
    assert torch.equal(logits(twin), logits(build("llama")))


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_pickle(protocol):
    model = wrapped()
    model.add_adapter("second", LoraConfig(r=2, init_lora_weights=False))
    again = pickle.loads(pickle.dumps(model, protocol))
    assert type(again) is type(model)
    assert torch.equal(logits(again), logits(model))
    again.set_adapter("second")
    model.set_adapter("second")
    assert torch.equal(logits(again), logits(model))
    assert type(pyadapt.unwrap(again)) is type(build("llama"))


def test_torch_save_of_a_whole_model():
    model = pyadapt.wrap(plain_module(), LoraConfig(target_modules=["encoder.0"], init_lora_weights=False))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    x = torch.randn(2, 7)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), model(x))


def test_deepcopy_of_one_layer():
    layer = wrapped().model.layers[0].self_attn.q_proj
    twin = copy.deepcopy(layer)
    x = torch.randn(3, 24)
    assert torch.equal(twin(x), layer(x))


# --- accelerate -------------------------------------------------------------------------------


def test_a_hook_from_before_wrap_does_not_hide_the_adapter():
    hooks = pytest.importorskip("accelerate.hooks", reason="tests accelerate's hooks")
    plain, expected = build("llama"), logits(wrapped())

    class Counts(hooks.ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            Counts.calls += 1
            return args, kwargs

    layer = plain.model.layers[0].self_attn.q_proj
    hooks.add_hook_to_module(layer, Counts())
    hooks.add_hook_to_module(plain, Counts())
    torch.manual_seed(1234)
    pyadapt.wrap(plain, LoraConfig(init_lora_weights=False))
    with_adapter = logits(plain)
    assert Counts.calls == 2
    with plain.disable_adapter():
        assert torch.equal(logits(plain), logits(build("llama")))
    assert not torch.allclose(with_adapter, logits(build("llama")))
    assert with_adapter.shape == expected.shape
    pyadapt.unwrap(plain)
    assert torch.equal(logits(plain), logits(build("llama")))
    assert Counts.calls > 2
    hooks.remove_hook_from_module(plain, recurse=True)
    assert type(layer) is nn.Linear
    assert "forward" not in vars(layer) or layer.forward.__func__ is nn.Linear.forward
    assert torch.equal(logits(plain), logits(build("llama")))


def test_a_hook_from_after_wrap_and_unwrap_under_it():
    hooks = pytest.importorskip("accelerate.hooks", reason="tests accelerate's hooks")
    model = wrapped()
    expected = logits(model)
    for module in (model, model.model.layers[0].self_attn.q_proj):
        hooks.add_hook_to_module(module, hooks.ModelHook())
    assert torch.equal(logits(model), expected)
    pyadapt.unwrap(model)
    assert torch.equal(logits(model), logits(build("llama")))


def test_cpu_offload_before_wrap():
    accelerate = pytest.importorskip("accelerate", reason="tests accelerate's offloading")
    model = build("llama")
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.model.layers[0].self_attn.q_proj.weight.is_meta
    pyadapt.wrap(model, LoraConfig(init_lora_weights=False))
    assert not any(p.is_meta for p in model.parameters() if p.requires_grad)
    reference = wrapped()
    with torch.no_grad():
        for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
            if ".adapters." in name:
                theirs.copy_(ours)
    assert_near(logits(model), logits(reference), "model")
    assert not torch.allclose(logits(model), logits(build("llama")))


def test_device_map(tmp_path):
    pytest.importorskip("accelerate", reason="device_map goes through accelerate")
    build("llama").save_pretrained(tmp_path)
    model = type(build("llama")).from_pretrained(tmp_path, device_map={"": "cpu"})
    torch.manual_seed(1)
    pyadapt.wrap(model, LoraConfig(init_lora_weights=False))
    torch.manual_seed(1)
    reference = build("llama")
    torch.manual_seed(1)
    pyadapt.wrap(reference, LoraConfig(init_lora_weights=False))
    assert_near(logits(model), logits(reference), "model")


def test_offloaded_weights_serve_in_forward_and_are_refused_in_backward():
    """Backward reads the weight again, when the hook has taken it away: an error, never a gradient of garbage."""
    accelerate = pytest.importorskip("accelerate", reason="tests accelerate's offloading")
    model = build("llama")
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    pyadapt.wrap(model, LoraConfig())
    loss = model(**model_batch("llama")).loss
    assert_near(loss, build("llama")(**model_batch("llama")).loss, "model")
    with pytest.raises(RuntimeError, match="offloaded"):
        loss.backward()
    before = {name: p.device for name, p in model.named_parameters()}
    with pytest.raises(RuntimeError, match="offloaded"):
        pyadapt.merge(model)
    assert {name: p.device for name, p in model.named_parameters()} == before
    assert pyadapt.is_wrapped(model)


# --- refused ----------------------------------------------------------------------------------


def refused(model, match, error=RuntimeError, config=None):
    before = snapshot(model)
    with pytest.raises(error, match=match):
        pyadapt.wrap(model, config or LoraConfig(target_modules="all-linear"))
    assert snapshot(model) == before
    assert not pyadapt.is_wrapped(model)


@pytest.mark.parametrize("kind", ["function", "bound method", "partial"])
def test_a_forward_of_the_instance(kind):
    import functools

    model = build("llama")
    layer = model.model.layers[1].self_attn.q_proj
    own = {
        "function": lambda x: x,
        "bound method": types.MethodType(lambda self, x: x, layer),
        "partial": functools.partial(nn.Linear.forward, layer),
    }[kind]
    layer.forward = own
    refused(model, r"model\.layers\.1\.self_attn\.q_proj: this Linear has a `forward` of its own", config=LoraConfig())


def test_a_forward_of_the_instance_on_a_module_to_save():
    model = build("bert")
    model.classifier.forward = lambda x: x
    refused(model, "classifier: this Linear has a `forward` of its own", config=LoraConfig(task_type="SEQ_CLS"))


def test_offloaded_to_disk(tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="tests accelerate's offloading")
    model = build("llama")
    accelerate.disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    plan = {"target_modules": ["q_proj"], "peft_type": "LORA"}
    with pytest.raises(RuntimeError, match=r"layers\.0\.self_attn\.q_proj is offloaded to disk; load the model with"):
        pyadapt.wrap(model, plan)
    assert not pyadapt.is_wrapped(model)


def test_compiled():
    refused(torch.compile(build("llama"), backend="eager"), "compiled already: wrap it first, then torch.compile it")


@pytest.mark.slow
def test_compiled_in_place_before_wrap():
    """`model.compile()` leaves the class, and its compiled call finds the adapter."""
    model = build("llama")
    model.compile(backend="eager")
    before = logits(model)
    pyadapt.wrap(model, LoraConfig(init_lora_weights=False))
    after = logits(model)
    assert not torch.allclose(after, before)
    assert_near(after, model.forward(**model_batch("llama")).logits, "model")


def test_no_module():
    for model in (None, 3, "model", nn.Linear):
        with pytest.raises(TypeError, match=r"not a torch\.nn\.Module"):
            pyadapt.wrap(model, LoraConfig())


@pytest.fixture
def gloo(tmp_path):
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch was built without distributed")
class TestFsdp2:
    """fully_shard in a process group of one."""

    def shard(self, model):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (1,))
        for block in model.model.layers:
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    def test_sharded_first_is_refused(self, gloo):
        model = self.shard(build("llama"))
        with pytest.raises(RuntimeError, match="sharded already: wrap it first, then shard it"):
            pyadapt.wrap(model, LoraConfig())
        assert not any(".adapters." in name for name, _ in model.named_parameters())

    def test_wrapped_first_trains_the_same(self, gloo):
        model = wrapped()
        reference = copy.deepcopy(model)
        self.shard(model)
        assert pyadapt.is_wrapped(model)
        batch = model_batch("llama")
        model.train()(**batch).loss.backward()
        reference.train()(**batch).loss.backward()
        for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
            if theirs.requires_grad:
                assert_near(ours.grad.full_tensor(), theirs.grad, "gradient")
            else:
                assert ours.grad is None, name
