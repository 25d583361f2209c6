"""Transformer Engine's layers as wrapped by Megatron Core; importing this module requires Transformer Engine."""

from keepwarm.parallel.errors import EngineUnavailable
from keepwarm.parallel.kernels import TRANSFORMER_ENGINE
from keepwarm.parallel.megatron.core import quiet

if TRANSFORMER_ENGINE.missing:
    raise EngineUnavailable(TRANSFORMER_ENGINE.problem)
with quiet():
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear as TEColumnParallelLinear
    from megatron.core.extensions.transformer_engine import TENorm as TENorm
    from megatron.core.extensions.transformer_engine import TERowParallelLinear as TERowParallelLinear
