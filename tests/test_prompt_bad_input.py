"""What prompt methods refuse: one sentence that names the thing, and a model that is what it was, bit for bit."""

from __future__ import annotations

import pytest
import torch
from models import FAMILIES, build, plain_module, snapshot
from models.zoo import MODELS
from prompt_life_cases import METHODS, PROMPTS, config_of, output, wrapped

import pyadapt
from pyadapt import LoraConfig
from pyadapt.config import TaskType, as_config
from pyadapt.tasks import check_task

ROWS = {row.model_class: row for row in MODELS if not row.missing}
EVERY = pytest.mark.parametrize("method", METHODS)
PROMPT = pytest.mark.parametrize("method", PROMPTS)
# Those whose prompt is put where tokens become vectors.
INPUT = [method for method in PROMPTS if not method.startswith("prefix")]
PREFIX = ["prefix", "prefix MLP"]
LAYERS = {"LORA": {"r": 2}, "ADALORA": {"init_r": 3, "target_r": 2, "total_step": 9}, "IA3": {}, "LOHA": {}, "LOKR": {}}


def refused(model, config, message, error=ValueError):
    before = snapshot(model)
    for verb in (pyadapt.plan, pyadapt.wrap):
        with pytest.raises(error, match=message):
            verb(model, config)
        assert snapshot(model) == before


# Tasks.


@pytest.mark.parametrize("method", [*METHODS, *LAYERS])
@pytest.mark.parametrize(
    ("name", "task", "message"),
    [
        ("LlamaForCausalLM", "SEQ_CLS", "this LlamaForCausalLM has no head called classifier or score"),
        ("LlamaForCausalLM", "TOKEN_CLS", "no head called classifier or score.*AutoModelForTokenClassification"),
        ("GPT2LMHeadModel", "QUESTION_ANS", "no head called qa_outputs.*AutoModelForQuestionAnswering"),
        ("GPT2LMHeadModel", "SEQ_2_SEQ_LM", "no encoder and decoder.*AutoModelForSeq2SeqLM"),
        ("T5ForConditionalGeneration", "SEQ_CLS", "no head called classifier or score"),
        ("GPT2Model", "CAUSAL_LM", "this GPT2Model has no output head over the vocabulary.*AutoModelForCausalLM"),
        ("BertForQuestionAnswering", "CAUSAL_LM", "no output head over the vocabulary"),
        ("BertForSequenceClassification", "QUESTION_ANS", "no head called qa_outputs"),
        (
            "BertModel",
            "SEQ_CLS",
            "no head called.*AutoModelForSequenceClassification.*modules_to_save.*leave task_type",
        ),
    ],
)
def test_a_task_that_the_model_has_no_head_for(method, name, task, message):
    values = {"peft_type": method, **LAYERS[method]} if method in LAYERS else config_of(method).to_dict()
    refused(ROWS[name].build(), as_config({**values, "task_type": task}), f"task_type={task}: .*{message}")


@pytest.mark.parametrize("name", ROWS)
def test_a_task_that_the_model_has_a_head_for(name):
    """And none at all, and hidden states, which every model has."""
    row = ROWS[name]
    model = row.build()
    for task in {row.task, None, "FEATURE_EXTRACTION"}:
        check_task(LoraConfig(task_type=task), model)
    pyadapt.plan(model, as_config({"peft_type": "LORA", "task_type": row.task, **row.options, **row.layer_options}))


TINY = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
HALVES = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}


@pytest.mark.parametrize(
    ("name", "options", "task"),
    [
        ("BartForSequenceClassification", {"d_model": 8, **HALVES, "vocab_size": 20}, "SEQ_CLS"),
        ("T5ForSequenceClassification", {"d_model": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 20}, "SEQ_CLS"),
        ("T5ForTokenClassification", {"d_model": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 20}, "TOKEN_CLS"),
        ("XLNetForSequenceClassification", {"d_model": 8, "n_layer": 1, "n_head": 2, "vocab_size": 20}, "SEQ_CLS"),
        ("BertForMultipleChoice", TINY, "SEQ_CLS"),
        ("BertLMHeadModel", {**TINY, "is_decoder": True}, "CAUSAL_LM"),
        ("T5ForQuestionAnswering", {"d_model": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 20}, "QUESTION_ANS"),
        ("PegasusForConditionalGeneration", {"d_model": 8, **HALVES, "vocab_size": 20}, "SEQ_2_SEQ_LM"),
        ("ViTForImageClassification", {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}, "SEQ_CLS"),
    ],
)
def test_heads_of_other_names_are_heads(name, options, task):
    import transformers

    model_class = getattr(transformers, name)
    check_task(LoraConfig(task_type=task), model_class(model_class.config_class(**options)))


def test_heads_of_other_peoples_models_are_known_to_them():
    """A subclass with a head of its own, a plain module, and a head that the configuration names."""
    from transformers import BertModel

    class Scored(BertModel):
        def __init__(self, config):
            super().__init__(config)
            self.verdict = torch.nn.Linear(config.hidden_size, 2)

    config = ROWS["BertModel"].build().config
    for task in TaskType:
        check_task(LoraConfig(task_type=task), Scored(config))
        check_task(LoraConfig(task_type=task), plain_module())
    named = LoraConfig(task_type="SEQ_CLS", modules_to_save=["pooler.dense"])
    check_task(named, ROWS["BertModel"].build())


# Lengths and shapes.


@PROMPT
@pytest.mark.parametrize(("family", "count"), [("gpt2", 32), ("llama", 32), ("bert", 32), ("olmo", 32)])
def test_a_prompt_longer_than_the_positions(method, family, count):
    for tokens in (count, count + 5):
        message = rf"num_virtual_tokens={tokens}: .*no positions for the text \(.*\b{count}\)"
        refused(build(family), config_of(method, family, num_virtual_tokens=tokens), message)
    model = wrapped(method, family, num_virtual_tokens=count - 1)
    asked = {"task_ids": torch.tensor([1])} if method == "multitask" else {}
    assert output(model, {"input_ids": torch.tensor([[5]]), **asked}).isfinite().all()


@pytest.mark.parametrize("method", [*PROMPTS])
@pytest.mark.parametrize("tokens", [0, -1, 2.0, "3", True, [3]])
def test_a_length_that_is_none(method, tokens):
    with pytest.raises(ValueError, match=r"num_virtual_tokens=.*: a whole number of at least 1 is needed"):
        config_of(method, num_virtual_tokens=tokens)


@PROMPT
def test_a_length_that_is_missing(method):
    refused(build("llama"), config_of(method, num_virtual_tokens=None), "needs num_virtual_tokens")


@PROMPT
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_transformer_submodules": 2}, "num_transformer_submodules=2: this LlamaForCausalLM is no encoder with a"),
        ({"token_dim": 17}, "token_dim=17: .* LlamaForCausalLM .*(24|12) features"),
    ],
)
def test_shapes_that_the_model_has_not(method, options, message):
    refused(build("llama"), config_of(method, **options), message)


@pytest.mark.parametrize("method", PREFIX)
def test_a_number_of_layers_that_the_model_has_not(method):
    for layers in (1, 3):
        refused(build("llama"), config_of(method, num_layers=layers), rf"num_layers={layers}: .* has 2 self-attentions")


@pytest.mark.parametrize("method", PREFIX)
@pytest.mark.parametrize(("family", "token_dim"), [("llama", 24), ("llama", 12), ("gpt2", 24), ("t5", 24)])
def test_the_width_that_peft_is_told_is_understood(method, family, token_dim):
    """PEFT makes that of the states into that of the key/value heads."""
    given = config_of(method, family, token_dim=token_dim, num_attention_heads=4, num_layers=2)
    assert pyadapt.plan(build(family), given).config == pyadapt.plan(build(family), config_of(method, family)).config


@PROMPT
@pytest.mark.parametrize("value", [0, 3, "2", 1.5])
def test_a_number_of_halves_that_is_none(method, value):
    with pytest.raises(ValueError, match=r"num_transformer_submodules=.* is not 1 or 2"):
        config_of(method, num_transformer_submodules=value)


@EVERY
@pytest.mark.parametrize(
    ("key", "near"),
    [("num_virtual_token", "num_virtual_tokens"), ("adapter_layer", "adapter_layers"), ("task_typ", "task_type")],
)
def test_keys_that_are_near(method, key, near):
    known = hasattr(config_of(method), near)
    with pytest.raises(ValueError, match=f"has no key '{key}'" + (f"; did you mean '{near}'" if known else "")):
        as_config({**config_of(method).to_dict(), key: 1})


# Models.


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_a_method_for_decoders_on_an_encoder(family):
    config = as_config({"peft_type": "ADAPTION_PROMPT", "adapter_len": 2, "adapter_layers": 1})
    refused(build(family), config, f"for decoders.*{type(build(family)).__name__}")


@pytest.mark.parametrize("method", INPUT)
@pytest.mark.parametrize("name", ["ViTForImageClassification", "SwinForImageClassification", "PlainNet"])
def test_a_model_that_reads_no_tokens(method, name):
    refused(ROWS[name].build(), config_of(method).replaced(task_type=None), "prompt has nowhere to go")


@pytest.mark.parametrize("method", [*PREFIX, "llama-adapter"])
def test_a_module_that_attends_to_nothing(method):
    refused(plain_module(), config_of(method).replaced(task_type=None), "no self-attention")


@pytest.mark.parametrize("method", [*PREFIX, "llama-adapter"])
@pytest.mark.parametrize("implementation", ["flash_attention_2", "flex_attention"])
def test_an_attention_that_takes_no_masks(method, implementation):
    model = build("llama")
    model.config._attn_implementation = implementation
    refused(model, config_of(method), rf"self_attn: .*'{implementation}'.*set_attn_implementation\('sdpa'\)")


@pytest.mark.parametrize("method", [*PREFIX, "llama-adapter"])
def test_an_eager_attention_of_its_own(method):
    """GPT-2's, which keeps its products in fp32."""
    model = build("gpt2")
    model.set_attn_implementation("eager")
    for block in model.transformer.h:
        block.attn.reorder_and_upcast_attn = True
    refused(model, config_of(method), r"attn: .*reorder_and_upcast_attn.*set_attn_implementation\('sdpa'\)")


@EVERY
def test_a_model_with_an_adapter_that_is_merged(method):
    model = pyadapt.wrap(build("llama"), LoraConfig(r=2, init_lora_weights=False))
    model.merge_adapter()
    before = snapshot(model)
    for verb in (
        lambda: model.add_adapter("prompt", config_of(method)),
        lambda: pyadapt.wrap(model, config_of(method), "prompt"),
    ):
        with pytest.raises(RuntimeError, match=r"cannot add an adapter: default is merged; unmerge_adapter\(\) first"):
            verb()
        assert snapshot(model) == before


@EVERY
def test_loading_onto_a_merged_model(method, tmp_path):
    wrapped(method).save_pretrained(tmp_path)
    model = pyadapt.wrap(build("llama"), LoraConfig(r=2, init_lora_weights=False))
    model.merge_adapter()
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="cannot add an adapter: default is merged"):
        model.load_adapter(tmp_path, "prompt")
    assert snapshot(model) == before


@PROMPT
def test_a_compiled_model(method):
    refused(torch.compile(build("llama"), backend="eager"), config_of(method), "compiled already", RuntimeError)


@EVERY
@pytest.mark.parametrize("name", ["", "a.b", "default", "keys"])
def test_names_that_no_adapter_can_have(method, name):
    model = wrapped(method)
    before = snapshot(model)
    with pytest.raises(ValueError, match="adapter"):
        model.add_adapter(name, config_of(method))
    assert snapshot(model) == before


def test_tasks_are_asked_for_and_looked_at():
    model = wrapped("multitask")
    ids = torch.tensor([[5, 6], [7, 8]])
    for wrong, message in [
        ({}, "needs task_ids"),
        ({"task_ids": torch.tensor([0, 2])}, r"task_ids=\[0, 2\]: the adapter has tasks 0 to 1"),
        ({"task_ids": torch.tensor([0, -1])}, "the adapter has tasks 0 to 1"),
        ({"task_ids": torch.tensor([0, 1, 1])}, "for 2 rows: one whole number a row"),
        ({"task_ids": torch.tensor([0.0, 1.0])}, "one whole number a row"),
    ]:
        asked = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **wrong}
        with pytest.raises(ValueError, match=message):
            model(**asked)
        with pytest.raises(ValueError, match=message):
            model.generate(**asked, max_new_tokens=2)
    assert output(model, {"input_ids": ids, "task_ids": torch.tensor([0, 1])}).isfinite().all()


def test_families_have_the_tasks_that_they_are_tested_with():
    for name, family in FAMILIES.items():
        check_task(LoraConfig(task_type=family.task), build(name))
