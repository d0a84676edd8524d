"""Prompt tuning, P-tuning and multitask prompt tuning against peft; what a call takes and gives."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from models import CACHE, assert_near
from prompt_cases import (
    CONFIGS,
    DECODERS,
    TASKS,
    TOKENS,
    VOCABULARY,
    WIDTH,
    batch,
    build,
    extra,
    pairs,
    peft_twin,
    wrapped,
)

import pyadapt

ENCODERS = ("bert", "roberta", "deberta", "deberta-v2")
TEXT_TASKS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
CASES = [
    *((family, "CAUSAL_LM") for family in DECODERS),
    *((family, "SEQ_2_SEQ_LM") for family in ("t5", "bart")),
    *((family, task) for family in ENCODERS for task in TEXT_TASKS),
    *((family, "SEQ_CLS") for family in ("gpt2", "opt", "llama")),
    *((family, "TOKEN_CLS") for family in ("gpt2", "bloom")),
]
EVERY = [(*case, kind) for case in CASES for kind in CONFIGS]
# A family of each sort, for what all have in common.
SOME = [
    ("llama", "CAUSAL_LM", "prompt"), ("gpt2", "CAUSAL_LM", "multitask"), ("t5", "SEQ_2_SEQ_LM", "lstm"),
    ("bart", "SEQ_2_SEQ_LM", "mlp"), ("bert", "SEQ_CLS", "mlp"), ("deberta", "TOKEN_CLS", "prompt"),
    ("roberta", "QUESTION_ANS", "lstm"),
]  # fmt: skip


def inputs(task):
    """A batch that peft takes."""
    made = batch(task)
    if task in ("TOKEN_CLS", "QUESTION_ANS"):
        # In peft the labels of tokens do not fit the longer text, and those of answers mean other tokens of it.
        return {key: made[key] for key in ("input_ids", "attention_mask")}
    if task == "CAUSAL_LM":
        # In peft the last virtual token has to say the text's first; where its position is taken out nothing does.
        made["labels"] = made["labels"].clone()
        made["labels"][:, 0] = -100
    return made


def twins(family, task, kind, **options):
    """Our model, and what calls peft's with the same adapter."""
    base = build(family, task)
    model = wrapped(family, task, kind, **options)
    twin = peft_twin(base, model)
    if kind != "multitask" or task in ("SEQ_CLS", "TOKEN_CLS", "CAUSAL_LM", "SEQ_2_SEQ_LM"):
        return model, twin, functools.partial(twin, **extra(kind))
    # peft's models for the other tasks do not hand the ids on to the prompt, which takes them.
    twin.get_prompt = functools.partial(twin.get_prompt, task_ids=TASKS)
    return model, twin, twin


def compared(outputs, given):
    """The tensors of an output by name, without the virtual positions that peft leaves in."""
    found = {}
    for key, value in outputs.items():
        if not isinstance(value, torch.Tensor) or key.startswith("encoder"):
            continue
        by_token = value.dim() == 3 or key in ("start_logits", "end_logits")
        length = given["labels" if "encoder_last_hidden_state" in outputs else "input_ids"].shape[1]
        found[key] = value[:, -length:] if by_token else value
    return found


def loss_of(outputs, given):
    """The loss of the model's own, or one of its outputs where it has none."""
    found = compared(outputs, given)
    return found["loss"] if "loss" in found else next(iter(found.values())).square().mean()


@pytest.mark.parametrize(("family", "task", "kind"), EVERY)
def test_outputs_loss_and_gradients_are_those_of_peft(family, task, kind):
    model, twin, call = twins(family, task, kind)
    given = inputs(task)
    with torch.no_grad():
        ours, theirs = compared(model(**given, **extra(kind)), given), compared(call(**given), given)
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert_near(value, theirs[key], "model")
    loss_of(model(**given, **extra(kind)), given).backward()
    loss_of(call(**given), given).backward()
    met = pairs(model, twin)
    assert met
    for name, parameter, other in met:
        assert other.grad.abs().max() > 0, name
        assert_near(parameter.grad, other.grad, "gradient")


@pytest.mark.parametrize(("family", "task", "kind"), SOME)
def test_three_steps_of_training_are_those_of_peft(family, task, kind):
    model, twin, call = twins(family, task, kind)
    given = inputs(task)
    losses = []
    for one, run in ((model, functools.partial(model, **extra(kind))), (twin, call)):
        optimizer = torch.optim.SGD([p for p in one.train().parameters() if p.requires_grad], lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            loss = loss_of(run(**given), given)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    ours, theirs = torch.stack(losses).chunk(2)
    assert ours[2] < ours[0]
    assert_near(ours, theirs, "loss")


def test_a_row_that_is_padded_on_the_right_is_classified_as_it_is_alone():
    """GPT-2 takes the text's last token; PEFT gives it no ids, and it takes the padding's."""
    model, _, call = twins("gpt2", "SEQ_CLS", "prompt")
    given = batch("SEQ_CLS")
    ids, mask = given["input_ids"].clone(), given["attention_mask"].clone()
    ids[1, 5:], mask[1, 5:] = 0, 0
    with torch.no_grad():
        padded = model(ids, attention_mask=mask).logits
        alone = model(ids[1:, :5]).logits
        assert_near(alone, call(input_ids=ids[1:, :5], attention_mask=mask[1:, :5]).logits, "model")
        theirs = call(input_ids=ids, attention_mask=mask).logits
    assert_near(padded[:1], theirs[:1], "model")
    assert_near(padded[1:], alone, "model")
    assert (theirs[1] - padded[1]).abs().max() > 1e-2


@pytest.mark.parametrize(("family", "task", "kind"), SOME)
def test_outputs_have_the_shapes_of_the_text(family, task, kind):
    model = wrapped(family, task, kind)
    model.set_attn_implementation("eager")
    given, more = batch(task), {"output_hidden_states": True, "output_attentions": True, **extra(kind)}
    with torch.no_grad():
        outputs = model(**given, **more)
        plain = model(**given, **more, return_dict=False)
    side = "decoder_" if task == "SEQ_2_SEQ_LM" else ""
    length = 5 if side else 7
    assert [tuple(state.shape) for state in outputs[f"{side}hidden_states"]] == [(2, length, WIDTH)] * 3
    # Keys of the virtual tokens are there to be looked at; behind an encoder, across.
    keys = length if side else length + TOKENS
    assert [tuple(part.shape) for part in outputs[f"{side}attentions"]] == [(2, 4, length, keys)] * 2
    if side:
        assert [tuple(part.shape) for part in outputs.cross_attentions] == [(2, 4, length, 7 + TOKENS)] * 2
    flat = [value for value in outputs.to_tuple() if isinstance(value, torch.Tensor)]
    others = [value for value in plain if isinstance(value, torch.Tensor)]
    assert len(flat) == len(others)
    for one, other in zip(flat, others, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("family", "task", "kind"), SOME)
def test_the_loss_is_that_of_the_texts_logits(family, task, kind):
    model, given = wrapped(family, task, kind), batch(task)
    outputs = model(**given, **extra(kind))
    if task == "QUESTION_ANS":
        # PEFT's labels are off by the virtual positions.
        assert outputs.start_logits.shape == outputs.end_logits.shape == (2, 7)
        parts = [(outputs.start_logits, given["start_positions"]), (outputs.end_logits, given["end_positions"])]
    elif task == "CAUSAL_LM":
        assert outputs.logits.shape == (2, 7, VOCABULARY)
        parts = [(outputs.logits[:, :-1].flatten(0, 1), given["labels"][:, 1:].flatten())]
    else:
        parts = [(outputs.logits.flatten(0, -2), given["labels"].flatten())]
    expected = torch.stack([F.cross_entropy(logits, labels) for logits, labels in parts]).mean()
    assert_near(outputs.loss, expected, "loss")


@pytest.mark.parametrize(("family", "task", "kind"), SOME)
def test_embeddings_in_place_of_ids(family, task, kind):
    model, given = wrapped(family, task, kind), batch(task)
    states = model.get_input_embeddings()(given["input_ids"]).detach()
    by_states = {key: value for key, value in given.items() if key != "input_ids"}
    with torch.no_grad():
        one = model(**given, **extra(kind))
        other = model(inputs_embeds=states, **by_states, **extra(kind))
    assert torch.equal(one.loss, other.loss)


@pytest.mark.parametrize(("family", "task", "kind"), SOME)
def test_no_mask_is_a_mask_of_ones(family, task, kind):
    model, given = wrapped(family, task, kind), batch(task)
    with torch.no_grad():
        one = model(**given, **extra(kind)).loss
        other = model(**{**given, "attention_mask": None}, **extra(kind)).loss
    assert_near(one, other, "model")


@pytest.mark.parametrize(("family", "task"), [("llama", "CAUSAL_LM"), ("bert", "SEQ_CLS"), ("bart", "SEQ_2_SEQ_LM")])
def test_what_is_padding_is_not_seen(family, task):
    model, given = wrapped(family, task), batch(task)
    given["attention_mask"][1, 5:] = 0
    other = {**given, "input_ids": given["input_ids"].clone()}
    other["input_ids"][1, 5:] = 9
    states = [3, 4] if task == "CAUSAL_LM" else [0]
    with torch.no_grad():
        one, two = model(**given).logits, model(**other).logits
        assert_near(one[:, states], two[:, states], "model")
        given["attention_mask"][1, 4] = 0
        assert (model(**given).logits - one)[1, states[-1]].abs().max() > 1e-4


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_types_of_tokens_are_those_of_peft(family):
    model, _, call = twins(family, "SEQ_CLS", "prompt")
    given = {**batch("SEQ_CLS"), "token_type_ids": torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1]])}
    with torch.no_grad():
        found = model(**given).logits
        assert (found - model(**batch("SEQ_CLS")).logits).abs().max() > 1e-3
        assert_near(found, call(**given).logits, "model")


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_positions_given_are_those_of_the_text(family):
    model, given = wrapped(family, "CAUSAL_LM"), batch("CAUSAL_LM")
    ids, mask, positions = given["input_ids"], given["attention_mask"], torch.arange(7).expand(2, 7)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        assert_near(model(ids, attention_mask=mask, position_ids=positions).logits, expected, "model")
        # Padding in front moves nothing where positions say so.
        ids = torch.cat([torch.zeros(2, 2, dtype=torch.long), ids], dim=1)
        mask, positions = F.pad(mask, (2, 0)), F.pad(positions, (2, 0))
        assert_near(model(ids, attention_mask=mask, position_ids=positions).logits[:, 2:], expected, "model")
        others = model(given["input_ids"], position_ids=torch.arange(0, 14, 2).expand(2, 7)).logits
        assert (others - expected).abs().max() > 1e-3


def test_a_mask_of_four_dimensions_is_refused():
    model, ids = wrapped("llama", "CAUSAL_LM"), batch("CAUSAL_LM")["input_ids"]
    with pytest.raises(ValueError, match=r"the attention mask is to be the text's, of shape \(rows, tokens\)"):
        model(ids, attention_mask=torch.zeros(2, 1, 7, 7))


def test_a_cache_holds_the_prompt_from_the_first_call_on():
    model, given = wrapped("llama", "CAUSAL_LM"), batch("CAUSAL_LM")
    ids, mask = given["input_ids"], given["attention_mask"]
    with torch.no_grad():
        whole = model(ids, attention_mask=mask).logits
        first = model(ids[:, :4], attention_mask=mask[:, :4], use_cache=True)
        cache = getattr(first, CACHE)
        assert cache.get_seq_length() == 4 + TOKENS
        rest = model(ids[:, 4:], attention_mask=mask, **{CACHE: cache}).logits
    assert_near(torch.cat([first.logits, rest], dim=1), whole, "model")


# The figure of a P-tuning of roberta-large with two labels; PEFT prints the same.
ROBERTA_LARGE = {
    "vocab_size": 50265, "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
    "intermediate_size": 4096, "max_position_embeddings": 514, "type_vocab_size": 1, "num_labels": 2,
}  # fmt: skip


def test_parameters_of_roberta_large():
    from transformers import RobertaConfig, RobertaForSequenceClassification

    with torch.device("meta"):
        model = RobertaForSequenceClassification(RobertaConfig(**ROBERTA_LARGE))
    config = pyadapt.PromptEncoderConfig(task_type="SEQ_CLS", num_virtual_tokens=20, encoder_hidden_size=128)
    plan = pyadapt.plan(model, config)
    assert (plan.trainable_parameters, plan.all_parameters) == (1_351_938, 355_662_082)
    model = pyadapt.wrap(model, config)
    assert model.get_nb_trainable_parameters() == (1_351_938, 355_662_082)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_a_decoder_that_is_told_what_an_encoder_hears():
    """Whisper's encoder reads no tokens: the prompt stands before the decoder's text. PEFT has no such thing."""
    from models.zoo import MODELS

    row = next(row for row in MODELS if row.name == "Whisper")
    given = row.batch()
    plain = row.build()
    model = pyadapt.wrap(row.build(), pyadapt.PromptTuningConfig(task_type=row.task, num_virtual_tokens=3)).eval()
    prompt = model.model.decoder.adapters["default"].embeddings
    labels = given["labels"]
    start = torch.full_like(labels[:, :1], plain.config.decoder_start_token_id)
    with torch.no_grad():
        states = plain.model.decoder.embed_tokens(torch.cat([start, labels[:, :-1]], dim=1))
        longer = torch.cat([prompt.expand(len(labels), -1, -1), states], dim=1)
        heard = plain.model.encoder(given["input_features"]).last_hidden_state
        read = plain.model.decoder(inputs_embeds=longer, encoder_hidden_states=heard).last_hidden_state
        expected = plain.proj_out(read[:, 3:])
        assert_near(model(**given).logits, expected, "model")
        assert (plain(**given).logits - expected).abs().max() > 1e-2
