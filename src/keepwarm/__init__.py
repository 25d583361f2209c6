"""Training of large language models through the loss of nodes.

The names in `__all__` are the public API, described in docs/api.md; docs/extending.md names the modules that packages
with extensions import. Everything else is private. Importing `keepwarm` loads none of these names: each is imported on
first use, so that planning a job never loads torch. Their types are in `__init__.pyi`.
"""

from importlib import import_module
from typing import Any

_PUBLIC = {
    "Batch": "keepwarm.parallel.engine:Batch",
    "Codec": "keepwarm.ft.codec.reed_solomon:Codec",
    "Deployment": "keepwarm.ft.worker.in_memory:Deployment",
    "Engine": "keepwarm.parallel.engine:Engine",
    "InMemoryCheckpointer": "keepwarm.ft.worker.in_memory:InMemoryCheckpointer",
    "Plan": "keepwarm.launch.plan.plan:Plan",
    "Registry": "keepwarm.registry:Registry",
    "RunFolder": "keepwarm.trainer.job.run_folder:RunFolder",
    "Section": "keepwarm.section:Section",
    "Shard": "keepwarm.parallel.shard:Shard",
    "SnapshotSpec": "keepwarm.ft.spec:SnapshotSpec",
    "load_job": "keepwarm.trainer.job.files:load_job",
    "train": "keepwarm.launch.local.train:train_here",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("importlib.metadata").version("keepwarm")
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _PUBLIC[name].partition(":")
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted(__all__)
