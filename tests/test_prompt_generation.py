"""`generate` with a prompt before the text: peft's tokens where peft works, and a row's own in a batch."""

from __future__ import annotations

import pytest
import torch
from prompt_cases import (
    DECODERS,
    NEW,
    SEQ2SEQ,
    TASKS,
    TOKENS,
    batch,
    build,
    config_of,
    extra,
    generated,
    ids_of,
    named,
    peft_twin,
    task_of,
    wrapped,
)

import pyadapt

# peft says so in every step.
pytestmark = pytest.mark.filterwarnings("ignore:Position ids are not supported for parameter efficient tuning")

# Every family with the plainest prompt, and some with other kinds.
KINDS = [(family, "prompt") for family in (*DECODERS, *SEQ2SEQ)]
KINDS += [(family, kind) for family in ("llama", "bloom", "t5") for kind in ("mlp", "multitask")]
WAYS = [
    {},
    {"num_beams": 3, "num_return_sequences": 2},
    {"do_sample": True, "top_k": 10},
    {"do_sample": True, "num_return_sequences": 3},
    {"do_sample": True, "num_beams": 3},
]
CACHES = [
    {"use_cache": False},
    {"cache_implementation": "static"},
    {"prefill_chunk_size": 3},
    {"prefill_chunk_size": 3, "cache_implementation": "static"},
]


@pytest.mark.parametrize(("family", "kind"), KINDS)
def test_tokens_are_those_of_peft(family, kind):
    task, ids = task_of(family), ids_of(family)
    base, model = build(family, task), wrapped(family, task, kind)
    twin, more = peft_twin(base, model), {"attention_mask": torch.ones_like(ids), **extra(kind)}
    for way in WAYS:
        ours = generated(model, ids, **more, **way)
        # Of a decoder PEFT gives the new tokens alone.
        theirs = generated(twin, input_ids=ids, **more, **way)
        assert torch.equal(ours[:, -theirs.shape[1] :], theirs), named(way)
        assert ours.shape[1] == (0 if family in SEQ2SEQ else ids.shape[1]) + NEW + (family in SEQ2SEQ)


def test_the_prompt_is_heard():
    for family in (*DECODERS, *SEQ2SEQ):
        base, model = build(family, task_of(family)), wrapped(family, task_of(family))
        given = {**batch(task_of(family))}
        with torch.no_grad():
            assert (base(**given).logits - model(**given).logits).abs().max() > 1e-2, family


# transformers cuts the text of decoders alone.
CACHED = [(family, cache) for family in DECODERS for cache in CACHES]
CACHED += [(family, cache) for family in SEQ2SEQ for cache in CACHES[:2]]


@pytest.mark.parametrize(
    ("family", "cache"), CACHED, ids=lambda value: named(value) if isinstance(value, dict) else value
)
def test_every_cache_gives_the_same_tokens(family, cache):
    model, ids = wrapped(family, task_of(family)), ids_of(family)
    for way in WAYS:
        assert torch.equal(generated(model, ids, **way, **cache), generated(model, ids, **way)), named(way)


@pytest.mark.parametrize(("family", "kind"), KINDS)
def test_rows_of_a_batch_are_served_as_they_are_alone(family, kind):
    model, ids = wrapped(family, task_of(family), kind), ids_of(family)
    for way in WAYS[:2]:
        rows = [
            generated(model, ids[i : i + 1], **way, **({"task_ids": TASKS[i : i + 1]} if extra(kind) else {}))
            for i in range(2)
        ]
        assert torch.equal(generated(model, ids, **way, **extra(kind)), torch.cat(rows))


@pytest.mark.parametrize("options", [{}, *CACHES[:3], {"num_beams": 3}], ids=named)
@pytest.mark.parametrize("kind", ["prompt", "multitask"])
@pytest.mark.parametrize("family", [family for family in DECODERS if family != "mistral"])
def test_a_row_with_padding_in_front_is_served_as_it_is_alone(family, kind, options):
    """PEFT forgets position_ids, and so gives other tokens than for the row alone; those are its own for the row."""
    model, ids = wrapped(family, "CAUSAL_LM", kind), ids_of(family)
    alone = ids[1:, 2:]
    ids[1, :2] = 0
    found = generated(model, ids, attention_mask=ids.ne(0).long(), **options, **extra(kind))
    more = {"task_ids": TASKS[1:]} if extra(kind) else {}
    expected = generated(model, alone, **more, **({"num_beams": 3} if "num_beams" in options else {}))
    assert torch.equal(found[1:, 2:], expected)
    twin = peft_twin(build(family, "CAUSAL_LM"), model)
    if not options:
        theirs = generated(twin, input_ids=alone, attention_mask=torch.ones_like(alone), **more)
        assert torch.equal(theirs, expected[:, -theirs.shape[1] :])


def test_padding_in_front_within_a_window():
    """A window counts the padding that lies between the prompt and the text; one that is wide enough shows no more."""
    torch.manual_seed(7)
    model = pyadapt.wrap(build("mistral", "CAUSAL_LM", sliding_window=40), config_of("prompt", "CAUSAL_LM")).eval()
    ids = ids_of("mistral")
    alone = generated(model, ids[1:, 2:])
    ids[1, :2] = 0
    assert torch.equal(generated(model, ids, attention_mask=ids.ne(0).long())[1:, 2:], alone)


@pytest.mark.parametrize("family", SEQ2SEQ)
def test_padding_of_an_encoders_text(family):
    model, ids = wrapped(family, "SEQ_2_SEQ_LM"), ids_of(family)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    found = generated(model, ids, attention_mask=mask)
    assert torch.equal(found[1:], generated(model, ids[1:, :5]))


# --- assistants


LONG = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False, "pad_token_id": 0}


def steps(model, part, *args, **options):
    """The tokens, and how often `part` was called for them."""
    calls = []
    hook = part.register_forward_hook(lambda *_: calls.append(1))
    try:
        return model.generate(*args, **options), len(calls)
    finally:
        hook.remove()


def ready(assistant):
    """An assistant that always gives five tokens."""
    config = assistant.generation_config
    config.num_assistant_tokens, config.num_assistant_tokens_schedule = 5, "constant"
    config.assistant_confidence_threshold = 0.0
    return assistant


@pytest.mark.parametrize("family", [*DECODERS, *SEQ2SEQ])
def test_a_plain_assistant(family):
    task, ids = task_of(family), ids_of(family, 1)
    model = wrapped(family, task)
    expected = model.generate(ids, **LONG)
    for assistant in (build(family, task), build(family, task, seed=5)):
        assert torch.equal(model.generate(ids, assistant_model=ready(assistant), **LONG), expected)


@pytest.mark.parametrize("tokens", [TOKENS, 30])
@pytest.mark.parametrize("family", [*DECODERS, *SEQ2SEQ])
def test_an_assistant_with_a_prompt_of_its_own(family, tokens):
    """One that has learnt the same gives what is taken as it is: six tokens a step."""
    task, ids = task_of(family), ids_of(family, 1)
    model = wrapped(family, task, num_virtual_tokens=tokens)
    expected = model.generate(ids, **LONG)
    same = ready(wrapped(family, task, num_virtual_tokens=tokens))
    stack = model.get_decoder()
    found, count = steps(model, stack, ids, assistant_model=same, **LONG)
    assert torch.equal(found, expected)
    assert count == 4
    other = ready(wrapped(family, task, num_virtual_tokens=tokens + 2))
    assert torch.equal(model.generate(ids, assistant_model=other, **LONG), expected)


@pytest.mark.parametrize("kind", ["prompt", "multitask"])
@pytest.mark.parametrize("family", [*DECODERS, *SEQ2SEQ])
def test_candidates_from_the_text(family, kind):
    model, ids = wrapped(family, task_of(family), kind), ids_of(family, 1)
    more = extra(kind, 1)
    found = model.generate(ids, prompt_lookup_num_tokens=3, **LONG, **more)
    assert torch.equal(found, model.generate(ids, **LONG, **more))


# --- what a text is given as, and where it goes


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"use_cache": False}], ids=named
)
@pytest.mark.parametrize("family", [*DECODERS, *SEQ2SEQ])
def test_embeddings_in_place_of_ids(family, options):
    model, ids = wrapped(family, task_of(family)), ids_of(family)
    states = model.get_input_embeddings()(ids).detach()
    expected = generated(model, ids, **options)
    found = generated(model, inputs_embeds=states, **options)
    assert torch.equal(found, expected[:, -found.shape[1] :])


def test_embeddings_in_place_of_ids_with_another_method():
    """Whatever the adapter is, transformers asks the signature whether embeddings are taken."""
    model = pyadapt.wrap(build("llama", "CAUSAL_LM"), pyadapt.LoraConfig(init_lora_weights=False)).eval()
    ids = ids_of("llama")
    found = generated(model, inputs_embeds=model.get_input_embeddings()(ids).detach())
    assert torch.equal(found, generated(model, ids)[:, -NEW:])


class Streamer:
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_streaming(family):
    model, ids, streamer = wrapped(family, task_of(family)), ids_of(family, 1), Streamer()
    expected = generated(model, ids)
    assert torch.equal(generated(model, ids, streamer=streamer), expected)
    assert streamer.ended
    assert streamer.tokens == expected[0].tolist()


@pytest.mark.parametrize("family", SEQ2SEQ)
def test_an_encoders_outputs_of_before(family):
    model, ids = wrapped(family, "SEQ_2_SEQ_LM"), ids_of(family)
    with torch.no_grad():
        outputs = model.get_encoder()(ids)
    assert outputs.last_hidden_state.shape[1] == ids.shape[1] + TOKENS
    assert torch.equal(generated(model, ids, encoder_outputs=outputs), generated(model, ids))


@pytest.mark.parametrize("submodules", [1, 2])
@pytest.mark.parametrize("family", SEQ2SEQ)
def test_a_decoders_text_to_begin_with(family, submodules):
    """With two prompts the decoder's stands before its tokens, in `generate` as in training; PEFT's forgets it."""
    model = wrapped(family, "SEQ_2_SEQ_LM", "multitask", num_transformer_submodules=submodules)
    ids, more = ids_of(family), extra("multitask")
    start = torch.tensor([[model.config.decoder_start_token_id, 4, 9]]).expand(2, 3)
    found = generated(model, ids, decoder_input_ids=start, **more)
    assert torch.equal(found, generated(model, ids, decoder_input_ids=start, use_cache=False, **more))
    with torch.no_grad():
        logits = model(input_ids=ids, decoder_input_ids=found[:, :-1], **more).logits
    assert torch.equal(logits[:, 2:].argmax(-1), found[:, 3:])
