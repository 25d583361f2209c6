"""Memory of a rank under FSDP2, HSDP or plain replication. Pure and torch-free."""

from math import ceil, prod
from typing import NamedTuple

from keepwarm.parallel.memory import RankEstimate, Shape, Workload, elements
from keepwarm.parallel.spec import ParallelSpec

Shapes = dict[str, Shape]


def estimate(work: Workload) -> RankEstimate:
    """Return the maximum that any rank holds.

    FSDP splits the first dim of every parameter as `torch.chunk` does, so the first data-parallel rank holds the most.
    """
    stages = [dict(stage) for stage in work.stages]
    stored = sum(_stored(work.parallel, shapes) for shapes in stages)
    moments = _moments(work, stages, stored)
    worst = max(moments, key=lambda moment: moment.gathered + moment.gradients + moment.activations)
    return RankEstimate(
        parameters=stored,
        weights=stored * work.master_bytes + worst.gathered,
        gradients=worst.gradients,
        optimizer=round(stored * work.master_bytes * work.moments),
        activations=worst.activations,
    )


class _Moment(NamedTuple):
    """What a rank holds at one moment of the last backward of a step, besides stored weights and optimizer state."""

    gathered: int
    """Weights that were gathered over the data axis, or cast for computing."""
    gradients: int
    activations: int


def _moments(work: Workload, stages: list[Shapes], stored: int) -> list[_Moment]:
    """Return the moments at which memory may be highest: backward of the head, of a layer, and of what is around them.

    FSDP reduces a gradient from a copy of it in the precision of the masters.
    """
    whole = sum(elements(shapes.values()) for shapes in stages)
    around = sum(elements(_around(shapes).values()) for shapes in stages)
    layer = max(map(_largest_layer, stages))
    compute, master, parallel = work.compute_bytes, work.master_bytes, work.parallel
    keeps = parallel.reshard_after_forward is False
    shards = parallel.accumulate == "sharded"
    earlier = 0 if work.micro_batches == 1 else stored if shards else whole
    of_head, in_head = (0, 0) if work.head is None else (work.head.weight_gradient(compute), _in_head(work))

    if parallel.data == 1 and compute == master:  # without FSDP: a gradient is added as it comes
        return [
            _Moment(0, max(earlier * master + of_head, stored * master), work.layer_elements * compute + in_head),
            _Moment(0, stored * master, work.layer_activations),
        ]

    def gathered(layers: int) -> int:
        return compute * (whole if keeps else around + layers * layer)

    moments = []
    if work.head is not None:
        activations = work.layer_elements * compute + in_head
        moments.append(_Moment(gathered(1), earlier * master + of_head, activations))
        of_head = work.head.hidden_size * work.head.vocabulary * compute  # until it is reduced, last
    gradients = max(earlier, stored) * master + of_head + layer * (compute + master)
    moments.append(_Moment(gathered(2), gradients, work.layer_activations))
    # By then, the layers are reduced, and gathered weights are free unless another micro-batch needs them.
    before = stored - (0 if earlier else sum(_stored(parallel, _around(shapes)) for shapes in stages))
    copied = 2 * master if earlier and not shards else compute + master
    moments.append(_Moment(whole * compute if keeps and shards else 0, before * master + around * copied, 0))
    return moments


def _in_head(work: Workload) -> int:
    return 0 if work.head is None else work.head.bytes_in_chunks(work.compute_bytes)


def _stored(parallel: ParallelSpec, shapes: Shapes) -> int:
    size = shard_size(parallel)
    return elements((ceil(shape[0] / size), *shape[1:]) for shape in shapes.values())


def shard_size(parallel: ParallelSpec) -> int:
    """Return the number of data-parallel ranks that share one copy of the parameters."""
    match parallel.data_mode:
        case "fsdp":
            return parallel.data
        case "hsdp":
            return parallel.shard_size or parallel.data
        case "ddp":
            return 1


def _around(shapes: Shapes) -> Shapes:
    """Return the parameters outside the layers."""
    return {name: shape for name, shape in shapes.items() if not name.startswith("layers.")}


def _largest_layer(shapes: Shapes) -> int:
    layers: dict[str, int] = {}
    for name, shape in shapes.items():
        if name.startswith("layers."):
            index = name.split(".")[1]
            layers[index] = layers.get(index, 0) + prod(shape)
    return max(layers.values(), default=0)
