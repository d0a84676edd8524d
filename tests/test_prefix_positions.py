"""Prefix tuning against attention over the longer sequence, formed outright in fp64, one family a way of positions."""

from __future__ import annotations

import copy

import pytest
import torch
from prefix_cases import CASES, batch
from prefix_reference import Text, angles, turning
from tolerance import assert_close

import pyadapt
from pyadapt.methods.prefix import PrefixTuningConfig

N = 4


def watched(name, inputs, options, **config):
    """Every self-attention's inputs and output in one forward of the wrapped fp64 model, by layer."""
    case = CASES[name]
    model = case.make(**options).double()
    plain = copy.deepcopy(model)
    task = None if case.task == "FEATURE_EXTRACTION" else case.task
    config = PrefixTuningConfig(task_type=task, num_virtual_tokens=N, adapter_dtype="float64", **config)
    wrapped = pyadapt.wrap(model, config).eval()
    calls, tables = [], []
    paths = []
    while True:
        path = case.attention.format(len(paths))
        try:
            module = wrapped.get_submodule(path)
        except AttributeError:
            break
        paths.append(path)
        module.register_forward_hook(
            lambda module, args, kwargs, output: calls.append((args, kwargs, output[0])), with_kwargs=True
        )
    if case.table:
        wrapped.get_submodule(case.table[0]).register_forward_hook(lambda module, args, output: tables.append(output))
    with torch.no_grad():
        wrapped(**{key: value.double() if value.is_floating_point() else value for key, value in inputs.items()})
    assert len(calls) == len(paths) >= 2
    return wrapped, plain, paths, calls, tables


def blocks(wrapped, plain, path, layers):
    """The prefix of each layer, (n, 2, G, D), from the adapter's file as PEFT lays it out: (n, layers 2 G D)."""
    prompt = wrapped.get_adapter_state_dict("default")["prompt_embeddings"]
    module = plain.get_submodule(path)
    size = next(
        getattr(module, name)
        for name in ("head_dim", "head_size", "attention_head_size", "key_value_proj_dim")
        if hasattr(module, name)
    )
    assert prompt.dtype == torch.float64
    stacked = prompt.unflatten(1, (2 * layers, -1, size))
    if getattr(plain.config, "is_encoder_decoder", False) and hasattr(plain, "get_decoder"):
        # PEFT's says the blocks twice, for the cross-attention too, and each layer takes the first of two pairs.
        stacked = torch.cat([stacked, stacked], dim=1)
        return [stacked[:, 4 * layer : 4 * layer + 2] for layer in range(layers)]
    return [stacked[:, 2 * layer : 2 * layer + 2] for layer in range(layers)]


def check(name, inputs, options=None, positions=None, **config):
    case = CASES[name]
    wrapped, plain, paths, calls, tables = watched(name, inputs, options or {}, **config)
    behind = "decoder_input_ids" in inputs
    text = inputs["decoder_input_ids" if behind else "input_ids"]
    mask = torch.ones_like(text) if behind else inputs["attention_mask"]
    if positions is None:
        positions = torch.arange(text.shape[1]).expand_as(text)
    parts = blocks(wrapped, plain, paths[0], len(paths))
    exact = case.exact and (case.own_forward or (options or {}).get("attn_implementation") != "eager")
    dtype = torch.float64 if exact else torch.float32
    real = mask.bool()
    with torch.no_grad():
        for path, part, (args, kwargs, output) in zip(paths, parts, calls, strict=True):
            states = args[0] if args else kwargs["hidden_states"]
            given = Text(states, mask, positions, part, plain, args[1:], kwargs)
            expected = case.reading()(plain.get_submodule(path), given)
            assert_close(output[real], expected[real], "layer", dtype, path)
        if case.table:
            path, first = case.table
            (found,) = tables
            expected = plain.get_submodule(path).weight[positions + first + N]
            assert torch.equal(found.expand_as(expected)[real], expected[real])


def options_of(implementation):
    return {"attn_implementation": implementation}


@pytest.mark.parametrize(
    ("name", "implementation"),
    [(name, implementation) for name, case in CASES.items() for implementation in case.implementations],
)
def test_each_attention_is_that_of_the_longer_sequence(name, implementation):
    check(name, batch(name), options_of(implementation))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.task != "SEQ_2_SEQ_LM"])
def test_padding_on_the_right(name):
    inputs = batch(name, padding=4)
    positions = None
    if name == "roberta":
        # Its own rule; at tokens that are none positions do not count.
        positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    check(name, inputs, positions=positions)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.task == "CAUSAL_LM"])
def test_padding_on_the_left(name):
    """Positions count the tokens that are none not at all, as `generate` gives them."""
    inputs = batch(name, padding=4, left=True)
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    # BLOOM and OPT count them from the mask themselves.
    given = {} if name in ("bloom", "opt") else {"position_ids": positions}
    check(name, {**inputs, **given}, positions=positions)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_block_of_its_own_for_each_layer_of_a_decoder_behind_an_encoder(name):
    """PEFT cannot run num_transformer_submodules=1, so its file is read as a decoder's is."""
    inputs = batch(name)
    wrapped, plain, paths, calls, _ = watched(name, inputs, {}, num_transformer_submodules=1)
    plain_layout = blocks_in_order(wrapped, plain, paths)
    positions = torch.arange(inputs["decoder_input_ids"].shape[1]).expand_as(inputs["decoder_input_ids"])
    mask = torch.ones_like(positions)
    with torch.no_grad():
        for path, part, (args, kwargs, output) in zip(paths, plain_layout, calls, strict=True):
            states = args[0] if args else kwargs["hidden_states"]
            expected = CASES[name].reading()(
                plain.get_submodule(path), Text(states, mask, positions, part, plain, args[1:], kwargs)
            )
            assert_close(output, expected, "layer", torch.float64, path)


def blocks_in_order(wrapped, plain, paths):
    prompt = wrapped.get_adapter_state_dict("default")["prompt_embeddings"]
    module = plain.get_submodule(paths[0])
    size = getattr(module, "head_dim", None) or module.key_value_proj_dim
    return prompt.unflatten(1, (len(paths), 2, -1, size)).unbind(1)


@pytest.mark.parametrize("kinds", [["c2p"], ["p2c"], []])
@pytest.mark.parametrize("name", ["deberta", "deberta_v2_buckets"])
def test_each_term_of_disentangled_attention_alone(name, kinds):
    # Heads of 8 or 16 features, so that the root that transformers rounds to fp32 is a whole number.
    options = {"hidden_size": 32, "num_attention_heads": 4} if kinds else {"hidden_size": 64, "num_attention_heads": 4}
    check(name, batch(name), {**options, "pos_att_type": kinds})


def test_deberta_without_relative_attention():
    check("deberta", batch("deberta"), {"relative_attention": False, "pos_att_type": [], "hidden_size": 64})


def test_a_window_hides_the_whole_prefix_from_the_last_tokens():
    """Of 11 tokens behind 4, with a window of 5: the fourth token sees one token of the prefix, the fifth none."""
    name = "mistral"
    model = CASES[name].make().double()
    config = {"num_virtual_tokens": N, "adapter_dtype": "float64", "task_type": "CAUSAL_LM"}
    wrapped = pyadapt.wrap(model, PrefixTuningConfig(**config)).eval()
    first = wrapped.get_submodule(CASES[name].attention.format(0))
    outputs = []
    first.register_forward_hook(lambda module, args, output: outputs.append(output[0]))
    with torch.no_grad():
        for _ in range(2):
            wrapped(**batch(name))
            next(p for p in wrapped.parameters() if p.requires_grad).add_(1.0)
    changed = (outputs[0] != outputs[1]).any(-1)[0].tolist()
    assert changed == [True] * 4 + [False] * 7


@pytest.mark.parametrize("name", ["llama", "neox"])
def test_rotations_are_those_of_the_formula(name):
    """The reference takes transformers' fp32 tables; here they are held against the definition."""
    plain = CASES[name].make()
    positions = torch.arange(9)[None]
    states = torch.zeros(1, 9, 48)
    cos, sin = turning(Text(states, positions, positions, torch.zeros(N, 2, 1, 1), plain, (), {}))
    turn = angles(positions + N, cos.shape[-1])
    assert_close(cos, turn.cos().repeat(1, 1, 2), "layer", torch.float32)
    assert_close(sin, turn.sin().repeat(1, 1, 2), "layer", torch.float32)
