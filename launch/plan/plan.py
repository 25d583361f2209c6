"""Plan of a job as data: layout, parameters, memory, steps and learning rates. Pure and torch-free."""

from dataclasses import asdict, dataclass
from functools import cached_property, reduce
from operator import getitem
from typing import TYPE_CHECKING, Any

from keepwarm.ft.groups import groups_of
from keepwarm.launch.plan.placement import Placement, expected, is_placed
from keepwarm.launch.plan.room import Room
from keepwarm.parallel.memory import RankEstimate
from keepwarm.parallel.mesh.axes import Coordinates
from keepwarm.parallel.mesh.layout import Layout, split_layers, stages_of
from keepwarm.parallel.spec import ParallelSpec
from keepwarm.trainer.job.estimate import decided_parallel, estimate_rank, state_bytes, total_parameters, usable_memory
from keepwarm.trainer.job.shrink import layouts
from keepwarm.trainer.job.site.defaults import JOB
from keepwarm.trainer.job.spec import JobSpec
from keepwarm.trainer.job.stages import StagePlan, global_size_at, plan_stages

if TYPE_CHECKING:
    from keepwarm.ft.memory.buffers import HostMemory

CURVE_POINTS = 64
"""Number of steps at which a stage's learning rate is sampled, including the first and last."""


@dataclass(frozen=True)
class Plan:
    """A job with everything derived from it."""

    job: JobSpec

    @cached_property
    def layout(self) -> Layout:
        return self.job.layout

    @cached_property
    def stages(self) -> tuple[StagePlan, ...]:
        return plan_stages(self.job)

    @cached_property
    def parameters(self) -> int:
        """Return the number of parameters of the whole model; tied embeddings count once."""
        return total_parameters(self.job.model)

    @cached_property
    def estimates(self) -> tuple[RankEstimate, ...]:
        """Return a rank's estimate by pipeline coordinate; the data and tensor coordinates make no difference."""
        return tuple(estimate_rank(self.job, pipeline, self.parallel) for pipeline in range(self.layout.pipeline))

    @cached_property
    def parallel(self) -> ParallelSpec:
        """Return the job's section with what it leaves to the plan decided."""
        return decided_parallel(self.job)

    @property
    def fits(self) -> bool:
        """Whether every rank's estimate leaves a GPU of `cluster.gpu_memory` enough for the rest."""
        return max(each.total for each in self.estimates) <= usable_memory(self.job)

    @cached_property
    def host_memory(self) -> "HostMemory | None":
        """Return the maximum host memory of a node's snapshot agent; None without snapshots.

        Raises:
            PlacementError: the code does not fit the number of nodes.
        """
        spec, layout = self.job.snapshot, self.layout
        if spec == "off":
            return None
        # These import NumPy, which a plan without snapshots does not need.
        from keepwarm.ft.format.contents import META_BYTES
        from keepwarm.ft.memory.buffers import host_memory

        parts = [-(-(state_bytes(self.job, at) + META_BYTES) // spec.bucket) for at in range(layout.pipeline)]
        buckets = [0] * layout.nodes
        for rank in range(layout.world_size):
            buckets[layout.node_of(rank)] += parts[layout.coordinates(rank).pipeline]
        groups = {(group.size, group.m) for group in groups_of(layout.nodes, spec)}
        possible = (
            host_memory(
                max(buckets) * spec.bucket,
                members=size,
                parity=parity,
                bucket_bytes=spec.bucket,
                durable=spec.durable is not None,
                workers=layout.ranks_per_node,
            )
            for size, parity in groups
        )
        return max(possible, key=lambda memory: memory.total)

    def node_memory(self, *, gpus: bool) -> int:
        """Return the bytes of host memory that a node needs for its snapshots and, without GPUs, for its ranks.

        Raises:
            PlacementError: the code does not fit the number of nodes.
        """
        host = 0 if self.host_memory is None else self.host_memory.total
        return host + (0 if gpus else self.layout.ranks_per_node * max(each.total for each in self.estimates))

    @property
    def checkpoint_bytes(self) -> int:
        """Return the size of one durable checkpoint, uncompressed."""
        each = (state_bytes(self.job, at) for at in range(self.layout.pipeline))
        return sum(each) * self.layout.data * self.layout.tensor

    @cached_property
    def smaller(self) -> tuple["Plan", ...]:
        """Return plans of the layouts that the job may shrink to while nodes are missing, the largest first."""
        return tuple(Plan(job) for job in layouts(self.job).values() if job is not self.job)

    def room_beside(self, after: "Plan", *, lost: int = 1) -> Room | None:
        """Return the room on this machine for the snapshots of another layout beside those of this one.

        The agents of `lost` nodes run beside those of one node, and ranks read from other nodes: those of nodes that
        have joined read everything through one agent of this layout. None if two layouts' agents cannot run at once.
        """
        spec, before, next_one = self.job.snapshot, self.host_memory, after.host_memory
        if spec == "off" or spec.port or before is None or next_one is None:
            return None
        from keepwarm.ft.memory.buffers import READ_CACHE, READ_WINDOW
        from keepwarm.ft.memory.shared_memory import available_memory

        nodes, ranks = self.layout.nodes, after.layout.ranks_per_node
        joining = -(-max(0, after.layout.nodes - nodes) // nodes) * ranks
        reading = (READ_CACHE * ranks + (READ_WINDOW * joining if nodes > 1 else 0)) * spec.bucket
        return Room(before=before.total * (1 + lost), after=next_one.total + reading, total=available_memory())

    @cached_property
    def placement(self) -> Placement | None:
        """Return which nodes take which slots if the job gets the first ones that it names; None if any may take any.

        Raises:
            PlacementError: the code does not fit the number of nodes.
        """
        return expected(self.job) if is_placed(self.job) and self.job.cluster.slurm.domain_of_node else None

    @cached_property
    def site(self) -> dict[str, dict[str, Any]]:
        """Return the value and the site file of every key that the job takes from one."""
        cluster = self.job.cluster.model_dump(mode="json")
        taken = {key: source for key, source in (cluster["sources"] or {}).items() if source != JOB}
        return {
            f"cluster.{key}": {"value": reduce(getitem, key.split("."), cluster), "source": source}
            for key, source in taken.items()
        }

    def layers_at(self, pipeline: int) -> list[range]:
        """Return the layers of the pipeline stages at a pipeline coordinate."""
        split = split_layers(self.job.model.layers, self.job.parallel)
        return [split[stage] for stage in stages_of(pipeline, self.job.parallel)]

    def ranks_at(self, data: int, pipeline: int) -> range:
        """Return the ranks of the tensor group at these coordinates."""
        first = self.layout.rank_at(Coordinates(data, pipeline, 0))
        return range(first, first + self.layout.tensor)

    def rate_at(self, step: int) -> float:
        """Return the learning rate of a step counted from the start of the job."""
        stage = next(stage for stage in self.stages if step < stage.end_step)
        return stage.rate_at(step)

    def micro_batches(self, stage: StagePlan) -> tuple[int, int]:
        """Return the micro-batches per step and data-parallel rank in the first and last step of a stage."""
        unit = self.layout.data * self.job.batch.micro_batch_size
        last = max(stage.start_sample, stage.end_sample - 1)
        first_size, last_size = (global_size_at(self.job.batch, at) for at in (stage.start_sample, last))
        return first_size // unit, last_size // unit

    def data(self) -> dict[str, Any]:
        """Return plain values for JSON: bytes, tokens, and steps counted from the start of the job."""
        layout = self.layout
        return {
            "job": self.job.model_dump(mode="json", exclude={"cluster": {"sources"}}),
            "site": self.site,
            "layout": {**asdict(layout), "world_size": layout.world_size, "nodes": layout.nodes},
            "decided": {
                "accumulate": self.parallel.accumulate,
                "reshard_after_forward": self.parallel.reshard_after_forward,
            },
            "fits": self.fits,
            "parameters": {"total": self.parameters, "per_rank": [e.parameters for e in self.estimates]},
            "ranks": [
                {
                    "pipeline": pipeline,
                    "layers": [[layers.start, layers.stop] for layers in self.layers_at(pipeline)],
                    "memory": {**_memory(estimate), "total": estimate.total},
                }
                for pipeline, estimate in enumerate(self.estimates)
            ],
            "host_memory": None if (host := self.host_memory) is None else {**asdict(host), "total": host.total},
            "placement": None if (placed := self.placement) is None else placed.data(),
            "smaller": [
                {
                    "nodes": one.layout.nodes,
                    "data": one.layout.data,
                    "host_memory": None if (host := one.host_memory) is None else host.total,
                }
                for one in self.smaller
            ],
            "stages": [self._stage(stage) for stage in self.stages],
        }

    def _stage(self, stage: StagePlan) -> dict[str, Any]:
        first, last = self.micro_batches(stage)
        return {
            "name": stage.name,
            "start_step": stage.start_step,
            "steps": stage.steps,
            "samples": stage.samples,
            "tokens": stage.tokens,
            "micro_batches": [first, last],
            "mixtures": [{"sample": first, "weights": dict(mixture)} for first, mixture in stage.mixtures],
            "learning_rate": [[step, stage.curve.at(step)] for step in sampled_steps(stage.steps, CURVE_POINTS)],
        }


def sampled_steps(steps: int, points: int) -> list[int]:
    """Return at most `points` evenly spaced steps of a stage, including the first and last."""
    if steps <= points:
        return list(range(steps))
    return sorted({round(i * (steps - 1) / (points - 1)) for i in range(points)})


def _memory(estimate: RankEstimate) -> dict[str, int]:
    return {name: getattr(estimate, name) for name in ("weights", "gradients", "optimizer", "activations")}
