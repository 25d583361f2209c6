"""Wait, beside training, for the agent that takes the place of one that has died."""

import threading
import time

from keepwarm.ft.discovery.config import AgentConfig
from keepwarm.ft.errors import AgentError, FtError
from keepwarm.ft.worker.client import AgentClient, answers, ensure_agent

POLL_S = 0.1


class NextAgent:
    """The next agent of this rank's node. Not thread-safe."""

    def __init__(self, config: AgentConfig, secret: bytes, *, starts: bool) -> None:
        """Let `ready` start the agent if no keeper or supervisor does; one rank of a node should."""
        self._config, self._secret, self._starts = config, secret, starts
        self._thread: threading.Thread | None = None
        self._ready = False

    def ready(self) -> bool:
        """Return whether it answers with all of its memory. Never wait: files and the start of a process take long."""
        if not self._ready and (self._thread is None or not self._thread.is_alive()):
            self._thread = threading.Thread(target=self._await, name="next-agent", daemon=True)
            self._thread.start()
        return self._ready

    def _await(self) -> None:
        """Wait until it is ready. If it cannot be started, the rank says why at its next snapshot."""
        config = self._config
        try:
            self._answers()
            client = AgentClient(config.socket, run=config.run, secret=self._secret, role="onlooker")
            try:
                client.wait_until_grown(config.start_seconds)
                self._ready = True
            finally:
                client.close()
        except (FtError, OSError):
            time.sleep(POLL_S)

    def _answers(self) -> None:
        if self._starts:
            ensure_agent(self._config, secret=self._secret)
        end = time.monotonic() + self._config.start_seconds
        while not answers(self._config.socket):
            if time.monotonic() > end:
                raise AgentError(f"no agent answers at {self._config.socket}")
            time.sleep(POLL_S)
