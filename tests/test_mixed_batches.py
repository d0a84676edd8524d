"""A batch in which each row has an adapter of its own."""

from __future__ import annotations

import pytest
import torch
from models import FAMILIES, assert_near, build, copy_adapter_to_peft, model_batch, peft_twin, snapshot
from torch import nn

import pyadapt
from pyadapt import LoraConfig

NAMES = ("first", "second", "third")


def wrapped(family="llama", **config):
    """Three adapters of different ranks, none of them the identity."""
    model = build(family)
    config = {"task_type": FAMILIES[family].task, "init_lora_weights": False, **config}
    for r, name in zip((2, 3, 5), NAMES, strict=True):
        model = pyadapt.wrap(model, LoraConfig(r=r, lora_alpha=2 * r + 1, **config), name)
    return model.eval()


def rows_of(family, names):
    """A batch of one row a name, without labels."""
    batch = model_batch(family, rows=len(names))
    labels = batch.pop("labels")
    return {**batch, "decoder_input_ids": labels} if family == "t5" else batch


def one_by_one(model, batch, names):
    """Each row answered alone, with its adapter switched on for the whole model."""
    answers = []
    for i, name in enumerate(names):
        row = {key: value[i : i + 1] if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
        if name == "__base__":
            with model.disable_adapter():
                answers.append(model(**row).logits)
        else:
            model.set_adapter(name)
            answers.append(model(**row).logits)
    return torch.cat(answers)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "names",
    [
        ["first", "second", "third", "__base__"],
        ["second", "second", "first", "second", "__base__", "__base__"],
        ["__base__", "__base__"],
        ["third"],
    ],
    ids=",".join,
)
def test_each_row_is_answered_by_its_adapter(family, names):
    model = wrapped(family)
    batch = rows_of(family, names)
    with torch.no_grad():
        found = model(**batch, adapter_names=names).logits
        assert_near(found, one_by_one(model, batch, names), "model")


def test_the_same_as_peft():
    names = ["second", "__base__", "first", "first"]
    model = wrapped()
    twin = peft_twin(build("llama"), "first", r=2, lora_alpha=5, task_type="CAUSAL_LM")
    import peft

    for r, name in ((3, "second"), (5, "third")):
        twin.add_adapter(name, peft.LoraConfig(r=r, lora_alpha=2 * r + 1, task_type="CAUSAL_LM"))
    for name in NAMES:
        copy_adapter_to_peft(model, twin, name)
    batch = rows_of("llama", names)
    with torch.no_grad():
        expected = twin.eval()(**batch, adapter_names=names).logits
        assert_near(model(**batch, adapter_names=names).logits, expected, "model")
        assert_near(model(**batch).logits, twin(**batch).logits, "model")


@pytest.mark.parametrize("quantised", [False, True])
def test_training_reaches_each_adapter_through_its_own_rows(quantised):
    names = ["first", "second", "first", "__base__"]
    model = build("llama")
    if quantised:
        pyadapt.quantize(model)
    for r, name in zip((2, 3, 5), NAMES, strict=True):
        model = pyadapt.wrap(model, LoraConfig(r=r, init_lora_weights=False), name)
    model.set_requires_grad(NAMES)
    batch = rows_of("llama", names)
    weight = torch.randn(model(**batch).logits.shape)
    (model(**batch, adapter_names=names).logits * weight).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert not any(".third." in name and bool(gradient.any()) for name, gradient in found.items())
    for name in ("first", "second"):
        model.zero_grad()
        model.set_adapter(name)
        mine = torch.tensor([other == name for other in names])
        part = {key: value[mine] if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
        (model(**part).logits * weight[mine]).sum().backward()
        for path, p in model.named_parameters():
            if f".{name}." in path:
                assert_near(found[path], p.grad, "gradient")


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_generate(family, options):
    names = ["first", "__base__", "second"]
    model = wrapped(family)
    ids = rows_of(family, names)["input_ids"]
    options = {"max_new_tokens": 5, "min_new_tokens": 5, **options}
    mask = torch.ones_like(ids)
    if options.pop("do_sample", False):
        # Sampling from the whole batch draws other numbers than sampling row by row: the most likely token is all left.
        options.update(do_sample=True, top_k=1)
    found = model.generate(input_ids=ids, attention_mask=mask, adapter_names=names, **options)
    count = options.get("num_return_sequences", 1)
    for i, name in enumerate(names):
        row = {"input_ids": ids[i : i + 1], "attention_mask": mask[i : i + 1]}
        if name == "__base__":
            with model.disable_adapter():
                expected = model.generate(**row, **options)
        else:
            model.set_adapter(name)
            expected = model.generate(**row, **options)
        assert found[i * count : (i + 1) * count].tolist() == expected.tolist()


def test_modules_that_are_trained_whole_follow_their_rows():
    model = wrapped("bert")
    with torch.no_grad():
        for i, name in enumerate(NAMES):
            model.classifier.copies[name].weight += i + 1
    names = ["first", "second", "__base__", "third"]
    batch = rows_of("bert", names)
    with torch.no_grad():
        assert_near(model(**batch, adapter_names=names).logits, one_by_one(model, batch, names), "model")


def test_adapters_on_different_layers():
    model = pyadapt.wrap(build("llama"), LoraConfig(target_modules=["q_proj"], init_lora_weights=False), "first")
    pyadapt.wrap(model, LoraConfig(target_modules=["v_proj", "up_proj"], init_lora_weights=False), "second")
    model.eval()
    names = ["second", "first"]
    batch = rows_of("llama", names)
    with torch.no_grad():
        assert_near(model(**batch, adapter_names=names).logits, one_by_one(model, batch, names), "model")


def test_the_state_is_as_before_also_after_an_error():
    model = wrapped()
    batch = rows_of("llama", NAMES)
    before = snapshot(model)
    model(**batch, adapter_names=list(NAMES))
    with pytest.raises(IndexError):
        model(input_ids=batch["input_ids"] + 1000, adapter_names=list(NAMES))
    assert snapshot(model) == before
    assert model.active_adapters == ["first"]


def test_compiled_whole():
    model = wrapped()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    batch = rows_of("llama", NAMES)
    for names in (["first", "second", "third"], ["third", "first", "second"]):
        with torch.no_grad():
            assert_near(compiled(**batch, adapter_names=names).logits, one_by_one(model, batch, names), "model")


@pytest.mark.parametrize(
    ("names", "match"),
    [
        (["first", "nobody", "second"], "no adapter is called 'nobody'"),
        (["first", "second"], "adapter_names has 2 names, but the batch has 3 rows"),
        ([], "adapter_names has 0 names"),
    ],
)
@pytest.mark.parametrize("call", ["forward", "generate"])
def test_names_that_do_not_fit(names, match, call):
    model = wrapped()
    batch = rows_of("llama", NAMES)
    before = snapshot(model)
    with pytest.raises(ValueError, match=match):
        (model if call == "forward" else model.generate)(**batch, adapter_names=names)
    assert snapshot(model) == before


def test_not_while_merged():
    model = wrapped()
    model.merge_adapter()
    with pytest.raises(RuntimeError, match="cannot choose adapters by row: first is merged"):
        model(**rows_of("llama", NAMES), adapter_names=list(NAMES))


def test_a_layer_that_sees_no_whole_rows():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            return self.linear(x.flatten()[:-4].view(-1, 4))

    model = pyadapt.wrap(Flat(), LoraConfig(target_modules=["linear"]), "first")
    with pytest.raises(ValueError, match="adapter_names has 2 names, but a layer inside the model sees 5 rows"):
        model(torch.randn(2, 3, 4), adapter_names=["first", "__base__"])
