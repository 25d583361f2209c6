"""Properties of the torch engine that are known before a rank runs it. Torch-free."""

from collections.abc import Iterator
from itertools import product

from keepwarm.parallel.engine_registry import EngineOptions
from keepwarm.parallel.engine_support import EngineInfo, Job
from keepwarm.parallel.memory import RankEstimate, Workload
from keepwarm.parallel.native.memory import estimate, shard_size
from keepwarm.parallel.spec import ParallelSpec
from keepwarm.tested import installed, splits_custom_backward


class TorchInfo(EngineInfo):
    """PyTorch's own DTensor, pipelining and FSDP2."""

    Options = EngineOptions
    engine = "keepwarm.parallel.native.engine:TorchEngine"
    in_process = True
    foreign_layers = True
    unequal_parts = True

    def refuses(self, job: Job) -> Iterator[str]:
        if job.numerics.norms == "apex" and job.parallel.sequence:
            yield "numerics.norms = apex: with parallel.sequence its norms are split by DTensor; set torch"
        if not job.model.is_native and job.numerics.norms == "apex":
            yield "numerics.norms = apex: model.transformers has norms of its own; set torch"
        if not job.model.is_native and job.numerics.compile:
            yield "numerics.compile: compiled layers of transformers have not been tried; set false"
        if job.numerics.compile and _splits_backward(job):
            yield (
                "parallel.schedule = zero_bubble splits backward, which compiled layers do not allow; "
                "set numerics.compile = false or another schedule"
            )

        if job.parallel.accumulate == "sharded":
            if job.parallel.data_mode == "ddp":
                yield "parallel.accumulate = sharded: with data_mode ddp every rank has all gradients; set fsdp or hsdp"
            if job.parallel.pipeline > 1:
                yield "parallel.accumulate = sharded: a pipeline reduces gradients once per step; set whole or auto"

    @classmethod
    def forms(cls, parallel: ParallelSpec, micro_batches: int) -> Iterator[ParallelSpec]:
        can_shard = micro_batches > 1 and parallel.pipeline == 1 and shard_size(parallel) > 1
        accumulate = ("whole", "sharded") if can_shard else ("whole",)
        if parallel.accumulate != "auto":
            accumulate = (parallel.accumulate,)
        keep = (False, True) if micro_batches > 1 or parallel.pipeline > 1 else (True,)
        if parallel.reshard_after_forward is not None:
            keep = (parallel.reshard_after_forward,)
        for reshard, kind in product(keep, accumulate):
            yield parallel.model_copy(update={"reshard_after_forward": reshard, "accumulate": kind})

    def lacks(self, job: Job) -> Iterator[str]:
        torch = installed("torch")
        if torch is not None and _splits_backward(job) and not splits_custom_backward(torch):
            yield f"parallel.schedule = zero_bubble needs torch 2.13, {torch} is installed; set another schedule"

    def memory(self, work: Workload) -> RankEstimate:
        return estimate(work)


def _splits_backward(job: Job) -> bool:
    return job.parallel.schedule == "zero_bubble" and job.parallel.pipeline > 1
