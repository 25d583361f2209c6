"""Properties of the torch engine that are known before a rank runs it. Torch-free."""

from collections.abc import Iterator

from keepwarm.parallel.engine_registry import EngineOptions
from keepwarm.parallel.engine_support import EngineInfo, Job
from keepwarm.parallel.memory import RankEstimate, Workload
from keepwarm.parallel.native.memory import estimate


class TorchInfo(EngineInfo):
    """PyTorch's own DTensor, pipelining and FSDP2."""

    Options = EngineOptions
    engine = "keepwarm.parallel.native.engine:TorchEngine"
    in_process = True

    def refuses(self, job: Job) -> Iterator[str]:
        if job.numerics.norms == "apex" and job.parallel.sequence:
            yield "numerics.norms = apex: with parallel.sequence its norms are split by DTensor; set torch"

    def memory(self, work: Workload) -> RankEstimate:
        return estimate(work)
