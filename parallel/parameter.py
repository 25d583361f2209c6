"""Parameters as an engine holds them: the local box of a global tensor, and which ranks hold the same box."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from keepwarm.parallel.mesh.layout import Coordinates, Layout
from keepwarm.parallel.shard import Shard


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSlice:
    """Part of a tensor: `shape` at `offsets`."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def whole(cls, shape: Sequence[int]) -> "TensorSlice":
        return cls(offsets=(0,) * len(shape), shape=tuple(shape))

    def cut(self, dim: int, pieces: int, index: int) -> "TensorSlice":
        """Piece `index` of `pieces` along `dim`, as `torch.chunk` cuts: the last ones may be shorter or empty."""
        size = self.shape[dim]
        width = -(-size // pieces)
        start, stop = min(index * width, size), min((index + 1) * width, size)
        offsets, shape = list(self.offsets), list(self.shape)
        offsets[dim] += start
        shape[dim] = stop - start
        return TensorSlice(offsets=tuple(offsets), shape=tuple(shape))


@dataclass(kw_only=True, slots=True)
class ShardedParameter:
    """One parameter of one pipeline stage on this rank."""

    name: str
    """Canonical name."""
    parameter: nn.Parameter
    """As the module has it while nothing is gathered; a DTensor where an axis splits or replicates it."""
    local: nn.Parameter
    """Leaf over the same memory as the local part of `parameter`; what the optimizer steps."""
    global_shape: tuple[int, ...]
    box: TensorSlice
    replicas: tuple[int, ...]
    """Ranks that hold the same box, ascending."""

    def shard(self, prefix: str, tensor: torch.Tensor) -> Shard:
        """A tensor of the shape of `local` as a shard of the state."""
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
    """How the parameters of one stage lie on the mesh."""

    layout: Layout
    at: Coordinates
    split: Mapping[str, int]
    """Dim that the tensor axis splits, by parameter name."""
    shard_size: int
    """Consecutive ranks of the data axis that share one copy; 1 where every data rank holds the whole."""

    def box(self, name: str, global_shape: tuple[int, ...]) -> TensorSlice:
        """What this rank holds: the cut over the tensor axis, then that over the sharding part of the data axis."""
        box = TensorSlice.whole(global_shape)
        if name in self.split:
            box = box.cut(self.split[name], self.layout.tensor, self.at.tensor)
        return box.cut(0, self.shard_size, self.at.data % self.shard_size)

    def replicas(self, name: str, stages: Sequence[int]) -> tuple[int, ...]:
        """Ranks with the same box; `stages` are the pipeline coordinates that hold the parameter."""
        data = range(self.at.data % self.shard_size, self.layout.data, self.shard_size)
        tensor = [self.at.tensor] if name in self.split else range(self.layout.tensor)
        return tuple(
            sorted(self.layout.rank_at(Coordinates(d, p, t)) for d in data for p in set(stages) for t in tensor)
        )


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a tensor on this rank."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def materialise(module: nn.Module, device: torch.device) -> None:
    """Give the meta parameters of `module` memory on `device`, without values; shared parameters stay shared."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for owner in module.modules():
        for key, parameter in list(owner._parameters.items()):
            if parameter is not None and parameter.is_meta and parameter not in made:
                made[parameter] = nn.Parameter(torch.empty_like(parameter.data, device=device))
            if parameter is not None and parameter in made:
                owner._parameters[key] = made[parameter]


def layers_of(part: nn.Module) -> Iterable[nn.Module]:
    """The layers of a stage, in order."""
    layers: nn.ModuleDict = part.layers  # type: ignore[assignment]
    return layers.values()


def wrapped(part: nn.Module) -> Iterator[FSDPModule]:
    """Every module of a stage that FSDP manages."""
    return (module for module in part.modules() if isinstance(module, FSDPModule))
