"""What can go wrong in `launch`, each with the exit code that the command ends with.

LaunchError
├── PreflightError       2  this machine or installation cannot run the job
├── SimulationError      2  a question that the simulator cannot answer
├── SnapshotsError       2  there are no agents to ask about snapshots
├── StatusError          2  there is no run to tell about
├── DrillError           2  a fault that cannot happen to the job, or a drill that could not be carried out
├── ClusterError         2  a batch system cannot be asked, or cannot give what the job asks for
├── OptionError          2  options of a command contradict each other
└── RanksFailed      2,3,4  a rank ended before the job was done; the code is the rank's own
"""

from keepwarm.exit_code import ExitCode


class LaunchError(Exception):
    """Base of every error raised by this package; the message says what to do next."""

    exit_code: int = ExitCode.BAD_INPUT


class PreflightError(LaunchError):
    """Something the job needs is missing or in the way, found before anything was started."""


class SimulationError(LaunchError):
    """A cluster, a time or a file that cannot be simulated; names the option or the file and the line."""


class SnapshotsError(LaunchError):
    """No agent of the run can be asked; names the run folder."""


class StatusError(LaunchError):
    """There is no run in a folder; names it."""


class DrillError(LaunchError):
    """A fault of a drill that makes no sense or could not be done; names it as it was written."""


class ClusterError(LaunchError):
    """A batch system is absent, does not answer or refuses; names the key or the command. Nothing was submitted."""


class OptionError(LaunchError):
    """Options of a command contradict each other; names them. Nothing was started."""


class RanksFailed(LaunchError):
    """A rank ended before the job was done; names the rank and its log."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code
