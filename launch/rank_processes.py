"""The processes of the ranks that one supervisor runs through a fork server, from one restart to the next."""

import signal
import time
from collections.abc import Mapping

from keepwarm.launch.forkserver import ForkServer, Worker

FAILURE_GRACE_S = 10.0
"""How long the other ranks may take to end by themselves once one has failed: they may be about to report the same."""
KILL_TIMEOUT_S = 30.0
"""How long a killed process may take to die."""
_POLL_INTERVAL_S = 0.1


class RankProcesses:
    """Starts, signals, parks and kills processes by rank, and knows in which order they ended."""

    def __init__(self, server: ForkServer) -> None:
        self._server = server
        self.pids: dict[int, int] = {}
        """Of the current start, by rank; without those that are parked."""
        self.codes: dict[int, int] = {}
        """Exit codes by rank of those that have ended, first to last; negative for a signal."""
        self._parked: dict[int, int] = {}

    def start(self, workers: Mapping[int, Worker]) -> None:
        """Start workers by rank, each in the parked process of its rank if there is one; kill the other parked ones."""
        self.pids, self.codes = {}, {}
        for rank, worker in workers.items():
            self.pids[rank] = self._server.start(worker, self._parked.pop(rank, None))
        self._kill(self._parked)

    def poll(self, seconds: float = 0.0) -> bool:
        """Update `codes`, waiting at most `seconds` for a process to end; return whether all have ended."""
        self._server.poll(seconds)
        ended = {rank: self._server.ended[pid] for rank, pid in self.pids.items() if pid in self._server.ended}
        # Of those found together, the ones ended by a signal come first: they may have made the others fail.
        new = sorted(ended.keys() - self.codes.keys(), key=lambda rank: (ended[rank] >= 0, rank))
        self.codes |= {rank: ended[rank] for rank in new}
        return len(self.codes) == len(self.pids)

    @property
    def failures(self) -> list[tuple[int, int]]:
        """(rank, exit code) of those that did not end with 0, first to last."""
        return [(rank, code) for rank, code in self.codes.items() if code]

    def send(self, number: signal.Signals) -> None:
        """Signal every rank that still runs."""
        self._server.send(list(self.pids.values()), number)

    def wait(self, seconds: float) -> None:
        """Wait until all have ended, at most `seconds`."""
        end = time.monotonic() + seconds
        ended = self.poll()
        while not ended and time.monotonic() < end:
            ended = self.poll(_POLL_INTERVAL_S)

    def park(self) -> None:
        """Park the ranks that can be resumed in the next start; they are no longer part of this one."""
        parked = self._server.park([pid for rank, pid in self.pids.items() if rank not in self.codes])
        self._parked |= {rank: pid for rank, pid in self.pids.items() if pid in parked}
        self.pids = {rank: pid for rank, pid in self.pids.items() if pid not in parked}

    def kill(self) -> None:
        """Kill the ranks that still run, and wait until they are dead."""
        self.send(signal.SIGKILL)
        self.wait(KILL_TIMEOUT_S)

    def kill_parked(self) -> None:
        """Kill the parked processes, and wait until they are dead."""
        self._kill(self._parked)

    def _kill(self, pids: dict[int, int]) -> None:
        self._server.send(list(pids.values()), signal.SIGKILL)
        end = time.monotonic() + KILL_TIMEOUT_S
        while any(pid not in self._server.ended for pid in pids.values()) and time.monotonic() < end:
            self._server.poll(_POLL_INTERVAL_S)
        pids.clear()
