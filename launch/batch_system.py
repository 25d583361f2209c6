"""What keepwarm's commands need of a batch system, and the registry of batch systems. Torch-free.

`submit`, `runs`, `watch`, `logs`, `cancel` and `requeue` know `BatchSystem` alone. To add one, subclass it in a package
of its own and name the class in the entry-point group `keepwarm.batch_systems`; docs/clusters.md has an example.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import BaseModel

from keepwarm.launch.errors import ClusterError
from keepwarm.launch.run.prepare import Mode
from keepwarm.registry import Registry, UnknownName, UnusableComponent
from keepwarm.trainer.job.spec import JobSpec

Phase = Literal["pending", "running", "ended"]
"""A pending job is waiting for nodes, being set up or torn down, or suspended."""


@dataclass(frozen=True, kw_only=True)
class Array:
    """Runs that are submitted together, in the folders 0, 1... below one."""

    members: int
    max_parallel: int | None = None
    """How many of them run at the same time; None: as many as there is room for."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """A job that is to be submitted."""

    job: JobSpec
    folder: Path
    """Run folder; of an array, the folder that holds the run folders."""
    mode: Mode = "new"
    chain: int = 1
    """Jobs that continue one another."""
    array: Array | None = None


@dataclass(frozen=True, kw_only=True)
class BatchJob:
    """A job as its batch system knows it."""

    id: str
    phase: Phase
    state: str
    """The batch system's own word, in lower case."""
    reason: str = ""
    """Why it is in this state, if the batch system says so."""
    nodes: str = ""
    restarts: int = 0
    """How often the batch system put it back into the queue."""
    run_time: str = ""
    time_limit: str = ""

    @property
    def active(self) -> bool:
        """Whether it has not ended."""
        return self.phase != "ended"


class BatchSystem(ABC):
    """A batch system. Stateless: each command makes one, perhaps on another machine than the last.

    All methods raise ClusterError if the batch system is absent, does not answer or refuses. What a class does not
    override is refused in one sentence.
    """

    name: ClassVar[str]
    """As registered; `cluster.NAME` of the job holds its options."""
    title: ClassVar[str]
    """Its name in sentences."""
    options: ClassVar[type[BaseModel]]
    """Class of `cluster.NAME`."""
    script: ClassVar[str] = "job.sh"
    """File in the run folder that the rendered text is written to."""
    sees_files: ClassVar[bool] = True
    """Whether the job's data and output lie where the submitting machine sees them."""
    has_chains: ClassVar[bool] = False
    has_arrays: ClassVar[bool] = False

    @abstractmethod
    def check(self, request: Request, *, dry_run: bool) -> list[str]:
        """Raise ClusterError, naming the key or option, if this can never run; return remarks for the user.

        Writes nothing. With `dry_run`, the absence of the batch system is a remark.
        """

    @abstractmethod
    def render(self, request: Request) -> str:
        """The script or manifest. Pure. Raises SpecError, naming the key, if an option is missing or does not fit."""

    def command(self, request: Request) -> list[str]:
        """The command that submits the script, to be shown by a dry run; empty if there is none."""
        return []

    def stage(self, request: Request, folder: Path) -> list[str]:
        """Prepare what the job needs beside its script; return remarks for the user.

        `folder` is the run folder, of an array that of its first run. The script and `run.json` are written.
        """
        return []

    def submit(self, request: Request) -> str:
        """Submit the script; return the job's ID. Called once for each link of a chain, once for an array."""
        raise self._refusal("submit")

    def member(self, job_id: str, index: int) -> str:
        """The ID of one run of an array."""
        return f"{job_id}_{index}"

    def state(self, job_id: str) -> BatchJob | None:
        """The job, or None once the batch system has forgotten it."""
        raise self._refusal("runs")

    def cancel(self, job: BatchJob, *, now: bool) -> None:
        """End a job that is active: after the current step and with its state saved, or `now`."""
        raise self._refusal("cancel")

    def requeue(self, job: BatchJob, *, now: bool) -> None:
        """Put a running job back into the queue: after the current step and with its state saved, or `now`."""
        raise self._refusal("requeue")

    def logs(self, folder: Path) -> list[Path]:
        """The logs of a run's jobs. Those of its ranks and nodes lie beside them under names that keepwarm gives."""
        return list((folder / "logs").glob(f"{self.name}-*.log"))

    def advice(self, job: JobSpec, command: str) -> str | None:
        """What to do instead of `keepwarm COMMAND` for a run that was started by other means; None if unknown."""
        return None

    def _refusal(self, command: str) -> ClusterError:
        return ClusterError(f"keepwarm {command} is not possible with {self.title}")


BATCH_SYSTEMS: Registry[type[BatchSystem]] = Registry(
    "batch system",
    "keepwarm.batch_systems",
    {"slurm": "keepwarm.launch.slurm.system:Slurm", "kubernetes": "keepwarm.launch.kubernetes:Kubernetes"},
    BatchSystem,
)


def batch_system(name: str) -> BatchSystem:
    """Raises ClusterError if there is none of this name, or it cannot be imported."""
    try:
        return BATCH_SYSTEMS.get(name)()
    except (UnknownName, UnusableComponent) as error:
        raise ClusterError(str(error)) from error
