from keepwarm.ft.codec.reed_solomon import Codec
from keepwarm.ft.spec import SnapshotSpec
from keepwarm.ft.worker.in_memory import Deployment, InMemoryCheckpointer
from keepwarm.launch.local.train import train_here as train
from keepwarm.launch.plan.plan import Plan
from keepwarm.parallel.engine import Batch, Engine
from keepwarm.parallel.shard import Shard
from keepwarm.registry import Registry
from keepwarm.section import Section
from keepwarm.trainer.job.files import load_job
from keepwarm.trainer.job.run_folder import RunFolder

__all__ = [
    "Batch",
    "Codec",
    "Deployment",
    "Engine",
    "InMemoryCheckpointer",
    "Plan",
    "Registry",
    "RunFolder",
    "Section",
    "Shard",
    "SnapshotSpec",
    "__version__",
    "load_job",
    "train",
]

__version__: str
