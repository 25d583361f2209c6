"""Properties of the torch engine that are known before a rank runs it. Torch-free."""

from collections.abc import Iterator

from keepwarm.parallel.engine_registry import EngineOptions
from keepwarm.parallel.engine_support import EngineInfo, Job
from keepwarm.parallel.memory import RankEstimate, Workload
from keepwarm.parallel.native.memory import estimate
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

    def lacks(self, job: Job) -> Iterator[str]:
        torch = installed("torch")
        if torch is not None and _splits_backward(job) and not splits_custom_backward(torch):
            yield f"parallel.schedule = zero_bubble needs torch 2.13, {torch} is installed; set another schedule"

    def memory(self, work: Workload) -> RankEstimate:
        return estimate(work)


def _splits_backward(job: Job) -> bool:
    return job.parallel.schedule == "zero_bubble" and job.parallel.pipeline > 1
