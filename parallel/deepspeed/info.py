"""Properties of the deepspeed engine that are known before a rank runs it. Torch-free."""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from keepwarm.parallel.engine_registry import EngineOptions
from keepwarm.parallel.engine_support import MEGATRON_CORE, EngineInfo, Job, Requirement
from keepwarm.parallel.memory import RankEstimate, Workload, data_share

DEEPSPEED = Requirement(distribution="deepspeed", install="DS_BUILD_OPS=0 pip install 'keepwarm[deepspeed]'")


class DeepSpeedOptions(EngineOptions):
    """Options of the deepspeed engine."""

    zero_stage: Literal[1, 2, 3] = Field(
        1, description="what is sharded over data: optimizer state, gradients too, weights too"
    )
    offload_optimizer: bool = Field(False, description="keep and update the optimizer state in host memory")


class DeepSpeedInfo(EngineInfo):
    """DeepSpeed's ZeRO and pipeline, with Megatron Core's linear layers on the tensor axis."""

    Options = DeepSpeedOptions
    engine = "keepwarm.parallel.deepspeed.engine:DeepSpeedEngine"
    requirements = (DEEPSPEED, MEGATRON_CORE)

    options: DeepSpeedOptions

    def refuses(self, job: Job) -> Iterator[str]:
        parallel, zero = job.parallel, self.options.zero_stage
        if parallel.sequence:
            yield "parallel.sequence: activations stay whole between the matrices; set false"
        if parallel.pipeline > 1 and (parallel.schedule != "1f1b" or parallel.stages != parallel.pipeline):
            yield "parallel.schedule: its pipeline has 1f1b with one stage on each rank alone"
        if parallel.pipeline > 1 and zero > 1:
            yield f"parallel.options.zero_stage = {zero}: its pipeline needs whole gradients until the last; set 1"
        if parallel.accumulate != "auto":
            yield "parallel.accumulate: parallel.options.zero_stage decides, 1 keeps whole gradients; leave it out"
        if parallel.data_mode != "fsdp":
            yield "parallel.data_mode: ZeRO always shards, by parallel.options.zero_stage; leave it out"
        if self.options.offload_optimizer and job.optimizer.implementation == "apex":
            yield (
                "parallel.options.offload_optimizer: Apex updates on a GPU alone; set optimizer.implementation = torch"
            )
        if job.optimizer.name == "muon":
            yield "optimizer.name = muon: ZeRO's flat buffers hold no matrices; set parallel.engine = torch"
        if job.numerics.precision == "fp64":
            yield "numerics.precision = fp64: ZeRO keeps its master weights in fp32 whatever the model's type"
        if job.numerics.precision == "bf16" and parallel.tensor > 1:
            yield "numerics.precision = bf16: with parallel.tensor > 1 it has not been shown to compute alike; set fp32"
        if job.numerics.compile:
            yield "numerics.compile: its hooks and compiled layers have not been tried together; set false"

    def memory(self, work: Workload) -> RankEstimate:
        """Return what each rank holds under ZeRO (Rajbhandari et al., 2020), excluding offloaded state.

        ZeRO keeps fp32 master weights in addition to the weights, even where these are already fp32.
        """
        zero, offload = self.options.zero_stage, self.options.offload_optimizer
        whole, share, master = work.elements, data_share(work), work.master_bytes
        held = share if zero == 3 else whole
        return RankEstimate(
            parameters=held,
            weights=held * work.compute_bytes + (0 if offload else share * master),
            gradients=(share if zero > 1 else whole) * master,
            optimizer=0 if offload else round(share * master * work.moments),
            activations=work.activations,
        )
