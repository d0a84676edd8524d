"""The names that scripts for PEFT use."""

from __future__ import annotations

import pytest
import torch
from models import FAMILIES, assert_near, build, model_batch

import pyadapt
from pyadapt import AdapterFileError, LoraConfig, PeftModel

AUTO = {
    "llama": pyadapt.AutoPeftModelForCausalLM,
    "t5": pyadapt.AutoPeftModelForSeq2SeqLM,
    "bert": pyadapt.AutoPeftModelForSequenceClassification,
}


def saved(name, tmp_path, task="own", **config):
    """A base model and an adapter on disk; the wrapped model."""
    build(name).save_pretrained(tmp_path / "base")
    model = type(build(name)).from_pretrained(tmp_path / "base").eval()
    task = FAMILIES[name].task if task == "own" else task
    pyadapt.wrap(model, LoraConfig(task_type=task, init_lora_weights=False, **config)).save_pretrained(
        tmp_path / "adapter"
    )
    return model


@pytest.mark.parametrize("name", AUTO)
def test_auto_classes_load_base_and_adapter(name, tmp_path):
    model, batch = saved(name, tmp_path), model_batch(name)
    for cls in (AUTO[name], pyadapt.AutoPeftModel):
        again = cls.from_pretrained(tmp_path / "adapter")
        assert type(again).__name__ == type(model).__name__
        assert isinstance(again, PeftModel)
        assert not again.training
        assert_near(again(**batch).logits, model(**batch).logits, "model")
    trainable = AUTO[name].from_pretrained(
        tmp_path / "adapter", adapter_name="mine", is_trainable=True, dtype=torch.bfloat16
    )
    assert list(trainable.peft_config) == ["mine"]
    assert any(p.requires_grad for p in trainable.parameters())
    assert torch.bfloat16 in {p.dtype for p in trainable.parameters()}


@pytest.mark.parametrize(
    ("task", "auto"), [("TOKEN_CLS", "TokenClassification"), ("QUESTION_ANS", "QuestionAnswering")]
)
def test_auto_classes_of_other_tasks(task, auto, tmp_path):
    import transformers

    torch.manual_seed(0)
    config = build("bert").config
    config.num_labels = 2
    base = getattr(transformers, f"AutoModelFor{auto}").from_config(config)
    base.save_pretrained(tmp_path / "base")
    base = type(base).from_pretrained(tmp_path / "base")
    model = pyadapt.wrap(base, LoraConfig(task_type=task, init_lora_weights=False)).eval()
    model.save_pretrained(tmp_path / "adapter")
    again = getattr(pyadapt, f"AutoPeftModelFor{auto}").from_pretrained(tmp_path / "adapter")
    ids = model_batch("bert")["input_ids"]
    assert_near(again(input_ids=ids)[0], model(input_ids=ids)[0], "model")


def test_without_a_task_the_class_is_remembered(tmp_path):
    model, batch = saved("llama", tmp_path, task=None), model_batch("llama")
    again = pyadapt.AutoPeftModel.from_pretrained(tmp_path / "adapter")
    assert type(again).__name__ == "LlamaForCausalLM"
    assert_near(again(**batch).logits, model(**batch).logits, "model")


def test_peft_reads_what_we_write_with_its_auto_class(tmp_path):
    import peft

    model, batch = saved("llama", tmp_path), model_batch("llama")
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert_near(theirs(**batch).logits, model(**batch).logits, "model")


def test_a_folder_that_does_not_name_its_base(tmp_path):
    pyadapt.wrap(build("llama"), LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    with pytest.raises(AdapterFileError, match="does not name its base model"):
        pyadapt.AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(AdapterFileError, match=r"has no adapter_config\.json"):
        pyadapt.AutoPeftModel.from_pretrained(tmp_path / "..")


def test_get_peft_model_and_isinstance():
    for get in (pyadapt.get_peft_model, pyadapt.get_pet_model):
        model = build("llama")
        assert not isinstance(model, PeftModel)
        assert get(model, LoraConfig(), "mine") is model
        assert isinstance(model, PeftModel)
        assert isinstance(model, type(build("llama")))
        assert list(model.peft_config) == ["mine"]
    assert not isinstance(3, PeftModel)


def test_peft_model_from_pretrained(tmp_path):
    model, batch = saved("llama", tmp_path), model_batch("llama")
    base = type(build("llama")).from_pretrained(tmp_path / "base")
    again = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    assert again is base
    assert any(p.requires_grad for p in again.parameters())
    assert_near(again.eval()(**batch).logits, model(**batch).logits, "model")


def test_a_script_for_peft_runs(tmp_path, capsys):
    """The calls of a usual script, with nothing but the import changed."""
    from pyadapt import LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model

    config = LoraConfig(task_type=TaskType.SEQ_2_SEQ_LM, inference_mode=False, r=8, lora_alpha=32, lora_dropout=0.1)
    model = get_peft_model(build("t5"), config)
    model.print_trainable_parameters()
    assert "trainable params: " in capsys.readouterr().out
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(**model_batch("t5")).loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    assert config.task_type == TaskType.SEQ_2_SEQ_LM
    again = PeftModel.from_pretrained(build("t5"), tmp_path)
    batch = model_batch("t5")
    assert torch.equal(again(**batch).logits, model.eval()(**batch).logits)
    merged = model.merge_and_unload(progressbar=False)
    assert not isinstance(merged, PeftModel)


def test_the_arguments_of_get_peft_model():
    model = pyadapt.get_peft_model(
        build("llama", dtype=torch.bfloat16),
        {"peft_type": "LORA"},
        autocast_adapter_dtype=False,
        revision="main",
        low_cpu_mem_usage=True,
    )
    assert model.active_peft_config.revision == "main"
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.bfloat16}


def test_state_dicts_by_their_keys_in_a_file():
    model = pyadapt.wrap(build("llama"), LoraConfig(init_lora_weights=False))
    tensors = pyadapt.get_peft_model_state_dict(model)
    assert all(key.startswith("base_model.model.") for key in tensors)
    pyadapt.set_peft_model_state_dict(model, {key: 2 * value.detach() for key, value in tensors.items()})
    again = pyadapt.get_peft_model_state_dict(model)
    before = {key: value.clone() for key, value in again.items()}
    key = next(iter(before))
    with pytest.raises(pyadapt.AdapterFileError, match="missing"):
        pyadapt.set_peft_model_state_dict(model, {name: value for name, value in before.items() if name != key})
    assert all(torch.equal(value, before[name]) for name, value in pyadapt.get_peft_model_state_dict(model).items())
