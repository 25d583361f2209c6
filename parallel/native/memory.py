"""Memory of a rank under FSDP2, HSDP or plain replication. Pure and torch-free."""

from math import ceil, prod

from keepwarm.parallel.memory import RankEstimate, Shape, Workload, elements
from keepwarm.parallel.spec import ParallelSpec

Shapes = dict[str, Shape]


def estimate(work: Workload) -> RankEstimate:
    """Return the maximum that any rank holds.

    FSDP splits the first dim of every parameter as `torch.chunk` does, so the first data-parallel rank holds the most.
    """
    stages = [dict(stage) for stage in work.stages]
    stored = sum(_stored(work.parallel, shapes) for shapes in stages)
    master = work.master_bytes
    return RankEstimate(
        parameters=stored,
        weights=stored * master + sum(_gathered(work, shapes) for shapes in stages) * work.compute_bytes,
        gradients=sum(_gradients(work, shapes) for shapes in stages) * master,
        optimizer=stored * master * work.moments,
        activations=work.activations,
    )


def _stored(parallel: ParallelSpec, shapes: Shapes) -> int:
    size = _shard_size(parallel)
    return elements((ceil(shape[0] / size), *shape[1:]) for shape in shapes.values())


def _shard_size(parallel: ParallelSpec) -> int:
    match parallel.data_mode:
        case "fsdp":
            return parallel.data
        case "hsdp":
            return parallel.shard_size or parallel.data
        case "ddp":
            return 1


def _gathered(work: Workload, shapes: Shapes) -> int:
    """Return the elements that FSDP holds besides the stored ones: gathered over the data axis, or cast for computing.

    Gradient accumulation keeps them between micro-batches; parameters outside the layers stay gathered throughout.
    """
    if _shard_size(work.parallel) == 1 and work.numerics.precision != "bf16":
        return 0
    if not work.parallel.reshard_after_forward or work.micro_batches > 1:
        return elements(shapes.values())
    around = elements(shape for name, shape in shapes.items() if not name.startswith("layers."))
    # The current layer and the next one, which is prefetched.
    return around + 2 * _largest_layer(shapes)


def _gradients(work: Workload, shapes: Shapes) -> int:
    """Return the gradient elements; they are unsharded during accumulation, as they are reduced once per step."""
    if _shard_size(work.parallel) == 1 or work.micro_batches > 1:
        return elements(shapes.values())
    return _stored(work.parallel, shapes) + _largest_layer(shapes)


def _largest_layer(shapes: Shapes) -> int:
    layers: dict[str, int] = {}
    for name, shape in shapes.items():
        if name.startswith("layers."):
            index = name.split(".")[1]
            layers[index] = layers.get(index, 0) + prod(shape)
    return max(layers.values(), default=0)
