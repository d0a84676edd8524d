"""Input prompts under what training puts around a model: checkpointing, autocast, compilation, 8 bits, copies."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from models import assert_near, snapshot
from prompt_cases import CONFIGS, batch, build, config_of, extra, louder, trained, wrapped

import pyadapt
from pyadapt.base import base_of

# Every family with the plainest prompt, and one with every kind.
CASES = [
    *(("llama", "CAUSAL_LM", kind) for kind in CONFIGS),
    *((family, "CAUSAL_LM", "prompt") for family in ("gpt2", "bloom")),
    *((family, "SEQ_2_SEQ_LM", "multitask") for family in ("t5", "bart")),
    *(("bert", "SEQ_CLS", kind) for kind in ("mlp", "multitask")),
    ("deberta-v2", "TOKEN_CLS", "prompt"),
]
COMPILED = [
    *(("llama", "CAUSAL_LM", kind) for kind in CONFIGS),
    *(
        (family, task, kind)
        for family, task in (("bert", "SEQ_CLS"), ("t5", "SEQ_2_SEQ_LM"))
        for kind in ("lstm", "multitask")
    ),
]


def step(model, given):
    """The loss and all gradients of one step."""
    model.zero_grad()
    loss = model(**given).loss
    loss.backward()
    return loss.detach(), {
        name.removeprefix("_orig_mod."): parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def assert_steps_equal(found, expected, names):
    assert_near(found[0], expected[0], "loss")
    assert found[1].keys() == expected[1].keys() == names
    for name, gradient in expected[1].items():
        assert gradient.abs().max() > 0, name
        assert_near(found[1][name], gradient, "gradient")


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize(("family", "task", "kind"), CASES)
def test_gradient_checkpointing(family, task, kind, reentrant, when):
    """The embeddings are frozen, and still the blocks' inputs need gradients: the prompt is among them."""
    given = {**batch(task), **extra(kind)}
    expected = step(wrapped(family, task, kind).train(), given)
    model = build(family, task)
    options = {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    if when == "before":
        model.gradient_checkpointing_enable(**options)
    torch.manual_seed(7)
    model = louder(pyadapt.wrap(model, config_of(kind, task))).train()
    if when == "after":
        model.gradient_checkpointing_enable(**options)
    assert_steps_equal(step(model, given), expected, trained(model).keys())


@pytest.mark.parametrize(("family", "task", "kind"), CASES)
def test_autocast(family, task, kind):
    model, given = wrapped(family, task, kind).train(), {**batch(task), **extra(kind)}
    exact = step(copy.deepcopy(model), given)
    with torch.autocast("cpu", torch.bfloat16):
        loss, gradients = step(model, given)
    assert_near(loss, exact[0], "loss", torch.bfloat16)
    assert gradients.keys() == trained(model).keys()
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        assert gradient.isfinite().all(), name
        assert gradient.abs().max() > 0, name


@pytest.mark.slow
@pytest.mark.parametrize(("family", "task", "kind"), COMPILED)
def test_fullgraph(family, task, kind):
    model, given = wrapped(family, task, kind), {**batch(task), **extra(kind)}
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected = step(eager.train(), given)
    model.train()
    assert_steps_equal(step(compiled, given), expected, trained(model).keys())
    model.eval()
    with torch.no_grad():
        assert_near(compiled(**given).logits, eager.eval()(**given).logits, "model")


@pytest.mark.parametrize(("family", "task", "kind"), CASES)
def test_a_model_of_16_bits(family, task, kind):
    """The prompt is held in fp32, and rounded where it meets the text."""
    model = build(family, task).bfloat16()
    torch.manual_seed(7)
    model = louder(pyadapt.wrap(model, config_of(kind, task))).eval()
    own = {name: value for name, value in trained(model).items() if ".copies." not in name}
    assert own
    assert {value.dtype for value in own.values()} == {torch.float32}
    given, reference = {**batch(task), **extra(kind)}, wrapped(family, task, kind)
    with torch.no_grad():
        for (_, value), (_, other) in zip(reference.named_parameters(), model.named_parameters(), strict=True):
            value.copy_(other)
        outputs = model(**given)
        assert outputs.logits.dtype == torch.bfloat16
        assert_near(outputs.loss.float(), reference(**given).loss, "loss", torch.bfloat16)
    _, gradients = step(model.train(), given)
    assert gradients.keys() == trained(model).keys()
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_an_adapter_may_be_held_in_16_bits():
    model = pyadapt.wrap(
        build("llama", "CAUSAL_LM").bfloat16(), config_of("mlp", "CAUSAL_LM", adapter_dtype=torch.bfloat16)
    )
    assert {value.dtype for value in trained(model).values()} == {torch.bfloat16}
    loss, gradients = step(model, batch("CAUSAL_LM"))
    assert loss.isfinite()
    assert {gradient.dtype for gradient in gradients.values()} == {torch.bfloat16}


@pytest.mark.parametrize(("family", "task", "kind"), COMPILED)
def test_a_model_of_8_bits(family, task, kind):
    # What is trained whole stays as it is.
    plain = pyadapt.quantize(build(family, task), skip=["classifier"] if task == "SEQ_CLS" else ["lm_head"])
    before = {key: value.clone() for key, value in plain.state_dict().items()}
    torch.manual_seed(7)
    model = louder(pyadapt.wrap(plain, config_of(kind, task))).eval()
    given = {**batch(task), **extra(kind)}
    with torch.no_grad():
        # A model of the weights that the int8 ones stand for.
        dense = build(family, task)
        for path, layer in model.named_modules():
            base = base_of(layer)
            if base is not None and base.quantized:
                dense.get_submodule(path).weight.copy_(base.matrix(layer))
        torch.manual_seed(7)
        dense = louder(pyadapt.wrap(dense, config_of(kind, task))).eval()
        assert_near(model(**given).logits, dense(**given).logits, "model")
    loss, gradients = step(model.train(), given)
    assert loss.isfinite()
    assert gradients.keys() == trained(model).keys()
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())
    after = pyadapt.unwrap(model).state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in after.items())


@pytest.mark.parametrize(("family", "task", "kind"), CASES)
def test_copies_and_pickles(family, task, kind):
    model, given = wrapped(family, task, kind), {**batch(task), **extra(kind)}
    step(model.train(), given)
    model.eval()
    with torch.no_grad():
        expected = model(**given).loss
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
            assert torch.equal(twin(**given).loss, expected)
            for parameter in trained(twin).values():
                parameter.zero_()
            assert twin(**given).loss != expected
            assert torch.equal(model(**given).loss, expected)


def test_a_decoder_shares_the_encoders_parameters_in_a_copy():
    model = copy.deepcopy(wrapped("t5", "SEQ_2_SEQ_LM", "multitask", num_transformer_submodules=2))
    encoder, decoder = (part.adapters.default for part in (model.encoder, model.decoder))
    for name in ("embeddings", "columns", "rows"):
        assert getattr(encoder, name) is getattr(decoder, name)
    assert len(trained(model)) == 3


@pytest.mark.parametrize(("family", "task", "kind"), CASES)
def test_unwrapping_is_exact(family, task, kind):
    model = build(family, task)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.dim() == 2)
    before, keys = snapshot(model), set(model.state_dict())
    model = pyadapt.wrap(model, config_of(kind, task))
    assert {key for key in model.state_dict() if ".adapters." not in key and ".copies." not in key} == keys
    step(model, {**batch(task), **extra(kind)})
    if hasattr(model, "generate") and task != "SEQ_CLS" and task != "TOKEN_CLS":
        more = extra(kind)
        model.generate(batch(task)["input_ids"], max_new_tokens=3, cache_implementation="static", **more)
        del model._previous_max_cache_length
    assert snapshot(pyadapt.unwrap(model)) == before


@pytest.mark.parametrize("kind", CONFIGS)
def test_switching_and_deleting(kind):
    model, given = wrapped("llama", "CAUSAL_LM", kind), batch("CAUSAL_LM")
    more = extra(kind)
    with torch.no_grad():
        base = build("llama", "CAUSAL_LM")(**given).logits
        first = model(**given, **more).logits
        model.add_adapter("other", config_of("prompt", "CAUSAL_LM", num_virtual_tokens=5))
        assert torch.equal(model(**given, **more).logits, first)
        assert model.adapter_state.prepended == 3
        model.set_adapter("other")
        second = model(**given).logits
        assert model.adapter_state.prepended == 5
        with model.disable_adapter():
            assert torch.equal(model(**given).logits, base)
            assert model.adapter_state.prepended == 0
        model.set_adapter("default")
        assert torch.equal(model(**given, **more).logits, first)
        model.delete_adapter("default")
        model.set_adapter("other")
        assert torch.equal(model(**given).logits, second)
    assert (first - second).abs().max() > 1e-3
    assert (first - base).abs().max() > 1e-3


def test_dropout_of_the_lstm_is_for_training_alone():
    model = wrapped("llama", "CAUSAL_LM", "lstm", encoder_dropout=0.5)
    given = batch("CAUSAL_LM")
    losses = {}
    for training in (True, False):
        model.train(training)
        losses[training] = [model(**given).loss.item() for _ in range(3)]
    assert len(set(losses[True])) == 3
    assert len(set(losses[False])) == 1
    model.train()
    saved = [model.get_adapter_state_dict("default")["prompt_embeddings"] for _ in range(2)]
    assert torch.equal(*saved)
    model.eval()
    with torch.no_grad():
        assert torch.equal(saved[0], model.model.adapters.default.prompt(1))


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_prompt_is_where_the_table_is(kind):
    """On the meta device nothing is computed; made there, and moved, it is where the model is."""
    with torch.device("meta"):
        model = build("llama", "CAUSAL_LM")
    model = pyadapt.wrap(model, config_of(kind, "CAUSAL_LM"))
    assert {value.device.type for value in trained(model).values()} == {"meta"}
    model = wrapped("llama", "CAUSAL_LM", kind).double()
    assert {value.dtype for value in trained(model).values()} == {torch.float64}
    assert model(**batch("CAUSAL_LM"), **extra(kind)).logits.dtype == torch.float64
