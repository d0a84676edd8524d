"""`generate` going on from an earlier call of it, and beside other adapters."""

from __future__ import annotations

import pytest
import torch
from models import CACHE
from prompt_cases import DECODERS, NEW, TOKENS, build, generated, ids_of, named, wrapped

import pyadapt


def next_turn(model, ids, mask=None, **options):
    """The whole text of a second turn, and its mask with the cache of the first as arguments."""
    first = generated(model, ids, attention_mask=mask, return_dict_in_generate=True, **options)
    added = torch.randint(3, 50, (ids.shape[0], 4), generator=torch.Generator().manual_seed(9))
    whole = torch.cat([first.sequences, added], dim=1)
    mask = torch.ones_like(ids) if mask is None else mask
    mask = torch.nn.functional.pad(mask, (0, whole.shape[1] - mask.shape[1]), value=1)
    return whole, {"attention_mask": mask, CACHE: getattr(first, CACHE)}


@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 2}], ids=named)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", DECODERS)
def test_going_on_from_a_cache(family, padded, options):
    model, ids = wrapped(family, "CAUSAL_LM"), ids_of(family)
    if padded:
        ids[1, :2] = 0
    whole, going_on = next_turn(model, ids, ids.ne(0).long())
    expected = generated(model, whole, attention_mask=going_on["attention_mask"])
    assert torch.equal(generated(model, whole, **going_on, **options), expected)


@pytest.mark.parametrize("family", DECODERS)
def test_going_on_from_a_cache_with_the_new_tokens_alone(family):
    model, ids = wrapped(family, "CAUSAL_LM"), ids_of(family)
    whole, going_on = next_turn(model, ids)
    expected = generated(model, whole, attention_mask=going_on["attention_mask"])[:, whole.shape[1] :]
    # The last token of a turn is not in its cache yet.
    new = whole[:, -5:]
    found = generated(model, new, **going_on)
    assert torch.equal(found[:, 5:], expected)


def test_going_on_from_a_static_cache():
    model, ids = wrapped("llama", "CAUSAL_LM"), ids_of("llama")
    whole, going_on = next_turn(model, ids, cache_implementation="static", max_cache_len=40)
    expected = generated(model, whole, attention_mask=going_on["attention_mask"])
    assert torch.equal(generated(model, whole, **going_on), expected)


def test_going_on_with_embeddings():
    model, ids = wrapped("llama", "CAUSAL_LM"), ids_of("llama")
    whole, going_on = next_turn(model, ids)
    states = model.get_input_embeddings()(whole).detach()
    expected = generated(model, whole, attention_mask=going_on["attention_mask"])
    found = generated(model, inputs_embeds=states, **going_on)
    assert torch.equal(found, expected[:, -NEW:])


@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}], ids=named)
def test_rows_with_adapters_of_their_own_have_no_prompt(cache):
    model = wrapped("llama", "CAUSAL_LM")
    model.add_adapter("other", pyadapt.LoraConfig(init_lora_weights=False))
    ids = ids_of("llama")
    found = generated(model, ids, adapter_names=["other", "__base__"], **cache)
    model.set_adapter("other")
    assert torch.equal(found[:1], generated(model, ids[:1], **cache))
    model.set_adapter("default")
    with model.disable_adapter():
        assert torch.equal(found[1:], generated(model, ids[1:], **cache))
    assert model.adapter_state.prepended == TOKENS
    whole, going_on = next_turn(model, ids, adapter_names=["other", "__base__"])
    expected = generated(model, whole, attention_mask=going_on["attention_mask"], adapter_names=["other", "__base__"])
    assert torch.equal(generated(model, whole, **going_on, adapter_names=["other", "__base__"]), expected)


def test_without_adapters_it_is_the_base_model():
    base, model, ids = build("llama", "CAUSAL_LM"), wrapped("llama", "CAUSAL_LM"), ids_of("llama")
    for options in ({}, {"cache_implementation": "static"}, {"num_beams": 2}):
        with model.disable_adapter():
            assert torch.equal(generated(model, ids, **options), generated(base, ids, **options))
    assert torch.equal(generated(pyadapt.unwrap(model), ids), generated(base, ids))
