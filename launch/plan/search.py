"""Search for the layout in which a job trains fastest on given GPUs. Pure and torch-free."""

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import get_args

from keepwarm.launch.errors import SearchError
from keepwarm.launch.plan.step_time import Choice, Efficiency, Recompute, Sizes, StepModel, StepTime
from keepwarm.parallel.cards import Card
from keepwarm.parallel.errors import LayoutError
from keepwarm.parallel.memory import RankEstimate
from keepwarm.parallel.native.memory import shard_size
from keepwarm.parallel.spec import ParallelSpec
from keepwarm.trainer.job.checks import check_job
from keepwarm.trainer.job.estimate import decided_parallel, estimate_rank, usable_memory
from keepwarm.trainer.job.spec import JobSpec

BEST = 10
_MICRO_BATCHES = (1, 2, 4, 8, 16)
_SHOWN_REASONS = 3

HOPPER = Efficiency(
    matrices=0.697, attention=0.469, elementwise=0.382, eager=5.86, link=0.970, network=0.914, jitter=0.012
)
EFFICIENCIES = {
    # The published runs on A100s computed attention unfused and in full, which no engine of today does.
    "A100": Efficiency(
        matrices=0.677, attention=0.469, elementwise=0.382, eager=5.86, link=0.970, network=0.914, jitter=0.012
    ),
    "H100": HOPPER,
    "H200": HOPPER,
    "B200": HOPPER,
}
"""Shares fitted by tests/launch/plan/published_runs.py; there is no published run on B200, which takes Hopper's."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """A layout that fits, with what is expected of it."""

    job: JobSpec
    """The job in this layout."""
    time: StepTime
    memory: RankEstimate
    """Of the rank that needs most."""
    tokens_per_s: float
    """Of each GPU."""


def find(job: JobSpec, card: Card, gpus: int, best: int = BEST) -> list[Found]:
    """Return the fastest layouts of a job that fit on so many cards, the fastest first.

    The global batch stays. Chosen are tensor, pipeline, data, schedule, recompute, micro-batch and the form of data
    parallelism.

    Raises:
        SearchError: the job cannot be planned, or no layout fits.
    """
    if job.numerics.precision != "bf16":
        raise SearchError(
            f"numerics.precision = {job.numerics.precision}: speeds are known of bf16; give numerics.precision=bf16"
        )
    if gpus > card.per_node and gpus % card.per_node:
        raise SearchError(f"{gpus} GPUs do not fill whole nodes of {card.per_node}; see --gpus-per-node")
    sizes = Sizes(job)
    model = StepModel(sizes, card, EFFICIENCIES[card.name])
    timed = [(model.time(choice), choice) for choice in choices(job, card, gpus)]
    usable, refused = usable_memory(_on(job, card, gpus)), Counter[str]()
    found: list[Found] = []
    for time, choice in sorted(timed, key=lambda pair: pair[0].total):
        if _state(job, sizes, choice.parallel) > usable:
            continue
        try:
            planned = laid_out(job, choice, card, gpus)
        except (ValueError, LayoutError) as error:
            refused[str(error).splitlines()[0]] += 1
            continue
        memory = most_memory(planned)
        if memory.total > usable:
            continue
        found.append(Found(job=planned, time=time, memory=memory, tokens_per_s=model.tokens_per_s(choice)))
        if len(found) == best:
            break
    if not found:
        bounds = [(_state(job, sizes, choice.parallel), choice) for _, choice in timed]
        least = [choice for bound, choice in bounds if bound <= 1.01 * min(bounds, key=lambda pair: pair[0])[0]]
        raise SearchError(_why_nothing(job, card, gpus, least, refused))
    return found


def choices(job: JobSpec, card: Card, gpus: int) -> Iterator[Choice]:
    """Yield every choice whose sizes divide; what else a job or its engine refuses is found by `check_job`."""
    layers, batch = job.model.layers, job.batch.global_batch_size
    node = min(card.per_node, gpus)
    for tensor, pipeline in product(_divisors(node), _divisors(gpus)):
        data, rest = divmod(gpus, tensor * pipeline)
        if rest or pipeline > layers or job.model.heads % tensor:
            continue
        forms = _forms(job, data, pipeline, tensor, node)
        sizes = [size for size in _MICRO_BATCHES if batch % (data * size) == 0]
        for parallel, size, recompute in product(forms, sizes, get_args(Recompute)):
            if batch // (data * size) >= pipeline:
                yield Choice(parallel=parallel, micro_batch_size=size, recompute=recompute)


def _forms(job: JobSpec, data: int, pipeline: int, tensor: int, node: int) -> list[ParallelSpec]:
    """Return the schedules and forms of data parallelism of one layout."""
    schedules: list[tuple[str, int]] = [("1f1b", 1)]
    if pipeline > 1:
        schedules += [("interleaved", each) for each in (2, 3, 4, 8) if pipeline * each <= job.model.layers]
        schedules += [("zero_bubble", 2)] if 2 * pipeline <= job.model.layers else []
    beside = max(1, node // (tensor * pipeline))
    modes: list[tuple[str, int | None]] = [("ddp", None)] if data > 1 else [("fsdp", None)]
    if data > 1:
        modes.append(("fsdp", None))
    if 1 < beside < data and data % beside == 0:
        modes.append(("hsdp", beside))
    return [
        job.parallel.model_copy(
            update={
                "tensor": tensor, "pipeline": pipeline, "data": data, "sequence": tensor > 1,
                "schedule": schedule, "stages_per_rank": each if schedule == "interleaved" else None,
                "layer_split": _split(job.model.layers, pipeline * each), "data_mode": mode, "shard_size": shard,
                "reshard_after_forward": False if pipeline > 1 else None, "accumulate": "auto",
            }
        )
        for (schedule, each), (mode, shard) in product(schedules, modes)
    ]  # fmt: skip


def _split(layers: int, stages: int) -> tuple[int, ...] | None:
    """Return the layers of each stage if they do not divide: fewer for the last, which has the head, and the first."""
    small, more = divmod(layers, stages)
    if not more:
        return None
    order = sorted(range(stages), key=lambda stage: (stage in (0, stages - 1), stage == stages - 1, stage))
    larger = set(order[:more])
    return tuple(small + (stage in larger) for stage in range(stages))


def _on(job: JobSpec, card: Card, gpus: int) -> JobSpec:
    """Return a job on these nodes, in a layout that need not fit them."""
    update = {"ranks_per_node": min(card.per_node, gpus), "gpu_memory": card.memory}
    return job.model_copy(update={"cluster": job.cluster.model_copy(update=update)})


def laid_out(job: JobSpec, choice: Choice, card: Card, gpus: int) -> JobSpec:
    """Return a job in a layout. Raise ValueError or LayoutError if the job or its engine refuses it."""
    laid = _on(job, card, gpus).model_copy(
        update={
            "parallel": choice.parallel,
            "batch": job.batch.model_copy(update={"micro_batch_size": choice.micro_batch_size}),
            "numerics": job.numerics.model_copy(update={"recompute": choice.recompute}),
        }
    )
    check_job(laid)
    return laid


def most_memory(job: JobSpec) -> RankEstimate:
    """Return the estimate of the rank that needs most: of the first pipeline coordinate or of the last one."""
    parallel = decided_parallel(job)
    ends = sorted({0, job.parallel.pipeline - 1})
    return max((estimate_rank(job, at, parallel) for at in ends), key=lambda estimate: estimate.total)


def _state(job: JobSpec, sizes: Sizes, parallel: ParallelSpec) -> float:
    """Return the bytes of weights and moments that some rank stores at least."""
    moments = {"adamw": 2, "muon": 1, "sgd": 0}[job.optimizer.name]
    return sizes.elements(parallel) / shard_size(parallel) * 4 * (1 + moments)


def _why_nothing(job: JobSpec, card: Card, gpus: int, least: Sequence[Choice], refused: Counter[str]) -> str:
    """Return why no layout was found; `least` are the choices whose ranks store least."""
    planned = []
    for choice in least:
        with contextlib.suppress(ValueError, LayoutError):
            planned.append(laid_out(job, choice, card, gpus))
    if planned:
        best = min(planned, key=lambda one: most_memory(one).total)
        parallel = best.parallel
        return (
            f"{job.name} does not fit on {gpus} {card.name}: even with tensor {parallel.tensor} x pipeline "
            f"{parallel.pipeline} x data {parallel.data} a rank needs {most_memory(best).total / 2**30:.1f} GiB; "
            "use more GPUs"
        )
    reasons = [reason for reason, _ in refused.most_common(_SHOWN_REASONS)]
    batch = job.batch.global_batch_size
    return f"{job.name}: no layout of {gpus} GPUs is possible: " + (
        "; ".join(reasons) or f"batch.global_batch_size = {batch} divides by none of them"
    )


def _divisors(number: int) -> Sequence[int]:
    return [each for each in range(1, number + 1) if number % each == 0]
