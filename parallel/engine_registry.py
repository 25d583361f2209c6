"""Engines by name, ours and those of other packages, and the base of their option sections. Torch-free.

An engine is registered with its `keepwarm.parallel.engine_support.EngineInfo`; other packages list theirs in the
entry-point group `keepwarm.engines`. The name is what `parallel.engine` says.
"""

from collections.abc import Iterator
from typing import Any

from keepwarm.options import Component
from keepwarm.registry import Registry, UnusableComponent
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
    """Base of `parallel.options`, the keys of one engine."""

    @classmethod
    def unknown_key(cls, key: str, values: Any) -> str | None:
        owners = [name for name, engine in usable_engines() if key in engine.Options.model_fields]
        if owners:
            return f"of this engine; it belongs to parallel.engine = {', '.join(owners)}"
        return None if cls.model_fields else "of this engine, which has no options"


def usable_engines() -> Iterator[tuple[str, type[Component]]]:
    """All engines whose information can be imported; for hints, which must not fail where a foreign one is broken."""
    for name in ENGINES.names():
        try:
            yield name, ENGINES.get(name)
        except UnusableComponent:
            continue
