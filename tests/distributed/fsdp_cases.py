"""What the ranks of a gang run for the tests of FSDP1, FSDP2 and DDP."""

from __future__ import annotations

import filecmp
import os
import traceback
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from engines import Options, start, train
from methods_cases import compare, global_batch, wrapped
from tolerance import assert_near

import pyadapt
from pyadapt.base.dense import Dense
from pyadapt.base.int8 import Int8
from pyadapt.biases import TrainedBias
from pyadapt.distributed import agreement
from pyadapt.distributed.fsdp1 import Fsdp1
from pyadapt.distributed.fsdp2 import Fsdp2
from pyadapt.layer import base_modules, saved_modules, unwrapped
from pyadapt.method import AdapterUnit


def compare_options(engine: str, rows: Sequence[tuple[str, dict[str, Any]]]) -> dict[str, str]:
    """Cases each under options of its own, and what went wrong with which."""
    wrong = {}
    for name, options in rows:
        try:
            compare(engine, name, **options)
        except Exception:
            wrong[f"{name} {options}"] = traceback.format_exc(limit=-6)
    return wrong


def compare_all_options(engine: str, rows: Sequence[tuple[str, dict[str, Any]]]) -> dict[str, str]:
    """`compare_options`, a fault that it has to see, and adapters that are switched on the sharded model."""
    wrong = compare_options(engine, rows)
    if not compare_with_fault(engine):
        wrong["fault"] = "a weight that is lost in backward is not seen"
    if engine == "ddp":
        # DDP would average a part of the gradient alone; nothing but our own refusal says so.
        parts = compare_options(engine, [("prefix", {"checkpointing": "reentrant"})])
        wrong.update(
            {name: text for name, text in parts.items() if "use_reentrant" not in text} if parts else {"parts": ""}
        )
    return {**wrong, **switch_on_sharded(engine)}


def compare_with_fault(engine: str) -> str:
    """What the comparison says where W reads as zeros in backward, under the engine alone; empty if it sees nothing."""
    read = Dense.operands

    def faulty(layer: Any) -> Any:
        operands = read(layer)
        in_backward = torch._C._current_graph_task_id() != -1
        return operands._replace(weight=torch.zeros_like(operands.weight)) if in_backward else operands

    alone, shared = wrapped("lora"), wrapped("lora")
    wanted = train(alone, None, lambda step: global_batch("lora", step), Options())
    Dense.operands = staticmethod(faulty)  # type: ignore[method-assign]
    try:
        found = train(shared, engine, lambda step: global_batch("lora", step), Options())
    finally:
        Dense.operands = staticmethod(read)  # type: ignore[method-assign]
    try:
        assert_near(torch.tensor(found), torch.tensor(wanted), "loss")
    except AssertionError as error:
        return str(error)
    return ""


def bytes_of_base(engine: str) -> tuple[int, int]:
    """(bytes of int8 weights and scales that this rank holds, those of the whole model).

    The first is the larger of what is counted before and after a forward and its backward.
    """
    storage = torch.float32 if engine.startswith("fsdp1") else None
    model = wrapped("lora", "int8", storage)
    every = sum(sum(p.nbytes for p in Int8.stored(layer).values()) for layer in _int8_layers(model))
    if engine == "fsdp1_flat":
        # Its flat parameters hold all that is frozen.
        every = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    runner = start(model, engine, Options())
    held = [_held(model, engine)]
    runner.micro_step({key: value[:2] for key, value in global_batch("lora", 0).items()}, True)
    held.append(_held(model, engine))
    return max(held), every


def _int8_layers(model: Any) -> list[Any]:
    return [layer for _, layer in base_modules(model) if hasattr(layer, "dense_dtype")]


def _held(model: Any, engine: str) -> int:
    if engine == "fsdp2":
        return sum(p.to_local().nbytes for layer in _int8_layers(model) for p in Int8.stored(layer).values())
    # Whatever of their memory is left, in the rank's part of a flat parameter or beside it.
    storages = {}
    for layer in _int8_layers(model):
        for name in ("weight", "weight_scale"):
            held = getattr(layer, name)
            if isinstance(held, torch.nn.Parameter):
                storages[id(held)] = held.nbytes
            else:
                storages[held.untyped_storage()._cdata] = held.untyped_storage().nbytes()
    if engine == "fsdp1_flat":
        storages |= {id(p): p.nbytes for p in model.parameters() if not p.requires_grad}
    return sum(storages.values())


def save_all(engine: str, names: Sequence[str], folder: str) -> dict[str, str]:
    """Files saved under an engine beside those of one process: before the first forward, and after one.

    The values are those of the start; of the model is saved through its own object, and through the engine's.
    """
    wrong = {}
    for name in names:
        try:
            _save(engine, name, os.path.join(folder, engine, name))
        except Exception:
            wrong[name] = traceback.format_exc(limit=-6)
    return wrong


def _save(engine: str, name: str, folder: str) -> None:
    alone, shared = wrapped(name), wrapped(name)
    if dist.get_rank() == 0:
        alone.save_pretrained(os.path.join(folder, "wanted"))
    runner = start(shared, engine, Options())
    through = runner.call if engine.startswith("fsdp1") else shared
    asked: list[Any] = []
    originals = {kind: kind.whole for kind in (Fsdp1, Fsdp2)}
    for kind, whole in originals.items():

        def noted(self: Any, modules: Any, write: bool = False, whole: Any = whole) -> Any:
            asked.extend(modules)
            return whole(self, modules, write)

        kind.whole = noted  # type: ignore[method-assign]
    try:
        through.save_pretrained(os.path.join(folder, "before"))
        runner.micro_step({key: value[:2] for key, value in global_batch(name, 0).items()}, True)
        shared.save_pretrained(os.path.join(folder, "after"))
    finally:
        for kind, whole in originals.items():
            kind.whole = whole  # type: ignore[method-assign]
    dist.barrier()
    for folder_of in ("before", "after"):
        files = sorted(os.listdir(os.path.join(folder, "wanted")))
        assert sorted(os.listdir(os.path.join(folder, folder_of))) == files
        for file in files:
            both = os.path.join(folder, "wanted", file), os.path.join(folder, folder_of, file)
            assert filecmp.cmp(*both, shallow=False), f"{folder_of}/{file} differs"
    adapters = {module for module in shared.modules() if isinstance(module, AdapterUnit)}
    adapters |= {
        inner
        for _, saved in saved_modules(shared)
        for copy in saved.copies.values()
        for inner in unwrapped(copy).modules()
    }
    # A file with an adapted embedding has its weight too, and trained biases lie in their layers.
    beside = {module for _, module in base_modules(shared) if isinstance(module, torch.nn.Embedding | TrainedBias)}
    assert set(asked) <= adapters | beside, [type(module).__name__ for module in set(asked) - adapters - beside]
    assert engine == "ddp" or asked


def save_on_first_rank_alone(engine: str) -> str:
    """What the rank is told that saves without the other."""
    os.environ["PYADAPT_RANK_TIMEOUT"] = "2"
    model = wrapped("lora")
    start(model, engine, Options())
    store = dist.distributed_c10d._get_default_store()
    if dist.get_rank() != 0:
        store.wait(["told"])
        return ""
    try:
        model.save_pretrained("/nowhere")
    except agreement.RankError as error:
        return str(error)
    finally:
        store.set("told", "")
    return "nothing"


def guard_against_casts(engine: str) -> str:
    """What is said where mixed precision casts the bytes of an int8 weight."""
    model = wrapped("lora", "int8", torch.float32)
    runner = start(model, engine, Options(mixed=True))
    try:
        runner.micro_step({key: value[:2] for key, value in global_batch("lora", 0).items()}, True)
    except RuntimeError as error:
        return str(error)
    return "nothing"


def t5_under_accelerate() -> tuple[float, float]:
    """The loss of T5 that accelerate has prepared for FSDP2, and that of one process."""
    from types import SimpleNamespace

    from accelerate import PartialState
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model
    from torch.distributed.device_mesh import init_device_mesh

    from pyadapt.distributed.ties import unite_tied_tables

    PartialState(backend="gloo")
    model, batch = wrapped("lora-t5"), global_batch("lora-t5", 0)
    keys, wanted = list(model.state_dict()), float(model(**batch).loss)
    assert unite_tied_tables(model) == ["encoder.embed_tokens", "decoder.embed_tokens"]
    assert list(model.state_dict()) == keys
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
    )
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        mixed_precision="no",
        is_main_process=True,
        device=torch.device("cpu"),
        torch_device_mesh={("ranks",): init_device_mesh("cpu", (dist.get_world_size(),))},
        parallelism_config=SimpleNamespace(fsdp_dim_names=("ranks",)),
    )
    loss = fsdp2_prepare_model(accelerator, model)(**batch).loss
    loss.backward()
    return float(loss), wanted


def switch_on_sharded(engine: str) -> dict[str, str]:
    """Adapters chosen, switched off and loaded once the model is sharded."""
    wrong = {}
    model = wrapped("lora")
    pyadapt.wrap(model, {"peft_type": "LORA", "r": 4, "init_lora_weights": False}, adapter_name="other")
    batch = global_batch("lora", 0)
    with torch.no_grad():
        model.set_adapter("other")
        other = model(**batch).logits
        model.set_adapter("default")
        default = model(**batch).logits
        with model.disable_adapter():
            plain = model(**batch).logits
    call = start(model, engine, Options()).call
    model.eval()

    def check(what: str, wanted: torch.Tensor) -> None:
        with torch.no_grad():
            found = call(**batch).logits
        try:
            assert_near(found, wanted, "model")
        except AssertionError as error:
            wrong[what] = str(error)

    check("default", default)
    with model.disable_adapter():
        check("disabled", plain)
    check("enabled", default)
    model.set_adapter("other")
    check("other", other)
    return wrong
