"""torch's elastic agent for one node: workers are forked by the fork server, ended at once and restarted together.

torch's own `LocalElasticAgent` starts interpreters that import for seconds, and gives workers half a minute to end;
after a failure there is nothing that they could still save. So this class implements the documented hooks of its base
`SimpleElasticAgent` instead, whose loop (rendezvous, start, monitor, restart) is used unchanged.
"""

import contextlib
import os
import signal
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch.distributed.elastic.agent.server.api import (
    RunResult,
    SimpleElasticAgent,
    WorkerGroup,
    WorkerSpec,
    WorkerState,
)

from keepwarm.exit_code import ExitCode
from keepwarm.launch.forkserver import ForkServer, Worker
from keepwarm.launch.node.hooks import Hooks
from keepwarm.launch.node.key_store.proxy import StoreProxy
from keepwarm.launch.node.options import LOOPBACK
from keepwarm.launch.node.rendezvous import SlotRendezvous
from keepwarm.launch.node.slot_table import Kind, survivors_are_reusable
from keepwarm.launch.rank_processes import FAILURE_GRACE_S, OutlivesKill, RankProcesses
from keepwarm.trainer.monitor.last_words import LAST_WORDS, BrokenGpu, Hang, LastWords, OnGpu, Word

MONITOR_INTERVAL_S = 0.03
"""How often workers are checked."""
UNLIMITED = 1 << 30
FINAL: dict[int, str] = {
    ExitCode.TRAINING_STOPPED: "training stopped itself",
    ExitCode.UNRECOVERABLE: "unrecoverable fault",
    ExitCode.STATE_NOT_SAVED: "the state could not be saved",
    ExitCode.INTERRUPTED: "interrupted",
}
"""Exit codes of a worker that end the run for all nodes."""


@dataclass(frozen=True, kw_only=True)
class WorkerOptions:
    """What the workers of a node run, in every restart."""

    module: str
    arguments: tuple[str, ...]
    logs: str
    """Folder of their logs."""
    ranks_per_node: int
    reusable: bool
    """Whether workers restart in the same process after others have died."""


class Explained(NamedTuple):
    """How a worker failed, for the slot table."""

    kind: Kind
    cause: str
    at_fault: tuple[int, ...] = ()
    """Of a hang: the ranks that the others wait for."""


def explain(rank: int, code: int, words: Sequence[Word]) -> Explained:
    """Return what the exit code of a worker means, given its last words. Pure.

    On GPUs SIGABRT is how NCCL's watchdog ends a rank whose collective takes too long, whichever rank is at fault.
    """
    for word in words:
        if isinstance(word, BrokenGpu):
            return Explained("gpu", f"rank {rank}: {word.text}")
    if code == -signal.SIGABRT and any(isinstance(word, OnGpu) for word in words):
        return Explained("hung", f"rank {rank} was ended by SIGABRT, as NCCL's watchdog does when a collective hangs")
    if code < 0:
        return Explained("killed", f"rank {rank} was ended by {signal.Signals(-code).name}")
    if code != ExitCode.HUNG:
        return Explained("failed", f"rank {rank} ended with exit code {code}")
    late = next((word.at_fault for word in words if isinstance(word, Hang)), ())
    waits = f": the others wait for {'rank' if len(late) == 1 else 'ranks'} {', '.join(map(str, late))}" if late else ""
    return Explained("hung", f"rank {rank} detected a hang{waits}", late)


class NodeAgent(SimpleElasticAgent):
    """Runs the workers of one node until the job is done, the handler ends the run, or a worker does."""

    def __init__(
        self, handler: SlotRendezvous, server: ForkServer, hooks: Hooks, options: WorkerOptions, secret: bytes
    ) -> None:  # fmt: skip
        # Ranks follow from slots: the same number of workers on every node.
        os.environ["TORCH_ELASTIC_WORKER_IDENTICAL"] = "1"
        spec = WorkerSpec(
            role="trainer", local_world_size=options.ranks_per_node, rdzv_handler=handler, entrypoint="trainer",
            max_restarts=UNLIMITED, monitor_interval=MONITOR_INTERVAL_S,
        )  # fmt: skip
        super().__init__(spec)
        self._handler, self._hooks, self._options = handler, hooks, options
        self._processes = RankProcesses(server)
        self._proxy = StoreProxy(secret, handler.membership.node, lambda: list(self._processes.pids.values()))
        self._last_words = [LastWords() for _ in range(options.ranks_per_node)]
        self._signals = self._forwarded = 0
        self.saving = self.on_disk = False
        """Workers were asked to hand over or save their state and end, so that the run can grow or a node can leave;
        and `on_disk`, to save it."""
        self._ended_at: float | None = None

    def close(self) -> None:
        self._proxy.close()

    # ---- hooks of the base class

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        options, store = self._options, self._handler.membership.record
        assert store is not None
        self._proxy.open((store.host, store.port), self._handler.restart)
        common = self._hooks.environment() | {
            "KEEPWARM_STORE": f"{LOOPBACK}:{self._proxy.port}",
            "MASTER_ADDR": LOOPBACK,
            "MASTER_PORT": str(self._proxy.port),
            "TORCHELASTIC_RESTART_COUNT": str(self._handler.restart),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RUN_ID": self._handler.get_run_id(),
            "GROUP_RANK": str(worker_group.group_rank),
            "LOCAL_WORLD_SIZE": str(options.ranks_per_node),
        }
        # One that has come since the rendezvous is passed on to these workers, too.
        self._ended_at, self._forwarded, self.saving = None, 0, False
        self.on_disk = False
        workers = {}
        for worker in worker_group.workers:
            rank, words = worker.global_rank, self._last_words[worker.local_rank]
            words.clear()
            own = {"RANK": rank, "LOCAL_RANK": worker.local_rank, "WORLD_SIZE": worker.world_size}
            workers[rank] = Worker(
                arguments=options.arguments,
                environment=common | {key: str(value) for key, value in own.items()} | {LAST_WORDS: words.path},
                log=f"{options.logs}/rank_{rank:05d}.log" if rank else None,
                module=options.module,
                reusable=options.reusable,
            )
        self._processes.start(workers)
        self._hooks.on_started(dict(self._processes.pids))
        return {worker.local_rank: self._processes.pids[worker.global_rank] for worker in worker_group.workers}

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        self._forward_signals()
        all_ended = self._processes.poll()
        self._hooks.poll()
        if self._processes.failures:
            self._report(*self._processes.failures[0])
            return RunResult(state=WorkerState.FAILED)
        if all_ended:
            return RunResult(state=WorkerState.SUCCEEDED, return_values=dict.fromkeys(self._processes.codes))
        return RunResult(state=WorkerState.FAILED if self._ended_elsewhere() else WorkerState.HEALTHY)

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        """Park the workers that can be resumed in the next restart; kill the others.

        They are dead when this returns, so that the slot's agent knows which processes may write. If one is not, this
        raises `OutlivesKill`, and the node leaves the run: its GPU may still be in use.
        """
        if survivors_are_reusable(self._handler.membership.read()):
            self._processes.park()
        self._processes.kill()

    def _shutdown(self, death_sig: signal.Signals = signal.SIGKILL, timeout: int = 30) -> None:
        with contextlib.suppress(OutlivesKill):  # raised before, or the run has ended
            self._processes.kill()
        with contextlib.suppress(OutlivesKill):
            self._processes.kill_parked()

    def _exit_barrier(self) -> None:
        """Wait for the workers of all nodes; the supervisor handles the outcome."""
        self._handler.finish()

    # ---- failures and signals

    def _report(self, rank: int, code: int) -> None:
        """Report the first failed worker to the other nodes: it ends the run, or begins a restart."""
        if code == ExitCode.INTERRUPTED and self._were_asked_for_state():
            self._processes.wait(FAILURE_GRACE_S)
            self._handler.on_saved(on_disk=self.on_disk)
        elif code in FINAL or (code == ExitCode.BAD_INPUT and self._handler.restart == 0):
            self._processes.wait(FAILURE_GRACE_S)
            self._handler.end(code, f"rank {rank}: {FINAL.get(code, 'bad input')} (exit code {code})")
        else:
            per_node = self._options.ranks_per_node
            kind, cause, at_fault = explain(rank, code, self._last_words[rank % per_node].read())
            self._fail(kind, cause, {other // per_node for other in at_fault})

    def _were_asked_for_state(self) -> bool:
        """Return whether the workers ended so that the run can grow or a node can leave, and not because it is to end.

        Ranks agree on a step at which all hand over their state. So those of this node may end because another node has
        asked its own, before this one has heard of it; it may even hear first that the others have begun to restart.
        """
        end = time.monotonic() + FAILURE_GRACE_S
        while not self.asked and self._handler.ended() is None:
            if self.saving or self._handler.num_nodes_waiting():
                return True
            if time.monotonic() > end:
                return False
            time.sleep(MONITOR_INTERVAL_S)
            self._hooks.poll()
        return False

    def _fail(self, kind: Kind, cause: str, at_fault: Collection[int]) -> None:
        first = self._handler.fail(kind, cause, at_fault)
        if first or kind in ("killed", "gpu"):
            self._hooks.on_failed(kind, cause)

    def _ended_elsewhere(self) -> bool:
        """Return whether the run has ended elsewhere and the workers here have had time to do the same."""
        if self._handler.ended() is None:
            return False
        self._ended_at = self._ended_at or time.monotonic()
        return time.monotonic() - self._ended_at > FAILURE_GRACE_S

    def save(self) -> None:
        """Ask the workers to save their state on disk and end; the next restart continues from there."""
        self.saving = self.on_disk = True
        self._processes.send(signal.SIGTERM)

    def hand_over(self) -> None:
        """Ask the workers to commit their state in memory and end; those that do not train yet ignore it."""
        self.saving = True
        self._processes.send(signal.SIGUSR2)

    def on_signal(self, number: int) -> None:
        """Count a signal: the first one asks the workers to save and end, a second Ctrl-C kills them.

        Other signals count once, since batch systems repeat them.
        """
        if not self._signals or number == signal.SIGINT:
            self._signals += 1

    @property
    def asked(self) -> bool:
        """Whether this process was asked to end."""
        return self._signals > 0

    def _forward_signals(self) -> None:
        if self._signals > self._forwarded:
            number = signal.SIGTERM if self._signals == 1 else signal.SIGKILL
            self._processes.send(number)
            if self._signals > 1:
                self._handler.end(ExitCode.INTERRUPTED, "interrupted")
            self._forwarded = self._signals
