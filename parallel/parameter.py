"""Sharded parameters: the local box of a global tensor, and the ranks that hold the same box."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from keepwarm.parallel.mesh.axes import Coordinates
from keepwarm.parallel.mesh.layout import Layout
from keepwarm.parallel.shard import Shard


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSlice:
    """A box of a tensor: `shape` at `offsets`."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def whole(cls, shape: Sequence[int]) -> "TensorSlice":
        return cls(offsets=(0,) * len(shape), shape=tuple(shape))

    def cut(self, dim: int, pieces: int, index: int) -> "TensorSlice":
        """Return piece `index` of `pieces` along `dim`, cut as by `torch.chunk`: the last may be shorter or empty."""
        size = self.shape[dim]
        width = -(-size // pieces)
        start, stop = min(index * width, size), min((index + 1) * width, size)
        offsets, shape = list(self.offsets), list(self.shape)
        offsets[dim] += start
        shape[dim] = stop - start
        return TensorSlice(offsets=tuple(offsets), shape=tuple(shape))


class Split(NamedTuple):
    """How the tensor axis splits a parameter."""

    dim: int
    copies: int = 1
    """Neighbouring ranks that hold the same part."""

    def cut(self, box: TensorSlice, tensor: int, rank: int) -> TensorSlice:
        """Return the part of `rank` out of `tensor` ranks."""
        return box.cut(self.dim, tensor // self.copies, rank // self.copies)


@dataclass(kw_only=True, slots=True)
class ShardedParameter:
    """One parameter of one pipeline stage on this rank."""

    name: str
    """Canonical name."""
    parameter: nn.Parameter
    """The module's parameter while nothing is gathered; a DTensor if an axis splits or replicates it."""
    local: nn.Parameter
    """Leaf that shares memory with the local part of `parameter`; the optimizer updates it."""
    global_shape: tuple[int, ...]
    box: TensorSlice
    replicas: tuple[int, ...]
    """Ranks that hold the same box, ascending."""
    box_of: Callable[[int], TensorSlice]
    """The box of another rank of this pipeline coordinate."""
    copied: bool = False
    """Whether neighbours on the tensor axis hold copies whose gradients have to be summed."""

    def shard(self, prefix: str, tensor: torch.Tensor) -> Shard:
        """Return a tensor of the shape of `local` as a shard of the state."""
        return Shard(
            name=f"{prefix}.{self.name}",
            global_shape=self.global_shape,
            offsets=self.box.offsets,
            shape=self.box.shape,
            local=tensor,
            replicas=self.replicas,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardingSpec:
    """Placement of one stage's parameters on the mesh."""

    layout: Layout
    at: Coordinates
    split: Mapping[str, Split]
    """Parameters that the tensor axis splits, by name."""
    shard_size: int
    """Number of consecutive data-axis ranks that share one copy; 1 if every data-parallel rank holds the whole."""

    def box(self, name: str, global_shape: tuple[int, ...]) -> TensorSlice:
        """Return this rank's box: cut over the tensor axis, then over the sharding part of the data axis."""
        box = TensorSlice.whole(global_shape)
        if name in self.split:
            box = self.split[name].cut(box, self.layout.tensor, self.at.tensor)
        return box.cut(0, self.shard_size, self.at.data % self.shard_size)

    def copies(self, name: str) -> int:
        """Return the number of ranks of the tensor axis that hold the same part."""
        return self.split[name].copies if name in self.split else self.layout.tensor

    def replicas(self, name: str, stages: Sequence[int]) -> tuple[int, ...]:
        """Return the ranks with the same box; `stages` are the pipeline coordinates that hold the parameter."""
        data = range(self.at.data % self.shard_size, self.layout.data, self.shard_size)
        copies = self.copies(name)
        first = self.at.tensor // copies * copies
        tensor = range(first, first + copies)
        return tuple(
            sorted(self.layout.rank_at(Coordinates(d, p, t)) for d in data for p in set(stages) for t in tensor)
        )


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a tensor, without copying."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def materialise(module: nn.Module, device: torch.device) -> None:
    """Allocate the meta tensors of `module` on `device`, without values; shared parameters stay shared."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for owner in module.modules():
        for key, parameter in list(owner._parameters.items()):
            if parameter is not None and parameter.is_meta and parameter not in made:
                made[parameter] = nn.Parameter(torch.empty_like(parameter.data, device=device))
            if parameter is not None and parameter in made:
                owner._parameters[key] = made[parameter]
        for key, buffer in list(owner._buffers.items()):
            if buffer is not None and buffer.is_meta:
                owner._buffers[key] = torch.empty_like(buffer, device=device)


def layers_of(part: nn.Module) -> Iterable[nn.Module]:
    """Return the layers of a stage, in order."""
    layers: nn.ModuleDict = part.layers  # type: ignore[assignment]
    return layers.values()


def wrapped(part: nn.Module) -> Iterator[FSDPModule]:
    """Yield every module of a stage that FSDP manages."""
    return (module for module in part.modules() if isinstance(module, FSDPModule))
