"""What a job needs before it runs: parameters, memory of each rank, floating-point operations. Pure and torch-free.

Parameters are exact, as the torch engine holds them. Memory is an estimate of what stays allocated: activations are
counted by the tensors that backward keeps (after Korthikanti et al., 2022), without allocator or workspace.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil, prod

from keepwarm.parallel.mesh.layout import split_layers, stages_of
from keepwarm.parallel.spec import NumericsSpec, OptimizerSpec, ParallelSpec
from keepwarm.trainer.job.spec import JobSpec
from keepwarm.trainer.model.shapes import LOGITS_AT_ONCE, Shapes, local_shape, parameter_shapes, tensor_plan
from keepwarm.trainer.model.spec import ModelSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class RankEstimate:
    """What one rank holds; memory in bytes."""

    parameters: int
    """Elements of model parameters that the rank stores between steps."""
    weights: int
    """Stored weights (fp32 masters under bf16), and what of them is gathered for computing at the same time."""
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """Bytes of all four."""
        return self.weights + self.gradients + self.optimizer + self.activations


def total_parameters(spec: ModelSpec) -> int:
    """Parameters of the whole model; tied embeddings count once."""
    return _elements(parameter_shapes(spec).values())


def stage_shapes(job: JobSpec, stage: int) -> Shapes:
    """Parameters of one pipeline stage by module name, before tensor and data parallelism split them."""
    layers = split_layers(job.model.layers, job.parallel)
    return parameter_shapes(job.model, layers[stage], embed=stage == 0, head=stage == len(layers) - 1)


def stage_parameters(job: JobSpec, stage: int) -> int:
    """Parameters of one pipeline stage that each rank of it stores, at most.

    The tensor axis splits matrices, FSDP splits the first dim of what is left as `torch.chunk` does, so that the
    first data-parallel rank holds the most.
    """
    return _elements(_sharded(job, shape) for shape in _local_shapes(job, stage).values())


def estimate_rank(job: JobSpec, pipeline: int) -> RankEstimate:
    """What every rank at this pipeline coordinate needs, at most, in the last steps of a batch-size ramp."""
    if job.parallel.engine != "torch":
        return _estimate_flattened(job, pipeline)
    stages = stages_of(pipeline, job.parallel)
    stored = sum(stage_parameters(job, stage) for stage in stages)
    master, compute = _bytes_of(job.numerics)
    return RankEstimate(
        parameters=stored,
        weights=stored * master + sum(_gathered(job, stage) for stage in stages) * compute,
        gradients=sum(_gradients(job, stage) for stage in stages) * master,
        optimizer=stored * master * _moments(job.optimizer),
        activations=_activations(job, pipeline, compute),
    )


def state_bytes(job: JobSpec, pipeline: int) -> int:
    """What every rank at this pipeline coordinate stores in a snapshot: weights, moments and moving average, once each.

    Ranks that hold the same share the storing, so that it does not depend on how the data axis keeps the state.
    """
    master, _ = _bytes_of(job.numerics)
    copies = 1 + _moments(job.optimizer) + (job.moving_average is not None)
    return ceil(_whole(job, pipeline) / job.parallel.data) * master * copies


def _estimate_flattened(job: JobSpec, pipeline: int) -> RankEstimate:
    """The same for the engines whose optimizers cut flattened buffers in equal parts (Rajbhandari et al., 2020).

    Megatron's distributed optimizer is ZeRO stage 1: weights and gradients, in fp32, are whole. DeepSpeed keeps fp32
    masters beside the weights even where these are fp32 too, and in host memory what it offloads.
    """
    parallel = job.parallel
    master, compute = _bytes_of(job.numerics)
    whole = _whole(job, pipeline)
    share = whole if parallel.data_mode == "ddp" else ceil(whole / parallel.data)
    zero = parallel.zero_stage if parallel.engine == "deepspeed" else 1
    masters = share * master if parallel.engine == "deepspeed" or compute != master else 0
    held = share if zero == 3 else whole
    moments = share * master * _moments(job.optimizer)
    return RankEstimate(
        parameters=held,
        weights=held * compute + (0 if parallel.offload_optimizer else masters),
        gradients=(share if zero > 1 else whole) * master,
        optimizer=0 if parallel.offload_optimizer else moments,
        activations=_activations(job, pipeline, compute),
    )


def model_flops_per_token(spec: ModelSpec, sequence: int) -> float:
    """FLOPs that count towards MFU: 6 N + 6 L h s, all parameters, causal attention, recompute not counted."""
    return 6.0 * total_parameters(spec) + 6.0 * spec.layers * _queries(spec) * sequence


def layer_elements(job: JobSpec) -> tuple[float, float]:
    """Per token and layer: elements kept from forward to backward, and those that live while it is recomputed.

    Norms count as fused ones, which keep their input only.
    """
    spec, tensor = job.model, job.parallel.tensor
    hidden = spec.hidden_size
    between = hidden / (tensor if job.parallel.sequence else 1)
    keys = spec.key_value_heads * spec.size_per_head
    # Input of the projections; query, key, value and the mixed heads.
    attention = hidden + (2 * _queries(spec) + 2 * keys) / tensor
    if spec.qk_norm != "none":
        attention += (_queries(spec) + keys) / tensor
    # Input of the MLP; gate, its activation, up and their product, or up and its activation.
    mlp = hidden + (4 if spec.activation == "swiglu" else 2) * spec.ffn_size / tensor
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


def _elements(shapes: Iterable[tuple[int, ...]]) -> int:
    return sum(prod(shape) for shape in shapes)


def _local_shapes(job: JobSpec, stage: int) -> Shapes:
    plan = tensor_plan(job.model)
    shapes = stage_shapes(job, stage)
    return {name: local_shape(name, shape, plan, job.parallel.tensor) for name, shape in shapes.items()}


def _whole(job: JobSpec, pipeline: int) -> int:
    """Elements at one pipeline coordinate, split by the tensor axis alone."""
    return sum(_elements(_local_shapes(job, stage).values()) for stage in stages_of(pipeline, job.parallel))


def _sharded(job: JobSpec, shape: tuple[int, ...]) -> tuple[int, ...]:
    return ceil(shape[0] / _shard_size(job.parallel)), *shape[1:]


def _shard_size(parallel: ParallelSpec) -> int:
    match parallel.data_mode:
        case "fsdp":
            return parallel.data
        case "hsdp":
            return parallel.shard_size or parallel.data
        case "ddp":
            return 1


def _bytes_of(numerics: NumericsSpec) -> tuple[int, int]:
    """Bytes of a stored and of a computing element."""
    master = 8 if numerics.precision == "fp64" else 4
    return master, 2 if numerics.precision == "bf16" else master


def _moments(optimizer: OptimizerSpec) -> int:
    return 2 if optimizer.name == "adamw" else int(optimizer.momentum > 0)


def _micro_batches(job: JobSpec) -> int:
    return job.batch.global_batch_size // (job.parallel.data * job.batch.micro_batch_size)


def _gathered(job: JobSpec, stage: int) -> int:
    """Elements that FSDP holds beside the stored ones: gathered over the data axis, or cast for computing.

    Gradient accumulation keeps them from one micro-batch to the next; what surrounds the layers always stays.
    """
    if _shard_size(job.parallel) == 1 and job.numerics.precision != "bf16":
        return 0
    shapes = _local_shapes(job, stage)
    if not job.parallel.reshard_after_forward or _micro_batches(job) > 1:
        return _elements(shapes.values())
    around = _elements(shape for name, shape in shapes.items() if not name.startswith("layers."))
    # The layer at work and the one that is gathered ahead of it.
    return around + 2 * _largest_layer(shapes)


def _gradients(job: JobSpec, stage: int) -> int:
    """Elements of gradient: unsharded while micro-batches accumulate, since they are reduced once per step."""
    shapes = _local_shapes(job, stage)
    if _shard_size(job.parallel) == 1 or _micro_batches(job) > 1:
        return _elements(shapes.values())
    return stage_parameters(job, stage) + _largest_layer(shapes)


def _largest_layer(shapes: Shapes) -> int:
    layers: dict[str, int] = {}
    for name, shape in shapes.items():
        if name.startswith("layers."):
            index = name.split(".")[1]
            layers[index] = layers.get(index, 0) + prod(shape)
    return max(layers.values(), default=0)


def _queries(spec: ModelSpec) -> int:
    return spec.heads * spec.size_per_head


def _activations(job: JobSpec, pipeline: int, compute: int) -> int:
    """Bytes kept for backward by the micro-batches in flight, and by the layer that is computed again."""
    split = split_layers(job.model.layers, job.parallel)
    stages = stages_of(pipeline, job.parallel)
    longest = max(stage.sequence_length or job.data.sequence_length for stage in job.stages)
    tokens = job.batch.micro_batch_size * longest
    kept, again = layer_elements(job)
    layers = sum(len(split[stage]) for stage in stages) / len(stages)
    held = in_flight(job.parallel, pipeline, _micro_batches(job)) * layers * kept + again
    head = _head_bytes(job, tokens, compute) if stages[-1] == len(split) - 1 else 0
    return round(held * tokens) * compute + head


def _head_bytes(job: JobSpec, tokens: int, compute: int) -> int:
    """Input and output of the last norm, one chunk of logits and of their gradient.

    Megatron's has no chunks; its exponentials are kept from forward on.
    """
    vocabulary = job.model.vocabulary_size // job.parallel.tensor
    if job.parallel.engine == "megatron":
        return 2 * tokens * job.model.hidden_size * compute + tokens * vocabulary * (compute + 3 * 4)
    chunk = min(tokens, max(1, LOGITS_AT_ONCE // vocabulary))
    wide = max(4, compute)
    return 2 * tokens * job.model.hidden_size * compute + chunk * vocabulary * (compute + wide)
