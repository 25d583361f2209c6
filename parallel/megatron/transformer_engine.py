"""Transformer Engine's layers, as Megatron Core wraps them; importing this needs Transformer Engine."""

from keepwarm.parallel.errors import EngineUnavailable
from keepwarm.parallel.kernels import TRANSFORMER_ENGINE
from keepwarm.parallel.megatron.core import quiet

if TRANSFORMER_ENGINE.missing:
    raise EngineUnavailable(TRANSFORMER_ENGINE.problem)
with quiet():
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear as TEColumnParallelLinear
    from megatron.core.extensions.transformer_engine import TENorm as TENorm
    from megatron.core.extensions.transformer_engine import TERowParallelLinear as TERowParallelLinear
