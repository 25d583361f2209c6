"""Engine properties known before a rank runs: requirements, unsupported settings and memory. Torch-free."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar, Protocol

from keepwarm.options import Component
from keepwarm.parallel.architecture import Architecture
from keepwarm.parallel.engine_registry import ENGINES
from keepwarm.parallel.errors import EngineUnavailable
from keepwarm.parallel.memory import RankEstimate, Workload
from keepwarm.parallel.mesh.layout import check_micro_batches
from keepwarm.parallel.spec import NumericsSpec, OptimizerSpec, ParallelSpec
from keepwarm.parallel.style import unequal
from keepwarm.registry import UnknownName, UnusableComponent
from keepwarm.tested import TESTED, installed


class Job(Protocol):
    """The sections of a job that an engine may reject; `keepwarm.trainer.job.spec.JobSpec` has them."""

    @property
    def model(self) -> Architecture: ...
    @property
    def parallel(self) -> ParallelSpec: ...
    @property
    def optimizer(self) -> OptimizerSpec: ...
    @property
    def numerics(self) -> NumericsSpec: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Requirement:
    """A distribution that an engine needs, in a version from `keepwarm.tested` (any version if it lists none)."""

    distribution: str
    install: str
    """The command that installs the distribution."""

    def problem(self) -> str | None:
        """Return why the distribution cannot be used and the command that fixes it, or None if it can."""
        found, tested = installed(self.distribution), TESTED.get(self.distribution)
        if found is None:
            return f"{self.distribution} is not installed: {self.install}"
        if tested is not None and found not in tested:
            return f"{self.distribution} {found} is installed, tested is {tested}: {self.install}"
        return None


MEGATRON_CORE = Requirement(distribution="megatron-core", install="pip install 'keepwarm[megatron]'")
"""Of two engines: megatron, and deepspeed for its tensor-parallel layers."""


class EngineInfo(Component, ABC):
    """One registered engine, constructed with the `parallel.options` of a job.

    Its module is imported wherever a job is read, including machines without torch. The engine itself, a
    `keepwarm.parallel.engine.Engine`, is a separate class that only the ranks that run it import.
    """

    engine: ClassVar[str]
    """Location of the engine class as "module:class"; the class is called with an `EngineConfig`."""
    requirements: ClassVar[tuple[Requirement, ...]] = ()
    in_process: ClassVar[bool] = False
    """Whether an engine can be closed after a failure and created again in the same process.

    This requires that it keeps no state in module globals."""

    foreign_layers: ClassVar[bool] = False
    """Whether the engine calls the layers of `ModelParts.build_stage` as they are, also those of transformers."""

    unequal_parts: ClassVar[bool] = False
    """Whether tensor ranks can hold unequal parts of the vocabulary, and copies of key-value heads."""

    def __init__(self, options: Any) -> None:
        """Store the options, an instance of `Options`."""
        self.options = options

    def refuses(self, job: Job) -> Iterator[str]:
        """Yield a line for each setting of the job that the engine does not support: key, reason and alternative."""
        yield from ()

    def lacks(self, job: Job) -> Iterator[str]:
        """Yield a line for each setting that what is installed here cannot run: key, reason and alternative.

        Unlike `refuses`, depends on this machine, and is asked where ranks are about to start.
        """
        yield from ()

    @classmethod
    def check_micro_batches(cls, count: int, parallel: ParallelSpec) -> None:
        """Raise LayoutError if a step cannot have `count` micro-batches on each data-parallel rank."""
        check_micro_batches(count, parallel)

    @classmethod
    def forms(cls, parallel: ParallelSpec, micro_batches: int) -> Iterator[ParallelSpec]:
        """Yield `parallel` with what it leaves to the plan decided in every possible way.

        The fastest comes first, and the one that needs the least memory last.
        """
        yield parallel

    @abstractmethod
    def memory(self, work: Workload) -> RankEstimate:
        """Return the maximum that any rank at one pipeline coordinate holds; used by the planner."""

    @classmethod
    def engine_class(cls) -> Any:
        """Import and return the engine class; importing its library can take many seconds."""
        module, _, name = cls.engine.partition(":")
        return getattr(import_module(module), name)


def engine_info(parallel: ParallelSpec) -> EngineInfo:
    """Return the information of the engine that a job names, constructed with the job's options."""
    return registered_engine(parallel.engine)(parallel.options)


def registered_engine(name: str) -> type[EngineInfo]:
    """Return the registered engine with this name.

    Raises:
        EngineUnavailable: no engine has this name, or it cannot be imported.
    """
    try:
        found = ENGINES.get(name)
    except (UnknownName, UnusableComponent) as error:
        raise EngineUnavailable(f"parallel.engine = {name}: {error}") from error
    if not issubclass(found, EngineInfo):
        raise EngineUnavailable(f"parallel.engine = {name}: {found.__name__} is no subclass of EngineInfo")
    return found


def require(job: Job) -> None:
    """Raise EngineUnavailable if what the job's engine needs here is missing, or has a version that cannot run the job
    or was not tested.
    """
    engine = engine_info(job.parallel)
    problems = [text for one in engine.requirements if (text := one.problem()) is not None]
    problems += engine.lacks(job)
    if problems:
        raise EngineUnavailable(f"parallel.engine = {job.parallel.engine}: " + "; ".join(problems))


def refusals(job: Job) -> list[str]:
    """Return one line for each setting of the job that its engine does not support: key, reason, alternative. Pure."""
    engine = engine_info(job.parallel)
    if not job.model.is_native and not engine.foreign_layers:
        reasons = ["model.transformers: it has layers of its own; set parallel.engine = torch"]
    else:
        reasons = list(engine.refuses(job))
    if not engine.unequal_parts:
        reasons += unequal(job.model.key_value_heads, job.model.vocabulary_size, job.parallel.tensor)
    return [f"parallel.engine = {job.parallel.engine}: {reason}" for reason in reasons]
