"""Checks of a job that need more than one of its sections. Each names the keys and says what would fit."""

from typing import TYPE_CHECKING

from parallel.layout import Layout

if TYPE_CHECKING:
    from trainer.spec import JobSpec


def check_job(job: "JobSpec") -> None:
    """Raise ValueError or LayoutError, with the keys named, for the first thing that does not fit."""
    Layout.of(job.parallel, job.cluster.ranks_per_node)
    _check_tensor(job)
    _check_batch(job)
    _check_data(job)


def _check_tensor(job: "JobSpec") -> None:
    tensor, model = job.parallel.tensor, job.model
    for key, value in (
        ("heads", model.heads),
        ("kv_heads", model.key_value_heads),
        ("ffn_size", model.ffn_size),
        ("vocabulary_size", model.vocabulary_size),
    ):
        if value % tensor:
            raise ValueError(f"model.{key} = {value} does not divide by parallel.tensor = {tensor}")
    if job.parallel.sequence and job.data.sequence_length % tensor:
        raise ValueError(
            f"parallel.sequence: data.sequence_length = {job.data.sequence_length} does not divide by "
            f"parallel.tensor = {tensor}"
        )


def _check_batch(job: "JobSpec") -> None:
    unit = job.parallel.data * job.batch.micro_size
    named = f"parallel.data x batch.micro_size = {job.parallel.data} x {job.batch.micro_size} = {unit}"
    if job.batch.global_size % unit:
        raise ValueError(f"batch.global_size = {job.batch.global_size} does not divide by {named}")
    ramp = job.batch.ramp
    if ramp and (ramp.start % unit or ramp.increment % unit):
        raise ValueError(f"batch.ramp.start and batch.ramp.increment must divide by {named}")
    if ramp and (job.batch.global_size - ramp.start) % ramp.increment:
        raise ValueError("batch.ramp: increments from batch.ramp.start must reach batch.global_size exactly")


def _check_data(job: "JobSpec") -> None:
    if job.data.sequence_length > job.model.max_sequence_length:
        raise ValueError(
            f"data.sequence_length = {job.data.sequence_length} is longer than "
            f"model.max_sequence_length = {job.model.max_sequence_length}"
        )
    names = [stage.name for stage in job.stages]
    if len(set(names)) != len(names):
        raise ValueError(f"stages: names must differ, got {names}")
    for stage in job.stages:
        unknown = sorted(set(stage.mixture) - set(job.data.sources))
        if unknown:
            raise ValueError(
                f"stages.{stage.name}.mixture names {unknown}, not in data.sources {sorted(job.data.sources)}"
            )
