"""The formulas of docs/scaling.md, against what processes hold and send."""

from __future__ import annotations

import gang
import pytest
from source_tree import ROOT, benchmark
from torch import nn

import pyadapt

if not (ROOT / "benchmarks").is_dir():
    pytest.skip("waits for a source tree: benchmarks are not installed", allow_module_level=True)

formulas, measure, page = benchmark("scaling.formulas"), benchmark("scaling.measure"), benchmark("scaling.page")
Plan, Case = benchmark("scaling.engines").Plan, benchmark("scaling.measure").Case

# Of what a rank holds: formulas leave out logits and the counters of AdamW.
WITHIN = 0.03
SHARDING = ("fsdp2", "zero3")
CASES = [
    Case(Plan("ddp")),
    Case(Plan("fsdp1")),
    Case(Plan("fsdp2")),
    Case(Plan("fsdp2"), base="int8"),
    Case(Plan("zero3")),
    Case(Plan("zero3"), base="int8"),
]


def wrong(case, ranks, found):
    """What differs from the formulas."""
    engine = case.plan.engine
    memory = formulas.memory(engine, found.weights, ranks)
    room = WITHIN * memory.total
    pairs = {
        "at start": (found.at_start, memory.at_start),
        "gradients": (found.gradients, memory.gradients),
        "optimizer": (found.optimizer, memory.optimizer),
        "most at once": (found.total, memory.total + measure.activations(case)),
    }
    lines = [f"{name}: {seen}, {said} expected" for name, (seen, said) in pairs.items() if abs(seen - said) > room]
    said = formulas.traffic(engine, found.weights, ranks, case.plan.accumulate, case.plan.reshard)
    if found.traffic != said:
        lines.append(f"traffic: {found.traffic}, {said} expected")
    return [f"{engine} {case.base} {case.method}, {ranks} ranks: {line}" for line in lines]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_bytes_and_traffic_are_what_the_formulas_say(ranks):
    """Parameters, gradients, AdamW's states, what is gathered; what is sent, to the byte and the call."""
    # Two engines shard as ranks grow; the others are the same on four as on two.
    cases = CASES if ranks < 4 else [case for case in CASES if case.plan.engine in SHARDING]
    measured = gang.run(ranks, measure.measure_all, cases, group=False)[0]
    assert [line for case, found in zip(cases, measured, strict=True) for line in wrong(case, ranks, found)] == []
    for case, found in zip(cases, measured, strict=True):
        if case.plan.engine in SHARDING:
            # Frozen weights have no states: what there is, is of the adapters.
            trained = formulas.total(formulas.trained(found.weights))
            assert found.optimizer < 1.1 * 2 * trained / ranks


@pytest.mark.parametrize("engine", SHARDING)
def test_the_peak_of_a_rank_falls_as_ranks_grow(engine):
    """As it is measured, on 1, 2 and 4 processes; parameters and states by nearly the number of ranks."""
    found = [gang.run(ranks, measure.measure_all, [Case(Plan(engine))], group=False)[0][0] for ranks in (1, 2, 4)]
    for smaller, larger in zip(found[1:], found[:-1], strict=True):
        assert smaller.total < larger.total
        assert smaller.at_start < 0.6 * larger.at_start
        assert smaller.optimizer < 0.6 * larger.optimizer


def test_blocks_as_units_of_fsdp1_give_frozen_weights_gradients():
    """The negative control: FSDP1 without pyadapt's policy wastes a gradient of the frozen block."""
    (found, _) = gang.run(2, measure.measure_all, [Case(Plan("fsdp1", alone=False))], group=False)
    memory = formulas.memory("fsdp1", found[0].weights, 2)
    frozen = sum(weight.size for weight in found[0].weights if weight.group >= 0 and not weight.trained)
    assert found[0].gradients > memory.gradients + 0.9 * frozen / 2
    assert wrong(Case(Plan("fsdp1")), 2, found[0])


@pytest.mark.parametrize("checkpointing", [None, "non-reentrant"])
@pytest.mark.parametrize("base", ["fp32", "bf16"])
def test_activations_of_a_block(base, checkpointing):
    """To the byte; with checkpointing its input alone."""
    case = Case(Plan("ddp"), base, checkpointing=checkpointing)
    itemsize = 2 if base == "bf16" else 4
    whole = formulas.llama_block_activations(hidden=256, inner=512, kv=128, heads=8, r=8, itemsize=itemsize)
    wanted = whole if checkpointing is None else 256 * itemsize
    assert gang.run(1, measure.block_activations, case, group=False) == [wanted]


@pytest.mark.parametrize(
    ("method", "config"),
    [
        ("lora", {"peft_type": "LORA", "r": 4}),
        ("dora", {"peft_type": "LORA", "r": 4, "use_dora": True}),
        ("ia3", {"peft_type": "IA3", "feedforward_modules": []}),
        ("ia3 feed-forward", {"peft_type": "IA3", "feedforward_modules": ["0"]}),
        ("loha", {"peft_type": "LOHA", "r": 4}),
        ("lokr", {"peft_type": "LOKR", "r": 2}),
    ],
)
def test_values_of_adapters(method, config):
    """The table of methods, against what is on a layer."""
    K, N = 64, 32
    model = pyadapt.wrap(nn.Sequential(nn.Linear(K, N)), {"target_modules": ["0"], **config})
    shapes = {name.rpartition(".")[2]: tuple(value.shape) for name, value in model.named_parameters()}
    first = shapes.get("lokr_w1")
    factors = {} if first is None else {"N1": first[0], "K1": first[1], "whole": "lokr_w2" in shapes}
    found = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert found == formulas.adapter_values(method, K, N, config.get("r", 0), **factors)


@pytest.mark.parametrize("name", page.TABLES)
def test_page_has_the_tables_that_are_made_now(name):
    """``python -m benchmarks.scaling --page`` writes them."""
    assert page.TABLES[name]() in page.PAGE.read_text()
