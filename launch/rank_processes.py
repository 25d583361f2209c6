"""Rank processes that a supervisor runs through a fork server, kept across restarts."""

import signal
import time
from collections.abc import Mapping

from keepwarm.launch.forkserver import ForkServer, Worker

FAILURE_GRACE_S = 10.0
"""Time for the other ranks to exit on their own after one has failed: they may be about to report the same error."""
KILL_TIMEOUT_S = 30.0
"""Time for a killed process to die."""
_POLL_INTERVAL_S = 0.1


class RankProcesses:
    """Starts, signals, parks and kills processes by rank, and records the order in which they exit."""

    def __init__(self, server: ForkServer) -> None:
        self._server = server
        self.pids: dict[int, int] = {}
        """PIDs of the current start by rank, excluding parked processes."""
        self.codes: dict[int, int] = {}
        """Exit codes by rank in order of exit; negative for a signal."""
        self._parked: dict[int, int] = {}

    def start(self, workers: Mapping[int, Worker]) -> None:
        """Start workers by rank, reusing the parked process of a rank if there is one; kill the other parked ones."""
        self.pids, self.codes = {}, {}
        for rank, worker in workers.items():
            self.pids[rank] = self._server.start(worker, self._parked.pop(rank, None))
        self._kill(self._parked)

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
        """Kill the running ranks and wait until they are dead."""
        self.send(signal.SIGKILL)
        self.wait(KILL_TIMEOUT_S)

    def kill_parked(self) -> None:
        """Kill the parked processes and wait until they are dead."""
        self._kill(self._parked)

    def _kill(self, pids: dict[int, int]) -> None:
        self._server.send(list(pids.values()), signal.SIGKILL)
        end = time.monotonic() + KILL_TIMEOUT_S
        while any(pid not in self._server.ended for pid in pids.values()) and time.monotonic() < end:
            self._server.poll(_POLL_INTERVAL_S)
        pids.clear()
