"""Layouts that a job may go on with while nodes are missing: fewer data-parallel replicas, all else the same.

The global batch and the order of samples do not depend on the layout, so that a run which shrinks and grows sees what
any other one sees. Pure and torch-free.
"""

import json

from pydantic import ValidationError

from keepwarm.trainer.job.spec import JobSpec


def layouts(job: JobSpec) -> dict[int, JobSpec]:
    """The job by number of nodes, largest first, itself included: with as many replicas as fit on so many nodes.

    Where the nodes are too few for the code of the snapshots, it becomes the strongest that they allow.
    """
    found = {job.layout.nodes: job}
    if job.cluster.elastic == "shrink":
        for data in range(job.parallel.data - 1, job.cluster.min_data_parallel - 1, -1):
            if job.batch.global_batch_size % (data * job.batch.micro_batch_size):
                continue  # what the validation of the job would say, in a thousandth of the time
            smaller = _with_replicas(job, data)
            if smaller is not None:
                found.setdefault(smaller.layout.nodes, smaller)
    return found


def resized(job: JobSpec, world_size: int) -> JobSpec:
    """The job as it is run by so many ranks; unchanged where no layout has them."""
    data, rest = divmod(world_size, job.parallel.tensor * job.parallel.pipeline)
    if rest or not job.cluster.min_data_parallel <= data < job.parallel.data:
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
