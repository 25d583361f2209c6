"""Imports from Megatron Core, with its known warnings suppressed."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_EXPECTED = (
    # Packages that are optional for Megatron Core, and modules that it has moved.
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
    "The following imports from `dynamic_context.py` will be removed",
    "`torch.jit.script_method` is deprecated",
    "`torch.jit.script` is deprecated",
    # Advice on the order of CUDA kernels; docs/engines.md covers it.
    r"When using (async grad allreduce|sequence parallelism) it is recommended to set the environment variable",
    # Megatron Core calls collectives by the names they had before torch 2.13.
    r"`torch\.distributed\.\w+` is deprecated",
)


@contextmanager
def quiet() -> Iterator[None]:
    """Ignore the known warnings and no others."""
    with warnings.catch_warnings():
        for message in _EXPECTED:
            warnings.filterwarnings("ignore", message=message)
        yield


with quiet():
    from megatron.core import parallel_state as parallel_state
    from megatron.core.distributed import (
        DistributedDataParallel as DistributedDataParallel,
    )
    from megatron.core.distributed import (
        DistributedDataParallelConfig as DistributedDataParallelConfig,
    )
    from megatron.core.distributed import (
        finalize_model_grads as finalize_model_grads,
    )
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add as get_bias_dropout_add
    from megatron.core.models.gpt import GPTModel as GPTModel
    from megatron.core.optimizer import OptimizerConfig as OptimizerConfig
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer as DistributedOptimizer
    from megatron.core.optimizer.optimizer import (
        Float16OptimizerWithFloat16Params as Float16OptimizerWithFloat16Params,
    )
    from megatron.core.optimizer.optimizer import FP32Optimizer as FP32Optimizer
    from megatron.core.optimizer.optimizer import MegatronOptimizer as MegatronOptimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func as get_forward_backward_func
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator as P2PCommunicator
    from megatron.core.process_groups_config import ProcessGroupCollection as ProcessGroupCollection
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear as ColumnParallelLinear
    from megatron.core.tensor_parallel.layers import RowParallelLinear as RowParallelLinear
    from megatron.core.tensor_parallel.random import initialize_rng_tracker as initialize_rng_tracker
    from megatron.core.transformer import ModuleSpec as ModuleSpec
    from megatron.core.transformer import TransformerConfig as TransformerConfig
    from megatron.core.transformer.attention import SelfAttention as SelfAttention
    from megatron.core.transformer.attention import SelfAttentionSubmodules as SelfAttentionSubmodules
    from megatron.core.transformer.enums import AttnMaskType as AttnMaskType
    from megatron.core.transformer.mlp import MLP as MLP
    from megatron.core.transformer.mlp import MLPSubmodules as MLPSubmodules
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules as TransformerBlockSubmodules
    from megatron.core.transformer.transformer_layer import TransformerLayer as TransformerLayer
    from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules as TransformerLayerSubmodules
    from megatron.core.utils import GlobalMemoryBuffer as GlobalMemoryBuffer
