"""Wait, beside training, for the agent that takes the place of one that has died."""

import threading

from keepwarm.ft.discovery.config import AgentConfig
from keepwarm.ft.errors import FtError
from keepwarm.ft.worker.client import answers, ensure_agent


class NextAgent:
    """The next agent of this rank's node. Not thread-safe."""

    def __init__(self, config: AgentConfig, *, starts: bool) -> None:
        """Let `answers` start the agent if no keeper or supervisor does; one rank of a node should."""
        self._config, self._starts = config, starts
        self._thread: threading.Thread | None = None

    def answers(self) -> bool:
        """Return whether it can be attached to. Never wait: files and the start of a process may take long."""
        if answers(self._config.socket):
            return True
        if self._starts and (self._thread is None or not self._thread.is_alive()):
            self._thread = threading.Thread(target=self._start, name="next-agent", daemon=True)
            self._thread.start()
        return False

    def _start(self) -> None:
        try:
            ensure_agent(self._config)
        except (FtError, OSError):
            return  # the rank tries again at its next snapshot, and says then why it fails
