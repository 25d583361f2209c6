"""One pipeline stage of one rank: built, split over the mesh, and known by its parameters."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from parallel import data
from parallel.layout import split_layers
from parallel.mesh import Mesh
from parallel.model import ModelParts
from parallel.parameter import Held, Spread, local_of
from parallel.recompute import apply_numerics
from parallel.spec import NumericsSpec, ParallelSpec
from parallel.tensor import TensorParallel


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """A stage as a module, and this rank's boxes of its parameters."""

    index: int
    """Among all stages of the pipeline."""
    part: nn.Module
    held: tuple[Held, ...]

    @classmethod
    def build(
        cls,
        index: int,
        model: ModelParts,
        spec: ParallelSpec,
        numerics: NumericsSpec,
        mesh: Mesh,
        device: torch.device,
    ) -> "Stage":
        """Build on the meta device, split over the axes, and give what is left memory on `device`.

        The parameters hold no values until `initialise`; with `device` meta they never do, which is how a layout of
        thousands of ranks is validated on one machine.
        """
        with torch.device("meta"):
            layers = split_layers(model.layers, spec)[index]
            part = model.part(layers, embed=index == 0, head=index == spec.stages - 1)
        if numerics.precision == "fp64":
            part = part.double()
        split: dict[str, int] = {}
        if spec.tensor > 1:
            tensor = TensorParallel(model.tensor_plan(), mesh.device_mesh("tensor"), sequence=spec.sequence)
            split = tensor.apply(part)
        apply_numerics(part, numerics)
        if data.is_wrapped(spec, numerics):
            data.wrap(part, mesh.device_mesh("data"), spec, numerics, device)
        else:
            data.materialise(part, device)
        spread = Spread(layout=mesh.layout, at=mesh.at, split=split, shard_size=mesh.shard_size)
        held = (_hold(name, parameter, model, spread) for name, parameter in part.named_parameters())
        return cls(index=index, part=part, held=tuple(held))

    def initialise(self, model: ModelParts) -> None:
        """Write in the initial values of this rank's boxes."""
        for held in self.held:
            if held.local.numel():
                values = model.initial(held.name, held.global_shape, held.box.offsets, held.box.shape)
                held.local.data.copy_(values)


def is_tied_across(name: str, model: ModelParts, pipeline: int) -> bool:
    """Whether a parameter of this canonical name exists on the first and on the last pipeline rank."""
    return pipeline > 1 and model.tied_embeddings and model.canonical("head.weight") == name


def _hold(name: str, parameter: nn.Parameter, model: ModelParts, spread: Spread) -> Held:
    box, local = spread.box(name, tuple(parameter.shape)), local_of(parameter.data)
    if tuple(local.shape) != box.shape:
        raise AssertionError(f"{name}: torch holds {tuple(local.shape)} of it, the layout says {box.shape}")
    canonical, pipeline = model.canonical(name), spread.layout.pipeline
    tied = is_tied_across(canonical, model, pipeline)
    holders: Sequence[int] = (0, pipeline - 1) if tied else (spread.at.pipeline,)
    return Held(
        name=canonical,
        parameter=parameter,
        local=nn.Parameter(local) if isinstance(parameter, DTensor) else parameter,
        global_shape=tuple(parameter.shape),
        box=box,
        replicas=spread.replicas(name, holders),
    )
