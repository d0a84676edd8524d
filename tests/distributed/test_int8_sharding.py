"""int8 weights under FSDP: each rank holds its part of their bytes, in the dtype that the engine can shard."""

import fsdp_cases
import gang
import pytest
import torch
from models import build

import pyadapt
from pyadapt.base.int8 import Int8, store_as
from pyadapt.layer import base_modules
from pyadapt.planning import count_base_parameters
from pyadapt.quantization import set_storage_dtype

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize(("engine", "ranks"), [("fsdp1", 4), ("fsdp1_flat", 2), ("fsdp2", 2), ("fsdp2", 4)])
def test_a_rank_holds_its_part(engine, ranks):
    held = gang.run(ranks, fsdp_cases.bytes_of_base, engine)
    whole = held[0][1]
    # What FSDP pads is at most a few values a layer.
    assert sum(part for part, _ in held) >= whole
    assert all(part <= 1.1 * whole / ranks for part, _ in held)


@pytest.mark.parametrize("engine", ["fsdp1", "fsdp1_flat"])
def test_a_cast_is_refused(engine):
    for said in gang.run(2, fsdp_cases.guard_against_casts, engine):
        assert "bytes of torch.float32" in said
        assert "cast to torch.bfloat16" in said
        assert "param_dtype=torch.float32" in said


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_storage_changes_no_value_and_no_file(family, dtype, tmp_path):
    plain, held = pyadapt.quantize(build(family)), pyadapt.quantize(build(family), storage_dtype=dtype)
    ids = torch.arange(8)[None]
    assert torch.equal(held(ids).logits, plain(ids).logits)
    assert count_base_parameters(held) == count_base_parameters(plain)
    wanted = plain.state_dict()
    for key, value in held.state_dict().items():
        assert value.dtype == wanted[key].dtype
        assert torch.equal(value, wanted[key])
    for name, model in (("plain", plain), ("held", held)):
        model.save_pretrained(tmp_path / name)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "held")]
    assert files[0] == files[1]
    again = pyadapt.quantize(build(family, seed=1), storage_dtype=dtype)
    again.load_state_dict(wanted)
    assert torch.equal(again(ids).logits, plain(ids).logits)


@pytest.mark.parametrize("dtype", DTYPES)
def test_merging_over_stored_bytes(dtype):
    models = []
    for storage in (None, dtype):
        model = pyadapt.quantize(build("llama"), storage_dtype=storage)
        torch.manual_seed(0)
        models.append(pyadapt.wrap(model, {"peft_type": "LORA", "r": 4, "init_lora_weights": False}))
    ids = torch.arange(8)[None]
    before = models[1](ids).logits
    for model in models:
        model.merge_adapter()
    assert torch.equal(models[0](ids).logits, models[1](ids).logits)
    models[1].unmerge_adapter()
    assert torch.equal(models[1](ids).logits, before)
    models[0].unmerge_adapter()
    for model in models:
        pyadapt.merge(model)
    assert torch.equal(models[0](ids).logits, models[1](ids).logits)
    assert all("stored_as" not in vars(module) for module in models[1].modules())


def test_odd_sizes_fill_the_wider_dtype_with_zeros():
    layer = torch.nn.Sequential(torch.nn.Linear(7, 5))
    pyadapt.quantize(layer, skip=[], storage_dtype=torch.float32)
    wanted = Int8.matrix(layer[0])
    assert layer[0].weight.shape == (9,)
    for dtype in (*DTYPES, None):
        store_as(layer[0], dtype)
        assert torch.equal(Int8.matrix(layer[0]), wanted)
    assert layer[0].weight.shape == (5, 7)


def test_casting_the_model_leaves_the_bytes():
    layer = torch.nn.Sequential(torch.nn.Linear(7, 5))
    pyadapt.quantize(layer, skip=[], storage_dtype=torch.float32)
    wanted = Int8.matrix(layer[0])
    layer.to(torch.bfloat16)
    assert layer[0].bias.dtype == torch.bfloat16
    assert layer[0].weight.dtype == torch.float32
    assert torch.equal(Int8.matrix(layer[0]), wanted)


def test_the_storage_can_be_changed_later():
    model = pyadapt.quantize(build("llama"))
    pyadapt.wrap(model, {"peft_type": "LORA", "r": 4})
    assert set_storage_dtype(model, torch.bfloat16) is model
    layers = [layer for _, layer in base_modules(model) if hasattr(layer, "dense_dtype")]
    assert layers
    assert all(layer.weight.dtype == layer.weight_scale.dtype == torch.bfloat16 for layer in layers)
    with pytest.raises(ValueError, match=r"storage_dtype=torch.int16 is not"):
        set_storage_dtype(model, torch.int16)


def test_other_layers_have_no_storage():
    with pytest.raises(ValueError, match="holds no int8 weight"):
        store_as(torch.nn.Linear(3, 3), torch.float32)
