"""Build one pipeline stage of a rank, split it over the mesh, and name its sharded parameters."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from keepwarm.parallel.engine import EngineConfig
from keepwarm.parallel.mesh.layout import split_layers
from keepwarm.parallel.mesh.mesh import Mesh
from keepwarm.parallel.model import ModelParts, is_tied_across
from keepwarm.parallel.native import data
from keepwarm.parallel.native.tensor import TensorParallel
from keepwarm.parallel.parameter import ShardedParameter, ShardingSpec, Split, local_of, materialise
from keepwarm.parallel.recompute import apply_numerics
from keepwarm.parallel.shard import Shard

PREFIX = "model"
"""Of the names of weights in the state."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """A stage as a module, with this rank's boxes of its parameters."""

    index: int
    """Index among all stages of the pipeline."""
    module: nn.Module
    parameters: tuple[ShardedParameter, ...]
    buffers: tuple[Shard, ...]
    """Constants of the layers, whole on every rank that holds the stage."""

    @classmethod
    def build(cls, index: int, config: EngineConfig, mesh: Mesh) -> "Stage":
        """Build the stage on the meta device, split it over the axes, and allocate the rest on the config's device.

        The parameters hold no values until `initialise`. On the meta device they never do, which allows a layout of
        thousands of ranks to be validated on one machine.
        """
        model, spec, numerics = config.model, config.parallel, config.numerics
        with torch.device("meta"):
            layers = split_layers(model.layers, spec)[index]
            module = model.build_stage(layers, embed=index == 0, head=index == spec.stages - 1)
        if numerics.precision == "fp64":
            module = module.double()
        split: dict[str, Split] = {}
        if spec.tensor > 1:
            tensor = TensorParallel(
                model.tensor_plan(), mesh.device_mesh("tensor"), kv_heads=model.kv_heads, sequence=spec.sequence
            )
            split = tensor.apply(module)
        apply_numerics(module, numerics)
        if data.is_wrapped(spec, numerics):
            data.wrap(module, mesh.device_mesh("data"), spec, numerics, config.device)
        else:
            materialise(module, config.device)
        sharding = ShardingSpec(layout=mesh.layout, at=mesh.at, split=split, shard_size=mesh.shard_size)
        sharded = (_sharded(name, parameter, model, sharding) for name, parameter in module.named_parameters())
        whole = ShardingSpec(layout=mesh.layout, at=mesh.at, split={}, shard_size=1)
        buffers = (_buffer(name, buffer, whole) for name, buffer in module.named_buffers())
        return cls(index=index, module=module, parameters=tuple(sharded), buffers=tuple(buffers))

    def initialise(self, model: ModelParts) -> None:
        """Fill in the initial values of this rank's boxes."""
        for sharded in self.parameters:
            if sharded.local.numel():
                values = model.initial(sharded.name, sharded.global_shape, sharded.box.offsets, sharded.box.shape)
                sharded.local.data.copy_(values)
        for buffer in self.buffers:
            name = buffer.name.removeprefix(f"{PREFIX}.")
            buffer.local.copy_(model.initial(name, buffer.global_shape, buffer.offsets, buffer.shape))


def _buffer(name: str, buffer: torch.Tensor, whole: ShardingSpec) -> Shard:
    shape = tuple(buffer.shape)
    return Shard(
        name=f"{PREFIX}.{name}",
        global_shape=shape,
        offsets=(0,) * len(shape),
        shape=shape,
        local=buffer,
        replicas=whole.replicas(name, (whole.at.pipeline,)),
    )


def _sharded(name: str, parameter: nn.Parameter, model: ModelParts, sharding: ShardingSpec) -> ShardedParameter:
    split, shape = sharding.split.get(name), list(parameter.shape)
    if split is not None:
        shape[split.dim] //= split.copies
    box, local = sharding.box(name, tuple(shape)), local_of(parameter.data)
    if tuple(local.shape) != box.shape:
        raise AssertionError(f"{name}: torch holds {tuple(local.shape)} of it, the layout says {box.shape}")
    canonical, pipeline = model.canonical(name), sharding.layout.pipeline
    tied = is_tied_across(canonical, model, pipeline)
    holders: Sequence[int] = (0, pipeline - 1) if tied else (sharding.at.pipeline,)
    return ShardedParameter(
        name=canonical,
        parameter=parameter,
        local=nn.Parameter(local) if isinstance(parameter, DTensor) else parameter,
        global_shape=tuple(shape),
        box=box,
        replicas=sharding.replicas(name, holders),
        box_of=lambda rank: replace(sharding, at=sharding.layout.coordinates(rank)).box(name, tuple(shape)),
        copied=split is not None and split.copies > 1,
    )
