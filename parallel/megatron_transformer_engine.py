"""Transformer Engine's layers, as Megatron Core wraps them; importing this needs Transformer Engine."""

import importlib.util

from parallel.errors import EngineUnavailable
from parallel.megatron_import import quiet

if importlib.util.find_spec("transformer_engine") is None:
    raise EngineUnavailable(
        "parallel.transformer_engine = true: Transformer Engine is not installed: "
        "pip install --no-build-isolation 'transformer_engine[pytorch]'; or set false"
    )
with quiet():
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear as TEColumnParallelLinear
    from megatron.core.extensions.transformer_engine import TENorm as TENorm
    from megatron.core.extensions.transformer_engine import TERowParallelLinear as TERowParallelLinear
