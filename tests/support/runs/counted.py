"""Runs through the product's loop whose engine only records: which windows were drawn, at which rate, in which stage.

Windows of a source hold consecutive numbers, so that a row of tokens tells the source, the window and the length.
"""

import contextlib
import copy
import hashlib
import json
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch

from keepwarm.parallel.engine import Batch, EngineConfig, Evaluation, StepResult
from keepwarm.parallel.engine_registry import ENGINES
from keepwarm.parallel.loss import MAIN
from keepwarm.parallel.model import ModelParts
from keepwarm.parallel.native.info import TorchInfo
from keepwarm.parallel.shard import Shard
from keepwarm.trainer.data.packing import PackedSource
from keepwarm.trainer.data.preprocess.prepare import PreparedData
from keepwarm.trainer.data.table import Ints
from keepwarm.trainer.distributed.world import World
from keepwarm.trainer.job.spec import JobSpec
from keepwarm.trainer.loop.build import assemble
from keepwarm.trainer.loop.interrupt import Interrupt
from keepwarm.trainer.loop.loop import train
from keepwarm.trainer.loop.restore import Start
from keepwarm.trainer.monitor.goodput import Timeline
from tests.support.runs.registered import registered
from tests.support.runs.toy import ToyParts

FIRST = {"a": 0, "b": 1_000_000, "c": 2_000_000}
"""First token of each source."""
TOKENS = {"a": 4096, "b": 6144, "c": 1_000_000}
"""Length of each source."""


CUT = "cut"
"""Stands for the source of a sample that is joined from pieces of others, as replay of another length is."""


@dataclass(frozen=True)
class NumberedTokens:
    """A document of consecutive numbers."""

    path: str
    first: int
    count: int

    @property
    def content(self) -> str:
        return self.path

    def read(self, start: int, count: int) -> Ints:
        return np.arange(self.first + start, self.first + start + count, dtype=np.int64)

    def starts_between(self, start: int, end: int) -> Ints:
        return np.zeros(0, np.int64)

    def prefixes_between(self, start: int, end: int) -> list[tuple[int, int]]:
        return []


@dataclass(frozen=True)
class Step:
    """A step as the engine saw it."""

    rate: float
    rows: tuple[tuple[str, int, int], ...]
    """Source, first token within it and number of tokens of every sample, in order."""

    @property
    def tokens(self) -> int:
        return sum(length for _, _, length in self.rows)


class RecordingEngine:
    """Counts updates and records batches; its only tensor is the number of updates."""

    steps: ClassVar[list[Step]] = []

    def __init__(self, config: EngineConfig) -> None:
        self.layout = config.layout
        self._updates = torch.zeros(1)

    def step(self, batch: Batch, lr: float, before_update: Callable[[], None] | None = None) -> StepResult:
        rows = batch.tokens.flatten(0, 1)
        drawn = []
        for row in rows.tolist():
            name = max((name for name, first in FIRST.items() if first <= row[0]), key=lambda name: FIRST[name])
            whole = row == list(range(row[0], row[0] + len(row)))
            drawn.append((name if whole else CUT, row[0] - FIRST[name], len(row)))
        self.steps.append(Step(lr, tuple(drawn)))
        if before_update is not None:
            before_update()
        self._updates += 1
        return StepResult(losses={MAIN: 1.0}, tokens=rows.numel(), grad_norm=1.0, skipped=False)

    def evaluate(self, batch: Batch) -> Evaluation:
        return Evaluation(sums={MAIN: 1.0}, tokens=1)

    def state(self) -> Mapping[str, Shard]:
        shard = Shard(
            name="model.updates", global_shape=(1,), offsets=(0,), shape=(1,), local=self._updates, replicas=(0,)
        )
        return {shard.name: shard}

    def restored(self) -> None:
        pass

    def close(self) -> None:
        pass


class RecordingInfo(TorchInfo):
    """Registers the engine."""

    engine = f"{__name__}:RecordingEngine"


@contextlib.contextmanager
def recording_engine() -> Iterator[None]:
    """Register the engine inside the `with` block."""
    with registered(ENGINES, "recording", RecordingInfo):
        yield


def job_values(folder: Path, stages: list[dict[str, Any]], *, batch: dict[str, Any], length: int) -> dict[str, Any]:
    """A whole job of these stages, as plain values."""
    return {
        "name": "counted",
        "output": str(folder),
        "model": {
            "layers": 1,
            "hidden_size": 8,
            "heads": 1,
            "ffn_size": 8,
            "vocabulary_size": 8,
            "max_sequence_length": 64,
        },
        "data": {"sources": {name: name for name in FIRST}, "sequence_length": length},
        "batch": batch,
        "stages": stages,
        "parallel": {"engine": "recording"},
        "health": {"min_hang_timeout": None, "straggler_every": None},
        "log": {"every": 10**9, "tensorboard": False},
    }


@dataclass
class Counted:
    """A run that is stopped and continued, with everything that its engine saw."""

    values: dict[str, Any]
    steps: list[Step] = field(default_factory=list)
    stages: list[str] = field(default_factory=list)
    """The stage of every step, from metrics.jsonl."""

    @property
    def folder(self) -> Path:
        return Path(self.values["output"])

    def changed(self, change: Callable[[dict[str, Any]], None]) -> JobSpec:
        """The job with a change, which is kept only if `train` succeeds with it."""
        values = copy.deepcopy(self.values)
        change(values)
        return JobSpec.model_validate_json(json.dumps(values))

    def train(self, job: JobSpec, start: Start, *, stop_after: int | None = None) -> bool:
        """Train until the end or for `stop_after` steps; return whether the run is finished."""
        self.folder.mkdir(parents=True, exist_ok=True)
        length = job.data.sequence_length
        sources: dict[str, PackedSource] = {
            name: PackedSource(name, NumberedTokens(name, first, TOKENS[name] + 1), length)
            for name, first in FIRST.items()
        }
        world = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
        RecordingEngine.steps = []
        timeline = Timeline(self.folder, rank=1, began=0.0, restart=False, fresh=start == "fresh")
        data = PreparedData(sources=sources, validation={}, tokenizer=None)
        run = assemble(job, world, cast(ModelParts, ToyParts(1)), data, start=start, timeline=timeline)
        with Interrupt().watching() as interrupt:
            if stop_after is not None:
                original = run.engine.step

                def step(*arguments: Any) -> StepResult:
                    result = original(*arguments)
                    if len(RecordingEngine.steps) == stop_after:
                        interrupt.received = signal.SIGTERM
                    return result

                run.engine.step = step  # type: ignore[method-assign,assignment]
            finished = train(run, interrupt)
        run.callbacks.close(run, "finished" if finished else "stopped")
        run.loader.close()
        self.values = json.loads(job.model_dump_json(by_alias=True))
        self.steps += RecordingEngine.steps
        lines = map(json.loads, (self.folder / "metrics.jsonl").read_text().splitlines())
        self.stages = [line["stage"] for line in lines if "stage" in line]
        assert len(self.stages) == len(self.steps)
        return finished

    def consumed(self) -> dict[str, int]:
        """Tokens by stage."""
        tokens: dict[str, int] = {}
        for name, step in zip(self.stages, self.steps, strict=True):
            tokens[name] = tokens.get(name, 0) + step.tokens
        return tokens

    def digests(self) -> dict[str, str]:
        """The content of every file of the run folder."""
        return {
            str(path): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(self.folder.rglob("*"))
            if path.is_file()
        }
