"""AdaLoRA's schedule: peft's allocation step by step, where peft fails as it should be, resumed bit for bit."""

from __future__ import annotations

import copy
import logging
import os

import pytest
import torch
from adalora_cases import config_of, factors, optimizer_of, randomise, train, twin_of, wrapped, zeros_of_E
from models import assert_near, build, model_batch, snapshot
from torch import nn

import pyadapt
from pyadapt import AdaLoraConfig, LoraConfig
from pyadapt.methods.adalora.allocation import budget_at

STEPS = range(1, 15)


def units_of(model, name="default"):
    return model.units_of(name)


def run(model, steps=STEPS, name="llama", optimizer=None):
    return train(model, optimizer or optimizer_of(model), steps, model.update_and_allocate, name)


# --- step by step ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {}),
        ("llama", {"target_modules": "all-linear"}),
        ("llama", {"deltaT": 1, "tinit": 0}),
        ("llama", {"deltaT": 3, "tfinal": 1, "beta1": 0.5}),
        ("llama", {"orth_reg_weight": 0.0}),
        ("gpt2", {"target_modules": "all-linear"}),
        ("t5", {}),
        ("bert", {"target_r": 1}),
        ("vit", {}),
    ],
    ids=str,
)
def test_every_step_is_that_of_peft(name, options):
    """The same E are 0 after each step, the losses are the same, and so is what is left in the end."""
    model, twin = wrapped(name, **options).train(), twin_of(name, **options).train()
    ours = run(model, name=name)
    theirs = train(twin, optimizer_of(twin), STEPS, twin.base_model.update_and_allocate, name)
    assert_near(ours[0], theirs[0], "loss")
    for step, (mask, expected) in enumerate(zip(ours[1], theirs[1], strict=True), 1):
        assert mask == expected, step
    left = sum(not zero for mask in ours[1][-1].values() for zero in mask)
    target = config_of(name, **options)["target_r"]
    assert left == target * len(ours[1][-1])
    # Some were taken away before the end, too.
    assert any(any(map(any, mask.values())) for mask in ours[1][2:9])


def test_the_budget_falls_with_the_cube():
    config = AdaLoraConfig(init_r=10, target_r=2, total_step=30, tinit=5, tfinal=5)
    units = [type("Unit", (), {"kept": torch.ones(10)})() for _ in range(3)]
    budgets = [budget_at(config, units, step) for step in range(6, 26)]
    assert budgets == [int(24 * (1 - (step - 5) / 20) ** 3 + 6) for step in range(6, 26)]
    assert budgets[-1] == 6
    assert budgets == sorted(budgets, reverse=True)


def test_importance_is_the_formula():
    """After two steps, in fp64 and element by element."""
    model = randomise(wrapped(model=build("llama", dtype=torch.float64), orth_reg_weight=0.0)).train()
    unit = units_of(model)[0]
    s = u = torch.zeros_like(unit.lora_A)
    for step in (1, 2):
        model(**model_batch("llama", step)).loss.backward()
        importance = (unit.lora_A * unit.lora_A.grad).abs()
        s = 0.85 * s + 0.15 * importance
        u = 0.7 * u + 0.3 * (importance - s).abs()
        model.update_and_allocate(step)
        model.zero_grad()
    assert_near(unit.sensitivity_A, s.detach(), "layer")
    assert_near(unit.uncertainty_A, u.detach(), "layer")


def test_a_budget_that_takes_nothing_away():
    """There peft asks for the smallest but zero of all scores, and crashes."""
    model = wrapped(target_r=4).train()
    run(model)
    assert all(bool(unit.kept.all()) and bool(unit.settled) for unit in units_of(model))
    assert not any(map(any, zeros_of_E(model).values()))


def test_parameters_without_a_gradient_count_as_zero():
    """peft multiplies by None."""
    results = []
    for zeros in (False, True):
        model = randomise(wrapped()).train()
        for step in range(1, 9):
            model(**model_batch("llama", step)).loss.backward()
            for parameter in list(factors(model).values())[:3]:
                parameter.grad = torch.zeros_like(parameter) if zeros else None
            model.update_and_allocate(step)
            model.zero_grad()
        results.append({key: value.clone() for key, value in model.state_dict().items() if ".adapters." in key})
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


def test_16_bit_adapters_are_measured_in_32_bits():
    """Of weights times gradients below 6e-8 nothing would be left in fp16."""
    model = randomise(wrapped(adapter_dtype="float16"))
    for parameter in factors(model).values():
        parameter.grad = torch.full_like(parameter, 1e-7)
    model.update_and_allocate(1)
    for unit in units_of(model):
        assert unit.sensitivity_A.dtype == torch.float32
        assert_near(unit.sensitivity_A, 0.15 * (unit.lora_A.float() * unit.lora_A.grad.float()).abs().detach(), "layer")


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_steps_that_a_gradient_scaler_left_out_count_for_nothing(value):
    """In peft one of them spoils all scores for good."""
    model = randomise(wrapped()).train()
    model(**model_batch("llama")).loss.backward()
    model.update_and_allocate(1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for parameter in factors(model).values():
        parameter.grad.fill_(value)
    model.update_and_allocate(2)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_loop_that_steps_over_the_end_allocates_then():
    """peft allocates at the very step, and crashes at a later one if that was missed."""
    model = wrapped().train()
    run(model, [*range(1, 10), 12, 13])
    assert sum(int(unit.kept.sum()) for unit in units_of(model)) == 8
    assert all(bool(unit.settled) for unit in units_of(model))


def test_what_was_taken_away_stays_away():
    model = wrapped().train()
    _, zeros = run(model)
    assert zeros[9] == zeros[-1]
    unit = units_of(model)[0]
    assert not unit.sensitivity_A.any()
    assert torch.equal(unit.kept, unit.lora_E.flatten() != 0)


def test_each_adapter_has_a_schedule_of_its_own():
    """peft trains one at a time."""
    model = wrapped().train()
    model.add_adapter("second", AdaLoraConfig(**config_of(total_step=8, tfinal=1, tinit=1, deltaT=1)))
    model.set_adapter(["default", "second"])
    run(model, range(1, 9))
    assert all(bool(unit.settled) for unit in units_of(model, "second"))
    assert not any(bool(unit.settled) for unit in units_of(model))
    assert sum(int(unit.kept.sum()) for unit in units_of(model, "second")) == 8
    assert all(bool(unit.sensitivity_A.any()) for unit in units_of(model))


def test_lora_beside_it_is_left_alone():
    model = wrapped().train()
    model.add_adapter("plain", LoraConfig(r=2))
    model.set_adapter(["default", "plain"])
    run(model)
    assert sum(int(unit.kept.sum()) for unit in units_of(model)) == 8


# --- what goes wrong ---------------------------------------------------------------------------


def test_after_zero_grad_is_too_late():
    model = wrapped().train()
    model(**model_batch("llama")).loss.backward()
    model.zero_grad()
    with pytest.raises(RuntimeError, match=r"adapter 'default' has a gradient: .* before optimizer\.zero_grad"):
        model.update_and_allocate(1)


@pytest.mark.parametrize("step", [-1, 2.0, True, None, "3"])
def test_bad_steps(step):
    with pytest.raises(ValueError, match=r"global_step=.* is no whole number of optimizer steps"):
        wrapped().update_and_allocate(step)


def test_no_schedule(tmp_path):
    model = pyadapt.wrap(build("llama"), LoraConfig())
    with pytest.raises(ValueError, match="no active adapter in training has a schedule"):
        model.update_and_allocate(1)
    wrapped().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is_trainable=True"):
        pyadapt.load(build("llama"), tmp_path).update_and_allocate(1)


def test_merged_or_sharded():
    model = wrapped().train()
    model(**model_batch("llama")).loss.backward()
    unit = units_of(model)[1]
    whole = unit.lora_B
    unit.lora_B = nn.Parameter(torch.empty(0))
    with pytest.raises(RuntimeError, match="an engine has sharded it"):
        model.update_and_allocate(1)
    unit.lora_B = whole
    model.merge_adapter()
    with pytest.raises(RuntimeError, match="cannot allocate ranks"):
        model.update_and_allocate(1)


# --- resuming ----------------------------------------------------------------------------------


def resumed_by_state_dict(model, folder):
    torch.save(model.state_dict(), folder / "model.pt")
    fresh = wrapped()
    fresh.load_state_dict(torch.load(folder / "model.pt", weights_only=True))
    return fresh


def resumed_by_adapter(model, folder):
    model.save_pretrained(folder)
    return pyadapt.load(build("llama"), folder, is_trainable=True)


def resumed_with_little_memory(model, folder):
    model.save_pretrained(folder)
    return pyadapt.load(build("llama"), folder, is_trainable=True, low_cpu_mem_usage=True)


def resumed_beside_another(model, folder):
    model.save_pretrained(folder)
    other = pyadapt.wrap(build("llama"), LoraConfig(r=2), "other")
    other.load_adapter(folder, "default", is_trainable=True)
    other.delete_adapter("other")
    return other


@pytest.mark.parametrize("stop", [1, 5, 9])
@pytest.mark.parametrize(
    "resumed", [resumed_by_state_dict, resumed_by_adapter, resumed_with_little_memory, resumed_beside_another]
)
def test_resuming_is_exact(resumed, stop, tmp_path):
    whole = wrapped().train()
    optimizer = optimizer_of(whole)
    run(whole, range(1, stop + 1), optimizer=optimizer)
    state = copy.deepcopy(optimizer.state_dict())
    again = resumed(whole, tmp_path).train()
    expected = run(whole, range(stop + 1, 15), optimizer=optimizer)
    other = optimizer_of(again)
    other.load_state_dict(state)
    found = run(again, range(stop + 1, 15), optimizer=other)
    assert torch.equal(found[0], expected[0])
    assert found[1] == expected[1]
    states = whole.state_dict(), again.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_the_state_of_training_is_there_while_it_is_needed(tmp_path):
    model = wrapped().train()
    file = tmp_path / "adapter_training_state.safetensors"
    optimizer = optimizer_of(model)
    run(model, range(1, 6), optimizer=optimizer)
    model.save_pretrained(tmp_path)
    assert file.exists()
    # Nothing of it where the adapter only serves.
    served = pyadapt.load(build("llama"), tmp_path)
    assert not any(True for unit in units_of(served) for _ in unit.buffers())
    served.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again" / file.name).exists()
    run(model, range(6, 15), optimizer=optimizer)
    model.save_pretrained(tmp_path)
    assert not file.exists()


def test_the_state_of_another_adapter_is_refused(tmp_path):
    model = wrapped().train()
    run(model, range(1, 4))
    model.save_pretrained(tmp_path / "a")
    wrapped(init_r=6).save_pretrained(tmp_path / "b")
    name = "adapter_training_state.safetensors"
    os.replace(tmp_path / "a" / name, tmp_path / "b" / name)
    fresh = build("llama")
    before = snapshot(fresh)
    with pytest.raises(pyadapt.AdapterFileError, match="does not belong to this adapter"):
        pyadapt.load(fresh, tmp_path / "b", is_trainable=True)
    (tmp_path / "b" / name).write_bytes(b"not safetensors")
    with pytest.raises(pyadapt.AdapterFileError, match="damaged"):
        pyadapt.load(fresh, tmp_path / "b", is_trainable=True)
    assert snapshot(fresh) == before
    pyadapt.load(fresh, tmp_path / "b")


def test_a_copy_and_a_pickle_train_on():
    import pickle

    model = wrapped().train()
    run(model, range(1, 5))
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        expected = run(copy.deepcopy(model), range(5, 9))
        found = run(again, range(5, 9))
        assert torch.equal(found[0], expected[0])
        assert found[1] == expected[1]


# --- the Trainer -------------------------------------------------------------------------------


class Rows(torch.utils.data.Dataset):
    def __init__(self):
        batch = model_batch("llama", rows=16)
        self.rows = [{key: value[i] for key, value in batch.items()} for i in range(16)]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def trainer(model, folder, **options):
    pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate")
    from transformers import Trainer, TrainingArguments

    options = {"max_steps": 14, "save_strategy": "no", **options}
    arguments = TrainingArguments(
        output_dir=os.fspath(folder), per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1, use_cpu=True,
        report_to=[], disable_tqdm=True, seed=11, dataloader_pin_memory=False, lr_scheduler_type="constant",
        max_grad_norm=0.0, optim="adamw_torch", **options,
    )  # fmt: skip
    callbacks = [pyadapt.AdaLoraCallback()]
    return Trainer(model=model, args=arguments, train_dataset=Rows(), callbacks=callbacks)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_callback_does_what_a_plain_loop_does(accumulate, tmp_path):
    model = wrapped()
    batches = []
    run_by_trainer = trainer(model, tmp_path, gradient_accumulation_steps=accumulate)
    model.register_forward_pre_hook(
        lambda module, args, kwargs: batches.append({key: value.clone() for key, value in kwargs.items()}),
        with_kwargs=True,
    )
    run_by_trainer.train()
    assert len(batches) == 14 * accumulate
    plain = wrapped().train()
    optimizer = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    for step in STEPS:
        for batch in batches[(step - 1) * accumulate : step * accumulate]:
            # The sum over the tokens is divided by `num_items_in_batch`, which counts those of all its parts.
            plain(**batch).loss.backward()
        optimizer.step()
        plain.update_and_allocate(step)
        optimizer.zero_grad()
    assert zeros_of_E(plain) == zeros_of_E(model)
    assert any(map(any, zeros_of_E(model).values()))
    for key, value in factors(plain).items():
        assert torch.equal(value, model.get_parameter(key)), key


@pytest.mark.parametrize(("steps", "told"), [(14, None), (12, "not at all, or without"), (20, "too early")])
def test_the_callback_warns_of_another_number_of_steps(steps, told, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "pyadapt"):
        trainer(wrapped(), tmp_path, max_steps=steps).train()
    if told is None:
        assert "total_step" not in caplog.text
    else:
        assert f"total_step=14, but the Trainer takes {steps} optimizer steps" in caplog.text
        assert told in caplog.text


def test_the_callback_leaves_out_steps_that_were_not_taken():
    from transformers import TrainerState

    model = wrapped().train()
    model(**model_batch("llama")).loss.backward()
    skipped = type("Optimizer", (), {"step_was_skipped": True})()
    callback = pyadapt.AdaLoraCallback()
    callback.on_optimizer_step(None, TrainerState(), None, model=model, optimizer=skipped)
    assert not any(bool(unit.sensitivity_A.any()) for unit in units_of(model))
    callback.on_optimizer_step(None, TrainerState(), None, model=nn.DataParallel(model), optimizer=None)
    assert all(bool(unit.sensitivity_E.isfinite().all()) for unit in units_of(model))
    with pytest.raises(ValueError, match="this Linear carries no adapters"):
        callback.on_optimizer_step(None, TrainerState(), None, model=nn.Linear(2, 2))
