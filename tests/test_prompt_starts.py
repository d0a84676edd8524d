"""What a prompt starts from: numbers drawn, the vocabulary, a text."""

from __future__ import annotations

import pytest
import torch
from models import assert_near, snapshot
from prompt_cases import TOKENS, VOCABULARY, build, config_of

import pyadapt

WORDS = ["classify", "if", "the", "tweet", "is", "a", "complaint", "or", "not", "a", "complaint", "at", "all", "please"]
TEXT = " ".join(WORDS)
# (family, task, options of the model, how many prompts it gets); two of these scale what their table says.
PLACES = [
    ("llama", "CAUSAL_LM", {}, 1),
    ("gemma", "CAUSAL_LM", {}, 1),
    ("bert", "SEQ_CLS", {}, 1),
    ("t5", "SEQ_2_SEQ_LM", {}, 1),
    ("t5", "SEQ_2_SEQ_LM", {}, 2),
    ("bart", "SEQ_2_SEQ_LM", {"scale_embedding": True}, 2),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A folder with a tokenizer of one token a word."""
    return made_tokenizer(tmp_path_factory.mktemp("tokenizer"), 3)


def made_tokenizer(folder, first):
    """A tokenizer whose words are numbered from `first` on."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<unk>": 2, **{word: first + i for i, word in enumerate(dict.fromkeys(WORDS))}}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", pad_token="<pad>").save_pretrained(folder)
    return str(folder)


def started(family, task, kind="prompt", build_options=None, **options):
    """The prompt of a fresh adapter, and the plain model."""
    base = build(family, task, **(build_options or {}))
    model = pyadapt.wrap(build(family, task, **(build_options or {})), config_of(kind, task, **options))
    return next(value for name, value in model.named_parameters() if name.endswith(".embeddings")).detach(), base


def peft_start(base, task, **options):
    import peft

    config = {"peft_type": "PROMPT_TUNING", "task_type": task, "num_virtual_tokens": TOKENS, **options}
    twin = peft.get_peft_model(base, peft.get_peft_config(config))
    return twin.prompt_encoder["default"].embedding.weight.detach()


# --- numbers drawn


@pytest.mark.parametrize("kind", ["prompt", "multitask", "mlp"])
def test_random_is_normal(kind):
    torch.manual_seed(5)
    found, _ = started("llama", "CAUSAL_LM", kind, num_virtual_tokens=30)
    assert found.dtype == torch.float32
    # Of 480 numbers.
    assert abs(found.mean()) < 0.2
    assert 0.85 < found.std() < 1.15
    torch.manual_seed(5)
    assert torch.equal(started("llama", "CAUSAL_LM", kind, num_virtual_tokens=30)[0], found)


def test_matrices_of_tasks_start_small():
    model = pyadapt.wrap(build("llama", "CAUSAL_LM"), config_of("multitask", "CAUSAL_LM", num_tasks=40))
    for name in ("columns", "rows"):
        value = model.model.adapters.default.get_parameter(name)
        assert 0.015 < value.std() < 0.025


@pytest.mark.parametrize(("family", "task", "options", "submodules"), PLACES)
def test_sampled_rows_are_what_the_model_makes_of_tokens(family, task, options, submodules):
    found, base = started(
        family, task, build_options=options, prompt_tuning_init="SAMPLE_VOCAB", num_transformer_submodules=submodules
    )
    assert found.shape[0] == submodules * TOKENS
    with torch.no_grad():
        table = base.get_input_embeddings()(torch.arange(VOCABULARY))
    same = (found[:, None] == table[None]).all(-1)
    assert same.any(1).all()
    assert len(set(same.int().argmax(1).tolist())) > 1


# --- a text


@pytest.mark.parametrize("tokens", [3, 8, len(WORDS)])
@pytest.mark.parametrize(("family", "task", "options", "submodules"), PLACES)
def test_a_text_gives_the_rows_that_peft_takes(family, task, options, tokens, submodules, tokenizer):
    given = {
        "prompt_tuning_init": "TEXT", "prompt_tuning_init_text": TEXT, "tokenizer_name_or_path": tokenizer,
        "num_virtual_tokens": tokens, "num_transformer_submodules": submodules,
    }  # fmt: skip
    found, base = started(family, task, build_options=options, **given)
    with torch.no_grad():
        ids = torch.tensor([3 + list(dict.fromkeys(WORDS)).index(word) for word in WORDS])
        rows = base.get_input_embeddings()(ids)
    assert torch.equal(found[:tokens], rows[:tokens])
    assert torch.equal(found, peft_start(base, task, **given))


def test_a_text_for_several_tasks(tokenizer):
    given = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": TEXT, "tokenizer_name_or_path": tokenizer}
    found, _ = started("llama", "CAUSAL_LM", "multitask", **given)
    assert torch.equal(found, started("llama", "CAUSAL_LM", **given)[0])


def test_options_reach_the_tokenizer(tokenizer, tmp_path):
    made_tokenizer(tmp_path / "inner", 3)
    given = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": TEXT}
    expected, _ = started("llama", "CAUSAL_LM", **given, tokenizer_name_or_path=tokenizer)
    below = {"tokenizer_name_or_path": str(tmp_path), "tokenizer_kwargs": {"subfolder": "inner"}}
    assert torch.equal(started("llama", "CAUSAL_LM", **given, **below)[0], expected)


def test_the_rows_of_a_half_precision_model_are_held_in_full(tokenizer):
    model = build("llama", "CAUSAL_LM").bfloat16()
    given = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": TEXT, "tokenizer_name_or_path": tokenizer}
    table = model.get_input_embeddings().weight.detach().clone()
    found = pyadapt.wrap(model, config_of("prompt", "CAUSAL_LM", **given)).model.adapters.default.embeddings
    assert found.dtype == torch.float32
    assert torch.equal(found.detach(), table[3 : 3 + TOKENS].float())


def test_a_quantised_table_is_read_as_it_is(tokenizer):
    """int8 leaves embeddings alone; a text starts from the same rows."""
    model = pyadapt.quantize(build("llama", "CAUSAL_LM"))
    given = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": TEXT, "tokenizer_name_or_path": tokenizer}
    expected = started("llama", "CAUSAL_LM", **given)[0]
    model = pyadapt.wrap(model, config_of("prompt", "CAUSAL_LM", **given))
    assert torch.equal(model.model.adapters.default.embeddings.detach(), expected)


def test_a_file_needs_no_tokenizer(tokenizer, tmp_path):
    """What the prompt started from is written down, and not looked at again."""
    folder = made_tokenizer(tmp_path / "tokenizer", 3)
    given = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": TEXT, "tokenizer_name_or_path": folder}
    model = pyadapt.wrap(build("llama", "CAUSAL_LM"), config_of("prompt", "CAUSAL_LM", **given))
    model.save_pretrained(tmp_path / "adapter")
    for file in (tmp_path / "tokenizer").iterdir():
        file.unlink()
    for trainable in (False, True):
        loaded = pyadapt.load(build("llama", "CAUSAL_LM"), tmp_path / "adapter", is_trainable=trainable)
        value = loaded.model.adapters.default.embeddings
        assert torch.equal(value, model.model.adapters.default.embeddings)
        assert value.requires_grad is trainable
        assert loaded.peft_config["default"].prompt_tuning_init_text == TEXT


# --- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "prompt_tuning_init=TEXT needs tokenizer_name_or_path"),
        ({"tokenizer_name_or_path": "somewhere"}, "prompt_tuning_init=TEXT needs prompt_tuning_init_text"),
        (
            {
                "tokenizer_name_or_path": "somewhere",
                "prompt_tuning_init_text": TEXT,
                "tokenizer_kwargs": {"trust_remote_code": True},
            },
            "trust_remote_code would run code that a file names",
        ),
        ({"prompt_tuning_init": "RANDOM", "tokenizer_kwargs": {"use_fast": True}}, "for prompt_tuning_init=TEXT alone"),
        ({"prompt_tuning_init": "PIRATE"}, "prompt_tuning_init='PIRATE' is not one of TEXT, SAMPLE_VOCAB, RANDOM"),
        ({"prompt_tuning_init": "RANDOM", "num_virtual_tokens": 0}, "num_virtual_tokens=0: a whole number"),
        ({"prompt_tuning_init": "RANDOM", "num_virtual_tokens": 2.5}, "num_virtual_tokens=2.5: a whole number"),
    ],
)
def test_a_configuration_that_says_too_little(options, message):
    with pytest.raises(ValueError, match=message):
        config_of("prompt", "CAUSAL_LM", **{"prompt_tuning_init": "TEXT", **options})


@pytest.mark.parametrize("kind", ["prompt", "multitask"])
@pytest.mark.parametrize(
    ("tokens", "text", "first", "message"),
    [
        (
            4,
            "the tweet is",
            3,
            "num_virtual_tokens=4, but prompt_tuning_init_text has 3 tokens: give a longer text, or",
        ),
        (2, " ", 3, "num_virtual_tokens=2, but prompt_tuning_init_text has 0 tokens"),
        (3, TEXT, 60, "gives token 62, and the model has 50: it is another model's"),
    ],
)
def test_a_text_that_does_not_fit(kind, tokens, text, first, message, tmp_path):
    given = {
        "prompt_tuning_init": "TEXT", "prompt_tuning_init_text": text, "num_virtual_tokens": tokens,
        "tokenizer_name_or_path": made_tokenizer(tmp_path, first),
    }  # fmt: skip
    refused(build("llama", "CAUSAL_LM"), config_of(kind, "CAUSAL_LM", **given), message)


def test_a_tokenizer_that_is_not_there(tmp_path):
    given = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": TEXT}
    for name in (str(tmp_path / "nowhere"), "no-such-organisation/no-such-model", str(tmp_path)):
        config = config_of("prompt", "CAUSAL_LM", tokenizer_name_or_path=name, **given)
        refused(build("llama", "CAUSAL_LM"), config, "tokenizer_name_or_path=.* cannot be loaded")


@pytest.mark.parametrize(
    ("family", "task", "options", "message"),
    [
        ("gpt2", "CAUSAL_LM", {"num_virtual_tokens": 64}, "leaves no positions for the text"),
        ("bert", "SEQ_CLS", {"num_virtual_tokens": 80}, "leaves no positions for the text"),
        ("llama", "CAUSAL_LM", {"num_virtual_tokens": 64}, "leaves no positions for the text"),
        ("llama", "CAUSAL_LM", {"token_dim": 17}, "token_dim=17: embeddings of this LlamaForCausalLM have 16 features"),
        ("llama", "SEQ_2_SEQ_LM", {}, "task_type=SEQ_2_SEQ_LM: this LlamaForCausalLM has no encoder and decoder"),
        ("llama", "SEQ_CLS", {}, "has no head called"),
    ],
)
def test_a_model_that_the_prompt_does_not_fit(family, task, options, message):
    refused(
        build(family, "SEQ_CLS" if family == "bert" else "CAUSAL_LM"), config_of("prompt", task, **options), message
    )


def test_a_model_without_tokens():
    from transformers import ViTConfig, ViTForImageClassification

    model = ViTForImageClassification(ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    refused(model, pyadapt.PromptTuningConfig(num_virtual_tokens=2), "a prompt has nowhere to go")


def refused(model, config, message):
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        pyadapt.wrap(model, config)
    assert snapshot(model) == before


def test_a_second_adapter_that_is_refused_leaves_the_first():
    model = pyadapt.wrap(build("llama", "CAUSAL_LM"), config_of("prompt", "CAUSAL_LM")).eval()
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        expected = model(ids).logits
    before = snapshot(model)
    with pytest.raises(ValueError, match="leaves no positions"):
        model.add_adapter("other", config_of("prompt", "CAUSAL_LM", num_virtual_tokens=64))
    assert snapshot(model) == before
    with torch.no_grad():
        assert_near(model(ids).logits, expected, "model")
