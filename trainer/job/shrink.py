"""Layouts that a job may continue with while nodes are missing: fewer data-parallel replicas, all else equal.

The global batch and the order of samples do not depend on the layout, so a run that shrinks and grows sees the same
data as any other. Pure and torch-free.
"""

import json

from pydantic import ValidationError

from keepwarm.trainer.job.spec import JobSpec


def layouts(job: JobSpec) -> dict[int, JobSpec]:
    """Return the job by number of nodes, largest first, including itself: each with as many replicas as fit on the
    nodes.

    If the nodes are too few for the snapshot code, the strongest code that they allow is used.
    """
    jobs = {job.layout.nodes: job}
    if job.cluster.elastic == "shrink":
        for data in range(job.parallel.data - 1, job.cluster.min_data_parallel - 1, -1):
            if job.batch.global_batch_size % (data * job.batch.micro_batch_size):
                continue  # validation would refuse it too, but takes a thousand times as long
            smaller = _with_replicas(job, data)
            if smaller is not None:
                jobs.setdefault(smaller.layout.nodes, smaller)
    return jobs


def resized(job: JobSpec, world_size: int) -> JobSpec:
    """Return the job for `world_size` ranks; unchanged if no layout has that many."""
    data, remainder = divmod(world_size, job.parallel.tensor * job.parallel.pipeline)
    if remainder or not job.cluster.min_data_parallel <= data < job.parallel.data:
        return job
    return _with_replicas(job, data) or job


def _with_replicas(job: JobSpec, data: int) -> JobSpec | None:
    values = job.model_dump(mode="json")
    values["parallel"]["data"] = data
    for smaller_code in ({}, {"data": None, "parity": None}):
        if isinstance(values["snapshot"], dict) and values["snapshot"]["code"] is not None:
            values["snapshot"]["code"] |= smaller_code
        try:
            return JobSpec.model_validate_json(json.dumps(values))
        except (ValidationError, ValueError):
            continue
    return None
