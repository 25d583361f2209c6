"""torch's elastic agent for one node: workers forked from the nursery, ended at once, started again by rounds.

torch's own `LocalElasticAgent` starts interpreters that import for seconds and ends workers politely, with half a
minute of patience; after a failure nothing that they could still save is wanted. So this fills in the documented
hooks of `SimpleElasticAgent`, its base, whose loop (rendezvous, start, monitor, restart) is used as it is.
"""

import os
import signal
import time
from abc import ABC, abstractmethod
from typing import Any

from torch.distributed.elastic.agent.server.api import (
    RunResult,
    SimpleElasticAgent,
    WorkerGroup,
    WorkerSpec,
    WorkerState,
)

from keepwarm.exit_code import ExitCode
from keepwarm.launch.forkserver import FAILURE_GRACE_S, KILL_TIMEOUT_S, Nursery, Worker
from keepwarm.launch.node.rendezvous import SlotRendezvous
from keepwarm.launch.node.slot_table import Kind, workers_are_sound

MONITOR = 0.03
"""Seconds between two looks at the workers."""
UNLIMITED = 1 << 30
FINAL: dict[int, str] = {
    ExitCode.TRAINING_STOPPED: "training stopped itself",
    ExitCode.UNRECOVERABLE: "a fault that could not be recovered",
    ExitCode.INTERRUPTED: "interrupted",
}
"""Exit codes of a worker that end the run for all."""


class Plan(ABC):
    """What the workers of a node are told, and what is told of them; the supervisor fills it in."""

    def __init__(
        self, module: str, arguments: tuple[str, ...], logs: str, ranks_per_node: int, *, stay: bool
    ) -> None:  # fmt: skip
        """`stay`: workers begin again in the same process when others have died."""
        self.module, self.arguments, self.logs, self.ranks_per_node = module, arguments, logs, ranks_per_node
        self.stay = stay

    @abstractmethod
    def environment(self, handler: SlotRendezvous) -> dict[str, str]:
        """Variables of every worker of the round that begins; ranks come on top."""

    @abstractmethod
    def started(self, workers: dict[int, int]) -> None:
        """Workers run; pid by rank."""

    @abstractmethod
    def failed(self, kind: Kind, cause: str) -> None:
        """A worker failed, and not because of another one as far as anyone knows."""

    @abstractmethod
    def look(self) -> None:
        """Called between two looks at the workers."""


class NodeAgent(SimpleElasticAgent):
    """Runs the workers of one node until their job is done, `handler` says otherwise or one of them ends the run."""

    def __init__(self, handler: SlotRendezvous, nursery: Nursery, plan: Plan) -> None:
        # Ranks follow from slots: the same number of workers on every node.
        os.environ["TORCH_ELASTIC_WORKER_IDENTICAL"] = "1"
        spec = WorkerSpec(
            role="trainer", local_world_size=plan.ranks_per_node, rdzv_handler=handler, entrypoint="trainer",
            max_restarts=UNLIMITED, monitor_interval=MONITOR,
        )  # fmt: skip
        super().__init__(spec)
        self._handler, self._nursery, self._plan = handler, nursery, plan
        self._pids: dict[int, int] = {}
        """By local rank."""
        self._resting: dict[int, int] = {}
        """Workers of the last round that can begin the next one, by rank."""
        self._signals = self._forwarded = 0
        self.saving = False
        """Workers were asked to save their state and end, so that a round of more slots can begin."""
        self._ended_at: float | None = None

    # ---- hooks

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        common = self._plan.environment(self._handler) | {
            "MASTER_ADDR": str(worker_group.master_addr),
            "MASTER_PORT": str(worker_group.master_port),
            "TORCHELASTIC_RESTART_COUNT": str(self._handler.round),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RUN_ID": self._handler.get_run_id(),
            "GROUP_RANK": str(worker_group.group_rank),
            "LOCAL_WORLD_SIZE": str(self._plan.ranks_per_node),
        }
        self._pids, self._ended_at, self._forwarded, self.saving = {}, None, self._signals, False
        by_rank = {}
        for worker in worker_group.workers:
            own = {"RANK": worker.global_rank, "LOCAL_RANK": worker.local_rank, "WORLD_SIZE": worker.world_size}
            log = f"{self._plan.logs}/rank_{worker.global_rank:05d}.log" if worker.global_rank else None
            order = Worker(
                arguments=self._plan.arguments,
                environment=common | {key: str(value) for key, value in own.items()},
                log=log,
                module=self._plan.module,
                stays=self._plan.stay,
            )
            pid = self._nursery.start(order, self._resting.pop(worker.global_rank, None))
            self._pids[worker.local_rank] = by_rank[worker.global_rank] = pid
        self._shut(self._resting)  # of a slot that this node has no more
        self._plan.started(by_rank)
        return dict(self._pids)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        self._forward()
        self._nursery.poll()
        self._plan.look()
        codes = {
            worker.global_rank: self._nursery.ended[pid]
            for worker in worker_group.workers
            if (pid := self._pids[worker.local_rank]) in self._nursery.ended
        }
        failed = {rank: code for rank, code in codes.items() if code}
        if not failed:
            if len(codes) == len(self._pids):
                return RunResult(state=WorkerState.SUCCEEDED, return_values=dict.fromkeys(codes))
            return RunResult(state=WorkerState.FAILED if self._too_late() else WorkerState.HEALTHY)
        self._report(failed)
        return RunResult(state=WorkerState.FAILED)

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        """Have those come to rest that can begin the next round; the others are killed."""
        rank_of = {self._pids[one.local_rank]: one.global_rank for one in worker_group.workers if self._pids}
        sound = workers_are_sound(self._handler.membership.read())
        resting = self._nursery.halt(list(rank_of)) if sound else set()
        self._resting |= {rank_of[pid]: pid for pid in resting}
        self._pids = {local: pid for local, pid in self._pids.items() if pid not in resting}
        self._shut(self._pids)

    def _shutdown(self, death_sig: signal.Signals = signal.SIGKILL, timeout: int = 30) -> None:
        self._shut(self._pids)
        self._shut(self._resting)

    def _shut(self, pids: dict[int, int]) -> None:
        """Kill workers and wait until they are dead: their slot's agent then knows who may write."""
        alive = [pid for pid in pids.values() if pid not in self._nursery.ended]
        self._nursery.send(alive, signal.SIGKILL)
        end = time.monotonic() + KILL_TIMEOUT_S
        while any(pid not in self._nursery.ended for pid in alive) and time.monotonic() < end:
            self._nursery.poll(0.1)
        pids.clear()

    def _exit_barrier(self) -> None:
        """Wait for the workers of all nodes; the supervisor looks at what came of it."""
        self._pids = {}
        self._handler.finish()

    # ---- inside

    def _report(self, failed: dict[int, int]) -> None:
        """Say what happened to the first worker that failed by itself: for the run, or for the round."""
        rank, code = min(failed.items(), key=lambda item: (item[1] >= 0, item[0]))
        if code < 0:
            self._fail("killed", f"rank {rank} was ended by {signal.Signals(-code).name}")
        elif code == ExitCode.INTERRUPTED and self.saving and not self.asked:
            self._wait_for_others()
            self._handler.saved()
        elif code in FINAL or (code == ExitCode.BAD_INPUT and self._handler.round == 0):
            self._wait_for_others()
            self._handler.end(code, f"rank {rank}: {FINAL.get(code, 'bad input')} (exit code {code})")
        else:
            hung = code == ExitCode.HUNG
            what = "saw that training hangs" if hung else f"ended with exit code {code}"
            self._fail("hung" if hung else "failed", f"rank {rank} {what}")

    def _fail(self, kind: Kind, cause: str) -> None:
        first = self._handler.fail(kind, cause)
        if first or kind == "killed":
            self._plan.failed(kind, cause)

    def _wait_for_others(self) -> None:
        end = time.monotonic() + FAILURE_GRACE_S
        while any(pid not in self._nursery.ended for pid in self._pids.values()) and time.monotonic() < end:
            self._nursery.poll(0.1)

    def _too_late(self) -> bool:
        """Whether the run has ended elsewhere and the workers here have had their time to do the same."""
        if self._handler.ended() is None:
            return False
        self._ended_at = self._ended_at or time.monotonic()
        return time.monotonic() - self._ended_at > FAILURE_GRACE_S

    def save(self) -> None:
        """Ask the workers to save their state and end; the next round goes on from there."""
        self.saving = True
        self._nursery.send(list(self._pids.values()), signal.SIGTERM)

    def signalled(self, number: int) -> None:
        """For a signal handler: the first one asks the workers to save and end, a second Ctrl-C kills them.

        Of other signals there may be several without anybody's insisting: batch systems repeat themselves.
        """
        if not self._signals or number == signal.SIGINT:
            self._signals += 1

    @property
    def asked(self) -> bool:
        """This process was asked to end."""
        return self._signals > 0

    def _forward(self) -> None:
        if self._signals > self._forwarded:
            number = signal.SIGTERM if self._signals == 1 else signal.SIGKILL
            self._nursery.send(list(self._pids.values()), number)
            if self._signals > 1:
                self._handler.end(ExitCode.INTERRUPTED, "interrupted")
            self._forwarded = self._signals
