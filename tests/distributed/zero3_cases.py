"""What is run under DeepSpeed ZeRO-3 on the ranks of a gang; each function gives what went wrong, by name."""

from __future__ import annotations

import hashlib
import os
import traceback
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from engines import ZERO3, Options, start, train
from methods_cases import CASES, compare_all, global_batch, wrapped
from models import FAMILIES, build, model_batch
from tolerance import assert_close, assert_near

import pyadapt


def collect(names: Iterable[str], check: Callable[[str], None]) -> dict[str, str]:
    """Several checks, and what went wrong with which."""
    wrong = {}
    for name in names:
        try:
            check(name)
        except Exception:
            wrong[name] = traceback.format_exc(limit=-6)
    return wrong


# --- options ----------------------------------------------------------------------------------------------------------


def offloaded(*what: str) -> dict[str, Any]:
    """DeepSpeed's configuration with `what` of "param" and "optimizer" on the CPU."""
    return {
        "zero_optimization": {**ZERO3["zero_optimization"], **{f"offload_{part}": {"device": "cpu"} for part in what}}
    }


def adamw(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """torch's AdamW; epsilon above the rounding of the gradients, which it else magnifies."""
    return torch.optim.AdamW(parameters, lr=0.01, eps=1e-3)


def cpu_adam(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The same by DeepSpeed, on the CPU."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return DeepSpeedCPUAdam(parameters, lr=0.01, eps=1e-3, weight_decay=0.01)


OPTIONS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "accumulation": ("lora", "fp32", {"accumulate": 2}),
    "clipping": ("lora-t5", "fp32", {"clip": 0.5}),
    "reentrant": ("dora", "fp32", {"checkpointing": "reentrant"}),
    "non-reentrant": ("dora", "fp32", {"checkpointing": "non-reentrant"}),
    "reentrant int8": ("lora", "int8", {"checkpointing": "reentrant"}),
    "non-reentrant int8": ("lora", "int8", {"checkpointing": "non-reentrant"}),
    "torch_autocast": ("lora", "fp32", {"autocast": True}),
    "bf16": ("lora-saved", "bf16", {"zero3": {"bf16": {"enabled": True}}}),
    "bf16 int8": (
        "lora",
        "int8",
        {"autocast": True, "zero3": {"torch_autocast": {"enabled": False}, "bf16": {"enabled": True}}},
    ),
    "offloaded optimizer": ("lora", "fp32", {"zero3": offloaded("optimizer"), "optimizer": adamw}),
    "offloaded parameters": ("lora", "int8", {"zero3": offloaded("param", "optimizer"), "optimizer": adamw}),
}


def options(names: Iterable[str]) -> dict[str, str]:
    """Training with each of the options of `OPTIONS`, as in `methods_cases.compare`."""

    def check(name: str) -> None:
        case, base, given = OPTIONS[name]
        wrong = compare_all("zero3", [case], base, **given)
        assert not wrong, wrong[case]

    return collect(names, check)


def by_cpu_adam() -> dict[str, str]:
    """DeepSpeed's own AdamW on the CPU against torch's in one process."""

    def check(name: str) -> None:
        alone, shared = wrapped(name), wrapped(name)
        wanted = train(alone, None, lambda step: global_batch(name, step), Options(optimizer=adamw))
        given = Options(optimizer=cpu_adam, zero3=offloaded("optimizer"))
        found = train(shared, "zero3", lambda step: global_batch(name, step), given)
        assert_near(torch.tensor(found), torch.tensor(wanted), "loss")
        for key, value in alone.get_adapter_state_dict().items():
            assert_close(shared.get_adapter_state_dict()[key], value, "gradient", torch.float32, key)

    return collect(["lora"], check)


def compiled() -> dict[str, str]:
    """`engine.compile()`, without code generation."""

    def check(name: str) -> None:
        alone, shared = wrapped(name), wrapped(name)
        wanted = train(alone, None, lambda step: global_batch(name, step), Options(steps=2))
        shared.train()
        runner = start(shared, "zero3", Options())
        runner.engine.compile(backend="aot_eager")
        from engines import rows_of_rank

        found = []
        for step in range(2):
            found.append(runner.micro_step(rows_of_rank(global_batch(name, step)), True))
            runner.step()
        assert_near(torch.tensor(found), torch.tensor(wanted), "loss")

    return collect(["lora"], check)


def evaluating() -> dict[str, str]:
    """Generation and evaluation in the engine's hands, between steps of training."""

    def check(name: str) -> None:
        alone, shared = wrapped(name), wrapped(name)
        train(alone, None, lambda step: global_batch(name, step), Options(steps=1))
        train(shared, "zero3", lambda step: global_batch(name, step), Options(steps=1))
        batch = model_batch(CASES[name][0], seed=7, rows=2)
        alone.eval()
        shared.eval()
        with torch.no_grad():
            assert_near(shared(**batch).logits, alone(**batch).logits, "model")
            ids = {"input_ids": batch["input_ids"], "max_new_tokens": 4, "do_sample": False}
            assert torch.equal(shared.generate(**ids, synced_gpus=True), alone.generate(**ids))
            with shared.disable_adapter(), alone.disable_adapter():
                assert_near(shared(**batch).logits, alone(**batch).logits, "model")

    return collect(["lora", "dora", "prefix"], check)


# --- saving -----------------------------------------------------------------------------------------------------------


def saved(folder: str, names: Iterable[str]) -> dict[str, str]:
    """What is saved under ZeRO-3, gathered and from DeepSpeed's own state dict, is what one process saves."""
    rank = dist.get_rank()

    def check(name: str) -> None:
        alone, shared = wrapped(name), wrapped(name)
        runner = start(shared, "zero3", Options(zero3={"zero_optimization": _GATHERS}))
        # All that a rank needs to ask for is there: nothing has been trained, so that bytes can be compared.
        shared.save_pretrained(os.path.join(folder, f"{name}-gathered"))
        state = runner.engine._zero3_consolidated_16bit_state_dict()
        if rank == 0:
            alone.save_pretrained(os.path.join(folder, f"{name}-alone"))
            shared.save_pretrained(os.path.join(folder, f"{name}-given"), state_dict=state)
            digests = {_digest(os.path.join(folder, f"{name}-{way}")) for way in ("alone", "gathered", "given")}
            assert len(digests) == 1
            for wrong in ({}, {key: value for key, value in state.items() if "adapters" not in key}):
                refused = _error_of(
                    lambda given=wrong: shared.save_pretrained(os.path.join(folder, "none"), state_dict=given)
                )
                assert "rank 0" in refused, refused
                assert wrong or "stage3_gather_16bit_weights_on_model_save" in refused, refused
            assert not os.path.exists(os.path.join(folder, "none", "adapter_model.safetensors"))
        dist.barrier()

    return collect(names, check)


_GATHERS = {**ZERO3["zero_optimization"], "stage3_gather_16bit_weights_on_model_save": True}


def _digest(folder: str) -> str:
    with open(os.path.join(folder, "adapter_model.safetensors"), "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def _error_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


# --- first values -----------------------------------------------------------------------------------------------------


def seeds_of_their_own(engine: str) -> dict[str, str]:
    """Ranks with different seeds train the adapter that the first one would draw alone, and keep their own seeds."""

    def check(name: str) -> None:
        family, config = CASES[name]
        config = {"task_type": FAMILIES[family].task, **config}
        base, model = build(family), build(family)
        torch.manual_seed(11)
        os.environ["PYADAPT_CHECK_RANKS"] = "0"
        alone = pyadapt.wrap(base, config)
        del os.environ["PYADAPT_CHECK_RANKS"]
        torch.manual_seed(11 + dist.get_rank())
        before = torch.get_rng_state()
        shared = pyadapt.wrap(model, config)
        assert dist.get_rank() == 0 or torch.equal(torch.get_rng_state(), before)
        wanted = train(alone, None, lambda step: global_batch(name, step), Options(steps=2))
        found = train(shared, engine, lambda step: global_batch(name, step), Options(steps=2))
        assert_near(torch.tensor(found), torch.tensor(wanted), "loss")

    return collect(["lora", "dora"], check)


# --- the negative control ---------------------------------------------------------------------------------------------


def clipped() -> dict[str, str]:
    """The gradients of this case are longer than 1, to which DeepSpeed clips unless it is told not to."""
    return compare_all("zero3", ["lora-t5"], zero3={"gradient_clipping": 1.0})
