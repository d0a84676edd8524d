"""Multitask prompt tuning: which row is of which task, and what is beside it."""

from __future__ import annotations

import pytest
import torch
from models import assert_near
from prompt_cases import CONFIGS, TASKS, batch, build, config_of, extra, peft_twin, wrapped

import pyadapt

GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
FAMILIES = [("llama", "CAUSAL_LM"), ("t5", "SEQ_2_SEQ_LM"), ("bert", "SEQ_CLS")]


def unit_of(model, name="default"):
    """The unit that holds the parameters."""
    return next(module.adapters[name] for module in model.modules() if hasattr(module, "adapters"))


# --- the task of a row


@pytest.mark.parametrize(("family", "task", "submodules"), [*((*row, 1) for row in FAMILIES), (*FAMILIES[1], 2)])
def test_each_row_has_the_prompt_of_its_task(family, task, submodules):
    """As prompt tuning with the prompt of one task has it, and that is the product that the paper writes."""
    model = wrapped(family, task, "multitask", num_transformer_submodules=submodules)
    given = batch(task)
    given.pop("labels") if task == "SEQ_CLS" else None
    unit = unit_of(model)
    with torch.no_grad():
        prompts = unit.embeddings.double() * (unit.columns.double() @ unit.rows.double())
        found = model(**given, task_ids=TASKS).logits
        for row in range(2):
            one = wrapped(family, task, num_transformer_submodules=submodules)
            unit_of(one).embeddings.copy_(prompts[TASKS[row]])
            if submodules == 1 or task != "SEQ_2_SEQ_LM":
                alone = one(**{key: value[row : row + 1] for key, value in given.items()}).logits
                assert_near(found[row : row + 1], alone, "model")
            same = model(**{key: value[row : row + 1] for key, value in given.items()}, task_ids=TASKS[row : row + 1])
            assert_near(found[row : row + 1], same.logits, "model")
        other = model(**given, task_ids=TASKS.flip(0)).logits
    assert (found - other).abs().max() > 1e-3


def test_a_prompt_of_the_decoder_is_learnt_too():
    """With two prompts; PEFT's `generate` forgets the one that its training used, ours does not."""
    model = wrapped("t5", "SEQ_2_SEQ_LM", "multitask", num_transformer_submodules=2)
    twin, given = peft_twin(build("t5", "SEQ_2_SEQ_LM"), model), batch("SEQ_2_SEQ_LM")
    with torch.no_grad():
        ours, theirs = (one(**given, task_ids=TASKS) for one in (model, twin))
        assert_near(ours.logits, theirs.logits[:, -5:], "model")
        assert_near(ours.loss, theirs.loss, "model")
    model.train()(**given, task_ids=TASKS).loss.backward()
    assert (unit_of(model).embeddings.grad.abs().amax(1) > 0).all()
    tokens = model.eval().generate(given["input_ids"], task_ids=TASKS, **GREEDY)
    with torch.no_grad():
        logits = model(input_ids=given["input_ids"], decoder_input_ids=tokens[:, :-1], task_ids=TASKS).logits
    assert torch.equal(logits.argmax(-1), tokens[:, 1:])


@pytest.mark.parametrize("ids", [[2, 0], torch.tensor([2, 0], dtype=torch.int32), (2, 0)])
def test_ids_may_be_any_whole_numbers(ids):
    model, given = wrapped("llama", "CAUSAL_LM", "multitask"), batch("CAUSAL_LM")
    with torch.no_grad():
        assert torch.equal(model(**given, task_ids=ids).logits, model(**given, task_ids=TASKS).logits)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (None, r"multitask prompt tuning needs task_ids: the task of each row, model\(\.\.\., task_ids=\.\.\.\)"),
        ([0, 1, 2], r"task_ids of shape \(3,\) for 2 rows"),
        ([], r"task_ids of shape \(0,\) for 2 rows"),
        ([[0, 1]], r"task_ids of shape \(1, 2\) for 2 rows"),
        (1, r"task_ids of shape \(\) for 2 rows"),
        ([0.0, 1.0], "one whole number a row is needed"),
        ([0, 3], r"task_ids=\[0, 3\]: the adapter has tasks 0 to 2"),
        ([-1, 0], r"task_ids=\[-1, 0\]: the adapter has tasks 0 to 2"),
    ],
)
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_ids_that_cannot_be(family, ids, message):
    task = dict(FAMILIES)[family]
    model, given = wrapped(family, task, "multitask"), batch(task)
    with pytest.raises(ValueError, match=message):
        model(**given, task_ids=ids)
    with pytest.raises(ValueError, match=message):
        model.generate(given["input_ids"], task_ids=ids, **GREEDY)
    with torch.no_grad():
        assert model(**given, task_ids=TASKS).loss.isfinite()
    if ids is None:
        with pytest.raises(ValueError, match=message):
            model(**given)


def test_one_id_is_that_of_all_rows():
    """As in PEFT."""
    model, given = wrapped("llama", "CAUSAL_LM", "multitask"), batch("CAUSAL_LM")
    with torch.no_grad():
        assert torch.equal(model(**given, task_ids=[2]).logits, model(**given, task_ids=[2, 2]).logits)


def test_rows_are_no_beams():
    """Two ids for four rows are for the beams of two rows in `generate` alone."""
    model, given = wrapped("llama", "CAUSAL_LM", "multitask"), batch("CAUSAL_LM", rows=4)
    with pytest.raises(ValueError, match=r"task_ids of shape \(2,\) for 4 rows: one whole number a row is needed"):
        model(**given, task_ids=[0, 1])


@pytest.mark.parametrize("way", [{}, {"num_beams": 3}, {"num_return_sequences": 3, "do_sample": True}], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_generating_for_each_rows_task(family, way):
    task = dict(FAMILIES).get(family, "CAUSAL_LM")
    model, ids = wrapped(family, task, "multitask"), batch(task)["input_ids"]
    found = model.generate(ids, task_ids=TASKS, **{**GREEDY, **way})
    if "do_sample" in way:
        assert found.shape[0] == 6
        return
    rows = [model.generate(ids[i : i + 1], task_ids=TASKS[i : i + 1], **{**GREEDY, **way}) for i in range(2)]
    assert torch.equal(found, torch.cat(rows))


# --- beside other adapters


def test_task_ids_without_the_adapter_are_no_argument():
    """Neither while it is disabled, nor where another one is active, as it is for the plain model."""
    model, given = wrapped("llama", "CAUSAL_LM", "multitask"), batch("CAUSAL_LM")
    model.add_adapter("other", pyadapt.LoraConfig())
    model.add_adapter("prompt", config_of("prompt", "CAUSAL_LM"))
    with model.disable_adapter(), torch.no_grad():
        model(**given)
        refuses(model, given)
    for name in ("other", "prompt"):
        model.set_adapter(name)
        with torch.no_grad():
            model(**given)
        refuses(model, given)
    model.set_adapter("default")
    with torch.no_grad():
        model(**given, task_ids=TASKS)
    refuses(pyadapt.unwrap(model), given)


def refuses(model, given):
    with pytest.raises(ValueError, match="task_ids"):
        model.generate(given["input_ids"], task_ids=TASKS, **GREEDY)


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_what_the_base_model_makes_of_task_ids_is_left_to_it(family):
    task = dict(FAMILIES).get(family, "CAUSAL_LM")
    model, base, given = wrapped(family, task, "multitask"), build(family, task), batch(task)
    with model.disable_adapter():
        assert outcome(model, given) == outcome(base, given)
    model.add_adapter("other", pyadapt.LoraConfig())
    model.set_adapter("other")
    assert outcome(model, given) == outcome(base, given)


def outcome(model, given):
    """The loss, or the class of the error."""
    try:
        return model(**given, task_ids=TASKS).loss.item()
    except Exception as error:
        return type(error)


def test_two_prompts_at_once_are_refused():
    model = wrapped("llama", "CAUSAL_LM", "multitask")
    model.add_adapter("prompt", config_of("prompt", "CAUSAL_LM"))
    with pytest.raises(ValueError, match="'default' and 'prompt' each put a prompt before the text"):
        model.set_adapter(["default", "prompt"])
    assert model.active_adapters == ["default"]


def test_with_lora_at_once():
    """The prompt and weights of one adapter each: what has to be asked of the units is asked of the right ones."""
    model, given = wrapped("llama", "CAUSAL_LM", "multitask"), batch("CAUSAL_LM")
    with torch.no_grad():
        alone = model(**given, task_ids=TASKS).logits
        model.add_adapter("lora", pyadapt.LoraConfig(init_lora_weights=False))
        model.set_adapter(["default", "lora"])
        both = model(**given, task_ids=TASKS).logits
        model.set_adapter("default")
        assert torch.equal(model(**given, task_ids=TASKS).logits, alone)
    assert (both - alone).abs().max() > 1e-3


def test_rows_cannot_choose_it():
    model, given = wrapped("llama", "CAUSAL_LM", "multitask"), batch("CAUSAL_LM")
    with pytest.raises(ValueError, match="has one prompt for the whole batch"):
        model(**given, task_ids=TASKS, adapter_names=["default", "__base__"])
    assert not unit_of(model).call_arguments


def test_extra_arguments_of_calls_are_for_multitask_alone():
    assert [bool(extra(kind)) for kind in CONFIGS] == [False, False, False, True]
