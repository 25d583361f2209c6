"""Megatron Core's `GPTModel` for keepwarm's models: configuration, layers and the stages of one rank."""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from keepwarm.parallel.architecture import NativeArchitecture, native
from keepwarm.parallel.engine import EngineConfig
from keepwarm.parallel.megatron.core import (
    MLP,
    AttnMaskType,
    ColumnParallelLinear,
    GPTModel,
    MLPSubmodules,
    ModuleSpec,
    RowParallelLinear,
    SelfAttentionSubmodules,
    TransformerBlockSubmodules,
    TransformerConfig,
    TransformerLayer,
    TransformerLayerSubmodules,
    get_bias_dropout_add,
)
from keepwarm.parallel.megatron.info import MegatronOptions
from keepwarm.parallel.megatron.layers import (
    ApexLayerNorm,
    ApexRMSNorm,
    LayerNorm,
    QueryKeyValueAttention,
    RMSNorm,
    ScaledDotProductAttention,
)
from keepwarm.parallel.mesh.layout import split_layers
from keepwarm.parallel.recompute import recomputed
from keepwarm.parallel.spec import NumericsSpec, ParallelSpec

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def transformer_config(config: EngineConfig) -> Any:
    """Return Megatron Core's configuration of model and parallelism, without dropout and initialisation."""
    spec, parallel, numerics = native(config.model.spec), config.parallel, config.numerics
    dtype = DTYPES[numerics.precision]
    stages = parallel.stages // parallel.pipeline
    return TransformerConfig(
        num_layers=spec.layers,
        hidden_size=spec.hidden_size,
        num_attention_heads=spec.heads,
        num_query_groups=spec.key_value_heads,
        kv_channels=spec.size_per_head,
        ffn_hidden_size=spec.ffn_size,
        normalization="RMSNorm" if spec.norm == "rms" else "LayerNorm",
        layernorm_epsilon=spec.norm_eps,
        qk_layernorm=spec.qk_norm == "head",
        gated_linear_unit=spec.activation == "swiglu",
        activation_func=_activation(spec),
        add_bias_linear=spec.mlp_bias,
        add_qkv_bias=spec.qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor,
        sequence_parallel=parallel.sequence and parallel.tensor > 1,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=stages if stages > 1 else None,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=numerics.precision == "bf16",
        use_cpu_initialization=config.device.type == "cpu",
        perform_initialization=False,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        # The engine itself divides by the global count of targets.
        calculate_per_token_loss=True,
        # Two ranks that are both each other's next and previous need the calls that name their direction.
        overlap_p2p_comm=stages > 1,
        batch_p2p_comm=stages == 1,
        batch_p2p_sync=False,
        cuda_graph_scope=[],
    )


def build_stages(config: EngineConfig, transformer: Any, groups: Any, stages: tuple[int, ...]) -> list[Any]:
    """Return the `GPTModel` of each of this rank's pipeline stages; their parameters have no values yet.

    `transformer` is the `transformer_config`; `groups` is Megatron Core's collection of process groups.
    """
    split = split_layers(config.model.layers, config.parallel)
    return [_build(config, transformer, groups, stage, chunk, len(split[stage])) for chunk, stage in enumerate(stages)]


def _build(config: EngineConfig, transformer: Any, groups: Any, stage: int, chunk: int, layers: int) -> Any:
    spec, parallel, numerics = native(config.model.spec), config.parallel, config.numerics
    using = building_blocks(spec, parallel, numerics)
    gpt = GPTModel(
        config=transformer,
        transformer_layer_spec=TransformerBlockSubmodules(
            layer_specs=[_layer(spec, using)] * layers, layer_norm=using.norm
        ),
        vocab_size=spec.vocabulary_size,
        max_sequence_length=spec.max_sequence_length,
        pre_process=stage == 0,
        post_process=stage == parallel.stages - 1,
        share_embeddings_and_output_weights=spec.tied_embeddings,
        position_embedding_type="rope" if spec.position == "rotary" else "learned_absolute",
        rotary_percent=spec.rotary_fraction,
        rotary_base=spec.rope_theta,
        rope_scaling=spec.rope_scaling is not None,
        rope_scaling_factor=1.0 if spec.rope_scaling is None else spec.rope_scaling.factor,
        pg_collection=groups,
        vp_stage=chunk if transformer.virtual_pipeline_model_parallel_size else None,
    )
    for layer in gpt.decoder.layers:
        if numerics.recompute == "selective":
            layer.self_attention.core_attention.forward = recomputed(layer.self_attention.core_attention.forward)
        if numerics.recompute == "full":
            layer.forward = recomputed(layer.forward)
    # Norms and learned positions are made on the CPU. Only the distributed optimizer's buffers would move them.
    return gpt.to(config.device)


@dataclass(frozen=True, kw_only=True)
class BuildingBlocks:
    """The classes that make up a layer."""

    norm: Any
    column: Any
    row: Any


def building_blocks(spec: NativeArchitecture, parallel: ParallelSpec, numerics: NumericsSpec) -> BuildingBlocks:
    """Return Megatron Core's own linear layers with PyTorch's or Apex's norms, or Transformer Engine's for both.

    Transformer Engine's attention is not used: PyTorch's kernels accept document masks directly.

    Raises:
        EngineUnavailable: a selected implementation is not installed.
    """
    if parallel.options_as(MegatronOptions).transformer_engine:
        from keepwarm.parallel.megatron.transformer_engine import TEColumnParallelLinear, TENorm, TERowParallelLinear

        return BuildingBlocks(norm=TENorm, column=TEColumnParallelLinear, row=TERowParallelLinear)
    own = {"rms": RMSNorm, "layer": LayerNorm} if numerics.norms == "torch" else _OF_APEX
    return BuildingBlocks(norm=own[spec.norm], column=ColumnParallelLinear, row=RowParallelLinear)


_OF_APEX = {"rms": ApexRMSNorm, "layer": ApexLayerNorm}


def _layer(spec: NativeArchitecture, using: BuildingBlocks) -> Any:
    norm = using.norm
    head_norm = norm if spec.qk_norm == "head" else None
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                module=QueryKeyValueAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=using.column,
                    core_attention=ScaledDotProductAttention,
                    linear_proj=using.row,
                    q_layernorm=head_norm,
                    k_layernorm=head_norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=ModuleSpec(
                module=MLP,
                params={"ffn_hidden_size": spec.ffn_size},
                submodules=MLPSubmodules(linear_fc1=using.column, linear_fc2=using.row),
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def _activation(spec: NativeArchitecture) -> Any:
    if spec.activation == "swiglu":
        return F.silu
    return functools.partial(F.gelu, approximate="tanh" if spec.activation == "gelu_tanh" else "none")
