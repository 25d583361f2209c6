"""The snapshot agent of a node's slot, as its supervisor sees it: started before workers need it, told of epochs."""

import contextlib
import os
import select
import signal
import time
from pathlib import Path

import msgspec

from keepwarm.ft.discovery import config as agent_config
from keepwarm.ft.discovery.config import AgentConfig, runtime_folder
from keepwarm.ft.discovery.registry import AGENTS_FOLDER, TEMPLATE_FILE, Registry
from keepwarm.ft.discovery.status import Status
from keepwarm.ft.errors import FtError
from keepwarm.ft.protocol.state import Mode
from keepwarm.ft.transport.auth import SECRET, load_secret, run_identity
from keepwarm.ft.worker.client import AgentClient, ensure_agent, start_agent

ANSWER_TIMEOUT_S = 5.0
LEAVING = 0.5
"""Seconds after which an agent that left by itself has cleaned up."""


class SnapshotAgent:
    """One slot's agent on this node. Not thread-safe."""

    def __init__(self, folder: Path, host: str) -> None:
        self._folder, self._host = folder, host
        self._client: AgentClient | None = None
        self._slot: int | None = None
        self.pid: int | None = None
        self._gone_at: float | None = None

    def take(self, slot: int) -> None:
        """The slot that this node has."""
        self._slot = slot

    def ensure(self) -> None:
        """Start the slot's agent unless it runs, and connect; nothing before workers have said how large it is.

        Raises:
            MemoryTooSmall, AgentError: this node cannot take the slot.
        """
        if (config := self._config()) is not None:
            ensure_agent(config)
            self.look()

    def restart(self) -> None:
        """Start the slot's agent anew without waiting for it: its workers may need it to come as far as doing so."""
        if (config := self._config()) is not None:
            start_agent(config)

    def _config(self) -> AgentConfig | None:
        """What the slot's agent is told; None before workers have said how large it is."""
        assert self._slot is not None
        template = self._folder / AGENTS_FOLDER / TEMPLATE_FILE
        if not template.is_file():
            return None
        config = msgspec.json.decode(template.read_bytes(), type=AgentConfig)
        folder = str(runtime_folder(config.run, self._slot))
        return msgspec.structs.replace(config, slot=self._slot, host=self._host, folder=folder)

    def look(self) -> bool:
        """Connect to the agent when this is not the case, as workers may start one too; False when one has died."""
        if self._client is not None and self._client.gone:
            self._forget()
            self._gone_at = time.monotonic()
        died = False
        if self._gone_at is not None and time.monotonic() - self._gone_at > LEAVING and self._slot is not None:
            # One that leaves because the job is done takes its address away.
            died, self._gone_at = Registry(self._folder).endpoint(self._slot) is not None, None
        if self._client is None and self._slot is not None and (self._folder / SECRET).exists():
            with contextlib.suppress(FtError, OSError):
                self._connect(self._slot)
        return not died

    def _connect(self, slot: int) -> None:
        secret = load_secret(self._folder / SECRET)
        run = run_identity(secret)
        socket = runtime_folder(run, slot) / agent_config.SOCKET
        if not socket.exists():
            return
        client = AgentClient(socket, run=run, secret=secret, worker=slot, role="supervisor", deadline=ANSWER_TIMEOUT_S)
        try:
            self.pid = client.status(ANSWER_TIMEOUT_S).pid
        except FtError:
            client.close()
            raise
        self._client = client

    def begin_epoch(self) -> int | None:
        """Have all agents decide on the next restore plan now; its epoch, or None when there are no agents yet."""
        if self._client is None or self._client.gone:
            return None
        epoch = Registry(self._folder).newest_epoch() + 1
        with contextlib.suppress(FtError):
            self._client.begin(epoch)
            return epoch
        return None

    def whole(self) -> tuple[int, int] | None:
        """(epoch, step) of the committed snapshot of which this node holds every chunk; None while some are missing."""
        if self._client is None or self._client.gone:
            return None
        with contextlib.suppress(FtError):
            return _whole(self._client.status(ANSWER_TIMEOUT_S))
        return None

    def save(self, epoch: int) -> None:
        """Have the agent write to disk what an epoch restores; nothing when there is none."""
        if self._client is not None and not self._client.gone:
            with contextlib.suppress(FtError):
                self._client.save(epoch)

    def decided(self, epoch: int) -> tuple[int, int] | str | None:
        """(epoch, step) that an epoch restores, once this agent holds every chunk of it; why there is nothing."""
        if self._client is None or self._client.gone:
            return "the agent has died"
        with contextlib.suppress(FtError):
            status = self._client.status(ANSWER_TIMEOUT_S)
            if status.epoch < epoch or status.mode != Mode.ACTIVE.value:
                return None
            return _whole(status) if status.committed else Registry(self._folder).reason(epoch)
        return None

    def kill(self) -> None:
        """End this node's agent and its memory: it is not the slot's agent any more."""
        if self._client is not None and not self._client.gone and self.pid is not None:
            # The link is open, so the pid is still the agent's.
            os.kill(self.pid, signal.SIGTERM)
        self._forget()
        self._slot = None

    def discard(self) -> None:
        """End the slot's agent, and forget what one was told: the next workers say it anew. Waits until it is dead."""
        with contextlib.ExitStack() as stack:
            process = None
            if self.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    process = stack.enter_context(os.fdopen(os.pidfd_open(self.pid)))
            self.kill()
            (self._folder / AGENTS_FOLDER / TEMPLATE_FILE).unlink(missing_ok=True)
            if process is not None:  # it can be read once the process has ended, whether its parent cares or not
                select.select([process], [], [], ANSWER_TIMEOUT_S)

    def close(self) -> None:
        """Leave the agent to its lease."""
        self._forget()

    def _forget(self) -> None:
        if self._client is not None:
            self._client.close()
        self._client, self.pid = None, None


def _whole(status: Status) -> tuple[int, int] | None:
    """(epoch, step) of the committed snapshot, when this agent holds every chunk of it."""
    whole = [(held.epoch, held.step) for held in status.held if held.phase == "committed"]
    return status.committed if status.committed in whole else None
