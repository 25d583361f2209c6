"""An engine of another distribution: PyTorch's with every learning rate scaled, which it cannot do in a pipeline."""

from pathlib import Path

NAME = "scaled"
INFO = """
from collections.abc import Iterator

from pydantic import PositiveFloat

from keepwarm.parallel.engine_registry import EngineOptions
from keepwarm.parallel.engine_support import Job, Requirement
from keepwarm.parallel.native.info import TorchInfo


class ScaledOptions(EngineOptions):
    lr_factor: PositiveFloat = 1.0


class ScaledInfo(TorchInfo):
    Options = ScaledOptions
    engine = "scaled_engine.engine:ScaledEngine"
    requirements = (Requirement(distribution="scaled-engine", install="pip install scaled-engine"),)

    def refuses(self, job: Job) -> Iterator[str]:
        yield from super().refuses(job)
        if job.parallel.pipeline > 1 and self.options.lr_factor != 1:
            yield "parallel.options.lr_factor: not with a pipeline; leave it out"
"""
ENGINE = """
from keepwarm.parallel.native.engine import TorchEngine
from scaled_engine.info import ScaledOptions


class ScaledEngine(TorchEngine):
    def __init__(self, config):
        super().__init__(config)
        self._factor = config.parallel.options_as(ScaledOptions).lr_factor

    def step(self, batch, lr, before_update=None):
        return super().step(batch, self._factor * lr, before_update)
"""


def install(folder: Path) -> None:
    """Write the distribution into a folder, which goes onto PYTHONPATH."""
    package = folder / "scaled_engine"
    package.mkdir(parents=True)
    for name, text in {"__init__": "", "info": INFO, "engine": ENGINE}.items():
        (package / f"{name}.py").write_text(text)
    metadata = folder / "scaled_engine-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: scaled-engine\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[keepwarm.engines]\n{NAME} = scaled_engine.info:ScaledInfo\n")
