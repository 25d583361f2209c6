"""Rank processes that a supervisor runs through a fork server, kept across restarts."""

import signal
import time
from collections.abc import Mapping

from keepwarm.exit_code import ExitCode
from keepwarm.launch.errors import LaunchError
from keepwarm.launch.forkserver import ForkServer, Worker

FAILURE_GRACE_S = 10.0
"""Time for the other ranks to exit on their own after one has failed: they may be about to report the same error."""
KILL_TIMEOUT_S = 60.0
"""Time for a killed process to die. Its memory is freed, and unlocked for GPUs, before it is dead."""
_POLL_INTERVAL_S = 0.1


class OutlivesKill(LaunchError):
    """A process is still there long after SIGKILL: it waits in the kernel, as for a GPU that does not answer.

    It may hold the GPU and the memory of its rank, so that no other process may take its place on this machine.
    """

    exit_code = ExitCode.UNRECOVERABLE


class RankProcesses:
    """Starts, signals, parks and kills processes by rank, and records the order in which they exit."""

    def __init__(self, server: ForkServer) -> None:
        self._server = server
        self.pids: dict[int, int] = {}
        """PIDs of the current start by rank, excluding parked processes."""
        self.codes: dict[int, int] = {}
        """Exit codes by rank in order of exit; negative for a signal."""
        self._parked: dict[int, int] = {}
        self._undead: set[int] = set()
        """Processes that have outlived SIGKILL; nothing waits for them twice."""

    def start(self, workers: Mapping[int, Worker]) -> None:
        """Start workers by rank, reusing the parked process of a rank if there is one; kill the other parked ones.

        Raises:
            OutlivesKill: a killed process of this machine is still there.
        """
        self._raise_undead()
        self.pids, self.codes = {}, {}
        for rank, worker in workers.items():
            self.pids[rank] = self._server.start(worker, self._parked.pop(rank, None))
        self.kill_parked()

    def poll(self, seconds: float = 0.0) -> bool:
        """Update `codes`, waiting at most `seconds` for an exit; return whether all processes have exited."""
        self._server.poll(seconds)
        ended = {rank: self._server.ended[pid] for rank, pid in self.pids.items() if pid in self._server.ended}
        # Among exits seen in one poll, those by signal come first: they may have caused the others.
        new = sorted(ended.keys() - self.codes.keys(), key=lambda rank: (ended[rank] >= 0, rank))
        self.codes |= {rank: ended[rank] for rank in new}
        return len(self.codes) == len(self.pids)

    @property
    def failures(self) -> list[tuple[int, int]]:
        """Return (rank, exit code) of each nonzero exit, in order of exit."""
        return [(rank, code) for rank, code in self.codes.items() if code]

    def send(self, number: signal.Signals) -> None:
        """Signal every running rank."""
        self._server.send(list(self.pids.values()), number)

    def wait(self, seconds: float) -> None:
        """Wait until all processes have exited, at most `seconds`."""
        end = time.monotonic() + seconds
        ended = self.poll()
        while not ended and time.monotonic() < end:
            ended = self.poll(_POLL_INTERVAL_S)

    def park(self) -> None:
        """Park the ranks that the next start can resume, and remove them from this one."""
        parked = self._server.park([pid for rank, pid in self.pids.items() if rank not in self.codes])
        self._parked |= {rank: pid for rank, pid in self.pids.items() if pid in parked}
        self.pids = {rank: pid for rank, pid in self.pids.items() if pid not in parked}

    def kill(self) -> None:
        """Kill the running ranks and wait until they are dead.

        Raises:
            OutlivesKill: one of them is not, after KILL_TIMEOUT_S.
        """
        self._kill(self.pids)
        self.poll()

    def kill_parked(self) -> None:
        """Kill the parked processes and wait until they are dead; raises as `kill`."""
        parked, self._parked = self._parked, {}
        self._kill(parked)

    def _kill(self, pids: Mapping[int, int]) -> None:
        self._server.send(list(pids.values()), signal.SIGKILL)
        end = time.monotonic() + KILL_TIMEOUT_S
        while (left := self._alive(pids)) - self._undead and time.monotonic() < end:
            self._server.poll(_POLL_INTERVAL_S)
        self._undead |= left
        self._raise_undead()

    def _alive(self, pids: Mapping[int, int]) -> set[int]:
        return set(pids.values()) - self._server.ended.keys()

    def _raise_undead(self) -> None:
        self._undead -= self._server.ended.keys()
        if self._undead:
            pids = ", ".join(map(str, sorted(self._undead)))
            raise OutlivesKill(
                f"process {pids} is still there {KILL_TIMEOUT_S:g} s after SIGKILL, as one that waits for a GPU that "
                "does not answer: no other process may use its GPU. Restart the machine before it takes part again"
            )
