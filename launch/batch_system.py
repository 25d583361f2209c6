"""Interface and registry of batch systems. Torch-free.

`submit`, `runs`, `watch`, `logs`, `cancel` and `requeue` depend on `BatchSystem` alone. To add a batch system, subclass
it in your own package and list the class in the entry-point group `keepwarm.batch_systems`; docs/clusters.md has an
example.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import BaseModel

from keepwarm.launch.errors import ClusterError
from keepwarm.launch.run.prepare import Mode
from keepwarm.registry import Registry, UnknownName, UnusableComponent
from keepwarm.trainer.job.run_folder import RunFolder
from keepwarm.trainer.job.spec import JobSpec

Phase = Literal["pending", "running", "ended"]
"""A pending job is waiting for nodes, being set up or torn down, or suspended."""


@dataclass(frozen=True, kw_only=True)
class Array:
    """Runs submitted together, in the subfolders 0, 1... of one folder."""

    members: int
    max_parallel: int | None = None
    """Maximum number of concurrent runs; None for no limit."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """A job to submit."""

    job: JobSpec
    folder: Path
    """Run folder; for an array, the folder that holds the run folders."""
    mode: Mode = "new"
    chain: int = 1
    """Number of consecutive jobs, each continuing the previous one."""
    after: str | None = None
    """ID of the previous job of a chain, which must have ended before this one starts."""
    array: Array | None = None
    probe: bool = False
    """Whether to ask a node beforehand what only a node knows, at the price of a short allocation."""

    @property
    def spec(self) -> Path:
        """Argument of `python -P -m keepwarm.trainer`; names `run.json`, and on resuming the changes that wait for the
        job, if there are any.
        """
        return RunFolder(self.folder).submitted_file if self.mode == "resume" else RunFolder(self.folder).run_file


@dataclass(frozen=True, kw_only=True)
class BatchJob:
    """A job as reported by its batch system."""

    id: str
    phase: Phase
    state: str
    """State in the batch system's own terms, in lower case."""
    reason: str = ""
    """Reason for the state, if the batch system gives one."""
    nodes: str = ""
    restarts: int = 0
    """How often the batch system has requeued the job."""
    run_time: str = ""
    time_limit: str = ""
    exit_code: int | None = None
    """Exit code of an ended job, if the batch system gives one; docs/reference.md lists those of keepwarm."""

    @property
    def active(self) -> bool:
        """Return whether the job has not ended."""
        return self.phase != "ended"


class BatchSystem(ABC):
    """A batch system. Stateless: each command creates an instance, possibly on a different machine.

    All methods raise ClusterError if the batch system is absent, unresponsive or refuses. So do `submit`, `state`,
    `cancel` and `requeue` of a subclass that does not override them.
    """

    name: ClassVar[str]
    """Registered name; the job's section `cluster.NAME` holds the options."""
    title: ClassVar[str]
    """Name used in messages."""
    Options: ClassVar[type[BaseModel]]
    """Class of the job's section `cluster.NAME`."""
    script: ClassVar[str] = "job.sh"
    """Name of the rendered file in the run folder."""
    sees_files: ClassVar[bool] = True
    """Whether the submitting machine sees the job's data and output."""
    has_chains: ClassVar[bool] = False
    has_arrays: ClassVar[bool] = False

    def completed(self, jobs: Sequence[JobSpec], *, dry_run: bool) -> list[JobSpec]:
        """Return jobs that are submitted together with the options that they leave to the batch system, the source of
        each in `cluster.sources`. With `dry_run`, an absent batch system leaves them as they are.
        """
        return list(jobs)

    @abstractmethod
    def check(self, request: Request, *, dry_run: bool) -> list[str]:
        """Raise ClusterError, naming the key or option, if the request can never run; return remarks for the user.

        Writes nothing. With `dry_run`, an absent batch system is a remark.
        """

    @abstractmethod
    def render(self, request: Request) -> str:
        """Return the script or manifest. Pure. Raises SpecError, naming the key, if an option is missing or invalid."""

    def command(self, request: Request) -> list[str]:
        """Return the command that submits the script, for a dry run to show; empty if there is none."""
        return []

    def stage(self, request: Request, folder: Path) -> list[str]:
        """Prepare what the job needs besides its script; return remarks for the user.

        `folder` is the run folder or, for an array, that of its first run. The script and `run.json` already exist.
        """
        return []

    def submit(self, request: Request) -> str:
        """Submit the script; return the job's ID. Called once for each link of a chain, once for an array."""
        raise self._refusal("submit")

    def member(self, job_id: str, index: int) -> str:
        """Return the ID of one run of an array."""
        return f"{job_id}_{index}"

    def state(self, job_id: str) -> BatchJob | None:
        """Return the job, or None if the batch system has forgotten it."""
        raise self._refusal("runs")

    def cancel(self, job: BatchJob, *, now: bool) -> None:
        """End an active job: after the current step and with its state saved, or immediately if `now`."""
        raise self._refusal("cancel")

    def requeue(self, job: BatchJob, *, now: bool) -> bool | None:
        """Requeue a running job: after the current step and with its state saved, or immediately if `now`.

        Return False if it is requeued immediately because nothing trains in it.
        """
        raise self._refusal("requeue")

    def logs(self, folder: Path) -> list[Path]:
        """Return the logs of a run's jobs. keepwarm itself names the logs of ranks and nodes."""
        return list((folder / "logs").glob(f"{self.name}-*.log"))

    def advice(self, job: JobSpec, command: str) -> str | None:
        """Return advice in place of `keepwarm COMMAND` for a run started by other means; None if unknown."""
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
    """Return the batch system of a name. Raises ClusterError if it is not registered or cannot be imported."""
    try:
        return BATCH_SYSTEMS.get(name)()
    except (UnknownName, UnusableComponent) as error:
        raise ClusterError(str(error)) from error
