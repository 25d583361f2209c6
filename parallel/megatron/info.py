"""Properties of the megatron engine that are known before a rank runs it. Torch-free."""

from collections.abc import Iterator

from pydantic import Field

from keepwarm.parallel.architecture import NativeArchitecture, native
from keepwarm.parallel.engine_registry import EngineOptions
from keepwarm.parallel.engine_support import MEGATRON_CORE, EngineInfo, Job
from keepwarm.parallel.errors import LayoutError
from keepwarm.parallel.memory import RankEstimate, Workload, data_share
from keepwarm.parallel.spec import ParallelSpec


class MegatronOptions(EngineOptions):
    """Options of the megatron engine."""

    transformer_engine: bool = Field(False, description="Transformer Engine's linear layers and norms")


class MegatronInfo(EngineInfo):
    """Megatron Core's layers, schedules, data parallelism and optimizers."""

    Options = MegatronOptions
    engine = "keepwarm.parallel.megatron.engine:MegatronEngine"
    requirements = (MEGATRON_CORE,)
    in_process = True

    options: MegatronOptions

    def refuses(self, job: Job) -> Iterator[str]:
        yield from _families_of_gpt_model(native(job.model))
        parallel = job.parallel
        if parallel.schedule == "zero_bubble" and parallel.pipeline > 1:
            yield "parallel.schedule: Megatron Core has 1f1b and interleaved, no zero_bubble"
        if parallel.layer_split is not None and len(set(parallel.layer_split)) > 1:
            yield "parallel.layer_split: every stage holds the same number of layers; leave it out"
        if parallel.accumulate == "sharded":
            yield "parallel.accumulate = sharded: its gradients are reduced once per step; set whole or auto"
        if parallel.data_mode == "hsdp":
            yield (
                "parallel.data_mode: fsdp (the distributed optimizer: optimizer state is sharded, weights are not) or "
                "ddp, no hsdp"
            )
        if job.optimizer.name == "muon":
            yield "optimizer.name = muon: its optimizers are AdamW and SGD; set parallel.engine = torch"
        if job.optimizer.name == "sgd" and parallel.data_mode != "ddp":
            yield "optimizer.name = sgd: the distributed optimizer knows AdamW alone; set parallel.data_mode = ddp"
        if self.options.transformer_engine and job.numerics.norms == "apex":
            yield "numerics.norms = apex: parallel.options.transformer_engine brings its own norms; set one of them"
        if job.numerics.precision == "fp64":
            yield "numerics.precision: fp32 or bf16; its optimizers refuse fp64"
        if job.numerics.compile:
            yield "numerics.compile: its layers are not compiled; set false"

    @classmethod
    def check_micro_batches(cls, count: int, parallel: ParallelSpec) -> None:
        if parallel.schedule == "interleaved" and count % parallel.pipeline:
            raise LayoutError(
                f"parallel.schedule = interleaved on parallel.engine = megatron needs a number of micro-batches per "
                f"data-parallel rank that divides by parallel.pipeline = {parallel.pipeline}, got {count}"
            )
        super().check_micro_batches(count, parallel)

    def memory(self, work: Workload) -> RankEstimate:
        """Return what each rank holds; the distributed optimizer is ZeRO stage 1 (Rajbhandari et al., 2020).

        Weights and fp32 gradients are not sharded over the data axis. Logits are not computed in chunks.
        """
        whole, share = work.elements, data_share(work)
        master, compute = work.master_bytes, work.compute_bytes
        head = 0 if work.head is None else work.head.bytes_at_once(compute)
        return RankEstimate(
            parameters=whole,
            weights=whole * compute + (share * master if compute != master else 0),
            gradients=whole * master,
            optimizer=round(share * master * work.moments),
            activations=work.layer_activations + head,
        )


LLAMA3 = (1.0, 4.0, 8192)
"""What Megatron Core's scaled frequencies have for the low and high frequency factor and the original length."""


def _families_of_gpt_model(model: NativeArchitecture) -> Iterator[str]:
    """Yield the model features that the transformer layers of Megatron Core 0.16 lack."""
    if model.norm_position == "post":
        yield "model.norm_position = post (OLMo 2): its layers normalise before attention and MLP"
    if model.parallel_residual:
        yield "model.parallel_residual (GPT-NeoX): its layers run attention and MLP one after the other"
    if model.qk_norm == "projection":
        yield "model.qk_norm = projection (OLMo 2): it normalises each head by itself"
    if model.sliding_window is not None:
        yield "model.sliding_window (Mistral): its layers without Transformer Engine attend to the whole sequence"
    scaling = model.rope_scaling
    if scaling is not None and scaling.type != "llama3":
        yield f"model.rope_scaling.type = {scaling.type}: it has no other scaled frequencies than those of llama3"
    elif scaling is not None:
        found = scaling.low_frequency_factor, scaling.high_frequency_factor, model.original_length
        if found != LLAMA3:
            yield (
                f"model.rope_scaling: its low and high frequency factor and original length are {LLAMA3} (Llama 3.1), "
                f"not {found}"
            )
    if model.nope_layers:
        yield "model.nope_layers (SmolLM3): all of its layers rotate"
    if model.attention_output_bias != model.mlp_bias or (model.mlp_bias and not model.qkv_bias):
        yield (
            "model.mlp_bias, attention_output_bias, qkv_bias: it has biases everywhere, nowhere, or in query, key and "
            "value alone"
        )
