"""What stays alive of gathered weights, under each engine. Run on the ranks of a gang."""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from source_tree import benchmark
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pyadapt

# A weight is N x N: as int8, its smallest form, more than all that these few rows of activations come to.
N, BLOCKS, ROWS = 512, 3, 2
ONE_WEIGHT = N * N

TARGETS = ["up", "down"]
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"peft_type": "LORA", "r": 4, "init_lora_weights": False},
    "dora": {"peft_type": "LORA", "r": 4, "init_lora_weights": False, "use_dora": True},
    "ia3": {"peft_type": "IA3", "feedforward_modules": ["down"]},
    # Its term is a LoRA of rank r squared, whose factors are kept for backward.
    "loha": {"peft_type": "LOHA", "r": 2, "init_weights": False},
    "lokr": {"peft_type": "LOKR", "r": 4, "init_weights": False},
}
BASES = ("fp32", "autocast", "int8")
CHECKPOINTING = (None, "reentrant", "non-reentrant")


class Block(nn.Module):
    """Two frozen layers that adapters go on."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(N, N, bias=False), nn.Linear(N, N, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (rows, N) -> (rows, N)."""
        return x + torch.tanh(self.down(torch.tanh(self.up(x)))).to(x.dtype) * 0.1


class Stack(nn.Module):
    """Blocks, and nothing outside them; the loss is a mean."""

    _no_split_modules = ("Block",)

    def __init__(self, checkpointing: str | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.checkpointing = checkpointing

    def forward(self, x: Tensor) -> Tensor:
        """x (rows, N) -> the loss."""
        for block in self.blocks:
            if self.checkpointing is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.checkpointing == "reentrant")
        return x.float().square().mean()


class KeepsCast(torch.autograd.Function):
    """y itself, with a bf16 copy of W kept for backward: what must not be done."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, weight: Tensor) -> Tensor:
        """y."""
        ctx.weight = weight.to(torch.bfloat16)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        """g."""
        return g, None


def leaking(engine: str) -> nn.Module:
    """The negative control: a stack whose layers keep their weights."""
    model = adapted(engine, "lora", "fp32", None)
    for block in model.blocks:
        for layer in (block.up, block.down):
            layer.register_forward_hook(lambda module, _, y: KeepsCast.apply(y, module.weight))
    return model


def adapted(engine: str, method: str, base: str, checkpointing: str | None) -> nn.Module:
    """The stack with a method on all its layers."""
    model = Stack(checkpointing).requires_grad_(False)
    if base == "int8":
        # FSDP1 flattens one dtype, which has to be a floating one.
        pyadapt.quantize(model, storage_dtype=torch.float32 if engine == "fsdp1" else None)
    return pyadapt.wrap(model, {"target_modules": TARGETS, **METHODS[method]})


def cases(methods: Iterable[str]) -> Iterator[tuple[str, str, str | None]]:
    """Every method on every base, without checkpointing and with; both forms of it for LoRA."""
    for method in methods:
        for base in BASES:
            for checkpointing in CHECKPOINTING if method == "lora" else (None, "non-reentrant"):
                yield method, base, checkpointing


def alive(engine: str, model: nn.Module, base: str) -> dict[str, int]:
    """Bytes that the second step has alive after its forward and at its end, beside what was there before it."""
    engines, Recorder = benchmark("scaling.engines"), benchmark("scaling.recorder").Recorder
    recorder = Recorder()
    x = torch.randn(ROWS, N, requires_grad=True)
    with recorder.recording():
        handle = engines.start(model, engines.Plan(engine, autocast=base == "autocast"))
        for _ in range(2):
            handle.step({"x": x}, recorder.mark)
    if handle.engine is not None:
        handle.engine.destroy()
    first_end = next(stage for stage in recorder.stages if stage.name == "end")
    return {name: recorder.last(name).live - first_end.live for name in ("forward", "end")}


def kept(engine: str, methods: Iterable[str]) -> dict[str, str]:
    """What keeps a whole weight alive, or fails; under "control" what the control keeps."""
    benchmark("scaling.recorder").start_group()
    found: dict[str, str] = {}
    for method, base, checkpointing in cases(methods):
        name = f"{method} {base} {checkpointing}"
        torch.manual_seed(0)
        try:
            bytes_alive = alive(engine, adapted(engine, method, base, checkpointing), base)
        except Exception:
            found[name] = traceback.format_exc(limit=-4)
            continue
        found |= {f"{name} after {when}": f"{size} bytes" for when, size in bytes_alive.items() if size >= ONE_WEIGHT}
    control = alive(engine, leaking(engine), "fp32")["forward"]
    # Every layer's copy in bf16; what else the step frees may be taken off.
    copies = 2 * BLOCKS * 2 * ONE_WEIGHT
    found["control"] = "caught" if control > copies - ONE_WEIGHT else f"{control} bytes"
    return found
