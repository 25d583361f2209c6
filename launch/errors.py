"""Errors of `launch`, each with the exit code of the command.

LaunchError
├── PreflightError       2  this machine or installation cannot run the job
├── SearchError          2  no layout of a job fits on the given GPUs
├── SimulationError      2  input that the simulator cannot handle
├── SnapshotsError       2  no snapshot agent can be reached
├── StatusError          2  the folder holds no run
├── DrainError         1,2  a node cannot leave the run, or has not in time
├── DrillError           2  a fault that does not apply to the job, or a drill that could not be carried out
├── ClusterError         2  a batch system cannot be queried, or cannot provide what the job requests
├── OptionError          2  conflicting command-line options
├── OutlivesKill         4  a process is still there long after SIGKILL
└── RanksFailed    2,3,4,6  a rank exited before the job was done; the code is the rank's own
"""

from keepwarm.exit_code import ExitCode


class LaunchError(Exception):
    """Base class of this package's errors; the message tells the user what to do next."""

    exit_code: int = ExitCode.BAD_INPUT


class PreflightError(LaunchError):
    """A prerequisite of the job is not met; raised before anything is started."""


class SearchError(LaunchError):
    """No layout of a job fits on the given GPUs, or the job cannot be planned; says why and what to change."""


class SimulationError(LaunchError):
    """A cluster, duration or file cannot be simulated; names the option, or the file and line."""


class SnapshotsError(LaunchError):
    """No agent of the run can be reached; names the run folder."""


class StatusError(LaunchError):
    """The folder holds no run; names the folder."""


class DrainError(LaunchError):
    """A node cannot leave the run; says why. If it has not in time, says who waits for whom."""

    def __init__(self, message: str, *, late: bool = False) -> None:
        super().__init__(message)
        self.exit_code = ExitCode.FAULT if late else ExitCode.BAD_INPUT


class DrillError(LaunchError):
    """A drill's fault is invalid or could not be injected; quotes it as the user wrote it."""


class ClusterError(LaunchError):
    """A batch system is absent, unresponsive or refuses; names the key or command. Nothing was submitted."""


class OptionError(LaunchError):
    """Options of a command conflict; names them. Nothing was started."""


class RanksFailed(LaunchError):
    """A rank exited before the job was done; names the rank and its log."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code
