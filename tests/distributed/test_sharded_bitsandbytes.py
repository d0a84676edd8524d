"""int8 weights under engines that shard: each rank holds its part, also of what bitsandbytes has quantised."""

from __future__ import annotations

import bitsandbytes_cases
import gang
import pytest
import torch
from bitsandbytes_cases import quantised, wrapped
from models import build, model_batch
from tolerance import assert_close

import pyadapt
from pyadapt.base import base_of
from pyadapt.base.bitsandbytes import BitsandbytesInt8
from pyadapt.base.int8 import Int8
from pyadapt.distributed import prepare_for_sharding


@pytest.fixture
def folder(tmp_path):
    """A function of a family: where its dense model lies."""

    def save(family):
        build(family).save_pretrained(tmp_path / family)
        return str(tmp_path / family)

    return save


@pytest.mark.parametrize(
    ("engine", "family"), [("zero3", "llama"), ("zero3", "gpt2"), ("fsdp2", "llama"), ("fsdp1", "llama")]
)
def test_bitsandbytes_int8_trains_sharded_as_in_one_process(engine, family, folder):
    first, second = gang.run(2, bitsandbytes_cases.train_under, engine, family, folder(family))
    for when in ("before", "after"):
        told, other = first[when], second[when]
        assert told["layers"] == {"llama": 14, "gpt2": 8}[family]
        assert "without loss" in told["report"]
        assert told["whole"] == told["counted"] == told["shard"] + other["shard"]
        # FSDP1 cuts where half of all parameters of a unit are reached.
        assert max(told["shard"], other["shard"]) <= 0.55 * told["whole"]


def test_each_of_four_ranks_holds_a_quarter_of_the_bytes():
    for held in gang.run(4, bitsandbytes_cases.shards_of, ["zero3", "fsdp2"], "llama"):
        for before, after in held.values():
            assert before > 0
            assert after * 4 == before


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_converted_weights_are_the_same_bits(family, folder):
    model = wrapped(quantised(family, folder(family)))
    before = {path: layer for path, layer in model.named_modules() if base_of(layer) is BitsandbytesInt8}
    weights = {path: (layer.weight.data.clone(), BitsandbytesInt8.matrix(layer)) for path, layer in before.items()}
    batch = model_batch(family, rows=2)
    wanted = model(**batch).logits
    report = prepare_for_sharding(model, "zero3")
    assert set(report.converted) == set(weights)
    for path, (weight, matrix) in weights.items():
        layer = model.get_submodule(path)
        assert base_of(layer) is Int8
        assert torch.equal(layer.weight.data, weight)
        assert torch.equal(Int8.matrix(layer), matrix)
    # Each layer that was converted has an adapter, whose kernel reads the same operands as before.
    assert torch.equal(model(**batch).logits, wanted)
    assert model.quantization_method == "pyadapt_int8"
    assert not getattr(model, "is_loaded_in_8bit", False)
    assert model.hf_quantizer.is_trainable
    model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(model(**batch).logits, wanted)
    plain = pyadapt.unwrap(model)
    assert {type(plain.get_submodule(path)).__name__ for path in weights} == {
        "Conv1D" if family == "gpt2" else "Linear"
    }


def test_a_converted_model_is_saved_and_loaded_again(folder, tmp_path):
    model = quantised("llama", folder("llama"))
    prepare_for_sharding(model, "fsdp2")
    model.save_pretrained(tmp_path / "int8")
    again = pyadapt.load_quantized(tmp_path / "int8")
    batch = model_batch("llama", rows=2)
    assert_close(again.eval()(**batch).logits, model.eval()(**batch).logits, "model", torch.float32)


def test_what_has_no_int8_weights_is_left_alone():
    model = build("llama")
    report = prepare_for_sharding(model, "zero3")
    assert (report.layers, report.bytes) == ((), 0)
    assert "no int8 weights" in str(report)


def test_bad_input(folder):
    with pytest.raises(ValueError, match="engine 'zero2' is not one of zero3, fsdp1, fsdp2"):
        prepare_for_sharding(build("llama"), "zero2")
    four = quantised("llama", folder("llama"), load_in_4bit=True)
    classes = [type(module) for module in four.modules()]
    with pytest.raises(ValueError, match=r"4-bit weights cannot be sharded by FSDP2.*load_in_8bit=True"):
        prepare_for_sharding(four, "fsdp2")
    assert [type(module) for module in four.modules()] == classes
    merged = wrapped(quantised("llama", folder("llama")))
    merged.merge_adapter()
    with pytest.raises(RuntimeError, match=r"an adapter is merged into model.layers.0.*unmerge_adapter\(\) first"):
        prepare_for_sharding(merged, "zero3")
