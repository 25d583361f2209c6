"""Mesh arithmetic: the coordinates of each rank. Pure and torch-free.

Axes from outermost to innermost are data, pipeline and tensor, as in Megatron-Turing NLG (Smith et al., 2022): tensor
groups lie inside a node, pipeline neighbours on neighbouring nodes, and data-parallel replicas are outermost.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from keepwarm.parallel.errors import LayoutError
from keepwarm.parallel.mesh.axes import Axis, Coordinates
from keepwarm.parallel.spec import ParallelSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """A mesh of `data * pipeline * tensor` ranks on nodes of `ranks_per_node` ranks each."""

    data: int
    pipeline: int
    tensor: int
    ranks_per_node: int

    @classmethod
    def of(cls, spec: ParallelSpec, ranks_per_node: int | None = None) -> "Layout":
        """Return the layout that a spec asks for; without `ranks_per_node`, all ranks are on one node.

        Raises:
            LayoutError: ranks do not fill whole nodes, or a tensor group would span two nodes.
        """
        world = spec.data * spec.pipeline * spec.tensor
        per_node = ranks_per_node or world
        if world % per_node:
            raise LayoutError(
                f"parallel: data {spec.data} x pipeline {spec.pipeline} x tensor {spec.tensor} = {world} ranks "
                f"do not fill whole nodes of cluster.ranks_per_node = {per_node}"
            )
        if per_node % spec.tensor:
            raise LayoutError(
                f"parallel.tensor = {spec.tensor} does not divide cluster.ranks_per_node = {per_node}: "
                "a tensor group would span two nodes"
            )
        return cls(data=spec.data, pipeline=spec.pipeline, tensor=spec.tensor, ranks_per_node=per_node)

    @property
    def world_size(self) -> int:
        return self.data * self.pipeline * self.tensor

    @property
    def nodes(self) -> int:
        return self.world_size // self.ranks_per_node

    @property
    def shape(self) -> tuple[int, int, int]:
        """Sizes of the axes in the order of `AXES`."""
        return self.data, self.pipeline, self.tensor

    def coordinates(self, rank: int) -> Coordinates:
        """Return the position of `rank`; the inverse of `rank_at`."""
        if not 0 <= rank < self.world_size:
            raise LayoutError(f"rank {rank} is outside the world of {self.world_size} ranks")
        rest, tensor = divmod(rank, self.tensor)
        data, pipeline = divmod(rest, self.pipeline)
        return Coordinates(data, pipeline, tensor)

    def rank_at(self, at: Coordinates) -> int:
        """Return the rank at these coordinates."""
        return (at.data * self.pipeline + at.pipeline) * self.tensor + at.tensor

    def node_of(self, rank: int) -> int:
        return rank // self.ranks_per_node

    def groups(self, axis: Axis) -> list[tuple[int, ...]]:
        """Return every group of ranks that differ only in `axis`, each ordered along that axis."""
        found: dict[Coordinates, list[int]] = {}
        for rank in range(self.world_size):
            key = self.coordinates(rank)._replace(**{axis: 0})
            found.setdefault(key, []).append(rank)
        return [tuple(ranks) for ranks in found.values()]


def split_layers(layers: int, spec: ParallelSpec) -> list[range]:
    """Return the layers of every pipeline stage, first to last, by global index.

    Raises:
        LayoutError: the layers do not divide evenly and there is no `layer_split`, or the split does not add up.
    """
    stages = spec.stages
    if spec.layer_split is None:
        if layers % stages:
            raise LayoutError(
                f"model.layers = {layers} does not divide by {stages} pipeline stages "
                f"(pipeline {spec.pipeline} x {stages // spec.pipeline} per rank); set parallel.layer_split"
            )
        counts: Sequence[int] = [layers // stages] * stages
    else:
        counts = spec.layer_split
        if len(counts) != stages or sum(counts) != layers:
            raise LayoutError(
                f"parallel.layer_split = {list(counts)} must hold {stages} numbers that add up to "
                f"model.layers = {layers}"
            )
    starts = [sum(counts[:i]) for i in range(stages + 1)]
    return [range(a, b) for a, b in itertools.pairwise(starts)]


def check_micro_batches(count: int, spec: ParallelSpec) -> None:
    """Raise LayoutError if the pipeline schedule cannot run a step of `count` micro-batches per data-parallel rank.

    The message lists the counts it can run. `EngineInfo.check_micro_batches` adds the engine's own constraints.
    """
    if spec.pipeline == 1:
        return
    if spec.schedule == "1f1b" and count < spec.stages:
        raise LayoutError(
            f"parallel.schedule = 1f1b over {spec.stages} pipeline stages needs at least {spec.stages} micro-batches "
            f"per data-parallel rank, got {count}; raise batch.global_batch_size or lower batch.micro_batch_size"
        )
    rounds = max(1, count // spec.pipeline)
    if spec.schedule != "1f1b" and count % rounds:
        raise LayoutError(
            f"parallel.schedule = {spec.schedule} runs {count} micro-batches per data-parallel rank in {rounds} rounds "
            f"over parallel.pipeline = {spec.pipeline} ranks, which does not divide; choose a multiple of "
            f"{spec.pipeline}"
        )


def stages_of(pipeline_coordinate: int, spec: ParallelSpec) -> tuple[int, ...]:
    """Return the pipeline stages of one pipeline coordinate, in order: stage i is on coordinate i mod pipeline."""
    return tuple(range(pipeline_coordinate, spec.stages, spec.pipeline))
