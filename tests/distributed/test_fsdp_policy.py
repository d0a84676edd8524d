"""Which modules are units under FSDP1, and settings that are refused with the line of accelerate's config."""

import pytest
import torch
from methods_cases import wrapped
from models import build

import pyadapt
from pyadapt.distributed import fsdp_auto_wrap_policy
from pyadapt.distributed.policy import Fsdp1Settings, check_fsdp1, check_fsdp2
from pyadapt.distributed.ties import unite_tied_tables

FLAT = Fsdp1Settings(use_orig_params=False)


def units(model):
    policy = fsdp_auto_wrap_policy(model)
    return {path for path, module in model.named_modules() if policy(module, recurse=False, nonwrapped_numel=0)}


def test_blocks_and_what_is_trained_are_units():
    found = units(wrapped("lora"))
    assert "model.layers.0" in found
    assert "model.layers.0.self_attn.q_proj.adapters.default" in found
    assert not {"model.embed_tokens", "lm_head", "model.layers.0.self_attn.q_proj"} & found
    assert "classifier.copies.default" in units(wrapped("lora-saved"))
    assert "model.embed_tokens.adapters.default" in units(wrapped("lora-embedding"))


def test_ancestors_users_import_it_from_where_they_expect():
    from pyadapt.utils.other import fsdp_auto_wrap_policy as familiar

    assert familiar is fsdp_auto_wrap_policy


def test_a_table_that_a_prompt_reads_is_in_no_inner_unit():
    assert "bert.embeddings" in units(wrapped("lora-saved"))
    assert "bert.embeddings" not in units(wrapped("p-tuning"))
    settings = Fsdp1Settings(classes=("BertEmbeddings", "BertLayer"))
    with pytest.raises(ValueError, match=r"fsdp_transformer_layer_cls_to_wrap: BertLayer,PromptEncoderUnit"):
        check_fsdp1(wrapped("p-tuning"), settings)


def test_what_two_modules_read_is_no_unit():
    assert not {"encoder.adapters.default", "decoder.adapters.default"} & units(wrapped("multitask"))
    both = Fsdp1Settings(classes=("T5Block", "MultitaskPromptUnit"))
    with pytest.raises(ValueError, match=r"one parameter in two units.*cls_to_wrap: T5Block`"):
        check_fsdp1(wrapped("multitask"), both)


def test_classes_by_their_names(monkeypatch):
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "LlamaMLP, LinearUnit")
    found = units(wrapped("lora"))
    assert "model.layers.0.mlp" in found
    assert "model.layers.0" not in found
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "GPT2Block")
    with pytest.raises(ValueError, match=r"names GPT2Block, .*: LlamaDecoderLayer,LinearUnit"):
        fsdp_auto_wrap_policy(wrapped("lora"))


@pytest.mark.parametrize("name", ["lora-bias", "multitask"])
def test_without_orig_params_nothing_is_trained_beside_what_is_frozen(name):
    with pytest.raises(ValueError, match=r"fsdp_use_orig_params: true"):
        check_fsdp1(wrapped(name), FLAT)
    check_fsdp1(wrapped(name), Fsdp1Settings())


@pytest.mark.parametrize("name", ["lora", "lora-saved", "lora-t5", "p-tuning", "prefix-mlp", "loha"])
def test_what_can_be_trained_passes_in_silence(name):
    for settings in (FLAT, Fsdp1Settings()):
        check_fsdp1(wrapped(name), settings)


def test_whole_blocks_waste_gradients_or_cannot_be():
    blocks = ("LlamaDecoderLayer",)
    with pytest.warns(UserWarning, match=r"cls_to_wrap: LlamaDecoderLayer,LinearUnit"):
        check_fsdp1(wrapped("lora"), Fsdp1Settings(classes=blocks))
    with pytest.raises(ValueError, match=r"fsdp_use_orig_params: true.*LlamaDecoderLayer,LinearUnit"):
        check_fsdp1(wrapped("lora"), Fsdp1Settings(use_orig_params=False, classes=blocks))
    check_fsdp1(wrapped("lora"), Fsdp1Settings(use_orig_params=False, classes=(*blocks, "LinearUnit")))


def test_two_dtypes_in_a_unit_are_refused():
    with pytest.raises(ValueError, match=r"torch.bfloat16 and torch.float32 in one unit.*LlamaDecoderLayer,LinearUnit"):
        check_fsdp1(wrapped("lora", "bf16"), Fsdp1Settings(classes=("LlamaDecoderLayer",)))
    check_fsdp1(wrapped("lora", "bf16"), FLAT)


def test_integers_need_a_storage_dtype_that_is_not_cast():
    with pytest.raises(ValueError, match=r"cannot flatten torch.int8.*storage_dtype=torch.float32"):
        fsdp_auto_wrap_policy(wrapped("lora", "int8"))
    held = wrapped("lora", "int8", torch.float32)
    check_fsdp1(held, FLAT)
    with pytest.raises(ValueError, match=r"a cast to torch.bfloat16 would destroy it"):
        check_fsdp1(held, Fsdp1Settings(param_dtype=torch.bfloat16))


def test_tables_that_are_adapted_or_differ_stay_apart():
    model = build("t5")
    assert unite_tied_tables(model) == ["encoder.embed_tokens", "decoder.embed_tokens"]
    assert model.encoder.embed_tokens is model.decoder.embed_tokens is model.shared
    assert unite_tied_tables(build("llama")) == []
    model = build("t5")
    config = {"peft_type": "LORA", "r": 2, "target_modules": ["shared"], "ensure_weight_tying": True}
    assert unite_tied_tables(pyadapt.wrap(model, config)) == []


def test_classes_that_fsdp2_cannot_have():
    with pytest.raises(ValueError, match=r"BertEmbeddings holds the input embedding.*: BertLayer,LinearUnit"):
        check_fsdp2(wrapped("lora-saved"), ("BertEmbeddings", "BertLayer"))
    check_fsdp2(wrapped("lora-bias"), ["BertLayer"])
    with pytest.raises(ValueError, match=r"cannot train torch.\w+ and torch.\w+ in one group.*BertLayer,LinearUnit"):
        check_fsdp2(wrapped("lora-bias", "bf16"), ["BertLayer"])
    check_fsdp2(wrapped("lora-bias", "bf16"), ["BertLayer"], upcast=True)
    check_fsdp2(wrapped("lora", "bf16"), ["LlamaDecoderLayer"])
