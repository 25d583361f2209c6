"""What a job needs before it runs: parameters, memory of each rank, floating-point operations. Pure and torch-free.

Parameters are exact, as the torch engine holds them. Memory is an estimate of what stays allocated: activations are
counted by the tensors that backward keeps (after Korthikanti et al., 2022), without allocator or workspace.
"""

from dataclasses import replace
from math import ceil

from keepwarm.parallel.engine_support import engine_info
from keepwarm.parallel.memory import Head, RankEstimate, Workload, elements
from keepwarm.parallel.mesh.layout import split_layers, stages_of
from keepwarm.parallel.spec import ParallelSpec
from keepwarm.trainer.job.spec import JobSpec
from keepwarm.trainer.model.any_spec import AnyModelSpec
from keepwarm.trainer.model.shapes import LOGITS_AT_ONCE, Shapes, local_shape, parameter_shapes

RESERVED_GIB = 6.0
"""Memory of a GPU beside tensors: CUDA's context, NCCL's buffers and fragmentation take 4 to 6 GiB."""


def total_parameters(spec: AnyModelSpec) -> int:
    """Parameters of the whole model; tied embeddings count once."""
    return elements(parameter_shapes(spec).values())


def stage_shapes(job: JobSpec, stage: int) -> Shapes:
    """Parameters of one pipeline stage by module name, before tensor and data parallelism split them."""
    layers = split_layers(job.model.layers, job.parallel)
    return parameter_shapes(job.model, layers[stage], embed=stage == 0, head=stage == len(layers) - 1)


def estimate_rank(job: JobSpec, pipeline: int, parallel: ParallelSpec | None = None) -> RankEstimate:
    """Return what every rank at this pipeline coordinate needs, at most, in the last steps of a batch-size ramp.

    `parallel` is what `decided_parallel` has returned, for callers that ask about several coordinates.
    """
    work = replace(_workload(job, pipeline), parallel=parallel or decided_parallel(job))
    return engine_info(job.parallel).memory(work)


def decided_parallel(job: JobSpec) -> ParallelSpec:
    """Return `job.parallel` with what it leaves to the plan decided: the fastest that fits in `cluster.gpu_memory`.

    If nothing fits, this is what needs the least memory.
    """
    engine = engine_info(job.parallel)
    # The first coordinate has the most micro-batches in flight, the last one the head.
    works = [_workload(job, at) for at in sorted({0, job.parallel.pipeline - 1})]
    forms = list(engine.forms(job.parallel, works[0].micro_batches))

    def fits(form: ParallelSpec) -> bool:
        return all(engine.memory(replace(work, parallel=form)).total <= usable_memory(job) for work in works)

    return forms[0] if len(forms) == 1 else next(filter(fits, forms), forms[-1])


def longest_sequence(job: JobSpec) -> int:
    """Return the number of tokens in a sample of the stage that has the longest."""
    return max(stage.sequence_length or job.data.sequence_length for stage in job.stages)


def usable_memory(job: JobSpec) -> float:
    """Return the bytes of a GPU that the estimated tensors may take; the rest is the context's and the allocator's."""
    return (job.cluster.gpu_memory - RESERVED_GIB) * 2.0**30


def state_bytes(job: JobSpec, pipeline: int) -> int:
    """What every rank at this pipeline coordinate stores in a snapshot: weights, moments and moving average, once each.

    Ranks that hold the same share the storing, so that it does not depend on how the data axis keeps the state.
    """
    work = _workload(job, pipeline)
    copies = 1 + work.moments + (job.moving_average is not None)
    return ceil(ceil(work.elements / job.parallel.data) * work.master_bytes * copies)


def model_flops_per_token(spec: AnyModelSpec, sequence: int) -> float:
    """FLOPs that count towards MFU: 6 N + 12 h times the mean number of tokens that a query sees, over all layers.

    All parameters count, recompute does not. A causal query sees s / 2 tokens on average, in a window w - w^2 / 2s.
    """
    return 6.0 * total_parameters(spec) + 6.0 * sum(attended(spec, layer, sequence) for layer in range(spec.layers))


def attended(spec: AnyModelSpec, layer: int, sequence: int) -> float:
    """Return twice the mean number of tokens that a query of a layer sees, times the width of all queries."""
    window = spec.window(layer)
    span = sequence if window is None or window >= sequence else 2 * window - window * window / sequence
    return float(_queries(spec) * span)


def layer_elements(job: JobSpec) -> tuple[float, float]:
    """Per token and layer: elements kept from forward to backward, and those that live while it is recomputed.

    Norms count as fused ones, which keep their input only.
    """
    spec, tensor = job.model, job.parallel.tensor
    hidden = spec.hidden_size
    between = hidden / (tensor if job.parallel.sequence else 1)
    keys = spec.key_value_heads * spec.size_per_head
    # Input of the projections; query, key, value and the mixed heads.
    held = keys / min(tensor, spec.key_value_heads)
    attention = hidden + 2 * _queries(spec) / tensor + 2 * held
    if spec.has_qk_norm:
        attention += _queries(spec) / tensor + held
    # Input of the MLP; gate, its activation, up and their product, or up and its activation.
    mlp = hidden + (4 if spec.has_gate else 2) * spec.ffn_size / tensor
    residual = between if spec.parallel_residual else 2 * between
    everything = residual + attention + mlp
    match job.numerics.recompute:
        case "none":
            return everything, 0.0
        case "selective":
            return residual + between + mlp, attention
        case "full":
            return between, everything


def in_flight(parallel: ParallelSpec, pipeline: int, micro_batches: int) -> int:
    """Forward passes of single stages whose activations a rank holds at once, at most.

    1F1B: the stages from here to the end. Interleaved schedules: their longer warm-up (Narayanan et al., 2021), which
    the zero-bubble schedule shares.
    """
    if parallel.pipeline == 1:
        return 1
    per_rank = parallel.stages // parallel.pipeline
    behind = parallel.pipeline - pipeline - 1
    if per_rank == 1:
        return min(micro_batches, behind + 1)
    return min(micro_batches * per_rank, 2 * behind + (per_rank - 1) * parallel.pipeline + 1)


def _workload(job: JobSpec, pipeline: int) -> Workload:
    split = split_layers(job.model.layers, job.parallel)
    stages = stages_of(pipeline, job.parallel)
    tokens = job.batch.micro_batch_size * longest_sequence(job)
    micro_batches = job.batch.global_batch_size // (job.parallel.data * job.batch.micro_batch_size)
    kept, again = layer_elements(job)
    layers = sum(len(split[stage]) for stage in stages) / len(stages)
    held = in_flight(job.parallel, pipeline, micro_batches) * layers * kept
    return Workload(
        parallel=job.parallel,
        optimizer=job.optimizer,
        numerics=job.numerics,
        stages=tuple(_local_shapes(job, stage) for stage in stages),
        micro_batches=micro_batches,
        layer_elements=round(held * tokens),
        again_elements=round(again * tokens),
        head=_head(job, tokens) if stages[-1] == len(split) - 1 else None,
    )


def _head(job: JobSpec, tokens: int) -> Head:
    vocabulary = ceil(job.model.vocabulary_size / job.parallel.tensor)
    chunk = min(tokens, max(1, LOGITS_AT_ONCE // vocabulary))
    return Head(tokens=tokens, hidden_size=job.model.hidden_size, vocabulary=vocabulary, chunk=chunk)


def _local_shapes(job: JobSpec, stage: int) -> Shapes:
    shapes = stage_shapes(job, stage)
    return {name: local_shape(name, shape, job.model, job.parallel.tensor) for name, shape in shapes.items()}


def _queries(spec: AnyModelSpec) -> int:
    return spec.heads * spec.size_per_head
