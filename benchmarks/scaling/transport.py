"""A gloo process group that counts what it carries and keeps none of an engine's tensors.

gloo's threads hold a collective's tensors for a moment after it is done, longer on a busy machine, and free them where
no profiler looks: what a process has alive would differ from run to run by a gathered block. So the tensors are copied
to buffers of this group's own, which gloo sends; the engines see a process group like any other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C import _distributed_c10d
from torch._C._distributed_c10d import (
    AllgatherOptions,
    AllreduceOptions,
    BarrierOptions,
    BroadcastOptions,
)
from torch.futures import Future

NAME = "counted_gloo"

# torch's stubs do not know that its groups can be written in Python.
_ProcessGroup: Any = dist.ProcessGroup
_work_of: Any = vars(_distributed_c10d)["_create_work_from_future"]

# What all groups of this process have carried: kind of collective -> bytes of the whole tensor, which all ranks
# together put in (all-gather) or which each of them has (the others); and the number of calls.
traffic: Counter[str] = Counter()
calls: Counter[str] = Counter()

# What all groups stage in. Pages that are never written cost nothing.
_CAPACITY = 1 << 28
_buffer: list[Tensor] = []


class CountedGloo(_ProcessGroup):
    """Collectives of CPU tensors through gloo, by way of one buffer.

    Args:
        store, rank, ranks, timeout: as gloo's own group takes them.
    """

    def __init__(self, store: Any, rank: int, ranks: int, timeout: Any) -> None:
        super().__init__(rank, ranks)
        self._rank, self._ranks = rank, ranks
        self._gloo: Any = dist.ProcessGroupGloo(store, rank, ranks, timeout)
        if not _buffer:
            _buffer.append(torch.empty(_CAPACITY, dtype=torch.uint8))

    def size(self) -> int:
        """See `ProcessGroup.size`."""
        return self._ranks

    def getBackendName(self) -> str:
        """See `ProcessGroup.getBackendName`."""
        return NAME

    @property
    def pg_name(self) -> str:
        """The name under which torch knows this group."""
        return dist.distributed_c10d._world.pg_names[self]

    @property
    def group_name(self) -> str:
        """The same, as device meshes ask for it."""
        return self.pg_name

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> Any:
        """See `torch.distributed.all_reduce`."""
        for tensor in tensors:
            self._count("all-reduce", tensor)
            staged = self._staged(tensor)
            self._gloo.allreduce([staged], opts or AllreduceOptions()).wait()
            tensor.copy_(staged)
        return _done(tensors)

    def broadcast(self, tensors: list[Tensor], opts: Any = None) -> Any:
        """See `torch.distributed.broadcast`."""
        for tensor in tensors:
            self._count("broadcast", tensor)
            staged = self._staged(tensor)
            self._gloo.broadcast([staged], opts or BroadcastOptions()).wait()
            tensor.copy_(staged)
        return _done(tensors)

    def all_gather_single(self, output: Tensor, tensor: Tensor, opts: Any = None) -> Any:
        """See `torch.distributed.all_gather_into_tensor`."""
        self._count("all-gather", output)
        staged = self._staged(tensor)
        whole = self._staged(output, copy=False, offset=_aligned(tensor.nbytes))
        self._gloo._allgather_base(whole, staged, AllgatherOptions()).wait()
        output.copy_(whole)
        return _done(output)

    def all_gather_single_coalesced(self, outputs: list[Tensor], tensors: list[Tensor], opts: Any = None) -> Any:
        """See `torch.distributed.all_gather_into_tensor`, several at once."""
        for output, tensor in zip(outputs, tensors, strict=True):
            self.all_gather_single(output, tensor)
        return _done(outputs)

    def allgather(self, outputs: list[list[Tensor]], tensors: list[Tensor], opts: Any = None) -> Any:
        """See `torch.distributed.all_gather`."""
        for parts, tensor in zip(outputs, tensors, strict=True):
            traffic["all-gather"] += tensor.nbytes * self._ranks
            calls["all-gather"] += 1
            staged = self._staged(tensor)
            step = _aligned(tensor.nbytes)
            held = [self._staged(part, copy=False, offset=step * (i + 1)) for i, part in enumerate(parts)]
            self._gloo.allgather([held], [staged], AllgatherOptions()).wait()
            for part, whole in zip(parts, held, strict=True):
                part.copy_(whole)
        return _done(outputs)

    def reduce_scatter_single(self, output: Tensor, tensor: Tensor, opts: Any = None) -> Any:
        """See `torch.distributed.reduce_scatter_tensor`."""
        self._count("reduce-scatter", tensor)
        staged = self._staged(tensor)
        # What gloo does itself, on a copy of its own that its thread frees.
        options = AllreduceOptions()
        if opts is not None:
            options.reduceOp = opts.reduceOp
        self._gloo.allreduce([staged], options).wait()
        output.copy_(staged.view(self._ranks, -1)[self._rank].view_as(output))
        return _done(output)

    def reduce_scatter_single_coalesced(self, outputs: list[Tensor], tensors: list[Tensor], opts: Any = None) -> Any:
        """See `torch.distributed.reduce_scatter_tensor`, several at once."""
        for output, tensor in zip(outputs, tensors, strict=True):
            self.reduce_scatter_single(output, tensor, opts)
        return _done(outputs)

    def barrier(self, opts: Any = None) -> Any:
        """See `torch.distributed.barrier`."""
        self._gloo.barrier(opts or BarrierOptions()).wait()
        return _done(None)

    def _count(self, kind: str, whole: Tensor) -> None:
        traffic[kind] += whole.nbytes
        calls[kind] += 1

    def _staged(self, tensor: Tensor, copy: bool = True, offset: int = 0) -> Tensor:
        """A place in the buffer of the dtype and shape of `tensor`, with its values or without."""
        if offset + tensor.nbytes > _CAPACITY:
            raise ValueError(f"{tensor.nbytes} bytes at {offset} do not fit the buffer of {_CAPACITY}")
        place = _buffer[0][offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        return place.copy_(tensor) if copy else place


def _aligned(size: int) -> int:
    return -(-size // 64) * 64


def _done(value: Any) -> Any:
    future: Any = Future()
    future.set_result(value)
    return _work_of(future)


def register() -> None:
    """Make `init_process_group(NAME)` give such groups."""
    create: Callable[..., Any] = CountedGloo
    if NAME.upper() not in dist.Backend.__dict__:
        dist.Backend.register_backend(NAME, create, devices=["cpu"])
