"""Prefix tuning: against peft in outputs, gradients and training, and in the ways that models are run."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch._dynamo.testing
from models import assert_near, snapshot
from prefix_cases import CASES, DECODERS, ENCODERS, SEQ2SEQ, batch, labels
from prefix_twins import N, gradients, peft_weights, prefixed, twins, weights

import pyadapt
from pyadapt import LoraConfig
from pyadapt.methods.prefix import PrefixTuningConfig

# peft has no prefix for DeBERTa, and runs those of these.
PEFT_RUNS = (*DECODERS, *SEQ2SEQ, "bert", "roberta")
BOTH_WAYS = [(name, way) for name in PEFT_RUNS for way in CASES[name].implementations]
FORMS = {
    "plain": {},
    "mlp": {"prefix_projection": True, "encoder_hidden_size": 20},
    "zero": {"init_weights": "zero"},
}


def loss_of(model, name, seed=1, **how):
    return model(**labels(name, batch(name, seed, **how))).loss


def logits_of(model, name, inputs):
    """Logits, of tokens that are no padding."""
    logits = model(**inputs).logits
    return logits[inputs["attention_mask"].bool()] if name in DECODERS else logits


def step(model, name, **how):
    """Loss and gradients, by the parameter's own name."""
    model.zero_grad()
    loss = loss_of(model, name, **how)
    loss.backward()
    return loss.detach(), {path: p.grad.clone() for path, p in model.named_parameters() if p.grad is not None}


def assert_same_step(one, other):
    assert_near(one[0], other[0], "loss")
    assert one[1].keys() == other[1].keys()
    assert one[1]
    for path, gradient in other[1].items():
        assert gradient.abs().max() > 0
        assert_near(one[1][path], gradient, "gradient")


# Against peft


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("name", "implementation"), BOTH_WAYS)
def test_loss_and_gradients_are_peft_s(name, implementation, form):
    ours, theirs = twins(name, implementation, **FORMS[form])
    assert weights(ours).keys() == peft_weights(theirs).keys()
    inputs = labels(name, batch(name, padding=3))
    with torch.no_grad():
        assert_near(logits_of(ours, name, inputs), logits_of(theirs, name, inputs), "model")
    losses = []
    for model in (ours, theirs):
        # There is no dropout in the models.
        loss = model.train()(**inputs).loss
        loss.backward()
        losses.append(loss.detach())
    assert_near(losses[0], losses[1], "loss")
    found = gradients(weights(ours))
    for key, gradient in gradients(peft_weights(theirs)).items():
        assert_near(found[key], gradient, "gradient")


@pytest.mark.parametrize("form", ["plain", "mlp"])
@pytest.mark.parametrize("name", PEFT_RUNS)
def test_training_goes_as_peft_s_does(name, form):
    losses = []
    for model, found in zip(twins(name, **FORMS[form]), (weights, peft_weights), strict=True):
        optimizer = torch.optim.SGD(found(model.train()).values(), lr=0.1)
        run = []
        for seed in range(3):
            loss = loss_of(model, name, seed, padding=2)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.append(loss.detach())
        losses.append(torch.stack(run))
    assert losses[1].unique().numel() == 3
    assert_near(losses[0], losses[1], "loss")


@pytest.mark.parametrize("name", ["llama", "t5", "bert"])
def test_a_prefix_that_an_mlp_made_is_saved_finished(name, tmp_path):
    import peft
    from safetensors.torch import load_file

    plain = CASES[name].make()
    ours = prefixed(name, copy.deepcopy(plain), **FORMS["mlp"])
    inputs = batch(name)
    with torch.no_grad():
        expected = ours(**inputs).logits
    ours.save_pretrained(tmp_path)
    assert "prompt_embeddings" in load_file(tmp_path / "adapter_model.safetensors")
    again = pyadapt.load(copy.deepcopy(plain), tmp_path)
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, expected)
        assert_near(theirs(**inputs).logits, expected, "model")


@pytest.mark.parametrize("name", ["gpt2", "t5", "roberta"])
def test_peft_s_file_is_read(name, tmp_path):
    _, theirs = twins(name)
    plain = CASES[name].make()
    theirs.save_pretrained(tmp_path)
    ours = pyadapt.load(plain, tmp_path)
    inputs = batch(name, padding=2)
    with torch.no_grad():
        assert_near(ours(**inputs).logits, theirs(**inputs).logits, "model")


# Training in other ways

CHECKPOINTED = ("llama", "mistral", "gpt2", "gptj", "gptneo", "opt", "bloom", "neox", "t5", "bart", *ENCODERS)


@pytest.mark.parametrize("form", ["plain", "mlp"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", CHECKPOINTED)
def test_gradient_checkpointing_changes_nothing(name, reentrant, form):
    """peft refuses it."""
    model = prefixed(name, **FORMS[form]).train()
    model.config.use_cache = False
    expected = step(model, name)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    assert model.is_gradient_checkpointing
    assert_same_step(step(model, name), expected)


def test_an_attention_that_is_called_by_itself_has_no_prefix():
    model = prefixed("llama")
    with pytest.raises(RuntimeError, match="call the model, not one of its blocks"):
        model.model.layers[0](torch.zeros(1, 3, 48), position_embeddings=(torch.ones(1, 3, 12), torch.zeros(1, 3, 12)))


@pytest.mark.parametrize("form", ["plain", "mlp"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "gptj", "t5", "bert", "deberta_v2_buckets"])
def test_autocast(name, form):
    model = prefixed(name, **FORMS[form]).train()
    expected, _ = step(model, name)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model, name)
    loss.backward()
    assert_near(loss.detach().float(), expected, "loss", torch.bfloat16)
    for gradient in gradients(weights(model)).values():
        assert gradient.dtype == torch.float32
        assert gradient.isfinite().all()
        assert gradient.abs().max() > 0


@pytest.mark.slow
@pytest.mark.parametrize("form", ["plain", "mlp"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "mistral", "deberta_v2_buckets"])
def test_torch_compile_whole_and_once(name, form):
    model = CASES[name].make()
    model.config.use_cache = False
    if name == "gpt2":
        # Its class name says no loss; transformers then warns at each call, which no graph can hold.
        model.loss_type = "ForCausalLM"
    if CASES[name].task == "SEQ_CLS":
        model.config.problem_type = "single_label_classification"
    model = prefixed(name, model, **FORMS[form]).train()
    eager = copy.deepcopy(model)
    count = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=count, fullgraph=True)
    for seed in range(2):
        found = step(compiled, name, seed=seed, padding=2)
        found = found[0], {path.removeprefix("_orig_mod."): gradient for path, gradient in found[1].items()}
        assert_same_step(found, step(eager, name, seed=seed, padding=2))
    assert count.frame_count == 1
    model.eval()
    eager.eval()
    with torch.no_grad():
        assert_near(loss_of(compiled, name, padding=2), loss_of(eager, name, padding=2), "loss")


# Other bases


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert", "bloom"])
def test_a_base_of_half_precision_under_a_prefix_of_fp32(name, dtype):
    model = prefixed(name, CASES[name].make().to(dtype))
    prefix = weights(model)["embedding.weight"]
    loss, _ = step(model.train(), name)
    assert loss.isfinite()
    assert prefix.grad.dtype == prefix.dtype == torch.float32
    assert prefix.grad.isfinite().all()
    assert prefix.grad.abs().max() > 0


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert"])
def test_an_int8_base(name, tmp_path):
    plain = pyadapt.quantize(CASES[name].make())
    model = prefixed(name, copy.deepcopy(plain)).train()
    _, found = step(model, name)
    assert all(gradient.abs().max() > 0 for gradient in found.values())
    model.eval().save_pretrained(tmp_path)
    again = pyadapt.load(plain, tmp_path)
    with torch.no_grad():
        assert torch.equal(again(**batch(name)).logits, model(**batch(name)).logits)


@pytest.mark.parametrize("name", CASES)
def test_unwrapping_gives_the_plain_model_back(name):
    model = CASES[name].make()
    inputs = batch(name)

    def outputs():
        with torch.no_grad():
            return model(**inputs)[0]

    expected, before = outputs(), snapshot(model)
    case = CASES[name]
    task = None if case.task == "FEATURE_EXTRACTION" else case.task
    prefixed(name, model, task_type=task)
    assert not torch.equal(outputs(), expected)
    assert pyadapt.unwrap(model) is model
    after = snapshot(model)
    assert after == before
    assert torch.equal(outputs(), expected)


@pytest.mark.parametrize("form", ["plain", "mlp"])
@pytest.mark.parametrize("name", [*DECODERS, *SEQ2SEQ, *ENCODERS])
def test_copies_and_pickles_train_by_themselves(name, form):
    model = prefixed(name, **FORMS[form])
    with torch.no_grad():
        expected = model(**batch(name)).logits
    # After a backward, of which nothing may be held on to.
    step(model, name)
    held = io.BytesIO()
    torch.save(model, held)
    held.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(held, weights_only=False)):
        with torch.no_grad():
            assert torch.equal(other(**batch(name)).logits, expected)
        assert_same_step(step(other, name), step(model, name))
        with torch.no_grad():
            for parameter in weights(other).values():
                parameter.zero_()
            assert not torch.equal(other(**batch(name)).logits, expected)
            assert torch.equal(model(**batch(name)).logits, expected)


def test_weights_that_are_tied_stay_tied():
    model = CASES["llama"].make(tie_word_embeddings=True)
    prefixed("llama", model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    step(model, "llama")
    assert pyadapt.unwrap(model).lm_head.weight is model.model.embed_tokens.weight


def test_a_model_without_a_head():
    """Its blocks lie in the model itself."""
    from transformers import GPT2Model

    model = GPT2Model(CASES["gpt2"].make().config).eval()
    inputs = batch("gpt2")
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
        wrapped = pyadapt.wrap(model, PrefixTuningConfig(num_virtual_tokens=N)).eval()
        assert not torch.equal(wrapped(**inputs).last_hidden_state, expected)
        assert torch.equal(pyadapt.unwrap(wrapped)(**inputs).last_hidden_state, expected)


# Beside other adapters


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "deberta_v2_buckets"])
def test_beside_lora(name):
    """Together they are what a prefix is on the model with LoRA merged into it."""
    plain = CASES[name].make()
    lora = LoraConfig(r=3, init_lora_weights=False, target_modules="all-linear")
    model = prefixed(name, copy.deepcopy(plain), modules_to_save=[])
    pyadapt.wrap(model, lora, "lora")
    model.set_adapter(["default", "lora"])
    model.eval()
    inputs = batch(name, padding=2)
    prompt = weights(model)["embedding.weight"].detach().clone()

    merged = pyadapt.wrap(copy.deepcopy(plain), lora)
    factors = {key: value for key, value in model.state_dict().items() if ".adapters.lora." in key}
    with torch.no_grad():
        own = dict(merged.named_parameters())
        for key, value in factors.items():
            own[key.replace(".adapters.lora.", ".adapters.default.")].copy_(value)
    merged = prefixed(name, pyadapt.merge(merged), modules_to_save=[])
    with torch.no_grad():
        weights(merged)["embedding.weight"].copy_(prompt)
        assert_near(model(**inputs).logits, merged(**inputs).logits, "merged")
    _, found = step(model.train(), name)
    assert sum(".adapters.lora." in path for path in found) == len(factors)
    assert sum(".adapters.default." in path for path in found) == 1


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bloom", "deberta_v2_buckets"])
def test_two_prefixes_are_switched(name):
    lengths = {"first": 3, "second": 6}
    alone = {}
    for seed, (adapter, length) in enumerate(lengths.items()):
        model = prefixed(name, seed=seed, num_virtual_tokens=length, modules_to_save=[])
        with torch.no_grad():
            alone[adapter] = model(**batch(name)).logits
        alone[adapter, "prompt"] = weights(model)["embedding.weight"].detach().clone()
    model = CASES[name].make()
    with torch.no_grad():
        plain = model(**batch(name)).logits
    for adapter, length in lengths.items():
        config = PrefixTuningConfig(task_type=CASES[name].task, num_virtual_tokens=length, modules_to_save=[])
        pyadapt.wrap(model, config, adapter)
    with torch.no_grad():
        for adapter in lengths:
            weights(model, adapter)["embedding.weight"].copy_(alone[adapter, "prompt"])
        for adapter in ("first", "second", "first"):
            model.set_adapter(adapter)
            assert torch.equal(model.eval()(**batch(name)).logits, alone[adapter])
        with model.disable_adapter():
            assert torch.equal(model(**batch(name)).logits, plain)
    with pytest.raises(ValueError, match="'first' and 'second'"):
        model.set_adapter(["first", "second"])
    with torch.no_grad():
        assert torch.equal(model(**batch(name)).logits, alone["first"])


# What is refused


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("gpt2", {"num_virtual_tokens": 40}, r"num_virtual_tokens=40.*transformer.wpe has 40"),
        # Its first position is the third row of the table.
        ("roberta", {"num_virtual_tokens": 38}, r"num_virtual_tokens=38.*has 38"),
        ("opt", {"num_virtual_tokens": 40}, r"num_virtual_tokens=40.*has 40"),
        ("llama", {"num_virtual_tokens": 40}, r"num_virtual_tokens=40"),
        ("llama", {"num_virtual_tokens": None}, r"num_virtual_tokens"),
        ("llama", {"num_virtual_tokens": 0}, r"num_virtual_tokens=0"),
        ("llama", {"num_layers": 3}, r"num_layers=3.*2 self-attentions"),
        ("llama", {"num_transformer_submodules": 2}, r"num_transformer_submodules=2.*no encoder with a decoder"),
        ("llama", {"init_weights": "ones"}, r"init_weights='ones'"),
        ("llama", {"encoder_hidden_size": 0}, r"encoder_hidden_size=0"),
    ],
)
def test_options_that_do_not_fit(name, config, message):
    model = CASES[name].make()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        prefixed(name, model, **config)
    assert snapshot(model) == before


def test_an_attention_whose_masks_cannot_be_extended():
    model = CASES["llama"].make()
    model.config._attn_implementation = "flex_attention"
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn: attention runs as 'flex_attention'.*'sdpa'"):
        prefixed("llama", model)
    assert snapshot(model) == before


def test_an_attention_that_is_changed_afterwards():
    model = prefixed("llama")
    model.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match=r"attention runs as 'flex_attention'.*'sdpa'"):
        model(**batch("llama"))
    model.set_attn_implementation("eager")
    model(**batch("llama"))


def test_a_model_without_attention():
    with pytest.raises(ValueError, match="no self-attention"):
        pyadapt.wrap(torch.nn.Sequential(torch.nn.Linear(3, 3)), PrefixTuningConfig(num_virtual_tokens=2))
