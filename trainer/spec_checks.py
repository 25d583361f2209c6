"""Checks of a job that need more than one of its sections. Each names the keys and says what would fit."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from parallel.errors import LayoutError
from parallel.layout import Layout, check_micro_batches, split_layers

if TYPE_CHECKING:
    from trainer.spec import JobSpec


def check_job(job: "JobSpec") -> None:
    """Raise ValueError with a line for everything that does not fit, the keys named."""
    problems = [*_layout(job), *_tensor(job), *_batch(job), *_data(job)]
    if problems:
        raise ValueError("\n".join(problems))


def _layout(job: "JobSpec") -> Iterator[str]:
    try:
        Layout.of(job.parallel, job.cluster.ranks_per_node)
    except LayoutError as error:
        yield str(error)
    try:
        split_layers(job.model.layers, job.parallel)
    except LayoutError as error:
        yield str(error)


def _tensor(job: "JobSpec") -> Iterator[str]:
    tensor, model = job.parallel.tensor, job.model
    for key, value in (
        ("heads", model.heads),
        ("kv_heads", model.kv_heads or tensor),
        ("ffn_size", model.ffn_size),
        ("vocabulary_size", model.vocabulary_size),
    ):
        if value % tensor:
            yield f"model.{key} = {value} does not divide by parallel.tensor = {tensor}"
    if job.parallel.sequence and job.data.sequence_length % tensor:
        yield (
            f"parallel.sequence: data.sequence_length = {job.data.sequence_length} does not divide by "
            f"parallel.tensor = {tensor}"
        )


def _batch(job: "JobSpec") -> Iterator[str]:
    unit = job.parallel.data * job.batch.micro_size
    named = f"parallel.data x batch.micro_size = {job.parallel.data} x {job.batch.micro_size} = {unit}"
    if job.batch.global_size % unit:
        yield f"batch.global_size = {job.batch.global_size} does not divide by {named}"
        return
    ramp = job.batch.ramp
    if ramp and (ramp.start % unit or ramp.increment % unit):
        yield f"batch.ramp.start and batch.ramp.increment must divide by {named}"
    if ramp and (job.batch.global_size < ramp.start or (job.batch.global_size - ramp.start) % ramp.increment):
        yield "batch.ramp: increments from batch.ramp.start must reach batch.global_size exactly"
        return
    sizes = range(ramp.start, job.batch.global_size + 1, ramp.increment) if ramp else [job.batch.global_size]
    for size in sizes:
        try:
            check_micro_batches(size // unit, job.parallel)
        except LayoutError as error:
            yield str(error)
            return


def _data(job: "JobSpec") -> Iterator[str]:
    if job.data.sequence_length > job.model.max_sequence_length:
        yield (
            f"data.sequence_length = {job.data.sequence_length} is longer than "
            f"model.max_sequence_length = {job.model.max_sequence_length}"
        )
    names = [stage.name for stage in job.stages]
    if len(set(names)) != len(names):
        yield f"stages: names must differ, got {names}"
    for stage in job.stages:
        unknown = sorted(set(stage.mixture) - set(job.data.sources))
        if unknown:
            yield f"stages.{stage.name}.mixture names {unknown}, not in data.sources {sorted(job.data.sources)}"
