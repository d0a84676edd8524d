"""The formulas of docs/scaling.md, against what processes hold and send."""

from __future__ import annotations

import gang
import pytest
from source_tree import ROOT, benchmark

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
    measured = gang.run(ranks, measure.measure_all, cases, group=False, timeout=180)[0]
    assert [line for case, found in zip(cases, measured, strict=True) for line in wrong(case, ranks, found)] == []
    for case, found in zip(cases, measured, strict=True):
        if case.plan.engine in SHARDING:
            # Frozen weights have no states: what there is, is of the adapters.
            trained = formulas.total(formulas.trained(found.weights))
            assert found.optimizer < 1.1 * 2 * trained / ranks
            totals = [formulas.memory(case.plan.engine, found.weights, R).total for R in (2, 4, 8)]
            assert totals == sorted(set(totals), reverse=True)


def test_blocks_as_units_of_fsdp1_give_frozen_weights_gradients():
    """The negative control: FSDP1 without pyadapt's policy wastes a gradient of the frozen block."""
    (found, _) = gang.run(2, measure.measure_all, [Case(Plan("fsdp1", alone=False))], group=False, timeout=120)
    memory = formulas.memory("fsdp1", found[0].weights, 2)
    frozen = sum(weight.size for weight in found[0].weights if weight.group >= 0 and not weight.trained)
    assert found[0].gradients > memory.gradients + 0.9 * frozen / 2
    assert wrong(Case(Plan("fsdp1")), 2, found[0])


@pytest.mark.parametrize("name", page.TABLES)
def test_page_has_the_tables_that_are_made_now(name):
    """``python -m benchmarks.scaling --page`` writes them."""
    assert page.TABLES[name]() in page.PAGE.read_text()
