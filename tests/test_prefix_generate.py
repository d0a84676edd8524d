"""generate with a prefix: peft's tokens, and the same ones whichever way they are come by."""

from __future__ import annotations

import copy

import pytest
import torch
from models import CACHE, assert_near
from prefix_cases import CASES, DECODERS, SEQ2SEQ, WINDOW, batch
from prefix_twins import N, prefixed, twins

GREEDY = {"do_sample": False, "max_new_tokens": 8}
# The models are random: without these most say one word again and again, whatever they see. No text ends early.
WORDS = {"no_repeat_ngram_size": 1, "suppress_tokens": [0], "eos_token_id": None, "pad_token_id": 0}
SETTINGS = {
    "greedy": GREEDY,
    "without cache": {**GREEDY, "use_cache": False},
    "static cache": {**GREEDY, "cache_implementation": "static"},
    "beam": {**GREEDY, "num_beams": 3},
    "sampling": {"do_sample": True, "max_new_tokens": 8, "top_k": 9, "num_return_sequences": 2},
    "beam and sampling": {"do_sample": True, "max_new_tokens": 8, "num_beams": 3, "num_return_sequences": 2},
    "groups": {**GREEDY, "num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.5},
}


def generated(model, inputs, **how):
    torch.manual_seed(7)
    given = {key: value for key, value in inputs.items() if not key.startswith("decoder")}
    return model.generate(**given, **WORDS, **how)


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        (name, setting)
        for name in (*DECODERS, *SEQ2SEQ)
        for setting in SETTINGS
        # GPT-Neo's local layers take the end of a static cache for the place of the text, in transformers itself.
        if (name, setting) != ("gptneo", "static cache")
    ],
)
def test_generate_gives_peft_s_tokens(name, setting):
    ours, theirs = twins(name)
    inputs = batch(name, tokens=7, padding=3, left=True)
    found = generated(ours, inputs, **SETTINGS[setting])
    # peft's prefix lies in the cache of its own making.
    how = {key: value for key, value in SETTINGS[setting].items() if key not in ("use_cache", "cache_implementation")}
    assert torch.equal(found, generated(theirs, inputs, **how))
    with ours.disable_adapter():
        assert not torch.equal(found, generated(ours, inputs, **SETTINGS[setting]))


@pytest.mark.parametrize("name", DECODERS)
def test_a_padded_row_gives_what_it_gives_alone(name):
    model = prefixed(name)
    inputs = batch(name, rows=3, tokens=9, padding=4, left=True)
    found = generated(model, inputs, **GREEDY)
    for row in range(3):
        ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()][None]
        alone = generated(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, **GREEDY)
        if name == "mistral" and row == 2:
            # A window counts columns, padding too, in transformers as in peft.
            continue
        assert torch.equal(found[row, 9:], alone[0, ids.shape[1] :])


ASSISTED = ("llama", "qwen3", "neox", "gptj", "gpt2", "gptneo", "opt", "bloom")


@pytest.mark.parametrize("name", ASSISTED)
@pytest.mark.parametrize("by", ["assistant", "prompt lookup"])
def test_assisted_generation_gives_the_greedy_tokens(name, by):
    model = prefixed(name)
    inputs = batch(name, rows=1, tokens=9)
    # The same words again and again: something to look up.
    inputs["input_ids"][:, 4:8] = inputs["input_ids"][:, :4]
    how = {"assistant_model": CASES[name].make(seed=3)} if by == "assistant" else {"prompt_lookup_num_tokens": 3}
    assert torch.equal(generated(model, inputs, **GREEDY, **how), generated(model, inputs, **GREEDY))


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "opt", "neox"])
def test_a_text_that_is_read_in_chunks(name):
    model = prefixed(name)
    inputs = batch(name, tokens=11, padding=3, left=True)
    whole = generated(model, inputs, **GREEDY)
    assert torch.equal(generated(model, inputs, **GREEDY, prefill_chunk_size=4), whole)


@pytest.mark.parametrize("name", DECODERS)
def test_going_on_from_a_cache(name):
    model = prefixed(name)
    inputs = batch(name, tokens=6)
    whole = generated(model, inputs, **GREEDY)
    first = generated(model, inputs, do_sample=False, max_new_tokens=3, return_dict_in_generate=True)
    cache = getattr(first, CACHE)
    assert cache.get_seq_length() == 6 + 3 - 1
    ids = first.sequences
    rest = generated(
        model,
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        do_sample=False,
        max_new_tokens=5,
        **{CACHE: cache},
    )
    assert torch.equal(rest, whole)


@pytest.mark.parametrize("name", [*DECODERS, *SEQ2SEQ])
def test_attention_weights_cover_the_prefix(name):
    model = prefixed(name, CASES[name].make(attn_implementation="eager"))
    inputs = batch(name, tokens=6)
    with torch.no_grad():
        outputs = model(**inputs, output_attentions=True, return_dict=True)
    maps = outputs.decoder_attentions if name in SEQ2SEQ else outputs.attentions
    length = inputs["decoder_input_ids"].shape[1] if name in SEQ2SEQ else 6
    for weights_of_layer in maps:
        assert weights_of_layer.shape[-2:] == (length, N + length)
        assert_near(weights_of_layer.sum(-1), torch.ones(weights_of_layer.shape[:-1]), "layer")
    if name not in SEQ2SEQ:
        outputs = generated(model, inputs, **GREEDY, output_attentions=True, return_dict_in_generate=True)
        # A window's cache holds no more than the window.
        length = WINDOW if name == "mistral" else 6 + 7
        assert outputs.attentions[-1][0].shape[-1] == N + length


def test_whisper_generates_step_by_step():
    """peft has no prefix for a model that reads sound: the tokens are held against those of forward."""
    plain = CASES["whisper"].make()
    plain.generation_config.suppress_tokens = plain.generation_config.begin_suppress_tokens = None
    model = prefixed("whisper", copy.deepcopy(plain))
    sound = {"input_features": batch("whisper")["input_features"]}
    tokens = torch.full((2, 1), plain.config.decoder_start_token_id)
    for _ in range(8):
        with torch.no_grad():
            logits = model(**sound, decoder_input_ids=tokens).logits[:, -1]
        # As `WORDS` says.
        logits[:, 0] = -torch.inf
        tokens = torch.cat([tokens, logits.scatter(1, tokens, -torch.inf).argmax(-1, keepdim=True)], dim=1)
    found = generated(model, sound, **GREEDY)
    assert torch.equal(found[:, -8:], tokens[:, -8:])
    for how in ({"use_cache": False}, {"cache_implementation": "static"}):
        assert torch.equal(generated(model, sound, **GREEDY, **how), found)
    beams = generated(model, sound, **GREEDY, num_beams=3)
    assert torch.equal(beams, generated(model, sound, **GREEDY, num_beams=3, use_cache=False))
    assert not torch.equal(found, generated(plain, sound, **GREEDY))
