"""Supervise the snapshot agent of a node's slot: start it before workers need it, and begin epochs."""

import contextlib
import time
from pathlib import Path

import msgspec

from keepwarm.files import await_readable
from keepwarm.ft.discovery import config as agent_config
from keepwarm.ft.discovery.config import AgentConfig, runtime_folder
from keepwarm.ft.discovery.registry import TEMPLATE_FILE, Registry, agents_folder
from keepwarm.ft.discovery.status import Status
from keepwarm.ft.errors import AgentError, FtError
from keepwarm.ft.memory.shared_memory import Holder, started_at
from keepwarm.ft.protocol.state import Mode
from keepwarm.ft.transport.auth import SECRET, load_secret, run_identity
from keepwarm.ft.worker.client import AgentClient, ensure_agent, start_agent

ANSWER_TIMEOUT_S = 5.0
STORAGE_TIMEOUT_S = 120.0
"""How long this node waits for storage that it needs to start an agent."""
STORAGE_POLL_INTERVAL_S = 0.5
CLEANUP_S = 0.5
"""After this time an agent that ended by itself has cleaned up."""


class SnapshotAgent:
    """One slot's agent on this node. Not thread-safe."""

    def __init__(self, folder: Path, host: str, generation: int = 0) -> None:
        """Create the link to an agent of a run's layout, counted from 0."""
        self._folder, self._host, self.generation = folder, host, generation
        self._template = agents_folder(folder, generation) / TEMPLATE_FILE
        self._client: AgentClient | None = None
        self._slot: int | None = None
        self.pid: int | None = None
        self._keeper: Holder | None = None
        self._lost = False
        """The agent has died and its keeper is to start it again."""
        self._gone_at: float | None = None
        self._start_again = False
        """It could not be started, because a file could not be written."""
        self._epoch = 0
        """The last one that this node has begun."""

    def take(self, slot: int) -> None:
        """Set the slot of this node."""
        self._slot = slot

    @property
    def slot(self) -> int | None:
        """The slot of this node in the layout of this agent."""
        return self._slot

    def ensure(self) -> None:
        """Start the slot's agent unless it runs, and connect; do nothing before workers have reported its size.

        Raises:
            MemoryTooSmall, AgentError: this node cannot take the slot.
        """
        end = time.monotonic() + STORAGE_TIMEOUT_S
        while True:
            try:
                if (config := self._config()) is not None:
                    ensure_agent(config)
                    self.poll()
                return
            except OSError as error:
                if time.monotonic() > end:
                    raise AgentError(
                        f"waited {STORAGE_TIMEOUT_S:g} s to start the agent of slot {self._slot}: {error}"
                    ) from error
                time.sleep(STORAGE_POLL_INTERVAL_S)

    @property
    def keeper(self) -> int | None:
        """The process that holds the memory, as far as is known."""
        return None if self._keeper is None else self._keeper.pid

    def restart(self) -> None:
        """Start the slot's agent again without waiting: workers may depend on it before it is ready.

        Do nothing while its keeper lives, which does so itself.
        """
        self._start_again = False
        if self._keeper is not None and self._keeper.alive:
            return
        try:
            if (config := self._config()) is not None:
                start_agent(config)
        except OSError:
            self._start_again = True

    def _config(self) -> AgentConfig | None:
        """Return the configuration of the slot's agent; None before workers have reported its size.

        Raises OSError, and `AgentError` if the slot is not part of the layout that workers reported.
        """
        assert self._slot is not None
        template = self._template
        if not template.is_file():
            return None
        try:
            config = msgspec.json.decode(template.read_bytes(), type=AgentConfig)
            folder = str(runtime_folder(config.run, self._slot, self.generation))
            return msgspec.structs.replace(config, slot=self._slot, host=self._host, folder=folder)
        except ValueError as error:
            raise AgentError(
                f"{template}: describes the agents of another layout, or is damaged; it has no agent for slot "
                f"{self._slot}: {error}"
            ) from error

    def poll(self) -> str:
        """Connect to the agent if there is no connection, as workers may start one too.

        Return what has happened to it if it has died, else nothing.
        """
        if self._client is not None and self._client.gone:
            self._disconnect()
            self._gone_at = time.monotonic()
        if self._start_again:
            self.restart()
        said = ""
        if self._gone_at is not None and time.monotonic() - self._gone_at > CLEANUP_S and self._slot is not None:
            # An agent that ends with its job removes its address.
            self._gone_at = None
            kept = self._keeper is not None and self._keeper.alive
            if self._published(self._slot):
                said = "has died; its memory is kept" if kept else "has died with its memory"
                self._lost = kept and self._client is None
        if self._lost and self._slot is not None and (self._keeper is None or not self._keeper.alive):
            self._lost = False
            if self._published(self._slot):
                said = "has died again and again; its memory is given up"
        if self._client is None and self._slot is not None:
            with contextlib.suppress(FtError, OSError):
                self._connect(self._slot)
        return said and f"the snapshot agent of slot {self._slot} {said}"

    def _published(self, slot: int) -> bool:
        with contextlib.suppress(OSError):
            return Registry(self._folder, self.generation).endpoint(slot) is not None
        return True

    def _connect(self, slot: int) -> None:
        if not (self._folder / SECRET).exists():
            return
        secret = load_secret(self._folder / SECRET)
        run = run_identity(secret)
        socket = runtime_folder(run, slot, self.generation) / agent_config.SOCKET
        if not socket.exists():
            return
        client = AgentClient(socket, run=run, secret=secret, worker=slot, role="supervisor", deadline=ANSWER_TIMEOUT_S)
        try:
            status = client.status(ANSWER_TIMEOUT_S)
            started = started_at(status.keeper)
        except FtError:
            client.close()
            raise
        if self._keeper is None or self._keeper.pid != status.keeper:
            self._release()
            self._keeper = None if started is None else Holder.found(status.keeper, started)
        self._client, self.pid, self._lost = client, status.pid, False

    def begin_epoch(self) -> int | None:
        """Have all agents decide now what to restore; return the epoch of that decision, None if no agent runs yet."""
        if self._client is None or self._client.gone:
            return None
        with contextlib.suppress(FtError):
            newest = max(self._epoch, self._client.status(ANSWER_TIMEOUT_S).epoch)
            with contextlib.suppress(OSError):
                newest = max(newest, Registry(self._folder, self.generation).newest_epoch())
            self._client.begin(newest + 1)
            self._epoch = newest + 1
            return self._epoch
        return None

    def complete_snapshot(self) -> tuple[int, int] | None:
        """Return (epoch, step) of the committed snapshot if this node holds every chunk of it, else None."""
        if self._client is None or self._client.gone:
            return None
        with contextlib.suppress(FtError):
            return _complete(self._client.status(ANSWER_TIMEOUT_S))
        return None

    def committed(self) -> tuple[int, int] | None:
        """Return (epoch, step) of the newest snapshot that is committed according to this node's agent."""
        if self._client is None or self._client.gone:
            return None
        with contextlib.suppress(FtError):
            return self._client.status(ANSWER_TIMEOUT_S).committed
        return None

    def save(self, epoch: int) -> None:
        """Have the agent write the snapshot on which an epoch decided to disk; do nothing without an agent."""
        if self._client is not None and not self._client.gone:
            with contextlib.suppress(FtError):
                self._client.save(epoch)

    def decision(self, epoch: int) -> tuple[int, int] | str | None:
        """Return (epoch, step) of the snapshot on which `epoch` decided, once this agent holds every chunk of it.

        A string is the reason why there is none; None: not decided or not complete yet.
        """
        if self._client is None or self._client.gone:
            return "the agent has died"
        with contextlib.suppress(FtError, OSError):
            status = self._client.status(ANSWER_TIMEOUT_S)
            if status.epoch < epoch or status.mode != Mode.ACTIVE.value:
                return None
            return _complete(status) if status.committed else Registry(self._folder, self.generation).reason(epoch)
        return None

    def kill(self) -> None:
        """End this node's agent and its memory: the slot now belongs to another node."""
        if self._keeper is not None:
            self._keeper.terminate()
        self._forget()
        self._slot = None

    def discard(self, *, wait: bool = True) -> None:
        """End the slot's agent and the configuration of its layout, which is over; `wait` until it is dead."""
        keeper, self._keeper = self._keeper, None
        if keeper is not None:
            keeper.terminate()
        self.kill()
        with contextlib.suppress(OSError):
            self._template.unlink(missing_ok=True)
        if keeper is not None and not wait:
            keeper.close()
        elif keeper is not None:  # readable once the process has ended, even if its parent has not reaped it
            await_readable(keeper.fileno(), ANSWER_TIMEOUT_S)
            keeper.close()

    def close(self) -> None:
        """Disconnect; the agent ends with its lease."""
        self._forget()

    def _forget(self) -> None:
        self._disconnect()
        self._release()
        self._lost, self._gone_at = False, None

    def _disconnect(self) -> None:
        if self._client is not None:
            self._client.close()
        self._client, self.pid = None, None

    def _release(self) -> None:
        if self._keeper is not None:
            self._keeper.close()
        self._keeper = None


def _complete(status: Status) -> tuple[int, int] | None:
    """Return (epoch, step) of the committed snapshot if this agent holds every chunk of it."""
    complete = [(held.epoch, held.step) for held in status.held if held.phase == "committed"]
    return status.committed if status.committed in complete else None
