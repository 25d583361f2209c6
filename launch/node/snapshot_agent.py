"""Supervise the snapshot agent of a node's slot: start it before workers need it, and begin epochs."""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from keepwarm.files import await_readable, within
from keepwarm.ft.discovery import config as agent_config
from keepwarm.ft.discovery.config import AgentConfig, runtime_folder
from keepwarm.ft.discovery.registry import TEMPLATE_FILE, Registry
from keepwarm.ft.discovery.status import Status
from keepwarm.ft.errors import AgentError, FtError
from keepwarm.ft.memory.shared_memory import Holder, started_at
from keepwarm.ft.protocol.state import Mode
from keepwarm.ft.transport.auth import run_identity
from keepwarm.ft.worker.client import AgentClient, ensure_agent, start_agent

ANSWER_TIMEOUT_S = 5.0
FOLDER_PATIENCE_S = 2.0
"""How long this node waits for the run folder where it can go on without it."""
STORAGE_TIMEOUT_S = 120.0
"""How long this node waits for storage that it needs to start an agent."""
STORAGE_POLL_INTERVAL_S = 0.5
CLEANUP_S = 0.5
"""After this time an agent that ended by itself has cleaned up."""


class SnapshotAgent:
    """One slot's agent on this node. Not thread-safe."""

    def __init__(
        self, folder: Path, host: str, secret: bytes, others: Callable[[], bytes] = lambda: b"", generation: int = 0
    ) -> None:  # fmt: skip
        """Create the link to an agent of a run's layout.

        Args:
            folder: of the run.
            host: address of this node.
            secret: of the run.
            others: returns the template that another node knows, if any.
            generation: number of the layout, from 0.
        """
        self._host, self._secret, self._others = host, secret, others
        self.generation, self._registry = generation, Registry(folder, generation)
        self.template = b""
        """From what agents of this layout are started, as far as this node knows."""
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
                    ensure_agent(config, secret=self._secret)
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
                start_agent(config, self._secret)
        except OSError:
            self._start_again = True

    def _config(self) -> AgentConfig | None:
        """Return the configuration of the slot's agent; None before workers have reported its size.

        Raises OSError, and `AgentError` if the slot is not part of the layout that workers reported.
        """
        assert self._slot is not None
        template = self._registry.folder / TEMPLATE_FILE
        content = self._read_template(template)
        if not content:
            return None
        try:
            config = msgspec.json.decode(content, type=AgentConfig)
            if config.generation != self.generation:
                return None  # another node has not heard of this layout
            folder = str(runtime_folder(config.run, self._slot, self.generation))
            return msgspec.structs.replace(config, slot=self._slot, host=self._host, folder=folder)
        except ValueError as error:
            raise AgentError(
                f"{template}: describes the agents of another layout, or is damaged; it has no agent for slot "
                f"{self._slot}: {error}"
            ) from error

    def _read_template(self, path: Path) -> bytes:
        """Return the content of the template: what is known of it, if the folder has none or does not answer."""

        def read() -> bytes:
            try:
                return path.read_bytes()
            except FileNotFoundError:
                return b""

        found = within(read, FOLDER_PATIENCE_S)
        if found is None and not self.template:
            found = self._others()
        self.template = found or self.template
        return self.template

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
        """Return whether the folder has an agent of the slot, or does not answer."""
        found = within(lambda: self._registry.endpoint(slot) is not None, FOLDER_PATIENCE_S)
        return found is None or found

    def _connect(self, slot: int) -> None:
        secret, run = self._secret, run_identity(self._secret)
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
        with contextlib.suppress(OSError):  # on this node
            self.template = (socket.parent / agent_config.CONFIG).read_bytes()

    def begin_epoch(self) -> int | None:
        """Have all agents decide now what to restore; return the epoch of that decision, None if no agent runs yet."""
        if self._client is None or self._client.gone:
            return None
        with contextlib.suppress(FtError):
            newest = max(self._epoch, self._client.status(ANSWER_TIMEOUT_S).epoch)
            newest = max(newest, within(self._registry.newest_epoch, FOLDER_PATIENCE_S) or 0)
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
            if status.committed:
                return _complete(status)
            return within(lambda: self._registry.reason(epoch), FOLDER_PATIENCE_S) or "no reason is known"
        return None

    def kill(self) -> None:
        """End this node's agent and its memory: the slot now belongs to another node."""
        if self._keeper is not None:
            self._keeper.terminate()
        self._forget()
        self._slot, self.template = None, b""

    def discard(self, *, wait: bool = True) -> None:
        """End the slot's agent and the configuration of its layout, which is over; `wait` until it is dead."""
        keeper, self._keeper = self._keeper, None
        if keeper is not None:
            keeper.terminate()
        self.kill()
        within(lambda: (self._registry.folder / TEMPLATE_FILE).unlink(missing_ok=True), FOLDER_PATIENCE_S)
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
