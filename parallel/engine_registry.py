"""Registry of built-in and third-party engines by name, and the base class of their options. Torch-free.

An engine is registered by its `keepwarm.parallel.engine_support.EngineInfo`; other packages list theirs in the
entry-point group `keepwarm.engines`. The key `parallel.engine` holds the name.
"""

from typing import Any

from keepwarm.options import Component
from keepwarm.registry import Registry
from keepwarm.section import Section

ENGINES: Registry[type[Component]] = Registry(
    "engine",
    "keepwarm.engines",
    {
        "torch": "keepwarm.parallel.native.info:TorchInfo",
        "megatron": "keepwarm.parallel.megatron.info:MegatronInfo",
        "deepspeed": "keepwarm.parallel.deepspeed.info:DeepSpeedInfo",
    },
    Component,
)


class EngineOptions(Section):
    """Base of `parallel.options`, the keys that are specific to one engine."""

    @classmethod
    def unknown_key(cls, key: str, values: Any) -> str | None:
        owners = [name for name, engine in ENGINES.usable() if key in engine.Options.model_fields]
        if owners:
            return f"of this engine; it belongs to parallel.engine = {', '.join(owners)}"
        return None if cls.model_fields else "of this engine, which has no options"
